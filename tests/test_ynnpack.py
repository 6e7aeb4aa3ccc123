"""What YNNPACK makes of our programs, which XLA:CPU hands reductions and products to.

jaxlib 0.10.2 computes a small matrix that `vmap` applies to every row, and that is then reduced,
wrongly without a word: past 32,768 rows, in float64 past 16,384 (jax#39103). Multiplying and
reducing arrays of rank 7 and more crashed or hung up to 0.11.0. Every kernel gradient of ours ends
in such a reduction. So programs that train with our convolutions run here past these sizes, with
YNNPACK and without, each in a process of its own, for XLA reads its flags once. The reference is
XLA's own convolution in float64, without YNNPACK.
"""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_dwconv import accelerate, depthwise_conv

OFF = "--xla_cpu_experimental_ynn_fusion_type="
# Images and windows, with more than 32,768 positions; and a multiplier.
SHAPES = {
    "1-D": ((4, 10_000, 8), (4,), 1),
    "1-D long": ((2, 17_000, 4), (40,), 1),
    "3x3": ((11, 56, 56, 8), (3, 3), 1),
    "3x3 multiplier 2": ((11, 56, 56, 4), (3, 3), 2),
    "5x5": ((11, 56, 56, 8), (5, 5), 1),
    "7x7": ((11, 56, 56, 4), (7, 7), 1),
    "3-D": ((2, 17, 32, 32, 4), (3, 3, 3), 1),
}
STRIDED = {"3x3 stride 2": ((11, 112, 112, 2), (3, 3), 1)}


def sums(y):
    """Sums for each channel, and of the sizes, for the error of a sum is that of its terms."""
    axes = (*range(y.ndim - 1),)
    return jnp.stack([y.sum(axes), jnp.abs(y).sum(axes)])


def gradient(conv, x, k, g):
    """The gradients of a convolution for a given cotangent."""
    return jax.vjp(conv, x, k)[1](g[..., : x.shape[-1] * k.shape[-1]])


def batch_norm(conv, x, k, g):
    """Gradients through batch normalization and a rectifier, and the statistics."""

    def loss(x, k):
        y = conv(x, k)
        mean, var = y.mean((*range(y.ndim - 1),)), y.var((*range(y.ndim - 1),))
        y = (y - mean) * jax.lax.rsqrt(var + 1e-3)
        return jnp.sum(jax.nn.relu(y) * g[..., : y.shape[-1]]) / y.size, (mean, var)

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, k)


def of_several(conv, x, k, g):
    """The kernel gradients of three kernels, by `vmap`."""
    ks = jnp.stack([k, 2 * k, k - 1])
    return jax.vmap(lambda k: jax.grad(lambda k: jnp.vdot(conv(x, k), g))(k))(ks)


def per_example(conv, x, k, g):
    """The kernel gradient of each example, their norms, and what is left of them after clipping."""

    def one(x, g):
        return jax.grad(lambda k: jnp.vdot(conv(x[None], k), g[None]))(k)

    each = jax.vmap(one)(x, g)
    norms = jnp.sqrt(jnp.sum(each**2, (*range(1, each.ndim),)))
    scale = 1 / jnp.maximum(norms, 1)
    return each, norms, jnp.tensordot(scale, each, 1)


def norms(conv, x, k, g):
    """The gradient of a gradient's norm, and clipping by the global norm."""

    def norm(k):
        dx, dk = jax.grad(lambda x, k: jnp.sum(conv(x, k) ** 2 * g) / g.size, (0, 1))(x, k)
        return optax.global_norm((dx, dk))

    value, dk = jax.value_and_grad(norm)(k)
    return value, dk, optax.clip_by_global_norm(0.1).update(dk, optax.EmptyState())[0]


