"""The nnx layer: the linen layer's twin, bit for bit, inside nnx's transformations."""

import contextlib
import copy
import inspect
import io
import json

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import flax_dwconv
from flax_dwconv import constraints, total_loss
from flax_dwconv.nnx import DepthwiseConv2D, Loss

PENALISED = dict(
    depthwise_regularizer="l2",
    bias_regularizer="l1",
    activity_regularizer="l1_l2",
    padding="same",
)


def build(in_features=3, kernel_size=3, seed=0, **settings):
    return DepthwiseConv2D(in_features, kernel_size, rngs=nnx.Rngs(seed), **settings)


def losses(model):
    """The penalties of the last call as linen has them: a nested dict of arrays."""
    state = nnx.to_pure_dict(nnx.state(model, Loss))
    return state.get("losses", {})


# Twins

TWINS = [
    dict(),
    dict(use_bias=False, depthwise_regularizer="l2", bias_regularizer="l1"),
    dict(strides=2, depth_multiplier=2, activation="tanh", **PENALISED),
    dict(dilation_rate=(2, 1), data_format="channels_first", activation="relu"),
    dict(dtype="bfloat16", activation="relu", **PENALISED),
    dict(dtype="float16", param_dtype="float16", precision="highest", method="lax", **PENALISED),
]


@pytest.mark.parametrize("settings", TWINS, ids=str)
def test_twins_agree_to_the_last_bit(settings):
    linen = flax_dwconv.DepthwiseConv2D(3, **settings)
    model = build(**settings, depthwise_initializer="uniform")
    x = oracle.from_last(oracle.normals(0, 2, 7, 6, 3), linen.data_format)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if linen.use_bias:
        params["bias"] = model.bias[...] = oracle.normals(1, *model.bias.shape).astype(
            model.param_dtype
        )

    @jax.jit
    def of_linen(params, x):
        def loss(params):
            y, state = linen.apply({"params": params}, x, mutable=["losses"])
            penalties = state.get("losses", {})
            return jnp.sum(jnp.sin(y.astype("f4"))) + total_loss(penalties), (y, penalties)

        return jax.grad(loss, has_aux=True)(params)

    @nnx.jit
    def of_nnx(model, x):
        def loss(model):
            y = model(x)
            penalties = nnx.state(model, Loss)
            return jnp.sum(jnp.sin(y.astype("f4"))) + total_loss(penalties), y

        return nnx.grad(loss, has_aux=True)(model)

    gradients, (y, penalties) = of_linen(params, x)
    twin_gradients, twin_y = of_nnx(model, x)
    assert twin_y.dtype == y.dtype
    jax.tree.map(np.testing.assert_array_equal, twin_y, y)
    jax.tree.map(np.testing.assert_array_equal, losses(model), penalties)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(twin_gradients), gradients)


def test_twins_agree_outside_of_jit_and_with_penalties_is_pure():
    settings = dict(depthwise_regularizer="l2", depthwise_initializer="uniform")
    model, linen = build(**settings), flax_dwconv.DepthwiseConv2D(3, **settings)
    variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    x = oracle.normals(0, 2, 6, 6, 3)
    y, penalties = model.with_penalties(x)
    assert model.losses["kernel_penalty"][...] == 0
    expected, state = linen.apply(variables, x, mutable=["losses"])
    np.testing.assert_array_equal(y, expected)
    assert penalties == state["losses"]


WRONG = [
    dict(kernel_size=0),
    dict(strides=(1, 2, 3)),
    dict(strides=2, dilation_rate=2),
    dict(padding="causal"),
    dict(depth_multiplier=True),
    dict(data_format="last"),
    dict(activation="rleu"),
    dict(use_bias=1),
    dict(depthwise_initializer="glorot"),
    dict(bias_regularizer=0.1),
    dict(depthwise_constraint="maxnrom"),
    dict(dtype=int),
    dict(param_dtype=None),
    dict(precision="low"),
    dict(method="fast"),
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_errors_are_those_of_linen(settings):
    settings = {"kernel_size": 3} | settings
    with pytest.raises((TypeError, ValueError)) as expected:
        flax_dwconv.DepthwiseConv2D(**settings)
    with pytest.raises(expected.type) as error:
        build(**settings)
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 6, 6, 4), (1, 2, 9, 3)], ids=str)
def test_errors_of_a_call_are_those_of_linen(shape):
    model = build()
    linen = flax_dwconv.DepthwiseConv2D(3)
    variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    x = np.ones(shape, "f4")
    with pytest.raises(ValueError) as expected:
        linen.apply(variables, x)
    with pytest.raises(ValueError) as error:
        model(x)
    assert str(error.value) == str(expected.value)


