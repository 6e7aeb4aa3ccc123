"""The API reference, `.github/API.md`: every public name with its whole docstring, in Markdown.

    python tests/reference.py > .github/API.md

makes it anew; `test_architecture.py` fails while the file says something else.
"""

import inspect
import re
import textwrap

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

Every public name of `flax_dwconv`, with its arguments, shapes, errors and an example; the
[README](../README.md) is the introduction. The text is that of the docstrings, which
`help(flax_dwconv.DepthwiseConv2D)` shows too, with the types of all arguments. The examples run as
doctests.

`python -m flax_dwconv --help` and `python -m flax_dwconv.benchmark --help` show the options of the
two programs.
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

INDENTED = re.compile(" ")


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


def methods(cls):
    """The public methods of a class that this package defines and describes, `__call__` first."""
    names = ["__call__", *(name for name in dir(cls) if not name.startswith("_"))]
    found = {name: getattr(cls, name, None) for name in names}
    return {
        name: value
        for name, value in found.items()
        if inspect.isroutine(value)
        and (value.__module__ or "").startswith("flax_dwconv")
        and value.__doc__
    }


def headings():
    """{heading: its anchor}, by GitHub's rule.

    What is no letter, digit, - or _ is dropped. Repeated ones, as of `ReLU` and `relu`, are
    numbered.
    """
    titles = [t for title, m in SECTIONS.items() for t in (title, *dotted(m))]
    anchors = {}
    for title in titles:
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        repeated = sum(re.fullmatch(rf"{slug}(-\d+)?", a) is not None for a in anchors.values())
        anchors[title] = f"{slug}-{repeated}" if repeated else slug
    return anchors


def dotted(module):
    """{public name with that of its module: value}."""
    return {f"{module.__name__}.{name}": value for name, value in public(module).items()}


class Page:
    """Docstrings as Markdown; a name in backticks that has a heading becomes a link to it."""

    def __init__(self):
        self.anchors, self.module = headings(), None
        self.modules = {module.__name__: title for title, module in SECTIONS.items()}

    def link(self, code):
        name = code.strip("`")
        for full in (f"{self.module.__name__}.{name}", f"flax_dwconv.{name}", name):
            anchor = self.anchors.get(self.modules.get(full, full))
            if anchor and full not in (self.heading, self.module.__name__, "flax_dwconv"):
                return f"[{code}](#{anchor})"
        return code

    def inline(self, text):
        """Text with links, in which nothing but backticks and the dashes of lists is markup."""
        parts = re.split(r"(`[^`]+`)", text)
        parts[::2] = (re.sub(r"([*<|\\]|\b_|_\b)", r"\\\1", part) for part in parts[::2])
        for i in range(1, len(parts), 2):
            if not parts[i - 1].endswith("Keras's "):  # whose layers have the same names
                parts[i] = self.link(parts[i])
        return "".join(parts)

    def markdown(self, text):
        """A docstring, or a part of it: paragraphs, sections, lists, blocks of code."""
        return "\n\n".join(self.blocks(text))

    def blocks(self, text):
        lines = text.strip("\n").split("\n")
        while lines:
            first = lines.pop(0)
            block = [first]
            if not first:
                continue
            if section := re.fullmatch(r"([A-Z][a-z]+( [a-z]+)?):", first):
                block = take(lines, lambda line: not line or INDENTED.match(line))
                yield f"**{section[1]}**"
                body = textwrap.dedent("\n".join(block)).strip("\n")
                listed = section[1] in ("Args", "Attributes", "Raises")
                yield self.items(body) if listed else self.markdown(body)
            elif first.startswith((" ", ">>>")):
                # A block that is indented ends with the indentation, a doctest at an empty line.
                indented = str.strip if first.startswith(">>>") else INDENTED.match
                block += take(lines, indented)
                body = textwrap.dedent("\n".join(block))
                yield f"```{'python' if '>>>' in body else 'text'}\n{body}\n```"
            else:
                block += take(lines, lambda line: line and not line.startswith(("    ", ">>>")))
                yield self.inline("\n".join(block))

    def items(self, body):
        """`name: what it is`, one below the other, as a list."""
        found = []
        for line in body.split("\n"):
            if item := re.match(r"(\*{0,2}\w[\w, ]*): ", line):
                found.append([f"`{item[1]}`: {line[item.end() :]}"])
            else:
                found[-1].append(line.strip())
        return "\n".join(self.inline("- " + "\n  ".join(lines)).strip() for lines in found)

    def entry(self, heading, value, seen):
        """A public name: heading, signature, docstring; of a class, its methods."""
        self.heading = heading
        yield f"### `{heading}`"
        short = heading.rpartition(".")[2]
        yield signature(short, value)
        yield self.markdown(inspect.getdoc(value))
        others = []
        for name, method in (methods(value) if inspect.isclass(value) else {}).items():
            first = seen.setdefault(method.__doc__, heading)
            if first == heading:
                yield f"#### `{short}.{name}`"
                yield signature(name, method)
                yield self.markdown(inspect.getdoc(method))
            else:
                label = f"{first.rpartition('.')[2]}.{name}"
                others.append(f"[`{label}`](#{self.anchors[first]})")
        if others:
            yield f"Other methods, described above: {', '.join(others)}."

    def render(self):
        """The whole page: all names with their first lines, then all docstrings."""
        parts = [HEAD.strip()]
        for title, module in SECTIONS.items():
            self.module, rows = module, []
            for heading, value in dotted(module).items():
                self.heading = heading
                summary = self.inline(inspect.getdoc(value).split("\n")[0])
                rows.append(f"| [`{heading}`](#{self.anchors[heading]}) | {summary} |")
            parts += [f"**{title}**", "\n".join(["| name | |", "|---|---|", *rows])]
        for title, module in SECTIONS.items():
            self.module, self.heading = module, module.__name__
            parts += [f"## {title}", self.markdown(inspect.getdoc(module))]
            seen = {}  # docstring of a method -> heading of the class that has it first
            for heading, value in dotted(module).items():
                parts += self.entry(heading, value, seen)
        return "\n\n".join(parts) + "\n"


def take(lines, belongs):
    """Removes and returns the first lines, as long as they belong."""
    block = []
    while lines and belongs(lines[0]):
        block.append(lines.pop(0))
    return block


def signature(name, value):
    """How it is called: names and defaults, for the docstring says what the types are."""
    parameters = [
        p.replace(annotation=p.empty)
        for p in inspect.signature(value).parameters.values()
        if p.name not in ("self", "parent")  # Flax's `parent` is not for users
    ]
    text = f"{name}{inspect.Signature(parameters)}".replace("'", '"')
    text = re.sub(r"<class \"jax\.numpy\.(\w+)\">", r"jnp.\1", text)
    if text.endswith("(*args, **kwargs)"):
        return "Takes what its base class takes."
    if len(text) > 100:
        inside = re.split(r", (?![^(]*\))", text[len(name) + 1 : -1])  # not between parentheses
        text = "\n    ".join([f"{name}(", *(f"{argument}," for argument in inside)]) + "\n)"
    return f"```python\n{text}\n```"


def render():
    """The whole page."""
    return Page().render()


if __name__ == "__main__":
    print(render(), end="")
