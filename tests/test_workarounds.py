"""Each trick of `workarounds`: what it does, beside the same program without it.

A test looks for a pattern that is bad: a word or a number of loops in what XLA made of the program,
or the code that LLVM made of that. It must be absent with the trick and present without. Where it
is not present without, XLA or LLVM has changed: the trick is not needed any more, or the pattern
has another look, and then the test would find nothing with the trick either.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

import flax_dwconv
from flax_dwconv import depthwise_conv, depthwise_conv2d
from flax_dwconv._lowering import program, tuning, workarounds

ROOT = pathlib.Path(flax_dwconv.__file__).parents[1]
HAS_SMALL_CALLS = jax.__version_info__ >= (0, 12)
# The same program, said plainly.
PLAIN = {
    "materialized": lambda *arrays: arrays,
    "computed_once": lambda y: y,
    "one_loop": list,
    "parallel": lambda i: i,
    "zero_within": lambda i, dtype: jnp.zeros((), dtype),
}


@pytest.fixture
def with_and_without():
    """Calls a function, with a trick and without; returns both results."""

    def run(name, f):
        program.cached.cache_clear()
        results = [f()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workarounds, name, PLAIN[name])
            program.cached.cache_clear()
            results.append(f())
        program.cached.cache_clear()
        return results

    return run


def computations(f, *args):
    """The text of each computation of the executable: what XLA runs as one loop."""
    f = functools.partial(f)  # nothing that `jax.jit` has seen
    return jax.jit(f).lower(*args).compile().as_text().split("\n}\n")


def operands(k=3, size=9, channels=3, batch=2):
    x = oracle.integers(0, batch, size, size, channels)
    return jnp.asarray(x), jnp.asarray(oracle.integers(1, k, k, channels, 1))


@pytest.mark.parametrize("operand", ["image", "cotangent"])
def test_operands_are_materialized(operand, with_and_without):
    """Without it, the taps compute the operand that they read, each anew."""
    x, kernel = operands(k=2)
    g = depthwise_conv2d(x, kernel)

    def taps_that_compute():
        def image(x, k, g):
            return depthwise_conv2d(jnp.floor(x), k)

        def cotangent(x, k, g):
            return jax.vjp(depthwise_conv2d, x, k)[1](jnp.floor(g))

        f = image if operand == "image" else cotangent
        loops = [loop for loop in computations(f, x, kernel, g) if " floor(" in loop]
        assert loops
        return sum(" slice(" in loop for loop in loops)

    with_it, without = with_and_without("materialized", taps_that_compute)
    assert with_it == 0 < without


def test_results_are_computed_once(with_and_without):
    """Without it, each reader of a batch normalization computes the convolution anew."""
    x, kernel = operands()

    def normalized(x, k):
        y = depthwise_conv2d(x, k, padding="same")
        y = y - y.mean((0, 1, 2), keepdims=True)
        return y * lax.rsqrt((y**2).mean((0, 1, 2), keepdims=True) + 1)

    def taps():
        def loss(x, k):
            return (normalized(x, k) ** 3).sum()

        return sum(
            loop.count(" slice(") for loop in computations(jax.grad(loss, (0, 1)), x, kernel)
        )

    with_it, without = with_and_without("computed_once", taps)
    assert with_it < without


def test_several_outputs_are_one_loop(with_and_without, much_effort):
    """Without it, the kernel gradient reads image and cotangent in a loop for each tap."""
    x, kernel = operands(size=20)
    g = depthwise_conv2d(x, kernel)

    def loops():
        def gradient(x, k, g):
            return jax.vjp(lambda k: depthwise_conv2d(x, k), k)[1](g)

        return sum(" multiply(" in loop for loop in computations(gradient, x, kernel, g))

    with_it, without = with_and_without("one_loop", loops)
    assert with_it == 1 and without >= 9


@pytest.mark.parametrize("mode", ["forward", "gradients"])
def test_loops_are_parallel(mode, with_and_without):
    """Without it, XLA of jax 0.12 and later runs the loop of a large kernel on one thread."""
    x, kernel = operands(k=31, size=33, channels=2, batch=1)
    g = jax.eval_shape(functools.partial(depthwise_conv2d, padding="same"), x, kernel)

    def marks():
        f = functools.partial(depthwise_conv2d, padding="same")
        if mode == "forward":
            text = "".join(computations(lambda x, k, g: f(x, k), x, kernel, g))
        else:
            text = "".join(computations(lambda x, k, g: jax.vjp(f, x, k)[1](g), x, kernel, g))
        assert " while(" in text
        return text.count("xla_cpu_small_call")

    with_it, without = with_and_without("parallel", marks)
    assert with_it == 0
    assert (without > 0) == HAS_SMALL_CALLS


@pytest.mark.parametrize(
    ("name", "size", "kernel", "pads"),
    [
        ("zero_within", (120, 80, 300), (7, 7), ((3, 3), (3, 3))),
        ("computed_once", (24, 60, 60, 48), (5, 5, 5), ((2, 2), (0, 0), (0, 0))),
    ],
)
def test_pads_are_made_of_some_rows_at_a_time(name, size, kernel, pads, with_and_without):
    """Without the first, a large image is padded as a whole before the loop over its rows.

    Without the second, it is in each pass of that loop, if no other dimension is padded and the
    taps are a loop too.
    """
    x, kernel = jnp.zeros((1, *size)), jnp.zeros((*kernel, size[-1], 1))
    whole = f"= f32[1,{size[0] + sum(pads[0])},"

    def made():
        all_of_it = computations(functools.partial(depthwise_conv, padding=pads), x, kernel)
        assert any(" while(" in text for text in all_of_it)
        # What is in memory: not what is inside of a fusion.
        outside = [
            text for text in all_of_it if not text.strip().startswith(("%fused", "%wrapped"))
        ]
        return sum(text.count(whole) for text in outside)

    with_it, without = with_and_without(name, made)
    assert with_it == 0 < without


def test_cotangents_are_not_copied(with_and_without):
    """Without it, some images at a time, a loop over taps begins with copies of a cotangent."""
    x = jax.ShapeDtypeStruct((8, 43, 43, 374), jnp.float32)
    kernel = jax.ShapeDtypeStruct((7, 7, 374, 1), jnp.float32)
    g = jax.ShapeDtypeStruct((8, 22, 22, 374), jnp.float32)

    def copies():
        def gradient(x, kernel, g):
            return jax.vjp(lambda k: depthwise_conv2d(x, k, strides=2, padding="same"), kernel)[1](
                g
            )

        text = jax.jit(gradient).lower(x, kernel, g).compile().as_text()
        assert text.count(" while(") == 2, "over images and over taps"
        # What is in memory: of each of 11 positions, all from the first block to the second.
        return len(re.findall(r"= f32\[\d,22,12,374\]\S* fusion\(", text))

    with_it, without = with_and_without("zero_within", copies)
    assert with_it == 0 < without


# What LLVM makes of it, with the flags that users have

DUMP = """
import jax, jax.numpy as jnp
from jax import lax
from flax_dwconv._lowering import sums, tuning, workarounds

