"""Kernel gradients: for each tap, a sum over all examples and positions.

A sum over all positions for each channel does not vectorise. So neighbouring positions are summed
up first, for several taps of the kernel in one pass, which leaves a fraction of the array to
reduce.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv._lowering import kernel_gradient_plan as plan
from flax_dwconv._lowering import sums, windows, workarounds


def kernel_gradient(x: jax.Array, g: jax.Array, gradient: plan.KernelGradient) -> jax.Array:
    """Returns the sum over all examples of the convolution of `x` with `g` as the kernel.

    Args:
      x: `(n, *sizes, c)`.
      g: `(n, *kernels, c)`: the cotangent, of the dtype of `x`.
      gradient: the plan.

    Returns:
      `(*outs, c)`.
    """
    if gradient.exchanged:
        y = _passes(g, x, gradient)
        return lax.rev(y, range(y.ndim - 1))
    return _passes(x, g, gradient)


def _passes(x: jax.Array, g: jax.Array, gradient: plan.KernelGradient) -> jax.Array:
    """Computes the gradients pass by pass, and puts them in order."""
    if gradient.crop is not None:
        x = windows.crop(x, *gradient.crop)
    if gradient.loop is None:
        read = functools.partial(windows.window, x)
        y = jnp.stack([_taps(read, g, blocks, gradient) for blocks in gradient.blocks])
    else:
        loop, (blocks,) = gradient.loop, gradient.blocks
        x = windows.crop(x, loop.first, loop.reach)

        def step(i: jax.Array) -> jax.Array:
            i = workarounds.parallel(i) if loop.parallel else i
            corner = windows.unravel(i, gradient.grid)
            start = [a * gap for a, gap in zip(corner, loop.apart, strict=True)]
            return _taps(windows.moving_window(x, start), g, blocks, gradient)

        y = lax.map(step, jnp.arange(math.prod(gradient.grid)))
    grid, taps = gradient.grid, gradient.taps
    tail = y.shape[1 + len(taps) :]
    if any(n > 1 for n in taps[:-1]) and math.prod(grid) > 1:  # else the taps are in order
        pairs = [(d, d + len(grid)) for d in range(len(grid))]
        y = y.reshape(*grid, *taps, *tail)
        y = lax.transpose(y, [*itertools.chain(*pairs), *range(2 * len(grid), y.ndim)])
    y = y.reshape(*[n * m for n, m in zip(grid, taps, strict=True)], *tail)
    return lax.slice(y, [0] * y.ndim, [*gradient.outs, *tail])


def _taps(
    read: windows.Reader,
    g: jax.Array,
    blocks: Sequence[plan.Block],
    gradient: plan.KernelGradient,
) -> jax.Array:
    """Returns `(*taps, c)`: the gradients of the taps of one pass.

    Args:
      read: the image, from the position that the pass counts from.
      g: `(n, *kernels, c)`.
      blocks: what is summed up.
      gradient: the plan.
    """
    taps, tail = gradient.taps, g.shape[len(gradient.taps) + 1 :]
    sums_of: dict[int, jax.Array] = {}
    for block in blocks:
        for tap, y in _block(read, g, block, gradient).items():
            sums_of[tap] = lax.add(sums_of[tap], y) if tap in sums_of else y
    zeros = jnp.zeros(tail, g.dtype)
    y = jnp.stack([sums_of.get(tap, zeros) for tap in range(math.prod(taps))])
    return y.reshape(*taps, *tail)


def _block(
    read: windows.Reader, g: jax.Array, block: plan.Block, gradient: plan.KernelGradient
) -> dict[int, jax.Array]:
    """Returns for each tap `(c,)`: what one block adds to its gradient."""
    steps = [len(reads) for reads in block.reads]
    images = functools.cache(lambda at: read(at, block.counts, block.apart))
    cotangents = functools.cache(lambda at: windows.window(g, at, block.counts, steps))
    shape = (g.shape[0], *block.counts, *g.shape[1 + len(steps) :])
    taps = list(itertools.product(*map(range, gradient.taps)))
    outputs: list[sums.Terms] = [{} for _ in taps]
    for i, reads in enumerate(itertools.product(*block.reads)):
        for terms, tap in zip(outputs, taps, strict=True):
            if all(a in of for a, of in zip(tap, reads, strict=True)):
                dims = [of[a] for a, of in zip(tap, reads, strict=True)]
                at, position = zip(*[(t, p) for p, t in dims], strict=True)
                image = windows.repeated(images(at), shape)
                terms[i // gradient.positions_together, i] = lax.mul(image, cotangents(position))
    some = [i for i, terms in enumerate(outputs) if terms]
    summed = sums.together([outputs[i] for i in some], gradient.row_by_row, shape, g.dtype)
    return {i: y.sum(range(1 + len(steps))) for i, y in zip(some, summed, strict=True)}
