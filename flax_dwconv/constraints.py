"""Keras's constraints, by name, config or object: projections of a weight after each update.

The layers take all of them as `depthwise_constraint`, `pointwise_constraint` and `bias_constraint`,
and store them; an optimizer applies them with `flax_dwconv.constrain`. `get` shows what a name or a
config stands for.

Every projection is computed in float32 at least and returned in the weight's dtype. Norms are
|w| = sqrt(sum(w**2)) over `axis`; epsilon is 1e-7, and shortens even an allowed vector of norm 1 by
that share.

On a depthwise kernel (kh, kw, c, m) Keras's default `axis=0` is the norm along the height alone;
the norm of each filter is `axis=(0, 1)`.

Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import flax_dwconv
    >>> from flax_dwconv import constraints
    >>> of_filters = constraints.MaxNorm(1.0, axis=(0, 1))
    >>> layer = flax_dwconv.DepthwiseConv2D(3, depthwise_constraint=of_filters)
    >>> found = flax_dwconv.collect_constraints(layer, jnp.ones((1, 8, 8, 4)))
    >>> tx = optax.chain(optax.sgd(0.1), flax_dwconv.constrain(found))  # the last of the chain
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flax_dwconv._vocabulary import (
    Identifier,
    Vocabulary,
    assign,
    at_least_float32,
    integers,
    number,
    spellings,
)

Projection = Callable[[jax.Array], jax.Array]
_T = TypeVar("_T")

_EPSILON = 1e-7


@dataclasses.dataclass(frozen=True)
class Constraint:
    """No constraint: w stays w, as Keras's base class has it.

    Example:
        >>> print(Constraint()(3.0))
        3.0

    Source: `tf.keras.constraints.Constraint`.
    """

    def __call__(self, w: _T) -> _T:
        return w


@dataclasses.dataclass(frozen=True)
class MaxNorm:
    """Shortens vectors that are longer than `max_value`.

    Defined as `w * clip(|w|, 0, max_value) / (epsilon + |w|)`.

    Args:
        max_value: the greatest norm, non-negative.
        axis: int or tuple, the axes of one vector; (0, 1) for one filter of a depthwise kernel.

    Raises:
        TypeError: `max_value` is not a number or `axis` not made of ints.
        ValueError: `max_value` is negative or not finite, `axis` is empty or repeats, or, at the
            call, the weight has no such axis.

    Example:
        >>> import jax.numpy as jnp
        >>> print(MaxNorm(1.0)(jnp.array([3.0, 4.0])).round(3))
        [0.6 0.8]

    Source: `tf.keras.constraints.MaxNorm`; Srivastava et al., Dropout (2014), section 5.1.
    """

    max_value: float = 2.0
    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        assign(
            self,
            max_value=number("max_value", self.max_value, "finite non-negative"),
            axis=integers("axis", self.axis),
        )

    def __call__(self, w: ArrayLike) -> jax.Array:
        return _rescale(w, self.axis, lambda norm: jnp.clip(norm, 0.0, self.max_value))


@dataclasses.dataclass(frozen=True)
class NonNeg:
    """Sets negative weights to zero.

    Defined as `max(w, 0)`.

    Example:
        >>> import jax.numpy as jnp
        >>> print(NonNeg()(jnp.array([-1.0, 2.0])))
        [0. 2.]

    Source: `tf.keras.constraints.NonNeg`.
    """

    def __call__(self, w: ArrayLike) -> jax.Array:
        return jnp.maximum(w, 0)


@dataclasses.dataclass(frozen=True)
class UnitNorm:
    """Gives every vector the norm 1.

    Defined as `w / (epsilon + |w|)`.

    Args:
        axis: int or tuple, the axes of one vector; (0, 1) for one filter of a depthwise kernel.

    Raises:
        TypeError: `axis` is not made of ints.
        ValueError: `axis` is empty or repeats, or, at the call, the weight has no such axis.

    Example:
        >>> import jax.numpy as jnp
        >>> print(UnitNorm()(jnp.array([3.0, 4.0])).round(3))
        [0.6 0.8]

    Source: `tf.keras.constraints.UnitNorm`.
    """

    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        assign(self, axis=integers("axis", self.axis))

    def __call__(self, w: ArrayLike) -> jax.Array:
        return _rescale(w, self.axis, jnp.ones_like)


@dataclasses.dataclass(frozen=True)
class MinMaxNorm:
    """Moves norms into [min_value, max_value], by the share `rate` of the way at each update.

    Defined as `w * (rate * clip(|w|, min_value, max_value) + (1 - rate) * |w|) / (epsilon + |w|)`.

    Args:
        min_value: the least norm, non-negative.
        max_value: the greatest norm, not below `min_value`.
        rate: in [0, 1]; 1 projects at once.
        axis: int or tuple, the axes of one vector; (0, 1) for one filter of a depthwise kernel.

    Raises:
        TypeError: an argument is not a number or `axis` not made of ints.
        ValueError: a number is out of its range, `axis` is empty or repeats, or, at the call, the
            weight has no such axis.

    Example:
        >>> import jax.numpy as jnp
        >>> print(MinMaxNorm(1.0, 2.0, rate=0.5)(jnp.array([3.0, 4.0])).round(3))
        [2.1 2.8]

    Source: `tf.keras.constraints.MinMaxNorm`.
    """

    min_value: float = 0.0
    max_value: float = 1.0
    rate: float = 1.0
    axis: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        assign(
            self,
            min_value=number("min_value", self.min_value, "finite non-negative"),
            max_value=number("max_value", self.max_value, "finite non-negative"),
            rate=number("rate", self.rate, "finite non-negative"),
            axis=integers("axis", self.axis),
        )
        if self.min_value > self.max_value:
            raise ValueError(
                f"`min_value` must not exceed `max_value` (={self.max_value}), "
                f"got {self.min_value}."
            )
        if self.rate > 1.0:
            raise ValueError(f"`rate` must be between 0 and 1, got {self.rate}.")

    def __call__(self, w: ArrayLike) -> jax.Array:
        def wanted(norm: jax.Array) -> jax.Array:
            clipped = jnp.clip(norm, self.min_value, self.max_value)
            return self.rate * clipped + (1.0 - self.rate) * norm

        return _rescale(w, self.axis, wanted)


@dataclasses.dataclass(frozen=True)
class RadialConstraint:
    """Makes each 2-D filter constant on the square rings about its centre.

    Ring r of an n x n filter takes the value on the diagonal below the centre,
    w[n//2 + r, n//2 + r]; for even n the innermost ring, r = 0, is the four middle values and takes
    the upper left one.

    For even n this is Keras 2. For odd n Keras 2 reads one place further up the diagonal
    (w[n//2 - 1 + r, ...]), so that applied at every update it exchanges the rings of a 3 x 3 filter
    for ever; here the projection leaves a radial filter alone, whatever its size. Keras 3 has no
    such constraint.

    Raises:
        ValueError: at the call, the weight is not of shape (n, n, c, m).

    Example:
        >>> import jax.numpy as jnp
        >>> print(RadialConstraint()(jnp.arange(9.0).reshape(3, 3, 1, 1))[..., 0, 0])
        [[8. 8. 8.]
         [8. 4. 8.]
         [8. 8. 8.]]

    Source: `tf.keras.constraints.RadialConstraint`.
    """

    def __call__(self, w: ArrayLike) -> jax.Array:
        shape = jnp.shape(w)
        if len(shape) != 4 or shape[0] != shape[1]:
            raise ValueError(
                "`RadialConstraint` must be given a square kernel of shape (n, n, c, m), "
                f"got an array of shape {shape}."
            )
        n = shape[0]
        from_centre = np.abs(2 * np.arange(n) - (n - 1))  # twice the distance, so that it is whole
        ring = np.maximum(from_centre[:, None], from_centre) // 2
        diagonal = n // 2 + np.arange((n + 1) // 2)
        if n and n % 2 == 0:
            diagonal[0] -= 1
        return jnp.asarray(w)[diagonal[ring], diagonal[ring]]


@dataclasses.dataclass(frozen=True)
class Stacked:
    """One constraint for each member of a stack of weights, as `nn.scan` and `vmap` make it.

    Defined as `jax.vmap(constraint, axis, axis)`.

    Args:
        constraint: of one member.
        axis: the axis of the stack.

    Example:
        >>> import jax.numpy as jnp
        >>> print(Stacked(UnitNorm())(jnp.array([[3.0, 4.0], [0.0, 2.0]])).round(3))
        [[0.6 0.8]
         [0. 1. ]]
    """

    constraint: Projection
    axis: int = 0

    def __call__(self, w: jax.Array) -> jax.Array:
        return jax.vmap(self.constraint, self.axis, self.axis)(w)


def _rescale(w: ArrayLike, axis: int | tuple[int, ...], wanted: Projection) -> jax.Array:
    """Returns w with its norms |w| over `axis` replaced by wanted(|w|)."""
    w = jnp.asarray(w)
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not all(-w.ndim <= a < w.ndim for a in axes):
        raise ValueError(
            f"`axis` must be within the rank of the weight, of shape {w.shape}, got {axis}."
        )
    wide = at_least_float32(w)
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=axes, keepdims=True))
    return (wide * (wanted(norm) / (_EPSILON + norm))).astype(w.dtype)


VOCABULARY = Vocabulary(
    kind="constraint",
    module="keras.constraints",
    names=spellings(Constraint, MaxNorm, NonNeg, UnitNorm, MinMaxNorm, RadialConstraint)
    | {
        "maxnorm": MaxNorm,
        "nonneg": NonNeg,
        "unitnorm": UnitNorm,
        "minmaxnorm": MinMaxNorm,
        "radialconstraint": RadialConstraint,
    },
    slips={"nonnegative": "non_neg"},
    number=MaxNorm,
)


def get(identifier: Identifier) -> Projection | None:
    """Returns the projection that a Keras identifier stands for.

    Args:
        identifier: None (which is returned); a name such as 'max_norm', 'NonNeg' or Keras 2's
            'unitnorm'; a config dict of Keras 3 or of the old tf.keras; one of the classes here, or
            an instance; or any callable w -> w, which is returned as it is.

    Returns:
        A callable w -> w, or None.

    Raises:
        TypeError: the identifier is of another type.
        ValueError: the name or an argument in the config is unknown, or its value not allowed.

    Example:
        >>> get("max_norm")
        MaxNorm(max_value=2.0, axis=0)
        >>> get({"class_name": "UnitNorm", "config": {"axis": [0, 1]}})
        UnitNorm(axis=(0, 1))

    Source: `tf.keras.constraints.get`.
    """
    return VOCABULARY.get(identifier)


def serialize(obj: Identifier) -> dict[str, Any] | None:
    """Returns the config dict that `get`, and Keras 3, read back.

    Keras 3 does not know RadialConstraint; Keras 2 does.

    Args:
        obj: None, or anything that `get` takes and that is not a foreign callable.

    Returns:
        None, or a dict of JSON's types.

    Raises:
        TypeError: `get` does not take it.
        ValueError: it has no Keras name.

    Example:
        >>> serialize(UnitNorm(axis=(0, 1)))["config"]
        {'axis': [0, 1]}

    Source: `tf.keras.constraints.serialize`.
    """
    return VOCABULARY.serialize(obj)
