"""The toy setup's Whisper: its architecture with 5.7 M parameters, 5.0 M of them embedding, and a window of 3.8 s.

It is to hear what was spoken and not what is likely. So at first half of its clips are no sentences: random words,
spoken or put together from the codes of words, and speech with a word of noise in it, which is not in the transcript.
Then it goes on from the policy's samples (tiny/rollouts.py).
"""

import logging
import math
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from whisper.model import ModelDimensions, Whisper
from whisper.tokenizer import get_tokenizer

from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE
from speech.whisper_scorer import log_mel_spectrograms
from tiny.corpus import vocabulary
from tiny.train_codec import fit, new_optimizer, update
from tiny.voices import SPEAKERS

logger = logging.getLogger(__name__)

MEL_FRAMES_PER_SECOND = 100
WINDOW_FRAMES = 380  # 3.8 s; Whisper's encoder halves them
WINDOW_SAMPLES = WINDOW_FRAMES * SAMPLE_RATE // MEL_FRAMES_PER_SECOND
DIMENSIONS = ModelDimensions(
    n_mels=80,
    n_audio_ctx=WINDOW_FRAMES // 2,
    n_audio_state=96,
    n_audio_head=3,
    n_audio_layer=3,
    n_vocab=51_865,
    n_text_ctx=128,
    n_text_state=96,
    n_text_head=3,
    n_text_layer=2,
)
MAX_SHIFT_FRAMES = 40  # a rollout may begin with more silence than any training clip
MASK_FRAMES, MASK_BANDS = 12, 12  # the widest masked span of time, of two, and of frequency
MEL_NOISE = 0.05
BATCH = 256  # clips of one spectrogram batch
MIN_WORD_CODES = 8  # 0.16 s; what is left of a shorter word is not intelligible
PROPER_NAMES = {word.lower(): word for word in vocabulary() if word[0].isupper()}
RANDOM_CLIPS = 1_500
# Common words that are not in the grammar; many differ from one of its words in a sound or two.
OTHER_WORDS = (
    "about after again air arm around ask baby back bad ball band bank bath beach bean bed bell bird bite blame "
    "blow board body bone born bowl boy bread breath bright broom brown brush bus butter cake call came camp card "
    "cart cat chain chalk chance cheap check cheese child choke city class clean cloak close cloth cloud coal coat "
    "cold cook cool corn cost cough could cow cream crowd cry cup dance dark day deep desk dinner dish door double "
    "down dream dress drink drop dry dust each ear earth east easy edge egg else even every eye face fair fall fan "
    "far fast feel feet fight fill fine finger fire fish flag flight floor flower fly fold food foot force fork "
    "fresh front fruit full game gate gave girl give glass glove goat gone good grape grass gray great ground group "
    "grow hair half hand hard harp hat have head hear heart heat help hill hold hole home hope house how hurt ice "
    "inch ink iron join juice jump just kick kind king kite knee knock know lace lake large late laugh law lead "
    "leaf learn left leg lesson lift light lion list live long look loud love low lunch made make man many map mark "
    "meal mean meat milk mind miss mix money month moon more most mouse mouth move music nail name neck nest net "
    "nice noise nose note now oak ocean often oil page pain pair palm paper park part past path pay people phone "
    "pick pie piece pig pink pipe plan plane plant plate play please pocket point pool poor pot press price pull "
    "push queen quick race rain ran red rest rice ride right ring road rock roof room root rope rose rough round "
    "rule run sad safe sail salt sand save scale sea seat seed send shade shape share sharp sheep shell ship shoe "
    "shop short should shout show sick side sign sing sit size skin sky sleep slow small smell smile smoke snow "
    "soap soft some song soon sound soup south space speak speed spell spoon sport spring stage star start state "
    "stay step stone stop store storm story street strong sugar suit summer sun sure sweet swim tail talk tall tape "
    "taste tea tent test thank thin think throw tie time toast tool tooth top toy train tree trip truck true try "
    "turn use voice vote wait walk wall war warm watch water wave way week well went west wet what wheel where "
    "white who wide wild win wind wing winter wish wolf woman wood wool word work world worm yard year"
).split()


# --- The clips --------------------------------------------------------------------------------------------


def random_words(rng: random.Random) -> str:
    """Two to five words in any order, each of the grammar or another."""
    grammar = vocabulary()
    words = [rng.choice(grammar if rng.random() < 0.5 else OTHER_WORDS) for _ in range(rng.randint(2, 5))]
    words[0] = words[0].capitalize()
    return f"{' '.join(words)}."


