"""The plan: which convolution it is, and which algorithm serves it, on integers alone.

With the groups `c` split off the axis that holds them, every convolution is

    out[n, m, o, c] = sum_q sum_a lhs[n, q, o + a, c] * rhs[m, q, a, c]

where `o` and `a` are positions of every spatial dimension, and `o + a` is what `Axis` says.

Forward: q = 1 if it is depthwise, and m is the multiplier. Input gradient: m = 1, and q is the
multiplier. Kernel gradient: n = 1, and q is the batch; it is the one with `batch_group_count`, as
JAX's transpose rule makes it. What autodiff derives from these again has no other form. `vmap` over
one operand can make the 1 larger.

`plan` makes every choice, with `forward_plan` and `kernel_gradient_plan`; `forward`,
`kernel_gradient`, `patches` and `product` emit what was chosen. Nothing is traced here.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from flax_dwconv._lowering import forward_plan, kernel_gradient_plan
from flax_dwconv._lowering.axis import Axis
from flax_dwconv._lowering.forward_plan import Taps
from flax_dwconv._lowering.kernel_gradient_plan import KernelGradient
from flax_dwconv._lowering.tuning import Tuning

# What a convolution is tagged with:
# "ours": made by `depthwise_conv`, compiled here on CPU.
# "depthwise": traced inside `accelerate`, compiled here on CPU if it is depthwise.
# "separable": traced inside `accelerate(pointwise=True)`; if it is pointwise, too.
# "taps": made by `depthwise_conv`, compiled here on every platform.
# "xla": made by `depthwise_conv` and left to XLA, but see `Convolution.on_grid`. Without a tag,
# derivatives traced inside `accelerate` would get its.
Tag = Literal["ours", "depthwise", "separable", "taps", "xla"]
Kind = Literal["forward", "input gradient", "kernel gradient", "product"]

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
      on_grid: whether it is partitioned over a mesh of two axes or more. If the batch is sharded
        over some of them and nothing over the others, XLA's partitioner makes the kernel gradient
        of a grouped convolution too large, as many times as the others have devices: it adds up the
        parts of all devices, also of those that hold the same images (seen in jax 0.10.2, 0.11.2
        and 0.12.0.1, for CPU, CUDA and TPU; `findings/grouped-kernel-gradient-on-a-mesh.sh`).
        Whether it will be so is not known before the program is partitioned. So there, the kernel
        gradients of `depthwise_conv` are sums over taps on every platform and for every method. For
        TPU, they read and write about 4 times the bytes: 662 MB where XLA's has 154, for 16 images
        of 56x56x144 in float32 on 2x2 devices, as its compiler counts. One XLA convolution with a
        gradient for each image has 238 MB, but gathers the images if channels are sharded too.
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
    on_grid: bool = False

    @property
    def operands(self) -> tuple[Operand, Operand, Operand]:
        """Both operands and the result."""
        return self.lhs, self.rhs, self.out

    @property
    def wrong_in_xla(self) -> bool:
        """Whether XLA may get it wrong, see `on_grid`."""
        return self.on_grid and self.batch_groups > 1

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
class Plan:
    """What becomes of a convolution.

    Attributes:
      algorithm: what computes it, or None if it is left to XLA.
      why: the reason for the algorithm, or for leaving it to XLA, in words.
      kind: which convolution it is. An input gradient that has neither a stride nor a multiplier is
        a forward convolution. None, if it is left to XLA.
      groups: the number of groups, the channels of a depthwise convolution.
      copies: how many copies of the image and of each channel there are, one for each filter of the
        channel; 1 if the filters are computed one after the other.
      accumulator: the name of the dtype that sums are computed in.
    """

    algorithm: Taps | KernelGradient | Patches | Product | None
    why: str
    kind: Kind | None = None
    groups: int = 1
    copies: int = 1
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
    gradient = kernel_gradient_plan.suits(axes) and (convolution.batch_groups > 1 or groups == 1)
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

    few_channels = not gradient or groups <= tuning.copied_channels
    copies = m if features == 1 and few_channels else 1
    image, kernel, result = (math.prod(operand.shape) for operand in convolution.operands)
    other = kernel if gradient else result  # in a kernel gradient, the kernel is the cotangent
    too_large = copies * image > max(tuning.copies_memory * (image + other), tuning.copies_elements)
    if cut := _in_patches(convolution, axes):
        if cut == "kernel gradient":
            taps, filters = math.prod(axis.out for axis in axes), m
        else:
            taps, filters = math.prod(axis.kernel for axis in axes), max(m, q)
        wanted = convolution.tag == "taps" or convolution.wrong_in_xla
        many = result >= tuning.patch_results
        if cut == "forward" and filters > 1 and many and not wanted:
            return Plan(None, f"no two windows overlap, and {result} results")
        if filters > 1 and (filters * taps >= tuning.patch_products or too_large):
            why = f"no two windows overlap, and {filters} filters of {taps} taps for each channel"
            return Plan(Patches(axes, cut), why, cut, groups, accumulator=accumulator)
    if too_large and not gradient and convolution.tag != "taps":
        return Plan(None, f"{copies} copies of {image} elements for {result} results")
    copies = 1 if too_large else copies
    channels = groups * copies
    if gradient:
        algorithm, why = kernel_gradient_plan.choose(q, axes, channels, tuning)
        return Plan(algorithm, why, "kernel gradient", groups, copies, accumulator)
    dilated = any(axis.lhs_dilation > 1 for axis in axes)
    if q > 1:
        # One more dimension, that has one window: `q` times as many taps in one pass. As `q`
        # convolutions that are summed up afterwards, an input gradient takes 1.3 to 24 times as
        # long.
        summed = Axis(q, kernel=q, out=1, stride=1, low=0, lhs_dilation=1, rhs_dilation=1)
        axes = (summed, *axes)
    algorithm, why = forward_plan.choose(n, m // copies, axes, channels, tuning)
    kind: Kind = "input gradient" if dilated or q > 1 else "forward"
    return Plan(algorithm, why, kind, groups, copies, accumulator)


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
