"""The depthwise convolution as pure functions: one `jax.lax.conv_general_dilated` each.

Short pieces of a causal sequence, and packed documents, are sums of shifted inputs instead.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flax_dwconv import _dtypes, _geometry, _lowering, _mesh

_P = ParamSpec("_P")


def depthwise_conv(
    x: ArrayLike,
    kernel: ArrayLike,
    *,
    strides: _geometry.Ints = 1,
    padding: _geometry.PaddingLike = "valid",
    dilation_rate: _geometry.Ints = 1,
    data_format: str = "channels_last",
    precision: _geometry.Precision = None,
    preferred_element_type: DTypeLike | None = None,
    method: _geometry.Method = "auto",
) -> jax.Array:
    """Convolves every channel with its own `m` filters, in 1, 2 or 3 dimensions.

    In two dimensions, with strides `s`, dilation rates `d` and pads `p` before the first row and
    column,

        y[n, i, j, c*M + m] = sum_{a,b} x[n, i*s0 + a*d0 - p0, j*s1 + b*d1 - p1, c] * kernel[a, b,
        c, m]

    where each channel has `M` filters, of which `m` is one, and `x` is 0 outside its bounds: a
    cross-correlation, as everywhere in deep learning. It is
    one `jax.lax.conv_general_dilated` with `feature_group_count = c`, so that every JAX
    transformation works by JAX's own rules: `jit`, `vmap`, forward and reverse mode to any order,
    `jax.export`, sharding.

    Args:
      x: inputs, `(*batch, *space, c)`, or `(*batch, c, *space)` with
        `data_format="channels_first"`; any number of batch axes, none included. Floating, complex
        or integer.
      kernel: filters, `(*window, c, m)` in both data formats, of the dtype of `x`. The number of
        dimensions of the window, 1, 2 or 3, is that of `space`.
      strides: step of the window, one int > 0 or one for each dimension.
      padding: "valid" (none), "same" (TensorFlow's rule: `ceil(size / stride)` results, an odd
        total pads one more at the end), "causal" (1-D only: `(k - 1) * dilation_rate` zeros before
        the sequence), an int >= 0 for every side, or for each dimension an int >= 0 or a pair
        `(before, after)`, where a negative pad crops. Strings in any case.
      dilation_rate: distance of neighbouring kernel taps, one int > 0 or one for each dimension.
      data_format: "channels_last" or "channels_first".
      precision: `jax.lax.Precision`, its name, or a pair of them, for GPU and TPU.
      preferred_element_type: dtype of the accumulation and the result; None is the dtype of `x`.
      method: "auto" compiles the convolution as a sum over kernel taps on CPU, where that is
        faster than XLA's convolution, and leaves it to XLA on GPU and TPU; "taps" compiles the sum
        over taps on every platform; "lax" leaves the convolution to XLA on every platform. The
        exception is the kernel gradient on a mesh of two axes, where XLA's may be wrong: it is a
        sum over taps.

    Returns:
      `(*batch, *space, c*m)` or `(*batch, c*m, *space)`; filter `m` of channel `c` is at `c*M + m`.

    Raises:
      TypeError: if `x` or `kernel` is not an array, their dtypes differ, or another argument is of
        a wrong type.
      ValueError: if another argument has no meaning, the channels of `x` and `kernel` differ, or
        the kernel does not fit into the input.

    Example:
      The kernel decides how many dimensions there are:

      >>> import jax.numpy as jnp
      >>> import flax_dwconv
      >>> sequences, videos = jnp.ones((8, 100, 4)), jnp.ones((8, 10, 32, 32, 4))
      >>> flax_dwconv.depthwise_conv(sequences, jnp.ones((5, 4, 1)), padding="causal").shape
      (8, 100, 4)
      >>> flax_dwconv.depthwise_conv(videos, jnp.ones((3, 3, 3, 4, 2)), strides=(1, 2, 2)).shape
      (8, 8, 15, 15, 8)

    Source: tf.keras's `DepthwiseConv2D`; strides together with dilation, which it refuses, are
    computed by the formula above.
    """
    x, kernel = _geometry.as_array(x, "x"), _geometry.as_array(kernel, "kernel")
    rank = kernel.ndim - 2
    if rank not in _geometry.SPELLINGS:
        raise ValueError(
            "`kernel` must have shape (*window, c, m), with a window of 1, 2 or 3 dimensions, got "
            f"{kernel.shape}."
        )
    _geometry.check_method(method)
    kernel_size, (c, m) = kernel.shape[:rank], kernel.shape[rank:]
    window = _geometry.window(rank, kernel_size, strides, padding, dilation_rate, data_format)
    if x.ndim <= rank:
        raise ValueError(f"`x` must have shape (*batch, {window.input_axes()}), got {x.shape}.")
    _check_operands(x, kernel, window)
    shape = window.output_shape(x.shape, c * m)  # raises where the kernel does not fit

    def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _convolve(x, kernel, window, method, precision, preferred_element_type)

    def result(x: Sequence[_mesh.Part], kernel: Sequence[_mesh.Part]) -> _mesh.Result:
        parts = list(x)
        parts[window.channel_axis] = parts[window.channel_axis] or kernel[-2]
        return shape, parts

    return _mesh.on_automatic_axes(conv, result, x, kernel)


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    window: _geometry.Window,
    method: _geometry.Method,
    precision: _geometry.Precision,
    preferred_element_type: DTypeLike | None,
) -> jax.Array:
    """Returns the convolution of operands that fit."""
    (c, m), rank = kernel.shape[-2:], window.rank
    batch = x.shape[: -rank - 1]
    x = x.reshape(math.prod(batch), *x.shape[-rank - 1 :])
    pads = window.explicit_padding
    if not isinstance(pads, str) and min(map(min, pads)) < 0:
        # Up to jax 0.11.2, XLA:CPU is wrong for some pads that crop one end and add to the other:
        # with 6 rows, 3 taps and pads (-1, 1), the kernel gradient in 1-D and 2-D, and in 2-D the
        # result (`findings/pads-that-crop-and-add.sh`). With any negative pad, we therefore pad and
        # crop before the convolution.
        config = [(0, 0, 0)] * (rank + 2)
        for axis, (before, after) in zip(window.spatial_axes, pads, strict=True):
            config[axis] = (before, after, 0)
        x, pads = lax.pad(x, jnp.zeros((), x.dtype), config), "VALID"
    with _lowering.method_scope(method, x, kernel):
        y = lax.conv_general_dilated(
            x,
            kernel.reshape(*window.kernel_size, 1, c * m),
            window_strides=window.strides,
            padding=pads,
            rhs_dilation=window.dilation_rate,
            dimension_numbers=window.dimension_numbers,
            feature_group_count=c,
            precision=_geometry.precision(precision),
            preferred_element_type=_geometry.element_type(preferred_element_type),
        )
    return y.reshape(*batch, *y.shape[1:])


def _check_operands(x: jax.Array, kernel: jax.Array, window: _geometry.Window) -> None:
    if x.shape[window.channel_axis] != kernel.shape[-2]:
        raise ValueError(
            f"`x` and `kernel` must have the same number of channels, got {x.shape} with the "
            f"channels on axis {window.channel_axis} and a `kernel` of shape {kernel.shape} with "
            "the channels on its last axis but one."
        )
    if kernel.shape[-2] == 0:
        raise ValueError(f"`x` must have at least one channel, got {x.shape}.")
    if x.dtype == bool:
        raise TypeError("`x` must be floating, complex or integer, got bool.")
    if x.dtype != kernel.dtype:
        raise TypeError(
            "`x` and `kernel` must have the same dtype, got "
            f"{x.dtype.name} and {kernel.dtype.name}."
        )


def _of_rank(
    rank: int, conv: Callable[_P, jax.Array]
) -> Callable[[Callable[[], None]], Callable[_P, jax.Array]]:
    """Returns a decorator: a function becomes `conv` for one rank, and keeps name and docstring."""

    def decorate(described: Callable[[], None]) -> Callable[_P, jax.Array]:
        @functools.wraps(conv)
        def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> jax.Array:
            kernel = args[1] if len(args) > 1 else kwargs.get("kernel")
            if getattr(kernel, "ndim", rank + 2) != rank + 2:
                raise ValueError(
                    f"`kernel` must have shape ({_geometry.SPELLINGS[rank].kernel}, c, m), got "
                    f"{kernel.shape}."  # pyrefly: ignore[missing-attribute]
                )
            return conv(*args, **kwargs)

        wrapper.__name__ = wrapper.__qualname__ = described.__name__
        wrapper.__doc__ = described.__doc__
        return wrapper

    return decorate


@_of_rank(1, depthwise_conv)
def depthwise_conv1d() -> None:
    """Convolves every channel of sequences with its own `m` filters: `depthwise_conv` in 1-D.

    Args:
      x: `(*batch, l, c)`, or `(*batch, c, l)` with `data_format="channels_first"`.
      kernel: `(k, c, m)`.
      strides: see `depthwise_conv`, as for all that follow.
      padding: also "causal".
      dilation_rate: one int > 0, or a tuple of one.
      data_format: "channels_last" or "channels_first".
      precision: for GPU and TPU.
      preferred_element_type: dtype of the accumulation and the result.
      method: "auto", "lax" or "taps".

    Returns:
      `(*batch, lo, c*m)` or `(*batch, c*m, lo)`.

    Raises:
      TypeError: as `depthwise_conv`.
      ValueError: as `depthwise_conv`, and for a kernel of another rank.

    Example:
      Each result is the sum of its own position and the one before:

      >>> import jax.numpy as jnp
      >>> import flax_dwconv
      >>> x = jnp.arange(4.0).reshape(1, 4, 1)
      >>> y = flax_dwconv.depthwise_conv1d(x, jnp.ones((2, 1, 1)), padding="causal")
      >>> print(y[0, :, 0])
      [0. 1. 3. 5.]

    Source: Keras's `DepthwiseConv1D`; causal padding is that of its `Conv1D`.
    """


@_of_rank(2, depthwise_conv)
def depthwise_conv2d() -> None:
    """Convolves every channel of images with its own `m` filters: `depthwise_conv` in 2-D.

    Args:
      x: `(*batch, h, w, c)`, or `(*batch, c, h, w)` with `data_format="channels_first"`.
      kernel: `(kh, kw, c, m)`.
      strides: see `depthwise_conv`, as for all that follow.
      padding: "valid", "same", an int, or `((top, bottom), (left, right))`.
      dilation_rate: one int > 0 or two.
      data_format: "channels_last" or "channels_first".
      precision: for GPU and TPU.
      preferred_element_type: dtype of the accumulation and the result.
      method: "auto", "lax" or "taps".

    Returns:
      `(*batch, ho, wo, c*m)` or `(*batch, c*m, ho, wo)`.

    Raises:
      TypeError: as `depthwise_conv`.
      ValueError: as `depthwise_conv`, and for a kernel of another rank.

    Example:
      A 3x3 box blur and its negative, for each of two channels:

      >>> import jax.numpy as jnp
      >>> import flax_dwconv
      >>> blur = jnp.full((3, 3, 2, 1), 1 / 9)
      >>> y = flax_dwconv.depthwise_conv2d(
      ...     jnp.ones((8, 32, 32, 2)), jnp.concatenate([blur, -blur], axis=-1), strides=2)
      >>> y.shape, y[0, 0, 0]
      ((8, 15, 15, 4), Array([ 1., -1.,  1., -1.], dtype=float32))

    Source: tf.keras's `DepthwiseConv2D`.
    """


@_of_rank(3, depthwise_conv)
def depthwise_conv3d() -> None:
    """Convolves every channel of volumes or videos with its own `m` filters, in 3-D.

    Args:
      x: `(*batch, d, h, w, c)`, or `(*batch, c, d, h, w)` with `data_format="channels_first"`.
      kernel: `(kd, kh, kw, c, m)`.
      strides: see `depthwise_conv`, as for all that follow.
      padding: "valid", "same", an int, or `((front, back), (top, bottom), (left, right))`.
      dilation_rate: one int > 0 or three.
      data_format: "channels_last" or "channels_first".
      precision: for GPU and TPU.
      preferred_element_type: dtype of the accumulation and the result.
      method: "auto", "lax" or "taps".

    Returns:
      `(*batch, do, ho, wo, c*m)` or `(*batch, c*m, do, ho, wo)`.

    Raises:
      TypeError: as `depthwise_conv`.
      ValueError: as `depthwise_conv`, and for a kernel of another rank.

    Example:
      The difference of neighbouring frames of a video:

      >>> import jax.numpy as jnp
      >>> import flax_dwconv
      >>> frames = jnp.arange(3.0).reshape(1, 3, 1, 1, 1) * jnp.ones((1, 3, 4, 4, 2))
      >>> change = jnp.array([-1.0, 1.0]).reshape(2, 1, 1, 1, 1) * jnp.ones((2, 1, 1, 2, 1))
      >>> y = flax_dwconv.depthwise_conv3d(frames, change)
      >>> y.shape, float(y.min()), float(y.max())
      ((1, 2, 4, 4, 2), 1.0, 1.0)

    Source: the formula of `depthwise_conv`; Keras has no such layer.
    """


def causal_conv1d(
    x: ArrayLike,
    kernel: ArrayLike,
    state: ArrayLike | None = None,
    *,
    dilation_rate: _geometry.Ints = 1,
    segment_ids: ArrayLike | None = None,
    precision: _geometry.Precision = None,
    method: _geometry.Method = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Convolves sequences causally, piece by piece: a prefill, chunks and single steps are alike.

    With the distance `d` of the taps,

        y[t, c*M + m] = sum_a x[t - (k - 1 - a) * d, c] * kernel[a, c, m]

    where `x` continues into the past as `state` says: its last position is the one before `x`. So
    no result reads what comes after its own position, and

        y1, state = causal_conv1d(x1, kernel)
        y2, state = causal_conv1d(x2, kernel, state)

    gives the results, gradients and last state of `causal_conv1d` of `x1` and `x2` joined. It is
    pure: carry the state in a `lax.scan`, `vmap` over slots, donate it to `jit`.

    Args:
      x: the next inputs, `(*batch, l, c)` for any `l >= 1`.
      kernel: filters, `(k, c, m)`, of the dtype of `x`.
      state: the inputs before `x`, `(*batch, (k - 1) * d, c)`, of any floating dtype if `x` is
        floating, else of the dtype of `x`. None is zeros: nothing came before.
      dilation_rate: `d`, an int > 0.
      segment_ids: integers `(*batch, l)` that name the document of each position, where several are
        packed into one sequence. For a position, those of other documents count as zeros. They
        exclude a `state`.
      precision: see `depthwise_conv`. It has no effect on sums of shifted inputs.
      method: see `depthwise_conv`. Unless it is "lax", pieces of at most 16 positions are sums of
        shifted inputs on every platform, if the kernel has at most 64 taps. With `segment_ids`,
        pieces of any length are, whatever the method: which taps count depends on the position, so
        that it is no convolution.

    Returns:
      `y`, `(*batch, l, c*m)` in the dtype of `x`; and the next state, which is the last
      `(k - 1) * d` inputs, in the dtype of `state`, or of `x` if that is None.

    Raises:
      TypeError: if an argument is not an array, or has a dtype that does not fit.
      ValueError: if the shapes do not fit, there is no position, or `segment_ids` and `state` are
        both given.

    Example:
      A moving sum of three numbers: four at once, then one more.

      >>> import jax.numpy as jnp
      >>> import flax_dwconv
      >>> kernel = jnp.ones((3, 1, 1))
      >>> y, state = flax_dwconv.causal_conv1d(jnp.array([[1.0], [2.0], [3.0], [4.0]]), kernel)
      >>> print(y[:, 0], state[:, 0])
      [1. 3. 6. 9.] [3. 4.]
      >>> y, state = flax_dwconv.causal_conv1d(jnp.array([[5.0]]), kernel, state)
      >>> print(y[:, 0], state[:, 0])
      [12.] [4. 5.]

    Source: the short convolution of H3, Mamba and Griffin; T. Dao and others, causal-conv1d.
    """
    x, kernel = _geometry.as_array(x, "x"), _geometry.as_array(kernel, "kernel")
    if kernel.ndim != 3:
        raise ValueError(f"`kernel` must have shape (k, c, m), got {kernel.shape}.")
    if x.ndim < 2 or x.shape[-2] == 0:
        raise ValueError(f"`x` must have shape (*batch, l, c) with l >= 1, got {x.shape}.")
    _geometry.check_method(method)
    precision = _geometry.precision(precision)
    window = _geometry.window(1, kernel.shape[:1], 1, "causal", dilation_rate, "channels_last")
    _check_operands(x, kernel, window)
    if segment_ids is not None and state is not None:
        raise ValueError("`segment_ids` and `state` exclude each other, got both.")
    shape = (*x.shape[:-2], window.effective_size[0] - 1, x.shape[-1])
    optional = {}
    if state is not None:
        optional["state"] = _state(state, x, shape)
    if segment_ids is not None:
        optional["ids"] = _segments(segment_ids, x)
    conv = functools.partial(
        depthwise_conv, dilation_rate=dilation_rate, precision=precision, method=method
    )

    def causal(x: jax.Array, kernel: jax.Array, *values: jax.Array) -> list[jax.Array]:
        given = dict(zip(optional, values, strict=True))
        return _causal(conv, x, kernel, window, given.get("state"), given.get("ids"), method)

    def results(
        x: Sequence[_mesh.Part], kernel: Sequence[_mesh.Part], *_: Any
    ) -> list[_mesh.Result]:
        y = (*x[:-1], x[-1] or kernel[-2])
        features = kernel_shape[-2] * kernel_shape[-1]
        return [((*x_shape[:-1], features), y), (shape, (*x[:-2], None, x[-1]))]

    x_shape, kernel_shape = x.shape, kernel.shape
    y, state = _mesh.on_automatic_axes(causal, results, x, kernel, *optional.values())
    return y, state


