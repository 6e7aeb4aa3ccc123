"""Images whose channels come before their space: read plane by plane, on CPU, as they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_plan import forward, input_gradient, kernel_gradient, operand

from flax_dwconv import accelerate, depthwise_conv
from flax_dwconv._lowering import plan, tuning
from flax_dwconv._lowering.planes_plan import Planes, PlanesGradient

# Shape with the channels last, window, multiplier, strides, padding, dilation.
CASES = {
    "3x3": ((8, 7, 9, 6), (3, 3), 1, 1, "same", 1),
    "3x3, some images left over": ((11, 6, 6, 5), (3, 3), 1, 1, "same", 1),
    "3x3, one image in pieces": ((1, 12, 8, 4), (3, 3), 1, 1, "same", 1),
    "two channels": ((3, 5, 6, 2), (3, 3), 1, 1, "same", 1),
    "valid": ((4, 9, 8, 5), (3, 2), 1, 1, "valid", 1),
    "one dimension valid": ((4, 9, 8, 5), (3, 1), 1, 1, "valid", 1),
    "more pads than needed": ((2, 6, 5, 4), (3, 3), 1, 1, 2, 1),
    "stride 2": ((4, 8, 40, 4), (3, 3), 1, 2, "same", 1),
    "stride 2, narrow": ((4, 9, 11, 4), (5, 3), 1, 2, "same", 1),
    "stride 3": ((2, 13, 9, 4), (3, 3), 1, 3, "same", 1),
    "dilated": ((2, 9, 8, 5), (3, 3), 1, 1, "same", 2),
    "multiplier": ((2, 6, 7, 5), (3, 3), 2, 1, "same", 1),
    "sequence": ((8, 33, 6), (4,), 1, 1, "causal", 1),
    "volume": ((3, 4, 5, 6, 4), (3, 3, 2), 1, 1, "same", 1),
}


@pytest.fixture(params=CASES)
def case(request):
    """The convolution in both layouts, as functions of what has its channels last; operands."""
    shape, window, m, strides, padding, rate = CASES[request.param]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(-9, 10, shape), "float32")
    kernel = jnp.asarray(rng.integers(-3, 4, (*window, shape[-1], m)), "float32")
    conv = functools.partial(depthwise_conv, strides=strides, padding=padding, dilation_rate=rate)

    def first(x, kernel):
        y = conv(jnp.moveaxis(x, -1, 1), kernel, data_format="channels_first")
        return jnp.moveaxis(y, 1, -1)

    g = jnp.asarray(rng.integers(-2, 3, jax.eval_shape(conv, x, kernel).shape), "float32")
    return first, conv, x, kernel, g


def gradients(f):
    def run(x, kernel, g):
        y, vjp = jax.vjp(f, x, kernel)
        return y, *vjp(g)

    return run


def check(f, g, *args):
    """The same bits, compiled."""
    jax.tree.map(np.testing.assert_array_equal, jax.jit(f)(*args), jax.jit(g)(*args))


def test_results_and_gradients(case):
    first, last, *args = case
    check(gradients(first), gradients(last), *args)


@pytest.mark.parametrize("axes", [(0, None, 0), (None, 0, 0), (0, 0, 0)])
def test_vmap(axes):
    x, kernel = jnp.arange(960.0).reshape(3, 2, 8, 4, 5) % 7, jnp.arange(135.0) % 5
    kernel = kernel.reshape(3, 3, 3, 5, 1)
    g = jnp.arange(960.0).reshape(3, 2, 8, 4, 5) % 3
    args = [a if axis == 0 else a[0] for a, axis in zip((x, kernel, g), axes, strict=True)]

    def conv(x, kernel, method):
        y = depthwise_conv(
            jnp.moveaxis(x, -1, 1),
            kernel,
            padding="same",
            data_format="channels_first",
            method=method,
        )
        return jnp.moveaxis(y, 1, -1)

    ours, theirs = (
        jax.vmap(gradients(functools.partial(conv, method=method)), axes)
        for method in ("auto", "lax")
    )
    check(ours, theirs, *args)


def test_jvp_of_gradients(case):
    first, last, x, kernel, g = case
    tangents = x + 1, kernel - 1, g
    ours, theirs = (
        lambda *args, f=f: jax.jvp(gradients(f), args[:3], args[3:]) for f in (first, last)
    )
    check(ours, theirs, x, kernel, g, *tangents)


def test_accelerate():
    x, kernel = jnp.arange(480.0).reshape(2, 5, 6, 8) % 7, jnp.arange(45.0).reshape(5, 1, 3, 3) % 5

    def conv(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", feature_group_count=5)

    fast = jax.jit(accelerate(conv))
    assert "stablehlo.convolution" not in fast.lower(x, kernel).as_text()
    np.testing.assert_array_equal(fast(x, kernel), conv(x, kernel))


def test_a_nan_stays_in_its_plane_and_reaches_what_reads_it():
    x = jnp.ones((8, 4, 6, 5)).at[1, 2, 0, 4].set(jnp.nan).at[0, 0, 5, 0].set(jnp.inf)
    conv = functools.partial(depthwise_conv, padding="same", data_format="channels_first")
    f, g = (gradients(functools.partial(conv, method=method)) for method in ("auto", "lax"))
    check(f, g, x, jnp.ones((3, 3, 4, 1)), jnp.ones(x.shape))


# What is chosen


def first(convolution):
    """The same convolution with the channels first."""

    def moved(of):
        if of.spec[-1] == len(of.spec) - 1 or of.spec in ((3, 2, 0, 1), (2, 3, 0, 1)):
            return of  # a kernel
        shape = [of.shape[d] for d in of.spec]
        if of.spec[0] == 3:  # batch and features exchanged, in a kernel gradient
            return operand([shape[1], shape[0], *shape[2:]], (1, 0, 2, 3))
        return operand(shape, (0, 1, 2, 3))

    lhs, rhs, out = map(moved, convolution.operands)
    return dataclasses.replace(convolution, lhs=lhs, rhs=rhs, out=out)


def algorithm(convolution):
    return type(plan.plan(convolution, tuning.TUNING).algorithm)


@pytest.mark.parametrize("stride", [1, 2])
def test_channels_that_come_first_are_planes(stride):
    assert algorithm(first(forward(8, stride=stride))) is Planes
    assert algorithm(first(input_gradient(8, stride=stride))) is Planes
    assert algorithm(first(kernel_gradient(8, stride=stride))) is PlanesGradient


@pytest.mark.parametrize("make", [forward, input_gradient, kernel_gradient])
def test_what_are_no_planes(make):
    planes = Planes, PlanesGradient
    assert algorithm(make(8)) not in planes  # the channels come last
    assert algorithm(first(make(8, partitioned=1))) not in planes
    assert algorithm(first(make(8, size=3))) not in planes
    assert algorithm(first(make(8, k=9))) not in planes
    many = first(kernel_gradient(8, k=5))
    assert algorithm(many) not in planes


def test_the_first_convolution_of_mobilenet_is_no_product():
    """Of its 15 that are not depthwise, 14 are pointwise; this one has 3x3 windows that slide."""
    stem = dataclasses.replace(
        forward(1, size=224, c=3, k=3, stride=2, tag="separable"),
        rhs=operand((3, 3, 3, 32), (3, 2, 0, 1)),
        out=operand((1, 112, 112, 32), (0, 3, 1, 2)),
        feature_groups=1,
    )
    found = plan.plan(stem, tuning.TUNING)
    assert found.algorithm is None
    assert found.why.endswith("a window of several positions slides")
