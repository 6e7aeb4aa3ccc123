"""The command line: a run times what was chosen; a report is made of the JSON that it gives."""

import argparse
import fnmatch
import importlib.util
import json
import pathlib
import sys
from collections.abc import Sequence

from flax_dwconv.benchmark import cases, peers, report, run, scan, stacks

NEEDS = ["archspec", "matplotlib", "pandas", "tabulate", "tqdm"]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments, all checked; exits with code 2 and the reason for a bad one."""
    parser = argparse.ArgumentParser(
        prog="python -m flax_dwconv.benchmark",
        description="Time this package beside PyTorch, TensorFlow, flax.linen, Haiku, shifts.",
        epilog="Without --layers, --draw and --networks all of the family is timed.",
    )
    add, error, which = parser.add_argument, parser.error, parser.add_mutually_exclusive_group()
    file = {"type": pathlib.Path, "metavar": "FILE"}
    add("--family", choices=cases.MODES, default="images", help="of layers, default %(default)s")
    add("--quick", action="store_true", help="twelve layers of images, short times: some minutes")
    patterns = "time these layers, by patterns such as 'Xception*' MobileNetV1-7/32"
    which.add_argument("--layers", nargs="*", metavar="NAME", help=patterns)
    drawn = "time N random layers on images"
    which.add_argument("--draw", nargs=2, type=int, metavar=("SEED", "N"), help=drawn)
    scanned = f"time N random convolutions beside XLA's own; KIND is {' or '.join(scan.KINDS)}"
    which.add_argument("--scan", nargs=3, metavar=("KIND", "SEED", "N"), help=scanned)
    compiled = "compile stacks of layers with gradients beside XLA's own, run nothing"
    which.add_argument("--stacks", action="store_true", help=compiled)
    add("--networks", nargs="*", choices=cases.NETWORKS, help="time networks, all or these")
    add("--batch", type=int, metavar="N", help="images of a network's batch, default 1")
    add("--peers", nargs="+", choices=peers.PEERS, help="default all of the family")
    add("--rounds", type=int, help="default 5, with --quick 3")
    add("--device", action="store_true", help="time layers on a GPU or TPU, beside XLA's own")
    add("--json", **file, help="save all times")
    add("--plot", **file, help="save a picture of the layers: .png, .svg or .pdf")
    add("--report", **file, help="report what --json saved, time nothing")
    args = parser.parse_args(argv)

    if missing := [name for name in NEEDS if not importlib.util.find_spec(name)]:
        error(f"needs {', '.join(missing)}: pip install 'flax_dwconv[bench]'.")
    if args.rounds is not None and args.rounds < 1:
        error(f"argument --rounds: must be at least 1, got {args.rounds}.")
    for name, path in {"json": args.json, "plot": args.plot}.items():
        if path and not path.resolve().parent.is_dir():
            error(f"argument --{name}: must be in a folder that exists, got '{path}'.")
    if args.plot and args.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        error(f"argument --plot: must end in .png, .svg or .pdf, got '{args.plot}'.")
    if args.batch is not None and (args.batch < 1 or args.networks is None):
        error(f"argument --batch: must be at least 1 and with --networks, got {args.batch}.")
    if args.scan:
        kind, *numbers = args.scan
        if kind not in scan.KINDS or not all(number.isdecimal() for number in numbers):
            error(f"argument --scan: must be {' or '.join(scan.KINDS)} and two numbers, got "
                  f"{' '.join(args.scan)}.")  # fmt: skip
        args.scan = kind, *map(int, numbers)
    images, known = args.family == "images", peers.FAMILIES[args.family]
    if others := [peer for peer in args.peers or () if peer not in known]:
        error(f"argument --peers: must be of {', '.join(known)}, got {', '.join(others)}.")
    # Of the others, XLA's convolutions, a draw has too many that are slow.
    args.peers = args.peers or [*(known[:2] if args.draw else known)]
    if args.draw and not images:
        error(f"argument --draw: must be of --family images, got {args.family}.")
    everything = args.layers is args.draw is args.networks is None
    whole = args.networks == [] or (everything and images and not (args.quick or args.device))
    args.networks = [*(cases.NETWORKS if whole else args.networks or ())]
    if args.batch is not None:
        args.networks = [f"{name}/{args.batch}" for name in args.networks]
    args.cases = cases.drawn(*args.draw) if args.draw else []
    patterns = (args.layers or ["*"]) if everything or args.layers is not None else []
    for pattern in patterns:
        layers = cases.layers(args.quick, args.family)
        found = [case for case in layers if fnmatch.filter([case.name, case.label], pattern)]
        if not found:
            error(f"argument --layers: must match names of layers, got {pattern!r}.")
        args.cases += [case for case in found if case not in args.cases]
    if args.plot and not (args.cases or args.report):
        error("argument --plot: needs layers, which --networks alone leaves out.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and returns the exit code.

    Args:
      argv: the arguments; None takes those of the command line.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        if args.scan or args.stacks:
            if args.stacks:
                rows, wanted = stacks.stacks(args.rounds or (3 if args.quick else 5)), stacks.STACKS
            else:
                rows, wanted = scan.scan(*args.scan), range(len(scan.PROGRAMS) * args.scan[2])
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            if rows:
                print((stacks if args.stacks else scan).markdown(rows))
            return 0 if len(rows) == len(wanted) else 130  # Ctrl-C
        if args.report:
            document = json.loads(args.report.read_text(encoding="utf-8"))
        else:
            document = run.run(args, argv)
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(report.markdown(document))
        if args.plot:
            report.draw(document, args.plot)
    except (OSError, ValueError, KeyError) as error:
        print(f"The benchmark could not finish: {error}", file=sys.stderr)
        return 1
    return 130 if document["stopped"] else 0 if document["times"] else 1


if __name__ == "__main__":
    sys.exit(main())
