"""Weights of PyTorch, Equinox, Flax and Haiku, in and out; batch normalizations folded in.

`from_torch` and `to_torch` are for PyTorch and Equinox, `from_flax` and `to_flax` for
`flax.linen.Conv` and `nnx.Conv`; `from_flax` reads Haiku's too. `fold_batch_norm` puts a batch
normalization into the layer before it, for inference. `keras_io` is for Keras.

Filter `m` of channel `c` makes the output channel `c*M + m` in all of them; only the axes differ.
`*window` is the kernel's one, two or three dimensions, `kh, kw` for images:

    here and in Keras                      (*window, c, m)      "kernel", "bias" (c*m,)
    PyTorch, Conv1d to Conv3d(groups=c)    (c*m, 1, *window)    "weight", "bias" (c*m,)
    Equinox, Conv1d to Conv3d(groups=c)    (c*m, 1, *window)    weight, bias (c*m, 1, ...)
    Flax, Conv(feature_group_count=c)      (*window, 1, c*m)    "kernel", "bias" (c*m,)
    Haiku, DepthwiseConv1D to 3D           (*window, 1, c*m)    "w", "b" (c*m,)

None of the foreign kernels says what `m` is, so that it is an argument. The settings of a layer are
not in its weights either. PyTorch pads both sides alike: `padding=1` there is `padding=1` here, and
never "same", which at stride 2 may pad the end only; and its data format is "channels_first".

Example:
  >>> import numpy as np
  >>> from flax_dwconv import weights
  >>> state_dict = {"weight": np.ones((16, 1, 3, 3)), "bias": np.zeros(16)}  # of a Conv2d
  >>> params = weights.from_torch(state_dict)
  >>> params["kernel"].shape, params["bias"].shape
  ((3, 3, 16, 1), (16,))
"""

import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.typing import ArrayLike

from flax_dwconv import _geometry, _state_dict

# PyTorch.


