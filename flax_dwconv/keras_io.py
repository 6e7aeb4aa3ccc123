"""Keras's configs, layers and files, in and out. A file is read without Keras, and never run.

What `load` reads, with the weights of a layer "dw" in the order kernel, bias:

    .keras         zip of config.json, metadata.json and model.weights.h5
    .weights.h5    HDF5, <path>/vars/0 and 1; a path names attributes and classes, not layers
    .h5, Keras 3   HDF5, attribute model_config; model_weights/dw/dw/kernel and bias
    .h5, Keras 2   the same, but model_weights/dw/dw/depthwise_kernel:0 and bias:0

In a path such as "layers/functional/layers/depthwise_conv2d_1" every list numbers the layers of one
class in the order of the model's config, which is therefore needed to find a name.
"""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import os
import re
import typing
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from flax_dwconv import _config, _layer, linen
from flax_dwconv._vocabulary import is_of_keras

Layer = (
    linen.DepthwiseConv1D | linen.DepthwiseConv2D | linen.SeparableConv1D | linen.SeparableConv2D
)
# Keras's name of a layer -> ours.
_LAYERS: dict[str, Any] = {layer.__name__: layer for layer in typing.get_args(Layer)}


def from_config(config: Mapping[str, Any]) -> Layer:
    """Returns the layer that a config of Keras 2 or 3 stands for, as its own `from_config` does.

    Args:
      config: the whole dict with "class_name" and "config", or the settings of a DepthwiseConv2D,
        as its `get_config` returns them. "hard_sigmoid" is Keras 3's in a config that Keras 3
        wrote, and Keras 2's elsewhere.

    Raises:
      ValueError: for another class, an unknown key, a value that has no meaning or a custom object.
      TypeError: for a value of a wrong type.

    Example:
      >>> from flax_dwconv import keras_io
      >>> layer = keras_io.from_config({
      ...     "class_name": "DepthwiseConv2D",
      ...     "config": {"name": "dw", "kernel_size": [3, 3], "dtype": "mixed_bfloat16"}})
      >>> layer.name, layer.kernel_size, layer.dtype
      ('dw', (3, 3), dtype(bfloat16))
    """
    name = config.get("class_name") if isinstance(config, Mapping) else None
    return _LAYERS.get(str(name), linen.DepthwiseConv2D).from_config(config)


# Keys of our own configs that Keras 3 has no word for, as messages.
_OURS_ONLY = {
    "precision": "`precision` must be None",
    "method": "`method` must be 'auto'",
    "param_dtype": "`dtype` and `param_dtype` must be one of Keras's policies",
    "groups": "`activation` must not be Keras 2's 'hard_sigmoid'",
}
_KERAS_2_ONLY = ("RadialConstraint", "ThresholdedReLU", "Threshold")


def to_config(layer: _layer.Settings) -> dict[str, Any]:
    """Returns the layer as the dict that `keras.saving.deserialize_keras_object` of Keras 3 reads.

    Args:
      layer: a layer of linen or nnx.

    Raises:
      TypeError: for anything else.
      ValueError: if Keras 3 has no such layer (3-D), or no word for a setting: `precision`,
        `method`, explicit or causal padding, a callable without a Keras name, an object that only
        Keras 2 or this package has.

    Example:
      >>> import flax_dwconv
      >>> from flax_dwconv import keras_io
      >>> whole = keras_io.to_config(flax_dwconv.DepthwiseConv2D(3, activation="relu", name="dw"))
      >>> whole["module"], whole["class_name"], whole["config"]["activation"]
      ('keras.layers', 'DepthwiseConv2D', 'relu')
    """
    name = type(layer).__name__
    if not isinstance(layer, _layer.Settings):
        raise TypeError(f"`layer` must be a layer of this package, got {name}.")
    if name not in _LAYERS:
        raise ValueError(f"`layer` must be one of {', '.join(_LAYERS)} for Keras, got {name}.")
    config = layer.get_config()
    for key, value in config.items():
        rule = _OURS_ONLY.get(key)
        if key == "padding" and value not in ("valid", "same"):
            rule = "`padding` must be 'valid' or 'same'"
        elif isinstance(value, Mapping) and value["class_name"] in _KERAS_2_ONLY:
            rule, value = f"`{key}` must be one of Keras 3's", value["class_name"]
        if rule is not None:
            raise ValueError(f"Keras 3 has no word for it: {rule}, got {value!r}.")
    return {
        "module": "keras.layers",
        "class_name": name,
        "config": config,
        "registered_name": None,
    }


