"""The tag, `accelerate`, and the lowering rule that compiles tagged convolutions for CPU.

A convolution is tagged by tracing it under a metadata context, which JAX keeps with the equation:
what autodiff, `vmap`, `remat` and `scan` derive from a tagged convolution is tagged too. When JAX
lowers a convolution for CPU it asks the rule registered here; the rule compiles a tagged depthwise
one as a sum over taps (`_taps`), a pointwise one, if the tag says so, as a matrix product, and
hands every other one to the rule that was registered before.

This is the only file that touches what JAX does not promise to keep:

- `jax.experimental.xla_metadata.set_xla_metadata`, which sets the tag;
- `jax.interpreters.mlir.register_lowering` and `.lower_fun`;
- `jax.interpreters.mlir._platform_specific_lowerings` and `._lowerings`: the earlier rule;
- `LoweringRuleContext.jaxpr_eqn_ctx.xla_metadata`, where the rule reads the tag, `.avals_in` and
  `.avals_out`.

If one of them goes away, one warning says so and XLA compiles every convolution.
"""

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import lax

from flax_dwconv import _taps

set_xla_metadata: Any = None
with contextlib.suppress(ImportError, AttributeError):  # `_register` says so
    from jax.experimental import xla_metadata

    set_xla_metadata = xla_metadata.set_xla_metadata

_KEY = "flax_dwconv"
# The tag says what is compiled here: a convolution of this package and what derives from it; those
# that are depthwise; pointwise ones too; nothing. That is a tag as well: without one, derivatives
# that are traced inside `accelerate` would be given the scope's.
_OURS, _DEPTHWISE, _SEPARABLE, _XLA = "ours", "depthwise", "separable", "xla"


class _Scope(threading.local):
    """A context that sets the tag; may be entered again, nested and in other threads.

    Called with a function, it returns one that runs inside.
    """

    def __init__(self, tag: str):
        self._tag = tag
        self._entered: list[contextlib.AbstractContextManager] = []

    def __enter__(self):
        metadata = contextlib.nullcontext()
        if set_xla_metadata is not None:
            metadata = set_xla_metadata(**{_KEY: self._tag})
        metadata.__enter__()
        self._entered.append(metadata)

    def __exit__(self, *exception):
        self._entered.pop().__exit__(*exception)

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        if not callable(f):
            raise TypeError(f"`f` must be a function or None, got {type(f).__name__}.")
        if inspect.iscoroutinefunction(f) or inspect.isgeneratorfunction(f):
            # It would run after the scope. Inside, others would run in the scope.
            raise TypeError("`f` must not be a generator function or a coroutine function.")

        def inside(g):
            @functools.wraps(g)
            def wrapper(*args, **kwargs):
                with self:
                    return g(*args, **kwargs)

            return wrapper

        wrapper = inside(f)
        for name in ("lower", "trace", "eval_shape"):  # of a jitted function
            if callable(getattr(f, name, None)):
                setattr(wrapper, name, inside(getattr(f, name)))
        return wrapper


def tagged() -> _Scope:
    """Returns a context for depthwise convolutions only, which are compiled here."""
    return _Scope(_OURS)


def left_to_xla() -> _Scope:
    """Returns a context whose convolutions are left to XLA, inside `accelerate` too."""
    return _Scope(_XLA)


@overload
def accelerate(*, pointwise: bool = False) -> _Scope: ...
@overload
def accelerate(f: Callable[..., Any], *, pointwise: bool = False) -> Callable[..., Any]: ...
def accelerate(f=None, *, pointwise=False):
    """Makes depthwise convolutions fast on CPU in any JAX code: a context manager and a decorator.

    Convolutions that are traced inside are tagged, like those of `depthwise_conv2d`; of them, and
    of those that autodiff and `vmap` derive from them, the depthwise ones are compiled as sums over
    taps. Nothing else changes: not what is not depthwise (but see `pointwise`), not
    `method="lax"`, not GPU or TPU, not the jaxpr.

    A function that `jax.jit` compiled outside is compiled anew when it is called inside, and back.

    Args:
      f: a function, jitted or not, to be called inside; None returns a context manager, which is a
        decorator too.
      pointwise: whether 1x1 convolutions, the other half of a depthwise separable convolution, are
        compiled as the matrix products that they are. XLA's convolutions take about twice as long.

    Raises:
      TypeError: if `f` cannot be called or is a generator or coroutine function, or `pointwise` is
        not a bool.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> model = nn.Conv(32, (3, 3), feature_group_count=32)  # knows nothing of this package
      >>> x = jnp.ones((1, 56, 56, 32))
      >>> params = model.init(jax.random.key(0), x)
      >>> with flax_dwconv.accelerate():
      ...     y = model.apply(params, x)
      >>> predict = flax_dwconv.accelerate(jax.jit(model.apply))
      >>> predict(params, x).shape
      (1, 56, 56, 32)
    """
    if not isinstance(pointwise, bool):
        raise TypeError(f"`pointwise` must be a bool, got {pointwise!r}.")
    scope = _Scope(_SEPARABLE if pointwise else _DEPTHWISE)
    return scope if f is None else scope(f)


