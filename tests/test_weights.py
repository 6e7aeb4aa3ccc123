"""Foreign kernels: each against the formula of its axes, and whole layers against live ones."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import flax_dwconv
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


# Every rank


RANKS = {"1-D": (3,), "2-D": (3, 5), "3-D": (2, 3, 5)}


@pytest.mark.parametrize("window", RANKS.values(), ids=RANKS)
def test_every_rank(window):
    kernel = oracle.normals(0, *window, 4, 2)
    params = {"kernel": kernel, "bias": BIAS}
    torch, flax = weights.to_torch(params), weights.to_flax(params)
    for *at, c, m in np.ndindex(kernel.shape):
        assert torch["weight"][(c * 2 + m, 0, *at)] == kernel[(*at, c, m)]
        assert flax["kernel"][(*at, 0, c * 2 + m)] == kernel[(*at, c, m)]
    equinox = torch | {"bias": BIAS.reshape(8, *[1] * len(window))}
    for read, source in [(weights.from_torch, torch), (weights.from_torch, equinox)] + [
        (weights.from_flax, flax)
    ]:
        back = read(source, depth_multiplier=2)
        jax.tree.map(np.testing.assert_array_equal, back, params)
    for array in [*torch.values(), *flax.values(), *map(np.asarray, back.values())]:
        assert array.flags.c_contiguous


@pytest.mark.parametrize("window", RANKS.values(), ids=RANKS)
def test_whole_layers_of_every_rank(window):
    torch = pytest.importorskip("torch")
    rank = len(window)
    conv = getattr(torch.nn, f"Conv{rank}d")(4, 8, window, stride=2, padding=1, groups=4)
    x = oracle.normals(3, 2, 4, *[8] * rank)
    wanted = conv(torch.from_numpy(x)).detach().numpy()
    layer = getattr(flax_dwconv, f"DepthwiseConv{rank}D")(
        window, strides=2, padding=1, depth_multiplier=2, data_format="channels_first"
    )
    params = weights.from_torch(conv.state_dict(), depth_multiplier=2)
    np.testing.assert_allclose(layer.apply({"params": params}, x), wanted, 1e-5, 1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_haiku_layers_of_other_ranks(rank):
    hk = pytest.importorskip("haiku")
    conv = getattr(hk, f"DepthwiseConv{rank}D")
    run = hk.transform(lambda x: conv(2, 3, padding="SAME", name="dw")(x))
    theirs = {"w": oracle.normals(6, *[3] * rank, 1, 8), "b": BIAS}
    x = oracle.normals(5, 1, *[6] * rank, 4)
    layer = getattr(flax_dwconv, f"DepthwiseConv{rank}D")(3, padding="same", depth_multiplier=2)
    params = weights.from_flax(theirs, depth_multiplier=2)
    ours = layer.apply({"params": params}, x)
    np.testing.assert_allclose(ours, run.apply({"dw": theirs}, None, x), 1e-5, 1e-5)


def test_the_state_of_an_nnx_layer():
    conv = nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
    params = weights.from_flax(nnx.state(conv, nnx.Param), depth_multiplier=2)
    np.testing.assert_array_equal(params["kernel"].reshape(3, 3, 1, 8), conv.kernel[...])
    ours = flax_dwconv.nnx.DepthwiseConv2D(4, 3, depth_multiplier=2, rngs=nnx.Rngs(0))
    arrays = weights.to_torch(nnx.state(ours, nnx.Param))
    assert arrays["weight"].shape == (8, 1, 3, 3) and arrays["bias"].shape == (8,)


def test_the_name_of_before():
    for name in ("from_torch", "to_torch", "from_flax", "to_flax"):
        assert getattr(flax_dwconv.torch_io, name) is getattr(weights, name)


# Whole models


def a_model(layers=3):
    ones = np.ones
    state_dict = {"stem.weight": ones((4, 3, 3, 3), "f4"), "pos": ones((1, 1, 8), "f4")}
    for i in range(layers):
        state_dict |= {
            f"blocks.{i}.dw.weight": np.full((4, 1, 3, 5), i, np.float32),
            f"blocks.{i}.dw.bias": np.full(4, i, np.float32),
            f"blocks.{i}.bn.weight": ones(4, "f4"),
            f"blocks.{i}.bn.num_batches_tracked": np.array(3),
            f"blocks.{i}.gamma": ones(4, "f4"),
            f"blocks.{i}.pw.weight": ones((6, 4, 1, 1), "f4"),
        }
    return state_dict | {"mixer.conv1d.weight": ones((8, 1, 4), "f4")}


@pytest.mark.parametrize("prefix", ["blocks.1.dw", "blocks.1.dw."])
def test_one_layer_of_a_model(prefix):
    params = weights.from_torch(a_model(), prefix=prefix)
    assert params["kernel"].shape == (3, 5, 4, 1)
    assert np.all(params["kernel"] == 1) and np.all(params["bias"] == 1)
    assert weights.from_torch(a_model(), prefix="mixer.conv1d")["kernel"].shape == (4, 8, 1)
    assert weights.from_torch({"weight": WEIGHT}, prefix="")["kernel"].shape == (3, 5, 8, 1)


@pytest.mark.parametrize(
    ("prefix", "error", "said", "unsaid"),
    [
        (
            None,
            ValueError,
            [
                "got 21 keys",
                "the first is prefix='blocks.0.dw'",
                "blocks.0.dw.weight (4, 1, 3, 5), blocks.1.dw.weight (4, 1, 3, 5)",
                "mixer.conv1d.weight (8, 1, 4).",
            ],
            ["stem", "pos", "pw"],
        ),
        ("blocks.0", ValueError, ["Did you mean 'blocks.0.dw' (blocks.0.dw.weight"], ["blocks.1"]),
        ("conv1d", ValueError, ["Did you mean 'mixer.conv1d'"], ["blocks"]),
        ("module.mixer.conv1d", ValueError, ["Did you mean 'mixer.conv1d'"], ["pw"]),
        ("blocks.1.dw.weight", ValueError, ["Did you mean 'blocks.1.dw'"], ["blocks.0"]),
        ("blocks.0.dv", ValueError, ["Did you mean 'blocks.0.dw'"], ["pw"]),
        ("zzz", ValueError, ["got 'zzz'. Depthwise by shape", "mixer.conv1d.weight"], ["stem"]),
        ("stem", ValueError, ["(c*m, 1, kh, kw), got (4, 3, 3, 3)"], []),
        (7, TypeError, ["`prefix` must be a string or None, got 7"], []),
    ],
)
def test_what_errors_say_about_a_model(prefix, error, said, unsaid):
    with pytest.raises(error) as raised:
        weights.from_torch(a_model(), prefix=prefix)
    for part in said:
        assert part in str(raised.value)
    for part in unsaid:
        assert part not in str(raised.value)


def test_the_list_of_an_error_is_bounded():
    with pytest.raises(ValueError, match=r"blocks.19.dw.weight \(4, 1, 3, 5\), and 11 more\.$"):
        weights.from_torch(a_model(30))
    with pytest.raises(ValueError, match="No weight among them is depthwise"):
        weights.from_torch({"a.weight": np.ones((4, 3)), "b.weight": np.ones((4, 3, 1, 1))})
    with pytest.raises(TypeError, match="`prefix` is for a state_dict, got a ndarray"):
        weights.from_torch(WEIGHT, prefix="a")


# What PyTorch computes a weight from


SPELLINGS = [
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
]


@pytest.mark.parametrize("dim", [0, 1, 2, 3, None])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s[0])
def test_weight_normalization(spelling, dim):
    """The norm over all axes but `dim`, and the layer among others."""
    v = oracle.normals(0, 8, 1, 3, 5)
    kept = () if dim is None else tuple(n if i == dim else 1 for i, n in enumerate(v.shape))
    g = oracle.normals(1, *kept)
    wanted = np.empty(v.shape)
    for at in np.ndindex(v.shape):
        part = v if dim is None else v.take(at[dim], dim)
        norm = np.sqrt(sum(float(n) ** 2 for n in part.flat))
        wanted[at] = float(g if dim is None else g.flat[at[dim]]) * float(v[at]) / norm
    layer = {f"dw.{name}": value for name, value in zip(spelling, (g, v), strict=True)}
    params = weights.from_torch(layer | {"dw.bias": BIAS}, depth_multiplier=2)
    wanted = wanted.transpose(2, 3, 1, 0).reshape(3, 5, 4, 2).astype(np.float32)
    np.testing.assert_allclose(params["kernel"], wanted, 1e-7)  # one rounding
    np.testing.assert_array_equal(params["bias"], BIAS)
    picked = weights.from_torch(a_model() | layer, prefix="dw", depth_multiplier=2)
    np.testing.assert_array_equal(picked["kernel"], params["kernel"])
    with pytest.raises(ValueError) as raised:
        weights.from_torch(a_model() | layer)
    assert f"dw.{spelling[1]} (8, 1, 3, 5)" in str(raised.value)


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        (["weight_orig", "weight_u", "weight_v"], "torch.nn.utils.remove_spectral_norm(layer)"),
        (["weight_orig", "weight_mask"], "torch.nn.utils.prune.remove(layer, 'weight')"),
        (["weight", "bias_orig", "bias_mask"], "torch.nn.utils.prune.remove(layer, 'bias')"),
        (["weight", "weight_g"], "torch.nn.utils.remove_weight_norm(layer)"),
        (
            ["parametrizations.weight.original", "parametrizations.weight.0._u"],
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
        ),
        (
            ["weight", "parametrizations.bias.original"],
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'bias')",
        ),
    ],
)
@pytest.mark.parametrize("prefix", [None, "dw"])
def test_other_parametrizations(entries, line, prefix):
    with pytest.raises(ValueError) as raised:
        weights.from_torch({f"dw.{name}": WEIGHT for name in entries}, prefix=prefix)
    assert line in str(raised.value) and f"dw.{entries[0]}" in str(raised.value)


def test_a_norm_of_another_shape():
    with pytest.raises(ValueError, match="`weight_g` must have the shape of a norm"):
        weights.from_torch({"weight_g": np.ones((4, 1, 1, 1)), "weight_v": WEIGHT})


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("dim", [0, 2, None])
def test_weight_normalized_layers_of_torch(dim):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import parametrizations, spectral_norm, weight_norm

    for normalize in weight_norm, parametrizations.weight_norm:
        conv = normalize(torch.nn.Conv2d(4, 8, 3, groups=4), dim=dim)
        kernel = weights.from_torch(conv.state_dict(), depth_multiplier=2)["kernel"]
        wanted = conv.weight.detach().numpy().transpose(2, 3, 1, 0).reshape(3, 3, 4, 2)
        np.testing.assert_allclose(kernel, wanted, 1e-6)
    for normalize in spectral_norm, parametrizations.spectral_norm, parametrizations.orthogonal:
        layer = normalize(torch.nn.Conv2d(4, 8, 3, groups=4))
        with pytest.raises(ValueError, match=r"In PyTorch, `torch.nn.utils.*remove_.*\(layer"):
            weights.from_torch(layer.state_dict(), depth_multiplier=2)


@pytest.mark.parametrize("output_padding", [0, 1])
def test_a_transposed_layer_of_torch(output_padding):
    """What the docstring of `from_torch` says to do."""
    torch = pytest.importorskip("torch")
    conv = torch.nn.ConvTranspose2d(
        4, 4, (3, 5), stride=2, padding=1, output_padding=output_padding, groups=4
    )
    params = weights.from_torch(conv.state_dict())
    x = oracle.normals(0, 2, 7, 8, 4)
    h, w = ((n - 1) * 2 - 2 + k + output_padding for n, k in zip(x.shape[1:3], (3, 5), strict=True))
    forward = lambda y: flax_dwconv.depthwise_conv2d(y, params["kernel"], strides=2, padding=1)  # noqa: E731
    (y,) = jax.linear_transpose(forward, jax.ShapeDtypeStruct((2, h, w, 4), np.float32))(x)
    wanted = conv(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()
    np.testing.assert_allclose(
        np.asarray(y) + np.asarray(params["bias"]), wanted.transpose(0, 2, 3, 1), 1e-5, 1e-5
    )


# Files


def test_safetensors_files(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "model.safetensors"
    half = {"half.weight": WEIGHT.astype(jnp.bfloat16), "ints.weight": WEIGHT.astype(int)}
    ours = weights.from_torch(TO["torch"], depth_multiplier=2)
    entries = {f"dw.{name}": array for name, array in weights.to_torch(ours).items()}
    entries |= {f"flax.{name}": array for name, array in weights.to_flax(ours).items()}
    entries |= {f"ours.{name}": np.asarray(array) for name, array in ours.items()}
    numpy.save_file(a_model() | entries | half, path)
    read = numpy.load_file(path)
    np.testing.assert_array_equal(read["dw.weight"], WEIGHT)
    np.testing.assert_array_equal(read["flax.kernel"], TO["flax"]["kernel"])
    np.testing.assert_array_equal(read["ours.kernel"], KERNEL)
    for name in path, str(path):
        params = weights.from_torch(name, prefix="dw", depth_multiplier=2)
        jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    kernel = weights.from_torch(path, prefix="half", depth_multiplier=2)["kernel"]
    np.testing.assert_array_equal(kernel, KERNEL.astype(jnp.bfloat16))
    assert kernel.dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="`weight` must be an array of a floating dtype, got I64"):
        weights.from_torch(path, prefix="ints")
    with pytest.raises(ValueError, match=r"dw.weight \(4, 1, 3, 5\), .*dw.weight \(8, 1, 3, 5\)"):
        weights.from_torch(path)
    numpy.save_file(TO["torch"], path)
    params = weights.from_torch(path, depth_multiplier=2)  # one layer needs no prefix
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)


def test_unreadable_safetensors_files(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "bad.safetensors"
    with pytest.raises(FileNotFoundError, match="bad.safetensors"):
        weights.from_torch(path)
    path.write_bytes(b"not a header")
    with pytest.raises(ValueError, match="bad.safetensors' is no .safetensors file"):
        weights.from_torch(path)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'flax_dwconv\[safetensors\]'"):
        weights.from_torch("m.safetensors")


# Batch normalization


def a_batch_norm(features, seed=10):
    names = ("mean", "var", "scale", "bias")
    arrays = {n: oracle.normals(seed + i, features) for i, n in enumerate(names)}
    return arrays | {"var": np.abs(arrays["var"]) + 0.1}


def randomized(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(
        [jnp.asarray(oracle.normals(i, *a.shape), a.dtype) for i, a in enumerate(leaves)]
    )


LAYERS = ("DepthwiseConv1D", "DepthwiseConv2D", "DepthwiseConv3D")
LAYERS += ("SeparableConv1D", "SeparableConv2D")


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_folded_is_layer_and_normalization(name, m, use_bias):
    rank = int(name[-2])
    filters = (5,) if name.startswith("Separable") else ()
    settings = dict(depth_multiplier=m, padding="same", strides=2)
    x = oracle.normals(0, 2, *[6] * rank, 3)
    linen = getattr(flax_dwconv, name)(*filters, 3, use_bias=use_bias, **settings)
    params = randomized(linen.init(jax.random.key(0), x)["params"])
    y = linen.apply({"params": params}, x)
    stats = a_batch_norm(y.shape[-1])
    norm = nn.BatchNorm(use_running_average=True, epsilon=1e-2)
    split = {k: stats[k] for k in ("scale", "bias")}, {k: stats[k] for k in ("mean", "var")}
    wanted = norm.apply({"params": split[0], "batch_stats": split[1]}, y)

    folded = flax_dwconv.fold_batch_norm(params, {**split[0], **split[1]}, 1e-2)
    got = linen.clone(use_bias=True).apply({"params": folded}, x)
    np.testing.assert_allclose(got, wanted, 1e-5, 2e-5)
    assert set(folded) == set(params) | {"bias"}
    assert all(p.dtype == np.float32 and np.asarray(p).flags.c_contiguous for p in folded.values())

    twin = getattr(flax_dwconv.nnx, name)(3, *filters, 3, use_bias=use_bias, **settings, rngs=RNGS)
    nnx.update(twin, params)
    bn = nnx.BatchNorm(y.shape[-1], use_running_average=True, epsilon=1e-2, rngs=RNGS)
    nnx.update(bn, stats)
    np.testing.assert_allclose(bn(twin(x)), wanted, 1e-6, 1e-6)
    again = flax_dwconv.fold_batch_norm(nnx.state(twin, nnx.Param), nnx.state(bn), 1e-2)
    jax.tree.map(np.testing.assert_array_equal, again, folded)


RNGS = nnx.Rngs(0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32])
def test_folding_rounds_once(dtype):
    params = {"kernel": KERNEL.astype(dtype), "bias": BIAS.astype(dtype)}
    stats = a_batch_norm(8)
    folded = weights.fold_batch_norm(params, stats, 1e-3)
    s = stats["scale"].astype(float) / np.sqrt(stats["var"].astype(float) + 1e-3)
    for a, b, c, m in np.ndindex(KERNEL.shape):
        wanted = np.asarray(float(params["kernel"][a, b, c, m]) * s[c * 2 + m]).astype(dtype)
        assert folded["kernel"][a, b, c, m] == wanted
    bias = stats["bias"] + (params["bias"].astype(float) - stats["mean"]) * s
    np.testing.assert_array_equal(folded["bias"], bias.astype(dtype))
    assert folded["kernel"].dtype == folded["bias"].dtype == dtype


def test_statistics_under_the_names_of_others():
    stats = a_batch_norm(8)
    wanted = weights.fold_batch_norm(PARAMS, stats, 1e-3)
    keras = {"mean": "moving_mean", "var": "moving_variance", "scale": "gamma", "bias": "beta"}
    torch = {"mean": "running_mean", "var": "running_var", "scale": "weight", "bias": "bias"}
    counted = {torch[k]: v for k, v in stats.items()} | {"num_batches_tracked": np.array(7)}
    for other in {keras[k]: v for k, v in stats.items()}, counted:
        got = weights.fold_batch_norm(PARAMS, other, 1e-3)
        jax.tree.map(np.testing.assert_array_equal, got, wanted)
    plain = {"mean": stats["mean"], "var": stats["var"]}  # neither scale nor bias
    neutral = plain | {"scale": np.ones(8, "f4"), "bias": np.zeros(8, "f4")}
    fold = lambda given: weights.fold_batch_norm(PARAMS, given, 1e-3)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, fold(plain), fold(neutral))


STATS = {"mean": np.zeros(8), "var": np.ones(8)}
SEPARABLE = {"depthwise_kernel": KERNEL, "pointwise_kernel": np.ones((1, 1, 8, 8))}


@pytest.mark.parametrize(
    ("params", "stats", "epsilon", "error", "message"),
    [
        (KERNEL, STATS, 0.1, TypeError, "`params` must be a dict, got ndarray"),
        ({}, STATS, 0.1, ValueError, "`params` must hold one layer's 'kernel'"),
        ({"pointwise_kernel": BIAS}, STATS, 0.1, ValueError, r"keys \['pointwise_kernel'\]"),
        ({"depthwise_kernel": KERNEL}, STATS, 0.1, ValueError, "one layer's 'pointwise_kernel'"),
        ({"kernel": BIAS}, STATS, 0.1, ValueError, r"\(\*window, c, m\), got \(8,\)"),
        (
            SEPARABLE | {"depthwise_kernel": KERNEL[:, :, :3]},
            STATS,
            0.1,
            ValueError,
            r"`depthwise_kernel` must have shape .* is 8, got \(3, 5, 3, 2\)",
        ),
        (PARAMS, KERNEL, 0.1, TypeError, "`batch_stats` must be a dict, got ndarray"),
        (PARAMS, {"mean": BIAS}, 0.1, ValueError, r"'mean', 'var' .* the keys \['mean'\]"),
        (PARAMS, STATS | {"sigma": BIAS}, 0.1, ValueError, r"keys \['mean', 'sigma', 'var'\]"),
        (PARAMS, STATS | {"gamma": BIAS, "scale": BIAS}, 0.1, ValueError, "`batch_stats` must"),
        (PARAMS, STATS | {"var": np.ones(4)}, 0.1, ValueError, r"shape \(8,\), .* got \(4,\)"),
        (PARAMS, STATS | {"var": np.ones(8, int)}, 0.1, TypeError, "`var` must be an array of a"),
        (PARAMS, STATS, "0.1", TypeError, "`epsilon` must be a number, got '0.1'"),
        (PARAMS, STATS, True, TypeError, "`epsilon` must be a number, got True"),
        (PARAMS, STATS | {"var": np.zeros(8)}, 0, ValueError, "must make every variance positive"),
    ],
)
def test_errors_of_folding(params, stats, epsilon, error, message):
    with pytest.raises(error, match=message):
        weights.fold_batch_norm(params, stats, epsilon)
