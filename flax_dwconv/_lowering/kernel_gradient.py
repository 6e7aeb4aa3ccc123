"""Kernel gradients: for each tap, a sum over all examples and positions.

A sum over all positions for each channel does not vectorise. So neighbouring positions are summed
up first, for several taps of the kernel in one pass, which leaves a fraction of the array to
reduce.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

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
    tail = g.shape[len(gradient.taps) + 1 :]
    added: dict[tuple[int, ...], list[jax.Array]] = {}
    for _, alike in itertools.groupby(sorted(blocks, key=_counts), _counts):
        for tap, y in _loop(read, g, list(alike), gradient).items():
            added.setdefault(tap, []).append(y)
    zeros = [jnp.zeros(tail, g.dtype)]
    parts = [added.get(tap, zeros) for tap in itertools.product(*map(range, gradient.taps))]
    y = jnp.stack([functools.reduce(lax.add, some) for some in parts])
    return y.reshape(*gradient.taps, *tail)


def _counts(block: plan.Block) -> list[int]:
    """Returns what blocks have in common whose products are summed up in one loop."""
    return sorted(block.counts, reverse=True)


def _loop(
    read: windows.Reader,
    g: jax.Array,
    blocks: Sequence[plan.Block],
    gradient: plan.KernelGradient,
) -> dict[tuple[int, ...], jax.Array]:
    """Returns for each tap `(c,)`: what some blocks add to its gradient, in one loop.

    What is left of the rows and what is left of the columns may be as many blocks along one
    dimension as along another. A loop for each takes longer than its few products.
    """
    shape = (g.shape[0], *blocks[0].counts, *g.shape[len(gradient.taps) + 1 :])
    products = itertools.chain(*[_products(read, g, block, shape) for block in blocks])
    taps = itertools.product(*map(range, gradient.taps))
    outputs: dict[tuple[int, ...], sums.Terms] = {tap: {} for tap in taps}
    for i, of in enumerate(products):
        for tap, product in of.items():
            outputs[tap][i // gradient.positions_together, i] = product
    outputs = {tap: terms for tap, terms in outputs.items() if terms}
    summed = sums.together(list(outputs.values()), gradient.row_by_row, shape, g.dtype)
    axes = range(1 + len(gradient.taps))
    return {tap: y.sum(axes) for tap, y in zip(outputs, summed, strict=True)}


def _products(
    read: windows.Reader, g: jax.Array, block: plan.Block, shape: tuple[int, ...]
) -> Iterator[dict[tuple[int, ...], jax.Array]]:
    """Yields for each position of a block {tap: the products of all such blocks, of this shape}."""
    steps = [len(reads) for reads in block.reads]

    @functools.cache
    def image(at: tuple[int, ...]) -> jax.Array:
        y = read(at, block.counts, block.apart)
        return windows.repeated(lax.reshape(y, (*shape[: y.ndim - 1], y.shape[-1])), shape)

    @functools.cache
    def cotangent(at: tuple[int, ...]) -> jax.Array:
        return lax.reshape(windows.window(g, at, block.counts, steps), shape)

    for reads in itertools.product(*block.reads):
        found = {}
        for dims in itertools.product(*[of.items() for of in reads]):
            tap, places = zip(*dims, strict=True)
            p, t = zip(*places, strict=True)
            found[tap] = lax.mul(image(t), cotangent(p))
        yield found
