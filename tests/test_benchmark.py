"""The benchmark: its arithmetic on made-up times, its workers on tiny cases, its refusals."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_dwconv import benchmark
from flax_dwconv.benchmark import OURS, Case, Figure, Goal, Machine, Results, Summary, Timing

SMALL = Case("small", 1, 4, 4, 8, 3, 2, "same")
BIG = Case("big", 2, 64, 64, 64, 3, 1, "valid")


def made_up():
    """Two cases, two peers, two rounds: forward takes ours 1 and 4, train 3 and 6 seconds."""
    results = Results()
    for case, mode, ours in [
        (SMALL, "forward", 1.0),
        (BIG, "forward", 4.0),
        (benchmark.doubled(BIG), "forward", 10.0),
        (SMALL, "train", 3.0),
        (BIG, "train", 6.0),
    ]:
        times = {OURS: {"jit": ours}}
        if case in (SMALL, BIG):
            times["torch"] = {"channels-last": 2.0, "contiguous": 8.0}
            times["linen"] = {"jit": 21 * ours}
        for worker, variants in times.items():
            for round_, slower in enumerate((1.5, 1.0)):
                answer = {v: {"first": 30.0, "seconds": s * slower} for v, s in variants.items()}
                results.add((case.label, mode, worker), round_, answer)
    seconds = {"numpy": 4.0, "jax": 2.0, **{str(moved): 1.0 for moved in benchmark.COPIES}}
    answer = {variant: {"first": 1.0, "seconds": s} for variant, s in seconds.items()}
    results.add(("machine", "limit", "machine"), 0, answer)
    return results


def summary(**kwargs):
    return Summary(made_up(), [SMALL, BIG], ["torch", "linen"], **kwargs)


# Cases


def test_cases():
    cases = benchmark.cases()
    assert len({case.label for case in cases}) == len(cases) == 2 * 57
    assert len({dataclasses.replace(case, name="") for case in cases}) == len(cases)
    assert {case.n for case in cases} == {1, 8, 32}
    assert {case.name.split("-")[0] for case in cases} == {
        "MobileNetV1",
        "MobileNetV2",
        "MobileNetV3",
        "EfficientNet",
        "Xception",
        "ConvNeXtTiny",
    }
    quick = benchmark.cases(quick=True)
    assert len(quick) == 12 and set(quick) < set(cases)
    assert cases[0] == Case("MobileNetV1-1", 1, 112, 112, 32, 3, 1, "same")


def test_a_case_counts_bytes_and_operations():
    assert SMALL.out_shape == (1, 2, 2, 8) and BIG.out_shape == (2, 62, 62, 64)
    assert SMALL.moved("forward") == 4 * (128 + 32 + 72 + 8)
    assert SMALL.moved("train") == 2 * SMALL.moved("forward")
    assert SMALL.operations("forward") == 2 * 9 * 32
    assert SMALL.operations("train") == 3 * SMALL.operations("forward")


def convolve(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel.swapaxes(2, 3),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@pytest.mark.parametrize(
    "case", [Case("", 1, h, h + s, 2, k, s, "same") for h in (6, 7) for k in (3, 5) for s in (1, 2)]
)
def test_flipped_images_turn_same_into_equal_pads(case):
    x, kernel, *_ = map(jnp.asarray, case.arrays())
    flipped, flipped_kernel, *_ = map(jnp.asarray, case.arrays(flip=True))
    y = convolve(x, kernel, case.stride, "SAME")
    pads = ((case.k // 2, case.k // 2),) * 2
    flipped_y = convolve(flipped, flipped_kernel, case.stride, pads)
    assert y.shape == case.out_shape
    np.testing.assert_allclose(y, flipped_y[:, ::-1, ::-1], rtol=1e-4, atol=1e-5)


# Arithmetic


def test_geometric_mean():
    assert benchmark.geometric_mean([0.5, 8]) == pytest.approx(2)
    assert benchmark.geometric_mean(iter([3])) == pytest.approx(3)
    assert benchmark.geometric_mean([]) is None


@pytest.mark.parametrize(
    ("durations", "fresh", "first", "counted"),
    [
        ([9, 1, 1, 3, 2, 3], True, 9, [3, 2, 3]),  # compiles, warms up, counts
        ([1, 1, 3, 3, 3], False, 1, [3, 3, 3]),
        ([30, 20], True, 30, [20]),  # slow: once more after it compiled
        ([20], False, 20, [20]),
    ],
)
def test_measure(durations, fresh, first, counted, monkeypatch):
    clock, left = [0.0], list(durations)

    def call():
        clock[0] += left.pop(0)
        return "result"

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])
    found = benchmark.measure(call, budget=8, fresh=fresh)
    assert found == (first, sorted(counted)[len(counted) // 4], "result")
    assert not left


def test_a_timing_keeps_the_minimum_and_its_spread():
    timing = Timing(5.0, {0: 1.0, 1: 1.5, 2: 2.0})
    assert (timing.best, timing.spread, timing.compile) == (1.0, 1.5, 4.0)
    assert Timing(0.5, {0: 1.0}).compile == 0


def test_the_better_variant_counts():
    results = made_up()
    assert results.timing("small/1", "forward", "torch").best == 2
    assert results.timing("small/1", "forward", "haiku") is None
    assert results.table()["small/1", "forward", "torch"] == 2
    assert results.table(0)["small/1", "forward", "torch"] == 3
    assert ("machine", "limit", "machine") not in results.table(1)


def test_results_that_differ_are_reported(capsys):
    results = Results()
    for worker, magnitude in [(OURS, 1.0), ("torch", 1.0001), ("haiku", 1.01)]:
        time = {"first": 1.0, "seconds": 1.0, "magnitudes": [magnitude, 2.0]}
        results.add(("small/1", "train", worker), 0, {"jit": time})
    for worker in ("torch", "haiku", "linen"):
        results.compare("small/1", "train", worker, OURS)
    message = "its results are not those of flax_dwconv"
    assert results.failures == {"haiku, small/1 train": message}
    assert message in capsys.readouterr().err


def test_ratios_to_the_best_of_the_others():
    table = {("a", "forward", OURS): 2.0, ("a", "forward", "x"): 8.0, ("a", "forward", "y"): 4.0}
    labels, modes = ["a", "b"], ["forward", "train"]
    assert benchmark.ratios(table, labels, modes, OURS, ["x", "y", "z"]) == {("a", "forward"): 0.5}
    assert benchmark.ratios(table, labels, modes, OURS, ["z"]) == {}


def test_figure_has_the_range_of_the_rounds():
    tables = [{"a": 2.0}, {"a": 3.0}, {}, {"a": 2.5}]
    assert benchmark.figure(lambda table: table.get("a"), tables) == Figure(2.0, 2.5, 3.0)
    assert benchmark.figure(lambda table: None, tables) == Figure(None, None, None)


def test_roofline():
    machine = Machine(peak=100.0, bandwidth={1000: 50.0, 100_000: 10.0})
    assert machine.limit(moved=1000, operations=1000) == 20  # bytes, out of a cache
    assert machine.limit(moved=1000, operations=5000) == 50  # operations
    assert machine.limit(moved=50_000, operations=0) == 5000  # bytes, out of memory
    seconds = {str(moved): 2.0 for moved in benchmark.COPIES} | {"numpy": 4.0, "jax": 2.0}
    machine = Machine.of(seconds)
    assert machine.peak == benchmark.MATRIX**3
    assert machine.bandwidth[2**20] == 2**24 and machine.bandwidth[2**28] == 2**27


def test_summary():
    found = summary()
    assert found.layer_mean("forward").value == pytest.approx(1)  # 1/2 and 4/2
    assert found.layer_mean("train").value == pytest.approx(math.sqrt(4.5))  # 3/2 and 6/2
    assert found.layer_worst("forward", "train") == Figure(3.0, 3.0, 3.0)
    assert found.over("linen", "train").value == pytest.approx(21)
    assert found.over("haiku", "train") == Figure(None)
    assert found.doubling("forward", "train").value == pytest.approx(2.5)
    # Only the big case is above 1 MB, and the machine moves them at 32 MiB/s.
    limits = [max(BIG.moved(m) / 2**25, BIG.operations(m) / 1024**3) for m in ("forward", "train")]
    assert found.distance("train").value == pytest.approx(6 / limits[1])
    both = math.sqrt(4 / limits[0] * 6 / limits[1])
    assert found.distance("forward", "train").value == pytest.approx(both)


@pytest.mark.parametrize(
    ("reached", "speedup", "verdict"),
    [
        (1.0, False, "aim"),
        (1.5, False, "at least"),
        (2.5, False, "missed"),
        (2.5, True, "aim"),
        (1.5, True, "missed"),
        (None, True, "not measured"),
    ],
)
def test_verdict(reached, speedup, verdict):
    at_least, aim = (2.0, 2.5) if speedup else (2.0, 1.0)
    assert Goal("", at_least, aim, Figure(reached), speedup).verdict == verdict


# What is printed, saved and drawn


def test_table_of_the_cases():
    small, big = benchmark.describe_layers(summary(), "forward").splitlines()[1:]
    assert small.split()[:-1] == (
        "small 1 4 4 8 3 2 same 1000.000 1.25 0.50 0.048 torch 1.25".split()
    )
    assert big.split()[:-1] == (
        "big 2 64 64 64 3 1 valid 4000.000 1.25 2.00 0.048 torch 1.25".split()
    )


def test_summary_of_the_layers_in_words():
    text = benchmark.describe_layer_summary(summary())
    assert "forward, our time / best peer's, geometric mean of 2 cases: 1.00 (rounds" in text
    assert "train, worst case: 3.00 (rounds 3.00..3.00), big/2" in text
    assert "forward, speed-up over linen, geometric mean: 21.0x" in text
    assert "forward, compile time of flax_dwconv: median 27.5 s, longest 29.0 s, small/1" in text
    assert "GB/s at 1 MiB" in text
    assert "geometric mean of 1 cases above 1 MB" in text
    assert "geometric mean of 1 cases: 2.50x (rounds 2.50..2.50x), worst 2.50x" in text


def test_networks_and_the_reach_table():
    results, compile_ = made_up(), {}
    for name, seconds in {
        benchmark.PLAIN: 12.0,
        benchmark.FAST: 2.0,
        "keras-tensorflow": 4.0,
        "keras-torch": 5.0,
    }.items():
        for mode in benchmark.NETWORK_MODES:
            answer = {"jit": {"first": 50.0, "seconds": seconds}}
            results.add(("MobileNetV2", mode, name), 0, answer)
    for mode, plain in (("infer", 10.0), ("train", 8.0)):
        compile_["MobileNetV2", mode, benchmark.PLAIN] = plain
        compile_["MobileNetV2", mode, benchmark.FAST] = 12.0
    found = Summary(results, [SMALL, BIG], ["torch", "linen"], ["MobileNetV2"], compile_)
    infer = benchmark.describe_networks(found).splitlines()[1]
    for text in ("MobileNetV2 infer", "12000.0 ~1.00", "6.00x", "0.50", "10.0 s", "12.0 s", "1.20"):
        assert text in infer
    goals = found.goals()
    assert len(goals) == 15
    assert {goal.name: goal.verdict for goal in goals} == {
        "layer forward / best peer": "missed",
        "layer train step / best peer": "missed",
        "worst single case, either": "missed",
        "over flax.linen.Conv, forward": "at least",
        "over flax.linen.Conv, train step": "missed",
        "MobileNetV2 over plain JAX, infer": "aim",
        "EfficientNetB0 over plain JAX, infer": "not measured",
        "ConvNeXtTiny over plain JAX, infer": "not measured",
        "MobileNetV2 over plain JAX, train": "at least",
        "EfficientNetB0 over plain JAX, train": "not measured",
        "ConvNeXtTiny over plain JAX, train": "not measured",
        "network / best of Keras's TF, torch: worst": "aim",
        "network compile time / plain JAX: worst": "at least",
        "machine's limit, cases above 1 MB": "missed",
        "time when the batch doubles": "missed",
    }
    row = benchmark.describe_goals(goals).splitlines()[4]
    assert row.split() == "over flax.linen.Conv, forward 20x 30x 21.0x 21.0..21.0x at least".split()


def test_nothing_measured_can_be_described():
    found = Summary(Results(), [SMALL], ["torch"], ["MobileNetV2"])
    texts = [
        benchmark.describe_layers(found, "train"),
        benchmark.describe_layer_summary(found),
        benchmark.describe_networks(found),
        benchmark.describe_goals(found.goals()),
    ]
    assert all("-" in text for text in texts)
    json.loads(benchmark.as_json(found))


def test_device_table():
    results = Results()
    times = {"auto": {"first": 1.0, "seconds": 0.001}, "lax": {"first": 1.0, "seconds": 0.002}}
    results.add(("small/1", "train", "device"), 0, times)
    row = benchmark.describe_device(Summary(results, [SMALL], [])).splitlines()[1]
    assert row.split() == "small/1 train 1.000 2.000 1.00 1.00 0.50".split()


@pytest.mark.parametrize("results", [made_up(), Results()], ids=["made up", "empty"])
def test_chart(results, tmp_path):
    path = tmp_path / "chart.png"
    benchmark.draw(Summary(results, [SMALL, BIG], ["torch", "linen"]), path)
    assert path.read_bytes().startswith(b"\x89PNG")


# Workers


TINY = Case("tiny", 2, 5, 6, 4, 3, 2, "same")


@pytest.mark.parametrize("peer", ["linen", "haiku", "torch"])
@pytest.mark.parametrize("mode", benchmark.LAYER_MODES)
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_peers_compute_what_we_compute(peer, mode):
    pytest.importorskip(benchmark.PEERS[peer][0])
    ours = benchmark.WORKERS[OURS]()(TINY, mode)["jit"]()
    for variant in benchmark.WORKERS[peer]()(TINY, mode).values():
        found = benchmark._magnitudes(variant())
        np.testing.assert_allclose(found, benchmark._magnitudes(ours), rtol=1e-4)


def test_a_run_with_linen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "cases", lambda quick=False: [SMALL, TINY])
    monkeypatch.setattr(benchmark, "BUDGET", (0.001, 0.001))
    path = tmp_path / "times.json"
    argv = ["--layers", "--peers", "linen", "--rounds", "2", "--json", str(path)]
    assert benchmark.main(argv) == 0
    out = capsys.readouterr().out
    assert "failed" not in out and "absent" not in out
    assert " cores, " in out and " jax " in out
    for line in ("small ", "tiny ", "layer forward / best peer ", "over flax.linen.Conv, forward "):
        assert f"\n{line}" in out
    saved = json.loads(path.read_text())
    assert saved["command"].endswith("--layers --peers linen --rounds 2 --json " + str(path))
    workers = {(raw["case"], raw["mode"], raw["worker"]) for raw in saved["raw"]}
    assert workers - {("machine", "limit", "machine")} == {
        (label, mode, worker)
        for label in ("small/1", "tiny/2", "tiny doubled/4")
        for mode in benchmark.LAYER_MODES
        for worker in ([OURS] if "doubled" in label else [OURS, "linen"])
    }
    assert all(len(raw["seconds"]) == 2 and min(raw["seconds"]) > 0 for raw in saved["raw"])
    assert all(rate > 0 for rate in saved["machine"]["bandwidth"].values())


def test_a_worker_that_fails_or_dies_is_reported_and_no_more(capsys):
    results = Results()
    impossible = dataclasses.replace(TINY, name="impossible", padding="nonsense")
    with pytest.raises(KeyboardInterrupt):
        with benchmark.Crew(["linen"], results) as crew:

            def ask(case, round_=0):
                crew.ask("linen", case, case.label, "forward", 0.001, round_)

            ask(impossible)
            ask(TINY)
            crew._workers["linen"]._process.kill()
            crew._workers["linen"]._process.wait()
            ask(TINY, 1)
            ask(SMALL)
            processes = [worker._process for worker in crew._workers.values()]
            raise KeyboardInterrupt
    assert [key[0] for key in results.timings] == ["tiny/2", "small/1"]
    assert list(results.timings["tiny/2", "forward", "linen"]["jit"].rounds) == [0, 1]
    assert list(results.failures) == ["linen, impossible/2 forward"]
    assert all(process.poll() is not None for process in processes)


# The command line


def no_run(monkeypatch, then=lambda *args: None):
    """Replaces what takes time."""
    monkeypatch.setattr(benchmark, "run_layers", then)
    monkeypatch.setattr(benchmark, "run_networks", lambda *args: {})


def test_an_absent_peer_is_named(capsys, monkeypatch):
    asked = []
    no_run(monkeypatch, lambda layers, peers, *args: asked.extend(peers))
    monkeypatch.setitem(benchmark.sys.modules, "torch", None)
    assert benchmark.main(["--quick", "--peers", "torch,linen"]) == 1  # nothing was measured
    assert asked == ["linen"]
    assert "absent, skipped: torch (pip install 'flax_dwconv[bench]')" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "layers", "networks", "rounds"),
    [
        ([], 114, 3, 5),
        (["--quick"], 12, 0, 3),
        (["--layers"], 114, 0, 5),
        (["--layers", "Xception*,MobileNetV1-7/32", "--rounds", "7"], 19, 0, 7),
        (["--networks"], 0, 3, 5),
        (["--networks", "MobileNetV2"], 0, 1, 5),
        (["--networks", "MobileNetV2,ConvNeXtTiny", "--layers", "ConvNeXtTiny-1"], 2, 2, 5),
    ],
)
def test_what_is_chosen(argv, layers, networks, rounds):
    args = benchmark._parse(argv)
    assert (len(args.cases), len(args.networks), args.rounds) == (layers, networks, rounds)
    assert args.peers == list(benchmark.PEERS)


PEERS = "argument --peers: must be some of torch,tensorflow,linen,haiku, got {!r}."
ROUNDS = "argument --rounds: must be an integer from 1 to 1000, got {!r}."


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *[(["--peers", text], PEERS.format(text)) for text in ("", "numpy", "torch,", "Torch")],
        *[(["--rounds", text], ROUNDS.format(text)) for text in ("0", "-1", "1.5", "1001", "1e9")],
        (
            ["--networks", "VGG16"],
            "argument --networks: must be some of MobileNetV2,EfficientNetB0,ConvNeXtTiny, "
            "got 'VGG16'.",
        ),
        (["--layers", "VGG*"], "argument --layers: must match names of layers, got 'VGG*'."),
        (
            ["--quick", "--layers", "Xception-9"],
            "argument --layers: must match names of layers, got 'Xception-9'.",
        ),
        (["--quick", "--networks"], "argument --networks: not allowed with argument --quick."),
        (["--json", "a.txt"], "argument --json: must end in .json, got 'a.txt'."),
        (
            ["--json", "absent/a.json"],
            "argument --json: must be in a folder that exists, got 'absent/a.json'.",
        ),
        (["--plot", "a.gif"], "argument --plot: must end in .png, .jpg, .pdf, .svg, got 'a.gif'."),
        (["--plot", "folder.png"], "argument --plot: must be a file, got the folder 'folder.png'."),
        (
            ["--networks", "--plot", "a.png"],
            "argument --plot: needs layers, which --networks alone leaves out.",
        ),
        (["--threads", "2"], "unrecognized arguments: --threads 2"),
    ],
)
def test_bad_arguments(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(benchmark, "_run", lambda *args: pytest.fail("the benchmark has begun"))
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(argv)
    out, err = capsys.readouterr()
    assert err.endswith(f"python -m flax_dwconv.benchmark: error: {message}\n") and not out


def test_a_chart_needs_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(benchmark.sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--quick", "--plot", "a.png"])
    assert "needs matplotlib: pip install 'flax_dwconv[bench]'." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "\nStopped.\n"),
        (OSError(28, "No space left"), 1, "The benchmark could not finish: [Errno 28] No space"),
    ],
)
def test_ends_without_a_traceback(error, code, message, capsys, monkeypatch):
    def fail(*args):
        raise error

    no_run(monkeypatch, fail)
    assert benchmark.main(["--quick"]) == code
    assert capsys.readouterr().err.startswith(message)
