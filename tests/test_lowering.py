"""The CPU lowering: the values of XLA's convolution under every transformation, and in use.

Operands are small integers in floating point, so that every order of summation gives the same bits.
"""

import dataclasses
import functools
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import flax_dwconv
from flax_dwconv import activations, depthwise_conv2d
from flax_dwconv._lowering import forward, forward_plan, sums, tuning
from flax_dwconv._lowering.axis import Axis

# kernel size, strides, padding, dilation rate, multiplier, channels_first, image size
CASES = {
    "3x3": ((3, 3), 1, "same", 1, 1, False, (9, 8)),
    "3x3 stride 2": ((3, 3), 2, "same", 1, 1, False, (9, 8)),
    "3x3 strides and multiplier": ((3, 3), (2, 3), "valid", 1, 2, False, (9, 8)),
    "patches": ((2, 3), (3, 4), ((1, 0), (0, 2)), 1, 16, False, (9, 8)),
    "patches dilated channels_first": ((2, 2), (3, 4), "same", (2, 3), 16, True, (9, 8)),
    "a few odd filters": ((3, 3), 1, "same", 1, 3, False, (9, 8)),
    "filters in vectors": ((3, 3), 1, ((1, 0), (-1, 2)), (1, 2), 8, False, (9, 8)),
    "filters padded to vectors": ((4, 3), (2, 3), "same", 1, 11, True, (9, 8)),
    "many filters and taps": ((9, 11), 2, "same", 1, 9, False, (12, 13)),
    "filters in pieces of the kernel": (
        (5, 4),
        (1, 2),
        ((2, 3), (0, 1)),
        (2, 1),
        8,
        False,
        (13, 8),
    ),
    "filters and nothing but pads": ((5, 2), 4, ((2, 3), (2, 2)), 1, 17, False, (12, 1)),
    "filters and one tap": ((1, 1), 2, "same", 1, 12, False, (9, 8)),
    "11x2": ((11, 2), 1, "same", 1, 1, False, (13, 6)),
    "2x5 dilated channels_first": ((2, 5), 1, "same", (2, 3), 2, True, (7, 13)),
    "stride and dilation": ((3, 3), 2, ((2, 1), (0, 3)), 2, 1, False, (9, 8)),
    "negative pads": ((3, 3), 1, ((-1, 1), (2, -1)), 1, 1, False, (9, 8)),
    "pads beyond the kernel": ((2, 2), 1, ((4, 3), (5, 4)), 1, 1, False, (3, 4)),
    "1x1": ((1, 1), 1, "valid", 1, 1, False, (4, 5)),
    "1x1 stride 3": ((1, 1), 3, "valid", 1, 1, False, (7, 8)),
    "4x4 stride 3 multiplier 3": ((4, 4), 3, "same", 1, 3, True, (9, 8)),
    "3x3 on long rows": ((3, 3), 1, "same", 1, 1, False, (4, 38)),
    "3x5 stride 2 on long rows": ((3, 5), 2, "same", 1, 1, False, (4, 75)),
    "3x3 with most taps outside": ((3, 3), 1, "same", (1, 40), 1, False, (3, 121)),
    "7x7 on short rows": ((7, 7), 1, "same", 1, 1, False, (7, 7)),
    "7x7 in tiles": ((7, 7), 1, "same", 1, 1, False, (9, 12)),
    "7x7 stride 2 in tiles": ((7, 7), 2, "same", 1, 1, False, (15, 17)),
    "9x11 in a loop": ((9, 11), 1, "same", 1, 1, False, (12, 13)),
    "kernel as large as the image": ((6, 5), 1, "valid", 1, 1, False, (6, 5)),
}
GRADIENT_CASES = ["3x3 stride 2", "2x5 dilated channels_first", "7x7 in tiles"]


def operands(name, batch=2, channels=3, dtype=jnp.float32, seed=0):
    (kh, kw), _, _, _, m, first, (h, w) = CASES[name]
    rng = np.random.default_rng(seed)
    shape = (batch, channels, h, w) if first else (batch, h, w, channels)
    return integers(rng, shape, dtype), integers(rng, (kh, kw, channels, m), dtype)


def integers(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.integers(-3, 4, shape), dtype)


def convolution(name, method):
    _, strides, padding, dilation_rate, _, first, _ = CASES[name]
    return functools.partial(
        depthwise_conv2d,
        strides=strides,
        padding=padding,
        dilation_rate=dilation_rate,
        data_format="channels_first" if first else "channels_last",
        method=method,
    )


def check(make, name, *args):
    """`make(f)` gives the same bits for both methods, and without a convolution for "auto"."""
    fast = jax.jit(make(convolution(name, "auto")))
    slow = jax.jit(make(convolution(name, "lax")))
    assert "conv_general_dilated" in str(jax.make_jaxpr(fast)(*args))
    compiled = fast.lower(*args).compile()
    assert " convolution(" not in compiled.as_text()
    assert " convolution(" in slow.lower(*args).compile().as_text()
    jax.tree.map(np.testing.assert_array_equal, compiled(*args), slow(*args))


