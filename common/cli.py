"""What every script does with its command line: flags, one-line errors for bad input, devices, atomic writes."""

import argparse
import contextlib
import difflib
import errno
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

logger = logging.getLogger(Path(sys.argv[0]).name)

_debug = False  # set by --debug
# What Python and safetensors, torch.save, and np.save say where a file cannot be written to its end
FULL_DISK = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
FULL_DISK += (r"unexpected pos \d+ vs \d+", r"\d+ requested and \d+ written")


class InputError(ValueError):
    """The user's input is wrong; the message names the flag or file, what came, and what to do."""


@contextlib.contextmanager
def bad_input_exits() -> Iterator[None]:
    """Around what reads the user's input: InputError becomes one line and exit code 2 (--debug: its traceback too).

    Any other exception is a bug, ours or a library's, and keeps its traceback.
    """
    try:
        yield
    except InputError as error:
        if _debug:
            raise
        logger.error("error: %s", error)
        sys.exit(2)


@contextlib.contextmanager
def library_errors_are_input(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Around a library's reading of the user's input: its `kinds` of exceptions become InputErrors about `what`."""
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        raise InputError(f"{what}: {first_line(error)}") from error


def run_script(main: Callable, parse_args: Callable) -> None:
    """`main(parse_args())` of a script; what is nobody's bug ends in one line: Ctrl-C (130) and a full disk (1)."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which `!python train.py` inherits, need not be installed here
    try:
        main(parse_args())
    except KeyboardInterrupt:
        logger.error("interrupted. Long work that can be resumed is, by the same command (see --help)")
        sys.exit(130)
    except Exception as error:
        if _debug or not any(re.search(message, str(error)) for message in FULL_DISK):
            raise
        message = "error: the disk or its quota is full: %s. Free some space; what is complete is kept"
        logger.error(message, first_line(error))
        sys.exit(1)


def set_up_logging(*loggers: str, timestamps: bool = False) -> None:
    """Messages of the project's loggers to stderr, from INFO on.

    Args:
        loggers: names of loggers; those of libraries stay at WARNING.
        timestamps: for long runs, whose log is read afterwards.
    """
    logging.basicConfig(
        format="%(asctime)s %(message)s" if timestamps else "%(message)s", datefmt="%H:%M:%S", level=logging.WARNING
    )
    for name in loggers:
        logging.getLogger(name).setLevel(logging.INFO)
    if not sys.stderr.isatty():  # in a log file the bars of libraries are noise
        from datasets import disable_progress_bars  # here: --help need not wait for them
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bars()
        disable_progress_bar()


# --- Flags ------------------------------------------------------------------------------------------------


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands, and the defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False:  # not `in`: 0 is equal to False
            return action.help
        return super()._get_help_string(action)


def parse_strictly(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """What `parser` makes of `argv`, --debug included; for an unknown flag the error names the nearest one.

    A flag cut short is unknown too: iterate_preferences.py compares names.
    """
    parser.allow_abbrev = False
    parser.add_argument("--debug", action="store_true", help="show the traceback of an input error")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        parser.error(f"unknown argument {unknown[0]}{did_you_mean(flag, parser._option_string_actions)}")
    show_tracebacks(args.debug)
    return args


def add_device(parser: argparse.ArgumentParser, what: str) -> None:
    """--device, which `pick_device` reads; `what` says of what it is."""
    help = f"{what}: auto (a GPU where there is one), cpu, cuda or cuda:1"
    parser.add_argument("--device", default="auto", help=help)


def add_top_p(parser: argparse.ArgumentParser) -> None:
    help = "nucleus sampling: sample from the likeliest tokens of this total mass"
    parser.add_argument("--top_p", type=float, default=1.0, help=help)


def settings_of(args: argparse.Namespace, free: tuple[str, ...]) -> dict:
    """The arguments that decide what a run makes: all but the `free` ones, of which a resumed run may have others."""
    return {name: value for name, value in vars(args).items() if name not in free}


def show_tracebacks(debug: bool) -> None:
    """Whether `bad_input_exits` lets an InputError through with its traceback."""
    global _debug
    _debug = debug


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.4) -> str:
    """The part of an error message that names the nearest of the `known` names; "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f". Did you mean {near[0]!r}?" if near else ""


def unknown_key(key: str, known: Iterable[str]) -> str:
    """An error message's part about an unknown key: the nearest known one, and all of them."""
    hint = did_you_mean(key, known) or "."
    return f"unknown key {key!r}{hint} Known: {', '.join(sorted(known))}"


def check_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raises InputError where a whole number of the arguments is below its least; None is no number, and passes."""
    for name, number in least.items():
        value = getattr(args, name)
        if value is not None and value < number:
            raise InputError(f"--{name}: must be >= {number} (got {value})")


Range = tuple[float, bool, float, bool]  # least, whether it is allowed, most, whether it is allowed
POSITIVE, NOT_NEGATIVE, COUNT = (0, False, math.inf, False), (0, True, math.inf, False), (1, True, math.inf, False)
FRACTION = (0, True, 1, False)


def check_ranges(values: object, ranges: dict[str, Range]) -> None:
    """Raises InputError for a number that is NaN or out of its range.

    Args:
        values: an object with the numbers as attributes; None is no number, and passes.
    """
    for name, (low, low_allowed, high, high_allowed) in ranges.items():
        value = getattr(values, name)
        if value is None:
            continue
        above = value >= low if low_allowed else value > low
        below = value <= high if high_allowed else value < high
        if not (above and below):
            interval = f"{'[' if low_allowed else '('}{low:g}, {high:g}{']' if high_allowed else ')'}"
            raise InputError(f"--{name}: must be in {interval} (got {value})")


def check_flags_of_tasks(
    parser: argparse.ArgumentParser, args: argparse.Namespace, flags: dict[str, tuple[str, ...]]
) -> None:
    """Raises InputError for a flag of another task than --task that has another value than its default.

    Args:
        flags: task -> names of its own flags.
    """
    for task, names in flags.items():
        for name in names:
            if task != args.task and getattr(args, name) != parser.get_default(name):
                raise InputError(f"--{name}: is for --task {task} (got --task {args.task}). Leave it out")


def check_seed(seed: int) -> None:
    """Raises InputError for a seed that numpy does not take."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed: must be in [0, {2**32 - 1}] (got {seed})")


