"""CPU, GPU and TPU without a device: what each is given, that it compiles, one artifact for all.

GPU and TPU keep XLA's own convolution, but for `method="taps"`. Compilation for them needs their
compiler but no device, and runs in a process of its own, as the compilers read the environment when
they are loaded.
"""

import functools
import importlib.util
import multiprocessing
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental import topologies

from flax_dwconv import DepthwiseConv2D, accelerate, depthwise_conv2d, total_loss

PLATFORMS = ["cpu", "cuda", "tpu"]
# kernel size, multiplier, arguments; images are 9 x 8 with 3 channels
CASES = {
    "3x3": (3, 2, dict(padding="same")),
    "3x3 stride 2": (3, 1, dict(strides=2)),
    "dilated": (3, 1, dict(padding=2, dilation_rate=2)),
    "7x7": (7, 1, dict(padding="same")),
}
LARGE = {"9x10": ((9, 10), 1, dict(padding="same"))}  # more than 64 taps are a loop


def operands(case, batch=2, h=9, w=8, c=3):
    k, m, _ = (CASES | LARGE)[case]
    kh, kw = k if isinstance(k, tuple) else (k, k)
    return oracle.integers(0, batch, h, w, c), oracle.integers(1, kh, kw, c, m)


def forward(case, method="auto"):
    return functools.partial(depthwise_conv2d, method=method, **(CASES | LARGE)[case][2])


def gradients(case, method="auto"):
    """Both gradients of a sum that weighs every result differently."""

    def loss(x, kernel):
        y = forward(case, method)(x, kernel)
        return (y * (jnp.arange(y.size, dtype=y.dtype) % 7).reshape(y.shape)).sum()

    return jax.grad(loss, (0, 1))


def lowered(f, platform, *args):
    """The StableHLO for a platform, without the names of functions and our tag, which is inert."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return re.sub(r' ?mhlo\.frontend_attributes = \{flax_dwconv = "\w+"\},?|jit_\w+', "", text)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("case", CASES)
def test_gpu_and_tpu_are_given_one_convolution(case, platform):
    """The very program that they are given without this package."""
    for make, convolutions in ((forward, 1), (gradients, 2)):
        text = lowered(make(case), platform, *operands(case))
        assert text.count("stablehlo.convolution") == convolutions
        assert "flax_dwconv" not in text
        assert text.replace("{}", "").split() == (
            lowered(make(case, "lax"), platform, *operands(case)).replace("{}", "").split()
        )


@pytest.mark.parametrize("platform", ["cpu", "cuda", "rocm", "tpu"])
@pytest.mark.parametrize("case", [*CASES, *LARGE])
def test_taps_everywhere_if_asked_for(case, platform):
    """Forward and gradients, whose program for that platform gives the right bits on this one."""
    run = jax.export.export(
        jax.jit(lambda x, k: (forward(case, "taps")(x, k), gradients(case, "taps")(x, k))),
        platforms=[platform],
        disabled_checks=[jax.export.DisabledSafetyCheck.platform()],
    )(*operands(case))
    assert "stablehlo.convolution" not in run.mlir_module()
    expected = forward(case, "lax")(*operands(case)), gradients(case, "lax")(*operands(case))
    jax.tree.map(np.testing.assert_array_equal, run.call(*operands(case)), expected)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
@pytest.mark.parametrize("make", [forward, gradients])
def test_taps_elsewhere_hold_nothing_that_is_meant_for_xla_on_cpu(make, platform):
    (case,) = LARGE
    tricks = "inlineable", "reduce_precision", "stablehlo.sort", "stablehlo.maximum"
    here = lowered(make(case, "taps"), "cpu", *operands(case))
    there = lowered(make(case, "taps"), platform, *operands(case))
    assert [trick for trick in tricks if trick not in here] == []
    assert [trick for trick in tricks if trick in there] == []


def test_taps_of_one_channel_and_of_any_derivative(platform="tpu"):
    """With one channel, a convolution has no groups that would tell what it is."""
    args = operands("3x3", c=1)

    def step(x, k):
        y, vjp = jax.vjp(forward("3x3", "taps"), x, k)
        hvp = jax.jvp(gradients("3x3", "taps"), (x, k), (x, k))
        return vjp(y), hvp, jax.vmap(forward("3x3", "taps"), (None, 0))(x, k[None])

    assert "stablehlo.convolution" not in lowered(step, platform, *args)
    assert "stablehlo.convolution" in lowered(forward("3x3", "auto"), "cpu", *args)


def test_accelerate_and_taps_do_not_mix():
    """Inside `accelerate` each method stays what it is."""
    for platform, method, taps in [
        ("cpu", "auto", True), ("cpu", "lax", False), ("tpu", "auto", False),
        ("tpu", "lax", False), ("tpu", "taps", True),
    ]:  # fmt: skip
        text = lowered(accelerate(gradients("3x3", method)), platform, *operands("3x3"))
        assert ("stablehlo.convolution" not in text) == taps


def test_as_many_branches_as_without_this_package():
    """One for each platform with a rule of its own and one for the others, in every method."""

    def branches(method):
        exported = jax.export.export(
            jax.jit(forward("3x3", method)), platforms=["cpu", "cuda", "rocm", "tpu"]
        )
        return re.findall(r"stablehlo.case|^ *}, {", exported(*operands("3x3")).mlir_module(), re.M)

    assert len(branches("taps")) == len(branches("auto")) == len(branches("lax")) > 0


# Compilation

TPU = dict(
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_LOG_DIR="disabled",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    XLA_FLAGS="",
)
# An H100, from its data sheet.
GPU = """
platform_name: "CUDA"
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84978434048
  l2_cache_size: 52428800
  cuda_compute_capability { major: 9 minor: 0 }
}
"""


def topology(platform):
    if platform == "tpu":
        return topologies.get_topology_desc("v5e:2x2", platform="tpu")
    return topologies.get_topology_desc(platform="cuda", target_config=GPU, topology="1x1x1")


def compiled(platform, make):
    """The HLO that the platform's compiler makes of a 3x3 convolution, and its temporary bytes."""
    sharding = jax.sharding.SingleDeviceSharding(topology(platform).devices[0])
    specs = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        for a in operands("3x3", 8, 28, 28, 128)
    ]
    executable = jax.jit(make("3x3")).lower(*specs).compile()
    return executable.as_text(), executable.memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def compiler():
    """Calls `compiled` in a process with the environment that the compilers need."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TPU.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda *args: pool.submit(compiled, *args).result(timeout=300)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: jax[tpu]")
def test_tpu_compiles_a_depthwise_emitter(compiler):
    text, temporary = compiler("tpu", forward)
    assert "EmitDepthwise" in text and text.count(" convolution(") == 1
    assert temporary == 0
    text, _ = compiler("tpu", gradients)
    assert text.count(" convolution(") == 2


def cuda_compiler():
    """Whether there is JAX's plugin for CUDA, with NVIDIA's assembler."""
    plugins = [f"jax_plugins.xla_cuda{version}" for version in (12, 13)]
    return importlib.util.find_spec("jax_plugins") and any(map(importlib.util.find_spec, plugins))


@pytest.mark.skipif(not cuda_compiler(), reason="needs jax-cuda12-plugin and jax-cuda12-pjrt")
def test_cuda_compiles_cudnn(compiler):
    for make, calls in ((forward, 1), (gradients, 2)):
        text, _ = compiler("cuda", make)
        assert text.count("__cudnn$conv") == calls


# Export

LOAD = """
import sys
import jax
import numpy as np
with open(sys.argv[1], "rb") as file:
    exported = jax.export.deserialize(bytearray(file.read()))