def vjp(f):
    return lambda x, kernel, g: jax.vjp(f, x, kernel)[1](g)


def cotangent(name, *args):
    shape = jax.eval_shape(convolution(name, "lax"), *args)
    return integers(np.random.default_rng(7), shape.shape, shape.dtype)


@pytest.fixture(params=["little", "much"])
def effort(request):
    """Compiled as where there is little to compute, which is so in all cases, and as for much."""
    if request.param == "much":
        request.getfixturevalue("much_effort")


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, effort):
    x, kernel = operands(name)
    check(lambda f: lambda x, k, g: (f(x, k), vjp(f)(x, k, g)), name, x, kernel,
          cotangent(name, x, kernel))  # fmt: skip


def jvp(f):
    return lambda x, k, g: jax.jvp(f, (x, k), (k.sum() * x, -k))


def hessian_vector_product(f):
    def directional(x, k, g):
        return jax.jvp(lambda x, k: vjp(f)(x, k, g), (x, k), (x + 1, k - 1))

    return directional


def reverse_over_reverse(f):
    return lambda x, k, g: jax.vjp(vjp(f), x, k, g)[1]((x + 2, k + 2))


def transpose(f):
    return lambda x, k, g: jax.linear_transpose(lambda x: f(x, k), x)(g)


def checkpoint(f):
    return lambda x, k, g: vjp(jax.checkpoint(f))(x, k, g)


def scan(f):
    def run(x, k, g):
        return lax.scan(lambda k, g: (k - 1, vjp(f)(x, k, g)), k, jnp.stack([g, -g]))

    return run


def cond(f):
    return lambda x, k, g: lax.cond(k.sum() > 0, vjp(f), lambda x, k, g: vjp(f)(-x, k, g), x, k, g)


def fori(f):
    def run(x, k, g):
        return lax.fori_loop(0, 2, lambda i, xk: vjp(f)(x, xk[1] % 5, g), (x, k))

    return run


def scan_once(f):
    return lambda x, k: lax.scan(lambda c, k: (c, f(x, k)), 0, k[None])[1][0]


@pytest.mark.parametrize("name", GRADIENT_CASES)
@pytest.mark.parametrize(
    "make",
    [jvp, hessian_vector_product, reverse_over_reverse, transpose, checkpoint, scan, cond, fori],
)
def test_transformations(make, name):
    x, kernel = operands(name)
    check(make, name, x, kernel, cotangent(name, x, kernel))


@pytest.mark.parametrize("name", GRADIENT_CASES)
@pytest.mark.parametrize("axes", [(0, None, 0), (None, 0, 0), (0, 0, None), (None, None, 0)])
def test_vmap_of_gradients(axes, name):
    x, kernel = operands(name)
    g = cotangent(name, x, kernel)
    args = [
        a if axis is None else jnp.stack([a, a - 1, 2 * a])
        for a, axis in zip((x, kernel, g), axes, strict=True)
    ]
    check(lambda f: jax.vmap(vjp(f), axes), name, *args)


@pytest.mark.parametrize("name", ["3x3", "3x3 strides and multiplier"])
def test_nested_vmap_and_unbatched(name):
    x, kernel = operands(name)
    xs, kernels = jnp.stack([x, x + 1]), jnp.stack([kernel, -kernel, kernel + 1])
    check(lambda f: jax.vmap(jax.vmap(f, (None, 0)), (0, None)), name, xs, kernels)
    check(lambda f: f, name, x[0], kernel)


def test_hessian():
    x, kernel = operands("3x3 stride 2", batch=1, channels=2)
    check(
        lambda f: jax.hessian(lambda x, k: (f(x, k) ** 2).sum(), (0, 1)), "3x3 stride 2", x, kernel
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["3x3", "7x7 in tiles"])
def test_dtypes(name, dtype, x64):
    x, kernel = operands(name, dtype=dtype)
    g = cotangent(name, x, kernel)
    check(lambda f: lambda x, k, g: (f(x, k), *vjp(f)(x, k, g)), name, x, kernel, g)


