"""The tuning constants: where one algorithm takes over from another.

All were measured on two shared cores; what counts is the ratio of two times, not a time. To measure
a constant again, change its default here and compare two runs of

    python -m flax_dwconv.benchmark --layers PATTERN

for a pattern of layers that it decides about. The descriptions name one, where the benchmark has
such layers. Its images have neither multipliers nor kernels above 7x7; `--family sequences` in
place of `--layers` has kernels of up to 31 taps, `--draw` of up to 9x9. `plan.plan` says, on
integers alone, which algorithm a layer gets.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much may be compiled for one convolution.

    Attributes:
      elements: the fewest elements of the image, or of the result if that is larger, from which on
        this much may be compiled.
      region_taps: the most taps, summed up over all regions of an image. An image that would have
        more is padded instead.
      products: the most products that one pass of the inner loop computes: neighbouring outputs
        times taps.
    """

    elements: int
    region_taps: int
    products: int


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Every tuning constant, in the order in which the algorithms ask for them.

    Attributes:
      patch_products: the fewest filters of a channel times taps for which a convolution whose
        windows do not overlap, and each of its gradients, is a matrix product of patches. On 4
        images of 224x224x3, 16x16 kernels with strides of 16 and 64 filters take 0.4 ms forward,
        as taps 50 ms and in XLA 0.8 ms; a gradient by the image 0.4, 580 and 1,500 ms. With fewer
        products, 2x2 kernels with 4 filters for each of 64 channels, patches take 1.2 to 1.6 times
        as long as taps. No layer of the benchmark has a multiplier.
      patch_results: from as many results on, XLA computes the forward convolution of patches. For
        9,400,000 results of 16 taps, patches take 12 ms and XLA 3.4 ms. For 4,200,000 results of 9
        taps, the limit, patches take 1.5 ms and XLA 1.9 ms. The gradients stay products: XLA's take
        2.5 to 40 times as long.
      copies_memory: a sum over taps copies the image once for each filter of a channel. The copies
        may have this many times the elements of image and result together; for a kernel gradient,
        of image and cotangent. Beyond that, what does not overlap is patches. What overlaps XLA
        computes, if it is a forward convolution and no taps were asked for: it then takes 0.4 to
        2.2 times as long. A kernel gradient is computed filter by filter, which takes 0.2 to 2.7
        times as long.
      copies_elements: copies of at most as many elements are always made, however small the image
        is. In float32 they take half a MB.
      efforts: how much is compiled depends on how much there is to compute; ascending in
        `elements`, the first from 0 on. With pads, a 3x3 kernel has 21 taps in regions and a 5x5
        one 361. Each of these takes 1 to 3 ms to compile, as does a product. Without regions and
        tiles a layer takes 1 to 2 times as long on one small image, which a network hardly shows.
        Without regions it takes 1 to 4 times as long on a batch whose padded copy fits into no
        cache. For a 7x7 kernel, tiles of 4 outputs instead of 2 would take 0.8 to 0.9 of the time,
        but the 18 layers of a ConvNeXtTiny half a second longer to compile. Layers:
        'MobileNetV1-*' 'ConvNeXtTiny-*'.
      padded_taps: the most taps of an image in regions that are padded, each by itself, because
        they read outside for some outputs. Padding them saves regions: a 3x3 kernel would have 49
        taps. Four padded taps are slower: 4 times for a 5x5 kernel along one dimension; and for a
        3x3 kernel along both dimensions where other operations are fused, MobileNetV2's inference
        took 1.2 times as long. Layers: 'MobileNetV2-*' 'EfficientNet-*'.
      region_dimensions: the most dimensions along which several taps are cut off, for a kernel of 3
        at both ends, if the image is to be in regions. With three, LLVM often does not vectorise:
        in tiles, a 3x3x3 kernel takes 0.15 to 0.35 of the time, and where LLVM does, up to 1.2.
        This and the next two are for strides of 1. All three are measured with `--family volumes`
        and `--family sequences`.
      region_runs: the most regions along one dimension, estimated as the taps that are cut off,
        plus one. With more, tiles take 0.35 to 1.1 of the time: kernels of 9 to 27 taps along a
        sequence, "same" or causal.
      whole_image_tile_taps: from as many taps on, tiles are taken where no tap reads outside the
        image, so that nothing has to be padded. Tiles then take 0.2 to 0.9 of the time that single
        outputs take for 27 to 50 taps, 0.6 to 1.2 for 16 to 25, 0.8 to 4.7 for 11 and fewer.
      tile_outputs: the most neighbouring outputs of a row that are computed together. Networks for
        images of 224x224 have rows of 7, 14, 28, 56 and 112 outputs, all multiples of 7. Layers:
        'ConvNeXtTiny-*'.
      row_outputs: rows of at most as many outputs are computed as a whole. Layer:
        'ConvNeXtTiny-4'.
      unrolled_taps: the most taps that are compiled one by one; a kernel with more is a loop.
        Compile time grows with the taps.
      loop_outputs: neighbouring outputs that a loop over a kernel computes together.
      loop_products: the most products in one pass of such a loop. Compile time grows with them.
      outputs_row_by_row: from as many outputs on, outputs that are computed together are summed up
        row by row of the kernel: a row of all outputs, then the next row. With fewer outputs, each
        addition would wait for the one before, so each output is a tree of rows of its own: two
        outputs of a 7x7 kernel take 0.8 of the time. Layers: 'ConvNeXtTiny-*'.
      copied_channels: a kernel gradient with a multiplier is computed on one copy of the image for
        each filter of a channel if there are at most as many channels. A forward convolution always
        is: copies are in the order of the result. Forward, copies take 0.2 to 0.8 of the time that
        one kernel after the other and a transposition take, with 5x5 and 7x7 kernels about as long.
        Kernel gradients take 0.1 to 0.8 of it, but with more channels than this 0.9 to 3 times as
        long.
      all_taps: the most taps of a kernel whose gradients are all computed in one pass of the inner
        loop, which reads image and cotangent once: on 8 images of 56x56x144, the gradient of a 3x3
        kernel takes 0.65 of the time. Layers: 'MobileNetV2-*'.
      all_taps_elements: the fewest elements of the image for which that is done.
      all_taps_positions: neighbouring positions of the cotangent that such a pass sums up.
      row_taps: the most taps of a row of the kernel whose gradients one pass computes otherwise.
        Layers for these and the next: 'MobileNetV3-*' 'ConvNeXtTiny-*'.
      row_products: about how many products such a pass has: taps times positions of the cotangent.
        Compile time grows with them.
      positions_together: the sums of all taps grow together, by so many positions of the cotangent
        at a time.
      unrolled_bodies: the most passes of a kernel gradient that are compiled one by one. More are a
        loop, which needs a padded copy of the image.
      unrolled_bodies_large: the same for a large image, and in units of `row_products` the most
        products of passes that are compiled one by one there.
      unrolled_bodies_elements: the fewest elements of a large image in that sense.
      parallel_loops: whether the passes of a loop need `workarounds.parallel`, which is for
        XLA:CPU.
    """

    patch_products: int = 64
    patch_results: int = 1 << 22
    patch_taps: int = 64
    xla_taps: int = 25
    xla_products: int = 1500
    xla_filters: int = 64
    copies_memory: float = 2.5
    overlap_filters: int = 8
    overlap_padded: float = 2.0
    copied_channels: int = 16
    efforts: tuple[Effort, ...] = (
        Effort(0, region_taps=30, products=1),
        Effort(1 << 17, region_taps=150, products=100),
        Effort(1 << 19, region_taps=400, products=350),
    )
    padded_taps: int = 2
    region_dimensions: int = 2
    region_runs: int = 8
    whole_image_tile_taps: int = 27
    tile_outputs: int = 7
    row_outputs: int = 8
    unrolled_taps: int = 64
    loop_outputs: int = 4
    loop_products: int = 128
    outputs_row_by_row: int = 4
    all_taps: int = 9
    all_taps_elements: int = 1 << 17
    all_taps_positions: int = 28
    row_taps: int = 8
    row_products: int = 150
    positions_together: int = 4
    unrolled_bodies: int = 3
    unrolled_bodies_large: int = 5
    unrolled_bodies_elements: int = 1 << 19
    parallel_loops: bool = True


# What is in use. Tests replace it: it is part of the key of the cache of programs.
TUNING = Tuning()
# On other platforms, where only `method="taps"` is compiled here: what one writes by hand. A padded
# image, all taps of a single output one by one; for the gradient of a tap, the sum over all
# positions at once. Nothing of it was tuned. As on CPU, more than 64 taps are a loop.
ELSEWHERE = Tuning(
    efforts=(Effort(0, region_taps=0, products=1),),
    loop_outputs=1,
    all_taps=0,
    all_taps_positions=1,
    row_taps=1,
    row_products=1,
    unrolled_bodies=64,
    parallel_loops=False,
)
