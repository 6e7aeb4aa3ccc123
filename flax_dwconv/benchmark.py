"""The benchmark, `python -m flax_dwconv.benchmark`: how fast this package is beside its peers.

Every peer lives in a worker, a process of its own that is started from this file and speaks JSON
lines: a request names a case and a mode, the answer is the seconds that it takes. The workers take
turns, case by case and round after round, one busy and the others idle, so that whatever else the
machine does falls on all of them; all have the same number of threads, one for each core.

How a time is measured. Within a round a worker warms up, repeats the call for a fixed time and
answers the lower quartile: a call that is repeated often would otherwise have more chances of a
lucky minimum. The driver takes the minimum over the rounds. How noisy a time is shows as `spread`,
the median over the rounds divided by that minimum; how noisy a summary is shows as the range that
it takes when it is computed from each round alone.

What is measured. Layers are convolution + bias + relu6; "forward" is the result, "train" the result
and its gradients to input, kernel and bias. Networks are those of `keras.applications` with random
weights; "infer" is the compiled model, "train" the loss, its gradients and a step of SGD. On JAX
they run plain, inside `accelerate`, and inside `accelerate` with `pointwise=True`.
"""

import argparse
import collections
import contextlib
import dataclasses
import fnmatch
import functools
import gc
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import geometric_mean, median
from subprocess import PIPE
from typing import Any

import numpy as np

OURS = "flax_dwconv"
PEERS = {"torch": "torch", "tensorflow": "tensorflow", "linen": "flax", "haiku": "haiku"}  # modules
PLAIN, FAST, POINTWISE = "keras-jax", "keras-jax-accelerated", "keras-jax-pointwise"
ON_JAX = PLAIN, FAST, POINTWISE
BACKENDS = {"keras-tensorflow": "tensorflow", "keras-torch": "torch"}
NETWORKS = ("MobileNetV2", "EfficientNetB0", "ConvNeXtTiny")
LAYER_MODES, NETWORK_MODES = ("forward", "train"), ("infer", "train")
AGAIN = " again"  # follows the name of a network where that is only compiled
ROUNDS = 5, 3  # in full, quick
BUDGET = 0.2, 0.05  # seconds of repeating one call in one round, in full and quick
NETWORK_BUDGET, COMPILE_BUDGET = 1.0, 0.1
TIMEOUT = 600  # seconds for one answer: far more than any case takes, compiled or not
HOW = "minimum over rounds of each round's lower quartile; spread = median over rounds / minimum"
RATE = 1e-4  # of SGD: too low to lead anywhere
MIB = 2**20
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# What is timed


@dataclasses.dataclass(frozen=True)
class Case:
    """One depthwise layer: `n` images of `h` x `w` x `c`, a kernel of `k` x `k`, float32."""

    name: str
    n: int
    h: int
    w: int
    c: int
    k: int
    stride: int
    padding: str

    @property
    def label(self) -> str:
        """What names the case, batch included."""
        return f"{self.name}/{self.n}"

    @property
    def doubled(self) -> "Case":
        """The case with twice its batch."""
        return dataclasses.replace(self, name=f"{self.name} doubled", n=2 * self.n)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the result, `(n, ho, wo, c)`."""
        reach = self.k if self.padding == "valid" else 1
        ho, wo = ((size - reach) // self.stride + 1 for size in (self.h, self.w))
        return self.n, ho, wo, self.c

    def moved(self, mode: str) -> int:
        """Returns the bytes to move: x, kernel, bias, y; again for cotangent and gradients."""
        x, y = self.n * self.h * self.w * self.c, math.prod(self.out_shape)
        return 4 * (x + (self.k**2 + 1) * self.c + y) * (1 if mode == "forward" else 2)

    def operations(self, mode: str) -> int:
        """Returns additions and multiplications; each gradient costs as much as the forward."""
        return 2 * self.k**2 * math.prod(self.out_shape) * (1 if mode == "forward" else 3)

    def arrays(self, flip: bool = False) -> list[np.ndarray]:
        """Returns x, kernel `(k, k, c, 1)`, bias, cotangent; flipped, "same" pads the other end."""
        block = np.random.default_rng(0).standard_normal(65521, np.float32)  # prime: no stripes
        x, kernel = (self.n, self.h, self.w, self.c), (self.k, self.k, self.c, 1)
        shapes = x, kernel, self.c, self.out_shape
        x, kernel, bias, g = (np.resize(block, shape) for shape in shapes)
        if flip:
            x, kernel, g = x[:, ::-1, ::-1], kernel[::-1, ::-1], g[:, ::-1, ::-1]
        return [np.ascontiguousarray(array) for array in (x, kernel, bias, g)]


# The depthwise layers of keras.applications, each where it appears first: height and width of the
# images, then channels, kernel size and stride of every layer on them. The strided ones of the
# MobileNets and EfficientNet are a ZeroPadding2D and "valid" there: "same" pads alike.
_LAYERS = """
MobileNetV1 112: 32k3s1 64k3s2, 56: 128k3s1 128k3s2, 28: 256k3s1 256k3s2, 14: 512k3s1 512k3s2
MobileNetV1 7: 1024k3s1
MobileNetV2 112: 96k3s2, 56: 144k3s1 144k3s2, 28: 192k3s1 192k3s2, 14: 384k3s1 576k3s1 576k3s2
MobileNetV2 7: 960k3s1
MobileNetV3 112: 16k3s1 16k3s2, 56: 72k3s1 72k3s2 72k5s2, 28: 88k3s1 96k5s2 120k5s1
MobileNetV3 14: 120k5s1 144k5s1 184k3s1 200k3s1 240k5s1 288k5s2 672k3s1, 7: 576k5s1 960k5s1
EfficientNet 56: 144k5s2, 28: 240k3s2 240k5s1, 14: 480k3s1 480k5s1 672k5s1 672k5s2
EfficientNet 7: 1152k3s1 1152k5s1
Xception 147: 64k3s1 128k3s1, 74: 128k3s1 256k3s1, 37: 256k3s1 728k3s1, 19: 728k3s1
Xception 10: 1024k3s1 1536k3s1
ConvNeXtTiny 56: 96k7s1, 28: 192k7s1, 14: 384k7s1, 7: 768k7s1
"""
_QUICK = """
MobileNetV1-1/1 MobileNetV1-7/1 MobileNetV1-9/32 MobileNetV2-1/1 MobileNetV2-2/8 MobileNetV2-8/32
MobileNetV3-8/1 EfficientNet-1/8 EfficientNet-6/1 Xception-2/1 ConvNeXtTiny-1/1 ConvNeXtTiny-4/32
"""


def cases(quick: bool = False) -> list[Case]:
    """Returns the layers, each with a batch of one and a larger one, or a dozen of these."""
    found, number = [], collections.Counter()
    for row in _LAYERS.strip().split("\n"):
        network, _, images = row.partition(" ")
        for size, layers in re.findall(r"(\d+): ([^,]+)", images):
            for layer in layers.split():
                number[network] += 1
                name, size = f"{network}-{number[network]}", int(size)
                c, k, stride = map(int, re.split("[ks]", layer))
                for n in (1, 8 if size > 14 else 32):
                    found.append(Case(name, n, size, size, c, k, stride, "same"))
    return [case for case in found if not quick or case.label in _QUICK.split()]


# Workers: the peers, each in a function that imports it. A worker function returns
# `build(subject, mode)`, which returns a function without arguments for each way to do the work;
# such a function returns when its results are there, and returns them.

Variants = Mapping[str, Callable[[], Sequence[Any]]]
Build = Callable[[Any, str], Variants]


def _jax_worker(layer: Callable[[Case], Callable], swapped: bool = True) -> Build:
    """`layer(case) -> apply(x, kernel, bias)`, with a kernel `(k, k, 1, c)` if it is swapped."""
    import jax

    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8)))  # start XLA before compile times

    @functools.cache  # jax.jit keeps what it compiled with the function
    def compiled(case, mode):
        apply = layer(case)

        def run(g, *operands):
            if mode == "forward":
                return [apply(*operands)]
            y, vjp = jax.vjp(apply, *operands)
            return [y, *vjp(g)]

        return jax.jit(run)

    def build(case, mode):
        x, kernel, bias, g = map(jax.numpy.asarray, case.arrays())
        f, kernel = compiled(case, mode), kernel.swapaxes(2, 3) if swapped else kernel
        return {"jit": lambda: jax.block_until_ready(f(g, x, kernel, bias))}

    return build


def _our_layer(case: Case, method: Any = "auto") -> Callable:
    """This package's layer."""
    import flax_dwconv

    sizes = case.k, case.stride, case.padding  # channels last: no settings in KERAS_HOME
    layer = flax_dwconv.DepthwiseConv2D(*sizes, activation="relu6", method=method)
    return lambda x, kernel, bias: layer.apply({"params": {"bias": bias, "kernel": kernel}}, x)


