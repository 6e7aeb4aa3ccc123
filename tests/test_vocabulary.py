"""Keras identifiers. Oracles: live Keras 3 on its JAX backend, and formulas in numpy's float64."""

import contextlib
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_dwconv import activations, constraints, initializers, regularizers

MODULES = {
    "activation": activations,
    "constraint": constraints,
    "initializer": initializers,
    "regularizer": regularizers,
}


@pytest.fixture(scope="module")
def keras():
    """Keras 3 on JAX; tests/conftest.py chooses the backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        return pytest.importorskip("keras")


@contextlib.contextmanager
def loose():
    """Keras promotes dtypes and ranks as it likes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


# Names.

CLASSES = {  # class -> (snake name, aliases)
    initializers.Constant: ("constant", []),
    initializers.Identity: ("identity", ["IdentityInitializer"]),
    initializers.Ones: ("ones", ["one"]),
    initializers.Zeros: ("zeros", ["zero"]),
    initializers.STFT: ("stft", ["STFTInitializer"]),
    initializers.GlorotNormal: ("glorot_normal", ["glorot_normalV2"]),
    initializers.GlorotUniform: ("glorot_uniform", ["glorot_uniformV2"]),
    initializers.HeNormal: ("he_normal", ["he_normalV2"]),
    initializers.HeUniform: ("he_uniform", ["he_uniformV2"]),
    initializers.LecunNormal: ("lecun_normal", ["lecun_normalV2"]),
    initializers.LecunUniform: ("lecun_uniform", ["lecun_uniformV2"]),
    initializers.Orthogonal: ("orthogonal", ["OrthogonalInitializer"]),
    initializers.RandomNormal: ("random_normal", ["normal"]),
    initializers.RandomUniform: ("random_uniform", ["uniform"]),
    initializers.TruncatedNormal: ("truncated_normal", []),
    initializers.VarianceScaling: ("variance_scaling", []),
    regularizers.L1: ("l1", []),
    regularizers.L2: ("l2", []),
    regularizers.L1L2: ("l1l2", []),
    regularizers.OrthogonalRegularizer: ("orthogonal_regularizer", []),
    constraints.Constraint: ("constraint", []),
    constraints.MaxNorm: ("max_norm", ["maxnorm"]),
    constraints.NonNeg: ("non_neg", ["nonneg"]),
    constraints.UnitNorm: ("unit_norm", ["unitnorm"]),
    constraints.MinMaxNorm: ("min_max_norm", ["minmaxnorm"]),
    constraints.RadialConstraint: ("radial_constraint", ["radialconstraint"]),
}


def module_of(cls):
    return next(m for m in MODULES.values() if m.__name__ == cls.__module__)


def names_of(cls):
    snake, aliases = CLASSES[cls]
    names = [cls.__name__, snake, *aliases]
    if module_of(cls) is initializers and cls is not initializers.STFT:
        names.append(cls.__name__ + "V2")
    return names


@pytest.mark.parametrize("cls, name", [(cls, name) for cls in CLASSES for name in names_of(cls)])
def test_every_name_means_the_class_with_its_defaults(cls, name):
    get = module_of(cls).get
    assert get(name) == cls()
    assert get({"class_name": name, "config": {}}) == cls()
    assert get({"module": "keras", "class_name": name}) == cls()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_class_means_an_instance_and_an_instance_itself(cls):
    get = module_of(cls).get
    assert get(cls) == cls()
    made = cls()
    assert get(made) is made


def test_none():
    assert activations.get(None) is activations.linear
    assert activations.serialize(None) == "linear"
    for module in (constraints, initializers, regularizers):
        assert module.get(None) is None
        assert module.serialize(None) is None


def test_defaults_that_differ_between_names():
    assert regularizers.get("l1_l2") == regularizers.L1L2(0.01, 0.01)
    assert regularizers.get("l1l2") == regularizers.get("L1L2") == regularizers.L1L2(0.0, 0.0)
    half = {"class_name": "l1_l2", "config": {"l1": 0.5}}
    assert regularizers.get(half) == regularizers.L1L2(0.5, 0.01)
    assert activations.get("LeakyReLU") == activations.LeakyReLU(0.3)
    assert activations.get("ThresholdedReLU") == activations.ThresholdedReLU(1.0)
    assert activations.get("ELU") == activations.ELU(1.0)
    assert activations.get("Softmax") == activations.Softmax(-1)
    assert activations.get("ReLU") == activations.ReLU(None, 0.0, 0.0)


