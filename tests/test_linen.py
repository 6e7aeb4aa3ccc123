"""The linen layer: numbers, shapes, penalties, configs, and its life inside other modules."""

import dataclasses
import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax.core import meta

import flax_dwconv
from flax_dwconv import DepthwiseConv2D, constraints, initializers, regularizers, total_loss

KEY = jax.random.key(0)


def parameters(layer, x):
    """Small integers in place of the layer's own initial values."""
    shapes = jax.eval_shape(layer.init, KEY, x)["params"]
    return {
        "params": {
            name: oracle.integers(seed, *leaf.shape, dtype=leaf.dtype)
            for seed, (name, leaf) in enumerate(sorted(shapes.items()))
        }
    }


def apply_with_losses(layer, variables, x):
    y, state = layer.apply(variables, x, mutable=["losses"])
    return y, state.get("losses", {})


# Values


GEOMETRIES = [
    {},
    dict(kernel_size=(3, 2), strides=(2, 1), depth_multiplier=2),
    dict(kernel_size=(2, 3), padding="SAME", dilation_rate=(2, 1)),
    dict(padding=1, strides=2),
    dict(padding=((1, 0), (-1, 2)), depth_multiplier=3),
]


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_layer_is_convolution_plus_bias_then_activation(geometry, data_format, use_bias):
    geometry = {"kernel_size": 3} | geometry
    layer = DepthwiseConv2D(
        **geometry, data_format=data_format, use_bias=use_bias, activation="relu"
    )
    x = oracle.from_last(oracle.integers(0, 2, 7, 6, 3), data_format)
    variables = parameters(layer, x)
    params = variables["params"]
    kh, kw = oracle.each(geometry["kernel_size"], 2)
    m = geometry.pop("depth_multiplier", 1)
    assert params["kernel"].shape == (kh, kw, 3, m)
    assert set(params) == ({"kernel", "bias"} if use_bias else {"kernel"})

    del geometry["kernel_size"]
    y = oracle.forward(x, params["kernel"], **geometry, data_format=data_format)
    if use_bias:
        assert params["bias"].shape == (3 * m,)
        y = oracle.from_last(oracle.to_last(y, data_format) + params["bias"], data_format)
    ours = jax.jit(layer.apply)(variables, x)
    np.testing.assert_array_equal(ours, np.maximum(y, 0))
    assert layer.compute_output_shape(x.shape) == ours.shape


def test_bias_belongs_to_the_channels_even_where_the_width_is_as_large():
    """Keras on TensorFlow adds it along the width here."""
    layer = DepthwiseConv2D(1, data_format="channels_first", depthwise_initializer="zeros")
    x = np.zeros((1, 3, 5, 3), "f4")
    variables = {"params": {"kernel": np.zeros((1, 1, 3, 1), "f4"), "bias": np.arange(3.0)}}
    variables = jax.tree.map(np.float32, variables)
    y = layer.apply(variables, x)
    np.testing.assert_array_equal(y[0, :, 0, 0], [0, 1, 2])
    np.testing.assert_array_equal(y[0, 2], np.full((5, 3), 2))


