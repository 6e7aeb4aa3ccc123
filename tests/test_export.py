"""A layer as converters meet it: what its program holds, and what jax2onnx makes of it."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx as flax_nnx

import flax_dwconv
from flax_dwconv import activations

X = oracle.normals(0, 2, 9, 8, 3)
# Names, and what is called: a callable is not replaced by the function of its name.
ACTIVATIONS = {
    "relu": "relu",
    "relu6": "relu6",
    "silu": "silu",
    "None": None,
    "jax.nn.relu": jax.nn.relu,
    "jax.nn.relu6": jax.nn.relu6,
    "jax.nn.leaky_relu": jax.nn.leaky_relu,
    "jax.nn.soft_sign": jax.nn.soft_sign,
    "jax.nn.gelu": jax.nn.gelu,
    "lax.exp": jax.lax.exp,
}


def applied(rank=2, **settings):
    """A layer with fixed parameters as a function of its input, and an input."""
    cls = getattr(flax_dwconv, f"DepthwiseConv{rank}D")
    layer = cls(3, padding="same", bias_initializer="random_normal", **settings)
    x = oracle.normals(1, 2, *[9, 8, 7][:rank], 3)
    variables = layer.init(jax.random.key(0), x)
    return lambda x: layer.apply(variables, x), x


def primitives(jaxpr):
    """The names of all equations, those of inner programs included."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += primitives(getattr(inner, "jaxpr", inner))
    return found


@pytest.mark.parametrize("method", ["auto", "lax"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_layer_is_a_convolution_an_addition_and_its_activation(name, method):
    activation = ACTIVATIONS[name]
    f, x = applied(activation=activation, method=method)
    wrapped = {"reshape", "custom_jvp_call", "jit", "pjit"}

    def outline(f):
        return {k: n for k, n in primitives(jax.make_jaxpr(f)(x).jaxpr).items() if k not in wrapped}

    expected = collections.Counter(conv_general_dilated=1, add=1)
    expected += collections.Counter(outline(activations.get(activation)))
    assert outline(f) == dict(expected)


@pytest.mark.parametrize("activation", [jax.nn.relu, jax.nn.relu6], ids=["relu", "relu6"])
@pytest.mark.parametrize("twin", ["linen", "nnx"])
def test_a_rectifier_of_jax_is_called_in_train_steps_too(activation, twin):
    """Nothing of this package but the tag is then in the program of a gradient."""
    settings = dict(padding="same", activation=activation)
    if twin == "linen":
        layer = flax_dwconv.DepthwiseConv2D(3, **settings)
        f = layer.bind(layer.init(jax.random.key(0), X))
    else:
        f = flax_dwconv.nnx.DepthwiseConv2D(3, 3, **settings, rngs=flax_nnx.Rngs(0))
    assert f.activation is activation
    assert f.get_config()["activation"] == activation.__name__
    found = primitives(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(f(x))))(X).jaxpr)
    assert not found.keys() & {"platform_index", "cond", "reduce_precision", "div"}


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_grouped_convolution_in_stablehlo(rank, platform):
    """With `method="lax"` on every platform, by default on those that have no taps."""
    for method in ["lax"] if platform == "cpu" else ["lax", "auto"]:
        f, x = applied(rank, activation="relu", method=method)
        text = jax.export.export(jax.jit(f), platforms=[platform])(x).mlir_module()
        assert text.count("stablehlo.convolution") == text.count("stablehlo.maximum") == 1
        assert "feature_group_count = 3" in text
        assert "reduce_precision" not in text and "stablehlo.slice" not in text


# jax2onnx reads the jaxpr, where every method is one convolution.


def converted(f, x):
    """The ONNX model of `f`, and what onnxruntime computes by it."""
    jax2onnx = pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = jax2onnx.to_onnx(f, [jax.ShapeDtypeStruct(x.shape, x.dtype)])
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    return model.graph.node, y


def groups(nodes):
    """The groups of each Conv node."""
    return [a.i for n in nodes if n.op_type == "Conv" for a in n.attribute if a.name == "group"]


onnx = pytest.mark.filterwarnings("ignore")  # the converter's own


@onnx
@pytest.mark.parametrize("method", ["auto", "lax"])
@pytest.mark.parametrize("name", ["relu", "relu6", "silu", "None", "jax.nn.relu"])
def test_onnx_has_one_grouped_convolution(name, method):
    f, x = applied(activation=ACTIVATIONS[name], method=method, strides=2, depth_multiplier=2)
    nodes, y = converted(f, x)
    assert groups(nodes) == [3]
    assert not {n.op_type for n in nodes} & {"If", "Loop", "Scan", "Slice", "Pad"}
    np.testing.assert_allclose(y, f(x), rtol=1e-5, atol=1e-6)


@onnx
def test_onnx_of_a_model():
    model = nn.Sequential(
        [
            flax_dwconv.DepthwiseConv2D(3, strides=2, padding="same", activation="relu6"),
            flax_dwconv.SeparableConv2D(8, 3, padding="same", activation="relu"),
            flax_dwconv.DepthwiseConv2D(3, dilation_rate=2, padding="same", activation="swish"),
        ]
    )
    variables = model.init(jax.random.key(0), X)
    nodes, y = converted(lambda x: model.apply(variables, x), X)
    assert groups(nodes) == [3, 3, 8]
    np.testing.assert_allclose(y, model.apply(variables, X), rtol=1e-5, atol=1e-6)
