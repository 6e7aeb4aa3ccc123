"""The benchmark: its report of made-up times, its processes, one real run, its refusals."""

import dataclasses
import functools
import json
import os
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_dwconv.benchmark import __main__ as program
from flax_dwconv.benchmark import cases, driver, peers, report, run, scan, stacks
from flax_dwconv.benchmark.cases import Case

TINY = Case("tiny", 2, (5, 6), 4, (3, 3), 2)
SMALL = Case("small", 1, (4, 4), 8, (3, 3), 1, "valid")
SEQUENCE = Case("sequence", 2, (40,), 3, (5,), 1, "causal")
VOLUME = Case("volume", 2, (4, 5, 6), 3, (3, 1, 3), (1, 2, 2))
SMALLEST = {"images": TINY, "volumes": VOLUME, "sequences": SEQUENCE}


# What is timed


def test_the_layers():
    layers = cases.layers()
    assert len({case.label for case in layers}) == len(set(layers)) == 2 * 57
    assert layers[0] == Case("MobileNetV1-1", 1, (112, 112), 32, (3, 3), 1)
    assert layers[0].sizes == "112x112x32 k3x3 s1"
    assert {case.batch for case in layers} == {1, 8, 32}
    quick = cases.layers(quick=True)
    assert len(quick) == 12 and set(quick) < set(layers)


def test_the_other_families():
    sequences, volumes = cases.layers(family="sequences"), cases.layers(True, "volumes")
    assert [case.sizes for case in sequences[:2]] == ["2048x1024 k4 s1", "2048x512 k31 s1"]
    assert {case.padding for case in sequences} == {"causal"}
    assert len({case.label for case in sequences}) == 6 and len(volumes) == 5
    assert volumes[-1].sizes == "8x56x56x24 k3x3x3 s1x2x2"
    assert volumes[-1].out_shape == (1, 8, 28, 28, 24)


def test_drawn_layers():
    drawn = cases.drawn(seed=3, count=200)
    assert drawn == cases.drawn(3, 200) and drawn[:5] != cases.drawn(4, 5)
    assert len({case.label for case in drawn}) == 200
    assert {case.batch for case in drawn} == {1, 8, 32} and {case.stride for case in drawn} == {
        1,
        2,
    }
    assert {case.activation for case in drawn} == set(cases.ACTIVATIONS)
    assert Case("", 1, (7, 7), 24, (3, 3), 2, activation="silu").sizes == "7x7x24 k3x3 s2 silu"
    for case in drawn:
        (side, _), (k, _) = case.size, case.kernel
        assert 7 <= side <= 112 and 24 <= case.channels <= 960 and 3 <= k <= min(9, side)
        assert case.batch * side * side * case.channels <= 2**24