@pytest.mark.parametrize("kind", MODULES)
def test_we_know_every_name_of_keras_3(kind, keras):
    theirs = __import__(f"keras.src.{kind}s", fromlist=["ALL_OBJECTS_DICT"]).ALL_OBJECTS_DICT
    refused = {"Initializer", "initializer", "Regularizer", "regularizer", "threshold"}
    for name in set(theirs) - refused:
        assert callable(MODULES[kind].get(name)), name


def test_any_callable_is_taken_as_it_is():
    class Unhashable:
        __hash__ = None

        def __call__(self, *args):
            return 0.0

    for f in (jax.nn.gelu, functools.partial(jax.nn.elu, alpha=2.0), Unhashable(), lambda x: x):
        for module in MODULES.values():
            assert module.get(f) is f


def test_objects_and_classes_of_keras_become_ours(keras):
    assert regularizers.get(keras.regularizers.L2(0.5)) == regularizers.L2(0.5)
    assert initializers.get(keras.initializers.HeNormal(seed=3)) == initializers.HeNormal(seed=3)
    assert initializers.get(keras.initializers.HeNormal) == initializers.HeNormal()
    assert constraints.get(keras.constraints.MaxNorm(3, axis=[0, 1])) == constraints.MaxNorm(
        3, axis=(0, 1)
    )
    assert activations.get(keras.layers.LeakyReLU(0.1)) == activations.LeakyReLU(0.1)


# Config dicts.

MADE = [
    initializers.Constant(0.5),
    initializers.Identity(2.0),
    initializers.STFT("imag", None, None, True),
    initializers.GlorotUniform(seed=3),
    initializers.HeNormal(input_axes=(0, 1), output_axes=(3,)),
    initializers.Orthogonal(gain=2.0, seed=5),
    initializers.RandomNormal(1.0, 2.0, 3),
    initializers.RandomUniform(-1.0, 2.0, 3),
    initializers.TruncatedNormal(1.0, 2.0, 3),
    initializers.VarianceScaling(2.0, "fan_avg", "uniform", 3),
    regularizers.L1(0.5),
    regularizers.L2(0.25),
    regularizers.L1L2(0.5, 0.25),
    regularizers.OrthogonalRegularizer(0.5, "columns"),
    constraints.MaxNorm(3.0, (0, 1)),
    constraints.UnitNorm((0, 1, 2)),
    constraints.MinMaxNorm(0.5, 2.0, 0.25, -1),
    activations.ReLU(6.0, 0.1, 1.0),
    activations.LeakyReLU(0.1),
    activations.ELU(2.0),
    activations.Softmax((1, 2)),
    activations.ThresholdedReLU(2.0),
    activations.Threshold(1.0, -1.0),
    *(cls() for cls in CLASSES),
]
NOT_IN_KERAS_3 = (
    constraints.RadialConstraint,
    activations.ThresholdedReLU,
    activations.Threshold,
)


@pytest.mark.parametrize("obj", MADE, ids=repr)
def test_get_inverts_serialize_through_json(obj):
    module = module_of(type(obj))
    config = json.loads(json.dumps(module.serialize(obj)))
    assert list(config) == ["module", "class_name", "config", "registered_name"]
    assert module.get(config) == obj
    assert module.get(FrozenDict(config)) == obj
    assert module.get({key: config[key] for key in ("class_name", "config")}) == obj
    assert hash(module.get(config)) == hash(obj)
    assert eval(repr(obj), vars(module)) == obj
    assert "input_axes" not in config["config"] or config["config"]["input_axes"] is not None


@pytest.mark.parametrize("obj", [o for o in MADE if not isinstance(o, NOT_IN_KERAS_3)], ids=repr)
def test_keras_3_reads_what_we_write_and_we_what_it_writes(obj, keras):
    module = module_of(type(obj))
    config = module.serialize(obj)
    if isinstance(obj, initializers.STFT):
        pytest.importorskip("scipy")
    with loose():
        theirs = keras.saving.deserialize_keras_object(config)
        assert type(theirs).__name__ == type(obj).__name__
        back = module.get(json.loads(json.dumps(keras.saving.serialize_keras_object(theirs))))
    if isinstance(obj, initializers.Identity):
        return  # Keras forgets the gain
    for name, value in vars(obj).items():  # Keras keeps L1's factor in float32
        assert getattr(back, name) == (pytest.approx(value) if isinstance(value, float) else value)