def computed_once(x):
    return workarounds.computed_once(jnp.floor(x) * 2)

def divided(x):
    return jnp.floor(x) * 2 / (x + 1)

def outputs(x, w):
    # Four outputs of two rows each; the row shows in the function that its terms have.
    rows = lax.floor, lax.ceil
    return [
        {(r, c): lax.mul(f(lax.mul(x, w[i])), jnp.full_like(x, c + 2))
         for r, f in enumerate(rows) for c in range(2)}
        for i in range(4)
    ]

def grown_together(x, w):
    return sums.together(outputs(x, w), 2, x.shape, x.dtype)

def not_waiting(x, w):
    workarounds.after = lambda y, others: y
    return grown_together(x, w)

def reduced(taps, positions):
    def f(x, g):
        windows = [lax.slice_in_dim(x, a, a + positions, axis=1) for a in range(taps)]
        return sums.along([lax.mul(window, g) for window in windows], 1)

    f.__name__ = f.__qualname__ = f"reduced_{taps}_{positions}"
    return f

for taps in 2, 3, 5, 7, 9:
    limit = tuning.TUNING.unrolled_products // (taps + 1)
    for positions in limit, limit + limit // 4 + 1:
        x, g = jnp.ones((4, positions + taps - 1, 256)), jnp.ones((4, positions, 256))
        jax.jit(reduced(taps, positions)).lower(x, g).compile()

