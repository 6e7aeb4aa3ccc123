"""What the static arguments of a 2-D depthwise convolution mean, and every error about them.

Letters, here and in the whole package: `n` batch, `h w` input height and width, `c` input channels,
`m` depth multiplier, `kh kw` kernel, `ho wo` output height and width.
"""

import dataclasses
import json
import numbers
import os
import pathlib
from collections.abc import Sequence
from typing import Any

Pair = tuple[int, int]
Padding = str | tuple[Pair, Pair]

# Names that `jax.lax` gives to the axes of (input, kernel, output).
DIMENSION_NUMBERS = {
    "channels_last": ("NHWC", "HWIO", "NHWC"),
    "channels_first": ("NCHW", "HWIO", "NCHW"),
}


def is_int(value: Any) -> bool:
    """Whether `value` is an integer that fits 32 bits: Python's or numpy's, not a bool."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return -(2**31) <= int(value) < 2**31


def _pair(value: Any, name: str) -> Pair:
    """Returns one positive int, or two, as a pair.

    Raises:
      ValueError: for anything else; `name` is the argument that the message names.
    """
    values = (value, value) if is_int(value) else value
    if not isinstance(values, Sequence) or len(values) != 2 or not all(map(is_int, values)):
        raise ValueError(f"`{name}` must be a tuple of 2 integers, or one integer, got {value!r}.")
    if min(values) <= 0:
        raise ValueError(f"`{name}` must be a tuple of 2 integers > 0, got {value!r}.")
    return int(values[0]), int(values[1])


def positive_int(value: Any, name: str) -> int:
    """Returns `value` as an int > 0, or raises a ValueError that names the argument."""
    if not is_int(value) or value <= 0:
        raise ValueError(f"`{name}` must be an integer > 0, got {value!r}.")
    return int(value)


def _padding(value: Any) -> Padding:
    """Returns "valid", "same" or ((top, bottom), (left, right)).

    Strings are read in any case; an int n >= 0 pads every side by n; explicit pads may be negative,
    which crops, as in `jax.lax`.

    Raises:
      ValueError: for anything else, causal padding included.
    """
    if isinstance(value, str):
        if value.lower() == "causal":
            raise ValueError(
                "Causal padding is only supported for `Conv1D` and `SeparableConv1D`: "
                f"`padding` must be 'valid' or 'same', got {value!r}."
            )
        if value.lower() in ("valid", "same"):
            return value.lower()
    elif is_int(value) and value >= 0:
        return ((int(value),) * 2,) * 2
    elif isinstance(value, Sequence) and len(value) == 2:
        sides = [side for axis in value if isinstance(axis, Sequence) for side in axis]
        if all(isinstance(a, Sequence) and len(a) == 2 for a in value) and all(map(is_int, sides)):
            top, bottom, left, right = map(int, sides)
            return (top, bottom), (left, right)
    raise ValueError(
        "`padding` must be 'valid', 'same', an int >= 0 or ((top, bottom), (left, right)), "
        f"got {value!r}."
    )


def _data_format(value: Any) -> str:
    """Returns "channels_last" or "channels_first", read in any case.

    Raises:
      ValueError: for anything else.
    """
    if isinstance(value, str) and value.lower() in DIMENSION_NUMBERS:
        return value.lower()
    raise ValueError(
        f"`data_format` must be one of 'channels_first', 'channels_last', got {value!r}."
    )


def default_data_format() -> str:
    """Returns `image_data_format` of Keras's own config file, else "channels_last".

    The file is `keras.json` in the folder that the environment variable `KERAS_HOME` names, else in
    `.keras` in the home folder. An absent or broken file, or an unknown value, counts as no file.
    """
    home = os.environ.get("KERAS_HOME")
    folder = pathlib.Path(home) if home else pathlib.Path("~/.keras").expanduser()
    try:
        config = json.loads((folder / "keras.json").read_text(encoding="utf-8"))
        return _data_format(config["image_data_format"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "channels_last"


@dataclasses.dataclass(frozen=True)
class Window:
    """The geometry of one depthwise convolution, in the form that `window` gives it."""

    kernel_size: Pair
    strides: Pair
    padding: Padding
    dilation_rate: Pair
    data_format: str

    @property
    def spatial_axes(self) -> Pair:
        """The axes of height and width, counted from the end."""
        return (-3, -2) if self.data_format == "channels_last" else (-2, -1)

    @property
    def channel_axis(self) -> int:
        """The axis of the channels, counted from the end."""
        return -1 if self.data_format == "channels_last" else -3

    def output_shape(self, shape: Sequence[Any], channels: Any) -> tuple[Any, ...]:
        """Returns the result's shape for an input of `shape`, with `channels` output channels.

        With the effective kernel e = (k - 1) * dilation + 1, TensorFlow's rules are

            same:  ceil(n / stride)        valid:  floor((n - e) / stride) + 1

        and explicit pads are "valid" on n + before + after. A size may be None (unknown), which
        stays None, or one of JAX's symbolic dimensions, which is not compared with anything.

        Raises:
          ValueError: if the kernel does not fit into the input.
        """
        result = list(shape)
        for i, axis in enumerate(self.spatial_axes):
            size = shape[axis]
            if size is None:
                continue
            if self.padding == "same":
                result[axis] = -(-size // self.strides[i])
                continue
            pads = (0, 0) if isinstance(self.padding, str) else self.padding[i]
            effective = (self.kernel_size[i] - 1) * self.dilation_rate[i] + 1
            result[axis] = (size + sum(pads) - effective) // self.strides[i] + 1
            if is_int(size) and result[axis] <= 0:
                raise ValueError(
                    "Computed output size would be zero or negative. The kernel does not fit into "
                    f"the input: got an input of shape {tuple(shape)} with "
                    f"`kernel_size`={self.kernel_size}, `strides`={self.strides}, "
                    f"`padding`={self.padding!r}, `dilation_rate`={self.dilation_rate}."
                )
        result[self.channel_axis] = channels
        return tuple(result)


def window(
    kernel_size: Any, strides: Any, padding: Any, dilation_rate: Any, data_format: Any
) -> Window:
    """Returns the geometry that arguments in Keras's forms stand for.

    Raises:
      ValueError: for an argument that has no meaning.
    """
    return Window(
        _pair(kernel_size, "kernel_size"),
        _pair(strides, "strides"),
        _padding(padding),
        _pair(dilation_rate, "dilation_rate"),
        _data_format(data_format),
    )