@pytest.mark.parametrize("name", sorted(activations._FUNCTIONS))
def test_activation_names_round_trip_and_keras_3_reads_them(name, keras):
    f = activations.get(name)
    written = activations.serialize(f)
    assert activations.get(written) is f
    assert written == {"swish": "silu", "hard_swish": "hard_silu"}.get(name, name)
    assert keras.activations.get(written).__name__ == written
    function = {"module": "builtins", "class_name": "function", "config": name}
    assert activations.get({**function, "registered_name": "function"}) is f


def test_functions_of_jax_get_their_keras_name_where_they_mean_the_same():
    same = {
        jax.nn.relu: "relu",
        jax.nn.swish: "silu",
        jax.nn.hard_swish: "hard_silu",
        jax.nn.soft_sign: "softsign",
        jax.nn.tanh: "tanh",
        jnp.tanh: "tanh",
        jnp.exp: "exponential",
        jax.lax.logistic: "sigmoid",
        jax.nn.softmax: "softmax",
    }
    for f, name in same.items():
        assert activations.serialize(f) == name
    assert activations.get(activations.serialize(jax.nn.leaky_relu)) == activations.LeakyReLU(0.01)
    for f in (jax.nn.gelu, jax.nn.hard_sigmoid):
        with pytest.raises(
            ValueError, match="`activation` must have a Keras name to be serialized"
        ):
            activations.serialize(f)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    assert initializers.get(initializers.serialize(zeros)) == initializers.Zeros()
    assert initializers.get(initializers.serialize(ones)) == initializers.Ones()


@pytest.mark.parametrize(
    "kind, config, expected",
    [
        # what old tf.keras and TensorFlow 1 wrote
        (
            "initializer",
            {
                "class_name": "VarianceScaling",
                "config": {"scale": 1, "mode": "fan_avg", "distribution": "normal", "dtype": "f"},
            },
            initializers.VarianceScaling(1.0, "fan_avg", "truncated_normal"),
        ),
        (
            "initializer",
            {"class_name": "GlorotUniformV2", "config": {"seed": None}},
            initializers.GlorotUniform(),
        ),
        # what Keras 3.15 writes
        (
            "initializer",
            {
                "module": "keras.initializers",
                "class_name": "GlorotUniform",
                "config": {"seed": None, "input_axes": None, "output_axes": None},
                "registered_name": None,
            },
            initializers.GlorotUniform(),
        ),
        ("regularizer", {"class_name": "L1", "config": {"l": 0.5}}, regularizers.L1(0.5)),
        ("regularizer", {"class_name": "L2", "config": {"l": 0.5}}, regularizers.L2(0.5)),
        ("regularizer", {"class_name": "L2", "config": {"l2": None}}, regularizers.L2(0.01)),
        (
            "activation",
            {"class_name": "LeakyReLU", "config": {"name": "a", "trainable": True, "alpha": 0.1}},
            activations.LeakyReLU(0.1),
        ),
        (
            "activation",
            {"class_name": "ReLU", "config": {"max_value": 6, "negative_slope": [0.0][0]}},
            activations.ReLU(6.0),
        ),
        (
            "activation",
            {"class_name": "threshold", "config": {"threshold": 1, "default_value": -1}},
            activations.Threshold(1.0, -1.0),
        ),
        ("constraint", {"class_name": "UnitNorm", "config": {"axis": [0, 1]}}, None),
    ],
)
def test_dialects(kind, config, expected):
    expected = constraints.UnitNorm((0, 1)) if expected is None else expected
    assert MODULES[kind].get(config) == expected


def test_numbers_of_numpy_are_stored_as_pythons():
    stored = [
        regularizers.L2(np.float32(0.5)).l2,
        constraints.MaxNorm(np.int64(3)).max_value,
        constraints.UnitNorm(np.int32(1)).axis,
        constraints.UnitNorm([np.int32(1), 0]).axis[0],
        initializers.HeNormal(seed=np.uint8(3)).seed,
    ]
    assert stored == [0.5, 3, 1, 1, 3]
    assert [type(v) for v in stored] == [float, float, int, int, int]


