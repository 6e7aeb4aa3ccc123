"""PyTorch's state_dicts and `.safetensors` files: one layer's weight and bias out of a whole model.

A state_dict is flat: the key "blocks.0.conv_dw.weight" is the entry "weight" of the layer
"blocks.0.conv_dw". A layer may hold what PyTorch computes its weight from instead of the weight:
`weight_g` and `weight_v` of a weight normalization, for instance.
"""

import contextlib
import difflib
import importlib
import os
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# How many layers an error lists: a MobileNet has 17 depthwise ones.
_LISTED = 20


class _Layer(NamedTuple):
    """One layer of a state_dict."""

    name: str
    entries: dict[str, Any]  # by the names within the layer
    keys: dict[str, str]  # the same, by the names in the state_dict


# The entries that hold a weight, whatever PyTorch computes from it: as it is, weight-normalized in
# the two spellings, pruned or spectral-normalized.
_WEIGHTS = (
    "weight",
    "weight_v",
    "parametrizations.weight.original1",
    "parametrizations.weight.original",
    "weight_orig",
)
_WEIGHT_NORMS = (
    ("weight_g", "weight_v"),
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
)
# How the names of entries begin from which no weight is computed here, and the call in PyTorch that
# makes the weight a plain one.
_REMEDIES = {
    "parametrizations.": "torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r})",
    "weight_u": "torch.nn.utils.remove_spectral_norm(layer)",
    "weight_mask": "torch.nn.utils.prune.remove(layer, 'weight')",
    "bias_mask": "torch.nn.utils.prune.remove(layer, 'bias')",
    "weight_g": "torch.nn.utils.remove_weight_norm(layer)",
}


def _layers(state_dict: Mapping[str, Any]) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    for key, value in state_dict.items():
        # PyTorch keeps the original of a parametrized weight two modules below its layer.
        above, mark, name = f".{key}".partition(".parametrizations.")
        if not mark:
            above, _, name = above.rpartition(".")
        layer = layers.setdefault(above[1:], _Layer(above[1:], {}, {}))
        layer.entries[mark[1:] + name] = value
        layer.keys[mark[1:] + name] = f"{key}"
    return layers


def _picked(state_dict: Mapping[str, Any], prefix: str | None) -> _Layer:
    """Returns the layer of that name, or the only one."""
    layers = _layers(state_dict)
    if prefix is not None:
        name = prefix.removesuffix(".")
        if name not in layers or not set(layers[name].entries) & set(_WEIGHTS):
            raise ValueError(
                f"`prefix` must be the name of a layer, got {prefix!r}. {_near(layers, name)}"
            )
        return layers[name]
    if len(layers) != 1:
        keys = list(map(str, state_dict))
        got = f"{len(keys)} keys" if len(keys) > 8 else f"the keys {sorted(keys)}"
        raise ValueError(
            "`state_dict` must hold one layer's 'weight', and 'bias' if it has one, or `prefix` "
            f"pick one, got {got}. {_listed(layers)}"
        )
    return next(iter(layers.values()))


def _candidates(layers: Mapping[str, _Layer]) -> dict[str, str]:
    """Returns the layers that may be depthwise: by name, key and shape of the weight."""
    found = {}
    for name, layer in layers.items():
        for entry in _WEIGHTS:
            shape = tuple(getattr(layer.entries.get(entry), "shape", ()))
            if len(shape) in (3, 4, 5) and shape[1] == 1:
                found.setdefault(name, f"{layer.keys[entry]} {shape}")
    return found


def _listed(layers: Mapping[str, _Layer]) -> str:
    """Returns what an error says about the depthwise layers of a model."""
    found = _candidates(layers)
    if not found:
        return "No weight among them is depthwise: (c*m, 1, k), (c*m, 1, kh, kw) or 3-D."
    first = next(iter(found))
    return f"Depthwise by shape (the first is prefix={first!r}): {_shown(list(found.values()))}."


def _near(layers: Mapping[str, _Layer], name: str) -> str:
    """Returns what an error says about a layer that is not there."""
    found = _candidates(layers)
    # The name may be that of a module that holds layers. It may lack the beginning that a wrapper
    # such as DataParallel adds, or go on after a layer's name, as "conv.weight" does.
    related = [n for n in found if f".{name}." in f".{n}." or name.startswith(f"{n}.")]
    near = related or difflib.get_close_matches(name, found, 5)
    if not near:
        return _listed(layers)
    return f"Did you mean {_shown([f'{n!r} ({found[n]})' for n in near])}?"


