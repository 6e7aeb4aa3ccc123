"""The pure function, by transformation. Small integers make every correct result exact."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import export
from jax.test_util import check_grads

import flax_dwconv
from flax_dwconv import depthwise_conv2d


class Case(NamedTuple):
    x: tuple
    kernel: tuple
    strides: Any = 1
    padding: Any = "valid"
    dilation_rate: Any = 1
    data_format: str = "channels_last"

    @property
    def options(self):
        return dict(list(self._asdict().items())[2:])

    def arrays(self, dtype=np.float32, limit=3):
        """Input, kernel and a cotangent."""
        x = oracle.integers(0, *self.x, dtype=dtype, limit=limit)
        kernel = oracle.integers(1, *self.kernel, dtype=dtype, limit=limit)
        shape = oracle.output_shape(self.x, self.kernel, **self.options)
        return x, kernel, oracle.integers(2, *shape, dtype=dtype, limit=limit)

    def __str__(self):
        shapes = ["x".join(map(str, s)) for s in (self.x, self.kernel)]
        rest = [f"{k}={v}" for k, v in self.options.items() if v != Case._field_defaults[k]]
        return "-".join(shapes + rest).replace(" ", "")


# TensorFlow's own configurations (depthwise_conv_op_base.py) in spirit: its kernels, multipliers,
# strides and pads, images a dozen pixels wide where theirs are a few hundred.
TENSORFLOW = [
    # ConfigsToTest
    Case((4, 5, 5, 48), (1, 1, 48, 2), padding="same"),
    Case((4, 8, 8, 84), (1, 3, 84, 1), padding="same"),
    Case((4, 17, 17, 48), (3, 1, 48, 4), padding="same"),
    Case((4, 9, 27, 8), (3, 3, 8, 1), padding="same"),
    Case((4, 15, 15, 7), (3, 3, 7, 1), padding="same"),
    Case((4, 19, 19, 2), (5, 5, 2, 1), padding="same"),
    Case((4, 13, 13, 2), (3, 3, 2, 8), padding="valid"),
    Case((3, 17, 17, 3), (3, 2, 3, 8), strides=2, padding="valid"),
    Case((5, 13, 13, 1), (5, 5, 1, 2), padding="same"),
    Case((5, 15, 15, 1), (5, 5, 1, 2), strides=3, padding="same"),
    Case((2, 14, 14, 4), (7, 7, 4, 1), strides=2, padding="same"),
    # ConfigsToTestExplicit
    Case((4, 5, 5, 48), (1, 1, 48, 2), padding=((1, 2), (3, 4))),
    Case((4, 8, 8, 84), (1, 3, 84, 1), padding=((1, 2), (3, 4))),
    Case((4, 17, 17, 48), (3, 1, 48, 4), padding=((1, 2), (3, 4))),
    Case((4, 9, 27, 8), (3, 3, 8, 1), padding=((1, 2), (3, 4))),
    Case((4, 15, 15, 7), (3, 3, 7, 1), padding=((1, 2), (3, 4))),
    Case((4, 19, 19, 2), (5, 5, 2, 1), padding=((3, 4), (1, 2))),
    Case((4, 13, 13, 2), (3, 3, 2, 8), padding=((0, 0), (0, 0))),
    Case((3, 17, 17, 3), (3, 2, 3, 8), strides=2, padding=((0, 1), (2, 3))),
    Case((5, 13, 13, 1), (5, 5, 1, 2), padding=((3, 0), (0, 3))),
    Case((5, 15, 15, 1), (5, 5, 1, 2), strides=3, padding=((4, 4), (4, 4))),
    # CheckGradConfigsToTest
    Case((2, 5, 8, 1), (4, 4, 1, 2), padding="same"),
    Case((4, 5, 5, 1), (2, 2, 1, 2), padding="valid"),
    Case((2, 4, 4, 2), (3, 1, 2, 2), padding="same"),
    Case((1, 15, 15, 2), (1, 3, 2, 1), padding="same"),
    Case((2, 15, 16, 1), (3, 3, 1, 2), strides=2, padding="valid"),
    Case((2, 5, 8, 1), (3, 4, 1, 2), padding="same"),
    Case((1, 8, 5, 3), (5, 2, 3, 1), strides=3, padding="same"),
    Case((2, 6, 6, 3), (6, 6, 3, 1), padding="valid"),
    Case((1, 3, 1, 2), (2, 1, 2, 3), strides=2, padding="same"),
    # CheckGradConfigsToTestExplicit
    Case((2, 5, 8, 1), (4, 4, 1, 2), padding=((0, 0), (1, 1))),
    Case((4, 5, 5, 1), (2, 2, 1, 2), padding=((1, 2), (2, 1))),
    Case((2, 4, 4, 2), (3, 1, 2, 2), padding=((2, 2), (0, 0))),
    Case((1, 15, 15, 2), (1, 3, 2, 1), padding=((0, 1), (2, 0))),
    Case((2, 15, 16, 1), (3, 3, 1, 2), strides=2, padding=((2, 1), (1, 2))),
    Case((2, 5, 8, 1), (3, 4, 1, 2), padding=((5, 5), (6, 7))),
    Case((1, 8, 5, 3), (5, 2, 3, 1), strides=3, padding=((3, 0), (1, 4))),
]

# What they leave out: unequal strides and dilations, both together, crops, the other data format.
MORE = [
    Case((2, 9, 8, 3), (3, 2, 3, 2), strides=(2, 1)),
    Case((2, 9, 8, 3), (2, 3, 3, 1), strides=(1, 3), padding="same"),
    Case((2, 9, 8, 3), (3, 3, 3, 1), strides=4, padding="same"),
    Case((2, 7, 7, 2), (1, 1, 2, 1), strides=3),
    Case((2, 7, 7, 2), (1, 1, 2, 3), strides=2, padding="same"),
    Case((2, 9, 8, 3), (3, 2, 3, 2), dilation_rate=(2, 1)),
    Case((2, 9, 8, 3), (2, 3, 3, 1), padding="same", dilation_rate=(1, 3)),
    Case((2, 9, 8, 3), (3, 3, 3, 1), padding="same", dilation_rate=4),
    Case((1, 11, 10, 2), (3, 3, 2, 2), strides=2, dilation_rate=2),
    Case((1, 11, 10, 2), (3, 2, 2, 2), strides=(2, 3), padding="same", dilation_rate=(3, 2)),
    Case((1, 11, 10, 2), (2, 3, 2, 1), strides=(3, 2), padding=((1, 0), (0, 2)), dilation_rate=2),
    Case((2, 6, 5, 3), (3, 3, 3, 1), padding=0),
    Case((2, 6, 5, 3), (3, 3, 3, 1), padding=2),
    Case((2, 9, 8, 3), (3, 3, 3, 2), padding=((-1, 2), (1, -2))),
    Case((2, 9, 8, 3), (2, 2, 3, 1), strides=2, padding=((-2, -1), (-1, 0))),
    Case((2, 9, 8, 3), (2, 2, 3, 1), padding=((4, 4), (3, 5))),
    Case((2, 3, 4, 3), (3, 4, 3, 2)),
    Case((2, 3, 3, 2), (5, 5, 2, 1), padding="same"),
    Case((1, 1, 1, 1), (1, 1, 1, 1)),
    Case((2, 0, 4, 2), (3, 3, 2, 1), padding="same"),
    Case((0, 6, 5, 3), (3, 3, 3, 2), padding="same"),
    Case((6, 5, 3), (3, 3, 3, 2)),
    Case((2, 3, 6, 5, 3), (3, 3, 3, 2), strides=2, padding="same"),
    Case((2, 1, 3, 6, 5, 3), (3, 2, 3, 1)),
    Case((2, 0, 6, 5, 3), (3, 2, 3, 1)),
    Case((2, 3, 9, 8), (3, 3, 3, 2), data_format="channels_first"),
    Case((2, 3, 9, 8), (3, 2, 3, 1), (2, 1), "same", 1, "channels_first"),
    Case((2, 3, 9, 8), (2, 3, 3, 2), 1, "same", (2, 3), "channels_first"),
    Case((1, 2, 11, 10), (3, 2, 2, 2), (2, 3), ((1, 0), (-1, 2)), 2, "channels_first"),
    Case((3, 6, 5), (3, 3, 3, 2), data_format="channels_first"),
    Case((2, 3, 2, 6, 5), (3, 3, 2, 1), 2, 1, 1, "channels_first"),
    Case((0, 3, 6, 5), (3, 3, 3, 2), 1, "valid", 1, "channels_first"),
]

# One of each kind, for the transformations.
FEW = [
    Case((2, 6, 5, 3), (3, 2, 3, 2)),
    Case((2, 7, 6, 2), (3, 3, 2, 1), (2, 1), "same"),
    Case((2, 7, 6, 2), (2, 3, 2, 2), 1, "same", (2, 1)),
    Case((1, 9, 8, 2), (3, 2, 2, 2), 2, ((1, 0), (0, 2)), 2),
    Case((2, 2, 7, 6), (3, 3, 2, 2), 2, "same", 1, "channels_first"),
]

tensorflow_and_more = pytest.mark.parametrize("case", TENSORFLOW + MORE, ids=str)
few = pytest.mark.parametrize("case", FEW, ids=str)
two = pytest.mark.parametrize("case", FEW[3:], ids=str)


def value_and_gradients(x, kernel, g, **options):
    """y, and the gradients of sum(g * y) with respect to x and kernel, compiled as one.

    Compiling is nearly all of the time of this suite, and integers stay exact however XLA optimises
    them; the tests of single transformations compile as users do.
    """

    def run(x, kernel, g):
        y, vjp = jax.vjp(lambda x, kernel: depthwise_conv2d(x, kernel, **options), x, kernel)
        return y, *vjp(g)

    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(run, compiler_options=quickly)(x, kernel, g)


# Values


@tensorflow_and_more
def test_forward_and_gradients_are_those_of_the_definition(case):
    x, kernel, g = case.arrays()
    y, *gradients = value_and_gradients(x, kernel, g, **case.options)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, oracle.forward(x, kernel, **case.options))
    for ours, theirs in zip(gradients, oracle.vjp(x, kernel, g, **case.options), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@few
def test_op_by_op(case):
    """Without jit; every other test of values compiles, for speed."""
    x, kernel, g = case.arrays()
    y, vjp = jax.vjp(lambda x, kernel: depthwise_conv2d(x, kernel, **case.options), x, kernel)
    np.testing.assert_array_equal(y, oracle.forward(x, kernel, **case.options))
    for ours, theirs in zip(vjp(g), oracle.vjp(x, kernel, g, **case.options), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@few
def test_random_normals_in_float32(case):
    x, kernel = oracle.normals(0, *case.x), oracle.normals(1, *case.kernel)
    expected = oracle.forward(x, kernel, **case.options)
    y = depthwise_conv2d(x, kernel, **case.options)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@few
def test_random_normals_in_float64(case, x64):
    x, kernel = (oracle.normals(i, *s, dtype=np.float64) for i, s in enumerate(case[:2]))
    y = depthwise_conv2d(x, kernel, **case.options)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, oracle.forward(x, kernel, **case.options), rtol=1e-12, atol=1e-12)


def test_a_case_by_hand():
    """2x3 image, two channels, two filters each: the numbers of TensorFlow's own hand-made test."""
    x = np.arange(1, 13, dtype=np.float32).reshape(1, 2, 3, 2)
    kernel = np.arange(1, 17, dtype=np.float32).reshape(2, 2, 2, 2)
    y = depthwise_conv2d(x, kernel)
    np.testing.assert_array_equal(y.ravel(), [196, 216, 272, 296, 252, 280, 344, 376])


