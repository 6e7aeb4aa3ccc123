"""Training: next to Keras, penalties, mixed precision, partitioning, checkpoints."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import textwrap

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import keras_training
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import flax_dwconv
from flax_dwconv import (
    DepthwiseConv2D,
    collect_constraints,
    constrain,
    regularizers,
    total_loss,
)

KEY = jax.random.key(0)


def layer(**settings):
    return DepthwiseConv2D(3, padding="same", depthwise_constraint="unit_norm", **settings)


# A model trained next to Keras


def train(pair):
    """As `keras_training.train`."""
    layers = [DepthwiseConv2D(**settings) for settings in keras_training.settings(*pair)]
    model = nn.Sequential(layers)
    x, y = keras_training.X, keras_training.Y
    places = [(f"layers_{i}", name) for i in (0, 1) for name in ("kernel", "bias")]
    params = {"layers_0": {}, "layers_1": {}}
    for (at, name), value in zip(places, keras_training.weights(7), strict=True):
        params[at][name] = jnp.asarray(value)
    asked = collect_constraints(model, x)
    tx = optax.chain(optax.sgd(keras_training.LEARNING_RATE), constrain(asked))

    @jax.jit
    def step(params, state):
        def loss(params):
            out, variables = model.apply({"params": params}, x, mutable=["losses"])
            return jnp.mean((out - y) ** 2) + total_loss(variables["losses"])

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, path, losses = tx.init(params), [params], []
    for _ in range(keras_training.STEPS):
        params, state, loss = step(params, state)
        path.append(params)
        losses.append(loss)
    return [np.stack([p[at][name] for p in path]) for at, name in places], np.array(losses)


def test_training_follows_keras(tmp_path):
    """On TensorFlow if there is one: within 1e-4 at every step (1e-5 of the largest weight)."""
    pytest.importorskip("keras", minversion="3.10")
    file, script = tmp_path / "keras.npz", pathlib.Path(keras_training.__file__)
    backend = "tensorflow" if importlib.util.find_spec("tensorflow") else "jax"
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, script, file], env=environment, check=True)
    with np.load(file) as arrays:
        for kind, pair in enumerate(keras_training.KINDS):
            path, losses = train(pair)
            np.testing.assert_allclose(losses, arrays[f"{kind}/{len(path)}"], rtol=1e-4)
            for i, array in enumerate(path):
                for step, expected in zip(array, arrays[f"{kind}/{i}"], strict=True):
                    atol = 1e-5 * np.abs(expected).max()
                    np.testing.assert_allclose(step, expected, rtol=1e-4, atol=atol)


# Penalties, precision


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = layer(depthwise_regularizer="l2", dtype="bfloat16", activity_regularizer="l1")(x)
        return layer(dtype="float32", bias_regularizer="l1", depthwise_regularizer="l1")(x)


def test_penalties_of_a_nested_model_and_mixed_precision():
    model, x = nn.Sequential([Nested()]), oracle.normals(0, 2, 6, 6, 3)
    params = model.init(KEY, x)["params"]
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype("float32")}

    @jax.jit
    def loss(params):
        y, state = model.apply({"params": params}, x, mutable=["losses"])
        return total_loss(state["losses"]), (state["losses"], y)

    (value, (losses, y)), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    first, second = (losses["layers_0"][f"DepthwiseConv2D_{i}"] for i in (0, 1))
    assert set(first) == {"activity_penalty", "kernel_penalty"} and set(second) == {
        "kernel_penalty",
        "bias_penalty",
    }
    assert {leaf.dtype for leaf in jax.tree.leaves((losses, gradients))} == {np.dtype("float32")}
    np.testing.assert_allclose(value, sum(map(float, jax.tree.leaves(losses))), rtol=1e-6)
    kernel = params["layers_0"]["DepthwiseConv2D_0"]["kernel"]
    np.testing.assert_allclose(first["kernel_penalty"], regularizers.L2()(kernel), rtol=1e-6)
    np.testing.assert_allclose(
        gradients["layers_0"]["DepthwiseConv2D_1"]["kernel"],
        0.01 * np.sign(params["layers_0"]["DepthwiseConv2D_1"]["kernel"]),
        rtol=1e-6,
    )
    assert y.dtype == np.float32


# Files, tables, devices


def test_serialization_round_trip():
    model, x = layer(depthwise_regularizer="l2"), np.ones((1, 4, 4, 3), "f4")
    variables = model.init(KEY, x)
    empty = jax.tree.map(jnp.zeros_like, variables)
    restored = flax.serialization.from_bytes(empty, flax.serialization.to_bytes(variables))
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    plain = flax.serialization.from_state_dict(empty, flax.serialization.to_state_dict(variables))
    jax.tree.map(np.testing.assert_array_equal, plain, variables)


PENALTIES = dict(depthwise_regularizer="l2", activity_regularizer="l1")


@pytest.mark.parametrize("saved", [{}, PENALTIES], ids=["without", "with"])
@pytest.mark.parametrize("read", [{}, PENALTIES], ids=["without", "with"])
def test_a_checkpoint_does_not_depend_on_regularizers(saved, read, tmp_path):
    """README's lines: saved without `Loss`, and read by a model of other regularizers."""
    checkpoint = pytest.importorskip("orbax.checkpoint")
    x = oracle.normals(0, 2, 6, 6, 3)

    def model(seed, settings):
        rngs = nnx.Rngs(seed)
        return nnx.Sequential(
            flax_dwconv.nnx.DepthwiseConv2D(3, 3, rngs=rngs, **settings),
            nnx.BatchNorm(3, rngs=rngs),
            flax_dwconv.nnx.SeparableConv2D(3, 4, 3, rngs=rngs, **settings),
        )

    def state(model):
        return nnx.state(model, nnx.Not(flax_dwconv.nnx.Loss))

    old, new = model(0, saved), model(1, read)
    old(x)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", state(old))
    with checkpoint.StandardCheckpointer() as checkpointer:
        abstract = jax.tree.map(checkpoint.utils.to_shape_dtype_struct, state(new))
        nnx.update(new, checkpointer.restore(tmp_path / "old", abstract))
    assert total_loss(new) == 0
    jax.tree.map(np.testing.assert_array_equal, state(new), state(old))
    for m in (old, new):
        m.eval()
    np.testing.assert_array_equal(new(x), old(x))
    assert (total_loss(new) > 0) == bool(read)


