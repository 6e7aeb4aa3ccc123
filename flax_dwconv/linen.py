"""The layers for `flax.linen`, which `flax_dwconv` exports."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, overload

import flax.errors
import flax.linen as nn
import jax
from flax.core import meta

from flax_dwconv import _config, _geometry, _layer, _sow


def _explained(call: Callable[..., Any]) -> Callable[..., Any]:
    """Adds to Flax's error about a layer that belongs to no model the lines that call it."""

    @functools.wraps(call)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(self, *args, **kwargs)
        except flax.errors.CallCompactUnboundModuleError as error:
            if self.scope is None:
                error.args = (
                    f"{error} Inside a model, `layer.copy(name={self.name!r})(x)` makes the layer "
                    "a part of it and calls it (`clone` does not); outside, "
                    "`layer.apply(variables, x)`.",
                )
            raise

    return wrapper


class _Module(nn.Module):
    """What all layers here inherit, together with a class of `_layer`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = _explained(cls.__call__)

    @nn.compact
    def __call__(self: Any, x: jax.Array) -> jax.Array:
        """Applies the layer; shapes as in the class's description."""
        return _run(self, x)

    @classmethod
    def from_config(
        cls: Any, config: Mapping[str, Any], *, custom_objects: Mapping[str, Any] | None = None
    ) -> Self:
        """Returns the layer that a config stands for: of `get_config`, or of Keras 2 or 3.

        Args:
          config: the settings, or a dict with "class_name" and "config".
          custom_objects: {name: object or None}, what names stand for that are not Keras's. An
            initializer, regularizer or constraint that is neither is None, and a warning says so.

        Raises:
          ValueError: for an unknown key, a value that has no meaning, or an activation that is
            neither Keras's nor in `custom_objects`.
          TypeError: for a value of a wrong type.

        Example:
          >>> import flax_dwconv
          >>> layer = flax_dwconv.DepthwiseConv2D(3, activation="relu", name="dw")
          >>> flax_dwconv.DepthwiseConv2D.from_config(layer.get_config()) == layer
          True
        """
        customs = _config.Customs(custom_objects)
        layer = cls(**cls._settings_from_config(config, customs))
        customs.warn()
        return layer


# When a class is complete, for the error is raised by what Flax then wraps around its methods.
_Module.__call__ = _explained(_Module.__call__)


def _run(layer: Any, x: jax.Array, **streaming: Any) -> jax.Array:
    """Makes the parameters, applies the layer and sows its penalties."""
    channels = None
    name = next(iter(layer.prefixes))
    if layer.has_variable("params", name):
        kernel = meta.unbox(layer.get_variable("params", name))
        # Flax itself reports a kernel of another rank.
        channels = kernel.shape[-2] if kernel.ndim == layer.rank + 2 else None
    x = layer._check_input(x, channels)
    parameters = {
        name: layer.param(name, parameter.initializer, parameter.shape, layer.param_dtype)
        for name, parameter in layer._parameters(layer._channels(x.shape)).items()
    }
    y = layer._forward(x, parameters, **streaming)
    _sow.sow(layer, y, parameters)
    return y


