"""What the static arguments of a depthwise convolution mean, and every error about them.

The rank, which is the number of spatial dimensions, is a parameter: 1, 2 or 3. Everything here is
written once for all of them.

Letters, here and in the whole package: `n` batch, `d h w` input depth, height and width, `l` input
length of a sequence, `c` input channels, `m` depth multiplier, `k` or `kd kh kw` kernel, `lo` or
`do ho wo` output sizes.
"""

import dataclasses
import json
import numbers
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

Ints = int | Sequence[int]
Pads = tuple[tuple[int, int], ...]
DataFormat = Literal["channels_last", "channels_first"]
PaddingLike = str | int | Sequence[int] | Sequence[Sequence[int]]
Precision = lax.Precision | str | tuple[lax.Precision | str, lax.Precision | str] | None
Method = Literal["auto", "lax", "taps"]

METHODS = get_args(Method)
DATA_FORMATS = ("channels_first", "channels_last")


class Spelling(NamedTuple):
    """How error messages and `jax.lax` spell the shapes of one rank."""

    space: str
    kernel: str
    pads: str
    letters: str


SPELLINGS = {
    1: Spelling("l", "k", "((before, after),)", "W"),
    2: Spelling("h, w", "kh, kw", "((top, bottom), (left, right))", "HW"),
    3: Spelling("d, h, w", "kd, kh, kw", "((front, back), (top, bottom), (left, right))", "DHW"),
}


def is_int(value: Any) -> bool:
    """Whether `value` is an integer that fits 32 bits: Python's or numpy's, not a bool."""
    return _is_integral(value) and -(2**31) <= int(value) < 2**31


