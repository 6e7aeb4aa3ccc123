"""Training: constraints in optax, penalties, mixed precision, partitioning, checkpoints."""

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
from flax.core import meta

import flax_dwconv
from flax_dwconv import (
    DepthwiseConv2D,
    collect_constraints,
    constrain,
    constraints,
    regularizers,
    total_loss,
)

KEY = jax.random.key(0)
MAX, UNIT, NON_NEG = constraints.MaxNorm(), constraints.UnitNorm(), constraints.NonNeg()
Stacked = constraints.Stacked


def updated(tx, params, updates):
    """The parameters after one step, and the updates that made them."""
    updates, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    return optax.apply_updates(params, updates), updates


def tree(seed, *shapes):
    return {
        name: oracle.normals(seed + i, *shape)
        for i, (name, shape) in enumerate(zip("abc", shapes, strict=False))
    }


# constrain


ALL = [
    MAX,
    NON_NEG,
    UNIT,
    constraints.MinMaxNorm(0.5, 1.0, 0.5),
    constraints.RadialConstraint(),
    constraints.MaxNorm(1.0, axis=(0, 1)),
    Stacked(constraints.UnitNorm(), -1),
    lambda w: jnp.clip(w, -0.5, 0.5),
]


@pytest.mark.parametrize("projection", ALL, ids=lambda c: getattr(c, "__name__", str(c)))
def test_updates_land_on_the_constraint(projection):
    params, updates = tree(0, (3, 3, 4, 2), (8,)), tree(2, (3, 3, 4, 2), (8,))
    new, steps = updated(constrain({"a": projection}), params, updates)
    expected = projection(params["a"] + updates["a"])
    np.testing.assert_allclose(new["a"], expected, rtol=1e-6, atol=1e-6)
    assert steps["a"].dtype == np.float32
    np.testing.assert_array_equal(steps["b"], updates["b"])
    np.testing.assert_array_equal(new["b"], params["b"] + updates["b"])


def test_weights_that_are_allowed_keep_their_updates_to_the_bit():
    params, updates = tree(0, (100,)), tree(1, (100,))
    _, steps = updated(constrain({"a": NON_NEG}), params, updates)
    allowed = params["a"] + updates["a"] >= 0
    np.testing.assert_array_equal(steps["a"][allowed], updates["a"][allowed])
    np.testing.assert_array_equal(steps["a"][~allowed], -params["a"][~allowed])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_non_negative_after_any_rounding(scale):
    params = {"a": oracle.normals(0, 10_000)}
    new, _ = updated(constrain(NON_NEG), params, {"a": scale * oracle.normals(1, 10_000)})
    assert new["a"].min() == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_dtypes_are_projected_in_float32(dtype):
    cast = lambda t: jax.tree.map(lambda a: jnp.asarray(300 * a, dtype), t)  # noqa: E731
    params, updates = cast(tree(0, (3, 3, 4, 2))), cast(tree(1, (3, 3, 4, 2)))
    new, steps = updated(constrain({"a": constraints.MaxNorm(300.0)}), params, updates)
    assert new["a"].dtype == steps["a"].dtype == params["a"].dtype
    norm = np.linalg.norm(np.asarray(new["a"], "f4"), axis=0)
    assert 250 < norm.max() < 300 * (1 + 4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    "asked",
    [None, {}, {"a": None}, {"a": {}}, {"a": None, "b": None}, {"a": constraints.Constraint()}],
    ids=str,
)
def test_nothing_asked_nothing_done(asked):
    params, updates = tree(0, (3,), (2,)), tree(2, (3,), (2,))
    _, steps = updated(constrain(asked), params, updates)
    jax.tree.map(np.testing.assert_array_equal, steps, updates)


def test_names_and_subtrees():
    params = {"x": tree(0, (3,), (2,)), "y": [oracle.normals(2, 4), None]}
    new, _ = updated(constrain({"x": "non_neg", "y": [NON_NEG]}), params, params)
    assert all(leaf.min() >= 0 for leaf in jax.tree.leaves(new))


