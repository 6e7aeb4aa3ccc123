"""Keras's layers, configs and files, in and out.

- A file: `load` returns its depthwise and separable layers with their weights, `weights` the arrays
  of every layer. Files are read without Keras, and nothing in them is run. HDF5 needs the extra
  `h5`.
- A config: `from_config` makes a layer of it, `to_config` makes it of a layer.
- A live layer: `from_keras` reads one, `to_keras` makes one (extra `keras`, and `KERAS_BACKEND=jax`
  in the environment, for Keras's default backend is TensorFlow).

Example:
  >>> from flax_dwconv import keras_io
  >>> settings = {"kernel_size": [5, 5], "strides": [2, 2]}
  >>> layer = keras_io.from_config({"class_name": "DepthwiseConv2D", "config": settings})
  >>> layer.kernel_size, layer.strides, keras_io.to_config(layer)["class_name"]
  ((5, 5), (2, 2), 'DepthwiseConv2D')
"""

import contextlib
import os
import re
import typing
import warnings
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from flax_dwconv import _config, _keras_files, _keras_names, _keras_weights, _layer, linen
from flax_dwconv._vocabulary import is_of_keras

# `_keras_files` reads the containers that Keras writes, `_keras_names` the config of a model, and
# `_keras_weights` brings the two together. Here the layers of this package are made of them.

Layer = (
    linen.DepthwiseConv1D | linen.DepthwiseConv2D | linen.SeparableConv1D | linen.SeparableConv2D
)
# Keras's name of a layer -> ours.
_LAYERS: dict[str, Any] = {layer.__name__: layer for layer in typing.get_args(Layer)}
# These are depthwise too where `groups` is the number of channels.
_GROUPED = {"Conv1D": linen.DepthwiseConv1D, "Conv2D": linen.DepthwiseConv2D}


def from_config(
    config: Mapping[str, Any], *, custom_objects: Mapping[str, Any] | None = None
) -> Layer:
    """Returns the layer that a config of Keras 2 or 3 stands for, as its own `from_config` does.

    Args:
      config: the whole dict with "class_name" and "config", or the settings of a DepthwiseConv2D,
        as its `get_config` returns them. "hard_sigmoid" is Keras 3's in a config that Keras 3
        wrote, and Keras 2's elsewhere.
      custom_objects: what names stand for that are not Keras's, as in `load`.

    Raises:
      ValueError: for another class, an unknown key, a value that has no meaning or a custom
        activation that `custom_objects` lacks.
      TypeError: for a value of a wrong type.

    Example:
      >>> from flax_dwconv import keras_io
      >>> layer = keras_io.from_config({
      ...     "class_name": "DepthwiseConv2D",
      ...     "config": {"name": "dw", "kernel_size": [3, 3], "dtype": "mixed_bfloat16"}})
      >>> layer.name, layer.kernel_size, layer.dtype
      ('dw', (3, 3), dtype(bfloat16))
    """
    customs = _config.Customs(custom_objects)
    whole = isinstance(config, Mapping) and isinstance(config.get("class_name"), str)
    cls = (_class(config, customs) if whole else None) or linen.DepthwiseConv2D
    layer = cls(**cls._settings_from_config(config, customs))
    customs.warn()
    return layer


def _class(node: Mapping[str, Any], customs: _config.Customs) -> Any:
    """Returns our class for a serialized layer; None for one that is none of ours."""
    if node["class_name"] in _LAYERS and is_of_keras(node):
        return _LAYERS[node["class_name"]]
    return _ours(customs.bases(node))


def _ours(bases: Sequence[type]) -> Any:
    """Returns our class for a class with these bases, of Keras or of linen; None without any."""
    names = [base.__name__ for base in bases if base.__name__ in _LAYERS]
    if bases and issubclass(bases[0], linen.nn.Module):  # a subclass of ours
        return bases[0] if names else None
    return _LAYERS[names[0]] if names else None


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


