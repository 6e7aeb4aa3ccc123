"""What a program meets that only runs this package: threads, caches, imports, memory, other JAXes.

Scopes of `accelerate` in one thread, and how often a function is traced inside and outside of one,
are in `test_lowering.py`; names and signatures of the public modules in `test_architecture.py`.
"""

import ast
import functools
import importlib
import inspect
import itertools
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax import lax

import flax_dwconv
from flax_dwconv import _lowering, depthwise_conv2d
from flax_dwconv._lowering import forward, plan, program, rule
from flax_dwconv.benchmark.cases import layers

ROOT = pathlib.Path(flax_dwconv.__file__).parents[1]


def plain(x, kernel):
    """A depthwise convolution of a model that knows nothing of us."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def operands(size=8, c=3):
    return oracle.integers(0, 2, size, size, c), oracle.integers(1, 3, 3, 1, c)


def fresh(script, *args, check=True):
    """Runs a script in a Python of its own, with warnings as errors; returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *map(str, args)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert not check or result.returncode == 0, result.stderr
    return result.stdout


# Threads


def in_threads(number, f):
    """Returns f(0), ..., f(number - 1), called at the same time."""
    start = threading.Barrier(number)

    def call(i):
        start.wait(60)
        return f(i)

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(call, range(number)))


