#!/usr/bin/env bash
# A layer that all steps of an `nnx.scan` share forgets what the steps changed in it.
#
# Versions: flax 0.12.8 with jax 0.10.2. The same on flax 0.12.12 with jax 0.12.0.1.
#
# One expects: `in_axes=(nnx.Carry, None)` gives every step the same layer, and a batch
# normalization has updated its statistics afterwards, as in a loop; or an error, as in `nnx.vmap`,
# which says that it cannot give back a changed variable for the axis None.
#
# What happens: the running mean is 0 after five steps, without a word. With `graph=False` the same
# scan keeps the changes, and so it does with
# `in_axes=(nnx.Carry, nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None}))`.
#
# For depthwise convolutions: a separable block that is applied again and again, convolution and
# batch normalization, trains well and is wrong in inference. Penalties, metrics and caches that
# layers keep in variables are lost in the same way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'EOF'
import flax
import jax.numpy as jnp
from flax import nnx

print(f"flax {flax.__version__}")
x = 5 + jnp.arange(24.0).reshape(8, 3)


def mean(run):
    """The running mean of the first channel after five steps on the same data."""
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    run(norm)
    return float(norm.mean[0])


def scan(axes, **how):
    def step(x, norm):
        norm(x)
        return x

    how = dict(in_axes=(nnx.Carry, axes), out_axes=nnx.Carry, length=5) | how
    return lambda norm: nnx.scan(step, **how)(x, norm)


loop = mean(lambda norm: [norm(x) for _ in range(5)])
shared = mean(scan(None))
tree = mean(scan(None, graph=False))
carried = mean(scan(nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None})))
print(f"loop {loop:.4f}, scan {shared:.4f}, graph=False {tree:.4f}, carried {carried:.4f}")
try:
    nnx.vmap(lambda norm, x: norm(x), in_axes=(None, 0))(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), x)
    raise SystemExit("nnx.vmap says nothing either")
except ValueError as error:
    print(f"nnx.vmap: {error}")
assert shared == 0 and abs(tree - loop) < 1e-5 and abs(carried - loop) < 1e-5 and loop > 0.5
EOF
