#!/usr/bin/env bash
# From 32 MiB on, the memory of a result is mapped anew in every call.
#
# Versions: jax 0.10.2 on a CPU, Linux with glibc. The same on jax 0.12.0.1.
#
# One expects: the second call of a compiled function finds the memory that the first one had, so
# that `x + 1` takes about as long for each element of a large array as for one of a small array.
#
# What happens: glibc takes a block of more than 32 MiB straight from the system, and gives it back
# when it is freed. So each call touches fresh pages, and the system clears every one of them: an
# array of 40 MiB costs 10,240 page faults a call, one of 8 MiB none after the first calls. The
# limit for "large" grows with what a program frees, but never beyond 32 MiB. The temporaries of a
# compiled program are one block, so that many small ones count as a large one.
#
# For depthwise convolutions: on a batch, the padded copies of the images pass 32 MiB while the
# images themselves are far smaller. Then clearing pages can take longer than the convolution.
# `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000` in the environment keeps the memory.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat > "$folder/faults.py" <<'EOF'
import resource
import time

import jax
import jax.numpy as jnp

print(f"jax {jax.__version__}")
CALLS = 10


def per_call(mebibytes):
    """Page faults and nanoseconds an element of `x + 1`, after some calls."""
    x = jnp.ones(mebibytes * 2**18)
    f = jax.jit(lambda x: x + 1)
    for _ in range(5):
        f(x).block_until_ready()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for _ in range(CALLS):
        f(x).block_until_ready()
    seconds = (time.perf_counter() - start) / CALLS
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / CALLS
    print(f"{mebibytes} MiB: {faults:.0f} page faults, {seconds / x.size * 1e9:.2f} ns an element")
    return faults


small, large = per_call(8), per_call(40)
EOF
echo "as it is:"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<EOF
exec(open("$folder/faults.py").read())
assert small < 100 and large > 9000
EOF
echo "with the two settings of glibc:"
JAX_PLATFORMS=cpu MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 \
  "$folder/venv/bin/python" -I - <<EOF
exec(open("$folder/faults.py").read())
assert small < 100 and large < 100
EOF
