"""A run: who is asked what, and the JSON document of all that was found out and where."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from flax_dwconv.benchmark import driver
from flax_dwconv.benchmark.cases import MODES, NETWORK_MODES
from flax_dwconv.benchmark.peers import BACKENDS, LAX, ON_JAX, OURS, PEERS

PACKAGES = "python jax jaxlib keras numpy torch tensorflow tensorflow-cpu flax dm-haiku".split()
SETTINGS = (
    "XLA_|JAX_|OMP_|KMP_|MKL_|ONEDNN_|DNNL_|ATEN_|TF_ENABLE|TF_XLA|TF_NUM|MALLOC_|LD_PRELOAD$"
)


def where() -> dict[str, Any]:
    """Returns what times depend on: machine, versions, settings, and the git commit."""
    import archspec.cpu

    found = importlib.metadata.distributions()
    installed = {d.name.lower().replace("_", "-"): d.version for d in found}
    installed["python"] = platform.python_version()
    root, commit = pathlib.Path(__file__).parents[2], None
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "machine": {
            "cpu": archspec.cpu.brand_string() or platform.processor(),
            "architecture": archspec.cpu.host().name,
            "cores": driver.CORES,
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
        "environment": {k: v for k, v in os.environ.items() if re.match(SETTINGS, k)},
        "commit": commit,
    }


def run(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Times what was chosen, until Ctrl-C, and returns the document."""
    wanted = {peer: PEERS[peer] for peer in args.peers if args.cases and not args.device}
    wanted |= {"keras": "keras", **BACKENDS} if args.networks else {}
    absent = [name for name, module in wanted.items() if not importlib.util.find_spec(module)]
    peers = [LAX] if args.device else [peer for peer in args.peers if peer not in absent]
    backends = [*ON_JAX, *(name for name in BACKENDS if name not in absent)]
    count, budget = args.rounds or (3 if args.quick else 5), 0.05 if args.quick else 0.2
    turns = [(case, mode, [OURS, *peers]) for case in args.cases for mode in MODES[args.family]]
    sessions: list[Any] = [(turns, count, budget)] if turns else []
    networks = [] if "keras" in absent else args.networks
    for turn in ((name, mode) for name in networks for mode in NETWORK_MODES):
        # Each has processes of its own, and is compiled in one more: the less of two times counts.
        sessions += [([(*turn, ON_JAX)], 1, 0.0), ([(*turn, backends)], count, 1.0)]
    results, stopped = driver.Results(), False
    for name in absent:
        own = wanted[name] == "torch" and sys.version_info >= (3, 12)  # the extra lacks it there
        what = "torch" if own else "'flax_dwconv[bench]'"
        results.failures[name] = f"absent (pip install {what})"
    try:
        for turns, rounds, budget in sessions:
            driver.take_turns(turns, rounds, budget, results, args.device)
    except KeyboardInterrupt:
        stopped = True

    keys = "case", "mode", "peer", "variant"
    rows = [dict(zip(keys, key, strict=True)) | found for key, found in results.times.items()]
    return {
        "command": shlex.join(["python", "-m", "flax_dwconv.benchmark", *argv]),
        **where(),
        "rounds": count,
        "stopped": stopped,
        "modes": [*MODES[args.family]],
        "cases": [dataclasses.asdict(c) | {"label": c.label, "sizes": c.sizes} for c in args.cases],
        "networks": [*networks],
        "peers": peers,
        "failures": results.failures,
        "times": rows,
    }