def box(params):
    return jax.tree.map(lambda p: nn.Partitioned(p, (None,)), params)


@pytest.mark.parametrize("kind", [flax.core.freeze, nnx.State, box], ids=lambda k: k.__name__)
def test_other_kinds_of_trees(kind):
    params, updates = {"m": tree(0, (9,), (9,))}, {"m": tree(2, (9,), (9,))}
    new, _ = updated(constrain({"m": {"a": NON_NEG}}), kind(params), kind(updates))
    assert jax.tree.structure(new) == jax.tree.structure(kind(params))
    a, b = jax.tree.leaves(new)
    np.testing.assert_array_equal(a, np.maximum(params["m"]["a"] + updates["m"]["a"], 0))
    np.testing.assert_array_equal(b, params["m"]["b"] + updates["m"]["b"])


def test_vmap():
    params, updates = tree(0, (5, 3, 3, 2, 1)), tree(1, (5, 3, 3, 2, 1))
    tx = constrain({"a": UNIT})
    steps = jax.vmap(lambda p, u: tx.update(u, tx.init(p), p)[0])(params, updates)
    stacked, _ = constrain({"a": Stacked(UNIT)}).update(updates, optax.EmptyState(), params)
    np.testing.assert_allclose(steps["a"], stacked["a"], rtol=1e-5, atol=1e-6)


def test_masked_and_multi_transform():
    params, updates = tree(0, (9,), (9,), (9,)), tree(3, (9,), (9,), (9,))
    everything = constrain({"a": NON_NEG, "b": NON_NEG})
    plain = jax.tree.map(np.add, params, updates)

    new, _ = updated(optax.masked(everything, {"a": True, "b": False, "c": True}), params, updates)
    np.testing.assert_array_equal(new["a"], np.maximum(plain["a"], 0))
    np.testing.assert_array_equal(new["b"], plain["b"])

    tx = optax.multi_transform(
        {"train": everything, "freeze": optax.set_to_zero()},
        {"a": "train", "b": "freeze", "c": "train"},
    )
    new, _ = updated(tx, params, updates)
    np.testing.assert_array_equal(new["a"], np.maximum(plain["a"], 0))
    np.testing.assert_array_equal(new["b"], params["b"])
    np.testing.assert_array_equal(new["c"], plain["c"])


def test_missing_params_are_optaxs_own_error():
    with pytest.raises(ValueError) as expected:
        optax.add_decayed_weights(0.1).update({}, optax.EmptyState(), None)
    with pytest.raises(ValueError) as error:
        constrain({"a": NON_NEG}).update({"a": jnp.ones(3)}, optax.EmptyState())
    assert str(error.value) == str(expected.value)


def test_a_constraint_of_no_parameter_is_an_error():
    with pytest.raises(ValueError) as error:
        constrain({"m": {"kernle": NON_NEG}}).init({"m": {"kernel": jnp.ones(3)}})
    assert str(error.value) == (
        "`constraints` must be a tree like the parameters, got a constraint for 'm/kernle', "
        "which is none of them."
    )
    with pytest.raises(TypeError, match="Could not interpret `constraint` identifier"):
        constrain({"a": 1.0})


# collect_constraints


def layer(**settings):
    return DepthwiseConv2D(3, padding="same", depthwise_constraint=UNIT, **settings)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, train=None):
        return layer(name="conv", bias_constraint="non_neg")(x), None


def lifted(transform, axis, module=Step):
    options = dict(variable_axes={"params": axis}, split_rngs={"params": axis is not None})
    if transform is nn.scan:
        return nn.scan(module, length=3, in_axes=nn.broadcast, **options)
    return nn.vmap(module, axis_size=3, in_axes=None, **options)


