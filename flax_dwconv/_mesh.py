"""Meshes with explicit axes, which are what `jax.make_mesh` makes unless it is told otherwise.

There JAX keeps the sharding of every array in its type, and most operations must know how their
result is sharded. JAX has no rule for a convolution of sharded channels, and none for its
transposes. We do know how our results are sharded. So we compute with those axes automatic, which
leaves the inside to XLA, and name the sharding of each result.

`jax.shard_map` over these axes would leave XLA nothing to partition. But under a `vmap` over a
sharded axis it raises an error in JAX (0.10.2 and 0.12.0.1).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

# How one axis of an array is sharded: over no axis of the mesh, over one, or over several.
Part = str | tuple[str, ...] | None
# (shape, parts) of a result.
Result = tuple[Sequence[Any], Sequence[Part]]


def on_automatic_axes(
    f: Callable[..., Any], results: Callable[..., Any], *operands: jax.Array
) -> Any:
    """Returns `f(*operands)`, computed with the explicit axes of their mesh automatic.

    Without a mesh, or with one that has no explicit axes, it is a plain call, which leaves nothing
    in the program.

    Args:
      f: a function of the operands, with one result or a list of them.
      results: called with the parts of each operand, one for each of its axes; returns the shape of
        the result of `f` and its parts, or a list of such pairs. An axis that does not divide
        evenly, and one whose part of the mesh an earlier axis has, is not sharded.
      *operands: arrays, of which some may have no mesh.
    """
    shardings = [jax.typeof(operand).sharding for operand in operands]
    mesh = next((sharding.mesh for sharding in shardings if not sharding.mesh.empty), None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return f(*operands)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    parts = [
        (*sharding.spec, *[None] * (operand.ndim - len(sharding.spec)))
        for operand, sharding in zip(operands, shardings, strict=True)
    ]
    found = results(*parts)
    if isinstance(found, list):
        out = [_sharding(mesh, result) for result in found]
    else:
        out = _sharding(mesh, found)
    return jax.sharding.auto_axes(f, axes=explicit, out_sharding=out)(*operands)


def _sharding(mesh: AbstractMesh, result: Result) -> NamedSharding:
    """Returns the sharding with these parts, as far as the shape and the mesh allow them."""
    spec: list[Part] = []
    taken: set[str] = set()
    for size, part in zip(*result, strict=True):
        names = _names(part)
        pieces = math.prod(mesh.shape[name] for name in names)
        fits = isinstance(size, int) and size % pieces == 0 and taken.isdisjoint(names)
        spec.append(part if fits else None)
        taken.update(names if fits else ())
    return NamedSharding(mesh, PartitionSpec(*spec))


def _names(part: Part) -> tuple[str, ...]:
    return () if part is None else (part,) if isinstance(part, str) else tuple(part)
