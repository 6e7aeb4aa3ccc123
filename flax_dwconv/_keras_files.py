"""What Keras stores a model in, as one `Store`: its config, and its arrays, which are read later.

    .keras           zip of config.json, metadata.json and model.weights.h5, or model.weights.npz
    a directory      the same files, as `keras.saving.save_model(..., zipped=False)` leaves them
    .weights.h5      HDF5, <path>/vars/0, 1, ...; a path names attributes and classes, not layers
    .weights.json    the names of several such files, `save_weights(..., max_shard_size=...)`
    .h5              HDF5, attribute model_config; model_weights/<layer>/<name of a variable>

Nothing of a file is executed or extracted to disk, and no link in it is followed.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib
import io
import itertools
import json
import math
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax.numpy as jnp
import numpy as np

# What zipfile, zlib, pickle, h5py and json raise for a file that is not what it says, and we do.
BAD_FILE = (
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,  # a RecursionError too
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
_SMALL = 1 << 26  # bytes that are read without asking how they were compressed
_CHUNK = 1 << 22  # bytes of which a checksum is computed at once
_BLOCK = 1 << 13  # bytes that are read at once of what is not an array

Read = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Group:
    """The variables of one saved object: {"0": how to read it}, and the object's name, if known."""

    name: Callable[[], str]
    arrays: Mapping[str, Read]


@dataclasses.dataclass
class Store:
    """What a file holds.

    Attributes:
        config: the JSON of the model's config; None where the file holds weights only.
        no_config: the sentence that says so.
        version: of the Keras that wrote it; None if unknown.
        groups: the path of an object -> its variables, as Keras 3 stores them.
        layers: a top-level layer -> its variables by name, as `.h5` files of whole models have
            them, those of the model itself under ""; None in all other files.
    """

    config: str | None = None
    no_config: str = "it holds no config, weights only: pass the model's as `config`."
    version: str | None = None
    groups: dict[str, Group] = dataclasses.field(default_factory=dict)
    layers: dict[str, dict[str, Read]] | None = None


@contextlib.contextmanager
def opened(path: str) -> Generator[Store]:
    """Opens what is at a path. Arrays can be read until it is closed.

    Raises:
        ImportError: if h5py is needed and not installed.
        OSError: if there is nothing to read.
        Exception: one of `BAD_FILE`, if it is not one of Keras's, at closing if a checksum fails.
    """
    with contextlib.ExitStack() as stack:
        store = Store()
        if os.path.isdir(path):
            if not os.path.exists(os.path.join(path, "config.json")):
                raise FileNotFoundError(errno.ENOENT, "no model of Keras is in the directory", path)
            _parts(store, _Folder(path), stack)
        else:
            file = _whole(path)
            stack.enter_context(contextlib.closing(file))
            start = file.read(2)
            file.seek(0)
            if start == b"PK":
                archive = stack.enter_context(zipfile.ZipFile(io.BufferedReader(file)))
                _parts(store, _Archive(path, archive, stack), stack)
            elif path.endswith(".json"):
                _shards(store, file.readall(), _Folder(os.path.dirname(path)), stack)
            else:
                _hdf5(store, file, stack)
        yield store


def _parts(store: Store, files: "_Folder | _Archive", stack: contextlib.ExitStack) -> None:
    """Reads what is in a folder or an archive."""
    names = files.names()
    if "metadata.json" in names:
        store.version = json.loads(files.read("metadata.json")).get("keras_version")
    if "config.json" in names:
        store.config = files.read("config.json").decode()
    else:
        store.no_config = f"{files.kind} has no 'config.json'."
    if "model.weights.npz" in names:
        _npz(store, files.open("model.weights.npz"), stack)
    elif "model.weights.json" in names:
        _shards(store, files.read("model.weights.json"), files, stack)
    elif "model.weights.h5" in names:
        _hdf5(store, files.open("model.weights.h5"), stack)
    else:
        raise ValueError(f"{files.kind} has no 'model.weights.h5'.")


class _Folder:
    kind = "the directory"

    def __init__(self, path: str) -> None:
        self.path = path

    def names(self) -> list[str]:
        return os.listdir(self.path or ".")

    def open(self, name: str) -> "_Section":
        return _whole(os.path.join(self.path, name))

    def read(self, name: str) -> bytes:
        with contextlib.closing(self.open(name)) as file:
            return file.readall()


