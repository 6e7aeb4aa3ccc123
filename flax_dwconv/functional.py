"""The depthwise convolution as a pure function: `jax.lax.conv_general_dilated`, nothing else."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from flax_dwconv import _geometry, _lowering

Method = _lowering.Method


def check_method(method: Any) -> Method:
    """Returns `method` if it is "auto", "lax" or "taps", else raises a ValueError."""
    if method not in ("auto", "lax", "taps"):
        raise ValueError(f"`method` must be 'auto', 'lax' or 'taps', got {method!r}.")
    return method


def depthwise_conv2d(
    x: ArrayLike,
    kernel: ArrayLike,
    *,
    strides: int | tuple[int, int] = 1,
    padding: str | int | tuple[tuple[int, int], tuple[int, int]] = "valid",
    dilation_rate: int | tuple[int, int] = 1,
    data_format: str = "channels_last",
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    method: Method = "auto",
) -> jax.Array:
    """Convolves every channel with its own `m` filters.

    With strides `s`, dilation rates `d` and pads `p` before the first row and column,

        y[n, i, j, c*M + m] = sum_{a,b} x[n, i*s0 + a*d0 - p0, j*s1 + b*d1 - p1, c] * kernel[a, b,
        c, m]

    where `x` is 0 outside its bounds: a cross-correlation, as everywhere in deep learning. It is
    one `jax.lax.conv_general_dilated` with `feature_group_count = c`, so that every JAX
    transformation works by JAX's own rules: `jit`, `vmap`, forward and reverse mode to any order,
    `jax.export`, sharding.

    Args:
      x: images, `(*batch, h, w, c)`, or `(*batch, c, h, w)` with `data_format="channels_first"`;
        any number of batch axes, none included. Floating, complex or integer.
      kernel: filters, `(kh, kw, c, m)` in both data formats, of the dtype of `x`.
      strides: step of the window, one int > 0 or one for each of height and width.
      padding: "valid" (none), "same" (TensorFlow's rule: `ceil(h / stride)` rows out, an odd total
        pads one more at the end), an int >= 0 for every side, or `((top, bottom), (left, right))`,
        where a negative pad crops. Strings in any case.
      dilation_rate: distance of neighbouring kernel taps, one int > 0 or two.
      data_format: "channels_last" or "channels_first".
      precision: `jax.lax.Precision`, its name, or a pair of them, for GPU and TPU.
      preferred_element_type: dtype of the accumulation and the result; None is the dtype of `x`.
      method: "auto" lets the CPU lowering of this package (see `accelerate`) compile the
        convolution; "lax" leaves it to XLA on every platform; "taps" compiles it as a sum over
        taps on every platform.

    Returns:
      `(*batch, ho, wo, c*m)` or `(*batch, c*m, ho, wo)`; filter `m` of channel `c` is at `c*M + m`.

    Raises:
      TypeError: if `x` or `kernel` is not an array, or their dtypes differ.
      ValueError: if another argument has no meaning, the channels of `x` and `kernel` differ, or
        the kernel does not fit into the input.

    Example:
      A 3x3 box blur and its negative, for each of two channels:

      >>> import jax.numpy as jnp
      >>> import flax_dwconv
      >>> blur = jnp.full((3, 3, 2, 1), 1 / 9)
      >>> y = flax_dwconv.depthwise_conv2d(
      ...     jnp.ones((8, 32, 32, 2)), jnp.concatenate([blur, -blur], axis=-1), strides=2)
      >>> y.shape, y[0, 0, 0]
      ((8, 15, 15, 4), Array([ 1., -1.,  1., -1.], dtype=float32))

    Source: tf.keras's `DepthwiseConv2D`; strides together with dilation, which it refuses, are
    computed by the formula above.
    """
    x, kernel = _array(x, "x"), _array(kernel, "kernel")
    check_method(method)
    if kernel.ndim != 4:
        raise ValueError(f"`kernel` must have shape (kh, kw, c, m), got {kernel.shape}.")
    kh, kw, c, m = kernel.shape
    window = _geometry.window((kh, kw), strides, padding, dilation_rate, data_format)
    if x.ndim < 3:
        axes = "h, w, c" if window.data_format == "channels_last" else "c, h, w"
        raise ValueError(f"`x` must have shape (*batch, {axes}), got {x.shape}.")
    if x.shape[window.channel_axis] != c:
        raise ValueError(
            f"`x` and `kernel` must have the same number of channels, got {x.shape} with the "
            f"channels on axis {window.channel_axis} and a `kernel` of shape {kernel.shape}."
        )
    if x.dtype != kernel.dtype:
        raise TypeError(
            "`x` and `kernel` must have the same dtype, got "
            f"{x.dtype.name} and {kernel.dtype.name}."
        )
    window.output_shape(x.shape, c * m)  # raises where the kernel does not fit

    batch = x.shape[:-3]
    x = x.reshape(math.prod(batch), *x.shape[-3:])
    padding = window.padding.upper() if isinstance(window.padding, str) else window.padding
    if not isinstance(padding, str) and min(map(min, padding)) < 0:
        # JAX's kernel gradient is wrong for some: 6 rows, a kernel of 3 and the pads (-2, 1).
        sizes = [(0, 0, 0)] * 4
        for axis, pads in zip(window.spatial_axes, padding, strict=True):
            sizes[axis] = (*pads, 0)
        x, padding = lax.pad(x, jnp.zeros((), x.dtype), sizes), "VALID"
    with _lowering.method_scope(method):
        y = lax.conv_general_dilated(
            x,
            kernel.reshape(kh, kw, 1, c * m),
            window_strides=window.strides,
            padding=padding,
            rhs_dilation=window.dilation_rate,
            dimension_numbers=_geometry.DIMENSION_NUMBERS[window.data_format],
            feature_group_count=c,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
    return y.reshape(*batch, *y.shape[-3:])


def _array(value: Any, name: str) -> jax.Array:
    if not hasattr(value, "ndim") or not hasattr(value, "dtype"):
        raise TypeError(f"`{name}` must be an array, got {type(value).__name__}.")
    return jnp.asarray(value)
