#!/usr/bin/env bash
# `safetensors.numpy.save` of a transposed array stores its values in another order.
#
# Versions: safetensors 0.8.0 with numpy 2.4.6. Versions 0.5.0, 0.6.2 and 0.7.0 store it correctly.
#
# One expects: what `load` returns is what was given to `save`, as with `numpy.save`.
#
# What happens: `save` writes the memory of the array and the shape of the view. Of a transposed view
# these do not belong together: the shape is right and the values are in another order, without a
# message. A contiguous copy is stored correctly.
#
# For depthwise convolutions: to convert a kernel from (kh, kw, c, m) to PyTorch's (c*m, 1, kh, kw)
# is to transpose it. Copy it with `numpy.ascontiguousarray` before it is saved.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" -I - <<'EOF'
import numpy as np
import safetensors
from safetensors.numpy import load, save

print(f"safetensors {safetensors.__version__}")
kernel = np.arange(6, dtype=np.float32).reshape(2, 3)


def stored(array):
    return load(save({"weight": array}))["weight"]


view = kernel.T
found = stored(view)
print(f"given  {view.tolist()}\nstored {found.tolist()}")
assert found.shape == view.shape
assert found.tolist() == kernel.reshape(3, 2).tolist() != view.tolist()
assert stored(np.ascontiguousarray(view)).tolist() == view.tolist()
EOF
