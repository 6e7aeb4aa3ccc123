"""Objects of a user's own in Keras's configs and files: what they change, and what they do not."""

import io
import json
import re
import types
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import flax_dwconv
from flax_dwconv import DepthwiseConv2D, keras_io

h5py = pytest.importorskip("h5py")

KERNEL, BIAS = oracle.normals(0, 3, 3, 2, 1), oracle.normals(1, 2)


def config(name="dw", kind="DepthwiseConv2D", **settings):
    return {"class_name": kind, "config": {"name": name, "kernel_size": [3, 3]} | settings}


def write(path, *layers, paths=("depthwise_conv2d",)):
    """A `.keras` file of Keras 3 with one kernel and one bias at each path."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for at in paths:
            file[f"layers/{at}/vars/0"], file[f"layers/{at}/vars/1"] = KERNEL, BIAS
    with zipfile.ZipFile(path, "w") as archive:
        model = {"class_name": "Functional", "config": {"name": "m", "layers": list(layers)}}
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1"}))
        archive.writestr("config.json", json.dumps(model))
        archive.writestr("model.weights.h5", stream.getvalue())
    return path


class Scale:
    """An object of a user's own, of any kind."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, *args):
        return jnp.float32(self.factor)


FOREIGN = {
    "of Keras 2": {"class_name": "EfficientConv2DKernelInitializer", "config": {"scale": 2.0}},
    "of a module": {"module": "mine", "class_name": "Scale", "config": {}, "registered_name": None},
    "registered": {
        "module": None,
        "class_name": "L2",  # as Keras's
        "config": {"l2": 0.1},
        "registered_name": "mine>L2",
    },
    "a function": {
        "module": "builtins",
        "class_name": "function",
        "config": "decayed",
        "registered_name": "function",
    },
    "a name": "decayed_by_a_schedule",
}
WORDS = {
    "of Keras 2": "EfficientConv2DKernelInitializer",
    "of a module": "Scale",
    "registered": "L2",
    "a function": "decayed",
    "a name": "decayed_by_a_schedule",
}
ARGUMENTS = ["depthwise_initializer", "bias_regularizer", "depthwise_constraint"]


def ways(tmp_path):
    """from_config in all places, from_keras and load: functions of a config and custom_objects."""

    def live(whole, custom_objects):
        layer = types.SimpleNamespace(get_config=lambda: whole["config"], weights=[KERNEL, BIAS])
        return keras_io.from_keras(layer, custom_objects=custom_objects)[0]

    def loaded(whole, custom_objects):
        path = write(tmp_path / "m.keras", whole)
        return keras_io.load(path, custom_objects=custom_objects)["dw"][0]

    def of_nnx(whole, custom_objects):
        return flax_dwconv.nnx.DepthwiseConv2D.from_config(
            whole, in_features=2, rngs=nnx.Rngs(0), custom_objects=custom_objects
        )

    return {
        "linen": lambda c, o: DepthwiseConv2D.from_config(c, custom_objects=o),
        "nnx": of_nnx,
        "keras_io": lambda c, o: keras_io.from_config(c, custom_objects=o),
        "from_keras": live,
        "load": loaded,
    }


