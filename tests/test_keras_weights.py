"""Every array of Keras's files, by name: of Keras 3, and rebuilt in the layout of Keras 2."""

import importlib
import io
import json
import pickle
import shutil
import tracemalloc
import warnings
import zipfile

import flax.linen as nn
import jax
import numpy as np
import oracle
import pytest
from flax import nnx

import flax_dwconv
from flax_dwconv import _keras_files, depthwise_conv1d, depthwise_conv2d, keras_io

h5py = pytest.importorskip("h5py")

# Keras reads its own variables so, and calls `.h5` a legacy format.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")


@pytest.fixture(autouse=True)
def strict_jax():
    """Keras promotes dtypes."""


# Models of Keras, and their files


def filled(model):
    """Gives every weight other values."""
    values = [oracle.normals(i, *w.shape).astype(w.dtype) for i, w in enumerate(model.weights)]
    for weight, value in zip(model.weights, values, strict=True):
        weight.assign(value)
    return model


def bare(config):
    """A config without what only Keras 3 writes."""
    if isinstance(config, dict):
        only = ("module", "registered_name", "build_config", "compile_config")
        if config.get("class_name") == "DTypePolicy":
            return config["config"]["name"]
        return {k: bare(v) for k, v in config.items() if k not in only}
    return [bare(v) for v in config] if isinstance(config, list) else config


def old_name(layer, weight):
    names = {"DepthwiseConv1D": "depthwise_kernel", "DepthwiseConv2D": "depthwise_kernel"}
    kind = type(layer).__name__
    return names.get(kind, weight.name) if weight.name == "kernel" else weight.name


def leaves(layer, names=()):
    """(the names that lead to it, layer) of every layer of Keras's that has variables itself."""
    inner = [
        *getattr(layer, "layers", []),
        *(
            getattr(layer, name)
            for name in ("layer", "forward_layer", "backward_layer", "cell")
            if hasattr(layer, name) and type(layer).__name__ not in ("LSTM", "GRU")
        ),
    ]
    own = [w for w in layer.weights if not any(w is v for i in inner for v in i.weights)]
    if own:
        yield names, layer, own
    for child in inner:
        yield from leaves(child, (*names, child.name))


def wanted(model):
    """{name: (class, {variable: array})}; a layer that is part of several models counts as each."""
    return {
        "/".join(names): (type(layer).__name__, {w.name: np.asarray(w) for w in weights})
        for names, layer, weights in leaves(model)
    }


def write_keras_2(path, model):
    """What `tf.keras` 2 wrote: every top-level layer with a list of the weights in it."""
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps(bare(json.loads(model.to_json()))).encode()
        file.attrs["keras_version"] = b"2.15.0"
        top = file.create_group("model_weights")
        top.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        for layer in model.layers:
            group = top.create_group(layer.name)
            arrays = {
                "/".join([*(names or (layer.name,)), f"{old_name(inner, weight)}:0"]): weight
                for names, inner, weights in leaves(layer)
                for weight in weights
            }
            # The trainable ones of all layers come first.
            order = sorted(arrays, key=lambda name: not arrays[name].trainable)
            group.attrs["weight_names"] = [name.encode() for name in order]
            for name in order:
                group[name] = np.asarray(arrays[name])
    return path


def check(found, expected):
    assert list(found) == list(expected)
    for name, (kind, arrays) in expected.items():
        assert found[name][0] == kind
        assert list(found[name][2]) == list(arrays), name
        for key, array in arrays.items():
            read = found[name][2][key]
            assert read.dtype == array.dtype and read.flags.c_contiguous and read.flags.owndata
            np.testing.assert_array_equal(read, array, err_msg=f"{name} {key}")


def save(model, path):
    with warnings.catch_warnings(action="ignore"):
        (model.save_weights if ".weights." in path.name else model.save)(path)
    return path


def check_all_files(model, folder):
    """Both dialects, and the layout of Keras 2."""
    expected = wanted(model)
    for name in ("m.keras", "m.h5"):
        check(keras_io.weights(save(model, folder / name)), expected)
    check(keras_io.weights(write_keras_2(folder / "old.h5", model)), expected)
    return expected


