"""The plan, on integers: nothing here is traced, and no array is made."""

import ast
import dataclasses
import itertools
import math
import pathlib

import pytest

from flax_dwconv._lowering import forward_plan, kernel_gradient_plan, plan, tuning
from flax_dwconv._lowering.axis import Axis
from flax_dwconv._lowering.plan import Operand
from flax_dwconv.benchmark.cases import layers

ROOM = pathlib.Path(plan.__file__).parent
IMAGE, KERNEL, COTANGENT = (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)
TUNINGS = {
    "in use": tuning.TUNING,
    "elsewhere": tuning.ELSEWHERE,
    "large": dataclasses.replace(
        tuning.TUNING,
        efforts=(tuning.Effort(0, region_taps=400, products=350),),
        padded_elements=0,
        one_by_one_elements=0,
        unrolled_bodies_elements=0,
    ),
    "middling": dataclasses.replace(
        tuning.TUNING, padded_elements=0, short_row_products=0, unrolled_bodies=99
    ),
    "short blocks": dataclasses.replace(
        tuning.TUNING,
        padded_elements=0,
        unrolled_bodies_elements=0,
        row_products=8,
        row_positions=4,
        unrolled_products=20,
        rest_products=2,
    ),
    "small passes": dataclasses.replace(
        tuning.TUNING,
        efforts=(tuning.Effort(0, region_taps=0, products=20),),
        unrolled_taps=5,
        loop_products=8,
        row_taps=2,
        row_products=4,
        unrolled_bodies=0,
    ),
}
tunings = pytest.mark.parametrize("constants", TUNINGS.values(), ids=list(TUNINGS))


def operand(shape, spec, dtype="float32", sharded=()):
    return Operand(tuple(shape), spec, dtype, tuple(d in sharded for d in range(len(shape))))