@functools.lru_cache(maxsize=1024)
def _plan(tag: str, lhs: Any, rhs: Any, out: Any, **params: Any) -> Callable[..., jax.Array] | None:
    """Returns the jitted function (lhs, rhs) -> out that replaces a convolution of this tag.

    Or None, if it is left to the earlier rule. The cache makes equal convolutions of a network one
    function, which JAX traces and lowers once.

    With the groups `c` split off the axis that holds them, every convolution is

        out[n, m, o, c] = sum_q sum_a lhs[n, q, o + a, c] * rhs[m, q, a, c]

    Forward: q = 1 if it is depthwise, and m is the multiplier. Input gradient: m = 1, and q is the
    multiplier. Kernel gradient: n = 1, and q is the batch; it is the one with `batch_group_count`,
    as JAX's transpose rule makes it. What autodiff derives from these again has no other form.
    `vmap` over one operand can make the 1 larger. So is that of a grouped convolution which is not
    depthwise, hence it counts in what derives from this package's own only.
    """
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    batch_groups = params["batch_group_count"]
    groups = max(params["feature_group_count"], batch_groups)
    sizes = (*lhs.shape, *rhs.shape, *out.shape)
    if not all(isinstance(size, int) and size > 0 for size in sizes) or len(lhs_spec) < 3:
        return None  # symbolic, empty, or without spatial dimensions
    if lhs.dtype != rhs.dtype or not {lhs.dtype.name, out.dtype.name} <= _DTYPES:
        return None
    for aval, spec in zip((lhs, rhs, out), params["dimension_numbers"], strict=True):
        if any(aval.sharding.spec[d] is not None for d in spec[2:]):
            return None  # explicitly sharded over space, which JAX does not slice
    n, q = lhs.shape[lhs_spec[0]], lhs.shape[lhs_spec[1]]
    n, q = (n // groups, q) if batch_groups > 1 else (n, q // groups)
    m = rhs.shape[rhs_spec[0]] // groups
    axes = [
        _taps.Axis(
            size=lhs.shape[lhs_spec[i]],
            kernel=rhs.shape[rhs_spec[i]],
            out=out.shape[out_spec[i]],
            stride=params["window_strides"][i - 2],
            low=params["padding"][i - 2][0],
            lhs_dilation=params["lhs_dilation"][i - 2],
            rhs_dilation=params["rhs_dilation"][i - 2],
        )
        for i in range(2, len(lhs_spec))
    ]
    if batch_groups > 1 and _taps.is_kernel_gradient(axes):
        algorithm, other, spread = _sum_examples, n, groups <= _FEW_CHANNELS
    else:
        algorithm, other, spread = _sum_contracted, q, True
    depthwise = groups > 1 and (min(other, m) == 1 or tag == _OURS)
    spread = spread and depthwise and other == 1 < m
    if not depthwise:
        if tag != _SEPARABLE or not _taps.is_product(axes):
            return None
        if any(name is not None for aval in (lhs, rhs, out) for name in aval.sharding.spec):
            return None  # explicitly sharded, and JAX asks how the product is to be
        algorithm = functools.partial(
            _taps.product,
            features_first=out_spec[1] < min(out_spec[2:]),
            precision=params["precision"],
        )
    accumulator = max(lhs.dtype, out.dtype, jnp.dtype("float32"), key=lambda dtype: dtype.itemsize)

    def compute(x: jax.Array, kernel: jax.Array) -> jax.Array:
        x = _groups_last(x.astype(accumulator), lhs_spec, 0 if batch_groups > 1 else 1, groups)
        kernel = _groups_last(kernel.astype(accumulator), rhs_spec, 0, groups)
        if spread:  # as `m` times as many channels, each with its own copy of the image
            x = jnp.repeat(x, m, -1)
            kernel = jnp.moveaxis(kernel, 0, -1).reshape(*kernel.shape[1:-1], -1)[None]
        if depthwise:
            x, kernel = _materialize(x, kernel)
        y = algorithm(x, kernel, axes)  # (n, m, *outs, c)
        order = [(0,), (y.ndim - 1, 1), *[(i,) for i in range(2, y.ndim - 1)]]
        at = sorted(range(len(order)), key=out_spec.__getitem__)
        y = lax.transpose(y, [d for i in at for d in order[i]])
        y = y.reshape(out.shape)
        return (_taps.computed_once(y) if depthwise else y).astype(out.dtype)

    return jax.jit(compute)


# Copies of the image for a multiplier are in the order of the result. Forward, they take 0.2 to 0.8
# of the time that one kernel after the other and a transposition take, with 5x5 and 7x7 about as
# long; kernel gradients 0.1 to 0.8, but with more channels than this 0.9 to 3 times as long.
_FEW_CHANNELS = 16
_DTYPES = {"float16", "bfloat16", "float32", "float64"}


def _sum_examples(x: jax.Array, g: jax.Array, axes: Sequence[_taps.Axis]) -> jax.Array:
    """The kernel gradient of every pair of `n` and `m`."""
    gradient = functools.partial(_taps.kernel_gradient, axes=axes)
    if x.shape[0] == g.shape[0] == 1:
        return gradient(x[0], g[0])[None, None]
    return jax.vmap(jax.vmap(gradient, (None, 0)), (0, None))(x, g)


def _sum_contracted(x: jax.Array, kernel: jax.Array, axes: Sequence[_taps.Axis]) -> jax.Array:
    """The convolution, summed over `q`."""
    q = x.shape[1]
    if q == 1:
        return _taps.convolve(x[:, 0], kernel[:, 0], axes)
    # One more dimension, that has one window: `q` times as many taps in one pass. As `q`
    # convolutions that are summed up afterwards, an input gradient takes 1.3 to 24 times as long.
    summed = _taps.Axis(q, kernel=q, out=1, stride=1, low=0, lhs_dilation=1, rhs_dilation=1)
    return lax.squeeze(_taps.convolve(x, kernel, [summed, *axes]), [2])


def _groups_last(x: jax.Array, spec: Sequence[int], grouped: int, groups: int) -> jax.Array:
    """Transposes to the order of `spec`, and the groups, major in `spec[grouped]`, to the end."""
    axis = spec[grouped]
    x = x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
    return lax.transpose(x, (*[d + (d >= axis) for d in spec], axis))


def _materialize(*arrays: jax.Array) -> Sequence[jax.Array]:
    """Keeps XLA from computing the arrays anew for every tap that reads them.

    Without dimensions of size 1: XLA gives them any layout, and then copies the array for the call.
    """
    squeezed = [lax.squeeze(x, [d for d, size in enumerate(x.shape) if size == 1]) for x in arrays]
    # In a network, operands are expressions, and XLA:CPU fuses an expression into each of its
    # readers. When it does, an `optimization_barrier` is gone already; a call that is not inlined
    # stays, and costs nothing.
    with set_xla_metadata(inlineable="false"):
        squeezed = _identity(*squeezed)
    return [x.reshape(array.shape) for x, array in zip(squeezed, arrays, strict=True)]


_identity = jax.jit(lambda *arrays: arrays)


def _register() -> None:
    """Registers the rule for CPU, or warns that it cannot."""
    try:
        from jax.interpreters import mlir

        if set_xla_metadata is None:
            raise ImportError("jax.experimental.xla_metadata.set_xla_metadata")
        primitive, lower_fun = lax.conv_general_dilated_p, mlir.lower_fun
        lowerings = mlir._platform_specific_lowerings["cpu"]
        entry: Any = lowerings[primitive] if primitive in lowerings else mlir._lowerings[primitive]
        earlier = getattr(entry, "rule", entry)

        def rule(ctx, lhs, rhs, **params):
            compute = None
            try:
                tag = (ctx.jaxpr_eqn_ctx.xla_metadata or {}).get(_KEY, _XLA)
                if tag != _XLA:
                    compute = _plan(tag, *ctx.avals_in, *ctx.avals_out, **params)
            except AttributeError as error:
                _warn(str(error))
            if compute is None:
                return earlier(ctx, lhs, rhs, **params)
            # As it was traced: where x64 is off by now, float64 would become float32.
            wide = any(aval.dtype == "float64" for aval in (*ctx.avals_in, *ctx.avals_out))
            with jax.enable_x64(True) if wide else contextlib.nullcontext():
                return lower_fun(compute, multiple_results=False)(ctx, lhs, rhs)

        mlir.register_lowering(primitive, rule, platform="cpu")
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        _warn(repr(error))


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"flax_dwconv cannot hook into this JAX ({jax.__version__}: {reason}): XLA compiles "
        "depthwise convolutions, which is right but slow on CPU.",
        RuntimeWarning,
        stacklevel=3,
    )


_register()
