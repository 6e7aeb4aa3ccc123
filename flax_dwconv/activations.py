"""Keras's activations, by name, config or object: functions of an array, usually elementwise.

The layers take all of them, and any callable, as `activation`. The names are those of the functions
and classes here and of functions of `jax.nn`: celu, elu, glu, hard_silu or hard_swish, hard_tanh,
log_sigmoid, log_softmax, mish, selu, sigmoid, silu or swish, softmax, softplus, sparse_sigmoid,
tanh. Here is what `jax.nn` lacks or means otherwise, rectifiers with a cheaper derivative, and
Keras's activation layers that have arguments. Where Keras 2 and 3 differ, Keras 2 is followed
(`hard_sigmoid`). softmax, log_softmax, sparsemax and glu act along the last axis.

Example:
    >>> import flax_dwconv
    >>> layer = flax_dwconv.DepthwiseConv2D(3, activation="silu")  # or activations.LeakyReLU(0.1)
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from flax_dwconv._vocabulary import (
    Identifier,
    Refused,
    Vocabulary,
    assign,
    in_float32,
    integers,
    number,
)

Activation = Callable[[jax.Array], jax.Array]
_T = TypeVar("_T")


# Rectifier -> where its derivative is 1, told by its result. Elsewhere it is 0.
PASSES: dict[Activation, Activation] = {}


def _rectifier(passes: Activation) -> Callable[[Activation], Activation]:
    """Writes the derivative out, so that it is the same on every version of JAX."""

    def decorate(f: Activation) -> Activation:
        rectifier = jax.custom_jvp(jax.jit(f))

        @rectifier.defjvp
        def jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
            (x,), (t,) = primals, tangents
            y = rectifier(x)
            return y, lax.select(passes(y), t, lax.full_like(t, 0))

        PASSES[rectifier] = passes
        return rectifier

    return decorate


@_rectifier(lambda y: y > 0)
def relu(x: ArrayLike) -> jax.Array:
    """The rectifier.

    Defined as `max(x, 0)`, with the derivative 1 for x > 0, and 0 else.

    The derivative is taken at the result, where it is the same as at x. So nothing but the function
    itself reads x, and XLA:CPU computes a convolution, its bias and the rectifier in one loop. A
    derivative that read x would make x an array of its own in a train step, which takes 1.1 times
    as long.

    Example:
        >>> import jax
        >>> print(relu(-1.0), relu(2.0), jax.grad(relu)(0.0))
        0.0 2.0 0.0

    Source: `tf.keras.activations.relu`.
    """
    return jnp.maximum(x, 0)


@_rectifier(lambda y: (y > 0) & (y < 6))
def relu6(x: ArrayLike) -> jax.Array:
    """The rectifier that saturates at 6.

    Defined as `min(max(x, 0), 6)`, with the derivative 1 for 0 < x < 6, and 0 else; taken at the
    result, as that of `relu`.

    Example:
        >>> import jax
        >>> print(relu6(5.0), relu6(7.0), jax.grad(relu6)(6.0))
        5.0 6.0 0.0

    Source: `tf.keras.activations.relu6`.
    """
    return jnp.minimum(jnp.maximum(x, 0), 6.0)


def linear(x: _T) -> _T:
    """Returns x.

    Defined as `x`; what None stands for.

    Example:
        >>> print(linear(3.0))
        3.0

    Source: `tf.keras.activations.linear`.
    """
    return x


def exponential(x: ArrayLike) -> jax.Array:
    """The exponential function.

    Defined as `exp(x)`.

    Example:
        >>> print(exponential(0.0))
        1.0

    Source: `tf.keras.activations.exponential`.
    """
    return jnp.exp(x)


def gelu(x: ArrayLike) -> jax.Array:
    """The Gaussian error linear unit, exact; `jax.nn.gelu` defaults to its tanh approximation.

    Defined as `x * (1 + erf(x / sqrt(2))) / 2`.

    Example:
        >>> print(gelu(1.0).round(3))
        0.841

    Source: `tf.keras.activations.gelu`; Hendrycks and Gimpel (2016).
    """
    return jax.nn.gelu(x, approximate=False)


def leaky_relu(x: ArrayLike) -> jax.Array:
    """The leaky rectifier with the slope 0.2; `jax.nn.leaky_relu` defaults to 0.01.

    Defined as `x` for x >= 0, `0.2 * x` else. The layer name 'LeakyReLU' stands for 0.3.

    Example:
        >>> print(leaky_relu(-1.0))
        -0.2

    Source: `tf.keras.activations.leaky_relu`.
    """
    return jax.nn.leaky_relu(x, 0.2)


def hard_sigmoid(x: ArrayLike) -> jax.Array:
    """The piecewise linear sigmoid of Keras 2; that of Keras 3 and `jax.nn` has the slope 1/6.

    Defined as `clip(0.2 * x + 0.5, 0, 1)`.

    Example:
        >>> print(hard_sigmoid(1.0))
        0.7

    Source: `tf.keras.activations.hard_sigmoid`.
    """
    return jnp.clip(0.2 * jnp.asarray(x) + 0.5, 0.0, 1.0)


@in_float32
def softsign(x: jax.Array) -> jax.Array:
    """The algebraic sigmoid.

    Defined as `x / (1 + |x|)`.

    Example:
        >>> print(softsign(3.0))
        0.75

    Source: `tf.keras.activations.softsign`.
    """
    return jax.nn.soft_sign(x)


@in_float32
def squareplus(x: jax.Array) -> jax.Array:
    """A smooth rectifier without exponentials.

    Defined as `(x + sqrt(x**2 + 4)) / 2`.

    Example:
        >>> print(squareplus(0.0))
        1.0

    Source: `keras.activations.squareplus`; Barron (2021).
    """
    # f(x) * f(-x) = 1: the sum is taken where it does not cancel.
    size = jnp.where(x >= 0, x, -x)
    y = (size + jnp.sqrt(jnp.square(x) + 4)) / 2
    return jnp.where(x >= 0, y, 1 / y)


def sparse_plus(x: ArrayLike) -> jax.Array:
    """A smooth rectifier that is exactly linear, or 0, outside [-1, 1].

    Defined as 0 for x <= -1, `(x + 1)**2 / 4` between, `x` for x >= 1.

    Example:
        >>> print(sparse_plus(0.0))
        0.25

    Source: `keras.activations.sparse_plus`.
    """
    x = jnp.asarray(x)
    # Clipped, for the square of a large x is infinite and its gradient then not a number.
    return jnp.where(x >= 1, x, jnp.square(jnp.clip(x, -1.0, 1.0) + 1) / 4)


def hard_shrink(x: ArrayLike) -> jax.Array:
    """Keeps what is larger than 1/2.

    Defined as `x` where |x| > 0.5, 0 else.

    Example:
        >>> import jax.numpy as jnp
        >>> print(hard_shrink(jnp.array([-2.0, 0.4])))
        [-2.  0.]

    Source: `keras.activations.hard_shrink`.
    """
    x = jnp.asarray(x)
    return jnp.where(jnp.abs(x) > 0.5, x, 0.0)


def soft_shrink(x: ArrayLike) -> jax.Array:
    """Moves everything by 1/2 towards zero.

    Defined as `x - clip(x, -0.5, 0.5)`.

    Example:
        >>> import jax.numpy as jnp
        >>> print(soft_shrink(jnp.array([-2.0, 0.4])))
        [-1.5  0. ]

    Source: `keras.activations.soft_shrink`.
    """
    x = jnp.asarray(x)
    return jnp.where(jnp.abs(x) > 0.5, x - 0.5 * jnp.sign(x), 0.0)


@in_float32
def tanh_shrink(x: jax.Array) -> jax.Array:
    """What tanh takes away.

    Defined as `x - tanh(x)`.

    Example:
        >>> print(tanh_shrink(1.0).round(3))
        0.238

    Source: `keras.activations.tanh_shrink`.
    """
    return x - jnp.tanh(x)


@in_float32
def sparsemax(x: jax.Array) -> jax.Array:
    """The Euclidean projection of the last axis onto the probability simplex.

    Defined as `max(x - tau, 0)`, where tau makes the sum 1: with the descending order
    s_1 >= s_2 >= ... and the largest k for which 1 + k * s_k > s_1 + ... + s_k, it is
    tau = (s_1 + ... + s_k - 1) / k.

    Keras's sparsemax subtracts a wrong tau for some inputs and then exceeds 1; this is the paper's.

    Example:
        >>> import jax.numpy as jnp
        >>> print(sparsemax(jnp.array([1.0, 0.5, -1.0])))
        [0.75 0.25 0.  ]

    Source: Martins and Astudillo, From Softmax to Sparsemax (2016), algorithm 1.
    """
    z = x - lax.stop_gradient(jnp.max(x, axis=-1, keepdims=True))
    # The support (the k largest) is locally constant, so that only tau carries a gradient.
    descending = -jnp.sort(-lax.stop_gradient(z), axis=-1)
    k = jnp.broadcast_to(jnp.arange(1, z.shape[-1] + 1).astype(z.dtype), z.shape)
    size = jnp.sum(1 + k * descending > jnp.cumsum(descending, axis=-1), axis=-1, keepdims=True)
    smallest = jnp.take_along_axis(descending, size - 1, axis=-1)
    support = z >= smallest
    size = jnp.sum(support, axis=-1, keepdims=True).astype(z.dtype)
    tau = (jnp.sum(jnp.where(support, z, 0.0), axis=-1, keepdims=True) - 1) / size
    return jax.nn.relu(z - tau)


@dataclasses.dataclass(frozen=True)
class ReLU:
    """The rectifier with Keras's arguments.

    Defined as `min(x, max_value)` for x > threshold, `-negative_slope * (threshold - x)` else.

    Args:
        max_value: the saturation, non-negative, or None for none.
        negative_slope: the slope below the threshold, non-negative; `alpha` in a config.
        threshold: non-negative.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> print(ReLU(max_value=6.0, negative_slope=0.5)(jnp.array([-2.0, 3.0, 9.0])))
        [-1.  3.  6.]

    Source: `tf.keras.layers.ReLU`.
    """

    max_value: float | None = None
    negative_slope: float = 0.0
    threshold: float = 0.0
    renamed: ClassVar[dict[str, str]] = {"alpha": "negative_slope"}

    def __post_init__(self) -> None:
        names = ["negative_slope", "threshold"] + ["max_value"] * (self.max_value is not None)
        assign(self, **{n: number(n, getattr(self, n), "finite non-negative") for n in names})

    def __call__(self, x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        y = jnp.where(x > self.threshold, x, 0.0)
        if self.max_value is not None:
            y = jnp.minimum(y, self.max_value)
        if self.negative_slope:
            y = y - self.negative_slope * jax.nn.relu(self.threshold - x)
        return y


@dataclasses.dataclass(frozen=True)
class LeakyReLU:
    """The leaky rectifier.

    Defined as `x` for x >= 0, `negative_slope * x` else.

    Args:
        negative_slope: non-negative; `alpha` in a config of Keras 2.

    Raises:
        TypeError: the slope is not a number.
        ValueError: the slope is negative or not finite.

    Example:
        >>> print(LeakyReLU()(-1.0))
        -0.3

    Source: `tf.keras.layers.LeakyReLU`.
    """

    negative_slope: float = 0.3
    renamed: ClassVar[dict[str, str]] = {"alpha": "negative_slope"}

    def __post_init__(self) -> None:
        slope = number("negative_slope", self.negative_slope, "finite non-negative")
        assign(self, negative_slope=slope)

    def __call__(self, x: ArrayLike) -> jax.Array:
        return jax.nn.leaky_relu(x, self.negative_slope)


@dataclasses.dataclass(frozen=True)
class ELU:
    """The exponential linear unit.

    Defined as `x` for x > 0, `alpha * (exp(x) - 1)` else.

    Args:
        alpha: minus the limit towards minus infinity.

    Raises:
        TypeError: `alpha` is not a number.
        ValueError: `alpha` is not finite.

    Example:
        >>> print(ELU(2.0)(-100.0))
        -2.0

    Source: `tf.keras.layers.ELU`; Clevert et al. (2016).
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        assign(self, alpha=number("alpha", self.alpha))

    def __call__(self, x: ArrayLike) -> jax.Array:
        return jax.nn.elu(x, self.alpha)


