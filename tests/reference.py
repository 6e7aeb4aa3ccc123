"""The API reference, `.github/API.md`: every public name and the first line of its docstring.

    python tests/reference.py > .github/API.md

makes it anew; `test_architecture.py` fails while the file says something else.
"""

import inspect

import flax_dwconv
from flax_dwconv import (
    activations,
    constraints,
    initializers,
    keras_io,
    nnx,
    regularizers,
    weights,
)

HEAD = """# API reference

Every public name and what it does, made by `python tests/reference.py > .github/API.md` from the
docstrings. `help(flax_dwconv.NAME)` shows a whole docstring: arguments, shapes, errors, an example.
"""
SECTIONS = {
    "Functions and linen layers": flax_dwconv,
    "nnx layers": nnx,
    "Keras's configs, layers and files": keras_io,
    "Weights of PyTorch, Flax, Haiku and Equinox": weights,
    "Initializers": initializers,
    "Activations": activations,
    "Regularizers": regularizers,
    "Constraints": constraints,
}


def public(module):
    """The public functions and classes of a module; of the package, those that it exports."""
    if module is flax_dwconv:
        values = {name: getattr(module, name) for name in module.__all__}
        return {n: v for n, v in values.items() if not inspect.ismodule(v)}
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or callable(value))
    }


def render():
    """The whole page."""
    parts = [HEAD]
    for title, module in SECTIONS.items():
        parts.append(f"## {title}\n\n| name | |\n|---|---|")
        for name, value in public(module).items():
            summary = inspect.getdoc(value).split("\n")[0].replace("|", "\\|")
            parts.append(f"| `{module.__name__}.{name}` | {summary} |")
        parts[-1] += "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    print(render(), end="")