def _causal(
    conv: Callable[..., jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    window: _geometry.Window,
    state: jax.Array | None,
    segment_ids: jax.Array | None,
    method: _geometry.Method,
) -> list[jax.Array]:
    """Returns `causal_conv1d` of operands that fit."""
    shape = (*x.shape[:-2], window.effective_size[0] - 1, x.shape[-1])
    before = jnp.zeros(shape, x.dtype) if state is None else state
    length, k = x.shape[-2], kernel.shape[0]
    short = isinstance(length, int) and length <= _SHORT and k <= _UNROLLED and method != "lax"
    if short or segment_ids is not None:
        y = _sum_of_shifts(x, kernel, before, window, segment_ids)
    elif state is None:
        y = conv(x, kernel, padding="causal")
    else:
        y = _continued(conv, x, kernel, before)
    return [y, next_state(x, before)]


def _state(state: ArrayLike, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns the inputs before `x` as an array, once their shape and dtype are checked."""
    state = _geometry.as_array(state, "state")
    if state.shape != shape:
        raise ValueError(
            "`state` must have shape (*batch, (k - 1) * dilation_rate, c), which is "
            f"{shape} for `x` of shape {x.shape}, got {state.shape}."
        )
    both = jnp.issubdtype(x.dtype, jnp.floating) and jnp.issubdtype(state.dtype, jnp.floating)
    if not both and state.dtype != x.dtype:
        rule = "a floating dtype" if jnp.issubdtype(x.dtype, jnp.floating) else "the dtype of `x`"
        raise TypeError(f"`state` must have {rule}, got {state.dtype.name} for {x.dtype.name}.")
    return state


def next_state(x: jax.Array, state: jax.Array) -> jax.Array:
    """Returns the last inputs, as many as `state` holds, of `state` followed by `x`."""

    def result(x: Sequence[_mesh.Part], _: Sequence[_mesh.Part]) -> _mesh.Result:
        return state.shape, (*x[:-2], None, x[-1])

    return _mesh.on_automatic_axes(_last_inputs, result, x, state)


def _last_inputs(x: jax.Array, state: jax.Array) -> jax.Array:
    history, length = state.shape[-2], x.shape[-2]
    if not isinstance(length, int):  # symbolic, and comparable with nothing
        both = lax.concatenate([state, x.astype(state.dtype)], x.ndim - 2)
        return lax.slice_in_dim(both, length, length + history, axis=x.ndim - 2)
    if length >= history:
        return lax.slice_in_dim(x, length - history, length, axis=x.ndim - 2).astype(state.dtype)
    kept = lax.slice_in_dim(state, length, history, axis=state.ndim - 2)
    return lax.concatenate([kept, x.astype(state.dtype)], x.ndim - 2)


def _continued(
    conv: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array, state: jax.Array
) -> jax.Array:
    """Convolves `x` after `state`.

    Only the first results read the state. They are a convolution of their own, so that a long
    sequence is not copied behind its state.
    """
    axis = x.ndim - 2
    history, length = state.shape[-2], x.shape[-2]
    if not history:
        return conv(x, kernel)
    if not isinstance(length, int):  # symbolic, and comparable with nothing
        return conv(lax.concatenate([state.astype(x.dtype), x], axis), kernel)
    near = lax.slice_in_dim(x, 0, min(history, length), axis=axis)
    first = conv(lax.concatenate([state.astype(x.dtype), near], axis), kernel)
    if length <= history:
        return first
    return lax.concatenate([first, conv(x, kernel)], axis)


# Pieces of at most `_SHORT` positions are summed up tap by tap, if there are at most `_UNROLLED`
# taps. As convolutions of their own, with kernels of 2 to 31 taps, single steps took 1.0 to 3.3
# times as long, and 16 positions of one sequence 0.95 to 4 times (`--family sequences` of the
# benchmark).
# With segments, more taps are a loop: each one would be compiled, 1,024 of them for 4 s.
_SHORT, _UNROLLED = 16, 64


def _segments(segment_ids: ArrayLike, x: jax.Array) -> jax.Array:
    """Returns the segment of each position as an array, once shape and dtype are checked."""
    ids = _geometry.as_array(segment_ids, "segment_ids")
    if ids.shape != x.shape[:-1]:
        raise ValueError(
            f"`segment_ids` must have shape (*batch, l), which is {x.shape[:-1]} for `x` of shape "
            f"{x.shape}, got {ids.shape}."
        )
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`segment_ids` must be integers, got {ids.dtype.name}.")
    return ids


def _sum_of_shifts(
    x: jax.Array,
    kernel: jax.Array,
    state: jax.Array,
    window: _geometry.Window,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Convolves `x` after `state` as a sum of one product for each tap.

    With segments, each product is of the inputs in the segment of the output; all others count as
    zeros, a NaN too. State and pads get the segment 0, which is harmless: the state is zeros then.
    """
    (k, c, m), (distance,) = kernel.shape, window.dilation_rate
    length, axis = x.shape[-2], x.ndim - 2
    wide = _dtypes.accumulator(x.dtype)
    past = jnp.repeat(lax.concatenate([state.astype(x.dtype), x], axis), m, axis=-1)
    weights = kernel.astype(wide).reshape(k, *[1] * (axis + 1), c * m)
    pads = [(0, 0, 0)] * axis + [(state.shape[-2], 0, 0)]
    unrolled = k <= _UNROLLED

    def shifted(array: jax.Array, a: Any) -> jax.Array:
        """Returns what the tap `a` reads of the past and the sequence."""
        if unrolled:
            return lax.slice_in_dim(array, a * distance, a * distance + length, axis=axis)
        return lax.dynamic_slice_in_dim(array, a * distance, length, axis=axis)

    def term(a: Any) -> jax.Array:
        read = shifted(past, a)
        if segment_ids is not None:
            ids = lax.pad(segment_ids, jnp.zeros((), segment_ids.dtype), pads)
            same = jnp.equal(shifted(ids, a), segment_ids)
            read = jnp.where(same[..., None], read, jnp.zeros((), x.dtype))
        return read.astype(wide) * weights[a]

    if unrolled:
        y = functools.reduce(lax.add, map(term, range(k)))
    else:
        y = lax.fori_loop(1, k, lambda a, y: y + term(a), term(0))
    return y.astype(x.dtype)
