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
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Identifier = str | Mapping[str, Any] | Callable[..., Any] | type | None

# The top-level packages whose objects are Keras's: of an installed Keras, and in a config.
KERAS = ("keras", "tf_keras")
KERAS_IN_CONFIGS = (*KERAS, "tensorflow")


@dataclasses.dataclass(frozen=True)
class Refused:
    """The table entry of a name that Keras knows and this library cannot honour.

    Attributes:
        reason: the end of the sentence "got NAME, which ...".
    """

    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """One kind of Keras identifier.

    Attributes:
        kind: the word for error messages, such as "regularizer".
        module: the `module` that a serialized object carries.
        names: name -> class, `functools.partial` of a class, function or `Refused`.
        none: what None stands for.
        ignored: config keys that are read and dropped.
        synonyms: (foreign callable, what it is here), used by `serialize` only.
        slips: what people write for a name, squashed as by `_squash` and without the kind -> the
            name. Used for the hint of an error message only.
        number: the class that a bare number was probably meant for: of the hint only.
        array: makes the object that an array stands for, of the array and the argument's name; None
            where an array is no identifier.
    """

    kind: str
    module: str
    names: Mapping[str, Any]
    none: Any = None
    ignored: frozenset[str] = frozenset()
    synonyms: tuple[tuple[Any, Any], ...] = ()
    slips: Mapping[str, str] = dataclasses.field(default_factory=dict)
    number: type | None = None
    array: Callable[[Any, str], Any] | None = None

    def get(self, identifier: Any, argument: str | None = None) -> Any:
        """Returns the callable that an identifier stands for.

        Args:
            identifier: an `Identifier`, or an array in a vocabulary that has a meaning for it.
            argument: what error messages call the identifier, such as "depthwise_regularizer";
                None is the kind.

        Returns:
            The object; what `none` is, for None; a callable that is neither Keras's nor a class,
            unchanged.

        Raises:
            TypeError: the identifier, or an argument inside, is of another type.
            ValueError: a name is unknown, or a value not allowed.
        """
        argument = argument or self.kind
        identifier = _as_config(identifier, self.names)
        if identifier is None:
            return self.none
        if isinstance(identifier, str):
            return self._build(argument, identifier, {})
        if isinstance(identifier, Mapping):
            return self._build(argument, *_read(argument, identifier))
        if self.array is not None and isinstance(identifier, np.ndarray | jax.Array):
            return self.array(identifier, argument)
        obj = _instance(argument, identifier) if inspect.isclass(identifier) else identifier
        if not callable(obj):
            raise TypeError(
                f"{_complaint(argument)} it must be a name, a config dict or a callable, "
                f"got {show(identifier)}{self._meant_by_number(identifier)}"
            )
        return obj

    def serialize(self, obj: Any, argument: str | None = None) -> Any:
        """Returns the identifier, made of JSON's types only, from which `get` rebuilds an object.

        Args:
            obj: anything that `get` takes.
            argument: as for `get`.

        Returns:
            None, a name, or a config dict in the dialect of Keras 3.

        Raises:
            TypeError: `get` does not take it.
            ValueError: nor that, or it has no Keras name.
        """
        argument = argument or self.kind
        obj = self.get(obj, argument)
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
        raise ValueError(f"`{argument}` must have a Keras name to be serialized, got {show(obj)}.")

    def hint(self, name: str) -> str:
        """Ends the sentence of an unknown name, as `nearest` does."""
        stem = _squash(name).removesuffix(self.kind)  # "l2_regularizer" is "l2"
        return nearest(name, self.names, self.slips.get(stem, stem))

    def _build(self, argument: str, name: str, config: Mapping[str, Any]) -> Any:
        """Makes what the table holds under `name`, with the arguments in `config`."""
        entry = self.names.get(name)
        if entry is None:
            raise ValueError(f"{_complaint(argument)} got {show(name)}{self.hint(name)}")
        if isinstance(entry, Refused):
            raise ValueError(f"{_complaint(argument)} got {show(name)}, which {entry.reason}.")
        is_class = isinstance(entry, type | functools.partial)
        parameters = inspect.signature(entry).parameters if is_class else {}
        renamed = getattr(entry, "renamed", {})
        arguments = {}
        for key, value in config.items():
            key = renamed.get(key, key)
            if key in parameters:
                if key in arguments:
                    raise ValueError(f"`{argument}` {name!r} got the argument {key!r} twice.")
                arguments[key] = value
            elif key not in self.ignored:
                hint = nearest(key, parameters)
                raise ValueError(f"`{argument}` {name!r} has no argument {show(key)}{hint}")
        missing = [
            key
            for key, parameter in parameters.items()
            if parameter.default is parameter.empty and key not in arguments
        ]
        if missing:
            raise ValueError(
                f"`{argument}` {name!r} needs a config dict with {_join(missing, 'and')}."
            )
        if not is_class:
            return entry
        try:
            return entry(**arguments)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"`{argument}`: {error}") from None

    def _meant_by_number(self, value: Any) -> str:
        """Ends the sentence about a value that is no identifier: for a number, with the object."""
        if self.number is not None:
            try:
                self.number(value)
            except (TypeError, ValueError):
                pass
            else:
                return f", did you mean `{self.number.__name__}({float(value)})`?"
        return "."