def branches(keras):
    """A model with one branch for each kind of input, and a layer of every class with weights."""
    layers = keras.layers

    def branch(shape, *made):
        x = keras.Input(shape)
        outputs = [layer(x) for layer in made]
        return x, outputs

    rate = dict(return_sequences=True)
    parts = [
        branch(
            (8, 4),
            layers.Conv1D(4, 3),
            layers.Conv1D(4, 3, groups=2, use_bias=False),
            layers.DepthwiseConv1D(3, depth_multiplier=2, name="dw1"),
            layers.SeparableConv1D(4, 3, depth_multiplier=2),
            layers.Conv1DTranspose(3, 2),
            layers.Dense(3),
            layers.EinsumDense("abc,cd->abd", output_shape=(None, 5), bias_axes="d"),
            layers.EinsumDense("abc,cd->abd", output_shape=(None, 5)),
            layers.LSTM(3),
            layers.GRU(3, use_bias=False),
            layers.Bidirectional(layers.LSTM(3, **rate, name="both")),
            layers.Bidirectional(
                layers.GRU(3, **rate),
                backward_layer=layers.LSTM(3, **rate, go_backwards=True, name="back"),
            ),
            layers.RNN(layers.GRUCell(3)),
            layers.TimeDistributed(layers.Dense(3, name="each")),
            layers.Dropout(0.5),
        ),
        branch(
            (8, 8, 3),
            layers.Conv2D(4, 3),
            layers.Conv2D(6, 3, groups=3, name="grouped"),
            layers.DepthwiseConv2D(3, name="dw2"),
            layers.SeparableConv2D(3, 2, use_bias=False),
            layers.Conv2DTranspose(3, 2),
            layers.BatchNormalization(),
            layers.BatchNormalization(scale=False, trainable=False),
            layers.LayerNormalization(),
            layers.GroupNormalization(3),
            layers.RMSNormalization(),
            layers.Normalization(),
            layers.PReLU(),
            layers.RandomFlip(),
        ),
        branch((4, 8, 8, 3), layers.Conv3D(2, 2), layers.TimeDistributed(layers.Conv2D(2, 3))),
        branch((5,), layers.Embedding(7, 3)),
    ]
    inputs = [x for x, _ in parts]
    return keras.Model(inputs, [y for _, ys in parts for y in ys], name="branches")


def test_every_class_of_layers(keras, tmp_path):
    model = filled(branches(keras))
    expected = check_all_files(model, tmp_path)
    assert len(expected) == 31
    path = save(model, tmp_path / "m.weights.h5")
    check(keras_io.weights(path, config=model.to_json()), expected)


def test_attention_is_one_layer_with_parts(keras, tmp_path):
    a, b = keras.Input((4, 8)), keras.Input((5, 8))
    multi = keras.layers.MultiHeadAttention(2, 3, name="multi")
    group = keras.layers.GroupQueryAttention(3, 4, 2, use_bias=False, name="group")
    model = filled(keras.Model([a, b], [multi(a, b), group(a, b)]))
    for name in ("m.keras", "m.h5", "nameless.keras"):
        path = save(model, tmp_path / name)
        if name.startswith("nameless"):
            nameless(path)
        found = keras_io.weights(path)
        for layer in (multi, group):
            paths = [w.path.partition("/")[2] for w in layer.weights]
            assert list(found[layer.name][2]) == paths
            for array, weight in zip(found[layer.name][2].values(), layer.weights, strict=True):
                np.testing.assert_array_equal(array, weight)


def nested(keras):
    """Nested models with layers of equal names, one of them shared, one model inside a wrapper."""
    layers = keras.layers
    shared = layers.DepthwiseConv2D(3, padding="same", name="shared")

    def block(name, *more):
        inside = [layers.Conv2D(3, 1, name="conv"), layers.BatchNormalization(name="bn")]
        return keras.Sequential([layers.Input((8, 8, 3)), *inside, *more], name=name)

    x = inputs = keras.Input((8, 8, 3))
    deep = keras.Sequential([layers.Input((8, 8, 3)), block("a"), block("b", shared)], name="deep")
    x = shared(deep(x))
    x = layers.Lambda(lambda t: t[:, None], output_shape=(1, 8, 8, 3))(x)
    x = layers.TimeDistributed(block("inside"), name="timed")(x)
    return filled(keras.Model(inputs, x))


