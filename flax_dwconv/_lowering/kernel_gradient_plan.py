"""How the gradients of the taps of a kernel are shared out among passes, on integers alone."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from flax_dwconv._lowering.axis import Axis, inside
from flax_dwconv._lowering.tuning import Tuning

# Of one dimension, products one by one: of each {tap: (the position of the cotangent, that of the
# image)}, without the taps that read outside.
Reads = tuple[dict[int, tuple[int, int]], ...]


@dataclasses.dataclass(frozen=True)
class Block:
    """Products of image and cotangent that a pass sums up, and equal blocks next to them.

    Attributes:
      reads: of each dimension.
      counts: how many such blocks follow one another along each dimension.
      apart: along each dimension, the distance of one block to the next, in positions of the image.
        In positions of the cotangent it is the length of `reads`.
    """

    reads: tuple[Reads, ...]
    counts: tuple[int, ...]
    apart: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """What a block has of one dimension.

    Attributes:
      reads: as in `Block`.
      count: as in `counts` of `Block`.
      rest: whether it is what the equal blocks leave.
    """

    reads: Reads
    count: int
    rest: bool


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop over the passes of a kernel gradient.

    Attributes:
      first: the first position of the image along each dimension that the first pass reads.
      reach: how many positions all passes read, pads included.
      apart: the distance of one pass to the next, in positions of the image.
      parallel: as `parallel_loops` in `Tuning`.
    """

    first: tuple[int, ...]
    reach: tuple[int, ...]
    apart: tuple[int, ...]
    parallel: bool


@dataclasses.dataclass(frozen=True)
class KernelGradient:
    """The gradients of all taps of a kernel, some in one pass.

    Attributes:
      exchanged: whether image and cotangent exchange their roles, as `Axis.swapped` does.
      crop: the first position and the size of the image along each dimension, if it is padded or
        cropped before everything else.
      taps: how many taps of each dimension a pass has.
      grid: how many passes there are along each dimension.
      outs: the taps of the kernel along each dimension; the last passes may have more.
      blocks: for each pass, or in a loop for all, what it sums up.
      row_by_row: how the taps of a pass are summed up, see `sums.together`.
      positions_together: as in `Tuning`.
      loop: the loop, or None if the passes are compiled one by one.
    """

    exchanged: bool
    crop: tuple[tuple[int, ...], tuple[int, ...]] | None
    taps: tuple[int, ...]
    grid: tuple[int, ...]
    outs: tuple[int, ...]
    blocks: tuple[tuple[Block, ...], ...]
    row_by_row: bool
    positions_together: int
    loop: Loop | None


def suits(axes: Sequence[Axis]) -> bool:
    """Whether it is one for `KernelGradient`: a small result of a large image and kernel.

    Args:
      axes: the geometry; the "kernel" is the cotangent, and the outputs are the kernel's taps.
    """
    out = math.prod(axis.out for axis in axes)
    kernel = math.prod(axis.kernel for axis in axes)
    size = math.prod(axis.size for axis in axes)
    return out <= min(kernel, size) and allows(axes)


def allows(axes: Sequence[Axis]) -> bool:
    """Whether `KernelGradient` can compute it at all.

    Args:
      axes: as for `suits`.
    """
    dilated = {axis.lhs_dilation > 1 for axis in axes if axis.lhs_dilation != axis.rhs_dilation}
    both = any(axis.lhs_dilation > 1 and axis.rhs_dilation > 1 for axis in axes)
    return len(dilated) <= 1 and not both