def from_torch(
    state_dict: Mapping[str, Any] | ArrayLike | str | os.PathLike[str],
    *,
    depth_multiplier: int = 1,
    prefix: str | None = None,
) -> dict[str, jax.Array]:
    """Returns the parameters for a depthwise `Conv1d`, `Conv2d` or `Conv3d` of PyTorch or Equinox.

    A weight-normalized layer is read as the layer that it computes: `weight_g * weight_v` over the
    norm of `weight_v`, in either of PyTorch's spellings.

    The weight of a depthwise `ConvTranspose2d` with `m = 1` has the shape of a convolution's, and
    nothing tells them apart. That layer is the transpose of the convolution with the same weight,
    so convert the weight here and transpose the convolution by `jax.linear_transpose`: the second
    example.

    Args:
      state_dict: the `state_dict` of one convolution, with "weight" and perhaps "bias" after any
        common prefix; or that of a whole model, with `prefix`; of tensors or arrays. Or the path of
        a `.safetensors` file of either, of which one layer is read (extra `safetensors`). Or the
        weight alone, `(c*m, 1, *window)`.
      depth_multiplier: `m`, which is `out_channels // in_channels`.
      prefix: the name of a layer in a whole model, for instance "blocks.0.0.conv_dw" for the
        entries "blocks.0.0.conv_dw.weight" and "blocks.0.0.conv_dw.bias".

    Returns:
      `{"kernel": (*window, c, m), "bias": (c*m,)}`, the bias only if there is one.

    Raises:
      TypeError: if a weight is not an array, if a path does not end in `.safetensors`, if `prefix`
        is not a string, or if it comes with a weight alone.
      ValueError: if the weight is missing or there are several, if no layer has the name `prefix`,
        if there is another entry (of a spectral norm, for instance), if a shape does not fit, or if
        the file is damaged. Where it helps, the error lists the depthwise layers.
      OSError: if there is no such file.
      ImportError: if the path is given and safetensors is not installed.

    Example:
      A whole layer, `torch.nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)`, in a model:

      >>> import numpy as np
      >>> import flax_dwconv
      >>> from flax_dwconv import weights
      >>> w, b = np.ones((8, 1, 3, 3), np.float32), np.zeros(8, np.float32)
      >>> state_dict = {"conv.weight": w, "conv.bias": b, "head.weight": np.ones((5, 8))}
      >>> params = weights.from_torch(state_dict, prefix="conv", depth_multiplier=2)
      >>> params["kernel"].shape
      (3, 3, 4, 2)
      >>> layer = flax_dwconv.DepthwiseConv2D(
      ...     3, strides=2, padding=1, depth_multiplier=2, data_format="channels_first")
      >>> layer.apply({"params": params}, np.ones((1, 4, 8, 8), np.float32)).shape
      (1, 8, 4, 4)

      `torch.nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=4,
      bias=False)`, whose result has `(h - 1) * stride - 2 * padding + kernel + output_padding` rows
      for `h` rows:

      >>> import jax
      >>> kernel = weights.from_torch(np.ones((4, 1, 3, 3), np.float32))["kernel"]
      >>> def conv(y):
      ...     return flax_dwconv.depthwise_conv2d(y, kernel, strides=2, padding=1)
      >>> x = np.ones((1, 8, 8, 4), np.float32)
      >>> result = jax.ShapeDtypeStruct((1, 16, 16, 4), np.float32)  # (8 - 1) * 2 - 2 + 3 + 1
      >>> (y,) = jax.linear_transpose(conv, result)(x)
      >>> y.shape, float(y[0, 1, 1, 0])
      ((1, 16, 16, 4), 4.0)
    """
    _geometry.positive_int(depth_multiplier, "depth_multiplier")
    if prefix is not None and not isinstance(prefix, str):
        raise TypeError(f"`prefix` must be a string or None, got {prefix!r}.")
    if isinstance(state_dict, str | os.PathLike):
        with _state_dict.opened(state_dict) as tensors:
            return from_torch(tensors, depth_multiplier=depth_multiplier, prefix=prefix)
    if isinstance(state_dict, Mapping):
        weight, bias = _state_dict.weight_and_bias(state_dict, prefix)
    elif prefix is None:
        weight, bias = _state_dict.array(state_dict, "state_dict"), None
    else:
        raise TypeError(f"`prefix` is for a state_dict, got a {type(state_dict).__name__}.")
    if weight.ndim not in (3, 4, 5) or weight.shape[1] != 1:
        raise ValueError(
            "`weight` must have shape (c*m, 1, k), (c*m, 1, kd, kh, kw) or (c*m, 1, kh, kw), got "
            f"{weight.shape}."
        )
    return _params(np.moveaxis(weight, (1, 0), (-2, -1)), bias, depth_multiplier)


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters as those of a depthwise `Conv1d`, `Conv2d` or `Conv3d` of PyTorch.

    Args:
      params: `{"kernel": (*window, c, m), "bias": (c*m,)}`, the bias optional.

    Returns:
      `{"weight": (c*m, 1, *window), "bias": (c*m,)}` of writable and contiguous numpy arrays, for
      `torch.from_numpy` or `safetensors.numpy.save_file`. For Equinox, reshape the bias to
      `(c*m, 1, ...)`, with an axis of size 1 for each dimension of the window.

    Raises:
      TypeError: if a parameter is not an array.
      ValueError: if the kernel is missing, if there is an entry besides kernel and bias, or if a
        shape does not fit.

    Example:
      >>> import numpy as np
      >>> from flax_dwconv import weights
      >>> weights.to_torch({"kernel": np.ones((3, 5, 4, 2))})["weight"].shape
      (8, 1, 3, 5)
    """
    kernel, bias = _flat(params)
    return _named({"weight": np.moveaxis(kernel, (-1, -2), (0, 1)), "bias": bias})


# Flax and Haiku.


def from_flax(params_or_kernel: Any, *, depth_multiplier: int = 1) -> dict[str, jax.Array]:
    """Returns the parameters for those of a depthwise `Conv` of linen or nnx, or Haiku's.

    Args:
      params_or_kernel: the kernel, `(*window, 1, c*m)`, or a dict with "kernel" (Haiku: "w") and
        perhaps "bias" ("b"). Of nnx, take `nnx.state(conv, nnx.Param)`.
      depth_multiplier: `m`, which is `features // feature_group_count`.

    Returns:
      `{"kernel": (*window, c, m), "bias": (c*m,)}`, the bias only if there is one.

    Raises:
      TypeError: if a parameter is not an array.
      ValueError: if the kernel is missing or there are several, if there is an entry besides kernel
        and bias, or if a shape does not fit.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> from flax_dwconv import weights
      >>> x = jnp.ones((1, 8, 8, 4))
      >>> conv = nn.Conv(8, (3, 3), padding="SAME", feature_group_count=4)
      >>> variables = conv.init(jax.random.key(0), x)
      >>> params = weights.from_flax(variables["params"], depth_multiplier=2)
      >>> layer = flax_dwconv.DepthwiseConv2D(3, padding="same", depth_multiplier=2)
      >>> bool(jnp.allclose(layer.apply({"params": params}, x), conv.apply(variables, x)))
      True
    """
    _geometry.positive_int(depth_multiplier, "depth_multiplier")
    names = (("kernel", "bias"), ("w", "b"))
    kernel, bias = _kernel_and_bias(params_or_kernel, "params_or_kernel", names)
    if kernel.ndim not in (3, 4, 5) or kernel.shape[-2] != 1:
        raise ValueError(
            "`kernel` must have shape (k, 1, c*m), (kd, kh, kw, 1, c*m) or (kh, kw, 1, c*m), got "
            f"{kernel.shape}."
        )
    return _params(kernel, bias, depth_multiplier)


def to_flax(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters as those of a depthwise `Conv` of linen or nnx.

    Args:
      params: `{"kernel": (*window, c, m), "bias": (c*m,)}`, the bias optional.

    Returns:
      `{"kernel": (*window, 1, c*m), "bias": (c*m,)}` of writable and contiguous numpy arrays. Haiku
      calls them "w" and "b".

    Raises:
      TypeError: if a parameter is not an array.
      ValueError: if the kernel is missing, if there is an entry besides kernel and bias, or if a
        shape does not fit.

    Example:
      >>> import numpy as np
      >>> from flax_dwconv import weights
      >>> weights.to_flax({"kernel": np.ones((3, 5, 4, 2))})["kernel"].shape
      (3, 5, 1, 8)
    """
    kernel, bias = _flat(params)
    return _named({"kernel": kernel, "bias": bias})


