"""Depthwise convolution as numpy loops over its definition, in float64: slow, right by inspection.

    y[n, i, j, c*M + m] = sum_{a,b} x[n, i*s0 + a*d0 - p0, j*s1 + b*d1 - p1, c] * kernel[a, b, c, m]

with x = 0 outside its bounds. Both gradients are the same loop over the same (i, j, a, b), each
product handed to another of its three factors.
"""

import math

import numpy as np


def pair(value):
    return (value, value) if np.ndim(value) == 0 else tuple(value)


def size_and_pad(n, k, stride, dilation, padding):
    """Output size and pad before the first element of one axis, by TensorFlow's rule."""
    effective = (k - 1) * dilation + 1
    if padding == "same":
        out = math.ceil(n / stride)
        total = max((out - 1) * stride + effective - n, 0)
        return out, total // 2  # an odd total pads one more at the end
    before, after = (0, 0) if padding == "valid" else padding
    return (n + before + after - effective) // stride + 1, before


def geometry(shape, kernel_size, strides, padding, dilation_rate):
    """Output size, and the list of (output position, kernel position, input position)."""
    if isinstance(padding, str):
        padding = (padding.lower(),) * 2
    elif np.ndim(padding) == 0:
        padding = ((padding, padding),) * 2
    axes = list(zip(shape, kernel_size, pair(strides), pair(dilation_rate), padding, strict=True))
    (ho, p0), (wo, p1) = (size_and_pad(*axis) for axis in axes)
    (h, kh, s0, d0, _), (w, kw, s1, d1, _) = axes
    products = []
    for i, j in np.ndindex(ho, wo):
        for a, b in np.ndindex(kh, kw):
            row, column = i * s0 + a * d0 - p0, j * s1 + b * d1 - p1
            if 0 <= row < h and 0 <= column < w:
                products.append(((i, j), (a, b), (row, column)))
    return (ho, wo), products


def wide(array):
    """float64, or complex128; integers too, which are exact in it."""
    array = np.asarray(array)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def to_last(array, data_format):
    return np.moveaxis(array, -3, -1) if data_format == "channels_first" else array


def from_last(array, data_format):
    return np.moveaxis(array, -1, -3) if data_format == "channels_first" else array


def forward(x, kernel, strides=1, padding="valid", dilation_rate=1, data_format="channels_last"):
    x, kernel = to_last(wide(x), data_format), wide(kernel)
    kh, kw, c, m = kernel.shape
    size, products = geometry(x.shape[-3:-1], (kh, kw), strides, padding, dilation_rate)
    y = np.zeros((*x.shape[:-3], *size, c, m), np.result_type(x, kernel))
    for (i, j), (a, b), (row, column) in products:
        y[..., i, j, :, :] += x[..., row, column, :, None] * kernel[a, b]
    return from_last(y.reshape(*y.shape[:-2], c * m), data_format)


def vjp(x, kernel, g, strides=1, padding="valid", dilation_rate=1, data_format="channels_last"):
    """Gradients of `sum(g * forward(x, kernel))` with respect to `x` and `kernel`."""
    x, kernel = to_last(wide(x), data_format), wide(kernel)
    kh, kw, c, m = kernel.shape
    size, products = geometry(x.shape[-3:-1], (kh, kw), strides, padding, dilation_rate)
    g = to_last(wide(g), data_format).reshape(*x.shape[:-3], *size, c, m)
    dx, dk = np.zeros(x.shape, g.dtype), np.zeros(kernel.shape, g.dtype)
    for (i, j), (a, b), (row, column) in products:
        dx[..., row, column, :] += (g[..., i, j, :, :] * kernel[a, b]).sum(-1)
        dk[a, b] += (
            (x[..., row, column, :, None] * g[..., i, j, :, :]).reshape(-1, c, m).sum(axis=0)
        )
    return from_last(dx, data_format), dk


def integers(seed, *shape, dtype=np.float32, limit=3):
    """Small integers: their sums are exact in every dtype and in every order of summation."""
    values = np.random.default_rng(seed).integers(-limit, limit, shape, endpoint=True)
    return values.astype(dtype)


def normals(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
