"""What every script does with its command line: refuse bad input in one line, pick a device."""

import argparse
import contextlib
import difflib
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

logger = logging.getLogger(Path(sys.argv[0]).name)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


@contextlib.contextmanager
def bad_input_exits(*kinds: type[Exception]) -> Iterator[None]:
    """Around what reads the user's input: one line and exit code 2 instead of a traceback.

    Args:
        kinds: what counts as bad input; default ValueError and OSError.
    """
    accepted = kinds or (ValueError, OSError)
    try:
        yield
    except accepted as error:
        logger.error("error: %s", error)
        logger.debug("", exc_info=True)
        sys.exit(2)


def parse_strictly(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """What `parser` makes of `argv`; for an unknown flag the error names the nearest one."""
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        nearest = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    return args


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def check_writable(folder: Path) -> None:
    """Make `folder` and try it, before the work that it is to hold."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}; give another output") from error


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    for name, number in least.items():
        if getattr(args, name) < number:
            raise ValueError(f"--{name} {getattr(args, name)}: give a whole number from {number} on")


def pick_device(device: str = "auto") -> str:
    """A GPU if there is one, for "auto"; ValueError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build without CUDA
        raise ValueError(f"--device {device}: {first_line(error)}. Give auto, cpu, cuda or cuda:1") from error
    return device
