"""Keras's config dialects: a layer's settings as the dicts that Keras 2 and 3 write, in and out.

A config is the dict of settings, or a whole one that wraps it with "class_name" and, in Keras 3,
"module" and "registered_name". The dialects differ in three places:

    "hard_sigmoid"    Keras 2's clip(0.2 x + 0.5, 0, 1), or Keras 3's relu6(x + 3) / 6
    "dtype"           a name in Keras 2, a policy object in Keras 3
    other keys        "groups" is Keras 2's mark, "registered_name" that of Keras 3
"""

import inspect
import warnings
from collections.abc import Collection, Mapping, Sequence
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
    config: Any,
    class_name: str,
    arguments: Sequence[str],
    required: Sequence[str],
    customs: "Customs",
) -> dict[str, Any]:
    """Returns the constructor's arguments that a config of any dialect stands for, and `name`.

    Args:
      config: the settings, or a dict with "class_name" and "config".
      class_name: Keras's name of the layer.
      arguments: those of the layer.
      required: those of them that have no default.
      customs: what is not Keras's.

    Raises:
      TypeError: if something is not a dict, or the name neither a string nor None.
      ValueError: for another class, an unknown key, if a required one is missing, or for an
        activation that is neither Keras's nor in `customs`.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"`config` must be a dict, got {type(config).__name__}.")
    settings, whole = config, {}
    if "class_name" in config and "config" in config:
        settings, whole = config["config"], config
        of_keras = whole["class_name"] == class_name and is_of_keras(whole)
        if not of_keras and class_name not in [base.__name__ for base in customs.bases(whole)]:
            names = " of ".join(repr(whole[k]) for k in ("class_name", "module") if k in whole)
            name, offer = whole["class_name"], ""
            if not is_of_keras(whole):
                offer = (
                    f" `custom_objects={{{name!r}: flax_dwconv.{class_name}}}` reads it as that."
                )
            raise ValueError(f"`config` must be of Keras's {class_name}, got {names}.{offer}")
        if not isinstance(settings, Mapping):
            raise TypeError(f"`config` must be a dict, got {type(settings).__name__}.")
    settings = dict(settings)
    if settings.get("activation") == "hard_sigmoid" and _is_of_keras_3(settings, whole):
        settings["activation"] = jax.nn.hard_sigmoid
    by_hand = not whole and "trainable" not in settings
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
    for argument in arguments:
        if argument in settings:
            settings[argument] = customs.identifier(
                settings[argument], argument, settings.get("name"), by_hand
            )
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


class Customs:
    """What the names of a user's own objects stand for, as Keras's `custom_objects` say it.

    A trained layer computes the same whatever initialized, penalized or constrained its weights:
    an initializer, regularizer or constraint that `custom_objects` lacks is read as None.

    Args:
      custom_objects: {name: object or None}; None is no object at all.

    Raises:
      TypeError: if it is no such dict.
    """

    def __init__(self, custom_objects: Mapping[str, Any] | None) -> None:
        if not isinstance(custom_objects, Mapping | None):
            kind = type(custom_objects).__name__
            raise TypeError(f"`custom_objects` must be a dict, got {kind}.")
        self._objects = dict(custom_objects or {})
        # "`argument` 'name of an object'" -> the layers in which it was read as None.
        self._dropped: dict[str, list[str]] = {}

    def named(self, words: Sequence[str]) -> list[Any]:
        """Returns the object that one of the words stands for, in a list, or an empty list."""
        return [self._objects[word] for word in words if word in self._objects][:1]

    def bases(self, node: Mapping[str, Any]) -> list[type]:
        """Returns the class that stands for that of a serialized object, and its bases."""
        classes = self.named(words_of(node, ()))
        return [base for cls in classes for base in getattr(cls, "__mro__", ())]

    def identifier(self, value: Any, argument: str, layer: str | None, by_hand: bool) -> Any:
        """Returns the identifier to read instead of the one that a config has for an argument.

        Args:
          value: in the config.
          argument: of the layer, such as "bias_regularizer".
          layer: the name of the layer.
          by_hand: whether a person may have written the config. Then a name without a package that
            resembles one of Keras's is a slip.

        Raises:
          TypeError: if what `custom_objects` has cannot be made from the config.
          ValueError: for an activation that is neither Keras's nor in `custom_objects`, or a slip.
        """
        room = vocabulary(argument)
        words = [] if room is None else words_of(value, room.names)
        if room is None or not words:
            return value
        for obj in self.named(words):
            if not inspect.isclass(obj):
                return obj
            config = value.get("config") if isinstance(value, Mapping) else None
            config = config if isinstance(config, Mapping) else {}
            return obj.from_config(config) if hasattr(obj, "from_config") else obj(**config)
        if argument == "activation":
            try:
                return room.get(value, argument)
            except (TypeError, ValueError) as error:
                line = f"`custom_objects={{{words[-1]!r}: ...}}` says what it stands for."
                raise type(error)(f"{error} {line}") from None
        nameless = isinstance(value, str) or is_of_keras(value)
        if by_hand and nameless and room.hint(words[-1]) != ".":
            return value  # for the error that shows the nearest name
        name = "the layer" if layer is None else repr(layer)
        self._dropped.setdefault(f"`{argument}` {words[-1]!r}", []).append(name)
        return None

    def warn(self, stacklevel: int = 3) -> None:
        """Warns once of all that was read as None."""
        if self._dropped:
            found = [
                f"{what} of {', '.join(layers[:3])}"
                + (f" and {len(layers) - 3} other layers" if len(layers) > 3 else "")
                for what, layers in self._dropped.items()
            ]
            warnings.warn(
                f"Read as None, which changes nothing that a trained layer computes: "
                f"{'; '.join(found)}. `custom_objects={{name: object}}` says what they stand for.",
                stacklevel=stacklevel,
            )


def words_of(value: Any, names: Collection[str]) -> list[str]:
    """Returns the words by which users may name their own object in a config.

    Args:
      value: a name, or a serialized object.
      names: those of Keras's objects.

    Returns:
      The name under which it is registered, if it is, and that of its class or function. Nothing
      for an object of Keras's, or for what is no object.
    """
    if isinstance(value, str):
        return [] if value in names or not value else [value]
    if not isinstance(value, Mapping):
        return []
    name = value.get("config" if value.get("class_name") == "function" else "class_name")
    if not isinstance(name, str):
        return []
    if name in names and (is_of_keras(value) or value.get("module") == "builtins"):
        return []
    registered = value.get("registered_name")
    return [registered, name] if isinstance(registered, str) and registered != name else [name]


def _policy(value: Any) -> Any:
    """Returns the policy that counts: of a map, which has one for each name, the default."""
    if not isinstance(value, Mapping) or value.get("class_name") != "DTypePolicyMap":
        return value
    inner = value.get("config")
    default = inner.get("default_policy") if isinstance(inner, Mapping) else value
    return {"config": {"name": default}} if isinstance(default, str) else default


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
    policy = _policy(config.get("dtype"))
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