def from_keras(keras_layer: Any) -> tuple[Layer, dict[str, Any]]:
    """Returns the layer and the variables of a built Keras layer, of any version and backend.

    Args:
      keras_layer: a depthwise or separable layer with weights.

    Returns:
      `(layer, {"params": ...})`, to be used as `layer.apply(variables, x)`.

    Raises:
      TypeError: if it is not a Keras layer.
      ValueError: if it has no weights yet, or settings that are not Keras's own.

    Example:
      Anything with a config and weights will do:

      >>> import types
      >>> import numpy as np
      >>> from flax_dwconv import keras_io
      >>> built = types.SimpleNamespace(
      ...     get_config=lambda: {"kernel_size": 3, "use_bias": False},
      ...     weights=[np.ones((3, 3, 4, 1))])
      >>> layer, variables = keras_io.from_keras(built)
      >>> layer.apply(variables, np.ones((1, 3, 3, 4), np.float32))
      Array([[[[9., 9., 9., 9.]]]], dtype=float32)
    """
    if not hasattr(keras_layer, "get_config") or not hasattr(keras_layer, "weights"):
        raise TypeError(
            f"`keras_layer` must be a layer of Keras, got {type(keras_layer).__name__}."
        )
    name, config = type(keras_layer).__name__, keras_layer.get_config()
    whole = {"class_name": name, "config": config}
    layer = from_config(whole if name in _LAYERS else config)
    if not keras_layer.weights:
        raise ValueError(f"`keras_layer` must be built, got {keras_layer!r} without weights.")
    weights = [np.asarray(weight) for weight in keras_layer.weights]
    return layer, {"params": _params(layer, weights)}


def to_keras(layer: _layer.Settings, variables: Mapping[str, Any]) -> Any:
    """Returns a built Keras 3 layer with these settings and weights. Imports Keras.

    Args:
      layer: a layer of linen or nnx.
      variables: `{"params": {"kernel": ..., "bias": ...}}`, or as the layer names its parameters;
        other collections are ignored.

    Raises:
      ImportError: if Keras is not installed.
      ValueError: as in `to_config`, or if the parameters do not fit the layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> from flax_dwconv import keras_io
      >>> layer = flax_dwconv.DepthwiseConv2D(3)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 4)))
      >>> keras_layer = keras_io.to_keras(layer, variables)  # doctest: +SKIP
      >>> keras_layer(jnp.ones((1, 8, 8, 4))).shape  # doctest: +SKIP
      (1, 6, 6, 4)
    """
    whole = to_config(layer)
    variables = meta.unbox(variables)
    params = variables.get("params") if isinstance(variables, Mapping) else None
    names = list(layer._parameters(1))
    if not isinstance(params, Mapping) or set(params) != set(names):
        raise ValueError(f"`variables` must have 'params' with {names}, got {_keys(variables)}.")
    params = _params(layer, [params[name] for name in names])
    shape: list[int | None] = [None] * (layer.rank + 2)
    shape[layer._window.channel_axis] = params[names[0]].shape[-2]

    result = getattr(_require("keras").layers, whole["class_name"]).from_config(whole["config"])
    result.build(tuple(shape))
    result.set_weights([np.asarray(params[name]) for name in names])
    return result


