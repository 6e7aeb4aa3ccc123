"""Twenty SGD steps of a small constrained model in live Keras, on the backend of this process.

    python keras_training.py FILE

writes the weights before and after every step, and the losses, for a test of another backend.
"""

import sys

import numpy as np
import oracle

STEPS = 20
LEARNING_RATE = 0.05
X, Y = oracle.normals(0, 8, 9, 9, 3), oracle.normals(1, 8, 5, 5, 12)


def entry(class_name, **config):
    return {"class_name": class_name, "config": config}


# The constraints of the two layers' kernels.
KINDS = [
    (entry("MaxNorm", max_value=0.5), entry("UnitNorm", axis=[0, 1])),
    (entry("NonNeg"), entry("MinMaxNorm", min_value=0.3, max_value=0.6, rate=0.5)),
]


def settings(*kernel_constraints):
    """The arguments of the two layers, ours and Keras's alike."""
    l2 = entry("L2", l2=0.01)
    shared = dict(
        kernel_size=3,
        depth_multiplier=2,
        depthwise_regularizer=l2,
        bias_regularizer=l2,
        bias_constraint=entry("NonNeg"),
    )
    own = [dict(activation="tanh"), dict(activity_regularizer=l2)]
    pairs = zip(own, kernel_constraints, strict=True)
    return [shared | arguments | dict(depthwise_constraint=kind) for arguments, kind in pairs]


def weights(seed):
    shapes = [(3, 3, 3, 2), (6,), (3, 3, 6, 2), (12,)]
    return [0.5 * oracle.normals(seed + i, *shape) for i, shape in enumerate(shapes)]


def train(pair):
    """Returns each weight before and after every step, and the loss of every step."""
    import keras

    layers = [keras.layers.DepthwiseConv2D(**arguments) for arguments in settings(*pair)]
    model = keras.Sequential([keras.Input(X.shape[1:]), *layers])
    model.set_weights(weights(7))
    jit = keras.backend.backend() == "jax"  # TensorFlow's graph is faster to make than XLA's
    model.compile(keras.optimizers.SGD(LEARNING_RATE), loss="mse", jit_compile=jit)

    def values():
        return [np.array(keras.ops.convert_to_numpy(weight.value)) for weight in model.weights]

    path, losses = [values()], []
    for _ in range(STEPS):
        model.reset_metrics()
        losses.append(float(model.train_on_batch(X, Y)))
        path.append(values())
    return [np.stack(arrays) for arrays in zip(*path, strict=True)], np.array(losses)


if __name__ == "__main__":
    arrays = {}
    for kind, pair in enumerate(KINDS):
        path, losses = train(pair)
        arrays |= {f"{kind}/{i}": array for i, array in enumerate([*path, losses])}
    np.savez(sys.argv[1], **arrays)
