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
    zeros = jnp.zeros(tail, g.dtype)
    every = list(itertools.product(*map(range, gradient.taps)))
    parts = []
    for _, alike in itertools.groupby(sorted(blocks, key=_sizes), _sizes):
        found = _loop(read, g, list(alike), gradient)
        parts.append(jnp.stack([found.get(tap, zeros) for tap in every]))
    y = functools.reduce(lax.add, parts) if parts else jnp.zeros((len(every), *tail), g.dtype)
    return y.reshape(*gradient.taps, *tail)


def _sizes(block: plan.Block) -> tuple[int, list[int]]:
    """Returns what blocks have in common whose products are summed up in one loop.

    Returns:
      Where in their shape the dimension is that one `reduce` sums up, or -1; and the shape but for
      examples and channels.
    """
    sizes, d = list(block.counts), block.along
    if d is None:
        return -1, sizes
    sizes.insert(d + 1, len(block.reads[d]))
    # XLA gives a dimension of size 1 any place in the layout, and then copies what is summed up.
    return sum(n > 1 for n in sizes[: d + 1]), [n for n in sizes if n > 1]


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
    axis, sizes = _sizes(blocks[0])
    examples = g.shape[:1] if axis < 0 or g.shape[0] > 1 else ()
    sizes = [*examples, *sizes]
    products = itertools.chain(*[_products(read, g, block, sizes) for block in blocks])
    taps = itertools.product(*map(range, gradient.taps))
    outputs: dict[tuple[int, ...], sums.Terms] = {tap: {} for tap in taps}
    for i, of in enumerate(products):
        for tap, product in of.items():
            outputs[tap][i // gradient.positions_together, i] = product
    outputs = {tap: terms for tap, terms in outputs.items() if terms}
    shape = (*sizes, *g.shape[len(gradient.taps) + 1 :])
    if axis < 0:
        summed = sums.together(list(outputs.values()), gradient.row_by_row, shape, g.dtype)
    else:
        axis += len(examples)
        terms = [sums.tree(terms, shape, g.dtype) for terms in outputs.values()]
        summed = sums.along(terms, axis)
        sizes = sizes[1:]
    return {tap: y.sum(range(len(sizes))) for tap, y in zip(outputs, summed, strict=True)}


def _products(
    read: windows.Reader, g: jax.Array, block: plan.Block, sizes: Sequence[int]
) -> Iterator[dict[tuple[int, ...], jax.Array]]:
    """Yields for each position of a block {tap: the products of all such blocks}.

    Args:
      read: as in `_taps`.
      g: as in `_taps`.
      block: the blocks. Where one `reduce` sums up the positions of a dimension, the product is of
        all of them.
      sizes: the shape of the products but for channels.
    """
    rank = len(block.counts) + 1
    reads, counts, apart = list(block.reads), list(block.counts), list(block.apart)
    steps = [len(of) for of in reads]
    if (d := block.along) is not None:
        counts[d], apart[d], steps[d] = counts[d] * steps[d], apart[d] // steps[d], 1
        reads[d] = reads[d][:1]
    shape = (*sizes, *g.shape[rank:])

    @functools.cache
    def image(at: tuple[int, ...]) -> jax.Array:
        y = read(at, counts, apart)
        return windows.repeated(lax.reshape(y, (*sizes, *y.shape[rank:])), shape)

    @functools.cache
    def cotangent(at: tuple[int, ...]) -> jax.Array:
        return lax.reshape(windows.window(g, at, counts, steps), shape)

    for position in itertools.product(*reads):
        found = {}
        for dims in itertools.product(*[of.items() for of in position]):
            tap, places = zip(*dims, strict=True)
            p, t = zip(*places, strict=True)
            found[tap] = lax.mul(image(t), cotangent(p))
        yield found
