"""The benchmark: its arithmetic on made-up times, its workers on tiny cases, its refusals."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from statistics import geometric_mean

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_dwconv import benchmark
from flax_dwconv.benchmark import LIMIT, OURS, PEER, Case, Results, Summary

SMALL = Case("small", 1, 4, 4, 8, 3, 2, "same")
BIG = Case("big", 2, 64, 64, 64, 3, 1, "valid")


def made_up():
    """Two cases, two peers, two rounds: forward takes ours 1 and 4, train 3 and 6 seconds."""
    results = Results()
    for case, mode, ours in [
        (SMALL, "forward", 1.0),
        (BIG, "forward", 4.0),
        (BIG.doubled, "forward", 10.0),
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


def summary():
    return Summary(made_up(), [SMALL, BIG], ["torch", "linen"])


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


def test_the_minimum_and_its_spread():
    results = Results()
    for round_, seconds in enumerate([1.0, 1.5, 2.0]):
        answer = {"jit": {"first": 5.0, "seconds": seconds}}
        results.add(("small/1", "train", OURS), round_, answer)
    found = Summary(results, [SMALL], [])
    assert found.best["small/1", "train", OURS] == 1
    assert found.spread("small/1", "train", OURS) == "1.50"
    assert found.spread("small/1", "forward", OURS) == "-"


def test_compile_times_are_first_calls_without_running():
    results = Results()
    for network, mode, first in [
        ("MobileNetV2", "infer", 5.0),
        ("MobileNetV2 again", "infer", 4.0),  # the less of two counts
        ("MobileNetV2", "train", 0.5),  # a slow call that did not compile
    ]:
        answer = {"jit": {"first": first, "seconds": 1.0}}
        results.add((network, mode, benchmark.PLAIN), 0, answer)
    best = Summary(results, [], [], ["MobileNetV2"]).best
    assert best["MobileNetV2", "infer", "keras-jax compile"] == 3
    assert best["MobileNetV2", "train", "keras-jax compile"] == 0


def test_the_better_variant_counts():
    first, second = made_up().rounds.values()
    assert first["small/1", "forward", "torch"] == 3
    assert first["small/1", "forward", "torch contiguous"] == 12
    best = summary().best
    assert best["small/1", "forward", "torch"] == 2
    assert best["small/1", "forward", "torch contiguous"] == 8
    assert ("small/1", "forward", "haiku") not in best
    assert ("machine", "limit", "machine") in first and (
        "machine",
        "limit",
        "machine",
    ) not in second


def test_results_that_differ_are_reported(capsys):
    results = Results()
    for worker, magnitude in [(OURS, 1.0), ("torch", 1.0001), ("haiku", 1.01)]:
        time = {"first": 1.0, "seconds": 1.0, "magnitudes": [magnitude, 2.0]}
        results.add(("small/1", "train", worker), 0, {"jit": time})
    results.compare(["small/1"], ["train"], ["torch", "haiku", "linen"], OURS)
    message = "its results are not those of flax_dwconv"
    assert results.failures == {"haiku, small/1 train": message}
    assert message in capsys.readouterr().err


def test_quotients_of_what_there_is():
    table = {("a", "forward", OURS): 2.0, ("a", "forward", "x"): 8.0, ("b", "forward", OURS): 1.0}
    columns = ["a", "b"], ["forward", "train"], OURS
    assert benchmark.quotients(table, *columns, "x") == {("a", "forward"): 0.25}
    assert benchmark.quotients(table, *columns, "y") == {}


def test_figure_has_the_range_of_the_rounds():
    results = Results()
    for round_, seconds in {0: 3.0, 1: None, 2: 2.5}.items():
        for worker, time in ((OURS, seconds), ("torch", 1.0)):
            if time:
                answer = {"jit": {"first": 9.0, "seconds": time}}
                results.add(("small/1", "train", worker), round_, answer)
    found, columns = Summary(results, [SMALL], ["torch"]), (["small/1"], ["train"], OURS)
    assert found.figure(max, *columns, PEER) == {"value": 2.5, "low": 2.5, "high": 3.0}
    assert found.figure(max, *columns, "linen") == {"value": None, "low": None, "high": None}


def test_roofline():
    machine = {"peak": 100.0, "bandwidth": {1000: 50.0, 100_000: 10.0}}
    assert benchmark.roofline(machine, moved=1000, operations=1000) == 20  # bytes, out of a cache
    assert benchmark.roofline(machine, moved=1000, operations=5000) == 50  # operations
    assert benchmark.roofline(machine, moved=50_000, operations=0) == 5000  # bytes, out of memory
    variants = {str(moved): 2.0 for moved in benchmark.COPIES} | {"numpy": 4.0, "jax": 2.0}
    table = {("machine", "limit", f"machine {name}"): s for name, s in variants.items()}
    machine = benchmark.read_machine(table)
    assert machine["peak"] == benchmark.MATRIX**3
    assert machine["bandwidth"][2**20] == 2**24 and machine["bandwidth"][2**28] == 2**27
    assert benchmark.read_machine({("small/1", "train", OURS): 1.0}) is None


def test_summary():
    found = summary()

    def mean(labels, modes, over, under):
        return found.figure(geometric_mean, labels, modes, over, under)["value"]

    layers, both = ["small/1", "big/2"], ["forward", "train"]
    assert mean(layers, ["forward"], OURS, PEER) == pytest.approx(1)  # 1/2 and 4/2
    assert mean(layers, ["train"], OURS, PEER) == pytest.approx(math.sqrt(4.5))  # 3/2 and 6/2
    worst = found.figure(max, layers, both, OURS, PEER)
    assert worst == {"value": 3.0, "low": 3.0, "high": 3.0}
    assert mean(layers, ["train"], "linen", OURS) == pytest.approx(21)
    assert mean(layers, ["train"], "haiku", OURS) is None
    assert mean(layers, both, benchmark.DOUBLED, OURS) == pytest.approx(2.5)
    # Only the big case is above 1 MB, and the machine moves them at 32 MiB/s.
    assert found.large == ["big/2"]
    limits = [max(BIG.moved(m) / 2**25, BIG.operations(m) / 1024**3) for m in ("forward", "train")]
    assert mean(["big/2"], ["train"], OURS, LIMIT) == pytest.approx(6 / limits[1])
    expected = math.sqrt(4 / limits[0] * 6 / limits[1])
    assert mean(["big/2"], both, OURS, LIMIT) == pytest.approx(expected)
    # Twice the images, the same kernel and bias: 4 bytes for each of 10 * 64 numbers.
    moved = BIG.moved("forward")
    columns = benchmark.DOUBLED_LIMIT, LIMIT
    assert mean(["big/2"], ["forward"], *columns) == pytest.approx((2 * moved - 2560) / moved)


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
    assert benchmark.verdict(reached, at_least, aim) == verdict


# What is printed, saved and drawn


def test_tables_of_the_cases():
    lines = benchmark.describe_layers(summary()).splitlines()
    assert lines[0] == "layer = convolution + bias + relu6, forward: our time / peer's"
    header, small, big = (line.split() for line in lines[1:4])
    assert " ".join(header) == (
        "name n h w c k stride padding ours ms spread /torch /linen best peer spread /limit"
    )
    assert small[:-1] == "small 1 4 4 8 3 2 same 1000.000 1.25 0.50 0.048 torch 1.25".split()
    assert big[:-1] == "big 2 64 64 64 3 1 valid 4000.000 1.25 2.00 0.048 torch 1.25".split()
    assert lines[5] == "layer = convolution + bias + relu6, train: our time / peer's"


def test_summary_of_the_layers_in_words():
    text = benchmark.describe_layers(summary())
    for line in [
        "forward, our time / best peer's, geometric mean: 1.00 (rounds 1.00..1.00) of 2 cases; "
        "worst: 2.00 (rounds 2.00..2.00), big/2",
        "forward, speed-up over linen, geometric mean: 21.0x (rounds 21.0..21.0x) of 2 cases; "
        "worst: 21.0x (rounds 21.0..21.0x), small/1",
        "forward, speed-up over torch, geometric mean: 1.00x (rounds 1.00..1.00x) of 2 cases; "
        "worst: 0.50x (rounds 0.50..0.50x), big/2",
        "forward, time when the batch doubles, geometric mean: 2.50x (rounds 2.50..2.50x) of "
        "1 cases; worst: 2.50x (rounds 2.50..2.50x), big/2",
        "forward, compile time of flax_dwconv, median: 27.5 s of 2 cases; worst: 29.0 s, small/1",
    ]:
        assert line in text.splitlines()
    assert "GB/s at 1 MiB" in text
    assert "our time / the machine's limit above 1 MB, geometric mean: " in text
    assert "the machine's limit when it does, geometric mean: 2.00x" in text
    assert "train, time when the batch doubles" not in text  # it was not measured


def test_networks_and_the_reach_table():
    results = made_up()
    for name, seconds in {
        benchmark.PLAIN: 12.0,
        benchmark.FAST: 2.0,
        benchmark.POINTWISE: 3.0,
        "keras-tensorflow": 4.0,
        "keras-torch": 5.0,
    }.items():
        for mode in benchmark.NETWORK_MODES:
            first = {benchmark.PLAIN: 10.0 if mode == "infer" else 8.0}.get(name, 12.0) + seconds
            answer = {"jit": {"first": first, "seconds": seconds}}
            results.add(("MobileNetV2", mode, name), 0, answer)
    found = Summary(results, [SMALL, BIG], ["torch", "linen"], ["MobileNetV2"])
    _, _, infer, pointwise, *_ = benchmark.describe_networks(found).splitlines()
    assert pointwise.startswith("MobileNetV2 infer, pointwise  12000.000 ~1.00  3000.000 ~1.00")
    assert "4.00x" in pointwise and "0.75" in pointwise
    for text in (
        "MobileNetV2 infer",
        "12000.000 ~1.00",
        "6.00x",
        "0.50",
        "10.0 s",
        "12.0 s",
        "1.20",
    ):
        assert text in infer
    goals = found.goals()
    assert len(goals) == 16
    assert {goal["name"]: goal["verdict"] for goal in goals} == {
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
        "network / best of Keras's TF, torch: worst, pointwise": "at least",
        "network compile time / plain JAX: worst": "at least",
        "machine's limit, cases above 1 MB": "missed",
        "time when the batch doubles": "missed",
    }
    row = benchmark.describe_goals(goals).splitlines()[4]
    assert row.split() == "over flax.linen.Conv, forward 20x 30x 21.0x 21.0..21.0x at least".split()


def test_nothing_measured_can_be_described():
    found = Summary(Results(), [SMALL], ["torch"], ["MobileNetV2"])
    texts = [
        benchmark.describe_layers(found),
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


def test_without_a_device_the_reason_is_said():
    results = Results()
    results.fail("device", "JAX found no GPU")
    text = benchmark.describe_device(Summary(results, [SMALL], []))
    assert text == "device, skipped: JAX found no GPU"


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
    pytest.importorskip(benchmark.PEERS[peer])
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


@pytest.fixture
def processes(monkeypatch):
    """All worker processes that are started."""
    started = []

    class Recorded(benchmark.Worker):
        def __init__(self, *args):
            super().__init__(*args)
            started.append(self.process)

    monkeypatch.setattr(benchmark, "Worker", Recorded)
    return started


class Then(Results):
    """Results that do something after some of the answers."""

    def __init__(self, actions):
        super().__init__()
        self.actions, self.answers = actions, 0

    def add(self, *args):
        super().add(*args)
        self.answers += 1
        self.actions.get(self.answers, lambda: None)()


def turns(*cases):
    return [(case.label, case, ["forward"], ["linen"]) for case in cases]


def measured(results):
    """The cases of each round."""
    return [sorted({label for label, _, _ in table}) for table in results.rounds.values()]


IMPOSSIBLE = dataclasses.replace(TINY, name="impossible", padding="nonsense")


def test_a_worker_that_fails_or_dies_is_reported_and_no_more(processes):
    def kill():
        processes[0].kill()
        processes[0].wait()

    def stop():
        raise KeyboardInterrupt

    results = Then({2: kill, 4: stop})  # after small/1 and in the second round
    with pytest.raises(KeyboardInterrupt):
        benchmark.take_turns(turns(IMPOSSIBLE, TINY, SMALL), 3, 0.001, results)
    assert measured(results) == [["small/1", "tiny/2"]] * 2
    assert list(results.failures) == ["linen, impossible/2 forward"]
    assert len(processes) == 2
    assert all(process.poll() is not None for process in processes)


def test_a_worker_that_does_not_answer_is_reported_and_started_again(
    processes, monkeypatch, capsys
):
    def hang():
        os.kill(processes[0].pid, signal.SIGSTOP)
        monkeypatch.setattr(benchmark, "TIMEOUT", 0.5)

    results = Then({1: hang})
    fail = results.fail

    def patient(*args):
        fail(*args)
        monkeypatch.setattr(benchmark, "TIMEOUT", 600)

    results.fail = patient
    benchmark.take_turns(turns(TINY, SMALL, BIG), 2, 0.001, results)
    assert results.failures == {"linen, small/1 forward": "no answer within 0.5 s"}
    assert "linen, small/1 forward: no answer within 0.5 s\n" in capsys.readouterr().err
    assert measured(results) == [["big/2", "tiny/2"]] * 2
    assert len(processes) == 2 and processes[0].returncode == -signal.SIGKILL


def test_a_worker_that_does_not_start_is_asked_for_nothing(processes, monkeypatch):
    monkeypatch.setattr(benchmark, "TIMEOUT", 0.01)  # less than an import takes
    results = Results()
    benchmark.take_turns(turns(TINY, SMALL), 2, 0.001, results)
    assert results.failures == {"linen": "no answer within 0.01 s"}
    assert not results.rounds and len(processes) == 1


def test_ctrl_c_keeps_what_has_been_measured(tmp_path):
    """As a terminal does it: all processes of the group are interrupted, workers included."""
    script = """
        import os, signal, sys, time
        from flax_dwconv import benchmark

        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        benchmark.BUDGET = 0.001, 0.001
        add, answers = benchmark.Results.add, []

        def add_and_interrupt(*args):
            add(*args)
            answers.append(args)
            if len(answers) == 4:  # the machine, both peers forward, ours train
                os.killpg(0, signal.SIGINT)
                time.sleep(10)

        benchmark.Results.add = add_and_interrupt
        sys.exit(benchmark.main(sys.argv[1:]))
        """
    argv = ["--layers", "MobileNetV1-9", "--peers", "linen", "--rounds", "2"]
    saved, chart = tmp_path / "times.json", tmp_path / "chart.png"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *argv, "--json", saved, "--plot", chart],
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=300,
    )
    assert (run.returncode, run.stderr) == (130, "")
    lines = run.stdout.splitlines()
    assert "stopped by Ctrl-C: what follows had been measured until then" in lines
    assert [line for line in lines if line.startswith("forward, speed-up over linen, geometric")]
    assert not [line for line in lines if line.startswith("train, speed-up over linen")]
    assert [line for line in lines if line.startswith("over flax.linen.Conv, train ")]
    document = json.loads(saved.read_text())
    assert document["stopped"] is True and not document["failures"]
    measured = [(raw["case"], raw["mode"], raw["worker"]) for raw in document["raw"]]
    assert measured[-3:] == [
        ("MobileNetV1-9/1", "forward", OURS),
        ("MobileNetV1-9/1", "forward", "linen"),
        ("MobileNetV1-9/1", "train", OURS),
    ]
    assert chart.read_bytes().startswith(b"\x89PNG")


# The command line


def no_run(monkeypatch, then=lambda *args: None):
    """Replaces what takes time."""
    monkeypatch.setattr(benchmark, "take_turns", then)


def test_an_absent_peer_is_named(capsys, monkeypatch):
    asked = []
    no_run(monkeypatch, lambda turns, *args: asked.extend(turns[1][-1]))
    monkeypatch.setitem(benchmark.sys.modules, "torch", None)
    assert benchmark.main(["--quick", "--peers", "torch,linen"]) == 1  # nothing was measured
    assert asked == [OURS, "linen"]
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
    ("where", "error", "code", "message"),
    [
        (
            "take_turns",
            OSError(28, "No space left"),
            1,
            "The benchmark could not finish: [Errno 28]",
        ),
        ("hardware", KeyboardInterrupt(), 130, "\nStopped.\n"),
    ],
)
def test_ends_without_a_traceback(where, error, code, message, capsys, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(benchmark, where, fail)
    assert benchmark.main(["--quick"]) == code
    assert capsys.readouterr().err.startswith(message)
