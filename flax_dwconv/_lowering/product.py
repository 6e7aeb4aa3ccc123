"""Convolutions that are matrix products: pointwise ones, and what autodiff derives from them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv._lowering import plan, windows
from flax_dwconv._lowering.axis import Axis


def multiply(x: jax.Array, kernel: jax.Array, product: plan.Product, precision: Any) -> jax.Array:
    """Returns a convolution that is a matrix product for each `c`, summed over `q`.

    Args:
      x: `(n, q, *sizes, c)`.
      kernel: `(m, q, *kernels, c)`, of the dtype of `x`.
      product: the plan.
      precision: that of `lax.dot_general`.

    Returns:
      `(n, m, *outs, c)`.
    """
    operands, pads, reverse = [x, kernel], [(0, 0, 0)] * x.ndim, []
    # The axes of `x`, `kernel` and the result by name, None where there is one position.
    names: list[list[Any]] = [["n", "q"], ["m", "q"], ["n", "m"]]
    for d, (i, axis) in enumerate(map(Axis.sliding, product.axes), 2):
        if i:
            reverse.append(d)
        names[i].append(d)
        names[1 - i].append(d if axis.kernel > 1 else None)
        names[2].append(d if axis.kernel == 1 else None)
        if axis.lhs_dilation > 1:  # the input gradient of a strided one: zeros between the results
            gaps = axis.lhs_dilation
            pads[d] = axis.low, axis.out - axis.low - (axis.size - 1) * gaps - 1, gaps - 1
        else:
            y = windows.pad(operands[i], d, axis.low, axis.reach - axis.low - axis.size)
            step = axis.stride if axis.kernel == 1 else axis.rhs_dilation
            operands[i] = lax.slice_in_dim(y, 0, None, step, d)
    single = [[d for d, name in enumerate(each) if name is None] for each in names]
    x, kernel = (lax.squeeze(y, dims) for y, dims in zip(operands, single, strict=False))
    a, b, of_y = ([name for name in [*each, "c"] if name is not None] for each in names)
    if product.kernel_first:
        x, kernel, a, b = kernel, x, b, a
    summed = [name for name in a if name in b and name != "c"]
    contracting = [a.index(name) for name in summed], [b.index(name) for name in summed]
    batch = [a.index("c")], [b.index("c")]
    y = lax.dot_general(x, kernel, (contracting, batch), precision=precision)
    order = ["c", *[name for name in a + b if name not in (*summed, "c")]]
    y = lax.transpose(y, [order.index(name) for name in of_y])
    y = lax.expand_dims(y, single[2])
    return lax.rev(lax.pad(y, jnp.zeros((), y.dtype), pads), reverse)