@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "7x7 in tiles", "9x11 in a loop"])
def test_half_precision_accumulates_in_float32(name):
    """One rounding at the end: the error is half a unit of the last place of the result."""
    rng = np.random.default_rng(0)
    (kh, kw), *_, (h, w) = CASES[name]
    x = jnp.asarray(rng.normal(size=(2, h, w, 3)), jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(kh, kw, 3, 1)), jnp.bfloat16)
    y = convolution(name, "auto")(x, kernel)
    exact = convolution(name, "lax")(x.astype(jnp.float32), kernel.astype(jnp.float32))
    np.testing.assert_array_less(
        np.abs(y.astype(np.float32) - exact), 2.0**-8 * np.abs(exact) + 1e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_normal_numbers(name, effort):
    rng = np.random.default_rng(1)
    x, kernel = (jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in operands(name))
    g = cotangent(name, x, kernel)
    fast, slow = (jax.jit(vjp(convolution(name, m)))(x, kernel, g) for m in ("auto", "lax"))
    for a, b in zip(fast, slow, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def plain(x, kernel, rank=2, **kwargs):
    """A depthwise convolution of any rank, as a model writes it that knows nothing of us."""
    spec = ("NDHWC"[-rank - 1 :], "DHWIO"[-rank - 2 :])
    spec = ("N" + spec[0].lstrip("N"), spec[1], "N" + spec[0].lstrip("N"))
    return lax.conv_general_dilated(
        x, kernel, (1,) * rank, "SAME", dimension_numbers=spec, feature_group_count=x.shape[-1],
        **kwargs,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_accelerate_any_rank(rank):
    rng = np.random.default_rng(0)
    x = integers(rng, (2, *(6, 5, 4)[:rank], 3))
    kernel = integers(rng, (3,) * rank + (1, 6))
    f = functools.partial(plain, rank=rank)
    fast = flax_dwconv.accelerate(jax.jit(f))
    assert " convolution(" not in fast.lower(x, kernel).compile().as_text()
    np.testing.assert_array_equal(fast(x, kernel), f(x, kernel))
    g = integers(rng, (2, *(6, 5, 4)[:rank], 6))
    accelerated = jax.jit(flax_dwconv.accelerate(vjp(f)))
    assert " convolution(" not in accelerated.lower(x, kernel, g).compile().as_text()
    jax.tree.map(np.testing.assert_array_equal, accelerated(x, kernel, g), vjp(f)(x, kernel, g))


@pytest.mark.parametrize("spec", [("NHWC", "OIHW", "NCHW"), ("HWNC", "HWOI", "CNHW")])
def test_any_dimension_numbers(spec):
    rng = np.random.default_rng(0)
    sizes = {"N": 2, "H": 6, "W": 5, "C": 4, "O": 8, "I": 1}
    x = integers(rng, [sizes[d] for d in spec[0]])
    kernel = integers(rng, [sizes[d] if d in "OI" else 3 for d in spec[1]])

    def f(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 2), "SAME", dimension_numbers=spec, feature_group_count=4
        )

    fast = jax.jit(flax_dwconv.accelerate(f))
    assert " convolution(" not in fast.lower(x, kernel).compile().as_text()
    np.testing.assert_array_equal(fast(x, kernel), f(x, kernel))
    g = f(x, kernel)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(flax_dwconv.accelerate(vjp(f)))(x, kernel, g),
        vjp(f)(x, kernel, g),
    )


# dimension numbers, strides, padding, groups
POINTWISE = {
    "NHWC": (("NHWC", "HWIO", "NHWC"), (1, 1), "VALID", 1),
    "NCHW": (("NCHW", "OIHW", "NCHW"), (1, 1), "SAME", 1),
    "strides": (("NHWC", "HWIO", "NHWC"), (2, 3), "VALID", 1),
    "strides and pads": (("NCHW", "OIHW", "NCHW"), (2, 3), ((0, 1), (2, 3)), 1),
    "negative pads": (("NHWC", "OIHW", "NCHW"), (1, 2), ((-1, 0), (0, -2)), 1),
    "unusual dimension numbers": (("HWNC", "HWOI", "CNHW"), (2, 1), ((1, 1), (0, -1)), 1),
    "groups": (("NHWC", "HWIO", "NHWC"), (1, 1), "VALID", 2),
    "groups and strides": (("NCHW", "OIHW", "NCHW"), (2, 2), "SAME", 2),
}


@pytest.fixture
def pointwise(request):
    """A 1x1 convolution as a model writes it, and its operands."""
    spec, strides, padding, groups = POINTWISE[request.param]
    rng = np.random.default_rng(0)
    sizes = {"N": 2, "H": 5, "W": 7, "C": 12, "O": 10, "I": 12 // groups}
    x = integers(rng, [sizes[d] for d in spec[0]])
    kernel = integers(rng, [sizes[d] if d in "OI" else 1 for d in spec[1]])

    def f(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=spec, feature_group_count=groups
        )

    return f, x, kernel, f(x, kernel) % 5


def check_pointwise(f, *args):
    """Inside `accelerate(pointwise=True)`: no convolution, the same jaxpr, the same bits."""
    fast = jax.jit(flax_dwconv.accelerate(f, pointwise=True))
    assert str(jax.make_jaxpr(fast)(*args)) == str(jax.make_jaxpr(jax.jit(f))(*args))
    lowered = fast.lower(*args)
    assert "stablehlo.convolution" not in lowered.as_text()
    jax.tree.map(np.testing.assert_array_equal, lowered.compile()(*args), jax.jit(f)(*args))


@pytest.mark.parametrize("pointwise", POINTWISE, indirect=True)
@pytest.mark.parametrize(
    "make",
    [jvp, vjp, hessian_vector_product, reverse_over_reverse, transpose, checkpoint, scan, cond,
     fori],
)  # fmt: skip
def test_pointwise_transformations(make, pointwise):
    f, *args = pointwise
    check_pointwise(f, *args[:2])
    check_pointwise(make(f), *args)


@pytest.mark.parametrize("pointwise", POINTWISE, indirect=True)
@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, 0), (None, 0, 0)])
def test_pointwise_vmap_of_gradients(axes, pointwise):
    f, *args = pointwise
    args = [
        a if axis is None else jnp.stack([a, 1 - a]) for a, axis in zip(args, axes, strict=True)
    ]
    check_pointwise(jax.vmap(vjp(f), axes), *args)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("pointwise", ["NHWC"], indirect=True)
