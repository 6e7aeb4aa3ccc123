"""The tricks: what XLA or LLVM would do to a program that says plainly what is meant.

Each is a function that changes no value. Each docstring says what happens without it, on which
versions that was seen, and which test of `tests/test_workarounds.py` goes red when the trick stops
working; the same test shows, as its control, the program without the trick, and goes red too when
the trick is no longer needed. "Seen" is on jax 0.10.2 and 0.12.0.1 unless something else is said.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv._lowering import rule


def materialized(*arrays: jax.Array) -> Sequence[jax.Array]:
    """Keeps XLA from computing the arrays anew for every tap that reads them.

    In a network, operands are expressions, and XLA:CPU fuses an expression into each of its
    readers. Up to jax 0.11.0 an `optimization_barrier` does not help: XLA removes it before fusion.
    From 0.11.1 on it would. A call that is not inlined stays, and costs nothing.

    The call takes and returns the arrays without their dimensions of size 1: XLA gives such a
    dimension any place in the layout, and then copies the array for the call.

    Test: `test_operands_are_materialized`.
    """
    squeezed = [lax.squeeze(x, [d for d, size in enumerate(x.shape) if size == 1]) for x in arrays]
    with rule.metadata(inlineable="false"):
        squeezed = _identity(*squeezed)
    return [x.reshape(array.shape) for x, array in zip(squeezed, arrays, strict=True)]


_identity = jax.jit(lambda *arrays: arrays)


def always(y: jax.Array) -> jax.Array:
    """Returns true for each element of `y`: LLVM knows that it is one, XLA computes it from `y`.

    An element is ordered or unordered with itself. `computed_once` and `after` need a value that
    depends on `y` for XLA and costs nothing in the end. If XLA simplified it, both would be gone.

    Test: `test_always_is_computed_for_xla_and_known_to_llvm`.
    """
    return lax.bitwise_or(lax.eq(y, y), lax.ne(y, y))


def computed_once(y: jax.Array) -> jax.Array:
    """Keeps XLA from computing `y` anew for each of its readers; a single one may have it fused.

    XLA:CPU fuses a sum of taps into every operation that reads it: with a batch normalization, it
    put one convolution into 8 fusions. It copies no expression that ends in an operation which it
    counts as expensive, like a division. This one divides by 1 and costs nothing, since LLVM knows
    that it is 1 and XLA does not. It would not fuse a concatenation with several readers, hence
    `reduce_precision`, which does nothing either. XLA's cost analysis counts all that, as 6
    operations for each result.

    A call that is not inlined would do as well, but nothing is fused with one: a layer takes 1.3
    times as long.

    Tests: `test_results_are_computed_once` and `test_pads_are_made_of_some_rows_at_a_time`.
    """
    info = jnp.finfo(y.dtype)
    y = lax.reduce_precision(y, info.nexp, info.nmant)
    return lax.div(y, lax.convert_element_type(always(y), y.dtype))


def one_loop(outputs: Sequence[jax.Array]) -> list[jax.Array]:
    """Has several arrays computed in one loop, which loads once what they share.

    XLA:CPU would compute each of them in a loop of its own. It has no fusion with several results
    but one: a `reduce` of several operands. Here it takes the maximum of two copies of each output,
    which is the output itself. XLA does not see that. LLVM does: it computes the output before the
    loop over the copies, and drops that loop, so that the loop around it, over channels,
    vectorises.

    Tests: `test_several_outputs_are_one_loop` and
    `test_one_loop_is_vectorised_and_the_copies_are_gone`.
    """
    copies = tuple(lax.broadcast(y, (2,)) for y in outputs)
    least = tuple(jnp.full((), -jnp.inf, y.dtype) for y in outputs)
    return list(lax.reduce(copies, least, lambda a, b: tuple(map(lax.max, a, b)), (0,)))


def after(y: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
    """Returns `y`, such that the code that goes on with it comes after that of the others.

    XLA emits code in the order in which it meets operations on the way back from the result, one
    output after the other, and LLVM keeps to that order by and large. All that outputs share would
    have to stay in registers until the last one. With `after`, the first output waits, after each
    row of taps, for the others, which it needs for a condition: 7 outputs take 0.5 to 0.8 of the
    time.

    Test: `test_outputs_grow_together`.
    """
    waited = functools.reduce(lax.add, others)
    return lax.select(always(waited), y, waited)


def parallel(i: jax.Array) -> Any:
    """Returns the index `i` of a loop, such that XLA's threads share what each pass of it does.

    XLA of jax 0.12 compiles loops that it takes for small ones, which ours are too, as functions
    for one thread, and marks them `xla_cpu_small_call`: a 31x31 kernel takes 12 times as long. A
    sort keeps it from that. Not seen on jax 0.10.2, whose XLA has no such functions.

    Test: `test_loops_are_parallel`.
    """
    return lax.sort(jnp.stack([i, i]))[0]


def zero_within(i: jax.Array, dtype: Any) -> jax.Array:
    """Returns a 0 that XLA takes for a value of a loop's index: what reads it stays in the loop.

    XLA moves out of a loop what does not depend on its index. One such thing is the padded copy of
    an image of which each pass reads some rows: it would be in memory as a whole, and a 7x7 kernel
    on 102x102x659 takes 1.1 to 1.7 times as long. The other, in a loop over images, is the slices
    of their cotangent, one for each position of a block, which every pass over the taps reads: they
    would all be copied. The kernel gradients of six layers take 1.15 times as long then, and 1.4
    times as long to compile. `i` must be at least 0 and depend on the index.

    Tests: `test_pads_are_made_of_some_rows_at_a_time` and `test_cotangents_are_not_copied`.
    """
    return lax.convert_element_type(lax.min(i, lax.full_like(i, 0)), dtype)