def test_same_pads_one_more_at_the_end():
    x, kernel = np.arange(1, 5, dtype=np.float32).reshape(1, 1, 4, 1), np.ones((1, 2, 1, 1), "f4")
    y = depthwise_conv2d(x, kernel, padding="same")
    np.testing.assert_array_equal(y.ravel(), [3, 5, 7, 4])


def test_filters_are_not_flipped_and_channels_do_not_mix():
    x = np.zeros((1, 3, 3, 2), "f4")
    x[0, 1, 1] = [1, 100]
    kernel = np.arange(1, 19, dtype=np.float32).reshape(3, 3, 2, 1)
    y = depthwise_conv2d(x, kernel, padding="same")
    np.testing.assert_array_equal(y[0, ..., 0], kernel[::-1, ::-1, 0, 0])
    np.testing.assert_array_equal(y[0, ..., 1], 100 * kernel[::-1, ::-1, 1, 0])


FORMS = [
    (dict(strides=(2, 2)), dict(strides=2)),
    (dict(strides=[2, 1]), dict(strides=(2, 1))),
    (dict(strides=np.int64(2)), dict(strides=2)),
    (dict(strides=(np.int32(2), 1)), dict(strides=(2, 1))),
    (dict(dilation_rate=[2, 2]), dict(dilation_rate=2)),
    (dict(dilation_rate=np.uint8(2)), dict(dilation_rate=2)),
    (dict(padding="SAME"), dict(padding="same")),
    (dict(padding="Valid"), dict(padding="valid")),
    (dict(padding=1), dict(padding=((1, 1), (1, 1)))),
    (dict(padding=np.int64(1)), dict(padding=1)),
    (dict(padding=[[0, 1], [2, 0]]), dict(padding=((0, 1), (2, 0)))),
    (dict(data_format="CHANNELS_LAST"), {}),
    (dict(precision="highest"), dict(precision=jax.lax.Precision.HIGHEST)),
    (dict(preferred_element_type=jnp.float32), {}),
]


