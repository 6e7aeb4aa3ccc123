"""The layers for `flax.nnx`: twins of those for `flax.linen`, with the same arguments and numbers.

They are `DepthwiseConv1D`, `DepthwiseConv2D`, `DepthwiseConv3D`, `SeparableConv1D` and
`SeparableConv2D`. Before `kernel_size` they take `in_features`, the number of input channels, and
everything after it by name; `rngs` initializes the parameters. `Loss` is the type of the variables
that keep the penalties of regularizers.

Example:
  >>> import jax.numpy as jnp
  >>> from flax import nnx
  >>> import flax_dwconv
  >>> layer = flax_dwconv.nnx.DepthwiseConv2D(
  ...     16, 3, padding="same", activation="relu", depthwise_regularizer="l2", rngs=nnx.Rngs(0))
  >>> layer(jnp.ones((8, 32, 32, 16))).shape, layer.kernel.shape
  ((8, 32, 32, 16), (3, 3, 16, 1))
  >>> flax_dwconv.total_loss(layer).dtype
  dtype('float32')
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Self, overload

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax.core import meta
from flax.typing import Dtype
from jax.typing import ArrayLike

from flax_dwconv import _config, _geometry, _layer
from flax_dwconv._vocabulary import Identifier


@nnx.register_variable_name("losses", overwrite=True)  # what linen calls them, for `nnx.bridge`
class Loss(nnx.Intermediate):
    """A penalty of the last call: a float32 scalar, neither a parameter nor state of an RNG.

    It says something about a call, so that a checkpoint need not have it. Without it, what was
    saved can be read whether or not the layers have regularizers:

        nnx.state(model, nnx.Not(Loss))      what to save
        nnx.update(model, restored)          what to do with it

    `nnx.pop(model, Loss)` takes the penalties out of a model, for `nnx.tabulate` for instance,
    whose "Total Parameters" adds up variables of every type. The next call makes them anew.

    `nnx.bridge` keeps the penalties of linen layers in variables of this type.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_dwconv
      >>> layer = flax_dwconv.nnx.DepthwiseConv2D(
      ...     4, 3, depthwise_initializer="ones", depthwise_regularizer="l2", rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((1, 8, 8, 4)))
      >>> print(flax_dwconv.total_loss(nnx.pop(layer, flax_dwconv.nnx.Loss)), layer.losses)
      0.36 {}
    """


# What makes `sow` do nothing outside of an `nnx.capture`, where it is deprecated. Flax 0.12.12 has
# this argument. Flax 0.12.8 has none, and nothing public that tells whether a capture runs.
_OR_NOTHING = (
    {"capture_noop": True} if "capture_noop" in inspect.signature(nnx.Module.sow).parameters else {}
)


class _Signature:
    """`inspect.signature` of a class: that of its constructor, which nnx's metaclass hides."""

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        if instance is not None:  # which has a signature of its own, of a call
            raise AttributeError("__signature__")
        _, *parameters = inspect.signature(owner.__init__).parameters.values()
        return inspect.Signature(parameters)


