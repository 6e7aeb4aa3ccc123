"""Which sum over taps computes a convolution: regions, rows, tiles or a loop, on integers alone."""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from flax_dwconv._lowering.axis import Axis
from flax_dwconv._lowering.tuning import Effort, Tuning

# For each dimension, what `Axis.phases` returns.
Phases = Sequence[Sequence[tuple[range, Axis]]]


@dataclasses.dataclass(frozen=True)
class Zeros:
    """Outputs that are 0, since no tap reads for them."""


@dataclasses.dataclass(frozen=True)
class Regions:
    """Regions of the outputs, each the sum of those taps that read inside the image.

    Attributes:
      padded: for each spatial dimension, whether there are no regions along it: the taps that read
        outside for some outputs are padded, each by itself.
    """

    padded: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Whole rows, each output of them the sum of those taps that read inside the row.

    Attributes:
      exchanged: for each spatial dimension but the last, whether image and kernel exchange their
        roles there: the image's rows are the taps.
      sums_each: how the outputs are summed up, see `Tuning.sums_each`.
    """

    exchanged: tuple[bool, ...]
    sums_each: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of neighbouring outputs of a row, all taps one by one; the image is padded.

    Attributes:
      outputs: neighbouring outputs of a tile.
      sums_each: how they are summed up, see `Tuning.sums_each`.
    """

    outputs: int
    sums_each: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """Tiles again, whose taps are a loop, or two, each over some columns of the kernel.

    Attributes:
      outputs: neighbouring outputs of a tile.
      sums_each: how they are summed up, see `Tuning.sums_each`.
      passes: the loops.
      parallel: as `parallel_loops` in `Tuning`.
    """

    outputs: int
    sums_each: int
    passes: tuple["Pass", ...]
    parallel: bool


@dataclasses.dataclass(frozen=True)
class Pass:
    """A loop over the columns of the kernel from `start` to `stop`.

    Attributes:
      start: the first column, an index into the last spatial dimension.
      stop: the column after the last.
      taps: the taps of each dimension that one pass of the loop adds.
      grid: how many passes there are along each dimension; `taps` times `grid` are all.
    """

    start: int
    stop: int
    taps: tuple[int, ...]
    grid: tuple[int, ...]


Algorithm = Zeros | Regions | Rows | Tiles | Loop
# Of each dimension the first position of an image, perhaps before it, and how many follow.
Crop = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of the outputs along every dimension: a convolution that is not dilated.

    Attributes:
      taps: of each dimension, those of the kernel that read for this phase.
      axes: its geometry.
      algorithm: what computes it.
    """

    taps: tuple[range, ...]
    axes: tuple[Axis, ...]
    algorithm: Algorithm


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is convolved at a time, in a loop over a batch: some images, or some rows of one.

    Attributes:
      images: how many images; 1 if `rows` are not all.
      rows: how many rows of outputs, which are positions of one spatial dimension.
      dim: that dimension: the first that has more outputs than taps; 0 if there is none.
      axis: the geometry of whole images along it.
    """

    images: int
    rows: int
    dim: int
    axis: Axis

    @property
    def part(self) -> Axis:
        """The geometry of one piece along `dim`: all that its rows read, pads included."""
        part = dataclasses.replace(self.axis, out=self.rows, low=0)
        return dataclasses.replace(part, size=part.reach)


@dataclasses.dataclass(frozen=True)
class Taps:
    """A sum over taps: of an image and each of the kernels.

    Attributes:
      exchanged: whether image and kernel exchange their roles, as `Axis.swapped` does.
      axes: the geometry, exchanged if they are.
      crop: the first position and the size of the image along each dimension, pads included, that
        all phases read; None, where each phase reads the image as it is and may pad it.
      counts: how many phases there are along each dimension.
      phases: all of them, the last dimension fastest. If there is a `crop`, their geometry is that
        of the image after it. If `piece` has only some of the rows, their geometry along its
        dimension is that of one piece, which is padded there already.
      piece: what is convolved at a time; None: the whole batch.
      more_channels: how many channels of zeros a padded image has after its own, see
        `crowded_channels` in `Tuning`.
      whole: as in `choose`.
      parallel: as `parallel_loops` in `Tuning`.
    """

    exchanged: bool
    axes: tuple[Axis, ...]
    crop: Crop | None
    counts: tuple[int, ...]
    phases: tuple[Phase, ...]
    piece: Piece | None
    more_channels: int
    whole: bool
    parallel: bool


