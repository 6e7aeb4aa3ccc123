"""Random calls: whatever is asked for is computed as defined, or refused in words.

- The lowering under up to three transformations of JAX, against the numpy definition, and XLA's
  convolution with it, bit for bit on small integers. StableHLO's own interpreter runs what the
  rule lowers to: it takes a tenth of the time of compiling, and errs in other ways than XLA does;
  a part of the calls is compiled.
- Shapes, against the definition.
- Junk: settings, configs, weights and damaged files are read, or refused by a ValueError or a
  TypeError.

More of it: pytest tests/test_fuzz.py --hypothesis-profile overnight
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import warnings
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from test_errors import JUNK, refuses_or_works
from test_functional import Case

from flax_dwconv import (
    DepthwiseConv2D,
    accelerate,
    activations,
    constraints,
    depthwise_conv2d,
    initializers,
    keras_io,
    regularizers,
    weights,
)
from flax_dwconv._lowering import tuning

KEY = jax.random.key(0)


def examples(count):
    """As many in CI; `--hypothesis-profile overnight` says how many times more."""
    return settings(max_examples=count * settings.default.max_examples // 100)


# Geometry


class Axis(NamedTuple):
    """One spatial axis, and the pads where they are neither "same" nor "valid"."""

    size: int
    kernel: int
    stride: int
    dilation: int
    pads: tuple


def axes(pads):
    kernel, stride, dilation = (st.sampled_from(v) for v in ([2, 3, 1, 4], [1, 2, 3], [1, 2, 3]))
    return st.builds(Axis, st.integers(1, 9), kernel, stride, dilation, pads)


@st.composite
def cases(draw, fitting=True):
    """A `Case`, whose kernel fits into the image unless that is not asked for."""
    kind = draw(st.sampled_from(["valid", "same", "one int", "explicit"]))
    pads = st.tuples(st.integers(-2, 4), st.integers(-2, 4))
    if kind == "one int":
        pads = st.just((draw(st.integers(0, 3)),) * 2)
    elif kind != "explicit":
        pads = st.just((0, 0))
    both = [draw(axes(pads)) for _ in "hw"]
    if fitting and kind != "same":
        for i, a in enumerate(both):
            least = (a.kernel - 1) * a.dilation + 1 - sum(a.pads)
            both[i] = a._replace(size=max(least, 0) + a.size % 5 + (least < 1))
    (h, kh, s0, d0, p0), (w, kw, s1, d1, p1) = both
    c, m = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch = draw(st.lists(st.integers(1, 2), max_size=2).map(tuple))
    data_format = draw(st.sampled_from(["channels_last", "channels_first"]))
    image = (h, w, c) if data_format == "channels_last" else (c, h, w)
    return Case(
        (*batch, *image),
        (kh, kw, c, m),
        s0 if s0 == s1 else (s0, s1),
        {"valid": "valid", "same": "same", "one int": p0[0], "explicit": (p0, p1)}[kind],
        d0 if d0 == d1 else (d0, d1),
        data_format,
    )


# Values


class Form(NamedTuple):
    """What transformations made of the convolution: a function f(a, b), and what is known of it.

    The convolution is one of three bilinear maps of a single sum over products x * kernel * y; a
    derivative swaps an argument for the result, and is another of the three. A loop and `vmap` give
    an argument a new leading axis, along which there are as many sums, or one more to sum over.

    Attributes:
      f: the function.
      roles: "x", "kernel" or "y", for each argument and for the result.
      axes: {role: names of its new axes}, the first of which is the first.
      case: the convolution.
      dtype: that of every array.
    """

    f: Callable
    roles: tuple[str, str, str]
    axes: dict[str, tuple[int, ...]]
    case: Case
    dtype: str
    factor: int = 1

    def shape(self, role):
        """Of the array of a role."""
        sizes = {"x": self.case.x, "kernel": self.case.kernel, "y": shape(self.case)}
        return (2,) * len(self.axes[role]) + sizes[role]

    def example(self, argument):
        """The values of an argument on which a derivative with respect to it does not depend."""
        return jnp.ones(self.shape(self.roles[argument]), self.dtype)

    def of_one(self, argument, other):
        """The function of an argument alone."""
        return lambda value: self.f(*((value, other) if argument == 0 else (other, value)))

    def swapped(self, argument, f):
        """`f(other argument, cotangent)` instead."""
        other, wanted = self.roles[1 - argument], self.roles[argument]
        return self._replace(f=f, roles=(other, self.roles[2], wanted))

    def looped(self, f, *roles):
        """`f` with one more axis for these roles."""
        name = sum(len(names) for names in self.axes.values())
        longer = {role: (name, *self.axes[role]) for role in roles}
        return self._replace(f=f, axes=self.axes | longer)

    def expected(self, a, b):
        """The definition, summed over every axis that the result does not have."""
        names = sorted(set().union(*self.axes.values()))
        result = np.zeros(self.shape(self.roles[2]))
        for index in np.ndindex((2,) * len(names)):
            at = {
                role: tuple(index[names.index(name)] for name in self.axes[role])
                for role in self.roles
            }
            first, second, third = self.roles
            result[at[third]] += definition(
                self.case, third, {first: a[at[first]], second: b[at[second]]}
            )
        return self.factor * result


def shape(case):
    """Of the result, by the definition; a size is below 1 where the kernel does not fit."""
    return oracle.output_shape(case.x, case.kernel, **case.options)


def definition(case, wanted, arrays):
    """The convolution, or one of its gradients, which does not depend on what it is with."""
    if wanted == "y":
        return oracle.forward(arrays["x"], arrays["kernel"], **case.options)
    arrays = {wanted: np.zeros(getattr(case, wanted))} | arrays
    gradients = oracle.vjp(arrays["x"], arrays["kernel"], arrays["y"], **case.options)
    return gradients[["x", "kernel"].index(wanted)]


def jitted(form):
    return form._replace(f=jax.jit(form.f))


def checkpointed(form):
    return form._replace(f=jax.checkpoint(form.f))


def jvp(form):
    """f(a, b) - 2 f(a, b) by the product rule."""

    def f(a, b):
        return jax.jvp(form.f, (a, b), (-2 * a, b))[1]

    return form._replace(f=f, factor=-form.factor)


def vjp(argument, form):
    def f(other, g):
        return jax.vjp(form.of_one(argument, other), form.example(argument))[1](g)[0]

    return form.swapped(argument, f)


def transpose(argument, form):
    def f(other, g):
        return jax.linear_transpose(form.of_one(argument, other), form.example(argument))(g)[0]

    return form.swapped(argument, f)


def vmap(axes, form):
    roles = [role for role, axis in zip(form.roles, axes, strict=False) if axis is not None]
    return form.looped(jax.vmap(form.f, axes), *roles, form.roles[2])


def mapped(form):
    return form.looped(
        lambda a, b: lax.map(lambda a: form.f(a, b), a), form.roles[0], form.roles[2]
    )


def scanned(form):
    """The sum over a loop, its carry."""

    def f(a, b):
        zero = jnp.zeros(form.shape(form.roles[2]), form.dtype)
        return lax.scan(lambda total, a: (total + form.f(a, b), None), zero, a)[0]

    return form.looped(f, form.roles[0])


TRANSFORMATIONS = {
    "jit": jitted,
    "checkpoint": checkpointed,
    "jvp": jvp,
    "vjp of first": functools.partial(vjp, 0),
    "vjp of second": functools.partial(vjp, 1),
    "transpose of first": functools.partial(transpose, 0),
    "transpose of second": functools.partial(transpose, 1),
    "vmap over first": functools.partial(vmap, (0, None)),
    "vmap over second": functools.partial(vmap, (None, 0)),
    "vmap over both": functools.partial(vmap, (0, 0)),
    "map over first": mapped,
    "scan over first": scanned,
}

# The algorithms for large images and kernels, on small ones: their limits are lowered to these.
REGIONS = {"efforts": (tuning.Effort(0, 400, 1),), "tiled_region_taps": 400}
SOME_ROWS = {"batch_temporaries": 0, "loop_copies": 0}
ALGORITHMS = {
    "as is": {},
    "regions": REGIONS | {"padded_taps": 0},
    "padded taps": REGIONS | {"padded_taps": 99},
    "padded": {"efforts": (tuning.Effort(0, 0, 1),)},
    "padded, with more channels": {
        "efforts": (tuning.Effort(0, 0, 1),),
        "crowded_channels": 1,
        "more_channels": 3,
    },
    "short rows": {"efforts": (tuning.Effort(0, 0, 999),)},
    "tiles": {"efforts": (tuning.Effort(0, 0, 999),), "row_outputs": 0, "tile_outputs": 3},
    "wide tiles": {
        "efforts": (tuning.Effort(0, 0, 999),),
        "row_outputs": 0,
        "crowded_channels": 1,
    },
    "image by image": {
        "efforts": (tuning.Effort(0, 0, 999),),
        "row_outputs": 0,
        "loop_gain": -1 << 40,
        "loop_copies": 0,
    },
    "some images at a time": {
        "efforts": (tuning.Effort(0, 0, 1),),
        "batch_temporaries": 1000,
        "loop_copies": 1000,
    },
    "some rows at a time": SOME_ROWS | {"efforts": (tuning.Effort(0, 0, 1),)},
    "tiles of some rows at a time": SOME_ROWS
    | {"efforts": (tuning.Effort(0, 0, 999),), "row_outputs": 0, "tile_outputs": 3},
    "loops over some rows at a time": SOME_ROWS
    | {"efforts": (tuning.Effort(0, 0, 1),), "unrolled_taps": 5, "loop_products": 8},
    "not padded": {"padded_elements": 0, "short_row_products": 0, "unrolled_products": 20},
    "one by one": {"padded_elements": 0, "one_by_one_elements": 0},
    "one by one, in blocks": {
        "padded_elements": 0,
        "one_by_one_elements": 0,
        "row_positions": 4,
        "split_positions": 3,
        "positions_together": 1,
    },
    "gradients of some images at a time": {
        "batch_temporaries": 0,
        "gradient_temporaries": 0,
        "gradient_loop_temporaries": 1000,
    },
    "gradients of some large images, and of some taps, at a time": {
        "batch_temporaries": 0,
        "gradient_temporaries": 0,
        "gradient_loop_temporaries": 1000,
        "one_by_one_elements": 0,
        "unrolled_bodies": 0,
        "unrolled_bodies_large": 0,
    },
    "rows unrolled": {
        "efforts": (tuning.Effort(0, 0, 999),),
        "padded_elements": 0,
        "one_by_one_elements": 0,
        "unrolled_bodies_elements": 0,
    },
    "loops": {
        "efforts": (tuning.Effort(0, 0, 1),),
        "unrolled_taps": 5,
        "loop_products": 8,
        "unrolled_bodies": 0,
        "row_taps": 2,
        "row_products": 1,
    },
    "loops over rows": {
        "efforts": (tuning.Effort(0, 0, 1),),
        "crowded_channels": 1,
        "unrolled_taps": 5,
        "loop_products": 32,
    },
    "short sums": {
        "efforts": (tuning.Effort(0, 8, 20),),
        "unrolled_bodies": 0,
        "row_positions": 4,
        "moving_products": 20,
    },
}
# Every sum of products is exact: below 2 / eps.
LIMITS = {"float32": 3, "bfloat16": 1, "float16": 2, "float64": 9}

calls = {
    "case": cases(),
    "dtype": st.sampled_from(sorted(LIMITS)),
    "transformations": st.lists(st.sampled_from(list(TRANSFORMATIONS)), max_size=3),
    "algorithm": st.sampled_from(list(ALGORITHMS)),
}


def interpreted(f, *args):
    """Runs what `f` lowers to by StableHLO's interpreter, whose convolution knows too little."""
    lowered = jax.jit(f, keep_unused=True).lower(*args)
    if "stablehlo.convolution" in lowered.as_text():
        return lowered.compile()(*args)
    module = lowered.compiler_ir("stablehlo")
    with module.context:
        (result,) = stablehlo.eval_module(module, [ir.DenseElementsAttr.get(a) for a in args])
        return np.array(result)


