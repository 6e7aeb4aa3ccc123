"""Every notebook runs from a fresh kernel, and is committed as a reader should find it.

In it: outputs of a run from top to bottom, an `assert` for every piece of prose, no definition that
a reader has to study but for a network that is the subject, nothing that tells where it was run.

To run all of them again, or those that are named, and store what they show, in a checkout with the
extra `test` installed:

    python tests/test_notebooks.py [01_tour ...]

Commit other changes first: the benchmark in 05 prints the commit that it ran on.
"""

import ast
import os
import pathlib
import re
import sys
import tempfile

import nbformat
import pytest
from nbclient import NotebookClient

REPOSITORY = pathlib.Path(__file__).parents[1]
PATHS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
LINES = 5  # of a function's body
NETWORK_LINES = 12  # of the body of a module of linen or nnx, with its methods
KILOBYTES = 400
ABSOLUTE = re.compile(r"(?<![\w.:/])/\w[\w.-]*/[\w./-]+|\b[A-Z]:\\")  # /tmp/x.py, C:\

notebooks = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def strict_jax():
    """Not here: the kernels are processes of their own, with JAX as users have it."""


def read(path):
    return nbformat.read(path, as_version=4)


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook.cells) for output in cell.outputs]


def kinds(notebook):
    """What each cell leaves behind: text, pictures, values."""
    return [
        {
            (o.output_type, *sorted(o.get("data", ())))
            for o in cell.outputs
            if o.get("name") != "stderr"
        }
        for cell in code(notebook.cells)
    ]


def passages(notebook):
    """The prose below the introduction, each with the code that follows it."""
    result = []
    for cell in notebook.cells[1:]:
        if cell.cell_type == "markdown":
            result.append((cell.source, []))
        elif result:
            result[-1][1].append(cell.source)
    return result


def definitions(tree):
    """Functions and classes, with the most lines that each may have; methods count with a network.

    `ast.walk` would go into the networks, and find their methods as functions of their own.
    """
    for node in ast.iter_child_nodes(tree):
        bases = [ast.unparse(base) for base in getattr(node, "bases", ())]
        if {"nn.Module", "nnx.Module"} & set(bases):
            yield node, NETWORK_LINES
            continue
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node, LINES
        yield from definitions(node)


def test_there_are_seven_notebooks():
    names = ["tour", "jit_and_vmap", "train", "bring_your_model", "speed_and_scale", "sequences"]
    names += ["port_a_network"]
    assert [path.stem for path in PATHS] == [f"{i:02d}_{name}" for i, name in enumerate(names, 1)]


def execute(path, folder, **environment):
    """Returns the notebook as a run from top to bottom leaves it, and nothing of the machine."""
    notebook = read(path)
    search = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "IPYTHONDIR": str(folder / "ipython"),  # no history in the user's
    }
    client = NotebookClient(
        notebook,
        timeout=180,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | environment)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


@pytest.mark.slow  # as slow as a sixth of the suite: .ci/run does it
@notebooks
def test_runs(path, tmp_path):
    flags = os.environ.get("XLA_FLAGS", "").replace("--xla_backend_optimization_level=0", "")
    notebook = execute(path, tmp_path, XLA_FLAGS=flags.strip())  # as users have it
    assert kinds(notebook) == kinds(read(path)), "run it again, and commit what it shows"


@notebooks
def test_committed_outputs(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code(notebook.cells)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        text = output.get("text", "") + "".join(
            value for kind, value in output.get("data", {}).items() if kind.startswith("text/")
        )
        assert not ABSOLUTE.search(text), text
        assert "\x1b" not in text, "colours of a terminal"
    assert any(kind.startswith("image/") for o in outputs(notebook) for kind in o.get("data", {}))
    assert path.stat().st_size < KILOBYTES * 1024


@notebooks
def test_every_claim_ends_in_an_assert(path):
    notebook = read(path)
    assert notebook.cells[0].source.startswith("# ")
    assert len(passages(notebook)) >= 4
    for prose, sources in passages(notebook):
        statements = ast.walk(ast.parse("\n".join(sources)))
        assert any(isinstance(node, ast.Assert) for node in statements), prose


@notebooks
def test_definitions_are_short(path):
    for cell in code(read(path).cells):
        for node, limit in definitions(ast.parse(cell.source)):
            lines = node.body[-1].end_lineno - node.body[0].lineno + 1
            assert lines <= limit, node.name


@pytest.mark.parametrize(
    ("source", "limits"),
    [
        ("def f():\n  def g():\n    pass", [LINES, LINES]),
        ("class A:\n  def g():\n    pass", [LINES, LINES]),
        ("class A(nn.Module):\n  def __call__(self):\n    pass", [NETWORK_LINES]),
        ("class A(nnx.Module):\n  def __call__(self):\n    pass", [NETWORK_LINES]),
        ("if True:\n  def f():\n    pass", [LINES]),
    ],
)
def test_definitions_are_found(source, limits):
    assert [limit for _, limit in definitions(ast.parse(source))] == limits


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("File /tmp/ipykernel_1/2.py", True),
        ("'/home/someone/.venv/bin/python'", True),
        (r"C:\Users", True),
        ("12 ms/step, a / b, application/json", False),
        ("https://example.org/a/b", False),
    ],
)
def test_absolute_paths_are_found(text, found):
    assert bool(ABSOLUTE.search(text)) == found


if __name__ == "__main__":
    executed = {}
    for path in PATHS:
        if path.stem in sys.argv[1:] or not sys.argv[1:]:
            print(path.stem, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                executed[path] = execute(path, pathlib.Path(folder))
    for path, notebook in executed.items():  # all or none: until here, the checkout is as it was
        nbformat.write(notebook, path)
