"""Keras's configs, layers and files: both dialects, files of Keras 3, files like Keras 2's."""

import io
import json
import sys
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import flax_dwconv
from flax_dwconv import DepthwiseConv2D, keras_io

h5py = pytest.importorskip("h5py")

# Keras reads its own variables so.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")


@pytest.fixture(autouse=True)
def strict_jax():
    """Keras promotes dtypes."""


@pytest.fixture(scope="module")
def keras():
    return pytest.importorskip("keras")


def apply(layer, params, x):
    return np.asarray(layer.apply({"params": params}, x), np.float32)


# Configs


GLOROT = {"scale": 1, "mode": "fan_avg", "distribution": "uniform", "seed": None}
INNER = {
    "name": "dw",
    "trainable": True,
    "dtype": "float32",
    "kernel_size": [3, 3],
    "strides": [1, 1],
    "padding": "same",
    "data_format": "channels_last",
    "dilation_rate": 1,
    "depth_multiplier": 2,
    "activation": "hard_sigmoid",
    "use_bias": True,
    "depthwise_initializer": {"class_name": "VarianceScaling", "config": GLOROT},
    "bias_initializer": {"class_name": "Zeros", "config": {}},
}
KERAS_2 = {"groups": 1, "batch_input_shape": [None, 8, 8, 3]}


@pytest.mark.parametrize("old", [INNER, INNER | KERAS_2], ids=["2.2", "2.15"])
def test_old_configs(old):
    layer = keras_io.from_config(old)
    assert layer == keras_io.from_config({"class_name": "DepthwiseConv2D", "config": old})
    assert layer == DepthwiseConv2D.from_config(old)
    assert (layer.name, layer.depth_multiplier, layer.activation) == ("dw", 2, "hard_sigmoid")
    assert DepthwiseConv2D.from_config(json.loads(json.dumps(layer.get_config()))) == layer


ZEROS = {"module": "keras.initializers", "class_name": "Zeros", "registered_name": None}


@pytest.mark.parametrize(
    ("whole", "inner", "slope"),
    [
        ({}, {}, 1 / 5),
        ({}, {"groups": 1}, 1 / 5),
        ({"module": "keras.layers", "registered_name": None}, {}, 1 / 6),
        ({"module": "keras.layers", "registered_name": None}, {"groups": 1}, 1 / 5),
        ({}, {"bias_initializer": ZEROS}, 1 / 6),
        ({}, {"bias_initializer": ZEROS, "groups": 1}, 1 / 5),
    ],
)
def test_hard_sigmoid_is_that_of_the_keras_that_wrote_the_config(whole, inner, slope):
    config = {"class_name": "DepthwiseConv2D", "config": INNER | inner} | whole
    layer = keras_io.from_config(config)
    params = {"kernel": jnp.zeros((3, 3, 1, 2)), "bias": jnp.ones(2)}
    np.testing.assert_allclose(apply(layer, params, jnp.ones((1, 1, 1, 1))), 0.5 + slope, rtol=1e-6)
    again = DepthwiseConv2D.from_config(json.loads(json.dumps(layer.get_config())))
    assert again.activation == layer.activation
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (3, TypeError, "`config` must be a dict, got int"),
        ({"class_name": "DepthwiseConv2D", "config": None}, TypeError, "`config` must be a dict"),
        ({"class_name": "Conv2D", "config": INNER}, ValueError, "got 'Conv2D'"),
        (
            {"class_name": "DepthwiseConv2D", "module": "mine", "config": INNER},
            ValueError,
            "must be of Keras's DepthwiseConv2D, got 'DepthwiseConv2D' of 'mine'",
        ),
        (INNER | {"filters": 3}, ValueError, r"unknown keys, got \['filters'\]"),
        (
            INNER | {"activation": {"module": "mine", "class_name": "F", "config": {}}},
            ValueError,
            "custom object",
        ),
    ],
)
def test_bad_configs(config, error, message):
    with pytest.raises(error, match=message):
        keras_io.from_config(config)