@pytest.mark.parametrize("form, canonical", FORMS, ids=str)
def test_forms_of_an_argument_that_mean_the_same(form, canonical):
    x, kernel, _ = Case((2, 7, 6, 3), (3, 2, 3, 2)).arrays()
    y = depthwise_conv2d(x, kernel, **form)
    np.testing.assert_array_equal(y, depthwise_conv2d(x, kernel, **canonical))
    options = {k: v for k, v in canonical.items() if k != "precision"}
    np.testing.assert_array_equal(y, oracle.forward(x, kernel, **options))


def test_defaults_are_kerass():
    x, kernel, _ = Case((2, 7, 6, 3), (3, 2, 3, 2)).arrays()
    np.testing.assert_array_equal(depthwise_conv2d(x, kernel), oracle.forward(x, kernel))


def test_layer_and_function_are_one_package():
    assert flax_dwconv.depthwise_conv2d is depthwise_conv2d


# Dtypes


DTYPES = ["float16", "bfloat16", "float32", "int8", "int16", "int32", "uint8", "complex64"]


@pytest.mark.parametrize("dtype", DTYPES)
@two
def test_dtype_of_the_result_is_that_of_the_input(case, dtype):
    x, kernel = (np.abs(a) for a in case.arrays(limit=2)[:2])  # |y| <= 4 taps * 9 fits all
    if dtype == "complex64":
        x, kernel = x + 2j * x[..., ::-1], kernel - 1j * kernel[::-1]
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    y = depthwise_conv2d(x, kernel, **case.options)
    assert y.dtype == dtype
    expected = oracle.forward(x, kernel, **case.options)
    np.testing.assert_array_equal(np.asarray(y).astype(expected.dtype), expected)


