"""Constraints in optax, and trees that say of each parameter of a model what optax should know."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct, traverse_util
from flax.core import meta
from jax.typing import ArrayLike, DTypeLike

from flax_dwconv import _layer
from flax_dwconv._vocabulary import at_least_float32
from flax_dwconv.constraints import VOCABULARY, Projection, Stacked


def constrain(constraints: Any) -> optax.GradientTransformation:
    """Returns a transformation after whose updates the parameters satisfy their constraints.

    In an `optax.chain` it has to be the last one: what comes after it changes the updates again,
    and it cannot know. The example shows a norm of 2.78 under a largest norm of 2. Defined as

        updates' = project(params + updates) - params,

    so that `optax.apply_updates` lands on project(params + updates), to the rounding of one sum; a
    weight that the projection does not move keeps its update bit for bit.

    Args:
        constraints: a tree like the parameters, of projections w -> w or of what
            `constraints.get` takes by name; None, or nothing at all, where a parameter is free. One
            projection in place of a subtree is that of all parameters below it.
            `collect_constraints` makes such a tree. The parameters may be another kind of mapping,
            `nnx.State` for instance, and boxed.

    Returns:
        An `optax.GradientTransformation` without state.

    Raises:
        TypeError: a leaf is no constraint.
        ValueError: a leaf is no known name; at `init`, a constraint is of no parameter; at
            `update`, optax's own error if `params` is missing.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax_dwconv.constraints import NonNeg
        >>> tx = optax.chain(optax.sgd(1.0), constrain({"kernel": NonNeg()}))
        >>> params = {"kernel": jnp.array([1.0, 2.0]), "bias": jnp.array([1.0])}
        >>> grads = {"kernel": jnp.array([3.0, 0.5]), "bias": jnp.array([3.0])}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)
        {'bias': Array([-2.], dtype=float32), 'kernel': Array([0. , 1.5], dtype=float32)}

        Last in its chain, and wrongly the first:

        >>> from flax_dwconv.constraints import MaxNorm
        >>> params, grads = jnp.array([1.2, 1.6]), jnp.array([-1.56, -2.08])
        >>> last = optax.chain(optax.sgd(0.3), constrain(MaxNorm(2.0)))
        >>> first = optax.chain(constrain(MaxNorm(2.0)), optax.sgd(0.3))
        >>> for tx in (last, first):
        ...     updates, _ = tx.update(grads, tx.init(params), params)
        ...     print(jnp.linalg.norm(optax.apply_updates(params, updates)))
        2.0
        2.78
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(constraints, is_leaf=callable)
    projections = {_path(keys): VOCABULARY.get(leaf, "constraints") for keys, leaf in flat}

    def projection(path: tuple[Any, ...]) -> Projection | None:
        above = (path[:n] for n in range(len(path) + 1))
        return next((projections[place] for place in above if place in projections), None)

    def init(params: Any) -> optax.EmptyState:
        flat, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_absent)
        places = [(_path(keys), _is_absent(leaf)) for keys, leaf in flat]
        for path in projections:
            if not any(
                place[: len(path)] == path or (absent and path[: len(place)] == place)
                for place, absent in places
            ):
                raise ValueError(
                    "`constraints` must be a tree like the parameters, "
                    f"got a constraint for {'/'.join(map(str, path))!r}, which is none of them."
                )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:  # optax words its own error
            return optax.keep_params_nonnegative().update(updates, state, None)

        def step(keys: Any, p: Any, u: Any) -> Any:
            project = projection(_path(keys))
            return u if project is None or p is None or u is None else _step(project, p, u)

        return jax.tree_util.tree_map_with_path(step, params, updates, is_leaf=_is_none), state

    return optax.GradientTransformation(init, update)


def _step(project: Projection, p: ArrayLike, u: ArrayLike) -> jax.Array:
    """Returns the update, in u's dtype, that takes p to project(p + u)."""
    p, u = jnp.asarray(p), jnp.asarray(u)
    new = (at_least_float32(p) + at_least_float32(u)).astype(p.dtype)
    wanted = project(new).astype(p.dtype)
    step = at_least_float32(wanted) - at_least_float32(p)
    return jnp.where(wanted == new, u, step.astype(u.dtype))


