"""Static arguments of any rank: what they stand for, output shapes, and every error about them."""

import itertools

import numpy as np
import pytest
from jax import lax

from flax_dwconv import _geometry

RANKS = [1, 2, 3]


def window(rank, kernel_size=3, strides=1, padding="valid", dilation_rate=1, data_format=None):
    return _geometry.window(
        rank, kernel_size, strides, padding, dilation_rate, data_format or "channels_last"
    )


# What the arguments stand for


@pytest.mark.parametrize("rank", RANKS)
def test_one_int_is_one_for_each_dimension(rank):
    short = window(rank, 3, np.int64(2), 1, 4)
    long = window(rank, [3] * rank, (2,) * rank, ((1, 1),) * rank, [4] * rank)
    assert short == long and hash(short) == hash(long)
    assert short.rank == rank
    assert short.kernel_size == (3,) * rank and short.padding == ((1, 1),) * rank
    assert all(type(n) is int for n in short.strides)


@pytest.mark.parametrize("rank", RANKS)
def test_padding_in_every_form(rank):
    sides = tuple(range(rank))
    pads = tuple((n, n) for n in sides)
    for given in (sides, list(sides), pads, [list(p) for p in pads], (*pads[:-1], sides[-1])):
        assert window(rank, padding=given).padding == pads
    assert window(rank, padding=((-1, 2),) * rank).padding == ((-1, 2),) * rank
    assert window(rank, padding="SaMe").padding == "same"
    assert window(rank, padding="same").explicit_padding == "SAME"
    assert window(rank, padding=0).explicit_padding == ((0, 0),) * rank


def test_causal_padding_is_before_the_sequence():
    for k, dilation in itertools.product([1, 2, 5], [1, 3]):
        causal = window(1, k, padding="Causal", dilation_rate=dilation)
        assert causal.padding == "causal"
        assert causal.explicit_padding == (((k - 1) * dilation, 0),)
        assert causal.output_shape((2, 7, 3), 3) == (2, 7, 3)
    assert window(1, 3, 2, "causal").output_shape((2, 7, 3), 6) == (2, 4, 6)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("data_format", ["channels_last", "CHANNELS_FIRST"])
def test_axes(rank, data_format):
    w = window(rank, data_format=data_format)
    shape = (
        (7, *range(10, 10 + rank), 3) if "last" in data_format else (7, 3, *range(10, 10 + rank))
    )
    assert [shape[axis] for axis in w.spatial_axes] == list(range(10, 10 + rank))
    assert shape[w.channel_axis] == 3
    numbers = lax.conv_dimension_numbers(shape, (3,) * rank + (1, 3), w.dimension_numbers)
    assert [shape[axis] for axis in numbers.lhs_spec] == [7, 3, *range(10, 10 + rank)]
    assert numbers.lhs_spec == numbers.out_spec
    assert numbers.rhs_spec == (rank + 1, rank, *range(rank))


# Output shapes


GRID = list(itertools.product([1, 2, 4], [1, 2, 3], [1, 2, 3], ["valid", "same", (0, 2), (-1, 3)]))


@pytest.mark.parametrize("rank", RANKS)
def test_output_shape_is_that_of_lax(rank):
    """One geometry a dimension, each from another place of the grid."""
    checked = 0
    for i in range(len(GRID)):
        kernel, strides, dilation, padding = zip(
            *[GRID[(i + 17 * d) % len(GRID)] for d in range(rank)], strict=True
        )
        given = padding[0] if isinstance(padding[0], str) else None
        explicit = [p if isinstance(p, tuple) else (1, 0) for p in padding]
        w = window(rank, kernel, strides, given or explicit, dilation)
        sizes = tuple(range(12, 12 + rank))
        pads = w.explicit_padding
        effective = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True))
        assert w.effective_size == effective
        if isinstance(pads, str):
            pads = lax.padtype_to_pads(sizes, effective, strides, pads)
        expected = [
            (n + sum(p) - e) // s + 1
            for n, p, e, s in zip(sizes, pads, effective, strides, strict=True)
        ]
        assert w.output_shape((5, *sizes, 3), 6) == (5, *expected, 6)
        checked += 1
    assert checked == len(GRID)


@pytest.mark.parametrize("rank", RANKS)
def test_unknown_sizes_stay_unknown(rank):
    unknown = (None, *[None] * rank, 3)
    assert window(rank, padding="same", strides=2).output_shape(unknown, 6) == (*unknown[:-1], 6)


