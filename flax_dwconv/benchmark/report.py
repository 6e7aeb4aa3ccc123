"""What a run comes to: Markdown tables and a picture, made of its JSON document alone."""

import io
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_dwconv.benchmark.cases import LAYER_MODES, NETWORK_MODES
from flax_dwconv.benchmark.peers import BACKENDS, FAST, ON_JAX, OURS, PLAIN, POINTWISE

NAMES = {"torch": "PyTorch", "tensorflow": "TensorFlow", "linen": "flax.linen", "haiku": "Haiku"}
NAMES |= {"lax": "XLA", "forward": "forward", "train": "forward and gradients"}
NAMES |= {"infer": "inference", PLAIN: "plain JAX", FAST: "accelerated", POINTWISE: "pointwise"}
NAMES |= {"keras-tensorflow": "TensorFlow", "keras-torch": "PyTorch", OURS: "ours"}
LOOKS = {"torch": ("o", "#d9702b"), "tensorflow": ("s", "#c9a227"), "linen": ("o", "#1f5a96")}
LOOKS |= {"haiku": ("x", "#5aa0a0"), "lax": ("D", "#1f5a96")}
HOW = """A time is the minimum over the rounds of each round's lower quartile. Its spread is the
median over the rounds divided by that minimum. A speed-up is a peer's time divided by ours."""


