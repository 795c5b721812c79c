"""Say texts with a Llasa checkpoint: text, and a voice prompt if there is one, to wav.

    python inference.py --model_name_or_path llasa-grpo-exp1 --text "…" --output sample.wav

One random seed serves the whole run, so the same command writes the same clips on the same machine; another
--batch_size draws others. Exit codes: 0 something was written; 1 nothing could be; 2 the input was wrong.

Differs from Llasa's model card: the policy is confined to speech codes and END (the distribution it was trained
on), and a voice prompt's own codes are never decoded, so the wav starts with the new text.
"""

import argparse
import json
import logging
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, set_seed

from audio import load_audio, save_audio
from cli import HelpFormatter, bad_input_exits, check_at_least, check_writable, first_line, pick_device
from speech_tokens import (
    CODES_PER_SECOND,
    TEXT_UNDERSTANDING_END,
    TEXT_UNDERSTANDING_START,
    SpeechTokens,
    prepare_model,
    prepare_tokenizer,
    prompt_ids,
    tts_prompt,
)

logger = logging.getLogger(__name__)

DEFAULT_CODEC = "HKUSTAudio/xcodec2"
DEFAULT_WHISPER = "large-v3"
MIN_ROOM = CODES_PER_SECOND  # a prompt must leave room for one second of speech


@dataclass
class Sample:
    """A rollout: its speech codes, and whether END came before the context ran out."""

    codes: list[int]
    ended: bool


@dataclass
class Policy:
    """A Llasa checkpoint that samples speech codes for the prompts of `tts_prompt`."""

    model: torch.nn.Module
    tokenizer: object
    tokens: SpeechTokens

    @classmethod
    def from_pretrained(cls, id_or_path: str, device: str = "auto", dtype: torch.dtype | str = "auto") -> "Policy":
        """Load a model folder, a LoRA adapter folder or a Hub id, ready to sample.

        Args:
            dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
        Raises:
            ValueError: no such model, or not a Llasa one.
        """
        device = pick_device(device)
        if dtype == "auto":
            dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        tokenizer, tokens = load_tokenizer(id_or_path)  # before the weights: a wrong model is known at once
        try:
            model = AutoModelForCausalLM.from_pretrained(id_or_path, dtype=dtype)
        except OSError as error:  # what transformers raises for files that are not there
            raise ValueError(f"cannot load the model {id_or_path!r}: {first_line(error)}") from error
        # The checkpoint's own sampling defaults (top_k 50, say) must not mix with the ones given here.
        model.generation_config = GenerationConfig()
        prepare_model(model, tokenizer, tokens)
        return cls(model.to(device).eval(), tokenizer, tokens)

    def encode(self, prompts: list[list[dict[str, str]]], max_length: int = 2048) -> list[list[int]]:
        """Prompts to token ids.

        Raises:
            ValueError: a prompt that leaves less than a second of the context for its speech.
        """
        ids, limit = [prompt_ids(self.tokenizer, prompt) for prompt in prompts], self._limit(max_length)
        for prompt, row in zip(prompts, ids, strict=True):
            if len(row) + MIN_ROOM > limit:
                text = prompt[-1]["content"].split(TEXT_UNDERSTANDING_START)[-1].removesuffix(TEXT_UNDERSTANDING_END)
                raise ValueError(
                    f"the text {text[:60]!r} … is too long: its prompt takes {len(row)} tokens (voice prompt "
                    f"included) of {limit}, which leaves no room for a second of speech ({MIN_ROOM} codes). "
                    "Shorten or split it, shorten the voice prompt, or raise --max_length as far as the "
                    f"model's context of {self.model.config.max_position_embeddings} goes"
                )
        return ids

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[dict[str, str]]],
        *,
        temperature: float = 0.8,
        top_p: float = 1.0,
        max_length: int = 2048,
        batch_size: int = 16,
        progress: str | None = None,
    ) -> list[Sample]:
        """One rollout per prompt, in order. Random: call `transformers.set_seed` before.

        Args:
            prompts: from `tts_prompt`; a repeated one gives another rollout.
            temperature: 0 takes the likeliest code each time.
            max_length: tokens of prompt and speech together; the model's context caps it.
            progress: label of a progress bar.
        Raises:
            ValueError: a prompt too long for the context; nothing has been sampled then.
        """
        ids, limit = self.encode(prompts, max_length), self._limit(max_length)
        samples = [None] * len(ids)
        # Neighbours in length end at about the same step, so little is spent on padding.
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in trange(0, len(ids), batch_size, desc=progress, disable=progress is None):
            batch = by_length[start : start + batch_size]
            completions = self._generate([ids[i] for i in batch], limit, temperature, top_p)
            for i, completion in zip(batch, completions, strict=True):
                samples[i] = Sample(*self.tokens.codes(completion))
        return samples

    def _limit(self, max_length: int) -> int:
        return min(max_length, self.model.config.max_position_embeddings)

    def _generate(self, ids: list[list[int]], limit: int, temperature: float, top_p: float) -> list[list[int]]:
        """Completion ids (END included, padding not) of one left-padded batch."""
        rows = [torch.tensor(row) for row in ids]
        pad_id = self.tokenizer.pad_token_id
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            # The shortest prompt may speak for the longest; the others are cut below, so that what a text
            # may take does not depend on its neighbours.
            max_new_tokens=limit - min(map(len, ids)),
            eos_token_id=self.tokens.end_id,
            pad_token_id=pad_id,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        completions = output[:, input_ids.shape[1] :].tolist()
        return [completion[: limit - len(row)] for row, completion in zip(ids, completions, strict=True)]


