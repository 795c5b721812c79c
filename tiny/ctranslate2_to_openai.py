"""Convert a Whisper from CTranslate2's format into openai-whisper's.

    python -m tiny.ctranslate2_to_openai build/whisper-tiny.en build/whisper-tiny.en.pt

`--whisper` and `--judge` take a CTranslate2 folder as it is; the .pt file is for other programs, and for changing the
model. Its weights keep the folder's precision.
"""

import argparse
import logging
from functools import partial
from pathlib import Path

import torch

from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_writable,
    parse_strictly,
    run_script,
    set_up_logging,
    write_whole,
)
from speech.ctranslate2_checkpoint import is_ctranslate2_folder, read_ctranslate2_folder
from speech.whisper_checkpoint import build_whisper

logger = logging.getLogger("tiny.ctranslate2_to_openai")


def main(args: argparse.Namespace) -> None:
    output = Path(args.output)
    with bad_input_exits():
        if output.suffix != ".pt":
            raise InputError(f"{output}: not the path of a .pt file. Use a name such as whisper-tiny.en.pt")
        if not is_ctranslate2_folder(args.folder):
            raise InputError(f"{args.folder}: holds no model.bin. Use a folder of a Whisper in CTranslate2's format")
        check_writable(output.parent)
        dims, state = read_ctranslate2_folder(args.folder)
        build_whisper(dims, state, args.folder)  # raises for weights that make no Whisper
    write_whole(output, partial(torch.save, {"dims": dims, "model_state_dict": state}))
    logger.info("%s", output)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", help="folder with model.bin")
    parser.add_argument("output", help=".pt file to be written")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    set_up_logging(logger.name)
    run_script(main, parse_args)