@pytest.mark.parametrize("rank", RANKS)
def test_a_kernel_that_does_not_fit(rank):
    with pytest.raises(ValueError) as error:
        window(rank, 3, dilation_rate=2).output_shape((1, *[4] * rank, 3), 3)
    ones = (1,) * rank
    assert str(error.value) == (
        "Computed output size would be zero or negative. The kernel does not fit into the input: "
        f"got an input of shape {(1, *[4] * rank, 3)} with `kernel_size`={(3,) * rank}, "
        f"`strides`={ones}, `padding`='valid', `dilation_rate`={(2,) * rank}."
    )


# Errors


PADS = {
    1: "'valid', 'same', 'causal', an int >= 0 or ((before, after),)",
    2: "'valid', 'same', an int >= 0 or ((top, bottom), (left, right))",
    3: "'valid', 'same', an int >= 0 or ((front, back), (top, bottom), (left, right))",
}
A_TUPLE = {1: "a tuple of 1 integer", 2: "a tuple of 2 integers", 3: "a tuple of 3 integers"}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["kernel_size", "strides", "dilation_rate"])
@pytest.mark.parametrize(
    "value, exception, positive",
    [
        (1.0, TypeError, False),
        (True, TypeError, False),
        (None, TypeError, False),
        ("3", TypeError, False),
        (b"33", TypeError, False),
        ((3, "3", 3), TypeError, False),
        ({3: 3}, TypeError, False),
        ((1, 1, 1, 1), ValueError, False),
        ((), ValueError, False),
        (2**31, ValueError, False),
        (0, ValueError, True),
        (-2, ValueError, True),
    ],
    ids=repr,
)
def test_ints(rank, name, value, exception, positive):
    with pytest.raises(exception) as error:
        window(rank, **{name: value})
    rule = f"{A_TUPLE[rank]} > 0" if positive else f"{A_TUPLE[rank]}, or one integer"
    assert type(error.value) is exception
    assert str(error.value) == f"`{name}` must be {rule}, got {value!r}."


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    "value, exception",
    [
        (1.5, TypeError),
        (None, TypeError),
        (True, TypeError),
        (((1, 0.5),) * 3, TypeError),
        (("same",) * 3, TypeError),
        ("full", ValueError),
        ("", ValueError),
        (-1, ValueError),
        (((1, 1),) * 4, ValueError),
        (((1, 1, 1),) * 3, ValueError),
        ((-1,) * 3, ValueError),
        ((), ValueError),
    ],
    ids=repr,
)
def test_padding_errors(rank, value, exception):
    if isinstance(value, tuple) and len(value) == 3:
        value = value[:rank]
    with pytest.raises(exception) as error:
        window(rank, padding=value)
    assert type(error.value) is exception
    assert str(error.value) == f"`padding` must be {PADS[rank]}, got {value!r}."


def test_a_pair_for_a_sequence_is_one_dimension():
    with pytest.raises(ValueError) as error:
        window(1, padding=(2, 0))
    assert str(error.value) == (
        f"`padding` must be {PADS[1]}, got (2, 0), did you mean `((2, 0),)`?"
    )


@pytest.mark.parametrize("rank", [2, 3])
def test_causal_padding_is_of_sequences(rank):
    with pytest.raises(ValueError) as error:
        window(rank, padding="causal")
    assert str(error.value) == (
        "Causal padding is only supported for `DepthwiseConv1D` and `SeparableConv1D`: `padding` "
        "must be 'valid' or 'same', got 'causal'."
    )


@pytest.mark.parametrize(
    "check, value, exception, message",
    [
        (_geometry.check_method, "fast", ValueError, "`method` must be 'auto', 'lax' or 'taps'"),
        (_geometry.check_method, None, TypeError, "`method` must be 'auto', 'lax' or 'taps'"),
        (_geometry.check_method, ["lax"], TypeError, "`method` must be 'auto', 'lax' or 'taps'"),
        (_geometry.precision, "low", ValueError, "`precision` must be a `jax.lax.Precision`, its"),
        (_geometry.precision, 7, TypeError, "`precision` must be a `jax.lax.Precision`, its"),
        (_geometry.precision, (), ValueError, "`precision` must be a `jax.lax.Precision`, its"),
        (_geometry.precision, ("high", 7), TypeError, "`precision` must be a `jax.lax.Precision`"),
    ],
    ids=range(7),
)
def test_words(check, value, exception, message):
    with pytest.raises(exception) as error:
        check(value)
    assert type(error.value) is exception
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(f"got {value!r}.")


def test_precision_in_every_form():
    high, highest = lax.Precision.HIGH, lax.Precision.HIGHEST
    assert _geometry.precision(None) is None
    assert _geometry.precision("HIGH") == _geometry.precision(high) == (high, high)
    assert _geometry.precision(["high", highest]) == (high, highest)
