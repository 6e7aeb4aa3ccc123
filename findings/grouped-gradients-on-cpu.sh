#!/usr/bin/env bash
# The input gradient of a depthwise patch embedding takes XLA:CPU 200 times as long as the layer.
#
# Versions: jax 0.10.2 on a CPU. The same on jax 0.12.0.1.
#
# One expects: a gradient of a convolution takes about as long as the convolution. It has as many
# multiplications.
#
# What happens: with one group for each channel, 16x16 kernels, strides of 16 and 16 filters for each
# channel, the gradient by the image took 335 times as long as the forward convolution (0.12.0.1: 238).
# The patches do not overlap, so the gradient is a matrix product as well. Written as one, it has the
# same values and took half as long as the forward convolution.
#
# For depthwise convolutions: a model that is fast in inference may be unusable in training on a CPU.
# Cut the image into patches and multiply, where the strides are as large as the kernel.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" -I - <<'EOF'
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

print(f"jax {jax.__version__}")
n, side, c, m, k = 2, 96, 3, 16, 16
random = np.random.default_rng(0)
x = jnp.asarray(random.integers(-2, 3, (n, side, side, c)), jnp.float32)
kernel = jnp.asarray(random.integers(-2, 3, (k, k, 1, c * m)), jnp.float32)


@jax.jit
def forward(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (k, k), "VALID", feature_group_count=c,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@jax.jit
def by_the_image(kernel, g):
    return jax.vjp(lambda x: forward(x, kernel), x)[1](g)[0]


@jax.jit
def by_the_image_as_a_product(kernel, g):
    patches = jnp.einsum(
        "nhwcm,abcm->nhawbc",
        g.reshape(n, side // k, side // k, c, m),
        kernel.reshape(k, k, c, m),
    )
    return patches.reshape(n, side, side, c)


def seconds(f, *args):
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return min(times)


g = jnp.sign(forward(x, kernel))
np.testing.assert_array_equal(by_the_image(kernel, g), by_the_image_as_a_product(kernel, g))
first = seconds(forward, x, kernel)
for f in by_the_image, by_the_image_as_a_product:
    print(f"{f.__name__}: {seconds(f, kernel, g) / first:.1f} times the forward convolution")
assert seconds(by_the_image, kernel, g) > 50 * first
assert seconds(by_the_image, kernel, g) > 20 * seconds(by_the_image_as_a_product, kernel, g)
EOF