class DepthwiseConv1D(_layer.Depthwise1D, _Module):
    """Keras's `DepthwiseConv1D` as a linen module, which can also run causally, piece by piece.

    The arguments are those of `DepthwiseConv2D`, described there, for a window of one dimension;
    `padding` may also be "causal". Then the layer can be called with the inputs that came before,

        layer.apply(variables, x)         -> y
        layer.apply(variables, x, state)  -> (y, state)

    and with `segment_ids` for packed documents, as `causal_conv1d` describes. `initial_state`
    returns the state before a sequence.

    Input shape:
      `(n, l, c)`, or `(n, c, l)` with "channels_first". In both data formats a state is
      `(n, (k - 1) * dilation_rate, c)`.

    Output shape:
      `(n, lo, c*m)`, or `(n, c*m, lo)`; filter `m` of channel `c` is at `c*M + m`.

    Parameters:
      "kernel" of shape `(k, c, m)`, and "bias" of shape `(c*m,)`.

    Raises:
      ValueError: as `DepthwiseConv2D`; and for a state of another shape, with another padding than
        "causal", with strides, or together with `segment_ids`.
      TypeError: as `DepthwiseConv2D`; and for a state or `segment_ids` of another dtype.

    Example:
      Eight positions at once, then one more:

      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> layer = flax_dwconv.DepthwiseConv1D(4, padding="causal", activation="silu")
      >>> x = jnp.ones((2, 8, 16))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, state = layer.apply(variables, x, layer.initial_state(2, channels=16))
      >>> step, state = layer.apply(variables, x[:, :1], state)
      >>> y.shape, step.shape, state.shape
      ((2, 8, 16), (2, 1, 16), (2, 3, 16))

    Source: `keras.layers.DepthwiseConv1D`.
    """

    @overload
    def __call__(
        self, x: jax.Array, state: None = None, *, segment_ids: jax.Array | None = None
    ) -> jax.Array: ...
    @overload
    def __call__(self, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]: ...
    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> Any:
        """Applies the layer; shapes as in the class's description.

        Args:
          x: the inputs.
          state: the inputs before them.
          segment_ids: integers `(n, l)`, the document of each position.

        Returns:
          `y`, or `(y, state)` if a state was given.
        """
        y = _run(self, x, state=state, segment_ids=segment_ids)
        return y if state is None else (y, self._next_state(x, state))


class DepthwiseConv2D(_layer.Depthwise, _Module):
    """Keras's `DepthwiseConv2D` as a linen module: `depthwise_conv2d`, plus bias, then activation.

    The arguments are Keras's, in Keras's order and with its defaults. Then come Flax's `dtype`,
    `param_dtype` and `precision`, and `method`, which is this package's. An identifier is a name
    ("l2"), a Keras config dict, a callable, an object of this package, or None.

    Penalties of the regularizers are sown in the collection "losses", as float32 scalars under the
    names "activity_penalty" (of the output after the activation, divided by the batch size),
    "kernel_penalty" and "bias_penalty", whenever `apply` has it mutable; `init` sows none.
    `total_loss` sums them. A layer that is called twice adds up its activities and counts its
    weights once. Where `nn.scan` or `nn.vmap` would count the same weights several times, or would
    lose the penalties, an error says what to write. Constraints are stored; `collect_constraints`
    finds them, and an optimizer with `constrain` applies them.

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
      method: "auto", "lax" or "taps"; see `depthwise_conv2d`.

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
        rank is not 4, whose channels do not fit the parameters, or that is smaller than the kernel;
        and for penalties that a transformation loses or would count several times.
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
      ((8, 32, 32, 8), ['kernel_penalty'])

    Source: `tf.keras.layers.DepthwiseConv2D`.
    """

    rank: ClassVar[int] = 2
    strides: _geometry.Ints = (1, 1)
    dilation_rate: _geometry.Ints = (1, 1)


class DepthwiseConv3D(_layer.Depthwise, _Module):
    """The depthwise convolution of volumes or videos as a linen module. Keras has no such layer.

    The arguments are those of `DepthwiseConv2D`, described there, for a window of three dimensions.

    Input shape:
      `(n, d, h, w, c)`, or `(n, c, d, h, w)` with "channels_first".

    Output shape:
      `(n, do, ho, wo, c*m)`, or `(n, c*m, do, ho, wo)`; filter `m` of channel `c` is at `c*M + m`.

    Parameters:
      "kernel" of shape `(kd, kh, kw, c, m)`, and "bias" of shape `(c*m,)`.

    Raises:
      ValueError: as `DepthwiseConv2D`.
      TypeError: as `DepthwiseConv2D`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> layer = flax_dwconv.DepthwiseConv3D(3, strides=(1, 2, 2), padding="same")
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 16, 16, 4)))
      >>> y.shape, variables["params"]["kernel"].shape
      ((1, 8, 8, 8, 4), (3, 3, 3, 4, 1))

    Source: the formula of `depthwise_conv`.
    """

    rank: ClassVar[int] = 3


