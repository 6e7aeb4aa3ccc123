"""Convolutions whose windows do not overlap, with many filters for each channel: patch embeddings.

Cut into patches, the image is one matrix for each channel, and its products with the filters are
the convolution and its gradients. A sum over taps would need a copy of the image for each filter.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv._lowering import plan, windows


def multiply(x: jax.Array, kernel: jax.Array, patches: plan.Patches, precision: Any) -> jax.Array:
    """Returns a convolution whose windows do not overlap.

    Args:
      x: `(n, q, *sizes, c)`.
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
    # Along each dimension: how many patches, how far apart, and which of their positions are read.
    # For the kernel gradient, the cotangent, as the kernel, has a position for each patch.
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
    """Computes the input gradient: a patch from each position of `x`, and zeros between patches.

    A tap `a` adds `x[o]` to the output `o * lhs_dilation - a * rhs_dilation + low`, so a patch has
    the taps in reverse.
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
