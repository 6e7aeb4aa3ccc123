"""The hook into JAX: the tag of an equation, and the rules that JAX asks for convolutions.

This is the only file that touches what JAX does not promise to keep:

- `jax.experimental.xla_metadata.set_xla_metadata`, which sets the tag and what XLA reads;
- `jax.interpreters.mlir.register_lowering` and `.lower_fun`;
- `jax.interpreters.mlir._platform_specific_lowerings` and `._lowerings`: the earlier rules;
- `LoweringRuleContext.jaxpr_eqn_ctx.xla_metadata`, where a rule reads the tag, `.avals_in` and
  `.avals_out`, whose elements have a `shape`, `dtype`, `sharding.spec` and `sharding.mesh`, and
  `.module_context.axis_context.num_devices`;
- the parameters of `lax.conv_general_dilated_p`: `window_strides`, `padding`, `lhs_dilation`,
  `rhs_dilation`, `dimension_numbers`, `feature_group_count`, `batch_group_count`, `precision`.

If one of them goes away, a warning says which, once for each, and XLA compiles every convolution.
"""

import contextlib
import functools
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType

from flax_dwconv._lowering import plan

set_xla_metadata: Any = None
with contextlib.suppress(ImportError, AttributeError):  # `register` says so
    from jax.experimental import xla_metadata

    set_xla_metadata = xla_metadata.set_xla_metadata

_KEY = "flax_dwconv"

# (convolution, precision) -> the function (lhs, rhs) -> out that replaces it, or None.
Find = Callable[[plan.Convolution, Any], Callable[[jax.Array, jax.Array], jax.Array] | None]


def metadata(**values: str) -> contextlib.AbstractContextManager:
    """Returns a context whose equations carry these values; one without effect in other JAXes."""
    return contextlib.nullcontext() if set_xla_metadata is None else set_xla_metadata(**values)


def tagging(tag: plan.Tag) -> contextlib.AbstractContextManager:
    """Returns a context whose equations, and what is derived from them, carry the tag."""
    return metadata(**{_KEY: tag})


def register(find: Find) -> None:
    """Registers a rule in front of each rule that JAX has for convolutions, or warns.

    The programs of those who never heard of us stay as they are: a rule without a tag to act on
    calls the earlier one. In a program for several platforms, JAX emits a branch for each platform
    with a rule of its own and one for all others, so there are as many rules afterwards as before.

    Args:
      find: returns what replaces a convolution.
    """
    try:
        from jax.interpreters import mlir

        if set_xla_metadata is None:
            raise ImportError("jax.experimental.xla_metadata.set_xla_metadata")
        primitive, lower_fun = lax.conv_general_dilated_p, mlir.lower_fun
        specific, default = mlir._platform_specific_lowerings, mlir._lowerings
        entries: dict[str | None, Any] = {
            platform: rules[primitive]
            for platform, rules in dict(specific).items()
            if primitive in rules
        }
        if primitive in default:
            entries[None] = default[primitive]  # for every other platform
        if "cpu" not in entries:
            entries["cpu"] = entries[None]
        make = functools.cache(functools.partial(_rule, find=find, lower_fun=lower_fun))
        for platform, entry in entries.items():
            earlier = getattr(entry, "rule", entry)
            rule = make(earlier, on_cpu=platform == "cpu")
            mlir.register_lowering(primitive, rule, platform=platform)
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        _warn(repr(error))


def _rule(
    earlier: Callable[..., Any], *, on_cpu: bool, find: Find, lower_fun: Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a rule that lowers what `find` replaces, and hands the rest to the earlier rule."""

    def rule(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        try:
            found = _read(ctx, params, on_cpu)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _warn(repr(error))
            found = None
        if found is None:
            return earlier(ctx, lhs, rhs, **params)
        convolution, precision = found
        compute = find(convolution, precision)  # what it raises is a bug of ours, not JAX's
        if compute is None:
            return earlier(ctx, lhs, rhs, **params)
        # As it was traced: where x64 is off by now, float64 would become float32.
        wide = any(operand.dtype == "float64" for operand in convolution.operands)
        with jax.enable_x64(True) if wide else contextlib.nullcontext():
            return lower_fun(compute, multiple_results=False)(ctx, lhs, rhs)

    return rule


def _read(ctx: Any, params: Mapping[str, Any], on_cpu: bool) -> tuple[plan.Convolution, Any] | None:
    """Returns the convolution of an equation that is tagged for us and its precision, or None.

    Where JAX has given something another name or form, it raises what that raises.
    """
    tag = (ctx.jaxpr_eqn_ctx.xla_metadata or {}).get(_KEY)
    if tag is None:
        return None
    (lhs, rhs), (out,) = ctx.avals_in, ctx.avals_out
    lhs, rhs, out = map(_operand, (lhs, rhs, out), params["dimension_numbers"])
    convolution = plan.Convolution(
        lhs=lhs,
        rhs=rhs,
        out=out,
        strides=_integers(params["window_strides"]),
        padding=tuple((before, after) for before, after in map(_integers, params["padding"])),
        lhs_dilation=_integers(params["lhs_dilation"]),
        rhs_dilation=_integers(params["rhs_dilation"]),
        feature_groups=params["feature_group_count"],
        batch_groups=params["batch_group_count"],
        tag=tag,
        on_cpu=on_cpu,
        partitioned=partitioned(ctx.avals_in, _devices(ctx)),
    )
    return convolution, params["precision"]


def partitioned(types: Iterable[Any], devices: int) -> int:
    """Returns over how many axes of a mesh XLA partitions a program; 2 if it may be so many.

    Axes of one device do not count, nor do manual ones, those of `jax.shard_map`: there a program
    is for one device.

    Args:
      types: of arrays in it. They do not name the mesh if the shardings are only given to
        `jax.jit`, as `in_shardings`. Then 4 devices or more may be a grid.
      devices: how many it may be for.
    """
    meshes = [aval.sharding.mesh for aval in types if not aval.sharding.mesh.empty]
    if not meshes:
        return 2 if devices > 3 else int(devices > 1)
    kinds = [zip(mesh.axis_sizes, mesh.axis_types, strict=True) for mesh in meshes]
    return max(sum(n > 1 and kind != AxisType.Manual for n, kind in axes) for axes in kinds)


def _devices(ctx: Any) -> int:
    """Returns for how many devices a program is, or 1 if that is not known."""
    return getattr(ctx.module_context.axis_context, "num_devices", None) or 1
    return getattr(ctx.module_context.axis_context, "num_devices", None) or 1


def _operand(aval: Any, spec: Sequence[int]) -> plan.Operand:
    return plan.Operand(
        shape=_integers(aval.shape),
        spec=tuple(spec),
        dtype=aval.dtype.name,
        sharded=tuple(name is not None for name in aval.sharding.spec),
    )


def _integers(values: Sequence[Any]) -> tuple[int, ...]:
    """Returns the values as ints, those that are symbolic as SYMBOLIC."""
    return tuple(
        int(value) if isinstance(value, numbers.Integral) else plan.SYMBOLIC for value in values
    )


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"flax_dwconv cannot hook into this JAX ({jax.__version__}: {reason}): XLA compiles "
        "depthwise convolutions, which is right but slow on CPU.",
        RuntimeWarning,
        stacklevel=3,
    )
