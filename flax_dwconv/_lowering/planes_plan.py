"""Images whose channels come before their space in memory: how they are convolved as they are.

The positions of one channel of one image are a plane. The planes of an image follow one another, so
that a tap reads, for all outputs of all planes, the image itself, some positions further on: for
strides of 1 and outputs as large as the image, one contiguous array, whose last dimension is the
whole plane. What a tap reads beyond the plane, in a neighbouring row or plane, is masked.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from flax_dwconv._lowering.axis import Axis, inside
from flax_dwconv._lowering.tuning import Tuning


@dataclasses.dataclass(frozen=True)
class Reader:
    """How taps read an image of `(n, c * q, *sizes)`, plane by plane.

    Attributes:
      sizes: of a plane, once zeros are added at the end of each dimension.
      outs: the outputs of a plane.
      strides: the distance from one output to the next along each dimension.
      flat: whether all outputs of a plane are one dimension.
      columns: into how many images the columns are dealt out, each column in turn, before taps read
        them; 1, if they are not. The strides are those of what is dealt out.
      summed: `q`, the planes of each channel.
      ends: how many channels at the first and at the last end of an image are computed apart, since
        taps read beyond the image there. None, if zeros are added around the whole image.
      before: the most positions that a tap reads before its output's.
      after: the most positions that a tap reads after it.
    """

    sizes: tuple[int, ...]
    outs: tuple[int, ...]
    strides: tuple[int, ...]
    flat: bool
    columns: int
    summed: int
    ends: int | None
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Tap:
    """What one tap reads along one dimension.

    Attributes:
      index: that of the tap in the kernel.
      image: which of the images that columns are dealt out to; 0 along other dimensions.
      offset: how far it reads from the position of the output, in positions of this dimension.
      first: the first output for which it reads inside the image.
      stop: the output after the last one.
    """

    index: int
    image: int
    offset: int
    first: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Planes:
    """A sum over taps, plane by plane: a forward convolution or an input gradient.

    Attributes:
      reader: how the image is read.
      phases: for each phase of the outputs, the last dimension fastest, its taps along each
        dimension.
      counts: how many phases there are along each dimension.
      outs: the outputs of all phases.
    """

    reader: Reader
    phases: tuple[tuple[tuple[Tap, ...], ...], ...]
    counts: tuple[int, ...]
    outs: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PlanesGradient:
    """The gradients of the taps of a kernel, plane by plane.

    Attributes:
      reader: how the image is read; its outputs are the positions of the cotangent.
      taps: along each dimension. All are computed in one loop.
      kernel: how many taps the kernel has along each dimension, with those that read nothing.
      images: how many images are summed up before all else.
      pieces: in how many pieces the first dimension is cut, which are summed up too.
    """

    reader: Reader
    taps: tuple[tuple[Tap, ...], ...]
    kernel: tuple[int, ...]
    images: int
    pieces: int


def choose(
    axes: Sequence[Axis], channels: int, summed: int, tuning: Tuning
) -> tuple[Planes, str] | None:
    """Returns the algorithm for a forward convolution or an input gradient, and why; or None.

    Args:
      axes: the geometry of each spatial dimension.
      channels: of the image.
      summed: the planes of each channel that are summed up.
      tuning: the constants.
    """
    if not _suits(axes, tuning):
        return None
    found = [axis.phases() for axis in axes]
    geometry = [
        [dataclasses.replace(axis, out=of_axis[0][1].out) for _, axis in of_axis]
        for of_axis in found
    ]
    reads = _reads(geometry, channels, summed, tuning)
    if reads is None:
        return None
    reader, taps = reads
    of_kernel = [
        [
            tuple(dataclasses.replace(tap, index=every[tap.index]) for tap in tap_list)
            for (every, _), tap_list in zip(of_axis, of_taps, strict=True)
        ]
        for of_axis, of_taps in zip(found, taps, strict=True)
    ]
    planes = Planes(
        reader=reader,
        phases=tuple(itertools.product(*of_kernel)),
        counts=tuple(map(len, found)),
        outs=tuple(axis.out for axis in axes),
    )
    return planes, "channels come before space, and planes are read as they are"


def choose_gradient(
    axes: Sequence[Axis], examples: int, channels: int, tuning: Tuning
) -> tuple[PlanesGradient, str] | None:
    """Returns the algorithm for a kernel gradient, and why; or None.

    Args:
      axes: the geometry, `out` being the taps of the true kernel, and `kernel` the positions of the
        cotangent.
      examples: images of the batch.
      channels: of image and cotangent.
      tuning: the constants.
    """
    forward = [
        dataclasses.replace(
            axis,
            kernel=axis.out,
            out=axis.kernel,
            stride=axis.rhs_dilation,
            rhs_dilation=axis.stride,
        )
        for axis in axes
    ]
    if any(axis.lhs_dilation > 1 for axis in forward) or not _suits(forward, tuning):
        return None
    if math.prod(axis.kernel for axis in forward) > tuning.all_taps:
        return None
    reads = _reads([[axis] for axis in forward], channels, 1, tuning)
    if reads is None:
        return None
    reader, taps = reads
    # As many images as possible in blocks that leave none over, unless they would be small.
    most, preferred = min(examples, tuning.plane_terms), tuning.plane_images
    whole = [n for n in range(preferred // 2, most + 1) if n and examples % n == 0]
    images = max(whole, default=min(examples, preferred))
    room = tuning.plane_terms // images
    rows = reader.outs[0]
    cut = reader.flat and images < tuning.plane_images and math.prod(reader.outs[1:]) >= 8
    pieces = max(n for n in range(1, room + 1) if rows % n == 0) if cut else 1
    gradient = PlanesGradient(
        reader=reader,
        taps=tuple(of_taps for (of_taps,) in taps),
        kernel=tuple(axis.out for axis in axes),
        images=images,
        pieces=pieces,
    )
    return gradient, f"channels come before space, and {images} images are summed up at once"


def _suits(axes: Sequence[Axis], tuning: Tuning) -> bool:
    taps = math.prod(axis.kernel for axis in axes)
    size = math.prod(axis.size for axis in axes)
    outs = math.prod(axis.out for axis in axes)
    return taps <= min(tuning.unrolled_taps, size) and (
        tuning.plane_least <= min(size, outs) and max(size, outs) <= tuning.plane_most
    )


def _reads(
    geometry: Sequence[Sequence[Axis]], channels: int, summed: int, tuning: Tuning
) -> tuple[Reader, list[list[tuple[Tap, ...]]]] | None:
    """Returns how an image is read, and for each phase of each dimension its taps; or None.

    Args:
      geometry: for each dimension, its phases; these have the same size, outputs and stride.
      channels: of the image.
      summed: the planes of each channel.
      tuning: the constants.
    """
    # Every output has a position of its own in the image, `output * stride`, from which its taps
    # are counted; so the image must reach as far as the last of these.
    sizes = [max(of[0].size, (of[0].out - 1) * of[0].stride + 1) for of in geometry]
    outs = [of[0].out for of in geometry]
    strides = [of[0].stride for of in geometry]
    columns = 1
    if strides[-1] > 1 and outs[-1] <= tuning.plane_columns:
        columns, strides[-1] = strides[-1], 1
        sizes[-1] = max(-(-sizes[-1] // columns), outs[-1])
    taps: list[list[tuple[Tap, ...]]] = []
    reach = []
    for d, of in enumerate(geometry):
        last = d == len(geometry) - 1
        every = columns if last else 1
        of_phases = []
        for axis in of:
            found = []
            for a in range(axis.kernel):
                t = a * axis.rhs_dilation - axis.low
                reads = inside(t, axis.stride, axis.out, axis.size)
                if reads:
                    offset, image = divmod(t, every)
                    found.append(Tap(a, image, offset, reads.start, reads.stop))
            of_phases.append(tuple(found))
        offsets = [tap.offset for found in of_phases for tap in found]
        reach.append((min(offsets, default=0), max(offsets, default=0)))
        taps.append(of_phases)
    positions = [math.prod(sizes[d + 1 :]) for d in range(len(sizes))]
    plane = math.prod(sizes)
    before = max(-sum(lo * n for (lo, _), n in zip(reach, positions, strict=True)), 0)
    after = max(sum(hi * n for (_, hi), n in zip(reach, positions, strict=True)), 0)
    ends = -(-max(before, after + (summed - 1) * plane) // (plane * summed))
    reader = Reader(
        sizes=tuple(sizes),
        outs=tuple(outs),
        strides=tuple(strides),
        flat=all(step == 1 for step in strides) and outs[1:] == sizes[1:],
        columns=columns,
        summed=summed,
        ends=ends if channels > 2 * ends else None,
        before=before,
        after=after,
    )
    return reader, taps
