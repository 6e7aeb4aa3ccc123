"""The function that replaces a convolution: what all algorithms have in common."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv._lowering import (
    forward,
    kernel_gradient,
    overlap,
    patches,
    planes,
    product,
    tuning,
    windows,
    workarounds,
)
from flax_dwconv._lowering import plan as plans

Program = Callable[[jax.Array, jax.Array], jax.Array]


def program(convolution: plans.Convolution, precision: Any) -> Program | None:
    """Returns the jitted function (lhs, rhs) -> out that replaces a convolution.

    Args:
      convolution: what JAX is to lower.
      precision: its parameter.

    Returns:
      The function, or None if the convolution is left to XLA.
    """
    constants = tuning.TUNING if convolution.on_cpu else tuning.ELSEWHERE
    return cached(convolution, precision, constants)


@functools.lru_cache(maxsize=1024)
def cached(
    convolution: plans.Convolution, precision: Any, constants: tuning.Tuning
) -> Program | None:
    """`program` with these tuning constants.

    The cache makes equal convolutions of a network one function, which JAX traces and lowers once.
    """
    plan = plans.plan(convolution, constants)
    if plan.algorithm is None:
        return None
    if isinstance(plan.algorithm, plans.Planes | plans.PlanesGradient):
        return _in_planes(convolution, plan)
    if isinstance(plan.algorithm, plans.Product) and plan.groups == 1:
        return _pointwise(convolution, plan, plan.algorithm, precision)
    lhs_spec, rhs_spec, out_spec = (operand.spec for operand in convolution.operands)
    grouped = 0 if convolution.batch_groups > 1 else 1  # the batch or the features of `lhs`

    def compute(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = _groups_last(x.astype(plan.accumulator), lhs_spec, grouped, plan.groups)
        kernel = _groups_last(kernel.astype(plan.accumulator), rhs_spec, 0, plan.groups)
        if plan.filters == "copies":
            x = jnp.repeat(x, kernel.shape[0], -1)
            kernel = jnp.moveaxis(kernel, 0, -1).reshape(*kernel.shape[1:-1], -1)[None]
        elif plan.filters == "broadcast":
            kernel = windows.pad(kernel, 0, 0, plan.padded)
            kernel = jnp.moveaxis(kernel, 0, -1)[None]  # (1, q, *kernels, c, m)
        y = _algorithm(x, kernel, plan.algorithm, precision, convolution.on_cpu)
        if plan.filters == "broadcast":
            if plan.padded:
                (y,) = workarounds.materialized(y)
                y = windows.pad(y, y.ndim - 1, 0, -plan.padded)
            y = y.reshape(*y.shape[:-2], -1)
        order = [(0,), (y.ndim - 1, 1), *[(i,) for i in range(2, y.ndim - 1)]]
        at = sorted(range(len(order)), key=out_spec.__getitem__)
        y = _transposed(y, [d for i in at for d in order[i]])
        y = y.reshape(convolution.out.shape)
        # A kernel gradient ends in a concatenation, a loop or additions of a few rows, which cost
        # little if XLA computes them for each reader.
        if convolution.on_cpu and isinstance(plan.algorithm, plans.Taps):
            y = workarounds.computed_once(y)
        return y.astype(convolution.out.dtype)

    return jax.jit(compute)


def _pointwise(
    convolution: plans.Convolution, plan: plans.Plan, algorithm: plans.Product, precision: Any
) -> Program:
    """Returns the program of a matrix product, whose operands and result stay in their order."""
    names = []
    for operand, pair in zip(convolution.operands, ("nq", "mq", "nm"), strict=True):
        of_spec = [*pair, *range(len(operand.spec) - 2)]
        names.append([of_spec[operand.spec.index(d)] for d in range(len(of_spec))])

    def compute(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x, kernel = x.astype(plan.accumulator), kernel.astype(plan.accumulator)
        y = product.multiply(x, kernel, algorithm, precision, names)
        return y.astype(convolution.out.dtype)

    return jax.jit(compute)


def _in_planes(convolution: plans.Convolution, plan: plans.Plan) -> Program:
    """Returns the program of a convolution whose channels come before space."""
    algorithm: Any = plan.algorithm
    rhs_spec = convolution.rhs.spec
    out_spec, shape = convolution.out.spec, convolution.out.shape

    def compute(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x, kernel = x.astype(plan.accumulator), kernel.astype(plan.accumulator)
        if isinstance(algorithm, plans.PlanesGradient):
            x, kernel = workarounds.materialized(x, kernel)
            y = planes.kernel_gradient(x, kernel, algorithm)
            y = jnp.expand_dims(y, 0)  # (1, *kernel, c)
            order = [0, y.ndim - 1, *range(1, y.ndim - 1)]
            y = _transposed(y, [order[out_spec.index(d)] for d in range(y.ndim)])
        else:
            kernel = _groups_last(kernel, rhs_spec, 0, plan.groups)
            x, kernel = workarounds.materialized(x, kernel)
            y = planes.convolve(x, kernel, algorithm)
        return workarounds.computed_once(y.reshape(shape)).astype(convolution.out.dtype)

    return jax.jit(compute)


def _algorithm(
    x: jax.Array, kernel: jax.Array, algorithm: Any, precision: Any, on_cpu: bool
) -> jax.Array:
    """Returns `(n, m, *outs, c)` of `(n, q, *sizes, c)` and `(m, q, *kernels, c)`."""
    match algorithm:
        case plans.Product():
            spatial = range(len(algorithm.axes))
            names = [[*pair, *spatial, "c"] for pair in ("nq", "mq", "nm")]
            return product.multiply(x, kernel, algorithm, precision, names)
        case plans.Patches():
            return patches.multiply(x, kernel, algorithm, precision)
        case plans.Overlap():
            return overlap.multiply(x, kernel, algorithm, precision)
        case plans.KernelGradient():
            gradient = functools.partial(kernel_gradient.kernel_gradient, gradient=algorithm)
            if on_cpu:
                x, kernel = workarounds.materialized(x, kernel)
            return _of_all_pairs(gradient, x, kernel)
        case plans.Taps():
            # A `q` of more than 1 is one more dimension, which has one window.
            several = x.shape[1] > 1
            if not several:
                x, kernel = lax.squeeze(x, [1]), lax.squeeze(kernel, [1])
            if algorithm.whole:
                x = forward.cropped(x, algorithm)
            if on_cpu:
                x, kernel = workarounds.materialized(x, kernel)
            if not algorithm.whole:  # devices that share the image would gather the padded one
                x = forward.cropped(x, algorithm)
            y = forward.convolve(x, kernel, algorithm)
            return lax.squeeze(y, [2]) if several else y
        case _:
            raise AssertionError(algorithm)


def _of_all_pairs(f: Program, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns `f` of each element of `x` with each one of `kernel`, `(n, m, ...)`.

    A kernel gradient ends in sums, which XLA:CPU hands to YNNPACK. Sums of rank 7 and more crashed
    or hung there up to jax 0.11.0. A volume's have rank 5, so that only one more dimension may be
    mapped over. To reshape them first would not help: XLA undoes that.
    """

    def with_all(a: jax.Array) -> jax.Array:
        if kernel.shape[0] == 1:
            return lax.expand_dims(f(a, lax.squeeze(kernel, [0])), [0])
        return jax.vmap(f, (None, 0))(a, kernel)

    if x.shape[0] == 1:
        return lax.expand_dims(with_all(lax.squeeze(x, [0])), [0])
    if kernel.shape[0] > 1 and x.ndim > 5:
        return lax.map(with_all, x)
    return jax.vmap(with_all)(x)


def _groups_last(x: jax.Array, spec: Sequence[int], grouped: int, groups: int) -> jax.Array:
    """Transposes to the order of `spec`, and the groups, major in `spec[grouped]`, to the end."""
    axis = spec[grouped]
    # In a step of its own: jax 0.10.2 refuses to drop dimensions in the same reshape, on a mesh.
    x = x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
    return _transposed(x, [*[d + (d >= axis) for d in spec], axis])


def _transposed(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """Returns `x` with its dimensions in that order.

    Dimensions of size 1 are not transposed, but put in their places by a reshape: XLA gives them
    any place in the layout, and then copies the array. Often nothing else is left to transpose.
    """
    shape = x.shape
    places = [d for d in order if shape[d] > 1]
    if places != sorted(places):
        x = x.reshape([size for size in shape if size > 1])
        x = lax.transpose(x, [sorted(places).index(d) for d in places])
    return x.reshape([shape[d] for d in order])