def _is_integral(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _integers(rank: int) -> str:
    return f"a tuple of {rank} integer{'s' if rank > 1 else ''}"


def _one_for_each_dimension(value: Any, name: str, rank: int) -> tuple[int, ...]:
    """Returns one positive int, or one for each dimension, as a tuple of `rank` ints.

    Args:
      value: what the user passed.
      name: the argument that an error names.
      rank: the number of dimensions.

    Raises:
      TypeError: for what is neither an int nor a sequence of ints.
      ValueError: for another number of ints, or one that is not positive.
    """
    values = (value,) * rank if _is_integral(value) else value
    message = f"`{name}` must be {_integers(rank)}, or one integer, got {value!r}."
    if not _is_sequence(values) or not all(map(_is_integral, values)):
        raise TypeError(message)
    if len(values) != rank or not all(map(is_int, values)):
        raise ValueError(message)
    if min(values) <= 0:
        raise ValueError(f"`{name}` must be {_integers(rank)} > 0, got {value!r}.")
    return tuple(map(int, values))


def positive_int(value: Any, name: str) -> int:
    """Returns `value` as an int > 0, or raises an error that names the argument.

    Raises:
      TypeError: for what is not an int.
      ValueError: for an int that is not positive, or does not fit 32 bits.
    """
    message = f"`{name}` must be an integer > 0, got {value!r}."
    if not _is_integral(value):
        raise TypeError(message)
    if not is_int(value) or value <= 0:
        raise ValueError(message)
    return int(value)


def _padding(value: Any, rank: int) -> str | Pads:
    """Returns "valid", "same", "causal", or one (before, after) for each dimension.

    Strings are read in any case. An int n >= 0 pads every side by n, and one int for each
    dimension pads both sides of that dimension. Explicit pads may be negative, which crops, as in
    `jax.lax`.

    Raises:
      TypeError: for what is neither a string nor made of ints.
      ValueError: for another string, another number of pads, and causal padding of images.
    """
    strings = ("valid", "same", "causal") if rank == 1 else ("valid", "same")
    if isinstance(value, str):
        if value.lower() in strings:
            return value.lower()
        if value.lower() == "causal":
            raise ValueError(
                "Causal padding is only supported for `DepthwiseConv1D` and `SeparableConv1D`: "
                f"`padding` must be 'valid' or 'same', got {value!r}."
            )
    message = (
        f"`padding` must be {', '.join(map(repr, strings))}, an int >= 0 or "
        f"{SPELLINGS[rank].pads}, got {value!r}."
    )
    if isinstance(value, str):
        raise ValueError(message)
    sides = (value,) * rank if _is_integral(value) else value
    if not _is_sequence(sides):
        raise TypeError(message)
    pads = []
    for side in sides:
        both = _is_integral(side)  # one int for both ends
        pair = (side, side) if both else side
        if not _is_sequence(pair) or not all(map(_is_integral, pair)):
            raise TypeError(message)
        if len(pair) != 2 or not all(map(is_int, pair)) or (both and side < 0):
            raise ValueError(message)
        pads.append((int(pair[0]), int(pair[1])))
    if len(pads) != rank:
        if rank == 1 and len(value) == 2:
            message = f"{message[:-1]}, did you mean `(({value[0]}, {value[1]}),)`?"
        raise ValueError(message)
    return tuple(pads)


def _word(value: Any, name: str, words: Sequence[str], rule: str) -> str:
    """Returns `value` if it is one of `words`; else an error says that `name` must be `rule`."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be {rule}, got {value!r}.")
    if value not in words:
        raise ValueError(f"`{name}` must be {rule}, got {value!r}.")
    return value


def _data_format(value: Any) -> str:
    """Returns "channels_last" or "channels_first", read in any case.

    Raises:
      TypeError: for what is not a string.
      ValueError: for another string.
    """
    if isinstance(value, str) and value.lower() in DATA_FORMATS:
        return value.lower()
    return _word(value, "data_format", DATA_FORMATS, "one of 'channels_first', 'channels_last'")


def check_method(value: Any) -> Method:
    """Returns `value` if it is one of `METHODS`.

    Raises:
      TypeError: for what is not a string.
      ValueError: for another string.
    """
    return _word(value, "method", METHODS, "'auto', 'lax' or 'taps'")  # pyrefly: ignore[bad-return]


def precision(value: Any) -> tuple[lax.Precision, lax.Precision] | None:
    """Returns the precision of both operands, or None.

    Args:
      value: a `jax.lax.Precision`, its name in any case, a pair of them, or None.

    Raises:
      TypeError: for what is none of these.
      ValueError: for another name, or another number of them.
    """
    if value is None:
        return None
    message = (
        "`precision` must be a `jax.lax.Precision`, its name, a pair of them, or None, "
        f"got {value!r}."
    )
    values = tuple(value) if _is_sequence(value) else (value, value)
    if not all(isinstance(v, lax.Precision | str) for v in values):
        raise TypeError(message)
    try:
        left, right = (lax.Precision(v.lower() if isinstance(v, str) else v) for v in values)
    except ValueError:
        raise ValueError(message) from None
    return left, right


def as_array(value: Any, name: str) -> jax.Array:
    """Returns a numpy or JAX array as JAX's.

    Raises:
      TypeError: for anything else; `name` is the argument that the message names.
    """
    if not hasattr(value, "ndim") or not hasattr(value, "dtype"):
        raise TypeError(f"`{name}` must be an array, got {type(value).__name__}.")
    return jnp.asarray(value)


def element_type(value: Any) -> Any:
    """Returns `value` if it is a dtype in any form, or None.

    Raises:
      TypeError: for what is neither a dtype nor the name of one.
      ValueError: for an unknown name.
    """
    try:
        jnp.dtype(value)
        return value
    except TypeError:
        error = ValueError if isinstance(value, str) else TypeError
        raise error(f"`preferred_element_type` must be a dtype or None, got {value!r}.") from None


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
    """The geometry of one depthwise convolution, in the form that `window` gives it.

    Attributes:
      kernel_size: size of the kernel along each dimension.
      strides: step of the window along each dimension.
      padding: "valid", "same", "causal", or one (before, after) for each dimension.
      dilation_rate: distance of neighbouring kernel taps along each dimension.
      data_format: "channels_last" or "channels_first".
    """

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | Pads
    dilation_rate: tuple[int, ...]
    data_format: str

    @property
    def rank(self) -> int:
        """The number of spatial dimensions."""
        return len(self.kernel_size)

    @property
    def spatial_axes(self) -> range:
        """The axes of the spatial dimensions, counted from the end."""
        last = self.data_format == "channels_last"
        return range(-self.rank - last, -1 if last else 0)

    @property
    def channel_axis(self) -> int:
        """The axis of the channels, counted from the end."""
        return -1 if self.data_format == "channels_last" else -self.rank - 1

    @property
    def dimension_numbers(self) -> tuple[str, str, str]:
        """What `jax.lax` calls the axes of (input, kernel, output)."""
        space = SPELLINGS[self.rank].letters
        image = f"N{space}C" if self.data_format == "channels_last" else f"NC{space}"
        return image, f"{space}IO", image

    @property
    def effective_size(self) -> tuple[int, ...]:
        """The positions from the first to the last tap: e = (k - 1) * dilation + 1."""
        pairs = zip(self.kernel_size, self.dilation_rate, strict=True)
        return tuple((k - 1) * dilation + 1 for k, dilation in pairs)

    @property
    def explicit_padding(self) -> str | Pads:
        """The padding as `jax.lax` takes it: "SAME", "VALID", or pads.

        Causal padding is e - 1 zeros before the sequence, with the effective size e, so that no
        result reads what comes after its own position.
        """
        if self.padding == "causal":
            return tuple((e - 1, 0) for e in self.effective_size)
        return self.padding.upper() if isinstance(self.padding, str) else self.padding

    def input_axes(self) -> str:
        """How an error spells the shape of an input: "h, w, c", or "c, h, w"."""
        space = SPELLINGS[self.rank].space
        return f"{space}, c" if self.data_format == "channels_last" else f"c, {space}"

    def output_shape(self, shape: Sequence[Any], channels: Any) -> tuple[Any, ...]:
        """Returns the result's shape for an input of `shape`, with `channels` output channels.

        With the effective size e, TensorFlow's rules are

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
            pads = self.explicit_padding
            added = 0 if isinstance(pads, str) else sum(pads[i])
            result[axis] = (size + added - self.effective_size[i]) // self.strides[i] + 1
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
    rank: int,
    kernel_size: Any,
    strides: Any,
    padding: Any,
    dilation_rate: Any,
    data_format: Any,
) -> Window:
    """Returns the geometry that arguments in Keras's forms stand for.

    Args:
      rank: 1, 2 or 3.
      kernel_size: an int > 0, or one for each dimension; so are `strides` and `dilation_rate`.
      strides: as above.
      padding: see `functional.depthwise_conv`.
      dilation_rate: as above.
      data_format: "channels_last" or "channels_first", in any case.

    Raises:
      TypeError: for an argument of a wrong type.
      ValueError: for an argument that has no meaning.
    """
    return Window(
        _one_for_each_dimension(kernel_size, "kernel_size", rank),
        _one_for_each_dimension(strides, "strides", rank),
        _padding(padding, rank),
        _one_for_each_dimension(dilation_rate, "dilation_rate", rank),
        _data_format(data_format),
    )
