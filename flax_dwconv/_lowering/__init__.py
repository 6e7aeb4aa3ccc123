"""How tagged convolutions are compiled: the tag, and `accelerate`.

A convolution is tagged by tracing it under a metadata context, which JAX keeps with the equation:
what autodiff, `vmap`, `remat` and `scan` derive from a tagged convolution is tagged too. When JAX
lowers a convolution, it asks the rule that `rule` registered. `plan` says which convolution it is
and which algorithm serves it: a sum over taps, in `forward` and `kernel_gradient`, or `planes` if
the channels come before space, or a matrix product, in `patches` and `product`. `program` makes a
function of that. Every other convolution is handed to the rule that was registered before.

The rooms, from the bottom up: on integers only, `axis`, `tuning`, `forward_plan`,
`kernel_gradient_plan`, `planes_plan` and `plan`; what is JAX's, XLA's and LLVM's, `rule` and
`workarounds`; what the algorithms share, `windows` and `sums`; the algorithms `forward`,
`kernel_gradient`, `planes`, `patches` and `product`; `program`.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, Literal, overload

import jax

from flax_dwconv._lowering import plan, program, rule

Method = Literal["auto", "lax", "taps"]

_TAGS: dict[Method, plan.Tag] = {"auto": "ours", "lax": "xla", "taps": "taps"}


class _Depth(threading.local):
    """How many scopes of `accelerate` the thread is inside of."""

    value = 0


_depth = _Depth()


class _Scope(threading.local):
    """A context that sets the tag; may be entered again, nested and in other threads.

    Called with a function, it returns one that runs inside.
    """

    def __init__(self, tag: plan.Tag) -> None:
        self._tag = tag
        self._entered: list[contextlib.AbstractContextManager] = []

    def __enter__(self) -> None:
        context = rule.tagging(self._tag)
        context.__enter__()
        self._entered.append(context)
        _depth.value += 1

    def __exit__(self, *exception: Any) -> None:
        _depth.value -= 1
        self._entered.pop().__exit__(*exception)

    def __call__(self, f: Callable[..., Any]) -> Callable[..., Any]:
        _check_function(f)

        def inside(g: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(g)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return g(*args, **kwargs)

            return wrapper

        wrapper = inside(f)
        for name in ("lower", "trace", "eval_shape"):  # of a jitted function
            if callable(getattr(f, name, None)):
                setattr(wrapper, name, inside(getattr(f, name)))
        return wrapper


def _check_function(f: Any) -> None:
    """Raises a TypeError if `f` is not a function whose call does what it is called for."""
    if not callable(f):
        raise TypeError(f"`f` must be a function or None, got {type(f).__name__}.")
    g = _innermost(f)
    if inspect.isclass(g):
        return
    # A linen module before it is bound. What it looks like tells it, without an import of Flax.
    if callable(getattr(g, "apply", None)) and getattr(g, "scope", g) is None:
        raise TypeError(
            f"`f` must be a function, got {type(g).__name__}, a module that is not bound to its "
            "variables: pass `model.apply`."
        )
    if not inspect.isroutine(g):
        g = _innermost(g.__call__)
    # Calling one of these runs nothing yet: its body would run after the scope has been left.
    kinds = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction
    if any(kind(g) for kind in kinds):
        raise TypeError(
            "`f` must not be a generator function or a coroutine function, nor an async generator "
            "function."
        )


def _innermost(f: Any) -> Any:
    """Returns what decorators and `functools.partial` wrap."""
    f = inspect.unwrap(f)
    while isinstance(f, functools.partial):
        f = inspect.unwrap(f.func)
    return f


def method_scope(method: Method, *operands: Any) -> contextlib.AbstractContextManager:
    """Returns the context under which `depthwise_conv` traces its convolution.

    Args:
      method: "auto" has it compiled as taps on CPU; "taps" on every platform; "lax" leaves it to
        XLA. Outside of `accelerate` that needs no tag, so that the program has nothing of this
        package in it. Two exceptions: if a function is traced outside of `accelerate` and
        differentiated inside, the convolutions of the derivative get the tag of `accelerate`. And
        where XLA's kernel gradient may be wrong (`plan.Convolution.partitioned`), the tag says that
        this gradient is to be computed here.
      *operands: of the convolution.
    """
    axes = rule.partitioned(map(jax.typeof, operands), jax.device_count())
    if method == "lax" and not (_depth.value or axes > 1):
        return contextlib.nullcontext()
    return rule.tagging(_TAGS[method])


@overload
def accelerate(*, pointwise: bool = False) -> _Scope: ...
@overload
def accelerate(f: Callable[..., Any], *, pointwise: bool = False) -> Callable[..., Any]: ...
def accelerate(
    f: Callable[..., Any] | None = None, *, pointwise: bool = False
) -> _Scope | Callable[..., Any]:
    """Makes depthwise convolutions fast on CPU in any JAX code: a context manager and a decorator.

    Convolutions that are traced inside are tagged, like those of `depthwise_conv2d`; of them, and
    of those that autodiff and `vmap` derive from them, the depthwise ones are compiled as sums over
    taps. Nothing else changes: not what is not depthwise (but see `pointwise`), not a convolution
    with `method="lax"` that is traced inside, not a program for GPU or TPU, not the jaxpr.

    A function that `jax.jit` compiled outside is compiled anew when it is called inside, and back.

    Args:
      f: a function, jitted or not, to be called inside; None returns a context manager, which is a
        decorator too.
      pointwise: whether 1x1 convolutions, the other half of a depthwise separable convolution, are
        compiled as the matrix products that they are. XLA's convolutions take about twice as long.
        Other convolutions stay XLA's: of the 15 in MobileNet that are not depthwise, the first, 3x3
        with strides of 2.

    Returns:
      A function that calls `f` inside, with the `lower`, `trace` and `eval_shape` of a jitted one;
      or the context manager.

    Raises:
      TypeError: if `f` cannot be called, is a linen module that is not bound to its variables
        (pass `model.apply`), or only makes what runs later, as generator, coroutine and async
        generator functions do; or if `pointwise` is not a bool.

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
    scope = _Scope("separable" if pointwise else "depthwise")
    return scope if f is None else scope(f)


rule.register(program.program)