@pytest.mark.parametrize("in_features", [0, -1, 1.5, True, None])
def test_in_features_is_checked(in_features):
    wrong_value = in_features in (0, -1) and in_features is not True
    with pytest.raises(ValueError if wrong_value else TypeError) as error:
        build(in_features=in_features)
    assert str(error.value) == f"`in_features` must be an integer > 0, got {in_features!r}."


def test_rngs_are_checked():
    with pytest.raises(TypeError) as error:
        DepthwiseConv2D(3, 3, rngs=0)
    assert str(error.value) == "`rngs` must be an `nnx.Rngs`, got int."
    with pytest.raises(TypeError, match="rngs"):
        DepthwiseConv2D(3, 3)


# The module


def test_signature_is_linens_between_two_of_nnxs():
    signature = inspect.signature(DepthwiseConv2D)
    linen = inspect.signature(flax_dwconv.DepthwiseConv2D).parameters
    shared = [name for name in linen if name not in ("parent", "name")]
    assert list(signature.parameters) == ["in_features", *shared, "rngs"]
    for name in shared:
        assert signature.parameters[name].default == linen[name].default
    assert signature.parameters["rngs"].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(inspect.signature(build()).parameters) == ["x"]


def test_everything_after_the_kernel_size_has_a_name():
    """`nnx.Conv` is written with the features second, which here would be a kernel of 16x16."""
    with pytest.raises(TypeError) as error:
        DepthwiseConv2D(16, 16, (3, 3), rngs=nnx.Rngs(0))
    assert str(error.value) == (
        "`DepthwiseConv2D` takes `in_features`, `kernel_size` without their names and everything "
        "else by name, got 3 arguments without a name."
    )


def test_parameters_are_params_of_the_stream():
    layer = build(depth_multiplier=2)
    assert type(layer.kernel) is type(layer.bias) is nnx.Param
    assert layer.kernel.shape == (3, 3, 3, 2) and layer.bias.shape == (6,)
    np.testing.assert_array_equal(layer.kernel, build(depth_multiplier=2).kernel)
    assert np.any(layer.kernel[...] != build(depth_multiplier=2, seed=1).kernel[...])
    assert build(use_bias=False).bias is None
    assert set(nnx.to_pure_dict(nnx.state(build(use_bias=False)))) == {"kernel"}


def test_an_array_initializes():
    values = oracle.normals(0, 3, 3, 3, 1)
    layer = build(depthwise_initializer=values)
    np.testing.assert_array_equal(layer.kernel, values)
    nnx.jit(lambda layer, x: layer(x))(layer, np.ones((1, 4, 4, 3), "f4"))


def test_config_round_trip():
    settings = dict(strides=2, activation="relu", depthwise_constraint="max_norm", **PENALISED)
    layer = build(**settings)
    config = json.loads(json.dumps(layer.get_config()))
    assert config == flax_dwconv.DepthwiseConv2D(3, **settings).get_config()
    twin = DepthwiseConv2D.from_config(config, in_features=3, rngs=nnx.Rngs(0))
    assert nnx.graphdef(twin) == nnx.graphdef(layer)
    np.testing.assert_array_equal(twin.kernel, layer.kernel)
    named = flax_dwconv.DepthwiseConv2D(3, name="dw").get_config()
    DepthwiseConv2D.from_config(named, in_features=3, rngs=nnx.Rngs(0))
    assert layer.compute_output_shape((None, 9, 9, 3)) == (None, 5, 5, 3)


def test_a_layer_is_one_object():
    layer = build()
    assert layer == layer and layer != build() and len({layer, build()}) == 2
    twin = copy.deepcopy(layer)
    twin.kernel[...] = twin.kernel[...] + 1
    assert np.all(twin.kernel[...] != layer.kernel[...])


def test_repr_and_display():
    layer = build(depthwise_regularizer="l2")
    assert "L2(l2=0.01)" in repr(layer) and "Param" in repr(layer)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        nnx.display(layer)
    assert "kernel" in out.getvalue()