def pointwise(conv, x, k, g):
    """A separable layer and its gradients, with sums of what the product gives."""
    *_, c, m = k.shape
    matrix = jnp.sin(jnp.arange(c * m * 6, dtype=x.dtype)).reshape(*[1] * (x.ndim - 2), c * m, 6)
    letters = "DHW"[-(x.ndim - 2) :]

    def product(y, matrix):
        return jax.lax.conv_general_dilated(
            y,
            matrix,
            (1,) * (x.ndim - 2),
            "VALID",
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        )

    def loss(x, k, matrix):
        z = product(conv(x, k), matrix)
        return jnp.mean(z**2), sums(z)

    f = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    several = jax.vmap(f, (None, None, 0))(x, k, jnp.stack([matrix, matrix + 1]))
    return f(x, k, matrix), several


def rows(conv, x, k, g):
    """One matrix for every row by `vmap`, as a product by `accelerate`, and then reduced."""
    c = x.shape[-1]
    matrix = jnp.cos(jnp.arange(c * c, dtype=x.dtype)).reshape(1, 1, c, c)
    lines = x.reshape(-1, 1, 1, c)[:, None]

    def one(line, matrix):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(line, matrix, (1, 1), "VALID", dimension_numbers=dims)

    def loss(matrix):
        y = jax.vmap(one, (0, None))(lines, matrix)
        return jnp.mean(y**2), sums(y)

    return jax.value_and_grad(loss, has_aux=True)(matrix)


PROGRAMS = [gradient, batch_norm, of_several, per_example, norms, pointwise, rows]
CASES = [(gradient, name) for name in SHAPES | STRIDED] + [
    (program, name) for program in PROGRAMS[1:] for name in ["1-D", "3x3", "3-D"]
]


def operands(name, dtype):
    shape, window, m = (SHAPES | STRIDED)[name]
    rng = np.random.default_rng(0)
    strides = 2 if name in STRIDED else 1
    outputs = (shape[0], *(-(-n // strides) for n in shape[1:-1]), shape[-1] * m)
    arrays = [rng.standard_normal(s) for s in (shape, (*window, shape[-1], m), outputs)]
    return strides, [jnp.asarray(a, jnp.float32).astype(dtype) for a in arrays]


def run(program, name, dtype, method):
    strides, args = operands(name, dtype)
    conv = functools.partial(depthwise_conv, strides=strides, padding="same", method=method)
    f = functools.partial(program, conv)
    f = jax.jit(f if method == "lax" else accelerate(f, pointwise=True))
    compiled = f.lower(*args).compile()
    return compiled.as_text().count("__ynn_fusion"), jax.tree.leaves(compiled(*args))


def main(path, method, *dtypes):
    """Writes all results to a file: in a process of its own."""
    jax.config.update("jax_enable_x64", True)
    found = {}
    for program, name in CASES:
        for dtype in dtypes:
            fusions, values = run(program, name, dtype, method)
            key = f"{program.__name__} {name} {dtype}"
            found |= {f"{key} {i}": np.asarray(v) for i, v in enumerate(values)}
            found[f"{key} fusions"] = fusions
    np.savez(path, **found)


def results(path, flags, method, *dtypes):
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, __file__, path, method, *dtypes], check=True, env=environment)
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return results(tmp_path_factory.mktemp("lax") / "r.npz", OFF, "lax", "float64")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param("", marks=pytest.mark.slow, id="ynnpack"),
        pytest.param(OFF, marks=pytest.mark.nightly, id="without"),
    ],
)
def test_training_at_realistic_sizes(flags, reference, tmp_path):
    found = results(tmp_path / "r.npz", flags, "auto", "float32", "float64")
    fusions = {k: int(found.pop(k)) for k in list(found) if k.endswith("fusions")}
    # YNNPACK computes something in nearly every program, or nothing at all.
    using = sum(n > 0 for n in fusions.values())
    assert using == 0 if flags == OFF else using > 0.9 * len(fusions)
    wrong = {}
    for key, y in found.items():
        exact = reference[re.sub("float32", "float64", key)]
        dtype = "float32" if " float32 " in key else "float64"
        assert y.dtype == dtype and y.shape == exact.shape
        error = np.abs(y - exact).max() / np.abs(exact).max()
        # XLA's own sum of 209,000 squares in float32, the loss of `pointwise`, is wrong by 1.6e-4
        # without YNNPACK, with `method="lax"` too.
        if not error < {"float32": 5e-4 if flags == OFF else 5e-5, "float64": 1e-12}[dtype]:
            wrong[key] = error
    assert wrong == {}


