#!/usr/bin/env bash
# `inspect.signature` of an nnx layer is `(*args, **kwargs)`.
#
# Versions: flax 0.12.8 with jax 0.10.2. The same on flax 0.12.12 with jax 0.12.0.1.
#
# One expects: the signature of `nnx.Conv` lists `in_features`, `out_features`, `kernel_size` and so
# on, as that of `flax.linen.Conv` lists its fields.
#
# What happens: the metaclass of nnx modules has a `__call__`, and Python takes the signature from
# there. That of `nnx.Conv.__init__` is the real one.
#
# For depthwise convolutions: a tool that checks keyword arguments by the signature accepts
# `groups=16` for `feature_group_count=16`, a tooltip shows nothing, and whoever builds layers from
# configs has to ask `__init__`. A layer can set `__signature__`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 flax==0.12.8
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'EOF'
import inspect

import flax
import flax.linen as nn
from flax import nnx

print(f"flax {flax.__version__}")
names = {}
for what, f in [("linen.Conv", nn.Conv), ("nnx.Conv", nnx.Conv), ("its init", nnx.Conv.__init__)]:
    names[what] = list(inspect.signature(f).parameters)
    print(f"{what}: {names[what]}")
inspect.signature(nnx.Conv).bind(16, 16, (3, 3), groups=16)  # raises nothing
assert names["nnx.Conv"] == ["args", "kwargs"]
assert "feature_group_count" in names["linen.Conv"]
assert "feature_group_count" in names["its init"]
EOF
