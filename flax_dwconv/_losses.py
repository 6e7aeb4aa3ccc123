"""The sum of the penalties that the layers of a model made."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_dwconv.nnx import Loss


def total_loss(losses: Any) -> jax.Array:
    """Returns the sum of all penalties of a model, those that other modules sowed included.

    Args:
      losses: what holds penalties:

        - the collection "losses" that a linen `apply` returns, `state["losses"]`, or the penalties
          that an nnx layer's `with_penalties` returns. An empty one gives 0;
        - a dict of collections that has "losses", such as `state`. The rest of it is ignored;
        - an nnx model, or an `nnx.State` of one: its `Loss` variables count. A model that has no
          regularizer gives 0.

        In a dict without a key "losses", a penalty is told by its name, which ends in "_penalty",
        or by the tuple that linen's `sow` makes. Scalars beside one count too.

    Returns:
      A float32 scalar.

    Raises:
      TypeError: for anything else, such as None, an array, or `(y, state)`.
      ValueError: for values none of which is a penalty, such as parameters, and for a dict without
        "losses" that has an array beside penalties.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> layer = flax_dwconv.DepthwiseConv2D(
      ...     3, depthwise_initializer="ones", depthwise_regularizer="l2",
      ...     activity_regularizer="l1")
      >>> x = jnp.ones((2, 4, 4, 1))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, state = layer.apply(variables, x, mutable=["losses"])
      >>> print(state["losses"])
      {'activity_penalty': Array(0.36, dtype=float32), 'kernel_penalty': Array(0.09, dtype=float32)}
      >>> print(flax_dwconv.total_loss(state["losses"]))
      0.45
    """
    if isinstance(losses, nnx.Module):
        losses = nnx.state(losses, Loss)
    if not isinstance(losses, Mapping):
        raise TypeError(_message(_described(losses), _LOST if losses is None else _PASS))
    leaves, _ = jax.tree_util.tree_flatten_with_path(dict(losses), is_leaf=_is_leaf)
    penalties = [leaf for path, leaf in leaves if _is_penalty(path, leaf)]
    others = [(path, leaf) for path, leaf in leaves if not _is_penalty(path, leaf)]
    if "losses" not in losses and not any(isinstance(leaf, nnx.Variable) for _, leaf in leaves):
        # Only what `sow` makes is a tuple: parameters are not, activations are but have axes.
        sown = [isinstance(path[-1], jax.tree_util.SequenceKey) for path, _ in others]
        for (path, leaf), in_tuple in zip(others, sown, strict=True):
            if np.ndim(leaf) > 0 and not (in_tuple and penalties):
                raise ValueError(_message(f"{_described(leaf)} at {_written(path)}"))
        if penalties or all(sown):
            penalties, others = penalties + [leaf for _, leaf in others], []
    if others and not penalties:
        path, leaf = others[0]
        raise ValueError(_message(f"no penalty, but {_described(leaf)} at {_written(path)}"))
    if any(leaf is None for leaf in penalties):
        raise TypeError(_message("None in place of a penalty", _LOST))
    values = jax.tree.leaves(penalties)
    return sum((jnp.sum(jnp.asarray(value, jnp.float32)) for value in values), start=jnp.float32(0))


_PASS = ' Of `y, state = model.apply(variables, x, mutable=["losses"])`, pass `state`.'
_LOST = (
    ' `apply` returns no "losses" where no layer sowed a penalty; `total_loss(state)` is 0 then.'
)


def _message(got: str, hint: str = _PASS) -> str:
    return (
        '`losses` must be a collection of penalties, a dict that has "losses", an nnx model or its '
        f"state, got {got}.{hint}"
    )


def _described(value: Any) -> str:
    """Returns a value in words that are short for an array too."""
    if value is None:
        return "None"
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    return f"a value of type {type(value).__name__}"


def _is_leaf(value: Any) -> bool:
    return value is None or isinstance(value, nnx.Variable)


def _is_penalty(path: tuple[Any, ...], leaf: Any) -> bool:
    if isinstance(leaf, nnx.Variable):
        return isinstance(leaf, Loss)
    names = _names(path)
    return names[0] == "losses" or str(names[-1]).endswith("_penalty")


def _names(path: tuple[Any, ...]) -> list[Any]:
    return [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]


def _written(path: tuple[Any, ...]) -> str:
    return repr("/".join(map(str, _names(path))))
