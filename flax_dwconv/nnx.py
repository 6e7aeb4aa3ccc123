"""The layer for `flax.nnx`."""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta

from flax_dwconv import _geometry, _layer


class Loss(nnx.Variable):
    """A penalty of the last call: a float32 scalar, neither a parameter nor state of an RNG.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_dwconv
      >>> layer = flax_dwconv.nnx.DepthwiseConv2D(
      ...     4, 3, depthwise_initializer="ones", depthwise_regularizer="l2", rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((1, 8, 8, 4)))
      >>> print(flax_dwconv.total_loss(nnx.state(layer, flax_dwconv.nnx.Loss)))
      0.36
    """


class _Signature:
    """The constructor's signature, not typed a second time; an instance has its own, of a call."""

    def __get__(self, instance, owner):
        if instance is not None:
            raise AttributeError("__signature__")
        first = inspect.Parameter(
            "in_features", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=int
        )
        last = inspect.Parameter("rngs", inspect.Parameter.KEYWORD_ONLY, annotation=nnx.Rngs)
        settings = inspect.signature(_layer.Settings).parameters.values()
        return inspect.Signature([first, *settings, last])


class DepthwiseConv2D(nnx.Module, _layer.Settings):
    """Keras's `DepthwiseConv2D` as an nnx module: the twin of `flax_dwconv.DepthwiseConv2D`.

    The arguments are that layer's, described there, between two of nnx's own. So are the outputs,
    the gradients and the penalties, to the last bit.

    Each penalty of a regularizer that is set is one variable of the type `Loss`, in the dict
    `losses` under the name "activity", "kernel" or "bias". It is there, as 0, from the construction
    on, so that the structure of the graph never changes, and every call replaces it:

        total_loss(nnx.state(model, Loss))

    sums those of a model. Under `nnx.capture(model, Loss)` a call returns the penalties instead,
    and a layer that is called twice adds its activities, as in linen. A layer with penalties is
    changed by a call, so that it has to be an argument of `nnx.jit` and the like, not a part of the
    function's closure. `with_penalties` is pure.

    Args:
      in_features: `c`, the number of input channels.
      rngs: its stream "params" initializes the parameters.

    Attributes:
      kernel: `nnx.Param` of shape `(kh, kw, c, m)`, with the logical axes ("height", "width",
        "channels", "multiplier"), for an initializer wrapped with `nnx.with_partitioning`.
      bias: `nnx.Param` of shape `(c*m,)`, with the logical axes ("channels",), or None.
      losses: name -> `Loss`.

    Raises:
      ValueError: when constructed, for a value that has no meaning; when called, for an input whose
        rank is not 4, whose channels do not fit the parameters, or smaller than the kernel.
      TypeError: for a value of a wrong type.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import flax_dwconv
      >>> model = flax_dwconv.nnx.DepthwiseConv2D(
      ...     4, 3, depthwise_regularizer="l2", depthwise_constraint="max_norm", rngs=nnx.Rngs(0))
      >>> tx = optax.chain(
      ...     optax.sgd(0.1), flax_dwconv.constrain(flax_dwconv.collect_constraints(model)))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, x):
      ...     def loss(model):
      ...         y = model(x)
      ...         penalties = nnx.state(model, flax_dwconv.nnx.Loss)
      ...         return jnp.mean(y**2) + flax_dwconv.total_loss(penalties)
      ...     value, grads = nnx.value_and_grad(loss)(model)
      ...     optimizer.update(model, grads)
      ...     return value
      >>> train_step(model, optimizer, jnp.ones((8, 32, 32, 4))).shape
      ()

    Source: `tf.keras.layers.DepthwiseConv2D`.
    """

    __signature__ = _Signature()  # pyrefly: ignore[bad-override]
    kernel: nnx.Param

    # A module is one object with arrays in it, however alike the settings of two may be.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, in_features: int, *args: Any, rngs: nnx.Rngs, **kwargs: Any):
        for name, value in vars(_layer.Settings(*args, **kwargs)).items():
            setattr(self, name, value)
        self.in_features = _geometry.positive_int(in_features, "in_features")
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"`rngs` must be an `nnx.Rngs`, got {type(rngs).__name__}.")
        self.bias = nnx.data(None)
        for name, parameter in self._parameters(self.in_features).items():
            value = parameter.initializer(rngs.params(), parameter.shape, self.param_dtype)
            boxed = isinstance(value, meta.Partitioned)  # by linen's `with_partitioning`
            setattr(self, name, nnx.Param(**value.to_nnx_metadata() if boxed else {"value": value}))
        self.losses = nnx.data({name: Loss(jnp.float32(0)) for name in self._penalty_names})

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer to images, and keeps the penalties; shapes as in the linen layer."""
        y, penalties = self._apply(x)
        for name, value in penalties.items():
            if not self._captured(name, value):
                self.losses[name].set_value(value)
        return y

    def with_penalties(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the result and the penalties by name, and changes nothing.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> import flax_dwconv
          >>> layer = flax_dwconv.nnx.DepthwiseConv2D(
          ...     1, 3, depthwise_initializer="ones", bias_regularizer="l1", rngs=nnx.Rngs(0))
          >>> y, penalties = layer.with_penalties(jnp.ones((1, 3, 3, 1)))
          >>> print(y.item(), penalties)
          9.0 {'bias': Array(0., dtype=float32)}
        """
        return self._apply(x)

    def _apply(self, x):
        x = self._check_input(x, self.kernel.shape[2])
        parameters = {"kernel": self.kernel[...]}
        if self.bias is not None:
            parameters["bias"] = self.bias[...]
        y = self._forward(x, **parameters)
        return y, self._penalties(y, **parameters)

    def _captured(self, name: str, value: jax.Array) -> bool:
        """Whether an `nnx.capture` takes the penalty. Outside of one, `sow` is deprecated."""
        return hasattr(self, "__captures__") and self.sow(
            Loss,
            name,
            value,
            init_fn=lambda: jnp.float32(0),
            reduce_fn=_layer.REDUCTIONS[name],
        )

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, in_features: int, rngs: nnx.Rngs
    ) -> "DepthwiseConv2D":
        """Returns the layer that a config stands for: of `get_config`, or of Keras 2 or 3.

        Args:
          config: the settings, or a dict with "class_name" and "config". A name is dropped.
          in_features: the number of input channels.
          rngs: initializes the parameters.

        Raises:
          ValueError: for an unknown key or a value that has no meaning.
          TypeError: for a value of a wrong type.

        Example:
          >>> from flax import nnx
          >>> import flax_dwconv
          >>> layer = flax_dwconv.DepthwiseConv2D(3, activation="relu")
          >>> twin = flax_dwconv.nnx.DepthwiseConv2D.from_config(
          ...     layer.get_config(), in_features=4, rngs=nnx.Rngs(0))
          >>> twin.get_config() == layer.get_config()
          True
        """
        settings = cls._settings_from_config(config)
        settings.pop("name", None)
        return cls(in_features, **settings, rngs=rngs)