def choose(
    examples: int,
    kernels: int,
    axes: Sequence[Axis],
    channels: int,
    tuning: Tuning,
    broadcast: bool = False,
    whole: bool = False,
) -> tuple[Taps, str]:
    """Returns the algorithm that convolves every example with every kernel, and why.

    Args:
      examples: images of the batch.
      kernels: kernels for each channel.
      axes: the geometry of each spatial dimension.
      channels: of image and kernel.
      tuning: the constants.
      broadcast: whether what a tap reads is repeated in the loop, for each filter of a channel.
      whole: whether it is known that no device has only a part of the arrays: on CPU, in a program
        that is not partitioned. Then the batch may be a loop, and the weights of all taps one flat
        array.
    """
    larger = math.prod(axis.kernel for axis in axes) > math.prod(axis.size for axis in axes)
    exchanged = larger and not broadcast
    if exchanged:
        # In derivatives of the kernel gradient, the "kernel" is an image.
        examples, axes = kernels, [axis.swapped() for axis in axes]
    phases = [axis.phases() for axis in axes]
    interleaved = any(len(of_axis) > 1 for of_axis in phases)
    image = examples * math.prod(axis.size for axis in axes) * channels
    results = examples * math.prod(axis.out for axis in axes) * channels
    # With the regions of several phases of a 5x5 kernel, LLVM does not vectorise; tiles take 1.4
    # times as long as single outputs.
    elements = 0 if interleaved else max(image, results)
    effort = [effort for effort in tuning.efforts if elements >= effort.elements][-1]
    if broadcast:
        # The image is the smaller part of what is read and written, so its padded copy is cheap.
        # Neighbouring outputs would have to be put in order, which is a copy of the result.
        effort = Effort(effort.elements, region_taps=0, products=1)
    # In a loop, an input gradient in phases takes up to twice as long: (4, 63, 63, 162), 5x5,
    # stride 2. With several filters, the padded image is small beside the result.
    divisible = whole and not (exchanged or interleaved or broadcast)
    most = effort.region_taps
    of_kernel = math.prod(axis.kernel for axis in axes)
    shared = channels % tuning.vector or of_kernel * channels > tuning.region_weights
    if shared and effort.products >= 2 * of_kernel:
        tiles = sum(_memory(axes, Tiles(outputs=1, sums_each=0)))
        if channels * tiles * (1 if divisible else examples) < tuning.batch_temporaries:
            most = min(most, tuning.tiled_region_taps)
    padded, region_taps = _regions(phases, most, tuning)
    reason = None if interleaved else _better_in_tiles(axes, effort, tuning)
    regions = region_taps <= most and reason is None
    crop = None
    if interleaved and not regions and not exchanged:
        crop, phases = _same_image(phases)
    chosen = []
    rows = elements >= tuning.exchanged_rows_elements and not exchanged
    planes, several = examples * channels, divisible and examples > 1
    for parts in itertools.product(*phases):
        taps, geometry = zip(*parts, strict=True)
        algorithm = Regions(padded)
        if not regions:
            algorithm = _padded(geometry, effort.products, tuning, rows, planes, several)
        chosen.append(Phase(taps, geometry, algorithm))
    some = f" of {channels} channels" if most < effort.region_taps else ""
    why = reason or "{} taps in regions, {} {} for {}".format(
        region_taps,
        "at most" if regions else "more than",
        most,
        "an image in phases" if interleaved else f"{elements} elements{some}",
    )
    piece = None
    if divisible:
        piece = _piece(examples, channels, chosen[0], tuning)
        if piece:
            why += f", {piece.images} of {examples} images at a time"
            if piece.rows < piece.axis.out:
                why += f", {piece.rows} of {piece.axis.out} rows"
                chosen = [_cut(chosen[0], piece)]
    large = elements >= tuning.padded_before_elements
    in_tiles = len(chosen) == 1 and isinstance(chosen[0].algorithm, Tiles | Loop)
    if large and in_tiles and piece is None and not exchanged:
        crop, chosen[0] = _padded_before(chosen[0])
    copied = not any(isinstance(of.algorithm, Regions | Rows) for of in chosen)
    crowded = channels % tuning.crowded_channels == 0
    more = tuning.more_channels if copied and crowded and whole and not broadcast else 0
    found = Taps(
        exchanged=exchanged,
        axes=tuple(axes),
        crop=crop,
        counts=tuple(len(of_axis) for of_axis in phases),
        phases=tuple(chosen),
        piece=piece,
        more_channels=more,
        whole=whole,
        parallel=tuning.parallel_loops,
    )
    return found, why


