"""Depthwise convolutions as sums over kernel taps, in plain `lax`.

What the CPU lowering rule compiles instead of XLA's convolution. Everything here works on arrays
whose channels `c` are the last axis, with any number of spatial dimensions, and knows nothing of
layers or tags. All three algorithms compute

    out[n, m, o, c] = sum_a dilated[n, o * stride + a * rhs_dilation - low, c] * kernel[m, a, c]

where, in the names of `lax.conv_general_dilated`, `dilated[t] = x[t / lhs_dilation]` if that is a
position of `x`, else 0; `Axis` derives what it means for one spatial dimension.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Axis:
    """The geometry of one spatial dimension.

    Write an output position as o = q * P + r, with P = lhs_dilation / gcd(lhs_dilation, stride).
    Then the tap `a` reads a position of the input for every q or for none, and where it does, it
    reads `x[first + q * step]` with

        first = (r * stride + a * rhs_dilation - low) / lhs_dilation,    step = P * stride /
        lhs_dilation,

    a strided slice: the dilated input is never made. A forward convolution has P = 1; the input
    gradient of a strided one has P = stride phases, whose outputs interleave.
    """

    size: int
    kernel: int
    out: int
    stride: int
    low: int
    lhs_dilation: int
    rhs_dilation: int

    @property
    def phases(self) -> int:
        """P, the number of phases."""
        return self.lhs_dilation // math.gcd(self.lhs_dilation, self.stride)

    @property
    def step(self) -> int:
        """Input positions from one output of a phase to the next."""
        return self.phases * self.stride // self.lhs_dilation

    def count(self, phase: int) -> int:
        """Returns the number of outputs of a phase."""
        return len(range(phase, self.out, self.phases))

    def taps(self, phase: int) -> dict[int, int]:
        """Returns {tap: the position of the input that it reads for q = 0} of a phase."""
        reads = {
            a: phase * self.stride + a * self.rhs_dilation - self.low for a in range(self.kernel)
        }
        return {a: t // self.lhs_dilation for a, t in reads.items() if t % self.lhs_dilation == 0}

    def runs(self, phase: int) -> list["Run"]:
        """Splits a phase into runs of outputs none of whose taps reads outside the input."""
        valid = {}
        for a, first in self.taps(phase).items():
            inside = _inside(first, self.step, self.count(phase), self.size)
            if inside:
                valid[a] = (inside.start, inside.stop, first)
        cuts = {0, self.count(phase)} | {
            q for start, stop, _ in valid.values() for q in (start, stop)
        }
        return [
            Run(
                hi - lo,
                self.step,
                {
                    a: f + lo * self.step
                    for a, (start, stop, f) in valid.items()
                    if start <= lo < stop
                },
            )
            for lo, hi in itertools.pairwise(sorted(cuts))
        ]

    def swapped(self) -> "Axis":
        """Returns the geometry with input and kernel exchanged; its outputs come in reverse.

        The tap `a` and the input position `t` meet in the output `o` if
        t * lhs_dilation = o * stride + a * rhs_dilation - low. With o = out - 1 - o' that is
        a * rhs_dilation = o' * stride + t * lhs_dilation - low',  low' = (out - 1) * stride - low.
        """
        return Axis(
            size=self.kernel,
            kernel=self.size,
            out=self.out,
            stride=self.stride,
            low=(self.out - 1) * self.stride - self.low,
            lhs_dilation=self.rhs_dilation,
            rhs_dilation=self.lhs_dilation,
        )


def _inside(first: int, step: int, count: int, size: int) -> range:
    """Returns the positions p < count of which first + p * step is a position of the image."""
    return range(max(-(first // step), 0), min((size - 1 - first) // step + 1, count))


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring outputs of a phase that read the input by the same taps.

    Attributes:
      count: number of outputs.
      step: input positions from one output to the next.
      taps: {tap: the input position that it reads for the first output}.
    """

    count: int
    step: int
    taps: dict[int, int]


