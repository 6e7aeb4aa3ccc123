"""The constraints that the layers of a model ask for, as a tree like its parameters."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx, struct, traverse_util
from flax.core import meta

from flax_dwconv import _layer, constraints


def collect_constraints(model: Any, *example_inputs: Any, **kwargs: Any) -> Mapping[str, Any]:
    """Returns the constraints of every layer in a model, for `constrain`.

    Args:
      model: a linen or an nnx module that holds our layers at any depth, but for those on the
        other side of an `nnx.bridge`. A linen model is traced, not run, so that shapes will do for
        inputs.
      *example_inputs: what a linen model is called with; nnx models need none.
      **kwargs: its keyword arguments.

    Returns:
      A dict of the structure of `variables["params"]`, or of `nnx.state(model, nnx.Param)`, with a
      projection or None for each parameter. For layers that `nn.scan`, `nn.vmap` or `nnx.vmap`
      stacked it is a `constraints.Stacked`. (An nnx model does not tell the axis of a stack: it is
      the first one that fits the shape, where several do.)

    Raises:
      TypeError: if `model` is no module.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> import flax_dwconv
      >>> model = nn.Sequential([
      ...     flax_dwconv.DepthwiseConv2D(3, depthwise_constraint="max_norm"), nn.Dense(10)])
      >>> tree = flax_dwconv.collect_constraints(model, jnp.ones((1, 8, 8, 3)))
      >>> tree["layers_0"], tree["layers_1"]
      ({'bias': None, 'kernel': MaxNorm(max_value=2.0, axis=0)}, {'bias': None, 'kernel': None})
    """
    if isinstance(model, nn.Module):
        return _of_linen(model, example_inputs, kwargs)
    if isinstance(model, nnx.Module):
        return _of_nnx(model)
    raise TypeError(f"`model` must be a linen or an nnx module, got {type(model).__name__}.")


class _Asked(struct.PyTreeNode, meta.AxisMetadata):
    """A box for the parameter of a constrained layer.

    Flax's transformations tell a box about the axes that they add, in this order; that is more than
    the shapes would tell: (3, 3, 3, c, m) may be stacked along any of three axes.
    """

    value: Any
    constraint: int = struct.field(pytree_node=False)  # its id: any object may be a constraint
    axes: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self):
        return self.value

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        return self.replace(axes=(*self.axes, index))

    def remove_axis(self, index, params):
        return self.replace(axes=self.axes[:-1])


# `nn.jit` remembers traces, by the names of the RNG streams among others. A trace of ours must not
# come out of its memory, nor go into it as one of the model's own.
_TRACES = itertools.count()


def _of_linen(model, args, kwargs):
    asked = {}

    def box_parameters(call, args, kwargs, context):
        layer, own = context.module, {}
        if not isinstance(layer, _layer.Settings):
            return call(*args, **kwargs)
        for prefix in _layer.PARAMETERS.values():
            constraint = getattr(layer, f"{prefix}_constraint")
            if constraint is not None:
                asked[id(constraint)] = constraint
                name = f"{prefix}_initializer"
                own[name] = getattr(layer, name)
                object.__setattr__(layer, name, _boxed(id(constraint)))
        try:
            return call(*args, **kwargs)
        finally:
            for name, initializer in own.items():
                object.__setattr__(layer, name, initializer)

    # Arrays and shapes become tracers; everything else, such as `train=False`, stays what it is.
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    key = jax.random.key(0)

    def init(arrays):
        args, kwargs = structure.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
        return model.init({"params": key, f"trace_{next(_TRACES)}": key}, *args, **kwargs)

    with nn.intercept_methods(box_parameters):
        params = jax.eval_shape(init, arrays).get("params", {})
    return jax.tree.map(
        lambda p: _stacked(asked[p.constraint], p.axes) if isinstance(p, _Asked) else None,
        params,
        is_leaf=meta.is_axis_metadata,
    )


def _boxed(constraint: int) -> Callable[..., _Asked]:
    return lambda key, shape, dtype: _Asked(jnp.zeros(shape, dtype), constraint)


def _of_nnx(model):
    asked = {}
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, _layer.Settings):
            for name, parameter in layer._parameters(layer.in_features).items():  # pyrefly: ignore
                if parameter.constraint is not None:
                    variable = getattr(layer, name)
                    axes = _added_axes(variable.shape, parameter.shape)
                    asked[id(variable)] = _stacked(parameter.constraint, axes)
    return traverse_util.unflatten_dict(
        {
            path: asked.get(id(variable))
            for path, variable in nnx.iter_graph(model)
            if isinstance(variable, nnx.Param)
        }
    )


def _added_axes(shape: tuple[int, ...], own: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the first axes without which `shape` is `own`."""
    choices = list(itertools.combinations(range(len(shape)), len(shape) - len(own)))
    fits = (
        axes for axes in choices if own == tuple(n for i, n in enumerate(shape) if i not in axes)
    )
    return next(fits, choices[0])


def _stacked(constraint, axes):
    for axis in axes:
        constraint = constraints.Stacked(constraint, axis)
    return constraint
