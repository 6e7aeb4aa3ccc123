"""The peers that are timed: functions that import their framework, each in its own process.

They return `build(subject, mode)`, which returns the variants of doing that work: functions without
arguments that return when their results, a pytree, are there. A layer in JAX needs less:
`layer(case)`, which returns a function of x, kernel and bias to the result, or if it is causal of
x, kernel and state to the result and the next state; `jax_layer` compiles and differentiates it.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import flax_dwconv
from flax_dwconv.benchmark.cases import Case

Work = Callable[[], Any]
Build = Callable[[Any, str], Mapping[str, Work]]
Apply = Callable[..., Any]
Layer = Callable[[Case], Apply]

OURS, LAX = "flax_dwconv", "lax"
PEERS = {"torch": "torch", "tensorflow": "tensorflow", "linen": "flax", "haiku": "haiku"}  # modules
PEERS |= {"shifts": "jax"}
FAMILIES = {"images": ("torch", "tensorflow", "linen", "haiku"), "volumes": ("torch", "linen")}
FAMILIES |= {"sequences": ("torch", "shifts")}
ON_JAX = PLAIN, FAST, POINTWISE = "keras-jax", "keras-jax-accelerated", "keras-jax-pointwise"
BACKENDS = {"keras-tensorflow": "tensorflow", "keras-torch": "torch"}  # of Keras, beside JAX
RATE = 1e-4  # of SGD: too low to lead anywhere


def compiled_layer(make: Callable[..., Apply], convert: Any, wait: Any = lambda y: y) -> Build:
    """Layers that are compiled: `make(case, train)`, which gives gradients too if it is to train.

    Args:
      make: makes what is called with x, kernel, bias or state, and to train the cotangent.
      convert: from numpy to the framework's arrays.
      wait: for results, where calls return before these are there.
    """
    make = functools.cache(make)  # what a framework compiled is kept with the function

    def build(case: Case, mode: str) -> dict[str, Work]:
        f, arrays = make(case, mode == "train"), [*map(convert, case.arrays(mode))]
        return {"jit": lambda: wait(f(*arrays))}

    return build


def jax_layer(layer: Layer) -> Build:
    """Layers under `jax.jit`."""
    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8)))  # XLA's start is no compile time

    def make(case: Case, train: bool) -> Apply:
        apply, causal = layer(case), case.padding == "causal"

        def step(*arrays: jax.Array) -> Any:
            *operands, g = arrays
            y, vjp, *state = jax.vjp(apply, *operands, has_aux=causal)
            return y, *state, vjp(g)

        return jax.jit(step if train else apply)

    return compiled_layer(make, jnp.asarray, jax.block_until_ready)


def our_layer(case: Case, method: Any = "auto") -> Apply:
    """This package's layer."""
    if case.padding == "causal":
        return partial(flax_dwconv.causal_conv1d, method=method)
    make, activation = getattr(flax_dwconv, f"DepthwiseConv{len(case.size)}D"), case.activation
    layer = make(case.kernel, case.stride, case.padding, activation=activation, method=method)
    return lambda x, kernel, bias: layer.apply({"params": {"bias": bias, "kernel": kernel}}, x)


def activation_of(case: Case, library: Any) -> Apply:
    """Returns the activation of a layer, from a library that has it as a function of its name.

    Args:
      case: the layer.
      library: `flax.linen` or `tf.nn`.
    """
    match case.activation:
        case "linear":
            return lambda y: y
        case "hard_silu":  # `tf.nn` has none
            return lambda y: y * library.relu6(y + 3) * (1 / 6)
        case name:
            return getattr(library, name)


def linen_layer(case: Case) -> Apply:
    """`flax.linen.Conv`, one group for each channel."""
    c, padding = case.channels, case.padding.upper()
    layer: Any = nn.Conv(c, case.kernel, case.stride, padding, feature_group_count=c)
    activation = activation_of(case, nn)
    return lambda x, kernel, bias: activation(  # a kernel (kh, kw, 1, c)
        layer.apply({"params": {"bias": bias, "kernel": kernel.swapaxes(-1, -2)}}, x)
    )