@st.composite
def programs(draw):
    """A function of image and kernel with derivatives and maps around it, and its arguments."""
    rank = draw(st.integers(1, 3))
    c, m = draw(st.sampled_from([2, 5, 24])), draw(st.sampled_from([1, 2, 6]))
    window = [draw(st.integers(1, 7)) for _ in range(rank)]
    space = [draw(st.integers(k, 20)) for k in window]
    batch = [draw(st.sampled_from([1, 3]))] * draw(st.integers(1, 3))
    options = dict(
        padding=draw(st.sampled_from(["same", "valid"])),
        strides=draw(st.integers(1, 3)),
        dilation_rate=draw(st.integers(1, 2)),
    )
    if options["padding"] == "valid":
        options["dilation_rate"] = 1
    x = jax.ShapeDtypeStruct((*batch, *space, c), jnp.float32)
    k = jax.ShapeDtypeStruct((*window, c, m), jnp.float32)

    def loss(x, k):
        return jnp.sum(depthwise_conv(x, k, **options) ** 2)

    f = jax.grad(loss, (0, 1))
    if draw(st.booleans()):
        f = (lambda f: lambda x, k: jax.jvp(f, (x, k), (x, k)))(f)
    for _ in range(draw(st.integers(0, 3))):
        axes = draw(st.sampled_from([(0, None), (None, 0), (0, 0)]))
        f = jax.vmap(f, axes)
        x, k = (
            a if axis is None else jax.ShapeDtypeStruct((3, *a.shape), a.dtype)
            for a, axis in zip((x, k), axes, strict=True)
        )
    return f, x, k


def reduced_ranks(text):
    """The rank of the operand of each reduction in StableHLO that YNNPACK may be given.

    That is a reduction of one operand. Those of several, `workarounds.one_loop`, it does not take.
    """
    pattern = r"stablehlo\.reduce\(\S+ init: \S+\) applies.*?: \(tensor<((?:\d+x)*)\w+>"
    return [shape.count("x") for shape in re.findall(pattern, text)]


def test_ranks_are_read():
    """Of plain reductions, and not of those with several operands."""

    def f(x):
        pair = jax.lax.reduce((x, x + 1), (0.0, 0.0), lambda a, b: (a[0] + b[0], a[1] + b[1]), [0])
        return x.sum((0, 1)), x.sum(), pair

    assert reduced_ranks(jax.jit(f).lower(jnp.ones((2, 3, 4))).as_text()) == [3, 3]


@pytest.mark.slow
@settings(max_examples=40)
@given(programs())
def test_no_sum_of_rank_7(program):
    """However many transformations there are; the sums of a loss itself are not ours."""
    f, x, k = program
    assert max(reduced_ranks(jax.jit(f).lower(x, k).as_text()), default=0) <= 6


def test_a_volume_with_every_cotangent():
    """Each image with each cotangent: one dimension more than a sum may have."""
    x, g = oracle.integers(0, 3, 2, 5, 6, 7, 4), oracle.integers(1, 2, 2, 5, 6, 7, 8)
    kernel = oracle.integers(2, 3, 2, 3, 4, 2)

    def run(method):
        def gradient(x, g):
            f = functools.partial(depthwise_conv, x, padding="same", method=method)
            return jax.vjp(f, kernel)[1](g)[0]

        return jax.jit(jax.vmap(jax.vmap(gradient, (None, 0)), (0, None)))

    lowered = run("auto").lower(x, g)
    text = lowered.as_text()
    assert "stablehlo.convolution" not in text and max(reduced_ranks(text)) <= 6
    np.testing.assert_array_equal(lowered.compile()(x, g), run("lax")(x, g))


if __name__ == "__main__":
    main(*sys.argv[1:])
