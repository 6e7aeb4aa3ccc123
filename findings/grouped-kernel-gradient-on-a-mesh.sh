#!/usr/bin/env bash
# A mesh axis that nothing uses multiplies the kernel gradient of a grouped convolution.
#
# Versions: jax 0.10.2 on a CPU that plays 8 devices. The same on jax 0.12.0.1.
#
# One expects: under `jit`, a gradient does not depend on how the arrays are laid out on a mesh.
#
# What happens: the mesh has the axes "data" and "model", the batch is sharded over "data", and
# nothing is sharded over "model". The kernel gradient of a depthwise or grouped convolution is then
# exactly as many times too large as "model" has devices. XLA adds the parts of all devices, also of
# those that hold the same images. The gradient of the images, and the kernel gradient of an
# ordinary convolution, are right.
#
# For depthwise convolutions: such a mesh is usual for a network that is parallel over data and
# model. Of all parameters, the depthwise and grouped kernels alone get gradients of another scale,
# without a message. Shard the batch over all axes, or the channels over "model": both are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
"$folder/venv/bin/python" -I - <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

print(f"jax {jax.__version__}")
random = np.random.default_rng(0)


def ratios(shape, groups, image=P("data"), weights=P()):
    """The gradients (image, kernel) on a mesh, divided by those on one device."""

    def loss(x, k):
        spec = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=spec, feature_group_count=groups
        )
        return (y**2).sum()

    # Small integers: every sum is exact in float32, in any order.
    x = jnp.asarray(random.integers(1, 4, (8, 6, 6, 8)), jnp.float32)
    k = jnp.asarray(random.integers(1, 4, (3, 3, 8 // groups, 8)), jnp.float32)
    mesh = jax.make_mesh(
        shape,
        ("data", "model"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[: shape[0] * shape[1]],
    )
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    single = gradients(x, k)
    many = gradients(
        jax.device_put(x, NamedSharding(mesh, image)),
        jax.device_put(k, NamedSharding(mesh, weights)),
    )
    found = [np.unique(np.asarray(m) / np.asarray(s)).tolist() for m, s in zip(many, single)]
    print(f"mesh {shape}, {groups} groups, image {image}, kernel {weights}: times {found}")
    return found


assert ratios((2, 1), 8) == [[1], [1]]
assert ratios((2, 2), 8) == [[1], [2]]
assert ratios((2, 4), 8) == [[1], [4]]
assert ratios((4, 2), 8) == [[1], [2]]
assert ratios((2, 2), 2) == [[1], [2]]
assert ratios((2, 2), 1) == [[1], [1]]
assert ratios((2, 2), 8, P(("data", "model"))) == [[1], [1]]
channels = P("data", None, None, "model"), P(None, None, None, "model")
assert ratios((2, 2), 8, *channels) == [[1], [1]]
EOF
