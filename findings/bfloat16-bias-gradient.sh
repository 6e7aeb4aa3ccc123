#!/usr/bin/env bash
# A bias gradient in bfloat16 stops growing at 1,024.
#
# Versions: jax 0.10.2 with flax 0.12.8 on a CPU. The same on jax 0.12.0.1 with flax 0.12.12.
#
# One expects: the gradient of a bias, for the sum of all results as the loss, is the number of
# results of its channel. That is 8 * 56 * 56 = 25,088, which bfloat16 holds exactly. `jnp.sum` of
# 25,088 ones in bfloat16 is 25,088 as well, since it adds in float32.
#
# What happens: the gradient is 1,024. The bias is broadcast, and the transpose of a broadcast is a
# sum in the dtype of its operand. A running sum of ones in bfloat16 is stuck at 256, because 256 +
# 1 is rounded to 256. The dtype of the parameter does not matter: the float32 bias of a bfloat16
# layer gets the same 1,024.
#
# For depthwise convolutions: the bias gradient is a sum over batch and space, which are large in
# early layers. In bfloat16 on a CPU it can be many times too small. Add the bias in float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'EOF'
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

print(f"jax {jax.__version__}, flax {flax.__version__}")


def bias_gradient(dtype, param_dtype):
    layer = nn.Conv(8, (3, 3), feature_group_count=8, dtype=dtype, param_dtype=param_dtype)
    x = jnp.ones((8, 56, 56, 8), dtype)
    variables = layer.init(jax.random.key(0), x)
    gradient = jax.grad(lambda v: layer.apply(v, x).sum())(variables)["params"]["bias"]
    print(f"{dtype.__name__} layer, {param_dtype.__name__} parameters: {float(gradient[0])}")
    return float(gradient[0])


exact = 8 * 56 * 56
total = float(jnp.ones(exact, jnp.bfloat16).sum())
print(f"exact: {exact}, jnp.sum in bfloat16: {total}")
assert total == exact
assert bias_gradient(jnp.float32, jnp.float32) == exact
assert bias_gradient(jnp.bfloat16, jnp.float32) == 1024
assert bias_gradient(jnp.bfloat16, jnp.bfloat16) == 1024
EOF
