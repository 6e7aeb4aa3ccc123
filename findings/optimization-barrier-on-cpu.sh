#!/usr/bin/env bash
# `optimization_barrier` does not keep XLA:CPU from computing an array anew for each reader.
#
# Versions: jax 0.10.2. On jax 0.12.0.1 it holds, and this script fails.
#
# One expects: `lax.optimization_barrier(jnp.exp(x))` is computed once and stored, and what reads it
# is fused without the exponential.
#
# What happens: the barrier is gone before fusion. As without it, the exponential is in the one loop
# that reads it at 9 places. The text of the executable has it once; what XLA hands to LLVM calls it
# once for each place.
#
# For depthwise convolutions: one can write them as a sum of shifted slices, one for each tap. Where
# the input is an expression, like an activation, a 3x3 convolution then computes it 9 times, and
# the barrier that should prevent it changes nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_dump_to=$folder/dump"
"$folder/venv/bin/python" -I - "$folder/dump" <<'EOF'
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
from jax import lax

print(f"jax {jax.__version__}")


def loops(barrier):
    """What the executable runs: of each computation, whether it has the exponential and slices."""

    def sum_of_taps(x, k):
        y = jnp.exp(x)
        if barrier:
            y = lax.optimization_barrier(y)
        return sum(k[i] * y[:, i : i + 56] for i in range(9))

    compiled = jax.jit(sum_of_taps).lower(jnp.ones((64, 64)), jnp.ones(9)).compile()
    texts = compiled.as_text().split("\n}\n")
    found = [(t.count(" exponential("), t.count(" slice(")) for t in texts]
    found = [(e, s) for e, s in found if e or s]
    print(f"barrier: {barrier}, (exponentials, slices) of each loop: {found}")
    return found


without, with_it = loops(False), loops(True)
assert any(e and s for e, s in without)  # the text shows what we look for
assert with_it == without
codes = list(pathlib.Path(sys.argv[1]).glob("*sum_of_taps*ir-no-opt.ll"))
assert len(codes) == 2
for code in codes:
    calls = len(re.findall(r"call float @fused\w*exp\w*\(", code.read_text()))
    print(f"calls of the exponential in a loop: {calls}")
    assert calls == 9
EOF
