"""Convolutions that are matrix products: pointwise ones, and what autodiff derives from them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv._lowering import plan, windows
from flax_dwconv._lowering.axis import Axis


def multiply(
    x: jax.Array,
    kernel: jax.Array,
    product: plan.Product,
    precision: Any,
    names: Sequence[Sequence[Any]],
) -> jax.Array:
    """Returns a convolution that is a matrix product for each `c`, summed over `q`.

    Nothing is transposed but by `lax.dot_general` and once after it: XLA:CPU would compute what
    lies between two transpositions as copies of the arrays.

    Args:
      x: with the dimensions n, q, the spatial ones, and perhaps c.
      kernel: with the dimensions m, q, the spatial ones, and perhaps c; of the dtype of `x`.
      product: the plan.
      precision: that of `lax.dot_general`.
      names: the order of the dimensions of `x`, of `kernel` and of the result: "n", "m", "q", "c",
        and a number for each spatial one.

    Returns:
      An array with the dimensions n, m, the spatial ones, and perhaps c.
    """
    operands, reverse = [x, kernel], []
    # The same names, but None where there is one position.
    a, b, of_y = (list(each) for each in names)
    pads = [(0, 0, 0) for _ in of_y]
    for d, (i, axis) in enumerate(map(Axis.sliding, product.axes)):
        sliding, still = ((a, b), (b, a))[i]
        at, place = sliding.index(d), of_y.index(d)
        if i:
            reverse.append(place)
        if axis.lhs_dilation > 1:  # the input gradient of a strided one: zeros between the results
            gaps = axis.lhs_dilation
            pads[place] = axis.low, axis.out - axis.low - (axis.size - 1) * gaps - 1, gaps - 1
        else:
            y = windows.pad(operands[i], at, axis.low, axis.reach - axis.low - axis.size)
            step = axis.stride if axis.kernel == 1 else axis.rhs_dilation
            operands[i] = lax.slice_in_dim(y, 0, None, step, at)
        if axis.kernel == 1:
            still[still.index(d)] = None
        else:
            of_y[place] = None
    single = [[i for i, name in enumerate(each) if name is None] for each in (a, b, of_y)]
    x, kernel = (lax.squeeze(y, dims) for y, dims in zip(operands, single, strict=False))
    a, b, of_y = ([name for name in each if name is not None] for each in (a, b, of_y))
    if product.kernel_first:
        x, kernel, a, b = kernel, x, b, a
    batch = [name for name in a if name == "c"]
    summed = [name for name in a if name in b and name not in batch]
    contracting = [a.index(name) for name in summed], [b.index(name) for name in summed]
    batching = [a.index(name) for name in batch], [b.index(name) for name in batch]
    y = lax.dot_general(x, kernel, (contracting, batching), precision=precision)
    order = [*batch, *[name for name in a + b if name not in (*summed, *batch)]]
    y = lax.transpose(y, [order.index(name) for name in of_y])
    y = lax.expand_dims(y, single[2])
    return lax.rev(lax.pad(y, jnp.zeros((), y.dtype), pads), reverse)
