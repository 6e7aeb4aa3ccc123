#!/usr/bin/env bash
# Keras's `sparsemax` is not a distribution: its results need not sum to 1.
#
# Versions: keras 3.15.1 with jax 0.10.2 as its backend.
#
# One expects: the Euclidean projection onto the probability simplex (Martins and Astudillo, 2016,
# arXiv:1602.02068): nonnegative numbers whose sum is 1. Three equal inputs give three times 1/3.
#
# What happens: the threshold is computed from the sum of all partial sums where the paper takes the
# last one. The result is right where a single one stays above 0. Three inputs of 1 give three times
# 0, and three inputs of -1 give three times 4/3.
#
# For depthwise convolutions: as the activation of a layer, it gives channels that do not sum to 1.
# Where they are all 0, no gradient comes back either.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu KERAS_BACKEND=jax KERAS_HOME="$folder"
"$folder/venv/bin/python" -I - <<'EOF'
import keras
import numpy as np

print(f"keras {keras.__version__}")


def projection(z):
    """The paper's algorithm 1."""
    descending = np.sort(z)[::-1]
    partial = np.cumsum(descending)
    k = np.flatnonzero(1 + np.arange(1, len(z) + 1) * descending > partial)[-1] + 1
    return np.maximum(z - (partial[k - 1] - 1) / k, 0)


def sums(*z):
    """The sum of Keras's results and that of the projection."""
    z = np.array(z, np.float32)
    found, right = np.asarray(keras.activations.sparsemax(z[None]))[0], projection(z)
    print(f"{z}: keras {found}, projection {right}")
    return round(float(found.sum()), 3), round(float(right.sum()), 3)


assert sums(2, 1, 0) == (1, 1)
assert sums(1, 1, 1) == (0, 1)
assert sums(1, 0.5, -1) == (0.25, 1)
assert sums(-1, -1, -1) == (4, 1)
EOF