@pytest.mark.parametrize("dtype", ["int64", "float64", "complex128"])
def test_64_bits(dtype, x64):
    case = FEW[0]
    x, kernel, _ = case.arrays(dtype=dtype)
    y = depthwise_conv2d(x, kernel, **case.options)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, oracle.forward(x, kernel, **case.options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
@two
def test_gradients_keep_the_dtype(case, dtype):
    x, kernel, g = case.arrays(limit=1)  # every sum is below 256, exact in bfloat16
    if dtype == "complex64":
        x, kernel, g = x + 1j * x[..., ::-1], kernel - 2j, g * 1j
    x, kernel, g = (jnp.asarray(a, dtype) for a in (x, kernel, g))
    _, *gradients = value_and_gradients(x, kernel, g, **case.options)
    for ours, theirs in zip(gradients, oracle.vjp(x, kernel, g, **case.options), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours).astype(theirs.dtype), theirs)


@pytest.mark.parametrize(
    "dtype, wide", [("int8", "int32"), ("float16", "float32"), ("bfloat16", "float32")]
)
def test_preferred_element_type_is_the_dtype_of_sum_and_result(dtype, wide):
    """100 * 100 * 9 fits neither int8 nor float16, and bfloat16 would round it."""
    x, kernel = (np.full(s, 100, np.float32) for s in [(1, 5, 5, 2), (3, 3, 2, 1)])
    y = depthwise_conv2d(
        jnp.asarray(x, dtype), jnp.asarray(kernel, dtype), preferred_element_type=wide
    )
    assert y.dtype == wide
    np.testing.assert_array_equal(y, np.full((1, 3, 3, 2), 90_000))


