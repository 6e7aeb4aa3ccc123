#!/usr/bin/env bash
# A jitted function that is called eight times is compiled eight times, even if it is not inlined.
#
# Versions: jax 0.10.2 on a CPU. The same on jax 0.12.0.1.
#
# One expects: JAX traces and lowers a jitted function once, and the program that it hands to XLA has
# it once, with a call wherever it is used. With the metadata `inlineable="false"` XLA keeps the
# calls. So eight equal layers should cost XLA little more than one.
#
# What happens: XLA gives each call a copy of the function. The compiled program has eight, and took
# twice as long to compile as one call does. The metadata keeps XLA from fusing anything across the
# border of a call, and nothing else. In a `lax.scan` over the layers, the function is there once.
#
# For depthwise convolutions: a network of equal blocks waits for each of them. What helps is fewer
# operations in the program of one layer, or a scan over equal layers.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'EOF'
import re
import time

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

print(f"jax {jax.__version__}")


@jax.jit
def layer(x, kernel):
    padded = jnp.pad(x, ((3, 3), (3, 3), (0, 0)))
    rows, columns, _ = x.shape
    return sum(
        padded[i : i + rows, j : j + columns] * kernel[i, j] for i in range(7) for j in range(7)
    )


def compiled(calls, scan=False):
    """Functions in the program, computations with 49 products in the compiled one, and seconds."""

    def f(x, kernels):
        with set_xla_metadata(inlineable="false"):
            if scan:
                return lax.scan(lambda x, kernel: (layer(x, kernel), None), x, kernels)[0]
            for kernel in kernels:
                x = layer(x, kernel)
            return x

    lowered = jax.jit(f).lower(jnp.ones((28, 28, 64)), jnp.ones((calls, 7, 7, 64)))
    functions = lowered.as_text().count("func.func private @layer")
    start = time.perf_counter()
    text = lowered.compile().as_text()
    seconds = time.perf_counter() - start
    bodies = [body.count(" multiply(") for body in re.split(r"\n\n(?=%|ENTRY)", text)]
    return functions, sum(products >= 49 for products in bodies), seconds


compiled(1)  # XLA's start
for calls, scan in (1, False), (8, False), (8, True):
    functions, bodies, seconds = compiled(calls, scan)
    how = "in a scan" if scan else "one after the other"
    print(f"{calls} calls {how}: {functions} function lowered, {bodies} compiled, {seconds:.2f} s")
    assert functions == 1
    assert bodies == (1 if scan else calls)
EOF