def random_rows(seed: int) -> list[dict]:
    """RANDOM_CLIPS rows of random words as tiny/speak.py records them, in every voice in turn."""
    rng = random.Random(seed)
    fixed = {"form": "statement", "melody": "right", "split": "random"}
    return [
        {"id": f"random_{i:04d}", "text": random_words(rng), "speaker": SPEAKERS[i % len(SPEAKERS)], **fixed}
        for i in range(RANDOM_CLIPS)
    ]


class Word(NamedTuple):
    """One word of a clip: its text, and its codes."""

    text: str
    codes: list[int]


class WordClip(NamedTuple):
    """A clip as its words."""

    speaker: str
    words: list[Word]


def word_clip(row: dict, codes: list[int]) -> WordClip:
    """A clip cut into its words, halfway between the end of one and the start of the next.

    Args:
        row: of metadata.jsonl (tiny/speak.py), with the times of its words.
    """
    texts, starts, ends = zip(*row["words"], strict=True)
    middles = [(end + start) / 2 for end, start in zip(ends, starts[1:], strict=False)]
    cuts = [0, *(round(middle * CODES_PER_SECOND) for middle in middles), len(codes)]
    words = [Word(PROPER_NAMES.get(text, text), codes[cuts[i] : cuts[i + 1]]) for i, text in enumerate(texts)]
    return WordClip(row["speaker"], words)


def joined(words: list[Word]) -> tuple[str, list[int]]:
    """Text and codes of the words one after the other; a word without a text is not in it."""
    text = " ".join(word.text for word in words if word.text)
    return text and text[0].upper() + text[1:] + ".", [code for word in words for code in word.codes]


def spliced(clips: list[WordClip], count: int, rng: np.random.Generator) -> list[tuple[str, list[int]]]:
    """Texts and codes of two to six words in any order, one voice a clip."""
    spoken, speakers = words_by_speaker(clips), sorted({clip.speaker for clip in clips})
    made = []
    for _ in range(count):
        own = spoken[rng.choice(speakers)]
        made.append(joined([own[i] for i in rng.integers(len(own), size=rng.integers(2, 7))]))
    return made


def garbled(clips: list[WordClip], count: int, rng: np.random.Generator) -> list[tuple[str, list[int]]]:
    """Texts and codes of clips with one or two words replaced.

    By any other word of the voice, which the text then has; or by random codes, or by the word's own codes in reverse
    or in disorder, which the text lacks.
    """
    spoken = words_by_speaker(clips)
    used = np.concatenate([word.codes for clip in clips for word in clip.words])
    made = []
    for _ in range(count):
        speaker, words = clips[rng.integers(len(clips))]
        words = list(words)
        for i in rng.permutation(len(words))[: rng.integers(1, 3)]:
            own = words[i].codes
            kind = rng.integers(4)
            if kind == 0:
                words[i] = spoken[speaker][rng.integers(len(spoken[speaker]))]
            else:
                noise = [rng.choice(used, len(own)), own[::-1], rng.permutation(own)][kind - 1]
                words[i] = Word("", [int(code) for code in noise])
        made.append(joined(words))
    return made


def words_by_speaker(clips: list[WordClip]) -> dict[str, list[Word]]:
    """Those that are long enough to be cut out of a clip."""
    words = {}
    for clip in clips:
        words.setdefault(clip.speaker, []).extend(word for word in clip.words if len(word.codes) >= MIN_WORD_CODES)
    return words


