"""Which objects a Keras config of a model holds, where files keep them, and their variables' names.

In a path such as "layers/functional/layers/depthwise_conv2d_1" every list numbers the objects of
one class in the order of the config, which is therefore needed to find a name. A list in a list is
a "container".
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

from flax_dwconv._vocabulary import is_of_keras


@dataclasses.dataclass(frozen=True)
class Entry:
    """An object in a model's config.

    Attributes:
        names: of the nested models and wrappers that lead to it, and its own.
        node: its dict, with "class_name" and "config".
        path: where Keras 3 stores it.
        parent: the object around it; None of the model itself.
    """

    names: tuple[str, ...]
    node: Mapping[str, Any]
    path: str
    parent: "Entry | None"

    @property
    def name(self) -> str:
        """What its users call it."""
        return "/".join(self.names)

    @property
    def class_name(self) -> str:
        """Of Keras, or a custom one."""
        return self.node["class_name"]

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings."""
        config = self.node.get("config")
        return config if isinstance(config, Mapping) else {}


def model(config: Any) -> Mapping[str, Any]:
    """Returns the dict of a model, given that, its JSON, the inner dict, or its only layer's.

    Raises:
        ValueError: if it is no JSON.
        TypeError: if it is no dict.
    """
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
    if config["class_name"] in _VARIABLES or config["class_name"] in PARTS:
        config = {"class_name": "Sequential", "config": {"layers": [config]}}
    return config


def walk(model: Mapping[str, Any]) -> Iterator[Entry]:
    """Yields every object in the config of a model, the model itself first, in its order."""
    own = model["config"] if isinstance(model.get("config"), Mapping) else {}
    name = own.get("name")
    root = Entry((name if isinstance(name, str) else "model",), model, "", None)
    yield root
    yield from _inside(root, ())


def _inside(parent: Entry, names: tuple[str, ...]) -> Iterator[Entry]:
    config = parent.node.get("config")
    if isinstance(config, list):  # a Sequential before Keras 2.2.3
        config = {"layers": config}
    if not isinstance(config, Mapping):
        return
    if parent.class_name == "Bidirectional":
        config = _directions(config)
    for key, value in config.items():
        # These have no variables, and the names of their classes are those of no layer.
        if str(key).endswith(("dtype", "initializer", "regularizer", "constraint")):
            continue
        path = f"{parent.path}/{key}" if parent.path else str(key)
        for v, at in _objects(value, path):
            inner = v["config"] if isinstance(v.get("config"), Mapping) else {}
            name = inner.get("name") or v.get("name") or at.rpartition("/")[2]
            entry = Entry((*names, str(name)), v, at, parent)
            yield entry
            yield from _inside(entry, entry.names)