# Transformations


@few
def test_jit_traces_once(case):
    x, kernel, _ = case.arrays()
    traces = []

    @functools.partial(jax.jit, static_argnames=list(case.options))
    def f(x, kernel, **options):
        traces.append(options)
        return depthwise_conv2d(x, kernel, **options)

    for image in (x, 2 * x):
        y = f(image, kernel, **case.options)
        np.testing.assert_array_equal(y, oracle.forward(image, kernel, **case.options))
    assert len(traces) == 1


@few
def test_jvp_is_the_product_rule(case):
    x, kernel, _ = case.arrays()
    dx, dk = oracle.integers(3, *case.x), oracle.integers(4, *case.kernel)
    f = functools.partial(depthwise_conv2d, **case.options)
    y, dy = jax.jit(lambda *args: jax.jvp(f, args[:2], args[2:]))(x, kernel, dx, dk)
    np.testing.assert_array_equal(y, oracle.forward(x, kernel, **case.options))
    np.testing.assert_array_equal(
        dy, oracle.forward(dx, kernel, **case.options) + oracle.forward(x, dk, **case.options)
    )


@pytest.mark.parametrize("mode", ["fwd", "rev"])
@two
def test_derivatives_to_second_order_against_finite_differences(case, mode):
    """The operator is bilinear: in one operand at a time, a step of 1 makes no error at all."""
    x, kernel, _ = case.arrays()
    for f, argument in [
        (lambda x: depthwise_conv2d(x, kernel, **case.options), x),
        (lambda kernel: depthwise_conv2d(x, kernel, **case.options), kernel),
    ]:
        check_grads(jax.jit(f), (argument,), order=2, modes=[mode], eps=1.0, atol=1e-4, rtol=1e-4)


@few
def test_mixed_second_derivatives(case):
    """f(x, k) = <g, x * k> is bilinear: d/dx <v, df/dk> = df/dx at k = v, and the mirror image."""
    x, kernel, g = case.arrays()
    u, v = oracle.integers(5, *case.x), oracle.integers(6, *case.kernel)

    def f(x, kernel):
        return jnp.sum(g * depthwise_conv2d(x, kernel, **case.options))

    def reverse_over_reverse(x):
        return jax.grad(lambda x: jnp.sum(v * jax.grad(f, 1)(x, kernel)))(x)

    def forward_over_reverse(x):
        return jax.jvp(lambda x: jax.grad(f, 1)(x, kernel), (x,), (u,))[1]

    by_x, by_kernel = jax.jit(lambda x: (reverse_over_reverse(x), forward_over_reverse(x)))(x)
    np.testing.assert_array_equal(by_x, oracle.vjp(x, v, g, **case.options)[0])
    np.testing.assert_array_equal(by_kernel, oracle.vjp(u, kernel, g, **case.options)[1])


def test_hessian_of_a_quadratic():
    case = Case((1, 3, 3, 1), (2, 2, 1, 2))
    x, kernel, _ = case.arrays()
    hessian = jax.jit(jax.hessian(lambda k: jnp.sum(depthwise_conv2d(x, k) ** 2)))(kernel)
    columns = [oracle.forward(x, e.reshape(kernel.shape)).ravel() for e in np.eye(8)]
    np.testing.assert_array_equal(
        hessian.reshape(8, 8), 2 * np.array(columns) @ np.array(columns).T
    )