def from_keras(
    keras_layer: Any, *, custom_objects: Mapping[str, Any] | None = None
) -> tuple[Layer, dict[str, Any]]:
    """Returns the layer and the variables of a built Keras layer, of any version and backend.

    Args:
      keras_layer: a depthwise or separable layer with weights, a `Conv1D` or `Conv2D` whose groups
        are its channels, or one of a subclass of these, whose own `call` is ignored.
      custom_objects: what names stand for that are not Keras's, as in `load`.

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
    bases, config = type(keras_layer).__mro__, keras_layer.get_config()
    weights = [np.asarray(weight) for weight in keras_layer.weights]
    name = next((base.__name__ for base in bases if base.__name__ in _GROUPED), "")
    if name and _is_grouped(config):
        cls, config = _GROUPED[name], _as_depthwise(config)
        weights = _split_channels(weights, config)
    else:
        cls = _ours(bases) or linen.DepthwiseConv2D
    customs = _config.Customs(custom_objects)
    whole = {"class_name": cls.__name__, "config": config}
    layer = cls(**cls._settings_from_config(whole, customs))
    if not keras_layer.weights:
        raise ValueError(f"`keras_layer` must be built, got {keras_layer!r} without weights.")
    params = _params(layer, weights)
    customs.warn()
    return layer, {"params": params}


def to_keras(layer: _layer.Settings, variables: Mapping[str, Any]) -> Any:
    """Returns a built Keras 3 layer with these settings and weights. Imports Keras.

    Args:
      layer: a layer of linen or nnx.
      variables: `{"params": {"kernel": ..., "bias": ...}}`, or as the layer names its parameters;
        other collections are ignored.

    Raises:
      ImportError: if Keras is not installed, or lacks its backend: `KERAS_BACKEND=jax` in the
        environment makes that JAX.
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

    keras = _keras_files.require("keras", "keras")
    result = getattr(keras.layers, whole["class_name"]).from_config(whole["config"])
    result.build(tuple(shape))
    result.set_weights([np.asarray(params[name]) for name in names])
    return result


def load(
    path: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | str | None = None,
    custom_objects: Mapping[str, Any] | None = None,
) -> dict[str, tuple[Layer, dict[str, Any]]]:
    """Returns every depthwise and separable layer of a Keras file, with its weights.

    These are `DepthwiseConv1D` and `2D`, `SeparableConv1D` and `2D`, and those `Conv1D` and
    `Conv2D` that are depthwise: with several groups, as many as input channels. `weights` reads the
    other layers.

    Keras need not be installed. Nothing in the file is executed or extracted to disk; custom
    objects and pickled functions next to the layers are passed over, and so are layers that a
    custom class makes in its own code, of which a file has no config.

    Args:
      path: a `.keras` file, or the directory that Keras leaves with `zipped=False`; a whole-model
        `.h5` file of Keras 2 or 3; or weights only: a `.weights.h5` file, or the `.weights.json`
        beside the parts of sharded ones.
      config: what the file lacks if it holds weights only: the config of the model, as `to_json()`,
        `get_config()` or config.json in a `.keras` file give it, or that of its only layer.
        Otherwise it replaces the file's.
      custom_objects: {name: object or None}: what the names in the file stand for that are not
        Keras's. A custom activation has to be here, as a function. An initializer, regularizer or
        constraint that is not here is read as None, and a warning says so. A subclass of a layer is
        read if it is here, as the class itself or as the layer of this package to take for it, and
        passed over with a warning otherwise, or silently if None is here.

    Returns:
      `{name: (layer, {"params": ...})}` in the order of the model. The name of a layer in a nested
      model or a wrapper begins with theirs: "encoder/dw".

    Raises:
      ImportError: if h5py is not installed.
      OSError: if there is no file, or no right to read it.
      TypeError: if an argument is of another type.
      ValueError: if the file is not one of Keras's or is damaged, if it has no such layer or one
        whose weights do not fit its config, if it needs a `config`, or if a layer has both strides
        and dilation, which `depthwise_conv2d` computes: the message has the lines.

    Example:
      >>> from flax_dwconv import keras_io
      >>> for name, (layer, variables) in keras_io.load("model.keras").items():  # doctest: +SKIP
      ...     y = layer.apply(variables, x)
    """
    customs = _config.Customs(custom_objects)
    result: dict[str, tuple[Layer, dict[str, Any]]] = {}
    with _opened(path, config, " with depthwise layers") as (found, version):
        for item in found:
            with _named(item):
                loaded = _layer_of(item, version, customs)
                if loaded is not None and item.entry.name in result:
                    raise ValueError("its name must be unique.")
            if loaded is not None:
                result[item.entry.name] = loaded
        offers = _offers(found, customs)
        if not result:
            seen = Counter(item.entry.class_name for item in found)
            listed = ", ".join(f"{n} {name}" for name, n in seen.items()) or "no layer at all"
            raise ValueError(f"it has no depthwise layer, but {listed}.{offers}")
    if offers:
        warnings.warn(f"Passed over in {os.fsdecode(path)!r}:{offers}", stacklevel=2)
    customs.warn()
    return result


