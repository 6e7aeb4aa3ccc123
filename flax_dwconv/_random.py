"""What Keras's random initializers share: seeds, the keys that they make, the fans of a shape.

With a seed and without, an initializer is one code path. It is written in this package because the
functions of `jax.nn.initializers` multiply in another order and round otherwise than Keras.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_dwconv._vocabulary import integers, show

Key = jax.Array | None
Shape = Sequence[int]
Axes = tuple[int, ...] | None


def check_seed(value: Any) -> int | None:
    """Checks a seed: None, an integer, or the config of a `keras.random.SeedGenerator`."""
    if isinstance(value, Mapping) and value.get("class_name") == "SeedGenerator":
        value = (value.get("config") or {}).get("seed")  # what it draws with first
    if value is None:
        return None
    message = f"`seed` must be None or an integer of at most 64 bits, got {show(value)}."
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(message)
    if not -(2**63) <= int(value) < 2**64:
        raise ValueError(message)
    return int(value)


def check_axes(input_axes: Any, output_axes: Any) -> dict[str, Axes]:
    """Checks the axes of the two fans: both None, or both an int or a tuple of ints."""
    if (input_axes is None) != (output_axes is None):
        raise ValueError(
            "`input_axes` and `output_axes` must be given together, "
            f"got {show(input_axes)} and {show(output_axes)}."
        )
    checked: dict[str, Axes] = {"input_axes": None, "output_axes": None}
    if input_axes is not None:
        for name, value in (("input_axes", input_axes), ("output_axes", output_axes)):
            value = integers(name, value)
            checked[name] = value if isinstance(value, tuple) else (value,)
    return checked


def seeded_key(seed: int | None, key: Key) -> jax.Array:
    """Returns the caller's key or, for a seed, that of Keras on JAX: the words [seed, 0]."""
    if seed is None:
        if key is None:
            raise TypeError("`key` must be a random key, as there is no `seed`, got None.")
        return key
    words = jnp.asarray(np.array([seed % 2**32, 0], np.uint32))
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def fans(shape: Shape, input_axes: Axes, output_axes: Axes) -> tuple[int, int]:
    """Returns (fan_in, fan_out): products over the given axes, or by Keras's rule.

    By that rule the leading axes of a kernel (..., a, b) count in both fans, and a vector's length
    is both.
    """
    if input_axes is None or output_axes is None:
        if len(shape) < 2:
            return math.prod(shape), math.prod(shape)
        *window, a, b = shape
        return math.prod(window) * a, math.prod(window) * b
    if not all(-len(shape) <= axis < len(shape) for axis in input_axes + output_axes):
        raise ValueError(
            f"`input_axes` and `output_axes` must be within the rank of the shape {tuple(shape)}, "
            f"got {input_axes} and {output_axes}."
        )
    fan_in, fan_out = (math.prod(shape[i] for i in axes) for axes in (input_axes, output_axes))
    return fan_in, fan_out