def test_nested_models(keras, tmp_path):
    model = nested(keras)
    expected = wanted(model)
    assert list(expected) == [
        "deep/a/conv",
        "deep/a/bn",
        "deep/b/conv",
        "deep/b/bn",
        "deep/b/shared",
        "shared",
        "timed/inside/conv",
        "timed/inside/bn",
    ]
    check(keras_io.weights(save(model, tmp_path / "m.keras")), expected)
    check(keras_io.weights(write_keras_2(tmp_path / "old.h5", model)), expected)


SMALL = {"MobileNet": dict(alpha=0.25, input_shape=(32, 32, 3), classes=7)}
NETWORKS = dict.fromkeys(["MobileNetV2", "MobileNetV3Small"], pytest.mark.slow)
NETWORKS |= dict.fromkeys(  # 5 to 34 s each
    "ConvNeXtTiny EfficientNetB0 EfficientNetV2B0 MobileNetV3Large NASNetMobile Xception".split(),
    pytest.mark.nightly,
)


@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(name, marks=mark) for name, mark in NETWORKS.items())]
)
def test_networks(keras, tmp_path, name):
    network = getattr(keras.applications, name)(weights=None, **SMALL.get(name, {}))
    layers = {layer.name: layer for layer in network.layers}
    for layer in layers.values():  # Keras calls the variable "variable_7"
        if type(layer).__name__ == "LayerScale":
            layer.gamma._name = "gamma"
    filled(network)
    check_all_files(network, tmp_path)
    kinds = ("DepthwiseConv2D", "SeparableConv2D", "Conv2D")
    depthwise = {
        name: layer
        for name, layer in layers.items()
        if type(layer).__name__ in kinds
        and (type(layer).__name__ != "Conv2D" or layer.groups == layer.kernel.shape[-1] > 1)
    }
    for file in ("m.keras", "m.h5", "old.h5"):
        loaded = keras_io.load(tmp_path / file)
        assert list(loaded) == list(depthwise)
        for name, (_, variables) in loaded.items():
            params = variables["params"]
            for array, weight in zip(params.values(), depthwise[name].weights, strict=True):
                np.testing.assert_array_equal(np.ravel(array), np.ravel(weight))


# Layers that are depthwise under another name


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_convolutions_whose_groups_are_the_channels(keras, tmp_path, rank, data_format):
    """Group g reads channel g, and its filters are those of channel g in the same order."""
    layers = keras.layers
    first = data_format == "channels_first"
    conv = layers.Conv1D if rank == 1 else layers.Conv2D
    shape = (3, *(9, 8)[:rank]) if first else (*(9, 8)[:rank], 3)
    settings = dict(padding="same", data_format=data_format, activation="relu")
    grouped = conv(6, 3, groups=3, strides=2, name="grouped", **settings)
    model = keras.Sequential(
        [layers.Input(shape), grouped, conv(6, 3, groups=2, name="wider", **settings)]
    )
    x = oracle.normals(99, 2, *shape)
    y = np.asarray(grouped(x))
    for ours, variables in [
        keras_io.load(save(filled(model), tmp_path / "m.keras"))["grouped"],
        keras_io.from_keras(grouped),
    ]:
        y = np.asarray(grouped(x))
        assert ours.depth_multiplier == 2 and ours.name == "grouped"
        np.testing.assert_allclose(ours.apply(variables, x), y, 1e-5, 1e-5)
    assert list(keras_io.load(tmp_path / "m.keras")) == ["grouped"]


def test_what_is_passed_over_is_counted(keras, tmp_path):
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(4, 3),  # one group, one channel: nobody calls that depthwise
            layers.Conv2D(4, 3, groups=2),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    path = save(model, tmp_path / "m.keras")
    counted = "it has no depthwise layer, but 1 InputLayer, 2 Conv2D, 1 Flatten, 1 Dense."
    with pytest.raises(ValueError, match=counted):
        keras_io.load(path)