with np.load(sys.argv[2]) as arrays:
    results = jax.tree.leaves(jax.jit(exported.call)(*arrays.values()))
np.savez(sys.argv[3], *results)
assert "flax_dwconv" not in sys.modules
"""


def export(f, *args, vjp_order=1):
    """The artifact for all platforms, serialized, with that many derivatives."""
    exported = jax.export.export(jax.jit(f), platforms=PLATFORMS)(*args)
    assert exported.mlir_module().count("stablehlo.convolution") > 0  # of cuda and tpu
    return exported.serialize(vjp_order=vjp_order)


def model(x, params):
    layer = DepthwiseConv2D(3, padding="same", activation="relu", activity_regularizer="l2")
    y, state = layer.apply({"params": params}, x, mutable=["losses"])
    return y, total_loss(state["losses"])


def test_one_artifact_runs_in_a_process_without_this_package(tmp_path):
    artifact, inputs, outputs = (tmp_path / n for n in ("artifact", "in.npz", "out.npz"))
    args = operands("3x3")
    artifact.write_bytes(export(lambda x, k: (forward("3x3")(x, k), gradients("3x3")(x, k)), *args))
    np.savez(inputs, *args)
    subprocess.run([sys.executable, "-c", LOAD, artifact, inputs, outputs], check=True)
    expected = [forward("3x3", "lax")(*args), *gradients("3x3", "lax")(*args)]
    with np.load(outputs) as found:
        jax.tree.map(np.testing.assert_array_equal, list(found.values()), expected)


@pytest.mark.parametrize("case", CASES)
def test_artifacts_have_taps_for_cpu_and_derivatives(case):
    args = operands(case)
    exported = jax.export.deserialize(export(forward(case), *args))
    assert exported.platforms == tuple(PLATFORMS)
    run = jax.jit(exported.call).lower(*args).compile()
    assert " convolution(" not in run.as_text()
    y = run(*args)
    np.testing.assert_array_equal(y, forward(case, "lax")(*args))
    expected = jax.vjp(forward(case, "lax"), *args)[1](y)
    jax.tree.map(np.testing.assert_array_equal, jax.vjp(exported.call, *args)[1](y), expected)


@pytest.mark.parametrize("case", CASES)
def test_symbolic_batch_height_and_width(case):
    """XLA's convolution on every platform: taps need to know the sizes."""
    n, h, w = jax.export.symbolic_shape("n, h, w", constraints=["h >= 8", "w >= 8"])
    x, kernel = operands(case)
    spec = jax.ShapeDtypeStruct((n, h, w, 3), x.dtype)
    functions = [forward] if case == "3x3 stride 2" else [forward, gradients]
    for make in functions:
        exported = jax.export.deserialize(export(make(case), spec, kernel, vjp_order=0))
        for shape in [(2, 9, 8), (1, 8, 11)]:
            args = oracle.integers(3, *shape, 3), kernel
            expected = make(case, "lax")(*args)
            jax.tree.map(np.testing.assert_array_equal, exported.call(*args), expected)
    if gradients not in functions:  # with strides, pads of the gradient would be symbolic
        for method in ("auto", "lax"):
            with pytest.raises(ValueError, match="padding argument to conv_general_dilated"):
                export(gradients(case, method), spec, kernel)


def test_a_symbolic_batch_keeps_penalties():
    (n,) = jax.export.symbolic_shape("n")
    layer = DepthwiseConv2D(3, padding="same")
    params = layer.init(jax.random.key(0), jnp.ones((1, 9, 8, 3)))["params"]
    spec = jax.ShapeDtypeStruct((n, 9, 8, 3), jnp.float32)
    exported = jax.export.deserialize(export(model, spec, params))
    x = oracle.normals(0, 4, 9, 8, 3)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        exported.call(x, params),
        model(x, params),
    )
