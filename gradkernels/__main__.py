"""python -m gradkernels demo | bench | flow | tasks | doctor | backends."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import gradkernels as gk
from gradkernels import demo
from gradkernels.backends import backends as table
from gradkernels.doctor import as_dict
from gradkernels.doctor import doctor as diagnosis
from gradkernels.flow import command as flow
from gradkernels.tasks import command as tasks

ROOT = Path(__file__).resolve().parents[1]


def bench(arguments: list[str]) -> int:
    """Hand over to bench/run.py, which comes with the sources and not with the installed package."""
    if not (ROOT / "bench" / "run.py").exists():
        print("The benchmarks are in the source repository, in bench/: run this from a checkout.", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT))
    sys.argv[0] = "python -m gradkernels bench"  # what its usage line begins with
    return importlib.import_module("bench.run").main(arguments)


def doctor(args: argparse.Namespace) -> int:
    print(json.dumps(as_dict(), indent=2) if args.json else diagnosis())
    return 0


def backends(args: argparse.Namespace) -> int:
    found = table()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for name, reason in found.items():
            print(f"{name:10} {'runs' if reason is None else f'cannot run: {reason}'}")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m gradkernels", description="Kernels for PyTorch; see README.md.")
    top.add_argument("--version", action="version", version=f"gradkernels {gk.__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name, run, text):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command

    demo.add_arguments(add("demo", demo.run, "train a character model with torch and with gradkernels, side by side"))
    add("bench", None, "measure kernels against torch; `bench --help` lists the options")
    text = "see how far gradients travel: train small models, write a page, serve it live"
    flow.add_arguments(add("flow", flow.run, text))
    text = "train any cell, attention or convolution on a task that needs a long memory"
    tasks.add_arguments(add("tasks", tasks.run, text))
    text = "what this machine can run, why not, and what to do about it"
    add("doctor", doctor, text).add_argument("--json", action="store_true", help="print one JSON object")
    text = "the backends, and why one cannot run"
    add("backends", backends, text).add_argument("--json", action="store_true", help="print one JSON object")
    return top


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:  # its options, and its --help, are its own
        return bench(arguments[1:])
    args = parser().parse_args(arguments)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