STRIDED = {
    "DepthwiseConv2D": lambda layers, **s: layers.DepthwiseConv2D(3, depth_multiplier=2, **s),
    "DepthwiseConv1D": lambda layers, **s: layers.DepthwiseConv1D(3, **s),
    "SeparableConv2D": lambda layers, **s: layers.SeparableConv2D(5, 3, **s),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_the_error_about_strides_and_dilation_has_the_lines(keras, tmp_path, kind):
    settings = dict(strides=2, dilation_rate=2, padding="same", use_bias=False, name="both")
    layer = STRIDED[kind](keras.layers, **settings)
    shape = (9, 3) if kind.endswith("1D") else (9, 9, 3)
    with warnings.catch_warnings(action="ignore"):
        model = filled(keras.Sequential([keras.layers.Input(shape), layer]))
    path = save(model, tmp_path / "m.keras")
    with pytest.raises(ValueError, match="layer 'both': `strides > 1` not supported") as caught:
        keras_io.load(path)
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    x = oracle.normals(99, 2, *shape)
    scope = dict(
        keras_io=keras_io,
        path=path,
        x=x,
        depthwise_conv1d=depthwise_conv1d,
        depthwise_conv2d=depthwise_conv2d,
    )
    exec("\n".join(lines), scope)
    y = scope["y"]
    if kind == "SeparableConv2D":
        y = y @ scope["arrays"]["pointwise_kernel"][0, 0]
    np.testing.assert_allclose(y, layer(x), 1e-5, 1e-5)


# Containers


def two_layers(keras):
    layers = keras.layers
    model = [layers.Input((8, 8, 3)), layers.DepthwiseConv2D(3, name="dw"), layers.Dense(4)]
    return filled(keras.Sequential(model, name="m"))


def shards(keras, folder):
    """Weights in two files and more, and their index."""
    model = two_layers(keras)
    path = folder / "m.weights.json"
    model.save_weights(path, max_shard_size=1.3e-7)  # GB
    assert len(list(folder.glob("*.h5"))) > 1
    return model, path


def test_sharded_weights(keras, tmp_path):
    model, path = shards(keras, tmp_path)
    check(keras_io.weights(path, config=model.to_json()), wanted(model))
    assert list(keras_io.load(path, config=model.to_json())) == ["dw"]
    with pytest.raises(ValueError, match=r"m\.weights\.json.*pass the model's as `config`"):
        keras_io.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"/layers/dense/vars": "../elsewhere.h5"}, "beside the index, got '../"),
        ({"/layers/dense/vars": "/elsewhere.h5"}, "beside the index, got '/else"),
        ({"/layers/dense/vars": "..\\elsewhere.h5"}, "beside the index, got '..."),
        ({"/layers/dense/vars": ".."}, "the shard '..' is missing"),
        ({"/layers/dense/vars": 3}, "beside the index, got 3"),
        ({"/layers/dense/vars": "absent.h5"}, "the shard 'absent.h5' is missing"),
        ({"/layers/other/vars": "m_00000.weights.h5"}, "the shards have no '/layers/other"),
        (None, "layer 'dw': the file has no weights"),
    ],
)
def test_bad_indices(keras, tmp_path, change, message):
    """Parts lie beside their index, and nowhere else: nothing outside is opened."""
    folder = tmp_path / "in"
    folder.mkdir()
    model, path = shards(keras, folder)
    shutil.copy(next(folder.glob("*.h5")), tmp_path / "elsewhere.h5")
    index = json.loads(path.read_text())
    index["weight_map"] = {} if change is None else index["weight_map"] | change
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"m\.weights\.json.*{message}"):
        keras_io.weights(path, config=model.to_json())


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"weight_map": 3}'])
def test_no_index(tmp_path, text):
    path = tmp_path / "m.weights.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"m\.weights\.json"):
        keras_io.weights(path, config={"class_name": "Functional", "config": {"layers": []}})


def test_directories(keras, tmp_path):
    model = two_layers(keras)
    keras.saving.save_model(model, tmp_path / "m", zipped=False)
    check(keras_io.weights(tmp_path / "m"), wanted(model))
    assert list(keras_io.load(tmp_path / "m")) == ["dw"]
    (tmp_path / "m" / "model.weights.h5").unlink()
    with pytest.raises(ValueError, match="the directory has no 'model.weights.h5'"):
        keras_io.load(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="no model of Keras"):
        keras_io.load(tmp_path)


def as_npz(keras, model, path):
    """The `.keras` file whose weights NumPy stored."""
    saving = importlib.import_module("keras.src.saving.saving_lib")
    with warnings.catch_warnings(action="ignore"):
        saving.save_model(model, path, weights_format="npz")
    return path


