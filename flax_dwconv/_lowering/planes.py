"""Convolutions of images whose channels come before their space: sums over taps, plane by plane.

A plane is what one channel of one image holds. Everything is as `planes_plan` says: a tap reads the
image itself, some positions further on, and what it reads beyond its plane is masked. XLA:CPU takes
2 to 6 times as long to put the channels last first, and the result back.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_dwconv._lowering import planes_plan as plan
from flax_dwconv._lowering import sums, windows, workarounds


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some channels of all images.

    Attributes:
      images: for each column that is dealt out, `(n, blocks, length)`: planes that follow one
        another in each block, and what taps read before and after them.
      first: where in a block the planes begin.
      channels: which these are.
    """

    images: Sequence[jax.Array]
    first: int
    channels: Sequence[range]

    @property
    def count(self) -> int:
        """How many channels there are."""
        return sum(map(len, self.channels))

    def select(self, y: jax.Array, axis: int) -> jax.Array:
        """Returns these channels of an array that has all channels along `axis`."""
        parts = [lax.slice_in_dim(y, of.start, of.stop, axis=axis) for of in self.channels]
        return parts[0] if len(parts) == 1 else lax.concatenate(parts, axis)


def _parts(x: jax.Array, reader: plan.Reader) -> list[_Part]:
    """Cuts images into the channels in the middle, where all taps read inside, and the others.

    Args:
      x: `(n, c * q, *sizes)`.
      reader: the plan.
    """
    n, planes, *sizes = x.shape
    c = planes // reader.summed
    images, prepared = [x], False
    full = list(reader.sizes)
    full[-1] *= reader.columns
    if full != sizes:
        pads = [(0, max(to - size, 0), 0) for size, to in zip(sizes, full, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *pads])
        images, prepared = [x], True
    if reader.columns > 1:
        dims = x.ndim - 1
        images = [
            lax.slice_in_dim(x, i, x.shape[dims], reader.columns, axis=dims)
            for i in range(reader.columns)
        ]
        prepared = True
    flat = [y.reshape(n, 1, -1) for y in images]
    if prepared:
        flat = workarounds.materialized(*flat)
    plane = math.prod(reader.sizes) * reader.summed
    before, after = reader.before, reader.after + plane - math.prod(reader.sizes)
    zero = jnp.zeros((), x.dtype)
    if reader.ends is None:
        around = [(0, 0, 0), (0, 0, 0), (before, after, 0)]
        flat = workarounds.materialized(*[lax.pad(y, zero, around) for y in flat])
        return [_Part(flat, before, [range(c)])]
    if not reader.ends:
        return [_Part(flat, 0, [range(c)])]
    inner, length = reader.ends * plane, c * plane
    edges = []
    for y in flat:
        first = lax.slice_in_dim(y, 0, inner + after, axis=2)
        last = lax.slice_in_dim(y, length - inner - before, length, axis=2)
        first = lax.pad(first, zero, [(0, 0, 0), (0, 0, 0), (before, 0, 0)])
        last = lax.pad(last, zero, [(0, 0, 0), (0, 0, 0), (0, after, 0)])
        edges.append(lax.concatenate([first, last], 1))
    edges = workarounds.materialized(*edges)
    return [
        _Part(edges, before, [range(reader.ends), range(c - reader.ends, c)]),
        _Part(flat, inner, [range(reader.ends, c - reader.ends)]),
    ]


def _joined(parts: Sequence[jax.Array], reader: plan.Reader, axis: int) -> jax.Array:
    """Returns all channels in their order, which are along `axis`, from those of each part."""
    if len(parts) == 1:
        return parts[0]
    edges, middle = parts
    first = lax.slice_in_dim(edges, 0, reader.ends, axis=axis)
    last = lax.slice_in_dim(edges, reader.ends, None, axis=axis)
    return lax.concatenate([first, middle, last], axis)


