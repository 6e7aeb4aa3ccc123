"""What the four vocabularies share: reading a Keras identifier, and writing an object back as one.

An identifier is a name (`"l2"`), a config dict in the dialect of Keras 3 or of the old tf.keras, a
class, any callable, or None. A vocabulary is a table of names over frozen dataclasses whose fields
are the Keras config; everything else here checks arguments and words the errors.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Refused:
    """The table entry of a name that Keras knows and this library cannot honour."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """One kind of Keras identifier.

    Attributes:
        kind: the word for error messages, such as "regularizer".
        module: the `module` that a serialised object carries.
        names: name -> class, `functools.partial` of a class, function or `Refused`.
        none: what None stands for.
        ignored: config keys that are read and dropped.
        synonyms: (foreign callable, what it is here), used by `serialize` only.
    """

    kind: str
    module: str
    names: Mapping[str, Any]
    none: Any = None
    ignored: frozenset[str] = frozenset()
    synonyms: tuple[tuple[Any, Any], ...] = ()

    def get(self, identifier) -> Any:
        """Returns the callable that `identifier` stands for."""
        identifier = _as_config(identifier, self.names)
        if identifier is None:
            return self.none
        if isinstance(identifier, str):
            return self._build(identifier, {})
        if isinstance(identifier, Mapping):
            return self._build(*self._read(identifier))
        if inspect.isclass(identifier):
            return self._instantiate(identifier)
        if callable(identifier):
            return identifier
        raise TypeError(
            f"{self._complaint()} it must be a name, a config dict or a callable, "
            f"got {show(identifier)}."
        )

    def serialize(self, obj) -> Any:
        """Returns the identifier, made of JSON's types only, from which `get` rebuilds `obj`."""
        obj = self.get(obj)
        obj = next((known for foreign, known in self.synonyms if foreign is obj), obj)
        if obj is None:
            return None
        name = type(obj).__name__
        if self.names.get(name) is type(obj):
            config = {"class_name": name, "config": get_config(obj)}
            return {"module": self.module, **config, "registered_name": None}
        for name, entry in self.names.items():
            if entry is obj:
                return name
        raise ValueError(f"`{self.kind}` must have a Keras name to be serialized, got {show(obj)}.")

    def _complaint(self):
        return f"Could not interpret `{self.kind}` identifier:"

    def _read(self, identifier):
        """Splits a config dict of either dialect into name and arguments."""
        name, config = identifier.get("class_name"), identifier.get("config")
        module = identifier.get("module")
        for key in identifier:
            if key not in _DIALECT:
                raise ValueError(
                    f"{self._complaint()} a config dict has no key {show(key)}"
                    f"{nearest(key, _DIALECT)}"
                )
        if name is None:
            raise ValueError(
                f"{self._complaint()} a config dict needs a 'class_name', got {show(identifier)}."
            )
        if isinstance(name, str) and name == "function" and isinstance(config, str):
            name, config = config, None  # how Keras 3 writes a plain function
        config = {} if config is None else config
        if not isinstance(name, str) or not isinstance(config, Mapping):
            raise TypeError(
                f"{self._complaint()} 'class_name' must be a name and 'config' a dict, "
                f"got {show(identifier)}."
            )
        if not isinstance(module, str | None):
            raise TypeError(f"{self._complaint()} 'module' must be a name, got {show(module)}.")
        if ">" in str(identifier.get("registered_name")):
            raise ValueError(
                f"{self._complaint()} {show(identifier['registered_name'])} is a custom object."
            )
        if module is not None and module.partition(".")[0] not in _KERAS_MODULES:
            raise ValueError(
                f"{self._complaint()} 'module' must be one of Keras's, {show(name)} of another one "
                f"is a custom object, got {show(module)}."
            )
        return name, config

    def _build(self, name, config):
        """Makes what the table holds under `name`, with the arguments in `config`."""
        entry = self.names.get(name)
        if entry is None:
            raise ValueError(f"{self._complaint()} got {show(name)}{nearest(name, self.names)}")
        if isinstance(entry, Refused):
            raise ValueError(f"{self._complaint()} {show(name)} {entry.reason}.")
        is_class = isinstance(entry, type | functools.partial)
        parameters = inspect.signature(entry).parameters if is_class else {}
        renamed = getattr(entry, "renamed", {})
        arguments = {}
        for key, value in config.items():
            key = renamed.get(key, key)
            if key in parameters:
                if key in arguments:
                    raise ValueError(f"`{self.kind}` {name!r} got the argument {key!r} twice.")
                arguments[key] = value
            elif key not in self.ignored:
                raise ValueError(
                    f"`{self.kind}` {name!r} has no argument {show(key)}{nearest(key, parameters)}"
                )
        missing = [
            key
            for key, parameter in parameters.items()
            if parameter.default is parameter.empty and key not in arguments
        ]
        if missing:
            raise ValueError(
                f"`{self.kind}` {name!r} needs a config dict with {_either(missing, 'and')}."
            )
        return entry(**arguments) if is_class else entry

    def _instantiate(self, cls):
        """Keras takes a class for an instance of it with default arguments."""
        try:
            obj = cls()
        except Exception as error:
            raise ValueError(
                f"{self._complaint()} the class {cls.__name__} cannot be made without arguments, "
                "pass an instance."
            ) from error
        if not callable(obj):
            raise TypeError(
                f"{self._complaint()} it must be a name, a config dict or a callable, "
                f"got {show(cls)}."
            )
        return obj