def load(
    path: str | os.PathLike[str], *, config: Mapping[str, Any] | str | None = None
) -> dict[str, tuple[linen.DepthwiseConv2D, dict[str, Any]]]:
    """Returns every `DepthwiseConv2D` of a Keras file, with its weights.

    Keras need not be installed. Nothing in the file is executed or extracted to disk; custom
    objects and pickled functions next to the depthwise layers are passed over, and so are layers
    that a custom class makes in its own code, of which a file has no config.

    Args:
      path: a `.keras` file, a whole-model `.h5` file of Keras 2 or 3, or a `.weights.h5` file.
      config: what the file lacks if it holds weights only: the config of the model, as `to_json()`,
        `get_config()` or config.json in a `.keras` file give it, or that of its only layer.
        Otherwise it replaces the file's.

    Returns:
      `{name: (layer, {"params": ...})}` in the order of the model. The name of a layer in a nested
      model or a wrapper begins with theirs: "encoder/dw".

    Raises:
      ImportError: if h5py is not installed.
      OSError: if there is no file, or no right to read it.
      TypeError: if an argument is of another type.
      ValueError: if the file is not one of Keras's or is damaged, if it has no depthwise layer or
        one whose weights do not fit its config, or if it needs a `config`.

    Example:
      >>> from flax_dwconv import keras_io
      >>> for name, (layer, variables) in keras_io.load("model.keras").items():  # doctest: +SKIP
      ...     y = layer.apply(variables, x)
    """
    path = os.fspath(path)
    model = None if config is None else _model(config)
    with open(path, "rb") as file:
        try:
            return _read(file, model)
        except ImportError:
            raise
        except _BAD_FILE as error:
            raise ValueError(
                f"`path` must be a file of Keras with depthwise layers, got {path!r}: {error}"
            ) from error


# What zipfile, zlib, h5py and json raise for a file that is not what it says, and we ourselves.
_BAD_FILE = (
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,  # a RecursionError too
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
_SMALL = 1 << 26  # bytes that are read without asking how they were compressed


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A depthwise layer in a model's config: the names that lead to it, its dict, and its path."""

    names: tuple[str, ...]
    node: Mapping[str, Any]
    path: str


def _read(file: Any, model: Mapping[str, Any] | None) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        version = None
        if file.read(2) == b"PK":
            archive = stack.enter_context(zipfile.ZipFile(file))
            names = archive.namelist()
            if climbing := [n for n in names if ".." in re.split(r"[/\\]", n) or n[:1] in "/\\"]:
                raise ValueError(f"the entry {climbing[0]!r} climbs out of the archive.")
            if "metadata.json" in names:
                version = json.loads(_entry(archive, "metadata.json")).get("keras_version")
            if model is None:
                model = _model(_entry(archive, "config.json"))
            file = io.BytesIO(_entry(archive, "model.weights.h5"))
        file.seek(0)
        root = stack.enter_context(_require("h5py").File(file, "r"))
        if model is None:
            if "model_config" not in root.attrs:
                raise ValueError("it holds no config, weights only: pass the model's as `config`.")
            model = _model(_text(root.attrs["model_config"]))
        version = _text(root.attrs["keras_version"]) if "keras_version" in root.attrs else version

        legacy = _child(root, "model_weights") if "model_weights" in root.keys() else None
        if legacy is None and _strings(root.attrs, "layer_names"):  # weights only, of Keras 2
            legacy = root
        entries = list(_walk(model, (), ""))
        if not entries:
            raise ValueError("it has no depthwise layer.")
        result, seen = {}, []
        for entry in entries:
            name = "/".join(entry.names)
            try:
                layer = from_config(_config.with_version(entry.node, version))
                weights = (
                    _legacy_weights(legacy, entry) if legacy is not None else _weights(root, entry)
                )
                key = layer.name, layer
                if weights is None:
                    twins = [w for k, w in seen if k == key]
                    if len(twins) != 1:
                        raise ValueError(f"the file has no weights at {entry.path!r}.")
                    weights = twins[0]
                else:
                    seen.append((key, weights))
                params = _params(layer, weights, entry.node.get("build_config"))
                if name in result:
                    raise ValueError("its name must be unique.")
            except _BAD_FILE as error:
                raise ValueError(f"layer {name!r}: {error}") from error
            result[name] = layer, {"params": params}
        return result


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns an entry of an archive, checked by its CRC, unless it would explode."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise ValueError(f"the archive has no {name!r}.") from None
    if info.file_size > max(_SMALL, 100 * info.compress_size):
        raise ValueError(f"{name!r} is {info.file_size} bytes packed in {info.compress_size}.")
    return archive.read(info)


# Configs.


def _model(config: Any) -> Mapping[str, Any]:
    """Returns the dict of a model, given that, its JSON, the inner dict, or its only layer's."""
    if isinstance(config, str | bytes):
        try:
            config = json.loads(config)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"`config` must be valid JSON, got the error: {error}") from error
    if not isinstance(config, Mapping):
        raise TypeError(f"`config` must be a dict or JSON of one, got {type(config).__name__}.")
    if "class_name" not in config:
        kind = "DepthwiseConv2D" if "kernel_size" in config else "Functional"
        config = {"class_name": kind, "config": config}
    if _is_depthwise(config):
        config = {"class_name": "Sequential", "config": {"layers": [config]}}
    return config