@pytest.mark.parametrize("method", ["auto", "lax"])
@pytest.mark.parametrize("precision", [None, "highest", ("default", jax.lax.Precision.HIGH)])
def test_method_and_precision_reach_the_convolution(method, precision):
    layer = DepthwiseConv2D(3, method=method, precision=precision)
    x = oracle.integers(0, 1, 5, 5, 2)
    variables = parameters(layer, x)
    jaxpr = jax.make_jaxpr(layer.apply)(variables, x)
    (eqn,) = (e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated")
    assert eqn.params["precision"] == layer.precision
    expected = oracle.forward(x, variables["params"]["kernel"]) + variables["params"]["bias"]
    np.testing.assert_array_equal(layer.apply(variables, x), expected)


def test_precision_is_canonical():
    high, highest = jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST
    assert DepthwiseConv2D(3, precision="HIGH").precision == (high, high)
    assert DepthwiseConv2D(3, precision=(high, "highest")).precision == (high, highest)


def test_defaults_are_kerass():
    variables = DepthwiseConv2D(3).init(KEY, np.ones((1, 5, 5, 4), "f4"))
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    assert set(variables) == {"params"}
    assert kernel.shape == (3, 3, 4, 1)
    assert kernel.dtype == bias.dtype == np.float32
    assert np.abs(kernel).max() <= np.sqrt(6 / (9 * (4 + 1)))  # glorot: fans kh*kw*c and kh*kw*m
    assert np.abs(kernel).max() > 0.8 * np.sqrt(6 / (9 * (4 + 1)))
    np.testing.assert_array_equal(bias, np.zeros(4))


def test_initializer_none_is_the_default():
    layer = DepthwiseConv2D(3, depthwise_initializer=None, bias_initializer=None)
    assert layer == DepthwiseConv2D(3)


def test_initializers_are_used():
    layer = DepthwiseConv2D(
        (2, 3),
        depth_multiplier=2,
        depthwise_initializer=lambda key, shape, dtype: jnp.arange(24.0).reshape(shape),
        bias_initializer={"class_name": "Constant", "config": {"value": 5.0}},
    )
    params = layer.init(KEY, np.ones((1, 4, 4, 2), "f4"))["params"]
    np.testing.assert_array_equal(params["kernel"], np.arange(24.0).reshape(2, 3, 2, 2))
    np.testing.assert_array_equal(params["bias"], np.full(4, 5.0))


def test_constraints_are_stored_and_not_applied():
    layer = DepthwiseConv2D(
        3, depthwise_initializer="ones", depthwise_constraint="unit_norm", bias_constraint="NonNeg"
    )
    assert layer.depthwise_constraint == constraints.UnitNorm()
    assert layer.bias_constraint == constraints.NonNeg()
    x = np.ones((1, 4, 4, 1), "f4")
    params = layer.init(KEY, x)["params"]
    np.testing.assert_array_equal(params["kernel"], np.ones((3, 3, 1, 1)))
    np.testing.assert_array_equal(layer.apply({"params": params}, x), np.full((1, 2, 2, 1), 9))


# Shapes


SHAPES = [
    (dict(), (None, 9, 8, 3), (None, 7, 6, 3)),
    (dict(), (2, None, None, 3), (2, None, None, 3)),
    (dict(strides=2, depth_multiplier=4), (None, 9, None, 3), (None, 4, None, 12)),
    (dict(strides=2, padding="same"), (1, 9, 8, 3), (1, 5, 4, 3)),
    (dict(dilation_rate=(1, 3)), (1, 9, 8, 3), (1, 7, 2, 3)),
    (dict(padding=2), (1, 1, 1, 3), (1, 3, 3, 3)),
    (dict(padding=((0, 1), (2, 0))), (1, 9, 8, 3), (1, 8, 8, 3)),
    (dict(data_format="channels_first", depth_multiplier=2), (0, 3, 9, 8), (0, 6, 7, 6)),
    (dict(data_format="channels_first", padding="same"), (None, 3, None, 8), (None, 3, None, 8)),
    (dict(depth_multiplier=2, activation="glu"), (1, 9, 8, 3), (1, 7, 6, 3)),
    (dict(data_format="channels_first", activation="glu"), (1, 3, 9, 8), (1, 3, 7, 3)),
]


@pytest.mark.parametrize("settings, shape, expected", SHAPES, ids=str)
def test_compute_output_shape_is_the_shape(settings, shape, expected):
    layer = DepthwiseConv2D(3, **settings)
    assert layer.compute_output_shape(shape) == expected
    assert layer.compute_output_shape(list(shape)) == expected
    sizes = [11 if n is None else n for n in shape]
    x = jax.ShapeDtypeStruct(sizes, np.float32)
    y = jax.eval_shape(lambda x: layer.init_with_output(KEY, x)[0], x)
    assert y.shape == layer.compute_output_shape(sizes)
    assert all(a in (None, b) for a, b in zip(expected, y.shape, strict=True))


def test_empty_batch():
    layer = DepthwiseConv2D(3, activity_regularizer="l2", depthwise_regularizer="l2")
    x = np.zeros((0, 5, 5, 2), "f4")
    variables = parameters(layer, x)
    y, losses = apply_with_losses(layer, variables, x)
    assert y.shape == (0, 3, 3, 2)
    assert losses["activity_penalty"] == 0.0
    gradient = jax.grad(lambda v: jnp.sum(layer.apply(v, x)))(variables)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, np.zeros(g.shape)), gradient)


# Penalties


PENALISED = dict(
    depthwise_regularizer="l2",
    bias_regularizer={"class_name": "L1", "config": {"l1": 0.5}},
    activity_regularizer=regularizers.L1L2(l1=0.25, l2=0.125),
)