def _objects(value: Any, path: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields the serialized objects in a value of a config, each with its path."""
    if _is_object(value):
        yield value, path
        return
    if isinstance(value, Mapping):
        is_tuple = value.get("class_name") == "__tuple__"
        value = value.get("items") if is_tuple else list(value.values())
    if not isinstance(value, list):
        return
    used: dict[str, int] = {}
    for v in value:
        if isinstance(v, Mapping | list):
            name = _snake_case(v["class_name"]) if _is_object(v) else "container"
            used[name] = used.get(name, -1) + 1
            number = f"_{used[name]}" if used[name] else ""
            yield from _objects(v, f"{path}/{name}{number}")


def _is_object(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("class_name"), str)
        and value["class_name"] != "function"
        and not value["class_name"].startswith("__")  # "__tuple__", "__keras_tensor__"
    )


def _snake_case(class_name: str) -> str:
    """Returns what Keras makes of a class for a path: "conv2d" of "Conv2D"."""
    # The one layer with weights whose class is not called as its users call it.
    name = {"GroupQueryAttention": "GroupedQueryAttention"}.get(class_name, class_name)
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _directions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a Bidirectional with both of its layers, named as Keras names them.

    The backward layer is in it only if the user gave one. Keras 2 keeps the name that the layer had
    before it was wrapped.
    """
    layer: Any = config.get("layer")
    if not _is_object(layer) or not isinstance(layer.get("config"), Mapping):
        return dict(config)
    base = str(layer["config"].get("name")).removeprefix("forward_")

    def named(name: str) -> dict[str, Any]:
        return {**layer, "config": {**layer["config"], "name": name}}

    rest = {k: v for k, v in config.items() if k not in ("layer", "backward_layer")}
    backward = config.get("backward_layer")
    if not _is_object(backward):
        backward = named(f"backward_{base}")
    return {**rest, "forward_layer": named(f"forward_{base}"), "backward_layer": backward}


# Variables.

# Whether a layer has a variable, given its config.
Condition = Callable[[Mapping[str, Any]], Any]


def _always(config: Mapping[str, Any]) -> bool:
    return True


def _if(key: str, default: bool = True) -> Condition:
    return lambda config: config.get(key, default)


def _if_equal(key: str, *values: Any) -> Condition:
    return lambda config: config.get(key) in values


_KERNEL = {"kernel": _always, "bias": _if("use_bias")}
_RECURRENT = {"kernel": _always, "recurrent_kernel": _always, "bias": _if("use_bias")}
_AFFINE = {"gamma": _if("scale"), "beta": _if("center")}
_BATCH = _AFFINE | {
    "moving_mean": _always,
    "moving_variance": _always,
    "moving_stddev": _if("renorm", False),
    "renorm_mean": _if("renorm", False),
    "renorm_stddev": _if("renorm", False),
}
_SEPARABLE = {
    "depthwise_kernel": _always,
    "pointwise_kernel": _always,
    "bias": _if("use_bias"),
}
# Layers that keep their variables in a cell.
_CELLS = ("LSTM", "GRU", "SimpleRNN", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
# Layers that keep their variables in layers of their own, of which the config says nothing.
_ATTENTION = ("MultiHeadAttention", "GroupedQueryAttention", "GroupQueryAttention")
PARTS = dict.fromkeys(_ATTENTION, ("query", "key", "value", "attention_output"))

# The variables of each layer in the order in which Keras stores them.
_VARIABLES: dict[str, Mapping[str, Condition]] = {
    **dict.fromkeys([f"Conv{rank}D{end}" for rank in "123" for end in ("", "Transpose")], _KERNEL),
    **dict.fromkeys(["DepthwiseConv1D", "DepthwiseConv2D", "Dense"], _KERNEL),
    **dict.fromkeys(["LocallyConnected1D", "LocallyConnected2D"], _KERNEL),  # Keras 2
    **dict.fromkeys(["SeparableConv1D", "SeparableConv2D"], _SEPARABLE),
    **dict.fromkeys(["LSTMCell", "GRUCell", "SimpleRNNCell", *_CELLS], _RECURRENT),
    **dict.fromkeys(["CuDNNLSTM", "CuDNNGRU"], _RECURRENT),  # Keras 2
    **dict.fromkeys(["BatchNormalization", "SyncBatchNormalization"], _BATCH),
    "EinsumDense": {"kernel": _always, "bias": lambda config: config.get("bias_axes") is not None},
    "Embedding": {"embeddings": _always},
    "ReversibleEmbedding": {
        "embeddings": _always,
        "reverse_embeddings": lambda config: not config.get("tie_weights", True),
    },
    "LayerNormalization": {
        "gamma": lambda config: config.get("scale", True) or config.get("rms_scaling", False),
        "beta": lambda config: config.get("center", True) and not config.get("rms_scaling", False),
    },
    "GroupNormalization": _AFFINE,
    "RMSNormalization": {"scale": _always},
    "Normalization": dict.fromkeys(["mean", "variance", "count"], _if_equal("mean", None)),
    "SpectralNormalization": {"vector_u": _always},
    "PReLU": {"alpha": _always},
    "Attention": {
        "scale": _if("use_scale", False),
        "concat_score_weight": _if_equal("score_mode", "concat"),
    },
    "AdditiveAttention": {"scale": _if("use_scale")},
    "STFTSpectrogram": {
        "real_kernel": lambda config: config.get("mode") != "imag",
        "imag_kernel": lambda config: config.get("mode") != "real",
    },
    # Of `keras.applications.ConvNeXtTiny`. Keras calls the variable "variable_7" or the like, by
    # how many there were before.
    "LayerScale": {"gamma": _always},
}


def variables(entry: Entry) -> list[str] | None:
    """Returns the names of the variables that a layer has, in Keras's order; None if unknown."""
    if entry.class_name not in _VARIABLES or not is_of_keras(entry.node):
        return None
    conditions = _VARIABLES[entry.class_name].items()
    return [name for name, holds in conditions if holds(entry.config)]


def place(entry: Entry) -> str:
    """Returns the path of the variables of a layer: a recurrent one keeps them in its cell."""
    return f"{entry.path}/cell" if entry.class_name in _CELLS else entry.path


def part(path: str, name: str) -> str:
    """Returns what Keras calls a part of a layer: "query" for "_query_dense".

    Args:
        path: of the part, in the layer.
        name: of the part, if the file has it.
    """
    if name:
        return name
    *rest, last = path.split("/")
    last = last.removeprefix("_").removesuffix("_dense")
    return "/".join([*rest, "attention_output" if last == "output" else last])


# What an object keeps beside its weights: of the optimizer, of metrics and losses, of random
# numbers. The names of metrics are the user's, and most end so.
_STATE = re.compile(
    r"^_?(optimizer|compile_metrics|compile_loss|loss)(/|$)"
    r"|(^|/)\w*(seed_generator|random_generator|metrics?|tracker)(_\d+)?(/|$)"
)


def is_state(owner: Entry, part: str, name: str) -> bool:
    """Whether what is stored with an object is no weight: a seed, a metric, an optimizer.

    Args:
        owner: the object.
        part: the path in it.
        name: of the part, if the file has it.
    """
    if part == "generator" and is_of_keras(owner.node):  # of layers such as RandomFlip
        return True
    return bool(_STATE.search(part)) or name.startswith("seed_generator")
