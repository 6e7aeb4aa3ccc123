"""The layer for `flax.linen`."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from flax_dwconv import _layer


class DepthwiseConv2D(_layer.Settings, nn.Module):
    """Keras's `DepthwiseConv2D` as a linen module: `depthwise_conv2d`, plus bias, then activation.

    Every argument is Keras's, in Keras's order and with its defaults; the last four are Flax's. An
    identifier is a name ("l2"), a Keras config dict, a callable, an object of this package, or
    None.

    Penalties of the regularizers are sown in the collection "losses", as float32 scalars under the
    names "activity" (of the output after the activation, divided by the batch size), "kernel" and
    "bias", whenever `apply` has it mutable; `init` sows none. `total_loss` sums them. Constraints
    are stored; `collect_constraints` finds them, and an optimizer with `constrain` applies them.

    Attributes:
      kernel_size: height and width of the filters, one int > 0 or two.
      strides: one int > 0 or two. Strides > 1 exclude dilation rates > 1.
      padding: "valid", "same", an int, or `((top, bottom), (left, right))`; see `depthwise_conv2d`.
      depth_multiplier: `m`, the number of filters for each channel.
      data_format: "channels_last", "channels_first", or None: as Keras's own config file says
        (`keras.json` in `KERAS_HOME`, else in `~/.keras`), else "channels_last".
      dilation_rate: one int > 0 or two.
      activation: applied to the result; None is linear. See `flax_dwconv.activations`.
      use_bias: whether to add a bias.
      depthwise_initializer: of the kernel; None is "glorot_uniform". See
        `flax_dwconv.initializers`.
      bias_initializer: None is "zeros".
      depthwise_regularizer: penalty of the kernel. See `flax_dwconv.regularizers`.
      bias_regularizer: penalty of the bias.
      activity_regularizer: penalty of the output.
      depthwise_constraint: of the kernel. See `flax_dwconv.constraints`.
      bias_constraint: of the bias.
      dtype: dtype of the computation; None promotes the dtypes of the input and the parameters.
      param_dtype: dtype of the parameters.
      precision: `jax.lax.Precision`, its name, or a pair of them, for GPU and TPU.
      method: "auto" or "lax"; see `depthwise_conv2d`.

    Input shape:
      `(n, h, w, c)`, or `(n, c, h, w)` with "channels_first". Integers are cast to the dtype of the
      computation.

    Output shape:
      `(n, ho, wo, c*m)`, or `(n, c*m, ho, wo)`; filter `m` of channel `c` is at `c*M + m`.

    Parameters:
      "kernel" of shape `(kh, kw, c, m)`, with the logical axes ("height", "width", "channels",
      "multiplier"), and "bias" of shape `(c*m,)`, with ("channels",): one block of `m` for each
      channel, so that a mesh axis that splits the channels splits both alike. An initializer
      wrapped with `nn.with_partitioning` or `nn.with_logical_partitioning` says so.

    Raises:
      ValueError: when constructed, for a value that has no meaning; when called, for an input whose
        rank is not 4, whose channels do not fit the parameters, or that is smaller than the kernel.
      TypeError: for a value of a wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> layer = flax_dwconv.DepthwiseConv2D(
      ...     3, padding="same", depth_multiplier=2, activation="relu", depthwise_regularizer="l2")
      >>> x = jnp.ones((8, 32, 32, 4))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'bias': (8,), 'kernel': (3, 3, 4, 2)}
      >>> y, state = jax.jit(lambda v, x: layer.apply(v, x, mutable=["losses"]))(variables, x)
      >>> y.shape, list(state["losses"])
      ((8, 32, 32, 8), ['kernel'])

    Source: `tf.keras.layers.DepthwiseConv2D`.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to images; shapes as in the class's description."""
        channels = None
        if self.has_variable("params", "kernel"):
            kernel = meta.unbox(self.get_variable("params", "kernel"))
            channels = kernel.shape[2] if kernel.ndim == 4 else None  # else Flax says so
        x = self._check_input(x, channels)
        parameters = {
            name: self.param(name, parameter.initializer, parameter.shape, self.param_dtype)
            for name, parameter in self._parameters(self._channels(x.shape)).items()
        }
        y = self._forward(x, **parameters)

        if self.is_mutable_collection("losses") and not self.is_initializing():
            for name, value in self._penalties(y, **parameters).items():
                self.sow(
                    "losses",
                    name,
                    value,
                    init_fn=lambda: jnp.float32(0),
                    reduce_fn=_layer.REDUCTIONS[name],
                )
        return y

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DepthwiseConv2D":
        """Returns the layer that a config stands for: of `get_config`, or of Keras 2 or 3.

        Args:
          config: the settings, or a dict with "class_name" and "config".

        Raises:
          ValueError: for an unknown key or a value that has no meaning.
          TypeError: for a value of a wrong type.

        Example:
          >>> import flax_dwconv
          >>> layer = flax_dwconv.DepthwiseConv2D(3, activation="relu", name="dw")
          >>> flax_dwconv.DepthwiseConv2D.from_config(layer.get_config()) == layer
          True
        """
        return cls(**cls._settings_from_config(config))