class Everything(nn.Module):
    """The layer in every place where a model can have one."""

    given: nn.Module

    def setup(self):
        self.shared = layer()
        self.several = [layer(use_bias=False), nn.BatchNorm(use_running_average=True)]

    def __call__(self, x, *, train, mode="plain"):
        assert train is True and mode == "plain"
        x = self.shared(self.shared(x))
        for module in [*self.several, self.given]:
            x = module(x)
        return x


def test_collect_from_any_nesting():
    given = nn.Sequential([nn.Dropout(0.5, deterministic=False), DepthwiseConv2D(1), layer()])
    model = Everything(given)
    asked = collect_constraints(model, jax.ShapeDtypeStruct((1, 4, 4, 3), "float32"), train=True)
    init = lambda x: model.init(KEY, x, train=True)  # noqa: E731
    params = jax.eval_shape(init, jnp.ones((1, 4, 4, 3)))["params"]
    assert jax.tree.structure(asked, is_leaf=lambda a: a is None) == jax.tree.structure(params)
    assert asked == {
        "shared": {"kernel": UNIT, "bias": None},
        "several_0": {"kernel": UNIT},
        "several_1": {"scale": None, "bias": None},
        "given": {
            "layers_1": {"kernel": None, "bias": None},
            "layers_2": {"kernel": UNIT, "bias": None},
        },
    }
    assert given.layers[2].depthwise_initializer == layer().depthwise_initializer


# Name -> the model, the axes that were added to a weight in turn, the axis of its height then.
STACKS = {
    "remat": (nn.remat(Step), [], 0),
    "jit": (nn.jit(Step), [], 0),
    "scan": (lifted(nn.scan, 0), [0], 1),
    "scan along axis 1": (lifted(nn.scan, 1), [1], 0),
    "vmap": (lifted(nn.vmap, 0), [0], 1),
    "vmap along the last axis": (lifted(nn.vmap, -1), [-1], 0),
    "one for all of a vmap": (lifted(nn.vmap, None), [], 0),
    "vmap of scan of remat": (lifted(nn.vmap, 0, lifted(nn.scan, 1, nn.remat(Step))), [1, 0], 1),
    "scan of jit": (lifted(nn.scan, 1, nn.jit(Step)), [1], 0),
}


@pytest.mark.parametrize("name", STACKS)
def test_collect_from_stacks(name):
    """(3, 3, 3, 3, 1) looks the same along four axes."""
    module, axes, height = STACKS[name]
    model, x = module(), jnp.ones((1, 4, 4, 3))
    kernel, bias = UNIT, NON_NEG
    for axis in axes:
        kernel, bias = Stacked(kernel, axis), Stacked(bias, axis)
    # Before and after flax has traced the model itself: `nn.jit` remembers traces.
    for _ in range(2):
        assert collect_constraints(model, x) == {"conv": {"kernel": kernel, "bias": bias}}
        params = jax.eval_shape(model.init, KEY, x)["params"]["conv"]
        assert not any(map(meta.is_axis_metadata, params.values()))
    w = kernel(oracle.normals(0, *params["kernel"].shape))
    np.testing.assert_allclose(np.linalg.norm(w, axis=height), 1, rtol=1e-5)


def test_collect_from_the_layer_itself_and_from_boxes():
    boxed = nn.with_partitioning(nn.initializers.ones, (None, None, "channels", None))
    model = DepthwiseConv2D(3, depthwise_initializer=boxed, bias_constraint="non_neg")
    x = jnp.ones((1, 4, 4, 2))
    asked = collect_constraints(model, x)
    assert asked == {"kernel": None, "bias": NON_NEG}
    params = model.init(KEY, x)["params"]
    new, _ = updated(constrain(asked), params, jax.tree.map(lambda p: -1.0 - p, params))
    assert np.all(new["bias"] == 0) and isinstance(new["kernel"], nn.Partitioned)
    assert collect_constraints(nn.Dense(2), jnp.ones((1, 2))) == {"kernel": None, "bias": None}


