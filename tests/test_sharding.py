"""More than one device: the values of one device, and what the devices exchange.

Eight virtual devices live in a process of their own, since a process keeps the number of devices
that it started with. It runs the functions of this file that no test prefix marks; what is right is
decided here. Two more processes train together over `jax.distributed`. Operands are small integers
in floating point: every order of summation gives the same bits.
"""

import collections
import functools
import multiprocessing
import os
import re
import socket
import warnings
from concurrent.futures import ProcessPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_dwconv import (
    DepthwiseConv2D,
    accelerate,
    collect_constraints,
    constrain,
    depthwise_conv2d,
    total_loss,
)

TIMEOUT = 300  # seconds, for a process that hangs


def strict():
    """What conftest and the settings of pytest do for this process."""
    warnings.simplefilter("error")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def processes(number, devices):
    """Returns a pool of fresh processes, each with so many virtual devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", flags)
        # XLA reads here how many threads it starts; the default is one for each device or core. An
        # exchange between devices holds a thread until all have come to it. A device that waits in
        # two exchanges at once takes the thread that another needs, and all wait for ever.
        patch.setenv("NPROC", str(4 * devices))
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(number, spawn, strict)
        # The processes start here, with the flags of now.
        for future in [pool.submit(os.getpid) for _ in range(number)]:
            future.result(TIMEOUT)
    return pool


@pytest.fixture(scope="module")
def eight():
    """Calls a function in a process with eight devices."""
    with processes(1, devices=8) as pool:
        yield lambda f, *args: pool.submit(f, *args).result(TIMEOUT)


# kernel size, strides, multiplier, image shape
CASES = {
    "3x3": (3, 1, 1, (16, 16, 16)),
    "3x3 stride 2": (3, 2, 1, (16, 32, 16)),
    "5x5 multiplier 2": (5, 1, 2, (16, 16, 16)),
    "11x11": (11, 1, 1, (16, 16, 16)),
    "11x11 stride 2": (11, 2, 1, (32, 32, 16)),
    # Two channels for each device: one alone is not a depthwise convolution any more.
    # Large enough to be taken one by one where they are on one device.
    "3x3 on large images": (3, 1, 1, (64, 64, 32)),
    "7x7 on large images": (7, 1, 1, (64, 64, 32)),
}
ALL = ("data", "model")
# Shardings of images and kernels on a mesh of 2 x 4.
LAYOUTS = {
    "batch": (P(ALL), P()),
    "channels": (P(None, None, None, ALL), P(None, None, ALL)),
    "batch and channels": (P("data", None, None, "model"), P(None, None, "model")),
    "height": (P(None, ALL), P()),
    "width": (P(None, None, ALL), P()),
    "height and width": (P(None, "data", "model"), P()),
}
LOCAL = ["batch", "channels", "batch and channels"]
SPATIAL = ["height", "width", "height and width"]

# Of a compiled function: {collective: how often}, whether a convolution is left, the values, and
# what the first device has of each.
Report = collections.namedtuple("Report", "collectives convolves values shards")


def operands(case):
    """x, kernel and cotangent of a convolution with "same" pads."""
    k, strides, m, (h, w, c) = CASES[case]
    x, kernel = oracle.integers(0, 8, h, w, c), oracle.integers(1, k, k, c, m)
    return x, kernel, oracle.integers(2, 8, -(-h // strides), -(-w // strides), c * m)


def forward(case, method="auto"):
    """The convolution, as a function of x and kernel."""
    return functools.partial(
        depthwise_conv2d, strides=CASES[case][1], padding="same", method=method
    )


def with_gradients(f):
    """Returns a function of x, kernel and cotangent: the result and both gradients."""

    def value_and_gradients(x, kernel, g):
        y, vjp = jax.vjp(f, x, kernel)
        return y, *vjp(g)

    return value_and_gradients


def report(f, *args):
    """Compiles and runs `f`."""
    compiled = jax.jit(f).lower(*args).compile()
    text, values = compiled.as_text(), jax.tree.leaves(compiled(*args))
    collective = r" (all-[a-z-]+?|collective-[a-z-]+?|reduce-scatter|ragged-[a-z-]+?)(?:-start)?\("
    return Report(
        dict(collections.Counter(re.findall(collective, text))),
        " convolution(" in text,
        [np.asarray(value) for value in values],
        [value.addressable_shards[0].data.shape for value in values],
    )


def on_mesh(case, layout, method="auto", axis_type=AxisType.Auto, gradients=True):
    """The report of a convolution of sharded arrays under jit."""
    mesh = jax.make_mesh((2, 4), ALL, axis_types=(axis_type,) * 2)
    image, weights = (NamedSharding(mesh, spec) for spec in LAYOUTS[layout])
    x, kernel, g = map(jax.device_put, operands(case), (image, weights, image))
    f = forward(case, method)
    with jax.set_mesh(mesh):
        return report(with_gradients(f), x, kernel, g) if gradients else report(f, x, kernel)


def in_shard_map(case, layout, gradients_inside):
    """The report of a convolution that is a `shard_map` with its checks on."""
    image, weights = LAYOUTS[layout]
    mesh = jax.make_mesh((2, 4), ALL, axis_types=(AxisType.Auto,) * 2)
    shard_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=True)
    if gradients_inside:
        f = shard_map(
            with_gradients(forward(case)),
            in_specs=(image, weights, image),
            out_specs=(image, image, weights),
        )
    else:
        f = with_gradients(
            shard_map(forward(case), in_specs=(image, weights), out_specs=image)
        )  # fmt: skip
    return report(f, *operands(case))


@functools.cache
def expected(case):
    """The values on one device, of XLA's convolution."""
    return jax.jit(with_gradients(forward(case, "lax")))(*operands(case))