def _is_depthwise(node: Mapping[str, Any]) -> bool:
    return node["class_name"] == "DepthwiseConv2D" and is_of_keras(node)


def _walk(node: Mapping[str, Any], names: tuple[str, ...], path: str) -> Iterator[_Entry]:
    """Yields the depthwise layers of a serialized object, which a store keeps under `path`."""
    if _is_depthwise(node):
        yield _Entry(names, node, path)
        return
    config = node.get("config")
    if isinstance(config, list):  # a Sequential before Keras 2.2.3
        config = {"layers": config}
    for key, value in config.items() if isinstance(config, Mapping) else ():
        children: list[tuple[str, Any]] = [(key, value)]
        if isinstance(value, list):
            used: dict[str, int] = {}
            children = [(f"{key}/{_numbered(v, used)}", v) for v in value if _is_object(v)]
        for child, v in children:
            if _is_object(v):
                inner = v["config"] if isinstance(v.get("config"), Mapping) else {}
                name = inner.get("name") or v.get("name") or child.rpartition("/")[2]
                yield from _walk(v, (*names, str(name)), f"{path}/{child}")


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("class_name"), str)


def _numbered(node: Mapping[str, Any], used: dict[str, int]) -> str:
    """Returns what Keras calls a layer in a list: its class in snake case, and a number."""
    name = re.sub(r"\W+", "", node["class_name"])
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    name = re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
    used[name] = used.get(name, -1) + 1
    return f"{name}_{used[name]}" if used[name] else name


# Weights.


def _params(
    layer: _layer.Settings, weights: Sequence[Any], build_config: Any = None
) -> dict[str, Any]:
    """Returns kernel and bias, arrays or datasets, as parameters, once their shapes are checked."""
    axes = layer.rank + 2
    c = weights[0].shape[-2] if weights and len(weights[0].shape) == axes else 1
    shape = build_config.get("input_shape") if isinstance(build_config, Mapping) else None
    if isinstance(shape, list) and len(shape) == axes:
        c = layer._channels(shape)
    wanted = {name: parameter.shape for name, parameter in layer._parameters(c).items()}
    if len(weights) != len(wanted):
        raise ValueError(f"the weights must be {list(wanted)}, got {len(weights)} arrays.")
    result = {}
    for (name, shape), weight in zip(wanted.items(), weights, strict=True):
        if tuple(weight.shape) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {tuple(weight.shape)}.")
        value = np.asarray(weight)
        if value.dtype == "V2":  # how HDF5 keeps it
            value = value.view(jnp.bfloat16)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"`{name}` must be of a floating dtype, got {value.dtype}.")
        result[name] = jnp.asarray(value.astype(layer.param_dtype))
    return result


