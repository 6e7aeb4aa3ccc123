#!/usr/bin/env bash
# A slice that a loop reads is copied before the loop, and eight overlapping slices are eight copies.
#
# Versions: jax 0.10.2 on a CPU. The same on jax 0.12.0.1.
#
# One expects: a slice inside of a loop is read where it is. XLA fuses it with the product that reads
# it, so that it costs no memory, and neither does an outer loop that says which image it is of.
#
# What happens: XLA moves out of the inner loop what does not depend on its index, before it fuses
# anything. A `lax.slice` it leaves where it is. A `lax.dynamic_slice` at an index of the outer loop
# it moves, whatever its size. All eight slices are then in memory at once: here 8 MiB of temporaries
# more, where the image that they are cut from has 1 MiB. With a start that depends on the inner index
# as well, by adding min(t, 0), which is 0, nothing moves.
#
# For depthwise convolutions: a kernel gradient that goes image by image, and tap by tap within, reads
# the same positions of a cotangent for each tap. That copied all of it: this package's took 1.15 times
# as long, and 1.4 times as long to compile.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'EOF'
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

print(f"jax {jax.__version__}")
IMAGES, LENGTH, CHANNELS, SLICES, TAPS = 8, 4096, 64, 8, 4


def correlate(x, g, start):
    """For each tap, the sum of products of x and g, which are read in eight slices."""

    def read(array, image, position):
        shape = (1, LENGTH - SLICES, CHANNELS)
        return lax.dynamic_slice(array, (image, position, 0), shape)[:, ::SLICES]

    def of_image(i, total):
        def of_tap(t, total):
            products = [read(g, start(i, t), p) * read(x, i, t + p) for p in range(SLICES)]
            return total.at[t].add(sum(products).sum((0, 1)))

        return lax.fori_loop(0, TAPS, of_tap, total)

    return lax.fori_loop(0, IMAGES, of_image, jnp.zeros((TAPS, CHANNELS)))


x = jnp.arange(IMAGES * (LENGTH + TAPS) * CHANNELS, dtype="float32") % 7
g = jnp.arange(IMAGES * LENGTH * CHANNELS, dtype="float32") % 5
x, g = x.reshape(IMAGES, -1, CHANNELS), g.reshape(IMAGES, -1, CHANNELS)
starts = {
    "the image": lambda i, t: i,
    "the image + min(tap, 0)": lambda i, t: i + lax.min(t, 0),
}
memory, results = [], []
for name, start in starts.items():
    compiled = jax.jit(lambda x, g, start=start: correlate(x, g, start)).lower(x, g).compile()
    memory.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
    results.append(compiled(x, g))
    print(f"slices that start at {name}: {memory[-1]:.1f} MiB of temporaries")
np.testing.assert_array_equal(*results)
copies = memory[0] - memory[1]
print(f"{copies:.1f} MiB more; g has {g[0].nbytes / 2**20:.1f} MiB for each image")
assert copies > 0.95 * SLICES * g[0].nbytes / 2**20
EOF