def compiled(f, *args):
    return jax.jit(f)(*args)


def optimized(f, *args):
    """As users have it, not as conftest.py does."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 3})(*args)


def check(case, dtype, transformations, algorithm, run, method="auto"):
    """The call, transformed, gives the bits of the definition."""
    f = functools.partial(depthwise_conv2d, **case.options, method=method)
    form = Form(f, ("x", "kernel", "y"), dict.fromkeys(["x", "kernel", "y"], ()), case, dtype)
    for name in transformations:
        form = TRANSFORMATIONS[name](form)
    a, b = (oracle.integers(i, *form.shape(form.roles[i]), limit=LIMITS[dtype]) for i in (0, 1))
    largest = 3 ** transformations.count("jvp") * form.expected(abs(a), abs(b))
    assume(np.all(abs(largest) <= 2 / float(jnp.finfo(dtype).eps)))

    def wide(a, b):  # numpy has no bfloat16
        y = form.f(a.astype(dtype), b.astype(dtype))
        assert y.dtype == dtype
        return y.astype("float64")

    with pytest.MonkeyPatch.context() as patch:
        constants = dataclasses.replace(tuning.TUNING, **ALGORITHMS[algorithm])
        patch.setattr(tuning, "TUNING", constants)
        result = run(wide, a, b)
    np.testing.assert_array_equal(result, form.expected(a, b))


@examples(300)
@given(**calls)
def test_lowered(x64, case, dtype, transformations, algorithm):
    check(case, dtype, transformations, algorithm, interpreted)


@examples(25)
@given(**calls)
def test_compiled(x64, case, dtype, transformations, algorithm):
    """And plain XLA agrees with the definition."""
    for method in ("auto", "lax"):
        check(case, dtype, transformations, algorithm, compiled, method)


@pytest.mark.nightly
@examples(1000)
@given(**calls)
def test_optimized(x64, case, dtype, transformations, algorithm):
    check(case, dtype, transformations, algorithm, optimized)


@examples(60)
@given(
    axes=st.lists(
        st.tuples(
            st.integers(1, 4), st.sampled_from([1, 1, 2, 3]), st.integers(1, 3),
            st.tuples(st.integers(-2, 3), st.integers(-2, 3)), st.integers(1, 3), st.integers(1, 3),
        ),
        min_size=1,
        max_size=2,
    ),
    groups=st.sampled_from([1, 2]),
    batch_groups=st.booleans(),
)  # fmt: skip
def test_pointwise(axes, groups, batch_groups):
    """Any convolution inside `accelerate(pointwise=True)`, by its definition: XLA's reads outside
    the image if a pad is negative."""
    sizes, kernels, strides, pads, lhs_dilation, rhs_dilation = zip(*axes, strict=True)
    n, m, q, spatial = 2, 3, 5, range(len(axes))
    x = oracle.integers(0, *((groups * n, q) if batch_groups else (n, groups * q)), *sizes)
    kernel = oracle.integers(1, groups * m, q, *kernels)
    limits = [(size - 1) * gaps + 1 for size, gaps in zip(sizes, lhs_dilation, strict=True)]
    outs = [
        (limits[d] + sum(pads[d]) - (kernels[d] - 1) * rhs_dilation[d] - 1) // strides[d] + 1
        for d in spatial
    ]
    assume(min(outs) > 0)
    expected = np.zeros((n, groups * m, *outs))
    parts = np.split(x, groups, 0 if batch_groups else 1), np.split(kernel, groups)
    for o, a in itertools.product(np.ndindex(*outs), np.ndindex(*kernels)):
        t = [o[d] * strides[d] + a[d] * rhs_dilation[d] - pads[d][0] for d in spatial]
        if all(0 <= t[d] < limits[d] and t[d] % lhs_dilation[d] == 0 for d in spatial):
            at = tuple(t[d] // lhs_dilation[d] for d in spatial)
            products = [p[:, :, *at] @ k[:, :, *a].T for p, k in zip(*parts, strict=True)]
            expected[:, :, *o] += np.concatenate(products, 1)
    f = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=pads,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        **{"batch_group_count" if batch_groups else "feature_group_count": groups},
    )
    fast = jax.jit(accelerate(lambda x, kernel: f(x, kernel), pointwise=True)).lower(x, kernel)
    is_product = "stablehlo.convolution" not in fast.as_text()
    if is_product or min(map(min, pads)) >= 0:
        np.testing.assert_array_equal(fast.compile()(x, kernel), expected)
    assert is_product or set(kernels) != {1} or set(lhs_dilation) != {1}


# Shapes


@examples(300)
@given(case=cases(fitting=False), multiplier=st.integers(1, 3), channels=st.integers(1, 3))
def test_shapes(case, multiplier, channels):
    """The function's, traced, and the layer's; or both say that the kernel does not fit."""
    case = case._replace(kernel=(*case.kernel[:3], multiplier))
    expected = shape(case)
    options = case.options | {"depth_multiplier": multiplier}

    def function():
        arrays = (jax.ShapeDtypeStruct(s, np.float32) for s in (case.x, case.kernel))
        f = functools.partial(depthwise_conv2d, **case.options)
        return jax.eval_shape(f, *arrays).shape

    def layer():
        made = DepthwiseConv2D(case.kernel[:2], **options)
        return made.compute_output_shape((1, *case.x[-3:]))

    for call in (function, layer):
        if call is layer and np.max(case.strides) > 1 and np.max(case.dilation_rate) > 1:
            with pytest.raises(ValueError, match="in conjunction with"):
                call()
        elif min(expected) < 1:
            with pytest.raises(ValueError, match="does not fit"):
                call()
        else:
            assert call()[-3:] == expected[-3:]


# Junk. Single arguments and identifiers of nothing but junk are in test_errors and test_vocabulary;
# here something right is damaged.

# Sizes beyond what 32 and 64 bits hold, and beyond a float.
HUGE = st.sampled_from([2**31, -(2**31), 2**63, 10**30, 10**400, -(10**400)])


def places(tree):
    """Every (container, key) of a tree of dicts and lists."""
    pairs = {dict: dict.items, list: enumerate}.get(type(tree), lambda tree: ())(tree)
    for key, value in list(pairs):
        yield tree, key
        yield from places(value)


def copied(tree):
    """The tree, of other containers; what is in them need not be anything that can be copied."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