def _weights(root: Any, entry: _Entry) -> list[Any] | None:
    """Returns the weights at the path of a layer, in a file of `Model.save_weights` of Keras 3.

    A custom wrapper may keep the layer under another name than in its config; newer versions of
    Keras write the layer's name beside its weights. A layer that several models share is kept where
    Keras first met it: None at the others.
    """
    path = entry.path.lstrip("/")
    if "_layer_checkpoint_dependencies" in root.keys():  # tf.keras 2.12
        path = re.sub(r"\blayers\b", "_layer_checkpoint_dependencies", path)
    try:
        group = _child(root, f"{path}/vars")
    except LookupError:
        found: list[Any] = []
        parent, own = path.rpartition("/")[0], entry.names[-1]
        if not parent.endswith("layers"):  # of a model, which has a fixed name for each of its own
            _child(root, parent).visititems(
                lambda at, group: found.append(at) if _is_vars_of(group, at, own) else None
            )
        if len(found) == 1:
            return _values(_child(root, f"{parent}/{found[0]}"))
        return None
    return _values(group)


def _values(group: Any) -> list[Any]:
    return [_dataset(group, name) for name in sorted(group.keys())]


def _is_vars_of(group: Any, path: str, name: str) -> bool:
    is_vars = path.rpartition("/")[2] == "vars" and len(group)
    return bool(is_vars) and _text(group.attrs.get("name", "")) == name


def _legacy_weights(group: Any, entry: _Entry) -> list[Any]:
    """Returns the weights of a layer in "model_weights", where every top-level layer has a group.

    The names of the weights of a nested layer end with the names that lead to it, or some of them.
    """
    group = _child(group, entry.names[0])
    layers: dict[tuple[str, ...], list[str]] = {}
    for name in _strings(group.attrs, "weight_names"):
        layers.setdefault(tuple(name.split("/")[:-1]), []).append(name)
    found = list(layers)
    if len(found) > 1:
        found = [n for n in layers if n and n == entry.names[len(entry.names) - len(n) :]]
        found = sorted(found, key=len)[-1:]
        found = found or [n for n in layers if n[-1:] == entry.names[-1:]]
    if len(found) != 1:
        raise ValueError(f"its weights must be in the file once, got {len(found)} candidates.")
    return [_dataset(group, name) for name in layers[found[0]]]


def _dataset(group: Any, path: str) -> Any:
    """Returns a dataset whose data is in this file, and not much larger than what is stored."""
    dataset = _child(group, path)
    if getattr(dataset, "shape", None) is None or dataset.external or dataset.is_virtual:
        raise ValueError(f"{path!r} must be an array in the file itself.")
    if dataset.nbytes > max(_SMALL, 1000 * dataset.id.get_storage_size()):
        raise ValueError(f"{path!r} is {dataset.nbytes} bytes of almost nothing.")
    return dataset


def _child(group: Any, path: str) -> Any:
    """Returns what is at a path, never following a link, which could lead out of the file."""
    for part in path.split("/"):
        if not part or not hasattr(group, "keys") or part not in list(group.keys()):
            raise LookupError(f"the file has no {path!r}.")
        if group.id.links.get_info(part.encode()).type != _require("h5py").h5l.TYPE_HARD:
            raise ValueError(f"{path!r} is a link, which Keras does not write.")
        group = group[part]
    return group


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _strings(attributes: Mapping[str, Any], name: str) -> list[str]:
    """Returns a list of strings; a long one is cut into attributes with numbered names."""
    numbered = (f"{name}{i}" for i in itertools.count())
    keys = [name] if name in attributes else itertools.takewhile(attributes.__contains__, numbered)
    return [_text(value) for key in keys for value in np.ravel(attributes[key])]


def _keys(value: Any) -> Any:
    """What an error says about a tree: its keys, not its arrays."""
    return {k: _keys(v) for k, v in value.items()} if isinstance(value, Mapping) else ...


def _require(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`keras_io` needs {module}: pip install 'flax_dwconv[keras]'."
        ) from error
