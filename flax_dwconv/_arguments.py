"""Checks of the arguments of a layer, and hints for names that are no arguments."""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_dwconv import _config, _geometry, activations


def canonical(field: dataclasses.Field[Any], value: Any) -> Any:
    """Returns what a user's value of an argument stands for, or raises an error that names it."""
    name = field.name
    if name == "activation":
        return _activation(value)
    room = _config.vocabulary(name)
    if room is not None:
        if value is None and field.default is not None:
            value = field.default  # an initializer: None is Keras's default
        return room.get(value, name)
    return _CHECKS[name](value, name)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be a bool, got {value!r}.")
    return bool(value)


def _activation(value: Any) -> Any:
    """Returns the name of an activation that has one: it prints and compares better.

    A callable stays what it is if its name stands for another function of the same values: whoever
    passes `jax.nn.relu` finds that in the jaxpr, and not the `relu` of this package.
    """
    function = activations.VOCABULARY.get(value, "activation")
    try:
        name = activations.serialize(function)
    except ValueError:
        return function
    return name if isinstance(name, str) and activations.get(name) is function else function


_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "depth_multiplier": _geometry.positive_int,
    "filters": _geometry.positive_int,
    "use_bias": _flag,
    "dtype": lambda v, name: None if v is None else _config.dtype(v, name),
    "param_dtype": _config.dtype,
    "precision": lambda v, name: _geometry.precision(v),
    "method": lambda v, name: _geometry.check_method(v),
}

# What people write who come from other layers -> what it is called here.
_MEANT = {
    "kernel_initializer": "depthwise_initializer",
    "kernel_init": "depthwise_initializer",
    "kernel_regularizer": "depthwise_regularizer",
    "kernel_constraint": "depthwise_constraint",
    "bias_init": "bias_initializer",
    "kernel_dilation": "dilation_rate",
    "dilation": "dilation_rate",
    "stride": "strides",
    "multiplier": "depth_multiplier",
    "channel_multiplier": "depth_multiplier",
    "bias": "use_bias",
    "features": "filters",
    "out_features": "filters",
}


def with_hints(init: Callable[..., None]) -> Callable[..., None]:
    """Makes a constructor answer an unknown, missing or positional argument with a hint."""
    _, *parameters = inspect.signature(init).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return init  # of a subclass, which hands them on to ours
    known = [p.name for p in parameters]
    nameless = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in parameters if p.default is p.empty]

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        for word in kwargs:
            if word not in known:
                close = difflib.get_close_matches(word, known, 1)
                meant = [_MEANT[word]] if _MEANT.get(word) in known else close
                hint = f", did you mean `{meant[0]}`?" if meant else "."
                if _MEANT.get(word, word) == "filters" and not meant:
                    hint += " It has `depth_multiplier` results for each channel of its input."
                raise TypeError(f"`{name}` has no argument `{word}`{hint}")
        if len(args) > len(nameless):
            raise TypeError(
                f"`{name}` takes {', '.join(f'`{n}`' for n in nameless)} without their names and "
                f"everything else by name, got {len(args)} arguments without a name."
            )
        missing = [n for n in required if n not in kwargs and n not in nameless[: len(args)]]
        if missing:
            raise TypeError(f"`{name}` needs the argument `{missing[0]}`.")
        init(self, *args, **kwargs)

    return wrapper