def _linen_layer(case: Case) -> Callable:
    """`flax.linen.Conv`, one group for each channel."""
    import flax.linen as nn

    size, padding = (case.k, case.k), case.padding.upper()
    conv: Any = nn.Conv(case.c, size, case.stride, padding, feature_group_count=case.c)
    return lambda x, kernel, bias: nn.relu6(
        conv.apply({"params": {"bias": bias, "kernel": kernel}}, x)
    )


def _haiku_layer(case: Case) -> Callable:
    """`haiku.DepthwiseConv2D`."""
    import haiku
    import jax

    @haiku.without_apply_rng
    @haiku.transform
    def layer(x):
        padding = case.padding.upper()
        conv = haiku.DepthwiseConv2D(1, case.k, case.stride, padding=padding, name="depthwise")
        return jax.nn.relu6(conv(x))

    return lambda x, kernel, bias: layer.apply({"depthwise": {"b": bias, "w": kernel}}, x)


def _torch_worker() -> Build:
    """PyTorch, in both of its memory formats."""
    import torch
    from torch.nn import functional

    def build(case, mode):
        # PyTorch pads both sides alike. On flipped images that is what "same" does, since the
        # window never reaches the last row: the same work and the same numbers.
        same = case.padding == "same"
        pad = case.k // 2 if same else 0
        x, kernel, bias, g = map(torch.from_numpy, case.arrays(flip=same))
        arrays = x.permute(0, 3, 1, 2), kernel.permute(2, 3, 0, 1), bias, g.permute(0, 3, 1, 2)

        def layer(x, kernel, bias):
            y = functional.conv2d(x, kernel, bias, case.stride, pad, groups=case.c)
            return functional.relu6(y, inplace=True)

        def variant(memory_format):
            *operands, cotangent = (
                a.clone(memory_format=memory_format) if a.ndim == 4 else a.clone() for a in arrays
            )
            for array in operands:
                array.requires_grad_(mode == "train")

            def run():
                if mode == "forward":
                    with torch.inference_mode():
                        return [layer(*operands)]
                y = layer(*operands)
                return [y, *torch.autograd.grad(y, operands, cotangent)]

            return run

        formats = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
        return {name: variant(memory_format) for name, memory_format in formats.items()}

    return build


def _tensorflow_worker() -> Build:
    """TensorFlow, as a `tf.function`."""
    import tensorflow as tf

    @functools.cache  # a tf.function keeps its graphs
    def compiled(case, mode):
        def layer(x, kernel, bias):
            strides = [1, case.stride, case.stride, 1]
            y = tf.nn.depthwise_conv2d(x, kernel, strides, case.padding.upper())
            return tf.nn.relu6(tf.nn.bias_add(y, bias))

        @tf.function
        def run(g, *operands):
            if mode == "forward":
                return [layer(*operands)]
            with tf.GradientTape() as tape:
                tape.watch(operands)
                y = layer(*operands)
            return [y, *tape.gradient(y, operands, g)]

        return run

    def build(case, mode):
        f, (*operands, g) = compiled(case, mode), map(tf.constant, case.arrays())
        return {"function": lambda: f(g, *operands)}

    return build


def _device_worker() -> Build:
    """`method="auto"` and `method="lax"` on the GPU or TPU that JAX found."""
    import jax

    if jax.default_backend() == "cpu":
        raise RuntimeError(f"JAX {jax.__version__} found no GPU or TPU here, only the CPU")
    layers = {method: functools.partial(_our_layer, method=method) for method in ("auto", "lax")}
    builds = {method: _jax_worker(layer, swapped=False) for method, layer in layers.items()}
    return lambda case, mode: {method: f(case, mode)["jit"] for method, f in builds.items()}