def haiku_layer(case: Case) -> Apply:
    """`haiku.DepthwiseConv2D`."""
    import haiku

    @haiku.without_apply_rng
    @haiku.transform
    def layer(x: Any) -> Any:
        make, padding = getattr(haiku, f"DepthwiseConv{len(case.size)}D"), case.padding.upper()
        y = make(1, case.kernel, case.stride, padding=padding, name="layer")(x)
        return activation_of(case, nn)(y)

    return lambda x, kernel, bias: layer.apply(  # a kernel (kh, kw, 1, c)
        {"layer": {"b": bias, "w": kernel.swapaxes(-1, -2)}}, x
    )


def shifts_layer(case: Case) -> Apply:
    """The causal convolution as JAX programs write it by hand: a sum of shifted inputs."""

    def apply(x: Any, kernel: Any, state: Any = None) -> tuple[Any, Any]:
        if state is None:
            state = jnp.zeros((len(x), len(kernel) - 1, case.channels), x.dtype)
        past, length = jnp.concatenate([state, x], axis=1), x.shape[1]
        terms = (past[:, i : i + length] * kernel[None, None, i, :, 0] for i in range(len(kernel)))
        return functools.reduce(operator.add, terms), past[:, length:]

    return apply


def torch_layer() -> Build:
    """PyTorch, with the channels first and last in memory."""
    import torch
    from torch.nn import functional

    def build(case: Case, mode: str) -> dict[str, Work]:
        train, same, c = mode == "train", case.padding == "same", case.channels
        convolve: Any = partial(getattr(functional, f"conv{len(case.size)}d"), groups=c)
        pads = [k // 2 if same else 0 for k in case.kernel]
        if case.activation == "linear":
            activation = torch.nn.Identity()
        else:
            name = "hardswish" if case.activation == "hard_silu" else case.activation
            # In place, unless the gradient would need a copy of what it overwrites.
            in_place = not train or name in ("relu", "relu6")
            activation = partial(getattr(functional, name), inplace=in_place)

        def forward(x: Any, kernel: Any, *other: Any) -> Any:
            if case.padding != "causal":
                y = convolve(x, kernel, *other, case.stride, pads)
                return activation(y), ()
            before = case.kernel[0] - 1
            if other:  # the state
                past = torch.cat([*other, x], -1)
                return convolve(past, kernel), past[..., -before:]
            return convolve(x, kernel, padding=before)[..., : x.shape[-1]], x[..., -before:]

        def run(operands: list[Any], cotangent: list[Any]) -> Any:
            with torch.inference_mode(not train):
                y, state = forward(*operands)
            return y, state, torch.autograd.grad(y, operands, *cotangent) if train else ()

        x, kernel, *others = map(torch.from_numpy, case.arrays(mode))
        arrays = x, kernel.movedim(-2, 0), *others
        if same:
            # PyTorch pads both ends alike. On flipped images that is what "same" does, because the
            # window never reaches the last row: it is the same work with the same numbers.
            arrays = [a.flip([*range(1, a.ndim - 1)]) for a in arrays]
        copy = partial(torch.clone, memory_format=torch.contiguous_format)
        last = [copy(a).movedim(-1, min(1, a.ndim - 1)) for a in arrays]
        layouts = {"contiguous": [copy(a) for a in last], "channels-last": last}
        return {
            name: partial(run, [a.requires_grad_(train) for a in laid[:3]], laid[3:])
            for name, laid in layouts.items()
        }

    return build


def tensorflow_layer() -> Build:
    """TensorFlow, as a `tf.function`."""
    import tensorflow as tf

    def make(case: Case, train: bool) -> Apply:
        activation = activation_of(case, tf.nn)

        @tf.function
        def run(x: Any, kernel: Any, bias: Any, *cotangent: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch([x, kernel, bias] if train else [])
                strides, padding = [1, case.stride, case.stride, 1], case.padding.upper()
                y = tf.nn.depthwise_conv2d(x, kernel, strides, padding)
                y = activation(tf.nn.bias_add(y, bias))
            return y, tape.gradient(y, [x, kernel, bias], *cotangent) if train else ()

        return run

    return compiled_layer(make, tf.constant)


def keras_network(network: Callable[..., Work]) -> Build:
    """Networks of `keras.applications` with random weights, on the backend of this process.

    A name with a number, such as "MobileNetV2/8", is a network and the images of its batch.
    """
    import keras

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def build(name: str, mode: str) -> dict[str, Work]:
        keras.utils.set_random_seed(0)
        name, _, batch = name.partition("/")
        model = getattr(keras.applications, name)(weights=None, classifier_activation=None)
        shape = (int(batch or 1), 224, 224, 3)
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        x, y = map(keras.ops.convert_to_tensor, (x, [1] * shape[0]))
        return {"": network(model, x, partial(loss, y), mode == "train")}

    return build


def on_jax(model: Any, x: Any, loss: Any, train: bool, accelerate: Any = None) -> Work:
    """The model as a pure function under `jax.jit`, its state donated as Keras's trainer does."""
    variables = model.trainable_variables, model.non_trainable_variables
    state = [[v.value for v in group] for group in variables]

    def forward(weights: Any, others: Any) -> tuple[Any, Any]:
        y, others = model.stateless_call(weights, others, x, training=train)
        return loss(y) if train else y, others

    def step(weights: Any, others: Any) -> tuple[Any, Any]:
        if not train:
            return forward(weights, others)[0], None
        (value, others), grads = jax.value_and_grad(forward, has_aux=True)(weights, others)
        return value, ([w - RATE * g for w, g in zip(weights, grads, strict=True)], others)

    compiled = jax.jit(step, donate_argnums=(0, 1) if train else ())
    if accelerate is not None:  # its keyword arguments
        compiled = flax_dwconv.accelerate(compiled, **accelerate)

    def run() -> Any:
        nonlocal state
        value, new = jax.block_until_ready(compiled(*state))
        state = new or state
        return value

    return run


def on_tensorflow(model: Any, x: Any, loss: Any, train: bool) -> Work:
    """The model as a `tf.function`."""
    import tensorflow as tf

    weights = [v.value for v in model.trainable_variables]

    @tf.function
    def run() -> Any:
        if not train:
            return model(x, training=False)
        with tf.GradientTape() as tape:
            value = loss(model(x, training=True))
        for w, g in zip(weights, tape.gradient(value, weights), strict=True):
            w.assign_sub(RATE * g)
        return value

    return run


def on_torch(model: Any, x: Any, loss: Any, train: bool) -> Work:
    """The model as PyTorch runs it: eagerly."""
    import torch

    weights = [v.value for v in model.trainable_variables]

    def run() -> Any:
        with torch.inference_mode(not train):
            y = model(x, training=train)
        if not train:
            return y
        value = loss(y)
        with torch.no_grad():
            for w, g in zip(weights, torch.autograd.grad(value, weights), strict=True):
                w.sub_(g, alpha=RATE)
        return value

    return run


WORKERS: dict[str, Callable[[], Build]] = {
    OURS: partial(jax_layer, our_layer),
    LAX: partial(jax_layer, partial(our_layer, method="lax")),
    "linen": partial(jax_layer, linen_layer),
    "haiku": partial(jax_layer, haiku_layer),
    "shifts": partial(jax_layer, shifts_layer),
    "torch": torch_layer,
    "tensorflow": tensorflow_layer,
    PLAIN: partial(keras_network, on_jax),
    FAST: partial(keras_network, partial(on_jax, accelerate={})),
    POINTWISE: partial(keras_network, partial(on_jax, accelerate={"pointwise": True})),
    "keras-tensorflow": partial(keras_network, on_tensorflow),
    "keras-torch": partial(keras_network, on_torch),
}
