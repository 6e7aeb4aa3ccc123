"""The CPU lowering compiled as users compile it: what LLVM and YNNPACK make of it, at real sizes.

The rest of the suite compiles without LLVM's optimizations (see conftest.py). The lowering counts
on them: on loops that LLVM drops, and on divisions by 1 and conditions that it alone can see
through. XLA hands large reductions to YNNPACK. So every algorithm computes here at the default
level of optimization, on an image that is large enough to be given that algorithm, and through the
public functions alone. The definition comes from numpy, in float64.

Operands are integers such that every sum is exact in float32, in any order: the results must be
equal to the last bit. float32 images need 9 bits, so that a product in bfloat16 shows. bfloat16
images are positive, so that their sums need far more than the 8 bits of bfloat16.

The default selection runs each algorithm once, `-m slow` the layers of networks at their sizes.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax
from test_functional import Case

from flax_dwconv import accelerate, depthwise_conv2d

# The default level, for one function; the flag that conftest.py sets is for the process.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})

SAME = dict(padding="same")
# More than 32,768 positions, from which on some versions of XLA and YNNPACK give wrong sums.
MANY = (11, 56, 56)
# Each for a way in which the forward pass, an input gradient or a kernel gradient is computed.
CASES = {
    "3x3": Case((*MANY, 8), (3, 3, 8, 1), **SAME),  # padded taps; all taps in one pass
    "3x3 small": Case((2, 14, 14, 16), (3, 3, 16, 1), **SAME),  # a pass for each row
    "3x3 valid": Case((2, 30, 30, 24), (3, 3, 24, 1)),  # one region
    "3x3 stride 2": Case((11, 112, 112, 2), (3, 3, 2, 1), 2, "same"),  # phases
    "3x3 stride 3 dilated": Case((2, 31, 33, 8), (3, 3, 8, 1), 3, ((2, 1), (0, 3)), 2),
    "3x3, gradients in blocks, not padded": Case((4, 40, 40, 48), (3, 3, 48, 1), **SAME),
    "4x4 in regions": Case((1, 28, 28, 168), (4, 4, 168, 1), **SAME),
    "5x5 in regions": Case((11, 56, 56, 16), (5, 5, 16, 1), **SAME),  # rows unrolled
    "5x5 stride 2": Case((2, 28, 28, 24), (5, 5, 24, 1), 2, "same"),
    "5x5 small": Case((2, 14, 14, 16), (5, 5, 16, 1), **SAME),  # padded; a loop over the rows
    "7x7 in rows": Case((64, 7, 7, 48), (7, 7, 48, 1), **SAME),
    "7x7 in tiles of two": Case((8, 14, 14, 84), (7, 7, 84, 1), **SAME),
    "7x7 in tiles of seven": Case((16, 14, 14, 168), (7, 7, 168, 1), **SAME),
    "9x9 in a loop": Case((2, 24, 24, 16), (9, 9, 16, 1), **SAME),
    "17x17 stride 2": Case((1, 40, 40, 8), (17, 17, 8, 1), 2, "same"),  # a loop for each phase
    "multiplier 2": Case((2, 28, 28, 8), (3, 3, 8, 2), **SAME),
    "multiplier 2 of many channels": Case((2, 28, 28, 48), (3, 3, 48, 2), **SAME),
    "multiplier 6": Case((11, 56, 56, 2), (3, 3, 2, 6), 1, "same"),
    "most taps outside": Case((2, 3, 121, 16), (3, 3, 16, 1), 1, "same", (1, 40)),
    "channels first": Case((2, 24, 28, 28), (3, 3, 24, 1), 1, "same", 1, "channels_first"),
}
# At the sizes of networks, and with the long compilation that goes with some of them.
LAYERS = {
    "MobileNetV2 1": Case((8, 112, 112, 32), (3, 3, 32, 1), **SAME),
    "MobileNetV2 2": Case((8, 112, 112, 96), (3, 3, 96, 1), 2, "same"),
    "MobileNetV2 3": Case((8, 56, 56, 144), (3, 3, 144, 1), **SAME),
    "MobileNetV2 17": Case((32, 7, 7, 960), (3, 3, 960, 1), **SAME),
    "EfficientNet 5x5": Case((8, 14, 14, 672), (5, 5, 672, 1), **SAME),
    "EfficientNet 5x5 stride 2": Case((8, 56, 56, 144), (5, 5, 144, 1), 2, "same"),
    "ConvNeXt": Case((4, 56, 56, 96), (7, 7, 96, 1), **SAME),
    "ConvNeXt 4": Case((32, 7, 7, 768), (7, 7, 768, 1), **SAME),
    "ConvNeXt, 3 of 12 images at a time": Case((12, 56, 56, 96), (7, 7, 96, 1), **SAME),
    "3x3, gradients of 2 of 16 images at a time": Case((16, 56, 56, 100), (3, 3, 100, 1), **SAME),
    "RepLKNet": Case((1, 56, 56, 32), (31, 31, 32, 1), **SAME),
    "Xception entry": Case((2, 147, 147, 64), (3, 3, 64, 2), **SAME),
    "dilated": Case((2, 65, 65, 64), (3, 3, 64, 1), 1, "same", 12),
}


def operands(case, dtype):
    """Input, kernel and cotangent."""
    rng = np.random.default_rng(0)
    x = rng.integers(-300, 301, case.x) if dtype == "float32" else rng.integers(0, 256, case.x)
    kernel = rng.integers(-3, 4, case.kernel)
    g = rng.integers(-1, 2, oracle.output_shape(case.x, case.kernel, **case.options))
    return [array.astype("float32") for array in (x, kernel, g)]


def check(found, expected, dtype):
    """All results are the exact ones, rounded once to their dtype."""
    for y, exact in zip(found, expected, strict=True):
        assert y.dtype == dtype
        assert np.abs(exact).max(initial=0) <= 2**24, "not exact in float32"
        np.testing.assert_array_equal(
            np.asarray(y, np.float32), np.asarray(jnp.asarray(exact, dtype), np.float32)
        )


def check_case(case, dtype):
    """The result and both gradients."""
    arrays = operands(case, dtype)
    f = functools.partial(depthwise_conv2d, **case.options)

    def run(x, kernel, g):
        y, vjp = jax.vjp(f, x, kernel)
        return y, *vjp(g)

    args = [jnp.asarray(a, dtype) for a in arrays]
    lowered = compiled(run).lower(*args)
    assert "stablehlo.convolution" not in lowered.as_text()
    expected = oracle.forward(*arrays[:2], **case.options), *oracle.vjp(*arrays, **case.options)
    check(lowered.compile()(*args), expected, dtype)


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm(name):
    check_case(CASES[name], "float32")


# Those that another case resembles in bfloat16, which is converted before all that follows.
ALIKE = ["4x4 in regions", "7x7 in tiles of two", "17x17 stride 2", "multiplier 2 of many channels"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in CASES]
)
def test_every_algorithm_in_bfloat16(name):
    check_case(CASES[name], "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_networks(name, dtype):
    check_case(LAYERS[name], dtype)


def plain(x, kernel):
    """A depthwise convolution of any rank, of a model that knows nothing of this package."""
    *window, c, m = kernel.shape
    letters = "DHW"[-len(window) :]
    return lax.conv_general_dilated(
        x,
        kernel.reshape(*window, 1, c * m),
        (1,) * len(window),
        "SAME",
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=c,
    )


# Images and windows.
RANKS = {
    "1-D": ((4, 10_000, 4), (4,)),
    "1-D in a loop": ((2, 500, 8), (80,)),
    "3-D": ((2, 8, 14, 14, 8), (3, 3, 3)),
}


@pytest.mark.parametrize("name", RANKS)
def test_other_ranks(name):
    shape, window = RANKS[name]
    case = Case(shape, (*window, shape[-1], 1), **SAME)
    x, kernel, g = operands(case, "float32")

    @compiled
    @accelerate
    def run(x, kernel, g):
        y, vjp = jax.vjp(plain, x, kernel)
        return y, *vjp(g)

    expected = oracle.forward(x, kernel, **SAME), *oracle.vjp(x, kernel, g, **SAME)
    lowered = run.lower(x, kernel, g)
    assert "stablehlo.convolution" not in lowered.as_text()
    check(lowered.compile()(x, kernel, g), expected, "float32")


@pytest.mark.parametrize("name", ["3x3", "5x5 small", "7x7 in rows"])
def test_a_train_step(name):
    """Operands are expressions, results are read several times, sums go over many positions."""
    x, kernel, g = operands(CASES[name], "float32")
    bias = np.arange(kernel.shape[2], dtype=np.float32)

    @compiled
    @accelerate
    def step(x, kernel, bias, g):
        def loss(x, kernel, bias):
            y = plain(x + 1, 2 * kernel) + bias[None, None, None]
            y = jax.nn.relu(y)
            return jnp.vdot(y, g), (y, y.max((0, 1, 2)))

        return jax.grad(loss, (0, 1, 2), has_aux=True)(x, kernel, bias)

    gradients, (y, most) = step(x, kernel, bias, g)
    before = oracle.forward(x + 1, 2 * kernel, **SAME) + bias
    through = g * (before > 0)
    dx, dk = oracle.vjp(x + 1, 2 * kernel, through, **SAME)
    after = np.maximum(before, 0)
    expected = after, after.max((0, 1, 2)), dx, 2 * dk, through.sum((0, 1, 2))
    check((y, most, *gradients), expected, "float32")


@pytest.mark.parametrize("batched", [(0, None, 0), (None, 0, 0), (0, 0, 0)], ids=str)
def test_vmap(batched):
    case = Case((3, 40, 40, 4), (3, 3, 4, 1), **SAME)
    arrays = operands(case, "float32")
    several = [
        a if axis is None else np.stack([a, a[..., ::-1]])
        for a, axis in zip(arrays, batched, strict=True)
    ]
    f = functools.partial(depthwise_conv2d, **case.options)

    def run(x, kernel, g):
        y, vjp = jax.vjp(f, x, kernel)
        return y, *vjp(g)

    found = compiled(jax.vmap(run, batched))(*several)
    for i in range(2):
        x, kernel, g = (
            a if axis is None else a[i] for a, axis in zip(several, batched, strict=True)
        )
        expected = oracle.forward(x, kernel, **SAME), *oracle.vjp(x, kernel, g, **SAME)
        check([y[i] for y in found], expected, "float32")


# Batch, height and width, and whether there are several kernels: past 32,768 rows, YNNPACK of
# jax 0.10.2 computes a small matrix that `vmap` applies to every row wrongly (jax#39103).
POINTWISE = {"small": (2, 14, 14, 1), "many rows": (1, 200, 200, 1), "vmapped": (1, 200, 200, 3)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_products(name, dtype):
    *shape, kernels = POINTWISE[name]
    rng = np.random.default_rng(0)
    x = rng.integers(0, 120, (*shape, 4)).astype("float32")
    kernel = rng.integers(-3, 4, (kernels, 1, 1, 4, 6)).astype("float32")
    g = rng.integers(-1, 2, (kernels, *shape, 6)).astype("float32")

    def run(x, kernel, g):
        f = functools.partial(
            lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y, vjp = jax.vjp(f, x, kernel)
        return y, *vjp(g)

    step = jax.vmap(run, (None, 0, 0)) if kernels > 1 else run
    lead = slice(None) if kernels > 1 else 0
    args = [jnp.asarray(a, dtype) for a in (x, kernel[lead], g[lead])]
    lowered = compiled(accelerate(step, pointwise=True)).lower(*args)
    assert "stablehlo.convolution" not in lowered.as_text()
    x, kernel, g = (a.astype(np.float64) for a in (x, kernel[:, 0, 0], g))
    y = np.einsum("nhwc,kcd->knhwd", x, kernel)
    dx = np.einsum("knhwd,kcd->knhwc", g, kernel)
    dk = np.einsum("nhwc,knhwd->kcd", x, g)[:, None, None]
    check(lowered.compile()(*args), [a[lead] for a in (y, dx, dk)], dtype)


def test_pointwise_products_transpose_no_image():
    """But for a kernel gradient, whose sum runs over the rows of both operands."""
    x, kernel, g = jnp.ones((4, 12, 12, 96)), jnp.ones((1, 1, 96, 64)), jnp.ones((4, 12, 12, 64))

    def conv(x, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dims)

    steps = {
        "forward": (conv, x, kernel),
        "input gradient": (
            lambda kernel, g: jax.vjp(lambda x: conv(x, kernel), x)[1](g),
            kernel,
            g,
        ),
        "kernel gradient": (lambda x, g: jax.vjp(lambda k: conv(x, k), kernel)[1](g), x, g),
    }
    found = {}
    for name, (f, *args) in steps.items():
        text = compiled(accelerate(f, pointwise=True)).lower(*args).compile().as_text()
        assert "convolution(" not in text
        found[name] = text.count(" transpose("), text.count(" copy(")
    assert found["forward"] == found["input gradient"] == (0, 0), found
    assert max(found["kernel gradient"]) <= 1, found


def test_the_default_level_is_restored():
    """Code at the default level is more than twice as fast; measured: 7 to 10 times."""
    x, kernel = jnp.ones((1, 56, 56, 64)), jnp.ones((5, 5, 64, 1))

    def seconds(jit):
        run = jit(lambda x, kernel: depthwise_conv2d(x, kernel, padding="same"))
        run(x, kernel).block_until_ready()
        times = []
        for _ in range(20):
            start = time.perf_counter()
            run(x, kernel).block_until_ready()
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(jax.jit) > 2 * seconds(compiled)