def _keras_worker(run: Callable[..., Variants]) -> Build:
    """Networks of `keras.applications` by `run(model, loss, x, y, mode)`, on Keras's backend."""
    import keras

    def loss(y, logits):
        entropy = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        return keras.ops.mean(entropy)

    def build(network, mode):
        keras.utils.set_random_seed(0)
        model = getattr(keras.applications, network)(weights=None, classifier_activation=None)
        x = np.random.default_rng(0).standard_normal((1, 224, 224, 3), np.float32)
        return run(model, loss, x, np.array([1]), mode)

    return build


def _keras_on_jax(model, loss, x, y, mode, accelerate: Any = None) -> Variants:
    """The model as pure functions under `jax.jit`, its state donated as Keras's trainer does."""
    import jax

    import flax_dwconv

    x, y = jax.numpy.asarray(x), jax.numpy.asarray(y)
    variables = model.trainable_variables, model.non_trainable_variables
    state = [[v.value for v in group] for group in variables]

    def step(weights, others):
        if mode == "infer":
            return model.stateless_call(weights, others, x, training=False)[0]

        def objective(weights):
            logits, new = model.stateless_call(weights, others, x, training=True)
            return loss(y, logits), new

        (value, new), gradients = jax.value_and_grad(objective, has_aux=True)(weights)
        return value, [[w - RATE * g for w, g in zip(weights, gradients, strict=True)], new]

    compiled = jax.jit(step, donate_argnums=(0, 1) if mode == "train" else ())
    if accelerate is not None:  # its keyword arguments
        compiled = flax_dwconv.accelerate(compiled, **accelerate)

    def run():
        nonlocal state
        result = jax.block_until_ready(compiled(*state))
        value, state = (result, state) if mode == "infer" else result
        return [value]

    return {"jit": run}


def _keras_on_tensorflow(model, loss, x, y, mode) -> Variants:
    """The model as a `tf.function`."""
    import tensorflow as tf

    x, y = tf.constant(x), tf.constant(y)
    weights = [v.value for v in model.trainable_variables]

    @tf.function
    def run():
        if mode == "infer":
            return [model(x, training=False)]
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        for w, g in zip(weights, tape.gradient(value, weights), strict=True):
            w.assign_sub(RATE * g)
        return [value]

    return {"function": run}


def _keras_on_torch(model, loss, x, y, mode) -> Variants:
    """The model as PyTorch runs it: eagerly."""
    import torch

    x, y = torch.from_numpy(x), torch.from_numpy(y)
    weights = [v.value for v in model.trainable_variables]

    def run():
        if mode == "infer":
            with torch.inference_mode():
                return [model(x, training=False)]
        value = loss(y, model(x, training=True))
        gradients = torch.autograd.grad(value, weights)
        with torch.no_grad():
            for w, g in zip(weights, gradients, strict=True):
                w.sub_(g, alpha=RATE)
        return [value]

    return {"eager": run}


# The machine itself: copies of `COPIES` bytes moved, half read and half written, from what fits
# into a core's own cache to what fits into none, and matrix products.
COPIES = [MIB << i for i in range(9)]
LEAST_COPIED = 32 * MIB  # small copies are repeated up to this, or starting threads would show
MATRIX = 1024


