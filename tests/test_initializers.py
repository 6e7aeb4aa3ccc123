"""Initializers. Oracle: live Keras 3 on its JAX backend, bit for bit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rooms

from flax_dwconv import initializers

RANDOM = [
    initializers.GlorotNormal(seed=1337),
    initializers.GlorotUniform(seed=1337),
    initializers.HeNormal(seed=1),
    initializers.HeUniform(seed=2),
    initializers.LecunNormal(seed=3),
    initializers.LecunUniform(seed=2**32 - 1),
    initializers.Orthogonal(seed=5),
    initializers.Orthogonal(gain=0.7, seed=0),
    initializers.RandomNormal(seed=7),
    initializers.RandomNormal(0.5, 2.0, seed=7),
    initializers.RandomUniform(seed=8),
    initializers.RandomUniform(-1.0, 3.0, seed=8),
    initializers.TruncatedNormal(seed=9),
    initializers.TruncatedNormal(0.5, 2.0, seed=9),
    *(
        initializers.VarianceScaling(1.7, mode, distribution, seed=11)
        for mode in ("fan_in", "fan_out", "fan_avg")
        for distribution in ("truncated_normal", "untruncated_normal", "uniform")
    ),
]
FIXED = [initializers.Zeros(), initializers.Ones(), initializers.Constant(0.3)]
SHAPES = [(3, 3, 4, 2), (5, 1, 7, 1), (6, 8), (12,)]
ONE_OF_EACH = [RANDOM[i] for i in (0, 1, 7, 9, 11, 13)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("initializer", RANDOM + FIXED, ids=repr)
def test_seeded_values_are_those_of_keras_bit_for_bit(initializer, shape, keras):
    if isinstance(initializer, initializers.Orthogonal) and len(shape) < 2:
        pytest.skip("needs a matrix")
    config = initializers.serialize(initializer)
    with rooms.loose():
        expected = keras.initializers.deserialize(config)(shape, dtype="float32")
    ours = initializers.get(config)(jax.random.key(123), shape)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, np.asarray(expected))


def test_identity_is_keras_s(keras):
    with rooms.loose():
        expected = keras.initializers.Identity(2.0)((3, 4))
    np.testing.assert_array_equal(initializers.Identity(2.0)(None, (3, 4)), expected)


def unseeded(initializer):
    config = initializers.serialize(initializer)
    return initializers.get({**config, "config": {**config["config"], "seed": None}})


@pytest.mark.parametrize("initializer", ONE_OF_EACH, ids=repr)
def test_seeded_and_unseeded_are_one_code_path(initializer):
    key = jax.random.wrap_key_data(np.uint32([initializer.seed, 0]), impl="threefry2x32")
    f = unseeded(initializer)
    seeded = initializer(jax.random.key(0), (3, 3, 4, 2))
    np.testing.assert_array_equal(f(key, (3, 3, 4, 2)), seeded)
    keys = jax.random.split(jax.random.key(1), 3)
    several = jax.jit(jax.vmap(lambda key: f(key, (3, 3, 4, 2))))(keys)
    one_by_one = np.stack([f(key, (3, 3, 4, 2)) for key in keys])
    np.testing.assert_allclose(several, one_by_one, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(several[0], several[1])


@pytest.mark.parametrize("dtype", rooms.DTYPES)
@pytest.mark.parametrize("initializer", ONE_OF_EACH + FIXED, ids=repr)
def test_initializer_dtypes(initializer, dtype, x64):
    values = initializer(jax.random.key(0), (3, 3, 4, 2), dtype)
    assert values.dtype == dtype and values.shape == (3, 3, 4, 2)
    assert np.isfinite(np.asarray(values, np.float64)).all()


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_typed_and_raw_keys(make):
    assert initializers.get("glorot_uniform")(make(0), (3, 3, 4, 2)).shape == (3, 3, 4, 2)


def test_fans_of_a_depthwise_kernel_and_of_a_vector():
    kh, kw, c, m = shape = (5, 3, 64, 8)
    key = jax.random.key(0)
    limits = {
        "glorot_uniform": math.sqrt(6 / (kh * kw * (c + m))),
        "he_uniform": math.sqrt(6 / (kh * kw * c)),
        "lecun_uniform": math.sqrt(3 / (kh * kw * c)),
    }
    for name, limit in limits.items():
        largest = float(jnp.abs(initializers.get(name)(key, shape)).max())
        assert 0.99 * limit < largest <= limit
    deviations = {
        "glorot_normal": math.sqrt(2 / (kh * kw * (c + m))),
        "he_normal": math.sqrt(2 / (kh * kw * c)),
        "lecun_normal": math.sqrt(1 / (kh * kw * c)),
    }
    for name, deviation in deviations.items():
        assert float(initializers.get(name)(key, shape).std()) == pytest.approx(deviation, rel=0.03)
    vector = initializers.get("glorot_uniform")(key, (4096,))
    assert float(jnp.abs(vector).max()) == pytest.approx(math.sqrt(6 / 8192), rel=0.01)


def test_named_axes_count_as_fans(keras):
    axes = {"input_axes": (0, 1), "output_axes": (-1,)}
    ours = initializers.HeUniform(seed=3, **axes)(None, (3, 3, 4, 2))
    try:
        theirs = keras.initializers.HeUniform(seed=3, **axes)
    except TypeError:
        pytest.skip("this Keras does not know input_axes")
    with rooms.loose():
        np.testing.assert_array_equal(ours, theirs((3, 3, 4, 2)))


def test_orthogonal_kernels_are_orthogonal():
    for shape in ((3, 3, 4, 2), (1, 1, 2, 5)):
        q = initializers.Orthogonal()(jax.random.key(0), shape).reshape(-1, shape[-1])
        gram = q.T @ q if q.shape[0] >= q.shape[1] else q @ q.T
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**40 + 1, np.int64(3)])
def test_any_64_bit_seed(seed):
    low = initializers.HeNormal(seed=int(seed) % 2**32)
    np.testing.assert_array_equal(initializers.HeNormal(seed=seed)(None, (3, 3)), low(None, (3, 3)))


def test_arrays():
    values = rooms.normal(3, 3, 2, 1)
    initializer = initializers.get(values)
    expected = values.copy()
    values[:] = 0.0
    np.testing.assert_array_equal(initializer(None, (3, 3, 2, 1)), expected.astype(np.float32))
    assert initializer(None, [3, 3, 2, 1], jnp.bfloat16).dtype == jnp.bfloat16
    assert initializer == initializers.get(expected) != initializers.get(values)
    assert hash(initializer) == hash(initializers.get(expected))
    assert repr(initializer) == "Array(shape=(3, 3, 2, 1), dtype=float64)"
    half = initializers.get(jnp.ones((2,), jnp.bfloat16))
    np.testing.assert_array_equal(half(None, (2,)), [1, 1])
    assert initializers.get(np.arange(2))(None, (2,)).dtype == jnp.float32
    assert initializers.VOCABULARY.get(expected, "bias_initializer") == initializer


ERRORS = [
    (
        lambda: initializers.Array([1.0]),
        TypeError,
        "`initializer` must be an array of real numbers, got [1.0].",
    ),
    (
        lambda: initializers.get(np.ones((3, 3)))(None, (3, 3, 1, 1)),
        ValueError,
        "`initializer` must be an array of the parameter's shape (3, 3, 1, 1), "
        "got an array of shape (3, 3).",
    ),
    (
        lambda: jax.jit(initializers.get)(jnp.ones((3, 3))),
        TypeError,
        "`initializer` must be an array of real numbers, got an array of shape (3, 3), "
        "which is traced.",
    ),
    (
        lambda: initializers.get("he_normal")(None, (3, 3, 1, 1)),
        TypeError,
        "`key` must be a random key, as there is no `seed`, got None.",
    ),
    (lambda: initializers.Constant("0"), TypeError, "`value` must be a finite number, got '0'."),
    (
        lambda: initializers.VarianceScaling(0),
        ValueError,
        "`scale` must be a finite positive number, got 0.",
    ),
    (
        lambda: initializers.VarianceScaling(mode="fan"),
        ValueError,
        "`mode` must be 'fan_in', 'fan_out' or 'fan_avg', got 'fan'.",
    ),
    (
        lambda: initializers.VarianceScaling(distribution="cauchy"),
        ValueError,
        "`distribution` must be 'truncated_normal', 'untruncated_normal' or 'uniform', "
        "got 'cauchy'.",
    ),
    (
        lambda: initializers.HeNormal(seed=1.5),
        TypeError,
        "`seed` must be None or an integer of at most 64 bits, got 1.5.",
    ),
    (
        lambda: initializers.HeNormal(seed=2**64),
        ValueError,
        "`seed` must be None or an integer of at most 64 bits, got 18446744073709551616.",
    ),
    (
        lambda: initializers.HeNormal(input_axes=(0,)),
        ValueError,
        "`input_axes` and `output_axes` must be given together, got (0,) and None.",
    ),
    (
        lambda: initializers.HeNormal(input_axes=(0,), output_axes=(4,))(
            jax.random.key(0), (3, 3, 1, 1)
        ),
        ValueError,
        "`input_axes` and `output_axes` must be within the rank of the shape (3, 3, 1, 1), "
        "got (0,) and (4,).",
    ),
    (
        lambda: initializers.RandomUniform(1.0, 0.0),
        ValueError,
        "`minval` must not exceed `maxval` (=0.0), got 1.0.",
    ),
    (
        lambda: initializers.Identity()(None, (3, 3, 1, 1)),
        ValueError,
        "`Identity` must initialize a matrix, got the shape (3, 3, 1, 1).",
    ),
    (
        lambda: initializers.Orthogonal()(jax.random.key(0), (3,)),
        ValueError,
        "`Orthogonal` must initialize at least a matrix, got the shape (3,).",
    ),
]


@pytest.mark.parametrize("call, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    rooms.check_error(call, error, message)