x, w = jnp.ones((8, 1024)), jnp.ones((4, 8, 1024))
for f, args in [(computed_once, [x]), (divided, [x]), (grown_together, [x, w]),
                (not_waiting, [x, w])]:
    jax.jit(f).lower(*args).compile()
"""


@pytest.fixture(scope="module")
def llvm(tmp_path_factory):
    """(function, "no" or "with") -> the LLVM code of its loops, without or with optimization."""
    folder = tmp_path_factory.mktemp("llvm")
    flags = f"--xla_dump_to={folder} --xla_dump_emitter_re=llvm"
    env = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", DUMP], env=env, check=True)

    def read(name, optimization):
        files = sorted(folder.glob(f"*.jit_{name}.*ir-{optimization}-opt.ll"))
        assert files, sorted(folder.iterdir())
        return "".join(file.read_text(encoding="utf-8") for file in files)

    return read


def test_always_is_computed_for_xla_and_known_to_llvm(llvm):
    """It is in the code that LLVM is given, and not in what LLVM makes of it."""
    given, made = (llvm("computed_once", optimization) for optimization in ("no", "with"))
    assert "fdiv" in given and "fcmp" in given
    assert "fdiv" not in made and "fcmp" not in made
    assert "fdiv" in llvm("divided", "with"), "a division that is one shows"


@pytest.mark.parametrize("optimization", ["no", "with"])
def test_outputs_grow_together(llvm, optimization):
    """Without it, the second row of an output comes before the first row of the next one."""

    def order(name):
        return re.findall(r"call .*llvm\.(floor|ceil)\b", llvm(name, optimization))

    together, not_waiting = order("grown_together"), order("not_waiting")
    turns = [sum(a != b for a, b in zip(calls, calls[1:], strict=False))
             for calls in (together, not_waiting)]  # fmt: skip
    assert set(together) == set(not_waiting) == {"floor", "ceil"}
    assert turns[0] == 1 and turns[1] == 7


def test_one_loop_is_vectorised_and_the_copies_are_gone(llvm):
    """The maximum of two copies is in the code that LLVM is given, and not in what it makes."""
    given, made = (llvm("grown_together", optimization) for optimization in ("no", "with"))
    assert re.search(r"llvm\.maximum", given)
    assert not re.search(r"llvm\.maximum", made)
    assert re.search(r"fmul[^\n]*<\d+ x float>", made)


@pytest.mark.parametrize("taps", [2, 3, 5, 7, 9])
def test_a_reduce_of_few_products_is_vectorised(llvm, taps):
    """At the limit that the plan keeps, and no longer with a fourth more."""
    limit = tuning.TUNING.unrolled_products // (taps + 1)
    found = [
        bool(re.search(r"fmul[^\n]*<\d+ x float>", llvm(f"reduced_{taps}_{positions}", "with")))
        for positions in (limit, limit + limit // 4 + 1)
    ]
    assert found == [True, False]


def test_every_trick_names_its_tests():
    for name, trick in vars(workarounds).items():
        if getattr(trick, "__module__", None) == workarounds.__name__ and name[0] != "_":
            tests = re.findall(r"`(test_\w+)`", trick.__doc__.partition("Test")[2])
            assert tests and set(tests) <= set(globals()), name


@pytest.mark.parametrize("name", PLAIN)
def test_no_trick_changes_a_value(name, with_and_without, much_effort):
    for k in (3, 9):
        x, kernel = operands(k=k, size=12)
        f = functools.partial(depthwise_conv2d, padding="same")

        def step(x, k, f=f):
            y, vjp = jax.vjp(f, x, k)
            return y, *vjp(y % 4)

        results = with_and_without(
            name, lambda x=x, kernel=kernel, step=step: jax.jit(functools.partial(step))(x, kernel)
        )
        jax.tree.map(np.testing.assert_array_equal, *results)