def test_threads_compile_at_once_and_do_not_tag_each_other():
    scope = flax_dwconv.accelerate()  # shared by all of them

    def compile_and_run(i):
        x, kernel = operands(size=6 + i // 2)
        jitted = jax.jit(lambda x, kernel: plain(x, kernel))
        taps = []
        for inside in (i % 2, 1, 0, i % 2):
            with scope if inside else flax_dwconv.accelerate():
                if not inside:
                    with _lowering.method_scope("lax"):
                        lowered = jitted.lower(x, kernel)
                else:
                    lowered = jitted.lower(x, kernel)
            taps.append((inside, "stablehlo.convolution" not in lowered.as_text()))
            np.testing.assert_array_equal(lowered.compile()(x, kernel), plain(x, kernel))
        return taps

    for taps in in_threads(8, compile_and_run):
        assert all(inside == tagged for inside, tagged in taps)


def test_threads_share_a_jitted_function():
    """One function, called at once inside and outside: each call gets its own program."""
    traces = []

    @jax.jit
    def shared(x, kernel):
        traces.append(threading.get_ident())
        return plain(x, kernel)

    x, kernel = operands()
    fast = flax_dwconv.accelerate(shared)
    expected = plain(x, kernel)
    run = in_threads(8, lambda i: [(fast if i % 2 else shared)(x, kernel) for _ in range(20)])
    for y in itertools.chain(*run):
        np.testing.assert_array_equal(y, expected)
    before = len(traces)
    in_threads(8, lambda i: (fast if i % 2 else shared)(x, kernel))
    assert len(traces) == before
    for f, taps in ((fast, True), (shared, False)):
        assert ("stablehlo.convolution" not in f.lower(x, kernel).as_text()) == taps


def test_exceptions_leave_only_their_own_scope():
    """In several threads at once, each of which leaves half of its scopes by an exception."""
    scope = flax_dwconv.accelerate()

    def tagged():
        x, kernel = operands()
        return (
            "stablehlo.convolution"
            not in jax.jit(lambda x, k: plain(x, k)).lower(x, kernel).as_text()
        )

    @flax_dwconv.accelerate
    def fails():
        assert tagged()
        raise ValueError("on purpose")

    def nest(_):
        seen = [tagged()]
        with scope:
            for _ in range(3):
                with pytest.raises(ValueError, match="on purpose"), scope:
                    fails()
                with pytest.raises(KeyError), _lowering.method_scope("lax"):
                    seen.append(tagged())
                    raise KeyError
                seen.append(tagged())
        return [*seen, tagged()]

    expected = [False, *[False, True] * 3, False]
    assert in_threads(4, nest) == [expected] * 4


# Caches


@pytest.mark.parametrize("method", ["auto", "lax"])
def test_calling_again_compiles_nothing(method, caplog):
    """Neither under jit nor without, neither the function nor its gradient."""
    x, kernel = operands(size=7)
    kernel = kernel.swapaxes(2, 3)
    f = functools.partial(depthwise_conv2d, method=method)
    g = jax.grad(lambda x, kernel: f(x, kernel).sum())
    calls = [f, jax.jit(f), jax.jit(g), flax_dwconv.accelerate(jax.jit(f))]

    def compilations():
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            for call in calls:
                jax.block_until_ready(call(x, kernel))
        return [r.getMessage() for r in caplog.records if "ompil" in r.getMessage()]

    assert compilations(), "the first time"
    assert not compilations()


def test_equal_convolutions_are_planned_once():
    x, kernel = operands(size=10)

    def network(x, kernel):
        for _ in range(5):
            x = plain(x, kernel)
        return x

    before = program.cached.cache_info()
    flax_dwconv.accelerate(jax.jit(network)).lower(x, kernel)
    after = program.cached.cache_info()
    assert after.misses - before.misses == 1
    assert after.maxsize < 10_000  # it does not grow forever


# Import

ORDINARY = """
import json, sys
if sys.argv[1] == "import":
    import flax_dwconv
import jax
import jax.numpy as jnp

def loss(kernels, x):
    for kernel in kernels:
        x = jax.nn.relu(jax.lax.conv_general_dilated(
            x, kernel, (2, 1), ((1, 1), (1, 1)), lhs_dilation=(1, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] // kernel.shape[2]))
    return x.mean()

step = jax.jit(jax.value_and_grad(loss))
args = [jnp.ones((3, 3, 3, 8)), jnp.ones((3, 3, 1, 8))], jnp.ones((2, 8, 8, 3))
texts = {"lowered": step.lower(*args).as_text(), "compiled": step.lower(*args).compile().as_text()}
for platforms in (["cuda"], ["tpu"], ["cpu", "cuda", "tpu"]):
    try:
        text = jax.export.export(step, platforms=platforms)(*args).mlir_module()
    except TypeError as error:
        text = str(error)
    texts[" ".join(platforms)] = text
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def programs():
    """What a model that does not use this package becomes, without and with the import."""
    return [json.loads(fresh(ORDINARY, argument)) for argument in ("no", "import")]


@pytest.mark.parametrize("form", ["lowered", "compiled", "cuda", "tpu", "cpu cuda tpu"])
def test_import_changes_nothing_of_other_models(form, programs):
    without, with_import = (program[form] for program in programs)
    assert without.count("convolution(") >= 3
    assert with_import == without


def test_import_adds_no_rule():
    """A program for several platforms has a branch for each that has a rule of its own."""
    script = """
        from jax import lax
        from jax.interpreters import mlir

        def rules():
            found = mlir._platform_specific_lowerings
            found = {p: of[lax.conv_general_dilated_p].rule for p, of in dict(found).items()
                     if lax.conv_general_dilated_p in of}
            return sorted(found), [[a is b for a in found.values()] for b in found.values()]

        before = rules()
        default = mlir._lowerings[lax.conv_general_dilated_p]
        import flax_dwconv
        assert mlir._lowerings[lax.conv_general_dilated_p] is not default
        print(before == rules(), len(before[0]) > 1)
        """
    assert fresh(script) == "True True\n"


def test_import_starts_no_backend():
    """The number of devices can be set until a backend starts, and never after."""
    script = """
        import jax
        import flax_dwconv
        jax.config.update("jax_num_cpu_devices", 3)
        print(jax.device_count())
        try:
            jax.config.update("jax_num_cpu_devices", 2)
        except RuntimeError:
            print("too late")
        """
    assert fresh(script) == "3\ntoo late\n"


def test_import_is_quick():
    """Below 0.3 s of processor time, beyond JAX and what models import of Flax."""
    script = """
        import time
        import jax, flax.linen, flax.nnx
        start = time.process_time()
        import flax_dwconv
        print(time.process_time() - start)
        """
    seconds = []
    for _ in range(6):  # as often as something else disturbs it
        seconds.append(float(fresh(script)))
        if seconds[-1] < 0.3:
            return
    pytest.fail(f"seconds: {seconds}")


# Memory


def shapes():
    """The images and kernels of the benchmark, those with the fewest and with the most channels."""
    found = {}
    for case in layers():
        key = *case.size, case.kernel[0], case.stride, case.padding
        found.setdefault(key, []).append(case.channels)
    return {key: sorted({min(cs), max(cs)}) for key, cs in found.items()}


def temporary(f, *specs):
    """Bytes of temporaries of an executable, for each byte of its operands and results."""
    memory = jax.jit(f).lower(*specs).compile().memory_analysis()
    return memory.temp_size_in_bytes / (memory.argument_size_in_bytes + memory.output_size_in_bytes)


@pytest.mark.parametrize(("shape", "channels"), shapes().items(), ids=str)
def test_temporary_memory(shape, channels):
    """At most 2.5 times operands and results, on two images: one by one is not all at once."""
    h, w, k, stride, padding = shape
    f = functools.partial(depthwise_conv2d, strides=stride, padding=padding)
    ratios = {}
    for c in channels:
        x, kernel = (
            jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, h, w, c), (k, k, c, 1))
        )  # fmt: skip
        ratios["forward", c] = temporary(f, x, kernel)
    g = jax.eval_shape(f, x, kernel)
    ratios["gradients", c] = temporary(
        lambda x, kernel, g: jax.vjp(f, x, kernel)[1](g), x, kernel, g
    )
    assert max(ratios.values()) <= 2.5, ratios


@pytest.mark.parametrize(
    ("shape", "window", "multiplier", "stride"),
    [
        ((4, 224, 224, 3), 16, 64, 16),
        ((1, 224, 224, 3), 16, 384, 16),
        ((8, 512, 512, 4), 3, 32, 4),
        ((2, 112, 112, 3), 7, 64, 4),
        ((2, 56, 56, 32), 3, 8, 2),
        ((2, 56, 56, 8), 3, 32, 1),
        ((4, 108, 20, 3), 4, 6, 2),
        ((6, 34, 34, 3), 15, 24, 1),
        ((3, 21, 36, 2), 6, 38, 4),
        ((2, 23, 23, 18), 10, 5, 2),
        ((2, 112, 112, 3), 5, 32, 2),
        ((5, 79, 17, 34), 6, 31, 2),
    ],
    ids=str,
)
def test_temporary_memory_with_a_multiplier(shape, window, multiplier, stride):
    """An image repeated for each filter before strides are taken was up to 86 times as large.

    Patches of all taps of an input gradient would be 9 times as large, partial sums of a kernel
    gradient 5 times.
    """
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = jax.ShapeDtypeStruct((window, window, shape[-1], multiplier), jnp.float32)
    f = functools.partial(depthwise_conv2d, strides=stride, padding="same")
    g = jax.eval_shape(f, x, kernel)
    assert temporary(f, x, kernel) <= 2.5
    assert temporary(lambda x, g: jax.linear_transpose(lambda k: f(x, k), kernel)(g), x, g) <= 2.5
    assert temporary(lambda k, g: jax.linear_transpose(lambda x: f(x, k), x)(g), kernel, g) <= 2.5


# What of JAX may go away

SOURCE = inspect.getsource(rule)


def touched():
    """Every name of JAX that `rule` reads from a module that JAX does not promise to keep, or from
    the context that a lowering rule is given."""
    tree = ast.parse(SOURCE)
    roots, names = {"ctx"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.match(
            r"jax\.(_src|interpreters|experimental|extend)", node.module
        ):
            roots |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(base, name):
                pass
            case ast.Call(ast.Name("getattr" | "hasattr"), [base, ast.Constant(name), *_]):
                pass
            case _:
                continue
        while isinstance(base, ast.Attribute):
            base = base.value
        if isinstance(base, ast.Name) and base.id in roots:
            names.add(name)
    return sorted(names)


def test_what_we_touch_is_listed_in_one_place():
    assert {"set_xla_metadata", "register_lowering", "_lowerings"} <= set(touched())
    listed = re.findall(r"\w+", rule.__doc__.partition("does not promise to keep")[2])
    assert not set(touched()) - set(listed)


def test_nothing_else_is_private_to_jax_or_flax():
    for path in ROOT.glob("flax_dwconv/**/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None)
                for alias in node.names:
                    if re.match(r"(jax|flax|optax)\b", module or alias.name):
                        roots.add(alias.asname or alias.name.split(".")[0])
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr):
                base = node.value
                while isinstance(base, ast.Attribute):
                    base = base.value
                private = isinstance(base, ast.Name) and base.id in roots
                assert not private or path.stem == "rule", f"{path.name}: {ast.unparse(node)}"


GONE = """
import json, sys, warnings
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import xla_metadata
from jax._src.sharding_impls import ShardingContext
from jax.interpreters import mlir

def hide(cls, name):
    # JAX itself still finds it.
    found = cls.__getattribute__

    def get(self, attribute):
        caller = sys._getframe(1).f_globals["__name__"]
        if attribute == name and caller == "flax_dwconv._lowering.rule":
            raise AttributeError(name)
        return found(self, attribute)

    cls.__getattribute__ = get
    return lambda: setattr(cls, "__getattribute__", found)

def remove(name):
    for module in (mlir, xla_metadata):
        if hasattr(module, name):
            value = getattr(module, name)
            delattr(module, name)
            return lambda: setattr(module, name, value)
    equation = type(jax.make_jaxpr(jnp.sin)(1.0).eqns[0].ctx)
    contexts = [mlir.LoweringRuleContext, mlir.ModuleContext, ShardingContext, equation]
    (context,) = [
        context for context in contexts
        if name in {**context.__dict__, **getattr(context, "__annotations__", {})}
        or name in getattr(context, "__slots__", ())
    ]
    return hide(context, name)

def run(method):
    import flax_dwconv

    layer = flax_dwconv.DepthwiseConv2D(3, activation="relu", method=method)
    x, kernel = jnp.arange(72.0).reshape(1, 6, 6, 2) % 7, jnp.arange(18.0).reshape(3, 3, 2, 1)
    params = {"kernel": kernel, "bias": jnp.ones(2)}

    @jax.jit
    @jax.value_and_grad
    def step(kernel):
        y = flax_dwconv.depthwise_conv2d(x, kernel, method=method)
        return (y * layer.apply({"params": params}, x)).sum()

    jax.clear_caches()
    compiled = flax_dwconv.accelerate(step).lower(kernel).compile()
    return compiled(kernel), " convolution(" in compiled.as_text()

rules = {p: dict(r) for p, r in mlir._platform_specific_lowerings.items()}, dict(mlir._lowerings)
expected, _ = run("lax")
for name in [None, *sys.argv[1:]]:
    for module in [m for m in sys.modules if m.startswith("flax_dwconv")]:
        del sys.modules[module]
    for platform, of_platform in rules[0].items():
        mlir._platform_specific_lowerings[platform].update(of_platform)
    mlir._lowerings.update(rules[1])
    back = remove(name) if name else lambda: None
    convolves = error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            values, convolves = run("auto")
            jax.tree.map(np.testing.assert_array_equal, values, expected)
        except Exception as exception:
            error = repr(exception)
    back()
    print(json.dumps([name, convolves, error, [str(w.message) for w in caught]]))
"""


@pytest.fixture(scope="module")
def gone():
    """name -> (whether a convolution is left, the error, the warnings) without it."""
    lines = map(json.loads, fresh(GONE, *touched()).splitlines())
    return {name: outcome for name, *outcome in lines}


@pytest.mark.parametrize("name", touched())
def test_without_it_one_warning_and_the_same_numbers(name, gone):
    convolves, error, messages = gone[name]
    assert error is None
    assert all("cannot hook into this JAX" in message for message in messages)
    assert len(messages) == convolves, "a warning if XLA compiles convolutions, none if we do"


def test_with_all_of_them_no_warning(gone):
    assert gone[None] == [False, None, []]


RENAMED = """
import json, sys, warnings
import jax, jax.numpy as jnp
from jax.interpreters import mlir

primitive = jax.lax.conv_general_dilated_p
theirs = mlir._platform_specific_lowerings["cpu"][primitive].rule
renamed = None

def of_another_jax(ctx, lhs, rhs, **params):
    if renamed is not None:
        params[renamed] = params.pop("another_name")
    return theirs(ctx, lhs, rhs, **params)

mlir.register_lowering(primitive, of_another_jax, platform="cpu")
import flax_dwconv
ours = mlir._platform_specific_lowerings["cpu"][primitive].rule

def renames(ctx, lhs, rhs, **params):
    if renamed is not None:
        params["another_name"] = params.pop(renamed)
    return ours(ctx, lhs, rhs, **params)

mlir.register_lowering(primitive, renames, platform="cpu")

def lowered(method):
    jax.clear_caches()
    f = jax.jit(lambda x, k: flax_dwconv.depthwise_conv2d(x, k, method=method))
    return f.lower(jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 1))).as_text()