def test_tabulate_shows_shapes_and_flops():
    model = nn.Sequential([DepthwiseConv2D(3, depth_multiplier=2), nn.relu])
    table = nn.tabulate(
        model, KEY, compute_flops=True, console_kwargs={"width": 200, "force_terminal": False}
    )(np.ones((1, 5, 5, 3), "f4"))
    (row,) = [line for line in table.splitlines() if "DepthwiseConv2D" in line]
    assert "float32[1,5,5,3]" in row and "float32[1,3,3,6]" in row
    assert "float32[3,3,3,2]" in table
    assert f" {(2 * 9 + 6) * 54} " in row  # LLVM removes the 6 of `_computed_once`


SHARDED = """
    import pathlib, sys
    import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax, orbax.checkpoint as ocp
    from flax import nnx
    from jax.sharding import NamedSharding, PartitionSpec as P
    import flax_dwconv
    from flax_dwconv import collect_constraints, constrain, total_loss

    assert jax.device_count() == 8
    folder = pathlib.Path(sys.argv[1])
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = [("channels", "model"), ("height", None), ("width", None), ("multiplier", None)]
    axes = ("height", "width", "channels", "multiplier")
    settings = dict(
        depth_multiplier=2, depthwise_regularizer="l2", depthwise_constraint="unit_norm"
    )

    def logical(wrap):
        return dict(
            depthwise_initializer=wrap(nn.initializers.normal(1.0), axes),
            bias_initializer=wrap(nn.initializers.zeros, ("channels",)),
        )

    def equal(tree, other):
        def check(a, b):
            np.testing.assert_array_equal(a, b)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        jax.tree.map(check, tree, other)

    def saved(name, tree):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / name, tree)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder / name, abstract)

    def loss_of(y, losses):
        return jnp.mean(y**2) + total_loss(losses)

    # linen
    model = flax_dwconv.DepthwiseConv2D(3, **settings, **logical(nn.with_logical_partitioning))
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(4, 6, 6, 8)).astype("f4"),
        NamedSharding(mesh, P("data")),
    )
    key = jax.random.key(0)
    specs = nn.get_partition_spec(jax.eval_shape(model.init, key, x))
    shardings = nn.logical_to_mesh_sharding(specs, mesh, rules)
    variables = jax.jit(lambda: nn.unbox(model.init(key, x)), out_shardings=nn.unbox(shardings))()
    params = variables["params"]
    assert params["kernel"].sharding.spec == P(None, None, "model", None)
    assert params["bias"].sharding.spec == P("model")
    tx = optax.chain(optax.sgd(0.1), constrain(collect_constraints(model, x)))

    @jax.jit
    def step(params, x):
        def loss(params):
            y, state = model.apply({"params": params}, x, mutable=["losses"])
            return loss_of(y, state["losses"])
        updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    compiled = step.lower(params, x).compile()
    new = compiled(params, x)
    assert new["kernel"].sharding.is_equivalent_to(params["kernel"].sharding, 4)
    alone = step(jax.device_get(params), jax.device_get(x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new, alone)
    np.testing.assert_allclose(np.linalg.norm(new["kernel"], axis=0), 1, rtol=1e-5)
    equal(saved("linen", new), new)

    # nnx
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        twin = flax_dwconv.nnx.DepthwiseConv2D(
            8, 3, **settings, **logical(nnx.with_partitioning), rngs=nnx.Rngs(0)
        )
        assert twin.kernel[...].sharding.spec == P(None, None, "model", None), twin.kernel
        assert twin.bias[...].sharding.spec == P("model")
        nnx.update(twin, new)
        state = nnx.state(twin, nnx.Param)
        equal(saved("nnx", nnx.to_pure_dict(state)), nnx.to_pure_dict(state))
        restored = saved("nnx_state", state)
        equal(restored, state)
        twin.kernel[...] = jnp.zeros_like(twin.kernel[...])
        nnx.update(twin, restored)
        y, losses = nnx.jit(lambda twin, x: twin.with_penalties(x))(twin, x)
        expected = jax.jit(lambda p, x: model.apply({"params": p}, x))(new, x)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    print("sharded")
"""


def test_partitioning_and_checkpoints_on_eight_devices(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    root = pathlib.Path(flax_dwconv.__file__).parents[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED), tmp_path],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("sharded\n")