def penalised(**settings):
    layer = DepthwiseConv2D(3, **PENALISED | settings)
    # Half a step off the integers: no output is 0, where |y| has no derivative.
    x = oracle.integers(0, 4, 5, 5, 2) + np.float32(0.5)
    return layer, parameters(layer, x), x


def test_penalties_are_those_of_the_definition():
    layer, variables, x = penalised(activation="relu")
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    y, losses = apply_with_losses(layer, variables, x)
    y = np.maximum(oracle.forward(x, kernel) + bias, 0)  # after the activation
    expected = {
        "activity_penalty": (0.25 * np.abs(y).sum() + 0.125 * (y**2).sum())
        / 4,  # by the batch size
        "kernel_penalty": 0.01 * (kernel**2).sum(),
        "bias_penalty": 0.5 * np.abs(bias).sum(),
    }
    assert list(losses) == ["activity_penalty", "kernel_penalty", "bias_penalty"]  # Keras's order
    for name, value in losses.items():
        assert value.shape == () and value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], rtol=1e-6)
    np.testing.assert_allclose(total_loss(losses), sum(expected.values()), rtol=1e-6)


@pytest.mark.parametrize(
    "setting, name",
    [
        ("activity_regularizer", "activity_penalty"),
        ("depthwise_regularizer", "kernel_penalty"),
        ("bias_regularizer", "bias_penalty"),
    ],
)
def test_a_penalty_is_present_only_where_a_regularizer_is_set(setting, name):
    layer = DepthwiseConv2D(3, **{setting: "l2"})
    x = oracle.integers(0, 4, 5, 5, 2)
    assert list(apply_with_losses(layer, parameters(layer, x), x)[1]) == [name]


def test_no_regularizer_no_penalty():
    layer = DepthwiseConv2D(3)
    x = oracle.integers(0, 4, 5, 5, 2)
    assert apply_with_losses(layer, parameters(layer, x), x)[1] == {}
    layer = DepthwiseConv2D(3, use_bias=False, bias_regularizer="l2")
    assert apply_with_losses(layer, parameters(layer, x), x)[1] == {}


def test_penalties_are_sown_only_where_the_collection_is_mutable():
    layer, variables, x = penalised()
    assert isinstance(layer.apply(variables, x), jax.Array)
    assert set(layer.init(KEY, x)) == {"params"}
    y, state = layer.apply(variables, x, mutable=True)
    assert set(state) == {"params", "losses"}
    np.testing.assert_array_equal(y, layer.apply(variables, x))


def test_variables_passed_back_do_not_count_twice():
    layer, _, x = penalised()
    variables = layer.init(KEY, x)
    _, once = apply_with_losses(layer, variables, x)
    _, again = apply_with_losses(layer, variables, x)
    assert total_loss(once) == total_loss(again) > 0


