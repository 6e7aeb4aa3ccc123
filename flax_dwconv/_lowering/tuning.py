"""The tuning constants: where one algorithm takes over from another.

All were measured on two shared cores of an AMD EPYC, `loop_copies` and `loop_gain` on two of an
Intel Xeon too; what counts is the ratio of two times, not a time. To measure a constant again,
change its default here and compare two runs of

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
      patch_products: the fewest filters of a channel times taps for which the input gradient of a
        convolution whose windows do not overlap is a product of patches. On 4 images of 224x224x3,
        16x16 kernels with strides of 16 and 64 filters take 0.4 ms, as taps 580 and in XLA 1,500
        ms. With fewer products, 2x2 kernels with 4 filters for each of 64 channels, patches take
        1.2 to 1.6 times as long as taps. This and all that follows up to `vector_taps` is measured
        with `--scan multipliers SEED N`: no layer of the benchmark has a multiplier.
      patch_taps: the fewest taps for which the forward convolution is patches; with fewer, taps
        that are broadcast to the filters take 0.2 to 0.9 times as long in eight of ten cases.
      patch_results: from as many results on, XLA computes the forward convolution of patches. For
        9,400,000 results of 16 taps, patches take 12 ms and XLA 3.4 ms. For 4,200,000 results of 9
        taps, the limit, patches take 1.5 ms and XLA 1.9 ms.
      gradient_patch_sizes: the kernel gradient is patches if the kernel has as many taps along one
        dimension, or a single tap. With fewer, broadcast taps take 0.2 to 1.5 times as long.
      xla_work: with fewer products of results and taps, nothing is left to XLA for its speed.
      xla_taps: XLA computes a forward convolution of one or two dimensions, not dilated, that has
        as many taps and `xla_products`. Broadcast taps then take 0.5 to 1.2 times as long in eight
        of ten cases, and 2.1 times at most; with a dilation 0.15. In three dimensions they take
        0.05 to 0.45 times as long, 1.0 at most.
      xla_products: the fewest filters of a channel times taps for that.
      xla_odd_products: the same if the filters are no multiple of `vector`, whatever the number of
        taps is. Broadcast taps then take 0.5 to 1.5 times as long in eight of ten cases.
      xla_few_taps: 2-D kernels of at most as many taps are left to XLA, too, if there are
        `xla_filters` and these are no multiple of `vector`: broadcast taps then take 0.5 to 1.9
        times as long.
      xla_filters: the fewest filters of a channel for that.
      copies_memory: a sum over taps may copy the image once for each filter of a channel. The
        copies, with their pads, may have this many times the elements of image and result together;
        for a kernel gradient, of image and cotangent. Beyond that, what a tap reads is broadcast to
        the filters instead.
      vector: the float32 numbers of a vector. Filters are broadcast in any case if their number is
        a multiple of this, or at least 32. Other numbers are padded with zeros: without that, 35
        filters of 16 taps take 3.9 times as long, 126 of 49 taps 4.8 times.
      vector_taps: the fewest taps for which that is done. It costs a copy of the result: with a
        single tap, twice the time.
      overlap_filters: the fewest filters of a channel for which an input gradient is a product over
        the filters and a sum over the taps, where windows overlap. It takes 0.05 to 0.7 of the time
        of taps with at least as many filters, with fewer 0.4 to 2.4 of it.
      overlap_padded: with fewer filters, too, if a padded cotangent has more than this many times
        the positions of the cotangent. Taps would need as much memory.
      copied_channels: a kernel gradient with few filters is computed on one copy of the image for
        each if there are at most as many channels. It then takes 0.1 to 0.8 of the time that it
        takes filter by filter; with more channels than this 0.9 to 3 times as long.
      efforts: how much is compiled depends on how much there is to compute; ascending in
        `elements`, the first from 0 on. With pads, a 3x3 kernel has 21 taps in regions and a 5x5
        one 361. Each of these takes 1 to 3 ms to compile, as does a product. Without regions and
        tiles a layer takes 1 to 2 times as long on one small image, which a network hardly shows.
        Without regions it takes 1 to 4 times as long on a batch whose padded copy fits into no
        cache. For a 7x7 kernel, tiles of 4 outputs instead of 2 would take 0.8 to 0.9 of the time,
        but the 18 layers of a ConvNeXtTiny half a second longer to compile. Layers:
        'MobileNetV1-*' 'ConvNeXtTiny-*'.
      tiled_region_taps: the most `region_taps` of an effort where tiles, which load less for each
        product, pay: if the channels are no multiple of `vector`, so that vectors cross the lines
        of the cache, or if there are more than `region_weights`. It is ignored if padded images and
        tiles together have `batch_temporaries` elements or more; where the batch may be convolved
        in a loop, those of one image count. Such an image is convolved some rows at a time, and 5x5
        kernels then take 1.1 to 2.0 times as long in tiles as in regions. This limit was measured
        for 5x5 kernels only. They compile in half the time as tiles. Fourteen layers with odd
        channels took 0.97 of the time in the mean, 0.65 to 1.7.
      region_weights: the most weights of all taps and channels for regions. At this limit, 256
        channels of a 5x5 kernel, weights and pixels are 51 KB, slightly more than a first cache of
        48 KB. With 320 to 960 channels, a 5x5 kernel takes 0.66 to 0.98 of the time in tiles, and
        up to 1.07 with batches of 11 MiB and more; with 72 to 240 channels 1.2 to 1.8 times as
        long. 3x3 kernels differ: with 768 to 1,600 channels, regions are still faster than tiles.
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
      tile_outputs: the most neighbouring outputs of a row that are computed together. If it were 8,
        7x7 kernels on images whose sides are multiples of 7, from 14 to 56, would take 0.7 to 0.95
        of the time, and thirty layers drawn at random 1.01. They would compile to up to 1.3 times
        as many operations, and in 1.2 to 4 times as long where strides are 2. If it were 5, a train
        step of ConvNeXtTiny on 8 images would compile in 0.8 of the time that it takes with 8, and
        run as fast. Layers: 'ConvNeXtTiny-*'.
      batch_temporaries: from as many elements of padded images and tiles on, 20 MiB, a batch is
        convolved in a loop, some images in each pass. Where these and the result have more than 32
        MiB together, glibc maps memory anew in each call: for a 7x7 kernel, 4 images of 67x67x120,
        18.7 and 8.2 MiB, cost 400 page faults; 4 images of 67x67x143, 22.3 and 9.8 MiB, cost 5,700,
        and the loop takes 0.3 of the time. With 12 to 18 MiB it takes 0.9 to 1.1. For the same
        reason it is a limit in `tiled_region_taps`, `unrolled_taps` and `gradient_temporaries`.
      loop_gain: a batch of several images is also convolved in that loop if its padded images have
        at least this many elements, 4 MiB, more than twice its results have. The loop saves that
        padded images leave the caches. It writes the results twice more: as the zeros that it
        begins with, and where pieces are put together. With strides of 2 and passes of 4 MiB, 7x7
        and 9x9 kernels on padded images of 6 to 20 MiB take 0.3 to 1.1 of the time, 0.9 in the
        mean, on a CPU whose second cache has 1 MB; on one of 2 MB, with passes of 8 MiB, 0.8 to
        1.2. There is no loop if one pass is all: see `loop_copies`.
      loop_copies: one pass of that loop makes fewer elements of padded images than this, 8 MiB, but
        at least one whole image. An image that alone has `batch_temporaries` or more is cut into
        pieces of rows, of about as many rows of outputs as the kernel reaches over, or more. Large
        images take 0.54 to 0.87 of the time that they would take if they were cut by channels,
        because some channels of an image are not contiguous in memory. With 4 MiB instead, large
        images take 1.0 to 1.4 times as long, and batches 0.8 to 1.3 times as long, 1.03 in the mean
        of twelve.
      crowded_channels: a padded image whose channels are a multiple of this, 2 KiB, gets
        `more_channels`. Else the pixels that a tile reads share a few sets of the cache: with 512
        and 1,024 channels, 7x7 and 9x9 kernels then take 1.1 to 2.2 times as long. With 128 to 384
        channels, 640 and 704, more channels gained nothing.
      more_channels: how many channels of zeros, 64 bytes, a line of the cache.
      padded_before_elements: if image or result have as many elements, and the image is not in
        pieces or regions, what computes it, such as an activation, writes it padded. Else its pads
        are one more loop over it. An image that several phases read is always padded so. Chains of
        two to five layers of 3x3 to 1x11 take 0.83 to 1.05 of the time so, 0.95 in the mean of
        fourteen, and train steps of layers of 7x7 and 9x9 with strides 0.91 to 0.99. Where images
        have fewer elements, such chains take 0.9 to 1.05 of the time, and six 7x7 layers with their
        gradients take 1.08 times as long to compile.
      row_outputs: rows of at most as many outputs are computed as a whole. Layer:
        'ConvNeXtTiny-4'.
      exchanged_rows_elements: from as many elements on, image and kernel may exchange their roles
        in such rows. For 32 images of 7x7x768 and a 7x7 kernel, not exchanging them takes 1.25
        times as long; for 8 and for one, 0.85 and 1.0 times. Exchanged, a pixel that is not a
        number reaches outputs that do not see it. Layer: 'ConvNeXtTiny-4'.
      unrolled_taps: the most taps that are always compiled one by one. More are a loop below
        `batch_temporaries` and `loop_gain`, with the sums counted twice, as a loop has them. They
        are a loop, too, if the effort's `products` do not allow tiles of `loop_outputs`. For 9x9
        kernels, the loop takes 0.6 to 1.0 of the time of tiles below `batch_temporaries`, and above
        it 0.9 to 2.6 times as long, 1.6 in the mean of ten layers. For kernels of 11x11 and more,
        tiles take 5 to 9 times as long as the loop.
      loop_outputs: neighbouring outputs that a loop over a kernel computes together.
      loop_products: the most products in one pass of such a loop. Compile time grows with them.
      outputs_row_by_row: from as many outputs on, outputs that are computed together are summed up
        row by row of the kernel: a row of all outputs, then the next row. With fewer outputs, each
        addition would wait for the one before, so each output is a tree of rows of its own: two
        outputs of a 7x7 kernel take 0.8 of the time. Layers: 'ConvNeXtTiny-*'.
      two_sums_outputs: at most so many outputs that grow together, row by row, are two sums each. A
        product with a sum takes four cycles, and a core begins two in each, so eight sums keep it
        busy: 7x7 and 9x9 kernels on large images take 0.7 to 1.04 of the time so, 0.95 in the mean
        of 22 layers. With three sums, nine of those layers take 1.02 times as long as with two.
        Measured with `--draw`.
      all_taps: the most taps of a kernel whose gradients are all computed in one pass of the inner
        loop, which reads image and cotangent once: on 8 images of 56x56x144, the gradient of a 3x3
        kernel takes 0.65 of the time. Layers: 'MobileNetV2-*'.
      row_taps: the most taps of a row of the kernel whose gradients one pass computes otherwise;
        `all_taps`, if that is more, of an image of `one_by_one_elements`. Layers for these and the
        next: 'MobileNetV3-*' 'ConvNeXtTiny-*'.
      row_products: about how many products of a whole row are compiled one by one in such a pass:
        taps times positions of the cotangent. Compile time grows with them.
      padded_elements: with fewer elements, the image of a kernel gradient is padded, even if its
        passes are no loop. Then nothing is left over of rows and columns: eight 3x3 layers compile
        to 0.4 to 0.8 times as many lines of HLO, and take 0.7 to 1.3 times as long.
      one_by_one_elements: from as many elements on, each product of a kernel gradient is an
        operation of its own. With fewer, one `reduce` sums up neighbouring positions, see
        `sums.along`. Gradients of fourteen layers of fewer elements, 3x3 to 7x7, compile in 0.3 to
        0.95 of the time so, 0.6 in the mean, and take 0.8 to 1.9 times as long, 1.24 in the mean.
        Of more elements they would take 0.6 to 2.8 times as long, 1.2 in the mean of eighteen:
        there are more partial sums. Layers: 'MobileNetV2-*'.
      row_positions: the most positions of a row of the cotangent whose products are compiled one
        by one as a whole, or summed up by one `reduce`.
      split_positions: the most neighbouring positions in blocks of a longer row, one by one. With
        14, and `rest_cost` for every image, a row of 68 was 17 blocks of 4: a 7x7 kernel on
        68x68x900 took 1.6 times as long. If rows of 28 are split too, a 3x3 kernel compiles to 0.7
        times as many lines of HLO, but 1 and 8 images of 28x28x192 take 1.4 and 1.3 times as long.
      short_row_products: a row of at most as many products is compiled one by one in any case.
        Without that, ten layers, of 6 to 20 positions a row, compile in 0.87 of the time and take
        0.8 to 1.8 times as long, 1.12 in the mean.
      unrolled_products: one `reduce` sums up at most n positions of m products each, such that
        n * (m + 1) <= this: LLVM does not vectorise what has more. The rule was found by trying 2
        to 9 products, see `test_a_reduce_of_few_products_is_vectorised`.
      moving_products: the same inside a loop over taps. A window whose place is known only when the
        program runs has more instructions: with 98, the gradients of 9x9 kernels took 3 times as
        long.
      rest_products: if at most so many positions of all taps are left of a row or column, they are
        one block.
      rest_cost: blocks have the width that costs least, counted in blocks: their number, twice the
        positions that are left over, and this constant if any are left over where all taps have
        equally many. No other block would share their loop. It is not added for images of
        `one_by_one_elements`: with it, kernel gradients of thirteen layers take 1.06 times as long.
      one_by_one_cost: is added to that cost for a width whose products are not one `reduce`. So
        rows of 28 are blocks of 7, but rows of 13 and 26 are blocks of 13, product by product: with
        blocks of 12 and 1 or 2 positions left, 7x7 kernels took 2.6 and 3.4 times as long.
      gradient_temporaries: from as many elements of partial sums and padded images on, 4 MiB, a
        kernel gradient is a loop over some images, if these and the cotangent have
        `batch_temporaries`. Train steps of six layers, on images of 14 to 25 MB, took 0.45 to 0.93
        of the time so: most of it was spent on mapping memory anew.
      gradient_loop_temporaries: fewer elements of them than this, 8 MiB, are in memory in one pass
        of that loop, if the batch divides so. Kernel gradients of twelve layers take 1.04 times as
        long with 4 MiB, and 0.98 times with 16.
      positions_together: the sums of all taps grow together, by so many positions of the cotangent
        at a time.
      unrolled_bodies: the most passes of a kernel gradient that are compiled one by one. More are a
        loop, which needs a padded copy of the image. Train steps with 7x7 kernels, 7 passes, take
        0.84 to 1.1 of the time with loops, on images of 7x7 1.3, and compile in 0.4 to 0.6 of it.
      unrolled_bodies_large: the same for a large image. Train steps with 5x5 kernels, 5 passes,
        take 0.76 to 1.27 of the time with loops, and 2.5 times as long where temporaries grew from
        14 to 34 MiB. They compile in 0.5 to 1.0 of the time.
      unrolled_bodies_elements: the fewest elements of a large image in that sense. With a quarter
        of it, a train step of EfficientNetB0 on 8 images takes as long, and 1.2 times as long to
        compile.
      plane_least: the fewest positions of a plane, what one channel of one image holds, of which
        images with the channels first are read plane by plane. Forward, with batches, that takes
        0.5 to 3 times as long as with the channels last, and with transpositions 1.5 to 8 times.
      plane_most: the most positions of a plane; each mask is a constant as long as that.
      plane_columns: the most outputs of a row with a stride for which the columns of the image are
        dealt out first. With 14 and 7 outputs, that takes 0.6 and 0.4 of the time; with 28, 1.2 to
        2.2 times as long.
      plane_images: how many images a kernel gradient sums up at once. With 8, each of nine
        products takes 0.044 to 0.049 ns on two cores, with 4 images 0.062.
      plane_terms: the most products that are summed up for each tap at once, of several images or
        pieces of one. From 16 on, LLVM does not vectorise: 0.2 to 1 ns a product.
      partial_sums: with several filters of a channel, passes are compiled one by one only if their
        partial sums, which are all in memory at once, are at most as many cotangents. A 6x6 kernel
        with strides of 2 and 31 filters on 5 images of 79x17x34 needed 4.9 times operands and
        results, in a loop 1.0.
      parallel_loops: whether the passes of a loop need `workarounds.parallel`, which is for
        XLA:CPU.
    """

    patch_products: int = 64
    patch_results: int = 1 << 22
    patch_taps: int = 200
    gradient_patch_sizes: int = 10
    xla_work: int = 1 << 16
    xla_taps: int = 25
    xla_products: int = 1500
    xla_odd_products: int = 1200
    xla_few_taps: int = 4
    xla_filters: int = 32
    copies_memory: float = 2.5
    vector: int = 8
    vector_taps: int = 6
    overlap_filters: int = 8
    overlap_padded: float = 1.5
    copied_channels: int = 16
    efforts: tuple[Effort, ...] = (
        Effort(0, region_taps=30, products=1),
        Effort(1 << 17, region_taps=150, products=100),
        Effort(1 << 19, region_taps=400, products=324),
    )
    tiled_region_taps: int = 150
    region_weights: int = 6400
    padded_taps: int = 2
    region_dimensions: int = 2
    region_runs: int = 8
    whole_image_tile_taps: int = 27
    tile_outputs: int = 6
    row_outputs: int = 8
    batch_temporaries: int = 5 << 20
    loop_gain: int = 1 << 20
    loop_copies: int = 1 << 21
    crowded_channels: int = 512
    more_channels: int = 16
    padded_before_elements: int = 1 << 19
    exchanged_rows_elements: int = 1 << 19
    unrolled_taps: int = 64
    loop_outputs: int = 4
    loop_products: int = 128
    outputs_row_by_row: int = 4
    two_sums_outputs: int = 6
    all_taps: int = 9
    row_taps: int = 8
    row_products: int = 150
    padded_elements: int = 1 << 18
    one_by_one_elements: int = 1 << 19
    row_positions: int = 28
    split_positions: int = 17
    short_row_products: int = 64
    unrolled_products: int = 98
    moving_products: int = 66
    rest_products: int = 16
    rest_cost: int = 8
    one_by_one_cost: int = 9
    gradient_temporaries: int = 1 << 20
    gradient_loop_temporaries: int = 1 << 21
    positions_together: int = 4
    unrolled_bodies: int = 3
    unrolled_bodies_large: int = 5
    unrolled_bodies_elements: int = 1 << 21
    plane_least: int = 16
    plane_most: int = 1 << 16
    plane_columns: int = 16
    plane_images: int = 8
    plane_terms: int = 12
    partial_sums: float = 1.0
    parallel_loops: bool = True

    def sums_each(self, outputs: int) -> int:
        """Returns how outputs that are computed together are summed up: see `sums.together`.

        Args:
          outputs: how many they are.

        Returns:
          0, if each is a tree of rows of the kernel; else how many sums each has while all grow
          together, row by row.
        """
        if outputs < self.outputs_row_by_row:
            return 0
        return 2 if outputs <= self.two_sums_outputs else 1


# What is in use. Tests replace it: it is part of the key of the cache of programs.
TUNING = Tuning()
# On other platforms, where only `method="taps"` is compiled here: what one writes by hand. A padded
# image, all taps of a single output one by one; for the gradient of a tap, the sum over all
# positions at once. Nothing of it was tuned. More than 64 taps are a loop.
ELSEWHERE = Tuning(
    efforts=(Effort(0, region_taps=0, products=1),),
    loop_outputs=1,
    all_taps=0,
    padded_elements=0,
    row_positions=1,
    row_taps=1,
    row_products=1,
    unrolled_bodies=64,
    parallel_loops=False,
)