def _window(part: _Part, taps: Sequence[plan.Tap], summed: int, reader: plan.Reader) -> jax.Array:
    """Returns what taps, one of each dimension, read for all outputs: `(n, channels, *outs)`.

    Args:
      part: of the channels.
      taps: one of each dimension.
      summed: which of the planes of each channel.
      reader: the plan.
    """
    x = part.images[taps[-1].image]
    plane = math.prod(reader.sizes)
    positions = [math.prod(reader.sizes[d + 1 :]) for d in range(len(taps))]
    at = part.first + summed * plane
    at += sum(tap.offset * step for tap, step in zip(taps, positions, strict=True))
    count = part.count // x.shape[1]
    y = lax.slice_in_dim(x, at, at + count * plane * reader.summed, axis=2)
    y = y.reshape(x.shape[0], part.count, plane * reader.summed)
    outputs = math.prod(reader.outs)
    if reader.flat:
        return lax.slice_in_dim(y, 0, outputs, axis=2)
    y = lax.slice_in_dim(y, 0, plane, axis=2).reshape(*y.shape[:2], *reader.sizes)
    pairs = list(zip(reader.outs, reader.strides, strict=True))
    stop = [(n - 1) * step + 1 for n, step in pairs]
    return lax.slice(y, [0] * y.ndim, [*y.shape[:2], *stop], [1, 1, *reader.strides])


def _at(y: jax.Array, position: Mapping[int, int]) -> jax.Array:
    """Returns what is at a position of some dimensions, without these."""
    start = [position.get(d, 0) for d in range(y.ndim)]
    stop = [position[d] + 1 if d in position else size for d, size in enumerate(y.shape)]
    return lax.squeeze(lax.slice(y, start, stop), list(position))


def _lanes(reader: plan.Reader) -> tuple[int, ...]:
    return (math.prod(reader.outs),) if reader.flat else reader.outs


def _masked(y: jax.Array, inside: np.ndarray, dims: Sequence[int]) -> jax.Array:
    """Returns `y`, and zeros where `inside`, which holds these dimensions of `y`, is false."""
    if inside.all():
        return y
    return lax.select(lax.broadcast_in_dim(inside, y.shape, dims), y, lax.full_like(y, 0))


def _inside(tap: plan.Tap, d: int, reader: plan.Reader) -> np.ndarray:
    """Returns for which outputs of a plane a tap of dimension `d` reads inside: `_lanes`."""
    outs = np.arange(reader.outs[d])
    inside = (tap.first <= outs) & (outs < tap.stop)
    shape = [-1 if i == d else 1 for i in range(len(reader.outs))]
    return np.broadcast_to(inside.reshape(shape), reader.outs).reshape(_lanes(reader))


def convolve(x: jax.Array, kernel: jax.Array, planes: plan.Planes) -> jax.Array:
    """Returns the convolution of every image.

    Args:
      x: `(n, c * q, *sizes)`.
      kernel: `(m, q, *kernels, c)`, of the dtype of `x`; `m` or `q` is 1.
      planes: the plan.

    Returns:
      `(n, c * m, *outs)`.
    """
    reader = planes.reader
    parts = _parts(x, reader)
    n, m, c = x.shape[0], kernel.shape[0], kernel.shape[-1]

    def phase(taps: Sequence[Sequence[plan.Tap]]) -> jax.Array:
        y = _joined([_phase(part, kernel, taps, reader) for part in parts], reader, 1)
        return y.reshape(n, c * m, *reader.outs)

    def build(d: int, phases: Iterator[jax.Array]) -> jax.Array:
        if d == len(planes.counts):
            return next(phases)
        found = [build(d + 1, phases) for _ in range(planes.counts[d])]
        return windows.interleave(found, d + 2, planes.outs[d])

    found = [phase(taps) for taps in planes.phases]
    if len(found) > 1:
        found = workarounds.materialized(*found)
    return build(0, iter(found))