def weights(
    path: str | os.PathLike[str], *, config: Mapping[str, Any] | str | None = None
) -> dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray]]]:
    """Returns the weights of every layer in a Keras file, depthwise or not.

    Nested models, wrappers such as `TimeDistributed` and `Bidirectional`, and shared layers are
    included: what they hold is listed layer by layer. Keras need not be installed, and nothing in
    the file is executed. The state of optimizers, metrics and random numbers is no weight.

    The variables have the names that Keras 3 gives them, whichever version wrote the file:
    "kernel", "gamma", "moving_mean". A layer that keeps variables in parts of its own, such as
    `MultiHeadAttention`, has them as "query/kernel". Where a custom class makes its variables
    itself, only an `.h5` file of a whole model has their names; elsewhere they are "0", "1", ... in
    Keras's order, those of its parts with the path of the part before. So is all there is of a
    subclassed model, of which a file has no structure.

    Args:
      path: as in `load`.
      config: as in `load`.

    Returns:
      `{name: (class_name, config, {variable: array})}` in the order of the model, with the names
      that `load` gives; `config` is what the layer's `get_config` returned. The arrays are
      contiguous.

    Raises:
      ImportError: if h5py is not installed.
      OSError: if there is no file, or no right to read it.
      TypeError: if an argument is of another type.
      ValueError: if the file is not one of Keras's or is damaged, if it lacks weights that its
        config asks for, or if it needs a `config`.

    Example:
      >>> from flax_dwconv import keras_io
      >>> for name, (kind, config, arrays) in keras_io.weights("m.keras").items():  # doctest: +SKIP
      ...     print(name, kind, {key: array.shape for key, array in arrays.items()})
    """
    result: dict[str, tuple[str, dict[str, Any], dict[str, np.ndarray]]] = {}
    with _opened(path, config, "") as (found, _):
        for item in found:
            if item.variables or item.problem:
                with _named(item):
                    if item.entry.name in result:
                        raise ValueError("its name must be unique.")
                    arrays = item.arrays()
                entry = item.entry
                result[entry.name] = entry.class_name, dict(entry.config), arrays
    return result


@contextlib.contextmanager
def _opened(
    path: str | os.PathLike[str], config: Any, kind: str
) -> Generator[tuple[list[_keras_weights.Found], str | None]]:
    """Yields what a file holds, and the version of the Keras that wrote it, if known.

    What is wrong with the file, also while it is read, becomes a ValueError with its path.
    """
    path = os.fsdecode(path)
    model = None if config is None else _keras_names.model(config)
    try:
        with _keras_files.opened(path) as store:
            if model is None:
                if store.config is None:
                    raise ValueError(store.no_config)
                model = _keras_names.model(store.config)
            yield _keras_weights.find(store, model), store.version
    except (ImportError, FileNotFoundError, PermissionError):
        raise
    except _keras_files.BAD_FILE as error:
        raise ValueError(f"`path` must be a file of Keras{kind}, got {path!r}: {error}") from error


@contextlib.contextmanager
def _named(item: _keras_weights.Found) -> Generator[None]:
    """Says in an error which layer it is about."""
    try:
        yield
    except _keras_files.BAD_FILE as error:
        raise ValueError(f"layer {item.entry.name!r}: {error}") from error


