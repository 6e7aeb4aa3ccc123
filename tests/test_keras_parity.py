"""Live Keras 3 on JAX as the oracle: random configurations over all arguments.

What is left out, as Keras 3 itself is wrong or means something else than tf.keras there:
hard_sigmoid (Keras 2's is ours), sparsemax (Keras's exceeds 1), threshold (has no defaults), and
OrthogonalRegularizer (wants a matrix). Strides with dilation are refused by the layer, as
documented.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import flax_dwconv
from flax_dwconv import (
    DepthwiseConv2D,
    constraints,
    initializers,
    keras_io,
    regularizers,
    total_loss,
)

keras = pytest.importorskip("keras", minversion="3.10")

ACTIVATIONS = [
    *[None, "celu", "elu", "exponential", "gelu", "glu", "hard_shrink", "hard_silu", "hard_swish"],
    *["hard_tanh", "leaky_relu", "linear", "log_sigmoid", "log_softmax", "mish", "relu", "relu6"],
    *["selu", "sigmoid", "silu", "soft_shrink", "softmax", "softplus", "softsign", "sparse_plus"],
    *["sparse_sigmoid", "squareplus", "swish", "tanh", "tanh_shrink"],
]


def entry(class_name, **config):
    return {"class_name": class_name, "config": config}


INITIALIZERS = [
    *["glorot_uniform", "GlorotNormal", "he_normal", "he_uniform", "lecun_normal", "LecunUniform"],
    *["ones", "Zeros", "RandomNormal", "random_uniform", "truncated_normal", "variance_scaling"],
    *["normal", "uniform", "one", "zero"],
    entry("Constant", value=0.25),
    entry("RandomNormal", mean=1.0, stddev=0.5, seed=3),
    entry("VarianceScaling", scale=2.0, mode="fan_out", distribution="uniform", seed=None),
    entry("GlorotUniform", seed=1337),
]
KERNEL_INITIALIZERS = INITIALIZERS + ["orthogonal", entry("Orthogonal", gain=0.5, seed=1)]

REGULARIZERS = [
    *[None, "l1", "L2", "l1l2", "L1L2"],
    entry("L1", l1=0.25),
    entry("L2", l2=0.5),
    entry("L1L2", l1=0.125, l2=0.25),
]

CONSTRAINTS = [
    *[None, "max_norm", "NonNeg", "unit_norm", "MinMaxNorm"],
    entry("MaxNorm", max_value=1.5, axis=0),
    entry("MinMaxNorm", min_value=0.5, max_value=2.0, rate=0.5, axis=0),
]
KERNEL_CONSTRAINTS = CONSTRAINTS + [entry("UnitNorm", axis=[0, 1])]

COUNT = 152
PER_TEST = 4  # compiled together
# The first of those that are compiled together. The default selection runs half of them, which
# meets every value of every argument too.
STARTS = range(0, COUNT, PER_TEST)
DEFAULT = STARTS[len(STARTS) // 2 :]


def selected(default, slow):
    """Parametrizes a test with every start: those in `default` as they are, those in `slow` marked
    so, and all others `nightly`.
    """
    seldom = {n: pytest.mark.slow if n in slow else pytest.mark.nightly for n in STARTS}
    marks = seldom | dict.fromkeys(default, ())
    return pytest.mark.parametrize("start", [pytest.param(n, marks=marks[n]) for n in STARTS])


@pytest.fixture
def strict_jax():
    """Overrides the suite's: Keras promotes dtypes and ranks."""


