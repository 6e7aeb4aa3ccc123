"""Every rank, and the separable layers: against numpy loops, linen beside nnx, to Keras and back.

What the 2-D layer has in common with them is tested with it, in `test_linen.py` and `test_nnx.py`;
parity with live Keras is in `test_keras_parity.py`, streaming in `test_streaming.py`.
"""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import flax_dwconv
from flax_dwconv import keras_io, total_loss

KEY = jax.random.key(0)
LAYERS = ["DepthwiseConv1D", "DepthwiseConv3D", "SeparableConv1D", "SeparableConv2D"]
PENALIZED = dict(
    depthwise_regularizer="l2",
    bias_regularizer="l1",
    activity_regularizer="l1_l2",
)


def rank_of(name):
    return int(name[-2])


def build(name, /, *args, **settings):
    """The linen layer, with three filters if it is separable."""
    args = (3, *args) if name.startswith("Separable") else args
    return getattr(flax_dwconv, name)(*args, **settings)


def build_nnx(name, in_features, /, *args, **settings):
    args = (3, *args) if name.startswith("Separable") else args
    layer = getattr(flax_dwconv.nnx, name)
    return layer(in_features, *args, **settings, rngs=nnx.Rngs(0))


def images(name, seed=0, n=2, c=3, data_format="channels_last"):
    x = oracle.integers(seed, n, *(7, 6, 5)[: rank_of(name)], c)
    return np.moveaxis(x, -1, 1) if data_format == "channels_first" else x


def integer_params(layer, x):
    shapes = jax.eval_shape(layer.init, KEY, x)["params"]
    return {
        name: oracle.integers(seed, *leaf.shape, dtype=leaf.dtype)
        for seed, (name, leaf) in enumerate(sorted(shapes.items()))
    }


# The functions against numpy loops, of any rank

FUNCTIONS = {
    1: flax_dwconv.depthwise_conv1d,
    2: flax_dwconv.depthwise_conv2d,
    3: flax_dwconv.depthwise_conv3d,
}
OPTIONS = [
    dict(),
    dict(padding="same", strides=2),
    dict(padding="same", dilation_rate=2),
    dict(padding=1, strides=2, dilation_rate=2),
    dict(padding=((2, -1), (0, 1), (1, 1)), strides=(1, 2, 3)),
    dict(padding=(2, 1, 0), dilation_rate=(1, 2, 1)),
    dict(padding="causal", strides=2, dilation_rate=2),
]


def of_rank(options, rank):
    """The first entries of what has one for each dimension."""
    return {k: v[:rank] if isinstance(v, tuple) else v for k, v in options.items()}


