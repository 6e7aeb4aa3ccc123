"""Kernel gradients: for each tap, a sum over all examples and positions.

A sum over all positions for each channel does not vectorise. So neighbouring positions are summed
up first, for several taps of the kernel in one pass, which leaves a fraction of the array to
reduce.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

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
        y = _all_images(g, x, gradient)
        return lax.rev(y, range(y.ndim - 1))
    return _all_images(x, g, gradient)


@dataclasses.dataclass(frozen=True)
class _Operands:
    """What one pass reads.

    Attributes:
      image: reads the image, from the position that the pass counts from.
      cotangent: reads the cotangent.
      examples: how many there are of both.
      tail: the shape of the cotangent after its spatial dimensions, `(c,)` or `(c, m)`.
      dtype: of both.
    """

    image: windows.Reader
    cotangent: windows.Reader
    examples: int
    tail: tuple[int, ...]
    dtype: Any


def _all_images(x: jax.Array, g: jax.Array, gradient: plan.KernelGradient) -> jax.Array:
    """Sums up all images at once, or some at a time in a loop.

    The partial sums of a large batch are large. From 32 MiB on, glibc takes a block of memory from
    the system in each call and gives it back, and to map its pages takes longer than the sums: see
    `gradient_temporaries` in `Tuning`.
    """
    if not gradient.images:
        return _passes(x, g, gradient, None)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        i = workarounds.parallel(i) if gradient.parallel else i
        return lax.add(total, _passes(x, g, gradient, i * gradient.images))

    shape = (*gradient.outs, *g.shape[1 + len(gradient.outs) :])
    total = lax.full_like(g, 0, shape=shape)  # which varies in a `shard_map` as `g` does
    return lax.fori_loop(0, x.shape[0] // gradient.images, step, total)


def _passes(
    x: jax.Array, g: jax.Array, gradient: plan.KernelGradient, first: jax.Array | None
) -> jax.Array:
    """Computes the gradients pass by pass, and puts them in order.

    Args:
      x: `(n, *sizes, c)`.
      g: `(n, *kernels, c)`.
      gradient: the plan.
      first: the first of `gradient.images` images that are read; None for all.
    """
    rank = len(gradient.taps)
    still = [0] * rank
    cotangent = functools.partial(windows.window, g)
    image = None
    examples = g.shape[0]
    if first is not None:
        examples = gradient.images
        cotangent = windows.moving_window(g, still, first, examples)
        if gradient.crop is None and gradient.loop is None:
            image = windows.moving_window(x, still, first, examples)
        else:
            x = lax.dynamic_slice_in_dim(x, first, examples)
    if gradient.crop is not None:
        x = windows.crop(x, *gradient.crop)
    operands = functools.partial(
        _Operands, cotangent=cotangent, examples=examples, tail=g.shape[rank + 1 :], dtype=g.dtype
    )
    if gradient.loop is None:
        read = operands(image or functools.partial(windows.window, x))
        parts = [_taps(read, blocks, gradient) for blocks in gradient.blocks]
        y = lax.concatenate(parts, 0) if len(parts) > 1 else parts[0]
    else:
        loop, (blocks,) = gradient.loop, gradient.blocks
        x = windows.crop(x, loop.first, loop.reach)

        def step(i: jax.Array) -> jax.Array:
            i = workarounds.parallel(i) if gradient.parallel else i
            corner = windows.unravel(i, gradient.grid)
            start = [a * gap for a, gap in zip(corner, loop.apart, strict=True)]
            read = operands(windows.moving_window(x, start))
            if first is not None:
                # XLA would move the slices of the cotangent out of the loop: copies of all of it.
                again = lax.add(first, workarounds.zero_within(i, first.dtype))
                moving = windows.moving_window(g, still, again, examples)
                read = dataclasses.replace(read, cotangent=moving)
            return _taps(read, blocks, gradient)

        y = lax.map(step, jnp.arange(math.prod(gradient.grid)))
    grid, taps, tail = gradient.grid, gradient.taps, g.shape[rank + 1 :]
    if any(n > 1 for n in taps[:-1]) and math.prod(grid) > 1:  # else the taps are in order
        pairs = [(d, d + len(grid)) for d in range(len(grid))]
        y = y.reshape(*grid, *taps, *tail)
        y = lax.transpose(y, [*itertools.chain(*pairs), *range(2 * len(grid), y.ndim)])
    y = y.reshape(*[n * m for n, m in zip(grid, taps, strict=True)], *tail)
    outs = *gradient.outs, *tail
    return y if y.shape == outs else lax.slice(y, [0] * y.ndim, outs)


def _taps(
    operands: _Operands, blocks: Sequence[plan.Block], gradient: plan.KernelGradient
) -> jax.Array:
    """Returns `(*taps, c)`: the gradients of the taps of one pass.

    Args:
      operands: what it reads.
      blocks: what is summed up.
      gradient: the plan.
    """
    shape, tail, dtype = gradient.taps, operands.tail, operands.dtype
    every = list(itertools.product(*map(range, shape)))
    parts = []
    for _, alike in itertools.groupby(sorted(blocks, key=_sizes), _sizes):
        found = _loop(operands, list(alike), gradient)
        if len(found) < len(every):
            found = dict.fromkeys(every, jnp.zeros(tail, dtype)) | found
        gradients = [found[tap] for tap in every]
        # Side by side in one flat array, they need no operation each. Of sharded channels, such an
        # array would be gathered.
        if not gradient.whole:
            gradients = [lax.expand_dims(y, [0]) for y in gradients]
        parts.append(lax.concatenate(gradients, 0))
    if not parts:
        return jnp.zeros((*shape, *tail), dtype)
    return functools.reduce(lax.add, parts).reshape(*shape, *tail)


def _sizes(block: plan.Block) -> tuple[int, list[int]]:
    """Returns what blocks must share for one loop to sum up their products.

    Returns:
      Where in their shape the dimension is that one `reduce` sums up, or -1; and the shape but for
      examples and channels.
    """
    sizes, d = list(block.counts), block.reduced
    if d is None:
        return -1, sizes
    sizes.insert(d + 1, len(block.reads[d]))
    # XLA gives a dimension of size 1 any place in the layout, and then copies what is summed up.
    return sum(n > 1 for n in sizes[: d + 1]), [n for n in sizes if n > 1]


def _loop(
    operands: _Operands, blocks: Sequence[plan.Block], gradient: plan.KernelGradient
) -> dict[tuple[int, ...], jax.Array]:
    """Returns for each tap `(c,)`: what some blocks add to its gradient, in one loop.

    What is left of the rows may be as many blocks, and of as many positions, as what is left of the
    columns. Then one loop sums up both: a loop for each takes longer than its few products.
    """
    axis, sizes = _sizes(blocks[0])
    examples = [operands.examples] if axis < 0 or operands.examples > 1 else []
    sizes = examples + sizes
    products = itertools.chain(*[_products(operands, block, sizes) for block in blocks])
    taps = itertools.product(*map(range, gradient.taps))
    outputs: dict[tuple[int, ...], sums.Terms] = {tap: {} for tap in taps}
    for i, of in enumerate(products):
        for tap, product in of.items():
            outputs[tap][i // gradient.positions_together, i] = product
    outputs = {tap: terms for tap, terms in outputs.items() if terms}
    shape, dtype = (*sizes, *operands.tail), operands.dtype
    if axis < 0:
        summed = sums.together(list(outputs.values()), gradient.sums_each, shape, dtype)
    else:
        axis += len(examples)
        terms = [sums.tree(terms, shape, dtype) for terms in outputs.values()]
        summed = sums.along(terms, axis)
        sizes = sizes[1:]
    dims = range(len(sizes))
    return {tap: lax.reduce_sum(y, dims) for tap, y in zip(outputs, summed, strict=True)}


def _products(
    operands: _Operands, block: plan.Block, sizes: Sequence[int]
) -> Iterator[dict[tuple[int, ...], jax.Array]]:
    """Yields for each position of a block {tap: the products of all such blocks}.

    Args:
      operands: what is read.
      block: the equal blocks. Where one `reduce` sums up positions of a dimension, one product
        holds them all.
      sizes: the shape of the products but for channels.
    """
    reads, counts, apart = list(block.reads), list(block.counts), list(block.apart)
    steps = [len(of) for of in reads]
    if (d := block.reduced) is not None:
        counts[d], apart[d], steps[d] = counts[d] * steps[d], apart[d] // steps[d], 1
        reads[d] = reads[d][:1]
    shape = (*sizes, *operands.tail)

    @functools.cache
    def image(at: tuple[int, ...]) -> jax.Array:
        y = operands.image(at, counts, apart)
        return windows.repeated(lax.reshape(y, (*sizes, *y.shape[len(at) + 1 :])), shape)

    @functools.cache
    def cotangent(at: tuple[int, ...]) -> jax.Array:
        return lax.reshape(operands.cotangent(at, counts, steps), shape)

    for position in itertools.product(*reads):
        found = {}
        for dims in itertools.product(*[of.items() for of in position]):
            tap, places = zip(*dims, strict=True)
            p, t = zip(*places, strict=True)
            found[tap] = lax.mul(image(t), cotangent(p))
        yield found