class SeparableConv1D(_layer.Separable, _Module):
    """Keras's `SeparableConv1D` as a linen module: `SeparableConv2D` for sequences.

    The arguments are those of `SeparableConv2D`, described there, for a window of one dimension;
    `padding` may also be "causal".

    Input shape:
      `(n, l, c)`, or `(n, c, l)` with "channels_first".

    Output shape:
      `(n, lo, filters)`, or `(n, filters, lo)`.

    Parameters:
      "depthwise_kernel" `(k, c, m)`, "pointwise_kernel" `(1, c*m, filters)`, "bias" `(filters,)`.

    Raises:
      ValueError: as `SeparableConv2D`.
      TypeError: as `SeparableConv2D`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> layer = flax_dwconv.SeparableConv1D(32, 5, padding="causal", activation="relu")
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((8, 100, 16)))
      >>> jax.tree.map(jnp.shape, variables["params"])
      {'bias': (32,), 'depthwise_kernel': (5, 16, 1), 'pointwise_kernel': (1, 16, 32)}

    Source: `tf.keras.layers.SeparableConv1D`.
    """

    rank: ClassVar[int] = 1


class SeparableConv2D(_layer.Separable, _Module):
    """Keras's `SeparableConv2D` as a linen module: depthwise, then pointwise, bias, activation.

    A depthwise convolution, `depthwise_conv2d`, is followed by a matrix product over the channels.
    The arguments are Keras's, in Keras's order and with its defaults, and then those that all
    layers here add. They mean what they mean in `DepthwiseConv2D`. Penalties are sown as there, and
    named "activity_penalty", "depthwise_kernel_penalty", "pointwise_kernel_penalty" and
    "bias_penalty".

    Attributes:
      filters: the number of output channels.
      kernel_size: of the depthwise half.
      strides: of the depthwise half. Strides > 1 exclude dilation rates > 1.
      padding: of the depthwise half.
      data_format: "channels_last", "channels_first", or None: as Keras's own config file says.
      dilation_rate: of the depthwise half.
      depth_multiplier: `m`, the number of depthwise filters for each channel.
      activation: applied to the result; None is linear.
      use_bias: whether to add a bias, of the result.
      depthwise_initializer: None is "glorot_uniform".
      pointwise_initializer: None is "glorot_uniform".
      bias_initializer: None is "zeros".
      depthwise_regularizer: penalty of the depthwise kernel.
      pointwise_regularizer: penalty of the pointwise kernel.
      bias_regularizer: penalty of the bias.
      activity_regularizer: penalty of the output.
      depthwise_constraint: of the depthwise kernel.
      pointwise_constraint: of the pointwise kernel.
      bias_constraint: of the bias.
      dtype: dtype of the computation; None promotes the dtypes of the input and the parameters.
      param_dtype: dtype of the parameters.
      precision: of both halves, for GPU and TPU.
      method: of the depthwise half.

    Input shape:
      `(n, h, w, c)`, or `(n, c, h, w)` with "channels_first".

    Output shape:
      `(n, ho, wo, filters)`, or `(n, filters, ho, wo)`.

    Parameters:
      "depthwise_kernel" `(kh, kw, c, m)`, "pointwise_kernel" `(1, 1, c*m, filters)`, "bias"
      `(filters,)`.

    Raises:
      ValueError: as `DepthwiseConv2D`.
      TypeError: as `DepthwiseConv2D`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> layer = flax_dwconv.SeparableConv2D(64, 3, padding="same", depth_multiplier=2)
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((8, 32, 32, 16)))
      >>> y.shape, variables["params"]["pointwise_kernel"].shape
      ((8, 32, 32, 64), (1, 1, 32, 64))

    Source: `tf.keras.layers.SeparableConv2D`; F. Chollet, Xception (2017).
    """

    rank: ClassVar[int] = 2
