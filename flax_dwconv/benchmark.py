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
and the gradients to input, kernel and bias for a given cotangent. Networks are those of
`keras.applications` with random weights; "infer" is the compiled model, "train" the loss, its
gradients and a step of SGD.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import gc
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pathlib
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np

OURS = "flax_dwconv"
PEERS = {  # name -> the module that it needs, and the packages that may have brought it
    "torch": ("torch", ["torch"]),
    "tensorflow": ("tensorflow", ["tensorflow", "tensorflow-cpu"]),
    "linen": ("flax", ["flax"]),
    "haiku": ("haiku", ["dm-haiku"]),
}
PLAIN, FAST = "keras-jax", "keras-jax-accelerated"
BACKENDS = {"keras-tensorflow": "tensorflow", "keras-torch": "torch"}
NETWORKS = ("MobileNetV2", "EfficientNetB0", "ConvNeXtTiny")
LAYER_MODES, NETWORK_MODES = ("forward", "train"), ("infer", "train")
MIB = 2**20
ROUNDS = 5, 3  # in full, quick
BUDGET = 0.2, 0.05  # seconds of repeating one call in one round, in full and quick
NETWORK_BUDGET = 1.0
COMPILATIONS = 2  # fresh processes that compile each network; the minimum counts
FORMATS = (".png", ".jpg", ".pdf", ".svg")


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
    def in_shape(self) -> tuple[int, ...]:
        """The shape of the input, `(n, h, w, c)`."""
        return self.n, self.h, self.w, self.c

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the result, `(n, ho, wo, c)`."""
        reach = self.k if self.padding == "valid" else 1
        ho, wo = ((size - reach) // self.stride + 1 for size in (self.h, self.w))
        return self.n, ho, wo, self.c

    def moved(self, mode: str) -> int:
        """Returns the bytes that any implementation must move: each operand and result, once.

        Forward: x, kernel and bias in, y out. A train step: the cotangent in and three gradients
        out besides, which doubles all of them.
        """
        weights = (self.k**2 + 1) * self.c
        elements = math.prod(self.in_shape) + math.prod(self.out_shape) + weights
        return 4 * elements * (1 if mode == "forward" else 2)

    def operations(self, mode: str) -> int:
        """Returns additions and multiplications; each gradient costs as much as the forward."""
        return 2 * self.k**2 * math.prod(self.out_shape) * (1 if mode == "forward" else 3)

    def arrays(self, flip: bool = False) -> list[np.ndarray]:
        """Returns x, kernel `(k, k, c, 1)`, bias and cotangent: the same in every worker.

        Args:
          flip: turns rows and columns around, which turns "same" padding around, too.
        """
        block = np.random.default_rng(0).standard_normal(65521, np.float32)  # prime: no stripes
        x, kernel, bias, g = (
            np.resize(block, shape)
            for shape in (self.in_shape, (self.k, self.k, self.c, 1), self.c, self.out_shape)
        )
        if flip:
            x, kernel, g = x[:, ::-1, ::-1], kernel[::-1, ::-1], g[:, ::-1, ::-1]
        return [np.ascontiguousarray(array) for array in (x, kernel, bias, g)]


# The depthwise layers of keras.applications, each where it appears first. The strided ones of the
# MobileNets and EfficientNet are a ZeroPadding2D and "valid" there: "same" pads alike. `n` lists
# the batch sizes. A star marks those of `--quick`, and the batch size that is taken there.
_TABLE = """
name            n      h   w    c  k stride padding
MobileNetV1-1   1*,8  112 112   32  3  1  same
MobileNetV1-2   1,8   112 112   64  3  2  same
MobileNetV1-3   1,8    56  56  128  3  1  same
MobileNetV1-4   1,8    56  56  128  3  2  same
MobileNetV1-5   1,8    28  28  256  3  1  same
MobileNetV1-6   1,8    28  28  256  3  2  same
MobileNetV1-7   1*,32  14  14  512  3  1  same
MobileNetV1-8   1,32   14  14  512  3  2  same
MobileNetV1-9   1,32*   7   7 1024  3  1  same
MobileNetV2-1   1*,8  112 112   96  3  2  same
MobileNetV2-2   1,8*   56  56  144  3  1  same
MobileNetV2-3   1,8    56  56  144  3  2  same
MobileNetV2-4   1,8    28  28  192  3  1  same
MobileNetV2-5   1,8    28  28  192  3  2  same
MobileNetV2-6   1,32   14  14  384  3  1  same
MobileNetV2-7   1,32   14  14  576  3  1  same
MobileNetV2-8   1,32*  14  14  576  3  2  same
MobileNetV2-9   1,32    7   7  960  3  1  same
MobileNetV3-1   1,8   112 112   16  3  1  same
MobileNetV3-2   1,8   112 112   16  3  2  same
MobileNetV3-3   1,8    56  56   72  3  1  same
MobileNetV3-4   1,8    56  56   72  3  2  same
MobileNetV3-5   1,8    56  56   72  5  2  same
MobileNetV3-6   1,8    28  28   88  3  1  same
MobileNetV3-7   1,8    28  28   96  5  2  same
MobileNetV3-8   1*,8   28  28  120  5  1  same
MobileNetV3-9   1,32   14  14  120  5  1  same
MobileNetV3-10  1,32   14  14  144  5  1  same
MobileNetV3-11  1,32   14  14  184  3  1  same
MobileNetV3-12  1,32   14  14  200  3  1  same
MobileNetV3-13  1,32   14  14  240  5  1  same
MobileNetV3-14  1,32   14  14  288  5  2  same
MobileNetV3-15  1,32   14  14  672  3  1  same
MobileNetV3-16  1,32    7   7  576  5  1  same
MobileNetV3-17  1,32    7   7  960  5  1  same
EfficientNet-1  1,8*   56  56  144  5  2  same
EfficientNet-2  1,8    28  28  240  3  2  same
EfficientNet-3  1,8    28  28  240  5  1  same
EfficientNet-4  1,32   14  14  480  3  1  same
EfficientNet-5  1,32   14  14  480  5  1  same
EfficientNet-6  1*,32  14  14  672  5  1  same
EfficientNet-7  1,32   14  14  672  5  2  same
EfficientNet-8  1,32    7   7 1152  3  1  same
EfficientNet-9  1,32    7   7 1152  5  1  same
Xception-1      1,8   147 147   64  3  1  same
Xception-2      1*,8  147 147  128  3  1  same
Xception-3      1,8    74  74  128  3  1  same
Xception-4      1,8    74  74  256  3  1  same
Xception-5      1,8    37  37  256  3  1  same
Xception-6      1,8    37  37  728  3  1  same
Xception-7      1,8    19  19  728  3  1  same
Xception-8      1,32   10  10 1024  3  1  same
Xception-9      1,32   10  10 1536  3  1  same
ConvNeXtTiny-1  1*,8   56  56   96  7  1  same
ConvNeXtTiny-2  1,8    28  28  192  7  1  same
ConvNeXtTiny-3  1,32   14  14  384  7  1  same
ConvNeXtTiny-4  1,32*   7   7  768  7  1  same
"""


def cases(quick: bool = False) -> list[Case]:
    """Returns the cases of the table, all of them or a dozen that represent them."""
    found = []
    for row in _TABLE.split("\n")[2:-1]:
        name, batches, *sizes, padding = row.split()
        for n in batches.split(","):
            if not quick or n.endswith("*"):
                h, w, c, k, stride = map(int, sizes)
                found.append(Case(name, int(n.rstrip("*")), h, w, c, k, stride, padding))
    return found


# Workers: the peers, each in a function that imports it. A worker function returns
# `build(subject, mode)`, which returns a function without arguments for each way to do the work;
# such a function returns when its results are there, and returns them.

Variants = dict[str, Callable[[], Sequence[Any]]]
Build = Callable[[Any, str], Variants]


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _jax_worker(layer: Callable[[Case], tuple[Callable, Callable]]) -> Build:
    """Makes a worker of `layer(case) -> (apply(params, x), params(kernel, bias))`."""
    import jax

    jax.block_until_ready(jax.jit(lambda x: x + 1)(np.ones(8)))  # start XLA before compile times

    @functools.cache  # jax.jit keeps what it compiled with the function
    def compiled(case, mode):
        apply, params = layer(case)
        if mode == "forward":
            return jax.jit(lambda params, x, g: [apply(params, x)]), params

        def train(params, x, g):
            y, vjp = jax.vjp(apply, params, x)
            weights, dx = vjp(g)
            # In the order of the other workers: JAX sorts the biases before the kernels.
            return [y, dx, *reversed(jax.tree.leaves(weights))]

        return jax.jit(train), params

    def build(case, mode):
        f, params = compiled(case, mode)
        x, kernel, bias, g = map(jax.numpy.asarray, case.arrays())
        weights = params(kernel, bias)
        return {"jit": lambda: jax.block_until_ready(f(weights, x, g))}

    return build


def _our_layer(case: Case, method: Any = "auto") -> tuple[Callable, Callable]:
    """This package's layer."""
    import flax_dwconv

    layer = flax_dwconv.DepthwiseConv2D(
        case.k,
        case.stride,
        case.padding,
        data_format="channels_last",
        activation="relu6",
        method=method,
    )

    def apply(params, x):
        return layer.apply({"params": params}, x)

    return apply, lambda kernel, bias: {"bias": bias, "kernel": kernel}