# Errors.

R, A, C, I = regularizers, activations, constraints, initializers  # noqa: E741
NAN = float("nan")

ERRORS = [
    (
        lambda: R.get("l22"),
        ValueError,
        "Could not interpret `regularizer` identifier: got 'l22', did you mean 'l2'?",
    ),
    (
        lambda: A.get("RELU6"),
        ValueError,
        "Could not interpret `activation` identifier: got 'RELU6', did you mean 'relu6'?",
    ),
    (
        lambda: I.get("GlorotUnifrom"),
        ValueError,
        "Could not interpret `initializer` identifier: got 'GlorotUnifrom', "
        "did you mean 'GlorotUniform'?",
    ),
    (
        lambda: C.get("qqqq"),
        ValueError,
        "Could not interpret `constraint` identifier: got 'qqqq'.",
    ),
    (lambda: C.get(""), ValueError, "Could not interpret `constraint` identifier: got ''."),
    (
        lambda: R.get("Regularizer"),
        ValueError,
        "Could not interpret `regularizer` identifier: 'Regularizer' is the base class, "
        "which penalises nothing.",
    ),
    (
        lambda: I.get("initializer"),
        ValueError,
        "Could not interpret `initializer` identifier: 'initializer' is the base class, "
        "which has no values.",
    ),
    (
        lambda: A.get("PReLU"),
        ValueError,
        "Could not interpret `activation` identifier: 'PReLU' has weights of its own, "
        "which an activation function cannot hold.",
    ),
    (
        lambda: A.get("threshold"),
        ValueError,
        "`activation` 'threshold' needs a config dict with 'threshold' and 'default_value'.",
    ),
    (
        lambda: A.get(A.Threshold),
        ValueError,
        "Could not interpret `activation` identifier: the class Threshold cannot be made without "
        "arguments, pass an instance.",
    ),
    (
        lambda: R.get(3),
        TypeError,
        "Could not interpret `regularizer` identifier: it must be a name, a config dict or a "
        "callable, got 3.",
    ),
    (
        lambda: R.get(np.zeros(1000)),
        TypeError,
        "Could not interpret `regularizer` identifier: it must be a name, a config dict or a "
        "callable, got an array of shape (1000,).",
    ),
    (
        lambda: I.get(int),
        TypeError,
        "Could not interpret `initializer` identifier: it must be a name, a config dict or a "
        "callable, got <class 'int'>.",
    ),
    (
        lambda: R.get({"config": {}}),
        ValueError,
        "Could not interpret `regularizer` identifier: a config dict needs a 'class_name', "
        "got {'config': {}}.",
    ),
    (
        lambda: R.get({"class_name": "L2", "confg": {}}),
        ValueError,
        "Could not interpret `regularizer` identifier: a config dict has no key 'confg', "
        "did you mean 'config'?",
    ),
    (
        lambda: R.get({"class_name": "L2", "config": [1]}),
        TypeError,
        "Could not interpret `regularizer` identifier: 'class_name' must be a name and 'config' a "
        "dict, got {'class_name': 'L2', 'config': [1]}.",
    ),
    (
        lambda: R.get({"class_name": "L2", "module": "mine", "config": {}}),
        ValueError,
        "Could not interpret `regularizer` identifier: 'module' must be one of Keras's, 'L2' of "
        "another one is a custom object, got 'mine'.",
    ),
    (
        lambda: R.get({"class_name": "L2", "module": 3}),
        TypeError,
        "Could not interpret `regularizer` identifier: 'module' must be a name, got 3.",
    ),
    (
        lambda: R.get({"class_name": "L2", "config": {"l3": 1.0}}),
        ValueError,
        "`regularizer` 'L2' has no argument 'l3', did you mean 'l2'?",
    ),
    (
        lambda: A.get({"class_name": "relu", "config": {"max_value": 1.0}}),
        ValueError,
        "`activation` 'relu' has no argument 'max_value'.",
    ),
    (
        lambda: A.get({"class_name": "LeakyReLU", "config": {"alpha": 1, "negative_slope": 1}}),
        ValueError,
        "`activation` 'LeakyReLU' got the argument 'negative_slope' twice.",
    ),
    (lambda: R.L2(-1.0), ValueError, "`l2` must be a finite non-negative number, got -1.0."),
    (lambda: R.L1(NAN), ValueError, "`l1` must be a finite non-negative number, got nan."),
    (lambda: R.L1(True), TypeError, "`l1` must be a finite non-negative number, got True."),
    (lambda: R.L1L2(l2="1"), TypeError, "`l2` must be a finite non-negative number, got '1'."),
    (
        lambda: R.L2(10**5000),
        ValueError,
        "`l2` must be a finite non-negative number, got an object of type int.",
    ),
    (
        lambda: R.L2(np.zeros(1000)),
        TypeError,
        "`l2` must be a finite non-negative number, got an array of shape (1000,).",
    ),
    (
        lambda: R.OrthogonalRegularizer(mode="row"),
        ValueError,
        "`mode` must be 'rows' or 'columns', got 'row'.",
    ),
    (
        lambda: R.OrthogonalRegularizer(mode=[]),
        TypeError,
        "`mode` must be 'rows' or 'columns', got [].",
    ),
    (
        lambda: R.OrthogonalRegularizer()(jnp.zeros((3, 3, 3, 1))),
        ValueError,
        "Inputs to OrthogonalRegularizer must have rank 2, got an array of shape (3, 3, 3, 1).",
    ),
    (
        lambda: C.MaxNorm(-1),
        ValueError,
        "`max_value` must be a finite non-negative number, got -1.",
    ),
    (
        lambda: C.UnitNorm(1.0),
        TypeError,
        "`axis` must be an int or a tuple of different ints, got 1.0.",
    ),
    (
        lambda: C.UnitNorm(None),
        TypeError,
        "`axis` must be an int or a tuple of different ints, got None.",
    ),
    (
        lambda: C.UnitNorm((0, 0)),
        ValueError,
        "`axis` must be an int or a tuple of different ints, got (0, 0).",
    ),
    (
        lambda: C.UnitNorm(()),
        ValueError,
        "`axis` must be an int or a tuple of different ints, got ().",
    ),
    (
        lambda: C.UnitNorm(4)(jnp.ones((3, 3, 1, 1))),
        ValueError,
        "`axis` must be within the rank of the weight, of shape (3, 3, 1, 1), got 4.",
    ),
    (
        lambda: C.MinMaxNorm(2.0, 1.0),
        ValueError,
        "`min_value` must not exceed `max_value` (=1.0), got 2.0.",
    ),
    (lambda: C.MinMaxNorm(rate=2), ValueError, "`rate` must be between 0 and 1, got 2.0."),
    (
        lambda: C.RadialConstraint()(jnp.ones((3, 5, 1, 1))),
        ValueError,
        "`RadialConstraint` must be given a square kernel of shape (n, n, c, m), "
        "got an array of shape (3, 5, 1, 1).",
    ),
    (lambda: I.Constant("0"), TypeError, "`value` must be a finite number, got '0'."),
    (
        lambda: I.VarianceScaling(0),
        ValueError,
        "`scale` must be a finite positive number, got 0.",
    ),
    (
        lambda: I.VarianceScaling(mode="fan"),
        ValueError,
        "`mode` must be 'fan_in', 'fan_out' or 'fan_avg', got 'fan'.",
    ),
    (
        lambda: I.VarianceScaling(distribution="cauchy"),
        ValueError,
        "`distribution` must be 'truncated_normal', 'untruncated_normal' or 'uniform', "
        "got 'cauchy'.",
    ),
    (
        lambda: I.HeNormal(seed=1.5),
        TypeError,
        "`seed` must be None or an integer of at most 64 bits, got 1.5.",
    ),
    (
        lambda: I.HeNormal(seed=2**64),
        ValueError,
        "`seed` must be None or an integer of at most 64 bits, got 18446744073709551616.",
    ),
    (
        lambda: I.HeNormal(input_axes=(0,)),
        ValueError,
        "`input_axes` and `output_axes` must be given together, got (0,) and None.",
    ),
    (
        lambda: I.HeNormal(input_axes=(0,), output_axes=(4,))(jax.random.key(0), (3, 3, 1, 1)),
        ValueError,
        "`input_axes` and `output_axes` must be within the rank of the shape (3, 3, 1, 1), "
        "got (0,) and (4,).",
    ),
    (
        lambda: I.RandomUniform(1.0, 0.0),
        ValueError,
        "`minval` must not exceed `maxval` (=0.0), got 1.0.",
    ),
    (
        lambda: I.Identity()(None, (3, 3, 1, 1)),
        ValueError,
        "`Identity` must initialize a matrix, got the shape (3, 3, 1, 1).",
    ),
    (
        lambda: I.Orthogonal()(jax.random.key(0), (3,)),
        ValueError,
        "`Orthogonal` must initialize at least a matrix, got the shape (3,).",
    ),
    (
        lambda: I.STFT()(None, (3, 3, 1, 1)),
        ValueError,
        "`STFT` must initialize the kernel of a spectrogram, which is not implemented here, "
        "got the shape (3, 3, 1, 1).",
    ),
    (lambda: I.STFT(window=3), TypeError, "`window` must be a name or None, got 3."),
    (lambda: I.STFT(periodic=1), TypeError, "`periodic` must be True or False, got 1."),
    (
        lambda: I.get(np.ones((3, 3)))(None, (3, 3, 1, 1)),
        ValueError,
        "`initializer` must be an array of the parameter's shape (3, 3, 1, 1), "
        "got an array of shape (3, 3).",
    ),
    (
        lambda: I.get(np.ones((3, 3), complex)),
        TypeError,
        "`initializer` must be an array of real numbers, got an array of shape (3, 3) "
        "of dtype complex128.",
    ),
    (
        lambda: jax.jit(I.get)(jnp.ones((3, 3))),
        TypeError,
        "`initializer` must be an array of real numbers, got an array of shape (3, 3), "
        "which is traced.",
    ),
    (
        lambda: I.serialize(np.ones((3, 3))),
        ValueError,
        "`initializer` must have a Keras name to be serialized, "
        "got Array(shape=(3, 3), dtype=float64).",
    ),
]


