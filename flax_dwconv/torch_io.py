"""Depthwise kernels of PyTorch, Equinox, Flax and Haiku, in and out: one transposition, no imports.

Filter `m` of channel `c` makes the output channel `c*M + m` in all of them; only the axes differ:

    here and in Keras                      (kh, kw, c, m)      "kernel", "bias" (c*m,)
    PyTorch, Conv2d(groups=c)              (c*m, 1, kh, kw)    "weight", "bias" (c*m,)
    Equinox, Conv2d(groups=c)              (c*m, 1, kh, kw)    weight, bias (c*m, 1, 1)
    Flax, Conv(feature_group_count=c)      (kh, kw, 1, c*m)    "kernel", "bias" (c*m,)
    Haiku, DepthwiseConv2D and Conv2D      (kh, kw, 1, c*m)    "w", "b" (c*m,)

None of the foreign kernels says what `m` is, so that it is an argument. The settings of a layer are
not in its weights either. PyTorch pads both sides alike: `padding=1` there is `padding=1` here, and
never "same", which at stride 2 may pad the end only; and its data format is "channels_first".
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from flax_dwconv import _geometry


def from_torch(state_dict_or_weight: Any, *, depth_multiplier: int = 1) -> dict[str, jax.Array]:
    """Returns the parameters for the weights of a depthwise `torch.nn.Conv2d`, or Equinox's.

    Args:
      state_dict_or_weight: the weight, `(c*m, 1, kh, kw)`, or the `state_dict` of one convolution,
        with "weight" and perhaps "bias" after any common prefix; of tensors or arrays.
      depth_multiplier: `m`, which is `out_channels // in_channels`.

    Returns:
      `{"kernel": (kh, kw, c, m), "bias": (c*m,)}`, the bias only if there is one.

    Raises:
      TypeError: if a weight is not an array.
      ValueError: if there is no weight or more than one, another entry, or a shape that does not
        fit.

    Example:
      A whole layer, `torch.nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4)`, with weights w, b:

      >>> import numpy as np
      >>> import flax_dwconv
      >>> from flax_dwconv import torch_io
      >>> w, b = np.ones((8, 1, 3, 3), np.float32), np.zeros(8, np.float32)
      >>> params = torch_io.from_torch({"conv.weight": w, "conv.bias": b}, depth_multiplier=2)
      >>> params["kernel"].shape
      (3, 3, 4, 2)
      >>> layer = flax_dwconv.DepthwiseConv2D(
      ...     3, strides=2, padding=1, depth_multiplier=2, data_format="channels_first")
      >>> layer.apply({"params": params}, np.ones((1, 4, 8, 8), np.float32)).shape
      (1, 8, 4, 4)
    """
    weight, bias = _entries(
        state_dict_or_weight, "state_dict_or_weight", ("weight", "bias"), depth_multiplier
    )
    if weight.ndim != 4 or weight.shape[1] != 1:
        raise ValueError(f"`weight` must have shape (c*m, 1, kh, kw), got {weight.shape}.")
    return _params(weight.transpose(2, 3, 1, 0), bias, depth_multiplier)


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters as the weights of a depthwise `torch.nn.Conv2d`, `groups=c`.

    Args:
      params: `{"kernel": (kh, kw, c, m), "bias": (c*m,)}`, the bias optional.

    Returns:
      `{"weight": (c*m, 1, kh, kw), "bias": (c*m,)}` of writable numpy arrays, for
      `torch.from_numpy`. For Equinox, reshape the bias to `(c*m, 1, 1)`.

    Raises:
      TypeError: if a parameter is not an array.
      ValueError: if there is no kernel, another entry, or a shape that does not fit.

    Example:
      >>> import numpy as np
      >>> from flax_dwconv import torch_io
      >>> torch_io.to_torch({"kernel": np.ones((3, 5, 4, 2))})["weight"].shape
      (8, 1, 3, 5)
    """
    kernel, bias = _hwio(params)
    return _named({"weight": kernel.transpose(3, 2, 0, 1), "bias": bias})


