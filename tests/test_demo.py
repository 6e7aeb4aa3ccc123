"""The demo runs, says what it did, and refuses bad arguments before it does anything."""

import re

import jax
import jax.numpy as jnp
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
    shapes = jax.eval_shape(demo.Classifier().init, jax.random.key(seed), train_set.x[:1])
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), shapes["params"])
    metrics = [demo.Metrics(1.0, 0.1, 0.5)] * epochs
    return params, metrics, metrics


@pytest.fixture
def quick(monkeypatch):
    """Leaves out what takes seconds."""
    monkeypatch.setattr(demo, "train", untrained)
    monkeypatch.setattr(
        demo, "compare", lambda *args: [demo.Comparison("forward", 1e-3, 2e-3, 0.0)]
    )
    monkeypatch.setattr(demo, "draw", lambda path, *args: path.write_bytes(b"a figure"))


@pytest.fixture
def never(monkeypatch):
    """Fails the test if the demo begins to work."""
    monkeypatch.setattr(demo, "_run", lambda args: pytest.fail("the demo has begun"))


def test_the_demo_from_start_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 2)
    figure = tmp_path / "figure.png"
    assert demo.main(["--epochs", "3", "--seed", "7", "--out", str(figure)]) == 0
    out, err = capsys.readouterr()

    assert figure.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [figure]
    assert re.search(r"^figure +(.+)$", out, re.MULTILINE)[1] == str(figure)
    assert float(re.search(r"^test accuracy +([\d.]+)%$", out, re.MULTILINE)[1]) > 85
    total, data, penalties = map(
        float, re.search(r"loss +([\d.]+) = ([\d.]+) data \+ ([\d.]+) penalties", out).groups()
    )
    assert total == pytest.approx(data + penalties, abs=2e-4)
    assert penalties > 0
    row = r" +[\d.]+ ms +[\d.]+ ms +[\d.]+ +(\S+)$"
    for name in ("forward", r"forward \+ gradients"):
        assert float(re.search(f"^{name}{row}", out, re.MULTILINE)[1]) < 1e-3
    assert "training: 100%" in err and "3/3" in err


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
    assert [len(split.y) for split in splits] == [1257, 270, 270]
    assert all(
        (a.x == b.x).all() and (a.y == b.y).all() for a, b in zip(splits, again, strict=True)
    )
    assert any((a.y != b.y).any() for a, b in zip(splits, other, strict=True))
    images = {image.tobytes() for split in splits for image in split.x}
    assert len(images) == 1797
    assert splits[0].x.shape[1:] == (8, 8, 1) and splits[0].x.max() == 1


EPOCHS = "argument --epochs: must be an integer from 1 to 10000, got {!r}."
SEED = "argument --seed: must be an integer from 0 to 4294967295, got {!r}."
FORMAT = "argument --out: must end in .png, .jpg, .pdf, .svg, got {!r}."


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *[(["--epochs", text], EPOCHS.format(text)) for text in ("0", "-1", "2.5", "ten", "10001")],
        *[(["--seed", text], SEED.format(text)) for text in ("-1", "4294967296", "1e3", "")],
        *[(["--out", text], FORMAT.format(text)) for text in ("figure", "figure.txt", "", ".")],
        (
            ["--out", "absent/figure.png"],
            "argument --out: must be in a folder that exists, got 'absent/figure.png'.",
        ),
        (
            ["--out", "absent/figure.png", "--no-plot"],
            "argument --out: must be in a folder that exists, got 'absent/figure.png'.",
        ),
        (
            ["--out", "folder.png"],
            "argument --out: must be a file, got the folder 'folder.png'.",
        ),
        (["--epochs"], "argument --epochs: expected one argument"),
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


def test_a_folder_that_refuses_files(tmp_path, capsys, monkeypatch, never):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(SystemExit, match="2"):
        demo.main([])
    assert f"argument --out: must be writable, got '{tmp_path}'." in capsys.readouterr().err


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_extra(module, capsys, monkeypatch, never):
    monkeypatch.setitem(demo.sys.modules, module, None)
    assert demo.main([]) == 2
    assert capsys.readouterr().err == (
        f"The demo needs {module}: pip install 'flax_dwconv[demo]'\n"
    )


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
