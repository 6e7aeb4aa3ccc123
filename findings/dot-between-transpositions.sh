#!/usr/bin/env bash
# A matrix product between two transpositions that undo each other copies image and result.
#
# Versions: jax 0.10.2 on a CPU. The same on jax 0.12.0.1.
#
# One expects: XLA cancels a transposition and its inverse, as they move nothing. So a pointwise
# convolution that is written for channels first, between two transpositions, costs what the plain
# product costs.
#
# What happens: if a dimension of size 1 comes and goes in between, as a group of channels does, XLA
# keeps both transpositions and gives each a layout of its own. The executable copies operands and
# results from one layout into the same one: four copies, and each is a loop of its own to compile.
#
# For depthwise convolutions: half of a MobileNet is pointwise convolutions. Its train step had 78
# loops that copy with such products, and 28 with plain ones (jax 0.12.0.1).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$folder/dot.py" <<'EOF'
import jax
import jax.numpy as jnp
from jax import lax

print(f"jax {jax.__version__}")
x, kernel = jnp.arange(4.0 * 12 * 12 * 96).reshape(4, 12, 12, 96) % 7, jnp.ones((96, 64))


def plain(x, kernel):
    return x @ kernel


def between(x, kernel):
    x = jnp.transpose(x, (0, 3, 1, 2))[..., None]  # (n, q, h, w, groups)
    dimensions = ((1,), (0,)), ((4,), (2,))  # summed up, and for each group
    y = lax.dot_general(x, kernel[..., None], dimensions)  # (groups, n, h, w, m)
    y = jnp.transpose(y, (1, 4, 2, 3, 0))[..., 0]
    return jnp.transpose(y, (0, 2, 3, 1))


copies = {}
for f in plain, between:
    text = jax.jit(f).lower(x, kernel).compile().as_text()
    copies[f.__name__] = text.count(" copy(")
    print(f"{f.__name__}: {copies[f.__name__]} copies")
assert (jax.jit(plain)(x, kernel) == jax.jit(between)(x, kernel)).all()
assert copies == {"plain": 0, "between": 4}
EOF
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I "$folder/dot.py"
