"""Foreign kernels: each against the formula of its axes, and whole layers against live ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from flax_dwconv import DepthwiseConv2D, weights

KERNEL, BIAS = oracle.normals(0, 3, 5, 4, 2), oracle.normals(1, 8)
PARAMS = {"kernel": KERNEL, "bias": BIAS}


def test_axes():
    """Filter m of channel c is PyTorch's output channel c*M + m."""
    torch, flax = weights.to_torch(PARAMS), weights.to_flax(PARAMS)
    assert torch["weight"].shape == (8, 1, 3, 5) and flax["kernel"].shape == (3, 5, 1, 8)
    for a, b, c, m in np.ndindex(KERNEL.shape):
        assert torch["weight"][c * 2 + m, 0, a, b] == KERNEL[a, b, c, m]
        assert flax["kernel"][a, b, 0, c * 2 + m] == KERNEL[a, b, c, m]
    assert torch["weight"].flags.writeable and torch["weight"].flags.c_contiguous


TO = {"torch": weights.to_torch(PARAMS), "flax": weights.to_flax(PARAMS)}


@pytest.mark.parametrize(
    ("read", "source"),
    [
        (weights.from_torch, TO["torch"]),
        (weights.from_torch, {f"net.3.{k}": v for k, v in TO["torch"].items()}),
        (weights.from_torch, {"weight": TO["torch"]["weight"], "bias": None}),
        (weights.from_torch, TO["torch"]["weight"]),
        (weights.from_torch, TO["torch"] | {"bias": BIAS[:, None, None]}),  # Equinox
        (weights.from_flax, TO["flax"]),
        (weights.from_flax, TO["flax"]["kernel"]),
        (weights.from_flax, {"w": TO["flax"]["kernel"], "b": BIAS}),  # Haiku
    ],
)
def test_there_and_back(read, source):
    params = read(source, depth_multiplier=2)
    np.testing.assert_array_equal(params["kernel"], KERNEL)
    has_bias = isinstance(source, dict) and source.get("bias", 0) is not None
    assert set(params) == ({"kernel", "bias"} if has_bias else {"kernel"})
    if has_bias:
        np.testing.assert_array_equal(params["bias"], BIAS)
    assert all(isinstance(p, jax.Array) and p.dtype == jnp.float32 for p in params.values())