@st.composite
def damaged(draw, tree, junk=HUGE | JUNK):
    """The tree after up to three accidents."""
    root = {"": copied(tree)}
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(root))
        container, key = found[draw(st.integers(0, len(found) - 1))]
        value = container[key]
        accident = draw(st.sampled_from(["replace", "exchange", "delete", "rename", "misspell"]))
        if accident == "exchange":
            other, at = found[draw(st.integers(0, len(found) - 1))]
            container[key] = copied(other[at])
        elif accident == "delete" and container is not root:
            del container[key]
        elif accident == "rename" and isinstance(container, dict) and container is not root:
            container[f"{draw(st.text(max_size=4))}{key}"] = container.pop(key)
        elif accident == "misspell" and isinstance(value, str):
            cut = draw(st.integers(0, len(value)))
            container[key] = value[:cut] + draw(st.text(max_size=1)) + value[cut + 1 :]
        else:
            container[key] = draw(junk)
    return root[""]


ROOMS = {
    room.__name__.rpartition(".")[2]: room
    for room in (initializers, activations, regularizers, constraints)
}


def identifiers():
    for room_name, room in ROOMS.items():
        for name in room.VOCABULARY.names:
            with contextlib.suppress(ValueError):  # without arguments there is none
                yield room_name, room.serialize(name)