# How much is compiled depends on how much there is to compute: from how many results on, how many
# taps the regions of an image may have in all, and how many neighbouring outputs one pass of the
# inner loop computes together. An image with more taps is padded instead. With pads, a 3x3 kernel
# has 49 taps in regions and a 5x5 one 361, each of which takes 1 to 3 ms to compile. Without
# regions and tiles, a layer takes 1 to 2 times as long on one small image, which a network hardly
# shows; without regions, 1 to 4 times on a batch whose padded copy fits into no cache.
_SOME = 1 << 17
_EFFORT = [(0, 30, 1), (_SOME, 150, 2), (1 << 19, 400, 5)]
# More than 3 outputs together pay only where the kernel fills the first-level cache; beyond 5, LLVM
# does not vectorise.
_NARROW_TILE, _WIDE_BYTES = 3, 1 << 15
# The taps of one compiled loop body; compile time grows with them. More are a loop over bodies.
_BODY_TAPS = 64
# Rows of at most as many outputs are computed as a whole, each output by the taps inside the image:
# padding a row of 7 for a 7x7 kernel doubles it. 7x7 images with 7x7 kernels: twice as fast.
_ROW, _ROW_TILE = 8, 5
# One pass of the inner loop of a kernel gradient: so many taps of a row of the kernel, so many
# neighbouring cotangents, so many products of both, which is what compile time grows with.
_ROW_TAPS, _ROW_POSITIONS, _ROW_PRODUCTS = 8, 28, 100
# The rows of a kernel whose gradients are compiled one by one; more are a loop, unless the rows of
# the image are short and there is much to sum.
_ROWS = 5


def convolve(x: jax.Array, kernel: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    """Returns the convolution of every example with every kernel.

    Args:
      x: `(n, *sizes, c)`.
      kernel: `(m, *kernels, c)`, of the dtype of `x`.
      axes: the geometry of each spatial dimension.

    Returns:
      `(n, m, *outs, c)`.
    """
    if math.prod(kernel.shape[1:-1]) > math.prod(x.shape[1:-1]):
        # In derivatives of the kernel gradient, the "kernel" is an image.
        y = convolve(kernel, x, [axis.swapped() for axis in axes])
        return lax.rev(jnp.swapaxes(y, 0, 1), range(2, y.ndim - 1))
    if kernel.shape[0] == 1:
        return jnp.expand_dims(_convolve(x, kernel[0], axes), 1)
    return jax.vmap(lambda k: _convolve(x, k, axes), out_axes=1)(kernel)


def _convolve(x: jax.Array, kernel: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    runs = [[axis.runs(phase) for phase in range(axis.phases)] for axis in axes]
    results = x.shape[0] * math.prod(axis.out for axis in axes) * x.shape[-1]
    *_, (most, together) = [effort for least, *effort in _EFFORT if results >= least]
    if kernel.size * kernel.dtype.itemsize < _WIDE_BYTES:
        together = min(together, _NARROW_TILE)
    if math.prod(sum(len(run.taps) for p in axis for run in p) for axis in runs) <= most:

        def phase(phases):
            return _regions(x, kernel, [axis[p] for axis, p in zip(runs, phases, strict=True)])

    else:

        def phase(phases):
            return _tiles(x, kernel, axes, phases, together)

    return _interleave(axes, phase, ())


def _interleave(
    axes: Sequence[Axis], phase: Callable[[Sequence[int]], jax.Array], phases: Sequence[int]
) -> jax.Array:
    """Computes all phases of all axes, and puts their outputs in order."""
    d = len(phases)
    if d == len(axes):
        return phase(phases)
    axis = axes[d]
    parts = [_interleave(axes, phase, (*phases, p)) for p in range(min(axis.phases, axis.out))]
    return _alternate(parts, d + 1, axis.out)


def _alternate(parts: Sequence[jax.Array], dim: int, size: int) -> jax.Array:
    """Takes elements along `dim` in turns from each of `parts`, `size` of them in all."""
    if len(parts) == 1:
        return lax.slice_in_dim(parts[0], 0, size, axis=dim)
    longest = parts[0].shape[dim]
    parts = [_pad_end(part, dim, longest - part.shape[dim]) for part in parts]
    shape = list(parts[0].shape)
    shape[dim] *= len(parts)
    return lax.slice_in_dim(jnp.stack(parts, dim + 1).reshape(shape), 0, size, axis=dim)


def _pad_end(x: jax.Array, dim: int, zeros: int) -> jax.Array:
    if not zeros:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, zeros * (d == dim), 0) for d in range(x.ndim)])


