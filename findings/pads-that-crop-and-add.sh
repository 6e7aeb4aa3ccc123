#!/usr/bin/env bash
# A grouped convolution whose pads crop low and add high is wrong on a CPU, without a message.
#
# Versions: jax 0.10.2 on a CPU. With jax 0.12.0.1 it is right.
#
# One expects: a pad of -1 crops a row, as the documentation of `lax.conv_general_dilated` and of
# `lax.pad` has it, so that a convolution with the pads (-1, 1) is that of an image which was cropped
# and padded before.
#
# What happens: with 6 rows and 3 taps, and with a group for each channel, the result in 2-D is
# another one, and so are the kernel gradients in 1-D and 2-D. 3-D is right, and so are pads that add
# low and crop high. It depends on the size: 7 rows are right where 6 are not, and vice versa.
#
# For depthwise convolutions: such pads are rare, but they are what a convolution of a shifted window
# has, and what the derivatives of some others have. Crop and pad with `lax.pad`, then convolve with
# "VALID".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" -I - <<'EOF'
import jax
import numpy as np
from jax import lax

print(f"jax {jax.__version__}")
random = np.random.default_rng(0)


def wrong(rank, rows, pads):
    """What of (result, image gradient, kernel gradient) differs from those after `lax.pad`."""
    channels, letters, strides = 4, "DHW"[:rank], (1,) * rank
    spec = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    pads = (pads, *[(0, 0)] * (rank - 1))

    def direct(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, strides, pads, dimension_numbers=spec, feature_group_count=channels
        )

    def padded(x, kernel):
        x = lax.pad(x, np.float32(0), [(0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)])
        return lax.conv_general_dilated(
            x, kernel, strides, "VALID", dimension_numbers=spec, feature_group_count=channels
        )

    # Small integers: every sum is exact in float32, in any order.
    def integers(*shape):
        return random.integers(-3, 4, shape).astype(np.float32)

    x = integers(2, rows, *[5] * (rank - 1), channels)
    kernel = integers(*[3] * rank, 1, channels)
    g = integers(*jax.eval_shape(direct, x, kernel).shape)

    def all_three(f, x, kernel, g):
        y, vjp = jax.vjp(f, x, kernel)
        return y, *vjp(g)

    names = ["result", "image gradient", "kernel gradient"]
    compiled = jax.jit(all_three, static_argnums=0)
    pairs = zip(names, *(compiled(f, x, kernel, g) for f in (direct, padded)))
    found = [name for name, a, b in pairs if not np.array_equal(a, b)]
    print(f"{rank}-D, {rows} rows, pads {pads}: wrong: {', '.join(found) or 'nothing'}")
    return found


assert wrong(1, 6, (-1, 1)) == ["kernel gradient"]
assert wrong(1, 7, (-1, 1)) == []
assert wrong(1, 7, (-2, 1)) == ["kernel gradient"]
assert wrong(2, 6, (-1, 1)) == ["result", "kernel gradient"]
assert wrong(2, 7, (-1, 1)) == ["result"]
assert wrong(2, 6, (-3, 3)) == ["result", "kernel gradient"]
assert wrong(3, 6, (-1, 1)) == []
assert wrong(2, 6, (1, -1)) == []
EOF
