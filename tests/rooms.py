"""What the tests of the four vocabularies share: their rooms, their numbers, Keras's ways."""

import contextlib

import jax
import numpy as np
import pytest

from flax_dwconv import activations, constraints, initializers, regularizers

ROOMS = {
    "activation": activations,
    "constraint": constraints,
    "initializer": initializers,
    "regularizer": regularizers,
}
DTYPES = ["float16", "bfloat16", "float32", "float64"]


def room_of(cls):
    return next(room for room in ROOMS.values() if room.__name__ == cls.__module__)


@contextlib.contextmanager
def loose():
    """Keras promotes dtypes and ranks as it likes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def check_error(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message, str(caught.value)
    assert type(caught.value) is error