SETTINGS = [
    dict(kernel_size=(2, 3), strides=2, padding="same", activation="hard_sigmoid", use_bias=False),
    dict(data_format="channels_first", depth_multiplier=3, dilation_rate=2, activation="gelu"),
    dict(dtype="mixed_bfloat16", activation="hard_silu"),
    dict(dtype="float16", depthwise_initializer="he_normal", bias_initializer="ones"),
    dict(
        depthwise_regularizer="l2",
        bias_regularizer="l1",
        depthwise_constraint="max_norm",
        bias_constraint="non_neg",
    ),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_live_layers_there_and_back(keras, settings):
    theirs = keras.layers.DepthwiseConv2D(**{"kernel_size": 3} | settings, name="dw")
    shape = (2, 3, 8, 8) if "data_format" in settings else (2, 8, 8, 3)
    x = oracle.normals(0, *shape)
    theirs.build(shape)
    theirs.set_weights([oracle.normals(1, *w.shape) for w in theirs.weights])
    wanted = np.asarray(theirs(x), np.float32)

    layer, variables = keras_io.from_keras(theirs)
    tolerance = 0.02 if "dtype" in settings else 1e-5
    assert layer.name == "dw"
    assert layer == keras_io.from_config(theirs.get_config())
    np.testing.assert_allclose(
        np.asarray(layer.apply(variables, x), np.float32), wanted, tolerance, tolerance
    )
    for name, weight in zip(["kernel", "bias"], theirs.weights, strict=False):
        assert variables["params"][name].dtype.name == weight.dtype

    back = keras_io.to_keras(layer, variables)
    assert back.built and back.get_config() == theirs.get_config()
    for ours, weight in zip(back.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, weight)
    read = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras_io.to_config(layer))))
    assert read.get_config() == theirs.get_config()