def _path(keys: Iterable[Any]) -> tuple[Any, ...]:
    """The keys of a path in any kind of tree: of a mapping, a sequence or an attribute."""
    return tuple(
        next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)) for key in keys
    )


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _is_absent(leaf: Any) -> bool:
    """Whether it stands for parameters that another part of the optimizer has."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


# What is known about the parameters of a model.


def collect_constraints(model: Any, *example_inputs: Any, **kwargs: Any) -> Mapping[str, Any]:
    """Returns the constraints of every layer in a model, for `constrain`.

    Args:
        model: a linen or an nnx module that holds layers of this package at any depth, but for
            those on the other side of an `nnx.bridge`. A linen model is traced, not run, so that
            shapes will do for inputs.
        *example_inputs: what a linen model is called with; nnx models need none.
        **kwargs: its keyword arguments.

    Returns:
        A dict of the structure of `variables["params"]`, or of `nnx.state(model, nnx.Param)`, with
        a projection or None for each parameter. For layers that `nn.scan`, `nn.vmap` or `nnx.vmap`
        stacked it is a `constraints.Stacked`. (An nnx model does not tell the axis of a stack: it
        is the first one that fits the shape, where several do.)

    Raises:
        TypeError: `model` is no module, or a linen module without inputs.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import flax_dwconv
        >>> model = nn.Sequential([
        ...     flax_dwconv.DepthwiseConv2D(3, depthwise_constraint="max_norm"), nn.Dense(10)])
        >>> tree = flax_dwconv.collect_constraints(model, jnp.ones((1, 8, 8, 3)))
        >>> tree["layers_0"], tree["layers_1"]
        ({'bias': None, 'kernel': MaxNorm(max_value=2.0, axis=0)}, {'bias': None, 'kernel': None})
    """
    found = _found(model, example_inputs, kwargs, _constraints)
    return jax.tree.map(lambda f: f and _stacked(f.answer, f.axes), found, is_leaf=_is_none)


def depthwise_kernels(model: Any, *example_inputs: Any, **kwargs: Any) -> Mapping[str, Any]:
    """Returns which parameters of a model are depthwise kernels, for a mask of optax.

    They are those of this package's layers, under any name and at any depth, the depthwise kernel
    of a separable layer included, and those of depthwise `nn.Conv` and `nnx.Conv`. The shapes alone
    would not tell: (3, 3, 3, 32) is a depthwise kernel or that of an ordinary convolution.

    Args:
        model: a linen or an nnx module, as for `collect_constraints`.
        *example_inputs: what a linen model is called with; nnx models need none.
        **kwargs: its keyword arguments.

    Returns:
        A tree of the structure of `variables["params"]`, or of `nnx.state(model, nnx.Param)`, with
        a bool for each parameter.

    Raises:
        TypeError: `model` is no module, or a linen module without inputs.

    Example:
        Weight decay for all parameters but depthwise kernels and whatever has one axis:

        >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
        >>> import flax_dwconv
        >>> model = nn.Sequential([flax_dwconv.DepthwiseConv2D(3), nn.Dense(10)])
        >>> x = jnp.ones((1, 8, 8, 3))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> kernels = flax_dwconv.depthwise_kernels(model, x)
        >>> kernels["layers_0"]
        {'bias': False, 'kernel': True}
        >>> mask = jax.tree.map(lambda dw, p: not dw and p.ndim > 1, kernels, params)
        >>> tx = optax.chain(optax.add_decayed_weights(1e-4, mask), optax.sgd(0.1))
        >>> mask["layers_0"], mask["layers_1"]
        ({'bias': False, 'kernel': False}, {'bias': False, 'kernel': True})
    """
    found = _found(model, example_inputs, kwargs, _depthwise)
    mask = jax.tree.map(lambda f: f is not None, found, is_leaf=_is_none)
    return nnx.State(mask) if isinstance(model, nnx.Module) else mask  # pyrefly: ignore


# A question about a layer, called with `args` and `kwargs`: the answer for each of its parameters
# that has one, by name. Asked twice, it gives the same objects.
_Question = Callable[[Any, Any, Any], dict[str, Any]]


def _constraints(layer: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    if not isinstance(layer, _layer.Settings):
        return {}
    of = {name: getattr(layer, f"{word}_constraint") for name, word in layer.prefixes.items()}
    return {name: constraint for name, constraint in of.items() if constraint is not None}


def _depthwise(layer: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    if isinstance(layer, _layer.Settings):
        return {next(iter(layer.prefixes)): True}
    if isinstance(layer, nnx.Conv):
        channels = layer.in_features
    elif isinstance(layer, nn.Conv):
        channels = next((x.shape[-1] for x in (*args, *kwargs.values())), 1)
    else:
        return {}
    return {"kernel": True} if 1 < channels == layer.feature_group_count else {}


@dataclasses.dataclass(frozen=True)
class _Found:
    """The answer for a parameter, and the axes that Flax's transformations stacked it along."""

    answer: Any
    axes: tuple[int, ...]


