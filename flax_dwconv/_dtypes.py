"""The dtype of sums."""

import jax.numpy as jnp


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which many numbers of `dtype` are added up.

    That is float32 for shorter floating types, and `dtype` itself otherwise. Products of a matrix
    and their derivatives need it as well as sums: on a CPU, jax 0.12.0.1 gave a kernel gradient of
    20,096 in bfloat16 for a sum of 25,088 ones.
    """
    low = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.dtype("float32") if low else dtype