# Batch normalization.

# Our name of each array, and its names in Flax, Keras and PyTorch. PyTorch's bias has Flax's name.
_STATISTICS = {
    "mean": ("mean", "moving_mean", "running_mean"),
    "var": ("var", "moving_variance", "running_var"),
    "scale": ("scale", "gamma", "weight"),
    "bias": ("bias", "beta"),
}


def fold_batch_norm(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any], epsilon: float
) -> dict[str, jax.Array]:
    """Returns the parameters of a layer that includes the batch normalization after it.

    The normalization is that of inference, with its running mean and variance. With

        s = scale / sqrt(var + epsilon),

    the layer with the kernel `kernel * s` and the bias `shift + (bias - mean) * s` gives what layer
    and normalization gave. Here `bias` is the layer's, and `shift` is the normalization's, which
    Flax calls "bias" too. Of a separable layer, `s` goes into the pointwise kernel. Kernel and bias
    are computed in float64 and rounded once.

    The layer must have no activation of its own before the normalization; what comes after the
    normalization may become the folded layer's activation. The folded layer has a bias: in linen,
    `layer.clone(use_bias=True, activation="relu6")`.

    Args:
      params: of the layer, `{"kernel": (*window, c, m), "bias": (c*m,)}`, or of a separable one
        `{"depthwise_kernel": ..., "pointwise_kernel": (..., c*m, filters), "bias": (filters,)}`;
        the bias optional.
      batch_stats: the arrays of the normalization, one number for each channel: "mean", "var" and
        perhaps "scale", "bias". In linen that is `{**params["bn"], **batch_stats["bn"]}`, in nnx
        `nnx.state(bn)`. The names of Keras ("moving_mean", "moving_variance", "gamma", "beta") and
        PyTorch ("running_mean", "running_var", "weight", "bias") will do.
      epsilon: that of the normalization. Flax and PyTorch have 1e-5 by default, Keras 1e-3.

    Returns:
      The parameters of the folded layer, with a bias, in the kernel's dtype.

    Raises:
      TypeError: if a value is not an array, or `epsilon` not a number.
      ValueError: if the kernel, the mean or the variance is missing, if there is an unknown entry,
        if a shape does not fit, or if the sum of variance and `epsilon` is not positive.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> x = jnp.ones((1, 8, 8, 4))
      >>> model = nn.Sequential([
      ...     flax_dwconv.DepthwiseConv2D(3, use_bias=False),
      ...     nn.BatchNorm(use_running_average=True, epsilon=1e-3), nn.relu6])
      >>> variables = model.init(jax.random.key(0), x)
      >>> params, stats = variables["params"], variables["batch_stats"]
      >>> folded = flax_dwconv.fold_batch_norm(
      ...     params["layers_0"], {**params["layers_1"], **stats["layers_1"]}, epsilon=1e-3)
      >>> layer = flax_dwconv.DepthwiseConv2D(3, activation="relu6")
      >>> y = layer.apply({"params": folded}, x)
      >>> bool(jnp.allclose(y, model.apply(variables, x), atol=1e-6))
      True
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"`params` must be a dict, got {type(params).__name__}.")
    params = meta.unbox(params)
    separable = "depthwise_kernel" in params
    name = "pointwise_kernel" if separable else "kernel"
    folds = {key: value for key, value in params.items() if key != "depthwise_kernel"}
    kernel, bias = _kernel_and_bias(folds, "params", ((name, "bias"),))
    if kernel.ndim not in (3, 4, 5):
        shape = "(..., c*m, filters)" if separable else "(*window, c, m)"
        raise ValueError(f"`{name}` must have shape {shape}, got {kernel.shape}.")
    others = {}
    if separable:
        depthwise = _state_dict.array(params["depthwise_kernel"], "depthwise_kernel")
        if depthwise.ndim != kernel.ndim or math.prod(depthwise.shape[-2:]) != kernel.shape[-2]:
            raise ValueError(
                f"`depthwise_kernel` must have shape (*window, c, m) where c*m is "
                f"{kernel.shape[-2]}, got {depthwise.shape}."
            )
        others = {"depthwise_kernel": depthwise}
    # Of the axes of a pointwise kernel, the last one is that of the results.
    per_result = kernel.shape[-1:] if separable else kernel.shape[-2:]
    features = math.prod(per_result)
    bias = np.zeros(features) if bias is None else _bias(bias, features).astype(np.float64)
    mean, var, scale, shift = _statistics(batch_stats, features)
    if isinstance(epsilon, bool) or not isinstance(epsilon, numbers.Real):
        raise TypeError(f"`epsilon` must be a number, got {epsilon!r}.")
    var = var + float(epsilon)
    if not (var > 0).all():
        raise ValueError(
            f"`epsilon` must make every variance positive, got {epsilon!r} and a sum of "
            f"{var.min()}."
        )
    s = scale / np.sqrt(var)
    folded = others | {
        name: kernel.astype(np.float64) * s.reshape(per_result),
        "bias": shift + (bias - mean) * s,
    }
    return {key: jnp.array(folded[key].astype(kernel.dtype), copy=True) for key in folded}


def _statistics(batch_stats: Mapping[str, Any], features: int) -> list[np.ndarray]:
    """Returns mean, variance, scale and bias in float64."""
    if not isinstance(batch_stats, Mapping):
        raise TypeError(f"`batch_stats` must be a dict, got {type(batch_stats).__name__}.")
    given = {k: v for k, v in meta.unbox(batch_stats).items() if k != "num_batches_tracked"}
    found = {
        name: [key for key in names if given.get(key) is not None]
        for name, names in _STATISTICS.items()
    }
    unknown = set(given) - {key for names in _STATISTICS.values() for key in names}
    if unknown or not found["mean"] or not found["var"] or max(map(len, found.values())) > 1:
        raise ValueError(
            "`batch_stats` must hold 'mean', 'var' and perhaps 'scale' and 'bias', or Keras's or "
            f"PyTorch's names for them, got the keys {sorted(map(str, given))[:8]}."
        )
    neutral = {"scale": np.ones(features), "bias": np.zeros(features)}
    arrays = []
    for name, keys in found.items():
        value = _state_dict.array(given[keys[0]], keys[0]) if keys else neutral[name]
        if value.shape != (features,):
            raise ValueError(
                f"`{keys[0]}` must have shape {(features,)}, one number for each channel of the "
                f"layer's result, got {value.shape}."
            )
        arrays.append(value.astype(np.float64))
    return arrays


# What all of them share.


def _kernel_and_bias(
    source: Any, argument: str, spellings: tuple[tuple[str, str], ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns kernel and bias, given the kernel or a dict of them, in one of the spellings."""
    if not isinstance(source, Mapping):
        return _state_dict.array(source, argument), None
    found = {str(key).rpartition(".")[2]: value for key, value in meta.unbox(source).items()}
    prefixes = {str(key).rpartition(".")[0] for key in source}
    for kernel, bias in spellings:
        if kernel in found and set(found) <= {kernel, bias} and len(prefixes) == 1:
            value = found.get(bias)
            array = _state_dict.array(found[kernel], kernel)
            return array, None if value is None else _state_dict.array(value, bias)
    name, bias = spellings[0]
    raise ValueError(
        f"`{argument}` must hold one layer's {name!r}, and {bias!r} if it has one, got the keys "
        f"{sorted(map(str, source))[:8]}."
    )


