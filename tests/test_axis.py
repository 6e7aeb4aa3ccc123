"""`Axis` and `Run` against the definition of a convolution, position by position."""

import itertools
import math

import pytest

from flax_dwconv._lowering.axis import Axis, inside


def axes(lhs_dilations=(1, 2, 3), rhs_dilations=(1, 2, 3)):
    """Small geometries, all pads with which there is an output included."""
    for size, kernel, stride, a, b in itertools.product(
        (1, 2, 5), (1, 2, 3, 6), (1, 2, 3), lhs_dilations, rhs_dilations
    ):
        dilated, window = (size - 1) * a + 1, (kernel - 1) * b + 1
        for low, high in itertools.product((-1, 0, 1, window + 1), (-1, 0, 2)):
            if (out := (dilated + low + high - window) // stride + 1) > 0 and dilated + low > 0:
                yield Axis(size, kernel, out, stride, low, a, b)


FORWARD = [*axes(lhs_dilations=[1])]
ALL = [*axes()]


def reads(axis):
    """{(output, tap): the position of the input that it reads}, as the definition says."""
    found = {}
    for o, a in itertools.product(range(axis.out), range(axis.kernel)):
        t, between = divmod(o * axis.stride + a * axis.rhs_dilation - axis.low, axis.lhs_dilation)
        if not between and 0 <= t < axis.size:
            found[o, a] = t
    return found


def test_there_is_something_to_test():
    assert len(FORWARD) > 500 and len(ALL) > 2000


def test_inside():
    for first, step, count, size in itertools.product(range(-7, 8), (1, 2, 3), range(5), (1, 4)):
        expected = [p for p in range(count) if 0 <= first + p * step < size]
        assert [*inside(first, step, count, size)] == expected


def test_phases_read_what_the_dilated_input_holds():
    for axis in ALL:
        phases = axis.phases()
        assert len(phases) == min(axis.lhs_dilation // math.gcd(axis.lhs_dilation, axis.stride),
                                  axis.out)  # fmt: skip
        found = {}
        for r, (taps, phase) in enumerate(phases):
            assert phase.lhs_dilation == 1 and phase.kernel == len(taps)
            assert phase.out == len(range(r, axis.out, len(phases)))
            for (q, b), t in reads(phase).items():
                found[q * len(phases) + r, taps[b]] = t
        assert found == reads(axis)


def test_reads():
    for axis in FORWARD:
        found = {
            (first + i, a): run.taps[a] + i * axis.stride
            for a, (first, run) in axis.reads().items()
            for i in range(run.count)
        }
        assert found == reads(axis)


def test_runs_split_the_outputs_in_order():
    for axis in FORWARD:
        found, first = {}, 0
        for run in axis.runs():
            assert run.count > 0
            for (a, t), i in itertools.product(run.taps.items(), range(run.count)):
                found[first + i, a] = t + i * axis.stride
            first += run.count
        assert first == axis.out and found == reads(axis)


def test_runs_are_as_few_as_can_be():
    """Neighbouring runs have other taps: more runs would be more to compile."""
    for axis in FORWARD:
        runs = [set(run.taps) for run in axis.runs()]
        assert all(a != b for a, b in itertools.pairwise(runs))


def test_swapped_exchanges_input_and_kernel():
    for axis in ALL:
        swapped = axis.swapped()
        found = {(axis.out - 1 - o, t): a for (o, a), t in reads(axis).items()}
        assert found == reads(swapped)
        assert swapped.swapped() == axis


def test_reach():
    for axis in FORWARD:
        every = [
            o * axis.stride + a * axis.rhs_dilation
            for o, a in itertools.product(range(axis.out), range(axis.kernel))
        ]
        assert axis.reach == max(every) - min(every) + 1


def test_edge_taps():
    for axis in FORWARD:
        found = reads(axis)
        cut = [a for a in range(axis.kernel) if any((o, a) not in found for o in range(axis.out))]
        assert axis.edge_taps == len(cut)


@pytest.mark.parametrize(
    ("axis", "kernel_slides"),
    [
        (Axis(7, 1, 7, 1, 0, 1, 1), False),  # pointwise
        (Axis(4, 1, 7, 1, 0, 2, 1), False),  # its input gradient, with stride 2
        (Axis(7, 7, 1, 1, 0, 1, 1), False),  # its kernel gradient
        (Axis(1, 7, 7, 1, 6, 1, 1), True),  # a derivative of that
        (Axis(3, 5, 1, 1, 0, 2, 1), True),
    ],
)
def test_sliding(axis, kernel_slides):
    assert axis.sliding() == ((1, axis.swapped()) if kernel_slides else (0, axis))