@dataclasses.dataclass(frozen=True)
class Softmax:
    """The softmax along given axes.

    Defined as `exp(x) / sum(exp(x))`.

    Args:
        axis: int or tuple, the axes of the sum.

    Raises:
        TypeError: `axis` is not made of ints.
        ValueError: `axis` is empty or repeats.

    Example:
        >>> import jax.numpy as jnp
        >>> print(Softmax(axis=0)(jnp.zeros((2, 1)))[:, 0])
        [0.5 0.5]

    Source: `tf.keras.layers.Softmax`.
    """

    axis: int | tuple[int, ...] = -1

    def __post_init__(self) -> None:
        assign(self, axis=integers("axis", self.axis))

    def __call__(self, x: ArrayLike) -> jax.Array:
        return jax.nn.softmax(x, self.axis)


@dataclasses.dataclass(frozen=True)
class ThresholdedReLU:
    """The rectifier that starts at `theta`. Keras 3 has no such layer.

    Defined as `x` for x > theta, 0 else.

    Args:
        theta: non-negative.

    Raises:
        TypeError: `theta` is not a number.
        ValueError: `theta` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> print(ThresholdedReLU()(jnp.array([0.5, 2.0])))
        [0. 2.]

    Source: `tf.keras.layers.ThresholdedReLU`; Konda et al. (2014).
    """

    theta: float = 1.0

    def __post_init__(self) -> None:
        assign(self, theta=number("theta", self.theta, "finite non-negative"))

    def __call__(self, x: ArrayLike) -> jax.Array:
        return Threshold(self.theta, 0.0)(x)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Replaces what is not above a threshold.

    Defined as `x` for x > threshold, `default_value` else.

    Keras has it as the function 'threshold', which cannot be called without its arguments; so the
    bare name is refused, and a config dict with both arguments is taken (by this library alone).

    Args:
        threshold: any number.
        default_value: any number.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> print(Threshold(1.0, -1.0)(jnp.array([0.5, 2.0])))
        [-1.  2.]

    Source: `keras.activations.threshold`.
    """

    threshold: float
    default_value: float

    def __post_init__(self) -> None:
        names = ["threshold", "default_value"]
        assign(self, **{name: number(name, getattr(self, name)) for name in names})

    def __call__(self, x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        return jnp.where(x > self.threshold, x, self.default_value)


# Names of `jax.nn` that mean the same there.
_OF_JAX = [
    *["celu", "elu", "glu", "hard_silu", "hard_tanh", "log_sigmoid", "log_softmax", "mish", "selu"],
    *["sigmoid", "silu", "softmax", "softplus", "sparse_sigmoid"],
]

# The first of several names of one function is the one that `serialize` writes.
_FUNCTIONS = (
    {name: getattr(jax.nn, name) for name in _OF_JAX}
    | {
        f.__name__: f
        for f in [
            *[exponential, gelu, hard_shrink, hard_sigmoid, leaky_relu, linear, relu, relu6],
            *[soft_shrink, softsign, sparse_plus, sparsemax, squareplus, tanh_shrink],
        ]
    }
    | {"hard_swish": jax.nn.hard_silu, "swish": jax.nn.silu, "tanh": jnp.tanh}
)

VOCABULARY = Vocabulary(
    kind="activation",
    module="keras.layers",
    names=_FUNCTIONS
    | {cls.__name__: cls for cls in (ReLU, LeakyReLU, ELU, Softmax, ThresholdedReLU, Threshold)}
    | {"threshold": Threshold}
    | dict.fromkeys(("PReLU", "prelu"), Refused("has weights, as an activation function cannot")),
    none=linear,
    ignored=frozenset({"name", "trainable", "dtype", "batch_input_shape"}),  # of every Keras layer
    synonyms=(
        (jax.nn.leaky_relu, LeakyReLU(0.01)),
        (jax.nn.relu, relu),
        (jax.nn.relu6, relu6),
        (jax.nn.soft_sign, softsign),
        (jax.nn.sparse_plus, sparse_plus),
        (jax.nn.squareplus, squareplus),
        (jax.nn.swish, jax.nn.silu),
        (jax.nn.hard_swish, jax.nn.hard_silu),
        (jax.nn.tanh, jnp.tanh),
        (jax.nn.identity, linear),
        (lax.tanh, jnp.tanh),
        (lax.logistic, jax.nn.sigmoid),
        (lax.exp, exponential),
        (jnp.exp, exponential),
    ),
    slips={
        "hsigmoid": "hard_sigmoid",
        "hswish": "hard_swish",
        "identity": "linear",
        "none": "linear",
    },
)


def get(identifier: Identifier) -> Activation:
    """Returns the function that a Keras identifier stands for.

    Args:
        identifier: None (which is `linear`); a name such as 'relu' or 'LeakyReLU'; a config dict of
            Keras 3 or of the old tf.keras, such as an activation layer has; one of the classes
            here, or an instance; or any callable, which is returned as it is.

    Returns:
        A callable x -> array of the same shape ('glu' halves the last axis).

    Raises:
        TypeError: the identifier is of another type.
        ValueError: the name or an argument in the config is unknown, its value not allowed, or the
            activation cannot be used without weights ('PReLU') or arguments ('threshold').

    Example:
        >>> print(get("relu")(-1.0))
        0.0
        >>> get({"class_name": "LeakyReLU", "config": {"alpha": 0.1}})
        LeakyReLU(negative_slope=0.1)

    Source: `tf.keras.activations.get`.
    """
    return VOCABULARY.get(identifier)


def serialize(obj: Identifier) -> str | dict[str, Any]:
    """Returns the Keras name of an activation, or its config dict if it has arguments.

    Keras 3 reads them back, except ThresholdedReLU and Threshold, which it lacks; and it means
    another slope by 'hard_sigmoid'. A function of `jax.nn` gets its Keras name where it means the
    same: `jax.nn.gelu`, approximate by default, and `jax.nn.hard_sigmoid` have none.

    Args:
        obj: anything that `get` takes and that is not a foreign callable.

    Returns:
        A name, or a dict of JSON's types.

    Raises:
        TypeError: `get` does not take it.
        ValueError: it has no Keras name.

    Example:
        >>> serialize(None)
        'linear'
        >>> import jax
        >>> serialize(jax.nn.relu)
        'relu'
        >>> serialize(ELU(2.0))["config"]
        {'alpha': 2.0}

    Source: `tf.keras.activations.serialize`.
    """
    return VOCABULARY.serialize(obj)