def test_tabulate():
    table = nnx.tabulate(build(), np.ones((1, 5, 5, 3), "f4"), compute_flops=True)
    (row,) = [line for line in table.splitlines() if "float32" in line and "Depth" in line]
    assert "DepthwiseC" in row and "30" in table  # 27 + 3 weights
    assert str((2 * 9 + 6) * 27) in table  # flops: LLVM removes the 6 of `_computed_once`


def test_tabulate_counts_penalties_apart_from_parameters():
    layer = build(**PENALISED)
    x = np.ones((1, 5, 5, 3), "f4")
    how = dict(console_kwargs={"width": 200, "force_terminal": False})
    for call in (lambda: None, lambda: layer(x)):
        call()
        (totals,) = [row for row in nnx.tabulate(layer, x, **how).splitlines() if "Total │" in row]
        assert [cell.split()[0] for cell in totals.split("│")[5:7]] == ["3", "30"]  # Loss, Param
    nnx.pop(layer, Loss)
    assert "Total Parameters: 30 (120 B)" in nnx.tabulate(layer, x, **how)


# Penalties


def test_every_penalty_is_one_variable_replaced_by_every_call():
    layer = build(**PENALISED)
    names = {"activity_penalty", "kernel_penalty", "bias_penalty"}
    assert set(layer.losses) == names and total_loss(nnx.state(layer, Loss)) == 0
    x = oracle.normals(0, 2, 6, 6, 3)
    structure = nnx.graphdef(layer)
    for scale in (1, 1, 2):
        y = layer(scale * x)
        expected = np.abs(y).sum() * 0.01 + np.square(y).sum() * 0.01
        np.testing.assert_allclose(layer.losses["activity_penalty"][...], expected / 2, rtol=1e-5)
        assert nnx.graphdef(layer) == structure
    rest = nnx.state(layer, nnx.Not(nnx.Param))
    assert {v.shape for v in jax.tree.leaves(rest)} == {()} and len(jax.tree.leaves(rest)) == 3
    assert not jax.tree.leaves(nnx.state(layer, nnx.RngState))
    assert total_loss(rest) == total_loss(nnx.state(layer, Loss)) > 0


def test_no_regularizer_no_variable():
    assert not jax.tree.leaves(nnx.state(build(), Loss))
    assert set(build(use_bias=False, **PENALISED).losses) == {"activity_penalty", "kernel_penalty"}


class Twice(nnx.Module):
    def __init__(self):
        self.conv = build(**PENALISED)

    def __call__(self, x):
        return self.conv(self.conv(x))


def test_capture_adds_the_activities_of_a_layer_called_twice_as_linen_does():
    model = Twice()
    x = oracle.normals(0, 2, 6, 6, 3)
    y, captured = nnx.jit(lambda model, x: nnx.capture(model, Loss)(x))(model, x)
    assert total_loss(nnx.state(model, Loss)) == 0  # returned, not kept

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            conv = flax_dwconv.DepthwiseConv2D(3, name="conv", **PENALISED)
            return conv(conv(x))

    variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    expected, state = jax.jit(lambda v, x: Linen().apply(v, x, mutable=["losses"]))(variables, x)
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(captured), state["losses"])


def test_a_capture_of_other_variables_leaves_the_penalties_in_the_layer():
    model = Twice()
    x = oracle.normals(0, 2, 6, 6, 3)
    _, captured = nnx.capture(model, nnx.Intermediate)(x)
    assert not jax.tree.leaves(captured) and total_loss(model) > 0


def test_penalties_are_intermediates():
    layer = build(**PENALISED)
    assert issubclass(Loss, nnx.Intermediate)
    assert set(nnx.state(layer, nnx.Intermediate)["losses"]) == set(layer.losses)
    assert not jax.tree.leaves(nnx.state(layer, nnx.Not((nnx.Param, nnx.Intermediate))))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.PathContains("kernel")))]
    assert paths == [("kernel",)]
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.PathContains("bias")))]
    assert paths == [("bias",)]


