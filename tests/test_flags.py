"""Train steps under flags of JAX and Flax that change how functions and modules are traced.

`jax_remat3` is JAX's next `jax.checkpoint`. Without `nnx_graph_mode`, nnx takes modules for trees.
Both are off, or on, by default in the versions that have them; a version without one skips.
"""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import flax_dwconv
from flax_dwconv import collect_constraints, constrain, depthwise_conv2d, total_loss

SETTINGS = dict(
    padding="same",
    activation="relu",
    depthwise_initializer="random_normal",
    depthwise_regularizer="l2",
    bias_regularizer="l1",
    activity_regularizer="l2",
    depthwise_constraint="unit_norm",
)
X = oracle.normals(0, 2, 7, 6, 3)
equal = np.testing.assert_array_equal


@pytest.fixture(params=[False, True], ids=["as_is", "remat3"])
def remat3(request):
    """Runs with `jax_remat3` off and on."""
    if not hasattr(jax.config, "jax_remat3"):
        pytest.skip("this JAX has no jax_remat3")
    old = jax.config.jax_remat3
    jax.config.update("jax_remat3", request.param)
    yield
    jax.config.update("jax_remat3", old)


@pytest.fixture(params=[True, False], ids=["graph", "tree"])
def graph_mode(request):
    """Runs with `nnx_graph_mode` on and off."""
    if not hasattr(flax.config, "nnx_graph_mode"):
        pytest.skip("this Flax has no nnx_graph_mode")
    old = flax.config.nnx_graph_mode
    flax.config.update("nnx_graph_mode", request.param)
    yield
    flax.config.update("nnx_graph_mode", old)


# jax_remat3


def test_checkpoints_keep_the_tag(remat3):
    """What is computed again in the backward pass is a sum over taps too, and has its values."""
    x, kernel = oracle.integers(0, 2, 6, 5, 3), oracle.integers(1, 3, 3, 3, 1)

    def loss(x, kernel):
        def body(x, _):
            return jax.nn.relu(depthwise_conv2d(x, kernel, padding="same")), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, None, length=2)[0])

    step = jax.jit(jax.grad(loss, (0, 1)))
    assert "stablehlo.convolution" not in step.lower(x, kernel).as_text()

    # One after the other, and nothing computed again.
    def plain(x, kernel):
        for _ in range(2):
            x = jax.nn.relu(depthwise_conv2d(x, kernel, padding="same", method="lax"))
        return jnp.sum(x)

    jax.tree.map(equal, step(x, kernel), jax.grad(plain, (0, 1))(x, kernel))


def trained(layer, variables):
    """Parameters after a step of SGD onto the constraints, and the penalties."""
    tx = optax.chain(optax.sgd(0.1), constrain(collect_constraints(layer, X)))

    @jax.jit
    def step(params, x):
        def loss(params):
            y, state = layer.apply({"params": params}, x, mutable=["losses"])
            return jnp.sum(y**2) + total_loss(state["losses"]), state["losses"]

        gradients, losses = jax.grad(loss, has_aux=True)(params)
        updates, _ = tx.update(gradients, tx.init(params), params)
        return optax.apply_updates(params, updates), losses

    return step(variables["params"], X)


def test_a_linen_layer_in_remat(remat3):
    layer = flax_dwconv.DepthwiseConv2D(3, **SETTINGS)
    variables = layer.init(jax.random.key(0), X)
    remat = nn.remat(flax_dwconv.DepthwiseConv2D)(3, **SETTINGS)
    jax.tree.map(equal, trained(remat, variables), trained(layer, variables))


def test_an_nnx_layer_in_remat(remat3):
    layer = flax_dwconv.nnx.DepthwiseConv2D(3, 3, **SETTINGS, rngs=nnx.Rngs(0))

    def gradients(run):
        def loss(layer, x):
            y, losses = run(layer, x)
            return jnp.sum(y**2) + total_loss(losses)

        return nnx.to_pure_dict(nnx.state(nnx.jit(nnx.grad(loss))(layer, X)))

    def run(layer, x):
        return layer.with_penalties(x)

    jax.tree.map(equal, gradients(nnx.remat(run)), gradients(run))


# nnx_graph_mode


def test_an_nnx_train_step_is_that_of_linen(graph_mode):
    model = flax_dwconv.nnx.DepthwiseConv2D(3, 3, **SETTINGS, rngs=nnx.Rngs(0))
    linen = flax_dwconv.DepthwiseConv2D(3, **SETTINGS)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tx = optax.chain(optax.sgd(0.1), constrain(collect_constraints(model)))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            y = model(x)
            return jnp.sum(y**2) + total_loss(nnx.state(model, flax_dwconv.nnx.Loss))

        optimizer.update(model, nnx.grad(loss)(model))

    step(model, optimizer, X)
    expected, _ = trained(linen, {"params": params})
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)
    np.testing.assert_allclose(np.linalg.norm(found["kernel"], axis=0), 1, rtol=1e-5)
    assert np.any(found["kernel"] != params["kernel"])


def test_nnx_penalties_of_a_call(graph_mode):
    """Kept in the layer's variables, and captured."""
    model = flax_dwconv.nnx.DepthwiseConv2D(3, 3, **SETTINGS, rngs=nnx.Rngs(0))
    y, penalties = nnx.jit(lambda model, x: model.with_penalties(x))(model, X)
    kept = nnx.jit(lambda model, x: model(x))(model, X)
    equal(kept, y)
    losses = nnx.to_pure_dict(nnx.state(model, flax_dwconv.nnx.Loss))["losses"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), losses, penalties)


def test_nnx_layers_in_a_scan(graph_mode):
    @nnx.vmap
    def stack(rngs):
        return flax_dwconv.nnx.DepthwiseConv2D(3, 3, **SETTINGS, rngs=rngs)

    layers = stack(nnx.Rngs(0).split(3))

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
        return layer(x)

    y, expected = run(X, layers), X
    for kernel in layers.kernel[...]:
        expected = np.maximum(oracle.forward(expected, kernel, padding="same"), 0)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    squares = np.square(layers.kernel[...]).sum((1, 2, 3, 4))
    np.testing.assert_allclose(layers.losses["kernel_penalty"][...], 0.01 * squares, rtol=1e-5)
