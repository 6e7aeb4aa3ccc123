"""How the gradients of the taps of a kernel are shared out among passes, on integers alone."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

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
      reduced: the dimension along which all taps have the same number of neighbouring positions,
        which one `reduce` sums up; None if the products are summed up one by one.
    """

    reads: tuple[Reads, ...]
    counts: tuple[int, ...]
    apart: tuple[int, ...]
    reduced: int | None


@dataclasses.dataclass(frozen=True)
class Part:
    """What a block has of one dimension.

    Attributes:
      reads: as in `Block`.
      count: as in `counts` of `Block`.
      reduced: whether one `reduce` sums up the positions of a block.
    """

    reads: Reads
    count: int
    reduced: bool

    @property
    def products(self) -> int:
        """Returns how many products a block has, for each product of the other dimensions."""
        return sum(map(len, self.reads))


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much of a row one block may hold.

    Attributes:
      positions: the most positions of a row whose products are compiled one by one as a whole.
      large: whether the image is as large as `one_by_one_elements` in `Tuning`.
      unrolled: as `unrolled_products` in `Tuning`; in a loop over taps as `moving_products`.
    """

    positions: int
    large: bool
    unrolled: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop over the passes of a kernel gradient.

    Attributes:
      first: the first position of the image along each dimension that the first pass reads.
      reach: how many positions all passes read, pads included.
      apart: the distance of one pass to the next, in positions of the image.
    """

    first: tuple[int, ...]
    reach: tuple[int, ...]
    apart: tuple[int, ...]


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
      sums_each: how the taps of a pass are summed up, see `Tuning.sums_each`.
      positions_together: as in `Tuning`.
      loop: the loop, or None if the passes are compiled one by one.
      images: how many images are summed up at a time, in a loop over the batch; 0: all at once.
      whole: as in `choose`.
      parallel: as `parallel_loops` in `Tuning`.
    """

    exchanged: bool
    crop: tuple[tuple[int, ...], tuple[int, ...]] | None
    taps: tuple[int, ...]
    grid: tuple[int, ...]
    outs: tuple[int, ...]
    blocks: tuple[tuple[Block, ...], ...]
    sums_each: int
    positions_together: int
    loop: Loop | None
    images: int
    whole: bool
    parallel: bool


def suits(axes: Sequence[Axis]) -> bool:
    """Whether a convolution is one for `KernelGradient`: a small result of large operands.

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
    examples: int,
    axes: Sequence[Axis],
    channels: int,
    tuning: Tuning,
    filters: int = 1,
    whole: bool = False,
) -> tuple[KernelGradient, str]:
    """Returns the algorithm for the kernel gradient of one image and cotangent, and why.

    Args:
      examples: images of the batch.
      axes: the geometry, `out` being the size of the true kernel. One of `lhs_dilation` and
        `rhs_dilation` is 1 on each axis, the same one on all.
      channels: of image and cotangent.
      tuning: the constants.
      filters: for each channel.
      whole: whether it is known that no device has only a part of the arrays. Then the batch may be
        a loop, and the gradients of all taps one flat array.
    """
    exchanged = any(axis.lhs_dilation > 1 for axis in axes)
    if exchanged:
        axes = [axis.swapped() for axis in axes]
    elements = examples * math.prod(axis.size for axis in axes) * channels
    gradient, why = _choose(axes, elements, exchanged, tuning, filters)
    gradient = dataclasses.replace(gradient, whole=whole)
    # The cotangent is usually computed, not an argument, so it takes memory too.
    cotangent = channels * math.prod(axis.kernel for axis in axes)
    temporaries = channels * _temporaries(gradient)
    many = examples * temporaries >= tuning.gradient_temporaries
    large = examples * (cotangent + temporaries) >= tuning.batch_temporaries
    if whole and filters == 1 and examples > 1 and many and large:
        images = at_once(examples, temporaries, tuning.gradient_loop_temporaries)
        if images:
            gradient = dataclasses.replace(gradient, images=images)
            why += f", {images} of {examples} images at a time"
    return gradient, why


