"""The peers that are timed: functions that import their framework, each in its own process.

They return `build(subject, mode)`, which returns the variants of doing that work: functions without
arguments that return when their results are there. A layer in JAX needs less: `layer(case)`, which
returns `apply(x, kernel, bias)`, a function that `jax_layer` compiles and differentiates.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from flax_dwconv.benchmark.cases import Case

Variants = Mapping[str, Callable[[], Sequence[Any]]]
Build = Callable[[Any, str], Variants]

OURS, LAX = "flax_dwconv", "lax"
PEERS = {"torch": "torch", "tensorflow": "tensorflow", "linen": "flax", "haiku": "haiku"}  # modules
ON_JAX = PLAIN, FAST, POINTWISE = "keras-jax", "keras-jax-accelerated", "keras-jax-pointwise"
BACKENDS = {"keras-tensorflow": "tensorflow", "keras-torch": "torch"}  # of Keras, beside JAX
RATE = 1e-4  # of SGD: too low to lead anywhere


def jax_layer(layer: Callable[[Case], Callable]) -> Build:
    """Layers under `jax.jit`."""
    import jax

    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8)))  # XLA's start is no compile time

    @functools.cache  # jax.jit keeps what it compiled with the function
    def compiled(case, mode):
        def run(x, kernel, bias, g):
            if mode == "forward":
                return [layer(case)(x, kernel, bias)]
            y, vjp = jax.vjp(layer(case), x, kernel, bias)
            return [y, *vjp(g)]

        return jax.jit(run)

    def build(case, mode):
        f, arrays = compiled(case, mode), [*map(jax.numpy.asarray, case.arrays())]
        return {"jit": lambda: jax.block_until_ready(f(*arrays))}

    return build


def our_layer(case: Case, method: Any = "auto") -> Callable:
    """This package's layer."""
    import flax_dwconv

    make = getattr(flax_dwconv, f"DepthwiseConv{len(case.size)}D")
    layer = make(case.kernel, case.stride, case.padding, activation="relu6", method=method)
    return lambda x, kernel, bias: layer.apply({"params": {"bias": bias, "kernel": kernel}}, x)


def linen_layer(case: Case) -> Callable:
    """`flax.linen.Conv`, one group for each channel."""
    import flax.linen as nn

    c, padding = case.channels, case.padding.upper()
    layer: Any = nn.Conv(c, case.kernel, case.stride, padding, feature_group_count=c)

    def apply(x, kernel, bias):  # a kernel (kh, kw, 1, c)
        params = {"bias": bias, "kernel": kernel.swapaxes(-1, -2)}
        return nn.relu6(layer.apply({"params": params}, x))

    return apply


def haiku_layer(case: Case) -> Callable:
    """`haiku.DepthwiseConv2D`."""
    import haiku
    import jax

    @haiku.without_apply_rng
    @haiku.transform
    def layer(x):
        make, padding = getattr(haiku, f"DepthwiseConv{len(case.size)}D"), case.padding.upper()
        return jax.nn.relu6(make(1, case.kernel, case.stride, padding=padding, name="layer")(x))

    def apply(x, kernel, bias):  # a kernel (kh, kw, 1, c)
        return layer.apply({"layer": {"b": bias, "w": kernel.swapaxes(-1, -2)}}, x)

    return apply