for renamed in [None, *sys.argv[1:]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        xla = lowered("lax")
        without_tag = len(caught)
        taps = ["stablehlo.convolution" not in lowered("auto") for _ in range(2)]
    messages = [str(w.message) for w in caught]
    print(json.dumps([renamed, "stablehlo.convolution" in xla, without_tag, taps, messages]))
"""


def test_a_renamed_parameter_is_one_warning_and_the_same_program():
    """And none for a convolution that is not ours to compile."""
    names = sorted(set(re.findall(r'params\["(\w+)"\]', SOURCE)))
    assert {"padding", "window_strides", "dimension_numbers", "precision"} <= set(names)
    (_, xla, warned, taps, messages), *others = map(json.loads, fresh(RENAMED, *names).splitlines())
    assert (xla, warned, taps, messages) == (True, 0, [True, True], [])
    assert [name for name, *_ in others] == names
    for name, xla, warned, taps, messages in others:
        assert xla and not warned and taps == [False, False]
        (message,) = messages
        assert "cannot hook into this JAX" in message and f"KeyError('{name}')" in message


@pytest.mark.parametrize("error", [AttributeError, KeyError, TypeError, ValueError])
@pytest.mark.parametrize(
    "place", [(plan, "plan"), (forward, "convolve")], ids=["of the plan", "of an algorithm"]
)
def test_a_bug_of_ours_is_not_jaxs(place, error, monkeypatch):
    """It is raised, without a warning that blames JAX, which would be an error here."""

    def buggy(*args):
        raise error("a bug of ours")

    monkeypatch.setattr(*place, buggy)
    program.cached.cache_clear()
    x, kernel = operands(size=9)
    with pytest.raises(error, match="a bug of ours"):
        flax_dwconv.accelerate(jax.jit(lambda x, kernel: plain(x, kernel))).lower(x, kernel)


# The public surface

PUBLIC = """
activations.ELU(alpha=1.0)
activations.LeakyReLU(negative_slope=0.3)
activations.ReLU(max_value=None, negative_slope=0.0, threshold=0.0)
activations.Softmax(axis=-1)
activations.Threshold(threshold, default_value)
activations.ThresholdedReLU(theta=1.0)
activations.exponential(x)
activations.gelu(x)
activations.get(identifier)
activations.hard_shrink(x)
activations.hard_sigmoid(x)
activations.leaky_relu(x)
activations.linear(x)
activations.relu(x)
activations.relu6(x)
activations.serialize(obj)
activations.soft_shrink(x)
activations.softsign(x)
activations.sparse_plus(x)
activations.sparsemax(x)
activations.squareplus(x)
activations.tanh_shrink(x)
constraints.Constraint()
constraints.MaxNorm(max_value=2.0, axis=0)
constraints.MinMaxNorm(min_value=0.0, max_value=1.0, rate=1.0, axis=0)
constraints.NonNeg()
constraints.RadialConstraint()
constraints.Stacked(constraint, axis=0)
constraints.UnitNorm(axis=0)
constraints.get(identifier)
constraints.serialize(obj)
functional.causal_conv1d(x, kernel, state=None, *, dilation_rate=1, segment_ids=None,
    precision=None, method='auto')
functional.depthwise_conv(x, kernel, *, strides=1, padding='valid', dilation_rate=1,
    data_format='channels_last', precision=None, preferred_element_type=None, method='auto')
functional.depthwise_conv1d(x, kernel, *, strides=1, padding='valid', dilation_rate=1,
    data_format='channels_last', precision=None, preferred_element_type=None, method='auto')
functional.depthwise_conv2d(x, kernel, *, strides=1, padding='valid', dilation_rate=1,
    data_format='channels_last', precision=None, preferred_element_type=None, method='auto')
functional.depthwise_conv3d(x, kernel, *, strides=1, padding='valid', dilation_rate=1,
    data_format='channels_last', precision=None, preferred_element_type=None, method='auto')
functional.next_state(x, state)
initializers.Array(values, argument='initializer')
initializers.Constant(value=0.0)
initializers.GlorotNormal(seed=None, input_axes=None, output_axes=None)
initializers.GlorotUniform(seed=None, input_axes=None, output_axes=None)
initializers.HeNormal(seed=None, input_axes=None, output_axes=None)
initializers.HeUniform(seed=None, input_axes=None, output_axes=None)
initializers.Identity(gain=1.0)
initializers.LecunNormal(seed=None, input_axes=None, output_axes=None)
initializers.LecunUniform(seed=None, input_axes=None, output_axes=None)
initializers.Ones()
initializers.Orthogonal(gain=1.0, seed=None)
initializers.RandomNormal(mean=0.0, stddev=0.05, seed=None)
initializers.RandomUniform(minval=-0.05, maxval=0.05, seed=None)
initializers.TruncatedNormal(mean=0.0, stddev=0.05, seed=None)
initializers.VarianceScaling(scale=1.0, mode='fan_in', distribution='truncated_normal',
    seed=None, input_axes=None, output_axes=None)
initializers.Zeros()
initializers.get(identifier)
initializers.serialize(obj)
keras_io.from_config(config, *, custom_objects=None)
keras_io.from_keras(keras_layer, *, custom_objects=None)
keras_io.load(path, *, config=None, custom_objects=None)
keras_io.to_config(layer)
keras_io.to_keras(layer, variables)
keras_io.weights(path, *, config=None)
linen.DepthwiseConv1D(kernel_size, strides=1, padding='valid', depth_multiplier=1,
    data_format=None, dilation_rate=1, activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', bias_initializer='zeros',
    depthwise_regularizer=None, bias_regularizer=None, activity_regularizer=None,
    depthwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto')
linen.DepthwiseConv2D(kernel_size, strides=(1, 1), padding='valid', depth_multiplier=1,
    data_format=None, dilation_rate=(1, 1), activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', bias_initializer='zeros',
    depthwise_regularizer=None, bias_regularizer=None, activity_regularizer=None,
    depthwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto')
linen.DepthwiseConv3D(kernel_size, strides=1, padding='valid', depth_multiplier=1,
    data_format=None, dilation_rate=1, activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', bias_initializer='zeros',
    depthwise_regularizer=None, bias_regularizer=None, activity_regularizer=None,
    depthwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto')
linen.SeparableConv1D(filters, kernel_size, strides=1, padding='valid', data_format=None,
    dilation_rate=1, depth_multiplier=1, activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', pointwise_initializer='glorot_uniform',
    bias_initializer='zeros', depthwise_regularizer=None, pointwise_regularizer=None,
    bias_regularizer=None, activity_regularizer=None, depthwise_constraint=None,
    pointwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto')
linen.SeparableConv2D(filters, kernel_size, strides=1, padding='valid', data_format=None,
    dilation_rate=1, depth_multiplier=1, activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', pointwise_initializer='glorot_uniform',
    bias_initializer='zeros', depthwise_regularizer=None, pointwise_regularizer=None,
    bias_regularizer=None, activity_regularizer=None, depthwise_constraint=None,
    pointwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto')
nnx.DepthwiseConv1D(in_features, kernel_size, *, strides=1, padding='valid', depth_multiplier=1,
    data_format=None, dilation_rate=1, activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', bias_initializer='zeros',
    depthwise_regularizer=None, bias_regularizer=None, activity_regularizer=None,
    depthwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto', rngs)
nnx.DepthwiseConv2D(in_features, kernel_size, *, strides=(1, 1), padding='valid',
    depth_multiplier=1, data_format=None, dilation_rate=(1, 1), activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', bias_initializer='zeros',
    depthwise_regularizer=None, bias_regularizer=None, activity_regularizer=None,
    depthwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto', rngs)
nnx.DepthwiseConv3D(in_features, kernel_size, *, strides=1, padding='valid', depth_multiplier=1,
    data_format=None, dilation_rate=1, activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', bias_initializer='zeros',
    depthwise_regularizer=None, bias_regularizer=None, activity_regularizer=None,
    depthwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto', rngs)
nnx.Loss(*args, **kwargs)
nnx.SeparableConv1D(in_features, filters, kernel_size, *, strides=1, padding='valid',
    data_format=None, dilation_rate=1, depth_multiplier=1, activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', pointwise_initializer='glorot_uniform',
    bias_initializer='zeros', depthwise_regularizer=None, pointwise_regularizer=None,
    bias_regularizer=None, activity_regularizer=None, depthwise_constraint=None,
    pointwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto', rngs)
nnx.SeparableConv2D(in_features, filters, kernel_size, *, strides=1, padding='valid',
    data_format=None, dilation_rate=1, depth_multiplier=1, activation=None, use_bias=True,
    depthwise_initializer='glorot_uniform', pointwise_initializer='glorot_uniform',
    bias_initializer='zeros', depthwise_regularizer=None, pointwise_regularizer=None,
    bias_regularizer=None, activity_regularizer=None, depthwise_constraint=None,
    pointwise_constraint=None, bias_constraint=None, dtype=None, param_dtype=<class
    'jax.numpy.float32'>, precision=None, method='auto', rngs)
regularizers.L1(l1=0.01)
regularizers.L1L2(l1=0.0, l2=0.0)
regularizers.L2(l2=0.01)
regularizers.OrthogonalRegularizer(factor=0.01, mode='rows')
regularizers.get(identifier)
regularizers.serialize(obj)
weights.fold_batch_norm(params, batch_stats, epsilon)
weights.from_flax(params_or_kernel, *, depth_multiplier=1)
weights.from_torch(state_dict, *, depth_multiplier=1, prefix=None)
weights.to_flax(params)
weights.to_torch(params)
"""


def surface():
    """Public functions and classes of the library's modules, as `module.name(signature)`."""
    for path in sorted(ROOT.glob("flax_dwconv/[!_]*.py")):
        module = importlib.import_module(f"flax_dwconv.{path.stem}")
        for name, value in sorted(vars(module).items()):
            ours = getattr(value, "__module__", None) == module.__name__
            if ours and not name.startswith("_"):
                signature = inspect.signature(value)
                bare = [
                    p.replace(annotation=p.empty)
                    for p in signature.parameters.values()
                    if p.name not in ("parent", "name")  # Flax's
                ]
                yield f"{path.stem}.{name}{inspect.Signature(bare)}"


def test_the_public_surface_is_pinned():
    """A change here is a change for users: it belongs into `.github/CHANGES.md`."""
    assert list(surface()) == PUBLIC.strip().replace("\n    ", " ").splitlines()
