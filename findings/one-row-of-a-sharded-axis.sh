#!/usr/bin/env bash
# `x[7::8]` of 8 rows over 4 devices is row 0.
#
# Versions: jax 0.10.2 on a CPU that plays 4 devices. The same on jax 0.12.0.1.
#
# One expects: under `jit`, `x[7::8]` of an array with 8 rows is its last row, however it is
# sharded.
#
# What happens: if the rows are sharded over 4 devices, the result is row 0, without a message. With
# no `jit`, or over 2 devices, or written as `x[7:8]`, it is right. Some smaller steps that keep the
# last row alone do not compile: XLA's verifier finds a wrong shape after partitioning.
#
# For depthwise convolutions: a convolution with strides or dilation, written as slices with steps,
# reads such slices where a phase has a single row left. Use a step of 1 for a single element.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4
"$folder/venv/bin/python" -I - <<'EOF'
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

print(f"jax {jax.__version__}")
rows = np.arange(8, dtype=np.float32)


def kept(devices, part, compile=jax.jit):
    """The rows that a slice of 8 sharded rows keeps."""
    mesh = jax.make_mesh(
        (devices,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    x = jax.device_put(rows, NamedSharding(mesh, P("rows")))
    found = np.asarray(compile(lambda x: x[part])(x)).tolist()
    how = "jit" if compile is jax.jit else "no jit"
    print(f"{devices} devices, {part}, {how}: {found}, right: {rows[part].tolist()}")
    return found


assert kept(4, slice(7, None, 8)) == [0]
assert kept(2, slice(7, None, 8)) == [7]
assert kept(4, slice(7, 8)) == [7]
assert kept(4, slice(5, None, 8)) == [5]
assert kept(4, slice(7, None, 8), lambda f: f) == [7]
EOF
