"""Keras's initializers, by name, config or object: functions `f(key, shape, dtype)`.

That is how those of `jax.nn.initializers` are called too. The layers take all of them as
`depthwise_initializer`, `pointwise_initializer` and `bias_initializer`. `get` shows what a name or
a config stands for; a name is a class's, "HeNormal", or the same in small letters, "he_normal".

The fans of a kernel (kh, kw, c, m) are Keras's, fan_in = kh * kw * c and fan_out = kh * kw * m,
though a depthwise output sees kh * kw inputs only; a vector's length is both its fans. `HeNormal`
and the like take the `seed`, `input_axes` and `output_axes` of `VarianceScaling`.

An initializer with a `seed` ignores the key and gives, in float32, the bits that Keras gives on its
JAX backend for the same seed; without a seed it draws from the key.

Example:
    >>> import flax_dwconv
    >>> layer = flax_dwconv.DepthwiseConv2D(3, depthwise_initializer="he_normal")
    >>> layer = flax_dwconv.DepthwiseConv2D(3, depthwise_initializer=HeNormal(seed=1))
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from flax_dwconv._random import Axes, Key, Shape, check_axes, check_seed, fans, seeded_key
from flax_dwconv._vocabulary import (
    Identifier,
    Refused,
    Vocabulary,
    assign,
    choice,
    number,
    real_array,
    spellings,
)

Initializer = Callable[[jax.Array, Shape, DTypeLike], jax.Array]
Mode = Literal["fan_in", "fan_out", "fan_avg"]
Distribution = Literal["truncated_normal", "untruncated_normal", "uniform"]


@dataclasses.dataclass(frozen=True)
class Zeros:
    """All 0.

    Example:
        >>> print(Zeros()(None, (2,)))
        [0. 0.]

    Source: `tf.keras.initializers.Zeros`.
    """

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jnp.zeros(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Ones:
    """All 1.

    Example:
        >>> print(Ones()(None, (2,)))
        [1. 1.]

    Source: `tf.keras.initializers.Ones`.
    """

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jnp.ones(shape, dtype)


@dataclasses.dataclass(frozen=True)
class Constant:
    """All the same number.

    Args:
        value: the number.

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is not finite.

    Example:
        >>> print(Constant(0.5)(None, (2,)))
        [0.5 0.5]

    Source: `tf.keras.initializers.Constant`.
    """

    value: float = 0.0

    def __post_init__(self) -> None:
        assign(self, value=number("value", self.value))

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Identity:
    """A multiple of the identity matrix; for matrices only, so never for a depthwise kernel.

    Args:
        gain: the factor.

    Raises:
        TypeError: `gain` is not a number.
        ValueError: `gain` is not finite or, at the call, the shape is not of rank 2.

    Example:
        >>> print(Identity(2.0)(None, (2, 2)))
        [[2. 0.]
         [0. 2.]]

    Source: `tf.keras.initializers.Identity`.
    """

    gain: float = 1.0

    def __post_init__(self) -> None:
        assign(self, gain=number("gain", self.gain))

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        if len(shape) != 2:
            raise ValueError(f"`Identity` must initialize a matrix, got the shape {tuple(shape)}.")
        return self.gain * jnp.eye(*shape, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class _NormalArguments:
    """What the two normal distributions have in common."""

    mean: float = 0.0
    stddev: float = 0.05
    seed: int | None = None

    def __post_init__(self) -> None:
        assign(
            self,
            mean=number("mean", self.mean),
            stddev=number("stddev", self.stddev, "finite non-negative"),
            seed=check_seed(self.seed),
        )


class RandomNormal(_NormalArguments):
    """Independent normal numbers.

    Defined as `mean + stddev * z`, z standard normal.

    Args:
        mean: the mean.
        stddev: the standard deviation, non-negative.
        seed: int or None, see the module.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range.

    Example:
        >>> RandomNormal(stddev=0.1, seed=3)(None, (3, 3, 4, 2)).shape
        (3, 3, 4, 2)

    Source: `tf.keras.initializers.RandomNormal`.
    """

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        z = jax.random.normal(seeded_key(self.seed, key), shape, dtype)
        return z * self.stddev + self.mean


class TruncatedNormal(_NormalArguments):
    """Independent normal numbers, cut at two standard deviations.

    Defined as `mean + stddev * z`, z standard normal under the condition |z| < 2.

    Args:
        mean: the mean.
        stddev: the standard deviation before the cut, non-negative.
        seed: int or None, see the module.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range.

    Example:
        >>> bool(abs(TruncatedNormal(seed=3)(None, (100,))).max() <= 0.1)
        True

    Source: `tf.keras.initializers.TruncatedNormal`.
    """

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        z = jax.random.truncated_normal(seeded_key(self.seed, key), -2.0, 2.0, shape, dtype)
        return z * self.stddev + self.mean


@dataclasses.dataclass(frozen=True)
class RandomUniform:
    """Independent numbers, uniform in [minval, maxval).

    Args:
        minval: the lower end.
        maxval: the upper end, not below `minval`.
        seed: int or None, see the module.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range.

    Example:
        >>> bool(abs(RandomUniform(seed=3)(None, (100,))).max() <= 0.05)
        True

    Source: `tf.keras.initializers.RandomUniform`.
    """

    minval: float = -0.05
    maxval: float = 0.05
    seed: int | None = None

    def __post_init__(self) -> None:
        assign(
            self,
            minval=number("minval", self.minval),
            maxval=number("maxval", self.maxval),
            seed=check_seed(self.seed),
        )
        if self.minval > self.maxval:
            raise ValueError(
                f"`minval` must not exceed `maxval` (={self.maxval}), got {self.minval}."
            )

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        key = seeded_key(self.seed, key)
        return jax.random.uniform(key, shape, dtype, self.minval, self.maxval)


@dataclasses.dataclass(frozen=True)
class Orthogonal:
    """A multiple of a random matrix with orthonormal columns, or rows where those are fewer.

    A kernel (..., m) is the matrix (product of the other axes, m). The matrix is Q of the QR
    decomposition of normal numbers, its columns turned so that R has a positive diagonal.

    Args:
        gain: the factor.
        seed: int or None, see the module.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is out of its range or, at the call, the shape has a rank below 2.

    Example:
        >>> kernel = Orthogonal(seed=3)(None, (3, 3, 1, 2)).reshape(9, 2)
        >>> print(abs(kernel.T @ kernel).round(3))
        [[1. 0.]
         [0. 1.]]

    Source: `tf.keras.initializers.Orthogonal`; Saxe et al. (2014).
    """

    gain: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        assign(self, gain=number("gain", self.gain), seed=check_seed(self.seed))

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        if len(shape) < 2:
            raise ValueError(
                f"`Orthogonal` must initialize at least a matrix, got the shape {tuple(shape)}."
            )
        rows, columns = math.prod(shape[:-1]), shape[-1]
        # There is no QR in half precision.
        wide = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
        key = seeded_key(self.seed, key)
        a = jax.random.normal(key, (max(rows, columns), min(rows, columns)), wide)
        q, r = jnp.linalg.qr(a)
        q = q * jnp.sign(jnp.diag(r))[None, :]
        return (self.gain * (q.T if rows < columns else q).reshape(shape)).astype(dtype)


_NEWER = {"optional": True}  # keys that Keras knows since 3.15: not written while they are None
_SHRINKAGE = 0.87962566103423978  # the standard deviation of a normal distribution cut at +-2


@dataclasses.dataclass(frozen=True)
class VarianceScaling:
    """Independent numbers whose variance is `scale` divided by a fan.

    With n = fan_in, fan_out or their mean, at least 1: a normal distribution of the variance
    `scale / n`, cut at two standard deviations ('truncated_normal', the variance being that after
    the cut) or not, or a uniform one in `sqrt(3 * scale / n) * [-1, 1)`.

    Args:
        scale: positive.
        mode: 'fan_in', 'fan_out' or 'fan_avg', the mean.
        distribution: 'truncated_normal' (or 'normal'), 'untruncated_normal' or 'uniform'.
        seed: int or None, see the module.
        input_axes: the axes whose product is fan_in, or None; together with `output_axes`.
        output_axes: the axes whose product is fan_out, or None.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of its range or another word.

    Example:
        >>> import jax
        >>> kernel = VarianceScaling(2.0, "fan_out")(jax.random.key(0), (3, 3, 8, 64))
        >>> print(kernel.var().round(3))  # 2 / (3 * 3 * 64)
        0.003

    Source: `tf.keras.initializers.VarianceScaling`.
    """

    scale: float = 1.0
    mode: Mode = "fan_in"
    distribution: Distribution = "truncated_normal"
    seed: int | None = None
    input_axes: Axes = dataclasses.field(default=None, metadata=_NEWER)
    output_axes: Axes = dataclasses.field(default=None, metadata=_NEWER)

    def __post_init__(self) -> None:
        distribution = self.distribution
        if isinstance(distribution, str):
            distribution = distribution.lower()
            if distribution == "normal":
                distribution = "truncated_normal"
        assign(
            self,
            scale=number("scale", self.scale, "finite positive"),
            mode=choice("mode", self.mode, get_args(Mode)),
            distribution=choice("distribution", distribution, get_args(Distribution)),
            seed=check_seed(self.seed),
            **check_axes(self.input_axes, self.output_axes),
        )

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        fan_in, fan_out = fans(shape, self.input_axes, self.output_axes)
        fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[self.mode]
        variance = self.scale / max(1.0, fan)
        key = seeded_key(self.seed, key)
        if self.distribution == "truncated_normal":
            z = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
            return z * (math.sqrt(variance) / _SHRINKAGE)
        if self.distribution == "untruncated_normal":
            return jax.random.normal(key, shape, dtype) * math.sqrt(variance)
        limit = math.sqrt(3.0 * variance)
        return jax.random.uniform(key, shape, dtype, -limit, limit)


@dataclasses.dataclass(frozen=True)
class _NamedScaling:
    """A VarianceScaling under a name of its own, whose first three arguments are fixed."""

    seed: int | None = None
    input_axes: Axes = dataclasses.field(default=None, metadata=_NEWER)
    output_axes: Axes = dataclasses.field(default=None, metadata=_NEWER)
    scale: ClassVar[float]
    mode: ClassVar[Mode]
    distribution: ClassVar[Distribution]

    def __post_init__(self) -> None:
        axes = check_axes(self.input_axes, self.output_axes)
        assign(self, seed=check_seed(self.seed), **axes)

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        fixed, given = (self.scale, self.mode, self.distribution), dataclasses.astuple(self)
        return VarianceScaling(*fixed, *given)(key, shape, dtype)


class GlorotNormal(_NamedScaling):
    """`VarianceScaling(1.0, "fan_avg")`: truncated normal, variance 2 / (fan_in + fan_out).

    Example:
        >>> GlorotNormal(seed=3)
        GlorotNormal(seed=3, input_axes=None, output_axes=None)

    Source: `tf.keras.initializers.GlorotNormal`; Glorot and Bengio (2010).
    """

    scale, mode, distribution = 1.0, "fan_avg", "truncated_normal"


class GlorotUniform(_NamedScaling):
    """`VarianceScaling(1.0, "fan_avg", "uniform")`: in sqrt(6 / (fan_in + fan_out)) * [-1, 1).

    Keras's default for kernels.

    Example:
        >>> kernel = GlorotUniform(seed=3)(None, (3, 3, 64, 32))
        >>> print(kernel.max().round(3))  # sqrt(6 / (3 * 3 * (64 + 32)))
        0.083

    Source: `tf.keras.initializers.GlorotUniform`; Glorot and Bengio (2010).
    """

    scale, mode, distribution = 1.0, "fan_avg", "uniform"


class HeNormal(_NamedScaling):
    """`VarianceScaling(2.0)`: truncated normal, variance 2 / fan_in.

    Example:
        >>> kernel = HeNormal(seed=3)(None, (3, 3, 64, 32))
        >>> print(kernel.var().round(4))  # 2 / (3 * 3 * 64)
        0.0035

    Source: `tf.keras.initializers.HeNormal`; He et al. (2015).
    """

    scale, mode, distribution = 2.0, "fan_in", "truncated_normal"


class HeUniform(_NamedScaling):
    """`VarianceScaling(2.0, distribution="uniform")`: in sqrt(6 / fan_in) * [-1, 1).

    Example:
        >>> kernel = HeUniform(seed=3)(None, (3, 3, 64, 32))
        >>> print(kernel.max().round(3))  # sqrt(6 / (3 * 3 * 64))
        0.102

    Source: `tf.keras.initializers.HeUniform`; He et al. (2015).
    """

    scale, mode, distribution = 2.0, "fan_in", "uniform"


class LecunNormal(_NamedScaling):
    """`VarianceScaling(1.0)`: truncated normal, variance 1 / fan_in.

    Example:
        >>> kernel = LecunNormal(seed=3)(None, (3, 3, 64, 32))
        >>> print(kernel.var().round(4))  # 1 / (3 * 3 * 64)
        0.0017

    Source: `tf.keras.initializers.LecunNormal`; Klambauer et al. (2017).
    """

    scale, mode, distribution = 1.0, "fan_in", "truncated_normal"


class LecunUniform(_NamedScaling):
    """`VarianceScaling(1.0, distribution="uniform")`: in sqrt(3 / fan_in) * [-1, 1).

    Example:
        >>> kernel = LecunUniform(seed=3)(None, (3, 3, 64, 32))
        >>> print(kernel.max().round(3))  # sqrt(3 / (3 * 3 * 64))
        0.072

    Source: `tf.keras.initializers.LecunUniform`.
    """

    scale, mode, distribution = 1.0, "fan_in", "uniform"


class Array:
    """The values of an array, for a parameter of exactly its shape.

    Args:
        values: a numpy or jax array of real numbers; copied.
        argument: what error messages call it.

    Raises:
        TypeError: it is no array, does not hold real numbers, or is traced by jax.
        ValueError: at the call, the shape is another one.

    Example:
        >>> import numpy as np
        >>> initializer = Array(np.ones((3, 3, 4, 1)))
        >>> initializer
        Array(shape=(3, 3, 4, 1), dtype=float64)
        >>> initializer(None, (3, 3, 4, 1)).dtype
        dtype('float32')

    Source: `keras.initializers.get`, which takes arrays.
    """

    def __init__(self, values: jax.Array | np.ndarray, argument: str = "initializer") -> None:
        self._argument, self._values = argument, real_array(argument, values)

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike = jnp.float32) -> jax.Array:
        if tuple(shape) != self._values.shape:
            raise ValueError(
                f"`{self._argument}` must be an array of the parameter's shape {tuple(shape)}, "
                f"got an array of shape {self._values.shape}."
            )
        return jnp.asarray(self._values.astype(dtype))

    def _identity(self) -> tuple[Any, ...]:
        return self._values.shape, str(self._values.dtype), self._values.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"Array(shape={self._values.shape}, dtype={self._values.dtype})"


_NAMES = spellings(
    *[Constant, Identity, Ones, Zeros, RandomNormal, RandomUniform, TruncatedNormal, Orthogonal],
    *[VarianceScaling, GlorotNormal, GlorotUniform, HeNormal, HeUniform, LecunNormal, LecunUniform],
)

VOCABULARY = Vocabulary(
    kind="initializer",
    module="keras.initializers",
    names=_NAMES
    | {f"{name}V2": cls for name, cls in _NAMES.items()}
    | {
        "IdentityInitializer": Identity,
        "OrthogonalInitializer": Orthogonal,
        "normal": RandomNormal,
        "uniform": RandomUniform,
        "one": Ones,
        "zero": Zeros,
    }
    | dict.fromkeys(("Initializer", "initializer"), Refused("is the base class and has no values"))
    | dict.fromkeys(
        ("STFT", "stft", "STFTInitializer"),
        Refused("fills a kernel of shape (time, 1, frequency), as no depthwise layer has"),
    ),
    ignored=frozenset({"dtype"}),  # of TensorFlow 1
    synonyms=((jax.nn.initializers.zeros, Zeros()), (jax.nn.initializers.ones, Ones())),
    slips={
        "gaussian": "random_normal",
        "glorot": "glorot_uniform",  # Keras's default for kernels
        "he": "he_normal",
        "kaiming": "he_uniform",  # PyTorch's default for kernels
        "kaimingnormal": "he_normal",
        "kaiminguniform": "he_uniform",
        "lecun": "lecun_normal",
        "xavier": "glorot_uniform",
        "xaviernormal": "glorot_normal",
        "xavieruniform": "glorot_uniform",
    },
    number=Constant,
    array=Array,
)


def get(identifier: Identifier | jax.Array | np.ndarray) -> Initializer | None:
    """Returns the initializer that a Keras identifier stands for.

    Args:
        identifier: None (which is returned); a name such as 'he_normal', 'zeros' or 'HeNormalV2';
            a config dict of Keras 3 or of the old tf.keras; one of the classes here, or an
            instance; a numpy or jax array, for a parameter of its shape; or any callable
            f(key, shape, dtype) such as those of `jax.nn.initializers`, returned as it is.

    Returns:
        A callable f(key, shape, dtype=float32) -> array, or None.

    Raises:
        TypeError: the identifier is of another type.
        ValueError: the name or an argument in the config is unknown, or its value not allowed.

    Example:
        >>> get("random_normal")
        RandomNormal(mean=0.0, stddev=0.05, seed=None)
        >>> get({"class_name": "Constant", "config": {"value": 2}})
        Constant(value=2.0)

    Source: `tf.keras.initializers.get`.
    """
    return VOCABULARY.get(identifier)


def serialize(obj: Identifier) -> dict[str, Any] | None:
    """Returns the config dict that `get`, and Keras 3, read back.

    Args:
        obj: None, or anything that `get` takes and that is not an array or a foreign callable.

    Returns:
        None, or a dict of JSON's types.

    Raises:
        TypeError: `get` does not take it.
        ValueError: it has no Keras name, as an array has none.

    Example:
        >>> serialize("he_normal")["class_name"]
        'HeNormal'
        >>> serialize(HeNormal(seed=3))["config"]
        {'seed': 3}

    Source: `tf.keras.initializers.serialize`.
    """
    return VOCABULARY.serialize(obj)