def configuration(seed, name="DepthwiseConv2D"):
    """Random arguments and input shape. Names go round, so that each one is met several times."""
    rank = int(name[-2])
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    def size(high):
        return one_of(
            int(rng.integers(1, high)), tuple(int(n) for n in rng.integers(1, high, size=rank))
        )

    def turn(values, speed=1):
        return values[(seed * speed) % len(values)]

    stretch = one_of("strides", "dilation_rate", "neither")
    settings = dict(
        kernel_size=size(5),
        strides=size(4) if stretch == "strides" else one_of(1, (1,) * rank),
        padding=one_of("valid", "same", "SAME"),
        depth_multiplier=int(rng.integers(1, 4)),
        data_format=one_of(None, "channels_last", "channels_first"),
        dilation_rate=size(4) if stretch == "dilation_rate" else one_of(1, (1,) * rank),
        activation=turn(ACTIVATIONS),
        use_bias=bool(rng.random() < 0.8),
        depthwise_initializer=turn(KERNEL_INITIALIZERS, 5),
        bias_initializer=turn(INITIALIZERS, 3),
        depthwise_regularizer=turn(REGULARIZERS, 3),
        bias_regularizer=turn(REGULARIZERS, 5),
        activity_regularizer=one_of(*REGULARIZERS),
        depthwise_constraint=one_of(*KERNEL_CONSTRAINTS),
        bias_constraint=one_of(*CONSTRAINTS),
    )
    kernel, rate = (np.broadcast_to(settings[k], rank) for k in ("kernel_size", "dilation_rate"))
    spatial = [int(rng.integers(4)) + n for n in (kernel - 1) * rate + 1]
    channels = int(rng.integers(1, 5))
    if settings["activation"] == "softmax":  # Keras warns of a last axis of size 1
        spatial[-1] += 6
        channels += 1
    if settings["activation"] == "glu":  # halves the last axis, which must be even
        channels *= 2
        if settings["data_format"] == "channels_first":
            spatial[-1] = 24
            settings |= dict(strides=1, padding="same")
    if name.startswith("Separable"):
        settings["filters"] = 2 * int(rng.integers(1, 4))
        settings["pointwise_initializer"] = turn(KERNEL_INITIALIZERS, 7)
        settings["pointwise_regularizer"] = turn(REGULARIZERS, 7)
        settings["pointwise_constraint"] = one_of(*KERNEL_CONSTRAINTS)
    first = settings["data_format"] == "channels_first"
    shape = (int(rng.integers(1, 4)), *([channels, *spatial] if first else [*spatial, channels]))
    return settings, shape, rng


def rounded(config):
    """Keras writes L1 and L1L2's factors as float32: 0.01 reads 0.009999999776482582."""
    return json.loads(json.dumps(config), parse_float=lambda text: float(np.float32(text)))


def plain(config):
    """A Keras config without what does not set the layer."""
    return rounded({k: v for k, v in config.items() if k != "name"})


class Pair:
    """One configuration as our layer and as Keras's, with the same weights."""

    def __init__(self, seed, name="DepthwiseConv2D"):
        self.settings, self.shape, rng = configuration(seed, name)
        self.ours = getattr(flax_dwconv, name)(**self.settings)
        # The plain convolution, which Keras calls too, compiles twice as fast as our lowering; that
        # the two methods agree is tested elsewhere.
        self.method = "lax" if seed % 5 else "auto"
        self.keras = getattr(keras.layers, name)(**self.settings)
        # Not the initial values: an exact 0 has no derivative under L1. Built in this scope, Keras
        # does not compute them, which would take longer than everything else here.
        with keras.StatelessScope(initialize_variables=False):
            self.keras.build(self.shape)
        self.params = {
            v.name: rng.standard_normal(v.shape).astype(np.float32) for v in self.keras.weights
        }
        self.x = rng.standard_normal(self.shape).astype(np.float32)
        y_shape = self.ours.compute_output_shape(self.shape)
        self.g = rng.standard_normal(y_shape).astype(np.float32)

    def run_ours(self, params, x):
        layer = self.ours.clone(method=self.method)
        y, state = layer.apply({"params": params}, x, mutable=["losses"])
        losses = state.get("losses", {})
        return y, list(losses.values()), total_loss(losses)

    def run_keras(self, params, x):
        variables = [(v, params[v.name]) for v in self.keras.weights]
        with keras.StatelessScope(variables, collect_losses=True, initialize_variables=False):
            y = self.keras(x)
            losses = list(self.keras.losses)
        return y, losses, sum(losses, start=jnp.float32(0))

    def check_configs(self):
        config = self.ours.get_config()
        theirs = type(self.keras).from_config(dict(config, name="dw"))
        assert plain(theirs.get_config()) == plain(self.keras.get_config())
        layer = type(self.ours)
        back = layer.from_config(self.keras.get_config())
        assert plain(back.get_config()) == plain(config)
        assert back.name == self.keras.name
        whole = keras.layers.serialize(self.keras)
        assert plain(layer.from_config(whole).get_config()) == plain(config)
        assert plain(keras_io.from_config(whole).get_config()) == plain(config)
        again = keras.saving.deserialize_keras_object(keras_io.to_config(self.ours.copy(name="dw")))
        assert plain(again.get_config()) == plain(self.keras.get_config())

    def check_shapes(self):
        # Keras forgets that glu halves the last axis.
        if self.settings["activation"] != "glu":
            for shape in (self.shape, (None, *self.shape[1:])):
                expected = tuple(self.keras.compute_output_shape(shape))
                assert self.ours.compute_output_shape(shape) == expected
        params = jax.eval_shape(self.ours.init, jax.random.key(0), self.x)["params"]
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(np.shape, self.params)


