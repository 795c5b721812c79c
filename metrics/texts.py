"""Held-out texts to synthesize, from .txt, .jsonl and seed-tts-eval's .lst files."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.cli import InputError, check_unicode, read_lines
from speech.error_rate import CER_LANGUAGES, check_reference_text, error_rate, language_code
from speech.tokens import tts_prompt


@dataclass(frozen=True)
class Item:
    """A text to synthesize.

    Attributes:
        ref_audio, ref_text: path and transcript of its voice prompt; both or neither.
        audio: path of a natural reading of the text.
    """

    id: str
    text: str
    language: str
    ref_audio: str | None = None
    ref_text: str | None = None
    audio: str | None = None


def read_items(path: str, language: str) -> list[Item]:
    """The items of a .txt, .jsonl or .lst file, checked; relative audio paths start beside the file.

    Args:
        language: of items without one of their own.
    Raises:
        InputError: names the file, the line, and what is wrong with it.
    """
    parsers = {".txt": lambda line: {"text": line}, ".jsonl": parse_json, ".lst": _parse_meta}
    suffix = Path(path).suffix.lower()
    if suffix not in parsers:
        accepted = ", ".join(parsers)
        raise InputError(f"{path}: not a file of texts (got {suffix!r}). Use {accepted}; see evaluation.py --help")
    items = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            item = _item(parsers[suffix](line), str(number), language, Path(path).parent)
            check_item(item)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from error
        items.append(item)
    if not items:
        raise InputError(f"{path}: no text in the file. Add at least one line")
    return items


def parse_json(line: str) -> dict:
    """A line of JSON Lines; InputError if it is no object."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise InputError(f'expected an object such as {{"text": "…"}} (got {line[:60]})')
    check_unicode(json.dumps(fields, ensure_ascii=False))
    return fields


def _parse_meta(line: str) -> dict[str, str]:
    fields = line.rstrip("\n").split("|")
    if len(fields) not in (4, 5):
        raise InputError(f"expected id|ref_text|ref_audio|text, |audio is optional (got {line[:60]!r})")
    return dict(zip(("id", "ref_text", "ref_audio", "text", "audio"), fields, strict=False))


def _item(fields: dict[str, str], default_id: str, language: str, folder: Path) -> Item:
    if not isinstance(fields.get("text"), str):
        raise InputError(f'no text in this row (got {", ".join(fields) or "nothing"}). Add a "text"')
    for name in ("language", "ref_text", "ref_audio", "audio", "file_name"):
        if not isinstance(fields.get(name), str | None):
            raise InputError(f"{name} must be text (got {fields[name]!r}). Correct the row")
    audio = fields.get("audio") or fields.get("file_name")  # an audiofolder's metadata.jsonl calls it file_name
    ref_audio = fields.get("ref_audio")
    return Item(
        id=str(fields.get("id") or default_id),
        text=fields["text"].strip(),
        language=fields.get("language") or language,
        ref_audio=str(folder / ref_audio) if ref_audio else None,
        ref_text=fields.get("ref_text") or None,
        audio=str(folder / audio) if audio else None,
    )


def check_item(item: Item) -> None:
    """Raises InputError where a file is missing, no prompt can be built of the item, or its text cannot be scored."""
    for name, path in (("ref_audio", item.ref_audio), ("audio", item.audio)):
        if path is not None and not Path(path).is_file():
            raise InputError(f"{name} {path}: no such file. Paths start beside the file of the texts")
    if (item.ref_audio is None) != (item.ref_text is None):
        missing = "ref_text" if item.ref_text is None else "ref_audio"
        raise InputError(f"a voice prompt needs both ref_audio and ref_text. Add {missing}, or leave both out")
    # What a prompt may contain is known to `tts_prompt` alone; the codes of the voice prompt do not matter to it.
    tts_prompt(item.text, item.ref_text, ref_codes=None if item.ref_text is None else [])
    check_reference_text(item.text, item.language)


def units_of(languages: Iterable[str], source: str = "--texts") -> str:
    """ "words" or "characters": what the error rate of texts in these languages counts.

    Args:
        source: of the texts, for the message.
    Raises:
        InputError: languages of both kinds.
    """
    codes = sorted({language_code(language) for language in languages})
    by_characters = {code in CER_LANGUAGES for code in codes}
    if len(by_characters) > 1:
        raise InputError(
            f"{source}: languages scored by words and by characters are mixed (got {', '.join(codes)}). Evaluate them "
            "in separate runs"
        )
    return "characters" if by_characters.pop() else "words"


def num_units(item: Item) -> int:
    """Words as written (the normaliser would make one of "twenty five"), not the ? of "Tu viens ?"; or characters."""
    if language_code(item.language) in CER_LANGUAGES:
        return error_rate(item.text, "", item.language).ref_length
    return sum(bool(re.search(r"\w", word)) for word in item.text.split())