def _piece(examples: int, channels: int, phase: Phase, tuning: Tuning) -> Piece | None:
    """Returns what is convolved at a time, or None for the whole batch.

    Args:
      examples: images of the batch.
      channels: of each.
      phase: the only one. The results of several would interleave.
      tuning: the constants.
    """
    copies, sums = _memory(phase.axes, phase.algorithm)
    results = math.prod(axis.out for axis in phase.axes)
    planes = examples * channels
    if not copies or not _in_pieces(planes, copies, sums, results, examples > 1, tuning):
        return None
    most = tuning.loop_copies - 1
    dim = next((d for d, axis in enumerate(phase.axes) if axis.out > axis.kernel), 0)
    axis = phase.axes[dim]
    if channels * (copies + sums) < tuning.batch_temporaries:
        images, rows = nearly_dividing(examples, most // (channels * copies)), axis.out
    else:

        def copied(rows: int) -> int:
            part = _cut(phase, Piece(1, rows, dim, axis))
            return channels * _memory(part.axes, part.algorithm)[0]

        # With far fewer rows of outputs in a piece than the kernel reaches over, and a stride of 1,
        # each row of the image would be copied more than twice.
        least = min((axis.kernel - 1) * axis.rhs_dilation + 1, axis.out)
        rows = least + bisect.bisect_right(range(least + 1, axis.out + 1), most, key=copied)
        images, rows = 1, -(-axis.out // -(-axis.out // rows))  # as equal as they can be
    return None if (images, rows) == (examples, axis.out) else Piece(images, rows, dim, axis)


def _cut(phase: Phase, piece: Piece) -> Phase:
    """Returns the phase of a piece: `phase` is that of whole images."""
    axes = [piece.part if d == piece.dim else axis for d, axis in enumerate(phase.axes)]
    return dataclasses.replace(phase, axes=tuple(axes))


def _in_pieces(
    planes: int, copies: int, sums: int, results: int, several: bool, tuning: Tuning
) -> bool:
    """Returns whether a loop over a batch pays. There is none if one piece would be all of it.

    A loop over images saves that padded copies leave the caches. It costs that results are written
    twice more: as the zeros that it begins with, and where the pieces are put together.

    Args:
      planes: images times channels.
      copies: elements of padded copies, of one image and channel.
      sums: of sums.
      results: of results.
      several: whether there are images that may be convolved one after the other.
      tuning: the constants.
    """
    large = planes * (copies + sums) >= tuning.batch_temporaries
    return large or several and planes * (copies - 2 * results) >= tuning.loop_gain


def nearly_dividing(size: int, most: int) -> int:
    """Returns the size of equal pieces that cover `size`: of some sizes, that which overlaps least.

    Sizes of a quarter of the largest and less are not tried: each piece costs time of its own.

    Args:
      size: what is to be covered.
      most: the largest size of a piece, unless that is less than 1.
    """
    largest = max(min(size, most), 1)
    return min(range(largest, largest // 4, -1), key=lambda piece: -(-size // piece) * piece)


def _memory(axes: Sequence[Axis], algorithm: Algorithm) -> tuple[int, int]:
    """Returns how many elements of padded copies, and of sums, one image and channel needs."""
    *outer, last = axes
    padded, sums = math.prod(axis.reach for axis in axes), math.prod(axis.out for axis in axes)
    match algorithm:
        case Zeros() | Regions():
            return 0, 0
        case Rows():
            return math.prod(axis.reach for axis in outer) * last.size, sums
        case Tiles():
            return padded, sums
        case Loop():
            return padded, 2 * sums  # those that a pass reads, and those that it writes


def tile_reach(axes: Sequence[Axis], outputs: int) -> tuple[int, ...]:
    """Returns how many positions of each dimension tiles of so many outputs read, pads included."""
    *others, last = axes
    rounded = dataclasses.replace(last, out=-(-last.out // outputs) * outputs)
    return tuple(axis.reach for axis in (*others, rounded))


def _padded_before(phase: Phase) -> tuple[Crop, Phase]:
    """Has a phase in tiles read an image that is padded already.

    Returns:
      `crop` of `Taps`, and the phase.
    """
    algorithm: Any = phase.algorithm  # `Tiles` or `Loop`
    sizes = tile_reach(phase.axes, algorithm.outputs)
    axes = [
        dataclasses.replace(axis, size=size, low=0)
        for axis, size in zip(phase.axes, sizes, strict=True)
    ]
    crop = tuple(-axis.low for axis in phase.axes), sizes
    return crop, dataclasses.replace(phase, axes=tuple(axes))


def _same_image(phases: Phases) -> tuple[Crop, Phases]:
    """Has all phases read one padded image.

    Args:
      phases: of each dimension.

    Returns:
      The first position and the size of the padded image along each dimension, and the phases whose
      input it is.
    """
    first = [min(-axis.low for _, axis in of_axis) for of_axis in phases]
    stop = [max(axis.reach - axis.low for _, axis in of_axis) for of_axis in phases]
    sizes = [hi - lo for lo, hi in zip(first, stop, strict=True)]
    moved = [
        [(taps, dataclasses.replace(axis, size=size, low=axis.low + lo)) for taps, axis in of_axis]
        for of_axis, lo, size in zip(phases, first, sizes, strict=True)
    ]
    return (tuple(first), tuple(sizes)), moved


def _regions(phases: Phases, most: int, tuning: Tuning) -> tuple[tuple[bool, ...], int]:
    """Returns along which dimensions taps would be padded, and how many taps regions would have.

    Args:
      phases: of each dimension.
      most: from more taps than this on, a dimension is not looked at closely: along 4,096 taps,
        `Axis.runs` would take seconds.
      tuning: the constants.
    """
    padded, taps, pads = [], 1, tuning.padded_taps
    for of_axis in reversed(phases):
        cut = [run.count < axis.out for _, axis in of_axis for _, run in axis.reads().values()]
        padded.insert(0, sum(cut) <= pads)
        if padded[0]:
            pads -= sum(cut)
            taps *= len(cut)
        elif len(cut) > most:
            taps *= len(cut)
        else:
            taps *= sum(len(run.taps) for _, axis in of_axis for run in axis.runs())
    return tuple(padded), taps


def _better_in_tiles(axes: Sequence[Axis], effort: Effort, tuning: Tuning) -> str | None:
    """Returns why a padded image is faster than one in regions of few taps, or None.

    Args:
      axes: the geometry, without phases.
      effort: how much may be compiled.
      tuning: the constants.
    """
    kernel = math.prod(axis.kernel for axis in axes)
    if effort.products < 2 * kernel:
        return None  # a pass of the loop has no room for a tile of two outputs
    if any(axis.stride > 1 for axis in axes):
        return (
            None  # neighbours share less: tiles take 0.6 to 1.8 of the time, and longer to compile
        )
    # Along a dimension there are at most as many regions as taps that are cut off, plus one.
    cut = [sum(run.count < axis.out for _, run in axis.reads().values()) for axis in axes]
    if not any(cut):
        if kernel >= tuning.whole_image_tile_taps:
            return f"no tap reads outside, and {kernel} taps share what they load in tiles"
    elif sum(taps > 1 for taps in cut) > tuning.region_dimensions:
        return f"several taps cut off along more than {tuning.region_dimensions} dimensions"
    elif max(cut) + 1 > tuning.region_runs:
        return f"up to {max(cut) + 1} regions along a dimension, more than {tuning.region_runs}"
    return None


def _padded(
    axes: Sequence[Axis],
    products: int,
    tuning: Tuning,
    may_exchange: bool,
    planes: int,
    several: bool,
) -> Zeros | Rows | Tiles | Loop:
    """Returns the algorithm for a phase that has no regions.

    Args:
      axes: its geometry.
      products: the most products of a pass of the inner loop; with 1, outputs are single ones.
      tuning: the constants.
      may_exchange: whether image and kernel may exchange their roles along some dimensions.
      planes: images times channels.
      several: as for `_in_pieces`.
    """
    sizes = [axis.kernel for axis in axes]
    taps = math.prod(sizes)
    if not taps:
        return Zeros()
    if taps > tuning.unrolled_taps:
        outputs = tuning.loop_outputs
        passes = _passes(sizes, outputs, tuning)
        loop = Loop(outputs, tuning.sums_each(outputs), passes, tuning.parallel_loops)
        results = math.prod(axis.out for axis in axes)
        in_pieces = _in_pieces(planes, *_memory(axes, loop), results, several, tuning)
        if not in_pieces or products < outputs * taps:
            return loop
    if products > 1 and axes[-1].out <= tuning.row_outputs:
        exchanged = tuple(
            may_exchange and axis.size <= axis.kernel and axis.rhs_dilation == 1
            for axis in axes[:-1]
        )
        return Rows(exchanged, tuning.sums_each(axes[-1].out))
    outputs = _tile(axes, max(min(tuning.tile_outputs, products // taps), 1))
    return Tiles(outputs, tuning.sums_each(outputs))


def _tile(axes: Sequence[Axis], most: int) -> int:
    """Returns how many outputs a tile should have: those of a row need the fewest instructions.

    For each tap, an output is one product with a sum. A tile loads each weight once, and of each
    row of the kernel all that its outputs read. The last tile of a row may compute outputs that
    nobody needs.

    Args:
      axes: the geometry.
      most: the most outputs.
    """
    last = axes[-1]
    taps = math.prod(axis.kernel for axis in axes)

    def instructions(outputs: int) -> float:
        loads = taps // last.kernel * ((outputs - 1) * last.stride + last.kernel) + taps
        return -(-last.out // outputs) * (outputs * taps + loads)

    return min(range(most, 0, -1), key=instructions)


def _passes(sizes: Sequence[int], outputs: int, tuning: Tuning) -> tuple[Pass, ...]:
    """Returns the loops over a kernel: its columns in equal pieces, and what is left of them.

    A pass of a loop adds a piece of a row, or as many rows as divide them all.
    """
    *_, columns = sizes
    pieces = -(-columns * outputs // tuning.loop_products)
    width = -(-columns // pieces)
    rest = columns % width
    passes = []
    for start, stop, piece in [(0, columns - rest, width), (columns - rest, columns, rest)]:
        if start == stop:
            continue
        taps = [piece]
        for size in reversed(sizes[:-1]):
            most = max(tuning.loop_products // outputs // math.prod(taps), 1)
            taps.insert(0, max(n for n in range(1, most + 1) if size % n == 0))
        grid = [size // n for size, n in zip([*sizes[:-1], stop - start], taps, strict=True)]
        passes.append(Pass(start, stop, tuple(taps), tuple(grid)))
    return tuple(passes)
