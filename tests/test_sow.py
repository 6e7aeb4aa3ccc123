"""Penalties of linen layers: under lifted transformations, called twice, and fed back."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from flax_dwconv import DepthwiseConv2D, total_loss

KEY = jax.random.key(0)
WEIGHTS = dict(
    padding="same", depthwise_regularizer="l2", bias_regularizer="l1", bias_initializer="ones"
)
ALL = dict(activity_regularizer="l1", **WEIGHTS)
ACTIVITY = dict(padding="same", activity_regularizer="l1")
X = oracle.normals(0, 2, 6, 6, 2)
STEPS = 5


class Step(nn.Module):
    """One step of a recurrent model, or one layer of a stack."""

    settings: dict
    transform: object = None  # of the layer, such as `nn.remat`
    calls: int = 1

    @nn.compact
    def __call__(self, x, _):
        layer = self.transform(DepthwiseConv2D) if self.transform else DepthwiseConv2D
        conv = layer(3, name="conv", **self.settings)
        for _ in range(self.calls):
            x = jnp.tanh(conv(x))
        return x, None


class Loop(nn.Module):
    """What a scan of `Step` computes, written as a loop."""

    settings: dict
    calls: int = 1

    @nn.compact
    def __call__(self, x, _):
        return Step(self.settings, calls=STEPS * self.calls, name="steps")(x, None)


class Around(nn.Module):
    """The scan as a part of a model, beside a layer that has penalties too."""

    scanned: nn.Module

    @nn.compact
    def __call__(self, x, _):
        x = DepthwiseConv2D(1, depthwise_regularizer="l2", name="first")(x)
        return self.scanned(x, None)


def scan(step, **how):
    how = dict(variable_broadcast="params", split_rngs={"params": False}) | how
    return nn.scan(type(step), length=STEPS, **how)(
        step.settings, step.transform, step.calls, name="steps"
    )


def losses(model, x=X, *args, given=None):
    """The collection "losses" of an `apply`, which is the same one eagerly, jitted and fed back."""
    variables = model.init(KEY, x, *args) | (given or {})

    def apply(variables):
        return model.apply(variables, x, *args, mutable=["losses"])[1]

    state = apply(variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), jax.jit(apply)(variables), state
    )
    if not given:
        jax.tree.map(np.testing.assert_array_equal, apply(variables | state), state)
        assert set(model.init(KEY, x, *args)) == {"params"}
    return state["losses"]


# Weights that all steps share

remat = pytest.mark.parametrize(
    "transform", [None, nn.remat, nn.jit], ids=["plain", "remat", "jit"]
)
SHARED = dict(variable_broadcast=["params", "losses"])


def test_the_parameters_of_scan_and_loop_are_the_same():
    step = scan(Step(ALL))
    variables = step.init(KEY, X, None)
    y, _ = step.apply(variables, X, None)
    z, _ = Loop(ALL).apply({"params": {"steps": variables["params"]}}, X, None)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)


@remat
@pytest.mark.parametrize("calls", [1, 2])
def test_weights_count_once_where_the_collection_is_broadcast(transform, calls):
    step = scan(Step(WEIGHTS, transform, calls), **SHARED)
    penalties = losses(step, X, None)["conv"]
    kernel = step.init(KEY, X, None)["params"]["conv"]["kernel"]
    squares = np.square(kernel).sum()
    np.testing.assert_allclose(penalties.pop("kernel_penalty"), 0.01 * squares, rtol=1e-6)
    np.testing.assert_allclose(penalties.pop("bias_penalty"), 0.02, rtol=1e-6)
    assert not penalties


@remat
@pytest.mark.parametrize("calls", [1, 2])
def test_a_carried_collection_adds_activities_and_counts_weights_once(transform, calls):
    zeros = {"conv": dict.fromkeys(["activity_penalty", "kernel_penalty", "bias_penalty"], 0.0)}
    step = scan(Step(ALL, transform, calls), variable_carry="losses")
    variables = step.init(KEY, X, None)
    _, state = step.apply(variables | {"losses": zeros}, X, None, mutable=["losses"])
    params = {"params": {"steps": variables["params"]}}
    _, loop = Loop(ALL, calls).apply(params, X, None, mutable=["losses"])
    for name, value in loop["losses"]["steps"]["conv"].items():
        np.testing.assert_allclose(state["losses"]["conv"][name], value, rtol=1e-5)


@pytest.mark.parametrize("transform, calls", [(None, 2), (nn.remat, 1), (nn.jit, 1)])
def test_activities_of_the_steps_may_be_stacked(transform, calls):
    step = scan(Step(ACTIVITY, transform, calls), variable_axes={"losses": 0})
    stacked = losses(step, X, None)["conv"]["activity_penalty"]
    assert stacked.shape == (STEPS,)
    variables = {"params": {"steps": step.init(KEY, X, None)["params"]}}
    _, loop = Loop(ACTIVITY, calls).apply(variables, X, None, mutable=["losses"])
    np.testing.assert_allclose(total_loss({"losses": stacked}), total_loss(loop), rtol=1e-5)


CARRY = (
    'Write `variable_carry="losses"`, and give `apply` zeros to start from: "losses": {\'conv\': '
    "{'activity_penalty': 0.0, 'kernel_penalty': 0.0, 'bias_penalty': 0.0}}."
)
BROADCAST = 'Write `variable_broadcast=["params", "losses"]`.'
AGAIN = (
    "In `nn.scan`, the penalties of `DepthwiseConv2D` 'conv' would count every time, for weights "
    "that are the same. "
)
LOST = "In `nn.scan`, the penalties of `DepthwiseConv2D` 'conv' would be lost. "
TELL = 'Tell it of the collection too, for instance by `variable_axes={"losses": 0}`.'
REFUSED = [
    (ALL, dict(variable_axes={"losses": 0}), AGAIN + CARRY),
    (WEIGHTS, dict(variable_axes={"losses": 0}), AGAIN + BROADCAST),
    (ALL, dict(variable_carry="losses"), AGAIN + CARRY),  # from nothing
    (ALL, {}, LOST + CARRY),
    (WEIGHTS, {}, LOST + BROADCAST),
    (ACTIVITY, {}, LOST + TELL),
    (
        ALL,
        dict(variable_broadcast=False, variable_axes={"params": 0}, split_rngs={"params": True}),
        LOST + TELL,
    ),
]


@pytest.mark.parametrize("settings, how, message", REFUSED, ids=lambda v: str(v)[:70])
def test_what_would_count_every_step_or_be_lost_is_refused(settings, how, message):
    with pytest.raises(ValueError) as error:
        losses(scan(Step(settings), **how), X, None)
    assert str(error.value) == message
    with pytest.raises(ValueError, match="'scanned/conv' would"):
        losses(Around(scan(Step(settings), **how)), X, None)
    with pytest.raises(ValueError, match="In `nn.(scan` and `nn.remat|remat` and `nn.scan)`"):
        losses(Around(scan(Step(settings, nn.remat), **how)), X, None)
    # Who does not ask for penalties, and who has none, is left alone.
    step = scan(Step(settings), **how)
    step.apply(step.init(KEY, X, None), X, None)
    losses(Around(scan(Step(dict(padding="same")), **how)), X, None)


def test_activities_cannot_be_broadcast():
    with pytest.raises(ValueError, match="broadcasted variable has a data dependency"):
        losses(scan(Step(ALL), **SHARED), X, None)


def test_a_function_that_is_scanned():
    class Functional(nn.Module):
        how: dict

        @nn.compact
        def __call__(self, x):
            conv = DepthwiseConv2D(3, name="conv", **WEIGHTS)
            if self.is_initializing():
                return conv(x)
            how = dict(split_rngs={"params": False}, length=STEPS, **self.how)
            return nn.scan(lambda conv, x, _: (conv(x), None), **how)(conv, x, None)[0]

    penalties = losses(Functional(SHARED))["conv"]
    assert penalties == losses(DepthwiseConv2D(3, name="conv", **WEIGHTS)) | {
        "kernel_penalty": penalties["kernel_penalty"]
    }
    for how in ({}, dict(variable_axes={"losses": 0})):
        with pytest.raises(ValueError, match="'conv' would"):
            losses(Functional(dict(variable_broadcast="params", **how)))


def test_recurrent_layers():
    class Cell(nn.RNNCellBase):
        settings: dict

        @nn.compact
        def __call__(self, carry, x):
            y = DepthwiseConv2D(3, name="conv", **self.settings)(carry + x)
            return y, y

        @nn.nowrap
        def initialize_carry(self, rng, shape):
            return jnp.zeros(shape)

        @property
        def num_feature_axes(self):
            return 3

    x = np.stack([X] * STEPS, 1)
    penalties = losses(nn.RNN(Cell(WEIGHTS), **SHARED), x)["cell"]["conv"]
    assert {value.shape for value in penalties.values()} == {()}
    for how in ({}, dict(variable_axes={"losses": 0})):
        with pytest.raises(ValueError, match="'cell/conv' would"):
            losses(nn.RNN(Cell(WEIGHTS), **how), x)


# Weights of each layer's own

OWN = dict(variable_axes={"params": 0, "losses": 0}, split_rngs={"params": True})


@remat
def test_a_stack_of_layers_has_the_penalties_of_each(transform):
    step = scan(Step(ALL, transform), variable_broadcast=False, **OWN)
    params = step.init(KEY, X, None)["params"]
    penalties = losses(step, X, None)["conv"]
    squares = np.square(params["conv"]["kernel"]).sum((1, 2, 3, 4))
    np.testing.assert_allclose(penalties["kernel_penalty"], 0.01 * squares, rtol=1e-5)
    assert losses(Around(step), X, None)["scanned"]["conv"]["activity_penalty"].shape == (STEPS,)


def test_an_ensemble_has_the_penalties_of_each_member():
    x = np.stack([X] * 3)
    ensemble = nn.vmap(DepthwiseConv2D, **OWN)(3, **ALL)
    assert {value.shape for value in losses(ensemble, x).values()} == {(3,)}
    # of models that are recurrent
    recurrent = nn.vmap(Around, in_axes=(0, None), **OWN)(scan(Step(WEIGHTS), **SHARED))
    assert losses(recurrent, x, None)["scanned"]["conv"]["kernel_penalty"].shape == (3,)


def test_members_that_share_their_weights():
    x = np.stack([X] * 3)
    shared = dict(variable_axes={"params": None, "losses": 0}, split_rngs={"params": False})
    assert losses(nn.vmap(DepthwiseConv2D, **shared)(3, **ACTIVITY), x)[
        "activity_penalty"
    ].shape == (3,)
    with pytest.raises(ValueError) as error:
        losses(nn.vmap(DepthwiseConv2D, **shared)(3, **ALL), x)
    assert str(error.value) == (
        "In `nn.vmap`, the penalties of `DepthwiseConv2D` would count every time, for weights that "
        "are the same. Let the layer see the whole batch, or penalize the weights outside."
    )


def test_partitioned_weights():
    boxed = nn.with_partitioning(nn.initializers.normal(), (None,) * 4)
    settings = WEIGHTS | dict(depthwise_initializer=boxed)
    names = dict(metadata_params={nn.PARTITION_NAME: "layers"})
    step = scan(Step(settings), variable_broadcast=False, **OWN, **names)
    assert losses(step, X, None)["conv"]["kernel_penalty"].shape == (STEPS,)
    assert losses(scan(Step(settings), **SHARED), X, None)["conv"]["kernel_penalty"].shape == ()
    with pytest.raises(ValueError, match=re.escape(AGAIN + BROADCAST)):
        losses(scan(Step(settings), variable_axes={"losses": 0}), X, None)


# Calls


@pytest.mark.parametrize("transform", [None, nn.remat], ids=["plain", "remat"])
def test_two_calls_of_a_layer_are_not_an_apply_that_was_fed_back(transform):
    """`losses` feeds what it got back, and compares."""
    once = losses(Step(ALL, transform, 1), X, None)["conv"]
    twice = losses(Step(ALL, transform, 2), X, None)["conv"]
    assert twice["kernel_penalty"] == once["kernel_penalty"]
    assert twice["bias_penalty"] == once["bias_penalty"]
    assert twice["activity_penalty"] > once["activity_penalty"]


def test_a_layer_with_penalties_fed_back_at_every_step_of_a_training():
    layer = DepthwiseConv2D(3, **ALL)
    variables = layer.init(KEY, X)
    totals = []
    for _ in range(3):
        _, state = layer.apply(variables, X, mutable=["losses"])
        variables = variables | state
        totals.append(total_loss(state))
    assert totals[0] == totals[1] == totals[2] > 0


def test_an_apply_within_a_module_is_its_own():
    class Distilled(nn.Module):
        @nn.compact
        def __call__(self, x):
            teacher = Around(scan(Step(ALL)), parent=None)
            variables = teacher.init(KEY, x, None)
            y, _ = teacher.apply(variables, x, None)
            return y + DepthwiseConv2D(3, name="student", **ALL)(x)

    assert set(losses(Distilled())) == {"student"}


class Jitted(nn.Module):
    """A layer that is called by way of `nn.jit`, and then directly."""

    def setup(self):
        self.conv = DepthwiseConv2D(3, **ALL)

    @nn.jit
    def encode(self, x):
        return self.conv(x)

    def __call__(self, x):
        return self.conv(self.encode(x))


def test_a_trace_that_nn_jit_remembers_counts_as_a_call():
    variables = Jitted().init(KEY, X)
    layer = DepthwiseConv2D(3, **ALL)
    bound = layer.bind({"params": variables["params"]["conv"]}, mutable=["losses"])
    bound(bound(X))
    expected = total_loss(bound.variables)
    for _ in range(3):
        _, state = Jitted().apply(variables, X, mutable=["losses"])
        np.testing.assert_allclose(total_loss(state), expected, rtol=1e-6)


class While(nn.Module):
    """A loop whose length the program decides."""

    carry: str | bool
    calls: int = 1

    @nn.compact
    def __call__(self, x):
        conv = DepthwiseConv2D(3, name="conv", **ALL)
        if self.is_initializing():
            return conv(x)

        def body(conv, state):
            i, x = state
            for _ in range(self.calls):
                x = jnp.tanh(conv(x))
            return i + 1, x

        carry = dict(carry_variables=self.carry)
        return nn.while_loop(lambda _, state: state[0] < STEPS, body, conv, (0, x), **carry)[1]


@pytest.mark.parametrize("calls", [1, 2])
def test_a_while_loop_adds_activities_and_counts_weights_once(calls):
    zeros = {"conv": dict.fromkeys(["activity_penalty", "kernel_penalty", "bias_penalty"], 0.0)}
    given = jax.tree.map(jnp.float32, {"losses": zeros})
    variables = While("losses", calls).init(KEY, X)
    _, state = While("losses", calls).apply(variables | given, X, mutable=["losses"])
    _, loop = Step(ALL, calls=STEPS * calls).apply(variables, X, None, mutable=["losses"])
    for name, value in loop["losses"]["conv"].items():
        np.testing.assert_allclose(state["losses"]["conv"][name], value, rtol=1e-5)
    with pytest.raises(ValueError) as error:
        losses(While(False, calls))
    assert str(error.value) == (
        "In `nn.while_loop`, the penalties of `DepthwiseConv2D` 'conv' would be lost. "
        'Write `carry_variables="losses"`, and give `apply` zeros to start from: '
        f'"losses": {zeros}.'
    )


def test_mapped_variables_lose_penalties_in_words():
    """`nn.WeightNorm` maps all collections, and returns none of them."""

    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.WeightNorm(DepthwiseConv2D(3, name="conv", **WEIGHTS))(x)

    model = Normalized()
    model.apply(model.init(KEY, X), X)
    with pytest.raises(ValueError, match='would be lost. Write `mapped_collections="params"`'):
        losses(model)