def test_pointwise_dtypes(dtype, pointwise, x64):
    f, *args = pointwise
    check_pointwise(vjp(f), *(a.astype(dtype) for a in args))


def test_pointwise_has_to_be_asked_for():
    x, kernel = jnp.ones((1, 6, 6, 3)), jnp.ones((1, 1, 3, 8))
    f = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="VALID",
                          dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip

    def is_product():
        return "stablehlo.convolution" not in text(lambda x, k: f(x, k), x, kernel)

    @flax_dwconv.accelerate(pointwise=True)
    def decorated():
        return is_product(), uses_taps(lambda x, k: plain(x, k))

    assert decorated() == (True, True)
    assert not is_product()
    with flax_dwconv.accelerate():
        assert not is_product()
        with flax_dwconv.accelerate(pointwise=True):
            assert is_product()
        assert not is_product()
    with pytest.raises(TypeError, match="`pointwise` must be a bool, got 1"):
        flax_dwconv.accelerate(pointwise=1)


def text(f, *args):
    """The StableHLO of `f`, without what names our call sites."""
    return jax.jit(f).lower(*args).as_text()


def test_untagged_and_not_depthwise_run_as_before():
    rng = np.random.default_rng(0)
    x, kernel = integers(rng, (1, 6, 6, 4)), integers(rng, (3, 3, 4, 8))
    dense = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME",
                              dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
    for scope in flax_dwconv.accelerate(), flax_dwconv.accelerate(pointwise=True):
        with scope:
            assert "stablehlo.convolution" in text(lambda x, k: dense(x, k), x, kernel)
    assert "flax_dwconv" not in text(lambda x, k: dense(x, k), x, kernel)
    assert "stablehlo.convolution" in text(lambda x, k: plain(x, k), x, kernel.reshape(3, 3, 1, -1))


@pytest.mark.parametrize("features", [(2, 2), (2, 6), (4, 4), (4, 32)])
def test_grouped_convolutions_run_as_before(features):
    """Forward, gradients and `vmap`: several features of the input meet several of the output."""
    q, m = features
    rng = np.random.default_rng(0)
    x, kernel = integers(rng, (2, 6, 6, 2 * q)), integers(rng, (3, 3, q, 2 * m))

    def f(x, kernel):
        spec = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=2
        )

    def step(x, kernel, g):
        return f(x, kernel), vjp(f)(x, kernel, g)

    args = x, kernel, f(x, kernel)
    for axes in (None,) * 3, (0, None, None), (None, 0, None), (0, 0, 0):
        mapped = [a if axis is None else jnp.stack([a, 1 - a])
                  for a, axis in zip(args, axes, strict=True)]  # fmt: skip
        make = jax.vmap(step, axes) if any(axis == 0 for axis in axes) else step
        assert text(flax_dwconv.accelerate(make), *mapped).count("stablehlo.convolution") == 3


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None)])
def test_vmap_of_a_large_multiplier(axes):
    """Which makes grouped convolutions with many features on both sides."""
    rng = np.random.default_rng(0)
    args = [integers(rng, shape) for shape in ((1, 6, 5, 2), (3, 3, 2, 6), (1, 6, 5, 12))]
    args = [a if axis is None else jnp.stack([a - i for i in range(5)])
            for a, axis in zip(args, axes, strict=True)]  # fmt: skip
    check(lambda f: jax.vmap(vjp(f), axes), "3x3", *args)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((0, 6, 6, 3), "float32"), ((1, 6, 6, 3), "int32"), ((1, 6, 6, 1), "float32")],
)
def test_what_is_left_to_xla(shape, dtype):
    x, kernel = jnp.ones(shape, dtype), jnp.ones((3, 3, shape[-1], 1), dtype)
    lowered = jax.jit(depthwise_conv2d).lower(x, kernel)
    assert "stablehlo.convolution" in lowered.as_text()
    y = lowered.compile()(x, kernel)
    np.testing.assert_array_equal(y, np.full((shape[0], 4, 4, shape[-1]), 9, dtype))