def torch_layer() -> Build:
    """PyTorch, in both of its memory formats."""
    import torch
    from torch.nn import functional

    def build(case, mode):
        # PyTorch pads both ends alike. On flipped images that is what "same" does, because the
        # window never reaches the last row: it is the same work with the same numbers.
        same, convolve = case.padding == "same", getattr(functional, f"conv{len(case.size)}d")
        pads = [k // 2 if same else 0 for k in case.kernel]
        x, kernel, bias, g = map(torch.from_numpy, case.arrays(flip=same))
        arrays = x.movedim(-1, 1), kernel.movedim((-2, -1), (0, 1)), bias, g.movedim(-1, 1)

        def variant(layout):
            *operands, cotangent = (
                a.clone(memory_format=layout if a.ndim == 4 else torch.contiguous_format)
                for a in arrays
            )
            for array in operands:
                array.requires_grad_(mode == "train")

            def run():
                with torch.inference_mode(mode == "forward"):
                    y = convolve(*operands, case.stride, pads, groups=case.channels)
                    y = functional.relu6(y, inplace=True)
                if mode == "forward":
                    return [y]
                return [y, *torch.autograd.grad(y, operands, cotangent)]

            return run

        layouts = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
        return {name: variant(layout) for name, layout in layouts.items()}

    return build


def tensorflow_layer() -> Build:
    """TensorFlow, as a `tf.function`."""
    import tensorflow as tf

    @functools.cache  # a tf.function keeps its graphs
    def compiled(case, mode):
        @tf.function
        def run(x, kernel, bias, g):
            with tf.GradientTape() as tape:
                tape.watch([x, kernel, bias] if mode == "train" else [])
                strides, padding = [1, case.stride, case.stride, 1], case.padding.upper()
                y = tf.nn.depthwise_conv2d(x, kernel, strides, padding)
                y = tf.nn.relu6(tf.nn.bias_add(y, bias))
            return [y] if mode == "forward" else [y, *tape.gradient(y, [x, kernel, bias], g)]

        return run

    def build(case, mode):
        f, arrays = compiled(case, mode), [*map(tf.constant, case.arrays())]
        return {"function": lambda: f(*arrays)}

    return build


def keras_network(network: Callable[..., Callable]) -> Build:
    """Networks of `keras.applications` with random weights, on the backend of this process."""
    import keras

    def loss(y, logits):
        entropy = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        return keras.ops.mean(entropy)

    def build(name, mode):
        keras.utils.set_random_seed(0)
        model = getattr(keras.applications, name)(weights=None, classifier_activation=None)
        x = np.random.default_rng(0).standard_normal((1, 224, 224, 3), np.float32)
        x, y = map(keras.ops.convert_to_tensor, (x, [1]))
        return {"": network(model, x, partial(loss, y), mode == "train")}

    return build


def on_jax(model: Any, x: Any, loss: Any, train: bool, accelerate: Any = None) -> Callable:
    """The model as a pure function under `jax.jit`, its state donated as Keras's trainer does."""
    import jax

    import flax_dwconv

    variables = model.trainable_variables, model.non_trainable_variables
    state = [[v.value for v in group] for group in variables]

    def forward(weights, others):
        y, others = model.stateless_call(weights, others, x, training=train)
        return loss(y) if train else y, others

    def step(weights, others):
        if not train:
            return forward(weights, others)[0], None
        (value, others), grads = jax.value_and_grad(forward, has_aux=True)(weights, others)
        return value, ([w - RATE * g for w, g in zip(weights, grads, strict=True)], others)

    compiled = jax.jit(step, donate_argnums=(0, 1) if train else ())
    if accelerate is not None:  # its keyword arguments
        compiled = flax_dwconv.accelerate(compiled, **accelerate)

    def run():
        nonlocal state
        value, new = jax.block_until_ready(compiled(*state))
        state = new or state
        return [value]

    return run


def on_tensorflow(model: Any, x: Any, loss: Any, train: bool) -> Callable:
    """The model as a `tf.function`."""
    import tensorflow as tf

    weights = [v.value for v in model.trainable_variables]

    @tf.function
    def run():
        if not train:
            return [model(x, training=False)]
        with tf.GradientTape() as tape:
            value = loss(model(x, training=True))
        for w, g in zip(weights, tape.gradient(value, weights), strict=True):
            w.assign_sub(RATE * g)
        return [value]

    return run


def on_torch(model: Any, x: Any, loss: Any, train: bool) -> Callable:
    """The model as PyTorch runs it: eagerly."""
    import torch

    weights = [v.value for v in model.trainable_variables]

    def run():
        with torch.inference_mode(not train):
            y = model(x, training=train)
        if not train:
            return [y]
        value = loss(y)
        with torch.no_grad():
            for w, g in zip(weights, torch.autograd.grad(value, weights), strict=True):
                w.sub_(g, alpha=RATE)
        return [value]

    return run


WORKERS: dict[str, Callable[[], Build]] = {
    OURS: partial(jax_layer, our_layer),
    LAX: partial(jax_layer, partial(our_layer, method="lax")),
    "linen": partial(jax_layer, linen_layer),
    "haiku": partial(jax_layer, haiku_layer),
    "torch": torch_layer,
    "tensorflow": tensorflow_layer,
    PLAIN: partial(keras_network, on_jax),
    FAST: partial(keras_network, partial(on_jax, accelerate={})),
    POINTWISE: partial(keras_network, partial(on_jax, accelerate={"pointwise": True})),
    "keras-tensorflow": partial(keras_network, on_tensorflow),
    "keras-torch": partial(keras_network, on_torch),
}