def check(found, case, layout):
    """Values, shardings; and all images share the kernel, whose gradient is a sum over devices:
    that one all-reduce is all there is."""
    for value, right in zip(found.values, expected(case), strict=True):
        np.testing.assert_array_equal(value, right)
    image, weights = LAYOUTS[layout]
    parts = {"data": 2, "model": 4, ALL: 8, None: 1}
    for value, shard, spec in zip(found.values, found.shards, (image, image, weights), strict=True):
        divided = [parts[axes] for axes in [*spec, *[None] * 4][:4]]
        assert [n * d for n, d in zip(shard, divided, strict=True)] == list(value.shape)
    assert found.collectives == ({} if layout == "channels" else {"all-reduce": 1})
    assert not found.convolves


@pytest.mark.parametrize("case", CASES)
def test_batch_and_channels(case, eight):
    check(eight(on_mesh, case, "batch and channels"), case, "batch and channels")


@pytest.mark.parametrize("layout", ["batch", "channels"])
def test_batch_or_channels(layout, eight):
    check(eight(on_mesh, "3x3", layout), "3x3", layout)


@pytest.mark.parametrize("gradients_inside", [False, True])
@pytest.mark.parametrize(
    ("case", "layout"),
    [*(("3x3", layout) for layout in LOCAL),
     *((case, "batch and channels") for case in ("11x11", "5x5 multiplier 2"))],
)  # fmt: skip
def test_shard_map_with_checks(case, layout, gradients_inside, eight):
    check(eight(in_shard_map, case, layout, gradients_inside), case, layout)


@pytest.mark.parametrize("case", ["3x3", "11x11", "5x5 multiplier 2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_explicit_axes(layout, case, eight):
    """They are those of the mesh that `jax.make_mesh` makes by default."""
    found = eight(on_mesh, case, layout, "auto", AxisType.Explicit)
    if layout in LOCAL:
        check(found, case, layout)
    jax.tree.map(np.testing.assert_array_equal, found.values, list(expected(case)))


def pointwise_on_mesh():
    """Values and collectives of a 1x1 convolution and its gradients, of which each device has a
    part of the batch."""

    def f(x, kernel):
        spec = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=spec)

    def with_gradients(x, kernel, g):
        return f(x, kernel), *jax.vjp(f, x, kernel)[1](g)

    args = [oracle.integers(i, *shape) for i, shape in
            enumerate([(8, 3, 4, 6), (1, 1, 6, 5), (8, 3, 4, 5)])]  # fmt: skip
    batch = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P("data"))
    placed = [jax.device_put(args[0], batch), args[1], jax.device_put(args[2], batch)]
    compiled = jax.jit(accelerate(with_gradients, pointwise=True)).lower(*placed).compile()
    text = compiled.as_text()
    found = re.findall(r" (all-\w+|collective-\w+|convolution)(?:-start)?\(", text)
    return jax.device_get(compiled(*placed)), jax.device_get(with_gradients(*args)), found


def test_pointwise_needs_one_sum_over_devices(eight):
    """That of the kernel gradient; and there is no convolution left."""
    values, expected_, found = eight(pointwise_on_mesh)
    jax.tree.map(np.testing.assert_array_equal, values, expected_)
    assert found == ["all-reduce"]


