"""The plan: which convolution it is, and which algorithm serves it, on integers alone.

With the groups `c` split off the axis that holds them, every convolution is

    out[n, m, o, c] = sum_q sum_a lhs[n, q, o + a, c] * rhs[m, q, a, c]

where `o` and `a` are positions of every spatial dimension, and `o + a` is what `Axis` says.

Forward: q = 1 if it is depthwise, and m is the multiplier. Input gradient: m = 1, and q is the
multiplier. Kernel gradient: n = 1, and q is the batch; it is the one with `batch_group_count`, as
JAX's transpose rule makes it. What autodiff derives from these again has no other form. `vmap` over
one operand can make the 1 larger.

`plan` makes every choice, with `forward_plan` and `kernel_gradient_plan`; `forward`,
`kernel_gradient`, `overlap`, `patches` and `product` emit what was chosen. Nothing is traced here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from flax_dwconv._lowering import forward_plan, kernel_gradient_plan, planes_plan
from flax_dwconv._lowering.axis import Axis
from flax_dwconv._lowering.forward_plan import Taps
from flax_dwconv._lowering.kernel_gradient_plan import KernelGradient
from flax_dwconv._lowering.planes_plan import Planes, PlanesGradient
from flax_dwconv._lowering.tuning import Tuning

# What a convolution is tagged with:
# "ours": made by `depthwise_conv`, compiled here on CPU.
# "depthwise": traced inside `accelerate`, compiled here on CPU if it is depthwise.
# "separable": traced inside `accelerate(pointwise=True)`; if it is pointwise, too.
# "taps": made by `depthwise_conv`, compiled here on every platform.
# "xla": made by `depthwise_conv` and left to XLA, but see `Convolution.partitioned`. Without a tag,
# derivatives traced inside `accelerate` would get its.
Tag = Literal["ours", "depthwise", "separable", "taps", "xla"]
Kind = Literal["forward", "input gradient", "kernel gradient", "product"]
# How the filters of a channel share what a tap reads of it:
# "one by one": each filter reads it by itself.
# "copies": of the image, beforehand, one for each filter; channels and filters are one dimension.
# "broadcast": to each filter, in the loop that reads it, which takes no memory.
Filters = Literal["one by one", "copies", "broadcast"]

DTYPES = {"float16", "bfloat16", "float32", "float64"}
SYMBOLIC = -1  # in the place of a number that is known only when the program runs


# What is asked


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of a convolution, or its result.

    Attributes:
      shape: its sizes, or SYMBOLIC.
      spec: its dimension numbers: the dimensions that hold the batch and the features (of a
        kernel, the features out and in), then the spatial ones.
      dtype: the name of its dtype.
      sharded: for each dimension, whether its type says how it is sharded (explicit sharding).
    """

    shape: tuple[int, ...]
    spec: tuple[int, ...]
    dtype: str
    sharded: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A `lax.conv_general_dilated`, in the names of its parameters.

    If one of these numbers is SYMBOLIC, then so is one of the sizes.

    Attributes:
      lhs: the image.
      rhs: the kernel.
      out: the result.
      strides: one for each spatial dimension, as the next three.
      padding: the pads before and after.
      lhs_dilation: of the image.
      rhs_dilation: of the kernel.
      feature_groups: groups of the features of `lhs`.
      batch_groups: groups of the batch of `lhs`.
      tag: what it was traced under.
      on_cpu: whether it is compiled for CPU.
      partitioned: over how many axes of a mesh XLA partitions it; 2 where that is not known, and
        may be. If it is 2 or more, if the batch is sharded over some of them and nothing over the
        others, XLA's partitioner makes the kernel gradient of a grouped convolution too large, as
        many times as the others have devices: it adds up the parts of all devices, also of those
        that hold the same images (seen in jax 0.10.2, 0.11.2 and 0.12.0.1, for CPU, CUDA and TPU;
        `findings/grouped-kernel-gradient-on-a-mesh.sh`). Whether it will be so is not known before
        the program is partitioned. So there, the kernel gradients of `depthwise_conv` are sums over
        taps on every platform and for every method. For TPU, they read and write about 4 times the
        bytes: 662 MB where XLA's has 154, for 16 images of 56x56x144 in float32 on 2x2 devices, as
        its compiler counts. One XLA convolution with a gradient for each image has 238 MB, but
        gathers the images if channels are sharded too.
    """

    lhs: Operand
    rhs: Operand
    out: Operand
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int
    batch_groups: int
    tag: Tag
    on_cpu: bool = True
    partitioned: int = 0

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """Both operands and the result."""
        return self.lhs, self.rhs, self.out

    @property
    def wrong_in_xla(self) -> bool:
        """Whether XLA may get it wrong, see `partitioned`."""
        return self.partitioned > 1 and self.batch_groups > 1

    @property
    def sharded(self) -> bool:
        """Whether the type of an operand or of the result says how it is sharded."""
        return any(any(operand.sharded) for operand in self.operands)


# What is answered


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product.

    Attributes:
      axes: the geometry.
      kernel_first: which operand `lax.dot_general` takes first. With the other one first, XLA's
        products take up to 5 times as long.
    """

    axes: tuple[Axis, ...]
    kernel_first: bool


