"""Constraints. Oracles: formulas in numpy's float64, and live Keras 3 on its JAX backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rooms

from flax_dwconv import constraints

EPSILON = 1e-7


def norm_of(w, axis):
    return np.sqrt((w**2).sum(axis=axis, keepdims=True))


def min_max(w):
    norm = norm_of(w, (0, 1))
    return w * (0.25 * np.clip(norm, 0.5, 1.0) + 0.75 * norm) / (EPSILON + norm)


PROJECTIONS = [
    (constraints.Constraint(), lambda w: w),
    (constraints.NonNeg(), lambda w: np.maximum(w, 0)),
    (
        constraints.MaxNorm(),
        lambda w: w * np.clip(norm_of(w, 0), 0, 2) / (EPSILON + norm_of(w, 0)),
    ),
    (
        constraints.MaxNorm(1.5, (0, 1)),
        lambda w: w * np.clip(norm_of(w, (0, 1)), 0, 1.5) / (EPSILON + norm_of(w, (0, 1))),
    ),
    (constraints.UnitNorm(), lambda w: w / (EPSILON + norm_of(w, 0))),
    (constraints.UnitNorm(-1), lambda w: w / (EPSILON + norm_of(w, -1))),
    (constraints.UnitNorm((0, 1)), lambda w: w / (EPSILON + norm_of(w, (0, 1)))),
    (constraints.MinMaxNorm(0.5, 1.0, 0.25, (0, 1)), min_max),
]


@pytest.mark.parametrize("dtype", rooms.DTYPES)
@pytest.mark.parametrize("constraint, formula", PROJECTIONS)
def test_projections(constraint, formula, dtype, x64):
    w = jnp.asarray(rooms.normal(3, 3, 4, 2), dtype)
    projected = constraint(w)
    assert projected.dtype == dtype and projected.shape == w.shape
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-6, "float64": 1e-12}[dtype]
    expected = formula(np.asarray(w, np.float64))
    np.testing.assert_allclose(
        np.asarray(projected, np.float64), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("constraint, formula", PROJECTIONS)
def test_projections_are_those_of_keras(constraint, formula, keras):
    w = jnp.asarray(rooms.normal(3, 3, 4, 2), jnp.float32)
    with rooms.loose():
        expected = keras.saving.deserialize_keras_object(constraints.serialize(constraint))(w)
    np.testing.assert_allclose(constraint(w), expected, rtol=1e-6)
    several = jnp.stack([w, 2 * w])
    one_by_one = np.stack([constraint(one) for one in several])
    np.testing.assert_allclose(jax.jit(jax.vmap(constraint))(several), one_by_one, rtol=1e-6)


def test_projections_in_half_precision_do_not_overflow():
    w = jnp.full((4, 1), 300.0, jnp.float16)
    np.testing.assert_array_equal(constraints.UnitNorm()(w), 0.5)
    np.testing.assert_array_equal(constraints.UnitNorm()(jnp.zeros((3, 1))), 0)


@pytest.mark.parametrize("n", range(1, 7))
def test_radial_constraint(n):
    w = np.arange(n * n * 6, dtype=np.float32).reshape(n, n, 2, 3)
    projected = np.asarray(constraints.get("radial_constraint")(w))
    for i in range(n):
        for j in range(n):
            ring = int(max(abs(i - (n - 1) / 2), abs(j - (n - 1) / 2)))
            d = n // 2 + ring - (n % 2 == 0 and ring == 0)
            np.testing.assert_array_equal(projected[i, j], w[d, d])
    np.testing.assert_array_equal(constraints.RadialConstraint()(projected), projected)
    assert constraints.RadialConstraint()(jnp.asarray(w, jnp.bfloat16)).dtype == jnp.bfloat16


ERRORS = [
    (
        lambda: constraints.MaxNorm(-1),
        ValueError,
        "`max_value` must be a finite non-negative number, got -1.",
    ),
    (
        lambda: constraints.UnitNorm(1.0),
        TypeError,
        "`axis` must be an int or a tuple of different ints, got 1.0.",
    ),
    (
        lambda: constraints.UnitNorm(None),
        TypeError,
        "`axis` must be an int or a tuple of different ints, got None.",
    ),
    (
        lambda: constraints.UnitNorm((0, 0)),
        ValueError,
        "`axis` must be an int or a tuple of different ints, got (0, 0).",
    ),
    (
        lambda: constraints.UnitNorm(()),
        ValueError,
        "`axis` must be an int or a tuple of different ints, got ().",
    ),
    (
        lambda: constraints.UnitNorm(4)(jnp.ones((3, 3, 1, 1))),
        ValueError,
        "`axis` must be within the rank of the weight, of shape (3, 3, 1, 1), got 4.",
    ),
    (
        lambda: constraints.MinMaxNorm(2.0, 1.0),
        ValueError,
        "`min_value` must not exceed `max_value` (=1.0), got 2.0.",
    ),
    (
        lambda: constraints.MinMaxNorm(rate=2),
        ValueError,
        "`rate` must be between 0 and 1, got 2.0.",
    ),
    (
        lambda: constraints.RadialConstraint()(jnp.ones((3, 5, 1, 1))),
        ValueError,
        "`RadialConstraint` must be given a square kernel of shape (n, n, c, m), "
        "got an array of shape (3, 5, 1, 1).",
    ),
]


@pytest.mark.parametrize("call, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    rooms.check_error(call, error, message)
