"""Held-out texts to synthesize, from .txt, .jsonl and seed-tts-eval's .lst files."""

import json
from dataclasses import dataclass
from pathlib import Path

from common.cli import InputError, read_text
from speech.error_rate import CER_LANGUAGES, error_rate, language_code
from speech.tokens import tts_prompt


@dataclass(frozen=True)
class Item:
    """A text to say; `ref_audio` and `ref_text` are its voice prompt, `audio` a natural reading of it."""

    id: str
    text: str
    language: str
    ref_audio: str | None = None
    ref_text: str | None = None
    audio: str | None = None


def read_items(path: str, language: str) -> list[Item]:
    """The items of a .txt, .jsonl or .lst file, checked; audio paths start beside the file.

    Args:
        language: of the items that do not say.
    Raises:
        ValueError: names the file, the line, and what is wrong with it.
    """
    parsers = {".txt": lambda line: {"text": line}, ".jsonl": _parse_json, ".lst": _parse_meta}
    parse = parsers.get(Path(path).suffix.lower())
    if parse is None:
        raise InputError(f"{path}: give texts as {', '.join(parsers)}; see evaluation.py --help")
    items = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            try:
                items.append(_item(parse(line), str(number), language, Path(path).parent))
            except ValueError as error:
                raise InputError(f"{path}, line {number}: {error}") from error
    if not items:
        raise InputError(f"{path}: no text in it")
    return items


def _parse_json(line: str) -> dict[str, str]:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise InputError(f'expected an object such as {{"text": "…"}}, got {line[:60]}')
    return fields


def _parse_meta(line: str) -> dict[str, str]:
    fields = line.rstrip("\n").split("|")
    if len(fields) not in (4, 5):
        raise InputError(f"expected id|ref_text|ref_audio|text, with |audio or without, got {line[:60]!r}")
    return dict(zip(("id", "ref_text", "ref_audio", "text", "audio"), fields, strict=False))


def _item(fields: dict[str, str], default_id: str, language: str, folder: Path) -> Item:
    if not isinstance(fields.get("text"), str):
        raise InputError(f"a row without text; it has: {', '.join(fields) or 'nothing'}")
    values = {key: fields.get(key) or None for key in ("ref_audio", "ref_text", "audio")}
    values["audio"] = values["audio"] or fields.get("file_name")  # an audiofolder's metadata.jsonl calls it so
    for key in ("ref_audio", "audio"):
        if values[key]:
            values[key] = str(folder / values[key])
            if not Path(values[key]).is_file():
                raise InputError(f"{key} {values[key]}: no such file")
    item = Item(
        str(fields.get("id") or default_id), fields["text"].strip(), fields.get("language") or language, **values
    )
    tts_prompt(item.text, item.ref_text, None if item.ref_audio is None else [])  # half a voice prompt, …
    error_rate(item.text, "", item.language)  # an unknown language, nothing left to score
    return item


def units_of(items: list[Item]) -> str:
    """ "words" or "characters": what the error rate of these texts counts."""
    kinds = {language_code(item.language) in CER_LANGUAGES for item in items}
    if len(kinds) > 1:
        raise InputError("the texts mix languages scored by words and by characters; evaluate them apart")
    return "characters" if kinds.pop() else "words"


def num_units(item: Item) -> int:
    """Words as written (the normaliser would make one of "twenty five"), or characters."""
    by_characters = language_code(item.language) in CER_LANGUAGES
    return error_rate(item.text, "", item.language).ref_length if by_characters else len(item.text.split())