def results(pair, run, params, x):
    """Output, penalties, their sum, and the gradients of sum(g * y) + that sum."""

    def loss(params, x):
        y, losses, total = run(params, x)
        return jnp.sum(pair.g * y) + total, (y, losses, total)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)


@selected(DEFAULT, slow=STARTS)
def test_random_configurations(start):
    agree([Pair(seed) for seed in range(start, start + PER_TEST)])


@selected(DEFAULT[:4], slow=DEFAULT[4:10])
@pytest.mark.parametrize("name", ["DepthwiseConv1D", "SeparableConv1D", "SeparableConv2D"])
def test_random_configurations_of_the_family(name, start):
    agree([Pair(seed, name) for seed in range(start, start + PER_TEST)])


def agree(pairs):
    """Holds our layers to Keras's: configs, shapes, results, penalties and gradients."""
    for pair in pairs:
        pair.check_configs()
        pair.check_shapes()

    # Compiling is nearly all of the time here, and what it optimises is not measured.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(arguments):
        return [
            [results(pair, run, *a) for run in (pair.run_ours, pair.run_keras)]
            for pair, a in zip(pairs, arguments, strict=True)
        ]

    for pair, (ours, theirs) in zip(pairs, run([(p.params, p.x) for p in pairs]), strict=True):
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs), pair.settings
        for (path, a), b in zip(
            jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
        ):
            scale = max(1.0, float(np.abs(b).max(initial=0)))
            np.testing.assert_allclose(
                a, b, rtol=1e-5, atol=2e-6 * scale, err_msg=f"{path} of {pair.settings}"
            )


def test_every_value_is_met():
    """The generator must not leave anything out: this holds it to its tables."""
    met = [configuration(start + i)[0] for start in DEFAULT for i in range(PER_TEST)]
    for name, values in dict(
        activation=ACTIVATIONS,
        depthwise_initializer=KERNEL_INITIALIZERS,
        bias_initializer=INITIALIZERS,
        depthwise_regularizer=REGULARIZERS,
        bias_regularizer=REGULARIZERS,
        activity_regularizer=REGULARIZERS,
        depthwise_constraint=KERNEL_CONSTRAINTS,
        bias_constraint=CONSTRAINTS,
        use_bias=[True, False],
        data_format=[None, "channels_last", "channels_first"],
        depth_multiplier=[1, 2, 3],
    ).items():
        assert all(any(value == settings[name] for settings in met) for value in values), name
    unequal = [s for s in met if len(set(np.broadcast_to(s["strides"], 2))) == 2]
    assert len(unequal) > 5
    assert sum(np.max(s["dilation_rate"]) > 1 for s in met) > 15


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_dtype_policies(policy):
    theirs = keras.layers.DepthwiseConv2D(3, dtype=policy, activation="relu", padding="same")
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 3)).astype(np.float32)
    theirs.build(x.shape)
    ours = DepthwiseConv2D.from_config(theirs.get_config())
    params = {"kernel": theirs.kernel.value, "bias": theirs.bias.value}
    assert {str(leaf.dtype) for leaf in params.values()} == {ours.param_dtype.name}
    y = ours.apply({"params": params}, x)
    assert str(y.dtype) == theirs.compute_dtype
    # Ours is rounded once; Keras's, on older JAX, after each of the nine terms.
    ulp = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}[theirs.compute_dtype]
    kernel, rounded_x = (
        np.asarray(jnp.asarray(a, y.dtype), "f8") for a in (theirs.kernel.value, x)
    )
    expected = np.maximum(oracle.forward(rounded_x, kernel, padding="same"), 0)
    np.testing.assert_allclose(np.asarray(y, "f8"), expected, rtol=ulp, atol=1e-6)
    np.testing.assert_allclose(np.asarray(theirs(x), "f8"), expected, rtol=9 * ulp, atol=9 * ulp)
    again = keras.layers.DepthwiseConv2D.from_config(ours.get_config())
    assert again.dtype_policy.name == policy


