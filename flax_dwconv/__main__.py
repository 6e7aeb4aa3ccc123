"""The demo, `python -m flax_dwconv`: a small classifier of real handwritten digits, start to end.

Trains a depthwise-separable network with penalties, compares its layer with `flax.linen.Conv`, and
draws what it learned. scikit-learn ships the digits, so nothing is downloaded.
"""

import argparse
import importlib.util
import io
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import flax_dwconv

BATCH = 64
FORMATS = (".png", ".jpg", ".pdf", ".svg")
LEARNING_RATE = 4e-3
MAX_EPOCHS = 10_000
ROUNDS = 20
SMOOTHING = 0.1  # of the labels: a better test accuracy than dropout gives, and less code

BLUE, ORANGE, GRAY = "#1f5a96", "#d9702b", "#8a8f98"
STYLE = {
    "axes.edgecolor": GRAY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 9.5,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 160,
}


class Split(NamedTuple):
    """Images `(n, 8, 8, 1)` with values in [0, 1], and their labels `(n,)`."""

    x: np.ndarray
    y: np.ndarray


class Metrics(NamedTuple):
    """Loss of the data, penalties of the kernels, and the fraction of right answers."""

    data: jax.Array
    penalties: jax.Array
    accuracy: jax.Array


class Comparison(NamedTuple):
    """Seconds of our layer and of `flax.linen.Conv`, and their largest absolute difference."""

    name: str
    ours: float
    theirs: float
    difference: float


def depthwise(strides: int, depth_multiplier: int, name: str | None = None) -> nn.Module:
    """Returns the layer that the demo is about, as both blocks use it."""
    return flax_dwconv.DepthwiseConv2D(
        3,
        strides,
        "same",
        depth_multiplier,
        "channels_last",  # whatever Keras's config file says: the digits are (n, h, w, c)
        activation="elu",
        # Glorot's fans count all channels, but a depthwise filter sees only 9 pixels of its own:
        # sqrt(2 / 9) is about 0.4.
        depthwise_initializer=nn.initializers.normal(0.4),
        depthwise_regularizer=flax_dwconv.regularizers.L2(1e-3),
        name=name,
    )