def test_npz(keras, tmp_path):
    model = two_layers(keras)
    path = as_npz(keras, model, tmp_path / "m.keras")
    with zipfile.ZipFile(path) as archive:
        assert "model.weights.npz" in archive.namelist()
    check(keras_io.weights(path), wanted(model))


def with_npz(path, contents):
    """Replaces the weights of a `.keras` file by `numpy.savez(**contents)`."""
    with zipfile.ZipFile(path) as archive:
        entries = {n: archive.read(n) for n in archive.namelist() if not n.endswith(".npz")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        with archive.open("model.weights.npz", "w") as file:
            np.savez(file, **contents)
    return path


class Marked:
    """What pickle would call a function for."""

    called = False

    @staticmethod
    def mark(*args):
        Marked.called = True
        return np.zeros(3)

    def __reduce__(self):
        return Marked.mark, ()


def test_pickles_are_not_executed(keras, tmp_path):
    model = two_layers(keras)
    path = as_npz(keras, model, tmp_path / "m.keras")
    dense = {"0": np.asarray(model.layers[1].kernel), "1": np.asarray(model.layers[1].bias)}
    arrays = {"layers/dense": dense, "layers/depthwise_conv2d": {"0": Marked(), "1": np.ones(3)}}
    assert pickle.loads(pickle.dumps(Marked())).shape == (3,) and Marked.called
    Marked.called = False
    with pytest.raises(ValueError, match="layer 'dw': .*array of NumPy or JAX, got .*mark"):
        keras_io.weights(with_npz(path, arrays))
    assert not Marked.called
    for contents in ({"layers/dense": np.zeros(3)}, {"layers/dense": np.array([{}, {}])}):
        with pytest.raises(ValueError, match=r"m\.keras.*must hold the variables of a layer"):
            keras_io.weights(with_npz(path, contents))


def nameless(path):
    """Removes the names of layers beside their arrays, which Keras did not write at first."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    stream = io.BytesIO(entries["model.weights.h5"])
    with h5py.File(stream, "r+") as file:
        named = []
        file.visititems(lambda name, found: named.append(found) if "name" in found.attrs else None)
        assert named
        for group in named:
            del group.attrs["name"]
    entries["model.weights.h5"] = stream.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def test_lists_in_lists(keras, tmp_path):
    """Keras counts the lists in a list as "container", "container_1"."""

    @keras.saving.register_keras_serializable("mine")
    class Blocks(keras.layers.Layer):
        def __init__(self, blocks, **kwargs):
            super().__init__(**kwargs)
            self.blocks = [
                [keras.saving.deserialize_keras_object(b) if isinstance(b, dict) else b for b in bs]
                for bs in blocks
            ]

        def build(self, shape):
            for layer in (layer for block in self.blocks for layer in block):
                layer.build(shape)

        def call(self, x):
            for layer in (layer for block in self.blocks for layer in block):
                x = layer(x)
            return x

        def get_config(self):
            serialize = keras.saving.serialize_keras_object
            return super().get_config() | {
                "blocks": [[serialize(x) for x in b] for b in self.blocks]
            }

    def depthwise(name):
        return keras.layers.DepthwiseConv2D(3, padding="same", name=name)

    blocks = Blocks([[depthwise("a"), depthwise("b")], [depthwise("c")]], name="blocks")
    model = filled(keras.Sequential([keras.layers.Input((8, 8, 3)), blocks]))
    path = save(model, tmp_path / "m.keras")
    nameless(path)
    loaded = keras_io.load(path)
    assert list(loaded) == ["blocks/a", "blocks/b", "blocks/c"]
    for (_, variables), layer in zip(loaded.values(), sum(blocks.blocks, []), strict=True):
        np.testing.assert_array_equal(variables["params"]["kernel"], layer.kernel)


def test_a_subclassed_model_has_no_structure(keras, tmp_path):
    """Its arrays are there, under the paths that the file has; its layers are not."""

    @keras.saving.register_keras_serializable("mine")
    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.first, self.last = keras.layers.DepthwiseConv2D(3), keras.layers.Dense(2)

        def call(self, x):
            return self.last(self.first(x))

    model = Net(name="net")
    model(np.ones((1, 8, 8, 3), np.float32))
    filled(model).compile("adam", "mse")
    path = save(model, tmp_path / "m.keras")
    with pytest.raises(ValueError, match="it has no depthwise layer, but 1 Net"):
        keras_io.load(path)
    ((name, (kind, _, arrays)),) = keras_io.weights(path).items()
    assert (name, kind) == ("net", "Net") and len(arrays) == 4
    for layer in (model.first, model.last):
        for i, weight in enumerate(layer.weights):
            np.testing.assert_array_equal(arrays[f"{layer.name}/{i}"], weight)


def test_state_is_no_weight(keras, tmp_path):
    """Of an optimizer, of metrics, of generators of random numbers."""
    layers = keras.layers
    model = [layers.Input((8, 8, 3)), layers.RandomFlip(), layers.Dropout(0.5)]
    model += [layers.DepthwiseConv2D(3), layers.GaussianNoise(0.1), layers.Flatten()]
    model = keras.Sequential([*model, layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    model.fit(np.ones((4, 8, 8, 3)), np.ones((4, 1)), verbose=0)
    for name in ("m.keras", "m.h5", "nameless.keras"):
        path = save(model, tmp_path / name)
        if name.startswith("nameless"):
            nameless(path)
        found = keras_io.weights(path)
        check(found, wanted(model))
        assert len(found) == 2


def test_seeds_as_older_versions_stored_them(tmp_path):
    layers = [
        {"class_name": "RandomFlip", "module": "keras.layers", "config": {"name": "flip"}},
        {"class_name": "Dropout", "config": {"name": "dropout", "rate": 0.5}},
        # A custom class may call a layer so: that of a GAN, for instance.
        {"class_name": "Gan", "module": "mine", "config": {"name": "gan"}},
    ]
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        for at in ("random_flip/generator", "dropout/seed_generator", "gan/generator"):
            file[f"layers/{at}/vars/0"] = np.ones(2, np.uint32)
    found = keras_io.weights(tmp_path / "m.weights.h5", config=old_model("m", *layers))
    assert {name: list(arrays) for name, (_, _, arrays) in found.items()} == {
        "gan": ["generator/0"]
    }


def test_a_model_without_weights(keras, tmp_path):
    model = keras.Sequential([keras.layers.Input((8, 8, 3)), keras.layers.Flatten()])
    for name in ("m.keras", "m.h5"):
        assert keras_io.weights(save(model, tmp_path / name)) == {}


def test_what_is_missing_or_too_much(keras, tmp_path):
    model = two_layers(keras)
    path = save(model, tmp_path / "m.weights.h5")
    config = json.loads(model.to_json())
    for key, value, message in [
        ("use_bias", False, "the weights must be \\['kernel'\\], got 2 arrays"),
        ("name", "dw", "must be unique"),
    ]:
        edited = json.loads(json.dumps(config))
        edited["config"]["layers"][2]["config"][key] = value
        with pytest.raises(ValueError, match=rf"m\.weights\.h5.*layer '.*': .*{message}"):
            keras_io.weights(path, config=edited)
    more = json.loads(json.dumps(config))
    more["config"]["layers"].append(more["config"]["layers"][2])
    more["config"]["layers"][-1] = {
        **more["config"]["layers"][2],
        "config": {"name": "d", "units": 1},
    }
    with pytest.raises(ValueError, match=r"layer 'd': the file has no weights at 'layers/dense_1'"):
        keras_io.weights(path, config=more)


# Arrays as HDF5 can store them

DENSE = {"class_name": "Dense", "config": {"name": "d", "units": 2, "use_bias": False}}
DTYPES = ["<f4", ">f4", "f8", "f2", "bfloat16", "i8", "u1", "?", "c8"]


def written(path, write, **settings):
    with h5py.File(path, "w", **settings) as file:
        write(file, "layers/dense/vars/0")
    return keras_io.weights(path, config=DENSE)["d"][2]["kernel"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, dict(chunks=(2, 2), compression="gzip", shuffle=True)])
def test_dtypes_and_layouts(tmp_path, dtype, settings):
    values = oracle.integers(0, 5, 2).astype(jax.numpy.dtype(dtype))

    def write(file, name):
        file.create_dataset(name, data=values, **settings).attrs["dtype"] = dtype

    kernel = written(tmp_path / "m.h5", write)
    assert kernel.dtype == values.dtype.newbyteorder("=")
    np.testing.assert_array_equal(kernel, values)


def test_an_offset_into_the_file_counts_from_its_user_block(tmp_path):
    values = oracle.normals(0, 5, 2)
    kernel = written(tmp_path / "m.h5", lambda f, n: f.update({n: values}), userblock_size=512)
    np.testing.assert_array_equal(kernel, values)


def test_numbers_of_another_format(tmp_path):
    """HDF5 converts floats whose exponents are stored otherwise, which have no dtype of NumPy's."""
    values = oracle.integers(0, 5, 2)

    def write(file, name):
        kind, space = h5py.h5t.IEEE_F32LE.copy(), h5py.h5s.create_simple(values.shape)
        kind.set_ebias(100)
        group = file.require_group("layers/dense/vars")
        stored = h5py.h5d.create(group.id, b"0", kind, space)
        stored.write(h5py.h5s.ALL, h5py.h5s.ALL, values)

    np.testing.assert_array_equal(written(tmp_path / "m.h5", write), values)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (h5py.Empty("f4"), "must be an array in the file itself"),
        ("text", "must be an array of numbers"),
        (np.zeros(3, [("a", "f4"), ("b", "f4")]), "must be an array of numbers"),
        (np.zeros(3, "V4"), "must be of the dtype bfloat16, got"),
    ],
)
def test_no_arrays_of_numbers(tmp_path, value, message):
    with pytest.raises(ValueError, match=rf"m\.h5.*layer 'd': 'layers/dense/vars/0' {message}"):
        written(tmp_path / "m.h5", lambda f, n: f.update({n: value}))