def choose(
    examples: int, axes: Sequence[Axis], channels: int, tuning: Tuning, filters: int = 1
) -> tuple[KernelGradient, str]:
    """Returns the algorithm for the kernel gradient of one image and cotangent, and why.

    Args:
      examples: images of the batch.
      axes: the geometry, `out` being the size of the true kernel. One of `lhs_dilation` and
        `rhs_dilation` is 1 on each axis, the same one on all.
      channels: of image and cotangent.
      tuning: the constants.
      filters: for each channel.
    """
    exchanged = any(axis.lhs_dilation > 1 for axis in axes)
    if exchanged:
        axes = [axis.swapped() for axis in axes]
    # A pass takes neighbouring taps along one dimension, since they share what they read. It is the
    # dimension with the most taps, `out`, and the last of equals. When it was the last of all, an
    # (11, 1) kernel had 11 passes of one tap each, and on 4 images of 56x56x64 its gradient took
    # 25 ms, that of a (1, 11) kernel 0.7 ms.
    along = max(range(len(axes)), key=lambda d: (axes[d].out, d))
    axes, longest, crop = list(axes), axes[along], None
    if longest.edge_taps * min(longest.out, tuning.row_taps) > 2 * tuning.row_products:
        # Too many to be left out one by one, as with a large dilation: they read zeros.
        first, sizes = [0 for _ in axes], [axis.size for axis in axes]
        first[along], sizes[along] = -longest.low, longest.reach
        crop = tuple(first), tuple(sizes)
        axes[along] = longest = dataclasses.replace(longest, size=longest.reach, low=0)
    elements = examples * math.prod(axis.size for axis in axes) * channels

    taps, positions, why = _share(axes, along, elements, tuning)
    grid = [-(-axis.out // n) for axis, n in zip(axes, taps, strict=True)]
    apart = [n * axis.stride for axis, n in zip(axes, taps, strict=True)]
    first = [-axis.low for axis in axes]
    passes = math.prod(grid)

    def result(blocks: Sequence[tuple[Block, ...]], loop: Loop | None) -> KernelGradient:
        return KernelGradient(
            exchanged=exchanged,
            crop=crop,
            taps=tuple(taps),
            grid=tuple(grid),
            outs=tuple(axis.out for axis in axes),
            blocks=tuple(blocks),
            row_by_row=math.prod(taps) >= tuning.outputs_row_by_row,
            positions_together=tuning.positions_together,
            loop=loop,
        )

    if _is_unrolled(passes, passes * taps[along] * longest.kernel, elements, tuning):
        starts = [range(f, n * gap + f, gap) for f, n, gap in zip(first, grid, apart, strict=True)]
        corners = itertools.product(*starts)
        blocks = [_blocks(axes, at, taps, along, positions, tuning) for at in corners]
        # The partial sums of all passes are in memory at the same time. With several filters, they
        # are as large as so many cotangents.
        partial = sum(math.prod(taps) * math.prod(block.counts) for of in blocks for block in of)
        few = partial <= tuning.partial_sums * math.prod(axis.kernel for axis in axes)
        if filters == 1 or few:
            return result(blocks, None), f"{why}; passes one by one: {passes}"
    extent = [dataclasses.replace(axis, out=n).reach for axis, n in zip(axes, taps, strict=True)]
    reach = [(n - 1) * gap + e for n, gap, e in zip(grid, apart, extent, strict=True)]
    start = [0 for _ in axes]
    if grid[along] == 1 and longest.kernel <= positions:
        # Each pass reads the whole of the image along this dimension at once, which needs no pads.
        start[along], first[along] = first[along], 0
        extent[along] = reach[along] = longest.size
    else:
        positions = tuning.split_positions
    inner = [dataclasses.replace(axis, size=e) for axis, e in zip(axes, extent, strict=True)]
    blocks = _blocks(inner, start, taps, along, positions, tuning)
    loop = Loop(tuple(first), tuple(reach), tuple(apart), tuning.parallel_loops)
    return result([blocks], loop), f"{why}; passes in a loop: {passes}"


def _share(
    axes: Sequence[Axis], along: int, elements: int, tuning: Tuning
) -> tuple[list[int], int, str]:
    """Returns how many taps of each dimension one pass has, and of how many positions; and why.

    Args:
      axes: the geometry.
      along: the dimension with the most taps.
      elements: of the image.
      tuning: the constants.
    """
    taps = [axis.out for axis in axes]
    few_outside = all(axis.edge_taps <= axis.out for axis in axes)
    large = elements >= tuning.all_taps_elements
    if math.prod(taps) <= tuning.all_taps and large and few_outside:
        return taps, tuning.row_positions, "all taps in one pass"
    pieces = -(-taps[along] // tuning.row_taps)
    piece = -(-taps[along] // pieces)
    taps = [piece if d == along else 1 for d in range(len(axes))]
    return taps, tuning.row_products // piece, "a row of taps, or a piece of one, in one pass"


def _is_unrolled(passes: int, products: int, elements: int, tuning: Tuning) -> bool:
    """Whether the passes of a kernel gradient are compiled one by one.

    Args:
      passes: how many there are.
      products: of all passes: taps times positions of a row of the cotangent.
      elements: of the image.
      tuning: the constants.
    """
    if passes <= tuning.unrolled_bodies:
        return True
    few = passes <= tuning.unrolled_bodies_large
    short = products <= tuning.unrolled_bodies_large * tuning.row_products
    return elements >= tuning.unrolled_bodies_elements and (few or short)


def _blocks(
    axes: Sequence[Axis],
    first: Sequence[int],
    taps: Sequence[int],
    along: int,
    positions: int,
    tuning: Tuning,
) -> tuple[Block, ...]:
    """Returns what one pass of a kernel gradient sums up.

    Along each dimension, each tap has its own positions of the cotangent: those for which it reads
    inside the image. Equal blocks hold as many of them as every tap has, and each tap counts from
    the first of its own. What is left is a block of its own. When blocks had only the positions
    that all taps share, a 3x3 kernel on an image of 28x28 had 418 products; now it has 250.

    Args:
      axes: the geometry of each spatial dimension, with the sizes of the image.
      first: of each dimension, the position of the image that the first tap reads for the first
        position of the cotangent.
      taps: how many there are along each dimension.
      along: the dimension with the most taps. A block has neighbouring positions along it, and all
        positions or a single one along each other dimension.
      positions: about how many positions of the cotangent one block has.
      tuning: the constants.
    """
    order = [*[d for d in range(len(axes)) if d != along], along]
    # For each dimension {tap: the positions of the cotangent for which it reads inside}.
    own = [
        {
            a: some
            for a in range(n)
            if (some := inside(at + a * axis.stride, axis.rhs_dilation, axis.kernel, axis.size))
        }
        for at, n, axis in zip(first, taps, axes, strict=True)
    ]
    found: list[Block] = []

    def read(d: int, positions: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """Returns an element of `Reads` of {tap: the position of the cotangent}."""
        start, axis = first[d], axes[d]
        return {
            a: (p, start + a * axis.stride + p * axis.rhs_dilation) for a, p in positions.items()
        }

    def one_by_one(d: int, own: Mapping[int, range]) -> Reads:
        """Returns {tap: positions of the cotangent} as `Reads`."""
        every = sorted({p for positions in own.values() for p in positions})
        return tuple(read(d, {a: p for a, of in own.items() if p in of}) for p in every)

    def split(d: int, most: int, inner: int, rest: bool) -> list[Part]:
        """Returns the parts of a dimension."""
        whole = Part(one_by_one(d, own[d]), 1, rest)
        if not whole.reads:
            return []
        if d == along:
            most = max(min(most, tuning.rest_positions if rest else tuning.row_positions), 1)
            if len(whole.reads) <= most:
                return [whole]
            most = min(most, tuning.split_positions)
        else:
            if len(whole.reads) * inner <= 2 * most:
                return [whole]
            most = 1
        every = min(map(len, own[d].values()))
        width = min(range(-(-most // 2), most + 1), key=lambda width: (every % width, -width))
        # Where a rest has as many blocks as what was found before it, one loop sums up both.
        alike = every // max(found[-1].counts) if rest and found else 0
        if 1 <= alike <= most:
            width = alike
        count = every // width
        if count < 2:
            return [whole]
        blocks = tuple(read(d, {a: of[i] for a, of in own[d].items()}) for i in range(width))
        left = one_by_one(d, {a: of[count * width :] for a, of in own[d].items()})
        return [Part(blocks, count, rest)] + [Part(left, 1, True)] * bool(left)

    def thicker(d: int, part: Part, most: int) -> Part:
        """Returns blocks of several positions instead of one, if their number divides `count`."""
        (reads,) = part.reads
        n = max(n for n in range(1, max(most, 1) + 1) if part.count % n == 0)
        blocks = [read(d, {a: p + i for a, (p, _) in reads.items()}) for i in range(n)]
        return Part(tuple(blocks), part.count // n, part.rest)

    def build(chosen: dict[int, Part], most: int, rest: bool) -> None:
        if len(chosen) < len(axes):
            d, *others = order[len(chosen) :]
            inner = math.prod(axes[other].kernel for other in others)
            for part in split(d, most, inner, rest):
                build(chosen | {d: part}, most // len(part.reads), rest or part.rest)
            return
        if rest:  # few products, whose partial sums should be few too
            most = tuning.rest_positions // math.prod(len(part.reads) for part in chosen.values())
            for d in order[:-1]:
                if chosen[d].count > 1:
                    chosen[d] = thicker(d, chosen[d], most)
                    most //= len(chosen[d].reads)
        parts = [chosen[d] for d in range(len(axes))]
        found.append(
            Block(
                reads=tuple(part.reads for part in parts),
                counts=tuple(part.count for part in parts),
                apart=tuple(
                    len(part.reads) * axis.rhs_dilation
                    for part, axis in zip(parts, axes, strict=True)
                ),
            )
        )

    build({}, positions, False)
    return tuple(found)
