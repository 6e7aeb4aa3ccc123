"""How a linen layer hands on its penalties: activities add up, weights count once.

Linen knows two things that a layer needs for it, but tells a layer neither: what one `apply` is,
and what became of the layer's variables in a lifted transformation such as `nn.scan`. Both are
found by way of the scope in which `apply` started.
"""

import inspect
import re
import weakref
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta

from flax_dwconv import _layer

# The layers that were called, by the scope in which `apply`, or one run of a scan's body, started.
_CALLED: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def sow(layer: Any, y: jax.Array, parameters: Mapping[str, jax.Array]) -> None:
    """Puts the penalties of a call into the collection "losses".

    Args:
      layer: a bound linen layer.
      y: its result.
      parameters: by name.

    Raises:
      ValueError: if a transformation that Flax lifted loses the penalties, or makes that of a
        weight count more than once.
    """
    if layer.is_initializing() or not layer._penalized:
        return
    scope = layer.scope
    outer = _scope_of_apply(scope)
    if not layer.is_mutable_collection("losses"):
        if outer.is_mutable_collection("losses"):
            raise ValueError(_lost(layer, outer))
        return

    first = _first(outer, scope.path)
    if first and layer.has_variable("losses", layer._penalty_names[0]):
        # Or else a trace that `nn.jit` remembers called the layer, which runs nothing of this file.
        first = _was_given(outer, scope.path)
    if _count(scope, "while_loop"):  # what is mutable there is carried
        first = False
    elif outer is not scope.root:
        scanned = _count(scope, "scan") > 0
        given = [_value(outer, "losses", scope.path, name) for name in layer._penalty_names]
        axes = max((jnp.ndim(value) for value in given if value is not None), default=None)
        if scanned and axes is not None and axes < _stacks(scope):  # carried, or broadcast
            first = False
        elif _shares_weights(layer, outer) and (axes is not None or _is_stacked(layer, outer)):
            raise ValueError(_shared(layer))
        elif scanned and axes is not None:  # a slice of what was given: every step starts anew
            first = _first(scope.root, scope.path)
    for name, value in layer._penalties(y, parameters).items():
        layer.sow(
            "losses",
            name,
            value,
            init_fn=lambda: jnp.float32(0),
            # What there is before the first call is what an earlier `apply` returned.
            reduce_fn=(lambda old, new: new) if first else _layer.reduction(name),
        )


def _scope_of_apply(scope: Any) -> Any:
    """Returns the scope in which `apply` started; within a lifted transformation it is another one.

    Flax says nowhere what was lifted. But the module that a transformation was applied to is being
    called, so that Python's stack has it, as the `self` of a method.
    """
    frame = inspect.currentframe() if _is_lifted(scope.root) else None
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and module.scope is not None:
            if not _is_lifted(module.scope.root):
                return module.scope.root
        frame = frame.f_back
    return scope.root


def _is_lifted(scope: Any) -> bool:
    return any("(" in name for name in scope.debug_path)


def _count(scope: Any, transformation: str) -> int:
    """Returns how many transformations of a kind surround a scope, whose path names them."""
    return sum(name.count(f"{transformation}(") for name in scope.debug_path)


def _first(scope: Any, path: tuple[Any, ...]) -> bool:
    """Returns whether this is asked for the first time of a scope and a path."""
    paths = _CALLED.setdefault(scope, set())
    new = path not in paths
    paths.add(path)
    return new


def _was_given(root: Any, path: tuple[Any, ...]) -> bool:
    """Returns whether `apply` got penalties of a layer, or True where that cannot be told.

    A scope does not keep what it started from. The function of Flax that made it still has it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_locals.get("root") is root:
            values = frame.f_locals.get("variables", {}).get("losses", {})
            for key in path:
                values = values.get(key, {})
            return bool(values)
        frame = frame.f_back
    return True  # by `bind`


def _value(scope: Any, collection: str, path: tuple[Any, ...], name: str) -> Any:
    """Returns a variable of a root scope, or None."""
    values: Any = scope.variables().get(collection, {})
    for key in (*path, name):
        values = values.get(key) if isinstance(values, Mapping) else None
    return meta.unbox(values)


def _stacks(scope: Any) -> int:
    """Returns along how many axes the variables of a layer may be stacked."""
    return _count(scope, "scan") + _count(scope, "vmap")


def _shares_weights(layer: Any, outer: Any) -> bool:
    """Returns whether a scan or a vmap has one and the same penalized weight each time."""
    for name in layer._penalized:
        if name != "activity":
            whole = _value(outer, "params", layer.scope.path, name)
            own = meta.unbox(layer.get_variable("params", name))
            # Not so below `nn.map_variables`, which may make any shape of another.
            if whole is not None and 0 <= jnp.ndim(whole) - jnp.ndim(own) < _stacks(layer.scope):
                return True
    return False


def _is_stacked(layer: Any, outer: Any) -> bool:
    """Returns whether a transformation that shares weights stacks the penalties all the same.

    `nn.scan` runs its body twice. What the first run sows in a collection that is broadcast, the
    second run finds. `nn.vmap` runs its body once.
    """
    names = [f"{name}_penalty" for name in layer._penalized if name != "activity"]
    if any(layer.has_variable("losses", name) for name in names):
        return False
    once = _first(outer, ("sharing", *layer.scope.path))
    return not (once and _count(layer.scope, "scan") > 0)


def _lost(layer: Any, outer: Any) -> str:
    if _shares_weights(layer, outer):
        advice = _advice(layer)
    elif _count(layer.scope, "map_variables"):
        advice = 'Write `mapped_collections="params"`, or penalize the weights outside.'
    elif _count(layer.scope, "while_loop"):
        advice = f'Write `carry_variables="losses"`, {_zeros(layer)}'
    else:
        advice = 'Tell it of the collection too, for instance by `variable_axes={"losses": 0}`.'
    return f"{_who(layer)} would be lost. {advice}"


def _shared(layer: Any) -> str:
    return f"{_who(layer)} would count every time, for weights that are the same. {_advice(layer)}"


def _who(layer: Any) -> str:
    lifted = re.findall(r"(\w+)\(", "/".join(layer.scope.debug_path))
    path = "/".join(layer.scope.path)
    return (
        f"In {' and '.join(f'`nn.{name}`' for name in lifted)}, the penalties of "
        f"`{type(layer).__name__}`{path and f' {path!r}'}"
    )


def _advice(layer: Any) -> str:
    """Returns what to do about penalties of weights that are the same each time."""
    if not _count(layer.scope, "scan"):
        return "Let the layer see the whole batch, or penalize the weights outside."
    if "activity" not in layer._penalized:
        return 'Write `variable_broadcast=["params", "losses"]`.'
    return f'Write `variable_carry="losses"`, {_zeros(layer)}'


def _zeros(layer: Any) -> str:
    zeros: Any = dict.fromkeys(layer._penalty_names, 0.0)
    for key in reversed(layer.scope.path):
        zeros = {key: zeros}
    return f'and give `apply` zeros to start from: "losses": {zeros}.'
