#!/usr/bin/env bash
# Summing nine products over 11 positions takes 2 to 4 times as long a product as over 10.
#
# Versions: jax 0.10.2 on a CPU. The same on jax 0.12.0.1.
#
# One expects: `lax.reduce` over one position more takes a tenth longer.
#
# What happens: XLA:CPU writes a `reduce` of several arrays as a loop over positions inside the loop
# over channels. LLVM unrolls the inner loop if the result has at most about 300 instructions, and
# only then vectorises the loop over channels. Nine products over 10 positions stay within that,
# over 11 they do not. Then every channel is computed by itself.
#
# For depthwise convolutions: the gradient of a 3x3 kernel is nine sums over all positions. As one
# `reduce` of nine products over blocks of a row it compiles in less time than with an operation for
# each product, as long as the blocks are short.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$folder/reduce.py" <<'EOF'
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
from jax import lax

print(f"jax {jax.__version__}")
folder = pathlib.Path(sys.argv[1])


def sums(positions):
    """Nanoseconds for each product, and whether LLVM multiplies vectors."""

    def f(x, g):
        products = [x[:, i : i + positions] * g for i in range(9)]
        zeros = [jnp.zeros(())] * 9
        return lax.reduce(products, zeros, lambda a, b: [p + q for p, q in zip(a, b)], (1,))

    f.__name__ = f"over_{positions}"
    x, g = jnp.ones((40, positions + 8, 256)), jnp.ones((40, positions, 256))
    f = jax.jit(f)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        jax.block_until_ready(f(x, g))
        times.append(time.perf_counter() - start)
    code = "".join(p.read_text() for p in folder.glob(f"*jit_over_{positions}.*ir-with-opt.ll"))
    vectors = bool(re.search(r"fmul[^\n]*<\d+ x float>", code))
    each = min(times) / (9 * g.size) * 1e9
    print(f"{positions} positions: {each:.3f} ns a product, vectors: {vectors}")
    return each, vectors


ten, eleven = sums(10), sums(11)
print(f"{eleven[0] / ten[0]:.1f} times as long for each product")
assert ten[1] and not eleven[1]
assert eleven[0] > 1.5 * ten[0]
EOF
export XLA_FLAGS="--xla_dump_to=$folder/dump --xla_dump_emitter_re=llvm"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I "$folder/reduce.py" "$folder/dump"