@pytest.mark.parametrize("call, error, message", ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
    assert type(caught.value) is error


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.builds(lambda: 10**5000),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.complex_numbers(),
    st.sampled_from(["L2", "l1_l2", "ReLU", "MaxNorm", "VarianceScaling", "function", "Softmax"]),
    st.builds(object),
    st.builds(np.ones, st.tuples(st.integers(0, 3))),
    st.builds(np.float32),
)
KEYS = st.one_of(
    ATOMS.filter(lambda v: not isinstance(v, np.ndarray)),
    st.sampled_from(["class_name", "config", "module", "l2", "axis", "scale", "seed", "max_value"]),
)
JUNK = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner),
        st.dictionaries(KEYS, inner, max_size=3),
        st.builds(lambda n, c: {"class_name": n, "config": c}, inner, inner),
    ),
    max_leaves=8,
)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(JUNK)
def test_junk_is_a_value_or_type_error(junk):
    for module in MODULES.values():
        for f in (module.get, module.serialize):
            with contextlib.suppress(ValueError, TypeError):
                f(junk)


def test_hostile_objects():
    class Hostile:
        __hash__ = None

        def __repr__(self):
            raise RuntimeError("no")

    cyclic = {}
    cyclic["class_name"] = cyclic["config"] = cyclic
    for junk in (Hostile(), [Hostile()], cyclic, {"class_name": Hostile()}, b"relu", "x" * 10**6):
        for module in MODULES.values():
            with pytest.raises((ValueError, TypeError)) as caught:
                module.get(junk)
            assert len(str(caught.value)) < 1000


