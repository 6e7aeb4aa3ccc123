"""Slices, crops, pads and moving windows of arrays `(n, *sizes, c)`, and how they are multiplied.

A window is what one tap reads: for each spatial dimension a first position, a number of positions,
and the distance from one to the next.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Reads an image: (position, counts, steps) -> `(n, *counts, c)`.
Reader = Callable[[Sequence[int], Sequence[int], Sequence[int]], jax.Array]


def window(
    x: jax.Array,
    start: Sequence[int],
    counts: Sequence[int],
    steps: Sequence[int],
    channels: int | None = None,
) -> jax.Array:
    """Returns `counts` positions of each spatial dimension, from `start`, `steps` apart.

    Args:
      x: `(n, *sizes, c)`.
      start: the first position of each spatial dimension.
      counts: how many of them.
      steps: the distance from one to the next.
      channels: how many, the first ones; None is all.
    """
    # With a step, a single element of a sharded dimension may be a wrong one (jaxlib 0.10.2 and
    # 0.12.0.1).
    steps = [step if n > 1 else 1 for n, step in zip(counts, steps, strict=True)]
    stop = [s + (n - 1) * step + 1 for s, n, step in zip(start, counts, steps, strict=True)]
    tail = x.shape[len(stop) + 1 :] if channels is None else (channels,)
    if x.shape[1:] == (*counts, *tail):
        return x  # all of it
    zeros, ones = [0 for _ in tail], [1 for _ in tail]
    return lax.slice(x, (0, *start, *zeros), (x.shape[0], *stop, *tail), (1, *steps, *ones))


def moving_window(
    x: jax.Array,
    start: Sequence[Any],
    first: Any = 0,
    images: int | None = None,
    channels: int | None = None,
) -> Reader:
    """Returns a function like `window` of `x`, whose positions count from `start`.

    Args:
      x: `(n, *sizes, c)`.
      start: a position of each spatial dimension, known when the program runs.
      first: the first image, known when the program runs.
      images: how many of them; None is all.
      channels: how many, the first ones; None is all.
    """
    shifted = functools.cache(lambda d, a: start[d] + a)

    def read(at: Sequence[int], counts: Sequence[int], steps: Sequence[int]) -> jax.Array:
        # A slice of its own for each window: XLA would copy one that they share.
        sizes = [(n - 1) * step + 1 for n, step in zip(counts, steps, strict=True)]
        corner = [shifted(d, a) for d, a in enumerate(at)]
        tail = x.shape[len(at) + 1 :] if channels is None else (channels,)
        at_once = x.shape[0] if images is None else images
        y = lax.dynamic_slice(
            x,
            (first, *corner, *[0 for _ in tail]),
            (at_once, *sizes, *tail),
            allow_negative_indices=False,
        )
        return window(y, [0] * len(at), counts, steps)

    return read


def unravel(i: jax.Array, grid: Sequence[int]) -> list[Any]:
    """Returns the position of element `i >= 0` of a grid.

    `jnp.unravel_index` compiles two more loops, each of a single number.
    """
    at: list[Any] = []
    for d, size in reversed(list(enumerate(grid))):
        if size == 1:
            at.append(0)
        elif math.prod(grid[:d]) == 1:
            at.append(i)
        else:
            at.append(lax.rem(i, jnp.asarray(size, i.dtype)))
            i = lax.div(i, jnp.asarray(size, i.dtype))
    return at[::-1]


def crop(
    x: jax.Array,
    first: Sequence[int],
    sizes: Sequence[int],
    more_channels: int = 0,
    zero: jax.Array | None = None,
) -> jax.Array:
    """Returns `sizes` positions of each spatial dimension from `first` on, zeros outside `x`.

    Args:
      x: `(n, *sizes, c)`.
      first: a position of each spatial dimension.
      sizes: how many positions.
      more_channels: how many channels of zeros to add.
      zero: what to pad with, such as `workarounds.zero_within` returns; None is a constant 0.
    """
    dims = list(zip(first, sizes, x.shape[1:-1], strict=True))
    start = [min(max(lo, 0), old) for lo, _, old in dims]
    stop = [min(max(lo + size, at), old) for (lo, size, old), at in zip(dims, start, strict=True)]
    # First the slice, then the pads: a `pad` that crops too makes XLA:CPU pad the whole array.
    if [end - at for at, end in zip(start, stop, strict=True)] != list(x.shape[1:-1]):
        x = lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]))
    pads = [
        (at - lo if at < end else size, lo + size - end if at < end else 0, 0)
        for (lo, size, _), at, end in zip(dims, start, stop, strict=True)
    ]
    if not any(map(any, pads)) and not more_channels:
        return x
    zero = jnp.zeros((), x.dtype) if zero is None else zero
    return lax.pad(x, zero, [(0, 0, 0), *pads, (0, more_channels, 0)])


def pad(x: jax.Array, dim: int, before: int, after: int) -> jax.Array:
    """Returns `x` with zeros before and after it along one dimension; negative numbers crop."""
    if not before and not after:
        return x
    pads = [(before, after, 0) if d == dim else (0, 0, 0) for d in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), pads)


def interleave(parts: Sequence[jax.Array], dim: int, size: int) -> jax.Array:
    """Takes elements along `dim` in turns from each of `parts`, `size` of them in all.

    Args:
      parts: equally shaped but along `dim`, where none is longer than the first.
      dim: the dimension.
      size: that of the result along `dim`; no part is longer than `ceil(size / len(parts))`.
    """
    if len(parts) == 1:
        return parts[0]
    longest = parts[0].shape[dim]
    parts = [pad(part, dim, 0, longest - part.shape[dim]) for part in parts]
    shape = list(parts[0].shape)
    shape[dim] *= len(parts)
    y = jnp.stack(parts, dim + 1).reshape(shape)
    return y if shape[dim] == size else lax.slice_in_dim(y, 0, size, axis=dim)


def weights_of(
    kernel: jax.Array, rank: int, whole: bool
) -> Callable[[tuple[int, ...], Sequence[int]], jax.Array]:
    """Returns a function of a tap and a shape, in which it repeats the weights of the tap.

    Args:
      kernel: `(*sizes, c)`, or `(*sizes, c, m)`; the shapes end in `c` or `c, m` too.
      rank: the number of spatial dimensions.
      whole: whether it is known that each device has all channels. Then the weights of a tap are a
        part of one flat array. As rows `(1, c)` they would need one more operation each: a
        ConvNeXtTiny compiles in 0.9 to 0.97 of the time without. Of sharded channels, a flat array
        would have to be gathered.
    """
    sizes, tail = kernel.shape[:rank], kernel.shape[rank:]
    taps = list(itertools.product(*map(range, sizes)))
    if whole and len(tail) == 1:
        flat = kernel.reshape(-1)
        parts = [flat] if len(taps) == 1 else lax.split(flat, [kernel.shape[-1]] * len(taps))
        of_tap = dict(zip(taps, parts, strict=True))
        return lambda tap, shape: lax.broadcast_in_dim(of_tap[tap], shape, (len(shape) - 1,))
    rows = lax.split(kernel.reshape(len(taps), *tail), [1] * len(taps))
    at = dict(zip(taps, rows, strict=True))

    def weights(tap: tuple[int, ...], shape: Sequence[int]) -> jax.Array:
        last = range(len(shape) - len(tail), len(shape))
        if shape[0] == 1:  # one operation for XLA to compile instead of two
            return lax.broadcast_in_dim(at[tap], shape, (0, *last))
        return lax.broadcast_in_dim(lax.squeeze(at[tap], [0]), shape, last)

    return weights


def repeated(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns `x`, or a copy for each filter if `shape` has one more dimension, `m`."""
    return x if x.shape == shape else lax.broadcast_in_dim(x, shape, range(x.ndim))


def multiply(*factors: jax.Array) -> jax.Array:
    """Multiplies as numpy does, but each broadcast is one operation for XLA to compile, not three.

    It is one operation where no dimension of the factor has size 1, so these are squeezed first.
    """
    shape = jnp.broadcast_shapes(*[y.shape for y in factors])

    def full(y: jax.Array) -> jax.Array:
        if y.shape == shape:
            return y
        ones = [d for d, size in enumerate(y.shape) if size == 1]
        dims = [d + len(shape) - y.ndim for d in range(y.ndim) if d not in ones]
        return lax.broadcast_in_dim(lax.squeeze(y, ones), shape, dims)

    return lax.mul(*map(full, factors))