def test_a_layer_called_twice_adds_its_activity_and_counts_its_weights_once():
    class Twice(nn.Module):
        def setup(self):
            self.conv = DepthwiseConv2D(3, padding="same", **PENALISED)

        def __call__(self, a, b):
            return self.conv(a), self.conv(b)

    layer, variables, a = penalised(padding="same")
    b = oracle.integers(9, 2, 7, 5, 2)
    _, state = Twice().apply({"params": {"conv": variables["params"]}}, a, b, mutable=["losses"])
    _, losses_a = apply_with_losses(layer, variables, a)
    _, losses_b = apply_with_losses(layer, variables, b)
    losses = state["losses"]["conv"]
    np.testing.assert_allclose(
        losses["activity_penalty"],
        losses_a["activity_penalty"] + losses_b["activity_penalty"],
        rtol=1e-6,
    )
    assert losses["kernel_penalty"] == losses_a["kernel_penalty"] == losses_b["kernel_penalty"]
    assert losses["bias_penalty"] == losses_a["bias_penalty"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_penalties_are_computed_in_float32(dtype):
    """The sum, 80,000, is infinite in float16; the 513th is 512 in bfloat16."""
    layer = DepthwiseConv2D(
        1,
        dtype=dtype,
        param_dtype=dtype,
        depthwise_initializer="ones",
        depthwise_regularizer=regularizers.L1(1.0),
        bias_regularizer=regularizers.L1(1.0),
        bias_initializer="ones",
        activity_regularizer=regularizers.L1(1.0),
    )
    x = np.full((1, 200, 200, 1), 1, dtype=jnp.dtype(dtype))
    y, losses = apply_with_losses(layer, layer.init(KEY, x), x)
    assert y.dtype == dtype
    assert losses == {"activity_penalty": 80_000.0, "kernel_penalty": 1.0, "bias_penalty": 1.0}
    assert {v.dtype for v in losses.values()} == {np.dtype("float32")}


def test_a_callable_of_the_users_is_given_float32_too():
    layer = DepthwiseConv2D(1, dtype="float16", activity_regularizer=lambda y: jnp.sum(y))
    params = {"kernel": np.ones((1, 1, 1, 1), "f4"), "bias": np.ones(1, "f4")}
    _, losses = apply_with_losses(layer, {"params": params}, np.ones((1, 300, 300, 1), "f4"))
    assert losses["activity_penalty"] == 180_000.0


def test_penalties_of_float64_parameters_are_float32(x64):
    layer, variables, x = penalised(dtype="float64", param_dtype="float64")
    y, losses = apply_with_losses(layer, variables, x)
    assert y.dtype == np.float64
    assert {v.dtype for v in losses.values()} == {np.dtype("float32")}
    assert total_loss(losses).dtype == np.float32


def test_penalties_are_differentiable():
    layer, variables, x = penalised()

    def loss(variables):
        return total_loss(apply_with_losses(layer, variables, x)[1])

    gradient = jax.grad(loss)(variables)["params"]
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    y = oracle.forward(x, kernel) + bias
    assert np.abs(y).min() > 0
    g = (0.25 * np.sign(y) + 0.25 * y) / 4
    _, dk = oracle.vjp(x, kernel, g)
    np.testing.assert_allclose(gradient["kernel"], dk + 0.02 * kernel, rtol=1e-5, atol=1e-5)
    db = g.sum((0, 1, 2)) + 0.5 * np.sign(bias)
    np.testing.assert_allclose(gradient["bias"], db, rtol=1e-5)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = DepthwiseConv2D(3, depthwise_regularizer="l2", name="spatial")(x)
        return nn.Dense(4)(x)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = DepthwiseConv2D(3, activity_regularizer="l1")(x)
        x = Block(name="first")(x)
        return Block(name="second")(x)


def test_losses_are_sown_through_nested_models():
    x = oracle.normals(0, 2, 12, 12, 3)
    variables = Net().init(KEY, x)
    y, state = jax.jit(lambda v, x: Net().apply(v, x, mutable=["losses"]))(variables, x)
    assert y.shape == (2, 6, 6, 4)
    assert jax.tree.map(jnp.shape, state["losses"]) == {
        "DepthwiseConv2D_0": {"activity_penalty": ()},
        "first": {"spatial": {"kernel_penalty": ()}},
        "second": {"spatial": {"kernel_penalty": ()}},
    }
    params = variables["params"]
    expected = sum(0.01 * np.sum(params[b]["spatial"]["kernel"] ** 2) for b in ("first", "second"))
    expected += state["losses"]["DepthwiseConv2D_0"]["activity_penalty"]
    np.testing.assert_allclose(total_loss(state["losses"]), expected, rtol=1e-6)


# Dtypes


DTYPES = [
    # dtype, param_dtype, input -> output
    (None, "float32", "float32", "float32"),
    (None, "bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "float32", "float32", "bfloat16"),
    ("float16", "float32", "bfloat16", "float16"),
    ("float32", "bfloat16", "float16", "float32"),
    (None, "float32", "int32", "float32"),
    (None, "bfloat16", "uint8", "bfloat16"),
    ("float16", "float32", "int8", "float16"),
    (None, "float32", "bool", "float32"),
]
PROMOTED = [
    (None, "float32", "bfloat16", "float32"),
    (None, "bfloat16", "float32", "float32"),
    (None, "float16", "bfloat16", "float32"),
    (None, "float32", "complex64", "complex64"),
]


@pytest.mark.parametrize("dtype, param_dtype, given, result", PROMOTED)
def test_without_dtype_input_and_parameters_are_promoted(dtype, param_dtype, given, result):
    with jax.numpy_dtype_promotion("standard"):
        test_dtypes(dtype, param_dtype, given, result)


@pytest.mark.parametrize("dtype, param_dtype, given, result", DTYPES)
def test_dtypes(dtype, param_dtype, given, result):
    layer = DepthwiseConv2D(3, dtype=dtype, param_dtype=param_dtype)
    x = jnp.asarray(oracle.integers(0, 2, 5, 5, 2, limit=1) ** 2, given)
    params = layer.init(KEY, x)["params"]
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(param_dtype)}
    variables = {"params": jax.tree.map(jnp.ones_like, params)}
    y = layer.apply(variables, x)
    assert y.dtype == result
    expected = oracle.forward(x, np.ones((3, 3, 2, 1))) + 1
    np.testing.assert_array_equal(np.asarray(y).astype(expected.dtype), expected)


def test_float64(x64):
    layer = DepthwiseConv2D(3, param_dtype="float64")
    x = oracle.normals(0, 2, 5, 5, 2, dtype=np.float64)
    variables = layer.init(KEY, x)
    y = layer.apply(variables, x)
    assert y.dtype == np.float64
    expected = oracle.forward(x, variables["params"]["kernel"])
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


# The default of data_format


@pytest.fixture
def keras_home(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, "channels_last"),
        ('{"image_data_format": "channels_first"}', "channels_first"),
        ('{"image_data_format": "channels_last"}', "channels_last"),
        ('{"floatx": "float32"}', "channels_last"),
        ('{"image_data_format": "NHWC"}', "channels_last"),
        ('{"image_data_format": 3}', "channels_last"),
        ('{"image_data_format": ["channels_first"]}', "channels_last"),
        ('["channels_first"]', "channels_last"),
        ("null", "channels_last"),
        ("{broken", "channels_last"),
        ("", "channels_last"),
        ("[" * 100_000, "channels_last"),
        (b"\xff\xfe", "channels_last"),
    ],
    ids=lambda text: str(text)[:30],
)
def test_default_data_format_is_in_kerass_file(keras_home, text, expected):
    if text is not None:
        text = text if isinstance(text, bytes) else text.encode()
        (keras_home / "keras.json").write_bytes(text)
    assert DepthwiseConv2D(3).data_format == expected
    assert DepthwiseConv2D(3, data_format="channels_first").data_format == "channels_first"