@pytest.mark.parametrize("what", [Loss, nnx.Intermediate])
def test_a_call_after_pop_makes_the_penalties_anew(what):
    x = oracle.normals(0, 2, 6, 6, 3)
    layer = build(**PENALISED)
    layer(x)
    structure, expected = nnx.graphdef(layer), losses(layer)

    def train(layer, x):
        return nnx.grad(lambda layer: total_loss((layer(x), layer)[1]))(layer)

    for call in (lambda layer, x: layer(x), nnx.jit(lambda layer, x: layer(x)), nnx.jit(train)):
        popped = nnx.pop(layer, what)
        np.testing.assert_allclose(total_loss(popped), sum(expected.values()), rtol=1e-5)
        assert layer.losses == {} and total_loss(layer) == 0
        call(layer, x)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), losses(layer), expected
        )
        assert nnx.graphdef(layer) == structure
    nnx.pop(layer, what)
    _, captured = nnx.capture(layer, Loss)(x)
    np.testing.assert_allclose(total_loss(captured), sum(expected.values()), rtol=1e-5)
    assert layer.losses == {}


# Bridges and wrappers


def test_a_linen_layer_in_nnx_keeps_its_weights_and_penalties_apart():
    linen = flax_dwconv.DepthwiseConv2D(3, **PENALISED)
    x = oracle.normals(0, 2, 6, 6, 3)
    model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x)
    kernel = model.kernel[...]
    variables = {"params": {"kernel": kernel, "bias": model.bias[...]}}
    expected, state = linen.apply(variables, x, mutable=["losses"])
    for _ in range(2):  # the bridge feeds the penalties back
        np.testing.assert_array_equal(model(x, mutable=["losses"]), expected)
        np.testing.assert_array_equal(model.kernel, kernel)
        assert type(model.kernel) is nnx.Param and type(model.kernel_penalty) is Loss
        assert total_loss(model) == total_loss(nnx.state(model)) == total_loss(state)
    nnx.pop(model, Loss)
    model(x, mutable=["losses"])
    assert total_loss(model) == total_loss(state)


def test_an_nnx_layer_in_linen_has_its_penalties_in_the_collection():
    model = nnx.bridge.ToLinen(DepthwiseConv2D, args=(3, 3), kwargs=PENALISED)
    x = oracle.normals(0, 2, 6, 6, 3)
    variables = model.init(jax.random.key(0), x)
    y, state = model.apply(variables, x, mutable=["losses"])
    linen = flax_dwconv.DepthwiseConv2D(3, **PENALISED)
    expected, penalties = linen.apply({"params": variables["params"]}, x, mutable=["losses"])
    np.testing.assert_array_equal(y, expected)
    assert total_loss(state) == total_loss(penalties)
    _, again = model.apply(variables | state, x, mutable=["losses"])
    assert total_loss(again) == total_loss(state)


def test_weight_norm_around_a_layer_with_penalties():
    model = nnx.WeightNorm(build(**PENALISED), rngs=nnx.Rngs(0))
    x = oracle.normals(0, 2, 6, 6, 3)
    assert list(model.scales) == [("kernel",)]
    for _ in range(2):
        model(x)
    kernel = model.layer_instance.kernel[...]
    np.testing.assert_allclose(np.square(kernel).sum(), 1, rtol=1e-5)  # one feature
    np.testing.assert_allclose(model.layer_instance.losses["kernel_penalty"][...], 0.01, rtol=1e-5)
    gradient = nnx.jit(nnx.grad(lambda model, x: total_loss((model(x), model)[1])))(model, x)
    assert {v.shape for v in jax.tree.leaves(gradient)} >= {kernel.shape, (3,)}


# Transformations


CLOSURES = dict(
    jit=lambda call, x: jax.jit(call)(x),
    nnx_jit=lambda call, x: nnx.jit(call)(x),
    grad=lambda call, x: jax.grad(lambda x: call(x).sum())(x),
    vmap=lambda call, x: jax.vmap(call)(x[None]),
    scan=lambda call, x: jax.lax.scan(lambda x, _: (call(x), None), x, None, length=2),
    nnx_scan=lambda call, x: nnx.scan(call, in_axes=nnx.Carry, out_axes=nnx.Carry, length=2)(x),
)