def check_sampling(temperatures: list[float], top_p: float) -> None:
    """Raises InputError for a temperature or a top_p that cannot be sampled with."""
    for temperature in temperatures:
        if not 0 <= temperature < math.inf:
            raise InputError(f"--temperature: must be finite and >= 0, 0 is greedy (got {temperature})")
    if not 0 < top_p <= 1:
        raise InputError(f"--top_p: must be in (0, 1], 1 samples from every token (got {top_p})")


def pick_device(device: str = "auto") -> str:
    """A GPU if there is one, for "auto"; InputError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build without CUDA
        raise InputError(f"--device {device}: {first_line(error)}. Use auto, cpu, cuda or cuda:1") from error
    if torch.device(device).type == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)  # openai-whisper's Triton kernels run on the current GPU, not on the tensors'
    return device


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# --- Files ------------------------------------------------------------------------------------------------


def read_text(path: str) -> str:
    """The text of a UTF-8 file, or stdin for "-"; InputError names a file that cannot be read."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. Use a UTF-8 text file, or - for stdin") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason}). Convert the file to UTF-8") from error


def check_unicode(text: str) -> None:
    """Raises InputError for a text that no file and no tokenizer can hold: JSON and argv can carry half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"not Unicode text: half a character, a lone surrogate (got {ascii(text[error.start])}). Write it again"
        ) from error


def read_lines(path: str) -> list[str]:
    """The lines of a UTF-8 file, or of stdin for "-", without line ends; InputError names a file that cannot be read.

    Only a line feed ends a line. str.splitlines() would also split at U+2028, which JSON allows within a string.
    """
    return read_text(path).removesuffix("\n").split("\n")


def check_writable(folder: Path) -> None:
    """Try to make and write into `folder`, before the work that it is to hold; leaves no empty folder behind."""
    folders = (folder, *folder.absolute().parents)
    for link in folders:
        if link.is_symlink() and not link.exists():
            raise InputError(f"cannot write into {folder}: {link} is a link to {os.readlink(link)}, which is not there")
    existing = next(parent for parent in folders if parent.exists())
    try:
        if existing.is_dir():
            tempfile.TemporaryFile(dir=existing).close()
        else:
            folder.mkdir(parents=True, exist_ok=True)  # raises: a file is in the way
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror}. Use another output folder") from error


def give_usual_mode(folder: Path) -> None:
    """Make the weights below `folder` as readable as other new files: safetensors leaves them to their owner."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def check_pairs_file(output: str) -> None:
    """Raises InputError for an --output that pairs cannot be written to."""
    if Path(output).suffix != ".jsonl":
        raise InputError(f"--output {output}: not a .jsonl file, which pairs are written to. Rename it")
    if Path(output).is_dir():
        raise InputError(f"--output {output}: is a folder. Use another name, or remove the folder")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a temporary file beside `path`, then rename it: `path` is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole_text(path: Path, text: str) -> None:
    """`write_whole` of a text, in UTF-8."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
