"""What a run comes to: Markdown tables and a picture, made of its JSON document alone."""

import io
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_dwconv.benchmark.cases import NETWORK_MODES
from flax_dwconv.benchmark.peers import BACKENDS, FAST, ON_JAX, OURS, PLAIN, POINTWISE

NAMES = {"torch": "PyTorch", "tensorflow": "TensorFlow", "linen": "flax.linen", "haiku": "Haiku"}
NAMES |= {"lax": "XLA", "shifts": "sum of shifts"}
NAMES |= {"forward": "forward", "train": "forward and gradients", "state": "forward with a state"}
NAMES |= {"step-1": "step of 1", "step-16": "step of 16", "chunk": "16 positions"}
NAMES |= {"infer": "inference", PLAIN: "plain JAX", FAST: "accelerated", POINTWISE: "pointwise"}
NAMES |= {"keras-tensorflow": "TensorFlow", "keras-torch": "PyTorch", OURS: "ours"}
HOW = """A time is the minimum over the rounds of each round's lower quartile. Its spread is the
median over the rounds divided by that minimum. A speed-up is a peer's time divided by ours."""


class Report:
    """The times of a document as tables of pandas; what is missing is NaN in them."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        """Picks the better variant of each peer."""
        import pandas as pd

        key = ["mode", "case", "peer"]
        times = [time for time in document["times"] if time["seconds"]]
        rows = pd.DataFrame(times, columns=[*key, "seconds", "first"])
        rows["time"] = rows.seconds.map(min)
        several = np.where(rows.seconds.map(len) > 1, 1, np.nan)  # a single round has no spread
        rows["spread"] = several * rows.seconds.map(np.median) / rows.time
        rows["first"] = rows["first"].map(min)
        rows["compile"] = (rows["first"] - rows.time).clip(lower=0)
        self._best = rows.sort_values("time").drop_duplicates(key).set_index(key)
        self.names = {case["label"]: case["sizes"] for case in document["cases"]}
        self.peers, self.networks = document["peers"], document["networks"]
        self.modes = document["modes"]

    def table(self, what: str, mode: str, network: bool = False) -> Any:
        """Returns the times, or another column, of layers or networks: a column for each peer."""
        index = self.networks if network else list(self.names)
        columns = [*ON_JAX, *BACKENDS] if network else [OURS, *self.peers]
        one = self._best[self._best.index.get_level_values("mode") == mode].droplevel("mode")[what]
        return one.unstack("peer").reindex(index=index, columns=columns).astype(float)

    def speedups(self, mode: str) -> Any:
        """Returns the table of layers and peers: their time divided by ours."""
        times = self.table("time", mode)
        return times[self.peers].div(times[OURS], axis=0)


def number(value: Any, unit: str = "") -> str:
    """Returns three digits, more before the point, and the unit; a dash for what is missing."""
    if np.isnan(value):
        return "-"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value or 1)))}f}{unit}"


def times(value: Any) -> str:
    """Returns what is printed of a ratio."""
    return number(value, "x")


def mean(ratios: Any) -> Any:
    """Returns the geometric mean, of each column of a table."""
    return np.exp(np.log(ratios).mean())


def markdown_table(title: str, frame: Any) -> str:
    """Returns a table of strings in Markdown."""
    align = ["left", *["right"] * frame.shape[1]]
    frame = frame.rename_axis(title).rename(columns=NAMES)
    return frame.to_markdown(tablefmt="pipe", disable_numparse=True, colalign=align)


def layers(report: Report, mode: str) -> str:
    """Returns the table of all layers: our time, and the speed-up over each peer."""
    found = report.speedups(mode).map(times).rename(columns=lambda peer: f"over {NAMES[peer]}")
    found.insert(0, "ms", (report.table("time", mode)[OURS] * 1e3).map(number))
    found.insert(1, "spread", report.table("spread", mode)[OURS].map(number))
    return markdown_table(
        NAMES[mode], found.rename(lambda label: f"{label}, {report.names[label]}")
    )


def summary(report: Report) -> str:
    """Returns the speed-ups over the peers, how much times vary, and the times to compile."""
    import pandas as pd

    rows, lines = {}, []
    for mode in report.modes:
        over = report.speedups(mode)
        rows |= {NAMES[mode]: mean(over), f"{NAMES[mode]}, worst case": over.min()}
        if len(fastest := over.min(axis=1).dropna()):
            worst = [
                f"{times(ratio)}, {label}, {NAMES[over.loc[label].idxmin()]}"
                for label, ratio in fastest.nsmallest(5).items()
            ]
            lines.append(
                f"- {NAMES[mode]}, over the fastest peer of each layer: {times(mean(fastest))}; "
                f"slower in {(fastest < 1).sum()} of {len(fastest)}, at worst {'; '.join(worst)}"
            )
        for what, words in {"spread": "spread", "compile": "seconds to compile"}.items():
            medians = report.table(what, mode).median().items()
            said = ", ".join(f"{NAMES[peer]} {number(value)}" for peer, value in medians)
            lines.append(f"- {NAMES[mode]}, {words}, medians: {said}")
        if "shifts" in report.peers:
            first = report.table("first", mode)
            ratio = times(mean(first[OURS] / first["shifts"]))
            lines.append(f"- {NAMES[mode]}, first call, ours over the sum of shifts: {ratio}")
    frame = pd.DataFrame(rows).T.map(times)
    return "\n".join([markdown_table(f"over, {len(report.names)} layers", frame), "", *lines])


def networks(report: Report) -> str:
    """Returns the table of networks: milliseconds, speed-ups over plain JAX, time to compile."""
    import pandas as pd

    rows, words = [], dict(zip(NETWORK_MODES, ("inference", "train step"), strict=True))
    for mode in NETWORK_MODES:
        time, compiles = (report.table(what, mode, network=True) for what in ("time", "compile"))
        found = (time * 1e3).map(number)
        found["over plain JAX"] = (time[PLAIN] / time[FAST]).map(times)
        found["with pointwise"] = (time[PLAIN] / time[POINTWISE]).map(times)
        plain, fast = (compiles[name].map(number) for name in (PLAIN, FAST))
        found["to compile"] = plain + " -> " + fast + " s"
        rows.append(found.add_suffix(f", {words[mode]}", axis=0))
    order = [f"{network}, {words[mode]}" for network in report.networks for mode in NETWORK_MODES]
    return markdown_table("ms", pd.concat(rows).loc[order])


def markdown(document: Mapping[str, Any]) -> str:
    """Returns the whole report of a run."""
    report, machine = Report(document), "{cpu} ({architecture}), {cores} cores, {system}"
    settings = [f"{name}={value}" for name, value in document["environment"].items()]
    versions = [f"{name} {version}" for name, version in document["versions"].items()]
    parts = [
        f"`{document['command']}`, {document['rounds']} rounds, commit {document['commit']}",
        f"{machine.format(**document['machine'])}; {', '.join([*versions, *settings])}",
        HOW,
    ]
    if report.names:
        parts += [*(layers(report, mode) for mode in report.modes), summary(report)]
    parts += [networks(report)] if report.networks else []
    parts += [f"failed: {what}: {why}" for what, why in document["failures"].items()]
    return "\n\n".join([*parts, *(["stopped before the end"] if document["stopped"] else [])])


def draw(document: Mapping[str, Any], path: pathlib.Path) -> None:
    """Saves a picture: how many times longer than ours every peer takes, layer by layer."""
    import matplotlib.style
    from matplotlib.figure import Figure  # without pyplot: no window, no display
    from matplotlib.ticker import LogLocator

    report, width = Report(document), 2 + 4.5 * len(document["modes"])
    names = [f"{label}   {sizes}" for label, sizes in report.names.items()]
    rows = np.arange(len(names))
    style = {"font.size": 9, "ytick.labelsize": 8, "axes.grid": True, "grid.alpha": 0.25}
    with matplotlib.style.context(["default", style]):
        figure: Any = Figure(figsize=(width, 2.2 + 0.21 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(report.modes), sharex=True, sharey=True)
        for axes, mode in zip(panels, report.modes, strict=True):
            over = report.speedups(mode)
            fastest = over.min(axis=1)
            colors = np.where(fastest < 1, "#b3262e", "#8a8f98")
            axes.hlines(rows, 1, fastest, colors, lw=3, alpha=0.45, zorder=2)
            for peer, marker in zip(report.peers, "osxD", strict=False):
                axes.scatter(over[peer], rows, 26, marker=marker, zorder=3, label=NAMES[peer])
            axes.axvline(1, color="black", lw=1, zorder=1)
            title = f"{NAMES[mode]}: fastest peer takes {times(mean(fastest))} our time"
            axes.set_title(title, fontsize=9, fontweight="bold")
            axes.set(xscale="log", xlabel="peer's time / our time")
            axes.xaxis.set(major_locator=LogLocator(subs=(1, 3)), major_formatter="{x:g}x")
            axes.xaxis.set_minor_formatter("")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_yticks(rows, names)
        panels[0].set_ylim(len(names) - 0.5, -0.5)
        handles = panels[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
        where = "{cpu}, {cores} cores".format(**document["machine"])
        figure.suptitle(f"Depthwise convolutions on {where}: right of 1x, we are faster")
        buffer = io.BytesIO()  # in memory first: no half-written file, whatever happens
        figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=130)
    path.write_bytes(buffer.getvalue())