_DIALECT = ("module", "class_name", "config", "registered_name", "build_config", "shared_object_id")
_KERAS_MODULES = ("keras", "tf_keras", "tensorflow", "builtins")


def _as_config(identifier, names):
    """Turns an object or class of an installed Keras into its identifier; leaves the rest alone.

    Keras's own objects compute with Keras's backend, and its initializers take no key.
    """
    module = getattr(identifier, "__module__", None)
    if not isinstance(module, str) or module.partition(".")[0] not in ("keras", "tf_keras"):
        return identifier
    if inspect.isclass(identifier):
        return identifier.__name__
    if inspect.isfunction(identifier) and identifier.__name__ in names:
        # Not its "hard_sigmoid", which is another function in Keras 3 than in Keras 2.
        return identifier if identifier.__name__ == "hard_sigmoid" else identifier.__name__
    if hasattr(identifier, "get_config"):
        return {"class_name": type(identifier).__name__, "config": identifier.get_config()}
    return identifier


def get_config(obj) -> dict[str, Any]:
    """Returns the fields of a vocabulary object as Keras writes them.

    A field with the metadata `optional` is left out while it is None, so that a Keras which does
    not know it yet can read the rest.
    """
    values = {
        field.name: getattr(obj, field.name)
        for field in dataclasses.fields(obj)
        if not (field.metadata.get("optional") and getattr(obj, field.name) is None)
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def spellings(*classes) -> dict[str, type]:
    """Returns {CamelCase: class, snake_case: class} for each class."""
    names = {}
    for cls in classes:
        words = "".join(
            f"_{c}" if c.isupper() and i and cls.__name__[i - 1].islower() else c
            for i, c in enumerate(cls.__name__)
        )
        names |= {cls.__name__: cls, words.lower(): cls}
    return names


# Arguments. Each check returns the value in Python's own types.


def assign(obj, **values) -> None:
    """Stores checked values in a frozen dataclass, from its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(obj, name, value)


_RULES = {
    "finite": lambda v: True,
    "finite non-negative": lambda v: v >= 0,
    "finite positive": lambda v: v > 0,
}


def number(name: str, value, rule: str = "finite") -> float:
    """Checks that a real number, of Python or numpy, obeys a rule of `_RULES`."""
    message = f"`{name}` must be a {rule} number, got {show(value)}."
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(message)
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not (math.isfinite(result) and _RULES[rule](result)):
        raise ValueError(message)
    return result


def integers(name: str, value) -> int | tuple[int, ...]:
    """Checks an int or a non-empty list or tuple of different ints, as axes are given."""
    message = f"`{name}` must be an int or a tuple of different ints, got {show(value)}."
    many = isinstance(value, list | tuple)
    items = tuple(value) if many else (value,)
    if any(isinstance(i, bool) or not isinstance(i, int | np.integer) for i in items):
        raise TypeError(message)
    items = tuple(int(i) for i in items)
    if not items or len(set(items)) < len(items):
        raise ValueError(message)
    return items if many else items[0]


def choice(name: str, value, allowed: Collection[str]) -> str:
    """Checks a word against the allowed ones."""
    message = f"`{name}` must be {_either(allowed)}, got {show(value)}."
    if not isinstance(value, str):
        raise TypeError(message)
    if value not in allowed:
        raise ValueError(message)
    return str(value)


def at_least_float32(x) -> jax.Array:
    """Casts everything but float32 and float64 to float32."""
    x = jnp.asarray(x)
    return x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)


# Words.

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def show(value) -> str:
    """`repr` for an error message: short, and never the values of an array."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        return f"an array of shape {value.shape}"
    try:
        return _SHORT.repr(value)
    except Exception:  # an int of more digits than Python prints, or a broken __repr__
        return f"an object of type {type(value).__name__}"


def nearest(word, known: Collection[str]) -> str:
    """Ends the sentence of an unknown word: with the most similar known one, if any is similar."""
    if isinstance(word, str):
        word = word[:64]
        lower = difflib.get_close_matches(word.lower(), {k.lower() for k in known}, n=1, cutoff=0.5)
        if lower:  # of names that differ in case only, the one in the case of the word
            spelled = [name for name in known if name.lower() == lower[0]]
            close = difflib.get_close_matches(word, spelled, n=1, cutoff=0.0)
            return f", did you mean {close[0]!r}?"
    return "."


def _either(words, conjunction="or"):
    *head, last = [repr(word) for word in words]
    return f"{', '.join(head)} {conjunction} {last}" if head else last