WEIGHT = TO["torch"]["weight"]
TWO = {"a.weight": WEIGHT, "b.weight": WEIGHT}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: weights.from_torch(WEIGHT[:, :, 0, 0]), ValueError, r"\(c\*m, 1, kh, kw\), got"),
        (lambda: weights.from_torch(KERNEL), ValueError, r"got \(3, 5, 4, 2\)"),
        (
            lambda: weights.from_torch(WEIGHT, depth_multiplier=3),
            ValueError,
            "`depth_multiplier` must divide 8 output channels, got 3",
        ),
        (
            lambda: weights.from_torch(WEIGHT, depth_multiplier=0),
            ValueError,
            "`depth_multiplier` must be an integer > 0, got 0",
        ),
        (lambda: weights.from_torch({}), ValueError, r"must hold one layer's 'weight'.* \[\]"),
        (lambda: weights.from_torch(TWO), ValueError, r"got the keys \['a.weight', 'b.weight'\]"),
        (lambda: weights.from_torch({"weight": WEIGHT, "v": 1}), ValueError, r"'v', 'weight'\]"),
        (
            lambda: weights.from_torch({"weight": WEIGHT, "bias": BIAS[:5]}),
            ValueError,
            r"`bias` must have shape \(8,\), got \(5,\)",
        ),
        (lambda: weights.from_torch("a.pt"), TypeError, "must be an array of a floating dtype"),
        (lambda: weights.from_torch(WEIGHT.astype(int)), TypeError, "floating dtype, got int64"),
        (lambda: weights.from_flax(KERNEL), ValueError, r"\(kh, kw, 1, c\*m\), got \(3, 5, 4, 2"),
        (lambda: weights.to_torch(KERNEL), TypeError, "`params` must be a dict, got ndarray"),
        (lambda: weights.to_flax({"kernel": BIAS}), ValueError, r"\(kh, kw, c, m\), got \(8,\)"),
        (lambda: weights.to_flax({"bias": BIAS}), ValueError, "`params` must hold one layer's"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_swapping_the_layer_of_a_flax_model():
    x = oracle.normals(2, 1, 8, 8, 4)
    settings = dict(kernel_size=(3, 5), strides=2, feature_group_count=4)
    conv = nnx.Conv(4, 8, **settings, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    nnx.update(conv, TO["flax"])
    theirs = nnx.to_pure_dict(nnx.state(conv, nnx.Param))
    params = weights.from_flax(theirs, depth_multiplier=2)
    layer = DepthwiseConv2D((3, 5), padding="same", strides=2, depth_multiplier=2)
    ours = layer.apply({"params": params}, x)
    np.testing.assert_allclose(ours, conv(x), 1e-5, 1e-5)
    linen = nn.Conv(8, **settings).apply({"params": weights.to_flax(params)}, x)
    np.testing.assert_allclose(ours, linen, 1e-5, 1e-5)


@pytest.mark.parametrize("padding", [1, (2, 1)], ids=str)
def test_a_whole_torch_layer(padding):
    """PyTorch's symmetric padding is explicit pads: "same" differs at stride 2."""
    torch = pytest.importorskip("torch")
    conv = torch.nn.Conv2d(4, 8, 3, stride=2, padding=padding, groups=4)
    x = oracle.normals(3, 2, 4, 8, 8)
    wanted = conv(torch.from_numpy(x)).detach().numpy()

    top, left = (padding, padding) if isinstance(padding, int) else padding
    settings = dict(strides=2, depth_multiplier=2, data_format="channels_first")
    layer = DepthwiseConv2D(3, padding=((top, top), (left, left)), **settings)
    params = weights.from_torch(conv.state_dict(), depth_multiplier=2)
    np.testing.assert_allclose(layer.apply({"params": params}, x), wanted, 1e-5, 1e-5)
    same = DepthwiseConv2D(3, padding="same", **settings).apply({"params": params}, x)
    assert same.shape != wanted.shape or not np.allclose(same, wanted, atol=1e-2)

    with torch.no_grad():
        conv.weight.zero_()
    assert np.asarray(params["kernel"]).any(), "a copy, not PyTorch's memory"
    arrays = weights.to_torch(params)
    conv.load_state_dict({k: torch.from_numpy(a) for k, a in arrays.items()})
    np.testing.assert_array_equal(conv(torch.from_numpy(x)).detach().numpy(), wanted)


def test_tensors_that_numpy_does_not_take():
    torch = pytest.importorskip("torch")
    conv = torch.nn.Conv2d(4, 4, 3, groups=4, dtype=torch.bfloat16)
    params = weights.from_torch({"weight": conv.weight, "bias": conv.bias})
    assert params["kernel"].dtype == params["bias"].dtype == jnp.bfloat16
    wanted = conv.weight.detach().float().numpy()[:, 0].transpose(1, 2, 0)[..., None]
    np.testing.assert_array_equal(params["kernel"].astype(jnp.float32), wanted)


def test_boxed_parameters():
    """As `nn.with_partitioning` makes them."""
    boxed = {name: nn.Partitioned(value, names=()) for name, value in PARAMS.items()}
    for convert in weights.to_torch, weights.to_flax:
        jax.tree.map(np.testing.assert_array_equal, convert(boxed), convert(PARAMS))


def test_an_equinox_layer():
    eqx = pytest.importorskip("equinox")
    conv = eqx.nn.Conv2d(4, 8, 3, groups=4, key=jax.random.key(0))
    params = weights.from_torch({"weight": conv.weight, "bias": conv.bias}, depth_multiplier=2)
    x = oracle.normals(4, 4, 6, 6)
    layer = DepthwiseConv2D(3, depth_multiplier=2, data_format="channels_first")
    np.testing.assert_allclose(layer.apply({"params": params}, x[None])[0], conv(x), 1e-5, 1e-5)


def test_a_haiku_layer():
    hk = pytest.importorskip("haiku")
    conv = hk.transform(lambda x: hk.DepthwiseConv2D(2, 3, padding="SAME", name="dw")(x))
    theirs = {"w": oracle.normals(6, 3, 3, 1, 8), "b": BIAS}
    x = oracle.normals(5, 1, 6, 6, 4)
    params = weights.from_flax(theirs, depth_multiplier=2)
    layer = DepthwiseConv2D(3, padding="same", depth_multiplier=2)
    ours = layer.apply({"params": params}, x)
    np.testing.assert_allclose(ours, conv.apply({"dw": theirs}, None, x), 1e-5, 1e-5)
