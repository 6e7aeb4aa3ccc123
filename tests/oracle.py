"""Depthwise convolution of any rank as numpy computes its definition, in float64.

    y[n, o, c*M + m] = sum_a x[n, o*s + a*d - p, c] * kernel[a, c, m]

with one `o`, `a`, `s`, `d` and `p` for each spatial dimension, and x = 0 outside its bounds. One
term is computed for each `a`, a tap of the kernel, for all outputs for which it reads inside the
image. Both gradients are the same sum, each product handed to another of its three factors.

Equal calls are computed once, and their results, which are shared, cannot be written to.
"""

import functools
import hashlib
import math

import numpy as np


def each(value, rank):
    """One value for each spatial dimension."""
    return (value,) * rank if np.ndim(value) == 0 else tuple(value)


def size_and_pad(n, k, stride, dilation, padding):
    """Output size and pad before the first element of one axis, by TensorFlow's rule."""
    effective = (k - 1) * dilation + 1
    if padding == "same":
        out = math.ceil(n / stride)
        total = max((out - 1) * stride + effective - n, 0)
        return out, total // 2  # an odd total pads one more at the end
    named = {"valid": (0, 0), "causal": (effective - 1, 0)}
    before, after = named[padding] if isinstance(padding, str) else each(padding, 2)
    return (n + before + after - effective) // stride + 1, before


def geometry(sizes, window, strides, padding, dilation_rate):
    """Output sizes, and the list of (tap, slices of the outputs, slices of the image).

    These are the outputs for which the tap reads inside the image, and what it reads.
    """
    rank = len(window)
    padding = (padding.lower(),) * rank if isinstance(padding, str) else each(padding, rank)
    strides, dilations = each(strides, rank), each(dilation_rate, rank)
    axes = list(zip(sizes, window, strides, dilations, padding, strict=True))
    outs, pads = zip(*(size_and_pad(*axis) for axis in axes), strict=True)
    products = []
    for tap in np.ndindex(*window):
        written, read = [], []
        for (n, _, stride, dilation, _), out, pad, a in zip(axes, outs, pads, tap, strict=True):
            at = {o: t for o in range(out) if 0 <= (t := o * stride + a * dilation - pad) < n}
            first, count = (min(at), len(at)) if at else (0, 0)
            t = at.get(first, 0)
            written.append(slice(first, first + count))
            read.append(slice(t, t + count * stride, stride))
        products.append((tap, written, read))
    return outs, products


def wide(array):
    """float64, or complex128; integers too, which are exact in it."""
    array = np.asarray(array)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def to_last(array, data_format, rank=2):
    return np.moveaxis(array, -1 - rank, -1) if data_format == "channels_first" else array


def from_last(array, data_format, rank=2):
    return np.moveaxis(array, -1, -1 - rank) if data_format == "channels_first" else array


def computed_once(f):
    """Keeps the last results of a function of arrays and options, unless they are large."""
    results = {}

    def key(value):
        if isinstance(value, (list, tuple)):
            return tuple(map(key, value))
        if not hasattr(value, "__array__"):
            return value
        array = np.asarray(value)
        return array.shape, str(array.dtype), hashlib.sha1(array.tobytes()).digest()

    @functools.wraps(f)
    def cached(*args, **kwargs):
        if any(np.size(value) > 1 << 16 for value in args if hasattr(value, "__array__")):
            return f(*args, **kwargs)
        call = key(args), key(sorted(kwargs.items()))
        if call not in results:
            if len(results) == 64:
                del results[next(iter(results))]
            results[call] = f(*args, **kwargs)
            for array in results[call] if isinstance(results[call], tuple) else [results[call]]:
                array.flags.writeable = False
        return results[call]

    return cached


def output_shape(
    x, kernel, strides=1, padding="valid", dilation_rate=1, data_format="channels_last"
):
    """The shape of `forward` for these shapes; a size is below 1 where the kernel does not fit."""
    *window, c, m = kernel
    rank = len(window)
    first = data_format == "channels_first"
    sizes = x[-rank:] if first else x[-1 - rank : -1]
    outs, _ = geometry(sizes, window, strides, padding, dilation_rate)
    batch = x[: -1 - rank]
    return (*batch, c * m, *outs) if first else (*batch, *outs, c * m)


@computed_once
def forward(x, kernel, strides=1, padding="valid", dilation_rate=1, data_format="channels_last"):
    kernel = wide(kernel)
    *window, c, m = kernel.shape
    rank = len(window)
    x = to_last(wide(x), data_format, rank)
    outs, products = geometry(x.shape[-1 - rank : -1], window, strides, padding, dilation_rate)
    y = np.zeros((*x.shape[: -1 - rank], *outs, c, m), np.result_type(x, kernel))
    for tap, written, read in products:
        y[(..., *written, slice(None), slice(None))] += (
            x[(..., *read, slice(None), None)] * kernel[tap]
        )
    return from_last(y.reshape(*y.shape[:-2], c * m), data_format, rank)


@computed_once
def vjp(x, kernel, g, strides=1, padding="valid", dilation_rate=1, data_format="channels_last"):
    """Gradients of `sum(g * forward(x, kernel))` with respect to `x` and `kernel`."""
    kernel = wide(kernel)
    *window, c, m = kernel.shape
    rank = len(window)
    x = to_last(wide(x), data_format, rank)
    outs, products = geometry(x.shape[-1 - rank : -1], window, strides, padding, dilation_rate)
    g = to_last(wide(g), data_format, rank).reshape(*x.shape[: -1 - rank], *outs, c, m)
    dx, dk = np.zeros(x.shape, g.dtype), np.zeros(kernel.shape, g.dtype)
    for tap, written, read in products:
        part = g[(..., *written, slice(None), slice(None))]
        # No input position is read twice for the same tap.
        dx[(..., *read, slice(None))] += (part * kernel[tap]).sum(-1)
        dk[tap] = (x[(..., *read, slice(None), None)] * part).reshape(-1, c, m).sum(axis=0)
    return from_last(dx, data_format, rank), dk


def integers(seed, *shape, dtype=np.float32, limit=3):
    """Small integers: their sums are exact in every dtype and in every order of summation."""
    values = np.random.default_rng(seed).integers(-limit, limit, shape, endpoint=True)
    return values.astype(dtype)


def normals(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
