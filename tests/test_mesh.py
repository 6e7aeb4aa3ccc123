"""Meshes of two axes: explicit ones, and ones that only replicate.

Four virtual devices live in a process of their own; what is right is computed there, on one of
them. Operands are small integers in floating point, so that the bits are equal in any order.
"""

import contextlib
import functools
import itertools

import flax.linen as nn
import jax
import numpy as np
import oracle
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_sharding import TIMEOUT, processes, report

import flax_dwconv
from flax_dwconv import accelerate, causal_conv1d, depthwise_conv, regularizers, total_loss

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
METHODS = ["auto", "lax", "taps"]
# XLA's kernel gradient is wrong on automatic axes, and on explicit ones that are made automatic.
METHODS_AND_KINDS = [
    ("auto", EXPLICIT),
    ("lax", EXPLICIT),
    ("lax", AUTO),
    pytest.param("auto", AUTO, marks=pytest.mark.slow),
    pytest.param("taps", EXPLICIT, marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def four():
    """Calls a function in a process with four devices."""
    with processes(1, devices=4) as pool:
        yield lambda f, *args: pool.submit(f, *args).result(TIMEOUT)


def mesh_of(kinds, shape=(2, 2)):
    devices = jax.devices()[: shape[0] * shape[1]]
    return jax.make_mesh(shape, ("data", "model"), axis_types=kinds, devices=devices)


def layouts(rank):
    """The shardings of images and kernels, by name; `P` fills up with None."""
    no = [None] * rank
    return {
        "nothing": (P(), P()),
        "batch": (P("data"), P()),
        "batch over all": (P(("data", "model")), P()),
        "channels": (P(None, *no, "model"), P(*no, "model")),
        "channels over all": (P(None, *no, ("data", "model")), P(*no, ("data", "model"))),
        "batch and channels": (P("data", *no, "model"), P(*no, "model")),
    }


def equal(found, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(right))


# The function


def operands(rank, m):
    space, window = [7, 6, 5][:rank], [3, 2, 2][:rank]
    x, kernel = oracle.integers(0, 8, *space, 8), oracle.integers(1, *window, 8, m)
    return x, kernel, oracle.integers(2, 8, *space, 8 * m)


def transformed(f):
    """Functions of x, kernel and cotangent, by name."""

    def example(kernel, x):
        return (f(x[None], kernel) ** 2).sum()

    def step(kernel, x):
        return kernel + jax.grad(example)(kernel, x), f(x[None], kernel).sum()

    return {
        "forward": lambda x, k, g: f(x, k),
        "vjp": lambda x, k, g: jax.vjp(f, x, k)[1](g),
        "jvp": lambda x, k, g: jax.jvp(f, (x, k), (x, k)),
        "grad": lambda x, k, g: jax.grad(lambda x, k: (f(x, k) ** 2).sum(), (0, 1))(x, k),
        "remat": lambda x, k, g: jax.vjp(jax.checkpoint(f), x, k)[1](g),
        "vmap": lambda x, k, g: jax.vmap(lambda x: f(x[None], k)[0])(x),
        "gradient of each example": lambda x, k, g: jax.vmap(jax.grad(example), (None, 0))(k, x),
        # A loop over a sharded axis is refused by JAX, whatever its body is.
        "scan": lambda x, k, g: lax.scan(
            lambda k, _: (k, (f(x, k), jax.grad(lambda k: (f(x, k) * g).sum())(k))), k, None, 2
        )[1],
    }  # fmt: skip


def function_on_mesh(rank, method, kinds, m, only, where):
    """Checks values, and returns {(layout, transformation): (collectives, shardings)}.

    Args:
      only: the names of the transformations.
      where: the names of the layouts.
    """
    conv = functools.partial(depthwise_conv, padding="same", method=method)
    args, mesh, found = operands(rank, m), mesh_of(kinds), {}
    for name, f in transformed(conv).items():
        if name not in only:
            continue
        right = jax.tree.leaves(jax.jit(f)(*args))
        for layout in where:
            image, weights = layouts(rank)[layout]
            specs = (image, weights, image)
            placed = [
                jax.device_put(a, NamedSharding(mesh, spec))
                for a, spec in zip(args, specs, strict=True)
            ]
            with jax.set_mesh(mesh):
                there = report(f, *placed)
            for value, expected in zip(there.values, right, strict=True):
                np.testing.assert_array_equal(value, expected, f"{layout}, {name}")
            found[layout, name] = there.collectives, there.shards
    return found


def part(shape, spec):
    """The shape of what one device has."""
    axes = [*spec, *[None] * len(shape)][: len(shape)]
    parts = {None: 1, "data": 2, "model": 2, ("data", "model"): 4}
    return tuple(n // parts[axis] for n, axis in zip(shape, axes, strict=True))


def check(found, rank, kinds):
    """The kernel gradient is one sum over the devices that share a batch: nothing else is sent."""
    x, kernel, _ = operands(rank, 1)
    for (layout, name), (collectives, shards) in found.items():
        image, weights = layouts(rank)[layout]
        if name in ("forward", "jvp"):
            assert collectives == {}
        if name in ("vjp", "grad"):
            alone = layout in ("nothing", "channels", "channels over all")
            assert collectives == ({} if alone else {"all-reduce": 1})
        if AUTO not in kinds and name in ("forward", "vjp"):
            parts = [part(x.shape, image), part(kernel.shape, weights)]
            assert shards == parts[: len(shards)]


@pytest.mark.parametrize(("method", "kind"), METHODS_AND_KINDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_method(rank, method, kind, four):
    """The batch over one axis of two is where XLA's own kernel gradient is twice as large."""
    kinds = (kind, kind)
    names, where = ["forward", "vjp"], ["batch", "batch and channels"]
    if rank == 2:
        names, where = [*names, "gradient of each example"], list(layouts(rank))
    check(four(function_on_mesh, rank, method, kinds, 1, names, where), rank, kinds)


@pytest.mark.parametrize("method", ["auto", "lax", pytest.param("taps", marks=pytest.mark.slow)])
def test_every_transformation(method, four):
    kinds = (EXPLICIT, EXPLICIT)
    names = ["jvp", "grad", "remat", "vmap", "scan"]
    where = ["batch", "channels", "batch and channels"]
    check(four(function_on_mesh, 2, method, kinds, 1, names, where), 2, kinds)


def test_one_explicit_axis_of_two(four):
    kinds = (EXPLICIT, AUTO)
    where = list(layouts(2))
    check(four(function_on_mesh, 2, "auto", kinds, 1, ["forward", "vjp"], where), 2, kinds)


@pytest.mark.parametrize("method", METHODS)
def test_multiplier(method, four):
    """With several filters a channel, XLA's own input gradient gathers; ours does not."""
    names, where = ["forward", "vjp"], ["batch", "channels", "batch and channels"]
    found = four(function_on_mesh, 2, method, (EXPLICIT, EXPLICIT), 2, names, where)
    for layout in where:
        assert found[layout, "forward"][0] == {}
        assert method == "lax" or set(found[layout, "vjp"][0]) <= {"all-reduce"}


def eagerly(kinds, with_mesh):
    """Without `jax.jit`; JAX's own `jax.grad` of a sum needs `jax.set_mesh` there."""
    args, mesh = operands(2, 1), mesh_of(kinds)
    for method in ["auto", "lax"]:
        conv = functools.partial(depthwise_conv, padding="same", method=method)
        for name, f in transformed(conv).items():
            if name not in ("forward", "vjp", "jvp", *["grad", "vmap"] * with_mesh):
                continue
            for layout in ("batch", "batch and channels"):
                image, weights = layouts(2)[layout]
                placed = [
                    jax.device_put(a, NamedSharding(mesh, spec))
                    for a, spec in zip(args, (image, weights, image), strict=True)
                ]
                with jax.set_mesh(mesh) if with_mesh else contextlib.nullcontext():
                    equal(f(*placed), f(*args))


@pytest.mark.parametrize("with_mesh", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_without_jit(kind, with_mesh, four):
    four(eagerly, (kind, kind), with_mesh)


def other_shapes():
    """Batch axes, data formats, crops, kernels and shapes that do not divide; the specs of y."""
    mesh, found = mesh_of((EXPLICIT, EXPLICIT)), []

    def check(x, kernel, image, weights, **settings):
        placed = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in ((x, image), (kernel, weights))
        ]
        f = jax.jit(functools.partial(depthwise_conv, **settings))
        y = f(*placed)
        equal(y, f(x, kernel))
        found.append(tuple(jax.typeof(y).sharding.spec))

    kernel, last = oracle.integers(1, 3, 3, 4, 2), P(None, None, "model")
    check(oracle.integers(0, 2, 4, 6, 6, 4), kernel, P("data", None, None, None, "model"), last)
    check(oracle.integers(0, 4, 6, 6, 4), kernel, P(None, "data", None, "model"), last)
    check(oracle.integers(0, 4, 6, 6, 4), kernel, P(None, "data"), P(), padding="same")
    check(oracle.integers(0, 4, 6, 6, 4), kernel, P(None, "data"), P(), padding="same", strides=2)
    check(oracle.integers(0, 4, 6, 6, 4), kernel, P("data"), P(), padding=((-1, 1), (2, -2)))
    check(oracle.integers(0, 4, 6, 6, 4), kernel, P("data"), last)  # the kernel alone is sharded
    check(oracle.integers(0, 4, 6, 6, 4), kernel, P("model"), last)
    first = dict(data_format="channels_first")
    check(oracle.integers(0, 4, 4, 6, 6), kernel, P("data", "model"), last, **first)
    return found


def test_the_result_is_sharded_as_the_image(four):
    """An axis of the mesh that divides no more, such as two rows of three, is not used."""
    assert four(other_shapes) == [
        ("data", None, None, None, "model"),
        (None, "data", None, "model"),
        (None, "data", None, None),
        (None, None, None, None),
        ("data", None, None, None),
        ("data", None, None, "model"),
        ("model", None, None, None),
        ("data", "model", None, None),
    ]


def mixed_with_host_arrays():
    """One operand on the mesh, one not; and a mesh that is only in the shardings of `jax.jit`."""
    x, kernel, g = operands(2, 1)
    mesh = mesh_of((EXPLICIT, EXPLICIT))
    on_mesh = jax.device_put(x, NamedSharding(mesh, P("data")))
    conv = functools.partial(depthwise_conv, padding="same")
    equal(conv(on_mesh, kernel), conv(x, kernel))
    with jax.set_mesh(mesh):
        equal(jax.jit(conv)(on_mesh, kernel), conv(x, kernel))
    mesh = mesh_of((AUTO, AUTO))
    image, weights = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    for method in METHODS:
        f = transformed(functools.partial(depthwise_conv, padding="same", method=method))["vjp"]
        sharded = jax.jit(f, in_shardings=(image, weights, image))
        equal(sharded(x, kernel, g), f(x, kernel, g))


def test_operands_without_a_mesh(four):
    four(mixed_with_host_arrays)


def in_partial_shard_map(kind):
    """ "data" is an axis of `jax.shard_map`, and "model" is not."""
    x, kernel, g = operands(2, 1)
    mesh = mesh_of((AUTO, kind))
    image, weights = P("data", None, None, "model"), P(None, None, "model")
    specs = (image, weights, image)
    args = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip((x, kernel, g), specs, strict=True)
    ]
    for method in METHODS:
        f = transformed(functools.partial(depthwise_conv, padding="same", method=method))["vjp"]

        def local(x, kernel, g, f=f):
            dx, dkernel = f(x, lax.pcast(kernel, "data", to="varying"), g)
            return dx, lax.psum(dkernel, "data")

        with jax.set_mesh(mesh):
            both = jax.shard_map(
                local, in_specs=(P("data"), P(), P("data")), out_specs=(P("data"), P()),
                axis_names={"data"},
            )  # fmt: skip
            equal(jax.jit(both)(*args), f(x, kernel, g))


@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_partial_shard_map(kind, four):
    four(in_partial_shard_map, kind)


def programs():
    """On meshes of automatic axes: the jaxpr of "lax", and whether its program names us."""
    x, kernel, _ = operands(2, 1)
    meshes = {"one axis": mesh_of((AUTO, AUTO), (4, 1)), "two": mesh_of((AUTO,) * 2)}
    found = {}
    for name, mesh in meshes.items():
        args = (jax.device_put(x, NamedSharding(mesh, P("data"))), kernel)
        traced = jax.jit(functools.partial(depthwise_conv, method="lax")).trace(*args)
        found[name] = (
            [str(eqn.primitive) for eqn in traced.jaxpr.eqns],
            "flax_dwconv" in traced.lower().as_text(),
        )
    return found


def test_no_explicit_axes_no_trace_of_us(four):
    found = four(programs)
    for jaxpr, _ in found.values():
        assert [name for name in jaxpr if name != "reshape"] == ["conv_general_dilated"]
    # On a mesh of two axes, "lax" carries the tag that has its kernel gradient computed here.
    assert {name: tagged for name, (_, tagged) in found.items()} == {"one axis": False, "two": True}


def convolutions_elsewhere():
    """{(axes of the mesh, method): how many convolutions of a gradient are XLA's} on TPU."""
    found = {}
    for shape, method in itertools.product([(4, 1), (2, 2)], METHODS):
        mesh = mesh_of((AUTO, AUTO), shape)
        x, kernel, g = (
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip(operands(2, 1), (P("data"), P(), P("data")), strict=True)
        )
        f = transformed(functools.partial(depthwise_conv, padding="same", method=method))["vjp"]
        for platform in ["tpu", "cuda"]:
            lowered = jax.jit(f).trace(x, kernel, g).lower(lowering_platforms=(platform,))
            count = lowered.as_text().count("stablehlo.convolution")
            found[shape, method, platform] = count
    return found


def test_other_platforms(four):
    """Of the two gradients, the kernel's is not left to XLA on a mesh of two axes."""
    found = four(convolutions_elsewhere)
    for (shape, method, _), count in found.items():
        assert count == (0 if method == "taps" else 1 if shape == (2, 2) else 2), found


# Sequences


def sequences_on_mesh(kinds):
    mesh = mesh_of(kinds)
    batch, channels = ("data", None, "model"), (None, "model")
    state = oracle.integers(3, 4, 2, 4)
    ids = np.asarray([[0, 0, 0, 1, 1, 1] * 4] * 4)
    for length, method in [(6, "auto"), (6, "lax"), (24, "auto"), (24, "lax")]:
        x, kernel = oracle.integers(0, 4, length, 4), oracle.integers(1, 3, 4, 2)
        for extra, spec in [
            ({}, {}),
            ({"state": state}, {"state": P(*batch)}),
            ({"segment_ids": ids[:, :length]}, {"segment_ids": P("data")}),
        ]:

            def f(x, kernel, extra, method=method):
                def loss(x, kernel):
                    y, after = causal_conv1d(x, kernel, **extra, method=method)
                    return (y**2).sum(), (y, after)

                return jax.grad(loss, (0, 1), has_aux=True)(x, kernel)

            def place(a, spec):
                return jax.device_put(a, NamedSharding(mesh, spec))

            placed = (
                place(x, P(*batch)),
                place(kernel, P(*channels)),
                {name: place(extra[name], spec[name]) for name in extra},
            )
            with jax.set_mesh(mesh):
                gradients, (y, after) = jax.jit(f)(*placed)
            equal((gradients, (y, after)), f(x, kernel, extra))
            if AUTO not in kinds:
                for array in (gradients[0], y, after):
                    assert tuple(jax.typeof(array).sharding.spec) == batch
                assert jax.typeof(gradients[1]).sharding.spec == P(*channels, None)


@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_sequences(kind, four):
    four(sequences_on_mesh, (kind, kind))


# Layers

LAYERS = [
    ("DepthwiseConv1D", (), dict(padding="causal")),
    ("DepthwiseConv2D", (), dict(padding="same", depth_multiplier=2)),
    ("DepthwiseConv3D", (), dict(padding="same")),
    ("SeparableConv1D", (4,), dict(padding="same")),
    ("SeparableConv2D", (4,), dict(padding="same")),
]


def layer_on_mesh(name, first, settings, method, kinds):
    """Loss and gradients of both twins, for the batch over one axis, and with channels."""
    rank, c = int(name[-2]), 4
    settings = dict(settings, kernel_size=3, activation="relu", method=method)
    for what in ("depthwise", "bias", "activity"):
        settings[f"{what}_regularizer"] = regularizers.L1(1.0)
    x = oracle.integers(0, 8, *[6] * rank, c)
    layer = getattr(flax_dwconv, name)(*first, **settings)
    params = layer.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: oracle.integers(1, *p.shape), params)

    def linen_loss(params, x):
        y, state = layer.apply({"params": params}, x, mutable=["losses"])
        return (y**2).sum() + total_loss(state["losses"]), y

    def nnx_loss(model, x):
        y = model(x)
        return (y**2).sum() + total_loss(nnx.state(model, flax_dwconv.nnx.Loss)), y

    def linen(params, x):
        return jax.jit(jax.value_and_grad(linen_loss, has_aux=True))(params, x)

    def nnx_(params, x):
        twin = getattr(flax_dwconv.nnx, name)(c, *first, **settings, rngs=nnx.Rngs(0))
        nnx.update(twin, {name: nnx.Param(value) for name, value in params.items()})
        value, state = nnx.jit(nnx.value_and_grad(nnx_loss, has_aux=True))(twin, x)
        return value, dict(nnx.to_pure_dict(state))

    mesh, no = mesh_of(kinds), [None] * rank
    right = linen(params, x)
    for image in (P("data"), P("data", *no, "model")):
        for f in (linen, nnx_):
            with jax.set_mesh(mesh):
                weights = jax.device_put(params, NamedSharding(mesh, P()))
                found = f(weights, jax.device_put(x, NamedSharding(mesh, image)))
            equal(found, right)
            if AUTO not in kinds:
                spec = P("data") if "Separable" in name else image
                shape = (*spec, *[None] * (rank + 2 - len(spec)))
                assert tuple(jax.typeof(found[0][1]).sharding.spec) == shape


@pytest.mark.parametrize(("method", "kind"), METHODS_AND_KINDS)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer[0])
def test_layers(layer, method, kind, four):
    four(layer_on_mesh, *layer, method, (kind, kind))


def accelerated(kind, multiplier, height):
    """Code that knows nothing of us, with the batch over one axis of two."""
    layer = nn.Conv(8 * multiplier, (3, 3), feature_group_count=8, use_bias=False)
    x = oracle.integers(0, 8, height, 6, 8)
    params = {"params": {"kernel": oracle.integers(1, 3, 3, 1, 8 * multiplier)}}
    f = jax.jit(jax.grad(lambda params, x: (layer.apply(params, x) ** 2).sum(), (0, 1)))
    mesh = mesh_of((kind, kind))
    with jax.set_mesh(mesh):
        placed = (
            jax.device_put(params, NamedSharding(mesh, P())),
            jax.device_put(x, NamedSharding(mesh, P("data"))),
        )
        equal(accelerate(f)(*placed), f(params, x))
    if kind == EXPLICIT:
        channels = NamedSharding(mesh, P("data", None, None, "model"))
        with pytest.raises(Exception, match="specify the output sharding"):
            accelerate(f)(params, jax.device_put(x, channels))  # as without `accelerate`


@pytest.mark.parametrize(("multiplier", "height"), [(1, 6), (2, 1)])
@pytest.mark.parametrize("kind", [EXPLICIT, AUTO])
def test_accelerate(kind, multiplier, height, four):
    four(accelerated, kind, multiplier, height)