class _Archive:
    kind = "the archive"

    def __init__(self, path: str, archive: zipfile.ZipFile, stack: contextlib.ExitStack) -> None:
        self.path, self.archive, self.stack = path, archive, stack
        climbing = [n for n in self.names() if ".." in re.split(r"[/\\]", n) or n[:1] in "/\\"]
        if climbing:
            raise ValueError(f"the entry {climbing[0]!r} climbs out of the archive.")

    def names(self) -> list[str]:
        return self.archive.namelist()

    def read(self, name: str) -> bytes:
        """Returns an entry, checked by its CRC, unless it would explode."""
        info = self.archive.getinfo(name)
        if info.file_size > max(_SMALL, 100 * info.compress_size):
            raise ValueError(f"{name!r} is {info.file_size} bytes packed in {info.compress_size}.")
        return self.archive.read(info)

    def open(self, name: str) -> "_Section":
        """Returns an entry as a file.

        Keras does not compress. Such an entry is read where it lies, and a thread computes its
        checksum meanwhile: the archive's own reader would hold all of it beside the arrays.
        """
        info = self.archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:  # bit 0: encrypted
            data = self.read(name)
            return _Section(io.BytesIO(data), 0, len(data))
        file = open(self.path, "rb", buffering=0)
        self.stack.enter_context(file)
        file.seek(info.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(f"{name!r} is not where the archive says.")
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        pool = self.stack.enter_context(ThreadPoolExecutor(1))
        checksum = pool.submit(_checksum, self.path, start, info.file_size)

        def check(kind: Any, *_: Any) -> None:
            if checksum.result() != info.CRC and kind is None:
                raise zipfile.BadZipFile(f"Bad CRC-32 for {name!r}")

        self.stack.push(check)
        return _Section(file, start, info.file_size)


def _checksum(path: str, start: int, size: int) -> int:
    result = 0
    buffer = memoryview(bytearray(min(_CHUNK, size)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size and (n := file.readinto(buffer[:size])):
            result = zlib.crc32(buffer[:n], result)
            size -= n
    return result


class _Section(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        n = self.read_at(self.position, buffer)
        self.position += n
        return n

    def read_at(self, offset: int, buffer: Any) -> int:
        """Fills a buffer from an offset on, as far as the section goes, and moves nothing."""
        view = memoryview(buffer).cast("B")[: max(0, self.size - offset)]
        filled = 0
        self.file.seek(self.start + offset)
        while filled < len(view) and (n := self.file.readinto(view[filled:])):
            filled += n  # at most 2 GiB at once on Linux
        return filled

    def close(self) -> None:
        self.file.close()
        super().close()


def _whole(path: str) -> _Section:
    file = open(path, "rb", buffering=0)
    return _Section(file, 0, os.fstat(file.fileno()).st_size)


# HDF5.


class _Hdf5:
    """An HDF5 file, of which nothing is read that a link leads to.

    Attributes:
        root: the file as h5py has it.
        links: the path of everything in it -> whether its last part is a hard link.
    """

    def __init__(self, file: _Section, stack: contextlib.ExitStack) -> None:
        self.h5py, self.file = require("h5py", "h5"), file
        stack.enter_context(contextlib.closing(file))
        # Without the buffer, h5py makes two system calls for each of its many small reads.
        self.root = self.h5py.File(io.BufferedReader(file, _BLOCK), "r")
        stack.enter_context(self.root)
        # In one pass: to open each group costs more than to read the arrays.
        hard = self.h5py.h5l.TYPE_HARD
        self.links: dict[str, bool] = {}
        self.root.id.links.visit(
            lambda name, info: self.links.update({name.decode(): info.type == hard}), info=True
        )

    def strings(self, path: str, name: str) -> list[str]:
        """Returns an attribute of a group; a long list is cut into several with numbered names."""
        if path and not self.links.get(path):
            raise LookupError(f"the file has no {path!r}.")
        attributes = self.root[path or "/"].attrs
        numbered = (f"{name}{i}" for i in itertools.count())
        keys = itertools.takewhile(attributes.__contains__, numbered)
        if name in attributes:
            keys = [name]
        return [_text(value) for key in keys for value in np.ravel(attributes[key])]

    def reader(self, path: str) -> Read:
        """Returns the function that reads an array."""
        return functools.partial(self._read, path)

    def _read(self, path: str) -> np.ndarray:
        """Reads an array that is in this file, and not much larger than what is stored."""
        if not self.links.get(path):
            prefixes = itertools.accumulate(path.split("/"), lambda a, b: f"{a}/{b}")
            if any(self.links.get(prefix) is False for prefix in prefixes):
                raise ValueError(f"{path!r} is a link, which Keras does not write.")
            raise LookupError(f"the file has no {path!r}.")
        h5py = self.h5py
        dataset = h5py.h5o.open(self.root.id, path.encode())
        is_dataset = isinstance(dataset, h5py.h5d.DatasetID)
        # Where the data lies in one piece in this file; None for all else.
        offset = dataset.get_offset() if is_dataset else None
        if offset is None and not (is_dataset and _is_stored(h5py, dataset)):
            raise ValueError(f"{path!r} must be an array in the file itself.")
        kind = dataset.get_type()
        shape, dtype = dataset.shape, kind.dtype
        size = math.prod(shape) * dtype.itemsize
        if size > max(_SMALL, 1000 * dataset.get_storage_size()):
            raise ValueError(f"{path!r} is {size} bytes of almost nothing.")
        if dtype.kind not in "biufcV" or dtype.names or dtype.subdtype or dtype.hasobject:
            raise ValueError(f"{path!r} must be an array of numbers, got {dtype}.")
        result = np.empty(shape, dtype)
        converted = h5py.h5t.py_create(dtype) != kind
        if offset is None or not size or converted:
            dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, result)
        elif self.file.read_at(offset, result.reshape(-1).view(np.uint8)) != size:
            raise EOFError(f"{path!r} ends after the file does.")
        if dtype.kind == "V":
            # So h5py has dtypes that HDF5 does not know. Keras writes the name beside.
            attributes = h5py.Dataset(dataset).attrs
            known = jnp.dtype(_text(attributes.get("dtype", "bfloat16")))
            if known.itemsize != dtype.itemsize:
                raise ValueError(f"{path!r} must be of the dtype {known}, got {dtype}.")
            return result.view(known)
        return result.astype(dtype.newbyteorder("="), copy=False)


def _is_stored(h5py: Any, dataset: Any) -> bool:
    """Whether a dataset has values, in its own file."""
    settings = dataset.get_create_plist()
    return (
        settings.get_layout() in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED, h5py.h5d.COMPACT)
        and not settings.get_external_count()
        and dataset.get_space().get_simple_extent_type() != h5py.h5s.NULL
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _joined(*paths: str) -> str:
    """Joins paths as HDF5 does: it ignores what is empty, and "."."""
    return "/".join(part for path in paths for part in path.split("/") if part not in ("", "."))


def _hdf5(store: Store, section: _Section, stack: contextlib.ExitStack) -> None:
    """Adds what is in an HDF5 file, in any of Keras's layouts."""
    file = _Hdf5(section, stack)
    attributes = file.root.attrs
    if "model_config" in attributes:
        store.config = _text(attributes["model_config"])
    if "keras_version" in attributes:
        store.version = _text(attributes["keras_version"])

    def listed(group: str) -> dict[str, Read]:
        names = file.strings(group, "weight_names")
        return {name: file.reader(_joined(group, name)) for name in names}

    top = "model_weights" if file.links.get("model_weights") else ""
    layers = file.strings(top, "layer_names")
    if top or layers:
        own = _joined(top, "top_level_model_weights")
        store.layers = {layer: listed(_joined(top, layer)) for layer in dict.fromkeys(layers)}
        store.layers[""] = listed(own) if own in file.links else {}
        return
    found: dict[str, dict[str, Read]] = {}
    for name in sorted(file.links):
        parent, _, key = name.rpartition("/")
        path, _, last = parent.rpartition("/")
        if last == "vars":
            found.setdefault(path, {})[key] = file.reader(name)
    for path, arrays in found.items():
        _add(store, path, functools.partial(_name_of, file, _joined(path, "vars")), arrays)


def _name_of(file: _Hdf5, group: str) -> str:
    """Returns the name of a saved object, which newer versions of Keras write beside its arrays."""
    return _text(file.root[group].attrs.get("name", "")) if file.links[group] else ""


def _add(store: Store, path: str, name: Callable[[], str], arrays: dict[str, Read]) -> None:
    """Adds the variables of an object, or those of it that are in another file of the store."""
    # So tf.keras 2.12 called the layers of a model.
    parts = path.split("/")
    path = "/".join("layers" if p == "_layer_checkpoint_dependencies" else p for p in parts)
    known = store.groups.get(path)
    arrays = arrays | (dict(known.arrays) if known else {})
    # "10" comes after "9".
    order = sorted(arrays, key=lambda key: (not key.isdecimal(), len(key), key))
    store.groups[path] = Group(known.name if known else name, {key: arrays[key] for key in order})


def _shards(
    store: Store, index: bytes, files: _Folder | _Archive, stack: contextlib.ExitStack
) -> None:
    """Reads the files that an index of shards names, all of them beside it."""
    index = json.loads(index)
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(weight_map, Mapping):
        raise ValueError("it must have a 'weight_map', as `save_weights(max_shard_size=)` writes.")
    names = [v for value in weight_map.values() for v in np.ravel(value).tolist()]
    there = files.names()
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or "\\" in name:
            raise ValueError(f"a shard must be a file beside the index, got {name!r}.")
        if name not in there:
            raise ValueError(f"the shard {name!r} is missing.")
    for name in sorted(set(names)):
        _hdf5(store, files.open(name), stack)
    for path in weight_map:
        if f"/{path}".replace("//", "/").removesuffix("/vars").lstrip("/") not in store.groups:
            raise ValueError(f"the shards have no {path!r}.")


# NumPy's archives. Keras pickles into them, for each object, a dict of its own variables.


def _npz(store: Store, file: _Section, stack: contextlib.ExitStack) -> None:
    stack.enter_context(contextlib.closing(file))
    archive = stack.enter_context(zipfile.ZipFile(io.BufferedReader(file)))
    for name in archive.namelist():
        path = name.removesuffix(".npy")
        info = archive.getinfo(name)
        if info.file_size > max(_SMALL, 100 * info.compress_size):
            raise ValueError(f"{name!r} is {info.file_size} bytes packed in {info.compress_size}.")
        stream = io.BytesIO(archive.read(info))
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        if not dtype.hasobject or shape != ():
            raise ValueError(f"{name!r} must hold the variables of a layer, got {dtype}{shape}.")
        variables = _Unpickler(stream).load().value()
        variables = variables.item() if isinstance(variables, np.ndarray) else variables
        if not isinstance(variables, dict):
            raise ValueError(f"{name!r} must hold the variables of a layer.")
        arrays = {str(key): functools.partial(_variable, v, path) for key, v in variables.items()}
        if arrays:
            _add(store, "" if path == "__root__" else path, str, arrays)


class _Inert:
    """What a pickle makes instead of an object of a class or of a function's result: its parts."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def value(self) -> Any:
        """Returns the array that NumPy would make of this."""
        _, shape, dtype, fortran, data = self.state or self.args[2]
        word = dtype.args[0] if isinstance(dtype, _Inert) else dtype
        if isinstance(word, type):  # of ml_dtypes
            word = word.__name__
        if word == "O8":
            return data[0]
        swapped = dtype.state and dtype.state[1] == ">"
        dtype = jnp.dtype(word).newbyteorder(">" if swapped else "<")
        data = data.encode("latin1") if isinstance(data, str) else data
        order = "F" if fortran else "C"
        return np.frombuffer(data, dtype).reshape(shape, order=order).copy()


class _Unpickler(pickle.Unpickler):
    """Reads a pickle without running anything: whatever it names becomes an inert class."""

    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Inert,), {"__module__": module})


def _variable(value: Any, name: str) -> np.ndarray:
    """Returns the array in what Keras pickled for a variable: of numpy, or of its JAX backend."""
    try:
        if type(value).__name__ == "Variable":
            value = value.state["_value"]
        if type(value).__name__ == "_reconstruct_array":  # of JAX: function, arguments, state
            *_, state, _ = value.args
            value = _Inert()
            value.state = state
        return np.asarray(value.value())
    except (*BAD_FILE, AssertionError) as error:
        raise ValueError(
            f"{name!r} must be an array of NumPy or JAX, got {type(value).__name__}."
        ) from error


def require(module: str, extra: str) -> Any:
    """Imports a module that an extra of this package installs.

    Raises:
        ImportError: with the line that installs it, or with what is wrong if it is installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name != module:  # it is there, but not what it imports: a backend of Keras
            hint = " With KERAS_BACKEND=jax in the environment, Keras needs JAX alone."
            raise ImportError(
                f"`keras_io` cannot import {module}: {error}.{hint if module == 'keras' else ''}"
            ) from error
        raise ImportError(
            f"`keras_io` needs {module}: pip install 'flax_dwconv[{extra}]'."
        ) from error