class SeparableBlock(nn.Module):
    """A depthwise convolution, which looks around, and a pointwise one, which mixes channels."""

    features: int
    strides: int
    depth_multiplier: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(n, h, w, c)` to `(n, ceil(h / strides), ceil(w / strides), features)`."""
        x = depthwise(self.strides, self.depth_multiplier, name="depthwise")(x)
        return nn.relu(nn.Conv(self.features, (1, 1), name="pointwise")(x))


class Classifier(nn.Module):
    """Two separable blocks and a dense layer: images `(n, 8, 8, 1)` to the logits of ten digits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits `(n, 10)`."""
        x = SeparableBlock(32, strides=1, depth_multiplier=16, name="block1")(x)
        x = SeparableBlock(64, strides=2, depth_multiplier=1, name="block2")(x)
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


def load_splits(seed: int) -> tuple[Split, Split, Split]:
    """Returns 70 % of the digits to train, 15 % to validate and 15 % to test, drawn by `seed`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = (np.asarray(array, np.float32) for array in load_digits(return_X_y=True))
    x, y = x.reshape(-1, 8, 8, 1) / 16, y.astype(np.int32)
    size = round(0.15 * len(y))
    x, x_test, y, y_test = train_test_split(x, y, test_size=size, random_state=seed, stratify=y)
    x, x_val, y, y_val = train_test_split(x, y, test_size=size, random_state=seed, stratify=y)
    return Split(x, y), Split(x_val, y_val), Split(x_test, y_test)


def _loss(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Metrics]:
    """Returns what is minimised, data + penalties, and its parts.

    The data's part is the cross-entropy with smoothed labels less its least possible value: a
    Kullback-Leibler divergence, of the same gradient, that a perfect fit brings to 0.
    """
    logits, state = Classifier().apply({"params": params}, x, mutable=["losses"])
    labels = optax.smooth_labels(jax.nn.one_hot(y, 10), SMOOTHING)
    data = optax.losses.kl_divergence(jax.nn.log_softmax(logits), labels).mean()
    penalties = flax_dwconv.total_loss(state["losses"])
    accuracy = (logits.argmax(-1) == y).mean()
    return data + penalties, Metrics(data, penalties, accuracy)


@jax.jit
def _train_step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    """Returns the state after one step of the optimizer on one batch."""
    return state.apply_gradients(grads=jax.grad(_loss, has_aux=True)(state.params, x, y)[0])


@jax.jit
def _evaluate(params: Any, x: jax.Array, y: jax.Array) -> Metrics:
    """Returns the metrics of a whole split."""
    return _loss(params, x, y)[1]


def train(
    train_set: Split, val_set: Split, epochs: int, seed: int
) -> tuple[Any, list[Metrics], list[Metrics]]:
    """Returns the trained parameters, and the metrics of both splits after every epoch."""
    from tqdm import tqdm

    model = Classifier()
    batches = len(train_set.y) // BATCH
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * batches)
    params = jax.jit(model.init)(jax.random.key(seed), train_set.x[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(schedule))

    rng = np.random.default_rng(seed)
    on_train, on_val = [], []
    # A terminal gets a lively bar, a log file a line every few seconds.
    interval = 0.1 if sys.stderr.isatty() else 5
    with tqdm(total=epochs, desc="training", unit="epoch", mininterval=interval) as bar:
        for _ in range(epochs):
            order = rng.permutation(len(train_set.y))
            for batch in np.array_split(order[: batches * BATCH], batches):
                state = _train_step(state, train_set.x[batch], train_set.y[batch])
            on_train.append(jax.device_get(_evaluate(state.params, *train_set)))
            on_val.append(jax.device_get(_evaluate(state.params, *val_set)))
            bar.set_postfix_str(f"validation {on_val[-1].accuracy:.1%}", refresh=False)
            bar.update()
    return state.params, on_train, on_val


@jax.jit
def _intermediates(params: Any, x: np.ndarray) -> Any:
    """Returns the outputs of every submodule, nested as the parameters are."""
    _, state = Classifier().apply({"params": params}, x, capture_intermediates=True)
    return state["intermediates"]


def compare(params: Any, x: np.ndarray) -> list[Comparison]:
    """Runs the trained depthwise layer of block 2 on its own input, beside `flax.linen.Conv`.

    Args:
      params: of the classifier.
      x: images; both layers get the feature maps `(n, 8, 8, c)` that block 1 makes of them.

    Returns:
      One line for the forward pass, one for forward and gradients.
    """
    maps = _intermediates(params, x)["block1"]["__call__"][0]
    weights = params["block2"]["depthwise"]
    kh, kw, c, m = weights["kernel"].shape
    layer = depthwise(2, m)
    conv = nn.Conv(c * m, (kh, kw), strides=2, padding="SAME", feature_group_count=c)

    def ours(weights, maps):
        return layer.apply({"params": weights}, maps)

    def theirs(weights, maps):
        # A grouped convolution counts the filters of a channel within the last axis: c*M + m, too.
        grouped = weights | {"kernel": weights["kernel"].reshape(kh, kw, 1, c * m)}
        y: Any = conv.apply({"params": grouped}, maps)
        return nn.elu(y)

    def gradients(f):
        return jax.value_and_grad(lambda *args: (f(*args) ** 2).mean(0).sum(), argnums=(0, 1))

    return [
        _race("forward", ours, theirs, weights, maps),
        _race("forward + gradients", gradients(ours), gradients(theirs), weights, maps),
    ]


def _race(name: str, ours: Callable, theirs: Callable, *args: Any) -> Comparison:
    """Checks that two functions agree on `args`, and times them: the least of `ROUNDS` runs.

    They run in turns, so that whatever else the machine does falls on both.
    """
    ours, theirs = jax.jit(ours), jax.jit(theirs)
    difference = 0.0
    for a, b in zip(*(jax.tree.leaves(f(*args)) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
        difference = max(difference, float(jnp.abs(a - b).max()))

    seconds = {ours: [], theirs: []}
    for _ in range(ROUNDS):
        for f in seconds:
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            seconds[f].append(time.perf_counter() - start)
    return Comparison(name, min(seconds[ours]), min(seconds[theirs]), difference)


def _say(label: str, text: str) -> None:
    """Prints one line, at once: the progress bar goes to another stream."""
    print(f"{label:<16}{text}", flush=True)


def _hardware() -> str:
    """Returns the platform, the cores that this process may use, and JAX's version and backend."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count()
    backend = jax.default_backend()
    machine = f"{platform.system()} {platform.machine()}"
    return f"{machine}, {cores} cores, JAX {jax.__version__} on {backend}"


def _say_comparison(lines: list[Comparison], shape: tuple[int, ...]) -> None:
    """Prints the table of `compare`; `shape` is of the input."""
    n, h, w, c = shape
    print(f"\nThe depthwise layer of block 2 and nn.Conv(feature_group_count={c}), same weights:")
    print(f"3x3, stride 2, {n} inputs of {h}x{w}x{c}; the fastest of {ROUNDS} runs, in turns\n")
    print(f"{'':<22}{'flax_dwconv':>12}{'nn.Conv':>12}{'ratio':>8}{'max |difference|':>19}")
    for line in lines:
        ours, theirs = (f"{seconds * 1e3:.2f} ms" for seconds in (line.ours, line.theirs))
        ratio = f"{line.theirs / line.ours:.2f}"
        print(f"{line.name:<22}{ours:>12}{theirs:>12}{ratio:>8}{line.difference:>19.1e}")
    print(flush=True)


def draw(
    path: pathlib.Path, params: Any, on_train: list[Metrics], on_val: list[Metrics], test_set: Split
) -> None:
    """Saves the figure: curves above, below the kernels of block 1 and what they see in a digit."""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no window, no display

    with matplotlib.style.context(["default", STYLE]):
        figure: Any = Figure(figsize=(10.5, 7.6), layout="constrained")
        curves, pictures = figure.subfigures(2, 1, height_ratios=(1, 1.12), hspace=0.04)
        _draw_curves(curves, on_train, on_val)
        _draw_pictures(pictures, params, test_set)
        # In memory first: no half-written file, whatever happens.
        buffer = io.BytesIO()
        figure.savefig(buffer, format=path.suffix[1:].lower())
    path.write_bytes(buffer.getvalue())


def _draw_curves(figure: Any, on_train: list[Metrics], on_val: list[Metrics]) -> None:
    """Draws the loss in its parts, and the accuracy, over the epochs."""
    from matplotlib.ticker import MaxNLocator

    train_set, val_set = (Metrics(*np.transpose(metrics)) for metrics in (on_train, on_val))
    epochs = np.arange(1, len(on_train) + 1)
    line = {"marker": "o" if len(epochs) == 1 else None}  # a line of one point is invisible
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, train_set.data, color=ORANGE, label="data, train", **line)
    loss.plot(epochs, val_set.data, color=BLUE, label="data, validation", **line)
    loss.plot(epochs, train_set.penalties, color=GRAY, ls="--", label="penalties", **line)
    accuracy.plot(epochs, 100 * train_set.accuracy, color=ORANGE, label="train", **line)
    accuracy.plot(epochs, 100 * val_set.accuracy, color=BLUE, label="validation", **line)
    loss.set(title="Loss, in its parts", ylabel="loss (nats)")
    loss.set_ylim(bottom=0)
    accuracy.set(title="Accuracy", ylabel="right answers (%)")
    for axes in (loss, accuracy):
        axes.set(xlabel="epoch", xlim=(0.5, len(epochs) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()


def _draw_pictures(figure: Any, params: Any, test_set: Split) -> None:
    """Draws the kernels of block 1, one test image, and its feature maps, kernel by kernel."""
    from matplotlib.colors import LinearSegmentedColormap

    outputs, params = jax.device_get((_intermediates(params, test_set.x), params))
    kernels = np.moveaxis(params["block1"]["depthwise"]["kernel"][:, :, 0], -1, 0)
    maps = np.moveaxis(outputs["block1"]["depthwise"]["__call__"][0][0], -1, 0)
    answer = outputs["head"]["__call__"][0][0].argmax()
    signed = LinearSegmentedColormap.from_list("signed", [BLUE, "white", ORANGE])
    positive = LinearSegmentedColormap.from_list("positive", ["white", BLUE, "#0b2545"])
    largest, highest = np.abs(kernels).max(), np.abs(maps).max()

    left, middle, right = figure.subfigures(1, 3, width_ratios=(1, 0.95, 1))
    _draw_grid(left, kernels, "Depthwise kernels of block 1", "weight", signed, -largest, largest)
    title = f"A test image: {test_set.y[0]}, read as {answer}"
    _draw_grid(middle, test_set.x[:1, ..., 0], title, "ink", positive, 0, 1)
    _draw_grid(
        right,
        maps,
        "Its feature maps, one per kernel",
        "value after elu",
        signed,
        -highest,
        highest,
    )


def _draw_grid(
    figure: Any, images: np.ndarray, title: str, unit: str, colors: Any, low: float, high: float
) -> None:
    """Draws `n` images in a square grid with one common color scale."""
    side = int(np.ceil(len(images) ** 0.5))
    grid = figure.subplots(side, side, squeeze=False)
    for axes, image in zip(grid.flat, images, strict=True):
        axes.imshow(image, cmap=colors, vmin=low, vmax=high)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, linewidth=0.6)
    figure.suptitle(title, fontsize=11, fontweight="bold")
    scale = grid[0, 0].images[0]
    bar = figure.colorbar(scale, ax=grid, location="bottom", shrink=0.8, aspect=30, label=unit)
    bar.outline.set_visible(False)


def _integer(low: int, high: int) -> Callable[[str], int]:
    """Returns an argparse type: an integer within bounds."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"must be an integer from {low} to {high}, got {text!r}."
            )
        return value

    return convert


def _image_path(text: str) -> pathlib.Path:
    """An argparse type: a file in an existing folder, with the suffix of an image format."""
    path = pathlib.Path(text).resolve()
    if path.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(FORMATS)}, got {text!r}.")
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {text!r}.")
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}.")
    return path


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, all checked; exits with code 2 and the reason for a bad one."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_dwconv",
        description="Train a depthwise-separable classifier on real handwritten digits.",
    )
    parser.add_argument(
        "--epochs",
        type=_integer(1, MAX_EPOCHS),
        default=25,
        help="passes over the training images (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=_integer(0, 2**32 - 1),
        default=0,
        help="of the split, the weights and the batches (%(default)s)",
    )
    parser.add_argument(
        "--out",
        type=_image_path,
        default="flax_dwconv_demo.png",
        help="file of the figure (%(default)s)",
    )
    parser.add_argument("--no-plot", action="store_true", help="save no figure")
    args = parser.parse_args(argv)
    out = args.out if os.path.exists(args.out) else args.out.parent
    if not args.no_plot and not os.access(out, os.W_OK):
        parser.error(f"argument --out: must be writable, got '{out}'.")
    return args


def _missing(plot: bool) -> list[str]:
    """Returns the modules of the extra `demo` that are needed and not installed."""
    needed = ["sklearn", "tqdm", *(["matplotlib"] if plot else [])]
    return [name for name in needed if importlib.util.find_spec(name) is None]


def _run(args: argparse.Namespace) -> None:
    """Trains, tests, compares, draws; prints as it goes."""
    train_set, val_set, test_set = splits = load_splits(args.seed)
    sizes = [len(split.y) for split in splits]
    print("A depthwise-separable classifier of handwritten digits\n")
    _say("hardware", _hardware())
    _say("data", "{} images of 8x8 to train, {} to validate, {} to test".format(*sizes))

    start = time.perf_counter()
    params, on_train, on_val = train(train_set, val_set, args.epochs, args.seed)
    seconds = time.perf_counter() - start
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    data, penalties, accuracy = on_train[-1]
    test = _evaluate(params, *test_set)
    _say("model", f"{count} parameters, 2 separable blocks, seed {args.seed}")
    _say("training", f"{args.epochs} epochs, {seconds:.1f} s with compilation")
    _say("loss", f"{data + penalties:.4f} = {data:.4f} data + {penalties:.4f} penalties")
    _say("accuracy", f"{accuracy:.1%} train, {on_val[-1].accuracy:.1%} validation")
    _say("test accuracy", f"{test.accuracy:.1%}")

    _say_comparison(compare(params, test_set.x), (sizes[2], 8, 8, 32))
    if not args.no_plot:
        draw(args.out, params, on_train, on_val, test_set)
        _say("figure", str(args.out))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit code.

    Args:
      argv: the arguments; None takes those of the command line.
    """
    args = _parse(argv)
    if missing := _missing(plot=not args.no_plot):
        print(
            f"The demo needs {', '.join(missing)}: pip install 'flax_dwconv[demo]'", file=sys.stderr
        )
        return 2
    try:
        _run(args)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"The demo could not finish: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