# Activations.


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
x_values = 4 * normal(3, 5, 8)


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
    with loose():
        expected = keras.activations.get(name)(x)
    np.testing.assert_allclose(activations.get(name)(x), expected, rtol=1e-6, atol=1e-6)


EXTREMES = [-6e4, -300.0, -20.0, -5.0, -1.5, -0.3, -1e-3, 1e-3, 0.3, 1.5, 5.0, 20.0, 300.0, 6e4]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"exponential"}))
def test_activations_neither_overflow_nor_lose_their_gradient(name, dtype, x64):
    f = activations.get(name)
    x = jnp.asarray(EXTREMES, dtype)
    y, gradient = f(x), jax.grad(lambda x: f(x).astype(jnp.float32).sum())(x)
    wide = x.astype(jnp.float64)
    exact, exact_gradient = f(wide), jax.grad(lambda x: f(x).sum())(wide)
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


@pytest.mark.parametrize("f", [*FORMULAS, *(o for o in MADE if module_of(type(o)) is activations)])
def test_activations_under_jit_and_vmap(f):
    f = activations.get(f)
    x = jnp.asarray(normal(4, 3, 5, 8), jnp.float32)
    expected = np.stack([f(one) for one in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(x), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_rectifiers_have_the_derivatives_of_jax(name, dtype, x64):
    """Bit for bit, at their corners too, though they take them at the result."""
    tiny = jnp.finfo(dtype).tiny
    corners = [0.0, -0.0, tiny, -tiny, 6.0, jnp.nextafter(jnp.asarray(6, dtype), 7), jnp.inf]
    x = jnp.asarray([*corners, -jnp.inf, jnp.nan, -3.0, 2.0, 5.0, 9.0], dtype)
    for derive in (lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f)), jax.jacfwd,
                   lambda f: lambda x: jax.grad(lambda x: f(x) ** 2)(x)):  # fmt: skip
        ours, theirs = (jax.jit(jax.vmap(derive(f)))(x)
                        for f in (activations.get(name), getattr(jax.nn, name)))  # fmt: skip
        assert ours.dtype == theirs.dtype == dtype
        np.testing.assert_array_equal(ours.astype("float64"), theirs.astype("float64"))


