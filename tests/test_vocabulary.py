"""Keras identifiers: names, config dicts, what is written back, and the errors about them."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rooms
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from rooms import ROOMS, room_of

from flax_dwconv import activations, constraints, initializers, regularizers

# Names.

CLASSES = {  # class -> (snake name, aliases)
    initializers.Constant: ("constant", []),
    initializers.Identity: ("identity", ["IdentityInitializer"]),
    initializers.Ones: ("ones", ["one"]),
    initializers.Zeros: ("zeros", ["zero"]),
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
REFUSED = {
    "activation": {"PReLU", "prelu"},
    "constraint": set(),
    "initializer": {"Initializer", "initializer", "STFT", "stft", "STFTInitializer"},
    "regularizer": {"Regularizer", "regularizer"},
}


def names_of(cls):
    snake, aliases = CLASSES[cls]
    names = [cls.__name__, snake, *aliases]
    if room_of(cls) is initializers:
        names.append(cls.__name__ + "V2")
    return names


@pytest.mark.parametrize("cls, name", [(cls, name) for cls in CLASSES for name in names_of(cls)])
def test_every_name_means_the_class_with_its_defaults(cls, name):
    get = room_of(cls).get
    assert get(name) == cls()
    assert get({"class_name": name, "config": {}}) == cls()
    assert get({"module": "keras", "class_name": name}) == cls()


@pytest.mark.parametrize("cls", CLASSES)
def test_a_class_means_an_instance_and_an_instance_itself(cls):
    get = room_of(cls).get
    assert get(cls) == cls()
    made = cls()
    assert get(made) is made


def test_none():
    assert activations.get(None) is activations.linear
    assert activations.serialize(None) == "linear"
    for room in (constraints, initializers, regularizers):
        assert room.get(None) is None
        assert room.serialize(None) is None


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


@pytest.mark.parametrize("kind", ROOMS)
def test_we_know_every_name_of_keras_3(kind, keras):
    theirs = __import__(f"keras.src.{kind}s", fromlist=["ALL_OBJECTS_DICT"]).ALL_OBJECTS_DICT
    assert set(theirs) <= set(ROOMS[kind].VOCABULARY.names)
    for name in set(theirs) - REFUSED[kind] - {"threshold"}:  # which has no defaults
        assert callable(ROOMS[kind].get(name)), name


def test_any_callable_is_taken_as_it_is():
    class Unhashable:
        __hash__ = None

        def __call__(self, *args):
            return 0.0

    for f in (jax.nn.gelu, functools.partial(jax.nn.elu, alpha=2.0), Unhashable(), lambda x: x):
        for room in ROOMS.values():
            assert room.get(f) is f


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
    room = room_of(type(obj))
    config = json.loads(json.dumps(room.serialize(obj)))
    assert list(config) == ["module", "class_name", "config", "registered_name"]
    assert room.get(config) == obj
    assert room.get(FrozenDict(config)) == obj
    assert room.get({key: config[key] for key in ("class_name", "config")}) == obj
    assert hash(room.get(config)) == hash(obj)
    assert eval(repr(obj), vars(room)) == obj
    assert "input_axes" not in config["config"] or config["config"]["input_axes"] is not None


@pytest.mark.parametrize("obj", [o for o in MADE if not isinstance(o, NOT_IN_KERAS_3)], ids=repr)
def test_keras_3_reads_what_we_write_and_we_what_it_writes(obj, keras):
    room = room_of(type(obj))
    config = room.serialize(obj)
    with rooms.loose():
        theirs = keras.saving.deserialize_keras_object(config)
        assert type(theirs).__name__ == type(obj).__name__
        back = room.get(json.loads(json.dumps(keras.saving.serialize_keras_object(theirs))))
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
            {"class_name": "ReLU", "config": {"max_value": 6, "negative_slope": 0.0}},
            activations.ReLU(6.0),
        ),
        (
            "activation",
            {"class_name": "threshold", "config": {"threshold": 1, "default_value": -1}},
            activations.Threshold(1.0, -1.0),
        ),
        (
            "constraint",
            {"class_name": "UnitNorm", "config": {"axis": [0, 1]}},
            constraints.UnitNorm((0, 1)),
        ),
    ],
)
def test_dialects(kind, config, expected):
    assert ROOMS[kind].get(config) == expected


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


# Errors. A message calls the identifier ARGUMENT: its kind, or what the caller says.

NOT_AN_IDENTIFIER = (
    "Could not interpret ARGUMENT identifier: it must be a name, a config dict or a callable, "
)
SPECTROGRAM = "which fills a kernel of shape (time, 1, frequency), as no depthwise layer has."
ERRORS = [  # (kind, identifier, error, message)
    (
        "regularizer",
        "l22",
        ValueError,
        "Could not interpret ARGUMENT identifier: got 'l22', did you mean 'l2'?",
    ),
    (
        "constraint",
        "qqqq",
        ValueError,
        "Could not interpret ARGUMENT identifier: got 'qqqq'.",
    ),
    ("constraint", "", ValueError, "Could not interpret ARGUMENT identifier: got ''."),
    (
        "regularizer",
        "Regularizer",
        ValueError,
        "Could not interpret ARGUMENT identifier: got 'Regularizer', which is the base class "
        "and penalises nothing.",
    ),
    (
        "initializer",
        "initializer",
        ValueError,
        "Could not interpret ARGUMENT identifier: got 'initializer', which is the base class "
        "and has no values.",
    ),
    *(
        (
            "initializer",
            {"class_name": "STFT", "config": {"side": "real"}} if name == "STFT" else name,
            ValueError,
            f"Could not interpret ARGUMENT identifier: got {name!r}, {SPECTROGRAM}",
        )
        for name in ("STFT", "stft", "STFTInitializer")
    ),
    (
        "activation",
        "PReLU",
        ValueError,
        "Could not interpret ARGUMENT identifier: got 'PReLU', which has weights, "
        "as an activation function cannot.",
    ),
    (
        "activation",
        "threshold",
        ValueError,
        "ARGUMENT 'threshold' needs a config dict with 'threshold' and 'default_value'.",
    ),
    (
        "activation",
        activations.Threshold,
        ValueError,
        "Could not interpret ARGUMENT identifier: got the class Threshold, which cannot be made "
        "without arguments: pass an instance.",
    ),
    (
        "regularizer",
        np.zeros(1000),
        TypeError,
        NOT_AN_IDENTIFIER + "got an array of shape (1000,).",
    ),
    ("initializer", int, TypeError, NOT_AN_IDENTIFIER + "got <class 'int'>."),
    ("constraint", ["non_neg"], TypeError, NOT_AN_IDENTIFIER + "got ['non_neg']."),
    # a number: the object that was probably meant, if it can be made
    ("regularizer", 0.01, TypeError, NOT_AN_IDENTIFIER + "got 0.01, did you mean `L2(0.01)`?"),
    ("constraint", 2, TypeError, NOT_AN_IDENTIFIER + "got 2, did you mean `MaxNorm(2.0)`?"),
    ("initializer", 1.0, TypeError, NOT_AN_IDENTIFIER + "got 1.0, did you mean `Constant(1.0)`?"),
    ("activation", 3, TypeError, NOT_AN_IDENTIFIER + "got 3."),
    ("regularizer", True, TypeError, NOT_AN_IDENTIFIER + "got True."),
    ("regularizer", -1, TypeError, NOT_AN_IDENTIFIER + "got -1."),
    ("initializer", float("nan"), TypeError, NOT_AN_IDENTIFIER + "got nan."),
    # config dicts
    (
        "regularizer",
        {"config": {}},
        ValueError,
        "Could not interpret ARGUMENT identifier: a config dict needs a 'class_name', "
        "got {'config': {}}.",
    ),
    (
        "regularizer",
        {"class_name": "L2", "confg": {}},
        ValueError,
        "Could not interpret ARGUMENT identifier: a config dict has no key 'confg', "
        "did you mean 'config'?",
    ),
    (
        "regularizer",
        {"class_name": "L2", "config": [1]},
        TypeError,
        "Could not interpret ARGUMENT identifier: 'class_name' must be a name and 'config' a "
        "dict, got {'class_name': 'L2', 'config': [1]}.",
    ),
    (
        "regularizer",
        {"class_name": "L2", "module": "mine", "config": {}},
        ValueError,
        "Could not interpret ARGUMENT identifier: 'module' must be one of Keras's, 'L2' of "
        "another one is a custom object, got 'mine'.",
    ),
    (
        "regularizer",
        {"class_name": "L2", "module": 3},
        TypeError,
        "Could not interpret ARGUMENT identifier: 'module' must be a name, got 3.",
    ),
    (
        "regularizer",
        {"class_name": "L2", "registered_name": "mine>L2"},
        ValueError,
        "Could not interpret ARGUMENT identifier: got 'mine>L2', which is a custom object.",
    ),
    # the arguments inside
    (
        "regularizer",
        {"class_name": "L2", "config": {"l3": 1.0}},
        ValueError,
        "ARGUMENT 'L2' has no argument 'l3', did you mean 'l2'?",
    ),
    (
        "activation",
        {"class_name": "relu", "config": {"max_value": 1.0}},
        ValueError,
        "ARGUMENT 'relu' has no argument 'max_value'.",
    ),
    (
        "activation",
        {"class_name": "LeakyReLU", "config": {"alpha": 1, "negative_slope": 1}},
        ValueError,
        "ARGUMENT 'LeakyReLU' got the argument 'negative_slope' twice.",
    ),
    (
        "regularizer",
        {"class_name": "L2", "config": {"l2": -1.0}},
        ValueError,
        "ARGUMENT: `l2` must be a finite non-negative number, got -1.0.",
    ),
    (
        "constraint",
        {"class_name": "MaxNorm", "config": {"axis": 0.5}},
        TypeError,
        "ARGUMENT: `axis` must be an int or a tuple of different ints, got 0.5.",
    ),
    # arrays
    (
        "initializer",
        np.ones((3, 3), complex),
        TypeError,
        "ARGUMENT must be an array of real numbers, got an array of shape (3, 3) "
        "of dtype complex128.",
    ),
]


@pytest.mark.parametrize("argument", [None, "an_argument"])
@pytest.mark.parametrize("kind, identifier, error, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(kind, identifier, error, message, argument):
    message = message.replace("ARGUMENT", f"`{argument or kind}`")
    vocabulary = ROOMS[kind].VOCABULARY
    for f in (vocabulary.get, vocabulary.serialize):
        rooms.check_error(lambda f=f: f(identifier, argument), error, message)
    if argument is None:
        rooms.check_error(lambda: ROOMS[kind].get(identifier), error, message)


@pytest.mark.parametrize(
    "kind, obj, words",
    [
        ("activation", abs, "<built-in function abs>"),
        ("initializer", np.ones((3, 3)), "Array(shape=(3, 3), dtype=float64)"),
    ],
)
def test_what_has_no_name_cannot_be_written(kind, obj, words):
    serialize = ROOMS[kind].VOCABULARY.serialize
    for name, call in ((kind, serialize), ("a", functools.partial(serialize, argument="a"))):
        message = f"`{name}` must have a Keras name to be serialized, got {words}."
        rooms.check_error(lambda call=call: call(obj), ValueError, message)


HINTS = [
    # another library's name for it
    ("initializer", "xavier_uniform", "glorot_uniform"),
    ("initializer", "xavier_normal_", "glorot_normal"),
    ("initializer", "XavierUniform", "GlorotUniform"),
    ("initializer", "xavier", "glorot_uniform"),
    ("initializer", "kaiming_normal", "he_normal"),
    ("initializer", "KaimingUniform", "HeUniform"),
    ("initializer", "gaussian", "random_normal"),
    ("regularizer", "weight_decay", "l2"),
    ("activation", "identity", "linear"),
    ("activation", "None", "linear"),
    ("activation", "h_swish", "hard_swish"),
    # half of the name, or more than it
    ("initializer", "glorot", "glorot_uniform"),
    ("initializer", "Glorot", "GlorotUniform"),
    ("initializer", "he", "he_normal"),
    ("initializer", "zeros_initializer", "zeros"),
    ("regularizer", "l2_regularizer", "l2"),
    ("regularizer", "L1Regularizer", "L1"),
    ("regularizer", "orthogonal", "orthogonal_regularizer"),
    ("constraint", "non_negative", "non_neg"),
    ("constraint", "NonNegative", "NonNeg"),
    ("constraint", "max_norm_constraint", "max_norm"),
    # the same letters in another case, or with other signs between them
    ("activation", "leakyrelu", "LeakyReLU"),
    ("activation", "leaky-relu", "leaky_relu"),
    ("activation", "LeakyRelu", "LeakyReLU"),
    ("activation", "hard-swish", "hard_swish"),
    ("activation", "hardswish", "hard_swish"),
    ("activation", "hardsigmoid", "hard_sigmoid"),
    ("activation", "RELU6", "relu6"),
    ("regularizer", "L1_L2", "l1_l2"),  # "L1L2" has no penalty by default
    # a slip of the finger
    ("initializer", "GlorotUnifrom", "GlorotUniform"),
    ("initializer", "zeroes", "zeros"),
    ("regularizer", "L3", "L2"),
    ("constraint", "maxnorms", "maxnorm"),
]


@pytest.mark.parametrize("kind, word, meant", HINTS)
def test_hints(kind, word, meant):
    message = f"Could not interpret `{kind}` identifier: got {word!r}, did you mean {meant!r}?"
    rooms.check_error(lambda: ROOMS[kind].get(word), ValueError, message)


@pytest.mark.parametrize("kind", ROOMS)
def test_hints_name_what_there_is(kind):
    vocabulary = ROOMS[kind].VOCABULARY
    assert set(vocabulary.slips.values()) <= set(vocabulary.names)
    for slip, name in vocabulary.slips.items():
        with pytest.raises(ValueError, match=f"did you mean '{name.replace('_', '_?')}'"):
            vocabulary.get(slip)
    refused = {n for n, entry in vocabulary.names.items() if hasattr(entry, "reason")}
    assert refused == REFUSED[kind]


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
    for room in ROOMS.values():
        for f in (room.get, room.serialize):
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
        for room in ROOMS.values():
            with pytest.raises((ValueError, TypeError)) as caught:
                room.get(junk)
            assert len(str(caught.value)) < 1000