def test_to_keras_of_the_nnx_twin(keras):
    layer = flax_dwconv.nnx.DepthwiseConv2D(2, 3, depthwise_initializer="ones", rngs=nnx.Rngs(0))
    params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    theirs = keras_io.to_keras(layer, {"params": params, "losses": {}})
    np.testing.assert_array_equal(theirs.get_weights()[0], params["kernel"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(precision="highest"), "`precision` must be None, got"),
        (dict(method="lax"), "`method` must be 'auto', got 'lax'"),
        (dict(padding=1), "`padding` must be 'valid' or 'same', got"),
        (dict(activation="hard_sigmoid"), "must not be Keras 2's 'hard_sigmoid'"),
        (dict(activation="ThresholdedReLU"), "`activation` must be .* got 'ThresholdedReLU'"),
        (dict(depthwise_constraint="radial_constraint"), "got 'RadialConstraint'"),
        (dict(dtype="float16", param_dtype="bfloat16"), "`dtype` and `param_dtype` must be"),
        (dict(dtype="float64"), "`dtype` and `param_dtype` must be"),
        (dict(activation=lambda x: x), "must have a Keras name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_keras_has_no_word_for(settings, message):
    with pytest.raises(ValueError, match=message):
        keras_io.to_config(DepthwiseConv2D(3, **settings))


def test_bad_arguments_of_the_live_layers(keras):
    with pytest.raises(TypeError, match="`layer` must be a layer of this package, got int"):
        keras_io.to_config(3)
    with pytest.raises(TypeError, match="`keras_layer` must be a layer of Keras, got int"):
        keras_io.from_keras(3)
    with pytest.raises(ValueError, match="`keras_layer` must be built"):
        keras_io.from_keras(keras.layers.DepthwiseConv2D(3))
    with pytest.raises(ValueError, match="must be of Keras's DepthwiseConv2D|unknown keys"):
        keras_io.from_keras(keras.layers.Dense(3))
    layer = DepthwiseConv2D(3)
    with pytest.raises(ValueError, match="`variables` must have 'params'"):
        keras_io.to_keras(layer, {"params": {"kernel": np.ones((3, 3, 1, 1))}})
    with pytest.raises(ValueError, match="`kernel` must have shape"):
        params = {"kernel": np.ones((5, 3, 1, 1)), "bias": np.ones(1)}
        keras_io.to_keras(layer, {"params": params})


# Files of Keras 3


def a_model(keras):
    """Layers of one shape in swapped order, nested, shared, wrapped, between others."""
    layers = keras.layers

    def depthwise(name, **settings):
        return layers.DepthwiseConv2D(3, padding="same", name=name, **settings)

    def encoder(name, *inside):
        return keras.Sequential([layers.Input((8, 8, 3)), *inside], name=name)

    shared = depthwise("shared", activation="hard_sigmoid")
    x = inputs = keras.Input((8, 8, 3))
    x = encoder("a", shared, depthwise("dw"))(x) + encoder("b", depthwise("dw"), shared)(x)
    inner = keras.Input((8, 8, 3))
    half = keras.Sequential([depthwise("half", dtype="mixed_bfloat16")], name="deep")(inner)
    low = depthwise("low", dtype="bfloat16")(layers.BatchNormalization()(half))
    x = keras.Model(inner, low, name="c")(x)
    x = layers.SeparableConv2D(3, 3, padding="same", name="separable")(x)
    x = layers.Conv2D(6, 3, groups=3, padding="same", name="grouped")(x)
    x = layers.Conv2D(3, 1)(x)
    frozen, second = depthwise("z", trainable=False), depthwise("y", activation="relu")
    x = second(frozen(x)) + frozen(second(x))
    x = layers.Lambda(lambda t: t[:, None], output_shape=(1, 8, 8, 3))(x)
    x = layers.TimeDistributed(depthwise("inside", use_bias=False), name="wrapper")(x)
    model = keras.Model(inputs, x, name="m")
    model.set_weights(
        [oracle.normals(i, *w.shape).astype(w.dtype) for i, w in enumerate(model.get_weights())]
    )
    get = model.get_layer
    return model, {
        "a/shared": shared,
        "a/dw": get("a").get_layer("dw"),
        "b/dw": get("b").get_layer("dw"),
        "b/shared": shared,
        "c/deep/half": get("c").get_layer("deep").get_layer("half"),
        "c/low": get("c").get_layer("low"),
        "z": frozen,
        "y": second,
        "separable": get("separable"),
        "grouped": get("grouped"),
        "wrapper/inside": get("wrapper").layer,
    }


@pytest.fixture(scope="module")
def saved(keras, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model, layers = a_model(keras)
    for name in ("m.keras", "m.h5", "m.weights.h5"):
        write = model.save_weights if name == "m.weights.h5" else model.save
        write(folder / name)
    return folder, model, layers


@pytest.mark.parametrize("name", ["m.keras", "m.h5", "m.weights.h5"])
def test_files_of_keras_3(keras, saved, monkeypatch, name):
    folder, model, layers = saved
    configs = [None]
    if name == "m.weights.h5":
        configs = [model.to_json(), model.get_config(), json.loads(model.to_json())]
    x = oracle.normals(0, 2, 8, 8, 3)
    wanted = {name: np.asarray(layer(x), np.float32) for name, layer in layers.items()}
    for module in [m for m in sys.modules if m.partition(".")[0] in ("keras", "tensorflow")]:
        monkeypatch.setitem(sys.modules, module, None)  # an import of it fails
    for config in configs:
        loaded = keras_io.load(str(folder / name), config=config)
        assert sorted(loaded) == sorted(wanted)
        for key, (layer, variables) in loaded.items():
            assert layer.name == key.rpartition("/")[2]
            tolerance = 0.02 if key in ("c/deep/half", "c/low") else 1e-5
            y = np.asarray(layer.apply(variables, x), np.float32)
            np.testing.assert_allclose(y, wanted[key], tolerance, tolerance, err_msg=key)
        assert loaded["c/low"][1]["params"]["kernel"].dtype == jnp.bfloat16
        assert loaded["c/deep/half"][1]["params"]["kernel"].dtype == jnp.float32


def test_weights_without_a_config_are_refused(saved):
    with pytest.raises(ValueError, match=r"m\.weights\.h5.*pass the model's as `config`"):
        keras_io.load(saved[0] / "m.weights.h5")


# Files like Keras 2's, and files that are bad


def depthwise(name="dw", **settings):
    return {"class_name": "DepthwiseConv2D", "config": INNER | {"name": name} | settings}


def model_of(*layers, name="m", kind="Functional"):
    return {"class_name": kind, "config": {"name": name, "layers": list(layers)}}


KERNEL, BIAS = oracle.normals(0, 3, 3, 3, 2), oracle.normals(1, 6)


def put(group, name, values, chunks=1):
    """An attribute as Keras writes a list: cut into numbered ones if it is long."""
    if chunks == 1:
        group.attrs[name] = values
    parts = np.array_split(np.array(values, object), chunks) if chunks > 1 else []
    for i, part in enumerate(parts):
        group.attrs[f"{name}{i}"] = part


def write_keras_2(path, config, weights, *, encode=str.encode, chunks=1, root=None):
    """`weights` is {top-level layer: {name of a weight: array}}."""
    with h5py.File(path, "w") as file:
        if config is not None:
            file.attrs["model_config"] = encode(json.dumps(config))
        file.attrs["keras_version"] = encode("2.15.0")
        group = file if config is None else file.create_group("model_weights")
        put(group, "layer_names", [encode(name) for name in weights], min(chunks, len(weights)))
        for layer, arrays in weights.items():
            inner = group.create_group(layer)
            put(inner, "weight_names", [encode(n) for n in arrays], chunks if arrays else 1)
            for name, array in arrays.items():
                inner[name] = array
    return path


def pair(prefix, kernel=KERNEL, bias=BIAS):
    return {f"{prefix}/depthwise_kernel:0": kernel, f"{prefix}/bias:0": bias}


@pytest.mark.parametrize("encode", [str.encode, str], ids=["bytes", "str"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_files_of_keras_2(tmp_path, encode, chunks):
    """Nested, wrapped, frozen; names that a rename left behind; other layers between."""
    other = {"class_name": "Conv2D", "config": {"name": "conv"}}
    timed = {"class_name": "TimeDistributed", "config": {"name": "td", "layer": depthwise("t")}}
    config = model_of(
        depthwise("b"),
        depthwise("a"),
        model_of(other, depthwise("x"), model_of(depthwise("x"), name="deep"), name="sub"),
        timed,
    )
    weights = {
        "a": pair("old_name", KERNEL + 1),
        "b": pair("b", KERNEL + 2),
        "input": {},
        "sub": {"conv/kernel:0": KERNEL, "conv/bias:0": BIAS}
        | pair("x", KERNEL + 3)
        | pair("deep/x", KERNEL + 4),
        "td": pair("td", KERNEL + 5),
    }
    path = write_keras_2(tmp_path / "m.h5", config, weights, encode=encode, chunks=chunks)
    loaded = keras_io.load(path)
    assert list(loaded) == ["b", "a", "sub/x", "sub/deep/x", "td/t"]
    for name, i in {"a": 1, "b": 2, "sub/x": 3, "sub/deep/x": 4, "td/t": 5}.items():
        layer, variables = loaded[name]
        assert layer.activation == "hard_sigmoid"  # of Keras 2
        np.testing.assert_array_equal(variables["params"]["kernel"], KERNEL + i)
        np.testing.assert_array_equal(variables["params"]["bias"], BIAS)
    x = oracle.normals(2, 1, 8, 8, 3)
    y = oracle.forward(x, KERNEL + 1, padding="same") + BIAS
    layer, variables = loaded["a"]
    np.testing.assert_allclose(layer.apply(variables, x), np.clip(0.2 * y + 0.5, 0, 1), atol=1e-5)


@pytest.mark.parametrize("as_layer", [True, False])
def test_old_weights_with_a_config(tmp_path, as_layer):
    path = write_keras_2(tmp_path / "weights.h5", None, {"dw": pair("dw")})
    config = INNER if as_layer else {"class_name": "Sequential", "config": [depthwise()]}
    ((name, (layer, variables)),) = keras_io.load(path, config=config).items()
    assert name == "dw" and layer.name == "dw"
    np.testing.assert_array_equal(variables["params"]["kernel"], KERNEL)
    with pytest.raises(ValueError, match="pass the model's as `config`"):
        keras_io.load(path)


def test_weights_of_another_dtype_are_cast_and_nan_stays(tmp_path):
    kernel = np.where(KERNEL > 1, np.nan, KERNEL).astype(">f8")
    config = model_of(depthwise(dtype="float16"))
    path = write_keras_2(tmp_path / "m.h5", config, {"dw": pair("dw", kernel)})
    params = keras_io.load(path)["dw"][1]["params"]
    assert params["kernel"].dtype == params["bias"].dtype == jnp.float16
    np.testing.assert_array_equal(params["kernel"], kernel.astype(np.float16))


def write_keras(path, config, weights, extra=(), metadata=None, compression=zipfile.ZIP_STORED):
    """A `.keras` file; `weights` is {path: array}, or bytes, or a function of the HDF5 file."""
    stream = io.BytesIO()
    if not isinstance(weights, bytes):
        with h5py.File(stream, "w") as file:
            for name, array in weights.items() if isinstance(weights, dict) else ():
                file[name] = array
            if callable(weights):
                weights(file)
        weights = stream.getvalue()
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("metadata.json", json.dumps(metadata or {"keras_version": "3.15.1"}))
        if config is not None:
            text = config if isinstance(config, str | bytes) else json.dumps(config)
            archive.writestr("config.json", text)
        archive.writestr("model.weights.h5", weights)
        for name in extra:
            archive.writestr(name, "x")
    return path


PATH = "layers/depthwise_conv2d/vars"
GOOD = {f"{PATH}/0": KERNEL, f"{PATH}/1": BIAS}


def test_a_custom_object_beside_the_layer_is_not_touched(tmp_path):
    evil = {"class_name": "__lambda__", "config": {"value": "gASVIAAAAAAAAACMBXBvc2l4lIwGc3lzdGVt"}}
    config = model_of(
        {"class_name": "Lambda", "module": "keras.layers", "config": {"function": evil}},
        {"class_name": "DepthwiseConv2D", "module": "mine", "config": {"anything": 1}},
        depthwise(),
    )
    weights = {name.replace("2d/", "2d_1/"): array for name, array in GOOD.items()}
    loaded = keras_io.load(write_keras(tmp_path / "m.keras", config, weights))
    assert list(loaded) == ["dw"]


def test_a_custom_object_with_the_name_of_a_keras_one(tmp_path):
    """Keras 3 writes no module for what a user registers, but the package."""
    custom = depthwise("own") | {"module": None, "registered_name": "pkg>DepthwiseConv2D"}
    weights = GOOD | {name.replace("2d/", "2d_1/"): array for name, array in GOOD.items()}
    path = write_keras(tmp_path / "m.keras", model_of(custom, depthwise()), weights)
    with pytest.warns(UserWarning, match="'own' is of the custom class 'DepthwiseConv2D'"):
        assert list(keras_io.load(path)) == ["dw"]
    with pytest.raises(ValueError, match="`config` must be of Keras's DepthwiseConv2D"):
        keras_io.from_config(custom)
    penalty = {"module": None, "class_name": "L2", "config": {}, "registered_name": "pkg>L2"}
    with pytest.raises(ValueError, match="`depthwise_regularizer` identifier: got 'pkg>L2', which"):
        DepthwiseConv2D(3, depthwise_regularizer=penalty)


def test_a_seed_generator(keras):
    """A generator draws first with its own seed."""
    theirs = keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(3))
    layer = keras.layers.DepthwiseConv2D(3, depthwise_initializer=theirs)
    layer.build((None, 8, 8, 4))
    ours, variables = keras_io.from_keras(layer)
    assert ours.depthwise_initializer == flax_dwconv.initializers.RandomNormal(seed=3)
    np.testing.assert_array_equal(variables["params"]["kernel"], layer.weights[0])
    if keras.backend.backend() == "jax":
        drawn = ours.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)))["params"]["kernel"]
        np.testing.assert_array_equal(drawn, layer.weights[0])


@pytest.mark.parametrize("form", ["to_json", "get_config"])
def test_weights_of_a_shared_layer_with_the_config_of_the_model(form, keras, tmp_path):
    """Which does not say that it is shared, unlike that in a file."""
    shared = keras.layers.DepthwiseConv2D(3, padding="same", name="dw")
    inner = keras.Sequential([keras.Input((8, 8, 3)), shared], name="inner")
    x = keras.Input((8, 8, 3))
    model = keras.Model(x, shared(inner(x)))
    model.save_weights(tmp_path / "m.weights.h5")
    loaded = keras_io.load(tmp_path / "m.weights.h5", config=getattr(model, form)())
    assert list(loaded) == ["inner/dw", "dw"]
    for _, variables in loaded.values():
        np.testing.assert_array_equal(variables["params"]["kernel"], shared.weights[0])


def test_boxed_parameters_go_to_keras(keras):
    names = (None, None, "channels", None)
    ones = nn.with_partitioning(nn.initializers.ones, names)
    variables = DepthwiseConv2D(3, depthwise_initializer=ones).init(
        jax.random.key(0), jnp.ones((1, 4, 4, 2))
    )
    theirs = keras_io.to_keras(DepthwiseConv2D(3), variables)
    np.testing.assert_array_equal(theirs.weights[0], np.ones((3, 3, 2, 1)))


def test_functions_of_keras_are_ours(keras):
    """They compute on its own backend."""
    layer = DepthwiseConv2D(3, activation=keras.activations.relu)
    assert layer == DepthwiseConv2D(3, activation="relu")
    assert flax_dwconv.activations.get(keras.activations.gelu) is flax_dwconv.activations.get(
        "gelu"
    )
    theirs = keras.activations.hard_sigmoid  # another function than Keras 2's, and ours
    assert flax_dwconv.activations.get(theirs) is theirs


def test_a_custom_wrapper_with_an_attribute_of_another_name(tmp_path):
    wrapper = {"class_name": "Mine", "module": "mine", "config": {"conv": depthwise("q")}}

    def write(file):
        for i, array in enumerate([KERNEL, BIAS]):
            file[f"layers/mine/inner/vars/{i}"] = array
            file[f"{PATH}/{i}"] = array + 1
        file["layers/mine/inner/vars"].attrs["name"] = "q"
        file[PATH].attrs["name"] = "dw"

    path = write_keras(tmp_path / "m.keras", model_of(wrapper, depthwise()), write)
    loaded = keras_io.load(path)
    assert list(loaded) == ["mine/q", "dw"]
    np.testing.assert_array_equal(loaded["mine/q"][1]["params"]["kernel"], KERNEL)


def test_the_version_of_a_file_decides_about_hard_sigmoid(tmp_path):
    old = {"keras_version": "2.12.0"}
    stored = {name.replace("layers", "_layer_checkpoint_dependencies"): GOOD[name] for name in GOOD}
    cases = [(None, GOOD, jax.nn.hard_sigmoid), (old, stored, "hard_sigmoid")]
    for version, weights, activation in cases:
        config = model_of(depthwise() | {"module": "keras.layers"})
        path = write_keras(tmp_path / "m.keras", config, weights, metadata=version)
        assert keras_io.load(path)["dw"][0].activation == activation


def link(kind):
    def write(file):
        file[f"{PATH}/1"] = BIAS
        file["elsewhere"] = KERNEL
        file[f"{PATH}/0"] = kind

    return write


def external(file):
    file[f"{PATH}/1"] = BIAS
    file.create_dataset(
        f"{PATH}/0", KERNEL.shape, np.float32, external=[("secret.bin", 0, KERNEL.nbytes)]
    )


def bomb(file):
    file[f"{PATH}/1"] = BIAS
    file.create_dataset(f"{PATH}/0", (3, 3, 10**9, 2), np.float32, chunks=(3, 3, 10, 2))


LAYER = r"layer 'dw': "
CUSTOM = {"module": "mine", "class_name": "F", "config": {}, "registered_name": "mine>F"}
DENSE = {"class_name": "Dense", "config": {"name": "d"}}
BAD = {
    "no config": (None, GOOD, {}, "the archive has no 'config.json'"),
    "no weights": (model_of(depthwise()), b"", {}, "file signature|h5py|HDF5|Unable"),
    "not json": ("{", GOOD, {}, "`config` must be valid JSON"),
    "deep json": ("[" * 10**6, GOOD, {}, "`config` must be valid JSON"),
    "a list": ("[]", GOOD, {}, "`config` must be a dict or JSON of one, got list"),
    "no layer": (model_of(DENSE), GOOD, {}, "it has no depthwise layer"),
    "climbing entry": (model_of(depthwise()), GOOD, {"extra": ["../evil"]}, "climbs out"),
    "absolute entry": (model_of(depthwise()), GOOD, {"extra": ["/evil"]}, "climbs out"),
    "absent weights": (model_of(depthwise(), depthwise("b")), GOOD, {}, "layer 'b': .*has no"),
    "two of a name": (model_of(depthwise(), depthwise()), GOOD, {}, "layer 'dw'"),
    "kernel": (model_of(depthwise(kernel_size=5)), GOOD, {}, LAYER + r"`kernel` must .*\(5, 5,"),
    "bias": (model_of(depthwise()), GOOD | {f"{PATH}/1": BIAS[:5]}, {}, LAYER + "`bias` must have"),
    "no bias": (model_of(depthwise()), {f"{PATH}/0": KERNEL}, {}, LAYER + ".*got 1 arrays"),
    "more": (model_of(depthwise()), GOOD | {f"{PATH}/2": BIAS}, {}, LAYER + ".*got 3 arrays"),
    "rank": (model_of(depthwise()), GOOD | {f"{PATH}/0": BIAS}, {}, LAYER + "`kernel` must have"),
    "group": (model_of(depthwise()), {f"{PATH}/0/x": BIAS}, {}, LAYER + ".*must be an array"),
    "integers": (
        model_of(depthwise()),
        GOOD | {f"{PATH}/0": np.ones((3, 3, 3, 2), np.int32)},
        {},
        LAYER + "`kernel` must be of a floating dtype, got int32",
    ),
    "channels": (
        model_of(depthwise() | {"build_config": {"input_shape": [None, 8, 8, 4]}}),
        GOOD,
        {},
        LAYER + r"`kernel` must have shape \(3, 3, 4, 2\), got \(3, 3, 3, 2\)",
    ),
    "custom": (model_of(depthwise(activation=CUSTOM)), GOOD, {}, LAYER + ".*custom object"),
    "soft link": (model_of(depthwise()), link(h5py.SoftLink("/elsewhere")), {}, "is a link"),
    "out link": (model_of(depthwise()), link(h5py.ExternalLink("o.h5", "x")), {}, "is a link"),
    "external": (model_of(depthwise()), external, {}, LAYER + ".*in the file itself"),
    "bomb": (model_of(depthwise()), bomb, {}, LAYER + ".*of almost nothing"),
    "zip bomb": (
        b" " * 10**8,
        GOOD,
        {"compression": zipfile.ZIP_DEFLATED},
        "'config.json' is 100000000 bytes packed in",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_archives(tmp_path, case):
    config, weights, settings, message = BAD[case]
    path = write_keras(tmp_path / "bad.keras", config, weights, **settings)
    with pytest.raises(ValueError, match=rf"`path` must be .*bad\.keras.*: .*{message}"):
        keras_io.load(path)
    assert [p.name for p in tmp_path.parent.glob("**/*evil*")] == []


@pytest.mark.parametrize("keep", [0, 1, 3, 50, 0.5, 0.9, -1])
@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_truncated_files(tmp_path, kind, keep):
    path = tmp_path / f"cut.{kind}"
    if kind == "keras":
        write_keras(path, model_of(depthwise()), GOOD)
    else:
        write_keras_2(path, model_of(depthwise()), {"dw": pair("dw")})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=rf"cut\.{kind}"):
        keras_io.load(path)


def test_damaged_weights_are_noticed(tmp_path):
    """The archive has checksums: a flipped bit is an error, not another kernel."""
    path = write_keras(tmp_path / "m.keras", model_of(depthwise()), GOOD)
    data = path.read_bytes()
    at = data.index(KERNEL.tobytes())
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match=r"m\.keras.*CRC"):
        keras_io.load(path)


def test_bad_old_files(tmp_path):
    good = {"dw": pair("dw")}
    for config, weights, message in [
        (model_of(depthwise()), {"other": pair("dw")}, "layer 'dw': .*has no 'dw'"),
        (model_of(depthwise()), {"dw": pair("dw", KERNEL[:2])}, "layer 'dw': `kernel` must have"),
        (model_of(depthwise()), {"dw": {}}, "layer 'dw': .*once, got 0"),
        (model_of(model_of(depthwise(), name="s")), {"s": pair("a") | pair("b")}, "'s/dw'.*got 0"),
        (model_of(), good, "it has no depthwise layer"),
    ]:
        path = write_keras_2(tmp_path / "bad.h5", config, weights)
        with pytest.raises(ValueError, match=rf"bad\.h5.*{message}"):
            keras_io.load(path)


def test_bad_paths(tmp_path):
    (tmp_path / "text.h5").write_text("not a model, but long enough to look at " * 9)
    with pytest.raises(ValueError, match=r"text\.h5"):
        keras_io.load(tmp_path / "text.h5")
    with pytest.raises(FileNotFoundError, match="absent"):
        keras_io.load(tmp_path / "absent.keras")
    with pytest.raises(OSError):
        keras_io.load(tmp_path)
    with pytest.raises(TypeError):
        keras_io.load(3)


@pytest.mark.parametrize(("module", "extra"), [("h5py", "h5"), ("keras", "keras")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, module, extra):
    path = write_keras(tmp_path / "m.keras", model_of(depthwise(activation="relu")), GOOD)
    layer, variables = keras_io.load(path)["dw"]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}: pip install 'flax_dwconv\[{extra}\]'"):
        if module == "h5py":
            keras_io.load(path)
        else:
            keras_io.to_keras(layer, variables)


def test_keras_without_its_backend(tmp_path, monkeypatch):
    (tmp_path / "keras.py").write_text("import a_backend")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    layer = DepthwiseConv2D(3)
    variables = layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 1)))
    message = "`keras_io` cannot import keras: No module named 'a_backend'. With KERAS_BACKEND=jax"
    with pytest.raises(ImportError, match=message):
        keras_io.to_keras(layer, variables)