@few
def test_remat_and_scan(case):
    x, kernel, g = case.arrays()
    xs = np.stack([x, 2 * x, 3 * x])

    def loss(xs, kernel):
        conv = jax.checkpoint(lambda x: depthwise_conv2d(x, kernel, **case.options))
        return jax.lax.scan(lambda total, x: (total + jnp.sum(g * conv(x)), None), 0.0, xs)[0]

    dxs, dk = jax.jit(jax.grad(loss, (0, 1)))(xs, kernel)
    dx_expected, dk_expected = oracle.vjp(x, kernel, g, **case.options)
    np.testing.assert_array_equal(dxs, np.stack([dx_expected] * 3))
    np.testing.assert_array_equal(dk, 6 * dk_expected)


# vmap, against a loop


AXES = [(0, None), (None, 0), (0, 0), (-1, None), (None, -1), (1, 2), (-1, 4)]


def batched(array, axis, size=3):
    """`size` different arrays stacked along `axis`, or the one array for None."""
    if axis is None:
        return array, [array] * size
    several = [array + i for i in range(size)]
    return np.stack(several, axis), several


@pytest.mark.parametrize("in_axes", AXES, ids=str)
@two
def test_vmap_is_a_loop(case, in_axes):
    x, kernel, _ = case.arrays()
    (xs, each_x), (ks, each_k) = batched(x, in_axes[0]), batched(kernel, in_axes[1])
    f = jax.vmap(lambda x, kernel: depthwise_conv2d(x, kernel, **case.options), in_axes)
    expected = [oracle.forward(a, b, **case.options) for a, b in zip(each_x, each_k, strict=True)]
    np.testing.assert_array_equal(jax.jit(f)(xs, ks), np.stack(expected))


@few
def test_nested_vmap_is_two_loops(case):
    """Every image with every kernel."""
    x, kernel, _ = case.arrays()
    (xs, each_x), (ks, each_k) = batched(x, 0, 2), batched(kernel, 0, 3)
    f = jax.vmap(lambda x, kernel: depthwise_conv2d(x, kernel, **case.options), (None, 0))
    y = jax.jit(jax.vmap(f, (0, None)))(xs, ks)
    for (i, a), (j, b) in itertools.product(enumerate(each_x), enumerate(each_k)):
        np.testing.assert_array_equal(y[i, j], oracle.forward(a, b, **case.options))


@pytest.mark.parametrize("in_axes", [(0, None), (None, 0), (0, 0)], ids=str)
@two
def test_vmap_of_gradients_is_a_loop(case, in_axes):
    x, kernel, g = case.arrays()
    (xs, each_x), (ks, each_k) = batched(x, in_axes[0]), batched(kernel, in_axes[1])

    def loss(x, kernel):
        return jnp.sum(g * depthwise_conv2d(x, kernel, **case.options))

    dxs, dks = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), in_axes))(xs, ks)
    for i, (a, b) in enumerate(zip(each_x, each_k, strict=True)):
        dx, dk = oracle.vjp(a, b, g, **case.options)
        np.testing.assert_array_equal(dxs[i], dx)
        np.testing.assert_array_equal(dks[i], dk)


@pytest.mark.parametrize("size", [0, 1])
def test_vmap_over_none_and_one(size):
    x, kernel, _ = Case((size, 2, 6, 5, 3), (3, 2, 3, 2)).arrays()
    y = jax.vmap(depthwise_conv2d, (0, None))(x, kernel)
    np.testing.assert_array_equal(y, oracle.forward(x, kernel))


# What is traced


