"""The architecture as tests: who imports whom, and what the public names look like."""

import ast
import dataclasses
import importlib.metadata
import inspect
import pathlib
import re
import sys

import flax
import flax.linen as nn
import flax.nnx
import pytest
import reference

import flax_dwconv

PACKAGE = pathlib.Path(flax_dwconv.__file__).parent
VOCABULARIES = {"initializers", "activations", "regularizers", "constraints"}

# Module -> the modules of the package that it imports, and the frameworks besides jax and numpy
# that it may import at module level. A folder is a module too: its `__init__.py`. A line further
# down may import those above it, never the other way round.
ALLOWED = {
    "_geometry": set(),
    "_lowering.axis": set(),
    "_lowering.tuning": set(),
    "_lowering.forward_plan": {"_lowering.axis", "_lowering.tuning"},
    "_lowering.kernel_gradient_plan": {"_lowering.axis", "_lowering.tuning"},
    "_lowering.planes_plan": {"_lowering.axis", "_lowering.tuning"},
    "_lowering.plan": {
        "_lowering.axis",
        "_lowering.forward_plan",
        "_lowering.kernel_gradient_plan",
        "_lowering.planes_plan",
        "_lowering.tuning",
    },
    "_lowering.rule": {"_lowering.plan"},
    "_lowering.workarounds": {"_lowering.rule"},
    "_lowering.windows": set(),
    "_lowering.sums": {"_lowering.workarounds"},
    "_lowering.forward": {
        "_lowering.axis",
        "_lowering.forward_plan",
        "_lowering.sums",
        "_lowering.windows",
        "_lowering.workarounds",
    },
    "_lowering.kernel_gradient": {
        "_lowering.kernel_gradient_plan",
        "_lowering.sums",
        "_lowering.windows",
        "_lowering.workarounds",
    },
    "_lowering.overlap": {
        "_lowering.axis",
        "_lowering.plan",
        "_lowering.sums",
        "_lowering.windows",
        "_lowering.workarounds",
    },
    "_lowering.planes": {
        "_lowering.planes_plan",
        "_lowering.sums",
        "_lowering.windows",
        "_lowering.workarounds",
    },
    "_lowering.patches": {"_lowering.plan", "_lowering.windows"},
    "_lowering.product": {"_lowering.axis", "_lowering.plan", "_lowering.windows"},
    "_lowering.program": {
        "_lowering.forward",
        "_lowering.kernel_gradient",
        "_lowering.overlap",
        "_lowering.patches",
        "_lowering.planes",
        "_lowering.plan",
        "_lowering.product",
        "_lowering.tuning",
        "_lowering.windows",
        "_lowering.workarounds",
    },
    "_lowering": {"_lowering.plan", "_lowering.program", "_lowering.rule"},
    "_dtypes": set(),
    "_mesh": set(),
    "functional": {"_dtypes", "_geometry", "_lowering", "_mesh"},
    "_vocabulary": set(),
    "_random": {"_vocabulary"},
    "initializers": {"_random", "_vocabulary"},
    "activations": {"_vocabulary"},
    "regularizers": {"_vocabulary"},
    "constraints": {"_vocabulary"},
    "_config": VOCABULARIES | {"_vocabulary"},
    "_arguments": {"_config", "_geometry", "activations"},
    "_layer": {
        "_arguments",
        "_config",
        "_dtypes",
        "_geometry",
        "_lowering",
        "_mesh",
        "_vocabulary",
        "activations",
        "functional",
        "flax",
    },
    "_optim": {"_layer", "_vocabulary", "constraints", "flax", "optax"},
    "_sow": {"_layer", "flax"},
    "linen": {"_config", "_geometry", "_layer", "_sow", "flax"},
    "nnx": {"_config", "_geometry", "_layer", "_vocabulary", "flax"},
    "_losses": {"nnx", "flax"},
    "_keras_files": set(),
    "_keras_names": {"_vocabulary"},
    "_keras_weights": {"_keras_files", "_keras_names"},
    "keras_io": {
        "_config",
        "_keras_files",
        "_keras_names",
        "_keras_weights",
        "_layer",
        "_vocabulary",
        "linen",
        "flax",
    },
    "_state_dict": set(),
    "weights": {"_geometry", "_state_dict", "flax"},
    "torch_io": {"weights"},
    "__init__": None,  # everything of the package, nothing else
    "__main__": None,  # a program: a user of the library
    "benchmark": None,
}
# The only module that may import jax.interpreters and .experimental.
ROOM_FOR_INTERNALS = {"_lowering.rule"}

