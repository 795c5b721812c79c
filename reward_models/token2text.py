"""P(text | speech codes): intelligibility of codes without codec or Whisper, and differentiable in the codes.

The reward model of DiffRO (arXiv 2507.05911). It takes the *embeddings* of codes, so a row of the probability simplex
over the codebook is as good an input as a code. train_token2text.py trains one; tiny/token2text is a small one.

The model is a T5: its relative positions take speech of any length, and its pre-norm layers train a small model within
minutes. The layers are transformers' own; around them are the embedding of the codes, a convolution that halves 50
codes per second to 25 states, and the heads.

Differs from the paper: there it is SenseVoice with an embedding layer as front-end, trained on 13,000 hours. The
attention-pooled heads of its multi-task reward (MTR) are available for any column of labels in the training data.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from common.batches import batches_by_length
from common.cli import InputError, library_errors_are_input
from reward_whisper import nll_reward
from speech.checkpoint_files import UNREADABLE
from speech.error_rate import check_reference_text, normalize_text
from speech.weights import check_finite
from speech.whisper_scorer import MAX_NLL

PAD, END = 0, 1  # ids in the text vocabulary; PAD is also the decoder's start token, and CTC's blank
IGNORED = -100  # label after a text's end
CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE = "config.json", "tokenizer.json", "model.safetensors"
BATCH_SIZE = 32  # rollouts scored at a time


def new_text_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE trained on normalised texts; it can encode any text.

    Args:
        texts: normalised.
        vocab_size: two special tokens, 256 bytes, and merges for the rest.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _read_tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{file}: cannot be read as a tokenizer: {error}. Use train_token2text.py's own") from error


class Token2Text(nn.Module):
    """An encoder–decoder from codes to text, with a classifier head for each column of labels.

    Args:
        config: {"num_codes": size of the codebook, "labels": {column: its values}, "t5": settings of T5Config}.
        tokenizer: for normalised text, from `new_text_tokenizer`.
    """

    def __init__(self, config: dict, tokenizer: Tokenizer):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        special = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": PAD}
        shape = {"vocab_size": tokenizer.get_vocab_size(), "feed_forward_proj": "gated-gelu"}
        self.t5 = T5ForConditionalGeneration(T5Config(**special, **shape, **config["t5"]))
        width = self.t5.config.d_model
        self.embedding = nn.Embedding(config["num_codes"], width)
        self.halve = nn.Conv1d(width, width, kernel_size=5, stride=2, padding=2)
        self.ctc = nn.Linear(width, tokenizer.get_vocab_size())
        self.pooling = nn.ModuleDict({column: nn.Linear(width, 1) for column in config["labels"]})
        self.heads = nn.ModuleDict({column: nn.Linear(width, len(v)) for column, v in config["labels"].items()})

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Token2Text":
        """A saved model in float32, in evaluation mode, with frozen weights.

        Raises:
            InputError: the folder holds no such model.
        """
        folder = Path(folder)
        missing = [name for name in (CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"{folder}: not a token-to-text model, it lacks {', '.join(missing)}. Train one with "
                "train_token2text.py, or use tiny/token2text"
            )
        with library_errors_are_input(f"{folder}: the token-to-text model cannot be loaded", *UNREADABLE):
            config = json.loads((folder / CONFIG_FILE).read_text())
            missing = [key for key in ("num_codes", "labels", "t5") if key not in config]
            if missing:
                raise InputError(f"{folder / CONFIG_FILE}: lacks {', '.join(missing)}. Use train_token2text.py's own")
            model = cls(config, _read_tokenizer(folder / TOKENIZER_FILE))
            load_model(model, folder / WEIGHTS_FILE)  # strict: all weights, and no others
        check_finite(str(folder), model)
        return model.to(device).eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in half precision; the weights in memory stay as they are."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")
        self.tokenizer.save(str(folder / TOKENIZER_FILE), pretty=False)
        half = Token2Text(self.config, self.tokenizer).half()
        half.load_state_dict(self.state_dict())
        save_model(half, str(folder / WEIGHTS_FILE))

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def check_codebook(self, num_codes: int) -> None:
        """Raises InputError where the policy's codebook has another size than this model's."""
        if self.config["num_codes"] != num_codes:
            raise InputError(
                f"the token-to-text model has {self.config['num_codes']} codes and the policy has {num_codes}. Use a "
                "token-to-text model trained on the codes of the policy's codec"
            )

    # --- Inputs -------------------------------------------------------------------------------------------

    def pad(self, codes: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ragged codes as a tensor and its mask, both (batch, time).

        Raises:
            ValueError: an item without codes; the caller decides what an empty rollout is worth.
            InputError: a code outside the codebook.
        """
        for index, item in enumerate(codes):
            if not len(item):
                raise ValueError(f"item {index} has no codes; the caller decides what an empty rollout is worth")
            if not 0 <= min(item) <= max(item) < self.config["num_codes"]:
                raise InputError(
                    f"item {index}: codes must be in [0, {self.config['num_codes']}) for this token-to-text model (got "
                    f"{min(item)} to {max(item)}): they come from another codec. Use the codec it was trained with"
                )
        rows = [torch.tensor(item, device=self.device) for item in codes]
        padded = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(item) for item in codes], device=self.device)
        return padded, torch.arange(padded.shape[1], device=self.device) < lengths[:, None]

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (batch, time), or soft codes (batch, time, num_codes) whose rows sum to 1: (batch, time, width)."""
        return codes @ self.embedding.weight if codes.is_floating_point() else self.embedding(codes)

    def text_ids(self, texts: list[str], languages: list[str]) -> torch.Tensor:
        """Targets of the decoder: ids of the texts, normalised as for the error rate, each followed by END.

        Returns:
            Shape (batch, tokens), IGNORED after each END.
        Raises:
            InputError: nothing is left of a text after normalisation, or an unknown language.
        """
        rows = []
        for text, language in zip(texts, languages, strict=True):
            check_reference_text(text, language)
            ids = self.tokenizer.encode(normalize_text(text, language)).ids
            rows.append(torch.tensor([*ids, END], device=self.device))
        return pad_sequence(rows, batch_first=True, padding_value=IGNORED)

    def label_ids(self, column: str, values: list) -> torch.Tensor:
        """Indices of labels, shape (batch,); InputError for a column or a value that is not in the training data."""
        known = self.config["labels"].get(column)
        if known is None:
            heads = ", ".join(self.config["labels"]) or "none"
            raise InputError(f"this token-to-text model has no head for {column!r}; it has: {heads}")
        for value in values:
            if str(value) not in known:
                raise InputError(f"{column}: {value!r} was not among the labels in training. Known: {', '.join(known)}")
        return torch.tensor([known.index(str(value)) for value in values], device=self.device)

    # --- Outputs ------------------------------------------------------------------------------------------

    def encode(self, embeddings: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States of embedded codes; equal to encoding each item alone.

        Args:
            embeddings: (batch, time, width), from `embed`.
            mask: (batch, time), True where there is a code; padding only after an item's last code.
        Returns:
            States (batch, ⌈time / 2⌉, width), 25 per second, and their mask.
        """
        halved = F.gelu(self.halve((embeddings * mask[..., None]).mT)).mT
        mask = mask[:, ::2]
        return self.t5.encoder(inputs_embeds=halved, attention_mask=mask.long()).last_hidden_state, mask

    def text_logits(self, states: torch.Tensor, mask: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits of the text, shape (batch, tokens, vocabulary)."""
        inputs = self.t5.prepare_decoder_input_ids_from_labels(labels=text_ids)
        return self.t5(encoder_outputs=(states,), attention_mask=mask.long(), decoder_input_ids=inputs).logits

    def text_log_probs(self, states: torch.Tensor, mask: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
        """Mean log P of each text's tokens, END included: shape (batch,), in nats, at most 0."""
        logits = self.text_logits(states, mask, text_ids)
        nlls = F.cross_entropy(logits.flatten(0, 1), text_ids.flatten(), ignore_index=IGNORED, reduction="none")
        return -nlls.view(text_ids.shape).sum(1) / (text_ids != IGNORED).sum(1)

    def label_log_probs(self, states: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """log P of each label, by column, shape (batch, values); each from one attention-pooled state per item."""
        log_probs = {}
        for column, head in self.heads.items():
            weights = self.pooling[column](states).masked_fill(~mask[..., None], -torch.inf).softmax(1)
            log_probs[column] = head((weights * states).sum(1)).log_softmax(-1)
        return log_probs

    def log_prob(self, codes: list[list[int]], texts: list[str], languages: list[str]) -> torch.Tensor:
        """Mean log P of each text's tokens given the codes: shape (batch,).

        Args:
            codes: ragged.
            texts: as written; they are normalised as for the error rate.
            languages: Whisper's codes, one per text.
        """
        return self.text_log_probs(*self.encode(*self._embedded(codes)), self.text_ids(texts, languages))

    @torch.inference_mode()
    def score(self, codes: list[list[int]], texts: list[str], languages: list[str]) -> list[float]:
        """`log_prob` of any number of rollouts, in batches; −MAX_NLL for a rollout without codes."""
        scores = [-MAX_NLL] * len(codes)
        lengths = {i: len(item) for i, item in enumerate(codes) if len(item)}
        for batch in batches_by_length(lengths, BATCH_SIZE):
            log_probs = self.log_prob(
                [codes[i] for i in batch], [texts[i] for i in batch], [languages[i] for i in batch]
            )
            for i, log_prob in zip(batch, log_probs.tolist(), strict=True):
                scores[i] = max(log_prob, -MAX_NLL)
        return scores

    @torch.inference_mode()
    def transcribe(self, codes: list[list[int]]) -> list[str]:
        """Transcripts of the codes, normalised, by greedy decoding; at most one token per state."""
        states, mask = self.encode(*self._embedded(codes))
        generated = self.t5.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask.long(),
            max_new_tokens=states.shape[1],
            do_sample=False,
        )
        hyps = []
        for ids, length in zip(generated.tolist(), mask.sum(1).tolist(), strict=True):
            hyp_ids = ids[1 : 1 + length]  # without the decoder's start token
            if END in hyp_ids:
                hyp_ids = hyp_ids[: hyp_ids.index(END)]
            hyps.append(self.tokenizer.decode([token for token in hyp_ids if token != PAD]).strip())
        return hyps

    @torch.inference_mode()
    def labels(self, codes: list[list[int]]) -> dict[str, list[str]]:
        """The likeliest label of each item, by column."""
        log_probs = self.label_log_probs(*self.encode(*self._embedded(codes)))
        likeliest = {}
        for column, values in log_probs.items():
            names = self.config["labels"][column]
            likeliest[column] = [names[i] for i in values.argmax(-1).tolist()]
        return likeliest

    def _embedded(self, codes: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        padded, mask = self.pad(codes)
        return self.embed(padded), mask


class Token2TextReward:
    """exp(mean log P(text | codes) / alpha), in (0, 1]: `nll_reward` of the token-to-text model's NLL.

    The token-based R1 of arXiv 2509.18569, as the exponential of arXiv 2509.18798, so that one bad rollout does not
    stretch its group's deviation. Needs neither codec nor Whisper. A truncated rollout, or one without codes, earns 0.

    Args:
        rollout_scorer: a `SpeechRolloutScorer` with a token-to-text model.
        alpha: in nats; NLL 0.6 nats per token with alpha 3 is exp(−0.2) = 0.8187.
    Raises:
        InputError: an alpha that is not above 0.
    """

    __name__ = "token2text"
    needs = ("token2text",)

    def __init__(self, rollout_scorer, alpha: float = 3.0):
        if not 0 < alpha < math.inf:
            raise InputError(f"alpha: must be finite and > 0 (got {alpha})")
        self.rollout_scorer, self.alpha = rollout_scorer, alpha

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        items = zip(rollouts.text_log_probs, rollouts.truncated, rollouts.codes, strict=True)
        return [
            nll_reward(max(0.0, -log_prob), self.alpha) if codes and not truncated else 0.0
            for log_prob, truncated, codes in items
        ]
