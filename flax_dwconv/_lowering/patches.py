"""Convolutions whose windows do not overlap, with several filters a channel: patch embeddings.

The image is cut into patches, which are one matrix for each channel. The convolution is the product
of this matrix and the filters, and the kernel gradient its product with the cotangent. The input
gradient is the product of cotangent and filters, put back patch by patch. A sum over taps would
need a copy of the image for each filter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv._lowering import plan, windows


def multiply(x: jax.Array, kernel: jax.Array, patches: plan.Patches, precision: Any) -> jax.Array:
    """Returns a convolution whose windows do not overlap.

    Args:
      x: `(n, q, *sizes, c)`: examples, what is summed up, and channels, as in `plan`.
      kernel: `(m, q, *kernels, c)`, of the dtype of `x`.
      patches: the plan.
      precision: that of `lax.dot_general`.

    Returns:
      `(n, m, *outs, c)`.
    """
    if patches.kind == "input gradient":
        return _put_back(x, kernel, patches, precision)
    axes = patches.axes
    gradient = patches.kind == "kernel gradient"
    # Along each dimension: the number of patches, the distance from one to the next, how many
    # positions of a patch are read, and the step between these. For the kernel gradient, the
    # argument `kernel` is the cotangent, with one position for each patch.
    cuts = [
        (axis.kernel, axis.rhs_dilation, axis.out, axis.stride)
        if gradient
        else (axis.out, axis.stride, axis.kernel, axis.rhs_dilation)
        for axis in axes
    ]
    n, q, *_, c = x.shape
    first, reach = [-axis.low for axis in axes], [count * apart for count, apart, *_ in cuts]
    x = windows.crop(x.reshape(n * q, *x.shape[2:]), first, reach)
    x = x.reshape(n, q, *[size for count, apart, *_ in cuts for size in (count, apart)], c)
    for d, (_, _, reads, step) in enumerate(cuts):
        x = lax.slice_in_dim(x, 0, (reads - 1) * step + 1, step, 3 + 2 * d)
    counted, inside = range(2, x.ndim - 1, 2), range(3, x.ndim - 1, 2)
    summed = [1, *(counted if gradient else inside)], range(1, kernel.ndim - 1)
    y = lax.dot_general(x, kernel, (summed, ([x.ndim - 1], [kernel.ndim - 1])), precision)
    return lax.transpose(y, [1, y.ndim - 1, *range(2, y.ndim - 1), 0])  # from (c, n, *outs, m)


def _put_back(x: jax.Array, kernel: jax.Array, patches: plan.Patches, precision: Any) -> jax.Array:
    """Computes the input gradient: each position of `x`, the cotangent, makes a patch of it.

    Zeros fill the gaps between the taps of a patch and between patches. The tap `a` adds `x[i]` to
    the output `i * lhs_dilation - a * rhs_dilation + low`, so that a patch has the taps in reverse.
    """
    axes = patches.axes
    last = [x.ndim - 1], [kernel.ndim - 1]
    y = lax.dot_general(x, kernel, (([1], [1]), last), precision)  # (c, n, *sizes, m, *kernels)
    taps = range(len(axes) + 3, y.ndim)
    y = lax.rev(y, taps)
    gaps = [
        (0, axis.lhs_dilation - (axis.kernel - 1) * axis.rhs_dilation - 1, axis.rhs_dilation - 1)
        for axis in axes
    ]
    y = lax.pad(y, jnp.zeros((), y.dtype), [(0, 0, 0)] * (len(axes) + 3) + gaps)
    n, m = x.shape[0], kernel.shape[0]
    pairs = [d for tap in taps for d in (tap - len(axes) - 1, tap)]
    y = lax.transpose(y, [1, len(axes) + 2, *pairs, 0])
    y = y.reshape(n * m, *[axis.size * axis.lhs_dilation for axis in axes], x.shape[-1])
    first = [(axis.kernel - 1) * axis.rhs_dilation - axis.low for axis in axes]
    y = windows.crop(y, first, [axis.out for axis in axes])
    return y.reshape(n, m, *y.shape[1:])
