"""How accurate results and derivatives are, what becomes of numbers that are not, and that results
are the same in every run.

With u = eps / 2 of a dtype, half a unit in the last place of 1: float16 and bfloat16 are summed up
in float32 and rounded once, so that

    |y - exact| <= u |exact| + T u32 sum|terms|

for a sum of T terms, however it is ordered; the second part is small beside the first.
"""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.test_util import check_grads
from test_functional import Case

import flax_dwconv
from flax_dwconv import DepthwiseConv2D, activations, depthwise_conv, depthwise_conv2d
from flax_dwconv._lowering import tuning

CASES = {
    "stride": Case((2, 7, 6, 2), (3, 3, 2, 1), (2, 1), "same"),
    "both": Case((1, 9, 8, 2), (3, 2, 2, 2), 2, ((1, 0), (-1, 2)), 2),
    "first": Case((1, 2, 5, 4), (2, 3, 2, 2), 2, 1, 1, "channels_first"),
    "tiles": Case((1, 9, 10, 2), (7, 7, 2, 1), 1, "same"),
    "loop": Case((1, 10, 11, 2), (9, 10, 2, 1), 1, "same"),
    "loops": Case((1, 4, 75, 2), (2, 71, 2, 1), 1, "same"),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
few = pytest.mark.parametrize("case", [CASES[n] for n in ("both", "first")], ids=str)


def operands(case, dtype=np.float64):
    """Normal numbers: input, kernel and cotangent."""
    x, kernel = (oracle.normals(i, *s, dtype=dtype) for i, s in enumerate(case[:2]))
    shape = oracle.output_shape(case.x, case.kernel, **case.options)
    return x, kernel, oracle.normals(2, *shape, dtype=dtype)


def all_three(case, x, kernel, g, method="auto"):
    """The result and both gradients."""
    return compiled(case, method)(x, kernel, g)


@functools.cache
def compiled(case, method):
    def run(x, kernel, g):
        f = functools.partial(depthwise_conv2d, **case.options, method=method)
        y, vjp = jax.vjp(f, x, kernel)
        return y, *vjp(g)

    return jax.jit(run)


def exact(case, x, kernel, g):
    return oracle.forward(x, kernel, **case.options), *oracle.vjp(x, kernel, g, **case.options)


# Derivatives, against finite differences in float64


@few
@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_derivatives_of_the_function(case, mode, x64):
    """Of a function that is not linear in either operand."""
    x, kernel, _ = operands(case)

    def f(x, kernel):
        return jnp.sin(depthwise_conv2d(x, kernel, **case.options)).sum()

    check_grads(jax.jit(f), (x, kernel), order=2, modes=[mode], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_derivatives_of_a_layer_with_penalties(mode, x64):
    layer = DepthwiseConv2D(
        3,
        strides=2,
        padding="same",
        depth_multiplier=2,
        activation="silu",
        bias_initializer="random_normal",
        depthwise_regularizer="l2",
        bias_regularizer="l2",
        activity_regularizer="l2",
        param_dtype="float64",
    )
    x = oracle.normals(0, 2, 6, 5, 2, dtype=np.float64)
    params = layer.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        y, state = layer.apply({"params": params}, x, mutable=["losses"])
        return jnp.sum(y**2) + sum(state["losses"].values()).astype(y.dtype)

    # A penalty is a float32 number: a step of 1e-2 is well above its unit in the last place.
    check_grads(jax.jit(loss), (params, x), 2, [mode], atol=1e-2, rtol=1e-2, eps=1e-2)


# Rounding


@cases
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rounds_once(case, dtype):
    rounded = x, kernel, g = [jnp.asarray(a, dtype) for a in operands(case)]
    wide = [np.asarray(a, np.float64) for a in rounded]
    terms = exact(case, *map(np.abs, wide))
    u, u32 = (float(jnp.finfo(d).eps) / 2 for d in (dtype, "float32"))
    tiny = float(jnp.finfo(dtype).smallest_subnormal) / 2
    for ours, true, total in zip(all_three(case, *rounded), exact(case, *wide), terms, strict=True):
        assert ours.dtype == dtype
        error = np.abs(np.asarray(ours, np.float64) - true)
        assert np.all(error <= u * np.abs(true) + tiny + (g.size + kernel.size) * u32 * total)
        # Rounded once: nearly everywhere it is what the true sum itself would be rounded to.
        same = np.asarray(ours) == np.asarray(jnp.asarray(true, dtype))
        assert same.mean() > 0.95, same.mean()


@cases
def test_single_precision(case):
    """Far better than T u: the sums are trees, or run for each pixel on its own."""
    arrays = [a.astype(np.float32) for a in operands(case)]
    terms = exact(case, *map(np.abs, arrays))
    for ours, true, total in zip(
        all_three(case, *arrays), exact(case, *arrays), terms, strict=True
    ):
        assert np.all(np.abs(ours - true) <= 8 * 2.0**-24 * total)


# Infinite, not a number, minus zero


def kind(array):
    """Finite, an infinity of either sign, or not a number."""
    array = np.asarray(array)
    return np.where(np.isnan(array), 2, np.where(np.isinf(array), np.sign(array), 0))


@cases
@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 2], ids=["image", "kernel", "cotangent"])
def test_what_is_not_finite_propagates_as_in_lax(case, value, where):
    """To the same elements, with an exception here, and another one below.

    A pad is no element of a sum in the definition. It is a 0 in XLA's convolution and in our padded
    images, while images in regions leave it out: where an infinite or NaN weight (or cotangent)
    meets a pad, XLA's result is NaN, and ours is that or what the definition says.
    """
    arrays = [a.astype(np.float32) for a in operands(case)]
    arrays[where][(..., *(0 for _ in range(3)))] = value
    ours = all_three(case, *arrays)
    lax = all_three(case, *arrays, method="lax")
    with np.errstate(invalid="ignore"):
        defined = exact(case, *arrays)
    for y, theirs, wanted in zip(ours, lax, defined, strict=True):
        differs = kind(y) != kind(theirs)
        np.testing.assert_array_equal(kind(y)[differs], kind(wanted)[differs])
        assert np.isnan(np.asarray(theirs)[differs]).all()
        if where == 0:  # what it meets at the pads is nothing
            assert not differs.any()


