"""Causal sequences piece by piece: `causal_conv1d` and the 1-D layers, and what they owe.

`verify_streaming` is the contract of any streaming layer, as one function. Operands are small
integers in floating point, so that pieces and the whole give the same bits.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax import lax

import flax_dwconv
from flax_dwconv import DepthwiseConv1D, causal_conv1d, depthwise_conv1d, functional

KEY = jax.random.key(0)


def definition(x, kernel, before=None, dilation=1, segment_ids=None):
    """The sum of the docstring, in numpy loops in float64; `before` continues x into the past."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    k, c, m = kernel.shape
    *batch, length, _ = x.shape
    history = (k - 1) * dilation
    before = np.zeros((*batch, history, c)) if before is None else np.asarray(before, np.float64)
    past = np.concatenate([before, x], axis=-2)
    y = np.zeros((*batch, length, c, m))
    for t, a in np.ndindex(length, k):
        read = t - (k - 1 - a) * dilation
        value = past[..., history + read, :]
        if segment_ids is not None:
            same = segment_ids[..., max(read, 0)] == segment_ids[..., t]
            value = np.where(np.asarray(same)[..., None], value, 0)
        y[..., t, :, :] += value[..., None] * kernel[a]
    return y.reshape(*batch, length, c * m)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# The contract


def verify_streaming(run, params, x, state, cuts, exact_gradients=True):
    """Holds a streaming layer to what it owes.

    Args:
      run: `run(params, x, state) -> (y, state)`, and `run(params, x, None) -> (y, _)`, which starts
        from nothing; pure.
      params: a pytree of small integers.
      x: `(n, l, c)`, small integers.
      state: the state that stands for what came before, of `(n, history, c)`.
      cuts: where to cut the sequence, ascending.
      exact_gradients: whether gradients of pieces have the bits of those of the whole, else they
        have some of them.
    """
    run = jax.jit(run)
    length, history = x.shape[1], state.shape[1]
    whole, last = run(params, x, state)
    assert last.shape == state.shape and last.dtype == state.dtype

    def in_pieces(params, x, state, cuts):
        results = []
        for start, stop in itertools.pairwise([0, *cuts, length]):
            y, state = run(params, x[:, start:stop], state)
            results.append(y)
        return jnp.concatenate(results, 1), state

    # Pieces of any length are the whole: results and last state.
    equal(in_pieces(params, x, state, cuts), (whole, last))
    equal(in_pieces(params, x, state, range(1, length)), (whole, last))
    # No state is a state of zeros.
    equal(run(params, x, jnp.zeros_like(state))[0], run(params, x, None)[0])

    # So do their gradients, to everything.
    def loss(in_pieces_or_whole, params, x, state):
        y, last = in_pieces_or_whole(params, x, state)
        weights = (jnp.arange(y.size) % 5).reshape(y.shape).astype(y.dtype)
        return (y * weights).sum(dtype="float32") + (2 * last).sum(dtype="float32")

    of_pieces, of_whole = (
        jax.grad(functools.partial(loss, f), (0, 1, 2), allow_int=True)(params, x, state)
        for f in (functools.partial(in_pieces, cuts=cuts), run)
    )
    compare = (
        np.testing.assert_array_equal
        if exact_gradients
        else functools.partial(np.testing.assert_allclose, rtol=2e-2, atol=2e-2)
    )
    jax.tree.map(lambda a, b: compare(np.float32(a), np.float32(b)), of_pieces, of_whole)

    # What comes later never reaches what came before, not even a NaN.
    for t in sorted({*cuts, 0, length - 1}):
        y, _ = run(params, x.at[:, t:].set(jnp.nan), state)
        equal(y[:, :t], whole[:, :t])
    # A NaN of the past reaches no further than the history.
    if history:
        y, _ = run(params, x, state.at[:, 0].set(jnp.nan))
        assert np.isnan(np.float32(y[:, 0])).any()
        equal(y[:, 1:], whole[:, 1:])

    # One step of a scan, of vmap over slots, and donated states are the same function.
    def step(state, x):
        y, state = run(params, x[:, None], state)
        return state, y[:, 0]

    scanned, ys = lax.scan(step, state, x.swapaxes(0, 1))
    equal((ys.swapaxes(0, 1), scanned), (whole, last))
    slots = jax.vmap(run, (None, 0, 0))(params, x[:, None], state[:, None])
    equal(jax.tree.map(lambda a: a[:, 0], slots), (whole, last))
    donating = jax.jit(run, donate_argnums=2)
    equal(donating(params, x, jnp.copy(state)), (whole, last))