@examples(400)
@given(
    st.sampled_from(list(identifiers())).flatmap(
        lambda pair: st.tuples(st.just(pair[0]), damaged(pair[1]))
    )
)
def test_damaged_identifiers(room_and_identifier):
    """What is read can be written and read again, and computes or refuses."""
    name, identifier = room_and_identifier
    room = ROOMS[name]
    made = refuses_or_works(lambda: room.get(identifier))
    written = refuses_or_works(lambda: room.serialize(made))
    if not dataclasses.is_dataclass(made) or isinstance(made, type):  # nothing, or not ours
        return
    assert room.get(json.loads(json.dumps(written))) == made
    weights = np.ones((3, 3, 2, 2), np.float32)
    arguments = (KEY, weights.shape) if name == "initializers" else (weights,)
    refuses_or_works(lambda: jax.eval_shape(lambda: made(*arguments)))


LAYERS = [
    DepthwiseConv2D(3),
    DepthwiseConv2D(
        (2, 3),
        strides=2,
        padding=((0, 1), (2, -1)),
        depth_multiplier=2,
        data_format="channels_first",
        activation="LeakyReLU",
        depthwise_initializer="VarianceScaling",
        depthwise_regularizer="l1_l2",
        activity_regularizer="OrthogonalRegularizer",
        depthwise_constraint="MinMaxNorm",
        bias_constraint="RadialConstraint",
        dtype="bfloat16",
        precision="highest",
    ),
    DepthwiseConv2D(3, dilation_rate=2, padding="same", activation="glu", method="lax", name="dw"),
]
CONFIGS = [layer.get_config() for layer in LAYERS]
CONFIGS += [{"class_name": "DepthwiseConv2D", "module": "keras.layers", "config": CONFIGS[1]}]


