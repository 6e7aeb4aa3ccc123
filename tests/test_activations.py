"""Activations. Oracles: formulas in numpy's float64, and live Keras 3 on its JAX backend."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rooms

from flax_dwconv import activations


def erf(x):
    return np.vectorize(math.erf)(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(x, 0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def project_on_simplex(x):
    """Bisects for tau, one row at a time."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        low, high = row.min() - 1.0, row.max()
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
        rows.append(np.maximum(row - low, 0))
    return np.reshape(rows, x.shape)


SELU = 1.0507009873554805, 1.6732632423543772
FORMULAS = {
    "celu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "exponential": np.exp,
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
    "glu": lambda x: x[..., :4] * sigmoid(x[..., 4:]),
    "hard_shrink": lambda x: np.where(np.abs(x) > 0.5, x, 0),
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "hard_silu": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "hard_tanh": lambda x: np.clip(x, -1, 1),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.2 * x),
    "linear": lambda x: x,
    "log_sigmoid": lambda x: -softplus(-x),
    "log_softmax": lambda x: np.log(softmax(x)),
    "mish": lambda x: x * np.tanh(softplus(x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "selu": lambda x: SELU[0] * np.where(x > 0, x, SELU[1] * np.expm1(x)),
    "sigmoid": sigmoid,
    "silu": lambda x: x * sigmoid(x),
    "soft_shrink": lambda x: np.sign(x) * np.maximum(np.abs(x) - 0.5, 0),
    "softmax": softmax,
    "softplus": softplus,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sparse_plus": lambda x: np.where(x <= -1, 0, np.where(x >= 1, x, (x + 1) ** 2 / 4)),
    "sparse_sigmoid": lambda x: np.clip((x + 1) / 2, 0, 1),
    "sparsemax": project_on_simplex,
    "squareplus": lambda x: (x + np.sqrt(x**2 + 4)) / 2,
    "tanh": np.tanh,
    "tanh_shrink": lambda x: x - np.tanh(x),
}
FORMULAS["swish"], FORMULAS["hard_swish"] = FORMULAS["silu"], FORMULAS["hard_silu"]
FLOATS = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 1e-5, "float64": 1e-12}
x_values = 4 * rooms.normal(3, 5, 8)


def test_every_activation_has_a_formula():
    assert FORMULAS.keys() == activations._FUNCTIONS.keys()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FORMULAS)
def test_activation_values(name, dtype, x64):
    x = jnp.asarray(x_values, dtype)
    y = activations.get(name)(x)
    expected = FORMULAS[name](np.asarray(x, np.float64))
    assert y.dtype == dtype and y.shape == expected.shape
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected, rtol=FLOATS[dtype], atol=FLOATS[dtype]
    )


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"hard_sigmoid", "sparsemax"}))
def test_activation_values_are_those_of_keras(name, keras):
    x = jnp.asarray(x_values, jnp.float32)
    with rooms.loose():
        expected = keras.activations.get(name)(x)
    np.testing.assert_allclose(activations.get(name)(x), expected, rtol=1e-6, atol=1e-6)


EXTREMES = [-6e4, -300.0, -20.0, -5.0, -1.5, -0.3, -1e-3, 1e-3, 0.3, 1.5, 5.0, 20.0, 300.0, 6e4]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"exponential"}))
def test_activations_neither_overflow_nor_lose_their_gradient(name, dtype, x64):
    def value_and_gradient(x):
        y, vjp = jax.vjp(activations.get(name), x)
        return y, *vjp(jnp.ones_like(y))

    # Not compiled as a whole, which would compute what lies between in float32.
    x = jnp.asarray(EXTREMES, dtype)
    y, gradient = value_and_gradient(x)
    exact, exact_gradient = jax.jit(value_and_gradient)(x.astype(jnp.float64))
    tolerance = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}[dtype]
    with np.errstate(over="ignore"):
        exact = exact.astype(dtype)  # celu(6e4) and so on stay finite, glu's product may not
    np.testing.assert_allclose(
        np.asarray(y, np.float64), np.asarray(exact, np.float64), rtol=tolerance, atol=tolerance
    )
    assert np.isfinite(np.asarray(gradient, np.float32)).all()
    if name not in ("softmax", "log_softmax", "glu"):  # sums of 14 cotangents in half precision
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64), exact_gradient, rtol=tolerance, atol=tolerance
        )


