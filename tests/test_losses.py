"""`total_loss`: what holds penalties, and what does not."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_dwconv
from flax_dwconv import DepthwiseConv2D, total_loss
from flax_dwconv.nnx import Loss

PENALISED = dict(depthwise_regularizer="l2", bias_regularizer="l1", activity_regularizer="l1")
X = np.arange(2 * 5 * 5 * 3, dtype="f4").reshape(2, 5, 5, 3)


class Net(nnx.Module):
    """Two layers with penalties, at different depths, and one that has none."""

    def __init__(self, **settings):
        rngs = nnx.Rngs(0)
        self.first = flax_dwconv.nnx.DepthwiseConv2D(3, 1, rngs=rngs, **settings)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.rest = nnx.List([flax_dwconv.nnx.SeparableConv2D(3, 4, 3, rngs=rngs, **settings)])

    def __call__(self, x):
        return self.rest[0](self.norm(self.first(x)))


# What holds penalties

COLLECTIONS = [
    ({}, 0.0),
    ({"losses": {}}, 0.0),
    ({"kernel_penalty": 0.5}, 0.5),
    ({"conv": {"kernel_penalty": np.float32(0.5), "activity_penalty": np.ones(3, "f4")}}, 3.5),
    (flax.core.freeze({"losses": {"conv": {"kernel_penalty": 0.5}}}), 0.5),
    ({"losses": {"kernel_penalty": 0.5}, "params": {"kernel": np.ones(9, "f4")}}, 0.5),
    ({"params": {"losses": {"kernel": np.ones(9)}}, "losses": {"kernel_penalty": 0.5}}, 0.5),
    # a module whose name is "losses", beside another
    ({"losses": {"kernel_penalty": 0.5}, "conv": {"bias_penalty": 0.25}}, 0.75),
    # of other modules: linen's `sow` makes tuples; a scan stacks them
    ({"losses": {"moe": {"balance": (np.ones(4, "f4"), 2.0)}, "aux": 1.0}}, 7.0),
    ({"conv": {"kernel_penalty": 0.5}, "moe": {"balance": (np.ones(4, "f4"),)}, "aux": 1.0}, 5.5),
    ({"moe": {"balance": (0.25,)}}, 0.25),
    ({"kernel_penalty": jnp.full(70_000, 1, jnp.float16)}, 70_000.0),
]


@pytest.mark.parametrize("losses, expected", COLLECTIONS, ids=lambda v: str(v)[:50])
def test_collections(losses, expected):
    total = total_loss(losses)
    assert total == expected
    assert total.shape == () and total.dtype == np.float32
    assert jax.jit(total_loss)(losses) == expected


def test_what_a_linen_model_returns():
    model = nn.Sequential(
        [DepthwiseConv2D(3, **PENALISED), nn.BatchNorm(use_running_average=False)]
    )
    variables = model.init(jax.random.key(0), X)
    _, state = model.apply(variables, X, mutable=["losses", "batch_stats"])
    assert total_loss(state) == total_loss(state["losses"]) > 0
    assert total_loss(variables | state) == total_loss(state)


def test_an_nnx_model_and_its_states():
    model = Net(**PENALISED)
    assert total_loss(model) == 0
    model(X)
    penalties = jax.tree.leaves(nnx.state(model, Loss))
    assert len(penalties) == 6
    np.testing.assert_allclose(total_loss(model), sum(penalties), rtol=1e-6)
    _, losses, rest = nnx.split(model, Loss, ...)
    for state in (nnx.state(model), nnx.state(model, Loss), losses, nnx.to_pure_dict(losses)):
        assert total_loss(state) == total_loss(model)
    _, penalties = model.first.with_penalties(X)
    assert total_loss(penalties) == total_loss(model.first.losses) == total_loss(model.first)
    jitted = nnx.jit(lambda model, x: (model(x), total_loss(model)))(model, X)[1]
    np.testing.assert_allclose(jitted, total_loss(model), rtol=1e-6)
    with pytest.raises(ValueError, match="got no penalty, but an array of shape"):
        total_loss(rest)


def test_an_nnx_model_without_regularizers():
    model = Net()
    model(X)
    assert total_loss(model) == total_loss(nnx.state(model, Loss)) == 0
    assert total_loss(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) == 0


# What does not

WANTED = (
    '`losses` must be a collection of penalties, a dict that has "losses", an nnx model or its '
    "state, got "
)
PASS = ' Of `y, state = model.apply(variables, x, mutable=["losses"])`, pass `state`.'
LOST = ' `apply` returns no "losses" where no layer sowed a penalty; `total_loss(state)` is 0 then.'
KERNEL = np.ones((3, 3, 3, 1), "f4")
REFUSED = [
    (None, TypeError, f"None.{LOST}"),
    ({"losses": None}, TypeError, f"None in place of a penalty.{LOST}"),
    (KERNEL, TypeError, "an array of shape (3, 3, 3, 1)."),
    (jnp.float32(1), TypeError, "an array of shape ()."),
    (1.0, TypeError, "a value of type float."),
    ((KERNEL, {"losses": {"kernel_penalty": 0.5}}), TypeError, "a value of type tuple."),
    ([], TypeError, "a value of type list."),
    (DepthwiseConv2D(3), TypeError, "a value of type DepthwiseConv2D."),
    ({"kernel": KERNEL}, ValueError, "an array of shape (3, 3, 3, 1) at 'kernel'."),
    (
        {"params": {"conv": {"kernel": KERNEL}}},
        ValueError,
        "an array of shape (3, 3, 3, 1) at 'params/conv/kernel'.",
    ),
    ({"scale": 0.5}, ValueError, "no penalty, but a value of type float at 'scale'."),
    (
        {"params": {"losses": {"scale": 0.5}}},
        ValueError,
        "no penalty, but a value of type float at 'params/losses/scale'.",
    ),
    (
        {"kernel": KERNEL, "kernel_penalty": 0.5},
        ValueError,
        "an array of shape (3, 3, 3, 1) at 'kernel'.",
    ),
    (
        {"intermediates": {"__call__": (KERNEL,)}},
        ValueError,
        "an array of shape (3, 3, 3, 1) at 'intermediates/__call__'.",
    ),
]


@pytest.mark.parametrize("losses, kind, got", REFUSED, ids=lambda v: str(v)[:50])
def test_what_is_refused(losses, kind, got):
    with pytest.raises(kind) as error:
        total_loss(losses)
    assert str(error.value) == WANTED + got + PASS * (LOST not in got)


def test_parameters_of_an_nnx_model_are_refused():
    with pytest.raises(ValueError) as error:
        total_loss(nnx.state(Net(**PENALISED), nnx.Param))
    wanted = f"{WANTED}no penalty, but an array of shape (3,) at 'first/bias'.{PASS}"
    assert str(error.value) == wanted