def test_complex_numbers_are_three_real_convolutions():
    """As JAX's own rule for CPU computes them."""
    parts = [operands("3x3 stride 2", seed=seed) for seed in (0, 1)]
    args = [lax.complex(a, b) for a, b in zip(*parts, strict=True)]
    check(lambda f: lambda x, k: (f(x, k), *vjp(f)(x, k, f(x, k))), "3x3 stride 2", *args)


@pytest.mark.parametrize("name", ["3x3 stride 2", "9x11 in a loop"])
def test_float64_is_lowered_where_it_is_off(name):
    """As it was traced, inside `enable_x64`: a part of a function, and a function that was."""
    x, kernel = map(np.asarray, operands(name))

    def step(method, x, kernel):
        with jax.enable_x64(True):
            x, kernel = x.astype("float64") + (2.0**30 + 1), kernel.astype("float64")
            y, vjp = jax.vjp(convolution(name, method), x, kernel)
            return [(a % 64).astype("float32") for a in (y, *vjp(y % 64))]

    fast, slow = (jax.jit(functools.partial(step, method)) for method in ("auto", "lax"))
    with jax.enable_x64(False):
        assert "stablehlo.convolution" not in fast.lower(x, kernel).as_text()
        jax.tree.map(np.testing.assert_array_equal, fast(x, kernel), slow(x, kernel))
        with jax.enable_x64(True):
            x, kernel = (jnp.asarray(a, "float64") for a in (x, kernel))
            traced = jax.jit(convolution(name, "auto")).trace(x, kernel)
        assert traced.lower().compile().out_info.dtype == "float64"


def test_a_long_signal_is_lowered_in_time():
    """Ten seconds of audio. What is done in Python grows with the length, not with its square."""
    x, kernel = jnp.ones((1, 160_000, 2)), jnp.ones((5, 1, 2))
    fast = flax_dwconv.accelerate(jax.jit(vjp(functools.partial(plain, rank=1))))
    start = time.perf_counter()
    assert "stablehlo.convolution" not in fast.lower(x, kernel, x).as_text()
    assert time.perf_counter() - start < 20  # 1 s; 6 minutes with a search of a list


def computations(f, *args):
    """The text of each computation of the executable: what XLA runs as one loop."""
    return jax.jit(f).lower(*args).compile().as_text().split("\n}\n")


def test_operands_are_computed_once():
    """Not once for every tap that reads them, as XLA does while they are few."""
    rng = np.random.default_rng(0)
    x, kernel = integers(rng, (2, 9, 8, 3)), integers(rng, (2, 2, 3, 1))
    g = depthwise_conv2d(x, kernel)
    for make in (
        lambda x, k, g: depthwise_conv2d(jnp.floor(x), k),
        lambda x, k, g: jax.vjp(depthwise_conv2d, x, k)[1](jnp.floor(g)),
    ):
        loops = [loop for loop in computations(make, x, kernel, g) if " floor(" in loop]
        assert loops and not any(" slice(" in loop for loop in loops)


@pytest.mark.parametrize("channels", [2, 3 * tuning.TUNING.copied_channels])
def test_a_multiplier_with_few_and_many_channels(channels):
    """Few are copied for kernel gradients too."""
    name = "3x3 strides and multiplier"
    x, kernel = operands(name, channels=channels)
    check(lambda f: lambda x, k, g: (f(x, k), vjp(f)(x, k, g)), name, x, kernel,
          cotangent(name, x, kernel))  # fmt: skip


def test_an_activation_is_part_of_the_loop():
    """One pass over memory, not two."""
    x, kernel = operands("3x3")
    f = convolution("3x3", "auto")
    (loop,) = (loop for loop in computations(lambda x, k: jnp.exp(f(x, k)), x, kernel)
               if " exponential(" in loop)  # fmt: skip
    assert " slice(" in loop


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_a_rectifier_is_part_of_the_loop_in_a_train_step_too(name):
    """Its gradient reads its result, which the layer keeps from being computed again.

    Without that, and with the derivative of `jax.nn`, which reads the argument, the convolution
    plus bias becomes an array.
    """
    x, kernel = operands("3x3")
    layer = flax_dwconv.DepthwiseConv2D(3, padding="same", use_bias=False, activation=name)

    def in_loop(activated):
        def step(x, k):
            y, vjp = jax.vjp(activated, x, k)
            return y, vjp(y)

        rectify = [loop for loop in computations(step, x, kernel)
                   if re.search(r"\[2,9,8,3\]\S* (maximum|clamp)\(", loop)]  # fmt: skip
        return len(rectify) == 1 and " slice(" in rectify[0]

    f = convolution("3x3", "auto")
    assert in_loop(lambda x, k: layer.apply({"params": {"kernel": k}}, x))
    for activation in (activations.get(name), getattr(jax.nn, name)):
        assert not in_loop(lambda x, k, activation=activation: activation(f(x, k)))


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_nothing_of_ours_is_in_a_layer_that_is_left_to_xla(name):
    """Nor in the jaxpr of any layer that is not differentiated."""
    x, kernel = operands("3x3")
    params = {"params": {"kernel": kernel, "bias": jnp.ones(kernel.shape[2])}}

    def train(method):
        layer = flax_dwconv.DepthwiseConv2D(3, padding="same", activation=name, method=method)
        step = jax.value_and_grad(lambda p, x: (layer.apply(p, x) ** 2).sum())
        return layer, step

    layer, step = train("lax")
    words = str(jax.make_jaxpr(step)(params, x))
    assert "platform_index" not in words and "reduce_precision" not in words
    assert "flax_dwconv" not in jax.jit(step).lower(params, x).as_text()
    layer, step = train("auto")
    assert "flax_dwconv" in jax.jit(step).lower(params, x).as_text()  # the control
    assert "platform_index" in str(jax.make_jaxpr(step)(params, x))  # the control
    words = str(jax.make_jaxpr(layer.apply)(params, x))
    assert "platform_index" not in words and "reduce_precision" not in words
    assert words.count("conv_general_dilated[") == 1


