"""The page of a blind listening test, and its key.

The page is one file that works from disk: clips, texts and the script that plays them. Which clip is which stands in
the key alone, a JSON Lines file beside the page that listeners do not get.
"""

import json
import random
from pathlib import Path

import numpy as np

from common.run_record import short_digest
from metrics.degraded_copies import DEGRADATIONS
from metrics.html_page import data_uri
from metrics.listening_pairs import Clip, ClipPair
from metrics.result_files import FULL_SCALE
from speech.audio import load_audio, wav_bytes

TEMPLATE = Path(__file__).with_suffix(".html")
SIDES = ("A", "B")
NO_DIFFERENCE = "none"
LEVEL = 10 ** (-26 / 20)  # RMS, -26 dB of full scale: ITU-T P.56's usual level; of two clips the louder one is liked
MAX_PEAK = 0.99


def build(pairs: list[ClipPair], question: str, seed: int) -> tuple[str, list[dict]]:
    """The page, and the rows of its key.

    Pairs come in a random order, the sides of each at random, under random ids; nothing on the page but the sound
    tells a planted pair, or a clip, from another.

    Args:
        pairs: those to ask about, and the planted ones.
        seed: of the order, the sides, the ids and the degraded copies.
    Returns:
        The HTML, and a row of the key per pair on the page: "page" (an id of the page), "item" (the pair's id on the
        page), "id", "text", "clips" (A and B), "better" ("A" or "B" of a planted pair, else null), "ref_text" and
        "ref_codes" if there is a voice prompt, "speaker" if it is known.
    """
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    names = rng.sample(range(16**8), len(pairs))
    items, key = [], []
    for pair, number in zip(rng.sample(pairs, len(pairs)), names, strict=True):
        order = rng.choice([(0, 1), (1, 0)])
        item = f"{number:08x}"
        sounds = [wav_bytes(dithered(at_level(sound_of(pair.clips[side], noise)), noise)) for side in order]
        items.append({"item": item, "text": pair.text, "clips": [data_uri("audio/wav", sound) for sound in sounds]})
        key.append(
            {
                "item": item,
                "id": pair.id,
                "text": pair.text,
                "clips": [vars(pair.clips[side]) for side in order],
                "better": None if pair.better is None else SIDES[order.index(pair.better)],
                "ref_text": pair.ref_text,
                "ref_codes": pair.ref_codes,
                "speaker": pair.speaker,
            }
        )
    page = short_digest([question, *items])
    test = {"page": page, "question": question, "items": items}
    html = TEMPLATE.read_text(encoding="utf-8").replace("{{DATA}}", json_in_html(test))
    return html, [{"page": page, **row} for row in key]


def sound_of(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    wav = load_audio(clip.audio)
    return DEGRADATIONS[clip.degraded](wav, rng) if clip.degraded else wav


def at_level(wav: np.ndarray) -> np.ndarray:
    """The clip at `LEVEL`, or as near to it as its peaks allow; silence as it is."""
    rms, peak = np.sqrt(np.mean(np.square(wav, dtype=np.float64))), np.abs(wav).max()
    return wav * min(LEVEL / rms, MAX_PEAK / peak) if rms > 0 else wav


def dithered(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With noise of half a 16-bit step: a clip that is on the page twice, once as asked about and once as the better
    side of a planted pair, is not told by its bytes."""
    return wav + rng.uniform(-0.5, 0.5, len(wav)) / FULL_SCALE


def json_in_html(value: dict) -> str:
    """JSON that may stand in a <script>: a text with </script> or <!-- cannot end it."""
    text = json.dumps(value, ensure_ascii=False)
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")