def _machine_worker() -> Build:
    """Copies by numpy, matrix products by numpy and JAX, on all cores."""
    import jax

    pool = ThreadPoolExecutor(CORES)

    def copy(moved):
        parts = [np.ones((2, moved // 8 // CORES), np.float32) for _ in range(CORES)]

        def part(array):
            source, target = array
            for _ in range(max(1, LEAST_COPIED // moved)):
                np.copyto(target, source)

        return lambda: list(pool.map(part, parts))

    def build(subject: Any, mode: str) -> Any:
        a = np.random.default_rng(0).standard_normal((MATRIX, MATRIX), np.float32)
        b, product = jax.numpy.asarray(a), jax.jit(jax.numpy.matmul)
        products = {"numpy": lambda: [a @ a], "jax": lambda: [jax.block_until_ready(product(b, b))]}
        return products | {str(moved): copy(moved) for moved in COPIES}

    return build


WORKERS: dict[str, Callable[[], Build]] = {
    OURS: lambda: _jax_worker(_our_layer, swapped=False),
    "linen": lambda: _jax_worker(_linen_layer),
    "haiku": lambda: _jax_worker(_haiku_layer),
    "torch": _torch_worker,
    "tensorflow": _tensorflow_worker,
    PLAIN: lambda: _keras_worker(_keras_on_jax),
    FAST: lambda: _keras_worker(functools.partial(_keras_on_jax, accelerate={})),
    POINTWISE: lambda: _keras_worker(
        functools.partial(_keras_on_jax, accelerate={"pointwise": True})
    ),
    "keras-tensorflow": lambda: _keras_worker(_keras_on_tensorflow),
    "keras-torch": lambda: _keras_worker(_keras_on_torch),
    "machine": _machine_worker,
    "device": _device_worker,
}


def measure(f: Callable[[], Any], budget: float, fresh: bool) -> tuple[float, float, Any]:
    """Returns seconds of the first call, the lower quartile of those that count, and a result.

    They are repeated for `budget` seconds after a warm-up; the first one compiles if it is fresh.
    """

    def clock():
        start = time.perf_counter()
        result = f()
        return time.perf_counter() - start, result

    first, result = clock()
    calls = [] if fresh else [first]
    while sum(calls) < budget / 4:
        calls.append(clock()[0])
    if sum(calls) < budget:  # they were the warm-up; a call slower than all that needs none
        calls = []
        while sum(calls) < budget:
            calls.append(clock()[0])
    return first, sorted(calls)[len(calls) // 4], result


def _magnitudes(arrays: Sequence[Any]) -> list[float]:
    """Returns the mean magnitude of each result, to compare the peers' by."""
    arrays = [a.detach() if hasattr(a, "detach") else a for a in arrays]  # PyTorch
    return [float(np.abs(np.asarray(a, np.float64)).mean()) for a in arrays if a is not None]


def work(name: str) -> None:
    """Runs a worker: answers JSON lines on stdin with JSON lines on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    start = functools.cache(WORKERS[name])
    last: tuple[Any, Variants] = None, {}  # holds arrays: of one request at a time
    ran = set()

    def times(subject: Any, mode: str, budget: float) -> dict[str, dict[str, Any]]:
        """Returns the times of every variant, and at first the magnitudes of its results."""
        nonlocal last
        subject = Case(**subject) if isinstance(subject, dict) else subject
        if last[0] != (subject, mode):
            last = None, {}  # frees the arrays before there are new ones
            last = (subject, mode), start()(subject, mode)
        found: dict[str, dict[str, Any]] = {}
        for variant, f in last[1].items():
            fresh = (subject, mode, variant) not in ran
            first, seconds, result = measure(f, budget, fresh)
            found[variant] = {"first": first, "seconds": seconds}
            if fresh:
                found[variant]["magnitudes"] = _magnitudes(result)
            ran.add((subject, mode, variant))
        return found

    def answer(f: Callable[..., Any], **request: Any) -> None:
        try:
            said = {"answer": f(**request)}
        except Exception as error:  # of a framework: any of them, and the next case may succeed
            said = {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
        print(json.dumps(said), file=answers, flush=True)

    answer(lambda: start() and "ready")
    for line in sys.stdin:
        gc.collect()
        gc.disable()
        answer(times, **json.loads(line))
        gc.enable()


# The driver: starts workers, asks them in turns, keeps what they answer


class Worker:
    """One process; it gets ready while others do. Keras finds no settings in its folder."""

    def __init__(self, name: str, folder: str):
        package = str(pathlib.Path(__file__).resolve().parent.parent)
        on_cpu = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        pools = "OMP_NUM", "OPENBLAS_NUM", "TF_NUM_INTRAOP", "TF_NUM_INTEROP"
        environment = (os.environ if name == "device" else os.environ | on_cpu) | {
            **{f"{pool}_THREADS": str(CORES) for pool in pools},
            "KERAS_BACKEND": BACKENDS.get(name, "jax"),
            "KERAS_HOME": folder,
            "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_ENABLE_DEPRECATION_WARNINGS": "0",
        }
        command = [
            sys.executable,
            "-c",
            f"from flax_dwconv import benchmark; benchmark.work({name!r})",
        ]
        self.ready, self._errors = False, tempfile.TemporaryFile()
        self.process: Any = subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=self._errors, env=environment, text=True
        )

    def ask(self, subject: Any, mode: str, budget: float) -> dict[str, Any]:
        """Returns the times of every variant; or raises what says why it cannot."""
        if not self.ready:
            self._answer()
            self.ready = True
        request = {"subject": subject, "mode": mode, "budget": budget}
        line = json.dumps(request, default=dataclasses.asdict)  # of a case
        with contextlib.suppress(BrokenPipeError):  # it is gone: `_answer` says why
            print(line, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        late = threading.Event()
        # Not every system can wait for a pipe for some time, but killing its writer ends it.
        timer = threading.Timer(TIMEOUT, lambda: (late.set(), self.process.kill()))
        try:
            timer.start()
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if late.is_set() or not line:
            code = self.process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().split("\n")[-1]
            ended = f"the worker ended with code {code}: {said or 'it said nothing'}"
            raise ChildProcessError(f"no answer within {TIMEOUT:g} s" if late.is_set() else ended)
        answer = json.loads(line)
        if "error" in answer:
            raise ChildProcessError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        with contextlib.suppress(BrokenPipeError), self.process:  # there may be an unread request
            self.process.kill()
        self._errors.close()


Key = tuple[str, str, str]  # label of a case or name of a network, mode, column of a table
Table = dict[Key, float]  # seconds; the columns are the workers, and what `Summary` adds


class Results:
    """All times of a run, and what went wrong."""

    def __init__(self):
        self.rounds: dict[int, Table] = {}  # with a column for each variant of a worker, too
        self.first: dict[tuple[str, str, str, str], float] = {}  # calls, by variant: they compile
        self.magnitudes: dict[Key, list[float]] = {}
        self.failures: dict[str, str] = {}

    def add(self, key: Key, round_: int, times: Mapping[str, Any]) -> None:
        """Adds a worker's answer."""
        table = self.rounds.setdefault(round_, {})
        table[key] = min(time_["seconds"] for time_ in times.values())
        for variant, time_ in times.items():
            table[*key[:2], f"{key[2]} {variant}"] = time_["seconds"]
            self.first.setdefault((*key, variant), time_["first"])
            if "magnitudes" in time_:
                self.magnitudes.setdefault(key, time_["magnitudes"])

    def fail(self, what: str, reason: str) -> None:
        """Reports a failure, once and at once."""
        if what not in self.failures:
            self.failures[what] = reason
            _progress(f"{what}: {reason}\n")

    def compare(self, labels, modes, workers: Iterable[str], other: str) -> None:
        """Reports the workers whose results are not those of another one."""
        for label, mode, worker in itertools.product(labels, modes, workers):
            a, b = (self.magnitudes.get((label, mode, name)) for name in (worker, other))
            if a and b and not (len(a) == len(b) and np.allclose(a, b, rtol=1e-3, atol=1e-6)):
                self.fail(f"{worker}, {label} {mode}", f"its results are not those of {other}")


def _progress(text: str) -> None:
    """Writes to stderr: over the last line of a terminal, as whole lines into a file."""
    if sys.stderr.isatty() or text.endswith("\n"):
        start = "\r\033[K" if sys.stderr.isatty() else ""
        print(f"{start}{text}", end="", file=sys.stderr, flush=True)


def take_turns(turns: list[Any], rounds: int, budget: float, results: Results) -> None:
    """Starts workers, asks them round after round, and ends them, whatever happens.

    A turn is the label of a subject, such as a case, the subject, modes and names of workers.
    What a worker could not do it is not asked again. One that crashed or did not answer is started
    again for what comes next, one that did not even start is not.
    """
    workers: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="flax_dwconv_"))

        def start(name):
            workers[name] = Worker(name, folder)
            stack.callback(workers[name].close)

        for name in dict.fromkeys(name for turn in turns for name in turn[-1]):
            start(name)
        for round_, (i, turn) in itertools.product(range(rounds), enumerate(turns, 1)):
            label, subject, modes, names = turn
            shift = round_ % len(names)  # nobody is always first
            for mode, name in itertools.product(modes, names[shift:] + names[:shift]):
                what = f"{name}, {label} {mode}"
                if name in results.failures or what in results.failures:
                    continue
                _progress(f"round {round_ + 1}/{rounds}, {i}/{len(turns)}: {what}")
                if workers[name].ready and workers[name].process.poll() is not None:
                    start(name)
                try:
                    times = workers[name].ask(subject, mode, budget)
                    results.add((label, mode, name), round_, times)
                except ChildProcessError as error:
                    results.fail(what if workers[name].ready else name, str(error))


def plan(args: argparse.Namespace, peers, networks, backends: list[str]) -> list[tuple[Any, Any]]:
    """Returns sessions of (turns, rounds, budget), and what describes their results."""
    rounds, budget = args.rounds, BUDGET[args.quick]
    device = [(case.label, case, LAYER_MODES, ["device"]) for case in args.cases or cases(True)]
    layers: list[Any] = [("machine", "machine", ["limit"], ["machine"])]
    for case in args.cases:
        layers.append((case.label, case, LAYER_MODES, [OURS, *peers]))
        if case.n > 1:
            layers.append((case.doubled.label, case.doubled, LAYER_MODES, [OURS]))
    alone = []  # each network and mode has workers of its own
    for network, mode in itertools.product(networks, NETWORK_MODES):
        for name in ON_JAX:  # compile in one more process: the less of two times counts
            alone.append(([(network + AGAIN, network, [mode], [name])], 1, COMPILE_BUDGET))
        alone.append(([(network, network, [mode], backends)], rounds, NETWORK_BUDGET))
    parts = [
        (args.device, [(device, rounds, budget)], describe_device),
        (args.cases, [(layers, rounds, budget)], describe_layers),
        (networks, alone, describe_networks),
    ]
    return [(sessions, describe) for wanted, sessions, describe in parts if wanted]


# Arithmetic: what sums up a run is made of quotients of two columns of a table

PEER, BACKEND = "best peer", "best backend"  # columns that are made of others
DOUBLED, LIMIT, DOUBLED_LIMIT, SECOND = "doubled batch", "limit", "doubled limit", "1 s"


def quotients(table: Table, labels, modes, over: str, under: str) -> dict[tuple[str, str], float]:
    """Returns {(label, mode): a time of column `over` / that of `under`}, where both exist."""
    return {
        (label, mode): table[label, mode, over] / table[label, mode, under]
        for label, mode in itertools.product(labels, modes)
        if table.get((label, mode, over)) and table.get((label, mode, under))
    }


def read_machine(table: Table) -> dict[str, Any] | None:
    """Returns the peak, operations/s, and the bandwidth, {bytes: bytes/s}, or None."""
    times = {column: s for (label, _, column), s in table.items() if label == "machine"}
    if not times:
        return None
    peak = 2 * MATRIX**3 / min(times["machine numpy"], times["machine jax"])
    bandwidth = {n: max(n, LEAST_COPIED) / times[f"machine {n}"] for n in COPIES}
    return {"peak": peak, "bandwidth": bandwidth}


def roofline(machine: Any, moved: int, operations: int) -> float:
    """Returns the least seconds for so many bytes and operations.

    Bytes move as fast as in the copy of the nearest size: caches are faster than memory.
    """
    bandwidth = machine["bandwidth"]
    size = min(bandwidth, key=lambda size: abs(math.log(size / moved)))
    return max(moved / bandwidth[size], operations / machine["peak"])


def verdict(reached: float | None, at_least: float, aim: float) -> str:
    """Returns what a number is beside its bounds; the more the better if the aim is the larger."""
    if reached is None:
        return "not measured"
    sign = -1 if aim > at_least else 1
    if sign * reached <= sign * aim:
        return "aim"
    return "at least" if sign * reached <= sign * at_least else "missed"


class Summary:
    """What a run comes to; `best` is the table of all rounds together, `rounds` are the others."""

    def __init__(self, results: Results, layers: Sequence[Case], peers, networks=()):
        self.results, self.layers, self.peers, self.networks = results, layers, peers, networks
        self.labels = [case.label for case in layers]
        self.batches = [case.label for case in layers if case.n > 1]
        self.large = [case.label for case in layers if case.moved("forward") > 1e6]
        self.rounds = [self._complete(dict(table)) for table in results.rounds.values()]
        keys = dict.fromkeys(key for table in self.rounds for key in table)
        self.best = {key: min(t[key] for t in self.rounds if key in t) for key in keys}
        self.machine = read_machine(self.best)
        for case, mode in itertools.product(layers if self.machine else (), LAYER_MODES):
            for column, subject in {LIMIT: case, DOUBLED_LIMIT: case.doubled}.items():
                limit = roofline(self.machine, subject.moved(mode), subject.operations(mode))
                for table in (self.best, *self.rounds):
                    table[case.label, mode, column] = limit
        for (label, mode, worker, _), first in results.first.items():
            key = label.removesuffix(AGAIN), mode, f"{worker} compile"
            seconds = max(0.0, first - self.best[label, mode, worker])
            self.best[key] = min(seconds, self.best.get(key, math.inf))

    def _complete(self, table: Table) -> Table:
        """Adds the columns that are made of others."""

        def add(label, mode, column, others):
            seconds = [table[other] for other in others if other in table]
            if seconds:
                table[label, mode, column] = min(seconds)

        for case, mode in itertools.product(self.layers, LAYER_MODES):
            add(case.label, mode, PEER, [(case.label, mode, peer) for peer in self.peers])
            add(case.label, mode, DOUBLED, [(case.doubled.label, mode, OURS)])
            table[case.label, mode, SECOND] = 1.0
        for network, mode in itertools.product(self.networks, NETWORK_MODES):
            add(network, mode, BACKEND, [(network, mode, name) for name in BACKENDS])
        return table

    def figure(self, reduce: Callable[[Iterable], float], *columns: Any) -> dict[str, float | None]:
        """Returns what sums up quotients, and the range of what single rounds say, or None."""
        found = (quotients(table, *columns).values() for table in (self.best, *self.rounds))
        value, *rounds = (reduce(ratios) if ratios else None for ratios in found)
        known = [number for number in rounds if number is not None]
        return {"value": value, "low": min(known, default=None), "high": max(known, default=None)}

    def milliseconds(self, *key: str) -> str:
        """Returns what is printed of a time."""
        return f"{self.best[key] * 1e3:.3f}" if key in self.best else "-"

    def spread(self, *key: str) -> str:
        """Returns the median over the rounds, divided by the minimum: 1 is a quiet machine."""
        seconds = [table[key] for table in self.rounds if key in table]
        return _number(median(seconds) / min(seconds) if seconds else None)

    def ratio(self, label: str, mode: str, over: str, under: str) -> str:
        """Returns what is printed of a quotient."""
        return _number(quotients(self.best, [label], [mode], over, under).get((label, mode)))

    def goals(self) -> list[dict[str, Any]]:
        """The Reach table: what is wanted at least, what is aimed at, and what was reached."""
        mean, worst, layers, others = geometric_mean, max, self.labels, "Keras's TF, torch"
        both, forward, train = LAYER_MODES, ["forward"], ["train"]
        networks, compile_ = (self.networks, NETWORK_MODES), (f"{FAST} compile", f"{PLAIN} compile")
        beside = f"network / best of {others}: worst"
        speedups = {"infer": [(5, 6), (5, 6), (2, 2.5)], "train": [(5, 8), (8, 10), (3.5, 5)]}

        def goal(name, at_least, aim, *columns):
            reached = self.figure(*columns)
            found = {"name": name, "at_least": at_least, "aim": aim, "reached": reached}
            word = verdict(reached["value"], at_least, aim)
            return found | {"speedup": aim > at_least, "verdict": word}

        return [
            goal("layer forward / best peer", 0.95, 0.75, mean, layers, forward, OURS, PEER),
            goal("layer train step / best peer", 0.8, 0.6, mean, layers, train, OURS, PEER),
            goal("worst single case, either", 1.4, 1.0, worst, layers, both, OURS, PEER),
            goal("over flax.linen.Conv, forward", 20, 30, mean, layers, forward, "linen", OURS),
            goal("over flax.linen.Conv, train step", 45, 80, mean, layers, train, "linen", OURS),
            *(
                goal(f"{name} over plain JAX, {mode}", *bounds, mean, [name], [mode], PLAIN, FAST)
                for mode in NETWORK_MODES
                for name, bounds in zip(NETWORKS, speedups[mode], strict=True)
            ),
            goal(beside, 0.95, 0.6, worst, *networks, FAST, BACKEND),
            goal(f"{beside}, pointwise", 0.95, 0.6, worst, *networks, POINTWISE, BACKEND),
            goal("network compile time / plain JAX: worst", 2.0, 1.3, worst, *networks, *compile_),
            goal("machine's limit, cases above 1 MB", 3, 2, mean, self.large, both, OURS, LIMIT),
            goal("time when the batch doubles", 2.2, 2.0, mean, layers, both, DOUBLED, OURS),
        ]


# What is printed


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns aligned columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    aligned = ([line[0].ljust(first), *map(str.rjust, line[1:], others)] for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def _number(value: float | None, unit: str = "") -> str:
    """Returns two or three digits and the unit, or a dash."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}{unit}"


def _range(figure: Mapping[str, Any], unit: str = "") -> str:
    """Returns what single rounds say, from the lowest to the highest."""
    low, high = figure["low"], figure["high"]
    return "-" if low is None else f"{_number(low)}..{_number(high)}{unit}"


def _with_range(figure: Mapping[str, Any], unit: str = "") -> str:
    rounds = f" (rounds {_range(figure, unit)})" if figure["low"] is not None else ""
    return _number(figure["value"], unit) + rounds


def describe_layers(summary: Summary) -> str:
    """Returns a table of the cases for each mode, and what they come to."""
    best, peers, text = summary.best, summary.peers, ""
    header = [*(field.name for field in dataclasses.fields(Case)), "ours ms", "spread"]
    header += [*(f"/{peer}" for peer in peers), "best peer", "spread", "/limit"]
    for mode in LAYER_MODES:
        rows = []
        for case in summary.layers:
            at = case.label, mode
            rivals = {peer: best[*at, peer] for peer in peers if (*at, peer) in best}
            winner = min(rivals, key=rivals.__getitem__, default="-")
            row = [*map(str, dataclasses.astuple(case))]
            row += [summary.milliseconds(*at, OURS), summary.spread(*at, OURS)]
            row += [summary.ratio(*at, OURS, peer) for peer in peers]
            row += [winner, summary.spread(*at, winner), summary.ratio(*at, OURS, LIMIT)]
            rows.append(row)
        text += f"layer = convolution + bias + relu6, {mode}: our time / peer's\n"
        text += f"{format_table(header, rows)}\n\n"
    return text + "\n".join(_layer_lines(summary))


def _layer_lines(summary: Summary) -> Iterator[str]:
    """Our layers beside their peers and the machine, and what it takes to compile them."""
    layers, peers, mean = summary.labels, summary.peers, geometric_mean
    lines: list[Any] = [
        ("our time / best peer's", layers, OURS, PEER, "", mean, max),
        *((f"speed-up over {peer}", layers, peer, OURS, "x", mean, min) for peer in peers),
        ("our time / the machine's limit above 1 MB", summary.large, OURS, LIMIT, "x", mean, max),
        ("time when the batch doubles", layers, DOUBLED, OURS, "x", mean, max),
        ("the machine's limit when it does", summary.batches, DOUBLED_LIMIT, LIMIT, "x", mean, max),
    ]
    for name in (OURS, *(peer for peer in ("linen", "haiku") if peer in peers)):
        columns = layers, f"{name} compile", SECOND
        lines.append((f"compile time of {name}", *columns, " s", median, max))
    for mode in LAYER_MODES:
        for what, labels, over, under, unit, middle, worst in lines:
            columns = labels, [mode], over, under
            if found := quotients(summary.best, *columns):
                text = _with_range(summary.figure(middle, *columns), unit)
                extreme = _with_range(summary.figure(worst, *columns), unit)
                where, _ = worst(found, key=found.__getitem__)
                name = middle.__name__.replace("_", " ")
                text += f" of {len(found)} cases; worst: {extreme}, {where}"
                yield f"{mode}, {what}, {name}: {text}"
    if summary.machine:
        rates = summary.machine["bandwidth"].items()
        copies = ", ".join(f"{rate / 1e9:.1f} GB/s at {moved // MIB} MiB" for moved, rate in rates)
        yield f"machine: {summary.machine['peak'] / 1e9:.0f} GFLOP/s; copies move {copies}"


def describe_networks(summary: Summary) -> str:
    """Returns the table of the networks, times with their spread, and that of what compiles."""
    rows, mean, plain = [], geometric_mean, f"{PLAIN} compile"
    ways = {FAST: "", POINTWISE: ", pointwise"}  # that `accelerate` works in
    for network, mode, fast in itertools.product(summary.networks, NETWORK_MODES, ways):
        at, row = (network, mode), [f"{network} {mode}{ways[fast]}"]
        for name in (PLAIN, fast, *BACKENDS):
            row.append(f"{summary.milliseconds(*at, name)} ~{summary.spread(*at, name)}")
        row.append(_with_range(summary.figure(mean, [network], [mode], PLAIN, fast), "x"))
        row.append(_with_range(summary.figure(mean, [network], [mode], fast, BACKEND)))
        fast = f"{fast} compile"
        row += [_number(summary.best.get((*at, column)), " s") for column in (plain, fast)]
        rows.append([*row, summary.ratio(*at, fast, plain)])
    header = ["ms ~spread", "plain JAX", "accelerated", "TensorFlow", "torch", "speed-up"]
    header += ["/best backend", "compile plain", "accelerated", "ratio"]
    title = "networks, batch 1, 224x224; ratio of compile times: accelerated / plain\n"
    return title + format_table(header, rows)


def describe_device(summary: Summary) -> str:
    """Returns the table of both methods on a GPU or TPU, or why there is none."""
    columns, rows = ("device auto", "device lax"), []
    for at in (key[:2] for key in summary.best if key[2] == "device"):
        times = [summary.milliseconds(*at, column) for column in columns]
        spreads = [summary.spread(*at, column) for column in columns]
        rows.append([" ".join(at), *times, *spreads, summary.ratio(*at, *columns)])
    if not rows:
        return f"device, skipped: {summary.results.failures.get('device', 'nothing was measured')}"
    return format_table(["device", "auto ms", "lax ms", "spread", "spread", "auto/lax"], rows)


def describe_goals(goals: Iterable[Mapping[str, Any]]) -> str:
    """Returns the Reach table."""
    rows = []
    for goal in goals:
        unit, reached = "x" if goal["speedup"] else "", goal["reached"]
        bounds = [f"{goal[bound]:g}{unit}" for bound in ("at_least", "aim")]
        numbers = _number(reached["value"], unit), _range(reached, unit)
        rows.append([goal["name"], *bounds, *numbers, goal["verdict"]])
    return format_table(["reach", "at least", "aim", "reached", "rounds", "verdict"], rows)


def hardware() -> dict[str, Any]:
    """Returns the CPU's model, the cores that we may use, and the versions of all that is timed."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")  # Linux only
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    model = names[0] if names else platform.processor() or platform.machine()
    versions = {"python": platform.python_version()}
    for package in "jax jaxlib keras numpy torch tensorflow tensorflow-cpu flax dm-haiku".split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": model, "system": system, "cores": CORES, "versions": versions}


def as_json(summary: Summary, **run: Any) -> str:
    """Returns all raw numbers and the figures, with `run`, which says what was run where."""
    raw = []
    for (label, mode, worker, variant), first in summary.results.first.items():
        key = label, mode, f"{worker} {variant}"
        row = {"case": label, "mode": mode, "worker": worker, "variant": variant}
        seconds = [table[key] for table in summary.rounds if key in table]
        raw.append(row | {"seconds": seconds, "first_call_seconds": first})
    compile_ = [
        {"network": network, "mode": mode, "worker": name, "seconds": summary.best[key]}
        for network, mode, name in itertools.product(summary.networks, NETWORK_MODES, ON_JAX)
        if (key := (network, mode, f"{name} compile")) in summary.best
    ]
    document = run | {
        "machine": summary.machine,
        "cases": [dataclasses.asdict(case) | {"label": case.label} for case in summary.layers],
        "reach": summary.goals(),
        "compile": compile_,
        "failures": summary.results.failures,
        "raw": raw,
    }
    return json.dumps(document, indent=1) + "\n"


COLORS = {"torch": "#d9702b", "tensorflow": "#c9a227", "linen": "#1f5a96", "haiku": "#5aa0a0"}
MARKERS = {"torch": "o", "tensorflow": "s", "linen": "o", "haiku": "x"}


def draw(summary: Summary, path: pathlib.Path) -> None:
    """Saves a chart: how many times longer than ours every peer takes, case by case."""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no window, no display
    from matplotlib.ticker import LogLocator

    layers, labels, best = summary.layers, summary.labels, summary.best
    style = {"font.size": 9, "ytick.labelsize": 8, "axes.grid": True, "grid.alpha": 0.25}
    with matplotlib.style.context(["default", style]):
        canvas: Any = Figure(figsize=(11, 2.2 + 0.21 * len(layers)), layout="constrained")
        panels = canvas.subplots(1, 2, sharey=True)
        for axes, mode in zip(panels, LAYER_MODES, strict=True):
            for (label, _), ratio in quotients(best, labels, [mode], PEER, OURS).items():
                row, color = labels.index(label), "#b3262e" if ratio < 1 else "#8a8f98"
                axes.plot([1, ratio], [row, row], color=color, lw=3, alpha=0.45, zorder=2)
            for peer in summary.peers:
                if found := quotients(best, labels, [mode], peer, OURS):
                    rows = [labels.index(label) for label, _ in found]
                    look = {"c": COLORS[peer], "marker": MARKERS[peer], "label": peer}
                    axes.scatter([*found.values()], rows, 26, zorder=3, **look)
            axes.axvline(1, color="black", lw=1, zorder=1)
            mean = summary.figure(geometric_mean, labels, [mode], PEER, OURS)["value"]
            note = f": best peer takes {_number(mean)}x ours" if mean else ""
            axes.set_title(f"{mode}{note}", fontsize=11, fontweight="bold")
            axes.set(xscale="log", xlabel="peer's time / our time")
            axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}x")
            axes.xaxis.set_minor_formatter("")
            axes.spines[["top", "right"]].set_visible(False)
        names = [f"{c.name}   {c.h}x{c.w}x{c.c} k{c.k} s{c.stride} n{c.n}" for c in layers]
        panels[0].set_yticks(range(len(layers)), names)
        panels[0].set_ylim(len(layers) - 0.5, -0.5)
        handles = panels[0].get_legend_handles_labels()
        canvas.legend(*handles, loc="outside lower center", ncols=len(PEERS), frameon=False)
        canvas.suptitle("Depthwise convolution + bias + relu6 on CPU: right of 1x, we are faster")
        buffer = io.BytesIO()  # in memory first: no half-written file, whatever happens
        canvas.savefig(buffer, format=path.suffix[1:].lower(), dpi=130)
    path.write_bytes(buffer.getvalue())


# The command line


def _positive(text: str) -> int:
    """An argparse type: an integer from 1 to 1000."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:5]) <= 1000):
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 1000, got {text!r}.")
    return int(text)


def _chosen(known: Iterable[str], text: str) -> list[str]:
    """An argparse type: some of the known names, separated by commas."""
    chosen = dict.fromkeys(name.strip() for name in text.split(","))
    if not chosen.keys() <= set(known):
        raise argparse.ArgumentTypeError(f"must be some of {','.join(known)}, got {text!r}.")
    return list(chosen)


def _file(suffixes: Sequence[str], text: str) -> pathlib.Path:
    """An argparse type: a file that can be written, with one of these suffixes."""
    path = pathlib.Path(text).resolve()
    for wrong, reason in [
        (path.suffix.lower() not in suffixes, f"must end in {', '.join(suffixes)}, got"),
        (not path.parent.is_dir(), "must be in a folder that exists, got"),
        (path.is_dir(), "must be a file, got the folder"),
        (not os.access(path if path.exists() else path.parent, os.W_OK), "must be writable, got"),
    ]:
        if wrong:
            raise argparse.ArgumentTypeError(f"{reason} {text!r}.")
    return path


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, all checked; exits with code 2 and the reason for a bad one."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_dwconv.benchmark",
        description="Time this package beside PyTorch, TensorFlow, flax.linen and haiku.",
        epilog="Without --layers and --networks both parts run, with --quick the layers only.",
    )
    add, error, some = parser.add_argument, parser.error, functools.partial
    add("--quick", action="store_true", help="a dozen layers, few rounds: some minutes")
    layers = "time layers; which, by patterns of names such as 'Xception*,MobileNetV1-7/32'"
    add("--layers", nargs="?", const="*", metavar="PATTERNS", help=layers)
    whole = f"time whole networks; which, of {','.join(NETWORKS)}"
    add("--networks", nargs="?", const=[*NETWORKS], type=some(_chosen, NETWORKS), help=whole)
    beside = f"of {','.join(PEERS)}; default all"
    add("--peers", default=[*PEERS], type=some(_chosen, PEERS), help=beside)
    add("--rounds", type=_positive, help=f"default {ROUNDS[0]}, with --quick {ROUNDS[1]}")
    add("--device", action="store_true", help="time both methods on a GPU or TPU, too")
    add("--json", type=some(_file, [".json"]), metavar="FILE", help="save all numbers")
    pictures = some(_file, [".png", ".jpg", ".pdf", ".svg"])
    add("--plot", type=pictures, metavar="FILE", help="save a chart of the layers")
    args = parser.parse_args(argv)
    # What depends on several arguments, and what was left out.
    if args.quick and args.networks:
        error("argument --networks: not allowed with argument --quick.")
    if args.layers is None and args.networks is None:
        args.layers, args.networks = "*", [] if args.quick else list(NETWORKS)
    args.networks = args.networks or []
    args.rounds = args.rounds or ROUNDS[args.quick]
    args.cases = []
    for pattern in args.layers.split(",") if args.layers is not None else []:
        known = cases(args.quick)
        found = [case for case in known if fnmatch.filter([case.name, case.label], pattern)]
        if not found:
            error(f"argument --layers: must match names of layers, got {pattern!r}.")
        args.cases += [case for case in found if case not in args.cases]
    if args.plot and not args.cases:
        error("argument --plot: needs layers, which --networks alone leaves out.")
    if args.plot and not importlib.util.find_spec("matplotlib"):
        error("argument --plot: needs matplotlib: pip install 'flax_dwconv[bench]'.")
    return args


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Times what was chosen; prints, saves and draws what came out."""
    machine = hardware()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}; {versions}")
    print(f"{args.rounds} rounds in turns; {HOW}")
    keras = {**BACKENDS, "keras": "keras"} if args.networks else {}
    needed = {peer: PEERS[peer] for peer in args.peers} | keras
    absent = [name for name, module in needed.items() if not importlib.util.find_spec(module)]
    peers = [peer for peer in args.peers if peer not in absent]
    backends = [*ON_JAX, *(name for name in BACKENDS if name not in absent)]
    networks = [] if "keras" in absent else args.networks
    if absent:
        print(f"absent, skipped: {', '.join(absent)} (pip install 'flax_dwconv[bench]')")
    print(flush=True)

    start, stopped, results = time.perf_counter(), False, Results()
    summary = Summary(results, args.cases, peers, networks)
    for sessions, describe in plan(args, peers, networks, backends):
        try:
            for turns, rounds, budget in sessions:
                take_turns(turns, rounds, budget, results)
        except KeyboardInterrupt:
            stopped = True
        _progress("")
        results.compare(summary.labels, LAYER_MODES, peers, OURS)
        results.compare(networks, NETWORK_MODES, [FAST, POINTWISE], PLAIN)
        summary = Summary(results, args.cases, peers, networks)
        note = "stopped by Ctrl-C: what follows had been measured until then\n\n" if stopped else ""
        print(f"{note}{describe(summary)}\n", flush=True)
        if stopped:
            break

    print(describe_goals(summary.goals()))
    for what, reason in results.failures.items():
        print(f"failed: {what}: {reason}")
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        command = shlex.join(["python", "-m", "flax_dwconv.benchmark", *argv])
        run = {"command": command, "hardware": machine, "rounds": args.rounds, "absent": absent}
        args.json.write_text(as_json(summary, **run, stopped=stopped), encoding="utf-8")
    if args.plot:
        draw(summary, args.plot)
    measured = any(worker in (OURS, FAST, "device") for _, _, worker, _ in results.first)
    return 130 if stopped else 0 if measured else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark, with the command line's arguments if `argv` is None: the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    try:
        return _run(args, argv)
    except KeyboardInterrupt:  # while nothing is measured
        print("\nStopped.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"The benchmark could not finish: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # Ended politely, the driver still ends its workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