# What devices exchange when they share an image, in the result, and in it with both gradients: not
# more than this. It is right, and slow: each tap asks the neighbours for what it reads of theirs.
HALOS = {
    ("3x3", "height"): (16, 109),
    ("3x3 stride 2", "width"): (33, 168),
    ("11x11", "height"): (5, 14),
    ("11x11 stride 2", "height"): (6, 357),
}


@pytest.mark.parametrize(("case", "layout"), HALOS)
def test_height_and_width(case, layout, eight):
    for gradients, most in zip([False, True], HALOS[case, layout], strict=True):
        found = eight(on_mesh, case, layout, "auto", AxisType.Auto, gradients)
        for value, right in zip(found.values, expected(case), strict=False):
            np.testing.assert_array_equal(value, right)
        found.collectives.pop("all-reduce", None)  # of the kernel gradient
        assert 0 < sum(found.collectives.values()) <= most, found.collectives


# Two processes


class Model(nn.Module):
    """The layer with every kind of penalty and a constraint, and a dense one."""

    @nn.compact
    def __call__(self, x):
        x = DepthwiseConv2D(
            3,
            strides=2,
            depth_multiplier=2,
            activation="relu",
            depthwise_regularizer="l2",
            bias_regularizer="l1",
            activity_regularizer="l2",
            depthwise_constraint="max_norm",
        )(x)
        return nn.Dense(2)(x)


def step_of_training():
    """Returns a jitted step of SGD `(params, x, target) -> (params, loss)`, and its operands."""
    x, target = oracle.normals(0, 4, 9, 9, 3), oracle.normals(1, 4, 4, 4, 2)
    model = Model()
    params = jax.jit(model.init)(jax.random.key(0), x[:1])["params"]
    tx = optax.chain(optax.sgd(0.1), constrain(collect_constraints(model, x[:1])))

    @jax.jit
    def step(params, x, target):
        def loss(params):
            y, state = model.apply({"params": params}, x, mutable=["losses"])
            return jnp.mean((y - target) ** 2) + total_loss(state["losses"])

        value, gradients = jax.value_and_grad(loss)(params)
        updates, _ = tx.update(gradients, tx.init(params), params)
        return optax.apply_updates(params, updates), value

    return step, params, x, target


def train_together(address, process):
    """Trains one step in this process and another one, each with half of the batch."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    step, params, *batch = step_of_training()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    half = slice(2 * process, 2 * process + 2)
    x, target = (
        multihost_utils.host_local_array_to_global_array(array[half], mesh, P("data"))
        for array in batch
    )
    params = multihost_utils.host_local_array_to_global_array(params, mesh, P())
    compiled = step.lower(params, x, target).compile()
    trained = jax.tree.map(np.asarray, compiled(params, x, target))
    seen = (jax.process_count(), len(jax.local_devices()), x.shape, x.is_fully_addressable)
    text = compiled.as_text()
    jax.distributed.shutdown()
    return trained, seen, "all-reduce" in text, " convolution(" in text


def test_two_processes_train_as_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    with processes(2, devices=1) as pool:
        runs = list(pool.map(functools.partial(train_together, address), [0, 1], timeout=TIMEOUT))
    step, *args = step_of_training()
    alone = step(*args)
    for trained, seen, reduced, convolved in runs:
        assert seen == (2, 1, (4, 9, 9, 3), False) and reduced and not convolved
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), trained, alone
        )
    jax.tree.map(np.testing.assert_array_equal, runs[0][0], runs[1][0])
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-3, args[0], alone[0])
    assert all(jax.tree.leaves(moved)), "a step that moves nothing proves nothing"


def bias_gradients(dtype):
    """Of the sum of 25,088 results: with a sharded batch, and in a `shard_map` over the batch."""
    layer = DepthwiseConv2D(1, dtype=dtype, param_dtype=dtype)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones((8, 56, 56, 2), dtype), NamedSharding(mesh, P("data")))
    params = layer.init(jax.random.key(0), x[:1])["params"]

    def loss(params, x):
        return layer.apply({"params": params}, x).astype(jnp.float32).sum()

    def local(params, x):
        return jax.lax.psum(loss(params, x), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    gradients = [jax.jit(jax.grad(f))(params, x) for f in (loss, mapped)]
    return [np.asarray(g["bias"], np.float32) for g in gradients]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bias_gradients_are_summed_in_float32(dtype, eight):
    for gradient in eight(bias_gradients, dtype):
        np.testing.assert_array_equal(gradient, np.full(2, 25_088, "f4"))