def windows(number, seed=0):
    """Random windows, dilations, multipliers, lengths and cuts."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        k, dilation, m = rng.integers(1, 6), rng.integers(1, 4), rng.integers(1, 4)
        length = int(rng.integers(2, 12))
        cuts = sorted(set(rng.integers(1, length, rng.integers(1, 4)).tolist()))
        yield int(k), int(dilation), int(m), length, cuts


WINDOWS = list(windows(6))


def operands(k, dilation, m, length, dtype=jnp.float32, state_dtype=None, n=2, c=3):
    x = jnp.asarray(oracle.integers(0, n, length, c), dtype)
    kernel = jnp.asarray(oracle.integers(1, k, c, m), dtype)
    state = jnp.asarray(oracle.integers(2, n, (k - 1) * dilation, c), state_dtype or dtype)
    return x, kernel, state


@pytest.fixture
def as_convolutions(monkeypatch):
    """Pieces of any length are computed as long ones are, not as sums of shifts."""
    monkeypatch.setattr(functional, "_SHORT", 0)


@pytest.mark.parametrize("k, dilation, m, length, cuts", WINDOWS)
def test_long_pieces_keep_the_contract(k, dilation, m, length, cuts, as_convolutions):
    check_function(k, dilation, m, length, cuts, "auto")


@pytest.mark.parametrize(
    "k, dilation, m, length, cuts, method",
    [*((*window, "auto") for window in WINDOWS[1:4]), (*WINDOWS[0], "lax")],
)
def test_short_pieces_keep_the_contract(k, dilation, m, length, cuts, method):
    check_function(k, dilation, m, length, cuts, method)


def test_pieces_are_convolutions_unless_they_are_short():
    """And always where the convolution is XLA's."""
    _, kernel, state = operands(4, 1, 2, 1)

    def convolutions(length, method):
        x = jnp.ones((2, length, 3))
        f = functools.partial(causal_conv1d, method=method)
        return str(jax.make_jaxpr(f)(x, kernel, state)).count("conv_general_dilated[")

    short = functional._SHORT
    assert [convolutions(n, "auto") for n in (1, short, short + 1)] == [0, 0, 2]
    assert [convolutions(n, "lax") for n in (1, short, short + 1)] == [1, 2, 2]


def check_function(k, dilation, m, length, cuts, method):
    x, kernel, state = operands(k, dilation, m, length)

    def run(kernel, x, state):
        return causal_conv1d(x, kernel, state, dilation_rate=dilation, method=method)

    verify_streaming(run, kernel, x, state, cuts)
    equal(run(kernel, x, state)[0], definition(x, kernel, state, dilation))
    equal(run(kernel, x, None)[0], definition(x, kernel, None, dilation))


@pytest.mark.parametrize(
    "dtype, state_dtype",
    [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"),
     ("float16", "float32")],
)  # fmt: skip
def test_states_of_another_dtype(dtype, state_dtype):
    k, dilation, m, length, cuts = WINDOWS[0]
    x, kernel, state = operands(k, dilation, m, length, dtype, state_dtype)

    def run(kernel, x, state):
        return causal_conv1d(x, kernel, state, dilation_rate=dilation)

    y, last = run(kernel, x, state)
    assert y.dtype == dtype and last.dtype == state_dtype
    assert run(kernel, x, None)[1].dtype == dtype
    verify_streaming(run, kernel, x, state, cuts, exact_gradients=False)
    equal(np.float64(y), definition(x, kernel, state, dilation))