@pytest.mark.parametrize("transform", CLOSURES.values(), ids=CLOSURES)
@pytest.mark.parametrize("popped", [False, True])
def test_a_call_from_a_closure_says_what_to_do(transform, popped):
    layer = build(**PENALISED)
    if popped:
        nnx.pop(layer, Loss)
    x = oracle.normals(0, 2, 6, 6, 3)
    with pytest.raises(flax.errors.TraceContextError) as error:
        transform(lambda x: layer(x), x)
    assert str(error.value).startswith(
        "A call of `DepthwiseConv2D` keeps its penalties in the layer, which has to be an argument "
        "of the transformed function, of `nnx.jit` for instance in place of `jax.jit`. A layer "
        "from the function's closure is called by `with_penalties`, which returns them, and a "
        "model by `nnx.clone(model)(x)`, which drops them."
    )
    transform(lambda x: layer.with_penalties(x)[0], x)
    transform(lambda x: nnx.clone(layer)(x), x)
    transform(build(padding="same"), x)  # nothing to keep


def test_jit_traces_once():
    layer, count = build(**PENALISED), []

    @nnx.jit
    def call(layer, x):
        count.append(1)
        return layer(x)

    for _ in range(3):
        call(layer, np.ones((1, 4, 4, 3), "f4"))
    assert len(count) == 1 and layer.losses["activity_penalty"][...] > 0


def test_split_and_merge_under_jax():
    layer = build(**PENALISED)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    x = oracle.normals(0, 2, 6, 6, 3)

    @jax.jit
    def call(params, rest, x):
        layer = nnx.merge(graphdef, params, rest)
        y = layer(x)
        return y, nnx.state(layer, Loss)

    y, penalties = call(params, rest, x)
    np.testing.assert_array_equal(y, nnx.jit(lambda m, x: m(x))(layer, x))
    jax.tree.map(np.testing.assert_array_equal, penalties, nnx.state(layer, Loss))


CONSTRAINED = dict(depthwise_constraint="unit_norm", bias_constraint="non_neg", **PENALISED)


@nnx.jit
@nnx.vmap
def stack(rngs):
    return DepthwiseConv2D(3, 3, rngs=rngs, depthwise_initializer="uniform", **CONSTRAINED)


def test_vmap_over_layers():
    layers = stack(nnx.Rngs(0).split(3))
    x = oracle.normals(0, 2, 6, 6, 3)
    y = nnx.jit(nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None)))(layers, x)
    assert layers.kernel.shape == (3, 3, 3, 3, 1) and y.shape == (3, 2, 6, 6, 3)
    for i, kernel in enumerate(layers.kernel[...]):
        np.testing.assert_allclose(y[i], oracle.forward(x, kernel, padding="same"), atol=1e-5)
        squares = np.square(kernel).sum()
        np.testing.assert_allclose(layers.losses["kernel_penalty"][i], 0.01 * squares, rtol=1e-5)


def test_vmap_over_images_through_the_pure_method():
    layer = build(**PENALISED)
    x = oracle.normals(0, 5, 1, 6, 6, 3)
    run = nnx.vmap(lambda layer, x: layer.with_penalties(x), in_axes=(None, 0))
    y, penalties = nnx.jit(run)(layer, x)
    np.testing.assert_allclose(y[:, 0], layer(x[:, 0]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        penalties["activity_penalty"].mean(), layer.losses["activity_penalty"], rtol=1e-5
    )


def test_scan_over_layers():
    layers = stack(nnx.Rngs(0).split(3))
    x = oracle.normals(0, 2, 6, 6, 3)

    @nnx.jit
    def run(layers, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, layers
        )

    y, expected = run(layers, x), x
    for kernel in layers.kernel[...]:
        expected = oracle.forward(expected, kernel, padding="same")
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    squares = np.square(layers.kernel[...]).sum((1, 2, 3, 4))
    np.testing.assert_allclose(layers.losses["kernel_penalty"][...], 0.01 * squares, rtol=1e-5)
    nnx.remat(lambda layers: layers.kernel[...].sum())(layers)


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit])
def test_scan_over_time(jit):
    """A carried layer is called once a step, and so has the penalties of the last step."""
    loop = build(**PENALISED)
    x = y = oracle.normals(0, 2, 6, 6, 3)
    for _ in range(4):
        y = loop(y)
    carried = nnx.StateAxes({Loss: nnx.Carry, ...: None})
    for axis, how in [(carried, {}), (None, dict(graph=False))]:
        axes = dict(in_axes=(nnx.Carry, axis), out_axes=nnx.Carry, length=4)
        run = jit(nnx.scan(lambda x, layer: layer(x), **axes, **how))
        layer = build(**PENALISED)
        np.testing.assert_allclose(run(x, layer), y, rtol=1e-4, atol=1e-6)
        for name, value in losses(loop).items():
            np.testing.assert_allclose(layer.losses[name][...], value, rtol=1e-4)
    _, penalties = jax.lax.scan(lambda x, _: loop.with_penalties(x), x, None, length=4)
    assert penalties["kernel_penalty"].shape == (4,)
    np.testing.assert_allclose(
        penalties["activity_penalty"][-1], layer.losses["activity_penalty"], rtol=1e-4
    )


