"""A Llasa checkpoint and how it is sampled: speech codes for a text, or a text for speech codes."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig

from common.batches import batches_by_length
from common.cli import InputError, library_errors_are_input, pick_device
from speech.adapters import Adapter, add_adapters, check_base
from speech.checkpoint_files import UNREADABLE, read_json
from speech.tokens import (
    CODES_PER_SECOND,
    MAX_LENGTH,
    TEXT_UNDERSTANDING_END,
    TEXT_UNDERSTANDING_START,
    SpeechTokens,
    prepare_model,
    prepare_tokenizer,
    prompt_ids,
    written_text,
)
from speech.weights import load_causal_lm

DEFAULT_CODEC = "HKUSTAudio/xcodec2"
MIN_ROOM = CODES_PER_SECOND  # a prompt must leave room for one second of speech, or as many tokens of text


@dataclass
class Sample:
    """A TTS rollout: its speech codes, and whether the context ran out before END."""

    codes: list[int]
    truncated: bool


@dataclass
class Transcript:
    """An ASR rollout: its text, and whether the limit came before END."""

    text: str
    truncated: bool


@dataclass
class Policy:
    """A Llasa checkpoint; in task "tts" it samples speech for `tts_prompt`s, in "asr" text for `asr_prompt`s."""

    model: torch.nn.Module
    tokenizer: object
    tokens: SpeechTokens
    task: str = "tts"

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str,
        device: str = "auto",
        dtype: torch.dtype | str = "auto",
        task: str = "tts",
        adapters: Sequence[Adapter] = (),
    ) -> "Policy":
        """Load a model folder, a LoRA adapter folder or a Hub id, ready to sample.

        Args:
            dtype: "auto" is bfloat16 on a GPU and float32 on a CPU.
            adapters: LoRAs of this model, which are added to its weights.
        Raises:
            InputError: no such model, or not a Llasa one; adapters that are of another.
        """
        device = pick_device(device)
        if dtype == "auto":
            dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        tokenizer, tokens = load_tokenizer(id_or_path, task)  # before the weights: a wrong model is known at once
        check_base(id_or_path, adapters)
        model = add_adapters(load_causal_lm(id_or_path, dtype=dtype), adapters)
        # The checkpoint's own sampling defaults (top_k 50, say) must not mix with the ones given here.
        model.generation_config = GenerationConfig()
        prepare_model(model, tokenizer, tokens, task)
        return cls(model.to(device).eval(), tokenizer, tokens, task)

    def turn_to(self, task: str) -> None:
        """Switch the same model to another task."""
        prepare_tokenizer(self.tokenizer, task)
        prepare_model(self.model, self.tokenizer, self.tokens, task)
        self.task = task

    def encode(
        self, prompts: list[list[dict[str, str]]], max_length: int = MAX_LENGTH, names: list[str] | None = None
    ) -> list[list[int]]:
        """Prompts to token ids.

        Args:
            names: of the prompts, for the message: clips cannot be told by their text.
        Raises:
            InputError: a prompt that leaves less than MIN_ROOM tokens of the context for its answer.
        """
        ids, limit = [prompt_ids(self.tokenizer, prompt) for prompt in prompts], self._limit(max_length)
        for i, row in enumerate(ids):
            if len(row) + MIN_ROOM > limit:
                name = f"{names[i]}: " if names else ""
                raise InputError(name + self._too_long(prompts[i], len(row), limit))
        return ids

    def _too_long(self, prompt: list[dict[str, str]], length: int, limit: int) -> str:
        raise_it = f"or raise --max_length as far as the model's context of {self._limit(2**62)} goes"
        if self.task == "asr":
            return (
                f"a clip is too long: its prompt takes {length} tokens ({CODES_PER_SECOND} codes a second) of {limit}, "
                f"which leaves no room for {MIN_ROOM} tokens of text. Cut the clip, {raise_it}"
            )
        text = prompt[-1]["content"].split(TEXT_UNDERSTANDING_START)[-1].removesuffix(TEXT_UNDERSTANDING_END)
        return (
            f"the text {text[:60]!r} … is too long: its prompt takes {length} tokens (voice prompt included) of "
            f"{limit}, which leaves no room for a second of speech ({MIN_ROOM} codes). Shorten or split it, shorten "
            f"the voice prompt, {raise_it}"
        )

    def sample(self, prompts: list[list[dict[str, str]]], *, temperature: float = 0.8, **options) -> list[Sample]:
        """One TTS rollout per prompt of `tts_prompt`; arguments and errors as for `answer`."""
        return in_order(self.samples_by_batch(prompts, temperature=temperature, **options))

    def samples_by_batch(
        self, prompts: list[list[dict[str, str]]], *, temperature: float = 0.8, **options
    ) -> Iterator[dict[int, Sample]]:
        """As `sample`, by the index of the prompt, one batch after the other; arguments of `answers_by_batch`."""
        assert self.task == "tts", "call turn_to('tts') first"
        for batch in self.answers_by_batch(prompts, temperature=temperature, **options):
            yield {i: Sample(*self.tokens.codes(ids)) for i, ids in batch.items()}

    def transcribe(
        self, prompts: list[list[dict[str, str]]], *, temperature: float = 0.0, **options
    ) -> list[Transcript]:
        """One ASR rollout per prompt of `asr_prompt`; arguments and errors as for `answer`."""
        return in_order(self.transcripts_by_batch(prompts, temperature=temperature, **options))

    def transcripts_by_batch(
        self, prompts: list[list[dict[str, str]]], *, temperature: float = 0.0, **options
    ) -> Iterator[dict[int, Transcript]]:
        """As `transcribe`, by the index of the prompt, one batch after the other; arguments of `answers_by_batch`."""
        assert self.task == "asr", "call turn_to('asr') first"
        for batch in self.answers_by_batch(prompts, temperature=temperature, **options):
            yield {
                i: Transcript(*written_text(self.tokenizer, ids, self.tokens.text_end_id)) for i, ids in batch.items()
            }

    def answer(self, prompts: list[list[dict[str, str]]], **options) -> list[list[int]]:
        """A completion of each prompt, in their order; arguments and errors of `answers_by_batch`."""
        return in_order(self.answers_by_batch(prompts, **options))

    def answers_by_batch(
        self,
        prompts: list[list[dict[str, str]]],
        *,
        temperature: float,
        top_p: float = 1.0,
        max_length: int = MAX_LENGTH,
        max_completion_length: int | None = None,
        batch_size: int = 16,
        progress: str | None = None,
        first_batch: int = 0,
    ) -> Iterator[dict[int, list[int]]]:
        """A completion of each prompt by its index, one batch after the other: token ids, END included where it came.

        Random where the temperature is not 0: call `transformers.set_seed` before. When a batch is yielded nothing has
        been drawn for the next one.

        Args:
            prompts: one may be repeated, for several rollouts of it.
            temperature: 0 is greedy.
            max_length: maximum number of tokens of prompt and answer together, at most the model's context.
            max_completion_length: maximum number of tokens of the answer alone; None: as many as fit.
            progress: label of a progress bar, which a terminal gets and a log file does not; None: no bar.
            first_batch: where to begin; the batches are the same in every run with the same prompts.
        Raises:
            InputError: a prompt too long for the context; nothing has been sampled then.
        """
        ids, limit = self.encode(prompts, max_length), self._limit(max_length)
        limits = [min(limit, len(row) + (max_completion_length or limit)) for row in ids]
        # Neighbours in length also end at about the same step
        batches = batches_by_length({i: len(row) for i, row in enumerate(ids)}, batch_size)
        bar = {"desc": progress, "disable": None if progress else True, "initial": first_batch, "total": len(batches)}
        for batch in tqdm(batches[first_batch:], **bar):
            completions = self._generate([ids[i] for i in batch], [limits[i] for i in batch], temperature, top_p)
            yield dict(zip(batch, completions, strict=True))

    def _limit(self, max_length: int) -> int:
        return min(max_length, self.model.config.max_position_embeddings)

    @torch.inference_mode()
    def _generate(self, ids: list[list[int]], limits: list[int], temperature: float, top_p: float) -> list[list[int]]:
        """Completion ids (END included, padding not) of one left-padded batch, prompt and completion within limits."""
        rows = [torch.tensor(row) for row in ids]
        pad_id = self.tokenizer.pad_token_id
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        room = [limit - len(row) for row, limit in zip(ids, limits, strict=True)]
        output = self.model.generate(
            input_ids=input_ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            # The shortest prompt may have the longest answer; the others are cut below, so that what a text
            # may take does not depend on its neighbours.
            max_new_tokens=max(room),
            eos_token_id=self.tokens.answer_end_id(self.task),
            pad_token_id=pad_id,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        completions = output[:, input_ids.shape[1] :].tolist()
        end_id = self.tokens.answer_end_id(self.task)
        answers = [completion[:most] for most, completion in zip(room, completions, strict=True)]
        return [answer[: answer.index(end_id) + 1] if end_id in answer else answer for answer in answers]


def in_order(batches: Iterator[dict[int, object]]) -> list:
    """What comes in batches, by its index, as one list."""
    whole = {i: item for batch in batches for i, item in batch.items()}
    return [whole[i] for i in range(len(whole))]


def load_tokenizer(id_or_path: str, task: str = "tts", revision: str | None = None) -> tuple[object, SpeechTokens]:
    """A model's tokenizer, ready for a task's prompts, and its speech tokens; InputError if it is not a Llasa's."""
    check_model_exists(id_or_path)
    with library_errors_are_input(f"{id_or_path}: the tokenizer cannot be loaded", *UNREADABLE, TemplateError):
        tokenizer = AutoTokenizer.from_pretrained(id_or_path, revision=revision)
        return tokenizer, prepare_tokenizer(tokenizer, task)