def from_flax(params_or_kernel: Any, *, depth_multiplier: int = 1) -> dict[str, jax.Array]:
    """Returns the parameters for those of a depthwise `Conv` of linen or nnx, or Haiku's.

    Args:
      params_or_kernel: the kernel, `(kh, kw, 1, c*m)`, or a dict with "kernel" (Haiku: "w") and
        perhaps "bias" ("b"). Of nnx, take `nnx.to_pure_dict(nnx.state(conv, nnx.Param))`.
      depth_multiplier: `m`, which is `features // feature_group_count`.

    Returns:
      `{"kernel": (kh, kw, c, m), "bias": (c*m,)}`, the bias only if there is one.

    Raises:
      TypeError: if a parameter is not an array.
      ValueError: if there is no kernel or more than one, another entry, or a shape that does not
        fit.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> from flax_dwconv import torch_io
      >>> x = jnp.ones((1, 8, 8, 4))
      >>> conv = nn.Conv(8, (3, 3), padding="SAME", feature_group_count=4)
      >>> variables = conv.init(jax.random.key(0), x)
      >>> params = torch_io.from_flax(variables["params"], depth_multiplier=2)
      >>> layer = flax_dwconv.DepthwiseConv2D(3, padding="same", depth_multiplier=2)
      >>> bool(jnp.allclose(layer.apply({"params": params}, x), conv.apply(variables, x)))
      True
    """
    kernel, bias = _entries(
        params_or_kernel, "params_or_kernel", ("kernel", "bias", "w", "b"), depth_multiplier
    )
    if kernel.ndim != 4 or kernel.shape[2] != 1:
        raise ValueError(f"`kernel` must have shape (kh, kw, 1, c*m), got {kernel.shape}.")
    return _params(kernel, bias, depth_multiplier)


def to_flax(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters as those of a depthwise `Conv` of linen or nnx.

    Args:
      params: `{"kernel": (kh, kw, c, m), "bias": (c*m,)}`, the bias optional.

    Returns:
      `{"kernel": (kh, kw, 1, c*m), "bias": (c*m,)}` of numpy arrays. Haiku calls them "w" and "b".

    Raises:
      TypeError: if a parameter is not an array.
      ValueError: if there is no kernel, another entry, or a shape that does not fit.

    Example:
      >>> import numpy as np
      >>> from flax_dwconv import torch_io
      >>> torch_io.to_flax({"kernel": np.ones((3, 5, 4, 2))})["kernel"].shape
      (3, 5, 1, 8)
    """
    kernel, bias = _hwio(params)
    return _named({"kernel": kernel, "bias": bias})


def _entries(
    source: Any, argument: str, names: tuple[str, ...], depth_multiplier: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns kernel and bias, given the kernel or a dict of them under `names` after a prefix."""
    _geometry.positive_int(depth_multiplier, "depth_multiplier")
    if not isinstance(source, Mapping):
        return _array(source, argument), None
    found = {str(key).rpartition(".")[2]: key for key in source}
    prefixes = {str(key).rpartition(".")[0] for key in source}
    kernels = [name for name in names[::2] if name in found]
    if len(kernels) != 1 or len(prefixes) != 1 or not set(found) <= set(names):
        raise ValueError(
            f"`{argument}` must hold one layer's {names[0]!r}, and {names[1]!r} if it has one, "
            f"got the keys {sorted(map(str, source))[:8]}."
        )
    name, bias = kernels[0], names[names.index(kernels[0]) + 1]
    if source.get(found.get(bias)) is None:
        return _array(source[found[name]], name), None
    return _array(source[found[name]], name), _array(source[found[bias]], bias)


def _array(value: Any, name: str) -> np.ndarray:
    """Returns an array, or a tensor on any device, as numpy's."""
    if hasattr(value, "detach"):  # PyTorch
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which numpy does not know
            return value.float().numpy().astype(jnp.bfloat16)
    value = np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be an array of a floating dtype, got {value.dtype}.")
    return value


def _params(
    kernel: np.ndarray, bias: np.ndarray | None, depth_multiplier: int
) -> dict[str, jax.Array]:
    """Returns our parameters for a kernel (kh, kw, 1, c*m)."""
    kh, kw, _, features = kernel.shape
    if features % depth_multiplier:
        raise ValueError(
            f"`depth_multiplier` must divide {features} output channels, got {depth_multiplier}."
        )
    # A view of a tensor's memory would change with it.
    params = {"kernel": jnp.array(kernel.reshape(kh, kw, -1, depth_multiplier), copy=True)}
    if bias is not None:
        params["bias"] = jnp.array(_bias(bias, features), copy=True)
    return params


def _hwio(params: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns our parameters as a kernel (kh, kw, 1, c*m) and a bias, checked."""
    if not isinstance(params, Mapping):
        raise TypeError(f"`params` must be a dict, got {type(params).__name__}.")
    kernel, bias = _entries(meta.unbox(params), "params", ("kernel", "bias"), 1)
    if kernel.ndim != 4:
        raise ValueError(f"`kernel` must have shape (kh, kw, c, m), got {kernel.shape}.")
    kh, kw, c, m = kernel.shape
    return kernel.reshape(kh, kw, 1, c * m), None if bias is None else _bias(bias, c * m)


def _bias(bias: np.ndarray, features: int) -> np.ndarray:
    if bias.shape not in ((features,), (features, 1, 1)):
        raise ValueError(f"`bias` must have shape {(features,)}, got {bias.shape}.")
    return bias.reshape(-1)


def _named(arrays: dict[str, np.ndarray | None]) -> dict[str, np.ndarray]:
    return {k: np.array(a, order="C", copy=True) for k, a in arrays.items() if a is not None}
