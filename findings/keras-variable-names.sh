#!/usr/bin/env bash
# The paths of ConvNeXt's weights in Keras depend on what was built before in the same process.
#
# Versions: keras 3.15.1 with jax 0.10.2 as its backend.
#
# One expects: a weight is called by its layer and its role, as in "conv1/kernel". Equal models have
# equal paths, so that a dict by path moves weights from one to the other.
#
# What happens: the layer `LayerScale` of `keras.applications.ConvNeXtTiny` makes its variable without
# a name. Keras calls it "variable", the next one "variable_1", and goes on counting in the next model.
# All other paths are equal. `keras.utils.clear_session` starts anew.
#
# For depthwise convolutions: each block of a ConvNeXt ends with such a variable. Whoever ports one by
# the paths of its weights, in memory or from an `.h5` file, should take the layer's name and the
# variable's place in the layer instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q keras==3.15.1 jax==0.10.2 jaxlib==0.10.2 numpy==2.4.6
export JAX_PLATFORMS=cpu KERAS_BACKEND=jax KERAS_HOME="$folder"
"$folder/venv/bin/python" -I - <<'EOF'
import keras

print(f"keras {keras.__version__}")


def paths():
    """The paths of all weights of a ConvNeXtTiny."""
    model = keras.applications.ConvNeXtTiny(
        weights=None, include_top=False, input_shape=(32, 32, 3), name="net"
    )
    return [weight.path for weight in model.weights]


first, second = paths(), paths()
others = [
    pair
    for pair in zip(first, second, strict=True)
    if pair[0] != pair[1] and "layer_normalization" not in pair[0]  # which the user did not name
]
print(f"{len(first)} weights, {len(others)} with another path in the second model")
print(*others[0], sep="\n")
assert len(first) == len(second) == 180 and len(others) == 18
assert all("layer_scale" in path for pair in others for path in pair)
assert others[0][0].endswith("/variable") and others[0][1].endswith("/variable_18")
keras.utils.clear_session()
assert paths() == first
EOF