OURS = [f for f in activations._FUNCTIONS.values() if f.__module__ == activations.__name__]
OBJECTS = [
    activations.ReLU(6.0, 0.1, 1.0),
    activations.LeakyReLU(0.1),
    activations.ELU(2.0),
    activations.Softmax((1, 2)),
    activations.ThresholdedReLU(2.0),
    activations.Threshold(1.0, -1.0),
]


@pytest.mark.parametrize("f", OURS + OBJECTS, ids=lambda f: getattr(f, "__name__", str(f)))
def test_activations_under_jit_and_vmap(f):
    x = jnp.asarray(rooms.normal(4, 3, 5, 8), jnp.float32)
    expected = np.stack([f(one) for one in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name, top", [("relu", np.inf), ("relu6", 6.0)])
def test_derivatives_of_the_rectifiers(name, top, dtype, x64):
    """To the bit, at the corners too: 1 for 0 < x < top, 0 else, whichever side JAX takes there."""
    f = activations.get(name)
    tiny, six = jnp.finfo(dtype).tiny, jnp.asarray(6, dtype)
    corners = [0.0, -0.0, tiny, -tiny, 6.0, jnp.nextafter(six, 7), jnp.nextafter(six, 5), jnp.nan]
    x = jnp.asarray([*corners, jnp.inf, -jnp.inf, -3.0, 2.0, 5.0, 9.0], dtype)
    wide = np.asarray(x, np.float64)
    y = np.clip(wide, 0, top)
    slope = np.where((wide > 0) & ((wide < 6) if name == "relu6" else True), 1.0, 0.0)
    for of, expected in [
        (lambda f: f, y),
        (jax.grad, slope),
        (jax.jacfwd, slope),
        (lambda f: jax.grad(jax.grad(f)), 0 * slope),
        (lambda f: jax.grad(lambda x: f(x) ** 2), np.where(slope, 2 * y, 0)),
        (lambda f: jax.grad(jax.grad(lambda x: f(x) ** 2)), 2 * slope),
    ]:
        derived = jax.jit(jax.vmap(of(f)))(x)
        assert derived.dtype == dtype
        np.testing.assert_array_equal(np.asarray(derived, np.float64), expected)
    theirs = jax.jit(getattr(jax.nn, name))(x)
    np.testing.assert_array_equal(*(np.asarray(v, np.float64) for v in (f(x), theirs)))
    several = jax.jacfwd(f)(x)  # one x, many tangents
    np.testing.assert_array_equal(np.asarray(several, np.float64), np.diag(slope))


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_the_derivative_of_a_rectifier_reads_its_result_alone(name):
    """That of `jax.nn.relu` reads the argument, which is then kept for it."""

    def readers(f):
        jaxpr = jax.make_jaxpr(lambda x, g: jax.vjp(f, x)[1](g))(jnp.ones(3), jnp.ones(3))
        return sum(jaxpr.jaxpr.invars[0] in eqn.invars for eqn in jaxpr.eqns)

    assert readers(activations.get(name)) == 1
    assert readers(jax.nn.relu) == 2


def test_rectifiers_of_integers():
    x = jnp.arange(-1, 9)
    np.testing.assert_array_equal(activations.relu(x), np.maximum(x, 0))
    assert activations.relu(x).dtype == x.dtype
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_array_equal(activations.relu6(x), np.clip(x, 0, 6))
    loss = lambda x: activations.relu(x).astype(jnp.float32).sum()  # noqa: E731
    assert jax.grad(loss, allow_int=True)(x).dtype == jax.dtypes.float0


def test_sparsemax_is_the_projection_and_has_its_jacobian():
    z = jnp.array([3.0, 2.9, 2.9, 0.0, -jnp.inf])
    y = activations.get("sparsemax")(z)
    np.testing.assert_allclose(y, [0.4, 0.3, 0.3, 0.0, 0.0], atol=1e-6)
    s = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
    expected = jnp.diag(s) - jnp.outer(s, s) / 3
    np.testing.assert_allclose(jax.jacobian(activations.sparsemax)(z), expected, atol=1e-6)
    assert np.isnan(activations.sparsemax(jnp.array([1.0, jnp.nan]))).any()
    assert activations.sparsemax(jnp.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": "ReLU", "config": {}},
        {"class_name": "ReLU", "config": {"max_value": 2.0}},
        {"class_name": "ReLU", "config": {"threshold": 1.0, "max_value": 3.0}},
        {"class_name": "ReLU", "config": {"negative_slope": 0.1, "threshold": 1.0}},
        {"class_name": "ReLU", "config": {"negative_slope": 0.1, "max_value": 6.0}},
        {"class_name": "LeakyReLU", "config": {}},
        {"class_name": "LeakyReLU", "config": {"negative_slope": 0.1}},
        {"class_name": "ELU", "config": {"alpha": 2.0}},
        {"class_name": "Softmax", "config": {"axis": 1}},
        {"class_name": "Softmax", "config": {"axis": [1, 2]}},
    ],
)
def test_activation_layers_are_those_of_keras(config, keras):
    x = jnp.asarray(x_values, jnp.float32)
    with rooms.loose():
        expected = keras.saving.deserialize_keras_object({"module": "keras.layers", **config})(x)
    np.testing.assert_allclose(activations.get(config)(x), expected, rtol=1e-6, atol=1e-6)


def test_threshold_activations():
    x = jnp.array([0.5, 1.0, 2.0], jnp.bfloat16)
    np.testing.assert_array_equal(activations.get("ThresholdedReLU")(x), [0, 0, 2])
    np.testing.assert_array_equal(activations.Threshold(1, -1)(x), [-1, -1, 2])
    assert activations.Threshold(1, -1)(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(activations.ReLU()(jnp.array([-jnp.inf, jnp.inf])), [0, jnp.inf])


NON_NEGATIVE = "must be a finite non-negative number"
ERRORS = [
    (lambda: activations.ReLU(max_value=-1), ValueError, f"`max_value` {NON_NEGATIVE}, got -1."),
    (lambda: activations.ReLU(threshold="1"), TypeError, f"`threshold` {NON_NEGATIVE}, got '1'."),
    (
        lambda: activations.LeakyReLU(-0.1),
        ValueError,
        f"`negative_slope` {NON_NEGATIVE}, got -0.1.",
    ),
    (lambda: activations.ELU(None), TypeError, "`alpha` must be a finite number, got None."),
    (lambda: activations.ELU(np.inf), ValueError, "`alpha` must be a finite number, got inf."),
    (
        lambda: activations.Softmax(1.0),
        TypeError,
        "`axis` must be an int or a tuple of different ints, got 1.0.",
    ),
    (
        lambda: activations.Softmax([]),
        ValueError,
        "`axis` must be an int or a tuple of different ints, got [].",
    ),
    (lambda: activations.ThresholdedReLU(-1), ValueError, f"`theta` {NON_NEGATIVE}, got -1."),
    (
        lambda: activations.Threshold(0, True),
        TypeError,
        "`default_value` must be a finite number, got True.",
    ),
]


@pytest.mark.parametrize("call, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    rooms.check_error(call, error, message)


def test_the_module_says_which_names_there_are():
    names = {name for name in activations.VOCABULARY.names if name.lower() != "prelu"}
    told = set(re.findall(r"\w+", activations.__doc__)) | {"threshold"}  # needs arguments
    assert names - set(dir(activations)) <= told
    assert {"silu", "swish", "tanh"} <= names - set(dir(activations))