def _linen_layer(case: Case) -> tuple[Callable, Callable]:
    """`flax.linen.Conv`, one group for each channel."""
    import flax.linen as nn

    layer = nn.Conv(
        case.c,
        (case.k, case.k),
        case.stride,
        case.padding.upper(),
        feature_group_count=case.c,
    )

    def apply(params, x):
        y: Any = layer.apply({"params": params}, x)
        return nn.relu6(y)

    return apply, lambda kernel, bias: {"bias": bias, "kernel": kernel.swapaxes(2, 3)}


def _haiku_layer(case: Case) -> tuple[Callable, Callable]:
    """`haiku.DepthwiseConv2D`."""
    import haiku
    import jax

    def forward(x):
        padding = case.padding.upper()
        layer = haiku.DepthwiseConv2D(1, case.k, case.stride, padding=padding, name="depthwise")
        return jax.nn.relu6(layer(x))

    layer = haiku.without_apply_rng(haiku.transform(forward))
    return layer.apply, lambda kernel, bias: {"depthwise": {"b": bias, "w": kernel.swapaxes(2, 3)}}


def _torch() -> Any:
    """Imports PyTorch, told to use all cores."""
    import torch

    torch.set_num_threads(_cores())
    return torch


def _tensorflow() -> Any:
    """Imports TensorFlow, told to use all cores, which it must be before it does anything."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(_cores())
    tf.config.threading.set_inter_op_parallelism_threads(_cores())
    return tf


def _torch_worker() -> Build:
    """PyTorch, in both of its memory formats."""
    from torch.nn import functional

    torch = _torch()

    def build(case, mode):
        # PyTorch pads both sides alike. On flipped images that is what "same" does, since the
        # window never reaches the last row: the same work and the same numbers.
        same = case.padding == "same"
        x, kernel, bias, g = map(torch.from_numpy, case.arrays(flip=same))
        x, kernel, g = x.permute(0, 3, 1, 2), kernel.permute(2, 3, 0, 1), g.permute(0, 3, 1, 2)

        def layer(x, kernel, bias):
            y = functional.conv2d(
                x, kernel, bias, case.stride, case.k // 2 if same else 0, groups=case.c
            )
            return functional.relu6(y, inplace=True)

        def variant(memory_format):
            *operands, cotangent = (
                array.clone(memory_format=memory_format) if array.ndim == 4 else array.clone()
                for array in (x, kernel, bias, g)
            )

            @torch.inference_mode()
            def forward():
                return [layer(*operands)]

            def train():
                y = layer(*operands)
                return [y, *torch.autograd.grad(y, operands, cotangent)]

            if mode == "train":
                for array in operands:
                    array.requires_grad_()
            return train if mode == "train" else forward

        return {
            "channels-last": variant(torch.channels_last),
            "contiguous": variant(torch.contiguous_format),
        }

    return build


def _tensorflow_worker() -> Build:
    """TensorFlow, as a `tf.function`."""
    tf = _tensorflow()

    @functools.cache  # a tf.function keeps its graphs
    def compiled(case, mode):
        def layer(x, kernel, bias):
            strides = [1, case.stride, case.stride, 1]
            y = tf.nn.depthwise_conv2d(x, kernel, strides, case.padding.upper())
            return tf.nn.relu6(tf.nn.bias_add(y, bias))

        def forward(*operands):
            return [layer(*operands[:3])]

        def train(x, kernel, bias, g):
            with tf.GradientTape() as tape:
                tape.watch([x, kernel, bias])
                y = layer(x, kernel, bias)
            return [y, *tape.gradient(y, [x, kernel, bias], g)]

        return tf.function(train if mode == "train" else forward)

    def build(case, mode):
        f, arrays = compiled(case, mode), [tf.constant(array) for array in case.arrays()]
        return {"function": lambda: f(*arrays)}

    return build


def _device_worker() -> Build:
    """`method="auto"` and `method="lax"` on the GPU or TPU that JAX found."""
    import jax

    if jax.default_backend() == "cpu":
        raise RuntimeError(f"JAX {jax.__version__} found no GPU or TPU here, only the CPU")
    methods = {
        method: _jax_worker(functools.partial(_our_layer, method=method))
        for method in ("auto", "lax")
    }

    def build(case, mode):
        return {method: build(case, mode)["jit"] for method, build in methods.items()}

    return build


def _keras_worker(backend: str, accelerated: bool = False) -> Build:
    """A network of `keras.applications` on a backend; the environment has told Keras which."""
    frameworks = {"tensorflow": _tensorflow, "torch": _torch}
    if backend in frameworks:
        frameworks[backend]()
    import keras

    functions: dict[str, Callable] = {
        "jax": functools.partial(_keras_on_jax, accelerated=accelerated),
        "tensorflow": _keras_on_tensorflow,
        "torch": _keras_on_torch,
    }

    def loss(y, logits):
        return keras.ops.mean(
            keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
        )

    def build(network, mode):
        keras.utils.set_random_seed(0)
        model = getattr(keras.applications, network)(weights=None, classifier_activation=None)
        x = np.random.default_rng(0).standard_normal((1, 224, 224, 3), np.float32)
        return functions[backend](model, loss, x, np.array([1]), mode)

    return build


RATE = 1e-4  # of SGD: too low to lead anywhere


def _keras_on_jax(model, loss, x, y, mode, accelerated: bool) -> Variants:
    """The model as pure functions under `jax.jit`, its state donated as Keras's trainer does."""
    import jax

    import flax_dwconv

    x, y = jax.numpy.asarray(x), jax.numpy.asarray(y)
    state = [
        [v.value for v in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]

    def infer(weights, others):
        return model.stateless_call(weights, others, x, training=False)[0]

    def train(weights, others):
        def objective(weights):
            logits, new = model.stateless_call(weights, others, x, training=True)
            return loss(y, logits), new

        (value, others), gradients = jax.value_and_grad(objective, has_aux=True)(weights)
        weights = [w - RATE * g for w, g in zip(weights, gradients, strict=True)]
        return value, [weights, others]

    compiled = jax.jit(infer) if mode == "infer" else jax.jit(train, donate_argnums=(0, 1))
    if accelerated:
        compiled = flax_dwconv.accelerate(compiled)

    def run():
        nonlocal state
        if mode == "infer":
            return [jax.block_until_ready(compiled(*state))]
        value, state = jax.block_until_ready(compiled(*state))
        return [value]

    return {"jit": run}


def _keras_on_tensorflow(model, loss, x, y, mode) -> Variants:
    """The model as a `tf.function`."""
    import tensorflow as tf

    x, y = tf.constant(x), tf.constant(y)
    weights = [v.value for v in model.trainable_variables]

    @tf.function
    def infer():
        return model(x, training=False)

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        for w, g in zip(weights, tape.gradient(value, weights), strict=True):
            w.assign_sub(RATE * g)
        return value

    run = infer if mode == "infer" else train
    return {"function": lambda: [run()]}


def _keras_on_torch(model, loss, x, y, mode) -> Variants:
    """The model as PyTorch runs it: eagerly."""
    import torch

    x, y = torch.from_numpy(x), torch.from_numpy(y)
    weights = [v.value for v in model.trainable_variables]

    @torch.inference_mode()
    def infer():
        return [model(x, training=False)]

    def train():
        value = loss(y, model(x, training=True))
        gradients = torch.autograd.grad(value, weights)
        with torch.no_grad():
            for w, g in zip(weights, gradients, strict=True):
                w.sub_(g, alpha=RATE)
        return [value]

    return {"eager": infer if mode == "infer" else train}


# The machine itself: copies of `COPIES` bytes moved, half read and half written, from what fits
# into a core's own cache to what fits into none, and matrix products.
COPIES = [MIB << i for i in range(9)]
LEAST_COPIED = 32 * MIB  # small copies are repeated up to this, or starting threads would show
MATRIX = 1024


def _machine_worker() -> Build:
    """Copies by numpy, matrix products by numpy and JAX, on all cores."""
    import jax

    threads = _cores()
    pool = ThreadPoolExecutor(threads)

    def copy(moved):
        parts = [np.ones((2, moved // 8 // threads), np.float32) for _ in range(threads)]

        def part(array):
            source, target = array
            for _ in range(max(1, LEAST_COPIED // moved)):
                np.copyto(target, source)

        return lambda: list(pool.map(part, parts))

    def build(subject: Any, mode: str) -> Any:
        a = np.random.default_rng(0).standard_normal((MATRIX, MATRIX), np.float32)
        b, product = jax.numpy.asarray(a), jax.jit(jax.numpy.matmul)
        return {
            "numpy": lambda: [a @ a],
            "jax": lambda: [jax.block_until_ready(product(b, b))],
            **{str(moved): copy(moved) for moved in COPIES},
        }

    return build


WORKERS: dict[str, Callable[[], Build]] = {
    OURS: lambda: _jax_worker(_our_layer),
    "linen": lambda: _jax_worker(_linen_layer),
    "haiku": lambda: _jax_worker(_haiku_layer),
    "torch": _torch_worker,
    "tensorflow": _tensorflow_worker,
    PLAIN: lambda: _keras_worker("jax"),
    FAST: lambda: _keras_worker("jax", accelerated=True),
    **{name: functools.partial(_keras_worker, backend) for name, backend in BACKENDS.items()},
    "machine": _machine_worker,
    "device": _device_worker,
}


def _clock(f: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = f()
    return time.perf_counter() - start, result


def measure(f: Callable[[], Any], budget: float, fresh: bool) -> tuple[float, float, Any]:
    """Times a function.

    Args:
      f: the function, without arguments.
      budget: seconds to repeat it for, after warming up for a quarter of that.
      fresh: whether the first call compiles.

    Returns:
      The seconds of the first call, the lower quartile of those that count, and a result.
    """
    first, result = _clock(f)
    calls = [] if fresh else [first]
    while sum(calls) < budget / 4:
        calls.append(_clock(f)[0])
    if sum(calls) < budget:  # they were the warm-up; a call slower than all that needs none
        calls = []
        while sum(calls) < budget:
            calls.append(_clock(f)[0])
    return first, sorted(calls)[len(calls) // 4], result


def _magnitudes(arrays: Sequence[Any]) -> list[float]:
    """Returns the mean magnitude of each result, to compare the peers' by."""
    arrays = [a.detach() if hasattr(a, "detach") else a for a in arrays]  # PyTorch
    return [float(np.abs(np.asarray(a, np.float64)).mean()) for a in arrays if a is not None]


class Work:
    """What a worker remembers between requests."""

    def __init__(self, build: Build):
        self._build = build
        self._last: tuple[Any, Variants] = None, {}  # holds arrays: of one request at a time
        self._ran: set[Any] = set()

    def times(self, subject: Any, mode: str, budget: float) -> dict[str, dict[str, Any]]:
        """Returns the times of every variant, and at first the magnitudes of its results."""
        subject = Case(**subject) if isinstance(subject, dict) else subject
        if self._last[0] != (subject, mode):
            self._last = None, {}
            self._last = (subject, mode), self._build(subject, mode)
        found: dict[str, dict[str, Any]] = {}
        for variant, f in self._last[1].items():
            fresh = (subject, mode, variant) not in self._ran
            first, seconds, result = measure(f, budget, fresh)
            found[variant] = {"first": first, "seconds": seconds}
            if fresh and subject != "machine":
                found[variant]["magnitudes"] = _magnitudes(result)
            self._ran.add((subject, mode, variant))
        return found


def work(name: str) -> None:
    """Runs a worker: answers JSON lines on stdin with JSON lines on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its workers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like an answer

    def attempt(f: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"answer": f()}
        except Exception as error:  # of a framework: any of them, and the next case may succeed
            return {"error": f"{type(error).__name__}: {error}".split("\n")[0]}

    def start() -> str:
        nonlocal worker
        worker = Work(WORKERS[name]())
        return "ready"

    worker: Any = None
    print(json.dumps(attempt(start)), file=answers, flush=True)
    for line in sys.stdin if worker else ():
        gc.collect()
        gc.disable()
        answer = attempt(functools.partial(worker.times, **json.loads(line)))
        gc.enable()
        print(json.dumps(answer), file=answers, flush=True)


# The driver: starts workers, asks them in turns, keeps what they answer


class WorkerError(Exception):
    """A worker could not do a case, or is gone."""


class Worker:
    """One worker process."""

    def __init__(self, name: str, folder: str):
        """Starts it; it gets ready while others do, and the first `ask` waits for that.

        Args:
          name: one of `WORKERS`.
          folder: where Keras finds no settings of the user's.
        """
        self.name = name
        package = str(pathlib.Path(__file__).resolve().parent.parent)
        threads = str(_cores())
        environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "JAX_PLATFORMS": "cpu",
            "KERAS_BACKEND": BACKENDS.get(name, "jax"),
            "KERAS_HOME": folder,
            "OMP_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
            "PYTHONWARNINGS": "ignore",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_ENABLE_DEPRECATION_WARNINGS": "0",
        }
        if name == "device":  # whatever JAX finds
            for variable in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
                environment.pop(variable)
                if variable in os.environ:
                    environment[variable] = os.environ[variable]
        self._errors = tempfile.TemporaryFile()
        self.ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flax_dwconv.benchmark", "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            encoding="utf-8",
        )
        assert self._process.stdin and self._process.stdout  # they are pipes
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def ask(self, subject: Any, mode: str, budget: float) -> dict[str, Any]:
        """Returns the times of every variant.

        Raises:
          WorkerError: with the reason, if the worker cannot do it or has crashed.
        """
        if not self.ready:
            self._answer()
            self.ready = True
        if isinstance(subject, Case):
            subject = dataclasses.asdict(subject)
        request = json.dumps({"subject": subject, "mode": mode, "budget": budget})
        with contextlib.suppress(BrokenPipeError):  # it is gone: `_answer` says why
            print(request, file=self._requests, flush=True)
        return self._answer()

    @property
    def alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().split("\n")[-1]
            raise WorkerError(f"the worker ended with code {code}: {said or 'it said nothing'}")
        answer = json.loads(line)
        if "error" in answer:
            if not self.ready:
                self._process.wait()
            raise WorkerError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # an unread request
            self._requests.close()
        self._answers.close()
        self._errors.close()


@dataclasses.dataclass
class Timing:
    """What one variant of one worker took for one case, in seconds."""

    first: float  # the first call, which compiles
    rounds: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> float:
        """The minimum over the rounds."""
        return min(self.rounds.values())

    @property
    def spread(self) -> float:
        """The median over the rounds, divided by the minimum: 1 is a quiet machine."""
        return statistics.median(self.rounds.values()) / self.best

    @property
    def compile(self) -> float:
        """The first call without the time that it takes to run."""
        return max(0.0, self.first - self.best)


Key = tuple[str, str, str]  # label of the case, mode, worker
Table = dict[Key, float]


class Results:
    """All times of a run, and what went wrong."""

    def __init__(self):
        self.timings: dict[Key, dict[str, Timing]] = {}
        self.magnitudes: dict[Key, list[float]] = {}
        self.failures: dict[str, str] = {}

    def add(self, key: Key, round_: int, times: Mapping[str, Any]) -> None:
        """Adds a worker's answer."""
        variants = self.timings.setdefault(key, {})
        for variant, time_ in times.items():
            timing = variants.setdefault(variant, Timing(time_["first"]))
            timing.rounds[round_] = time_["seconds"]
            if "magnitudes" in time_:
                self.magnitudes.setdefault(key, time_["magnitudes"])

    def fail(self, what: str, reason: str) -> None:
        """Reports a failure, once and at once."""
        if what not in self.failures:
            self.failures[what] = reason
            _progress(f"{what}: {reason}\n")

    def timing(self, label: str, mode: str, worker: str) -> Timing | None:
        """Returns the variant that is the best of a worker, or None."""
        variants = self.timings.get((label, mode, worker))
        return min(variants.values(), key=lambda timing: timing.best) if variants else None

    def table(self, round_: int | None = None) -> Table:
        """Returns the seconds of every worker's better variant, in one round or the best of all."""
        found = {}
        for key, variants in self.timings.items():
            seconds = [
                timing.best if round_ is None else timing.rounds[round_]
                for timing in variants.values()
                if round_ is None or round_ in timing.rounds
            ]
            if seconds:
                found[key] = min(seconds)
        return found

    def compare(self, label: str, mode: str, worker: str, other: str) -> None:
        """Reports a worker whose results are not those of another one."""
        a, b = (self.magnitudes.get((label, mode, name)) for name in (worker, other))
        if a and b and not (len(a) == len(b) and np.allclose(a, b, rtol=1e-3, atol=1e-6)):
            self.fail(f"{worker}, {label} {mode}", f"its results are not those of {other}")


def _progress(text: str) -> None:
    """Writes to stderr: over the last line of a terminal, as whole lines into a file."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text.endswith("\n"):
        print(text, end="", file=sys.stderr, flush=True)


class Crew(contextlib.AbstractContextManager):
    """Workers by name, none of which outlives the `with`; one that crashed starts again."""

    def __init__(self, names: Iterable[str], results: Results):
        self._results = results
        self._skip: set[Any] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="flax_dwconv_")
        self._workers: dict[str, Worker] = {}
        try:
            for name in names:
                self._workers[name] = Worker(name, self._folder.name)
        except BaseException:
            self.close()
            raise

    def ask(self, name: str, subject: Any, label: str, mode: str, budget: float, round_: int):
        """Asks one worker and keeps its answer; reports a failure and does not ask that again."""
        key = (label, mode, name)
        if name in self._skip or key in self._skip:
            return
        worker = self._workers[name]
        try:
            if not worker.alive and worker.ready:
                worker.close()
                worker = self._workers[name] = Worker(name, self._folder.name)
            self._results.add(key, round_, worker.ask(subject, mode, budget))
        except WorkerError as error:
            usable = worker.ready
            self._skip.add(key if usable else name)
            self._results.fail(f"{name}, {label} {mode}" if usable else name, str(error))

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers.values():
            worker.close()
        self._folder.cleanup()

    def __exit__(self, *exception: object) -> None:
        self.close()


def run_layers(
    layers: Sequence[Case], peers: Sequence[str], rounds: int, budget: float, results: Results
) -> None:
    """Times every case of every worker, in turns; ours with the larger batches doubled, too."""
    schedule: list[tuple[Case, list[str]]] = []
    for case in layers:
        schedule.append((case, [OURS, *peers]))
        if case.n > 1:
            schedule.append((doubled(case), [OURS]))
    with Crew([OURS, *peers, "machine"], results) as crew:
        for round_ in range(rounds):
            crew.ask("machine", "machine", "machine", "limit", budget, round_)
            for i, (case, names) in enumerate(schedule):
                _progress(f"round {round_ + 1}/{rounds}, {i + 1}/{len(schedule)}: {case.label}")
                for mode in LAYER_MODES:
                    shift = round_ % len(names)  # nobody is always first
                    for name in names[shift:] + names[:shift]:
                        crew.ask(name, case, case.label, mode, budget, round_)
    for case in layers:
        for mode in LAYER_MODES:
            for name in peers:
                results.compare(case.label, mode, name, OURS)
    _progress("")


def doubled(case: Case) -> Case:
    """Returns the case with twice its batch."""
    return dataclasses.replace(case, name=f"{case.name} doubled", n=2 * case.n)


def run_networks(
    networks: Sequence[str], workers: Sequence[str], rounds: int, results: Results
) -> dict[Key, float]:
    """Times networks, in turns, and returns compile times, each in a fresh process.

    Each network and mode has workers of its own, which start, compile and end; those that compile
    with JAX do so once more, and the less of both times counts.
    """
    compile_: dict[Key, list[float]] = {}

    def note_compile(found: Results, network: str, mode: str) -> None:
        for name in (PLAIN, FAST):
            if timing := found.timing(network, mode, name):
                compile_.setdefault((network, mode, name), []).append(timing.compile)

    for network in networks:
        for mode in NETWORK_MODES:
            for _ in range(COMPILATIONS - 1):
                extra = Results()
                for name in (PLAIN, FAST):
                    _progress(f"{network} {mode}: {name} compiles")
                    with Crew([name], extra) as crew:
                        crew.ask(name, network, network, mode, 0.1, 0)
                note_compile(extra, network, mode)
            with Crew(workers, results) as crew:
                for round_ in range(rounds):
                    shift = round_ % len(workers)
                    for name in [*workers[shift:], *workers[:shift]]:
                        _progress(f"{network} {mode}, round {round_ + 1}/{rounds}: {name}")
                        crew.ask(name, network, network, mode, NETWORK_BUDGET, round_)
            note_compile(results, network, mode)
            results.compare(network, mode, FAST, PLAIN)
    _progress("")
    return {key: min(seconds) for key, seconds in compile_.items()}


def run_device(layers: Sequence[Case], rounds: int, budget: float, results: Results) -> None:
    """Times both methods on a GPU or TPU, in turns within one process: it owns the device."""
    with Crew(["device"], results) as crew:
        for round_ in range(rounds):
            for case in layers:
                _progress(f"device, round {round_ + 1}/{rounds}: {case.label}")
                for mode in LAYER_MODES:
                    crew.ask("device", case, case.label, mode, budget, round_)
    _progress("")


# Arithmetic


def geometric_mean(values: Iterable[float]) -> float | None:
    """Returns the geometric mean, None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the machine can do at most, measured.

    Attributes:
      peak: additions and multiplications in a second, of the faster matrix product.
      bandwidth: {bytes moved by a copy: bytes in a second}.
    """

    peak: float
    bandwidth: dict[int, float]

    @classmethod
    def of(cls, times: Mapping[str, float]) -> "Machine":
        """Reads the seconds of the machine's worker."""
        peak = 2 * MATRIX**3 / min(times["numpy"], times["jax"])
        return cls(peak, {moved: max(moved, LEAST_COPIED) / times[str(moved)] for moved in COPIES})

    def limit(self, moved: int, operations: int) -> float:
        """Returns the least seconds for so many bytes and operations: the roofline.

        The bandwidth is that of the copy whose size is the nearest: what fits into a cache moves
        faster than what does not, and the limit of memory would be none.
        """
        size = min(self.bandwidth, key=lambda size: abs(math.log(size / moved)))
        return max(moved / self.bandwidth[size], operations / self.peak)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A number that sums up a run, and the range of what single rounds say; None: not measured."""

    value: float | None
    low: float | None = None
    high: float | None = None


def figure(f: Callable[[Table], float | None], tables: Sequence[Table]) -> Figure:
    """Returns `f` of the best times, with its range over the rounds.

    Args:
      f: what sums up one table of times.
      tables: the best times, then those of each round.
    """
    value, *rounds = map(f, tables)
    rounds = [number for number in rounds if number is not None]
    return Figure(value, min(rounds, default=None), max(rounds, default=None))


def ratios(
    table: Table, labels: Iterable[str], modes: Iterable[str], one: str, others: Iterable[str]
) -> dict[tuple[str, str], float]:
    """Returns {(label, mode): time of `one` / time of the best of `others`}, where both exist."""
    labels, modes, others, found = list(labels), list(modes), list(others), {}
    for label in labels:
        for mode in modes:
            rivals = [table[label, mode, o] for o in others if (label, mode, o) in table]
            if rivals and (label, mode, one) in table:
                found[label, mode] = table[label, mode, one] / min(rivals)
    return found


def distances(
    table: Table, layers: Iterable[Case], modes: Iterable[str], machine: Machine | None
) -> dict[tuple[str, str], float]:
    """Returns {(label, mode): our time / the machine's limit} of the cases above 1 MB."""
    return {
        (case.label, mode): table[case.label, mode, OURS]
        / machine.limit(case.moved(mode), case.operations(mode))
        for case in layers
        for mode in modes
        if machine and case.moved("forward") > 1e6 and (case.label, mode, OURS) in table
    }


def doublings(
    table: Table, layers: Iterable[Case], modes: Iterable[str]
) -> dict[tuple[str, str], float]:
    """Returns {(label, mode): our time with twice the batch / our time}."""
    return {
        (case.label, mode): table[doubled(case).label, mode, OURS] / table[case.label, mode, OURS]
        for case in layers
        for mode in modes
        if {(doubled(case).label, mode, OURS), (case.label, mode, OURS)} <= table.keys()
    }


@dataclasses.dataclass(frozen=True)
class Goal:
    """A row of the Reach table: what is wanted at least, what is aimed at, and what was reached."""

    name: str
    at_least: float
    aim: float
    reached: Figure
    speedup: bool = False  # the more the better, else the less

    @property
    def verdict(self) -> str:
        """One word or two."""
        if self.reached.value is None:
            return "not measured"
        sign = -1 if self.speedup else 1
        for bound, word in ((self.aim, "aim"), (self.at_least, "at least")):
            if sign * self.reached.value <= sign * bound:
                return word
        return "missed"


class Summary:
    """What a run comes to: computed here, printed, drawn and saved elsewhere."""

    def __init__(
        self,
        results: Results,
        layers: Sequence[Case],
        peers: Sequence[str],
        networks: Sequence[str] = (),
        compile_: Mapping[Key, float] | None = None,
    ):
        self.results, self.layers, self.peers, self.networks = results, layers, peers, networks
        self.compile = compile_ or {}
        self.best = results.table()
        rounds = {r for v in results.timings.values() for t in v.values() for r in t.rounds}
        self.tables = [self.best, *(results.table(r) for r in sorted(rounds))]
        variants = results.timings.get(("machine", "limit", "machine"))
        self.machine = (
            Machine.of({name: timing.best for name, timing in variants.items()})
            if variants
            else None
        )

    def ratios(self, table: Table, mode: str, peers: Sequence[str] | None = None) -> dict:
        """Returns our time / the best peer's, case by case, in one mode."""
        labels = [case.label for case in self.layers]
        return ratios(table, labels, [mode], OURS, self.peers if peers is None else peers)

    def layer_mean(self, mode: str) -> Figure:
        """The geometric mean of our time / the best peer's."""
        return figure(lambda t: geometric_mean(self.ratios(t, mode).values()), self.tables)

    def layer_worst(self, *modes: str) -> Figure:
        """The worst case of our time / the best peer's."""
        return figure(
            lambda t: max((x for m in modes for x in self.ratios(t, m).values()), default=None),
            self.tables,
        )

    def over(self, peer: str, mode: str) -> Figure:
        """The geometric mean of a peer's time / ours."""
        return figure(
            lambda t: geometric_mean(1 / x for x in self.ratios(t, mode, [peer]).values()),
            self.tables,
        )

    def distance(self, *modes: str) -> Figure:
        """The geometric mean of our time / the machine's limit, over the cases above 1 MB."""
        return figure(
            lambda t: geometric_mean(distances(t, self.layers, modes, self.machine).values()),
            self.tables,
        )

    def doubling(self, *modes: str) -> Figure:
        """The geometric mean of our time with twice the batch / our time."""
        return figure(
            lambda t: geometric_mean(doublings(t, self.layers, modes).values()), self.tables
        )

    def network(self, network: str, mode: str, one: str, *others: str) -> Figure:
        """Time of one worker / time of the best of others, for one network."""
        return figure(
            lambda t: ratios(t, [network], [mode], one, others).get((network, mode)), self.tables
        )

    def networks_worst(self) -> Figure:
        """The worst network and mode of our time / the better of Keras's other backends."""
        return figure(
            lambda t: max(
                ratios(t, self.networks, NETWORK_MODES, FAST, BACKENDS).values(), default=None
            ),
            self.tables,
        )

    def compile_ratio(self, network: str, mode: str) -> float | None:
        """Compile time accelerated / plain, for one network."""
        fast, plain = (self.compile.get((network, mode, name)) for name in (FAST, PLAIN))
        return fast / plain if fast and plain else None

    def goals(self) -> list[Goal]:
        """The Reach table."""
        at_least = {"infer": (5, 5, 2), "train": (5, 8, 3.5)}
        aims = {"infer": (6, 6, 2.5), "train": (8, 10, 5)}
        compilations = [
            ratio
            for network in self.networks
            for mode in NETWORK_MODES
            if (ratio := self.compile_ratio(network, mode)) is not None
        ]
        both = LAYER_MODES
        return [
            Goal("layer forward / best peer", 0.95, 0.75, self.layer_mean("forward")),
            Goal("layer train step / best peer", 0.80, 0.60, self.layer_mean("train")),
            Goal("worst single case, either", 1.40, 1.00, self.layer_worst(*both)),
            Goal("over flax.linen.Conv, forward", 20, 30, self.over("linen", "forward"), True),
            Goal("over flax.linen.Conv, train step", 45, 80, self.over("linen", "train"), True),
            *(
                Goal(
                    f"{network} over plain JAX, {mode}",
                    at_least[mode][i],
                    aims[mode][i],
                    self.network(network, mode, PLAIN, FAST),
                    True,
                )
                for mode in NETWORK_MODES
                for i, network in enumerate(NETWORKS)
            ),
            Goal("network / best of Keras's TF, torch: worst", 0.95, 0.6, self.networks_worst()),
            Goal(
                "network compile time / plain JAX: worst",
                2.0,
                1.3,
                Figure(max(compilations, default=None)),
            ),
            Goal("machine's limit, cases above 1 MB", 3.0, 2.0, self.distance(*both)),
            Goal("time when the batch doubles", 2.2, 2.0, self.doubling(*both)),
        ]


# What is printed


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns aligned columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _number(value: float | None, unit: str = "") -> str:
    """Returns two or three digits and the unit, or a dash."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3
    return f"{value:.{digits}f}{unit}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def _range(found: Figure, unit: str = "") -> str:
    """Returns what single rounds say, from the lowest to the highest."""
    return "-" if found.low is None else f"{_number(found.low)}..{_number(found.high)}{unit}"


def _with_range(found: Figure, unit: str = "") -> str:
    rounds = f" (rounds {_range(found, unit)})" if found.low is not None else ""
    return _number(found.value, unit) + rounds


def describe_layers(summary: Summary, mode: str) -> str:
    """Returns the table of the cases in one mode."""
    results, best, rows = summary.results, summary.best, []
    for case in summary.layers:
        ours = results.timing(case.label, mode, OURS)
        rivals = {
            peer: timing
            for peer in summary.peers
            if (timing := results.timing(case.label, mode, peer))
        }
        winner = min(rivals, key=lambda peer: rivals[peer].best, default=None)
        machine = summary.machine
        limit = machine.limit(case.moved(mode), case.operations(mode)) if machine else None
        rows.append(
            [
                case.name,
                *map(str, [case.n, case.h, case.w, case.c, case.k, case.stride, case.padding]),
                _milliseconds(ours.best if ours else None),
                _number(ours.spread if ours else None),
                *(
                    _number(
                        ratios(best, [case.label], [mode], OURS, [peer]).get((case.label, mode))
                    )
                    for peer in summary.peers
                ),
                winner or "-",
                _number(rivals[winner].spread if winner else None),
                _number(ours.best / limit if ours and limit else None),
            ]
        )
    header = ["name", "n", "h", "w", "c", "k", "stride", "padding", "ours ms", "spread"]
    header += [f"/{peer}" for peer in summary.peers] + ["best peer", "spread", "/limit"]
    return format_table(header, rows)


def describe_layer_summary(summary: Summary) -> str:
    """Returns the geometric means and the worst cases of the layers."""
    lines = []
    for mode in LAYER_MODES:
        of_cases = summary.ratios(summary.best, mode)
        worst = max(of_cases, key=lambda key: of_cases[key], default=("none",))[0]
        lines += [
            f"{mode}, our time / best peer's, geometric mean of {len(of_cases)} cases: "
            + _with_range(summary.layer_mean(mode)),
            f"{mode}, worst case: {_with_range(summary.layer_worst(mode))}, {worst}",
            *(
                f"{mode}, speed-up over {peer}, geometric mean: "
                + _with_range(summary.over(peer, mode), "x")
                for peer in summary.peers
            ),
        ]
    return "\n".join([*lines, *_compile_lines(summary), *_limit_lines(summary)])


def _compile_lines(summary: Summary) -> Iterator[str]:
    """Compile times of our layers, beside plain XLA's where there is a peer that uses it."""
    for mode in LAYER_MODES:
        for peer in [OURS, *(peer for peer in ("linen", "haiku") if peer in summary.peers)]:
            seconds = {
                case.label: timing.compile
                for case in summary.layers
                if (timing := summary.results.timing(case.label, mode, peer))
            }
            if seconds:
                worst = max(seconds, key=lambda label: seconds[label])
                yield (
                    f"{mode}, compile time of {peer}: median "
                    f"{_number(statistics.median(seconds.values()), ' s')}, "
                    f"longest {_number(seconds[worst], ' s')}, {worst}"
                )


def _limit_lines(summary: Summary) -> Iterator[str]:
    """What the machine can do, how far our layers are from it, and how they scale."""
    if summary.machine:
        widths = ", ".join(
            f"{rate / 1e9:.1f} GB/s at {moved // MIB} MiB"
            for moved, rate in summary.machine.bandwidth.items()
        )
        yield f"machine: {summary.machine.peak / 1e9:.0f} GFLOP/s; copies move {widths}"
        for mode in LAYER_MODES:
            count = len(distances(summary.best, summary.layers, [mode], summary.machine))
            yield (
                f"{mode}, our time / the machine's limit, geometric mean of {count} cases above "
                f"1 MB: {_with_range(summary.distance(mode), 'x')}"
            )
    for mode in LAYER_MODES:
        found = doublings(summary.best, summary.layers, [mode])
        worst = f", worst {_number(max(found.values()), 'x')}" if found else ""
        yield (
            f"{mode}, time when the batch doubles, geometric mean of {len(found)} cases: "
            f"{_with_range(summary.doubling(mode), 'x')}{worst}"
        )


def describe_networks(summary: Summary) -> str:
    """Returns the table of the networks, times with their spread, and that of what compiles."""
    names = [PLAIN, FAST, *BACKENDS]
    rows = []
    for network in summary.networks:
        for mode in NETWORK_MODES:
            timings = [summary.results.timing(network, mode, name) for name in names]
            rows.append(
                [
                    f"{network} {mode}",
                    *(
                        f"{timing.best * 1e3:.1f} ~{timing.spread:.2f}" if timing else "-"
                        for timing in timings
                    ),
                    _with_range(summary.network(network, mode, PLAIN, FAST), "x"),
                    _with_range(summary.network(network, mode, FAST, *BACKENDS)),
                    *(
                        _number(summary.compile.get((network, mode, name)), " s")
                        for name in (PLAIN, FAST)
                    ),
                    _number(summary.compile_ratio(network, mode)),
                ]
            )
    header = ["ms ~spread", "plain JAX", "accelerated", "TensorFlow", "torch", "speed-up"]
    header += ["/best backend", "compile plain", "accelerated", "ratio"]
    return format_table(header, rows)


def describe_device(summary: Summary) -> str:
    """Returns the table of both methods on a GPU or TPU."""
    rows = []
    for (label, mode, worker), variants in summary.results.timings.items():
        if worker == "device":
            auto, lax = variants["auto"], variants["lax"]
            rows.append(
                [
                    f"{label} {mode}",
                    *(_milliseconds(timing.best) for timing in (auto, lax)),
                    *(_number(timing.spread) for timing in (auto, lax)),
                    _number(auto.best / lax.best),
                ]
            )
    return format_table(["device", "auto ms", "lax ms", "spread", "spread", "auto/lax"], rows)


def describe_goals(goals: Iterable[Goal]) -> str:
    """Returns the Reach table."""
    rows = []
    for goal in goals:
        unit = "x" if goal.speedup else ""
        bounds = [f"{bound:g}{unit}" for bound in (goal.at_least, goal.aim)]
        reached = _number(goal.reached.value, unit)
        rows.append([goal.name, *bounds, reached, _range(goal.reached, unit), goal.verdict])
    return format_table(["reach", "at least", "aim", "reached", "rounds", "verdict"], rows)


def hardware() -> dict[str, Any]:
    """Returns the CPU's model, the cores that we may use, and the versions of all that is timed."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux only
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    versions = {"python": platform.python_version()}
    packages = [package for _, packages in PEERS.values() for package in packages]
    for package in ["jax", "jaxlib", "keras", "numpy", *packages]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": model, "system": system, "cores": _cores(), "versions": versions}


def describe_hardware(found: Mapping[str, Any]) -> str:
    """Returns the hardware line."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['cpu']}, {found['cores']} cores, {found['system']}; {versions}"


def as_json(summary: Summary, **run: Any) -> str:
    """Returns all raw numbers and the figures, with `run`, which says what was run where."""
    raw = [
        {
            "case": label,
            "mode": mode,
            "worker": worker,
            "variant": variant,
            "seconds": list(timing.rounds.values()),
            "first_call_seconds": timing.first,
        }
        for (label, mode, worker), variants in summary.results.timings.items()
        for variant, timing in variants.items()
    ]
    goals = [{**dataclasses.asdict(goal), "verdict": goal.verdict} for goal in summary.goals()]
    compile_ = [
        {"network": network, "mode": mode, "worker": worker, "seconds": seconds}
        for (network, mode, worker), seconds in summary.compile.items()
    ]
    document = run | {
        "machine": summary.machine and dataclasses.asdict(summary.machine),
        "cases": [dataclasses.asdict(case) | {"label": case.label} for case in summary.layers],
        "reach": goals,
        "compile": compile_,
        "failures": summary.results.failures,
        "raw": raw,
    }
    return json.dumps(document, indent=1) + "\n"


LOOKS = {
    "torch": ("#d9702b", "o"),
    "tensorflow": ("#c9a227", "s"),
    "linen": ("#1f5a96", "o"),
    "haiku": ("#5aa0a0", "x"),
}
GRAY, RED = "#8a8f98", "#b3262e"


def draw(summary: Summary, path: pathlib.Path) -> None:
    """Saves a chart: how many times longer than ours every peer takes, case by case."""
    import matplotlib.style
    from matplotlib.figure import Figure as Canvas  # without pyplot: no window, no display
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    layers = summary.layers
    style = {
        "font.size": 9,
        "xtick.labelsize": 8,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.edgecolor": GRAY,
    }
    with matplotlib.style.context(["default", style]):
        canvas: Any = Canvas(figsize=(11, 2.2 + 0.21 * len(layers)), layout="constrained")
        panels = canvas.subplots(1, 2, sharey=True)
        for axes, mode in zip(panels, LAYER_MODES, strict=True):
            best = summary.ratios(summary.best, mode)
            for row, case in enumerate(layers):
                if ratio := best.get((case.label, mode)):
                    color = RED if ratio > 1 else GRAY
                    axes.plot([1, 1 / ratio], [row, row], color=color, lw=3, alpha=0.45, zorder=2)
            for peer in summary.peers:
                color, marker = LOOKS[peer]
                found = summary.ratios(summary.best, mode, [peer])
                points = [
                    (1 / found[case.label, mode], row)
                    for row, case in enumerate(layers)
                    if (case.label, mode) in found
                ]
                if points:
                    axes.scatter(
                        *zip(*points, strict=True),
                        s=26,
                        c=color,
                        marker=marker,
                        label=peer,
                        zorder=3,
                    )
            axes.axvline(1, color="black", lw=1, zorder=1)
            mean = summary.layer_mean(mode).value
            note = f": best peer takes {_number(1 / mean)}x ours" if mean else ""
            axes.set_title(f"{mode}{note}", fontsize=11, fontweight="bold")
            axes.set(xscale="log", xlabel="peer's time / our time")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.spines[["top", "right"]].set_visible(False)
        sizes = (f"{c.h}x{c.w}x{c.c} k{c.k} s{c.stride} n{c.n}" for c in layers)
        labels = [f"{c.name}   {size}" for c, size in zip(layers, sizes, strict=True)]
        panels[0].set_yticks(range(len(layers)), labels)
        panels[0].set_ylim(len(layers) - 0.5, -0.5)
        handles, names = panels[0].get_legend_handles_labels()
        if handles:
            canvas.legend(
                handles, names, loc="outside lower center", ncols=len(names), frameon=False
            )
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


def _chosen(known: Iterable[str]) -> Callable[[str], list[str]]:
    """Returns an argparse type: some of the known names, separated by commas."""
    known = list(known)

    def convert(text: str) -> list[str]:
        chosen = dict.fromkeys(name.strip() for name in text.split(","))
        if not chosen.keys() <= set(known):
            raise argparse.ArgumentTypeError(f"must be some of {','.join(known)}, got {text!r}.")
        return list(chosen)

    return convert


def _file(*suffixes: str) -> Callable[[str], pathlib.Path]:
    """Returns an argparse type: a file that can be written, with one of these suffixes."""

    def convert(text: str) -> pathlib.Path:
        path = pathlib.Path(text).resolve()
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"must end in {', '.join(suffixes)}, got {text!r}.")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"must be in a folder that exists, got {text!r}.")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}.")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"must be writable, got {text!r}.")
        return path

    return convert


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments, all checked; exits with code 2 and the reason for a bad one."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_dwconv.benchmark",
        description="Time this package beside PyTorch, TensorFlow, flax.linen and haiku.",
        epilog="Without --layers and --networks both parts run, with --quick the layers only.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a dozen layers, few rounds: below two minutes")
    add(
        "--layers",
        nargs="?",
        const="*",
        metavar="PATTERNS",
        help="time layers; which, by patterns of names such as 'Xception*,MobileNetV1-7/32'",
    )
    add(
        "--networks",
        nargs="?",
        const=list(NETWORKS),
        type=_chosen(NETWORKS),
        metavar="NAMES",
        help=f"time whole networks; which, of {','.join(NETWORKS)}",
    )
    add(
        "--peers",
        type=_chosen(PEERS),
        default=list(PEERS),
        metavar="NAMES",
        help=f"of {','.join(PEERS)}; default all",
    )
    add("--rounds", type=_positive, help=f"default {ROUNDS[0]}, with --quick {ROUNDS[1]}")
    add("--device", action="store_true", help="time both methods on a GPU or TPU, too")
    add("--json", type=_file(".json"), metavar="FILE", help="save all numbers")
    add("--plot", type=_file(*FORMATS), metavar="FILE", help="save a chart of the layers")
    add("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    _check(args, parser.error)
    return args


def _check(args: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    """Checks what depends on several arguments, and fills in what was left out."""
    if args.quick and args.networks:
        error("argument --networks: not allowed with argument --quick.")
    if args.layers is None and args.networks is None:
        args.layers = "*"
        args.networks = [] if args.quick else list(NETWORKS)
    args.networks = args.networks or []
    args.rounds = args.rounds or ROUNDS[args.quick]
    args.cases = []
    for pattern in args.layers.split(",") if args.layers is not None else []:
        found = [
            case
            for case in cases(args.quick)
            if fnmatch.fnmatchcase(case.label, pattern) or fnmatch.fnmatchcase(case.name, pattern)
        ]
        if not found:
            error(f"argument --layers: must match names of layers, got {pattern!r}.")
        args.cases += [case for case in found if case not in args.cases]
    if args.plot and not args.cases:
        error("argument --plot: needs layers, which --networks alone leaves out.")
    if args.plot and not _installed("matplotlib"):
        error("argument --plot: needs matplotlib: pip install 'flax_dwconv[bench]'.")


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Times what was chosen; prints, saves and draws what came out."""
    machine, results, budget = hardware(), Results(), BUDGET[args.quick]
    peers = [peer for peer in args.peers if _installed(PEERS[peer][0])]
    absent = [peer for peer in args.peers if peer not in peers]
    print(describe_hardware(machine), flush=True)
    print(
        f"{args.rounds} rounds in turns; minimum over rounds of each round's lower quartile; "
        "spread = median over rounds / minimum"
    )

    backends = [PLAIN, FAST, *(name for name, module in BACKENDS.items() if _installed(module))]
    networks = args.networks if _installed("keras") else []
    if args.networks:
        absent += [name for name in BACKENDS if name not in backends]
        absent += [] if networks else ["keras"]
    if absent:
        print(f"absent, skipped: {', '.join(absent)} (pip install 'flax_dwconv[bench]')")
    print(flush=True)

    start = time.perf_counter()
    if args.device:
        run_device(args.cases or cases(quick=True), args.rounds, budget, results)
        if len(results.timings):
            print(f"{describe_device(Summary(results, args.cases, peers))}\n", flush=True)
        else:
            print(f"device, skipped: {results.failures['device']}\n", flush=True)
    if args.cases:
        run_layers(args.cases, peers, args.rounds, budget, results)
        summary = Summary(results, args.cases, peers)
        for mode in LAYER_MODES:
            print(f"layer = convolution + bias + relu6, {mode}: our time / peer's")
            print(f"{describe_layers(summary, mode)}\n")
        print(f"{describe_layer_summary(summary)}\n", flush=True)
    compile_ = run_networks(networks, backends, args.rounds, results) if networks else {}
    summary = Summary(results, args.cases, peers, networks, compile_)
    if networks:
        print("networks, batch 1, 224x224; ratio of compile times: accelerated / plain")
        print(f"{describe_networks(summary)}\n")

    print(describe_goals(summary.goals()))
    for what, reason in results.failures.items():
        print(f"failed: {what}: {reason}")
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        command = shlex.join(["python", "-m", "flax_dwconv.benchmark", *argv])
        args.json.write_text(
            as_json(summary, command=command, hardware=machine, rounds=args.rounds, absent=absent),
            encoding="utf-8",
        )
    if args.plot:
        draw(summary, args.plot)
    measured = any(worker in (OURS, FAST, "device") for _, _, worker in results.timings)
    return 0 if measured else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code.

    Args:
      argv: the arguments; None takes those of the command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parse(argv)
    if args.worker:
        work(args.worker)
        return 0
    try:
        return _run(args, argv)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"The benchmark could not finish: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    # Ended politely, the driver still ends its workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