_DIALECT = ("module", "class_name", "config", "registered_name", "build_config", "shared_object_id")


def _complaint(argument: str) -> str:
    return f"Could not interpret `{argument}` identifier:"


def _read(argument: str, identifier: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Splits a config dict of either dialect into name and arguments."""
    complaint = _complaint(argument)
    name, config = identifier.get("class_name"), identifier.get("config")
    module = identifier.get("module")
    for key in identifier:
        if key not in _DIALECT:
            hint = nearest(key, _DIALECT)
            raise ValueError(f"{complaint} a config dict has no key {show(key)}{hint}")
    if name is None:
        raise ValueError(f"{complaint} a config dict needs a 'class_name', got {show(identifier)}.")
    if isinstance(name, str) and name == "function" and isinstance(config, str):
        name, config = config, None  # how Keras 3 writes a plain function
    config = {} if config is None else config
    if not isinstance(name, str) or not isinstance(config, Mapping):
        raise TypeError(
            f"{complaint} 'class_name' must be a name and 'config' a dict, got {show(identifier)}."
        )
    if not isinstance(module, str | None):
        raise TypeError(f"{complaint} 'module' must be a name, got {show(module)}.")
    if ">" in str(identifier.get("registered_name")):
        registered = show(identifier["registered_name"])
        raise ValueError(f"{complaint} got {registered}, which is a custom object.")
    # Keras 3 writes "builtins" as the module of a plain function.
    if module is not None and module.partition(".")[0] not in (*KERAS_IN_CONFIGS, "builtins"):
        raise ValueError(
            f"{complaint} 'module' must be one of Keras's, {show(name)} of another one "
            f"is a custom object, got {show(module)}."
        )
    return name, config


def _instance(argument: str, cls: type) -> Any:
    """Makes an instance with default arguments: for Keras, a class stands for it."""
    try:
        return cls()
    except Exception as error:
        raise ValueError(
            f"{_complaint(argument)} got the class {cls.__name__}, which cannot be made without "
            "arguments: pass an instance."
        ) from error


def _as_config(identifier: Any, names: Collection[str]) -> Any:
    """Turns an object or class of an installed Keras into its identifier; leaves the rest alone.

    Keras's own objects compute with Keras's backend, and its initializers take no key.
    """
    module = getattr(identifier, "__module__", None)
    if not isinstance(module, str) or module.partition(".")[0] not in KERAS:
        return identifier
    if inspect.isclass(identifier):
        return identifier.__name__
    if inspect.isfunction(identifier) and identifier.__name__ in names:
        # Not its "hard_sigmoid", which is another function in Keras 3 than in Keras 2.
        return identifier if identifier.__name__ == "hard_sigmoid" else identifier.__name__
    if hasattr(identifier, "get_config"):
        return {"class_name": type(identifier).__name__, "config": identifier.get_config()}
    return identifier


def get_config(obj: Any) -> dict[str, Any]:
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


def spellings(*classes: type) -> dict[str, type]:
    """Returns {CamelCase: class, snake_case: class} for each class."""
    names = {}
    for cls in classes:
        words = "".join(
            f"_{c}" if c.isupper() and i and cls.__name__[i - 1].islower() else c
            for i, c in enumerate(cls.__name__)
        )
        names |= {cls.__name__: cls, words.lower(): cls}
    return names


def is_of_keras(node: Mapping[str, Any]) -> bool:
    """Whether a serialized object is Keras's: its module is, or it has none, as in old configs.

    A custom one has another module, or none and a registered name "package>Name".
    """
    module = node.get("module")
    if ">" in str(node.get("registered_name")):
        return False
    top = module.partition(".")[0] if isinstance(module, str) else module
    return top is None or top in KERAS_IN_CONFIGS


# Arguments. Each check returns the value in Python's own types.


def assign(obj: object, **values: Any) -> None:
    """Stores checked values in a frozen dataclass, from its `__post_init__`."""
    for name, value in values.items():
        object.__setattr__(obj, name, value)


Rule = Literal["finite", "finite non-negative", "finite positive"]

_RULES: dict[Rule, Callable[[float], bool]] = {
    "finite": lambda v: True,
    "finite non-negative": lambda v: v >= 0,
    "finite positive": lambda v: v > 0,
}


def number(name: str, value: Any, rule: Rule = "finite") -> float:
    """Checks that a real number, of Python or numpy, obeys a rule."""
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


def integers(name: str, value: Any) -> int | tuple[int, ...]:
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


def real_array(name: str, value: Any) -> np.ndarray:
    """Checks an array of real numbers, and returns a copy that nobody can write to."""
    message = f"`{name}` must be an array of real numbers, got {show(value)}"
    if isinstance(value, jax.core.Tracer):
        raise TypeError(f"{message}, which is traced.")
    if not isinstance(value, np.ndarray | jax.Array):
        raise TypeError(f"{message}.")
    if not any(jnp.issubdtype(value.dtype, kind) for kind in (np.integer, np.floating)):
        raise TypeError(f"{message} of dtype {value.dtype}.")
    copy = np.array(value)
    copy.flags.writeable = False
    return copy


def choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """Checks a word against the allowed ones."""
    message = f"`{name}` must be {_join(allowed, 'or')}, got {show(value)}."
    if not isinstance(value, str):
        raise TypeError(message)
    if value not in allowed:
        raise ValueError(message)
    return str(value)


def at_least_float32(x: ArrayLike) -> jax.Array:
    """Casts everything but float32 and float64 to float32."""
    x = jnp.asarray(x)
    return x if x.dtype in (jnp.float32, jnp.float64) else x.astype(jnp.float32)


def in_float32(f: Callable[[jax.Array], jax.Array]) -> Callable[[ArrayLike], jax.Array]:
    """Computes `f` in float32 at least, and returns the dtype of the argument."""

    @functools.wraps(f)
    def wrapped(x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        return f(at_least_float32(x)).astype(x.dtype)

    return wrapped


# Words.

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def show(value: Any) -> str:
    """`repr` for an error message: short, and never the values of an array."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        return f"an array of shape {value.shape}"
    try:
        return _SHORT.repr(value)
    except Exception:  # an int of more digits than Python prints, or a broken __repr__
        return f"an object of type {type(value).__name__}"


def nearest(word: Any, known: Collection[str], meant: str | None = None) -> str:
    """Ends the sentence of an unknown word: with the most similar known one, if any is similar.

    Args:
        word: what was written; anything but a string is similar to nothing.
        known: the words to choose from.
        meant: what to compare instead of `word`.

    Returns:
        A full stop, or ", did you mean 'l2'?".
    """
    if not isinstance(word, str):
        return "."
    spelled: dict[str, list[str]] = {}
    for name in known:
        spelled.setdefault(_squash(name), []).append(name)
    squashed = _squash(word if meant is None else meant)
    similar = difflib.get_close_matches(squashed, spelled, n=1, cutoff=0.5)
    if not similar:
        return "."
    # Of several spellings the one that differs in case only ("L1_L2" is "l1_l2", not "L1L2"), else
    # CamelCase for CamelCase, else the one most like the word.
    names = spelled[similar[0]]
    names = (
        [name for name in names if name.lower() == word.lower()]
        or [name for name in names if name.islower() == word.islower()]
        or names
    )
    (name,) = difflib.get_close_matches(word[:_LONGEST_WORD], names, n=1, cutoff=0.0)
    return f", did you mean {name!r}?"


_LONGEST_WORD = 64  # what is compared of a word: difflib takes the square of its length


def _squash(word: str) -> str:
    """A word without what its spellings differ in: case, `_`, `-` and spaces."""
    return "".join(c for c in word[:_LONGEST_WORD].lower() if c not in "_- ")


def _join(words: Collection[str], conjunction: Literal["and", "or"]) -> str:
    *head, last = [repr(word) for word in words]
    return f"{', '.join(head)} {conjunction} {last}" if head else last
