"""The geometry of one spatial dimension, in integers: which tap reads which position for an output.

In the names of `lax.conv_general_dilated`, along one dimension

    out[o] = sum_a dilated[o * stride + a * rhs_dilation - low] * kernel[a]

where `dilated[t] = x[t / lhs_dilation]` if that is a position of `x`, else 0. For a forward
convolution with size=5, kernel=3, stride=1, low=1, and no dilation:

         pad |        x        | pad
    t:    -1 |  0  1  2  3  4  |  5
          a0   a1 a2              |     o = 0: the tap 0 reads outside
               a0 a1 a2           |     o = 1
                  a0 a1 a2        |     o = 2
                     a0 a1 a2     |     o = 3
                        a0 a1   a2|     o = 4: the tap 2 reads outside

`runs` cuts the outputs where a tap starts or stops reading inside: o = 0, o = 1 to 3, o = 4.

The input gradient of a convolution with stride 2 has lhs_dilation=2: zeros between the positions
of its input. Every second output reads by the same taps, and none of these taps reads a zero:

    dilated:   x0  0 x1  0 x2
               a0 a1 a2               o = 0: the taps 0 and 2 read x
                  a0 a1 a2            o = 1: the tap 1 reads x
                     a0 a1 a2         o = 2: the taps 0 and 2 again

`phases` makes of it one convolution of `x` itself for o = 0, 2, ... and another for o = 1, 3, ...
"""

import dataclasses
import itertools
import math


@dataclasses.dataclass(frozen=True)
class Axis:
    """The geometry of a convolution along one spatial dimension.

    Attributes:
      size: positions of the input, not dilated, without pads; > 0.
      kernel: taps of the kernel, not dilated; >= 0, where 0 is a phase that no tap reads for.
      out: outputs; > 0.
      stride: distance from one output to the next, in positions of the dilated input; > 0.
      low: zeros before the first position of the input; a negative number crops.
      lhs_dilation: distance from one position of the input to the next in the dilated input; > 0.
      rhs_dilation: distance from one tap to the next, in positions of the dilated input; > 0.
    """

    size: int
    kernel: int
    out: int
    stride: int
    low: int
    lhs_dilation: int
    rhs_dilation: int

    @property
    def reach(self) -> int:
        """Input positions of a phase from the first to the last that is read, pads included."""
        return (self.kernel - 1) * self.rhs_dilation + (self.out - 1) * self.stride + 1

    @property
    def edge_taps(self) -> int:
        """How many taps of a phase read outside the input for some of its outputs."""
        ends = -self.low, (self.out - 1) * self.stride - self.low
        first, last = (inside(t, self.rhs_dilation, self.kernel, self.size) for t in ends)
        return self.kernel - len(range(first.start, last.stop))

    def phases(self) -> list[tuple[range, "Axis"]]:
        """Splits a dilated input's outputs into phases, each a convolution of the input itself.

        Write an output position as o = q * P + r, with P = lhs_dilation / gcd(lhs_dilation,
        stride). Then the tap `a` reads a position of the input for every q or for none, and where
        it does, it reads `x[first + q * step]` with

            first = (r * stride + a * rhs_dilation - low) / lhs_dilation,
            step = P * stride / lhs_dilation,

        a strided slice: the dilated input is never made. The taps that read are evenly spaced, in
        the kernel and in the input. A forward convolution has P = 1; the input gradient of a
        strided one has P = stride phases, whose outputs interleave.

        Returns:
          For each r its taps of the kernel, and its geometry, with `lhs_dilation` 1.
        """
        count = self.lhs_dilation // math.gcd(self.lhs_dilation, self.stride)
        parts = []
        for r in range(min(count, self.out)):
            starts = {
                a: r * self.stride + a * self.rhs_dilation - self.low for a in range(self.kernel)
            }
            taps = [a for a, t in starts.items() if t % self.lhs_dilation == 0]
            every = taps[1] - taps[0] if len(taps) > 1 else 1
            phase = Axis(
                size=self.size,
                kernel=len(taps),
                out=len(range(r, self.out, count)),
                stride=count * self.stride // self.lhs_dilation,
                low=-(starts[taps[0]] // self.lhs_dilation) if taps else 0,
                lhs_dilation=1,
                rhs_dilation=max(every * self.rhs_dilation // self.lhs_dilation, 1),
            )
            parts.append((range(taps[0], taps[-1] + 1, every) if taps else range(0), phase))
        return parts

    def reads(self) -> dict[int, tuple[int, "Run"]]:
        """Returns for each tap of a phase the outputs for which it reads inside the input.

        Returns:
          {tap: (the first of the outputs, their run)}, without the taps that never read inside.
        """
        found = {}
        for a in range(self.kernel):
            t = a * self.rhs_dilation - self.low
            if outputs := inside(t, self.stride, self.out, self.size):
                start = t + outputs.start * self.stride
                found[a] = outputs.start, Run(len(outputs), {a: start})
        return found

    def runs(self) -> list["Run"]:
        """Splits the outputs of a phase into runs none of whose taps reads outside the input."""
        reads = self.reads()
        ends = {q for first, run in reads.values() for q in (first, first + run.count)}
        return [
            Run(
                stop - start,
                {
                    a: run.taps[a] + (start - first) * self.stride
                    for a, (first, run) in reads.items()
                    if first <= start < first + run.count
                },
            )
            for start, stop in itertools.pairwise(sorted({0, self.out} | ends))
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

    def sliding(self) -> tuple[int, "Axis"]:
        """Returns which operand slides in a matrix product, and the geometry in which it is `x`.

        The image slides under the kernel, unless it has one position, or is dilated for a single
        output: then the kernel slides over the image.

        Returns:
          0 and this geometry, or 1 and the swapped one, whose outputs come in reverse.
        """
        if self.size == 1 < self.kernel or self.out == 1 < self.lhs_dilation:
            return 1, self.swapped()
        return 0, self


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring outputs of a phase that read the input by the same taps.

    Attributes:
      count: number of outputs; > 0.
      taps: {tap: the input position that it reads for the first output}.
    """

    count: int
    taps: dict[int, int]


def inside(first: int, step: int, count: int, size: int) -> range:
    """Returns the p in range(count) for which first + p * step is a position of the input.

    Args:
      first: what p = 0 reads.
      step: distance from what one p reads to what the next reads; > 0.
      count: how many p there are.
      size: positions of the input.
    """
    return range(max(-(first // step), 0), min((size - 1 - first) // step + 1, count))