def test_results_that_are_read_again_are_computed_once():
    """A batch normalization reads them for its mean, its variance, and their gradients."""
    x, kernel = operands("3x3")
    f = convolution("3x3", "auto")

    def normalized(x, k):
        y = f(x, k)
        y = y - y.mean((0, 1, 2), keepdims=True)
        return y * lax.rsqrt((y**2).mean((0, 1, 2), keepdims=True) + 1)

    with_it, without = (
        sum(loop.count(" slice(") for loop in computations(jax.grad(loss, (0, 1)), x, kernel))
        for loss in (lambda x, k: (normalized(x, k) ** 3).sum(), lambda x, k: (f(x, k) ** 3).sum())
    )
    assert with_it == without


def uses_taps(f):
    x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 1, 2))
    return "stablehlo.convolution" not in jax.jit(f).lower(x, kernel).as_text()


def test_accelerate_scopes():
    scope = flax_dwconv.accelerate()
    with scope:
        with scope:  # the same object, again
            assert uses_taps(lambda x, k: plain(x, k))
        assert uses_taps(lambda x, k: plain(x, k))
        seen = []
        thread = threading.Thread(target=lambda: seen.append(uses_taps(lambda x, k: plain(x, k))))
        thread.start()
        thread.join()
        assert seen == [False]  # a scope is the thread's own
    assert not uses_taps(lambda x, k: plain(x, k))
    with pytest.raises(KeyError), scope:
        raise KeyError
    assert not uses_taps(lambda x, k: plain(x, k))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, scan_once])
def test_accelerate_leaves_the_lax_method_alone(wrap):
    """The derivatives too, which are traced inside `accelerate`."""
    x, kernel = operands("3x3")
    f = wrap(convolution("3x3", "lax"))

    def step(x, k):
        return jax.jvp(jax.grad(lambda x, k: (f(x, k) ** 2).sum(), (0, 1)), (x, k), (x, k))

    with_it, without = (text(g, x, kernel) for g in (flax_dwconv.accelerate(step), step))
    assert with_it.count("stablehlo.convolution") == without.count("stablehlo.convolution") > 0


def test_accelerate_decorates():
    @flax_dwconv.accelerate
    def f(x, k, again=True):
        """Doc."""
        y = plain(x, k)
        return f(y, k, False) if again else y

    assert f.__name__ == "f" and f.__doc__ == "Doc."
    assert uses_taps(f)
    assert not uses_taps(lambda x, k: plain(x, k))
    with pytest.raises(TypeError, match="`f` must be a function or None, got int"):
        flax_dwconv.accelerate(3)


def test_accelerate_refuses_what_runs_after_the_scope():
    async def coroutine():
        pass

    def generator():
        yield

    async def async_generator():
        yield

    for f in coroutine, generator, async_generator:
        later = type("Later", (), {"__call__": f})
        bound = type("Bound", (), {"call": f})().call

        @functools.wraps(f)
        def wrapped(f=f):
            return f()

        for g in (f, functools.partial(f), functools.partial(functools.partial(f)), later(),
                  functools.partial(later()), bound, wrapped):  # fmt: skip
            with pytest.raises(TypeError, match="`f` must not be a generator function or a corou"):
                flax_dwconv.accelerate(g)


def test_accelerate_refuses_a_module_that_is_not_bound():
    """It cannot be called: a linen module runs through `apply`."""
    x = jnp.ones((1, 6, 6, 2))
    model = flax_dwconv.DepthwiseConv2D(3)
    with pytest.raises(TypeError, match=re.escape("pass `model.apply`")):
        flax_dwconv.accelerate(model)
    variables = model.init(jax.random.key(0), x)
    for f in (model.bind(variables), functools.partial(model.apply, variables)):
        assert flax_dwconv.accelerate(f)(x).shape == (1, 4, 4, 2)


