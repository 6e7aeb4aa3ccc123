"""Sums of terms: one output as a tree of rows, several outputs in one loop."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv._lowering import workarounds

# What is summed up for one output: {tap: product}, or for a tap's gradient {(group, position):
# product}. A "row" is the terms whose keys agree but for the last number: a row of the kernel, or a
# group of positions.
Terms = dict[tuple[int, ...], jax.Array]


def tree(terms: Terms, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Sums up each row in order, and then the rows as a tree.

    In one chain of 49 additions each waits for the one before. `lax.add` traces in 0.4 of the time
    that `+` takes, which counts here.

    Args:
      terms: all of one shape; none gives zeros.
      shape: that of the terms.
      dtype: that of the terms.
    """
    rows: dict[tuple[int, ...], jax.Array] = {}
    for tap, term in terms.items():
        row = tap[:-1]
        rows[row] = lax.add(rows[row], term) if row in rows else term
    sums = list(rows.values()) or [jnp.zeros(shape, dtype)]
    while len(sums) > 1:
        pairs = [lax.add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=False)]
        sums = pairs + sums[2 * len(pairs) :]
    return sums[0]


def together(
    outputs: Sequence[Terms], sums_each: int, shape: tuple[int, ...], dtype: Any
) -> list[jax.Array]:
    """Sums up the terms of each output, all in one loop, which loads once what they share.

    Args:
      outputs: the terms of each output.
      sums_each: 0, if each output is a tree of its own. Else each row of all outputs is summed up
        before the next row, and each output has so many sums, which get its terms in turns.
      shape: that of every term.
      dtype: that of every term.
    """
    if len(outputs) == 1:
        return [tree(outputs[0], shape, dtype)]
    if sums_each:
        sums = _row_by_row(outputs, sums_each, shape, dtype)
    else:
        sums = [tree(terms, shape, dtype) for terms in outputs]
    return workarounds.one_loop(sums)


def along(arrays: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """Sums up each of several arrays along one axis, all in one loop over the other axes.

    For XLA that is one operation, however many products it adds. LLVM unrolls it, and then
    vectorises the loop around it, over channels, if that makes at most about 300 instructions. The
    plan keeps within that, see `unrolled_products` in `Tuning`. With more, a sum takes 2 to 4 times
    as long.

    Args:
      arrays: all of one shape; two or more. XLA would make the sum of a single array and one over
        other axes after it a single sum, which does not vectorise.
      axis: the axis.
    """
    zeros = tuple(jnp.zeros((), y.dtype) for y in arrays)
    return list(lax.reduce(tuple(arrays), zeros, lambda a, b: tuple(map(lax.add, a, b)), (axis,)))


def _row_by_row(
    outputs: Sequence[Terms], sums_each: int, shape: tuple[int, ...], dtype: Any
) -> list[jax.Array]:
    """Sums up the terms of each output so that all outputs grow together.

    The first output waits, after each row, for the others.
    """
    sums: list[Any] = [None] * (sums_each * len(outputs))
    turns = [itertools.cycle(range(i, len(sums), len(outputs))) for i in range(len(outputs))]
    for row in dict.fromkeys(tap[:-1] for terms in outputs for tap in terms):
        others = [y for y in sums[1:] if y is not None]
        if sums[0] is not None and others:
            sums[0] = workarounds.after(sums[0], others)
        for terms, turn in zip(outputs, turns, strict=True):
            for term in [term for tap, term in terms.items() if tap[:-1] == row]:
                i = next(turn)
                sums[i] = term if sums[i] is None else lax.add(sums[i], term)
    found = [[y for y in sums[i :: len(outputs)] if y is not None] for i in range(len(outputs))]
    return [functools.reduce(lax.add, of) if of else jnp.zeros(shape, dtype) for of in found]
