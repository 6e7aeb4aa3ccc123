#!/usr/bin/env bash
# Three spellings of relu have three derivatives at 0.
#
# Versions: jax 0.10.2. The same on jax 0.12.0.1.
#
# One expects: `jax.nn.relu(x)`, `jnp.maximum(x, 0)` and `jax.nn.leaky_relu(x, 0.0)` are the same
# function, and train alike.
#
# What happens: at exactly 0 their derivatives are 0, 0.5 and 1. `jax.nn.relu` defines its own; JAX
# shares the derivative of a maximum between equal operands; leaky relu counts 0 as positive.
# Likewise, `jnp.clip(x, 0, 6)` has 0.5 at 0 and at 6, where `jax.nn.relu6` has 0.
#
# For depthwise convolutions: results that are exactly 0 are common. A bias starts as 0, and the
# convolution of zeros is 0: of a black region, or of a channel that the relu before has switched
# off. There, a bias in front of `jnp.maximum` moves, and one in front of `jax.nn.relu` does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'EOF'
import jax
import jax.numpy as jnp
from jax import lax

print(f"jax {jax.__version__}")


def slope(what, f, x):
    value = float(jax.grad(f)(x))
    print(f"{what} at {x}: {value}")
    return value


assert slope("relu", jax.nn.relu, 0.0) == 0
assert slope("maximum", lambda x: jnp.maximum(x, 0), 0.0) == 0.5
assert slope("leaky_relu with slope 0", lambda x: jax.nn.leaky_relu(x, 0.0), 0.0) == 1
for x in (0.0, 6.0):
    assert slope("relu6", jax.nn.relu6, x) == 0
    assert slope("clip", lambda x: jnp.clip(x, 0, 6), x) == 0.5


def bias_gradient(what, activation):
    """Of a depthwise convolution of a black image."""

    def loss(bias):
        x, k = jnp.zeros((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
        spec = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=2
        )
        return activation(y + bias).sum()

    gradient = jax.grad(loss)(jnp.zeros(2)).tolist()
    print(f"bias gradient, black image, {what}: {gradient}")
    return gradient


assert bias_gradient("relu", jax.nn.relu) == [0, 0]
assert bias_gradient("maximum", lambda y: jnp.maximum(y, 0)) == [8, 8]
EOF