SMALL_IMAGES = [
    ((7,), (9,), 1, 1),
    ((20,), (45,), 1, 1),
    ((5,), (7,), 2, 3),
    ((5, 5), (7, 7), 1, 1),
    ((7, 7), (7, 7), 1, 1),
    ((4, 6), (9, 6), 1, 1),
    ((9, 8), (15, 17), 1, 1),
    ((5, 4), (6, 9), 2, 1),
    ((3, 4, 3), (4, 5, 3), 1, 1),
    ((3, 4, 3), (4, 5, 3), 1, 8),
]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("effort", ["little", "much"])
@pytest.mark.parametrize("size, window, stride, m", SMALL_IMAGES, ids=str)
def test_a_pixel_reaches_what_sees_it(size, window, stride, m, effort, value, request):
    """In an image no larger than the kernel, the kernel may be padded, and 0 * NaN is NaN.

    Every result, and every gradient to an image, is that of XLA's convolution, bit by bit: one
    pixel, and one element of the cotangent, is not finite.
    """
    if effort == "much":
        request.getfixturevalue("much_effort")
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (2, *size, 2)).astype("float32")
    kernel = rng.integers(1, 4, (*window, 2, m)).astype("float32")
    f = functools.partial(depthwise_conv, strides=stride, padding="same")

    def run(method, x, kernel, g):
        y, vjp = jax.vjp(lambda x: f(x, kernel, method=method), x)
        return y, *vjp(g)

    g = rng.integers(-3, 4, jax.eval_shape(f, x, kernel).shape).astype("float32")
    for where in range(3):  # the first position, one in the middle, the last
        at = (1, *[(0, n // 2, n - 1)[where] for n in size], 1)
        of_g = (1, *[(0, n // 2, n - 1)[where] for n in g.shape[1:-1]], 1)
        broken = x.copy(), kernel, g.copy()
        broken[0][at] = broken[2][of_g] = value
        ours, theirs = (jax.jit(functools.partial(run, method))(*broken)
                        for method in ("auto", "lax"))  # fmt: skip
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert np.isfinite(ours[0][0]).all() and not np.isfinite(ours[0]).all()


def test_a_pixel_that_is_not_a_number_in_a_large_batch(much_effort, monkeypatch):
    """The second exception: there it is the kernel that is padded, and 0 * NaN is NaN."""
    constants = dataclasses.replace(tuning.TUNING, exchanged_rows_elements=0)
    monkeypatch.setattr(tuning, "TUNING", constants)
    x = np.ones((2, 7, 7, 2), np.float32)
    x[0, 0, 0, 0] = np.nan
    kernel = np.ones((7, 7, 2, 1), np.float32)
    ours, theirs = (
        np.isnan(depthwise_conv2d(x, kernel, padding="same", method=m)) for m in ("auto", "lax")
    )
    assert theirs[0, :4, :4, 0].all() and theirs.sum() == 16
    assert ours[0, :, :4, 0].all() and ours.sum() == 28


def test_an_infinite_weight_and_a_pad(much_effort):
    """The first exception, in one case: 0 * inf at the first row and column, which read pads."""
    x, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 2, 1), np.float32)
    kernel[0, 0] = np.inf
    f = functools.partial(depthwise_conv2d, padding="same")
    ours = np.asarray(jax.jit(f)(x, kernel))
    theirs = np.asarray(f(x, kernel, method="lax"))
    assert np.isinf(ours[:, 1:, 1:]).all() and np.isinf(theirs[:, 1:, 1:]).all()
    for edge in (np.s_[:, 0], np.s_[:, :, 0]):
        assert np.isfinite(ours[edge]).all() and np.isnan(theirs[edge]).all()


@cases
def test_zeros_of_either_sign_are_zeros(case):
    """A sum of minus zeros is 0; whether -0.0 or 0.0 depends on how many zeros it starts with."""
    x, kernel, g = (np.abs(a).astype(np.float32) for a in operands(case))
    for method in ("auto", "lax"):
        y, dx, dk = all_three(case, -0.0 * x, kernel, -0.0 * g, method)
        for array in (y, dx, dk):
            np.testing.assert_array_equal(array, np.zeros_like(array))


# Large sums


LARGE = {
    "one image": (1, 3163, 3163, 2),
    "large images": (10, 1000, 1000, 2),
    "small images": (51_300, 14, 14, 2),
}


@pytest.mark.parametrize("shape", LARGE.values(), ids=list(LARGE))
def test_ten_million_terms_in_single_precision(shape):
    """Within 2**-20 of the sum, where plain lax is off by 2**-10 for some of these shapes.

    1 / 16 of a term is lost for each step of a float32 sum of 1e7 terms that goes one by one.
    """
    g = np.random.default_rng(0).random(shape, np.float32)
    true = np.einsum("nhwc->c", g, dtype=np.float64)
    layer = DepthwiseConv2D(1, depthwise_initializer="ones")
    x = np.ones(shape, np.float32)
    params = layer.init(jax.random.key(0), x[:1])["params"]

    @jax.jit
    def gradients(params, x, g):
        return jax.grad(lambda params: jnp.vdot(layer.apply({"params": params}, x), g))(params)

    found = gradients(params, x, g)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(found[name].ravel(), true, rtol=2.0**-20, err_msg=name)


# Sums in low precision. bfloat16 and float16 hold 25,088 exactly; a sum in bfloat16 ends below.


LAYERS = {
    "DepthwiseConv1D": (8, 3136, 4),
    "DepthwiseConv2D": (8, 56, 56, 4),
    "DepthwiseConv3D": (8, 14, 14, 16, 4),
    "SeparableConv1D": (8, 3136, 4),
    "SeparableConv2D": (8, 56, 56, 4),
}
low = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def low_layer(name, dtype, module=flax_dwconv, **settings):
    """A layer of kernels of one position and 8 results a position.

    For inputs of ones, every gradient of the sum of all results is 25,088.
    """
    settings |= dict(kernel_size=1, depthwise_initializer="ones", dtype=dtype)
    if name.startswith("Depthwise"):
        return getattr(module, name)(depth_multiplier=2, **settings)
    eighth = np.full((*[1] * int(name[-2]), 4, 8), 1 / 8, "f4")
    return getattr(module, name)(filters=8, pointwise_initializer=eighth, **settings)


@low
@pytest.mark.parametrize("param_dtype", ["low", "float32"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_parameters_are_summed_in_float32(name, data_format, param_dtype, dtype):
    param_dtype = dtype if param_dtype == "low" else param_dtype
    layer = low_layer(name, dtype, param_dtype=param_dtype, data_format=data_format)
    x = np.ones(LAYERS[name], jnp.dtype(dtype))
    x = x if data_format == "channels_last" else np.moveaxis(x, -1, 1)
    params = layer.init(jax.random.key(0), x)["params"]

    def loss(params, x):
        return layer.apply({"params": params}, x).astype("float32").sum()

    for gradient in (jax.grad(loss), jax.jit(jax.grad(loss)), jax.jit(jax.grad(jax.remat(loss)))):
        for key, g in gradient(params, x).items():
            assert g.dtype == param_dtype and (g.astype("float32") == 25_088).all(), (key, g)


@low
@pytest.mark.parametrize("method", ["auto", "taps", "lax"])
@pytest.mark.parametrize("name", ["DepthwiseConv2D", "SeparableConv2D"])
def test_gradients_of_parameters_are_rounded_once(name, method, dtype):
    """Against float64."""
    shape = LAYERS[name]
    layer = low_layer(name, dtype, method=method, param_dtype=dtype)
    random = np.random.default_rng(0)
    x = random.uniform(0.5, 1.5, shape).astype(jnp.dtype(dtype))
    g = (random.integers(1, 3, (*shape[:-1], 8)) / 256).astype(jnp.dtype(dtype))
    params = layer.init(jax.random.key(0), x)["params"]
    found = jax.jit(lambda p, x, g: jax.vjp(lambda p: layer.apply({"params": p}, x), p)[1](g)[0])
    found = found(params, x, g)
    x, g = x.astype(float), g.astype(float)
    if name == "DepthwiseConv2D":
        exact = {"kernel": np.einsum("nhwc,nhwcm->cm", x, g.reshape(*shape, 2))}
    else:
        exact = {
            "depthwise_kernel": np.einsum("nhwc,nhwf->c", x, g) / 8,
            "pointwise_kernel": np.einsum("nhwc,nhwf->cf", x, g),
        }
    exact["bias"] = g.sum((0, 1, 2))
    u = float(jnp.finfo(dtype).eps) / 2
    for key, value in exact.items():
        got = np.asarray(found[key], float).ravel()
        np.testing.assert_allclose(got, value.ravel(), rtol=1.01 * u, err_msg=key)


@low
def test_bias_gradients_under_every_transformation(dtype):
    """Summed over 25,088 positions, or all of them in pieces, whose sums are exact."""
    layer = low_layer("DepthwiseConv2D", dtype, param_dtype="float32")
    x = jnp.ones((2, 4, 56, 56, 4), dtype)
    params = layer.init(jax.random.key(0), x[0])["params"]

    def loss(params, x):
        return layer.apply({"params": params}, x).astype("float32").sum()

    def scanned(params, x):
        return jax.lax.scan(lambda c, x: (c + loss(params, x), None), jnp.float32(0), x)[0]

    def mapped(params, x):
        return jax.vmap(loss, (None, 0))(params, x).sum()

    def tangents(params, x):
        return jax.grad(lambda p: jax.jvp(lambda q: loss(q, x[0]), (p,), (p,))[1])(params)

    for function in (jax.grad(scanned), jax.grad(mapped)):
        for call in (function, jax.jit(function)):
            assert (call(params, x)["bias"] == 25_088).all()
    for call in (tangents, jax.jit(tangents)):
        assert (call(params, x)["bias"] == 12_544).all()
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, x)["bias"]
    assert each.shape == (2, 8) and (each == 12_544).all()


@low
def test_bias_gradients_in_nnx(dtype):
    settings = dict(param_dtype=dtype, in_features=4, rngs=nnx.Rngs(0))
    layer = low_layer("SeparableConv2D", dtype, flax_dwconv.nnx, **settings)
    x = jnp.ones((8, 56, 56, 4), dtype)
    grads = nnx.jit(nnx.grad(lambda layer: layer(x).astype("float32").sum()))(layer)
    for g in jax.tree.leaves(grads):
        assert (g.astype("float32") == 25_088).all()


@low
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_the_bias_is_added_as_in_low_precision(activation, dtype):
    """All sums of two numbers, one rounding: the value of an addition in `dtype`, bit for bit."""
    layer = DepthwiseConv2D(1, dtype=dtype, activation=activation, depthwise_initializer="ones")
    y = oracle.normals(0, 8, 32, 32, 4).astype(jnp.dtype(dtype))
    bias = oracle.normals(1, 4).astype(jnp.dtype(dtype))
    params = {"kernel": jnp.ones((1, 1, 4, 1)), "bias": bias.astype("float32")}
    got = jax.jit(lambda p, y: layer.apply({"params": p}, y))(params, y)
    expected = activations.get(activation)(jnp.asarray((y + bias).astype(jnp.dtype(dtype))))
    np.testing.assert_array_equal(got, expected)


def test_products_of_accelerate_are_summed_in_float32():
    """Of jax 0.12.0.1, XLA's own product on a CPU gives 20,096."""
    x, kernel = jnp.ones((8, 56, 56, 8), jnp.bfloat16), jnp.ones((1, 1, 8, 4), jnp.bfloat16)

    def loss(kernel):
        conv = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return conv.astype("float32").sum()

    gradient = flax_dwconv.accelerate(jax.jit(jax.grad(loss)), pointwise=True)(kernel)
    assert (gradient == 25_088).all()


# From run to run

RUN = """
import hashlib
import numpy as np
import test_numerics as t
case = t.Case((8, 40, 40, 16), (3, 3, 16, 1), 1, "same")
arrays = [t.oracle.normals(i, *shape) for i, shape in enumerate([case.x, case.kernel, case.x])]
for _ in range(3):
    results = t.all_three(case, *arrays)
    print(*(hashlib.sha256(np.asarray(a).tobytes()).hexdigest() for a in results))
"""


def test_results_are_the_same_in_every_call_and_process():
    folder = pathlib.Path(__file__).parent
    package = pathlib.Path(flax_dwconv.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (folder, package)))}
    command = [sys.executable, "-c", RUN]
    two = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    lines = [line for process in two for line in process.communicate()[0].splitlines()]
    assert len(lines) == 6 and len(set(lines)) == 1, lines