def test_default_data_format_decides_the_axes(keras_home):
    (keras_home / "keras.json").write_text('{"image_data_format": "channels_first"}')
    layer = DepthwiseConv2D(3)
    (keras_home / "keras.json").unlink()  # what was read at construction stays
    x = oracle.integers(0, 1, 2, 5, 6)
    assert layer.init(KEY, x)["params"]["kernel"].shape == (3, 3, 2, 1)
    assert layer.compute_output_shape(x.shape) == (1, 2, 3, 4)


def test_keras_json_in_the_home_folder(tmp_path, monkeypatch):
    home, other = tmp_path / "home", tmp_path / "other"
    for folder, value in [(home / ".keras", "channels_first"), (other, "channels_last")]:
        folder.mkdir(parents=True)
        (folder / "keras.json").write_text(json.dumps({"image_data_format": value}))
    monkeypatch.setenv("HOME" if os.name != "nt" else "USERPROFILE", str(home))
    for keras_home in (None, ""):
        if keras_home is None:
            monkeypatch.delenv("KERAS_HOME")
        else:
            monkeypatch.setenv("KERAS_HOME", keras_home)
        assert DepthwiseConv2D(3).data_format == "channels_first"
    monkeypatch.setenv("KERAS_HOME", str(other))  # goes first, and alone
    assert DepthwiseConv2D(3).data_format == "channels_last"
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "nowhere"))
    assert DepthwiseConv2D(3).data_format == "channels_last"


# Configs


