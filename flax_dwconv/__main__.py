"""The demo, `python -m flax_dwconv`: a small classifier of real handwritten digits, start to end.

It trains a depthwise-separable network with penalties, compares its layer with `flax.linen.Conv`,
and draws what it learned. scikit-learn ships the digits, so nothing is downloaded.
"""

import argparse
import importlib.util
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
LEARNING_RATE = 4e-3
ROUNDS = 20
SMOOTHING = 0.1  # of the labels: a better test accuracy than dropout gives, and less code
FORMATS = ".png", ".jpg", ".pdf", ".svg"
BLUE, ORANGE, GRAY = "#1f5a96", "#d9702b", "#8a8f98"

Split = tuple[np.ndarray, np.ndarray]  # images (n, 8, 8, 1) with values in [0, 1], labels (n,)


class Metrics(NamedTuple):
    """Loss of the data, penalties of the kernels, and the fraction of right answers."""

    data: jax.Array
    penalties: jax.Array
    accuracy: jax.Array


class Race(NamedTuple):
    """Two programs that compute the same: seconds of all runs, and the largest difference."""

    ours: list[float]
    theirs: list[float]
    difference: float

    def milliseconds(self) -> dict[str, np.ndarray]:
        """Returns the lower quartile, the median and the upper quartile, by name of the layer."""
        seconds = {"flax_dwconv": self.ours, "flax.linen.Conv": self.theirs}
        return {name: 1e3 * np.quantile(runs, [0.25, 0.5, 0.75]) for name, runs in seconds.items()}

    def ratio(self) -> float:
        """Returns the median of the other layer divided by that of ours."""
        return float(np.median(self.theirs) / np.median(self.ours))


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


class Classifier(nn.Module):
    """Two separable blocks and a dense layer: images `(n, 8, 8, 1)` to the logits of ten digits."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns logits `(n, 10)`."""
        # A block is a depthwise convolution, which looks around, and a pointwise one, which mixes
        # channels.
        x = depthwise(strides=1, depth_multiplier=16, name="depthwise1")(x)
        x = nn.relu(nn.Conv(32, (1, 1), name="pointwise1")(x))
        x = depthwise(strides=2, depth_multiplier=1, name="depthwise2")(x)
        x = nn.relu(nn.Conv(64, (1, 1), name="pointwise2")(x))
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
    return (x, y), (x_val, y_val), (x_test, y_test)


def _loss(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Metrics]:
    """Returns what is minimised, data + penalties, and its parts.

    The data's part is the cross-entropy with smoothed labels less its least possible value: a
    Kullback-Leibler divergence, of the same gradient, that a perfect fit brings to 0.
    """
    logits, state = Classifier().apply({"params": params}, x, mutable=["losses"])
    labels = optax.smooth_labels(jax.nn.one_hot(y, 10), SMOOTHING)
    data = optax.losses.kl_divergence(jax.nn.log_softmax(logits), labels).mean()
    penalties = flax_dwconv.total_loss(state["losses"])
    return data + penalties, Metrics(data, penalties, (logits.argmax(-1) == y).mean())


@jax.jit
def _train_step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
    return state.apply_gradients(grads=jax.grad(_loss, has_aux=True)(state.params, x, y)[0])


@jax.jit
def _evaluate(params: Any, x: Any, y: Any) -> Metrics:
    return _loss(params, x, y)[1]


@jax.jit
def _outputs(params: Any, x: Any) -> Any:
    """Returns the outputs of all layers, by name."""
    _, state = Classifier().apply({"params": params}, x, capture_intermediates=True)
    return {name: state["intermediates"][name]["__call__"][0] for name in params}