@pytest.mark.parametrize(
    "case",
    [Case("", 1, (h, h + s), 2, (k, k), s) for h in (6, 7) for k in (3, 5) for s in (1, 2)],
    ids=str,
)
def test_flipped_images_turn_same_into_equal_pads(case):
    def convolve(padding, flip):
        x, kernel, _ = map(jnp.asarray, case.arrays("forward"))
        x, kernel = (jnp.flip(x, (1, 2)), jnp.flip(kernel, (0, 1))) if flip else (x, kernel)
        kernel, strides = kernel.swapaxes(2, 3), (case.stride,) * 2
        numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 2}
        return lax.conv_general_dilated(x, kernel, strides, padding, **numbers)

    pads = [(k // 2, k // 2) for k in case.kernel]
    y = convolve("SAME", flip=False)
    assert y.shape == case.out_shape
    np.testing.assert_allclose(y, convolve(pads, flip=True)[:, ::-1, ::-1], rtol=1e-4, atol=1e-5)


PAIRS = [("images", peer) for peer in ("lax", "linen", "haiku", "torch")]
PAIRS += [("volumes", peer) for peer in peers.FAMILIES["volumes"]]
PAIRS += [(name, peer) for name in cases.ACTIVATIONS[1:] for peer in ("linen", "haiku", "torch")]
PAIRS += [(name, "tensorflow") for name in cases.ACTIVATIONS]
PAIRS += [("sequences", peer) for peer in ("lax", "shifts", "torch")]


@pytest.mark.parametrize(("family", "peer"), PAIRS)
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_peers_compute_what_we_compute(family, peer):
    pytest.importorskip(peers.PEERS.get(peer, "jax"))
    case = SMALLEST.get(family) or dataclasses.replace(TINY, activation=family)
    modes = cases.MODES.get(family, ("forward", "train"))
    ours, theirs = peers.WORKERS[peers.OURS](), peers.WORKERS[peer]()
    for mode in modes:
        wanted = driver.magnitudes(ours(case, mode)["jit"]())
        results = 2 if family == "sequences" else 1  # the next state
        assert len(wanted) == (results + 3 if mode == "train" else results)
        for variant in theirs(case, mode).values():
            np.testing.assert_allclose(driver.magnitudes(variant()), wanted, rtol=1e-4)


@pytest.mark.parametrize("mode", cases.MODES["sequences"])
def test_the_sum_of_shifts_is_ours_position_by_position(mode):
    case = SMALLEST["sequences"]
    ours, shifts = (peers.WORKERS[name]()(case, mode)["jit"]() for name in (peers.OURS, "shifts"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(shifts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    batch, length = {"step-1": (1, 1), "step-16": (16, 1), "chunk": (1, 16)}.get(mode, (2, 40))
    assert ours[0].shape == (batch, length, 3) and ours[1].shape == (batch, 4, 3)


# A scan


@pytest.mark.parametrize("kind", scan.KINDS)
def test_scanned_shapes(kind):
    shapes = scan.drawn(kind, 3, 100)
    assert shapes == scan.drawn(kind, 3, 100) and shapes[:5] != scan.drawn(kind, 4, 5)
    assert {len(shape.size) for shape in shapes} == {1, 2, 3}
    assert {shape.multiplier == 1 for shape in shapes} == {kind == "windows"}
    if kind == "multipliers":
        assert any(shape.strides == shape.kernel[0] > 4 for shape in shapes), "patches"
    else:
        assert any(len(set(shape.kernel)) > 1 for shape in shapes)
    for shape in shapes:
        assert min(shape.out) > 0 and shape.channels > 1
        assert shape.products <= scan.PRODUCTS and shape.channels * shape.batch <= scan.LARGEST


SCANNED = scan.Shape(2, (5, 9), 3, (2, 3), 2, 1, 4, "valid")


@pytest.mark.parametrize("shape", [SCANNED, scan.Shape(1, (7,), 2, (3,), 1, 3, 2, "same")], ids=str)
def test_a_scanned_shape_is_that_of_its_programs(shape):
    forward, specs = shape.programs("lax")["forward"]
    y = jax.eval_shape(forward, *specs)
    assert y.shape == (shape.batch, *shape.out, shape.channels * shape.multiplier)
    for method in ("auto", "lax"):
        f, specs = shape.programs(method)["input gradient"]
        assert jax.eval_shape(f, *specs).shape == (shape.batch, *shape.size, shape.channels)
        f, specs = shape.programs(method)["kernel gradient"]
        wanted = *shape.kernel, shape.channels, shape.multiplier
        assert jax.eval_shape(f, *specs).shape == wanted


def test_a_scan_lists_the_worst(monkeypatch, capsys, tmp_path):
    rows = scan.measured(SCANNED, rounds=1, budget=1e-6)
    assert [row["program"] for row in rows] == list(scan.PROGRAMS)
    assert all(row["ours"] > 0 and row["lax"] > 0 and row["memory"] >= 0 for row in rows)
    assert SCANNED.products == 2 * (2 * 4) * (2 * 3) * 3 * 4

    def made_up(shape):
        ours = [4e-3, 1e-3, 1e-3]
        values = {"shape": "a shape", "lax": 1e-3, "memory": 0.5, "products": 10**6}
        return [values | {"program": program, "ours": seconds}
                for program, seconds in zip(scan.PROGRAMS, ours, strict=True)]  # fmt: skip

    monkeypatch.setattr(scan, "measured", made_up)
    file = tmp_path / "scan.json"
    assert program.main(["--scan", "windows", "1", "2", "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())) == 6
    text = capsys.readouterr().out
    first = next(line for line in text.splitlines() if "a shape" in line)
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "a shape", "forward", "4.00", "1.00", "4.00x", "4000", "0.500x"
    ]  # fmt: skip
    assert text.endswith("2 of 6 programs take more than 1.1 times XLA's time.\n")


# Stacks


@pytest.mark.parametrize("name", stacks.STACKS)
def test_gradients_of_a_stack(name):
    f, arguments = stacks.gradients(name, "auto")
    lax_, _ = stacks.gradients(name, "lax")
    kernels, images = arguments
    found, wanted = jax.eval_shape(f, *arguments), jax.eval_shape(lax_, *arguments)
    assert found == wanted == (kernels if name in stacks.EQUAL else (kernels, images))
    texts = [jax.jit(g).lower(*arguments).as_text() for g in (f, lax_)]
    assert ["stablehlo.convolution" in text for text in texts] == [False, True]


def test_stacks_are_compiled_by_both_methods(monkeypatch):
    monkeypatch.setattr(stacks, "STACKS", {"2 of 3x3": [((5, 6, 4), 3)] * 2})
    monkeypatch.setattr(stacks, "EQUAL", stacks.STACKS)
    methods, gradients, cleared = [], stacks.gradients, []
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(True))

    def recorded(name, method):
        methods.append(method)
        return gradients(name, method)

    monkeypatch.setattr(stacks, "gradients", recorded)
    (row,) = stacks.stacks(rounds=2)
    assert row["stack"] == "2 of 3x3" and [*row] == ["stack", "auto", "lax"]
    assert all(len(row[method]) == 2 and min(row[method]) > 0 for method in stacks.METHODS)
    assert methods == ["auto", "lax", "lax", "auto"] and len(cleared) == 4


def test_the_table_of_stacks(monkeypatch, capsys, tmp_path):
    made_up = {"a": {"auto": [9, 3, 2], "lax": [1, 1, 5]}, "b": {"auto": [12], "lax": [1]}}
    rounds = []

    def measured(name, count):
        rounds.append(count)
        return {"stack": name} | made_up[name]

    monkeypatch.setattr(stacks, "STACKS", made_up)
    monkeypatch.setattr(stacks, "measured", measured)
    file = tmp_path / "stacks.json"
    assert program.main(["--stacks", "--rounds", "4", "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == [measured(name, 0) for name in made_up]
    text = capsys.readouterr().out
    assert "| a " in text and "3.00 |" in text and "3.00x |" in text
    assert text.endswith("Geometric mean 6.00x, at most 12.0x.\n")
    assert program.main(["--stacks", "--quick"]) == program.main(["--stacks"]) == 0
    assert rounds == [4, 4, 0, 0, 3, 3, 5, 5]


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_run_of_stacks_that_is_stopped(name, monkeypatch, capsys):
    def measured(stack, _):
        if stack == name:
            raise KeyboardInterrupt
        return {"stack": stack, "auto": [2], "lax": [1]}

    monkeypatch.setattr(stacks, "STACKS", {"a": [], "b": []})
    monkeypatch.setattr(stacks, "measured", measured)
    assert program.main(["--stacks"]) == 130
    assert ("at most 2.00x" in capsys.readouterr().out) == (name == "b")


# How it is timed


@pytest.mark.parametrize(
    ("durations", "fresh", "budget", "first", "counted"),
    [
        ([9, 1, 1, 3, 2, 3], True, 8, 9, [3, 2, 3]),  # compiles, warms up, counts
        ([9, 1, 1, 3, 1, 2, 4], True, 8, 9, [3, 1, 2, 4]),  # 2: not the least
        ([1, 1, 3, 3, 3], False, 8, 1, [3, 3, 3]),
        ([30, 20], True, 8, 30, [20]),  # slow: once more after it compiled
        ([20], False, 8, 20, [20]),
        ([9], True, 0, 9, [None]),  # nothing but the first call
    ],
)
def test_measure(durations, fresh, budget, first, counted, monkeypatch):
    clock, left = [0.0], list(durations)

    def call():
        clock[0] += left.pop(0)
        return {"a": np.full(2, -3.0)}

    monkeypatch.setattr(driver.time, "perf_counter", lambda: clock[0])
    lower_quartile = sorted(counted)[len(counted) // 4]
    magnitudes = [3.0] if fresh else None
    assert driver.measure(call, budget, fresh) == (first, lower_quartile, magnitudes)
    assert not left


def fake(other=False):
    """A worker that computes nothing, and fails in every way."""

    def build(name, mode):
        if name == "impossible":
            raise ValueError("cannot do that\nin detail")
        if other and name == "hang":
            time.sleep(1000)
        if other and name == "crash":
            print("first", "out of memory", sep="\n", flush=True)
            os._exit(3)
        return {"call": lambda: [np.ones(2) + (other and name == "different")]}

    return build


SETTINGS = "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX"


def settings():
    """A worker that says how it allocates memory."""
    return lambda *_: {"": lambda: [np.array(float(os.environ.get(s, -1))) for s in SETTINGS]}


@pytest.mark.parametrize(("name", "found"), [("torch", [0, 2**40, 1]), ("keras-torch", [1, 1, 1])])
def test_workers_of_layers_keep_their_memory(name, found, monkeypatch):
    for setting in SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    monkeypatch.setitem(driver.WORKERS, name, settings)
    worker = driver.Worker(name, False)
    try:
        assert worker.ask("a layer", "forward", 0.0)[""][-1] == found
    finally:
        worker.close()


def broken():
    """A worker that does not start."""
    raise ImportError("no such framework")


def test_workers_that_fail_are_reported_and_the_others_go_on(monkeypatch, capsys):
    started = []

    class Impatient(driver.Worker):
        def __init__(self, name, *args):
            super().__init__(name, *args)
            self.name = name
            started.append(name)

        def ask(self, subject, *args):
            if self.ready:  # Ctrl-C reaches the processes of a terminal, and is the driver's
                os.kill(self.process.pid, signal.SIGINT)
            hangs = (self.name, subject) == ("bad", "hang")
            monkeypatch.setattr(driver, "TIMEOUT", 0.5 if hangs else 600)
            return super().ask(subject, *args)

    workers = {
        "good": functools.partial(fake),
        "bad": functools.partial(fake, True),
        "broken": broken,
    }
    monkeypatch.setattr(driver, "WORKERS", workers)
    monkeypatch.setattr(driver, "Worker", Impatient)
    names, subjects = [*workers], ["fine", "different", "impossible", "hang", "crash", "last"]
    results = driver.Results()
    driver.take_turns([(subject, "forward", names) for subject in subjects], 2, 1e-4, results)

    assert results.failures == {
        "broken": "ImportError: no such framework",
        "bad, different forward": "its results are not those of the others",
        "good, impossible forward": "ValueError: cannot do that",
        "bad, impossible forward": "ValueError: cannot do that",
        "bad, hang forward": "no answer within 0.5 s",
        "bad, crash forward": "its process ended with code 3: out of memory",
    }
    assert (
        "bad, crash forward: its process ended with code 3: out of memory\n"
        in capsys.readouterr().err
    )
    rounds = {(label, name): len(t["seconds"]) for (label, _, name, _), t in results.times.items()}
    good = ["fine", "different", "hang", "crash", "last"]
    assert rounds == {(s, "good"): 2 for s in good} | {("fine", "bad"): 2, ("last", "bad"): 2}
    assert started == ["good", "bad", "broken", "bad", "bad"]
    assert len(results.times["last", "forward", "good", "call"]["first"]) == 1  # of each process


def test_ctrl_c_keeps_what_has_been_measured(tmp_path, capsys, monkeypatch):
    def interrupted(turns, rounds, budget, results, device):
        results.add(SMALL.label, "forward", peers.OURS, {"jit": (2.0, 1.0, [1.0])})
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "take_turns", interrupted)
    monkeypatch.setattr(cases, "layers", lambda *args: [SMALL])
    path = tmp_path / "run.json"
    assert program.main(["--layers", "--peers", "linen", "--json", str(path)]) == 130
    assert "stopped before the end" in capsys.readouterr().out
    assert json.loads(path.read_text())["times"][0]["seconds"] == [1.0]


def test_a_real_run_and_its_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cases, "layers", lambda *args: [TINY])
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    path, picture = tmp_path / "run.json", tmp_path / "run.png"
    argv = ["--quick", "--layers", "tiny", "--peers", "linen", "--rounds", "2"]
    assert program.main([*argv, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(path.read_text())
    assert document["command"].endswith(f"--rounds 2 --json {path}")
    assert document["environment"]["XLA_FLAGS"] == "--xla_backend_optimization_level=0"
    assert document["machine"]["cpu"] and document["versions"]["jax"] and not document["failures"]
    assert {(row["case"], row["mode"], row["peer"]) for row in document["times"]} == {
        ("tiny/2", mode, peer) for mode in ("forward", "train") for peer in (peers.OURS, "linen")
    }
    assert all(len(t["seconds"]) == 2 and min(t["seconds"]) > 0 for t in document["times"])

    monkeypatch.setattr(run, "run", lambda *args: pytest.fail("it times again"))
    assert program.main(["--report", str(path), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out == printed and "tiny/2, 5x6x4 k3x3 s2" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


# What is reported


def document(**times):
    """A document with two layers and one network; every time took 1.5 times as long in a round."""
    return {
        "command": "python -m flax_dwconv.benchmark",
        "machine": {"cpu": "CPU", "architecture": "v1", "cores": 2, "system": "Linux"},
        "versions": {"jax": "1.0"},
        "environment": {"XLA_FLAGS": "--a"},
        "commit": None,
        "rounds": 2,
        "stopped": False,
        "modes": ["forward", "train"],
        "cases": [{"label": case.label, "sizes": case.sizes} for case in (SMALL, TINY)],
        "networks": ["MobileNetV2", "ConvNeXtTiny"],
        "peers": ["torch", "linen"],
        "failures": {"haiku": "absent"},
        "times": [
            {"case": case, "mode": mode, "peer": peer, "variant": variant}
            | {"seconds": [1.5 * seconds, seconds] if seconds else [], "first": first}
            for case, mode, peer, variant, seconds, first in [
                ("small/1", "forward", peers.OURS, "jit", 1e-3, [3e-3]),
                ("small/1", "forward", "torch", "contiguous", 9e-3, [9e-3]),
                ("small/1", "forward", "torch", "channels-last", 0.5e-3, [5e-3]),
                ("small/1", "forward", "linen", "jit", 20e-3, [20e-3]),
                ("tiny/2", "forward", peers.OURS, "jit", 2e-3, [4e-3]),
                ("tiny/2", "forward", "torch", "contiguous", 8e-3, [8e-3]),
                ("tiny/2", "train", peers.OURS, "jit", 4e-3, [4e-3]),
                ("tiny/2", "train", "linen", "jit", 6e-3, [4e-3]),
                ("small/1", "train", peers.OURS, "jit", None, []),
                ("MobileNetV2", "infer", peers.PLAIN, "jit", 0.12, [2.12, 1.12]),
                ("MobileNetV2", "infer", peers.FAST, "jit", 0.02, [2.52, 9.02]),
                ("MobileNetV2", "infer", "keras-torch", "eager", 1.0, [0.1]),
            ]
        ],
    }


def rows(text):
    """The cells of every line of a Markdown table."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_the_tables():
    text = report.markdown(document())
    table = rows(text)
    for row in [
        ["forward", "ms", "spread", "over PyTorch", "over flax.linen"],
        ["small/1, 4x4x8 k3x3 s1", "1.00", "1.25", "0.500x", "20.0x"],
        ["tiny/2, 5x6x4 k3x3 s2", "2.00", "1.25", "4.00x", "-"],
        ["small/1, 4x4x8 k3x3 s1", "-", "-", "-", "-"],
        ["over, 2 layers", "PyTorch", "flax.linen"],
        ["forward", "1.41x", "20.0x"],  # sqrt(0.5 * 4)
        ["forward, worst case", "0.500x", "20.0x"],
        ["forward and gradients", "-", "1.50x"],
        [
            "MobileNetV2, inference",
            "120",
            "20.0",
            "-",
            "-",
            "1000",
            "6.00x",
            "-",
            "1.00 -> 2.50 s",
        ],
        ["MobileNetV2, train step", *"-" * 7, "- -> - s"],
    ]:
        assert row in table
    names = [
        f"{n}, {w}" for n in ("MobileNetV2", "ConvNeXtTiny") for w in ("inference", "train step")
    ]
    assert [row[0] for row in table if row and "Net" in row[0].replace("NeXt", "Net")] == names
    lines = text.splitlines()
    assert "CPU (v1), 2 cores, Linux; jax 1.0, XLA_FLAGS=--a" in lines
    assert "failed: haiku: absent" in lines
    assert (
        "- forward, over the fastest peer of each layer: 1.41x; slower in 1 of 2, at worst "
        "0.500x, small/1, PyTorch; 4.00x, tiny/2, PyTorch" in lines
    )
    assert "- forward, spread, medians: ours 1.25, PyTorch 1.25, flax.linen 1.25" in lines


@pytest.mark.parametrize("name", ["speed", "sequences", "volumes"])
def test_the_readme_has_the_table_of_the_committed_run(name):
    root = pathlib.Path(__file__).parents[1]
    found = report.Report(json.loads((root / ".github" / f"{name}.json").read_text()))
    table, _, _ = report.summary(found).partition("\n\n")
    assert table in (root / "README.md").read_text()


def test_the_readme_begins_with_the_means_of_the_committed_run():
    root = pathlib.Path(__file__).parents[1]
    found = report.Report(json.loads((root / ".github" / "speed.json").read_text()))
    readme = (root / "README.md").read_text()
    over = {mode: np.exp(np.log(found.speedups(mode)).mean()) for mode in found.modes}
    first = " ".join(readme.split("## ")[0].split())
    assert f"{over['forward']['linen']:.0f} times as fast as `flax.linen.Conv`" in first
    assert f"with its gradients {over['train']['linen']:.0f} times" in first
    assert f"faster forward, with {over['forward']['torch']:.2f} of the time" in first
    assert f"slower with gradients, with {over['train']['torch']:.2f} of it" in first


def test_the_readme_has_the_networks_of_the_committed_run():
    root = pathlib.Path(__file__).parents[1]
    found = report.Report(json.loads((root / ".github" / "networks.json").read_text()))
    cells = {
        row[0]: row[1:6]
        for line in (root / "README.md").read_text().splitlines()
        if len(row := [cell.strip() for cell in line.strip("|").split("|")]) == 8
    }
    for line in report.networks(found).splitlines()[2:]:
        name, *times = (cell.strip() for cell in line.strip("|").split("|"))
        assert cells[name] == times[:5]


def test_the_tables_of_sequences():
    found = document()
    found |= {"modes": ["forward", "step-1"], "networks": [], "peers": ["torch", "shifts"]}
    found["times"] = [
        {"case": case, "mode": mode, "peer": peer, "variant": ""}
        | {"seconds": [seconds], "first": [first]}
        for case, mode, peer, seconds, first in [
            ("small/1", "forward", peers.OURS, 1e-3, 0.4),
            ("small/1", "forward", "shifts", 2e-3, 0.1),
            ("tiny/2", "forward", peers.OURS, 1e-3, 0.9),
            ("tiny/2", "forward", "shifts", 0.5e-3, 0.9),
            ("tiny/2", "step-1", peers.OURS, 2e-5, 0.3),
            ("tiny/2", "step-1", "torch", 1e-5, 0.3),
        ]
    ]
    text = report.markdown(found)
    table, lines = rows(text), text.splitlines()
    assert ["forward", "-", "1.00x"] in table and ["forward, worst case", "-", "0.500x"] in table
    assert ["step of 1, worst case", "0.500x", "-"] in table
    assert "- forward, first call, ours over the sum of shifts: 2.00x" in lines  # sqrt(4 * 1)
    assert "- step of 1, first call, ours over the sum of shifts: -" in lines
    assert "sum of shifts: " not in report.markdown(document())


@pytest.mark.parametrize("empty", [False, True])
def test_the_picture(empty, tmp_path):
    times = document() | ({"times": []} if empty else {})
    report.draw(times, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert "<svg" in text
    assert "PyTorch" not in report.markdown(times | {"peers": [], "cases": [], "networks": []})


# The command line


@pytest.mark.parametrize(
    ("argv", "layers", "networks"),
    [
        ([], 114, 3),
        (["--quick"], 12, 0),
        (["--device"], 114, 0),
        (["--layers"], 114, 0),
        (["--layers", "Xception*", "MobileNetV1-7/32", "Xception-1"], 19, 0),
        (["--networks"], 0, 3),
        (["--networks", "MobileNetV2", "ConvNeXtTiny", "--layers", "ConvNeXtTiny-1"], 2, 2),
        (["--networks", "--batch", "8"], 0, 3),
        (["--family", "sequences"], 6, 0),
        (["--family", "volumes", "--quick"], 5, 0),
    ],
)
def test_what_is_chosen(argv, layers, networks):
    args = program.parse(argv)
    assert (len(args.cases), len(args.networks)) == (layers, networks)
    assert args.peers == list(peers.FAMILIES[args.family])


def test_the_batch_of_networks():
    """It is a part of the name, in the table too."""
    args = program.parse(["--networks", "MobileNetV2", "ConvNeXtTiny", "--batch", "8"])
    assert args.networks == ["MobileNetV2/8", "ConvNeXtTiny/8"]


def test_a_network_has_its_batch(monkeypatch):
    keras = pytest.importorskip("keras")
    monkeypatch.setattr(keras.applications, "MobileNetV2", lambda **_: "model")
    build = peers.keras_network(lambda model, x, loss, train: (model, x.shape, loss.args[0].shape))
    assert build("MobileNetV2/8", "train") == {"": ("model", (8, 224, 224, 3), (8,))}
    assert build("MobileNetV2", "train") == {"": ("model", (1, 224, 224, 3), (1,))}


def test_what_is_drawn():
    args = program.parse(["--draw", "0", "7"])
    assert args.cases == cases.drawn(0, 7) and not args.networks
    assert args.peers == ["torch", "tensorflow"]
    assert program.parse(["--draw", "0", "7", "--peers", "linen"]).peers == ["linen"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--peers", "numpy"], "argument --peers: invalid choice: 'numpy'"),
        (
            ["--networks", "--batch", "0"],
            "argument --batch: must be at least 1 and with --networks",
        ),
        (["--quick", "--batch", "8"], "argument --batch: must be at least 1 and with --networks"),
        (["--networks", "VGG16"], "argument --networks: invalid choice: 'VGG16'"),
        (["--rounds", "0"], "argument --rounds: must be at least 1, got 0."),
        (["--layers", "VGG*"], "argument --layers: must match names of layers, got 'VGG*'."),
        (["--draw", "1", "2", "--layers"], "not allowed with argument"),
        (
            ["--peers", "shifts"],
            "argument --peers: must be of torch, tensorflow, linen, haiku, got s",
        ),
        (["--family", "volumes", "--draw", "0", "1"], "must be of --family images, got volumes."),
        (["--plot", "a.gif"], "argument --plot: must end in .png, .svg or .pdf, got 'a.gif'."),
        (["--json", "absent/a.json"], "must be in a folder that exists, got 'absent/a.json'."),
        (["--scan", "layers", "0", "1"], "argument --scan: must be multipliers or windows and two"),
        (["--scan", "windows", "0", "-1"], "got windows 0 -1."),
        (["--scan", "windows", "0", "1", "--draw", "0", "1"], "not allowed with argument"),
        (["--networks", "--plot", "a.png"], "needs layers, which --networks alone leaves out."),
    ],
)
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(argv)
    assert message in capsys.readouterr().err


def test_absent_packages_are_named(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(driver, "take_turns", lambda turns, *args: asked.extend(turns[0][-1]))
    monkeypatch.setitem(program.sys.modules, "torch", None)
    assert program.main(["--quick", "--peers", "torch", "linen"]) == 1  # nothing was measured
    assert asked == [peers.OURS, "linen"]
    what = "'flax_dwconv[bench]'" if program.sys.version_info < (3, 12) else "torch"
    assert f"failed: torch: absent (pip install {what})" in capsys.readouterr().out
    monkeypatch.setitem(program.sys.modules, "tabulate", None)
    with pytest.raises(SystemExit, match="2"):
        program.main(["--quick"])
    assert "needs tabulate: pip install 'flax_dwconv[bench]'." in capsys.readouterr().err


def test_a_report_of_what_is_none(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    assert program.main(["--report", str(tmp_path / "a.json")]) == 1
    assert program.main(["--report", str(tmp_path / "b.json")]) == 1
    assert capsys.readouterr().err.count("The benchmark could not finish: ") == 2