@dataclasses.dataclass(frozen=True)
class Patches:
    """A convolution, or a gradient of one, whose windows do not overlap: one matrix product.

    Attributes:
      axes: the geometry.
      kind: which convolution it is.
    """

    axes: tuple[Axis, ...]
    kind: Kind


@dataclasses.dataclass(frozen=True)
class Overlap:
    """An input gradient with several filters a channel: products, and a sum over the taps.

    Attributes:
      axes: the geometry.
      rows: how many positions of the kernel's first dimension one product has; they divide it. A
        loop makes one product after the other.
      parallel: as `parallel_loops` in `Tuning`.
    """

    axes: tuple[Axis, ...]
    rows: int
    parallel: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of a convolution.

    Attributes:
      algorithm: what computes it, or None if it is left to XLA.
      why: the reason for the algorithm, or for leaving it to XLA, in words.
      kind: which convolution it is. An input gradient that has neither a stride nor a multiplier is
        a forward convolution. None, if it is left to XLA.
      groups: the number of groups, the channels of a depthwise convolution.
      filters: how the filters of a channel share what a tap reads.
      padded: how many filters of zeros are added to those of each channel. Loops over a number of
        filters that is no multiple of a vector's elements are hardly vectorised.
      accumulator: the name of the dtype that sums are computed in.
    """

    algorithm: Taps | KernelGradient | Planes | PlanesGradient | Patches | Overlap | Product | None
    why: str
    kind: Kind | None = None
    groups: int = 1
    filters: Filters = "one by one"
    padded: int = 0
    accumulator: str = "float32"


# Which convolution it is


def plan(convolution: Convolution, tuning: Tuning) -> Plan:
    """Returns what becomes of a convolution: its kind, an algorithm and the reason for it.

    Args:
      convolution: what JAX is to lower.
      tuning: the constants that the choice of the algorithm depends on.
    """
    if reason := _unsuitable(convolution):
        return Plan(None, reason)
    lhs, rhs, out = convolution.operands
    axes = _axes(convolution)
    groups = max(convolution.feature_groups, convolution.batch_groups)
    n, q = lhs.shape[lhs.spec[0]], lhs.shape[lhs.spec[1]]
    n, q = (n // groups, q) if convolution.batch_groups > 1 else (n, q // groups)
    m = rhs.shape[rhs.spec[0]] // groups
    accumulator = "float64" if "float64" in (lhs.dtype, out.dtype) else "float32"

    # A kernel gradient of one group has no group count that would tell it.
    if convolution.batch_groups > 1:
        # One that is larger than the cotangent is better off as the convolution of a large kernel,
        # if that has a single filter for each channel.
        gradient = kernel_gradient_plan.allows(axes) if m > 1 else kernel_gradient_plan.suits(axes)
    else:
        gradient = groups == 1 and kernel_gradient_plan.suits(axes)
    # In a depthwise convolution one of these two is 1, unless `vmap` made it larger. Ordinary
    # grouped convolutions have values above 1 too, so we accept them only if the tag says that
    # `depthwise_conv2d` made the convolution.
    features = n if gradient else q
    depthwise = min(features, m) == 1 or convolution.tag in ("ours", "taps", "xla")
    # With one group, every convolution looks like a depthwise one of one channel. It is XLA's,
    # unless taps were asked for.
    if not depthwise or (groups == 1 and convolution.tag != "taps"):
        if reason := _no_product(convolution, axes):
            return Plan(None, f"not depthwise: {groups} groups of {features} and {m}; {reason}")
        summed_positions = any(axis.kernel > 1 for _, axis in map(Axis.sliding, axes))
        features_first = out.spec[1] < min(out.spec[2:])
        product = Product(axes, m < n if summed_positions else features_first)
        why = "no window of several positions slides"
        return Plan(product, why, "product", groups, accumulator=accumulator)

    filters: Filters = "one by one"
    if features == 1 < m:
        image, kernel, result = (math.prod(operand.shape) for operand in convolution.operands)
        filters = _filters(axes, m, image, kernel if gradient else result, tuning)
    special = _several_filters(convolution, axes, gradient, q, m, tuning)
    if special is None or not isinstance(special.algorithm, Patches):
        special = _in_planes(convolution, axes, gradient, (n, q, m, groups), tuning) or special
    if special:
        return dataclasses.replace(special, groups=groups, accumulator=accumulator)
    whole = convolution.on_cpu and not (convolution.partitioned or convolution.sharded)
    if gradient:
        if filters == "copies" and groups > tuning.copied_channels:
            filters = "one by one"
        channels = groups if filters == "one by one" else groups * m
        algorithm, why = kernel_gradient_plan.choose(q, axes, channels, tuning, m, whole)
        return Plan(algorithm, why, "kernel gradient", groups, filters, accumulator=accumulator)
    dilated = any(axis.lhs_dilation > 1 for axis in axes)
    if q > 1:
        # One more dimension, that has one window: `q` times as many taps in one pass. As `q`
        # convolutions that are summed up afterwards, an input gradient takes 1.3 to 24 times as
        # long.
        summed = Axis(q, kernel=q, out=1, stride=1, low=0, lhs_dilation=1, rhs_dilation=1)
        axes = (summed, *axes)
    kernels, channels = (m, groups) if filters == "one by one" else (1, groups * m)
    if filters == "copies" and tuning.unrolled_taps < math.prod(axis.kernel for axis in axes):
        sizes = math.prod(axis.size for axis in axes)
        if math.prod(axis.kernel for axis in axes) <= sizes and not dilated:
            filters = "broadcast"  # a loop keeps copies of the result, too
    broadcast = filters == "broadcast"
    algorithm, why = forward_plan.choose(n, kernels, axes, channels, tuning, broadcast, whole)
    kind: Kind = "input gradient" if dilated or q > 1 else "forward"
    taps = math.prod(axis.kernel for axis in axes)
    padded = -m % tuning.vector if broadcast and m > tuning.vector // 2 else 0
    # If the taps are a loop, it keeps copies of the result already.
    if taps < tuning.vector_taps or (taps > tuning.unrolled_taps and 10 * padded > m):
        padded = 0
    return Plan(algorithm, why, kind, groups, filters, padded, accumulator)


def _filters(axes: Sequence[Axis], m: int, image: int, other: int, tuning: Tuning) -> Filters:
    """Returns how the filters of a channel share what a tap reads.

    Args:
      axes: the geometry.
      m: filters for each channel, more than 1.
      image: its elements.
      other: elements of the result, or for a kernel gradient of the cotangent.
      tuning: the constants.
    """
    sizes = math.prod(axis.size for axis in axes)
    padded = math.prod(max(axis.reach, axis.size) for axis in axes) / sizes
    too_large = m * image * (1 + padded) > tuning.copies_memory * (image + other)
    if any(axis.lhs_dilation > 1 for axis in axes):
        return "one by one" if too_large else "copies"
    if math.prod(axis.kernel for axis in axes) > sizes:
        return "copies"  # image and kernel exchange their roles, and the image is the smaller one
    if too_large:
        return "broadcast"
    strided = any(axis.stride > 1 or axis.rhs_dilation > 1 for axis in axes)
    return "broadcast" if m % tuning.vector == 0 or m >= 32 or (m == 4 and strided) else "copies"


def _several_filters(
    convolution: Convolution,
    axes: tuple[Axis, ...],
    gradient: bool,
    q: int,
    m: int,
    tuning: Tuning,
) -> Plan | None:
    """Returns the plan of what several filters a channel are better served by than taps, or None.

    Args:
      convolution: what JAX is to lower.
      axes: its geometry.
      gradient: whether it is a kernel gradient.
      q: what is summed up.
      m: filters for each channel.
      tuning: the constants.
    """
    taps = math.prod(axis.out if gradient else axis.kernel for axis in axes)
    cut = _in_patches(convolution, axes)
    many = f"{max(m, q)} filters of {taps} taps for each channel"
    patches = Plan(Patches(axes, cut), f"no two windows overlap, and {many}", cut) if cut else None
    if cut == "kernel gradient" and m > 1:
        longest = max(axis.out if gradient else axis.kernel for axis in axes)
        if longest == 1 or longest >= tuning.gradient_patch_sizes:
            return patches
    if gradient or m == q == 1:
        return None
    if cut == "input gradient" and q * taps >= tuning.patch_products:
        return patches
    if q > 1:
        if overlap := _overlap(convolution, axes, q, m, tuning):
            return Plan(overlap, f"windows overlap, and {many}", "input gradient")
        return None
    result = math.prod(convolution.out.shape)
    asked = convolution.tag == "taps" or convolution.wrong_in_xla
    if cut == "forward" and taps >= tuning.patch_taps and (asked or result < tuning.patch_results):
        return patches
    dilated = any(axis.lhs_dilation > 1 for axis in axes)  # which XLA is slow at
    if asked or dilated or len(axes) > 2 or result * taps < tuning.xla_work:
        return None
    odd = m % tuning.vector > 0
    few_taps = len(axes) == 2 and taps <= tuning.xla_few_taps and m >= tuning.xla_filters
    apart = any(axis.rhs_dilation > 1 for axis in axes)
    many_taps = not apart and taps >= tuning.xla_taps and m * taps >= tuning.xla_products
    if many_taps or (odd and (few_taps or (not apart and m * taps >= tuning.xla_odd_products))):
        return Plan(None, many)
    return None


def _overlap(
    convolution: Convolution, axes: tuple[Axis, ...], q: int, m: int, tuning: Tuning
) -> Overlap | None:
    """Returns how an input gradient is products of its filters, or None if it is not.

    Args:
      convolution: what JAX is to lower.
      axes: its geometry.
      q: filters for each channel.
      m: further filters, which only `vmap` makes.
      tuning: the constants.
    """
    if not convolution.on_cpu or convolution.partitioned or convolution.sharded or m > 1:
        return None
    if any(axis.stride > 1 for axis in axes):
        return None
    sizes = math.prod(axis.size for axis in axes)
    padded = math.prod(-(-(axis.out + (axis.kernel - 1) * axis.rhs_dilation) // axis.lhs_dilation)
                       for axis in axes)  # fmt: skip
    if q < tuning.overlap_filters and padded <= tuning.overlap_padded * sizes:
        return None
    first, *others = (axis.kernel for axis in axes)
    most = max(q // math.prod(others), 1)
    rows = max(n for n in range(1, first + 1) if first % n == 0 and n <= most)
    return Overlap(axes, rows, tuning.parallel_loops)


def _unsuitable(convolution: Convolution) -> str | None:
    """Returns why a convolution is left to XLA whatever its geometry is, or None."""
    operands = convolution.operands
    # What `accelerate` tagged is not ours to change on other platforms, right or wrong.
    wrong = convolution.wrong_in_xla and convolution.tag in ("ours", "xla")
    if convolution.tag == "xla" and not wrong:
        return "tagged to be left to XLA"
    if not convolution.on_cpu and convolution.tag != "taps" and not wrong:
        return "not for CPU, and not asked for there"
    if len(convolution.lhs.spec) < 3:
        return "no spatial dimensions"
    if any(size == SYMBOLIC for operand in operands for size in operand.shape):
        return "a size is symbolic"
    if any(size == 0 for operand in operands for size in operand.shape):
        return "a size is 0"
    dtypes = [operand.dtype for operand in operands]
    if dtypes[0] != dtypes[1] or not set(dtypes) <= DTYPES:
        return "its dtypes are {} and {} to {}".format(*dtypes)
    if any(operand.sharded[d] for operand in operands for d in operand.spec[2:]):
        return "explicitly sharded over space, which JAX does not slice"
    return None


def _axes(convolution: Convolution) -> tuple[Axis, ...]:
    """Returns the geometry of each spatial dimension."""
    lhs, rhs, out = convolution.operands
    return tuple(
        Axis(
            size=lhs.shape[lhs.spec[d + 2]],
            kernel=rhs.shape[rhs.spec[d + 2]],
            out=out.shape[out.spec[d + 2]],
            stride=convolution.strides[d],
            low=convolution.padding[d][0],
            lhs_dilation=convolution.lhs_dilation[d],
            rhs_dilation=convolution.rhs_dilation[d],
        )
        for d in range(len(convolution.strides))
    )


def _in_patches(convolution: Convolution, axes: Sequence[Axis]) -> Kind | None:
    """Returns as which of the products of `patches` a convolution is computed, or None.

    None, too, on other platforms, and if a type says how it is sharded: JAX then asks how the
    result of a product is to be. A forward convolution with a single output counts as a kernel
    gradient, unless its strides exceed its kernel: the product is the same.

    Args:
      convolution: what JAX is to lower.
      axes: its geometry.
    """
    if not convolution.on_cpu or convolution.sharded:
        return None
    if any(axis.lhs_dilation > 1 for axis in axes):
        reach = [((axis.kernel - 1) * axis.rhs_dilation, axis.lhs_dilation) for axis in axes]
        alone = all(last < gap for last, gap in reach)
        return "input gradient" if alone and all(axis.stride == 1 for axis in axes) else None
    if all((axis.kernel - 1) * axis.rhs_dilation < axis.stride for axis in axes):
        return "forward"
    if all((axis.out - 1) * axis.stride < axis.rhs_dilation for axis in axes):
        return "kernel gradient"
    return None


def _in_planes(
    convolution: Convolution,
    axes: Sequence[Axis],
    gradient: bool,
    sizes: tuple[int, int, int, int],
    tuning: Tuning,
) -> Plan | None:
    """Returns the plan for a convolution whose channels come before space, read plane by plane.

    None, if they do not, or if it is not one for planes. Then, as on other platforms and where XLA
    may share out the channels among devices, the channels are put last.

    Args:
      convolution: what JAX is to lower.
      axes: its geometry.
      gradient: whether it is a kernel gradient.
      sizes: n, q, m and the groups.
      tuning: the constants.
    """
    lhs, rhs, out = (operand.spec for operand in convolution.operands)
    n, q, m, groups = sizes
    first, swapped = tuple(range(len(lhs))), (1, 0, *range(2, len(lhs)))
    if not convolution.on_cpu or convolution.partitioned or convolution.sharded:
        return None
    if gradient and (lhs, rhs, n, m) == (swapped, swapped, 1, 1):
        found = planes_plan.choose_gradient(axes, q, groups, tuning)
        return found and Plan(*found, "kernel gradient")
    forward = not gradient and convolution.batch_groups == 1 and min(q, m) == 1
    if forward and (lhs, out) == (first, first):
        found = planes_plan.choose(axes, groups, q, tuning)
        dilated = q > 1 or any(axis.lhs_dilation > 1 for axis in axes)
        return found and Plan(*found, "input gradient" if dilated else "forward")
    return None


def _no_product(convolution: Convolution, axes: Sequence[Axis]) -> str | None:
    """Returns why a convolution is not compiled as a matrix product, or None if it is."""
    if convolution.tag != "separable":
        return "products were not asked for"
    if not is_product(axes):
        return "a window of several positions slides"
    if convolution.sharded:
        return "explicitly sharded, and JAX asks how the result is to be"
    return None


def is_product(axes: Sequence[Axis]) -> bool:
    """Whether a convolution is a matrix product: no window of several positions slides anywhere.

    So are pointwise convolutions, whose kernel has one position, and their input gradients; their
    kernel gradients, whose result has one; and derivatives of these, whose image has one.
    """
    return all(
        axis.lhs_dilation == 1 or axis.stride == 1
        if axis.kernel == 1
        else axis.lhs_dilation == axis.out == 1
        for _, axis in map(Axis.sliding, axes)
    )
