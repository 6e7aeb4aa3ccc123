#!/usr/bin/env bash
# The configs of Keras's L1 and orthogonal regularizers are rounded to float32, that of L2 is not.
#
# Versions: keras 3.15.1 with jax 0.10.2.
#
# One expects: `L1(0.01).get_config()` is `{"l1": 0.01}`, as `L2(0.01)` gives `{"l2": 0.01}`.
#
# What happens: L1 gives 0.009999999776482582, the float32 number next to 0.01, and so does
# `OrthogonalRegularizer`. `L2` and `L1L2`, with the same argument, keep the Python float.
#
# For depthwise convolutions: the `depthwise_regularizer` in a saved file is not the number that
# stands in the code, and a config that is written by hand, or by software that keeps Python floats,
# is not equal to what Keras writes for the same layer. Compare such numbers as float32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu KERAS_BACKEND=jax KERAS_HOME="$folder"
"$folder/venv/bin/python" -I - <<'EOF'
import json

import keras
import numpy as np

print(f"keras {keras.__version__}")
rounded = float(np.float32(0.01))


def numbers(regularizer):
    """The numbers of a depthwise layer's config, read back from JSON."""
    layer = keras.layers.DepthwiseConv2D(3, depthwise_regularizer=regularizer)
    config = json.loads(json.dumps(layer.get_config()))["depthwise_regularizer"]["config"]
    print(f"{type(regularizer).__name__}: {config}")
    return [value for value in config.values() if not isinstance(value, str)]


assert numbers(keras.regularizers.L1(0.01)) == [rounded] != [0.01]
assert numbers(keras.regularizers.L1(rounded)) == [rounded]  # rounded once only
assert numbers(keras.regularizers.OrthogonalRegularizer(0.01)) == [rounded] != [0.01]
assert numbers(keras.regularizers.L2(0.01)) == [0.01]
assert numbers(keras.regularizers.L1L2(0.01, 0.01)) == [0.01, 0.01]
EOF
