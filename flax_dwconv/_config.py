"""Keras's config dialects: a layer's settings as the dicts that Keras 2 and 3 write, in and out.

A config is the dict of settings, or a whole one that wraps it with "class_name" and, in Keras 3,
"module" and "registered_name". The dialects differ in three places:

    "hard_sigmoid"    Keras 2's clip(0.2 x + 0.5, 0, 1), or Keras 3's relu6(x + 3) / 6
    "dtype"           a name in Keras 2, a policy object in Keras 3
    other keys        "groups" is Keras 2's mark, "registered_name" that of Keras 3
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_dwconv import activations, constraints, initializers, regularizers
from flax_dwconv._vocabulary import Vocabulary, is_of_keras

_VOCABULARIES = {
    "activation": activations.VOCABULARY,
    "initializer": initializers.VOCABULARY,
    "regularizer": regularizers.VOCABULARY,
    "constraint": constraints.VOCABULARY,
}

# Not written under their own names: the two dtypes become Keras's "dtype", a policy. Keras does not
# know the others, which are written only where they are set.
_OURS = ("dtype", "param_dtype", "precision", "method")

# Keys that Keras 2 and 3 write and that set nothing here.
_IGNORED_KEYS = ("trainable", "groups", "batch_input_shape", "dynamic", "autocast")


def vocabulary(argument: str) -> Vocabulary | None:
    """Returns the vocabulary of an argument, such as regularizers for "bias_regularizer".

    None for an argument that holds no identifier.
    """
    return _VOCABULARIES.get(argument.rpartition("_")[2])


def write(name: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a layer's settings as a config in the dialect of Keras 3.

    Args:
      name: of the layer.
      settings: {argument: value}, checked, in the order of the constructor.

    Raises:
      ValueError: if a setting is a callable that has no Keras name.
    """
    config: dict[str, Any] = {"name": name, "trainable": True}
    config |= _write_dtypes(settings["dtype"], settings["param_dtype"])
    # Keras writes the multiplier first, all else in the order of its constructors.
    order = ["depth_multiplier", *(n for n in settings if n != "depth_multiplier")]
    for argument in order:
        if argument in _OURS:
            continue
        value, room = settings[argument], vocabulary(argument)
        if value is jax.nn.hard_sigmoid:
            value = "hard_sigmoid"
        config[argument] = value if room is None else room.serialize(value, argument)
    if settings["precision"] is not None:
        config["precision"] = [p.name for p in settings["precision"]]
    if settings["method"] != "auto":
        config["method"] = settings["method"]
    if settings["activation"] == "hard_sigmoid":
        config["groups"] = 1  # Keras 2's mark: `read` then takes Keras 2's function
    # Tuples become lists, as they would in JSON.
    return {k: _lists(v) for k, v in config.items()}