def _shown(layers: Sequence[str]) -> str:
    """Returns the first of the layers, and how many more there are."""
    more = f", and {len(layers) - _LISTED} more" if len(layers) > _LISTED else ""
    return ", ".join(layers[:_LISTED]) + more


def weight_and_bias(
    state_dict: Mapping[str, Any], prefix: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns what the layer called `prefix`, or the only one, convolves with, and its bias."""
    layer = _picked(state_dict, prefix)
    entries = {name: value for name, value in layer.entries.items() if value is not None}
    value = entries.pop("bias", None)
    if set(entries) == {"weight"}:
        weight = array(entries["weight"], "weight")
    elif pair := next((names for names in _WEIGHT_NORMS if set(entries) == set(names)), None):
        g, v = (array(entries[name], name) for name in pair)
        weight = _weight_normalized(g, v)
    else:
        raise ValueError(
            "`state_dict` must hold one layer's 'weight', and 'bias' if it has one, got the keys "
            f"{sorted(layer.keys.values())[:8]}.{_remedy(entries)}"
        )
    return weight, None if value is None else array(value, "bias")


def _weight_normalized(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns `g * v / norm(v)` as PyTorch's weight normalization defines it.

    The norm is taken over all axes but `dim`, which is 0 by default; `g` keeps `dim` and has ones
    elsewhere. With `dim=None` it is the norm of the whole and `g` a scalar.
    """
    kept = g.shape or (1,) * v.ndim
    if len(kept) != v.ndim or any(kept[i] not in (1, n) for i, n in enumerate(v.shape)):
        raise ValueError(
            f"`weight_g` must have the shape of a norm of `weight_v`, got {g.shape} and {v.shape}."
        )
    axes = tuple(i for i, n in enumerate(kept) if n == 1)
    wide = v.astype(np.float64)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN in PyTorch too
        unit = wide / np.sqrt(np.sum(wide**2, axis=axes, keepdims=True))
    normalized = g.astype(np.float64) * unit
    return normalized.astype(v.dtype)


def _remedy(entries: Mapping[str, Any]) -> str:
    for mark, line in _REMEDIES.items():
        for name in entries:
            if name.startswith(mark):
                tensor = name.removeprefix(mark).partition(".")[0]
                return f" In PyTorch, `{line.format(tensor=tensor)}` makes a plain one first."
    return ""


class _Stored:
    """A tensor of a `.safetensors` file, read when it is needed."""

    def __init__(self, file: Any, key: str) -> None:
        part = file.get_slice(key)
        self.shape, self.dtype = tuple(part.get_shape()), part.get_dtype()
        self._file, self._key = file, key

    def read(self) -> np.ndarray:
        return self._file.get_tensor(self._key)


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Generator[dict[str, _Stored]]:
    name = os.fspath(path)
    if not name.endswith(".safetensors"):
        raise TypeError(
            "`state_dict` must be an array of a floating dtype, a state_dict or the path of a "
            f".safetensors file, got {name!r}. PyTorch reads its own files: "
            "`torch.load(path, weights_only=True)`."
        )
    try:
        safetensors = importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(
            f"{name!r} needs safetensors: pip install 'flax_dwconv[safetensors]'."
        ) from error
    try:
        file = safetensors.safe_open(name, framework="numpy")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{name!r} is no .safetensors file: {error}") from error
    with file:
        yield {key: _Stored(file, key) for key in file.keys()}


def array(value: Any, name: str) -> np.ndarray:
    """Returns an array, or a tensor on any device, as numpy's."""
    if isinstance(value, _Stored):
        if value.dtype not in ("F64", "F32", "F16", "BF16"):
            raise TypeError(f"`{name}` must be an array of a floating dtype, got {value.dtype}.")
        value = value.read()
    if hasattr(value, "detach"):  # PyTorch
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # which numpy does not know
            return value.float().numpy().astype(jnp.bfloat16)
    value = np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be an array of a floating dtype, got {value.dtype}.")
    return value