SEEDED = [
    entry("GlorotUniform", seed=1337),
    entry("GlorotNormal", seed=1337),
    entry("HeNormal", seed=2),
    entry("HeUniform", seed=0),
    entry("LecunNormal", seed=7),
    entry("LecunUniform", seed=7),
    entry("RandomNormal", mean=0.5, stddev=2.0, seed=3),
    entry("RandomUniform", minval=-1.0, maxval=3.0, seed=4),
    entry("TruncatedNormal", mean=0.5, stddev=0.1, seed=5),
    entry("VarianceScaling", scale=2.0, mode="fan_out", distribution="uniform", seed=6),
    entry("VarianceScaling", scale=0.5, mode="fan_avg", distribution="untruncated_normal", seed=6),
    entry("Orthogonal", gain=2.0, seed=8),
    entry("Constant", value=0.1),
]


@pytest.mark.parametrize("identifier", SEEDED, ids=lambda e: e["class_name"])
def test_seeded_initializers_are_kerass_bit_for_bit(identifier):
    settings = dict(kernel_size=(3, 2), depth_multiplier=2, depthwise_initializer=identifier)
    if identifier["class_name"] != "Orthogonal":  # wants two axes
        settings["bias_initializer"] = identifier
    theirs = keras.layers.DepthwiseConv2D(**settings)
    theirs.build((None, 5, 5, 3))
    key = jax.random.key(0)  # which the seed in the identifier overrides
    params = DepthwiseConv2D(**settings).init(key, np.ones((1, 5, 5, 3), "f4"))["params"]
    np.testing.assert_array_equal(params["kernel"], theirs.kernel.value)
    np.testing.assert_array_equal(params["bias"], theirs.bias.value)


@pytest.mark.parametrize(
    "room, theirs",
    [
        (initializers, [keras.initializers.GlorotUniform(seed=1), keras.initializers.Ones()]),
        (regularizers, [keras.regularizers.L2(0.5), keras.regularizers.L1L2(0.25, 0.5)]),
        (constraints, [keras.constraints.MaxNorm(1.5, axis=[0, 1]), keras.constraints.NonNeg()]),
    ],
    ids=["initializers", "regularizers", "constraints"],
)
def test_objects_of_keras_are_identifiers(room, theirs):
    for obj in theirs:
        ours = room.get(obj)
        assert ours.__class__.__name__ == obj.__class__.__name__
        assert ours.__class__.__module__.startswith("flax_dwconv")
        config = keras.saving.serialize_keras_object(obj)
        assert room.get(config) == ours


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_kernel_and_bias_of_keras_fit_without_change(first, use_bias):
    """No transposition, in either format: the arrays are the parameters."""
    data_format = "channels_first" if first else "channels_last"
    settings = dict(kernel_size=(2, 3), depth_multiplier=2, use_bias=use_bias)
    theirs = keras.layers.DepthwiseConv2D(**settings, data_format=data_format)
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    expected = theirs(x)
    ours = DepthwiseConv2D(**settings, data_format=data_format)
    y = ours.apply({"params": {v.name: v.value for v in theirs.weights}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