def check_model_exists(id_or_path: str) -> None:
    """Raises InputError for what is neither a model folder nor of the shape of a Hub id (owner/name)."""
    folder = Path(id_or_path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise InputError(
                f"{id_or_path}: no model in this folder: no config.json or adapter_config.json. Use one of train.py"
            )
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", id_or_path) or folder.parent.is_dir():
        raise InputError(
            f"no such model: {id_or_path!r}. Use a folder saved by train.py, tiny/llasa, or a Hub id "
            "such as HKUSTAudio/Llasa-1B-Multilingual"
        )


def recorded(model: str, key: str, default=None):
    """A setting of the run that trained the model: `key` ("codec_id", "whisper", "reward") of its run.json.

    `default` if there is none. A path that does not exist from the working directory is tried from the project's
    folder.
    """
    for folder in (Path(model), Path(model).parent):  # a checkpoint-N lies in its run's folder
        if (folder / "run.json").is_file():
            value = read_json(folder / "run.json").get(key)
            if isinstance(value, str):
                in_project = Path(__file__).parent.parent / value
                return str(in_project) if in_project.exists() and not Path(value).exists() else value
            if value:
                return value
    return default


def recorded_with_adapters(model: str, adapters: Sequence[Adapter], key: str, default=None):
    """`recorded` of a model, or else of the last of its adapters that has it: a hub's model has no run.json."""
    for adapter in adapters:
        default = recorded(adapter.folder, key, default)
    return recorded(model, key, default)


def reward_parameters(model: str) -> dict[str, float]:
    """Parameters of the Whisper reward that the model was trained with; {}, for the paper's, if it was not."""
    parameters = (recorded(model, "reward") or {}).get("whisper", {})
    return {key: value for key, value in parameters.items() if key != "weight"}
