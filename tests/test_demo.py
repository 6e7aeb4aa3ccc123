"""The demo runs, says what it did, and refuses bad arguments before it does anything."""

import re

import jax
import jax.numpy as jnp
import matplotlib
import pytest

from flax_dwconv import __main__ as demo


@pytest.fixture(autouse=True)
def strict_jax():
    """Not here: optax's adam promotes its step counter."""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def untrained(train_set, val_set, epochs, seed):
    """Stands for `train`."""
    shapes = jax.eval_shape(demo.Classifier().init, jax.random.key(seed), train_set[0][:1])
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), shapes["params"])
    metrics = [demo.Metrics(1.0, 0.1, 0.5)] * epochs
    return params, metrics, metrics


RACE = demo.Race([1e-3, 3e-3, 2e-3], [1e-3] * 3, 0.0)  # the other layer is faster


@pytest.fixture
def quick(monkeypatch):
    """Leaves out what takes seconds."""
    monkeypatch.setattr(demo, "train", untrained)
    monkeypatch.setattr(demo, "compare", lambda *args: {"forward": RACE})
    monkeypatch.setattr(demo, "draw", lambda path, *args: path.write_bytes(b"a figure"))


@pytest.fixture
def never(monkeypatch):
    """Fails the test if the demo begins to work."""
    monkeypatch.setattr(demo, "_run", lambda args: pytest.fail("the demo has begun"))


def test_the_demo_from_start_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 2)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    figure = tmp_path / "figure.svg"
    assert demo.main(["--epochs", "3", "--seed", "7", "--out", str(figure)]) == 0
    out, err = capsys.readouterr()

    assert list(tmp_path.iterdir()) == [figure]
    assert re.search(r"^figure +(.+)$", out, re.MULTILINE)[1] == str(figure)
    accuracy = re.search(r"^test accuracy +([\d.]+)%$", out, re.MULTILINE)[1]
    assert float(accuracy) > 85
    numbers = re.search(r"loss +([\d.]+) = ([\d.]+) data \+ ([\d.]+) penalties", out).groups()
    total, data, penalties = map(float, numbers)
    assert total == pytest.approx(data + penalties, abs=2e-4)
    assert penalties > 0
    assert "training: 100%" in err and "3/3" in err
    drawn = figure.read_text()  # what the figure says is what the text says
    assert f"test, at the end: {accuracy}%" in drawn and ">flax.linen.Conv<" in drawn
    difference = re.search(r"^Largest difference .*: (\S+)$", out, re.MULTILINE)[1]
    assert 0 < float(difference) < 1e-3
    spread = r"([\d.]+) ms +([\d.]+) to ([\d.]+) ms"
    for name in ("forward", r"forward \+ gradients"):
        rows = rf"^{name} +flax_dwconv +{spread}\n +flax.linen.Conv +{spread} +([\d.]+)$"
        *times, ratio = map(float, re.search(rows, out, re.MULTILINE).groups())
        for median, low, high in (times[:3], times[3:]):
            assert 0 < low <= median <= high
            assert f">{median:.2f}<" in drawn
        assert ratio == pytest.approx(times[3] / times[0], rel=0.1)  # of rounded times
        assert f">ratio {ratio:.2f}<" in drawn


def test_a_layer_that_is_slower_is_said_to_be(capsys, quick):
    assert demo.main(["--epochs", "1", "--no-plot"]) == 0
    ours, theirs = capsys.readouterr().out.splitlines()[-5:-3]
    assert ours.split() == "forward flax_dwconv 2.00 ms 1.50 to 2.50 ms".split()
    assert theirs.split() == "flax.linen.Conv 1.00 ms 1.00 to 1.00 ms 0.50".split()


def test_default_figure_is_in_the_current_folder(tmp_path, capsys, quick):
    assert demo.main(["--epochs", "1"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["flax_dwconv_demo.png"]
    assert str(tmp_path / "flax_dwconv_demo.png") in capsys.readouterr().out


def test_no_plot_writes_nothing(tmp_path, capsys, quick):
    assert demo.main(["--epochs", "1", "--no-plot", "--out", "figure.png"]) == 0
    out = capsys.readouterr().out
    assert "test accuracy" in out and "figure" not in out
    assert not list(tmp_path.iterdir())


def test_the_splits_are_seeded_and_disjoint():
    splits, again, other = (demo.load_splits(seed) for seed in (2**32 - 1, 2**32 - 1, 0))
    assert [len(y) for _, y in splits] == [1257, 270, 270]
    assert all((a == b).all() for a, b in zip(sum(splits, ()), sum(again, ()), strict=True))
    assert any((a != b).any() for (_, a), (_, b) in zip(splits, other, strict=True))
    images = {image.tobytes() for x, _ in splits for image in x}
    assert len(images) == 1797
    assert splits[0][0].shape[1:] == (8, 8, 1) and splits[0][0].max() == 1


FORMAT = "argument --out: must end in .png, .jpg, .pdf, .svg, got {!r}."
FOLDER = "argument --out: must be a file in a writable folder, got {!r}."


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--epochs", "0"], "argument --epochs: must be from 1 to 10000, got 0."),
        (["--epochs", "10001"], "argument --epochs: must be from 1 to 10000, got 10001."),
        (["--epochs", "2.5"], "argument --epochs: invalid int value: '2.5'"),
        (["--seed", "-1"], "argument --seed: must be from 0 to 4294967295, got -1."),
        (
            ["--seed", "4294967296"],
            "argument --seed: must be from 0 to 4294967295, got 4294967296.",
        ),
        (["--out", "figure"], FORMAT.format("figure")),
        (["--out", "figure.txt"], FORMAT.format("figure.txt")),
        (["--out", "absent/figure.png"], FOLDER.format("absent/figure.png")),
        (["--out", "folder.png"], FOLDER.format("folder.png")),
        (["--steps", "3"], "unrecognized arguments: --steps 3"),
    ],
)
def test_bad_arguments(argv, message, tmp_path, capsys, never):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as error:
        demo.main(argv)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert err.endswith(f"python -m flax_dwconv: error: {message}\n")
    assert not out
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_extra(module, capsys, monkeypatch, never):
    monkeypatch.setitem(demo.sys.modules, module, None)
    with pytest.raises(SystemExit, match="2"):
        demo.main([])
    message = f"needs {module}: pip install 'flax_dwconv[demo]'.\n"
    assert capsys.readouterr().err.endswith(message)


def test_no_plot_needs_no_matplotlib(capsys, monkeypatch, quick):
    monkeypatch.setitem(demo.sys.modules, "matplotlib", None)
    assert demo.main(["--no-plot"]) == 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "\nStopped.\n"),
        (OSError(28, "No space left"), 1, "The demo could not finish: [Errno 28] No space left\n"),
    ],
)
def test_ends_without_a_traceback(error, code, message, capsys, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(demo, "train", fail)
    assert demo.main([]) == code
    assert capsys.readouterr().err == message
