"""Finds the variables of every object of a model's config in a file of Keras.

A file of Keras 3 keeps them under a path that follows from the config. A `.h5` file of a whole
model keeps those of each top-level layer in one list, under names that mostly end with the names of
the nested models and layers that lead to them.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from flax_dwconv import _keras_names
from flax_dwconv._keras_files import Read, Store
from flax_dwconv._keras_names import Entry

# The variables of an object: its own under "", those of its parts under their paths in it.
Parts = dict[str, dict[str, Read]]


@dataclasses.dataclass(frozen=True)
class Found:
    """An object of a config, and how to read its variables by Keras 3's names.

    Attributes:
        entry: the object.
        variables: none for an object without weights.
        problem: why they are not what the config asks for; empty if they are.
    """

    entry: Entry
    variables: Mapping[str, Read]
    problem: str = ""

    def arrays(self) -> dict[str, np.ndarray]:
        """Reads all variables, as contiguous arrays.

        Raises:
            ValueError: if one is missing or damaged, or there are more or fewer than the config
                says.
        """
        arrays = {name: read() for name, read in self.variables.items()}
        if self.problem:
            raise ValueError(self.problem)
        return arrays


def find(store: Store, model: Mapping[str, Any]) -> list[Found]:
    """Returns every object of a config in the model's order, with the variables that it has.

    A layer that several models share is stored once, where Keras first met it: the others get the
    same variables, if the config leaves no doubt which those are.
    """
    entries = list(_keras_names.walk(model))
    stored = _in_paths(store, entries) if store.layers is None else _in_lists(store.layers, entries)
    kin: dict[str, list[int]] = {}
    for i in sorted(stored):
        kin.setdefault(entries[i].class_name, []).append(i)
    result: list[Found] = []
    for i, entry in enumerate(entries):
        parts = stored.get(i) or stored.get(_twin(i, entries, kin.get(entry.class_name, [])))
        if parts:
            result.append(_checked(entry, parts))
        elif i or len(entries) == 1:
            asked = _keras_names.variables(entry)
            result.append(Found(entry, {}, _missing(entry, store) if asked else ""))
    return result


def _missing(entry: Entry, store: Store) -> str:
    if store.layers is None:
        return f"the file has no weights at {entry.path!r}."
    if entry.names[0] not in store.layers:
        return f"the file has no {entry.names[0]!r}."
    return "its weights must be in the file once, got 0 candidates."


def _twin(i: int, entries: list[Entry], kin: list[int]) -> int:
    """Returns the number of the same object where it was met before; -1 if that is in doubt.

    Args:
        i: of the object.
        entries: all objects.
        kin: those of its class that have variables.
    """
    if not kin or "name" not in entries[i].config:
        return -1
    own = _identity(entries[i])
    twins = [j for j in kin if j < i and _identity(entries[j]) == own]
    ids = {j: entries[j].node.get("shared_object_id") for j in (*twins, i)}
    if None not in ids.values():
        twins = [j for j in twins if ids[j] == ids[i]]
    return twins[0] if len(twins) == 1 else -1


def _identity(entry: Entry) -> Any:
    """What two occurrences of one object in a config have in common."""
    return entry.names[-1], json.dumps(_plain(entry.config), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    """A config without what differs between two serializations of one object."""
    if isinstance(value, Mapping):
        drop = ("shared_object_id", "build_config", "inbound_nodes")
        return {str(k): _plain(v) for k, v in value.items() if k not in drop}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# By paths, in files of Keras 3.


def _in_paths(store: Store, entries: list[Entry]) -> dict[int, Parts]:
    rest = dict(store.groups)
    result: dict[int, Parts] = {}
    owners: dict[str, int] = {}
    for i, entry in enumerate(entries):
        owners.setdefault(entry.path, i)
        group = rest.pop(_keras_names.place(entry), None)
        if group:
            result[i] = {"": dict(group.arrays)}
    # A custom layer may keep another one under another name than in its config. Newer versions of
    # Keras write the layer's name beside its weights.
    for i, entry in enumerate(entries):
        parent = entry.parent.path if entry.parent else ""
        numbered = entry.path.rpartition("/")[0].endswith("layers")  # of a model: never renamed
        if i and i not in result and "name" in entry.config and not numbered:
            prefix = f"{parent}/" if parent else ""
            named = [p for p in rest if p.startswith(prefix) and rest[p].name() == entry.names[-1]]
            if len(named) == 1:
                result[i] = {"": dict(rest.pop(named[0]).arrays)}
    for path, group in rest.items():
        owner = path
        while owner not in owners:
            owner = owner.rpartition("/")[0]
        i, inside = owners[owner], path[len(owner) :].strip("/")
        if not _keras_names.is_state(entries[i], inside, group.name()):
            name = _keras_names.part(inside, group.name()) if inside else ""
            parts = result.setdefault(i, {})
            parts[inside if name in parts else name] = dict(group.arrays)
    return result


# By names, in `.h5` files of whole models.


def _in_lists(layers: Mapping[str, Mapping[str, Read]], entries: list[Entry]) -> dict[int, Parts]:
    members: dict[str, list[int]] = {}
    for i, entry in enumerate(entries[1:], 1):
        members.setdefault(entry.names[0], []).append(i)
    result: dict[int, Parts] = {}
    for layer, variables in layers.items():
        prefixes: dict[tuple[str, ...], dict[str, Read]] = {}
        for name, read in variables.items():
            *prefix, last = _components(name)
            prefixes.setdefault(tuple(prefix), {})[re.sub(r":\d+$", "", last)] = read
        if layer:
            for i, parts in _assigned(prefixes, entries, members.get(layer, [0])).items():
                result[i] = result.get(i, {}) | parts
        elif variables:  # the model's own
            result[0] = {"": {k: v for group in prefixes.values() for k, v in group.items()}}
    return result


def _components(name: str) -> tuple[str, ...]:
    """Splits a name as HDF5 does, which ignores what is empty, and "."."""
    return tuple(part for part in name.split("/") if part not in ("", "."))


def _assigned(
    prefixes: Mapping[tuple[str, ...], dict[str, Read]], entries: list[Entry], members: list[int]
) -> dict[int, Parts]:
    """Returns whose variables those under each prefix are, of the objects in a top-level layer.

    Args:
        prefixes: of the names of the layer's variables. One may be the names that lead to an
            object, the last few of them, or more (that of the model); it may go on with the name of
            a part of the object.
        entries: all objects of the config.
        members: the numbers of the layer and of those in it.
    """
    result: dict[int, Parts] = {}
    done = set()
    for _, i, length, prefix in sorted(_matches(prefixes, entries, members)):
        part = "/".join(prefix[length:])
        if prefix not in done and part not in result.get(i, {}):
            done.add(prefix)
            result.setdefault(i, {})[part] = prefixes[prefix]
    for prefix in [prefix for prefix in prefixes if prefix not in done]:
        # Of a layer that was renamed after it was built, or with names that a custom layer made.
        owners = [i for i in members if _keras_names.variables(entries[i])]
        if len(prefixes) == len(owners) == 1:
            result[owners[0]] = {"": prefixes[prefix]}
        else:
            parts = result.setdefault(members[0], {})
            parts["/".join(prefix)] = parts.get("/".join(prefix), {}) | prefixes[prefix]
    return result


def _matches(
    prefixes: Iterable[tuple[str, ...]], entries: list[Entry], members: list[int]
) -> Iterator[tuple[Any, int, int, tuple[str, ...]]]:
    """Yields (rank, number of an object, how much of a prefix names it, prefix); low ranks first.

    The best match has no part, then names all of the object or of the prefix, then the most of it.
    """
    by_last: dict[str, list[tuple[int, tuple[str, ...]]]] = {}
    for i in members:
        entry = entries[i]
        spellings = [entry.names] if entry.class_name != "TimeDistributed" else []
        if entry.parent and entry.parent.class_name == "TimeDistributed":
            spellings.append(entry.names[:-1])  # so Keras 2 calls what it wraps
        for names in (_components("/".join(spelling)) for spelling in spellings):
            if names:
                by_last.setdefault(names[-1], []).append((i, names))
    for order, prefix in enumerate(prefixes):
        for length in range(len(prefix), 0, -1):
            for i, names in by_last.get(prefix[length - 1], []):
                pairs = zip(reversed(prefix[:length]), reversed(names), strict=False)
                common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
                partly = common < min(length, len(names))
                yield (
                    (len(prefix) - length, partly, -common, len(names), i, order),
                    i,
                    length,
                    prefix,
                )


# Names of variables.

# Keras 2's names -> Keras 3's, for the layers that changed them.
_RENAMED = {"depthwise_kernel": "kernel", "sn_u": "vector_u"}


def _checked(entry: Entry, parts: Parts) -> Found:
    """Returns the variables of an object and of its parts under the names that Keras 3 has."""
    schema = _keras_names.variables(entry)
    parts = dict(parts)
    own = parts.pop("", {})
    if not own and schema and len(parts) == 1:  # of a recurrent layer, in its cell
        own, parts = next(iter(parts.values())), {}
    if entry.class_name == "SpectralNormalization" and len(own) == 2:
        own = dict(list(own.items())[1:])  # the first is the kernel of the layer inside it
    if schema is not None and set(own) != set(schema):
        renamed = {_RENAMED.get(name, name): read for name, read in own.items()}
        if set(renamed) == set(schema):
            own = renamed
        elif len(own) == len(schema):
            own = dict(zip(schema, own.values(), strict=True))
        elif set(schema) < set(own):
            pass  # an `.h5` file has the names of what else the layer keeps
        elif len(own) > len(schema) and _is_quantized(entry):
            own = dict(zip([*schema, *list(own)[len(schema) :]], own.values(), strict=True))
        else:
            return Found(entry, own, f"the weights must be {schema}, got {len(own)} arrays.")
    result = {name: own[name] for name in (schema or own) if name in own} | own
    known = _keras_names.PARTS.get(entry.class_name, ())
    order = [part for part in known if part in parts]
    for part in [*order, *(part for part in parts if part not in order)]:
        group = parts[part]
        names = list(group)
        if part in known and len(names) <= 2 and names[0].isdecimal():
            names = ["kernel", "bias"][: len(names)]
        result |= {f"{part}/{n}": read for n, read in zip(names, group.values(), strict=True)}
    return Found(entry, result)


def _is_quantized(entry: Entry) -> bool:
    """Whether a layer stores scales beside its weights."""
    policy = json.dumps(entry.config.get("dtype"), default=str)
    return re.search("int8|int4|float8|gptq|awq", policy) is not None
