"""Constraints in optax, trees of what a model has of them and of depthwise kernels."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
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
    depthwise_kernels,
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
    with pytest.raises(TypeError, match="Could not interpret `constraints` identifier"):
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
    """By their shape, (3, 3, 3, 3, 1), weights may be stacked along any of four axes."""
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


@pytest.mark.parametrize("f", [collect_constraints, depthwise_kernels])
def test_a_linen_model_needs_its_inputs(f):
    with pytest.raises(TypeError, match="A linen `model` is traced: what it is called with must"):
        f(DepthwiseConv2D(3))


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


# depthwise_kernels


class Block(nn.Module):
    """Layers under names that say nothing, beside convolutions of the same shape."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(3, (3, 3), name="stem")(x)
        x = DepthwiseConv2D(3, depth_multiplier=3, name="one")(x)
        x = nn.Conv(9, (1, 1), name="two")(x)
        x = nn.BatchNorm(use_running_average=not train, name="three")(x)
        x = flax_dwconv.SeparableConv2D(9, 3, use_bias=False, padding="same", name="four")(x)
        x = nn.Conv(18, (3, 3), feature_group_count=9, name="five")(x)
        x = nn.Conv(18, (3, 3), feature_group_count=2, name="six")(inputs=x)
        return nn.Conv(18, (3, 3), feature_group_count=18, name="seven")(inputs=x)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Block(name="block")(x, train=False)
        return lifted(nn.vmap, 1)(name="stack")(x)[0].sum(0)


def found(mask):
    """The paths of the depthwise kernels."""
    flat, _ = jax.tree_util.tree_flatten_with_path(mask)
    assert all(isinstance(leaf, bool) for _, leaf in flat)
    return {"/".join(str(getattr(k, "key", k)) for k in path) for path, leaf in flat if leaf}


BLOCK = {"one/kernel", "four/depthwise_kernel", "five/kernel", "seven/kernel"}


def decayed(params, mask, updated_params):
    """Weight decay and nothing else: what it moved is what the mask says."""
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params, updated_params)
    jax.tree.map(lambda m, p: np.testing.assert_equal(m, p), moved, mask)


def test_depthwise_kernels_of_a_linen_model():
    x = jnp.ones((1, 9, 9, 3))
    model = Nested()
    shapes = jax.eval_shape(model.init, KEY, x)["params"]
    kernels = depthwise_kernels(model, x)
    assert jax.tree.structure(kernels) == jax.tree.structure(shapes)
    assert found(kernels) == {f"block/{name}" for name in BLOCK} | {"stack/conv/kernel"}

    params = jax.tree.map(lambda p: jnp.ones(p.shape), shapes)
    mask = jax.tree.map(lambda dw, p: not dw and p.ndim > 1, kernels, params)
    tx = optax.chain(optax.add_decayed_weights(0.1, mask=mask), optax.sgd(0.1))
    new, _ = updated(tx, params, jax.tree.map(jnp.zeros_like, params))
    decayed(params, mask, new)
    assert mask["block"]["two"] == {"kernel": True, "bias": False}


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 3, (3, 3), rngs=rngs)
        self.one = flax_dwconv.nnx.DepthwiseConv2D(3, 3, depth_multiplier=3, rngs=rngs)
        self.two = nnx.Conv(9, 9, (1, 1), rngs=rngs)
        self.three = nnx.BatchNorm(9, use_running_average=True, rngs=rngs)
        self.four = flax_dwconv.nnx.SeparableConv2D(9, 9, 3, use_bias=False, rngs=rngs)
        self.five = nnx.Conv(9, 18, (3, 3), feature_group_count=9, rngs=rngs)
        self.six = nnx.Conv(18, 18, (3, 3), feature_group_count=2, rngs=rngs)
        self.seven = nnx.Conv(18, 18, (3, 3), feature_group_count=18, rngs=rngs)


def test_depthwise_kernels_of_an_nnx_model():
    model = nnx.Sequential(NNXBlock(nnx.Rngs(0)))
    kernels = depthwise_kernels(model)
    assert found(kernels) == {f"layers/0/{name}" for name in BLOCK}
    params = nnx.state(model, nnx.Param)
    mask = jax.tree.map(lambda dw: not dw, kernels)
    before = jax.tree.map(jnp.copy, nnx.as_pure(params))
    tx = optax.chain(optax.add_decayed_weights(0.1, mask=mask), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, params))
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    zero = jax.tree.map(lambda p: not np.any(p), before)  # biases, which decay to themselves
    decayed(before, jax.tree.map(lambda m, z: m and not z, mask, zero), after)


def test_depthwise_kernels_of_what_is_no_module():
    with pytest.raises(TypeError, match="`model` must be a linen or an nnx module, got dict"):
        depthwise_kernels({})


@pytest.mark.parametrize("name", STACKS)
def test_depthwise_kernels_of_stacks(name):
    module, _, _ = STACKS[name]
    for _ in range(2):
        kernels = depthwise_kernels(module(), jnp.ones((1, 4, 4, 3)))
        assert kernels == {"conv": {"kernel": True, "bias": False}}