def _layer_of(
    item: _keras_weights.Found, version: str | None, customs: _config.Customs
) -> tuple[Layer, dict[str, Any]] | None:
    """Returns what was found as a layer of ours, with its variables; None if it is none."""
    node, settings, arrays = item.entry.node, item.entry.config, None
    cls = _class(node, customs)
    if cls is None:
        if node["class_name"] not in _GROUPED or not is_of_keras(node):
            return None
        if not _is_grouped(settings):
            return None
        arrays = list(item.arrays().values())
        if arrays[0].shape[-2:-1] != (1,):  # a group has several channels
            return None
        cls = _GROUPED[node["class_name"]]
        settings = _as_depthwise(settings)
        arrays = _split_channels(arrays, settings)
        node = {**node, "class_name": cls.__name__, "config": settings}
    try:
        layer = cls(**cls._settings_from_config(_config.with_version(node, version), customs))
    except ValueError as error:
        if "`strides > 1` not supported" not in str(error):
            raise
        raise ValueError(f"{error} {_lines(item, settings, cls.rank)}") from None
    arrays = list(item.arrays().values()) if arrays is None else arrays
    return layer, {"params": _params(layer, arrays, node.get("build_config"))}


# Convolutions whose groups are their channels.


def _is_grouped(config: Mapping[str, Any]) -> bool:
    groups, filters = config.get("groups"), config.get("filters")
    return (
        isinstance(groups, int) and isinstance(filters, int) and groups > 1 and not filters % groups
    )


def _as_depthwise(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a grouped convolution as those of a depthwise layer.

    Group g reads channel g, and its results follow those of group g - 1. That is the order of a
    depthwise convolution: filter `m` of channel `c` is at `c*M + m`.
    """
    settings = {re.sub("^kernel_(i|r|c)", r"depthwise_\1", key): v for key, v in config.items()}
    filters, groups = settings.pop("filters"), settings.pop("groups")
    for key in ("lora_rank", "lora_alpha"):  # merged into the stored kernel
        settings.pop(key, None)
    return settings | {"depth_multiplier": filters // groups}


def _split_channels(arrays: Sequence[np.ndarray], settings: Mapping[str, Any]) -> list[np.ndarray]:
    """Returns weights whose kernel (*window, 1, c*m) became (*window, c, m)."""
    kernel, *bias = arrays
    m = settings["depth_multiplier"]
    return [kernel.reshape(*kernel.shape[:-2], kernel.shape[-1] // m, m), *bias]


# What messages say.


def _lines(item: _keras_weights.Found, settings: Mapping[str, Any], rank: int) -> str:
    """Returns the lines that compute the convolution of a layer with strides and dilation."""
    kernel = f"arrays[{next(iter(item.variables or {}), 'kernel')!r}]"
    names = ("strides", "padding", "dilation_rate", "data_format")
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    arguments = ", ".join([f"{name}={value!r}" for name, value in given.items()])
    return (
        "Without what follows the convolution, that is:\n"
        f"    _, config, arrays = keras_io.weights(path)[{item.entry.name!r}]\n"
        f"    y = depthwise_conv{rank}d(x, {kernel}, {arguments})"
    )


def _offers(found: Sequence[_keras_weights.Found], customs: _config.Customs) -> str:
    """Returns sentences on the custom classes that look depthwise; nothing if there are none."""
    offers = {}
    for entry in (item.entry for item in found):
        words = _config.words_of(entry.node, _LAYERS)
        alike = {"kernel_size", "depth_multiplier"} <= set(entry.config)
        if alike and words and not customs.named(words):
            kind = "Separable" if "pointwise_initializer" in entry.config else "Depthwise"
            size = entry.config["kernel_size"]
            cls = f"{kind}Conv{len(size) if isinstance(size, list) else 2}D"
            offers.setdefault(
                words[-1],
                f" layer {entry.name!r} is of the custom class {words[-1]!r}: "
                f"`custom_objects={{{words[-1]!r}: flax_dwconv.{cls}}}` reads it as that layer, "
                "None there passes it over.",
            )
    return "".join(offers.values())


def _params(
    layer: _layer.Settings, weights: Sequence[Any], build_config: Any = None
) -> dict[str, Any]:
    """Returns arrays in Keras's order as parameters, once their shapes are checked."""
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
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"`{name}` must be of a floating dtype, got {value.dtype}.")
        result[name] = jnp.asarray(value.astype(layer.param_dtype))
    return result


def _keys(value: Any) -> Any:
    """What an error says about a tree: its keys, not its arrays."""
    return {k: _keys(v) for k, v in value.items()} if isinstance(value, Mapping) else ...