def train(
    train_set: Split, val_set: Split, epochs: int, seed: int
) -> tuple[Any, list[Metrics], list[Metrics]]:
    """Returns the trained parameters, and the metrics of both splits after every epoch."""
    from tqdm import tqdm

    (x, y), model = train_set, Classifier()
    batches = len(y) // BATCH
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * batches)
    params = jax.jit(model.init)(jax.random.key(seed), x[:1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(schedule))
    rng, on_train, on_val = np.random.default_rng(seed), [], []
    with tqdm(total=epochs, desc="training", unit="epoch") as bar:
        for _ in range(epochs):
            order = rng.permutation(len(y))
            for batch in np.array_split(order[: batches * BATCH], batches):
                state = _train_step(state, x[batch], y[batch])
            on_train.append(jax.device_get(_evaluate(state.params, x, y)))
            on_val.append(jax.device_get(_evaluate(state.params, *val_set)))
            bar.set_postfix_str(f"validation {on_val[-1].accuracy:.1%}", refresh=False)
            bar.update()
    return state.params, on_train, on_val


def compare(params: Any, x: np.ndarray) -> dict[str, Race]:
    """Runs the trained depthwise layer of block 2 on its own input, beside `flax.linen.Conv`.

    Args:
      params: of the classifier.
      x: images; both layers get the feature maps that block 1 makes of them.

    Returns:
      {what is computed: the race}.
    """
    maps, weights = nn.relu(_outputs(params, x)["pointwise1"]), params["depthwise2"]
    channels = maps.shape[-1]
    layer: Any = depthwise(strides=2, depth_multiplier=1)
    conv: Any = nn.Conv(channels, (3, 3), strides=2, feature_group_count=channels)

    def ours(weights: Any, maps: Any) -> Any:
        return layer.apply({"params": weights}, maps)

    def theirs(weights: Any, maps: Any) -> Any:
        grouped = weights | {"kernel": weights["kernel"].swapaxes(2, 3)}
        return nn.elu(conv.apply({"params": grouped}, maps))

    def gradients(f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda *args: (f(*args) ** 2).mean(0).sum(), argnums=(0, 1))

    return {
        "forward": _race(ours, theirs, weights, maps),
        "forward + gradients": _race(gradients(ours), gradients(theirs), weights, maps),
    }


def _race(ours: Callable, theirs: Callable, *args: Any) -> Race:
    """Checks that two functions agree, and times them.

    They run in turns, so that whatever else the machine does falls on both.
    """
    ours, theirs, difference = jax.jit(ours), jax.jit(theirs), 0.0
    for a, b in zip(*(jax.tree.leaves(f(*args)) for f in (ours, theirs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))
        difference = max(difference, float(jnp.abs(a - b).max()))
    seconds = {ours: [], theirs: []}
    for _ in range(ROUNDS):
        for f in seconds:
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            seconds[f].append(time.perf_counter() - start)
    return Race(seconds[ours], seconds[theirs], difference)


def draw(path: pathlib.Path, params: Any, history: Any, test_set: Split, comparison: Any) -> None:
    """Saves the figure: above curves and comparison, below kernels and what they see in a digit."""
    from matplotlib.figure import Figure  # without pyplot: no window, no display

    figure: Any = Figure(figsize=(12, 7.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.12), hspace=0.04)
    loss, accuracy, bars = above.subplots(1, 3)
    on_train, on_val = (Metrics(*np.transpose(metrics)) for metrics in history)
    test = float(_evaluate(params, *test_set).accuracy)
    epochs = np.arange(1, len(on_train.data) + 1)
    line = {"marker": "o" if len(epochs) == 1 else None}  # a line of one point is invisible
    loss.plot(epochs, on_train.data, color=ORANGE, label="data, train", **line)
    loss.plot(epochs, on_val.data, color=BLUE, label="data, validation", **line)
    loss.plot(epochs, on_train.penalties, color=GRAY, ls="--", label="penalties", **line)
    accuracy.plot(epochs, 100 * on_train.accuracy, color=ORANGE, label="train", **line)
    accuracy.plot(epochs, 100 * on_val.accuracy, color=BLUE, label="validation", **line)
    accuracy.axhline(100 * test, color="black", lw=1, ls=":", label=f"test, at the end: {test:.1%}")
    loss.set(title="Loss, in its parts", xlabel="epoch", ylabel="nats", ylim=0)
    accuracy.set(title="Accuracy", xlabel="epoch", ylabel="right answers (%)", ylim=(0, 103))
    colors = {"flax_dwconv": BLUE, "flax.linen.Conv": ORANGE}
    for i, (name, color) in enumerate(colors.items()):
        times = [race.milliseconds()[name] for race in comparison.values()]
        low, middle, high = np.transpose(times)
        at = np.arange(len(middle)) + 0.4 * (i - 0.5)
        spread = {"yerr": (middle - low, high - middle), "capsize": 3}
        drawn = bars.bar(at, middle, 0.4, color=color, label=name, **spread)
        bars.bar_label(drawn, [f"{time:.2f}" for time in middle])
    names = [f"{name}\nratio {race.ratio():.2f}" for name, race in comparison.items()]
    bars.set_xticks(range(len(names)), names)
    bars.set(
        title="Time of the depthwise layer of block 2", ylabel="ms: median, middle half of runs"
    )
    bars.margins(y=0.3)  # room for the legend
    for axes in (loss, accuracy, bars):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False)

    kernels = np.moveaxis(np.asarray(params["depthwise1"]["kernel"])[:, :, 0], -1, 0)
    outputs, (x, y) = _outputs(params, test_set[0][:1]), test_set
    maps, answer = np.moveaxis(outputs["depthwise1"][0], -1, 0), outputs["head"][0].argmax()
    pictures = [
        (kernels, "Depthwise kernels of block 1", "weight", "PuOr", -1),
        (x[:1, ..., 0], f"A test image: {y[0]}, read as {answer}", "ink", "Purples", 0),
        (maps, "Its feature maps, one per kernel", "value after elu", "PuOr", -1),
    ]
    for part, picture in zip(below.subfigures(1, 3), pictures, strict=True):
        images, title, unit, colors, low = picture
        side, largest = int(np.ceil(len(images) ** 0.5)), np.abs(images).max()
        grid = part.subplots(side, side, squeeze=False)
        for axes, image in zip(grid.flat, images, strict=True):
            axes.imshow(image, cmap=colors, vmin=low * largest, vmax=largest)
            axes.set(xticks=[], yticks=[])
        part.suptitle(title, fontsize=12)
        scale = {"location": "bottom", "shrink": 0.8, "aspect": 30, "label": unit}
        part.colorbar(grid[0, 0].images[0], ax=grid, **scale)
    figure.savefig(path, dpi=160)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, all checked; exits with code 2 and the reason for a bad one."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_dwconv",
        description="Train a depthwise-separable classifier on real handwritten digits.",
    )
    add, out = parser.add_argument, "flax_dwconv_demo.png"
    add("--epochs", type=int, default=25, help="passes over the training images (%(default)s)")
    add("--seed", type=int, default=0, help="of split, weights and batches (%(default)s)")
    add("--out", type=pathlib.Path, default=out, help="file of the figure (%(default)s)")
    add("--no-plot", action="store_true", help="save no figure")
    args = parser.parse_args(argv)
    if not 1 <= args.epochs <= 10_000:
        parser.error(f"argument --epochs: must be from 1 to 10000, got {args.epochs}.")
    if not 0 <= args.seed < 2**32:
        parser.error(f"argument --seed: must be from 0 to 4294967295, got {args.seed}.")
    if args.out.suffix.lower() not in FORMATS:
        parser.error(f"argument --out: must end in {', '.join(FORMATS)}, got '{args.out}'.")
    if args.out.is_dir() or not os.access(args.out.resolve().parent, os.W_OK):
        parser.error(f"argument --out: must be a file in a writable folder, got '{args.out}'.")
    needed = ["sklearn", "tqdm", *([] if args.no_plot else ["matplotlib"])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        parser.error(f"needs {', '.join(missing)}: pip install 'flax_dwconv[demo]'.")
    return args


def _run(args: argparse.Namespace) -> None:
    """Trains, tests, compares, draws; prints as it goes."""
    train_set, val_set, test_set = splits = load_splits(args.seed)
    sizes = [len(y) for _, y in splits]
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count()
    machine = f"{platform.system()} {platform.machine()}, {cores} cores"

    def say(label: str, text: object) -> None:
        print(f"{label:<16}{text}", flush=True)  # at once: the progress bar is another stream

    print("A depthwise-separable classifier of handwritten digits\n")
    say("hardware", f"{machine}, JAX {jax.__version__} on {jax.default_backend()}")
    say("data", "{} images of 8x8 to train, {} to validate, {} to test".format(*sizes))
    start = time.perf_counter()
    params, on_train, on_val = train(train_set, val_set, args.epochs, args.seed)
    seconds = time.perf_counter() - start
    data, penalties, accuracy = on_train[-1]
    test = float(_evaluate(params, *test_set).accuracy)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    say("model", f"{count} parameters, 2 separable blocks, seed {args.seed}")
    say("training", f"{args.epochs} epochs, {seconds:.1f} s with compilation")
    say("loss", f"{data + penalties:.4f} = {data:.4f} data + {penalties:.4f} penalties")
    say("accuracy", f"{accuracy:.1%} train, {on_val[-1].accuracy:.1%} validation")
    say("test accuracy", f"{test:.1%}")

    comparison = compare(params, test_set[0])
    print("\nThe depthwise layer of block 2, and flax.linen.Conv(feature_group_count=32) with its")
    print(f"weights: 3x3, stride 2, {sizes[2]} inputs of 8x8x32; {ROUNDS} runs of each, in turns\n")
    print(f"{'':<22}{'':<17}{'median':>10}{'middle half of the runs':>26}{'ratio':>9}")
    for name, race in comparison.items():
        rows = race.milliseconds().items()
        for label, ratio, (layer, (low, middle, high)) in zip(
            (name, ""), ("", f"{race.ratio():.2f}"), rows, strict=True
        ):
            spread = f"{low:.2f} to {high:.2f} ms"
            print(f"{label:<22}{layer:<17}{middle:>7.2f} ms{spread:>26}{ratio:>9}".rstrip())
    difference = max(race.difference for race in comparison.values())
    print("\nThe ratio is the median of flax.linen.Conv divided by that of flax_dwconv.")
    print(f"Largest difference of their outputs and gradients: {difference:.1e}")
    if not args.no_plot:
        draw(args.out, params, (on_train, on_val), test_set, comparison)
        say("\nfigure", args.out.resolve())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit code.

    Args:
      argv: the arguments; None takes those of the command line.
    """
    args = _parse(argv)
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