def test_collect_beside_a_bridge_to_nnx():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = DepthwiseConv2D(3, depthwise_constraint="non_neg", name="d")(x)
            return nnx.bridge.to_linen(nnx.Linear, 2, 2, name="l")(x)

    asked = collect_constraints(Model(), jnp.ones((1, 4, 4, 2)))
    assert asked["d"] == {"kernel": NON_NEG, "bias": None}
    assert not jax.tree.leaves(asked["l"])


def test_collect_refuses_what_is_no_module():
    with pytest.raises(TypeError) as error:
        collect_constraints({"kernel": UNIT})
    assert str(error.value) == "`model` must be a linen or an nnx module, got dict."


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
    assert set(first) == {"activity", "kernel"} and set(second) == {"kernel", "bias"}
    assert {leaf.dtype for leaf in jax.tree.leaves((losses, gradients))} == {np.dtype("float32")}
    np.testing.assert_allclose(value, sum(map(float, jax.tree.leaves(losses))), rtol=1e-6)
    kernel = params["layers_0"]["DepthwiseConv2D_0"]["kernel"]
    np.testing.assert_allclose(first["kernel"], regularizers.L2()(kernel), rtol=1e-6)
    np.testing.assert_allclose(
        gradients["layers_0"]["DepthwiseConv2D_1"]["kernel"],
        0.01 * np.sign(params["layers_0"]["DepthwiseConv2D_1"]["kernel"]),
        rtol=1e-6,
    )
    assert y.dtype == np.float32


# Frozen layers


def test_frozen_layers_the_optax_way():
    model = nn.Sequential([layer(), layer()])
    x = oracle.normals(0, 2, 6, 6, 3)
    params = model.init(KEY, x)["params"]
    tx = optax.multi_transform(
        {
            "train": optax.chain(optax.sgd(0.1), constrain(collect_constraints(model, x))),
            "freeze": optax.set_to_zero(),
        },
        {"layers_0": "freeze", "layers_1": "train"},
    )
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, x) ** 2)))(params)
    new, _ = updated(tx, params, gradients)
    jax.tree.map(np.testing.assert_array_equal, new["layers_0"], params["layers_0"])
    np.testing.assert_allclose(np.linalg.norm(new["layers_1"]["kernel"], axis=0), 1, rtol=1e-5)


def test_frozen_layers_in_nnx():
    make = lambda seed: flax_dwconv.nnx.DepthwiseConv2D(  # noqa: E731
        3, 3, depthwise_constraint="unit_norm", depthwise_initializer="uniform", rngs=nnx.Rngs(seed)
    )
    model = nnx.Sequential(make(0), make(1))
    trained = nnx.All(nnx.Param, nnx.PathContains(1))
    asked = collect_constraints(model)
    tx = optax.chain(optax.sgd(0.1), constrain({"layers": {1: asked["layers"][1]}}))
    optimizer = nnx.Optimizer(model, tx, wrt=trained)
    before = np.array(model.layers[0].kernel[...])

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: jnp.sum(model(x) ** 2)  # noqa: E731
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, trained))(model))

    step(model, optimizer, oracle.normals(0, 1, 6, 6, 3))
    np.testing.assert_array_equal(model.layers[0].kernel[...], before)
    norm = np.linalg.norm(model.layers[1].kernel[...], axis=0)
    np.testing.assert_allclose(norm, 1, rtol=1e-5)


# Files, tables, devices


def test_serialization_round_trip():
    model, x = layer(depthwise_regularizer="l2"), np.ones((1, 4, 4, 3), "f4")
    variables = model.init(KEY, x)
    empty = jax.tree.map(jnp.zeros_like, variables)
    restored = flax.serialization.from_bytes(empty, flax.serialization.to_bytes(variables))
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    plain = flax.serialization.from_state_dict(empty, flax.serialization.to_state_dict(variables))
    jax.tree.map(np.testing.assert_array_equal, plain, variables)


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
