"""A scan: convolutions drawn at random, each beside XLA's own, and the worst of what was found.

A run of the benchmark times layers that networks have; a scan looks for shapes that are slow and
that nobody thought of. It times three programs of each convolution by itself, in one process: the
result, the gradient to the input and the gradient to the kernel.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import flax_dwconv
from flax_dwconv.benchmark import driver, report

Kind = Literal["multipliers", "windows"]
Method = Literal["auto", "lax"]
KINDS: tuple[Kind, ...] = ("multipliers", "windows")
PROGRAMS = ("forward", "input gradient", "kernel gradient")
WORST = 10  # rows of each table
LARGEST = 1 << 22  # elements of the image, and of the result: 16 MiB each
PRODUCTS = 1 << 26  # of one convolution: XLA's kernel gradient took 1.2 seconds for half as many


@dataclasses.dataclass(frozen=True)
class Shape:
    """One convolution in float32, channels last; `kernel` is the window, as long as `size`."""

    batch: int
    size: tuple[int, ...]
    channels: int
    kernel: tuple[int, ...]
    strides: int
    dilation: int
    multiplier: int
    padding: str

    def __str__(self) -> str:
        by = "x".join
        text = f"{self.batch}x{by(map(str, self.size))}x{self.channels}"
        text += f" k{by(map(str, self.kernel))} m{self.multiplier} s{self.strides}"
        return f"{text} d{self.dilation} {self.padding}"

    @property
    def out(self) -> tuple[int, ...]:
        """The sizes of the result; one below 1 if the window is larger than the image."""
        reach = [1 + (k - 1) * self.dilation for k in self.kernel]
        reach = reach if self.padding == "valid" else [1] * len(reach)
        return tuple((n - r) // self.strides + 1 for n, r in zip(self.size, reach, strict=True))

    @property
    def products(self) -> int:
        """How many products the result is the sum of; each gradient has as many."""
        filters = self.channels * self.multiplier
        return self.batch * math.prod(self.out) * math.prod(self.kernel) * filters

    @property
    def fits(self) -> bool:
        """Whether it has results, and not too many."""
        image = self.batch * math.prod(self.size) * self.channels
        results = self.batch * math.prod(self.out) * self.channels * self.multiplier
        # An image of one channel has no convolution that is depthwise rather than ordinary.
        small = max(image, results) <= LARGEST and self.products <= PRODUCTS
        return self.channels > 1 and min(self.out) > 0 and small

    def programs(self, method: Method) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
        """Returns the three programs, and the shapes of what each of them is called with."""

        def apply(x: Any, kernel: Any) -> Any:
            return flax_dwconv.depthwise_conv(
                x,
                kernel,
                strides=self.strides,
                padding=self.padding,
                dilation_rate=self.dilation,
                method=method,
            )

        x = jax.ShapeDtypeStruct((self.batch, *self.size, self.channels), jnp.float32)
        kernel = jax.ShapeDtypeStruct((*self.kernel, self.channels, self.multiplier), jnp.float32)
        y = jax.eval_shape(apply, x, kernel)
        return {
            "forward": (apply, [x, kernel]),
            "input gradient": (lambda k, g: jax.linear_transpose(lambda x: apply(x, k), x)(g)[0],
                               [kernel, y]),
            "kernel gradient": (lambda x, g: jax.linear_transpose(lambda k: apply(x, k), kernel)(
                g)[0], [x, y]),
        }  # fmt: skip


def drawn(kind: Kind, seed: int, count: int) -> list[Shape]:
    """Returns random convolutions.

    Args:
      kind: "multipliers" draws filter banks, patch embeddings and the like, of 1 to 3 dimensions;
        "windows" draws windows of any shape with a multiplier of 1.
      seed: of the random numbers; the same seed gives the same convolutions.
      count: how many.
    """
    rng, found = np.random.default_rng(seed), []
    multipliers = kind == "multipliers"

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    def about(low: int, high: int) -> int:
        """An integer whose logarithm is uniform."""
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))

    while len(found) < count:
        rank = one_of(1, 2, 2, 2, 3)
        longest = (4096, 256, 48)[rank - 1]
        side = about(longest // 16, longest)
        size = tuple(side if one_of(0, 1) else about(longest // 16, longest) for _ in range(rank))
        if multipliers:
            kernel = (about(1, (64, 16, 4)[rank - 1]),) * rank
            multiplier, channels = about(2, 256), about(2, 64)
            strides = one_of(1, 1, 2, 4, kernel[0])
        else:
            kernel = tuple(one_of(1, about(2, 15), about(2, 15)) for _ in range(rank))
            multiplier, channels, strides = 1, about(2, 512), one_of(1, 1, 1, 2)
        shape = Shape(
            batch=about(1, 16),
            size=size,
            channels=channels,
            kernel=kernel,
            strides=strides,
            dilation=one_of(1, 1, 2, 3) if strides == 1 else 1,
            multiplier=multiplier,
            padding=one_of("same", "valid"),
        )
        if shape.fits:
            found.append(shape)
    return found


def measured(shape: Shape, rounds: int = 3, budget: float = 0.02) -> list[dict[str, Any]]:
    """Times the three programs of a convolution as taps and as XLA's own, in turns.

    Args:
      shape: the convolution.
      rounds: how often each has its turn.
      budget: seconds of a turn, more than 0: it has one call at least.

    Returns:
      For each program the least times in seconds, and the temporaries of ours as a multiple of its
      arguments and results.
    """
    rows = []
    normal = np.random.default_rng(0).standard_normal
    ours, theirs = shape.programs("auto"), shape.programs("lax")
    for program in PROGRAMS:
        calls, ratios = {}, {}
        for name, (f, specs) in {"lax": theirs[program], "ours": ours[program]}.items():
            compiled = jax.jit(f).lower(*specs).compile()
            memory: Any = compiled.memory_analysis()
            whole = memory.argument_size_in_bytes + memory.output_size_in_bytes
            ratios[name] = memory.temp_size_in_bytes / whole
            operands = [jnp.asarray(normal(spec.shape, np.float32)) for spec in specs]
            calls[name] = lambda compiled=compiled, operands=operands: jax.block_until_ready(
                compiled(*operands)
            )
            calls[name]()
        turns = [{k: min(driver.repeated(f, budget)) for k, f in calls.items()}
                 for _ in range(rounds)]  # fmt: skip
        least = {name: min(turn[name] for turn in turns) for name in calls}
        rows.append({"shape": str(shape), "program": program, **least}
                    | {"memory": ratios["ours"], "products": shape.products})  # fmt: skip
    return rows


def scan(kind: Kind, seed: int, count: int) -> list[dict[str, Any]]:
    """Draws convolutions and times each; Ctrl-C ends it early."""
    from tqdm import tqdm

    rows: list[dict[str, Any]] = []
    try:
        for shape in tqdm(drawn(kind, seed, count), unit="shape"):
            rows += measured(shape)
    except KeyboardInterrupt:
        pass
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns tables of the worst: by XLA's time, by time for each product, by memory."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    frame["ratio"] = frame.ours / frame.lax
    frame["ps"] = frame.ours / frame.products * 1e12
    columns = {
        "ours": lambda s: report.number(s * 1e3),
        "lax": lambda s: report.number(s * 1e3),
        "ratio": report.times,
        "ps": report.number,
        "memory": report.times,
    }
    names = {"ours": "ours ms", "lax": "XLA's ms", "ratio": "ours / XLA's",
             "ps": "ps / product", "memory": "temporaries / operands"}  # fmt: skip

    def table(title: str, some: Any) -> str:
        texts = some.assign(**{name: some[name].map(text) for name, text in columns.items()})
        texts = texts.set_index("shape")[["program", *columns]].rename(columns=names)
        return report.markdown_table(title, texts)

    tables = [table("longest beside XLA's", frame.nlargest(WORST, "ratio"))]
    for program in PROGRAMS:
        some = frame[frame.program == program].nlargest(WORST, "ps")
        tables.append(table(f"slowest, {program}", some))
    tables.append(table("most memory", frame.nlargest(WORST, "memory")))
    slower = sum(ratio > 1.1 for ratio in frame.ratio)
    tables.append(f"{slower} of {len(frame)} programs take more than 1.1 times XLA's time.")
    return "\n\n".join(tables)