# A damaged name may be a user's own.
customs = pytest.mark.filterwarnings("ignore:Read as None", "ignore:Passed over")


@customs
@examples(400)
@given(st.sampled_from(CONFIGS).flatmap(damaged))
def test_damaged_configs(config):
    layer = refuses_or_works(lambda: keras_io.from_config(config))
    if layer is None:
        return
    written = refuses_or_works(layer.get_config)
    if written is not None:
        assert DepthwiseConv2D.from_config(json.loads(json.dumps(written))) == layer
    assert layer == layer.clone()
    refuses_or_works(lambda: layer.compute_output_shape((1, 8, 8, 4)))
    x = jax.ShapeDtypeStruct((1, 8, 8, 4), np.float32)
    refuses_or_works(lambda: jax.eval_shape(layer.init, KEY, x))


ARRAYS = st.builds(
    np.zeros,
    st.lists(st.sampled_from([3, 1, 4, 2, 8, 0]), max_size=5).map(tuple),
    st.sampled_from(["f4", "f2", "f8", "i4", "?", "c8", "U1", "O", "M8[s]", "V2"]),
)


READERS = {
    weights.from_torch: {"a.weight": np.ones((4, 1, 3, 2), "f4"), "a.bias": np.ones(4, "f4")},
    weights.from_flax: {"kernel": np.ones((3, 2, 1, 4), "f4"), "bias": np.ones(4, "f4")},
}