def _found(model: Any, args: Any, kwargs: Any, ask: _Question) -> Mapping[str, Any]:
    """Returns a tree like the parameters, with `_Found` or None for each."""
    if isinstance(model, nn.Module):
        if not (args or kwargs):
            raise TypeError("A linen `model` is traced: what it is called with must follow it.")
        return _of_linen(model, args, kwargs, ask)
    if isinstance(model, nnx.Module):
        return _of_nnx(model, ask)
    raise TypeError(f"`model` must be a linen or an nnx module, got {type(model).__name__}.")


class _Asked(struct.PyTreeNode, meta.AxisMetadata):
    """A box for a parameter about which there is an answer.

    Flax's transformations tell a box which axes they add, one after the other. The shapes alone
    would not tell: a weight of shape (3, 3, 3, c, m) may be stacked along any of three axes.
    """

    value: Any
    answer: int = struct.field(pytree_node=False)  # its id: any object may be a constraint
    axes: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "_Asked":
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> "_Asked":
        return self.replace(axes=(*self.axes, index))

    def remove_axis(self, index: int, params: Any) -> "_Asked":
        return self.replace(axes=self.axes[:-1])


# `nn.jit` remembers traces, by the names of the RNG streams among others. Here every trace has a
# stream of its own, so that it is neither taken from that memory nor found there as the model's.
_TRACES = itertools.count()


def _of_linen(model: nn.Module, args: Any, kwargs: Any, ask: _Question) -> Mapping[str, Any]:
    answers: dict[int, Any] = {}

    def box_parameters(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        layer, own = context.module, {}
        for parameter, answer in ask(layer, args, kwargs).items():
            answers[id(answer)] = answer
            ours = isinstance(layer, _layer.Settings)
            name = f"{layer.prefixes[parameter]}_initializer" if ours else f"{parameter}_init"
            own[name] = getattr(layer, name)
            object.__setattr__(layer, name, _boxed(id(answer)))
        try:
            return call(*args, **kwargs)
        finally:
            for name, initializer in own.items():
                object.__setattr__(layer, name, initializer)

    # Arrays and shapes become tracers; everything else, such as `train=False`, stays what it is.
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    key = jax.random.key(0)

    def init(arrays: Any) -> Any:
        args, kwargs = structure.unflatten([arrays.get(i, x) for i, x in enumerate(leaves)])
        return model.init({"params": key, f"trace_{next(_TRACES)}": key}, *args, **kwargs)

    with nn.intercept_methods(box_parameters):
        params = jax.eval_shape(init, arrays).get("params", {})
    return jax.tree.map(
        lambda p: _Found(answers[p.answer], p.axes) if isinstance(p, _Asked) else None,
        params,
        is_leaf=meta.is_axis_metadata,
    )


def _boxed(answer: int) -> Callable[..., _Asked]:
    def initializer(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> _Asked:
        return _Asked(jnp.zeros(shape, dtype), answer)

    return initializer


def _of_nnx(model: nnx.Module, ask: _Question) -> Mapping[str, Any]:
    found: dict[int, _Found] = {}
    for _, layer in nnx.iter_modules(model):
        for name, answer in ask(layer, (), {}).items():
            variable, axes = getattr(layer, name), ()
            if isinstance(layer, _layer.Settings):
                own = layer._shapes(layer.in_features)[name]  # pyrefly: ignore
                axes = _added_axes(variable.shape, own)
            found[id(variable)] = _Found(answer, axes)
    return traverse_util.unflatten_dict(
        {
            path: found.get(id(variable))
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


def _stacked(constraint: Projection, axes: Iterable[int]) -> Projection:
    for axis in axes:
        constraint = Stacked(constraint, axis)
    return constraint
