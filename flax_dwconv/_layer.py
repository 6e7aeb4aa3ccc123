"""What the linen and the nnx layer share: settings, checks, the forward pass, penalties,
configs."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import lax

from flax_dwconv import (
    _geometry,
    activations,
    constraints,
    functional,
    initializers,
    regularizers,
)

# Name of a parameter, or of a penalty -> what the arguments about it begin with.
PARAMETERS = {"kernel": "depthwise", "bias": "bias"}
_PENALTIES = {"activity": "activity"} | PARAMETERS

# A layer that is called twice has two activities, but one kernel and one bias.
REDUCTIONS = {name: lambda old, new: new for name in PARAMETERS} | {"activity": operator.add}


class Parameter(NamedTuple):
    """How a parameter is made, and what holds for it after every update."""

    shape: tuple[int, ...]
    initializer: Callable[..., Any]
    constraint: Callable[[Any], Any] | None


@dataclasses.dataclass
class Settings:
    """The arguments of Keras's `DepthwiseConv2D` in its order, then Flax's; checked, canonical.

    A dataclass to inherit from: the constructor checks every argument and stores what it stands for
    (`3` as `(3, 3)`, `"l2"` as `L2(l2=0.01)`), so that layers compare equal by their settings.
    """

    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] = (1, 1)
    padding: Any = "valid"
    depth_multiplier: int = 1
    data_format: str | None = None
    dilation_rate: int | Sequence[int] = (1, 1)
    activation: Any = None
    use_bias: bool = True
    depthwise_initializer: Any = "glorot_uniform"
    bias_initializer: Any = "zeros"
    depthwise_regularizer: Any = None
    bias_regularizer: Any = None
    activity_regularizer: Any = None
    depthwise_constraint: Any = None
    bias_constraint: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    method: functional.Method = "auto"

    def __post_init__(self):
        canonical = vars(self._window) | {
            name: convert(getattr(self, name)) for name, convert in _CONVERTERS.items()
        }
        strides, dilation_rate = canonical["strides"], canonical["dilation_rate"]
        if max(strides) > 1 and max(dilation_rate) > 1:
            raise ValueError(
                "`strides > 1` not supported in conjunction with `dilation_rate > 1`, got "
                f"`strides`={strides} and `dilation_rate`={dilation_rate}. "
                "`depthwise_conv2d` computes it."
            )
        for name, value in canonical.items():
            object.__setattr__(self, name, value)  # a linen module is frozen after its construction
        if hasattr(super(), "__post_init__"):
            super().__post_init__()  # pyrefly: ignore[missing-attribute]

    @property
    def _window(self) -> _geometry.Window:
        data_format = self.data_format
        if data_format is None:
            data_format = _geometry.default_data_format()
        return _geometry.window(
            self.kernel_size, self.strides, self.padding, self.dilation_rate, data_format
        )

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Returns the shape of the result for an input of `input_shape`.

        Args:
          input_shape: `(n, h, w, c)`, or `(n, c, h, w)` for "channels_first"; None is an unknown
            size, allowed everywhere but for the channels.

        Raises:
          ValueError: if the rank is not 4, the channels are unknown, or the kernel does not fit.

        Example:
          >>> import flax_dwconv
          >>> layer = flax_dwconv.DepthwiseConv2D(3, strides=2, padding="same", depth_multiplier=4)
          >>> layer.compute_output_shape((None, 9, None, 3))
          (None, 5, None, 12)
        """
        if not isinstance(input_shape, Sequence) or isinstance(input_shape, str):
            raise TypeError(f"`input_shape` must be a tuple, got {input_shape!r}.")
        if not all(n is None or (_geometry.is_int(n) and n >= 0) for n in input_shape):
            raise ValueError(f"`input_shape` must hold integers >= 0 or None, got {input_shape!r}.")
        c = self._channels(input_shape)
        shape = list(self._window.output_shape(input_shape, c * self.depth_multiplier))
        if shape[-1] is not None:
            # Every activation keeps the shape but `glu`, which halves the last axis.
            activation = activations.get(self.activation)
            last = jax.ShapeDtypeStruct((1, 1, 1, shape[-1]), jnp.float32)
            shape[-1] = jax.eval_shape(activation, last).shape[-1]
        return tuple(shape)

    def get_config(self) -> dict[str, Any]:
        """Returns the settings as a dict of JSON values, in the dialect of Keras 3.

        Keras 3 reads it. It has no words for `precision`, `method`, and some pairs of `dtype` and
        `param_dtype`, which add keys of their own where they are set, and which only we read. It
        means its own function by "hard_sigmoid": for Keras 2's, `groups` marks Keras 2's dialect.

        Raises:
          ValueError: if a setting is a callable that has no Keras name.
        """
        config: dict[str, Any] = {"name": getattr(self, "name", None), "trainable": True}
        config |= _write_dtypes(self.dtype, self.param_dtype)
        for name in _KERAS_ORDER:
            value = getattr(self, name)
            if value is jax.nn.hard_sigmoid:
                value = "hard_sigmoid"
            if name in _VOCABULARY:
                value = _VOCABULARY[name].VOCABULARY.serialize(value, name)
            config[name] = value
        if self.precision is not None:
            config["precision"] = [p.name for p in self.precision]
        if self.method != "auto":
            config["method"] = self.method
        if self.activation == "hard_sigmoid":
            config["groups"] = 1
        # Tuples become lists, as they would in JSON.
        return {k: _lists(v) for k, v in config.items()}

    @classmethod
    def _settings_from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the constructor's arguments that a Keras config stands for, and `name`."""
        if not isinstance(config, Mapping):
            raise TypeError(f"`config` must be a dict, got {type(config).__name__}.")
        settings, whole = config, {}
        if "class_name" in config and "config" in config:
            settings, whole = config["config"], config
            if whole["class_name"] != "DepthwiseConv2D" or not is_of_keras(whole):
                names = " of ".join(repr(whole[k]) for k in ("class_name", "module") if k in whole)
                raise ValueError(f"`config` must be of Keras's DepthwiseConv2D, got {names}.")
            if not isinstance(settings, Mapping):
                raise TypeError(f"`config` must be a dict, got {type(settings).__name__}.")
        settings = dict(settings)
        if settings.get("activation") == "hard_sigmoid" and _is_of_keras_3(settings, whole):
            settings["activation"] = jax.nn.hard_sigmoid
        for ignored in _IGNORED_KEYS:
            settings.pop(ignored, None)
        known = [field.name for field in dataclasses.fields(Settings)] + ["name"]
        unknown = [key for key in settings if key not in known]
        if unknown:
            raise ValueError(f"`config` has unknown keys, got {sorted(map(str, unknown))}.")
        if "kernel_size" not in settings:
            keys = sorted(map(str, settings))
            raise ValueError(f"`config` must have a `kernel_size`, got the keys {keys}.")
        if not isinstance(settings.get("name"), str | None):
            raise TypeError(f"`name` must be a string or None, got {settings['name']!r}.")
        return settings | _read_dtypes(settings)

    def _channels(self, shape: Sequence[Any]) -> Any:
        """Returns the channel dimension of an input's shape, checked."""
        if len(shape) != 4:
            raise ValueError(
                f"Inputs to `DepthwiseConv2D` should have rank 4, got the shape {tuple(shape)}."
            )
        axis = self._window.channel_axis
        if shape[axis] is None:
            raise ValueError(
                "The channel dimension of the inputs to `DepthwiseConv2D` should be defined, got "
                f"the shape {tuple(shape)}, where axis {axis} is the channel dimension."
            )
        return _geometry.positive_int(shape[axis], "channels")

    def _parameters(self, channels: int) -> dict[str, Parameter]:
        """Returns what to create for inputs of `channels`, the kernel before the bias."""
        kh, kw = self._window.kernel_size
        m = self.depth_multiplier
        shapes = {"kernel": (kh, kw, channels, m)} | (
            {"bias": (channels * m,)} if self.use_bias else {}
        )
        return {
            name: Parameter(
                shape,
                getattr(self, f"{PARAMETERS[name]}_initializer"),
                getattr(self, f"{PARAMETERS[name]}_constraint"),
            )
            for name, shape in shapes.items()
        }

    def _check_input(self, x: Any, channels: int | None) -> jax.Array:
        """Returns `x` as an array that fits; `channels` is what the kernel has, if there is one."""
        if not hasattr(x, "ndim") or not hasattr(x, "dtype"):
            raise TypeError(f"`x` must be an array, got {type(x).__name__}.")
        x = jnp.asarray(x)
        axis = self._window.channel_axis
        if channels is not None and x.ndim == 4 and x.shape[axis] != channels:
            raise ValueError(
                f"The layer has a kernel for {channels} channels: expected axis {axis} of the "
                f"input shape to have value {channels}, got the shape {x.shape}."
            )
        self._channels(x.shape)
        return x

    def _forward(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        """Convolution, bias, activation, in the dtype that Flax's promotion rules give."""
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            x = x.astype(self.dtype or self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        window = self._window
        y = functional.depthwise_conv2d(
            x,
            kernel,
            strides=window.strides,
            padding=window.padding,
            dilation_rate=window.dilation_rate,
            data_format=window.data_format,
            precision=self.precision,
            method=self.method,
        )
        if bias is not None:
            shape = [1, 1, 1, 1]
            shape[window.channel_axis] = bias.size
            y = y + bias.reshape(shape)
        return activations.get(self.activation)(y)

    @property
    def _penalty_names(self) -> list[str]:
        """The penalties that are set, in Keras's order."""
        return [
            name
            for name, prefix in _PENALTIES.items()
            if getattr(self, f"{prefix}_regularizer") is not None
            and (name != "bias" or self.use_bias)
        ]

    def _penalties(
        self, y: jax.Array, kernel: jax.Array, bias: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Returns the penalties that are set, in Keras's order, as float32 scalars.

        The activity's is divided by the batch size: 0 for an empty batch.
        """
        tensors: dict[str, Any] = {"activity": y, "kernel": kernel, "bias": bias}
        result = {}
        for name in self._penalty_names:
            argument = f"{_PENALTIES[name]}_regularizer"
            tensor = tensors[name]
            if tensor.dtype.itemsize < 4:
                # A regularizer, ours or the user's, sums in the dtype that it is given.
                tensor = tensor.astype(jnp.float32)
            result[name] = _scalar(getattr(self, argument)(tensor), argument)
        if "activity" in result:
            n = y.shape[0]
            value = result["activity"]
            empty = isinstance(n, int) and n == 0
            result["activity"] = (
                jnp.zeros_like(value) if empty else value / jnp.asarray(n, jnp.float32)
            )
        return result


def total_loss(losses: Any) -> jax.Array:
    """Returns the sum of all penalties in a collection "losses" of any nesting.

    Args:
      losses: a pytree of arrays of any shape, such as `state["losses"]`, or an empty one.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> layer = flax_dwconv.DepthwiseConv2D(
      ...     3, depthwise_initializer="ones", depthwise_regularizer="l2",
      ...     activity_regularizer="l1")
      >>> x = jnp.ones((2, 4, 4, 1))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, state = layer.apply(variables, x, mutable=["losses"])
      >>> print(state["losses"])
      {'activity': Array(0.36, dtype=float32), 'kernel': Array(0.09, dtype=float32)}
      >>> print(flax_dwconv.total_loss(state["losses"]))
      0.45
    """
    return sum(
        (jnp.sum(jnp.asarray(leaf, jnp.float32)) for leaf in jax.tree.leaves(losses)),
        start=jnp.float32(0),
    )


def _scalar(value: Any, name: str) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(f"`{name}` must return a scalar, got an array of shape {value.shape}.")
    return value.astype(jnp.float32)


def _flag(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`use_bias` must be a bool, got {value!r}.")
    return bool(value)


def _dtype(value: Any, name: str) -> np.dtype:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise TypeError(f"`{name}` must be a floating dtype, got {value!r}.") from None
    if value is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"`{name}` must be a floating dtype, got {value!r}.")
    return dtype


def _precision(value: Any) -> tuple[lax.Precision, lax.Precision] | None:
    if value is None:
        return None
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    try:
        left, right = (lax.Precision(v.lower() if isinstance(v, str) else v) for v in values)
    except (ValueError, TypeError):
        raise ValueError(
            "`precision` must be a `jax.lax.Precision`, its name, a pair of them, or None, "
            f"got {value!r}."
        ) from None
    return left, right


def _activation(value: Any) -> Any:
    """Returns the name of an activation that has one: it prints and compares better."""
    function = activations.get(value)
    try:
        name = activations.serialize(function)
    except ValueError:
        return function
    return name if isinstance(name, str) else function


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "depth_multiplier": lambda v: _geometry.positive_int(v, "depth_multiplier"),
    "activation": _activation,
    "use_bias": _flag,
    "depthwise_initializer": lambda v: initializers.VOCABULARY.get(
        "glorot_uniform" if v is None else v, "depthwise_initializer"
    ),
    "bias_initializer": lambda v: initializers.VOCABULARY.get(
        "zeros" if v is None else v, "bias_initializer"
    ),
    "depthwise_regularizer": lambda v: regularizers.VOCABULARY.get(v, "depthwise_regularizer"),
    "bias_regularizer": lambda v: regularizers.VOCABULARY.get(v, "bias_regularizer"),
    "activity_regularizer": lambda v: regularizers.VOCABULARY.get(v, "activity_regularizer"),
    "depthwise_constraint": lambda v: constraints.VOCABULARY.get(v, "depthwise_constraint"),
    "bias_constraint": lambda v: constraints.VOCABULARY.get(v, "bias_constraint"),
    "dtype": lambda v: None if v is None else _dtype(v, "dtype"),
    "param_dtype": lambda v: _dtype(v, "param_dtype"),
    "precision": _precision,
    "method": functional.check_method,
}

# The order of the keys in Keras 3's own configs.
_KERAS_ORDER = (
    "depth_multiplier",
    "kernel_size",
    "strides",
    "padding",
    "data_format",
    "dilation_rate",
    "activation",
    "use_bias",
    "depthwise_initializer",
    "bias_initializer",
    "depthwise_regularizer",
    "bias_regularizer",
    "activity_regularizer",
    "depthwise_constraint",
    "bias_constraint",
)

_VOCABULARY = {
    name: room
    for room, names in {
        activations: ["activation"],
        initializers: ["depthwise_initializer", "bias_initializer"],
        regularizers: ["depthwise_regularizer", "bias_regularizer", "activity_regularizer"],
        constraints: ["depthwise_constraint", "bias_constraint"],
    }.items()
    for name in names
}


def is_of_keras(node: Mapping[str, Any]) -> bool:
    """Whether a serialized object is Keras's: its module is, or it has none, as in old configs.

    A custom one has another module, or none and a registered name "package>Name".
    """
    module = node.get("module")
    if ">" in str(node.get("registered_name")):
        return False
    top = module.partition(".")[0] if isinstance(module, str) else module
    return top in (None, "keras", "tf_keras", "tensorflow")


def _is_of_keras_3(settings: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether Keras 3 wrote a config: Keras 2 registers no names, or it writes `groups` too."""
    objects = [whole, *(v for v in settings.values() if isinstance(v, Mapping))]
    return "groups" not in settings and any("registered_name" in v for v in objects)


# Keys that Keras 2 and 3 write and that set nothing here.
_IGNORED_KEYS = ("trainable", "groups", "batch_input_shape", "dynamic", "autocast")


def _write_dtypes(dtype: np.dtype | None, param_dtype: np.dtype) -> dict[str, Any]:
    """Returns the keys of a config from which `_read_dtypes` reads the two dtypes back."""
    compute = "float32" if dtype is None else dtype.name
    # Keras mixes float32 with two other dtypes only.
    mixed = [f"mixed_{compute}"] if compute in ("float16", "bfloat16") else []
    for name in [compute, *mixed]:
        policy = {
            "module": "keras",
            "class_name": "DTypePolicy",
            "config": {"name": name},
            "registered_name": None,
        }
        for value in (policy, name):
            if _read_dtypes({"dtype": value}) == {"dtype": dtype, "param_dtype": param_dtype}:
                return {"dtype": value}
    return {"dtype": dtype and dtype.name, "param_dtype": param_dtype.name}


def _read_dtypes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `dtype` and `param_dtype` for the policy under "dtype", in any dialect.

    The policy object "float32", Keras 3's default, is our default: promotion by Flax's rules. Every
    other policy, and the bare string "float32", casts as Keras does.
    """
    policy = config.get("dtype")
    name = policy
    if isinstance(policy, Mapping):
        inner = policy.get("config")
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str):
            raise ValueError(f"`dtype` must be a dtype or a policy with a name, got {policy!r}.")
        if name == "float32":
            name = None
    mixed = isinstance(name, str) and name.startswith("mixed_")
    dtype = (
        None if name is None else _dtype(name.removeprefix("mixed_") if mixed else name, "dtype")
    )
    param_dtype = config.get("param_dtype")
    if param_dtype is None:
        param_dtype = jnp.float32 if mixed or dtype is None else dtype
    return {"dtype": dtype, "param_dtype": _dtype(param_dtype, "param_dtype")}


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value
