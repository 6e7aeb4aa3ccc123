"""Regularizers. Oracles: formulas in numpy's float64, and live Keras 3 on its JAX backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rooms

from flax_dwconv import regularizers


def orthogonality(w, factor, mode):
    w = w if mode == "rows" else w.T
    u = w / np.linalg.norm(w, axis=1, keepdims=True)
    n = len(u)
    products = [abs(u[i] @ u[j]) for i in range(n) for j in range(n) if i != j]
    return factor * 0.5 * sum(products) / (n * (n - 1) / 2)


PENALTIES = [
    (regularizers.L1(0.3), (3, 3, 4, 2), lambda w: 0.3 * np.abs(w).sum()),
    (regularizers.L2(0.3), (3, 3, 4, 2), lambda w: 0.3 * (w**2).sum()),
    (regularizers.L1L2(0.3, 0.2), (7,), lambda w: 0.3 * np.abs(w).sum() + 0.2 * (w**2).sum()),
    (regularizers.L1L2(), (7,), lambda w: 0.0),
    (
        regularizers.OrthogonalRegularizer(0.5),
        (4, 6),
        lambda w: orthogonality(w, 0.5, "rows"),
    ),
    (
        regularizers.OrthogonalRegularizer(0.5, "columns"),
        (4, 6),
        lambda w: orthogonality(w, 0.5, "columns"),
    ),
]


@pytest.mark.parametrize("dtype", rooms.DTYPES)
@pytest.mark.parametrize("regularizer, shape, formula", PENALTIES)
def test_penalties(regularizer, shape, formula, dtype, x64):
    w = jnp.asarray(rooms.normal(*shape), dtype)
    penalty = regularizer(w)
    assert penalty.shape == () and penalty.dtype == ("float64" if dtype == "float64" else "float32")
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    expected = formula(np.asarray(w, np.float64))
    np.testing.assert_allclose(penalty, expected, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("regularizer, shape, formula", PENALTIES)
def test_penalties_are_those_of_keras(regularizer, shape, formula, keras):
    w = jnp.asarray(rooms.normal(*shape), jnp.float32)
    with rooms.loose():
        expected = keras.saving.deserialize_keras_object(regularizers.serialize(regularizer))(w)
    np.testing.assert_allclose(regularizer(w), expected, rtol=1e-5)
    several = jnp.stack([w, 2 * w])
    one_by_one = [regularizer(one) for one in several]
    np.testing.assert_allclose(jax.jit(jax.vmap(regularizer))(several), one_by_one, rtol=1e-5)


def test_penalties_in_half_precision_do_not_overflow():
    assert regularizers.L2(1.0)(jnp.full((4,), 300, jnp.float16)) == 360000
    assert regularizers.L1(1.0)(jnp.full((4,), 60000, jnp.float16)) == 240000
    assert regularizers.L2(1.0)(jnp.arange(3)).dtype == jnp.float32
    assert regularizers.L2(1.0)(np.ones(3)).dtype == jnp.float32


def test_orthogonality_of_one_row_and_of_zero_rows():
    regularizer = regularizers.OrthogonalRegularizer()
    assert regularizer(jnp.ones((1, 3))) == 0
    value, gradient = jax.value_and_grad(regularizer)(jnp.zeros((3, 2)))
    assert value == 0 and np.isfinite(gradient).all()


def test_the_derivative_of_an_l1_penalty_at_zero_is_zero():
    x = jnp.array([-2.0, 0.0, 3.0])
    for penalty in (regularizers.L1(0.5), regularizers.L1L2(l1=0.5)):
        np.testing.assert_array_equal(jax.grad(penalty)(x), [-0.5, 0.0, 0.5])


ERRORS = [
    (
        lambda: regularizers.L2(-1.0),
        ValueError,
        "`l2` must be a finite non-negative number, got -1.0.",
    ),
    (
        lambda: regularizers.L1(float("nan")),
        ValueError,
        "`l1` must be a finite non-negative number, got nan.",
    ),
    (
        lambda: regularizers.L1(True),
        TypeError,
        "`l1` must be a finite non-negative number, got True.",
    ),
    (
        lambda: regularizers.L1L2(l2="1"),
        TypeError,
        "`l2` must be a finite non-negative number, got '1'.",
    ),
    (
        lambda: regularizers.L2(10**5000),
        ValueError,
        "`l2` must be a finite non-negative number, got an object of type int.",
    ),
    (
        lambda: regularizers.L2(np.zeros(1000)),
        TypeError,
        "`l2` must be a finite non-negative number, got an array of shape (1000,).",
    ),
    (
        lambda: regularizers.OrthogonalRegularizer(mode="row"),
        ValueError,
        "`mode` must be 'rows' or 'columns', got 'row'.",
    ),
    (
        lambda: regularizers.OrthogonalRegularizer(mode=[]),
        TypeError,
        "`mode` must be 'rows' or 'columns', got [].",
    ),
    (
        lambda: regularizers.OrthogonalRegularizer()(jnp.zeros((3, 3, 3, 1))),
        ValueError,
        "Inputs to OrthogonalRegularizer must have rank 2, got an array of shape (3, 3, 3, 1).",
    ),
]


@pytest.mark.parametrize("call, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    rooms.check_error(call, error, message)
