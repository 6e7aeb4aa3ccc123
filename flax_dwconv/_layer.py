"""What the layers of linen and nnx share: settings, checks, the forward pass, penalties.

A layer is written once for every rank. `Settings` holds the logic, `Depthwise` the arguments, and
the classes of `linen.py` and `nnx.py` add the rank, their framework and a description.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax import lax
from jax.typing import ArrayLike

from flax_dwconv import (
    _arguments,
    _config,
    _dtypes,
    _geometry,
    _lowering,
    _mesh,
    activations,
    functional,
)
from flax_dwconv._vocabulary import Identifier


def reduction(penalty: str) -> Callable[[Any, Any], Any]:
    """Returns how the penalties of several calls of one layer become one.

    The layer then has several activities, which add up, but one kernel and one bias.
    """
    return operator.add if penalty == "activity_penalty" else lambda old, new: new


class Parameter(NamedTuple):
    """How a parameter is made, and what holds for it after every update."""

    shape: tuple[int, ...]
    initializer: Callable[..., Any]
    constraint: Callable[[Any], Any] | None


class Settings:
    """The base of all layers: checks the arguments that its subclasses declare, and uses them.

    The constructor checks every argument and stores what it stands for (`3` as `(3, 3)`, `"l2"` as
    `L2(l2=0.01)`), so that linen layers with equal settings compare equal.
    """

    rank: ClassVar[int]
    # The parameters of the layer, each with the word that the arguments about it begin with.
    # The first one is the kernel that convolves, of shape (*window, c, m).
    prefixes: ClassVar[Mapping[str, str]]

    kernel_size: Any
    strides: Any
    padding: Any
    depth_multiplier: int
    data_format: Any
    dilation_rate: Any
    activation: Any
    use_bias: bool
    activity_regularizer: Any
    dtype: Any
    param_dtype: Any
    precision: Any
    method: _geometry.Method

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _arguments.with_hints(cls.__init__)  # pyrefly: ignore[bad-assignment]

    def __post_init__(self) -> None:
        names = [field.name for field in setting_fields(type(self))]
        for name, value in self._checked({name: getattr(self, name) for name in names}).items():
            setattr(self, name, value)
        if hasattr(super(), "__post_init__"):
            super().__post_init__()  # pyrefly: ignore[missing-attribute]

    @classmethod
    def _checked(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the arguments of the constructor stand for, or raises what is wrong."""
        data_format = given["data_format"]
        if data_format is None:
            data_format = _geometry.default_data_format()
        window = _geometry.window(
            cls.rank,
            given["kernel_size"],
            given["strides"],
            given["padding"],
            given["dilation_rate"],
            data_format,
        )
        checked = dict(vars(window))
        for field in setting_fields(cls):
            if field.name not in checked:
                checked[field.name] = _arguments.canonical(field, given[field.name])
        if max(window.strides) > 1 and max(window.dilation_rate) > 1:
            raise ValueError(
                "`strides > 1` not supported in conjunction with `dilation_rate > 1`, got "
                f"`strides`={window.strides} and `dilation_rate`={window.dilation_rate}. "
                f"`depthwise_conv{cls.rank}d` computes it."
            )
        return checked

    @property
    def _window(self) -> _geometry.Window:
        return _geometry.Window(
            self.kernel_size, self.strides, self.padding, self.dilation_rate, self.data_format
        )

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Returns the shape of the result for an input of `input_shape`.

        Args:
          input_shape: `(n, *space, c)`, or `(n, c, *space)` for "channels_first"; None is an
            unknown size, allowed everywhere but for the channels.

        Raises:
          TypeError: if it is not a sequence of integers and None.
          ValueError: if the rank is another one, a size is negative, the channels are unknown, or
            the kernel or the activation does not fit.

        Example:
          >>> import flax_dwconv
          >>> layer = flax_dwconv.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=4)
          >>> layer.compute_output_shape((None, 9, None, 3))
          (None, 5, None, 12)
        """
        if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
            raise TypeError(f"`input_shape` must be a tuple, got {input_shape!r}.")
        message = f"`input_shape` must hold integers >= 0 or None, got {input_shape!r}."
        sizes = [n for n in input_shape if n is not None]
        if not all(map(_geometry.is_int, sizes)):
            raise TypeError(message)
        if sizes and min(sizes) < 0:
            raise ValueError(message)
        c = self._channels(input_shape)
        shape = list(self._window.output_shape(input_shape, self._features(c)))
        if shape[-1] is not None:
            # Every activation keeps the shape but `glu`, which halves the last axis.
            activation = activations.get(self.activation)
            last = jax.ShapeDtypeStruct((*[1] * (len(shape) - 1), shape[-1]), jnp.float32)
            try:
                shape[-1] = jax.eval_shape(activation, last).shape[-1]
            except AssertionError as error:
                raise ValueError(
                    f"`activation` must fit the output, of shape {tuple(shape)}, got "
                    f"{self.activation!r}: {error}."
                ) from None
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the settings as a dict of JSON values, in the dialect of Keras 3.

        Keras 3 reads it, unless a setting has no counterpart there: causal or explicit padding,
        `precision`, `method`, or a pair of `dtype` and `param_dtype` that is no policy of Keras.
        The last three are written under keys of their own. Keras 3 defines "hard_sigmoid" otherwise
        than Keras 2, which is followed here: the key `groups` marks such a config as Keras 2's.
        `keras_io.to_config` refuses all of these.

        Raises:
          ValueError: if a setting is a callable that has no Keras name.

        Example:
          >>> import flax_dwconv
          >>> config = flax_dwconv.DepthwiseConv2D(3, activation="relu", name="dw").get_config()
          >>> config["name"], config["kernel_size"], config["activation"]
          ('dw', [3, 3], 'relu')
        """
        names = [field.name for field in setting_fields(type(self))]
        return _config.write(getattr(self, "name", None), {n: getattr(self, n) for n in names})

    @classmethod
    def _settings_from_config(
        cls, config: Mapping[str, Any], customs: _config.Customs
    ) -> dict[str, Any]:
        """Returns the constructor's arguments that a Keras config stands for, and `name`."""
        fields = setting_fields(cls)
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        names = [field.name for field in fields]
        return _config.read(config, cls.__name__, names, required, customs)

    def _features(self, channels: Any) -> Any:
        """Returns the channels of the result for inputs of `channels`."""
        return channels * self.depth_multiplier

    def _channels(self, shape: Sequence[Any]) -> Any:
        """Returns the channel dimension of an input's shape, checked."""
        name = type(self).__name__
        if len(shape) != self.rank + 2:
            raise ValueError(
                f"Inputs to `{name}` should have rank {self.rank + 2}, got the shape "
                f"{tuple(shape)}."
            )
        axis = self._window.channel_axis
        if shape[axis] is None:
            raise ValueError(
                f"The channel dimension of the inputs to `{name}` should be defined, got the shape "
                f"{tuple(shape)}, where axis {axis} is the channel dimension."
            )
        return _geometry.positive_int(shape[axis], "channels")

    def _shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each parameter for inputs of `channels`, the bias last."""
        raise NotImplementedError

    def _parameters(self, channels: int) -> dict[str, Parameter]:
        """Returns what to create for inputs of `channels`, in Keras's order."""
        return {
            name: Parameter(
                shape,
                getattr(self, f"{self.prefixes[name]}_initializer"),
                getattr(self, f"{self.prefixes[name]}_constraint"),
            )
            for name, shape in self._shapes(channels).items()
        }

    def _check_input(self, x: ArrayLike, channels: int | None) -> jax.Array:
        """Returns `x` as an array that fits; `channels` is what the kernel has, if there is one."""
        x = _geometry.as_array(x, "x")
        axis = self._window.channel_axis
        if channels is not None and x.ndim == self.rank + 2 and x.shape[axis] != channels:
            raise ValueError(
                f"The layer has a kernel for {channels} channels: expected axis {axis} of the "
                f"input shape to have value {channels}, got the shape {x.shape}."
            )
        self._channels(x.shape)
        return x

    def _convolve(self, x: jax.Array, **kernels: Any) -> jax.Array:
        """The layer without bias and activation."""
        raise NotImplementedError

    def _depthwise(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        window = self._window
        return functional.depthwise_conv(
            x,
            kernel,
            strides=window.strides,
            padding=window.padding,
            dilation_rate=window.dilation_rate,
            data_format=window.data_format,
            precision=self.precision,
            method=self.method,
        )

    def _forward(
        self, x: jax.Array, parameters: Mapping[str, jax.Array], **streaming: Any
    ) -> jax.Array:
        """Convolution, bias, activation, in the dtype that Flax's promotion rules give.

        Args:
          x: the checked input.
          parameters: by name.
          **streaming: what `_convolve` takes besides.
        """
        x = self._as_inexact(x)
        x, *values = promote_dtype(x, *parameters.values(), dtype=self.dtype)
        kernels = dict(zip(parameters, values, strict=True))
        bias = kernels.pop("bias", None)
        y = self._convolve(x, **kernels, **streaming)
        if bias is not None:
            y = _plus_bias(y, bias, self._window.channel_axis)
        activation = activations.get(self.activation)
        if self.method != "lax":
            activation = _STORED.get(id(activation), activation)
        return activation(y)

    def _as_inexact(self, x: jax.Array) -> jax.Array:
        """Casts integers and booleans to the dtype of the computation."""
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        return x.astype(self.dtype or self.param_dtype)

    @property
    def _penalized(self) -> dict[str, str]:
        """The penalties that are set, in Keras's order: {what is penalized: the argument}."""
        arguments = {"activity": "activity_regularizer"} | {
            name: f"{prefix}_regularizer"
            for name, prefix in self.prefixes.items()
            if name != "bias" or self.use_bias
        }
        return {k: v for k, v in arguments.items() if getattr(self, v) is not None}

    @property
    def _penalty_names(self) -> list[str]:
        return [f"{name}_penalty" for name in self._penalized]

    def _penalties(self, y: jax.Array, parameters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the penalties that are set, in Keras's order, as float32 scalars.

        The activity's is divided by the batch size: 0 for an empty batch.
        """
        tensors = {"activity": y, **parameters}
        result = {}
        for name, argument in self._penalized.items():
            tensor = tensors[name]
            if tensor.dtype.itemsize < 4:
                # A regularizer, ours or the user's, sums in the dtype that it is given.
                tensor = tensor.astype(jnp.float32)
            value = _scalar(getattr(self, argument)(tensor), argument)
            if name == "activity":
                n = y.shape[0]
                empty = isinstance(n, int) and n == 0
                value = jnp.zeros_like(value) if empty else value / jnp.asarray(n, jnp.float32)
            result[f"{name}_penalty"] = value
        return result


@dataclasses.dataclass
class Depthwise(Settings):
    """The arguments of Keras's depthwise layers in their order, then Flax's, then `method`."""

    prefixes: ClassVar[Mapping[str, str]] = {"kernel": "depthwise", "bias": "bias"}

    kernel_size: _geometry.Ints
    strides: _geometry.Ints = 1
    padding: _geometry.PaddingLike = "valid"
    depth_multiplier: int = 1
    data_format: str | None = None
    dilation_rate: _geometry.Ints = 1
    activation: Identifier = None
    use_bias: bool = True
    depthwise_initializer: Identifier | ArrayLike = "glorot_uniform"
    bias_initializer: Identifier | ArrayLike = "zeros"
    depthwise_regularizer: Identifier = None
    bias_regularizer: Identifier = None
    activity_regularizer: Identifier = None
    depthwise_constraint: Identifier = None
    bias_constraint: Identifier = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: _geometry.Precision = None
    method: _geometry.Method = "auto"

    def _shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        m = self.depth_multiplier
        shapes: dict[str, tuple[int, ...]] = {"kernel": (*self._window.kernel_size, channels, m)}
        return shapes | ({"bias": (channels * m,)} if self.use_bias else {})

    def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:  # pyrefly: ignore
        return self._depthwise(x, kernel)


class Depthwise1D(Depthwise):
    """The 1-D layer with causal padding can take a sequence piece by piece, or packed documents."""

    rank: ClassVar[int] = 1

    def initial_state(
        self, batch_shape: int | Sequence[int], channels: int, dtype: Dtype | None = None
    ) -> jax.Array:
        """Returns the state before a sequence: zeros.

        Args:
          batch_shape: `n`, or `(n,)`; more axes for a state to `vmap` over.
          channels: `c`, those of the inputs.
          dtype: of the state; None is the layer's `dtype`, or float32 if that is None.

        Returns:
          `(*batch_shape, (k - 1) * dilation_rate, channels)`.

        Raises:
          TypeError: for an argument of a wrong type.
          ValueError: if the padding of the layer is not causal, or for a negative size.

        Example:
          >>> import flax_dwconv
          >>> layer = flax_dwconv.DepthwiseConv1D(4, padding="causal", dilation_rate=2)
          >>> layer.initial_state(8, channels=3).shape
          (8, 6, 3)
        """
        self._check_streaming("initial_state")
        axes: Any = batch_shape if isinstance(batch_shape, Sequence) else [batch_shape]
        message = f"`batch_shape` must be an int >= 0 or a tuple of them, got {batch_shape!r}."
        known = [n for n in axes if not jax.export.is_symbolic_dim(n)]
        if not all(map(_geometry.is_int, known)):
            raise TypeError(message)
        if known and min(known) < 0:
            raise ValueError(message)
        channels = _geometry.positive_int(channels, "channels")
        dtype = (self.dtype or jnp.float32) if dtype is None else _config.dtype(dtype, "dtype")
        return jnp.zeros((*axes, self._window.effective_size[0] - 1, channels), dtype)

    def _check_streaming(self, argument: str) -> None:
        window = self._window
        if window.padding != "causal" or max(window.strides) > 1:
            raise ValueError(
                f"`{argument}` is for a layer with `padding`='causal' and strides of 1, got "
                f"`padding`={window.padding!r} and `strides`={window.strides}."
            )

    def _convolve(  # pyrefly: ignore[bad-override]
        self,
        x: jax.Array,
        kernel: jax.Array,
        state: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
    ) -> jax.Array:
        if state is None and segment_ids is None:
            return self._depthwise(x, kernel)
        self._check_streaming("segment_ids" if state is None else "state")
        y, _ = functional.causal_conv1d(
            self._channels_last(x),
            kernel,
            state,
            dilation_rate=self.dilation_rate,
            segment_ids=segment_ids,
            precision=self.precision,
            method=self.method,
        )
        return y if self.data_format == "channels_last" else y.swapaxes(1, 2)

    def _next_state(self, x: jax.Array, state: ArrayLike) -> jax.Array:
        """Returns the state after `x`: the inputs as they came, which `_forward` promotes."""
        return functional.next_state(self._channels_last(self._as_inexact(x)), jnp.asarray(state))

    def _channels_last(self, x: jax.Array) -> jax.Array:
        return x if self.data_format == "channels_last" else x.swapaxes(1, 2)


@dataclasses.dataclass
class Separable(Settings):
    """The arguments of Keras's separable layers in their order, then Flax's, then `method`."""

    prefixes: ClassVar[Mapping[str, str]] = {
        "depthwise_kernel": "depthwise",
        "pointwise_kernel": "pointwise",
        "bias": "bias",
    }

    filters: int
    kernel_size: _geometry.Ints
    strides: _geometry.Ints = 1
    padding: _geometry.PaddingLike = "valid"
    data_format: str | None = None
    dilation_rate: _geometry.Ints = 1
    depth_multiplier: int = 1
    activation: Identifier = None
    use_bias: bool = True
    depthwise_initializer: Identifier | ArrayLike = "glorot_uniform"
    pointwise_initializer: Identifier | ArrayLike = "glorot_uniform"
    bias_initializer: Identifier | ArrayLike = "zeros"
    depthwise_regularizer: Identifier = None
    pointwise_regularizer: Identifier = None
    bias_regularizer: Identifier = None
    activity_regularizer: Identifier = None
    depthwise_constraint: Identifier = None
    pointwise_constraint: Identifier = None
    bias_constraint: Identifier = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: _geometry.Precision = None
    method: _geometry.Method = "auto"

    def _features(self, channels: Any) -> Any:
        return self.filters

    def _shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        m, window = self.depth_multiplier, self._window
        shapes: dict[str, tuple[int, ...]] = {
            "depthwise_kernel": (*window.kernel_size, channels, m),
            "pointwise_kernel": (*[1] * window.rank, channels * m, self.filters),
        }
        return shapes | ({"bias": (self.filters,)} if self.use_bias else {})

    def _convolve(  # pyrefly: ignore[bad-override]
        self, x: jax.Array, depthwise_kernel: jax.Array, pointwise_kernel: jax.Array
    ) -> jax.Array:
        y = self._depthwise(x, depthwise_kernel)
        # A convolution with a kernel of one position is a matrix product. XLA:CPU compiles it
        # better as one.
        axis = self._window.channel_axis % y.ndim
        matrix = pointwise_kernel.reshape(pointwise_kernel.shape[-2:])
        precision = _geometry.precision(self.precision)

        def product(y: jax.Array, matrix: jax.Array) -> jax.Array:
            z = lax.dot_general(
                y,
                matrix,
                (((axis,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=_dtypes.accumulator(y.dtype),
            )
            return jnp.moveaxis(z.astype(y.dtype), -1, axis)

        def result(image: Sequence[_mesh.Part], matrix: Sequence[_mesh.Part]) -> _mesh.Result:
            shape, parts = list(y.shape), list(image)
            shape[axis], parts[axis] = self.filters, matrix[1]
            return shape, parts

        return _mesh.on_automatic_axes(product, result, y, matrix)


def _plus_bias(y: jax.Array, bias: jax.Array, axis: int) -> jax.Array:
    """Adds the bias to every position, along `axis`, such that its gradient is summed in float32.

    The bias is broadcast, and JAX's transpose of a broadcast is a sum over all positions in the
    dtype of the operand. In bfloat16 on a CPU, 25,088 ones added up to 1,024. Hence the operand is
    float32. The result does not change: the sum of two numbers with p bits, rounded to 2p + 2 bits
    or more and then to p, is the sum rounded to p bits once; p is 8 for bfloat16 and 11 for
    float16, and float32 has 24.
    """
    shape = [1] * y.ndim
    shape[axis] = bias.size
    wide = _dtypes.accumulator(y.dtype)
    return (y.astype(wide) + bias.reshape(shape).astype(wide)).astype(y.dtype)


def setting_fields(layer: type[Settings]) -> list[dataclasses.Field[Any]]:
    """Returns the fields that `Depthwise` or `Separable` declares.

    Linen adds fields of its own, and so may a subclass.
    """
    ours = next(cls for cls in layer.__mro__ if cls.__module__ == __name__)
    return list(dataclasses.fields(ours))  # pyrefly: ignore[bad-argument-type]


def _scalar(value: Any, name: str) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(f"`{name}` must return a scalar, got an array of shape {value.shape}.")
    return value.astype(jnp.float32)


# Rectifiers


def _stored(rectifier: activations.Activation, passes: activations.Activation) -> Any:
    """Returns a rectifier whose result is an array of its own in a train step on CPU.

    The derivative of a rectifier reads its result. XLA:CPU would not store that result: it stores
    the convolution plus bias, and computes the rectifier again in each reader. With the result
    stored, convolution, bias and rectifier are one loop. Otherwise a train step takes 1.1 times as
    long.

    Args:
      rectifier: the function.
      passes: given the result, where the derivative is 1.
    """

    @jax.custom_jvp
    def wrapped(x: jax.Array) -> jax.Array:
        return rectifier(x)

    @wrapped.defjvp
    def jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
        (x,), (t,) = primals, tangents
        y = rectifier(x)
        if jnp.issubdtype(y.dtype, jnp.floating):
            y = lax.platform_dependent(
                y, cpu=_lowering.workarounds.computed_once, default=lambda y: y
            )
        return y, lax.select(passes(y), t, lax.full_like(t, 0))

    return wrapped


# By identity: an activation of the user's need not be hashable.
_STORED = {
    id(rectifier): _stored(rectifier, passes) for rectifier, passes in activations.PASSES.items()
}
