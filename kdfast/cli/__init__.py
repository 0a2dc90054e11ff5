"""The command `kdfast`: `kdfast distill`, `kdfast cache`, `kdfast augment`, `kdfast env`."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
from collections.abc import Sequence

import torch

import kdfast
from kdfast.cli import augment, cache, distill
from kdfast.cli.errors import CommandError
from kdfast.cli.options import Parser
from kdfast.ops import registry


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes the process's.

    Returns:
        The exit status: 0, or 2 for a `CommandError`, whose line went to stderr.

    Example:
        >>> kdfast.cli.main(["env"])
    """
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except CommandError as error:
        print(f"kdfast: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="kdfast", description="Knowledge distillation with fused losses.")
    parser.add_argument("--version", action="version", version=f"kdfast {kdfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    env = commands.add_parser("env", help="which backends and versions this installation has")
    env.set_defaults(run=_env)
    distill.add_command(commands)
    cache.add_command(commands)
    augment.add_command(commands)
    return parser


def _env(arguments: argparse.Namespace) -> None:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})"
    else:
        device = f"cpu ({platform.machine()})"
    rows = [
        ("kdfast", kdfast.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        *((package, version(package)) for package in ("triton", "transformers")),
        ("device", device),
        ("threads", str(torch.get_num_threads())),
    ]
    print(*(f"{name:<14}{value}" for name, value in rows), "backends", sep="\n")
    for backend in registry.BACKENDS:
        reason = _missing(backend)
        print(f"  {backend:<12}{'yes' if reason is None else f'no: {reason}'}")


def _missing(backend: str) -> str | None:
    try:
        reason = registry.missing(backend)
        if backend == "cpp" and reason is None:
            registry.extension()
    except ImportError as error:
        return str(error)
    return reason
