"""How long stacks of layers take to compile with their gradients, beside XLA's own convolutions.

What users wait for is not one layer. Equal layers are lowered once; XLA compiles each of them anew.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import flax_dwconv
from flax_dwconv.benchmark import report

Method = Literal["auto", "lax"]
METHODS: tuple[Method, ...] = ("auto", "lax")
# Size and channels of the images, and the kernel, of each layer.
EQUAL = {
    "8 of 3x3 on 28x28x192": [((28, 28, 192), 3)] * 8,
    "6 of 7x7 on 28x28x96": [((28, 28, 96), 7)] * 6,
}
DIFFERENT = {
    "8 different ones": [
        ((56, 56, 24), 3), ((56, 56, 72), 5), ((28, 28, 40), 3), ((28, 28, 120), 5),
        ((14, 14, 240), 3), ((14, 14, 200), 5), ((14, 14, 480), 3), ((7, 7, 672), 5),
    ],
}  # fmt: skip
STACKS = EQUAL | DIFFERENT


def gradients(name: str, method: Method) -> tuple[Callable[..., Any], list[Any]]:
    """Returns a function to the gradients of a stack, and the shapes of its arguments.

    Args:
      name: one of `STACKS`. Equal layers follow each other, and the gradients are those of the
        kernels. Different ones have an image each, and there are gradients of the images too.
      method: as for `depthwise_conv`.
    """
    layers = STACKS[name]
    kernels = [jax.ShapeDtypeStruct((k, k, size[-1], 1), jnp.float32) for size, k in layers]
    images = [jax.ShapeDtypeStruct((1, *size), jnp.float32) for size, _ in layers]

    def layer(x: Any, kernel: Any) -> Any:
        y = flax_dwconv.depthwise_conv(x, kernel, padding="same", method=method)
        return jax.nn.relu6(y)

    def one_after_the_other(kernels: Sequence[Any], x: Any) -> Any:
        for kernel in kernels:
            x = layer(x, kernel)
        return x.sum()

    def side_by_side(kernels: Sequence[Any], images: Sequence[Any]) -> Any:
        return sum(layer(x, kernel).sum() for x, kernel in zip(images, kernels, strict=True))

    if name in EQUAL:
        return jax.grad(one_after_the_other), [kernels, images[0]]
    return jax.grad(side_by_side, (0, 1)), [kernels, images]


def measured(name: str, rounds: int) -> dict[str, Any]:
    """Returns the seconds that a stack takes to be lowered and compiled, by both methods in turns.

    Args:
      name: one of `STACKS`.
      rounds: how often each has its turn.

    Returns:
      "stack", and for each of `METHODS` the seconds of every round.
    """
    found: dict[str, Any] = {"stack": name} | {method: [] for method in METHODS}
    for round_ in range(rounds):
        for method in METHODS[:: -1 if round_ % 2 else 1]:  # neither is always first
            jax.clear_caches()
            f, arguments = gradients(name, method)
            start = time.perf_counter()
            jax.jit(f).lower(*arguments).compile()
            found[method].append(time.perf_counter() - start)
    return found


def stacks(rounds: int) -> list[dict[str, Any]]:
    """Compiles every stack; Ctrl-C ends it early."""
    from tqdm import tqdm

    jax.jit(lambda x: x + 1).lower(np.ones(8)).compile()  # XLA's start is no compile time
    rows: list[dict[str, Any]] = []
    try:
        for name in tqdm(STACKS, unit="stack", leave=False):
            rows.append(measured(name, rounds))
    except KeyboardInterrupt:
        pass
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the medians, and the geometric mean of their ratios."""
    import pandas as pd

    medians = pd.DataFrame(
        {row["stack"]: {method: np.median(row[method]) for method in METHODS} for row in rows}
    ).T
    ratios = medians["auto"] / medians["lax"]
    table = medians.map(report.number).rename(columns={"auto": "ours", "lax": "XLA's"})
    table["ours / XLA's"] = ratios.map(report.times)
    mean, worst = report.times(report.mean(ratios)), report.times(ratios.max())
    title = f"seconds to lower and compile, jax {jax.__version__}"
    return report.markdown_table(title, table) + f"\n\nGeometric mean {mean}, at most {worst}."