def test_nothing_is_held_twice(tmp_path):
    """An archive's own reader would hold the whole file beside the arrays."""
    values = oracle.normals(0, 1 << 20, 2)
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["layers/dense/vars/0"] = values
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(old_model("m", DENSE)))
        archive.write(tmp_path / "m.h5", "model.weights.h5")
    for name, config in [("m.keras", None), ("m.h5", DENSE)]:
        tracemalloc.start()
        kernel = keras_io.weights(tmp_path / name, config=config)["d"][2]["kernel"]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # What a checksum is computed of at once is part of it.
        assert peak - _keras_files._CHUNK < 1.1 * kernel.nbytes
        np.testing.assert_array_equal(kernel, values)


# Names with a slash, in files of Keras 2


def old_depthwise(name):
    return {"class_name": "DepthwiseConv2D", "config": {"name": name, "kernel_size": [3, 3]}}


def old_model(name, *layers):
    return {"class_name": "Functional", "config": {"name": name, "layers": list(layers)}}


SLASHES = {
    "top": (
        [old_depthwise("expanded_conv/depthwise"), old_depthwise("expanded_conv_1/depthwise")],
        {
            "expanded_conv/depthwise": ["expanded_conv/depthwise"],
            "expanded_conv_1/depthwise": ["expanded_conv_1/depthwise"],
        },
        ["expanded_conv/depthwise", "expanded_conv_1/depthwise"],
    ),
    "prefix of another": (
        [old_depthwise("a"), old_depthwise("a/b"), old_depthwise("a/b/c")],
        {"a": ["a"], "a/b": ["a/b"], "a/b/c": ["a/b/c"]},
        ["a", "a/b", "a/b/c"],
    ),
    "nested": (
        [
            old_model(
                "net", old_depthwise("expanded_conv/depthwise"), old_depthwise("e_1/depthwise")
            )
        ],
        {"net": ["expanded_conv/depthwise", "e_1/depthwise"]},
        ["net/expanded_conv/depthwise", "net/e_1/depthwise"],
    ),
    "nested with the model's name": (
        [old_model("net", old_depthwise("a/dw"), old_depthwise("b/dw"))],
        {"net": ["net/a/dw", "net/b/dw"]},
        ["net/a/dw", "net/b/dw"],
    ),
    "deep": (
        [
            old_model(
                "x/net",
                old_model("in/1", old_depthwise("a/dw")),
                old_model("in/2", old_depthwise("a/dw")),
            )
        ],
        {"x/net": ["in/1/a/dw", "in/2/a/dw"]},
        ["x/net/in/1/a/dw", "x/net/in/2/a/dw"],
    ),
    "wrapped": (
        [
            {
                "class_name": "TimeDistributed",
                "config": {"name": "t/d", "layer": old_depthwise("a/dw")},
            }
        ],
        {"t/d": ["t/d"]},
        ["t/d/a/dw"],
    ),
    "empty parts": (
        [old_depthwise("a//dw"), old_depthwise("a/./b")],
        {"a//dw": ["a//dw"], "a/./b": ["a/./b"]},
        ["a//dw", "a/./b"],
    ),
}