@pytest.mark.parametrize("reader", READERS)
@examples(150)
@given(data=st.data())
def test_damaged_weights(reader, data):
    source = data.draw(damaged(READERS[reader], ARRAYS | HUGE | JUNK))
    m = data.draw(st.sampled_from([2, 4]) | HUGE | JUNK)
    params = refuses_or_works(lambda: reader(source, depth_multiplier=m))
    if params is not None:
        *_, c, m = params["kernel"].shape
        assert params.get("bias", np.ones(c * m)).shape == (c * m,)


# Damaged files of Keras


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The bytes of three files of a model, the same in every run, and its config."""
    pytest.importorskip("h5py")
    keras = pytest.importorskip("keras")
    layers = keras.layers
    inner = keras.Sequential([layers.DepthwiseConv2D(2, activation="relu", name="dw")], name="in")
    outer = layers.DepthwiseConv2D(3, depth_multiplier=2, name="dw")
    model = keras.Sequential([layers.Input((6, 6, 2), name="x"), outer, inner], name="m")
    folder = tmp_path_factory.mktemp("files")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of its variables
        model.set_weights([oracle.normals(i, *w.shape) for i, w in enumerate(model.get_weights())])
        for name in ("m.keras", "m.h5", "m.weights.h5"):
            (model.save_weights if "weights" in name else model.save)(folder / name)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    with zipfile.ZipFile(io.BytesIO(contents["m.keras"])) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries["metadata.json"] = b'{"keras_version": "3.0.0"}'  # without the date
    return contents | {"m.keras": zipped(entries)}, entries, json.loads(model.to_json())


def zipped(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


@pytest.fixture(scope="module")
def elsewhere():
    """A process to load files in: libhdf5 may read a damaged heap forever, deaf to signals."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield lambda f, *args: pool.apply_async(f, args).get(timeout=60)


