"""Sums over taps: forward convolutions, and input gradients phase by phase.

Arrays have their channels `c` as the last axis and any number of spatial dimensions. All algorithms
compute

    out[n, m, o, c] = sum_a dilated[n, o * stride + a * rhs_dilation - low, c] * kernel[m, a, c]

as `axis` explains it for one dimension. What is to be emitted is the plan's choice.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv._lowering import forward_plan as plan
from flax_dwconv._lowering import sums, windows, workarounds
from flax_dwconv._lowering.axis import Axis, Run, inside


def cropped(x: jax.Array, taps: plan.Taps) -> jax.Array:
    """Returns the image `(n, *sizes, c)` as `convolve` reads it, perhaps with more channels.

    See `crop` of `Taps`. What computes the image may write it so, without a loop for the pads.
    """
    return x if taps.crop is None else windows.crop(x, *taps.crop, taps.more_channels)


def convolve(x: jax.Array, kernel: jax.Array, taps: plan.Taps) -> jax.Array:
    """Returns the convolution of every example with every kernel.

    Args:
      x: `(n, *sizes, c)`, as `cropped` returns it.
      kernel: `(m, *kernels, c)`, of the dtype of `x`.
      taps: the plan.

    Returns:
      `(n, m, *outs, c)`.
    """
    if taps.exchanged:
        y = _with_every_kernel(kernel, x, taps)
        return lax.rev(jnp.swapaxes(y, 0, 1), range(2, y.ndim - 1))
    if taps.piece is not None:
        return _piece_by_piece(x, kernel, taps, taps.piece)
    return _with_every_kernel(x, kernel, taps)


def _piece_by_piece(
    x: jax.Array, kernel: jax.Array, taps: plan.Taps, piece: plan.Piece
) -> jax.Array:
    """Convolves a piece of the batch at a time: padded copies and tiles are as large as it needs.

    Where temporaries and result have more than 32 MiB together, glibc takes memory from the system
    in each call and gives it back. To map and clear its pages takes longer than the convolution.
    """
    shape = (x.shape[0], kernel.shape[0], *[axis.out for axis in taps.axes], x.shape[-1])
    # A single kernel has no dimension here. Else XLA would not let the loop that reads the result,
    # such as an activation, write where it reads: 32 images of 34x34x178 would need 28 MiB, not 7.
    single = [1] if kernel.shape[0] == 1 else []
    flat = [n for d, n in enumerate(shape) if d not in single]
    rows = piece.axis.out
    grid = -(-x.shape[0] // piece.images), -(-rows // piece.rows)

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        i = workarounds.parallel(i) if taps.parallel else i
        at = windows.unravel(i, grid)
        # The last piece may end outside. `dynamic_slice` and `dynamic_update_slice` then begin
        # earlier, both alike, and some outputs are computed once more.
        image, row = [j * n for j, n in zip(at, (piece.images, piece.rows), strict=True)]
        part = lax.dynamic_slice_in_dim(x, image, piece.images, allow_negative_indices=False)
        if piece.rows < rows:
            part = _read_by(part, row, piece)
        results = lax.squeeze(_with_every_kernel(part, kernel, taps), single)
        corner = [image, *[0] * (y.ndim - 1)]
        corner[2 - len(single) + piece.dim] = row
        return lax.dynamic_update_slice(y, results, corner, allow_negative_indices=False)

    zeros = lax.full_like(x, 0, shape=flat)  # which vary in a `shard_map` as `x` does
    return lax.fori_loop(0, math.prod(grid), step, zeros).reshape(shape)


def _read_by(x: jax.Array, row: jax.Array, piece: plan.Piece) -> jax.Array:
    """Returns what rows of outputs read: rows of `x`, and zeros before and after them.

    Args:
      x: `(n, *sizes, c)`.
      row: the first of the rows of outputs, known when the program runs.
      piece: how many they are, and along which dimension.
    """
    axis = piece.axis
    start, sizes = [0] * (x.ndim - 2), list(x.shape[1:-1])
    start[piece.dim], sizes[piece.dim] = -axis.low, axis.reach
    x = windows.crop(x, start, sizes, zero=workarounds.zero_within(row, x.dtype))
    at, size, dim = row * axis.stride, piece.part.size, piece.dim + 1
    y = lax.dynamic_slice_in_dim(x, at, size, dim, allow_negative_indices=False)
    # Without this, XLA pads the whole image in each pass, if no other dimension is padded and the
    # taps are a loop.
    return workarounds.computed_once(y)


def _with_every_kernel(x: jax.Array, kernel: jax.Array, taps: plan.Taps) -> jax.Array:
    if kernel.shape[0] == 1:
        return lax.expand_dims(_interleaved(x, lax.squeeze(kernel, [0]), taps), [1])
    return jax.vmap(lambda k: _interleaved(x, k, taps), out_axes=1)(kernel)


def _interleaved(x: jax.Array, kernel: jax.Array, taps: plan.Taps) -> jax.Array:
    """Computes every phase and puts its outputs where they belong."""

    def build(d: int, phases: Iterator[plan.Phase]) -> jax.Array:
        if d == len(taps.axes):
            return _phase(x, kernel, next(phases), taps)
        parts = [build(d + 1, phases) for _ in range(taps.counts[d])]
        return windows.interleave(parts, d + 1, taps.axes[d].out)

    return build(0, iter(taps.phases))


def _phase(x: jax.Array, kernel: jax.Array, phase: plan.Phase, taps: plan.Taps) -> jax.Array:
    kernel = kernel[tuple(slice(of.start, of.stop, of.step) for of in phase.taps)]
    match phase.algorithm:
        case plan.Zeros():
            outs = [axis.out for axis in phase.axes]
            return jnp.zeros((x.shape[0], *outs, *kernel.shape[len(outs) :]), x.dtype)
        case plan.Regions():
            return _regions(x, kernel, phase.axes, phase.algorithm, taps.whole)
        case plan.Rows():
            return _rows(x, kernel, phase.axes, phase.algorithm, taps.exchanged)
        case plan.Tiles():
            return _tiles(x, kernel, phase.axes, phase.algorithm, taps)
        case plan.Loop():
            return _loop(x, kernel, phase.axes, phase.algorithm, taps)
        case _:
            raise AssertionError(phase.algorithm)


def _regions(
    x: jax.Array,
    kernel: jax.Array,
    axes: Sequence[Axis],
    regions: plan.Regions,
    whole: bool,
) -> jax.Array:
    """One phase as regions, each the sum of those taps that read inside the image.

    No padded copy of the image is made: with 3x3 kernels 1.4 to 2.5 times faster than with one.
    Along the `padded` dimensions there are no regions; what the taps sum up to there is padded if
    some outputs read outside. LLVM makes a loop for each case, as for regions, from fewer taps.
    """
    weights = windows.weights_of(kernel, len(axes), whole)
    steps = [axis.stride for axis in axes]
    # The pads of the last dimension outermost: for a strided 3x3 kernel 0.95 of the time.
    dims = [d for d in range(len(axes)) if not regions.padded[d]]
    dims += [d for d in reversed(range(len(axes))) if regions.padded[d]]

    def build(chosen: dict[int, Run]) -> jax.Array:
        counts = [chosen[d].count if d in chosen else axis.out for d, axis in enumerate(axes)]
        shape = (x.shape[0], *counts, *kernel.shape[len(axes) :])
        if len(chosen) == len(axes):
            taps = [chosen[d].taps for d in range(len(axes))]
            starts = itertools.product(*[at.values() for at in taps])
            terms: sums.Terms = {
                tap: lax.mul(windows.window(x, start, counts, steps), weights(tap, shape))
                for tap, start in zip(itertools.product(*taps), starts, strict=True)
            }
            return sums.tree(terms, shape, x.dtype)
        d = dims[len(chosen)]
        if not regions.padded[d]:
            parts = [build(chosen | {d: run}) for run in axes[d].runs()]
            return lax.concatenate(parts, d + 1) if len(parts) > 1 else parts[0]
        terms = {
            (tap,): windows.pad(
                build(chosen | {d: run}), d + 1, first, counts[d] - first - run.count
            )
            for tap, (first, run) in axes[d].reads().items()
        }
        return sums.tree(terms, shape, x.dtype)

    return build({})


def _rows(
    x: jax.Array, kernel: jax.Array, axes: Sequence[Axis], rows: plan.Rows, exchanged: bool
) -> jax.Array:
    """One phase in rows of few outputs, each output the sum of those taps that read inside the row.

    Padding a row of 7 for a 7x7 kernel would double it. If the other dimensions are as small, the
    input and the kernel exchange their roles there: the rows of the input are the taps, and it is
    the kernel that is padded, once for all examples. With 32 images of 7x7x768 and a 7x7 kernel,
    padding the images takes 1.4 times as long.
    """
    *outer, last = axes
    outer = [
        axis.swapped() if exchanged else axis
        for exchanged, axis in zip(rows.exchanged, outer, strict=True)
    ]

    def windows_of(
        array: jax.Array, slides: Sequence[bool]
    ) -> Callable[[tuple[int, ...]], jax.Array]:
        """Returns a function of a position of `array`, which slides along some dimensions."""
        dims = list(zip(slides, outer, strict=True))
        first = [-axis.low if slide else 0 for slide, axis in dims]
        reach = [axis.reach if slide else axis.kernel for slide, axis in dims]
        counts = [axis.out if slide else 1 for slide, axis in dims]
        steps = [axis.stride if slide else 1 for slide, axis in dims]
        apart = [axis.rhs_dilation if slide else 1 for slide, axis in dims]
        array = windows.crop(array, [*first, 0], [*reach, array.shape[-2]])

        @functools.cache
        def window(at: tuple[int, ...]) -> jax.Array:
            start = [a * gap for a, gap in zip(at, [*apart, 1], strict=True)]
            return windows.window(array, start, [*counts, 1], [*steps, 1])

        return window

    images = windows_of(x, [not exchanged for exchanged in rows.exchanged])
    weights = windows_of(kernel[None], rows.exchanged)
    reads = [axis.reads() for axis in outer]

    @functools.cache
    def seen(row: tuple[int, ...], b: int) -> jax.Array | None:
        """Returns the weight `b` of a row as `_Tiles._seen` does, if it is a pixel."""
        y = weights((*row, b))
        for d, (a, swapped) in enumerate(zip(row, rows.exchanged, strict=True)):
            if swapped or not exchanged:
                continue
            if a not in reads[d]:
                return None
            first, run = reads[d][a]
            if run.count < outer[d].out:
                shape = [outer[d].out if e == d + 1 else n for e, n in enumerate(y.shape)]
                y = lax.broadcast_in_dim(y, shape, range(y.ndim))
                o = lax.broadcasted_iota("int32", shape, d + 1)
                mask = (o >= first) & (o < first + run.count)
                y = lax.select(mask, y, lax.full_like(y, 0))
        return y

    outputs: list[sums.Terms] = [{} for _ in range(last.out)]
    for i, terms in enumerate(outputs):
        for row in itertools.product(*[range(axis.kernel) for axis in outer]):
            for b in range(last.kernel):
                t = i * last.stride + b * last.rhs_dilation - last.low
                if 0 <= t < last.size:
                    image, weight = images((*row, t)), seen(row, b)
                    if weight is not None:
                        terms[*row, b] = windows.multiply(image, weight)
    shape = (x.shape[0], *[axis.out for axis in outer], 1, x.shape[-1])
    y = lax.concatenate(sums.together(outputs, rows.sums_each, shape, x.dtype), len(axes))
    return lax.rev(y, [d for d, exchanged in enumerate(rows.exchanged, 1) if exchanged])


class _Tiles:
    """Tiles of neighbouring outputs of the last dimension, which share what they load.

    A tap costs two loads, of the input and of the kernel, and one multiplication, so that loads are
    what a convolution with many taps waits for. Neighbours use the same weights and nearly the same
    inputs.

    Attributes:
      x: the image, padded so that all outputs of all tiles read inside, perhaps with more channels.
      channels: how many of them are read.
      shape: that of one output of each tile, `(n, *outs, tiles, c)`.
    """

    def __init__(
        self,
        x: jax.Array,
        tail: Sequence[int],
        axes: Sequence[Axis],
        algorithm: plan.Tiles | plan.Loop,
        taps: plan.Taps,
    ) -> None:
        *outs, last = [axis.out for axis in axes]
        outputs = algorithm.outputs
        self._axes, self._sums_each = axes, algorithm.sums_each
        self._exchanged, self._whole = taps.exchanged, taps.whole
        self._blocks = [*outs, -(-last // outputs)]
        self._steps = [axis.stride for axis in axes]
        self._steps[-1] *= outputs
        reach = plan.tile_reach(axes, outputs)
        more = taps.more_channels if taps.crop is None else 0  # else `cropped` added them
        self.x = windows.crop(x, [-axis.low for axis in axes], reach, more)
        self.channels = tail[0]
        self.shape = (x.shape[0], *self._blocks, *tail)

    def first(self) -> jax.Array:
        """What the first tap reads for the first output of each tile."""
        start = [0] * len(self._axes)
        image = windows.window(self.x, start, self._blocks, self._steps, self.channels)
        return windows.repeated(image, self.shape)

    def add(
        self,
        outputs: Sequence[sums.Terms],
        window: windows.Reader,
        kernel: jax.Array,
        corner: Sequence[Any] | None = None,
    ) -> list[jax.Array]:
        """Adds the taps of `kernel` to what is summed up for each output of a tile.

        Args:
          outputs: what is summed up already.
          window: of the image, such that the first tap reads at position 0.
          kernel: `(*sizes, c)`: some taps.
          corner: the first of these taps, in a loop known only when the program runs; None is the
            first of all.
        """
        images = functools.cache(lambda *at: window(at, self._blocks, self._steps))
        weights = windows.weights_of(kernel, len(self._axes), self._whole)
        apart = [axis.rhs_dilation for axis in self._axes]
        for i, terms in enumerate(outputs):
            for tap in itertools.product(*map(range, kernel.shape[: len(apart)])):
                *rows, at = [a * gap for a, gap in zip(tap, apart, strict=True)]
                image = images(*rows, at + i * self._axes[-1].stride)
                image = windows.repeated(image, self.shape)
                weight = weights(tap, self.shape)
                if self._exchanged:
                    weight = self._seen(weight, tap if corner is None else map(add, corner, tap), i)
                if weight is not None:
                    terms[tap] = lax.mul(image, weight)
        return sums.together(outputs, self._sums_each, self.shape, self.x.dtype)

    def _seen(self, weight: jax.Array, tap: Iterable[Any], i: int) -> jax.Array | None:
        """Returns `weight` for those outputs for which the tap reads inside, 0 for the others.

        If image and kernel have exchanged their roles, the weight is a pixel, and what is padded is
        the kernel. A pixel that is not a number must not reach the outputs that do not see it, and
        0 * NaN is NaN.

        Args:
          weight: of one tap, of the shape of one output of each tile.
          tap: its place in the kernel.
          i: which output of a tile it is.

        Returns:
          The weight, or None if the tap reads outside for all of them.
        """
        masks = []
        for d, (a, axis) in enumerate(zip(tap, self._axes, strict=True)):
            last = d == len(self._axes) - 1
            start = a * axis.rhs_dilation - axis.low + i * axis.stride * last
            step, count = self._steps[d], self._blocks[d]
            if isinstance(start, int):
                outputs = inside(start, step, count, axis.size)
                if not outputs:
                    return None
                if len(outputs) == count:
                    continue
            # With x64 on, what counts a loop has 64 bits.
            at = start + step * lax.iota(getattr(start, "dtype", "int32"), count)
            mask = (at >= 0) & (at < axis.size)
            masks.append(lax.broadcast_in_dim(mask, self.shape, (d + 1,)))
        if not masks:
            return weight
        return lax.select(
            functools.reduce(lax.bitwise_and, masks), weight, lax.full_like(weight, 0)
        )

    def join(self, outputs: Sequence[jax.Array]) -> jax.Array:
        """Returns the outputs of all tiles in their order."""
        return windows.interleave(outputs, len(self._axes), self._axes[-1].out)


def _tiles(
    x: jax.Array, kernel: jax.Array, axes: Sequence[Axis], plan_: plan.Tiles, taps: plan.Taps
) -> jax.Array:
    """One phase in tiles, all taps one by one."""
    tiles = _Tiles(x, kernel.shape[len(axes) :], axes, plan_, taps)
    outputs: list[sums.Terms] = [{} for _ in range(plan_.outputs)]
    window = functools.partial(windows.window, tiles.x, channels=tiles.channels)
    return tiles.join(tiles.add(outputs, window, kernel))


def _loop(
    x: jax.Array, kernel: jax.Array, axes: Sequence[Axis], loop: plan.Loop, taps: plan.Taps
) -> jax.Array:
    """One phase in tiles, whose taps are loops: a kernel with many taps compiles in time."""
    tail = kernel.shape[len(axes) :]
    tiles = _Tiles(x, tail, axes, loop, taps)
    apart, zeros = [axis.rhs_dilation for axis in axes], [0 for _ in tail]

    def add_columns(outputs: list[jax.Array], columns: plan.Pass) -> list[jax.Array]:
        part = lax.slice_in_dim(kernel, columns.start, columns.stop, axis=len(axes) - 1)

        def step(i: jax.Array, outputs: list[jax.Array]) -> list[jax.Array]:
            i = workarounds.parallel(i) if loop.parallel else i
            corner = windows.unravel(i, columns.grid)
            at = [j * n for j, n in zip(corner, columns.taps, strict=True)]
            some = lax.dynamic_slice(part, (*at, *zeros), (*columns.taps, *tail))
            at[-1] += columns.start
            start = [a * gap for a, gap in zip(at, apart, strict=True)]
            window = windows.moving_window(tiles.x, start, channels=tiles.channels)
            return tiles.add([{(): y} for y in outputs], window, some, at)

        # Two passes in one. XLA writes the sums elsewhere than it reads them, and after a single
        # pass copies them back; of two, the second writes where the first read: 0.65 of the time.
        return lax.fori_loop(0, math.prod(columns.grid), step, outputs, unroll=2)

    # Sharded, and varying in a `shard_map`, as what is added to them.
    outputs = [lax.full_like(tiles.first(), 0)] * loop.outputs
    for columns in loop.passes:
        outputs = add_columns(outputs, columns)
    return tiles.join(outputs)