def read(
    config: Any, class_name: str, arguments: Sequence[str], required: Sequence[str]
) -> dict[str, Any]:
    """Returns the constructor's arguments that a config of any dialect stands for, and `name`.

    Args:
      config: the settings, or a dict with "class_name" and "config".
      class_name: Keras's name of the layer.
      arguments: those of the layer.
      required: those of them that have no default.

    Raises:
      TypeError: if something is not a dict, or the name neither a string nor None.
      ValueError: for another class, an unknown key, or if a required one is missing.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"`config` must be a dict, got {type(config).__name__}.")
    settings, whole = config, {}
    if "class_name" in config and "config" in config:
        settings, whole = config["config"], config
        if whole["class_name"] != class_name or not is_of_keras(whole):
            names = " of ".join(repr(whole[k]) for k in ("class_name", "module") if k in whole)
            raise ValueError(f"`config` must be of Keras's {class_name}, got {names}.")
        if not isinstance(settings, Mapping):
            raise TypeError(f"`config` must be a dict, got {type(settings).__name__}.")
    settings = dict(settings)
    if settings.get("activation") == "hard_sigmoid" and _is_of_keras_3(settings, whole):
        settings["activation"] = jax.nn.hard_sigmoid
    for ignored in _IGNORED_KEYS:
        settings.pop(ignored, None)
    unknown = [key for key in settings if key not in (*arguments, "name")]
    if unknown:
        raise ValueError(f"`config` has unknown keys, got {sorted(map(str, unknown))}.")
    for key in required:
        if key not in settings:
            keys = sorted(map(str, settings))
            raise ValueError(f"`config` must have a `{key}`, got the keys {keys}.")
    if not isinstance(settings.get("name"), str | None):
        raise TypeError(f"`name` must be a string or None, got {settings['name']!r}.")
    return settings | _read_dtypes(settings)


def with_version(node: Mapping[str, Any], version: str | None) -> Mapping[str, Any]:
    """Returns the whole config of a layer with the mark of the Keras that wrote it, if known."""
    if version is None:
        return node
    if int(version.partition(".")[0]) >= 3:
        return {"registered_name": None, **node}
    return {**node, "config": {"groups": 1, **node["config"]}}


def _is_of_keras_3(settings: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether Keras 3 wrote a config: Keras 2 registers no names, or it writes `groups` too."""
    objects = [whole, *(v for v in settings.values() if isinstance(v, Mapping))]
    return "groups" not in settings and any("registered_name" in v for v in objects)


# Dtypes


def dtype(value: Any, name: str) -> np.dtype:
    """Returns a floating dtype.

    Args:
      value: a dtype, its name, or a scalar type.
      name: the argument that an error names.

    Raises:
      TypeError: for what is none of these.
      ValueError: for an unknown name, or a dtype that is not floating.
    """
    message = f"`{name}` must be a floating dtype, got {value!r}."
    if isinstance(value, str) and value.startswith("mixed_"):
        word = value.removeprefix("mixed_")
        raise ValueError(f"{message[:-1]}, did you mean `dtype=jnp.{word}`?")
    try:
        result = jnp.dtype(value)
    except TypeError:
        raise (ValueError if isinstance(value, str) else TypeError)(message) from None
    if value is None:
        raise TypeError(message)
    if not jnp.issubdtype(result, jnp.floating):
        raise ValueError(message)
    return result


def _write_dtypes(compute: np.dtype | None, param_dtype: np.dtype) -> dict[str, Any]:
    """Returns the keys of a config from which `_read_dtypes` reads the two dtypes back."""
    word = "float32" if compute is None else compute.name
    # Keras mixes float32 with two other dtypes only.
    mixed = [f"mixed_{word}"] if word in ("float16", "bfloat16") else []
    for name in [word, *mixed]:
        policy = {
            "module": "keras",
            "class_name": "DTypePolicy",
            "config": {"name": name},
            "registered_name": None,
        }
        for value in (policy, name):
            if _read_dtypes({"dtype": value}) == {"dtype": compute, "param_dtype": param_dtype}:
                return {"dtype": value}
    return {"dtype": compute and compute.name, "param_dtype": param_dtype.name}


def _read_dtypes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `dtype` and `param_dtype` for the policy under "dtype", in any dialect.

    The policy object "float32", Keras 3's default, is our default: promotion by Flax's rules. Every
    other policy, and the bare string "float32", casts as Keras does.
    """
    policy = config.get("dtype")
    name = policy
    if isinstance(policy, Mapping):
        inner = policy.get("config")
        name = inner.get("name") if isinstance(inner, Mapping) else None
        if not isinstance(name, str):
            raise ValueError(f"`dtype` must be a dtype or a policy with a name, got {policy!r}.")
        if name == "float32":
            name = None
    mixed = isinstance(name, str) and name.startswith("mixed_")
    word = name.removeprefix("mixed_") if mixed else name
    compute = None if word is None else dtype(word, "dtype")
    param_dtype = config.get("param_dtype")
    if param_dtype is None:
        param_dtype = jnp.float32 if mixed or compute is None else compute
    return {"dtype": compute, "param_dtype": dtype(param_dtype, "param_dtype")}


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value