def at_once(examples: int, each: int, most: int) -> int:
    """Returns how many images of a batch one pass of a loop should sum up, or 0 for no loop.

    Args:
      examples: images of the batch.
      each: how many elements are in memory for one image.
      most: below how many elements a pass should stay; a single image may have more.
    """
    fitting = max(min((most - 1) // max(each, 1), examples - 1), 1)
    divisor = max(n for n in range(1, fitting + 1) if examples % n == 0)
    # A prime number of small images would be a pass for each.
    return divisor if examples > 1 and 8 * divisor >= fitting else 0


def _temporaries(gradient: KernelGradient) -> int:
    """Returns how many elements are in memory besides the operands, of one image and channel."""
    padded = gradient.crop[1] if gradient.crop else gradient.loop.reach if gradient.loop else (0,)
    partial = sum(_partial_sums(gradient.taps, blocks) for blocks in gradient.blocks)
    return math.prod(padded) + partial


def _choose(
    axes: Sequence[Axis], elements: int, exchanged: bool, tuning: Tuning, filters: int
) -> tuple[KernelGradient, str]:
    """Returns the algorithm for all images at once, and why.

    Args:
      axes: the geometry, with the roles of image and cotangent exchanged if they are.
      elements: of all images. What is decided by them is the same for all and for some at a time.
      exchanged: as in `KernelGradient`.
      tuning: the constants.
      filters: as in `choose`.
    """
    # A pass takes neighbouring taps along one dimension, since they share what they read. It is the
    # dimension with the most taps, `out`, and the last of equals. When it was the last of all, an
    # (11, 1) kernel had 11 passes of one tap each, and on 4 images of 56x56x64 its gradient took
    # 25 ms, that of a (1, 11) kernel 0.7 ms.
    along = max(range(len(axes)), key=lambda d: (axes[d].out, d))
    longest = axes[along]
    large = elements >= tuning.one_by_one_elements
    taps, positions, why = _share(axes, along, large, tuning)
    limits = Limits(positions, large, tuning.unrolled_products)
    grid = [-(-axis.out // n) for axis, n in zip(axes, taps, strict=True)]
    apart = [n * axis.stride for axis, n in zip(axes, taps, strict=True)]
    passes = math.prod(grid)

    def result(
        blocks: Sequence[tuple[Block, ...]],
        crop: tuple[tuple[int, ...], tuple[int, ...]] | None,
        loop: Loop | None,
    ) -> KernelGradient:
        return KernelGradient(
            exchanged=exchanged,
            crop=crop,
            taps=tuple(taps),
            grid=tuple(grid),
            outs=tuple(axis.out for axis in axes),
            blocks=tuple(blocks),
            sums_each=tuning.sums_each(math.prod(taps)),
            positions_together=tuning.positions_together,
            loop=loop,
            images=0,
            whole=False,
            parallel=tuning.parallel_loops,
        )

    if _is_unrolled(passes, elements, tuning):
        crop, of_passes = None, list(axes)
        many = longest.edge_taps * taps[along] > 2 * tuning.row_products
        if many or elements < tuning.padded_elements:
            # All taps have the same positions, as some read zeros: nothing is left of the blocks.
            crop = tuple(-axis.low for axis in axes), tuple(axis.reach for axis in axes)
            of_passes = [dataclasses.replace(axis, size=axis.reach, low=0) for axis in axes]
        starts = [
            range(-axis.low, n * gap - axis.low, gap)
            for axis, n, gap in zip(of_passes, grid, apart, strict=True)
        ]
        corners = itertools.product(*starts)
        blocks = [_Partition(of_passes, at, taps, along, limits, tuning).blocks() for at in corners]
        # The partial sums of all passes are in memory at the same time. With several filters, they
        # are as large as so many cotangents.
        partial = sum(_partial_sums(taps, of) for of in blocks)
        few = partial <= tuning.partial_sums * math.prod(axis.kernel for axis in axes)
        if filters == 1 or few:
            return result(blocks, crop, None), f"{why}; passes one by one: {passes}"
    first, start = [-axis.low for axis in axes], [0 for _ in axes]
    extent = [dataclasses.replace(axis, out=n).reach for axis, n in zip(axes, taps, strict=True)]
    reach = [(n - 1) * gap + e for n, gap, e in zip(grid, apart, extent, strict=True)]
    limits = Limits(positions, large, tuning.moving_products)
    if grid[along] == 1 and _one_by_one(longest.kernel, taps[along], limits, tuning):
        # Each pass reads the whole of the image along this dimension at once, which needs no pads.
        start[along], first[along] = first[along], 0
        extent[along] = reach[along] = longest.size
    inner = [dataclasses.replace(axis, size=e) for axis, e in zip(axes, extent, strict=True)]
    blocks = _Partition(inner, start, taps, along, limits, tuning).blocks()
    loop = Loop(tuple(first), tuple(reach), tuple(apart))
    return result([blocks], None, loop), f"{why}; passes in a loop: {passes}"


def _partial_sums(taps: Sequence[int], blocks: Sequence[Block]) -> int:
    """Returns how many partial sums a pass has for each channel of an image, at most."""
    return math.prod(taps) * sum(math.prod(block.counts) for block in blocks)


def _share(
    axes: Sequence[Axis], along: int, large: bool, tuning: Tuning
) -> tuple[list[int], int, str]:
    """Returns how many taps of each dimension one pass has, and of how many positions; and why.

    Args:
      axes: the geometry.
      along: the dimension with the most taps.
      large: as in `Limits`.
      tuning: the constants.
    """
    taps = [axis.out for axis in axes]
    few_outside = all(axis.edge_taps <= axis.out for axis in axes)
    if math.prod(taps) <= tuning.all_taps and few_outside:
        return taps, tuning.row_positions, "all taps in one pass"
    most = max(tuning.row_taps, tuning.all_taps if large else 0)
    pieces = -(-taps[along] // most)
    piece = -(-taps[along] // pieces)
    taps = [piece if d == along else 1 for d in range(len(axes))]
    return taps, tuning.row_products // piece, "a row of taps, or a piece of one, in one pass"


def _is_unrolled(passes: int, elements: int, tuning: Tuning) -> bool:
    """Whether the passes of a kernel gradient are compiled one by one.

    Args:
      passes: how many there are.
      elements: of the image.
      tuning: the constants.
    """
    large = elements >= tuning.unrolled_bodies_elements
    return passes <= (tuning.unrolled_bodies_large if large else tuning.unrolled_bodies)


@dataclasses.dataclass(frozen=True)
class _Partition:
    """One pass of a kernel gradient, which is cut into blocks.

    Along each dimension, each tap has its own positions of the cotangent: those for which it reads
    inside the image. Equal blocks hold as many of them as every tap has, and each tap counts from
    the first of its own. What is left is in blocks of its own. When blocks had only the positions
    that all taps share, a 3x3 kernel on an image of 28x28 had 418 products; now it has 250.

    Attributes:
      axes: the geometry of each spatial dimension, with the sizes of the image.
      first: of each dimension, the position of the image that the first tap reads for the first
        position of the cotangent.
      taps: how many there are along each dimension.
      along: the dimension with the most taps, along which equal blocks have several positions.
      limits: how many positions and products one block may hold.
      tuning: the constants.
    """

    axes: Sequence[Axis]
    first: Sequence[int]
    taps: Sequence[int]
    along: int
    limits: Limits
    tuning: Tuning

    def blocks(self) -> tuple[Block, ...]:
        """Returns what the pass sums up."""
        return tuple(self._of({}, True))

    def _of(self, chosen: Mapping[int, Part], main: bool) -> Iterator[Block]:
        """Yields the blocks of some parts of the first dimensions and all parts of the others.

        Args:
          chosen: {dimension: its part}.
          main: whether every tap has these parts.
        """
        if len(chosen) < len(self.axes):
            d = self._order[len(chosen)]
            others = math.prod(part.products for part in chosen.values())
            for i, part in enumerate(self._parts(d, others, main)):
                yield from self._of({**chosen, d: part}, main and i == 0)
            return
        parts = [chosen[d] for d in range(len(self.axes))]
        if main:
            yield self._block(parts, self.along if parts[self.along].reduced else None)
        else:
            yield from self._rest(parts)

    @property
    def _order(self) -> list[int]:
        """The dimensions as they are cut: `along` is the last."""
        return [*[d for d in range(len(self.axes)) if d != self.along], self.along]

    def _parts(self, d: int, others: int, main: bool) -> Iterator[Part]:
        """Yields the parts of a dimension, first what every tap has.

        Args:
          d: the dimension.
          others: how many products there are for each tap of this dimension.
          main: whether every tap has what was chosen of the dimensions before.
        """
        at, axis, limits = self.first[d], self.axes[d], self.limits
        left = {
            a: own
            for a in range(self.taps[d])
            if (own := inside(at + a * axis.stride, axis.rhs_dilation, axis.kernel, axis.size))
        }
        width, reduced = 1, False
        if main and left:
            whole, products = self._single(d, left), others * len(left)
            inner = math.prod(self.axes[e].kernel for e in self._order[self._order.index(d) + 1 :])
            if d == self.along:
                if _one_by_one(len(whole.reads), products, limits, self.tuning):
                    yield whole
                    return
                width, reduced = _width(left.values(), products, limits, self.tuning)
            elif limits.large and len(whole.reads) * inner <= 2 * limits.positions:
                yield whole
                return
        while left:
            count = min(map(len, left.values())) // width
            reads = [self._read(d, {a: own[i] for a, own in left.items()}) for i in range(width)]
            yield Part(tuple(reads), count, reduced)
            left = {a: own[count * width :] for a, own in left.items() if len(own) > count * width}
            if sum(map(len, left.values())) <= self.tuning.rest_products:
                break
            width, reduced = 1, False
        if left:
            yield self._single(d, left)

    def _single(self, d: int, own: Mapping[int, range]) -> Part:
        """Returns a single block of {tap: positions of the cotangent}."""
        every = sorted({p for positions in own.values() for p in positions})
        reads = [self._read(d, {a: p for a, of in own.items() if p in of}) for p in every]
        return Part(tuple(reads), 1, False)

    def _read(self, d: int, positions: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """Returns an element of `Reads` of {tap: the position of the cotangent}."""
        start, axis = self.first[d], self.axes[d]
        return {
            a: (p, start + a * axis.stride + p * axis.rhs_dilation) for a, p in positions.items()
        }

    def _rest(self, parts: list[Part]) -> Iterator[Block]:
        """Yields blocks of what is left, each of several neighbours along the longest dimension."""
        d = max(range(len(parts)), key=lambda d: parts[d].count)
        part, gap = parts[d], self.axes[d].rhs_dilation
        width, reduced = 1, False
        if len(part.reads) == 1:
            products = math.prod(part.products for part in parts)
            few = Limits(1, False, self.limits.unrolled)
            width, reduced = _width([range(part.count)], products, few, self.tuning)
        if not reduced:
            yield self._block(parts, None)
            return
        full = part.count - part.count % width
        for start, size, count in (0, width, full // width), (full, part.count - full, 1):
            if size:
                reads = [
                    {a: (p + i, t + i * gap) for a, (p, t) in part.reads[0].items()}
                    for i in range(start, start + size)
                ]
                several = Part(tuple(reads), count, True)
                yield self._block([*parts[:d], several, *parts[d + 1 :]], d)

    def _block(self, parts: Sequence[Part], reduced: int | None) -> Block:
        """Returns the block of one part of each dimension.

        Args:
          parts: of each dimension.
          reduced: the dimension that one `reduce` should sum up, or None. The block has None too
            where XLA would merge that `reduce` with the sum of all blocks.
        """
        outputs = math.prod(len(set().union(*part.reads)) for part in parts)
        if outputs == 1 or reduced is not None and len(parts[reduced].reads) == 1:
            reduced = None  # of a single array, or over one position, XLA would merge it
        return Block(
            reads=tuple(part.reads for part in parts),
            counts=tuple(part.count for part in parts),
            apart=tuple(
                len(part.reads) * axis.rhs_dilation
                for part, axis in zip(parts, self.axes, strict=True)
            ),
            reduced=reduced,
        )


def _one_by_one(row: int, products: int, limits: Limits, tuning: Tuning) -> bool:
    """Whether the products of a whole row are compiled one by one.

    Args:
      row: how many positions it has.
      products: at each position.
      limits: what a block may hold.
      tuning: the constants.
    """
    short = row * products <= tuning.short_row_products
    return row <= limits.positions and (limits.large or short)


def _width(
    own: Collection[range], products: int, limits: Limits, tuning: Tuning
) -> tuple[int, bool]:
    """Returns how many neighbouring positions equal blocks have, and whether a `reduce` adds them.

    Args:
      own: the positions of each tap.
      products: at each position.
      limits: what a block may hold.
      tuning: the constants.
    """
    every = min(map(len, own))
    most = every if every <= limits.positions else min(limits.positions, tuning.split_positions)
    unrolled = limits.unrolled // (products + 1) if products > 1 and not limits.large else 0
    alone = every == max(map(len, own))

    def cost(choice: tuple[int, bool]) -> tuple[int, bool, int]:
        """In partial sums of a tap: there is one for each block."""
        width, reduced = choice
        left = every % width
        one_by_one = 0 if reduced or limits.large else tuning.one_by_one_cost
        # If all taps have equally many positions, no other block shares the loop of what is left.
        rest = 2 * left + (tuning.rest_cost if alone and left and not limits.large else 0)
        return every // width + rest + one_by_one, not reduced, -width

    choices = [(width, False) for width in range(1, max(most, 1) + 1)]
    # In blocks of two, the partial sums of 8 taps are 4 times as large as the cotangent.
    least, most = max(min(4, every), 2), min(unrolled, tuning.row_positions, every)
    choices += [(width, True) for width in range(least, most + 1)]
    return min(choices, key=cost)