WAYS = ["linen", "nnx", "keras_io", "from_keras", "load"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_cannot_change_a_trained_layer_is_read_as_none(tmp_path, way, kind, argument):
    read = ways(tmp_path)[way]
    whole, word = config(**{argument: FOREIGN[kind]}), WORDS[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer = read(whole, None)
    (warning,) = caught
    assert issubclass(warning.category, UserWarning) and warning.filename == __file__
    assert re.search(f"Read as None.*`{argument}` '{word}' of 'dw'", str(warning.message))
    assert getattr(layer, argument) == getattr(DepthwiseConv2D(3), argument)

    theirs = Scale(3.0)
    assert getattr(read(whole, {word: theirs}), argument) is theirs
    assert getattr(read(whole, {word: None}), argument) == getattr(DepthwiseConv2D(3), argument)


def test_one_warning_for_a_file(tmp_path):
    foreign = {
        "depthwise_initializer": FOREIGN["of Keras 2"],
        "depthwise_regularizer": FOREIGN["registered"],
    }
    paths = ["depthwise_conv2d", *(f"depthwise_conv2d_{i}" for i in range(1, 5))]
    path = write(
        tmp_path / "m.keras", *(config(f"dw{i}", **foreign) for i in range(5)), paths=paths
    )
    with pytest.warns(UserWarning) as caught:
        assert len(keras_io.load(path)) == 5
    (warning,) = caught
    message = str(warning.message)
    assert (
        "'EfficientConv2DKernelInitializer' of 'dw0', 'dw1', 'dw2' and 2 other layers; " in message
    )
    assert "`depthwise_regularizer` 'L2' of 'dw0'" in message


@pytest.mark.parametrize("key", ["L2", "mine>L2"])
def test_a_class_is_made_as_keras_makes_it(key):
    class Own:
        def __init__(self, l2):
            self.l2 = l2

        def __call__(self, x):
            return self.l2 * jnp.sum(x)

    class OwnWithConfig(Own):
        @classmethod
        def from_config(cls, config):
            return cls(2 * config["l2"])

    whole = config(depthwise_regularizer=FOREIGN["registered"])
    layer = keras_io.from_config(whole, custom_objects={key: Own})
    assert layer.depthwise_regularizer.l2 == 0.1
    layer = keras_io.from_config(whole, custom_objects={key: OwnWithConfig})
    assert layer.depthwise_regularizer.l2 == 0.2


ACTIVATIONS = {
    "a name": "my_swish",
    "a function": {
        "module": "mine.layers",
        "class_name": "function",
        "config": "my_swish",
        "registered_name": "mine>my_swish",
    },
    "quantization-aware": {
        "class_name": "my_swish",
        "config": {"activation": "relu", "quantizer": {"class_name": "MovingAverageQuantizer"}},
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_a_custom_activation_has_to_be_there(tmp_path, way, kind):
    read = ways(tmp_path)[way]
    whole = config(activation=ACTIVATIONS[kind])
    with pytest.raises(ValueError, match="`custom_objects={'my_swish': ...}` says what"):
        read(whole, None)
    with pytest.raises(ValueError, match="`custom_objects={'my_swish': ...}` says what"):
        read(whole, {"other": jnp.tanh})
    theirs = Scale()
    assert read(whole, {"my_swish": theirs}).activation is theirs
    assert read(whole, {"my_swish": "relu6"}).activation == "relu6"
    assert read(whole, {"my_swish": None}).activation == read(config(), None).activation


def test_what_resembles_one_of_keras_is_a_slip_where_people_write():
    settings = {"kernel_size": 3, "depthwise_initializer": "glorot_unifrom"}
    with pytest.raises(ValueError, match="got 'glorot_unifrom', did you mean 'glorot_uniform'"):
        DepthwiseConv2D.from_config(settings)
    # Keras's own `get_config` always has this key.
    with pytest.warns(UserWarning, match="'glorot_unifrom' of the layer"):
        DepthwiseConv2D.from_config(settings | {"trainable": True})


def test_a_policy_map(keras):
    """Its default counts, whatever it says for other layers."""
    maps = keras.dtype_policies
    for default, dtype in [("mixed_bfloat16", "bfloat16"), (None, None), ("float32", None)]:
        for make in (lambda name: name, maps.DTypePolicy if default else lambda name: None):
            policy = maps.DTypePolicyMap(make(default), {"other": maps.DTypePolicy("float16")})
            theirs = keras.layers.DepthwiseConv2D(3, dtype=policy)
            written = json.loads(json.dumps(keras.saving.serialize_keras_object(theirs)))
            layer = keras_io.from_config(written)
            assert layer.dtype == (dtype and jnp.dtype(dtype))
            assert layer.param_dtype == jnp.float32
    with pytest.raises(ValueError, match="`dtype` must be a dtype or a policy with a name"):
        keras_io.from_config(config(dtype={"class_name": "DTypePolicyMap", "config": 3}))


# Subclasses of the layers


def registered(name="own"):
    """A layer of the kind that people write to drop `groups`, as it is in a file."""
    whole = config(name, kind="FixedDepthwiseConv2D", depth_multiplier=1, use_bias=True)
    whole["config"]["groups"] = 1
    return whole | {"module": "mine", "registered_name": "mine>FixedDepthwiseConv2D"}


class FixedDepthwiseConv2D(DepthwiseConv2D):
    pass


@pytest.mark.parametrize("key", ["FixedDepthwiseConv2D", "mine>FixedDepthwiseConv2D"])
@pytest.mark.parametrize("cls", [DepthwiseConv2D, FixedDepthwiseConv2D])
def test_a_registered_subclass(tmp_path, key, cls):
    paths = ["fixed_depthwise_conv2d"]
    path = write(tmp_path / "m.keras", registered(), paths=paths)
    offer = "'own' is of the custom class 'FixedDepthwiseConv2D': `custom_objects={'FixedDepth"
    with pytest.raises(ValueError, match=f"no depthwise layer, but .*{offer}"):
        keras_io.load(path)
    ((name, (layer, variables)),) = keras_io.load(path, custom_objects={key: cls}).items()
    assert name == "own" and type(layer) is cls
    np.testing.assert_array_equal(variables["params"]["kernel"], KERNEL)
    for read in (keras_io.from_config, cls.from_config):
        assert read(registered(), custom_objects={key: cls}) == layer
    with pytest.raises(ValueError, match="must be of Keras's DepthwiseConv2D.*`custom_objects={'F"):
        keras_io.from_config(registered())

    path = write(tmp_path / "two.keras", registered(), config(), paths=[*paths, "depthwise_conv2d"])
    with pytest.warns(UserWarning, match=f"two.keras': layer {offer}") as caught:
        assert list(keras_io.load(path)) == ["dw"]
    assert len(caught) == 1
    assert list(keras_io.load(path, custom_objects={key: None})) == ["dw"]
    assert list(keras_io.load(path, custom_objects={key: cls})) == ["own", "dw"]


def test_a_subclass_in_a_file_of_keras_2(tmp_path):
    """There, a custom class has no module, and no other name."""
    whole = {key: registered()[key] for key in ("class_name", "config")}
    with h5py.File(tmp_path / "m.h5", "w") as file:
        model = {"class_name": "Functional", "config": {"name": "m", "layers": [whole]}}
        file.attrs["model_config"], file.attrs["keras_version"] = json.dumps(model), "2.15.0"
        group = file.create_group("model_weights/own")
        file["model_weights"].attrs["layer_names"] = ["own"]
        group.attrs["weight_names"] = ["own/depthwise_kernel:0", "own/bias:0"]
        group["own/depthwise_kernel:0"], group["own/bias:0"] = KERNEL, BIAS
    with pytest.raises(
        ValueError, match="but 1 FixedDepthwiseConv2D. layer 'own' is of the custom"
    ):
        keras_io.load(tmp_path / "m.h5")
    objects = {"FixedDepthwiseConv2D": DepthwiseConv2D}
    ((layer, variables),) = keras_io.load(tmp_path / "m.h5", custom_objects=objects).values()
    assert type(layer) is DepthwiseConv2D
    np.testing.assert_array_equal(variables["params"]["kernel"], KERNEL)


@pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")
def test_a_subclass_of_kerass_own(keras, tmp_path):
    @keras.saving.register_keras_serializable("mine")
    class Fixed(keras.layers.DepthwiseConv2D):
        def __init__(self, *args, groups=1, **kwargs):
            super().__init__(*args, **kwargs)

    model = keras.Sequential([keras.layers.Input((8, 8, 2)), Fixed(3, name="dw")])
    model.layers[0].set_weights([KERNEL, BIAS])
    model.save(tmp_path / "m.keras")
    loaded = keras_io.load(tmp_path / "m.keras", custom_objects={"Fixed": Fixed})
    live = keras_io.from_keras(model.layers[0])
    for layer, variables in (loaded["dw"], live):
        assert type(layer) is DepthwiseConv2D
        np.testing.assert_array_equal(variables["params"]["kernel"], KERNEL)


@pytest.mark.parametrize("bad", [3, [("a", None)], "a"])
def test_bad_custom_objects(tmp_path, bad):
    for read in ways(tmp_path).values():
        with pytest.raises(TypeError, match="`custom_objects` must be a dict, got"):
            read(config(), bad)


def test_the_layer_computes(tmp_path):
    whole = config(activation="my_swish", depthwise_initializer=FOREIGN["of Keras 2"])
    path = write(tmp_path / "m.keras", whole)
    objects = {"my_swish": jax.nn.swish, "EfficientConv2DKernelInitializer": None}
    layer, variables = keras_io.load(path, custom_objects=objects)["dw"]
    x = oracle.normals(2, 1, 8, 8, 2)
    y = oracle.forward(x, KERNEL) + BIAS
    np.testing.assert_allclose(layer.apply(variables, x), y / (1 + np.exp(-y)), 1e-5, 1e-5)
