"""Keras's regularizers, by name, config or object: penalties on a tensor, scalars.

The layers take all of them as `depthwise_regularizer`, `pointwise_regularizer`, `bias_regularizer`
and `activity_regularizer`; `flax_dwconv.total_loss` sums the penalties of a model. `get` shows what
a name or a config stands for.

Every penalty is computed in float32 at least, so that a float16 or bfloat16 tensor neither
overflows nor loses its small terms.

Example:
    >>> import flax_dwconv
    >>> from flax_dwconv import regularizers
    >>> layer = flax_dwconv.DepthwiseConv2D(3, depthwise_regularizer=regularizers.L2(1e-4))
    >>> regularizers.get("l2")
    L2(l2=0.01)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flax_dwconv._vocabulary import (
    Identifier,
    Refused,
    Vocabulary,
    assign,
    at_least_float32,
    choice,
    number,
    spellings,
)

Regularizer = Callable[[jax.Array], jax.Array]
Mode = Literal["rows", "columns"]


@dataclasses.dataclass(frozen=True)
class L1:
    """The sum of absolute values.

    Defined as `l1 * sum(|x|)`.

    Args:
        l1: the factor, non-negative; None is 0.01.

    Raises:
        TypeError: `l1` is not a number.
        ValueError: `l1` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> print(L1(0.5)(jnp.array([-1.0, 2.0])))
        1.5

    Source: `tf.keras.regularizers.L1`.
    """

    l1: float = 0.01
    renamed: ClassVar[dict[str, str]] = {"l": "l1"}  # Keras 2 also wrote `l`

    def __post_init__(self) -> None:
        assign(self, l1=_factor("l1", self.l1, 0.01))

    def __call__(self, x: ArrayLike) -> jax.Array:
        return self.l1 * jnp.sum(_absolute(at_least_float32(x)))


@dataclasses.dataclass(frozen=True)
class L2:
    """The sum of squares, without the factor 1/2 of some texts.

    Defined as `l2 * sum(x**2)`.

    Args:
        l2: the factor, non-negative; None is 0.01.

    Raises:
        TypeError: `l2` is not a number.
        ValueError: `l2` is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> print(L2(0.5)(jnp.array([-1.0, 2.0])))
        2.5

    Source: `tf.keras.regularizers.L2`.
    """

    l2: float = 0.01
    renamed: ClassVar[dict[str, str]] = {"l": "l2"}

    def __post_init__(self) -> None:
        assign(self, l2=_factor("l2", self.l2, 0.01))

    def __call__(self, x: ArrayLike) -> jax.Array:
        return self.l2 * jnp.sum(jnp.square(at_least_float32(x)))


@dataclasses.dataclass(frozen=True)
class L1L2:
    """Both sums.

    Defined as `l1 * sum(|x|) + l2 * sum(x**2)`.

    The class and the names 'L1L2' and 'l1l2' default to no penalty at all; Keras 2's function
    name 'l1_l2' defaults to 0.01 for both.

    Args:
        l1: the factor of the absolute values, non-negative; None is 0.
        l2: the factor of the squares, non-negative; None is 0.

    Raises:
        TypeError: a factor is not a number.
        ValueError: a factor is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> print(L1L2(l1=0.5, l2=0.25)(jnp.array([-1.0, 2.0])))
        2.75

    Source: `tf.keras.regularizers.L1L2`.
    """

    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        assign(self, l1=_factor("l1", self.l1, 0.0), l2=_factor("l2", self.l2, 0.0))

    def __call__(self, x: ArrayLike) -> jax.Array:
        return L1(self.l1)(x) + L2(self.l2)(x)


@dataclasses.dataclass(frozen=True)
class OrthogonalRegularizer:
    """Drives the rows (or columns) of a matrix towards orthogonality.

    With the n rows u_i = x_i / |x_i| it is half the mean absolute off-diagonal product,

        factor * sum over i != j of |u_i . u_j| / 2 / (n * (n - 1) / 2),

    and 0 for one row. A row shorter than 1e-6 counts as shorter than a unit vector. Only a matrix
    has rows: a depthwise kernel, of rank 4, is refused when the penalty is computed.

    Args:
        factor: non-negative.
        mode: 'rows' or 'columns'.

    Raises:
        TypeError: `factor` is not a number or `mode` no string.
        ValueError: `factor` is negative or not finite, `mode` is another word, or, at the call, the
            rank is not 2.

    Example:
        >>> import jax.numpy as jnp
        >>> print(OrthogonalRegularizer(factor=0.5)(jnp.array([[3.0, 0.0], [2.0, 0.0]])))
        0.5

    Source: `tf.keras.regularizers.OrthogonalRegularizer`.
    """

    factor: float = 0.01
    mode: Mode = "rows"

    def __post_init__(self) -> None:
        assign(
            self,
            factor=number("factor", self.factor, "finite non-negative"),
            mode=choice("mode", self.mode, get_args(Mode)),
        )

    def __call__(self, x: ArrayLike) -> jax.Array:
        if jnp.ndim(x) != 2:
            raise ValueError(
                "Inputs to OrthogonalRegularizer must have rank 2, "
                f"got an array of shape {jnp.shape(x)}."
            )
        rows = at_least_float32(x if self.mode == "rows" else jnp.transpose(x))
        n = rows.shape[0]
        squares = jnp.sum(jnp.square(rows), axis=1, keepdims=True)
        units = rows / jnp.sqrt(jnp.maximum(squares, _SHORTEST_ROW**2))
        products = jnp.matmul(units, units.T, precision="highest")
        off_diagonal = jnp.where(jnp.eye(n, dtype=bool), 0.0, _absolute(products))
        return self.factor * 0.5 * jnp.sum(off_diagonal) / max(n * (n - 1) / 2, 1.0)


_SHORTEST_ROW = 1e-6  # Keras 2; below it the gradient of |x| would not be finite


def _factor(name: str, value: float | None, default: float) -> float:
    return default if value is None else number(name, value, "finite non-negative")


VOCABULARY = Vocabulary(
    kind="regularizer",
    module="keras.regularizers",
    names=spellings(L1, L2, L1L2, OrthogonalRegularizer)
    | {"l1_l2": functools.partial(L1L2, l1=0.01, l2=0.01)}
    | dict.fromkeys(
        ("Regularizer", "regularizer"), Refused("is the base class and penalises nothing")
    ),
    slips={"weightdecay": "l2"},
    number=L2,
)


def _absolute(x: jax.Array) -> jax.Array:
    """|x| with the derivative 0 at 0, TensorFlow's; that of `jnp.abs` is 1.

    A bias that starts at 0 under an l1 penalty stays there, as in Keras, instead of drifting off.
    """
    return x * jnp.sign(x)


def get(identifier: Identifier) -> Regularizer | None:
    """Returns the penalty that a Keras identifier stands for.

    Args:
        identifier: None (which is returned); a name such as 'l2', 'L1L2' or 'l1_l2'; a config dict
            of Keras 3 or of the old tf.keras; one of the classes here, or an instance; or any
            callable x -> scalar, which is returned as it is.

    Returns:
        A callable x -> scalar, or None.

    Raises:
        TypeError: the identifier is of another type.
        ValueError: the name or an argument in the config is unknown, or its value not allowed.

    Example:
        >>> get("l2")
        L2(l2=0.01)
        >>> get({"class_name": "L1L2", "config": {"l1": 0.1}})
        L1L2(l1=0.1, l2=0.0)
        >>> get("l22")
        Traceback (most recent call last):
            ...
        ValueError: Could not interpret `regularizer` identifier: got 'l22', did you mean 'l2'?

    Source: `tf.keras.regularizers.get`.
    """
    return VOCABULARY.get(identifier)


def serialize(obj: Identifier) -> dict[str, Any] | None:
    """Returns the config dict that `get`, and Keras 3, read back.

    Args:
        obj: None, or anything that `get` takes and that is not a foreign callable.

    Returns:
        None, or a dict of JSON's types.

    Raises:
        TypeError: `get` does not take it.
        ValueError: it has no Keras name.

    Example:
        >>> serialize(L2(0.5))["config"]
        {'l2': 0.5}
        >>> get(serialize("l1_l2"))
        L1L2(l1=0.01, l2=0.01)

    Source: `tf.keras.regularizers.serialize`.
    """
    return VOCABULARY.serialize(obj)