class _Module(nnx.Module):
    """What all layers here inherit, together with a class of `_layer`."""

    __signature__ = _Signature()  # pyrefly: ignore[bad-override]

    # A module is one object with arrays in it, however alike the settings of two may be.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def _construct(self: Any, arguments: Mapping[str, Any]) -> None:
        """Checks and stores the arguments of a constructor, and makes the variables."""
        # Checked first: nnx takes an attribute that ever was an array for one of its variables.
        for name, value in self._checked(arguments).items():
            setattr(self, name, value)
        self.in_features = _geometry.positive_int(arguments["in_features"], "in_features")
        rngs = arguments["rngs"]
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"`rngs` must be an `nnx.Rngs`, got {type(rngs).__name__}.")
        self.bias = nnx.data(None)
        for name, parameter in self._parameters(self.in_features).items():
            value = parameter.initializer(rngs.params(), parameter.shape, self.param_dtype)
            boxed = isinstance(value, meta.Partitioned)  # by linen's `with_partitioning`
            setattr(self, name, nnx.Param(**value.to_nnx_metadata() if boxed else {"value": value}))
        self.losses = nnx.data({name: Loss(jnp.float32(0)) for name in self._penalty_names})

    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the layer, and keeps the penalties; shapes as in the linen layer."""
        y, penalties = self._apply(x)
        self._keep(penalties)
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
          9.0 {'bias_penalty': Array(0., dtype=float32)}
        """
        return self._apply(x)

    def _apply(self: Any, x: jax.Array, **streaming: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = self._check_input(x, self.in_features)
        variables = {name: getattr(self, name) for name in self.prefixes}
        parameters = {name: v[...] for name, v in variables.items() if v is not None}
        y = self._forward(x, parameters, **streaming)
        return y, self._penalties(y, parameters)

    def _keep(self, penalties: Mapping[str, jax.Array]) -> None:
        new = {name: v for name, v in penalties.items() if not self._captured(name, v)}
        try:
            for name, value in new.items():
                if name in self.losses:
                    self.losses[name].set_value(value)
            missing = {name: Loss(v) for name, v in new.items() if name not in self.losses}
            if missing:  # after `nnx.pop(model, Loss)`
                self.losses = nnx.data({**self.losses, **missing})
        except errors.TraceContextError:
            raise errors.TraceContextError(
                f"A call of `{type(self).__name__}` keeps its penalties in the layer, which has to "
                "be an argument of the transformed function, of `nnx.jit` for instance in place of "
                "`jax.jit`. A layer from the function's closure is called by `with_penalties`, "
                "which returns them, and a model by `nnx.clone(model)(x)`, which drops them."
            ) from None

    def _captured(self, name: str, value: jax.Array) -> bool:
        """Hands the penalty to an `nnx.capture`, if there is one, and returns whether there is."""
        if not _OR_NOTHING and not hasattr(self, "__captures__"):
            return False
        # The base's method: what `nnx.tabulate` puts in place of `self.sow` returns a traced value.
        return nnx.Module.sow(
            self,
            Loss,
            name,
            value,
            init_fn=lambda: jnp.float32(0),
            reduce_fn=_layer.reduction(name),
            **_OR_NOTHING,
        )

    @classmethod
    def from_config(
        cls: Any,
        config: Mapping[str, Any],
        *,
        in_features: int,
        custom_objects: Mapping[str, Any] | None = None,
        rngs: nnx.Rngs,
    ) -> Self:
        """Returns the layer that a config stands for: of `get_config`, or of Keras 2 or 3.

        Args:
          config: the settings, or a dict with "class_name" and "config". A name is dropped.
          in_features: the number of input channels.
          custom_objects: {name: object or None}, what names stand for that are not Keras's. An
            initializer, regularizer or constraint that is neither is None, and a warning says so.
          rngs: initializes the parameters.

        Raises:
          ValueError: for an unknown key, a value that has no meaning, or an activation that is
            neither Keras's nor in `custom_objects`.
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
        customs = _config.Customs(custom_objects)
        settings = cls._settings_from_config(config, customs)
        settings.pop("name", None)
        layer = cls(in_features, **settings, rngs=rngs)
        customs.warn()
        return layer


class _Depthwise(_Module, _layer.Depthwise):
    """The depthwise layers. `DepthwiseConv2D` repeats the constructor, for Keras's (1, 1)."""

    kernel: nnx.Param[jax.Array]

    def __init__(
        self,
        in_features: int,
        kernel_size: _geometry.Ints,
        *,
        strides: _geometry.Ints = 1,
        padding: _geometry.PaddingLike = "valid",
        depth_multiplier: int = 1,
        data_format: str | None = None,
        dilation_rate: _geometry.Ints = 1,
        activation: Identifier = None,
        use_bias: bool = True,
        depthwise_initializer: Identifier | ArrayLike = "glorot_uniform",
        bias_initializer: Identifier | ArrayLike = "zeros",
        depthwise_regularizer: Identifier = None,
        bias_regularizer: Identifier = None,
        activity_regularizer: Identifier = None,
        depthwise_constraint: Identifier = None,
        bias_constraint: Identifier = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: _geometry.Precision = None,
        method: _geometry.Method = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self._construct(locals())


class DepthwiseConv1D(_layer.Depthwise1D, _Depthwise):
    """Keras's `DepthwiseConv1D` as an nnx module: the twin of `flax_dwconv.DepthwiseConv1D`.

    With `padding="causal"`,

        layer(x)         -> y
        layer(x, state)  -> (y, state)

    and `segment_ids` is for packed documents, as `causal_conv1d` describes.

    Args:
      in_features: `c`, the number of input channels.
      kernel_size: an int > 0, or a tuple of one. All other arguments are those of
        `DepthwiseConv2D`.
      rngs: its stream "params" initializes the parameters.

    Attributes:
      kernel: `nnx.Param` of shape `(k, c, m)`.
      bias: `nnx.Param` of shape `(c*m,)`, or None.
      losses: name -> `Loss`.

    Raises:
      ValueError: as the linen layer.
      TypeError: as the linen layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_dwconv
      >>> layer = flax_dwconv.nnx.DepthwiseConv1D(16, 4, padding="causal", rngs=nnx.Rngs(0))
      >>> x = jnp.ones((2, 8, 16))
      >>> y, state = layer(x, layer.initial_state(2, channels=16))
      >>> step, state = layer(x[:, :1], state)
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
    def __call__(
        self,
        x: jax.Array,
        state: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> Any:
        """Applies the layer, and keeps the penalties; shapes as in the linen layer.

        Returns:
          `y`, or `(y, state)` if a state was given.
        """
        result, penalties = self.with_penalties(x, state, segment_ids=segment_ids)
        self._keep(penalties)
        return result

    def with_penalties(  # pyrefly: ignore[bad-override]
        self,
        x: jax.Array,
        state: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Returns what a call does, and the penalties by name; changes nothing.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> import flax_dwconv
          >>> layer = flax_dwconv.nnx.DepthwiseConv1D(
          ...     1, 2, padding="causal", depthwise_regularizer="l2", rngs=nnx.Rngs(0))
          >>> (y, state), penalties = layer.with_penalties(
          ...     jnp.ones((1, 3, 1)), layer.initial_state(1, channels=1))
          >>> y.shape, list(penalties)
          ((1, 3, 1), ['kernel_penalty'])
        """
        y, penalties = self._apply(x, state=state, segment_ids=segment_ids)
        result = y if state is None else (y, self._next_state(x, state))
        return result, penalties


class DepthwiseConv2D(_Depthwise):
    """Keras's `DepthwiseConv2D` as an nnx module: the twin of `flax_dwconv.DepthwiseConv2D`.

    The arguments are that layer's, described there, after `in_features` and before `rngs`. The
    outputs, the gradients and the penalties are that layer's too, to the last bit.

    Each penalty of a regularizer that is set is one variable of the type `Loss`, in the dict
    `losses` under the name "activity_penalty", "kernel_penalty" or "bias_penalty". It is there, as
    0, from the construction on, so that the structure of the graph never changes, and every call
    replaces it. `total_loss(model)` sums those of a model.

    A layer that is called twice in a step has the activity of its last call, because nothing tells
    it where a step begins. In linen the activities add up, and so they do here under
    `nnx.capture(model, Loss)`, which returns the penalties in place of keeping them:

        y, penalties = nnx.capture(model, Loss)(x)

    A layer with penalties is changed by a call, so that it has to be an argument of `nnx.jit` and
    the like, not a part of the function's closure. `nnx.scan` keeps the penalties of a layer that
    all steps share if it carries them, `in_axes=nnx.StateAxes({Loss: nnx.Carry, ...: None})`, or
    with `in_axes=None` and `graph=False`; without `graph=False` it drops every change of a variable
    there, and says nothing. `with_penalties` is pure.

    Args:
      in_features: `c`, the number of input channels.
      kernel_size: an int > 0, or two. All other arguments have to be named.
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
      ...         return jnp.mean(y**2) + flax_dwconv.total_loss(model)
      ...     value, grads = nnx.value_and_grad(loss)(model)
      ...     optimizer.update(model, grads)
      ...     return value
      >>> train_step(model, optimizer, jnp.ones((8, 32, 32, 4))).shape
      ()

    Source: `tf.keras.layers.DepthwiseConv2D`.
    """

    rank: ClassVar[int] = 2

    def __init__(
        self,
        in_features: int,
        kernel_size: _geometry.Ints,
        *,
        strides: _geometry.Ints = (1, 1),
        padding: _geometry.PaddingLike = "valid",
        depth_multiplier: int = 1,
        data_format: str | None = None,
        dilation_rate: _geometry.Ints = (1, 1),
        activation: Identifier = None,
        use_bias: bool = True,
        depthwise_initializer: Identifier | ArrayLike = "glorot_uniform",
        bias_initializer: Identifier | ArrayLike = "zeros",
        depthwise_regularizer: Identifier = None,
        bias_regularizer: Identifier = None,
        activity_regularizer: Identifier = None,
        depthwise_constraint: Identifier = None,
        bias_constraint: Identifier = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: _geometry.Precision = None,
        method: _geometry.Method = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self._construct(locals())


class DepthwiseConv3D(_Depthwise):
    """Depthwise convolutions of volumes and videos: the twin of `flax_dwconv.DepthwiseConv3D`.

    Args:
      in_features: `c`, the number of input channels.
      kernel_size: an int > 0, or three. All other arguments are those of `DepthwiseConv2D`.
      rngs: its stream "params" initializes the parameters.

    Attributes:
      kernel: `nnx.Param` of shape `(kd, kh, kw, c, m)`.
      bias: `nnx.Param` of shape `(c*m,)`, or None.
      losses: name -> `Loss`.

    Raises:
      ValueError: as the linen layer.
      TypeError: as the linen layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_dwconv
      >>> layer = flax_dwconv.nnx.DepthwiseConv3D(4, 3, padding="same", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 8, 16, 16, 4))).shape
      (1, 8, 16, 16, 4)

    Source: the formula of `depthwise_conv`.
    """

    rank: ClassVar[int] = 3


class _Separable(_Module, _layer.Separable):
    """The separable layers of any rank."""

    depthwise_kernel: nnx.Param[jax.Array]
    pointwise_kernel: nnx.Param[jax.Array]

    def __init__(
        self,
        in_features: int,
        filters: int,
        kernel_size: _geometry.Ints,
        *,
        strides: _geometry.Ints = 1,
        padding: _geometry.PaddingLike = "valid",
        data_format: str | None = None,
        dilation_rate: _geometry.Ints = 1,
        depth_multiplier: int = 1,
        activation: Identifier = None,
        use_bias: bool = True,
        depthwise_initializer: Identifier | ArrayLike = "glorot_uniform",
        pointwise_initializer: Identifier | ArrayLike = "glorot_uniform",
        bias_initializer: Identifier | ArrayLike = "zeros",
        depthwise_regularizer: Identifier = None,
        pointwise_regularizer: Identifier = None,
        bias_regularizer: Identifier = None,
        activity_regularizer: Identifier = None,
        depthwise_constraint: Identifier = None,
        pointwise_constraint: Identifier = None,
        bias_constraint: Identifier = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: _geometry.Precision = None,
        method: _geometry.Method = "auto",
        rngs: nnx.Rngs,
    ) -> None:
        self._construct(locals())


class SeparableConv1D(_Separable):
    """Keras's `SeparableConv1D` as an nnx module: the twin of `flax_dwconv.SeparableConv1D`.

    Args:
      in_features: `c`, the number of input channels.
      filters: the number of output channels.
      kernel_size: an int > 0, or a tuple of one. All other arguments are those of
        `SeparableConv2D`.
      rngs: its stream "params" initializes the parameters.

    Attributes:
      depthwise_kernel: `nnx.Param` of shape `(k, c, m)`.
      pointwise_kernel: `nnx.Param` of shape `(1, c*m, filters)`.
      bias: `nnx.Param` of shape `(filters,)`, or None.
      losses: name -> `Loss`.

    Raises:
      ValueError: as the linen layer.
      TypeError: as the linen layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_dwconv
      >>> layer = flax_dwconv.nnx.SeparableConv1D(16, 32, 5, padding="same", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 100, 16))).shape
      (8, 100, 32)

    Source: `tf.keras.layers.SeparableConv1D`.
    """

    rank: ClassVar[int] = 1


class SeparableConv2D(_Separable):
    """Keras's `SeparableConv2D` as an nnx module: the twin of `flax_dwconv.SeparableConv2D`.

    The arguments are that layer's, described there.

    Args:
      in_features: `c`, the number of input channels.
      filters: the number of output channels.
      kernel_size: an int > 0, or two.
      rngs: its stream "params" initializes the parameters.

    Attributes:
      depthwise_kernel: `nnx.Param` of shape `(kh, kw, c, m)`.
      pointwise_kernel: `nnx.Param` of shape `(1, 1, c*m, filters)`.
      bias: `nnx.Param` of shape `(filters,)`, or None.
      losses: name -> `Loss`.

    Raises:
      ValueError: as the linen layer.
      TypeError: as the linen layer.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import flax_dwconv
      >>> layer = flax_dwconv.nnx.SeparableConv2D(16, 64, 3, padding="same", rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((8, 32, 32, 16))).shape
      (8, 32, 32, 64)

    Source: `tf.keras.layers.SeparableConv2D`.
    """

    rank: ClassVar[int] = 2