SETTINGS = [
    {},
    dict(kernel_size=(3, 2), strides=(2, 1), padding="SAME", depth_multiplier=2),
    dict(dilation_rate=[2, 1], data_format="Channels_First", use_bias=False),
    dict(padding=1),
    dict(padding=((1, 0), (-1, 2))),
    dict(activation="relu6", depthwise_initializer="he_normal", bias_initializer="ones"),
    dict(activation={"class_name": "LeakyReLU", "config": {"negative_slope": 0.1}}),
    dict(depthwise_initializer=initializers.get({"class_name": "RandomNormal", "config": {}})),
    dict(depthwise_initializer={"class_name": "GlorotUniform", "config": {"seed": 1337}}),
    PENALISED,
    dict(depthwise_constraint="max_norm", bias_constraint=constraints.UnitNorm(axis=0)),
    dict(depthwise_constraint={"class_name": "MinMaxNorm", "config": {"axis": [0, 1]}}),
    dict(dtype="bfloat16"),
    dict(dtype="float16", param_dtype="float16"),
    dict(dtype="float32"),
    dict(param_dtype="bfloat16"),
    dict(dtype="float16", param_dtype="bfloat16"),
    dict(precision="highest", method="lax"),
    dict(precision=("high", "default")),
    dict(name="depthwise"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: str(s)[:60])
def test_config_round_trip(settings):
    layer = DepthwiseConv2D(**{"kernel_size": 3} | settings)
    config = layer.get_config()
    restored = json.loads(json.dumps(config))
    assert restored == config  # JSON's types only: no tuple became a list
    assert DepthwiseConv2D.from_config(config) == layer
    assert DepthwiseConv2D.from_config(restored) == layer
    assert DepthwiseConv2D.from_config(restored).get_config() == config
    wrapped = {"class_name": "DepthwiseConv2D", "module": "keras.layers", "config": restored}
    assert DepthwiseConv2D.from_config(wrapped) == layer


def test_config_has_kerass_keys_in_kerass_order():
    config = DepthwiseConv2D(3, name="dw", depthwise_regularizer="l2").get_config()
    assert list(config) == [
        "name",
        "trainable",
        "dtype",
        "depth_multiplier",
        "kernel_size",
        "strides",
        "padding",
        "data_format",
        "dilation_rate",
        "activation",
        "use_bias",
        "depthwise_initializer",
        "bias_initializer",
        "depthwise_regularizer",
        "bias_regularizer",
        "activity_regularizer",
        "depthwise_constraint",
        "bias_constraint",
    ]
    assert config["name"] == "dw"
    assert config["activation"] == "linear"
    assert config["kernel_size"] == [3, 3]
    assert config["depthwise_regularizer"]["class_name"] == "L2"
    assert config["depthwise_initializer"]["class_name"] == "GlorotUniform"
    assert config["bias_regularizer"] is None


@pytest.mark.parametrize(
    "policy, dtype, param_dtype",
    [
        (None, None, "float32"),
        ("float32", "float32", "float32"),
        ("float16", "float16", "float16"),
        ("bfloat16", "bfloat16", "bfloat16"),
        ("mixed_bfloat16", "bfloat16", "float32"),
        ("mixed_float16", "float16", "float32"),
        ({"class_name": "DTypePolicy", "config": {"name": "float32"}}, None, "float32"),
        ({"class_name": "Policy", "config": {"name": "mixed_float16"}}, "float16", "float32"),
    ],
    ids=str,
)
def test_dtype_policies_of_a_config(policy, dtype, param_dtype):
    layer = DepthwiseConv2D.from_config({"kernel_size": 3, "dtype": policy})
    assert (layer.dtype, layer.param_dtype) == (dtype and jnp.dtype(dtype), jnp.dtype(param_dtype))


def test_config_of_keras_2():
    """As `tf.keras` wrote it: no modules, `groups`, a VarianceScaling for glorot_uniform."""
    glorot = {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform", "seed": None}
    config = {
        "name": "depthwise_conv2d",
        "trainable": True,
        "batch_input_shape": [None, 9, 8, 3],
        "dtype": "float32",
        "kernel_size": [3, 3],
        "strides": [2, 2],
        "padding": "same",
        "data_format": "channels_last",
        "dilation_rate": [1, 1],
        "groups": 1,
        "activation": "hard_sigmoid",
        "use_bias": True,
        "bias_initializer": {"class_name": "Zeros", "config": {}},
        "bias_regularizer": None,
        "activity_regularizer": None,
        "bias_constraint": None,
        "depth_multiplier": 2,
        "depthwise_initializer": {"class_name": "VarianceScaling", "config": glorot},
        "depthwise_regularizer": {"class_name": "L2", "config": {"l2": 0.009999999776482582}},
        "depthwise_constraint": {"class_name": "UnitNorm", "config": {"axis": [0, 1]}},
    }
    layer = DepthwiseConv2D.from_config(config)
    assert layer == DepthwiseConv2D(
        3,
        strides=2,
        padding="same",
        depth_multiplier=2,
        data_format="channels_last",
        activation="hard_sigmoid",
        depthwise_initializer=initializers.VarianceScaling(1.0, "fan_avg", "uniform"),
        depthwise_regularizer=regularizers.L2(0.009999999776482582),
        depthwise_constraint=constraints.UnitNorm((0, 1)),
        dtype="float32",
        name="depthwise_conv2d",
    )
    assert layer.compute_output_shape((None, 9, 8, 3)) == (None, 5, 4, 6)


def test_a_callable_without_a_keras_name_works_but_has_no_config():
    layer = DepthwiseConv2D(3, activation=lambda x: x + 1)
    x = np.zeros((1, 3, 3, 1), "f4")
    np.testing.assert_array_equal(layer.apply(layer.init(KEY, x), x), np.ones((1, 1, 1, 1)))
    with pytest.raises(ValueError, match="`activation` must have a Keras name"):
        layer.get_config()


# Equality and repr


def test_layers_are_equal_by_their_settings():
    layer = DepthwiseConv2D(3, activation=None, depthwise_regularizer="l2", dtype=jnp.bfloat16)
    same = DepthwiseConv2D(
        [3, 3],
        strides=np.int64(1),
        padding="VALID",
        activation="linear",
        depthwise_regularizer=regularizers.L2(0.01),
        dtype="bfloat16",
    )
    assert layer == same
    assert hash(layer) == hash(same)
    for different in [
        dict(strides=2),
        dict(activation="relu"),
        dict(dtype=None),
        dict(method="lax"),
    ]:
        assert layer != layer.clone(**different)


def test_clone_and_copy_keep_the_settings():
    layer = DepthwiseConv2D(3, depthwise_constraint={"class_name": "UnitNorm", "config": {}})
    assert layer.clone() == layer.copy() == layer
    assert layer.clone(kernel_size=5).kernel_size == (5, 5)
    with pytest.raises(ValueError, match="`strides`"):
        layer.clone(strides=0)


def test_repr_is_readable_and_rebuilds_the_numbers():
    text = repr(DepthwiseConv2D(3, strides=2, depthwise_regularizer="l2", activation="relu"))
    for part in [
        "DepthwiseConv2D(",
        "kernel_size = (3, 3)",
        "strides = (2, 2)",
        "activation = 'relu'",
        "depthwise_regularizer = L2(l2=0.01)",
        "method = 'auto'",
    ]:
        assert part.replace(" ", "") in text.replace(" ", "")
    assert " at 0x" not in text


# Inside other modules and transformations


def test_jit_and_gradients():
    layer, variables, x = penalised(activation="relu")

    @jax.jit
    def loss(variables, x):
        y, losses = apply_with_losses(layer, variables, x)
        return jnp.sum(y) + total_loss(losses)

    np.testing.assert_allclose(
        loss(variables, x),
        jnp.sum(layer.apply(variables, x)) + total_loss(apply_with_losses(layer, variables, x)[1]),
        rtol=1e-6,
    )
    gradient = jax.grad(loss)(variables, x)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, variables)


def test_layer_is_a_static_argument_of_jit():
    apply = jax.jit(DepthwiseConv2D.apply, static_argnums=0)
    layer, variables, x = penalised()
    np.testing.assert_array_equal(apply(layer, variables, x), layer.apply(variables, x))


def test_shared_layer_has_one_set_of_parameters():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = DepthwiseConv2D(3, padding="same", name="conv")
            return conv(conv(x))

    x = oracle.integers(0, 2, 5, 5, 2)
    variables = Shared().init(KEY, x)
    assert list(variables["params"]) == ["conv"]
    kernel = variables["params"]["conv"]["kernel"]
    expected = oracle.forward(oracle.forward(x, kernel, padding="same"), kernel, padding="same")
    np.testing.assert_allclose(Shared().apply(variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spatial_first", [True, False])
def test_channel_drift_is_our_error(spatial_first):
    layer = DepthwiseConv2D(3, data_format="channels_first" if spatial_first else "channels_last")
    shape, other = ((1, 2, 5, 5), (1, 4, 5, 5)) if spatial_first else ((1, 5, 5, 2), (1, 5, 5, 4))
    variables = layer.init(KEY, np.ones(shape, "f4"))
    with pytest.raises(ValueError, match="The layer has a kernel for 2 channels"):
        layer.apply(variables, np.ones(other, "f4"))
    boxed = DepthwiseConv2D(3, data_format=layer.data_format, depthwise_initializer=PARTITIONED)
    variables = boxed.init(KEY, np.ones(shape, "f4"))
    with pytest.raises(ValueError, match="The layer has a kernel for 2 channels"):
        boxed.apply(variables, np.ones(other, "f4"))


PARTITIONED = nn.with_partitioning(
    initializers.get("glorot_uniform"), (None, None, "channels", None)
)


def test_partitioned_initializers():
    layer = DepthwiseConv2D(3, depthwise_initializer=PARTITIONED, depthwise_regularizer="l2")
    x = oracle.integers(0, 2, 5, 5, 2)
    variables = layer.init(KEY, x)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    spec = nn.get_partition_spec(variables)["params"]
    assert spec["kernel"] == jax.sharding.PartitionSpec(None, None, "channels", None)
    assert spec["bias"] == jax.sharding.PartitionSpec()
    plain = DepthwiseConv2D(3, depthwise_regularizer="l2")
    unboxed = meta.unbox(variables)
    y, losses = apply_with_losses(layer, variables, x)
    expected, expected_losses = apply_with_losses(plain, unboxed, x)
    np.testing.assert_array_equal(y, expected)
    assert losses == expected_losses


def test_remat():
    layer, variables, x = penalised()
    remat = nn.remat(DepthwiseConv2D)(3, **PENALISED)

    def loss(layer, variables):
        y, losses = apply_with_losses(layer, variables, x)
        return jnp.sum(y**2) + total_loss(losses)

    jax.tree.map(
        np.testing.assert_array_equal,
        jax.grad(lambda v: loss(layer, v))(variables),
        jax.grad(lambda v: loss(remat, v))(variables),
    )


def test_vmap_makes_one_layer_for_each_member():
    ensemble = nn.vmap(
        DepthwiseConv2D,
        variable_axes={"params": 0, "losses": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
    )(3, **PENALISED)
    layer, _, x = penalised()
    variables = ensemble.init(KEY, x)
    assert variables["params"]["kernel"].shape == (3, 3, 3, 2, 1)
    y, losses = apply_with_losses(ensemble, variables, x)
    for i in range(3):
        member = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        expected, expected_losses = apply_with_losses(layer, member, x)
        np.testing.assert_allclose(y[i], expected, rtol=1e-5, atol=1e-5)
        for name, value in losses.items():
            np.testing.assert_allclose(value[i], expected_losses[name], rtol=1e-5)


def test_scan_over_layers():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return DepthwiseConv2D(3, padding="same", name="conv", **PENALISED)(x), None

    stack = nn.scan(
        Step, variable_axes={"params": 0, "losses": 0}, split_rngs={"params": True}, length=3
    )()
    x = oracle.normals(0, 2, 6, 6, 2)
    variables = stack.init(KEY, x, None)
    (y, _), state = stack.apply(variables, x, None, mutable=["losses"])
    kernels = variables["params"]["conv"]["kernel"]
    assert kernels.shape == (3, 3, 3, 2, 1)
    expected = x
    for kernel in kernels:
        expected = oracle.forward(expected, kernel, padding="same")
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    penalties = state["losses"]["conv"]["kernel_penalty"]
    np.testing.assert_allclose(penalties, 0.01 * (kernels**2).sum((1, 2, 3, 4)), rtol=1e-5)


def test_tabulate():
    table = DepthwiseConv2D(3, depth_multiplier=2).tabulate(KEY, np.ones((1, 5, 5, 3), "f4"))
    assert "DepthwiseConv2D" in table and "60" in table  # 3*3*3*2 + 6 parameters


def test_export_with_symbolic_batch():
    layer, variables, _ = penalised(activation="softmax")
    (n,) = jax.export.symbolic_shape("n")
    exported = jax.export.export(
        jax.jit(lambda x: layer.apply(variables, x, mutable=["losses"])),
    )(jax.ShapeDtypeStruct((n, 6, 6, 2), np.float32))
    for size in (1, 3):
        x = oracle.integers(0, size, 6, 6, 2)
        y, state = exported.call(x)
        expected, losses = apply_with_losses(layer, variables, x)
        np.testing.assert_allclose(y, expected, rtol=1e-5)
        np.testing.assert_allclose(
            state["losses"]["activity_penalty"], losses["activity_penalty"], rtol=1e-5
        )


def test_the_package_is_where_the_layer_is():
    assert flax_dwconv.DepthwiseConv2D is DepthwiseConv2D
    assert DepthwiseConv2D.__module__ == "flax_dwconv.linen"


@dataclasses.dataclass
class Scaled:
    """An activation that cannot be hashed, as a dataclass is that may change."""

    by: list

    def __call__(self, x):
        return x * self.by[0]


def test_an_activation_need_not_be_hashable():
    layer = DepthwiseConv2D(3, activation=Scaled([2.0]))
    x = oracle.integers(0, 1, 5, 5, 2)
    variables = parameters(layer, x)
    y = oracle.forward(x, variables["params"]["kernel"]) + variables["params"]["bias"]
    np.testing.assert_array_equal(layer.apply(variables, x), 2 * y)