SOURCES = sorted(PACKAGE.glob("**/*.py"))
PROGRAMS = {"__main__", "benchmark"}  # import what their extras install


def room(path):
    """The name of a module in the table: its path, with dots; of a program, that of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts[0] in PROGRAMS:
        return parts[0]
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


modules = pytest.mark.parametrize("path", SOURCES, ids=str)
libraries = pytest.mark.parametrize(
    "path", [p for p in SOURCES if room(p) not in PROGRAMS], ids=str
)


def imports(tree):
    """Every name that a tree imports, as `package.module` or `package.module.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "flax_dwconv." if node.level else ""
            for alias in node.names:
                yield f"{prefix}{node.module or ''}.{alias.name}".replace("..", ".")


def at_module_level(tree):
    """The tree without the bodies of its functions, which import when they are called."""
    return ast.Module(
        [n for n in tree.body if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))], []
    )


def read(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def rooms(names):
    """The modules of the package among imported names: of each, the longest in the table."""
    found = set()
    for name in names:
        _, *parts = name.split(".") if name.startswith("flax_dwconv.") else [name]
        known = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        found.update([name for name in known if name in ALLOWED][:1])
    return found


@modules
def test_every_module_is_in_the_table(path):
    assert room(path) in ALLOWED


def test_every_line_of_the_table_is_a_module():
    assert set(ALLOWED) == set(map(room, SOURCES))


def test_the_table_has_no_cycle():
    order = list(ALLOWED)
    for module, allowed in ALLOWED.items():
        for other in (allowed or set()) & set(order):
            assert order.index(other) < order.index(module)


@modules
def test_imports_go_down_only(path):
    allowed = ALLOWED[room(path)]
    if allowed is not None:
        assert rooms(imports(read(path))) == allowed & set(ALLOWED)


@libraries
def test_third_parties(path):
    allowed = ALLOWED[room(path)]
    tops = {name.split(".")[0] for name in imports(at_module_level(read(path)))}
    known = {"flax_dwconv", "jax", "jaxlib", "numpy"} | set(sys.stdlib_module_names)
    assert tops - known <= (allowed or set())


@modules
def test_no_private_jax_and_internals_in_one_room(path):
    names = list(imports(read(path)))
    assert not [name for name in names if name.startswith("jax._src")]
    if room(path) not in ROOM_FOR_INTERNALS:
        internals = ("jax.interpreters", "jax.experimental", "jax.extend")
        assert not [name for name in names if name.startswith(internals)]
        source = path.read_text(encoding="utf-8")
        assert not [name for name in internals if f"{name}." in source]


@modules
def test_foreign_frameworks_are_never_imported_with_the_package(path):
    names = {name.split(".")[0] for name in imports(at_module_level(read(path)))}
    assert not names & {"keras", "tf_keras", "tensorflow", "torch", "haiku", "safetensors"}


@modules
def test_annotations_are_evaluated(path):
    assert "__future__.annotations" not in set(imports(read(path)))


@modules
def test_no_module_is_longer_than_600_lines(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 600


def test_init_holds_names_and_nothing_else():
    docstring, *rest = read(PACKAGE / "__init__.py").body
    assert isinstance(docstring, ast.Expr)
    *imports, version, names = rest
    for node in imports:
        assert isinstance(node, ast.ImportFrom) and node.module.startswith("flax_dwconv")
        assert all(alias.asname == alias.name for alias in node.names)
    assert [node.targets[0].id for node in (version, names)] == ["__version__", "__all__"]


def test_the_version_is_in_one_place():
    assert importlib.metadata.version("flax_dwconv") == flax_dwconv.__version__


def test_a_star_import_leaves_the_names_of_flax_alone():
    scope = {}
    exec("from flax import nnx, linen\nfrom flax_dwconv import *", scope)
    assert scope["nnx"] is flax.nnx and scope["linen"] is flax.linen
    assert set(flax_dwconv.__all__) == CALLABLES | MODULES | {"keras_io", "torch_io", "weights"}
    assert flax_dwconv.__all__ == sorted(flax_dwconv.__all__)


# Public names


MODULES = {"initializers", "activations", "regularizers", "constraints"}
CALLABLES = {
    "DepthwiseConv1D",
    "DepthwiseConv2D",
    "DepthwiseConv3D",
    "SeparableConv1D",
    "SeparableConv2D",
    "accelerate",
    "causal_conv1d",
    "collect_constraints",
    "constrain",
    "depthwise_conv",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_conv3d",
    "depthwise_kernels",
    "fold_batch_norm",
    "total_loss",
}


def public(module):
    """Public names that a module defines, or, for the package, exports."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith(module.__name__)
    }


def test_public_names_are_pinned():
    exported = {n for n in dir(flax_dwconv) if not n.startswith("_")}
    submodules = {room(path) for path in SOURCES}
    assert CALLABLES | MODULES <= exported
    assert exported - submodules == CALLABLES


def test_the_api_reference_is_that_of_the_docstrings():
    page = (PACKAGE.parent / ".github" / "API.md").read_text(encoding="utf-8")
    assert page == reference.render(), "python tests/reference.py > .github/API.md"
    names = [name for module in reference.SECTIONS.values() for name in reference.dotted(module)]
    assert re.findall(r"^### `(.+)`$", page, re.MULTILINE) == names
    assert set(reference.public(flax_dwconv)) == CALLABLES
    assert set(re.findall(r"\]\(#(.+?)\)", page)) <= set(reference.headings().values())


def test_vocabularies_have_the_same_two_functions():
    for name in MODULES:
        room = getattr(flax_dwconv, name)
        assert list(inspect.signature(room.get).parameters) == ["identifier"]
        assert list(inspect.signature(room.serialize).parameters) == ["obj"]


DOCUMENTED = [
    pytest.param(value, id=f"{module.__name__}.{name}")
    for module in [flax_dwconv, *(getattr(flax_dwconv, name) for name in sorted(MODULES))]
    for name, value in public(module).items()
]


@pytest.mark.parametrize("value", DOCUMENTED)
def test_every_public_name_has_a_docstring_with_an_example(value):
    first, *rest = inspect.getdoc(value).splitlines()
    assert first.endswith(".") and len(first) <= 100
    assert not rest or rest[0] == ""
    assert value.__doc__ != getattr(nn.Module, "__doc__", None)
    assert ">>> " in value.__doc__, "an example that runs as a doctest"


@pytest.mark.parametrize(
    "function",
    [flax_dwconv.depthwise_conv2d, flax_dwconv.DepthwiseConv2D],
    ids=lambda f: f.__name__,
)
def test_every_argument_is_documented(function):
    arguments = set(inspect.signature(function).parameters) - {"parent", "name"}
    missing = [a for a in arguments if f"\n  {a}: " not in inspect.getdoc(function)]
    assert not missing
    assert "Raises:" in function.__doc__


def test_defaults_of_the_pure_function_are_keyword_only():
    parameters = inspect.signature(flax_dwconv.depthwise_conv2d).parameters.values()
    for p in parameters:
        assert (p.default is p.empty) == (p.kind is p.POSITIONAL_OR_KEYWORD)
    assert [(p.name, p.default) for p in parameters] == [
        ("x", inspect.Parameter.empty),
        ("kernel", inspect.Parameter.empty),
        ("strides", 1),
        ("padding", "valid"),
        ("dilation_rate", 1),
        ("data_format", "channels_last"),
        ("precision", None),
        ("preferred_element_type", None),
        ("method", "auto"),
    ]


def test_signature_of_the_layer_is_kerass_and_then_flaxs():
    fields = [
        (f.name, f.default)
        for f in dataclasses.fields(flax_dwconv.DepthwiseConv2D)
        if f.name not in ("parent", "name")
    ]
    assert fields[:-4] == [
        ("kernel_size", dataclasses.MISSING),
        ("strides", (1, 1)),
        ("padding", "valid"),
        ("depth_multiplier", 1),
        ("data_format", None),
        ("dilation_rate", (1, 1)),
        ("activation", None),
        ("use_bias", True),
        ("depthwise_initializer", "glorot_uniform"),
        ("bias_initializer", "zeros"),
        ("depthwise_regularizer", None),
        ("bias_regularizer", None),
        ("activity_regularizer", None),
        ("depthwise_constraint", None),
        ("bias_constraint", None),
    ]
    assert [name for name, _ in fields[-4:]] == ["dtype", "param_dtype", "precision", "method"]


def test_positional_arguments_come_in_kerass_order():
    layer = flax_dwconv.DepthwiseConv2D(
        3, 2, "same", 2, "channels_first", 1, "relu", False, "ones", "zeros", "l1", "l2"
    )
    assert layer == flax_dwconv.DepthwiseConv2D(
        kernel_size=3,
        strides=2,
        padding="same",
        depth_multiplier=2,
        data_format="channels_first",
        dilation_rate=1,
        activation="relu",
        use_bias=False,
        depthwise_initializer="ones",
        bias_initializer="zeros",
        depthwise_regularizer="l1",
        bias_regularizer="l2",
    )


def test_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()