def test_calling_again_traces_once():
    traces = []

    @jax.jit
    def f(x, k):
        traces.append(None)
        return plain(x, k)

    x, kernel = jnp.ones((1, 6, 6, 2)), jnp.ones((3, 3, 1, 2))
    fast = flax_dwconv.accelerate(f)
    for _ in range(3):
        fast(x, kernel)
    assert len(traces) == 1
    for _ in range(3):
        f(x, kernel)
    fast(x, kernel)
    assert len(traces) == 2


def test_large_kernels_compile_a_loop():
    """A 31x31 kernel compiles as fast as a smaller one, and gives the same numbers.

    XLA of jax 0.12 makes some loops functions for one thread. It marks them, and not ours.
    """
    rng = np.random.default_rng(0)
    x, kernel = integers(rng, (1, 34, 33, 2)), integers(rng, (31, 31, 2, 1))
    f = functools.partial(depthwise_conv2d, padding="same")
    slow = functools.partial(f, method="lax")
    g = slow(x, kernel) % 5
    forward, backward = jax.jit(f), jax.jit(vjp(f))
    lowered = forward.lower(x, kernel)
    products = tuning.TUNING.loop_products
    assert lowered.as_text().count("stablehlo.multiply") < 4 * products < 31 * 31
    for executable in lowered.compile(), backward.lower(x, kernel, g).compile():
        text = executable.as_text()
        assert " while(" in text and "xla_cpu_small_call" not in text
    np.testing.assert_array_equal(forward(x, kernel), slow(x, kernel))
    jax.tree.map(
        np.testing.assert_array_equal,
        backward(x, kernel, g),
        jax.jit(vjp(slow))(x, kernel, g),
    )


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("wanted", ["forward", "gradients"])
def test_pieces_in_a_shard_map(wanted, rows, monkeypatch):
    """A loop begins with zeros of the type that its sums have: varying over the mesh."""
    constants = dataclasses.replace(
        tuning.TUNING,
        efforts=(tuning.Effort(0, region_taps=0, products=1),),
        batch_temporaries=0 if rows else 800,  # one image has 360 padded elements and 210 results
        loop_copies=0,
        gradient_temporaries=0,
        gradient_loop_temporaries=0,
    )
    monkeypatch.setattr(tuning, "TUNING", constants)
    rng = np.random.default_rng(0)
    x, kernel = integers(rng, (4, 6, 7, 5)), integers(rng, (1, 3, 3, 5, 1))
    mesh = Mesh(jax.devices()[:1], ("data",))

    def f(x, kernel, method="auto"):
        conv = functools.partial(depthwise_conv2d, padding="same", method=method)
        if wanted == "forward":
            return conv(x, kernel[0])
        return jax.grad(lambda kernel: (conv(x, kernel[0]) ** 2).sum())(kernel)

    out = P("data")
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=out))
    assert "stablehlo.while" in mapped.lower(x, kernel).as_text()
    np.testing.assert_array_equal(mapped(x, kernel), f(x, kernel, "lax"))


@pytest.mark.parametrize(
    ("padding", "temporaries", "copies", "sizes"),
    [
        ("same", 3000, 1700, (4, 7, 7, 5)),
        ("same", 0, 250, (1, 5, 7, 5)),
        ("valid", 0, 200, (1, 5, 7, 5)),
    ],
)
def test_pieces_of_a_batch_that_overlap(padding, temporaries, copies, sizes, monkeypatch):
    """The last 4 of 7 images begin where the loop was already. So do the last 3 of 7 or 5 rows."""
    constants = dataclasses.replace(
        tuning.TUNING,
        efforts=(tuning.Effort(0, region_taps=0, products=1),),
        batch_temporaries=temporaries,
        loop_copies=copies,
    )
    monkeypatch.setattr(tuning, "TUNING", constants)
    rng = np.random.default_rng(0)
    x, kernel = integers(rng, (7, 7, 7, 5)), integers(rng, (3, 3, 5, 1))

    def conv(x, kernel, method="auto"):
        return depthwise_conv2d(x, kernel, padding=padding, method=method)

    lowered = jax.jit(conv).lower(x, kernel)
    assert f"sizes = [{', '.join(map(str, sizes))}]" in lowered.as_text()
    assert "xla_cpu_small_call" not in lowered.compile().as_text()  # on one thread, all of it
    np.testing.assert_array_equal(jax.jit(conv)(x, kernel), conv(x, kernel, "lax"))

    def gradients(method):
        f = functools.partial(conv, method=method)
        return jax.jit(jax.grad(lambda *args: (f(*args) ** 2).sum(), (0, 1)))(x, kernel)

    jax.tree.map(np.testing.assert_array_equal, gradients("auto"), gradients("lax"))