class Report:
    """Tables of a document: what is missing is NaN in them."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """Makes the tables."""
        import pandas as pd

        key = ["case", "mode", "peer"]
        times = [time for time in document["times"] if time["seconds"]]
        rows = pd.DataFrame(times, columns=[*key, "seconds", "first"])
        rows["time"] = rows.seconds.map(min)
        rows["spread"] = (
            rows.seconds.map(np.median) / rows.time if document["rounds"] > 1 else np.nan
        )
        rows["compile"] = (rows["first"].map(min) - rows.time).clip(lower=0)
        # The better variant of each peer counts.
        best = rows.sort_values("time").drop_duplicates(key).set_index(key)
        self.document, self.peers = document, document["peers"]
        self.cases = {case["label"]: case["sizes"] for case in document["cases"]}
        layers, networks = [*self.cases], document["networks"]
        self.layers = {
            mode: self._of(best, layers, mode, [OURS, *self.peers]) for mode in LAYER_MODES
        }
        names = [*ON_JAX, *BACKENDS]
        self.networks = {mode: self._of(best, networks, mode, names) for mode in NETWORK_MODES}

    def _of(self, best, cases, mode, peers):
        """Returns {"time", "spread" or "compile": a table of cases and peers}."""
        one = best[best.index.get_level_values("mode") == mode].droplevel("mode")
        return {
            name: one[name].unstack("peer").reindex(index=cases, columns=peers).astype(float)
            for name in ("time", "spread", "compile")
        }

    def speedups(self, mode: str) -> Any:
        """Returns the table of layers and peers: their time divided by ours."""
        times = self.layers[mode]["time"]
        return times[self.peers].div(times[OURS], axis=0)


def number(value: Any, unit: str = "") -> str:
    """Returns three digits, more before the point, and the unit; a dash for what is missing."""
    if np.isnan(value):
        return "-"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value or 1)))}f}{unit}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    from tabulate import tabulate

    align = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, "pipe", disable_numparse=True, colalign=align)


def mean(ratios: Any) -> Any:
    """Returns the geometric mean, of each column of a table."""
    return np.exp(np.log(ratios).mean())


def layers(report: Report, mode: str) -> str:
    """Returns the table of all layers: our time, and the speed-up over each peer."""
    found, over = report.layers[mode], report.speedups(mode)
    header = [NAMES[mode], "ms", "spread", *(f"over {NAMES[peer]}" for peer in report.peers)]
    rows = [
        [f"{label}, {sizes}", number(found["time"][OURS][label] * 1e3)]
        + [number(found["spread"][OURS][label]), *(number(x, "x") for x in over.loc[label])]
        for label, sizes in report.cases.items()
    ]
    return table(header, rows)


def summary(report: Report) -> str:
    """Returns the speed-up over each peer, over the fastest one, and how much times vary."""
    rows, lines = [], []
    for mode in LAYER_MODES:
        over, found = report.speedups(mode), report.layers[mode]
        rows.append([NAMES[mode], *(number(x, "x") for x in mean(over))])
        rows.append([f"{NAMES[mode]}, worst case", *(number(x, "x") for x in over.min())])
        fastest = over.min(axis=1).dropna()
        if len(fastest):
            worst = fastest.idxmin()
            peer = NAMES[over.loc[worst].idxmin()]
            lines.append(
                f"- {NAMES[mode]}, over the fastest peer of each layer: {number(mean(fastest))}x; "
                f"slower in {(fastest < 1).sum()} of {len(fastest)}, at worst "
                f"{number(fastest[worst])}x, {worst}, {peer}"
            )
        for what, name in {"spread": "spread", "compile": "seconds to compile"}.items():
            medians = found[what].median().items()
            text = ", ".join(f"{NAMES[peer]} {number(x)}" for peer, x in medians)
            lines.append(f"- {NAMES[mode]}, {name}, medians: {text}")
    header = [f"over, {len(report.cases)} layers", *(NAMES[peer] for peer in report.peers)]
    return f"{table(header, rows)}\n\n" + "\n".join(lines)


def networks(report: Report) -> str:
    """Returns the table of networks: milliseconds, speed-ups over plain JAX, time to compile."""
    header = ["ms", *(NAMES[name] for name in [*ON_JAX, *BACKENDS])]
    rows = []
    for network in report.document["networks"]:
        for mode in NETWORK_MODES:
            found = report.networks[mode]
            times, compiles = found["time"].loc[network], found["compile"].loc[network]
            row = [f"{network}, {NAMES[mode] if mode == 'infer' else 'train step'}"]
            row += [number(time * 1e3) for time in times]
            row += [number(times[PLAIN] / times[fast], "x") for fast in (FAST, POINTWISE)]
            rows.append([*row, " -> ".join(number(compiles[name], " s") for name in (PLAIN, FAST))])
    return table([*header, "over plain JAX", "pointwise", "to compile"], rows)


def markdown(document: Mapping[str, Any]) -> str:
    """Returns the whole report of a run."""
    report, machine = Report(document), "{cpu} ({architecture}), {cores} cores, {system}"
    settings = [f"{name}={value}" for name, value in document["environment"].items()]
    versions = [f"{name} {version}" for name, version in document["versions"].items()]
    parts = [
        f"`{document['command']}`, {document['rounds']} rounds, commit {document['commit']}",
        f"{machine.format(**document['machine'])}; {', '.join([*versions, *settings])}",
        HOW,
        *([layers(report, mode) for mode in LAYER_MODES] if report.cases else []),
        *([summary(report)] if report.cases else []),
        *([networks(report)] if document["networks"] else []),
        *(f"failed: {what}: {why}" for what, why in document["failures"].items()),
        *(["stopped before the end"] if document["stopped"] else []),
    ]
    return "\n\n".join(parts)


def draw(document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Saves a picture: how many times longer than ours every peer takes, layer by layer."""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no window, no display
    from matplotlib.ticker import LogLocator

    report = Report(document)
    names = [f"{label}   {sizes}" for label, sizes in report.cases.items()]
    rows = np.arange(len(names))
    style = {"font.size": 9, "ytick.labelsize": 8, "axes.grid": True, "grid.alpha": 0.25}
    with matplotlib.style.context(["default", style]):
        figure: Any = Figure(figsize=(11, 2.2 + 0.21 * len(names)), layout="constrained")
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, mode in zip(panels, LAYER_MODES, strict=True):
            over = report.speedups(mode)
            fastest = over.min(axis=1)
            colors = np.where(fastest < 1, "#b3262e", "#8a8f98")
            axes.hlines(rows, 1, fastest, colors, lw=3, alpha=0.45, zorder=2)
            for peer in report.peers:
                marker, color = LOOKS[peer]
                look = {"c": color, "marker": marker, "label": NAMES[peer]}
                axes.scatter(over[peer], rows, 26, zorder=3, **look)
            axes.axvline(1, color="black", lw=1, zorder=1)
            title = f"{NAMES[mode]}: fastest peer takes {number(mean(fastest), 'x')} our time"
            axes.set_title(title, fontsize=9.5, fontweight="bold")
            axes.set(xscale="log", xlabel="peer's time / our time")
            axes.xaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}x")
            axes.xaxis.set_minor_formatter("")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_yticks(rows, names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(LOOKS), frameon=False)
        where = "{cpu}, {cores} cores".format(**document["machine"])
        figure.suptitle(
            f"Depthwise convolution, bias, relu6 on {where}: right of 1x, we are faster"
        )
        buffer = io.BytesIO()  # in memory first: no half-written file, whatever happens
        figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=130)
    path.write_bytes(buffer.getvalue())