@pytest.mark.parametrize("method", ["auto", "taps"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rank", [1, 3])
def test_functions_against_numpy(rank, options, data_format, method):
    if options.get("padding") == "causal" and rank > 1:
        pytest.skip("causal padding is of sequences")
    options = of_rank(options, rank) | {"data_format": data_format}
    sizes = (9, 7, 8)[:rank]
    shape = (2, 3, *sizes) if data_format == "channels_first" else (2, *sizes, 3)
    x, kernel = oracle.integers(0, *shape), oracle.integers(1, *(3, 2, 3)[:rank], 3, 2)
    f = functools.partial(FUNCTIONS[rank], **options)
    y, vjp = jax.vjp(functools.partial(f, method=method), x, kernel)
    np.testing.assert_array_equal(y, oracle.forward(x, kernel, **options))
    g = oracle.integers(2, *y.shape)
    for ours, expected in zip(vjp(g), oracle.vjp(x, kernel, g, **options), strict=True):
        np.testing.assert_array_equal(ours, expected)
    # By way of the generic function, and without any of ours.
    generic = functools.partial(flax_dwconv.depthwise_conv, **options)
    np.testing.assert_array_equal(generic(x, kernel), y)
    np.testing.assert_array_equal(generic(x, kernel, method="lax"), y)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_any_batch_axes(rank, batch):
    sizes = (5, 4, 6)[:rank]
    x, kernel = oracle.integers(0, *batch, *sizes, 3), oracle.integers(1, *(2,) * rank, 3, 2)
    y = flax_dwconv.depthwise_conv(x, kernel)
    assert y.shape == (*batch, *[n - 1 for n in sizes], 6)
    np.testing.assert_array_equal(y, oracle.forward(x, kernel))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_kernel_of_another_rank_is_refused(rank):
    other = rank % 3 + 1
    x, kernel = np.ones((2, *(5,) * other, 3), "f4"), np.ones((2,) * other + (3, 1), "f4")
    letters = {1: "k", 2: "kh, kw", 3: "kd, kh, kw"}[rank]
    for call in (
        lambda: FUNCTIONS[rank](x, kernel),
        lambda: FUNCTIONS[rank](x=x, kernel=kernel),
        lambda: FUNCTIONS[rank](x, kernel=kernel),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == (
            f"`kernel` must have shape ({letters}, c, m), got {kernel.shape}."
        )
    for shape in [(3, 1), (2, 2, 2, 2, 3, 1)]:
        with pytest.raises(ValueError) as error:
            flax_dwconv.depthwise_conv(x, np.ones(shape, "f4"))
        assert str(error.value) == (
            "`kernel` must have shape (*window, c, m), with a window of 1, 2 or 3 dimensions, got "
            f"{shape}."
        )


def hessian_vector_product(f, x, kernel, g):
    def gradients(x, kernel):
        return jax.vjp(f, x, kernel)[1](g)

    return jax.jvp(gradients, (x, kernel), (x + 1, kernel - 1))


TRANSFORMATIONS = {
    "jvp": lambda f, x, k, g: jax.jvp(f, (x, k), (x + 1, -k)),
    "hvp": hessian_vector_product,
    "vmap": lambda f, x, k, g: jax.vmap(f, (0, None))(jnp.stack([x, -x]), k),
    "vmap of kernels": lambda f, x, k, g: jax.vmap(f, (None, 0))(x, jnp.stack([k, -k])),
    "per example": lambda f, x, k, g: jax.vmap(
        lambda x, g: jax.vjp(lambda k: f(x[None], k), k)[1](g[None])
    )(x, g),
    "checkpoint": lambda f, x, k, g: jax.vjp(jax.checkpoint(f), x, k)[1](g),
    "scan": lambda f, x, k, g: jax.lax.scan(lambda k, x: (k + 1, f(x, k)), k, jnp.stack([x, -x])),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("rank", [1, 3])
def test_transformations(rank, name):
    """Of `method="taps"`, which on CPU is "auto"; the same bits as XLA's convolution."""
    x, kernel = oracle.integers(0, 2, *(6, 5, 4)[:rank], 3), oracle.integers(1, *(3,) * rank, 3, 2)

    def run(method):
        f = functools.partial(flax_dwconv.depthwise_conv, padding="same", strides=2, method=method)
        g = jnp.ones(jax.eval_shape(f, x, kernel).shape)
        return jax.jit(lambda x, k: TRANSFORMATIONS[name](f, x, k, g))(x, kernel)

    jax.tree.map(np.testing.assert_array_equal, run("taps"), run("lax"))


# The layers


def expected(layer, params, x):
    """The layer's definition in numpy: depthwise, then pointwise, bias, relu."""
    options = dict(
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    first = layer.data_format == "channels_first"
    y = oracle.forward(x, params.get("kernel", params.get("depthwise_kernel")), **options)
    y = np.moveaxis(y, 1, -1) if first else y
    if "pointwise_kernel" in params:
        matrix = params["pointwise_kernel"]
        y = y @ matrix.reshape(matrix.shape[-2:]).astype("f8")
    y = np.maximum(y + params.get("bias", 0), 0)
    return np.moveaxis(y, -1, 1) if first else y


SETTINGS = [
    dict(padding="same", strides=2, depth_multiplier=2),
    dict(padding=1, dilation_rate=2, use_bias=False),
    dict(data_format="channels_first", depth_multiplier=2),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_against_numpy_and_twins(name, settings):
    layer = build(name, 2, **settings, activation="relu", **PENALIZED)
    x = images(name, data_format=layer.data_format)
    params = integer_params(layer, x)

    def of_linen(params, x):
        y, state = layer.apply({"params": params}, x, mutable=["losses"])
        return (jnp.sin(y)).sum() + total_loss(state["losses"]), (y, state["losses"])

    gradient, (y, losses) = jax.jit(jax.grad(of_linen, has_aux=True))(params, x)
    np.testing.assert_array_equal(y, expected(layer, params, x))
    assert layer.compute_output_shape(x.shape) == y.shape
    kernel = "depthwise_kernel" if name.startswith("Separable") else "kernel"
    names = ["activity_penalty", f"{kernel}_penalty", *["bias_penalty"] * layer.use_bias]
    assert set(losses) == set(names)
    assert list(layer._penalty_names) == names

    twin = build_nnx(name, 3, 2, **settings, activation="relu", **PENALIZED)
    graph, state = nnx.split(twin)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(state) | {k: v for k, v in params.items()})
    twin = nnx.merge(graph, state)

    @nnx.jit
    def of_nnx(twin, x):
        def loss(twin):
            y = twin(x)
            return jnp.sin(y).sum() + total_loss(nnx.state(twin, flax_dwconv.nnx.Loss)), y

        return nnx.grad(loss, has_aux=True)(twin)

    twin_gradient, twin_y = of_nnx(twin, x)
    np.testing.assert_array_equal(twin_y, y)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(twin, flax_dwconv.nnx.Loss))["losses"],
        losses,
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(twin_gradient), gradient)


@pytest.mark.parametrize("name", LAYERS)
def test_parameters_and_defaults(name):
    x, rank = images(name, c=4), rank_of(name)
    params = build(name, 3, depth_multiplier=2).init(KEY, x)["params"]
    window = (3,) * rank
    if name.startswith("Separable"):
        wanted = {
            "depthwise_kernel": (*window, 4, 2),
            "pointwise_kernel": (*[1] * rank, 8, 3),
            "bias": (3,),
        }
    else:
        wanted = {"kernel": (*window, 4, 2), "bias": (8,)}
    assert {k: v.shape for k, v in params.items()} == wanted
    twin = build_nnx(name, 4, 3, depth_multiplier=2)
    state = nnx.to_pure_dict(nnx.state(twin, nnx.Param))
    assert {k: v.shape for k, v in state.items()} == wanted
    np.testing.assert_array_equal(params["bias"], np.zeros(wanted["bias"]))


@pytest.mark.parametrize("name", LAYERS)
def test_dtypes(name):
    layer = build(name, 3, dtype="bfloat16", param_dtype="float32", padding="same")
    x = images(name)
    y, variables = layer.init_with_output(KEY, x)
    assert y.dtype == "bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    y, _ = build(name, 3).init_with_output(KEY, x.astype(np.int32))
    assert y.dtype == "float32"


@pytest.mark.parametrize("name", LAYERS)
def test_configs_round_trip(name):
    layer = build(
        name,
        2,
        padding="same",
        activation={"class_name": "LeakyReLU", "config": {"alpha": 0.1}},
        depthwise_initializer="he_normal",
        depthwise_constraint="max_norm",
        precision="highest",
        method="taps",
        name="a",
        **PENALIZED,
    )
    config = json.loads(json.dumps(layer.get_config()))
    assert type(layer).from_config(config) == layer
    whole = {"class_name": name, "config": config}
    assert type(layer).from_config(whole) == layer
    other = "DepthwiseConv2D"
    with pytest.raises(ValueError, match=f"must be of Keras's {name}, got '{other}'"):
        type(layer).from_config({"class_name": other, "config": config})
    twin = getattr(flax_dwconv.nnx, name).from_config(config, in_features=3, rngs=nnx.Rngs(0))
    assert twin.get_config() == config | {"name": None}


@pytest.mark.parametrize("name", LAYERS)
def test_constraints_are_found_and_applied(name):
    prefixes = ["depthwise"] + ["pointwise"] * name.startswith("Separable")
    settings = {f"{prefix}_constraint": "unit_norm" for prefix in prefixes}
    layer, x = build(name, 2, **settings), images(name)
    params = layer.init(KEY, x)["params"]
    tree = flax_dwconv.collect_constraints(nn.Sequential([layer]), x)["layers_0"]
    kernels = [k for k in params if k != "bias"]
    assert [k for k, v in tree.items() if v is not None] == sorted(kernels)
    twin = build_nnx(name, 3, 2, **settings)
    assert flax_dwconv.collect_constraints(twin) == tree
    tx = optax.chain(optax.sgd(0.1), flax_dwconv.constrain(tree))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    for kernel in kernels:
        # Keras's epsilon shortens a vector of norm 0.002 by 1e-4 of it.
        np.testing.assert_allclose(np.linalg.norm(new[kernel], axis=0), 1, rtol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_partitioning_names(name):
    """Of a kernel, its own axes; of a bias, the channels."""
    rank = rank_of(name)
    axes = (*[f"space{i}" for i in range(rank)], "channels", "multiplier")
    init = nn.with_partitioning(nn.initializers.ones, axes)
    variables = build(name, 2, depthwise_initializer=init).init(KEY, images(name))
    first = "depthwise_kernel" if name.startswith("Separable") else "kernel"
    assert nn.get_partition_spec(variables)["params"][first] == jax.sharding.PartitionSpec(*axes)
    box = nnx.with_partitioning(nnx.initializers.ones, axes)
    with nnx.use_eager_sharding(False):
        twin = build_nnx(name, 3, 2, depthwise_initializer=box)
    spec = nnx.get_partition_spec(nnx.state(twin, nnx.Param))
    assert spec[first].get_value() == jax.sharding.PartitionSpec(*axes)


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_that_do_not_fit(name):
    rank = rank_of(name)
    layer, x = build(name, 3), images(name)
    variables = layer.init(KEY, x)
    with pytest.raises(ValueError) as error:
        layer.apply(variables, x[0])
    assert str(error.value) == (
        f"Inputs to `{name}` should have rank {rank + 2}, got the shape {x[0].shape}."
    )
    with pytest.raises(ValueError, match="The layer has a kernel for 3 channels: expected axis -1"):
        layer.apply(variables, x[..., :2])
    with pytest.raises(ValueError, match="Computed output size would be zero or negative"):
        build(name, 30).init(KEY, x)
    with pytest.raises(ValueError, match=f"`depthwise_conv{rank}d` computes it"):
        build(name, 3, strides=2, dilation_rate=2)
    with pytest.raises(ValueError, match=f"The channel dimension of the inputs to `{name}`"):
        layer.compute_output_shape((None,) * (rank + 2))
    with pytest.raises(TypeError, match=f"`{name}` has no argument `kernel_regularizer`, did you "):
        build(name, 3, kernel_regularizer="l2")
    with pytest.raises(ValueError, match="`depthwise_regularizer` identifier: got 'l3'"):
        build(name, 3, depthwise_regularizer="l3")


@pytest.mark.parametrize("word", ["features", "filters", "out_features"])
def test_results_are_not_counted(word):
    with pytest.raises(TypeError) as error:
        flax_dwconv.DepthwiseConv2D(3, **{word: 32})
    assert str(error.value) == (
        f"`DepthwiseConv2D` has no argument `{word}`. It has `depth_multiplier` results for each "
        "channel of its input."
    )


@pytest.mark.parametrize("filters, error", [(0, ValueError), (1.5, TypeError), (None, TypeError)])
def test_filters(filters, error):
    with pytest.raises(error, match="`filters` must be an integer > 0, got"):
        flax_dwconv.SeparableConv2D(filters, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_missing(name):
    settings = {"filters": 3} if name.startswith("Separable") else {}
    layer = getattr(flax_dwconv, name)
    with pytest.raises(ValueError, match="`config` must have a `kernel_size`, got the keys"):
        layer.from_config(settings)
    with pytest.raises(TypeError, match=f"`{name}` needs the argument `kernel_size`."):
        layer(**settings)
    if settings:
        with pytest.raises(ValueError, match="`config` must have a `filters`, got the keys"):
            layer.from_config({"kernel_size": 3})
    with pytest.raises(TypeError, match=f"`{name}` needs the argument `rngs`."):
        getattr(flax_dwconv.nnx, name)(3, **settings, kernel_size=3)


class OfNnx(flax_dwconv.nnx.DepthwiseConv1D):
    def __init__(self, in_features, **kwargs):
        super().__init__(in_features, 3, **kwargs)


class OfLinen(flax_dwconv.DepthwiseConv1D):
    extra: int = 3


def test_subclasses():
    layer = OfNnx(3, padding="same", rngs=nnx.Rngs(0))
    assert layer(np.ones((1, 5, 3), "f4")).shape == (1, 5, 3)
    with pytest.raises(TypeError, match="no argument `pading`, did you mean `padding`"):
        OfNnx(3, pading="same", rngs=nnx.Rngs(0))
    layer = OfLinen(3, extra=4)
    assert layer.extra == 4 and layer.kernel_size == (3,)
    assert "extra" not in layer.get_config()


def test_the_pointwise_half_is_a_matrix_product():
    layer = flax_dwconv.SeparableConv2D(8, 3)
    x = images("SeparableConv2D")
    variables = layer.init(KEY, x)
    step = jax.jit(jax.grad(lambda v, x: layer.apply(v, x).sum()))
    text = step.lower(variables, x).as_text()
    assert "stablehlo.convolution" not in text and "stablehlo.dot_general" in text


# Keras


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("name", ["DepthwiseConv1D", "SeparableConv1D", "SeparableConv2D"])
def test_to_keras_and_back(keras, name, data_format):
    layer = build(
        name, 3, padding="same", depth_multiplier=2, activation="relu", data_format=data_format,
        name="sep",
    )  # fmt: skip
    x = images(name, data_format=data_format)
    params = integer_params(layer, x)
    theirs = keras_io.to_keras(layer, {"params": params})
    np.testing.assert_allclose(theirs(x), layer.apply({"params": params}, x), rtol=1e-6)
    back, variables = keras_io.from_keras(theirs)
    assert back == layer
    jax.tree.map(np.testing.assert_array_equal, variables["params"], params)
    whole = keras.saving.serialize_keras_object(theirs)
    assert keras_io.from_config(whole) == layer


def test_what_keras_has_no_word_for():
    with pytest.raises(ValueError, match="`padding` must be 'valid' or 'same', got 'causal'"):
        keras_io.to_config(flax_dwconv.DepthwiseConv1D(3, padding="causal"))
    with pytest.raises(
        ValueError, match="`layer` must be one of .* for Keras, got DepthwiseConv3D"
    ):
        keras_io.to_config(flax_dwconv.DepthwiseConv3D(3))


# GPU and TPU without a device


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("rank", [1, 3])
def test_taps_on_gpu_and_tpu_if_asked_for(rank, platform):
    x, kernel = np.ones((2, *(6,) * rank, 3), "f4"), np.ones((3,) * rank + (3, 1), "f4")

    def convolutions(method):
        def loss(x, kernel):
            return (flax_dwconv.depthwise_conv(x, kernel, method=method) ** 2).sum()

        traced = jax.jit(jax.grad(loss, (0, 1))).trace(x, kernel)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("stablehlo.convolution")

    assert [convolutions(method) for method in ("taps", "auto", "lax")] == [0, 3, 3]