@pytest.mark.parametrize("case", SLASHES)
def test_names_with_a_slash(tmp_path, case):
    layers, stored, names = SLASHES[case]
    kernels = [oracle.normals(i, 3, 3, 2, 1) for i in range(len(names))]
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file.attrs["model_config"] = json.dumps(old_model("m", *layers))
        top = file.create_group("model_weights")
        top.attrs["layer_names"] = [name.encode() for name in stored]
        left = iter(kernels)
        for name, prefixes in stored.items():
            group = top.require_group(name)
            group.attrs["weight_names"] = [
                f"{prefix}/{word}:0".encode()
                for prefix in prefixes
                for word in ("depthwise_kernel", "bias")
            ]
            for prefix in prefixes:
                group[f"{prefix}/depthwise_kernel:0"] = next(left)
                group[f"{prefix}/bias:0"] = np.ones(2, np.float32)
    loaded = keras_io.load(tmp_path / "m.h5")
    assert list(loaded) == names
    for (_, variables), kernel in zip(loaded.values(), kernels, strict=True):
        np.testing.assert_array_equal(variables["params"]["kernel"], kernel)


# A loaded layer inside a model


def loaded_layer(tmp_path):
    kernel = oracle.normals(0, 3, 3, 4, 1)
    config = old_depthwise("conv_dw_1")
    config["config"] |= {"use_bias": False, "padding": "same", "depthwise_regularizer": "l2"}
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file["layers/depthwise_conv2d/vars/0"] = kernel
    return keras_io.load(tmp_path / "m.weights.h5", config=config)["conv_dw_1"]