# Constraints


def test_optimizer_lands_on_the_constraints():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = stack(nnx.Rngs(0).split(3))
            self.more = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0)), build(**CONSTRAINED)])
            self.same = self.more[1]

    model = Model()
    unit, non_negative = constraints.UnitNorm(), constraints.NonNeg()
    tree = flax_dwconv.collect_constraints(model)
    assert tree == {
        "layers": {
            "kernel": constraints.Stacked(unit),
            "bias": constraints.Stacked(non_negative),
        },
        "more": {0: {"kernel": None, "bias": None}, 1: {"kernel": unit, "bias": non_negative}},
    }
    optimizer = nnx.Optimizer(
        model, optax.chain(optax.sgd(0.5), flax_dwconv.constrain(tree)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return optax.tree.sum(jax.tree.map(jnp.sin, nnx.state(model, nnx.Param)))

        optimizer.update(model, nnx.grad(loss)(model))

    step(model, optimizer)
    norm = np.linalg.norm
    np.testing.assert_allclose(norm(model.layers.kernel[...], axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(norm(model.same.kernel[...], axis=0), 1, rtol=1e-5)
    assert np.all(model.layers.bias[...] == 0) and np.all(model.same.bias[...] == 0)
    np.testing.assert_array_equal(model.more[0].bias, np.full(2, -0.5, "f4"))


@pytest.mark.parametrize("axis", [0, 2, 4])
def test_axis_of_a_stack(axis):
    @nnx.vmap(in_axes=0, out_axes=axis)
    def stack(_):
        settings = dict(use_bias=False, depthwise_constraint="unit_norm")
        return build(depthwise_initializer="ones", **settings)

    tree = flax_dwconv.collect_constraints(stack(np.zeros(5, "f4")))
    assert tree == {"kernel": constraints.Stacked(constraints.UnitNorm(), axis)}
    w = oracle.normals(0, 5, 3, 3, 3, 1)
    projected = np.moveaxis(tree["kernel"](np.moveaxis(w, 0, axis)), axis, 0)
    np.testing.assert_allclose(np.linalg.norm(projected, axis=1), 1, rtol=1e-5)


def test_stack_of_stacks():
    layer = build(depthwise_constraint="unit_norm")
    layer.kernel.set_value(oracle.normals(0, 2, 3, 3, 3, 3, 1))  # an axis of 2, one of 3, then it
    tree = flax_dwconv.collect_constraints(layer)
    unit = constraints.UnitNorm()
    assert tree["kernel"] == constraints.Stacked(constraints.Stacked(unit, 0), 1)
    projected = tree["kernel"](layer.kernel[...])
    np.testing.assert_allclose(np.linalg.norm(projected, axis=2), 1, rtol=1e-5)


def test_arrays_in_place_of_params():
    """As `nnx.Conv` takes them."""
    layer = build()
    x = oracle.normals(0, 1, 5, 5, 3)
    y = layer(x)
    np.testing.assert_array_equal(nnx.as_pure(layer)(x), y)
    layer.kernel = 2 * layer.kernel[...]
    np.testing.assert_array_equal(layer(x), 2 * y)


# Partitioning


@pytest.mark.parametrize("wrap", [nnx.with_partitioning, nn.with_partitioning])
def test_sharding_names_of_an_initializer(wrap):
    names = ("height", "width", "channels", "multiplier")
    with nnx.use_eager_sharding(False):
        layer = build(depthwise_initializer=wrap(nn.initializers.normal(), names), **PENALISED)
    spec = nnx.get_partition_spec(nnx.state(layer))
    assert spec["kernel"].get_value() == jax.sharding.PartitionSpec(*names)
    assert spec["bias"].get_value() == jax.sharding.PartitionSpec()
    assert layer.kernel.shape == (3, 3, 3, 1)
    layer(np.ones((1, 4, 4, 3), "f4"))