AT = st.integers(0, 2**20)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), AT, st.integers(1, 255)),
        st.tuples(st.just("cut"), AT),
        st.tuples(st.just("copy"), AT, AT, st.integers(1, 64)),
        st.tuples(st.just("write"), AT, st.binary(max_size=8)),
    ),
    min_size=1,
    max_size=3,
)


def edited(data, edits):
    data = bytearray(data)
    for kind, at, *rest in edits:
        at %= len(data) or 1
        if kind == "cut":
            del data[at:]
        elif kind == "flip":
            data[at : at + 1] = bytes(byte ^ rest[0] for byte in data[at : at + 1])
        elif kind == "write":
            data[at : at + len(rest[0])] = rest[0]
        else:
            start = rest[0] % (len(data) or 1)
            data[at : at + rest[1]] = data[start : start + rest[1]]
    return bytes(data)


def loads_or_refuses(path, config=None):
    try:
        loaded = keras_io.load(path, config=config)
    except (ValueError, OSError) as error:
        assert path.name in str(error) or "`config`" in str(error)
        return
    assert loaded
    for layer, variables in loaded.values():
        kernel = variables["params"]["kernel"]
        kh, kw, c, m = kernel.shape
        assert ((kh, kw), m) == (layer.kernel_size, layer.depth_multiplier)
        assert kernel.dtype == layer.param_dtype
        if layer.use_bias:
            assert variables["params"]["bias"].shape == (c * m,)


# A failure is shown with the fixture `files`, which is large.
large_repr = pytest.mark.filterwarnings("ignore:Generating overly large repr")


@large_repr
@examples(400)
@given(name=st.sampled_from(["m.h5", "m.weights.h5", "m.keras", "inside m.keras"]), edits=EDITS)
@example("inside m.keras", [("copy", 26, 66, 23)])  # an address beyond 64 bits
def test_damaged_files(files, elsewhere, tmp_path, name, edits):
    """In an archive the checksums notice most; "inside" they are right again."""
    path = tmp_path / name
    contents, entries, config = files
    if name == "inside m.keras":
        inside = sorted(entries)[edits[0][1] % len(entries)]
        data = zipped(entries | {inside: edited(entries[inside], edits)})
    else:
        data = edited(contents[name], edits)
    path.write_bytes(data)
    elsewhere(loads_or_refuses, path, config if "weights" in name else None)


JSON = st.recursive(
    st.none() | st.booleans() | HUGE | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


@large_repr
@customs
@examples(200)
@given(data=st.data())
def test_damaged_model_configs(files, tmp_path, data):
    """Of the model whose weights are read."""
    contents, _, config = files
    path = tmp_path / "m.weights.h5"
    path.write_bytes(contents[path.name])
    bad = data.draw(damaged(config, JSON))
    with contextlib.suppress(TypeError):  # of an argument
        loads_or_refuses(path, bad)