def load_tokenizer(id_or_path: str) -> tuple[object, SpeechTokens]:
    """A model's tokenizer, ready for prompts, and where its codes are; ValueError if it is not a Llasa's."""
    check_model_exists(id_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(id_or_path)
    except OSError as error:
        raise ValueError(f"cannot load the tokenizer of {id_or_path!r}: {first_line(error)}") from error
    return tokenizer, prepare_tokenizer(tokenizer)


def check_model_exists(id_or_path: str) -> None:
    """Raise ValueError for what is neither a model folder nor of the shape of a Hub id (owner/name)."""
    folder = Path(id_or_path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"{id_or_path}: no model in this folder: it has no config.json or adapter_config.json")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", id_or_path) or folder.parent.is_dir():
        raise ValueError(
            f"no such model: {id_or_path!r}. Give a folder saved by train.py, tiny/llasa, or a Hub id "
            "such as HKUSTAudio/Llasa-1B-Multilingual"
        )


def recorded(model: str, key: str, default: str) -> str:
    """What the model's run was made with: `key` ("codec_id", "whisper") of its run.json, else `default`.

    A path that is not there from the working directory is tried from the project's folder.
    """
    for folder in (Path(model), Path(model).parent):  # a checkpoint-N lies in its run's folder
        if (folder / "run.json").is_file():
            value = json.loads((folder / "run.json").read_text(encoding="utf-8")).get(key)
            if value:
                ours = Path(__file__).parent / value
                return str(ours) if ours.exists() and not Path(value).exists() else value
    return default


def check_codebook(tokens: SpeechTokens, codec) -> None:
    if tokens.num_codes != codec.codebook_size:
        raise ValueError(
            f"the policy has {tokens.num_codes} speech codes and the codec {codec.codebook_size}: "
            "they do not belong together; give the policy's codec with --codec_id"
        )


def decode_samples(codec, samples: list[Sample]) -> list[np.ndarray]:
    """Rollouts to float32 waveforms at 16 kHz, in order; one without codes has no samples, shape (0,)."""
    spoken = [sample.codes for sample in samples if sample.codes]
    wavs = iter(codec.decode(spoken) if spoken else [])
    return [next(wavs) if sample.codes else np.zeros(0, np.float32) for sample in samples]


def whisper_rewards(
    scorer, samples: list[Sample], wavs: list[np.ndarray], texts: list[str], languages: list[str]
) -> list[float]:
    """The reward that GRPO optimises and best-of-N picks by: R of each clip, 0 for one that failed or never ended."""
    from reward_whisper import harmonic_mean, nll_reward, wer_reward

    scores = scorer.score(wavs, texts, languages)
    return [
        harmonic_mean(wer_reward(score.wer), nll_reward(score.nll)) if sample.ended and not score.failure else 0.0
        for sample, score in zip(samples, scores, strict=True)
    ]


def best_of(rewards: list[float], n: int) -> list[int]:
    """Index of the highest reward of each n in a row (the first, where several are)."""
    return [start + int(np.argmax(rewards[start : start + n])) for start in range(0, len(rewards), n)]


def read_text(path: str) -> str:
    """A UTF-8 file, or stdin for "-"."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; give a UTF-8 text file, or - for stdin") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}); give a UTF-8 text file") from error


def read_texts(args: argparse.Namespace) -> list[str]:
    """The texts of --text, or the lines of --text_file that are not blank."""
    if args.text is not None:
        return args.text
    texts = [line.strip() for line in read_text(args.text_file).splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"{args.text_file}: no text in it; give one text a line")
    return texts


def output_paths(output: str, num_texts: int, num_samples: int) -> list[Path]:
    """Where the clips go, text by text; the rule is the help of --output."""
    path = Path(output)
    if path.suffix.lower() != ".wav":
        path = path / "sample.wav"
        numbered = True
    else:
        numbered = num_texts * num_samples > 1
    if not numbered:
        return [path]
    return [
        path.with_name(f"{path.stem}_{text:03d}" + (f"_{k}" if num_samples > 1 else "") + path.suffix)
        for text in range(num_texts)
        for k in range(num_samples)
    ]


def check_sampling(temperatures: list[float], top_p: float) -> None:
    for temperature in temperatures:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"--temperature {temperature}: give 0 (the likeliest code) or more; 0.8 is usual")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top_p {top_p}: give a share in (0, 1]; 1 samples from every code")


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, num_samples=1, best_of=1, batch_size=1, max_length=1)
    check_sampling([args.temperature], args.top_p)
    if (args.ref_audio is None) != (args.ref_text is None):
        raise ValueError(
            "a voice prompt needs both --ref_audio and --ref_text (what is said in it); only "
            f"{'--ref_audio' if args.ref_text is None else '--ref_text'} was given"
        )


def write_clips(paths: list[Path], texts: list[str], samples: list[Sample], wavs: list[np.ndarray]) -> int:
    """Write every clip that has sound and say what is wrong with the others; the number written."""
    written = 0
    for path, text, sample, wav in zip(paths, texts, samples, wavs, strict=True):
        if not len(wav):
            logger.warning("%s: empty, not written: the policy ended without a code: %r", path, text)
            continue
        if not sample.ended:
            logger.warning("%s: never ended, cut where the context did: %r", path, text)
        save_audio(path, wav)
        logger.info("%s  %.2f s  %r", path, len(sample.codes) / CODES_PER_SECOND, text)
        written += 1
    return written


def main(args: argparse.Namespace) -> None:
    from speech_codec import SpeechCodec  # here: --help and bad input need not wait for it

    with bad_input_exits():
        check_args(args)
        texts = read_texts(args)
        for text in texts:
            tts_prompt(text)
        ref_wav = load_audio(args.ref_audio) if args.ref_audio else None
        paths = output_paths(args.output, len(texts), args.num_samples)
        check_writable(paths[0].parent)

        device = pick_device(args.device)
        policy = Policy.from_pretrained(args.model_name_or_path, device)
        codec_id = args.codec_id or recorded(args.model_name_or_path, "codec_id", DEFAULT_CODEC)
        codec = SpeechCodec.from_pretrained(codec_id, device)
        check_codebook(policy.tokens, codec)
        ref_codes = None if ref_wav is None else codec.encode([ref_wav])[0]
        prompts = [tts_prompt(text, args.ref_text, ref_codes) for text in texts]
        policy.encode(prompts, args.max_length)  # a text too long is known before Whisper is loaded
        scorer = None
        if args.best_of > 1:
            from reward_whisper import WhisperScorer

            whisper = args.whisper or recorded(args.model_name_or_path, "whisper", DEFAULT_WHISPER)
            scorer = WhisperScorer(whisper, device)

    set_seed(args.seed)
    times = args.num_samples * args.best_of
    samples = policy.sample(
        [prompt for prompt in prompts for _ in range(times)],
        temperature=args.temperature,
        top_p=args.top_p,
        max_length=args.max_length,
        batch_size=args.batch_size,
        progress="sampling",
    )
    wavs = decode_samples(codec, samples)
    if scorer is not None:
        repeated = [text for text in texts for _ in range(times)]
        rewards = whisper_rewards(scorer, samples, wavs, repeated, [args.language] * len(repeated))
        kept = best_of(rewards, args.best_of)
        samples, wavs = [samples[i] for i in kept], [wavs[i] for i in kept]
    clip_texts = [text for text in texts for _ in range(args.num_samples)]
    if not write_clips(paths, clip_texts, samples, wavs):
        logger.error("nothing was written: no clip has sound")
        sys.exit(1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="folder saved by train.py (LoRA too), or a Hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", action="append", help="what to say; may be given several times")
    source.add_argument("--text_file", help="a UTF-8 file with one text a line; - is stdin")
    add(
        "--output",
        default="sample.wav",
        help="a .wav file; several clips are numbered from it, text by text: sample_000.wav, sample_001.wav, "
        "with --num_samples sample_000_0.wav, sample_000_1.wav. Anything else is a folder for such clips",
    )
    add("--ref_audio", help="voice prompt: the clip to speak like (wav, flac, ogg, mp3)")
    add("--ref_text", help="voice prompt: what is said in --ref_audio")
    add("--num_samples", type=int, default=1, help="clips per text")
    add("--best_of", type=int, default=1, help="draw so many for each clip and keep Whisper's favourite")
    add("--temperature", type=float, default=0.8, help="of sampling; 0 takes the likeliest code")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest codes that make up this share")
    add("--max_length", type=int, default=2048, help="tokens of prompt and speech together")
    add("--seed", type=int, default=0, help="of sampling")
    add("--batch_size", type=int, default=16, help="clips sampled at a time")
    add("--device", default="auto", help="auto is a GPU where there is one")
    add("--language", default="en", help="of the texts, for --best_of")
    add("--codec_id", help=f"default: what the model's run.json says, else {DEFAULT_CODEC}")
    add("--whisper", help=f"for --best_of; default: what the model's run.json says, else {DEFAULT_WHISPER}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    main(parse_args())