def test_weights_are_parts_of_a_flat_array():
    x, kernel = jnp.zeros((8, 5, 5, 8)), jnp.zeros((3, 3, 8, 1))
    text = jax.jit(depthwise_conv2d).lower(x, kernel).as_text()
    assert text.count("(tensor<72xf32>) -> tensor<8xf32>") == 9


def test_gradients_of_taps_are_one_flat_array():
    x, kernel = jnp.zeros((8, 5, 5, 8)), jnp.zeros((3, 3, 8, 1))
    gradient = jax.grad(lambda kernel, x: depthwise_conv2d(x, kernel).sum())
    text = jax.jit(gradient).lower(kernel, x).as_text()
    of_taps = ", ".join(["tensor<8xf32>"] * 9)
    assert f"({of_taps}) -> tensor<72xf32>" in text


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize(("size", "k", "strides"), [(14, 3, 1), (56, 3, 2), (28, 5, 1), (15, 7, 2)])
def test_no_operation_does_nothing(images, size, k, strides):
    """XLA would remove such operations; here they would be traced, lowered and compiled first.

    With the channels last and one kernel for each.
    """
    x, kernel = jnp.zeros((images, size, size, 16)), jnp.zeros((k, k, 16, 1))

    def conv(x, kernel):
        return depthwise_conv2d(x, kernel, strides=strides, padding="same")

    def gradients(x, kernel):
        y, pull = jax.vjp(conv, x, kernel)
        return pull(y)

    names = r"stablehlo\.(slice|reshape|broadcast_in_dim|pad|transpose) .*flax_dwconv"
    types = r".* : \(tensor<(.+?)>.*\) -> tensor<(.+?)>"
    changed = re.findall(names + types, jax.jit(gradients).lower(x, kernel).as_text())
    assert len(changed) > 50
    assert not [(name, before) for name, before, after in changed if before == after]


@pytest.mark.parametrize(("size", "strides", "pads"), [(16, 1, 0), (64, 1, 1), (16, 2, 1)])
def test_what_computes_an_image_pads_it(size, strides, pads):
    """One loop writes the padded image, of 2^19 elements or for several phases."""

    def input_gradient(g, kernel):
        x = jax.ShapeDtypeStruct((2, size, size, 64), jnp.float32)
        conv = functools.partial(depthwise_conv2d, strides=strides, padding="same")
        return jax.linear_transpose(lambda x: conv(x, kernel), x)(lax.floor(g))[0]

    g, kernel = jnp.zeros((2, size // strides, size // strides, 64)), jnp.zeros((7, 7, 64, 1))
    text = jax.jit(input_gradient).lower(g, kernel).compile().as_text()
    (computing,) = [body for body in text.split("\n\n") if " floor(" in body]
    assert computing.count(" pad(") == pads


def test_crowded_pixels_are_copied_apart():
    x, kernel = jnp.zeros((1, 9, 9, 512)), jnp.zeros((7, 7, 512, 1))
    text = jax.jit(functools.partial(depthwise_conv2d, padding="same")).lower(x, kernel).as_text()
    assert "high = [0, 3, 3, 16]" in text and "tensor<1x15x15x528xf32>" in text


@pytest.mark.parametrize("kernels", [1, 2])
def test_some_rows_by_several_kernels(kernels):
    """The results of each kernel are put where they belong."""
    limits = dict(batch_temporaries=0, loop_copies=0)
    tiles = (tuning.Effort(0, region_taps=0, products=1),)
    constants = dataclasses.replace(tuning.TUNING, efforts=tiles, **limits)
    axes = [Axis(7, 3, 7, 1, 1, 1, 1)] * 2
    taps, _ = forward_plan.choose(2, kernels, axes, 5, constants, whole=True)
    assert taps.piece.rows < 7
    rng = np.random.default_rng(0)
    x, kernel = integers(rng, (2, 7, 7, 5)), integers(rng, (kernels, 3, 3, 5))
    y = jax.jit(lambda x, kernel: forward.convolve(x, kernel, taps))(x, kernel)
    for m in range(kernels):
        expected = depthwise_conv2d(x, kernel[m, ..., None], padding="same", method="lax")
        np.testing.assert_array_equal(y[:, m], expected)


@pytest.mark.parametrize(("sums_each", "total"), [(0, 0), (1, 1), (2, 2)])
def test_terms_are_added_to_sums_in_turns(sums_each, total):
    """In float32, 2^30 + 1 is 2^30: a 1 is lost where it is added to that.

    Rows of their own lose both, one sum of all terms the first, and with two sums they are in the
    other one.
    """
    values = {(0, 0): 2.0**30, (0, 1): 1.0, (1, 0): -(2.0**30), (1, 1): 1.0}
    terms = {tap: jnp.full((1,), value) for tap, value in values.items()}
    found = sums.together([terms] * 4, sums_each, (1,), jnp.float32)
    assert [y.item() for y in found] == [total] * 4