def same(size, kernel, stride=1):
    """TensorFlow's rule: outputs, and the pads before and after."""
    out = -(-size // stride)
    total = max((out - 1) * stride + kernel - size, 0)
    return out, (total // 2, total - total // 2)


def forward(n=1, size=28, c=32, k=3, stride=1, m=1, tag="ours", **changes):
    """A depthwise convolution of square images, padded "same"."""
    out, pads = same(size, k, stride)
    return dataclasses.replace(
        plan.Convolution(
            lhs=operand((n, size, size, c), IMAGE),
            rhs=operand((k, k, 1, c * m), KERNEL),
            out=operand((n, out, out, c * m), IMAGE),
            strides=(stride, stride),
            padding=(pads, pads),
            lhs_dilation=(1, 1),
            rhs_dilation=(1, 1),
            feature_groups=c,
            batch_groups=1,
            tag=tag,
        ),
        **changes,
    )


def input_gradient(n=1, size=28, c=32, k=3, stride=1, m=1, **changes):
    """As JAX's transpose rule makes it: the kernel reversed, the image dilated by the stride."""
    out, (low, _) = same(size, k, stride)
    before = k - 1 - low
    pads = before, size - (out - 1) * stride - 1 + k - 1 - before
    return dataclasses.replace(
        forward(n, size, c, k),
        lhs=operand((n, out, out, c * m), IMAGE),
        rhs=operand((k, k, c, m), (2, 3, 0, 1)),
        out=operand((n, size, size, c), IMAGE),
        padding=(pads, pads),
        lhs_dilation=(stride, stride),
        **changes,
    )


def kernel_gradient(n=1, size=28, c=32, k=3, stride=1, m=1, **changes):
    """As JAX's transpose rule makes it: batch and features exchanged, the cotangent a kernel."""
    out, (low, _) = same(size, k, stride)
    pads = low, (out - 1) * stride + k - size - low
    return dataclasses.replace(
        forward(n, size, c, k),
        lhs=operand((n, size, size, c), (3, 0, 1, 2)),
        rhs=operand((n, out, out, c * m), (3, 0, 1, 2)),
        out=operand((k, k, 1, c * m), (2, 3, 0, 1)),
        padding=(pads, pads),
        rhs_dilation=(stride, stride),
        feature_groups=1,
        batch_groups=c,
        **changes,
    )


def planned(convolution, constants=tuning.TUNING):
    return plan.plan(convolution, constants)


def kinds(found):
    """The algorithms of all phases."""
    return [type(phase.algorithm).__name__ for phase in found.algorithm.phases]


# Which convolution it is


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_kinds(stride, m):
    sizes = dict(n=2, c=8, stride=stride, m=m)
    assert planned(forward(**sizes)).kind == "forward"
    assert planned(kernel_gradient(**sizes)).kind == "kernel gradient"
    is_forward = stride == m == 1
    kind = "forward" if is_forward else "input gradient"
    assert planned(input_gradient(**sizes)).kind == kind
    pointwise = forward(
        tag="separable", feature_groups=1, rhs=operand((1, 1, 32, 64), KERNEL),
        out=operand((1, 28, 28, 64), IMAGE), padding=((0, 0), (0, 0)),
    )  # fmt: skip
    found = planned(pointwise)
    assert found.kind == "product" and found.groups == 1 and not found.algorithm.kernel_first
    features_first = dataclasses.replace(pointwise, out=operand((1, 64, 28, 28), (0, 1, 2, 3)))
    assert planned(features_first).algorithm.kernel_first


SHAPE = (1, 28, 28, 32)
XLA = {
    "tagged to be left to XLA": dict(tag="xla"),
    "not for CPU, and not asked for there": dict(on_cpu=False),
    "a size is symbolic": dict(lhs=operand((plan.SYMBOLIC, 28, 28, 32), IMAGE)),
    "a size is 0": dict(lhs=operand((0, 28, 28, 32), IMAGE)),
    "no spatial dimensions": dict(
        lhs=operand((1, 32), (0, 1)), rhs=operand((1, 32), (1, 0)), out=operand((1, 32), (0, 1))
    ),
    "its dtypes are int8 and float32 to float32": dict(lhs=operand(SHAPE, IMAGE, "int8")),
    "its dtypes are float32 and float32 to complex64": dict(out=operand(SHAPE, IMAGE, "complex64")),
    "explicitly sharded over space, which JAX does not slice": dict(
        out=operand(SHAPE, IMAGE, sharded=[1])
    ),
    "not depthwise: 1 groups of 32 and 32; products were not asked for": dict(
        rhs=operand((3, 3, 32, 32), KERNEL), feature_groups=1
    ),
    "not depthwise: 16 groups of 2 and 2; products were not asked for": dict(
        rhs=operand((3, 3, 2, 32), KERNEL), feature_groups=16, tag="depthwise"
    ),
    "not depthwise: 16 groups of 2 and 2; a window of several positions slides": dict(
        rhs=operand((3, 3, 2, 32), KERNEL), feature_groups=16, tag="separable"
    ),
    "not depthwise: 1 groups of 32 and 32; "
    "explicitly sharded, and JAX asks how the result is to be": dict(
        rhs=operand((1, 1, 32, 32), KERNEL, sharded=[2]), padding=((0, 0), (0, 0)),
        feature_groups=1, tag="separable",
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", XLA)
def test_what_is_left_to_xla_and_why(reason):
    found = planned(forward(**XLA[reason]))
    assert found.algorithm is None and found.kind is None and found.why == reason


@pytest.mark.parametrize(
    ("tag", "on_cpu", "elsewhere"),
    [
        ("ours", True, False),
        ("depthwise", True, False),
        ("separable", True, False),
        ("taps", True, True),
        ("xla", False, False),
    ],
)
def test_tags_and_platforms(tag, on_cpu, elsewhere):
    for make in forward, input_gradient, kernel_gradient:
        for platform, expected in ((True, on_cpu), (False, elsewhere)):
            found = planned(make(tag=tag, on_cpu=platform))
            assert (found.algorithm is not None) == expected


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("tag", ["ours", "depthwise", "separable", "taps", "xla"])
def test_a_grid_of_devices_has_the_kernel_gradient_of_our_own_computed_here(tag, on_cpu):
    """XLA's is wrong there, on every platform. The others stay as they are without a mesh."""
    for make in forward, input_gradient:
        alone, found = (planned(make(tag=tag, on_cpu=on_cpu, partitioned=n)) for n in (0, 2))
        if alone.algorithm is not None:
            assert (alone.algorithm.whole, found.algorithm.whole) == (on_cpu, False)
            algorithm = dataclasses.replace(alone.algorithm, whole=False)
            alone = dataclasses.replace(alone, algorithm=algorithm)
        assert found == alone
    found = planned(kernel_gradient(tag=tag, on_cpu=on_cpu, partitioned=2))
    assert (found.kind == "kernel gradient") == (on_cpu or tag in ("ours", "taps", "xla"))


@pytest.mark.parametrize("tag", ["ours", "xla"])
def test_a_grid_of_devices_leaves_no_kernel_gradient_to_xla_because_of_its_size(tag):
    """Images of one window each, and millions of results. Forward, such a size is XLA's."""
    sizes = dict(n=64, size=16, c=64, k=16, stride=16, m=1024)
    assert planned(forward(**sizes)).algorithm is None
    assert planned(kernel_gradient(**sizes, tag=tag, partitioned=2)).algorithm


def test_features_on_both_sides_are_accepted_of_our_own_only():
    """As `vmap` over one operand makes them."""
    changes = dict(rhs=operand((3, 3, 2, 32), KERNEL), feature_groups=16)
    accepted = {tag for tag in ("ours", "depthwise", "separable", "taps")
                if planned(forward(**changes, tag=tag)).algorithm}  # fmt: skip
    assert accepted == {"ours", "taps"}


def test_one_channel_is_depthwise_if_taps_were_asked_for():
    for make in forward, input_gradient:
        assert planned(make(c=1, tag="taps")).algorithm
        assert not planned(make(c=1, tag="ours")).algorithm
    gradient = kernel_gradient(c=1, tag="taps")
    assert planned(gradient).kind == "kernel gradient"


def test_float64_is_summed_up_in_float64():
    wide = [operand(shape, spec, "float64") for shape, spec in
            ((SHAPE, IMAGE), ((3, 3, 1, 32), KERNEL), (SHAPE, IMAGE))]  # fmt: skip
    assert planned(forward(lhs=wide[0], rhs=wide[1], out=wide[2])).accumulator == "float64"
    for dtype in "float16", "bfloat16", "float32":
        narrow = [dataclasses.replace(a, dtype=dtype) for a in wide]
        found = planned(forward(lhs=narrow[0], rhs=narrow[1], out=narrow[2]))
        assert found.accumulator == "float32"


def test_filters_share_what_a_tap_reads():
    few = tuning.TUNING.copied_channels
    assert [planned(forward(c=c, m=3)).filters for c in (few, few + 1)] == ["copies"] * 2
    gradients = [planned(kernel_gradient(c=c, m=3)).filters for c in (few, few + 1)]
    assert gradients == ["copies", "one by one"]
    for make in forward, kernel_gradient:
        assert planned(make(m=8)).filters == "broadcast"  # whole vectors
        # Copies of the image before the strides are taken would be 8 times as large as the result.
        assert planned(make(m=3, stride=4)).filters == "broadcast"
        assert planned(make()).filters == "one by one"
    assert planned(input_gradient(m=3)).filters == "one by one"  # the multiplier is summed up


@pytest.mark.parametrize("make", [forward, input_gradient, kernel_gradient])
def test_windows_that_do_not_overlap_are_patches(make):
    """As copies of the image they took 50 to 100 times as long as in XLA."""
    found = planned(make(size=64, c=3, k=16, stride=16, m=16))
    assert type(found.algorithm) is plan.Patches
    assert found.kind == found.algorithm.kind == make.__name__.replace("_", " ")
    # More taps than patches: the kernel gradient is larger than the cotangent.
    assert type(planned(make(size=32, c=3, k=16, stride=16, m=384)).algorithm) is plan.Patches
    # So is not what has a single filter, or overlaps.
    assert type(planned(make(size=64, c=3, k=16, stride=16)).algorithm) is not plan.Patches
    assert type(planned(make(size=64, c=3, k=16, stride=15, m=2)).algorithm) is not plan.Patches


def test_input_gradients_with_many_filters_are_products():
    """Of all rows of the kernel at once, unless the patches outgrow the cotangent."""
    for m, k, rows in ((8, 3, 1), (9, 3, 3), (24, 3, 3), (24, 15, 1), (64, 6, 6), (40, 6, 6)):
        found = planned(input_gradient(size=34, c=3, k=k, m=m))
        assert type(found.algorithm) is plan.Overlap and found.kind == "input gradient"
        assert found.algorithm.rows == rows
    assert type(planned(input_gradient(m=3)).algorithm) is forward_plan.Taps
    # Pads would make a multiple of it.
    dilated = input_gradient(size=14, k=5, m=3, rhs_dilation=(3, 3))
    out, pads = 14 + 12 - 12, (12, 12)
    dilated = dataclasses.replace(dilated, padding=(pads, pads))
    assert out == 14 and type(planned(dilated).algorithm) is plan.Overlap


def test_what_xla_does_better_is_left_to_it():
    for sizes in (
        dict(n=8, size=512, c=4, k=16, stride=16, m=128),  # patches with many results
        dict(n=2, size=112, c=3, k=7, stride=4, m=64),  # many taps and filters
        dict(n=3, size=32, c=18, k=2, stride=4, m=171),  # an odd number of filters
    ):
        assert planned(forward(**sizes)).algorithm is None
        assert planned(kernel_gradient(**sizes)).algorithm
        assert planned(input_gradient(**sizes)).algorithm
        # But taps that were asked for are never left to it.
        assert planned(forward(**sizes, tag="taps")).algorithm


# Which algorithm


@pytest.mark.parametrize(
    ("sizes", "algorithm"),
    [
        (dict(size=7, c=8, k=3), "Regions"),
        (dict(size=112, c=32, k=3), "Regions"),
        (dict(size=112, c=96, k=3, stride=2), "Regions"),
        (dict(size=7, c=8, k=7), "Tiles"),
        (dict(n=32, size=7, c=768, k=7), "Rows"),
        (dict(size=56, c=96, k=7), "Tiles"),
        (dict(size=34, c=2, k=31), "Loop"),
    ],
)
def test_forward(sizes, algorithm):
    found = planned(forward(**sizes))
    assert kinds(found) == [algorithm]
    taps, _, most = found.why.partition(" taps in regions, ")
    assert int(taps) > 0 and most.startswith("at most" if algorithm == "Regions" else "more than")


def test_tiles_are_as_wide_as_the_effort_allows():
    widths = [planned(forward(n, 56, 96, 7)).algorithm.phases[0].algorithm.outputs
              for n in (1, 8)]  # fmt: skip
    assert widths == [100 // 49, 324 // 49]


@pytest.mark.parametrize(("row", "outputs"), [(28, 6), (24, 6), (23, 6), (20, 5), (9, 5), (59, 6)])
def test_tiles_nearly_divide_a_row(row, outputs):
    found = planned(forward(8, row, 960, 7)).algorithm
    assert found.phases[0].algorithm.outputs == outputs


def test_channels_that_vectors_do_not_divide_have_fewer_regions():
    """A 5x5 kernel has 361 taps in regions."""
    found = [kinds(planned(forward(8, 56, c, 5))) for c in (64, 60, 61)]
    assert found == [["Regions"], ["Tiles"], ["Tiles"]]
    assert kinds(planned(forward(8, 56, 61, 3))) == ["Regions"]
    large = dict(size=93, c=510, k=5)  # one padded image and its tiles have 36 MiB
    assert kinds(planned(forward(1, **large))) == ["Regions"]
    batch = forward(8, 56, 213, 5)
    assert kinds(planned(batch)) == ["Tiles"]
    assert kinds(planned(dataclasses.replace(batch, partitioned=1))) == ["Regions"], "no loop"


@pytest.mark.parametrize(
    ("n", "size", "c", "k", "algorithm"),
    [
        (4, 42, 200, 9, "Loop"),  # 4 images of 200 channels: padded 50x50, and twice 42x42
        (4, 42, 280, 9, "Tiles"),
        (1, 42, 280, 9, "Loop"),
        (4, 42, 280, 11, "Loop"),  # 121 taps for each of 4 outputs are more than 324 products
    ],
)
def test_many_taps_are_a_loop_if_its_sums_and_the_images_are_small(n, size, c, k, algorithm):
    assert kinds(planned(forward(n, size, c, k))) == [algorithm]


def piece(convolution):
    """Returns how many images and rows are convolved at a time; None is the whole batch."""
    of = planned(convolution).algorithm.piece
    return of and (of.images, of.rows)


def test_a_large_batch_is_a_loop():
    """Padded images of 40x40 and tiles of 34x34 together: 490,568 elements for each image."""
    sizes = dict(size=34, c=178, k=7)
    found = [piece(forward(n, **sizes)) for n in (6, 10, 14, 32)]
    assert found == [None, None, (7, 34), (4, 34)]
    assert piece(forward(32, size=34, c=17, k=7)) is None
    assert piece(forward(32, 34, 178, 3)) is None, "in regions nothing is copied"
    gradient = planned(input_gradient(n=32, stride=2, **sizes)).algorithm
    assert len(gradient.phases) == 4 and gradient.piece is None
    shared = dataclasses.replace(forward(32, **sizes), partitioned=1)
    assert piece(shared) is None, "each device may have a part of the batch"


def test_a_batch_of_large_copies_and_small_results_is_a_loop():
    """Images of 28x28 padded to 33x33, 1,089 elements for each channel, and results of 14x14."""
    found = [piece(forward(16, 28, c, 7, 2)) for c in (120, 121, 226)]
    assert found == [None, (8, 14), (8, 14)], "what fits into one pass needs no loop"
    assert piece(forward(1, 28, 121 * 16, 7, 2)) is None, "one image is not cut"
    assert piece(forward(16, 28, 226, 5, 2)) is None, "in regions"
    nine = [planned(forward(16, 20, c, 9, 2)) for c in (123, 124)]
    assert [kinds(of) for of in nine] == [["Loop"], ["Tiles"]], "tiles from `loop_gain` on"
    assert kinds(planned(forward(1, 20, 124 * 16, 9, 2))) == ["Loop"]


@pytest.mark.parametrize(("c", "algorithm"), [(256, "Regions"), (264, "Tiles")])
def test_many_weights_are_tiles(c, algorithm):
    """25 taps of 256 channels are 6,400 weights; a tile has at most 6 outputs."""
    found = planned(forward(8, 28, c, 5))
    assert kinds(found) == [algorithm]
    assert algorithm == "Regions" or found.algorithm.phases[0].algorithm.outputs == 6


def test_large_images_are_a_loop_over_their_rows():
    """Padded images of 99x99 and tiles of 93x93 together: 18,450 elements for each channel."""
    found = [piece(forward(n, 93, c, 7)) for n, c in ((1, 284), (1, 285), (3, 510))]
    assert found == [None, (1, 47), (1, 31)]
    wide = dict(size=93, k=7)
    least = [piece(forward(1, c=c, **wide)) for c in (2000, 20000)]
    assert least == [(1, 7), (1, 7)], "as many rows as the kernel has, however large they are"
    axis = planned(forward(1, c=285, **wide)).algorithm.phases[0].axes[0]
    assert (axis.size, axis.out, axis.low) == (53, 47, 0), "a piece has its pads already"
    row = Axis(1, 1, 1, 1, 0, 1, 1), Axis(60000, 31, 60000, 1, 15, 1, 1)
    of, _ = forward_plan.choose(1, 1, row, 100, tuning.TUNING, whole=True)
    assert (of.piece.dim, of.piece.rows) == (1, 20000), "an image of a single row is cut, too"
    flat = Axis(7, 7, 7, 1, 3, 1, 1), Axis(10000, 7, 10000, 1, 3, 1, 1)
    of, _ = forward_plan.choose(1, 1, flat, 100, tuning.TUNING, whole=True)
    assert of.piece.dim == 1, "7 rows of a 7x7 kernel are not cut"
    dilated = Axis(400, 7, 400, 1, 48, 1, 16), Axis(400, 7, 400, 1, 3, 1, 1)
    of, _ = forward_plan.choose(1, 1, dilated, 400, tuning.TUNING, whole=True)
    assert of.piece.rows == 80, "the kernel reaches over 97 rows; 400 in 5 pieces"


def test_images_of_crowded_channels_are_copied_with_more():
    """Not an image that is not copied, or of which a device has a part."""
    found = [planned(forward(1, 28, c, 7)).algorithm.more_channels for c in (512, 768, 1024)]
    assert found == [16, 0, 16]
    large = planned(forward(1, 93, 512, 7)).algorithm
    assert (large.piece.rows, large.more_channels) == (31, 16)
    assert planned(forward(1, 28, 512, 3)).algorithm.more_channels == 0
    shared = dataclasses.replace(forward(1, 28, 512, 7), partitioned=1)
    assert planned(shared).algorithm.more_channels == 0


@pytest.mark.parametrize(
    ("size", "most", "found"), [(32, 40, 32), (32, 20, 16), (13, 4, 2), (13, 0, 1), (32, 7, 4)]
)
def test_pieces_overlap_little(size, most, found):
    assert forward_plan.nearly_dividing(size, most) == found


@pytest.mark.parametrize(
    ("n", "padded", "reduced"), [(1, True, True), (2, False, True), (4, False, False)]
)
def test_how_much_is_compiled_for_a_kernel_gradient(n, padded, reduced):
    """Images of 40x40x120: padded, with a reduce; not padded; and product by product."""
    algorithm = planned(kernel_gradient(n, size=40, c=120, k=3)).algorithm
    assert (algorithm.crop is not None) == padded
    main, *rest = algorithm.blocks[0]
    assert (main.reduced is not None) == reduced and bool(rest) != padded


def test_a_kernel_gradient_of_a_large_batch_is_a_loop():
    """Its partial sums and the cotangent of 16 images of 56x56x100: 8.1 million elements."""
    sizes = dict(size=56, c=100, k=3)
    found = {n: planned(kernel_gradient(n, **sizes)).algorithm for n in (1, 4, 16, 17)}
    assert [found[n].images for n in found] == [0, 0, 8, 1], "17 is prime"
    assert found[16].blocks == found[4].blocks, "as where there is no loop"
    shared = dataclasses.replace(kernel_gradient(16, **sizes), partitioned=1)
    assert planned(shared).algorithm.images == 0, "each device may have a part of the batch"
    filters = kernel_gradient(16, size=56, c=50, k=3, m=2)
    assert planned(filters).algorithm.images == 0


@pytest.mark.parametrize(
    ("examples", "each", "found"),
    [(1, 10, 0), (12, 10, 6), (16, 30, 2), (7, 10, 1), (1009, 1, 0), (4, 1000, 1), (8, 0, 4)],
)
def test_how_many_images_at_a_time(examples, each, found):
    """Below 80 elements in all; none of a prime number of small images."""
    assert kernel_gradient_plan.at_once(examples, each, 80) == found


def test_phases_of_a_strided_input_gradient():
    found = planned(input_gradient(size=28, k=3, stride=2))
    assert found.algorithm.counts == (2, 2) and len(found.algorithm.phases) == 4
    assert sorted(math.prod(map(len, p.taps)) for p in found.algorithm.phases) == [1, 2, 2, 4]
    padded = planned(input_gradient(size=28, k=7, stride=2)).algorithm
    (sizes,) = {tuple(axis.size for axis in phase.axes) for phase in padded.phases}
    assert padded.crop[1] == sizes, "all phases read the same padded image"


def test_a_kernel_larger_than_the_image_is_exchanged():
    found, _ = forward_plan.choose(1, 1, [Axis(3, 9, 5, 1, 5, 1, 1)], 4, tuning.TUNING)
    assert found.exchanged and found.axes == (Axis(3, 9, 5, 1, 5, 1, 1).swapped(),)


@pytest.mark.parametrize(
    ("sizes", "passes", "loop"),
    [
        (dict(n=8, size=56, c=144, k=3), 1, False),
        (dict(n=1, size=28, c=32, k=3), 1, False),
        (dict(n=8, size=56, c=96, k=5), 5, False),
        (dict(n=1, size=14, c=32, k=5), 5, True),
        (dict(n=1, size=34, c=2, k=31), 31 * 4, True),
    ],
)
def test_kernel_gradients(sizes, passes, loop):
    algorithm = planned(kernel_gradient(**sizes)).algorithm
    assert math.prod(algorithm.grid) == passes and (algorithm.loop is not None) == loop
    assert len(algorithm.blocks) == (1 if loop else passes)


@pytest.mark.parametrize("rate", [1, 3])
@pytest.mark.parametrize("window", [(5, 1), (9, 1), (11, 1), (11, 2), (31, 1), (11, 3), (7, 5)])
def test_a_kernel_gradient_and_its_transpose_have_the_same_passes(window, rate):
    """An (11, 1) kernel had 11 passes of one tap, in a loop, and took 30 times as long."""

    def gradient(window):
        axes = [
            Axis(56, kernel=56, out=k, stride=rate, low=k // 2 * rate, lhs_dilation=1,
                 rhs_dilation=1)
            for k in window
        ]  # fmt: skip
        return kernel_gradient_plan.choose(4, axes, 64, tuning.TUNING)[0]

    tall, wide = gradient(window), gradient(window[::-1])
    assert tall.taps == wide.taps[::-1] and tall.grid == wide.grid[::-1]
    assert (tall.loop is None) == (wide.loop is None)
    assert max(tall.taps) > 1


@pytest.mark.parametrize("make", [forward, input_gradient, kernel_gradient])
def test_elsewhere_it_is_what_one_writes_by_hand(make):
    """Single outputs of a padded image; the gradient of a tap in one sum over all positions."""
    for stride, k in itertools.product((1, 2), (1, 3, 7)):
        found = planned(make(k=k, stride=stride, tag="taps", on_cpu=False), tuning.ELSEWHERE)
        if make is kernel_gradient:
            assert found.algorithm.taps == (1, 1) and found.algorithm.loop is None
            assert all(len(blocks) == 1 for blocks in found.algorithm.blocks)
            assert all(len(reads) == 1 for ((block),) in found.algorithm.blocks
                       for reads in block.reads)  # fmt: skip
        else:
            for phase in found.algorithm.phases:
                assert phase.algorithm in (forward_plan.Tiles(1, False), forward_plan.Zeros())


def axis_of(size, kernel, stride=1, padding="same"):
    """One spatial dimension of a forward convolution."""
    if padding == "same":
        out, (low, _) = same(size, kernel, stride)
    else:
        low = kernel - 1 if padding == "causal" else 0
        out = (size + low - kernel) // stride + 1
    return Axis(size, kernel, out, stride, low, lhs_dilation=1, rhs_dilation=1)


def chosen(axes, channels, constants=tuning.TUNING):
    """The algorithm of a convolution of any rank, and why."""
    taps, why = forward_plan.choose(1, 1, axes, channels, constants)
    (phase,) = taps.phases
    return type(phase.algorithm).__name__, why


def test_how_outputs_are_summed_up():
    found = {n: tuning.TUNING.sums_each(n) for n in (1, 3, 4, 6, 7, 9)}
    assert found == {1: 0, 3: 0, 4: 2, 6: 2, 7: 1, 9: 1}
    tiles, _ = forward_plan.choose(1, 1, [axis_of(56, 7)] * 2, 96, tuning.TUNING)
    assert tiles.phases[0].algorithm == forward_plan.Tiles(outputs=2, sums_each=0)
    tiles, _ = forward_plan.choose(8, 1, [axis_of(56, 7)] * 2, 96, tuning.TUNING)
    assert tiles.phases[0].algorithm == forward_plan.Tiles(outputs=6, sums_each=2)


MANY_WEIGHTS = "26 taps in regions, at most 150 for 1048576 elements of 512 channels"


@pytest.mark.parametrize(
    "kernel, padding, algorithm, why",
    [
        (4, "causal", "Regions", "10 taps in regions, at most 400 for 1048576 elements"),
        (8, "causal", "Regions", "36 taps in regions, at most 400 for 1048576 elements"),
        (9, "causal", "Tiles", "up to 9 regions along a dimension, more than 8"),
        (31, "causal", "Tiles", "up to 31 regions along a dimension, more than 8"),
        (7, "same", "Regions", "37 taps in regions, at most 400 for 1048576 elements"),
        (9, "same", "Tiles", "up to 9 regions along a dimension, more than 8"),
        (26, "valid", "Regions", MANY_WEIGHTS),
        (27, "valid", "Tiles", "no tap reads outside, and 27 taps share what they load in tiles"),
    ],
)
def test_sequences(kernel, padding, algorithm, why):
    axes = [axis_of(2048, kernel, padding=padding)]
    assert chosen(axes, 512) == (algorithm, why)
    # Where tiles would be of one output, nothing is gained by them.
    alone = dataclasses.replace(tuning.TUNING, efforts=(tuning.Effort(0, 999, products=kernel),))
    assert chosen(axes, 512, alone)[0] == "Regions"


@pytest.mark.parametrize(
    "sizes, kernels, strides, algorithm",
    [
        ((8, 28, 28), (3, 3, 3), (1, 1, 1), "Tiles"),
        ((8, 28, 28), (1, 3, 3), (1, 1, 1), "Regions"),
        ((8, 28, 28), (3, 1, 1), (1, 1, 1), "Regions"),
        ((8, 56, 56), (3, 3, 3), (1, 2, 2), "Regions"),
        ((9, 29, 29), (3, 3, 3), (2, 2, 2), "Regions"),
        ((56, 56), (5, 5), (1, 1), "Regions"),
    ],
)
def test_regions_along_three_dimensions(sizes, kernels, strides, algorithm):
    axes = [axis_of(*dimension) for dimension in zip(sizes, kernels, strides, strict=True)]
    found, why = chosen(axes, 192)
    assert found == algorithm
    tiles = "several taps cut off along more than 2 dimensions"
    assert (why == tiles) == (algorithm == "Tiles")


def test_the_quick_layers_of_the_benchmark():
    """A change here is a change of what is compiled for real networks."""
    found = {}
    for case in layers(quick=True):
        sizes = case.batch, case.size[0], case.channels, case.kernel[0], case.stride
        gradient = planned(kernel_gradient(*sizes)).algorithm
        found[case.label] = (
            *sorted(set(kinds(planned(forward(*sizes))))),
            *sorted(set(kinds(planned(input_gradient(*sizes))))),
            "all" if math.prod(gradient.taps) == math.prod(case.kernel) else "rows",
            "loop" if gradient.loop else "unrolled",
        )
    assert found == {
        "MobileNetV1-1/1": ("Regions", "Regions", "all", "unrolled"),
        "MobileNetV1-7/1": ("Regions", "Regions", "all", "unrolled"),
        "MobileNetV1-9/32": ("Regions", "Regions", "all", "unrolled"),
        "MobileNetV2-1/1": ("Regions", "Regions", "all", "unrolled"),
        "MobileNetV2-2/8": ("Regions", "Regions", "all", "unrolled"),
        "MobileNetV2-8/32": ("Regions", "Regions", "all", "unrolled"),
        "MobileNetV3-8/1": ("Tiles", "Tiles", "rows", "loop"),
        "EfficientNet-1/8": ("Regions", "Tiles", "rows", "unrolled"),
        "EfficientNet-6/1": ("Tiles", "Tiles", "rows", "loop"),
        "Xception-2/1": ("Regions", "Regions", "all", "unrolled"),
        "ConvNeXtTiny-1/1": ("Tiles", "Tiles", "rows", "loop"),
        "ConvNeXtTiny-4/32": ("Rows", "Rows", "rows", "loop"),
    }


# What every plan owes


def small_axes():
    """Geometries of two dimensions, of forward convolutions and kernel gradients."""
    of_one = [
        Axis(size, kernel, out, stride, low, 1, dilation)
        for size, kernel, stride, low, dilation in itertools.product(
            (4, 9), (1, 3, 8), (1, 2), (-1, 0, 2), (1, 3)
        )
        if (out := (size + low + 2 - (kernel - 1) * dilation - 1) // stride + 1) > 0
    ]
    return [(a, b) for a, b in itertools.product(of_one, of_one[::5])]


@tunings
def test_passes_add_every_tap_once(constants):
    for k in itertools.product((1, 3, 9, 31), (5, 11, 71)):
        axes = [Axis(2 * size, size, size + 1, 1, 0, 1, 1) for size in k]
        found, _ = forward_plan.choose(1, 1, axes, 4, constants)
        for phase in found.phases:
            if not isinstance(phase.algorithm, forward_plan.Loop):
                continue
            added = [
                tuple(p * n + i for p, n, i in zip(at, each.taps, inner, strict=True))
                for each in phase.algorithm.passes
                for at in itertools.product(*map(range, each.grid))
                for inner in itertools.product(*map(range, each.taps))
            ]
            starts = [
                each.start
                for each in phase.algorithm.passes
                for _ in range(math.prod(each.grid) * math.prod(each.taps))
            ]
            added = [(*tap[:-1], tap[-1] + s) for tap, s in zip(added, starts, strict=True)]
            assert sorted(added) == sorted(itertools.product(*map(range, k)))


def summed_up(block, at, taps, base):
    """(tap, position of the cotangent, position of the image) of each product of a block.

    Args:
      block: the block.
      at: the pass's place in the grid.
      taps: how many taps of each dimension a pass has.
      base: the position of the image from which the block counts.
    """
    steps = [len(reads) for reads in block.reads]
    for index in itertools.product(*map(range, block.counts)):
        for position in itertools.product(*block.reads):
            for tap in itertools.product(*map(range, taps)):
                dims = [*zip(tap, position, index, strict=True)]
                if all(a in reads for a, reads, _ in dims):
                    yield (
                        tuple(g * n + a for g, n, a in zip(at, taps, tap, strict=True)),
                        tuple(
                            reads[a][0] + j * step
                            for (a, reads, j), step in zip(dims, steps, strict=True)
                        ),
                        tuple(
                            reads[a][1] + j * apart + b
                            for (a, reads, j), apart, b in
                            zip(dims, block.apart, base, strict=True)
                        ),
                    )  # fmt: skip


@tunings
def test_blocks_sum_up_every_position_once(constants):
    """Each position of the cotangent that reads inside the image, for each tap, and no other."""
    for axes in small_axes():
        if not kernel_gradient_plan.suits(axes):
            continue
        found, _ = kernel_gradient_plan.choose(2, axes, 4, constants)
        assert not found.exchanged
        low = [-axis.low for axis in axes]
        sizes = [axis.size for axis in axes]
        moved = [0, 0]
        if found.crop is not None:
            moved, sizes = found.crop
        terms = []
        for i, at in enumerate(itertools.product(*map(range, found.grid))):
            base, blocks = moved, found.blocks[0 if found.loop else i]
            if found.loop is not None:
                shifts = zip(moved, found.loop.first, at, found.loop.apart, strict=True)
                base = [m + first + a * apart for m, first, a, apart in shifts]
            for block in blocks:
                terms += summed_up(block, at, found.taps, base)
        expected = [
            (tap, p, t)
            for tap in itertools.product(*[range(axis.out) for axis in axes])
            for p in itertools.product(*[range(axis.kernel) for axis in axes])
            for t in [tuple(f + a * axis.stride + q * axis.rhs_dilation
                            for f, a, q, axis in zip(low, tap, p, axes, strict=True))]
            if all(0 <= s < axis.size for s, axis in zip(t, axes, strict=True))
        ]  # fmt: skip
        # What is padded is read as well, and is zero; so are taps beyond the last.
        inside = [
            term for term in terms
            if all(0 <= s < axis.size for s, axis in zip(term[2], axes, strict=True))
            and all(a < axis.out for a, axis in zip(term[0], axes, strict=True))
        ]  # fmt: skip
        assert sorted(inside) == sorted(expected)


def test_a_plan_traces_nothing():
    """The rooms of the plan import neither JAX nor a room that does."""
    for name in "axis", "tuning", "forward_plan", "kernel_gradient_plan", "plan":
        tree = ast.parse((ROOM / f"{name}.py").read_text(encoding="utf-8"))
        names = {
            alias.name if isinstance(node, ast.Import) else f"{node.module}"
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not [n for n in names if n.split(".")[0] in ("jax", "numpy", "flax")]