def test_every_step_of_a_loaded_layer_inside_a_model(tmp_path):
    layer, variables = loaded_layer(tmp_path)
    x = oracle.normals(1, 2, 8, 8, 4)
    y = layer.apply(variables, x)

    class Compact(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(layer.copy(name="dw")(x))

    class Setup(nn.Module):
        def setup(self):
            self.dw = layer

        def __call__(self, x):
            return nn.relu(self.dw(x))

    class Field(nn.Module):
        dw: nn.Module

        def __call__(self, x):
            return nn.relu(self.dw(x))

    for model in (Compact(), Setup(), Field(layer)):
        params = model.init(jax.random.key(0), x)["params"]
        params |= {"dw": variables["params"]}
        np.testing.assert_array_equal(model.apply({"params": params}, x), nn.relu(y))
    bound = layer.bind(variables)
    np.testing.assert_array_equal(bound(x), y)

    twin = flax_dwconv.nnx.DepthwiseConv2D.from_config(
        layer.get_config(), in_features=4, rngs=nnx.Rngs(0)
    )
    twin.kernel[...] = variables["params"]["kernel"]
    np.testing.assert_array_equal(twin(x), y)


def test_a_layer_that_belongs_to_no_model_says_how_to_call_it(tmp_path):
    layer, _ = loaded_layer(tmp_path)
    x = oracle.normals(1, 2, 8, 8, 4)

    class Subclass(flax_dwconv.DepthwiseConv2D):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x)

    class Model(nn.Module):
        make: object

        @nn.compact
        def __call__(self, x):
            return self.make()(x)

    for made in (layer, layer.clone(name="conv_dw_1"), Subclass(3, name="conv_dw_1")):
        for call in (made, lambda x, made=made: Model(lambda: made).init(jax.random.key(0), x)):
            with pytest.raises(Exception, match="Can't call compact methods on unbound") as caught:
                call(x)
            assert str(caught.value).count("`layer.copy(name='conv_dw_1')(x)` makes the lay") == 1
            assert "`layer.apply(variables, x)`" in str(caught.value)
    made = Model(lambda: layer.copy(name="conv_dw_1")).init(jax.random.key(0), x)
    assert list(made["params"]) == ["conv_dw_1"]
