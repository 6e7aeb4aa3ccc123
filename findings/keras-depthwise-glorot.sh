#!/usr/bin/env bash
# Keras's default initializer makes a depthwise layer quieter the more channels it has.
#
# Versions: keras 3.15.1 on its JAX backend, jax 0.10.2.
#
# One expects: `glorot_uniform` is made to keep the scale of a signal, so that the results of a new
# layer have about the standard deviation of its inputs, whatever the number of channels.
#
# What happens: for a kernel (height, width, channels, multiplier) Keras counts height * width *
# channels as the inputs of a result. A depthwise result has only height * width. So with 256
# channels, results have 0.09 of the standard deviation of the inputs, and with 1,024 channels 0.04.
# A dense layer keeps the deviation.
#
# For depthwise convolutions: a few such layers without a normalization between them start with
# results near 0 and train slowly. `VarianceScaling(1.0, "fan_out")` has the right count where the
# multiplier is 1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
KERAS_HOME="$folder" KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" -I - <<'EOF'
import jax
import keras
import numpy as np

print(f"keras {keras.__version__}, jax {jax.__version__}")


def gain(layer, x):
    """The standard deviation of a new layer's results where that of its inputs is 1."""
    keras.utils.set_random_seed(0)
    return float(np.std(np.asarray(layer(x))))


rng = np.random.default_rng(0)
found = {}
for channels in (16, 64, 256, 1024):
    x = rng.standard_normal((4, 16, 16, channels), np.float32)
    found[channels] = gain(keras.layers.DepthwiseConv2D(3), x)
    dense = gain(keras.layers.Dense(channels), x)
    print(f"{channels} channels: depthwise {found[channels]:.3f}, dense {dense:.3f}")
    assert 0.9 < dense < 1.1
fan_out = keras.initializers.VarianceScaling(1.0, "fan_out")
kept = gain(keras.layers.DepthwiseConv2D(3, depthwise_initializer=fan_out), x)
print(f"1024 channels, VarianceScaling(1.0, 'fan_out'): {kept:.3f}")
assert 0.9 < kept < 1.1
assert found[16] < 0.4 and found[256] < 0.1 and found[1024] < 0.05
EOF