def _phase(
    part: _Part, kernel: jax.Array, taps: Sequence[Sequence[plan.Tap]], reader: plan.Reader
) -> jax.Array:
    """Returns one phase of some channels: `(n, channels, m, *_lanes)`."""
    m, q = kernel.shape[:2]
    weights = part.select(kernel, kernel.ndim - 1)
    lanes = _lanes(reader)
    shape = (part.images[0].shape[0], part.count, m, *lanes)
    dims = range(3, len(shape))

    def mask(tap: plan.Tap, d: int) -> tuple[np.ndarray, Sequence[int]]:
        if reader.flat:
            return _inside(tap, d, reader), dims
        outs = np.arange(reader.outs[d])
        return (tap.first <= outs) & (outs < tap.stop), [3 + d]

    def add(d: int, chosen: tuple[plan.Tap, ...]) -> jax.Array:
        """Sums up the taps of the dimensions up to `d`."""
        if d < 0:
            at = [tap.index for tap in chosen]
            terms = []
            for i in range(q):
                w = _at(weights, {d: a for d, a in enumerate((i, *at), 1)})  # (m, channels)
                y = _window(part, chosen, i, reader)
                y = lax.broadcast_in_dim(y, shape, [0, 1, *dims])
                terms.append(lax.mul(y, lax.broadcast_in_dim(w, shape, [2, 1])))
            return functools.reduce(lax.add, terms)
        terms = [_masked(add(d - 1, (tap, *chosen)), *mask(tap, d)) for tap in taps[d]]
        return functools.reduce(lax.add, terms)

    if not all(taps):
        return jnp.zeros(shape, kernel.dtype)
    return add(len(taps) - 1, ())


def kernel_gradient(x: jax.Array, g: jax.Array, gradient: plan.PlanesGradient) -> jax.Array:
    """Returns the gradient of every tap, summed up over all images.

    Args:
      x: `(n, c, *sizes)`.
      g: `(n, c, *outs)`: the cotangent, of the dtype of `x`.
      gradient: the plan.

    Returns:
      `(*kernel, c)`.
    """
    reader, n = gradient.reader, x.shape[0]
    rest = n - n % gradient.images
    blocks = [(0, rest, gradient.images), (rest, n, n - rest)]
    blocks = [(start, stop, images) for start, stop, images in blocks if start < stop]
    taps = list(itertools.product(*gradient.taps))
    of_parts = []
    for part in _parts(x, reader):
        of_blocks = [_block(part, g, taps, block, gradient) for block in blocks]
        of_parts.append([functools.reduce(lax.add, y) for y in zip(*of_blocks, strict=True)])
    found = {}
    for tap, *of_tap in zip(taps, *of_parts, strict=True):
        found[tuple(one.index for one in tap)] = _joined(of_tap, reader, 0)
    zeros = jnp.zeros((x.shape[1],), x.dtype)
    at = itertools.product(*map(range, gradient.kernel))
    return jnp.stack([found.get(tap, zeros) for tap in at]).reshape(*gradient.kernel, -1)


def _block(
    part: _Part,
    g: jax.Array,
    taps: Sequence[Sequence[plan.Tap]],
    block: tuple[int, int, int],
    gradient: plan.PlanesGradient,
) -> list[jax.Array]:
    """Returns the gradients of some taps by some channels of some images: `(channels,)` each."""
    reader = gradient.reader
    start, stop, images = block
    pieces, lanes = gradient.pieces, _lanes(reader)
    short = (lanes[0] // pieces, *lanes[1:])

    def cut(y: jax.Array) -> jax.Array:
        y = lax.slice_in_dim(y, start, stop, axis=0)
        return y.reshape(-1, images, part.count, pieces, *short)

    read = [cut(_window(part, tap, 0, reader)) for tap in taps]
    g = g.reshape(*g.shape[:2], *lanes)
    cotangent = cut(part.select(g, 1))
    outputs: list[sums.Terms] = [{} for _ in taps]
    inside = [[_inside(tap, d, reader) for d, tap in enumerate(each)] for each in taps]
    dims = range(2, 2 + len(short))
    for i, (image, piece) in enumerate(itertools.product(range(images), range(pieces))):
        theirs = _at(cotangent, {1: image, 3: piece})
        for terms, y, of in zip(outputs, read, inside, strict=True):
            term = lax.mul(_at(y, {1: image, 3: piece}), theirs)
            if pieces > 1:
                # Only the first dimension is cut; along the others each piece has the same mask.
                term = _masked(term, of[0].reshape(pieces, *short)[piece], dims)
            terms[i // 4, i] = term
    shape = outputs[0][0, 0].shape if outputs else ()
    summed = []
    for terms, of in zip(outputs, inside, strict=True):
        rest = [each.reshape(pieces, *short)[0] for each in (of[1:] if pieces > 1 else of)]
        mask = functools.reduce(np.logical_and, rest, np.ones(short, bool))
        summed.append(_masked(sums.tree(terms, shape, g.dtype), mask, dims))
    if len(summed) > 1:
        summed = workarounds.one_loop(summed)
    return [y.sum((0, *dims)) for y in summed]
