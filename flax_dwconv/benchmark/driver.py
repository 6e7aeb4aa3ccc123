"""How times are measured: one process for each peer, all of which take turns."""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import jax
import numpy as np

from flax_dwconv.benchmark.cases import Case
from flax_dwconv.benchmark.peers import BACKENDS, ON_JAX, WORKERS, Build

TIMEOUT = 600  # seconds for one answer: far more than any case takes, compilation included
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Measured = tuple[float, float | None, list[float] | None]
Turn = tuple[Any, str, Sequence[str]]  # case or name of a network, mode, names of workers


def timed(f: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def repeated(f: Callable[[], Any], budget: float) -> list[float]:
    """Returns the seconds of each of the calls that take `budget` seconds together."""
    calls, total = [], 0.0
    while total < budget:
        calls.append(timed(f)[0])
        total += calls[-1]
    return calls


def measure(f: Callable[[], Any], budget: float, fresh: bool) -> Measured:
    """Repeats a call for `budget` seconds after a warm-up.

    Returns:
      Seconds of the first call, the lower quartile of the calls that count, and if it is fresh the
      magnitudes of its results. The quartile is not the minimum, because a fast call is repeated
      more often and has more chances of a lucky one. Without a budget there is only the first call,
      which compiles if it is fresh.
    """
    first, result = timed(f)
    calls = [] if fresh else [first]
    calls += repeated(f, budget / 4 - sum(calls))
    if sum(calls) < budget:  # they were the warm-up, which a single slow call does not need
        calls = repeated(f, budget)
    quartile = sorted(calls)[len(calls) // 4] if calls else None
    return first, quartile, magnitudes(result) if fresh else None


def magnitudes(results: Any) -> list[float]:
    """Returns the mean magnitude of each result of a pytree, by which the peers are compared."""
    leaves = jax.tree.leaves(results)
    arrays = [a.detach() if hasattr(a, "detach") else a for a in leaves]  # PyTorch
    return [float(np.abs(np.asarray(a, np.float64)).mean()) for a in arrays]


def serve(start: Callable[[], Build], connection: Connection, log: str, device: bool) -> None:
    """Runs a peer in its process: answers requests until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its workers
    for stream in (sys.stdout, sys.stderr):  # of what frameworks print the last line may be of use
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream.fileno())
    build: Any = None
    last, variants, ran = None, {}, {None}
    request: Any = ()  # the first one: get ready
    with contextlib.suppress(EOFError):
        while True:
            gc.collect()
            gc.disable()
            try:
                if not request:
                    if device and jax.default_backend() == "cpu":
                        raise RuntimeError("JAX found no GPU or TPU here, only the CPU")
                    build = start()
                elif last != request[:-1]:
                    variants = {}  # frees the arrays before there are new ones
                    last, variants = request[:-1], build(*request[:-1])
                fresh = last not in ran
                said = {name: measure(f, request[-1], fresh) for name, f in variants.items()}
                ran.add(last)
            except Exception as error:  # of a framework: any of them; the next case may succeed
                last, said = None, f"{type(error).__name__}: {error}".split("\n")[0]
            gc.enable()
            connection.send(said)
            request = connection.recv()


class Worker:
    """The process of a peer, as the driver sees it; it gets ready while others do."""

    def __init__(self, name: str, device: bool) -> None:
        """Starts the process of a name in `WORKERS`."""
        pools = "OMP_NUM", "OPENBLAS_NUM", "TF_NUM_INTRAOP", "TF_NUM_INTEROP"
        environment = {f"{pool}_THREADS": str(CORES) for pool in pools} | {
            "KERAS_BACKEND": BACKENDS.get(name, "jax"),
            "KERAS_HOME": os.devnull,  # without the user's keras.json
            "PYTHONWARNINGS": "ignore",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several workers share a GPU
        }
        if name not in (*ON_JAX, *BACKENDS):
            # Results from 32 MiB on: glibc takes their memory from the system in each call, or it
            # does not, as what a process freed before will have it. For 8 images of 76x76x266,
            # PyTorch took 22 ms in one process and 7.5 in another. So all keep what they have. The
            # arenas of further threads, which XLA's results are in, give back what they can: so
            # there is one arena.
            keep = {"MMAP_MAX_": 0, "TRIM_THRESHOLD_": 1 << 40, "ARENA_MAX": 1}
            environment |= {f"MALLOC_{name}": str(value) for name, value in keep.items()}
        on_cpu = {} if device else {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.log = tempfile.NamedTemporaryFile()
        arguments = WORKERS[name], theirs, self.log.name, device
        self.process, self.ready = context.Process(target=serve, args=arguments, daemon=True), False
        with mock.patch.dict(os.environ, environment | on_cpu):
            self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> dict[str, Any]:
        """Returns the answer; raises ChildProcessError with the reason if there is none."""
        try:
            if not self.ready:
                self._receive()
                self.ready = True
            self.connection.send(request)
            return self._receive()
        except (EOFError, ConnectionError):
            self.process.join()
            said = self.log.read().decode(errors="replace").strip().split("\n")[-1]
            reason = f"its process ended with code {self.process.exitcode}: {said or 'no message'}"
            raise ChildProcessError(reason) from None

    def _receive(self) -> dict[str, Any]:
        if not self.connection.poll(TIMEOUT):
            self.close()
            raise ChildProcessError(f"no answer within {TIMEOUT:g} s")
        if isinstance(answer := self.connection.recv(), str):
            raise ChildProcessError(answer)
        return answer

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        self.log.close()


@dataclasses.dataclass
class Results:
    """What was found out."""

    # For (label or network, mode, worker, variant): "seconds" of each round, "first" calls.
    times: dict[tuple[str, ...], dict[str, list[float]]] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    magnitudes: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)

    def add(self, label: str, mode: str, name: str, answer: dict[str, Any]) -> None:
        """Adds an answer; raises ChildProcessError if its results are not those of the others."""
        for variant, (first, seconds, magnitudes) in answer.items():
            if magnitudes and name not in BACKENDS:  # whose random weights are others
                known = self.magnitudes.setdefault((label, mode), magnitudes)
                if not np.allclose(magnitudes, known, rtol=1e-3, atol=1e-6):
                    raise ChildProcessError("its results are not those of the others")
            key, none = (label, mode, name, variant), {"seconds": [], "first": []}
            times = self.times.setdefault(key, none)
            times["seconds"] += [seconds] if seconds else []
            times["first"] += [first] if magnitudes else []  # in this process


def take_turns(
    turns: Sequence[Turn], rounds: int, budget: float, results: Results, device: bool = False
) -> None:
    """Starts workers, asks them round after round, and ends them, whatever happens.

    One is busy and the others idle, so that whatever else the machine does falls on all of them.
    What a worker could not do it is not asked again. One that crashed or did not answer is started
    again for what comes next; one that did not even start is not.
    """
    from tqdm import tqdm

    names = dict.fromkeys(name for *_, names in turns for name in names)
    workers = {name: Worker(name, device) for name in names}
    try:
        schedule = [(round_, *turn) for round_ in range(rounds) for turn in turns]
        for round_, subject, mode, names in (bar := tqdm(schedule, unit="turn", leave=False)):
            label = subject.label if isinstance(subject, Case) else subject
            bar.set_description(f"{label} {mode}")
            shift = round_ % len(names)  # nobody is always first
            for name in [*names[shift:], *names[:shift]]:
                what = f"{name}, {label} {mode}"
                if name in results.failures or what in results.failures:
                    continue
                if workers[name].ready and not workers[name].process.is_alive():
                    workers[name] = Worker(name, device)
                try:
                    results.add(label, mode, name, workers[name].ask(subject, mode, budget))
                except ChildProcessError as error:
                    results.failures[what if workers[name].ready else name] = str(error)
                    bar.write(f"{what}: {error}", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.close()