def _params(
    kernel: np.ndarray, bias: np.ndarray | None, depth_multiplier: int
) -> dict[str, jax.Array]:
    """Returns our parameters for a kernel (*window, 1, c*m)."""
    features = kernel.shape[-1]
    if features % depth_multiplier:
        raise ValueError(
            f"`depth_multiplier` must divide {features} output channels, got {depth_multiplier}."
        )
    shape = (*kernel.shape[:-2], features // depth_multiplier, depth_multiplier)
    # A view of a tensor's memory would change with it.
    params = {"kernel": jnp.array(kernel.reshape(shape), copy=True)}
    if bias is not None:
        params["bias"] = jnp.array(_bias(bias, features), copy=True)
    return params


def _flat(params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns our parameters as a kernel (*window, 1, c*m) and a bias, checked."""
    if not isinstance(params, Mapping):
        raise TypeError(f"`params` must be a dict, got {type(params).__name__}.")
    kernel, bias = _kernel_and_bias(params, "params", (("kernel", "bias"),))
    if kernel.ndim not in (3, 4, 5):
        raise ValueError(
            "`kernel` must have shape (k, c, m), (kd, kh, kw, c, m) or (kh, kw, c, m), got "
            f"{kernel.shape}."
        )
    *window, c, m = kernel.shape
    return kernel.reshape(*window, 1, c * m), None if bias is None else _bias(bias, c * m)


def _bias(bias: np.ndarray, features: int) -> np.ndarray:
    """Returns a bias, which Equinox keeps with axes of size 1, as (features,)."""
    if bias.shape not in [(features, *[1] * rank) for rank in range(4)]:
        raise ValueError(f"`bias` must have shape {(features,)}, got {bias.shape}.")
    return bias.reshape(-1)


def _named(arrays: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    """Returns the arrays that are there as contiguous copies.

    safetensors and others write the memory of an array, not its values: of a transposed view they
    would store the values in the wrong order.
    """
    return {k: np.array(a, order="C", copy=True) for k, a in arrays.items() if a is not None}
