#!/usr/bin/env bash
# Keras's `predict` on JAX deletes the arrays of the model's weights.
#
# Versions: keras 3.15.1 with jax 0.10.2 or 0.12.0.1 as its backend.
#
# One expects: `predict` and `evaluate` only read the weights. An array that was taken from a
# variable before, `layer.kernel.value`, is still good after them, as it is after a call of the model.
#
# What happens: the compiled functions of `predict`, `predict_on_batch` and `evaluate` are given the
# weights as donated arguments, and return them. The variables hold the returned arrays afterwards,
# equal to the old ones. The old arrays are deleted: to use one raises "Array has been deleted".
#
# For depthwise convolutions: who ports a network collects its weights as JAX arrays, asks Keras for the
# expected outputs, and has no weights left. Take copies: `layer.get_weights()` returns numpy arrays.
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
x = np.ones((1, 4), np.float32)


def deleted(call):
    """Whether an array that was read from a layer before the call is gone after it."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(loss="mse")
    kernel = model.layers[0].kernel.value
    before = np.array(kernel)
    call(model)
    assert np.array_equal(model.layers[0].kernel.value, before), "not the same weights"
    print(f"{call.__name__:17} deleted: {kernel.is_deleted()}")
    return kernel.is_deleted()


def plain_call(model):
    model(x)


def predict(model):
    model.predict(x, verbose=0)


def predict_on_batch(model):
    model.predict_on_batch(x)


def evaluate(model):
    model.evaluate(x, np.ones((1, 2), np.float32), verbose=0)


assert not deleted(plain_call)
assert deleted(predict)
assert deleted(predict_on_batch)
assert deleted(evaluate)
EOF