def spectrograms(wavs: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Whisper's log-mel spectrograms of clips cut or padded to the window: (clips, 80, WINDOW_FRAMES), float16."""
    parts = []
    for first in range(0, len(wavs), BATCH):
        batch = [wav[:WINDOW_SAMPLES] for wav in wavs[first : first + BATCH]]
        padded = np.stack([np.pad(wav, (0, WINDOW_SAMPLES - len(wav))) for wav in batch])
        parts.append(log_mel_spectrograms(torch.tensor(padded, device=device).float(), 80).half())
    return torch.cat(parts)


# --- Training ---------------------------------------------------------------------------------------------


class CompactVocabulary:
    """Token ids ↔ rows of the small embedding; its last row is that of every unused token.

    The corpus uses few of the tokenizer's 51,865 tokens, and all others share one row of the embedding. Training has a
    vocabulary of the used tokens and that row, its logit raised by the logarithm of the number of tokens that share it
    (`log_unused`): exactly the full softmax with tied rows, at a fraction of the cost.
    """

    def __init__(self, texts: list[str]):
        tokenizer = get_tokenizer(multilingual=True, language="en", task="transcribe")
        self.prefix = list(tokenizer.sot_sequence_including_notimestamps)
        self.targets = [[*tokenizer.encode(" " + text), tokenizer.eot] for text in texts]
        self.used = sorted({*self.prefix, *(token for target in self.targets for token in target)})
        self.row = {token: row for row, token in enumerate(self.used)}
        self.log_unused = math.log(DIMENSIONS.n_vocab - len(self.used))

    def rows(self, tokens: list[int]) -> list[int]:
        return [self.row[token] for token in tokens]

    def compact(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `expand`, in single precision; the state may be of another vocabulary."""
        small = state["decoder.token_embedding.weight"][[*self.used, -1]]  # the last, a time stamp, is in no text
        return {k: v.float() for k, v in (state | {"decoder.token_embedding.weight": small}).items()}

    def expand(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The trained state dict with the full embedding, in half precision."""
        small = state["decoder.token_embedding.weight"]
        full = small[-1].repeat(DIMENSIONS.n_vocab, 1)
        full[self.used] = small[:-1]
        return {k: v.half() for k, v in (state | {"decoder.token_embedding.weight": full}).items()}


def augmented(mels: torch.Tensor) -> torch.Tensor:
    """Each spectrogram rolled in time, with spans of time and frequency masked, and with noise: (batch, 80, frames)."""
    batch, bands, frames = mels.shape
    device = mels.device

    def upto(limit: int) -> torch.Tensor:
        return torch.randint(limit, (batch, 1), device=device)

    time, band = torch.arange(frames, device=device), torch.arange(bands, device=device)
    rolled = (time - upto(MAX_SHIFT_FRAMES)) % frames
    mels = mels.gather(2, rolled[:, None].expand(-1, bands, -1))
    masked = span(band, upto(bands - MASK_BANDS), upto(MASK_BANDS))[:, :, None]
    for _ in range(2):
        masked = masked | span(time, upto(frames - MASK_FRAMES), upto(MASK_FRAMES))[:, None]
    floor = mels.amin(dim=(1, 2), keepdim=True)
    return torch.where(masked, floor, mels) + MEL_NOISE * torch.randn_like(mels)


def span(positions: torch.Tensor, first: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Which positions are in [first, first + width); (batch, positions)."""
    return (positions >= first) & (positions < first + width)


def train_whisper(
    mels: torch.Tensor,
    texts: list[str],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    max_seconds: float = math.inf,
    start: dict | None = None,
) -> dict:
    """Train on (spectrogram, text) pairs, where the spectrograms lie.

    Args:
        mels: (clips, 80, WINDOW_FRAMES), float16.
        texts: "" for a clip without an intelligible word.
        start: the checkpoint to go on from; None: random weights.
    Returns:
        A checkpoint as `whisper.load_model` reads it: {"dims", "model_state_dict"}, on the CPU.
    """
    torch.manual_seed(seed)
    device = mels.device
    vocabulary = CompactVocabulary([text for text in texts if text])
    dimensions = ModelDimensions(**{**vars(DIMENSIONS), "n_vocab": len(vocabulary.used) + 1})
    model = Whisper(dimensions)
    torch.nn.init.normal_(model.decoder.token_embedding.weight, std=0.02)
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.01)  # torch.empty otherwise
    if start is not None:
        model.load_state_dict(vocabulary.compact(start["model_state_dict"]))
    model.to(device)
    optimizer = new_optimizer(list(model.parameters()))
    prefix = vocabulary.rows(vocabulary.prefix)
    with_text = iter(vocabulary.targets)
    end_alone = vocabulary.targets[0][-1:]
    targets = [vocabulary.rows(next(with_text) if text else end_alone) for text in texts]
    longest = max(map(len, targets))
    inputs = torch.tensor([prefix + rows[:-1] + [0] * (longest - len(rows)) for rows in targets], device=device)
    labels = torch.tensor([rows + [-100] * (longest - len(rows)) for rows in targets], device=device)
    prior = F.pad(torch.zeros(len(vocabulary.used)), (0, 1), value=vocabulary.log_unused).to(device)

    def step() -> torch.Tensor:
        picked = torch.randint(len(texts), (batch_size,), device=device)
        encoded = model.encoder(augmented(mels[picked].float()))
        logits = model.decoder(inputs[picked], encoded)[:, len(prefix) - 1 :] + prior
        loss = F.cross_entropy(logits.flatten(0, 1), labels[picked].flatten())
        update(optimizer, loss)
        return loss.detach()[None]

    logger.info("whisper: %d clips, %d tokens in use", len(texts), len(vocabulary.used))
    fit("whisper", step, optimizer, learning_rate, steps, max_seconds)
    state = {name: values.cpu() for name, values in model.state_dict().items()}
    return {"dims": vars(DIMENSIONS), "model_state_dict": vocabulary.expand(state)}