def test_relu_of_integers():
    np.testing.assert_array_equal(activations.get("relu")(jnp.arange(-1, 2)), [0, 0, 1])


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
    with loose():
        expected = keras.saving.deserialize_keras_object({"module": "keras.layers", **config})(x)
    np.testing.assert_allclose(activations.get(config)(x), expected, rtol=1e-6, atol=1e-6)


def test_threshold_activations():
    x = jnp.array([0.5, 1.0, 2.0], jnp.bfloat16)
    np.testing.assert_array_equal(activations.get("ThresholdedReLU")(x), [0, 0, 2])
    np.testing.assert_array_equal(activations.Threshold(1, -1)(x), [-1, -1, 2])
    assert activations.Threshold(1, -1)(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(activations.ReLU()(jnp.array([-jnp.inf, jnp.inf])), [0, jnp.inf])


# Initializers.

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
    with loose():
        expected = keras.initializers.deserialize(config)(shape, dtype="float32")
    ours = initializers.get(config)(jax.random.key(123), shape)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(ours, np.asarray(expected))


def test_identity_is_keras_s(keras):
    with loose():
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


@pytest.mark.parametrize("dtype", FLOATS)
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
    with loose():
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
    values = normal(3, 3, 2, 1)
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


# Regularizers.


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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("regularizer, shape, formula", PENALTIES)
def test_penalties(regularizer, shape, formula, dtype, x64):
    w = jnp.asarray(normal(*shape), dtype)
    penalty = regularizer(w)
    assert penalty.shape == () and penalty.dtype == ("float64" if dtype == "float64" else "float32")
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    expected = formula(np.asarray(w, np.float64))
    np.testing.assert_allclose(penalty, expected, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("regularizer, shape, formula", PENALTIES)
def test_penalties_are_those_of_keras(regularizer, shape, formula, keras):
    w = jnp.asarray(normal(*shape), jnp.float32)
    with loose():
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


# Constraints.

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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("constraint, formula", PROJECTIONS)
def test_projections(constraint, formula, dtype, x64):
    w = jnp.asarray(normal(3, 3, 4, 2), dtype)
    projected = constraint(w)
    assert projected.dtype == dtype and projected.shape == w.shape
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-6, "float64": 1e-12}[dtype]
    expected = formula(np.asarray(w, np.float64))
    np.testing.assert_allclose(
        np.asarray(projected, np.float64), expected, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("constraint, formula", PROJECTIONS)
def test_projections_are_those_of_keras(constraint, formula, keras):
    w = jnp.asarray(normal(3, 3, 4, 2), jnp.float32)
    with loose():
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


def test_the_derivative_of_an_l1_penalty_at_zero_is_zero():
    x = jnp.array([-2.0, 0.0, 3.0])
    for penalty in (regularizers.L1(0.5), regularizers.L1L2(l1=0.5)):
        np.testing.assert_array_equal(jax.grad(penalty)(x), [-0.5, 0.0, 0.5])