def of_linen(layer, x):
    variables = layer.init(KEY, x)
    params = {
        name: jnp.asarray(oracle.integers(seed, *leaf.shape), leaf.dtype)
        for seed, (name, leaf) in enumerate(variables["params"].items())
    }

    def run(params, x, state):
        if state is None:
            return layer.apply({"params": params}, x), None
        return layer.apply({"params": params}, x, state)

    return run, params


def of_nnx(settings, x):
    layer = flax_dwconv.nnx.DepthwiseConv1D(x.shape[-1], **settings, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    leaves, tree = jax.tree.flatten(params)
    params = tree.unflatten(
        [jnp.asarray(oracle.integers(seed, *a.shape), a.dtype) for seed, a in enumerate(leaves)]
    )

    def run(params, x, state):
        layer = nnx.merge(graph, params)
        return (layer(x), None) if state is None else layer(x, state)

    return run, params


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("activation, use_bias", [("relu", True), (None, False)])
@pytest.mark.parametrize("k, dilation, m, length, cuts", WINDOWS[2:4])
def test_the_layers_keep_the_contract(k, dilation, m, length, cuts, activation, use_bias, kind):
    x, _, state = operands(k, dilation, m, length)
    settings = dict(
        kernel_size=k,
        padding="causal",
        dilation_rate=dilation,
        depth_multiplier=m,
        activation=activation,
        use_bias=use_bias,
    )
    if kind == "linen":
        run, params = of_linen(DepthwiseConv1D(**settings), x)
    else:
        run, params = of_nnx(settings, x)
    verify_streaming(run, params, x, state, cuts)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_layers_in_low_precision_carry_a_float32_state(kind):
    k, dilation, m, length, cuts = WINDOWS[1]
    x, _, state = operands(k, dilation, m, length, "bfloat16", "float32")
    settings = dict(
        kernel_size=k,
        padding="causal",
        dilation_rate=dilation,
        depth_multiplier=m,
        dtype="bfloat16",
    )
    run, params = (
        of_linen(DepthwiseConv1D(**settings), x) if kind == "linen" else of_nnx(settings, x)
    )
    y, last = run(params, x, state)
    assert y.dtype == "bfloat16" and last.dtype == "float32"
    verify_streaming(run, params, x, state, cuts, exact_gradients=False)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_channels_first_streams_too(length):
    x, _, state = operands(3, 2, 2, length)
    last = DepthwiseConv1D(3, padding="causal", dilation_rate=2, depth_multiplier=2)
    first = last.copy(data_format="channels_first")
    variables = last.init(KEY, x)
    y, end = last.apply(variables, x, state)
    y1, end1 = first.apply(variables, x.swapaxes(1, 2), state)
    equal((y1.swapaxes(1, 2), end1), (y, end))
    ids = jnp.arange(length)[None] // 2 + jnp.zeros((2, 1), int)
    equal(
        first.apply(variables, x.swapaxes(1, 2), segment_ids=ids).swapaxes(1, 2),
        last.apply(variables, x, segment_ids=ids),
    )


def test_integers_are_cast_in_results_and_states():
    layer = DepthwiseConv1D(3, padding="causal")
    x = oracle.integers(0, 1, 5, 2, dtype=np.int32)
    variables = layer.init(KEY, x)
    whole = layer.apply(variables, x.astype("f4"))
    y, state = layer.apply(variables, x[:, :3], layer.initial_state(1, channels=2))
    z, _ = layer.apply(variables, x[:, 3:], state)
    equal(jnp.concatenate([y, z], 1), whole)


def test_a_step_is_traced_once():
    traces = []

    @jax.jit
    def step(kernel, x, state):
        traces.append(None)
        return causal_conv1d(x, kernel, state)

    x, kernel, state = operands(4, 1, 1, 9)
    for t in range(9):
        _, state = step(kernel, x[:, t : t + 1], state)
    assert len(traces) == 1


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_batch_axes(batch):
    x, kernel = oracle.integers(0, *batch, 7, 3), oracle.integers(1, 3, 3, 2)
    state = oracle.integers(2, *batch, 4, 3)
    y, last = causal_conv1d(x, kernel, state, dilation_rate=2)
    assert last.shape == (*batch, 4, 3)
    equal(y, definition(x, kernel, state, 2))
    ids = np.sort(oracle.integers(3, *batch, 7, dtype=np.int32), axis=-1)
    y, _ = causal_conv1d(x, kernel, dilation_rate=2, segment_ids=ids)
    equal(y, definition(x, kernel, None, 2, ids))


def test_it_is_depthwise_conv1d_with_causal_padding():
    for k, dilation, m, length, _ in WINDOWS:
        x, kernel, _ = operands(k, dilation, m, length)
        equal(
            causal_conv1d(x, kernel, dilation_rate=dilation)[0],
            depthwise_conv1d(x, kernel, padding="causal", dilation_rate=dilation),
        )


# Segments


def segments(length, n=2, seed=0):
    """Documents one after the other, and ids that come again."""
    rng = np.random.default_rng(seed)
    sorted_ids = np.sort(rng.integers(0, 4, (n, length)), axis=-1)
    return [sorted_ids, rng.integers(-1, 2, (n, length)), np.zeros((n, length), int)]


@pytest.mark.parametrize("k, dilation, m, length, cuts", WINDOWS)
def test_segments_do_not_see_each_other(k, dilation, m, length, cuts):
    x, kernel, _ = operands(k, dilation, m, length)
    f = functools.partial(causal_conv1d, dilation_rate=dilation)
    for ids in segments(length):
        ids = jnp.asarray(ids, jnp.int32)
        y, last = f(x, kernel, segment_ids=ids)
        equal(y, definition(x, kernel, None, dilation, np.asarray(ids)))
        equal(last, f(x, kernel)[1])
        # Nor a NaN of another one.
        masked = jnp.where((ids == ids[:, -1:])[..., None], x, jnp.nan)
        alone = f(masked, kernel, segment_ids=ids)[0]
        equal(alone[:, -1], y[:, -1])
    one = jnp.zeros((2, length), jnp.int32)
    equal(f(x, kernel, segment_ids=one)[0], f(x, kernel)[0])


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_packed_documents_are_as_if_alone(kind):
    x = jnp.asarray(oracle.integers(0, 1, 9, 3), jnp.float32)
    ids = jnp.array([[0, 0, 0, 1, 1, 1, 1, 2, 2]])
    settings = dict(kernel_size=3, padding="causal", activation="relu")
    if kind == "linen":
        layer = DepthwiseConv1D(**settings)
        layer = layer.bind(layer.init(KEY, x))
    else:
        layer = flax_dwconv.nnx.DepthwiseConv1D(3, **settings, rngs=nnx.Rngs(0))
    alone = [layer(x[:, start:stop]) for start, stop in [(0, 3), (3, 7), (7, 9)]]
    np.testing.assert_allclose(
        layer(x, segment_ids=ids), jnp.concatenate(alone, 1), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_segments_accumulate_in_float32(dtype):
    """257 taps of ones: in bfloat16 the sum would stay 256."""
    x, kernel = jnp.ones((1, 600, 1), dtype), jnp.ones((520, 1, 1), dtype)
    ids = jnp.zeros((1, 600), jnp.int32)
    y, _ = causal_conv1d(x, kernel, segment_ids=ids)
    assert y.dtype == dtype
    equal(np.float64(y[0, 511:519, 0]), np.float64(jnp.arange(512, 520).astype(dtype)))


# States


def test_initial_state():
    layer = DepthwiseConv1D(4, padding="causal", dilation_rate=3)
    for batch, shape in [(2, (2, 9, 5)), ((2,), (2, 9, 5)), ((), (9, 5)), ((3, 2), (3, 2, 9, 5))]:
        state = layer.initial_state(batch, 5)
        assert state.shape == shape and state.dtype == np.float32 and not state.any()
    assert layer.initial_state(1, 5, "bfloat16").dtype == "bfloat16"
    assert layer.copy(dtype="bfloat16").initial_state(1, 5).dtype == "bfloat16"
    assert layer.copy(kernel_size=1).initial_state(1, 5).shape == (1, 0, 5)


X, K = np.ones((2, 6, 3), np.float32), np.ones((3, 3, 1), np.float32)
CAUSAL = DepthwiseConv1D(3, padding="causal")


def apply(layer, *args, **kwargs):
    return layer.apply(layer.init(KEY, X), X, *args, **kwargs)


ERRORS = [
    (
        lambda: causal_conv1d(X, K, X),
        ValueError,
        "`state` must have shape (*batch, (k - 1) * dilation_rate, c), which is (2, 2, 3) for `x` "
        "of shape (2, 6, 3), got (2, 6, 3).",
    ),
    (
        lambda: causal_conv1d(X, K, X[0, :2]),
        ValueError,
        "`state` must have shape (*batch, (k - 1) * dilation_rate, c), which is (2, 2, 3) for `x` "
        "of shape (2, 6, 3), got (2, 3).",
    ),
    (
        lambda: causal_conv1d(X, K, X[:, :2].astype(int)),
        TypeError,
        "`state` must have a floating dtype, got int32 for float32.",
    ),
    (
        lambda: causal_conv1d(X.astype("i4"), K.astype("i4"), X[:, :2]),
        TypeError,
        "`state` must have the dtype of `x`, got float32 for int32.",
    ),
    (lambda: causal_conv1d(X, K, 3), TypeError, "`state` must be an array, got int."),
    (lambda: causal_conv1d([1.0], K), TypeError, "`x` must be an array, got list."),
    (
        lambda: causal_conv1d(X[:, :0], K),
        ValueError,
        "`x` must have shape (*batch, l, c) with l >= 1, got (2, 0, 3).",
    ),
    (
        lambda: causal_conv1d(X[0, 0], K),
        ValueError,
        "`x` must have shape (*batch, l, c) with l >= 1, got (3,).",
    ),
    (
        lambda: causal_conv1d(X, K[0]),
        ValueError,
        "`kernel` must have shape (k, c, m), got (3, 1).",
    ),
    (
        lambda: causal_conv1d(X[..., :2], K),
        ValueError,
        "`x` and `kernel` must have the same number of channels, got (2, 6, 2) with the channels "
        "on axis -1 and a `kernel` of shape (3, 3, 1) with the channels on its last axis but one.",
    ),
    (
        lambda: causal_conv1d(X, K.astype("f2"), segment_ids=np.zeros((2, 6), int)),
        TypeError,
        "`x` and `kernel` must have the same dtype, got float32 and float16.",
    ),
    (
        lambda: causal_conv1d(X, K, X[:, :2], segment_ids=np.zeros((2, 6), int)),
        ValueError,
        "`segment_ids` and `state` exclude each other, got both.",
    ),
    (
        lambda: causal_conv1d(X, K, segment_ids=np.zeros((6,), int)),
        ValueError,
        "`segment_ids` must have shape (*batch, l), which is (2, 6) for `x` of shape (2, 6, 3), "
        "got (6,).",
    ),
    (
        lambda: causal_conv1d(X, K, segment_ids=np.zeros((2, 6), "f4")),
        TypeError,
        "`segment_ids` must be integers, got float32.",
    ),
    (
        lambda: causal_conv1d(X, K, dilation_rate=0),
        ValueError,
        "`dilation_rate` must be a tuple of 1 integer > 0, got 0.",
    ),
    (
        lambda: causal_conv1d(X, K, segment_ids=np.zeros((2, 6), int), method="fast"),
        ValueError,
        "`method` must be 'auto', 'lax' or 'taps', got 'fast'.",
    ),
    (
        lambda: causal_conv1d(X, K, precision="garbage"),
        ValueError,
        "`precision` must be a `jax.lax.Precision`, its name, a pair of them, or None, got "
        "'garbage'.",
    ),
    (
        lambda: causal_conv1d(X > 0, K > 0),
        TypeError,
        "`x` must be floating, complex or integer, got bool.",
    ),
    (
        lambda: causal_conv1d(X[..., :0], K[:, :0]),
        ValueError,
        "`x` must have at least one channel, got (2, 6, 0).",
    ),
    (
        lambda: apply(DepthwiseConv1D(3), X[:, :2]),
        ValueError,
        "`state` is for a layer with `padding`='causal' and strides of 1, got "
        "`padding`='valid' and `strides`=(1,).",
    ),
    (
        lambda: apply(DepthwiseConv1D(3, 2, "causal"), segment_ids=np.zeros((2, 6), int)),
        ValueError,
        "`segment_ids` is for a layer with `padding`='causal' and strides of 1, got "
        "`padding`='causal' and `strides`=(2,).",
    ),
    (
        lambda: DepthwiseConv1D(3).initial_state(2, 3),
        ValueError,
        "`initial_state` is for a layer with `padding`='causal' and strides of 1, got "
        "`padding`='valid' and `strides`=(1,).",
    ),
    (
        lambda: CAUSAL.initial_state(2.0, 3),
        TypeError,
        "`batch_shape` must be an int >= 0 or a tuple of them, got 2.0.",
    ),
    (
        lambda: CAUSAL.initial_state(-1, 3),
        ValueError,
        "`batch_shape` must be an int >= 0 or a tuple of them, got -1.",
    ),
    (
        lambda: CAUSAL.initial_state(2, 0),
        ValueError,
        "`channels` must be an integer > 0, got 0.",
    ),
    (
        lambda: CAUSAL.initial_state(2, 3, "int8"),
        ValueError,
        "`dtype` must be a floating dtype, got 'int8'.",
    ),
    (
        lambda: apply(CAUSAL, X),
        ValueError,
        "`state` must have shape (*batch, (k - 1) * dilation_rate, c), which is (2, 2, 3) for `x` "
        "of shape (2, 6, 3), got (2, 6, 3).",
    ),
]


@pytest.mark.parametrize("call, exception, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(call, exception, message):
    with pytest.raises(exception) as error:
        call()
    assert type(error.value) is exception
    assert str(error.value) == message


# Long kernels and symbolic lengths


@pytest.mark.parametrize("k", [functional._UNROLLED, functional._UNROLLED + 1])
def test_many_taps(k):
    """More are convolutions, or a loop for segments."""
    x, kernel, state = operands(k, 1, 2, 9)
    y, _ = causal_conv1d(x, kernel, state)
    equal(y, definition(x, kernel, state))
    ids = jnp.asarray(segments(9)[0], jnp.int32)

    def f(x, kernel):
        return causal_conv1d(x, kernel, segment_ids=ids)[0]

    y, vjp = jax.vjp(f, x, kernel)
    equal(y, definition(x, kernel, None, 1, np.asarray(ids)))
    assert ("scan" in str(jax.make_jaxpr(f)(x, kernel))) == (k > functional._UNROLLED)
    # Linear in each operand: <g, f(x, k)> is <x, its gradient> and <k, its gradient>.
    dx, dk = vjp(y)
    assert jnp.vdot(y, y) == jnp.vdot(x, dx) == jnp.vdot(kernel, dk)


@pytest.mark.parametrize("with_state", [True, False])
def test_a_symbolic_length_exports(with_state):
    n, length = jax.export.symbolic_shape("n, l")
    kernel = jnp.asarray(oracle.integers(1, 4, 3, 2), jnp.float32)

    def f(x, state):
        return causal_conv1d(x, kernel, state if with_state else None)

    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(n, length, 3), (n, 3, 3)]]
    exported = jax.export.export(jax.jit(f))(*specs)
    for size in (1, 2, 3, 7, 20):
        x, _, state = operands(4, 1, 2, size)
        equal(exported.call(x, state), f(x, state))


def test_a_first_state_of_a_symbolic_batch():
    (n,) = jax.export.symbolic_shape("n")
    variables = CAUSAL.init(KEY, X)

    def f(x):
        return CAUSAL.apply(variables, x, CAUSAL.initial_state(x.shape[0], 3))

    exported = jax.export.export(jax.jit(f))(jax.ShapeDtypeStruct((n, 6, 3), jnp.float32))
    equal(exported.call(X), f(X))