def _regions(x: jax.Array, kernel: jax.Array, runs: Sequence[Sequence[Run]]) -> jax.Array:
    """One phase as regions, each the sum of those taps that read inside the image.

    No padded copy of the image is made: with 3x3 kernels 1.4 to 2.5 times faster than with one.
    """
    weights = _weights(kernel)

    def build(chosen: tuple[Run, ...]) -> jax.Array:
        d = len(chosen)
        if d < len(runs):
            parts = [build((*chosen, run)) for run in runs[d]]
            return lax.concatenate(parts, d + 1) if len(parts) > 1 else parts[0]
        counts = [run.count for run in chosen]
        terms = {
            tap: _weigh(_window(x, start, counts, steps), weights(tap))
            for tap, start in zip(
                itertools.product(*[run.taps for run in chosen]),
                itertools.product(*[run.taps.values() for run in chosen]),
                strict=True,
            )
        }
        if not terms:
            return jnp.zeros((x.shape[0], *counts, x.shape[-1]), x.dtype)
        return _sum_taps(terms)

    steps = [axis[0].step for axis in runs]
    return build(())


def _tiles(
    x: jax.Array, kernel: jax.Array, axes: Sequence[Axis], phases: Sequence[int], together: int
) -> jax.Array:
    """One phase in tiles of neighbouring outputs, which share what they load.

    A tap costs two loads, of the input and of the kernel, and one multiplication, so that loads are
    what a convolution with many taps waits for. Neighbours use the same weights and nearly the same
    inputs.
    """
    spatial = len(axes)
    counts = [axis.count(p) for axis, p in zip(axes, phases, strict=True)]
    steps = [axis.step for axis in axes]

    # The taps of a phase are evenly spaced, in the kernel and in the input.
    taps = [list(axis.taps(p).items()) for axis, p in zip(axes, phases, strict=True)]
    if not all(taps):
        return jnp.zeros((x.shape[0], *counts, x.shape[-1]), x.dtype)
    first = [t[0][1] for t in taps]
    apart = [t[1][1] - t[0][1] if len(t) > 1 else 1 for t in taps]
    kernel = kernel[
        tuple(slice(t[0][0], t[-1][0] + 1, t[1][0] - t[0][0] if t[1:] else None) for t in taps)
    ]
    sizes = [len(t) for t in taps]

    looped = math.prod(sizes) > _BODY_TAPS
    row = together > 1 and counts[-1] <= _ROW and not looped
    if looped or row:
        together = max(together, _ROW_TILE if row else _NARROW_TILE)
    tile = counts[-1] if row else together
    blocks = [*counts[:-1], -(-counts[-1] // tile)]
    # One body holds all taps, or a piece of a row of the kernel.
    body = sizes
    if looped:
        pieces = -(-sizes[-1] // (_BODY_TAPS // tile))
        body = [1] * (spatial - 1) + [-(-sizes[-1] // pieces)]
        kernel = _pad_end(kernel, spatial - 1, body[-1] * pieces - sizes[-1])
        sizes[-1] = body[-1] * pieces
    reach = [
        (size - 1) * gap + (count - 1) * step + 1
        for size, gap, count, step in zip(
            sizes, apart, [*blocks[:-1], blocks[-1] * tile], steps, strict=True
        )
    ]
    left = 0
    if row:  # no pads: what is outside the image is left out below
        left, first[-1], reach[-1] = first[-1], 0, x.shape[-2]
    x = _crop(x, first, reach)

    def add(x: jax.Array, kernel: jax.Array, sums: Sequence[jax.Array]) -> list[jax.Array]:
        pairs = []
        weights = _weights(kernel)
        for i, before in enumerate(sums):
            terms: dict[tuple[int, ...], jax.Array] = {}
            for tap in itertools.product(*map(range, kernel.shape[:-1])):
                start = [a * gap for a, gap in zip(tap, apart, strict=True)]
                start[-1] += left + i * steps[-1]
                if not row or 0 <= start[-1] < x.shape[-2]:
                    window = _window(x, start, blocks, [*steps[:-1], steps[-1] * tile])
                    terms[tap] = _weigh(window, weights(tap))
            first, second = _halves(terms or {(0,): jnp.zeros_like(before)})
            pairs.append((lax.add(before, first) if looped else first, second))
        parts = -(-tile // together)
        return [
            y
            for i in range(parts)
            for y in _together(pairs[i * tile // parts : (i + 1) * tile // parts])
        ]

    sums = [jnp.zeros((x.shape[0], *blocks, x.shape[-1]), x.dtype)] * tile
    if not looped:
        sums = add(x, kernel, sums)
    else:
        grid = [size // piece for size, piece in zip(sizes, body, strict=True)]
        extent = [
            whole - (size - piece) * gap
            for whole, size, piece, gap in zip(reach, sizes, body, apart, strict=True)
        ]

        def step(i, sums):
            at = [j * piece for j, piece in zip(_unravel(i, grid), body, strict=True)]
            start = [a * gap for a, gap in zip(at, apart, strict=True)]
            piece = lax.dynamic_slice(x, (0, *start, 0), (x.shape[0], *extent, x.shape[-1]))
            return add(piece, lax.dynamic_slice(kernel, (*at, 0), (*body, x.shape[-1])), sums)

        sums = lax.fori_loop(0, math.prod(grid), step, sums)
    return _alternate(sums, spatial, counts[-1])


def is_kernel_gradient(axes: Sequence[Axis]) -> bool:
    """Whether it is one for `kernel_gradient`: a small result of a large image and kernel."""
    out, kernel, size = (
        math.prod(getattr(axis, name) for axis in axes) for name in ("out", "kernel", "size")
    )
    dilated = {axis.lhs_dilation > 1 for axis in axes if axis.lhs_dilation != axis.rhs_dilation}
    both = any(axis.lhs_dilation > 1 and axis.rhs_dilation > 1 for axis in axes)
    return out <= min(kernel, size) and len(dilated) <= 1 and not both


def kernel_gradient(x: jax.Array, g: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    """Returns the sum over all examples of the convolution of `x` with `g` as the kernel.

    Args:
      x: `(n, *sizes, c)`.
      g: `(n, *kernels, c)`: the cotangent, of the dtype of `x`.
      axes: the geometry, `out` being the size of the true kernel. One of `lhs_dilation` and
        `rhs_dilation` is 1 on each axis, the same one on all.

    Returns:
      `(*outs, c)`.

    A sum over all positions for each channel does not vectorise. So neighbouring positions are
    summed up first, for all taps of a row of the kernel in one pass, which leaves a fraction of the
    array to reduce.
    """
    if any(axis.lhs_dilation > 1 for axis in axes):
        y = kernel_gradient(g, x, [axis.swapped() for axis in axes])
        return lax.rev(y, range(y.ndim - 1))
    *outer, last = axes
    whole = (last.out - 1) * last.stride + (last.kernel - 1) * last.rhs_dilation + 1
    outside = last.kernel - len(_inside_for_all(-last.low, last, last.out, last.size))
    if outside * min(last.out, _ROW_TAPS) > 2 * _ROW_PRODUCTS:
        # Too many to be left out one by one, as with a large dilation: they read zeros.
        x = _crop(x, [0] * len(outer) + [-last.low], [*x.shape[1:-2], whole])
        last = dataclasses.replace(last, size=whole, low=0)
        axes = [*outer, last]

    # One body has the whole last dimension of the kernel, or a piece of it.
    pieces = -(-last.out // _ROW_TAPS)
    taps = -(-last.out // pieces)
    grid = [axis.out for axis in outer] + [pieces]
    apart = [axis.stride for axis in outer] + [taps * last.stride]
    rows = math.prod(grid)
    first = [-axis.low for axis in axes]
    short = rows * taps * last.kernel <= _ROWS * _ROW_PRODUCTS
    if rows <= _ROWS or short and x.size >= _SOME:
        starts = [range(f, n * gap + f, gap) for f, n, gap in zip(first, grid, apart, strict=True)]
        y = jnp.stack([_row_gradient(x, g, axes, at, taps) for at in itertools.product(*starts)])
    else:
        extent = [(axis.kernel - 1) * axis.rhs_dilation + 1 for axis in axes]
        extent[-1] += (taps - 1) * last.stride
        reach = [(n - 1) * gap + e for n, gap, e in zip(grid, apart, extent, strict=True)]
        left = 0
        if pieces == 1:  # every row reads the whole width of the image, which needs no pads
            left, first[-1], extent[-1], reach[-1] = first[-1], 0, last.size, last.size
        x = _crop(x, first, reach)

        def step(i):
            start = [a * gap for a, gap in zip(_unravel(i, grid), apart, strict=True)]
            piece = lax.dynamic_slice(x, (0, *start, 0), (x.shape[0], *extent, x.shape[-1]))
            return _row_gradient(piece, g, axes, [*[0] * len(outer), left], taps)

        y = lax.map(step, jnp.arange(rows))
    return lax.slice_in_dim(y.reshape(*grid[:-1], pieces * taps, -1), 0, last.out, axis=len(outer))


def _row_gradient(
    x: jax.Array, g: jax.Array, axes: Sequence[Axis], first: Sequence[int], taps: int
) -> jax.Array:
    """Returns `(taps, c)`: the gradients of neighbouring taps of one row of the kernel.

    The first of them reads `x` at `first` for the first position of `g`. Positions that read
    outside `x` are left out. The positions of a row of `g` that are inside for all taps are blocks
    of neighbours; a loop over the blocks sums up each. The few others are a block of their own.
    """
    *outer, last = axes
    rows = [
        _inside(f, axis.rhs_dilation, *sizes)
        for f, axis, *sizes in zip(first, outer, g.shape[1:-2], x.shape[1:-2], strict=False)
    ]
    if not all(rows):
        return jnp.zeros((taps, x.shape[-1]), x.dtype)
    reads = {
        p: {
            b: t
            for b in range(taps)
            if 0 <= (t := first[-1] + b * last.stride + p * last.rhs_dilation) < x.shape[-2]
        }
        for p in range(last.kernel)
    }

    def total(positions: Sequence[int], blocks: int, step: int) -> jax.Array:
        """Sums `positions`, and those `step` further, so many `blocks`, of rows and examples."""
        counts = [*map(len, rows), blocks]
        shape = (x.shape[0], *counts, x.shape[-1])
        in_g = [row.start for row in rows]
        in_x = [
            f + row.start * axis.rhs_dilation
            for f, row, axis in zip(first, rows, outer, strict=False)
        ]
        steps = [axis.rhs_dilation for axis in outer] + [last.rhs_dilation * step]
        gs = {p: _window(g, [*in_g, p], counts, [1] * len(outer) + [step]) for p in positions}
        xs = {
            t: _window(x, [*in_x, t], counts, steps)
            for t in sorted({t for p in positions for t in reads[p].values()})
        }
        sums = []
        for b in range(taps):
            terms: dict[tuple[int, ...], jax.Array] = {
                (p,): lax.mul(xs[reads[p][b]], gs[p]) for p in positions if b in reads[p]
            }
            sums.append(_halves(terms or {(0,): jnp.zeros(shape, x.dtype)}))
        return jnp.stack([y.sum(range(y.ndim - 1)) for y in _together(sums)])

    inside = _inside_for_all(first[-1], last, taps, x.shape[-2])
    most = max(min(_ROW_POSITIONS, _ROW_PRODUCTS // taps), 1)
    width = min(range(-(-most // 2), most + 1), key=lambda width: (len(inside) % width, -width))
    blocks = len(inside) // width
    if blocks < 2 or last.kernel * taps <= _ROW_PRODUCTS:
        return total(range(last.kernel), 1, 1)
    inside = inside[: blocks * width]
    y = total(inside[:width], blocks, width)
    others = [p for p in reads if p not in inside]
    return y + total(others, 1, 1) if others else y


def _inside_for_all(first: int, last: Axis, taps: int, size: int) -> range:
    """Returns the positions of the cotangent for which each of neighbouring taps reads inside."""
    start = _inside(first, last.rhs_dilation, last.kernel, size).start
    end = first + (taps - 1) * last.stride
    return range(start, _inside(end, last.rhs_dilation, last.kernel, size).stop)


def _window(
    x: jax.Array, start: Sequence[int], counts: Sequence[int], steps: Sequence[int]
) -> jax.Array:
    """Returns `counts` positions of each spatial dimension, from `start`, `steps` apart."""
    stop = [s + (n - 1) * step + 1 for s, n, step in zip(start, counts, steps, strict=True)]
    return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *steps, 1))


def _unravel(i: jax.Array, grid: Sequence[int]) -> list[Any]:
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


def _crop(x: jax.Array, first: Sequence[int], sizes: Sequence[int]) -> jax.Array:
    """Returns `sizes` positions of each spatial dimension from `first` on, zeros outside `x`."""
    dims = list(zip(first, sizes, x.shape[1:-1], strict=True))
    start = [min(max(lo, 0), old) for lo, _, old in dims]
    stop = [min(max(lo + size, at), old) for (lo, size, old), at in zip(dims, start, strict=True)]
    # First the slice, then the pads: a `pad` that crops too makes XLA:CPU pad the whole array.
    x = lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]))
    pads = [
        (at - lo if at < end else size, lo + size - end if at < end else 0, 0)
        for (lo, size, _), at, end in zip(dims, start, stop, strict=True)
    ]
    if not any(map(any, pads)):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def _weights(kernel: jax.Array) -> Callable[[tuple[int, ...]], jax.Array]:
    """Returns a function of a tap, which slices its weights once for all who read them."""

    @functools.cache
    def weights(tap: tuple[int, ...]) -> jax.Array:
        return lax.slice(kernel, (*tap, 0), (*[a + 1 for a in tap], kernel.shape[-1]))

    return weights


def _weigh(window: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the window times the weights of a tap."""
    return lax.mul(window, lax.broadcast_in_dim(weights, window.shape, range(1, window.ndim)))


def _sum_taps(terms: Mapping[tuple[int, ...], jax.Array]) -> jax.Array:
    """Sums {tap: product}: each row of the kernel in order, the rows as a tree.

    In one chain of 49 additions each waits for the one before. (`lax.add` traces in 0.4 of the
    time that `+` takes, which counts here.)
    """
    rows: dict[tuple[int, ...], jax.Array] = {}
    for tap, term in terms.items():
        row = tap[:-1]
        rows[row] = lax.add(rows[row], term) if row in rows else term
    sums = list(rows.values())
    while len(sums) > 1:
        pairs = [lax.add(a, b) for a, b in zip(sums[::2], sums[1::2], strict=False)]
        sums = pairs + sums[2 * len(pairs) :]
    return sums[0]


def _halves(terms: Mapping[tuple[int, ...], jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the sums of the first and of the second half of the terms."""
    items = list(terms.items())
    middle = (len(items) + 1) // 2
    first = _sum_taps(dict(items[:middle]))
    return first, _sum_taps(dict(items[middle:])) if items[middle:] else jnp.zeros_like(first)


def _together(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> list[jax.Array]:
    """Adds each pair, all in one loop, so that what the pairs have in common is loaded once.

    XLA:CPU has no fusion with several results but one: a `reduce` of several operands.
    """
    if len(pairs) == 1:
        return [lax.add(*pairs[0])]
    operands = tuple(jnp.stack(pair) for pair in pairs)
    zeros = tuple(jnp.zeros((), x.dtype) for x in operands)
    return list(lax.reduce(operands, zeros, lambda a, b: tuple(map(lax.add, a, b)), (0,)))