@pytest.mark.parametrize("padding", ["valid", "same", ((1, 0), (0, 2))], ids=str)
@pytest.mark.parametrize("strides", [1, 2])
def test_export_with_symbolic_batch_height_and_width(padding, strides):
    """One artifact for all sizes; every size check must leave symbolic dimensions alone."""
    n, h, w = export.symbolic_shape("n, h, w", constraints=["h >= 3", "w >= 3"])
    options = dict(strides=strides, padding=padding)
    _, kernel, _ = Case((1, 3, 3, 2), (3, 2, 2, 2)).arrays()
    exported = export.export(jax.jit(lambda x: depthwise_conv2d(x, kernel, **options)))(
        jax.ShapeDtypeStruct((n, h, w, 2), np.float32)
    )
    loaded = export.deserialize(exported.serialize())
    for shape in [(1, 3, 3, 2), (2, 7, 6, 2), (3, 4, 9, 2)]:
        x = oracle.integers(0, *shape)
        np.testing.assert_array_equal(loaded.call(x), oracle.forward(x, kernel, **options))


def test_export_with_symbolic_leading_axes():
    a, b = export.symbolic_shape("a, b")
    _, kernel, _ = FEW[0].arrays()
    exported = export.export(jax.jit(lambda x: depthwise_conv2d(x, kernel)))(
        jax.ShapeDtypeStruct((a, b, 5, 5, 3), np.float32)
    )
    x = oracle.integers(0, 2, 3, 5, 5, 3)
    np.testing.assert_array_equal(exported.call(x), oracle.forward(x, kernel))


@pytest.mark.parametrize("method", ["auto", "lax"])
@few
def test_jaxpr_is_one_plain_convolution(case, method):
    x, kernel, _ = case.arrays()
    jaxpr = jax.make_jaxpr(
        lambda x, kernel: depthwise_conv2d(x, kernel, **case.options, method=method)
    )(x, kernel)
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert names.count("conv_general_dilated") == 1
    assert set(names) <= {"conv_general_dilated", "reshape"}
    (eqn,) = (e for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated")
    assert eqn.params["feature_group_count"] == case.kernel[2]


@tensorflow_and_more
def test_shape_without_computing(case):
    x, kernel = (jax.ShapeDtypeStruct(s, np.float32) for s in (case.x, case.kernel))
    y = jax.eval_shape(lambda x, kernel: depthwise_conv2d(x, kernel, **case.options), x, kernel)
    assert y.shape == case.arrays()[2].shape
    assert y.dtype == np.float32


@few
def test_method_lax_is_method_auto(case):
    lax, auto = (
        value_and_gradients(*case.arrays(), **case.options, method=m) for m in ("lax", "auto")
    )
    jax.tree.map(np.testing.assert_array_equal, lax, auto)


def foreign(x, kernel, *, padding):
    """The convolution as code writes it that knows nothing of this package."""
    rank = kernel.ndim - 2
    space = "DHW"[:rank]
    return jax.lax.conv_general_dilated(
        x,
        kernel.reshape(*kernel.shape[:rank], 1, -1),
        (1,) * rank,
        padding,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=x.shape[-1],
    )


PADDED = {
    **{
        method: functools.partial(flax_dwconv.depthwise_conv, method=method)
        for method in ("auto", "lax", "taps")
    },
    "accelerate": flax_dwconv.accelerate(foreign),
}


@pytest.mark.parametrize(
    ("rows", "pads"),
    [(6, (-1, 1)), (6, (-2, 2)), (7, (-3, 3)), (7, (-2, 1)), (6, (1, -1)), (6, (2, -2))],
)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("conv", PADDED.values(), ids=list(PADDED))
def test_pads_that_crop_and_add(conv, rank, rows, pads):
    """XLA:CPU of jax 0.10.2 is wrong for the first four, in 2-D and in kernel gradients."""
    for axis in range(rank):
        space, padding = [5] * rank, [(0, 0)] * rank
        space[axis], padding[axis] = rows, pads
        case = Case((2, *space, 3), (*[3] * rank, 3, 1), padding=tuple(padding))
        x, kernel, g = case.arrays()
        y, vjp = jax.vjp(functools.partial(conv, padding=case.padding), x, kernel)
        np.testing.assert_array_equal(y, oracle.forward(x, kernel, padding=case.padding))
        right = oracle.vjp(x, kernel, g, padding=case.padding)
        jax.tree.map(np.testing.assert_array_equal, vjp(g), right)
