"""P(text | speech codes): how well codes carry a text, without codec or Whisper, and differentiable in the codes.

The reward model of DiffRO (arXiv 2507.05911): it reads the *embeddings* of codes, so a row of the probability simplex
over the codebook is read as well as a code. train_token2text.py trains one; tiny/token2text ships.

T5, of the encoder–decoders in transformers: its positions are relative, so speech of any length can be read, and its
norms come first, so a small one trains in minutes. Each layer is transformers' own; around them stand the embedding of
the codes, a convolution that halves 50 codes a second to 25 states, and the heads.

Differs from the paper: there it is SenseVoice with an embedding layer for a front-end, trained on 13,000 hours. The
attention-pooled heads of its multi-task reward (MTR) are here for any column of labels that training was given.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from common.cli import InputError
from reward_whisper import nll_reward
from speech.error_rate import normalize_text
from speech.whisper_scorer import MAX_NLL

PAD, END = 0, 1  # ids in the text's vocabulary; PAD also opens the decoder, and is CTC's blank
IGNORED = -100  # labels beyond a text's end
FILES = ("config.json", "tokenizer.json", "model.safetensors")
BATCH_SIZE = 32  # rollouts that are scored at a time


def new_text_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE learnt from normalised texts: no text is foreign to it.

    Args:
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


class Token2Text(nn.Module):
    """An encoder–decoder from codes to text, with a head for each column of labels.

    Args:
        config: {"num_codes": size of the codebook, "labels": {column: its values}, "t5": settings of T5Config}.
        tokenizer: of normalised text; see `new_text_tokenizer`.
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
        """In float32, for evaluation, its weights frozen; ValueError for a folder that holds none."""
        folder = Path(folder)
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"{folder} is no token-to-text model, it lacks {', '.join(missing)}: train one with "
                "train_token2text.py, or give tiny/token2text"
            )
        model = cls(json.loads((folder / FILES[0]).read_text()), Tokenizer.from_file(str(folder / FILES[1])))
        load_model(model, folder / FILES[2])
        return model.to(device).eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """In half precision. The model itself is unchanged."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).write_text(json.dumps(self.config, indent=2) + "\n")
        self.tokenizer.save(str(folder / FILES[1]), pretty=False)
        half = Token2Text(self.config, self.tokenizer).half()
        half.load_state_dict(self.state_dict())
        save_model(half, str(folder / FILES[2]))

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def check_codebook(self, num_codes: int) -> None:
        """ValueError where a policy's codebook is another one."""
        if self.config["num_codes"] != num_codes:
            raise InputError(
                f"the token-to-text model reads {self.config['num_codes']} codes and the policy speaks {num_codes}: "
                "they do not belong together"
            )

    # --- What goes in -------------------------------------------------------------------------------------

    def pad(self, codes: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ragged codes as a tensor and its mask, both (batch, time).

        Raises:
            ValueError: an item without codes, which nothing can be read from, or a code outside the codebook.
        """
        for index, item in enumerate(codes):
            if not len(item):
                raise InputError(f"item {index} has no codes; the caller decides what silence is worth")
            if not 0 <= min(item) <= max(item) < self.config["num_codes"]:
                raise InputError(
                    f"item {index} holds codes from {min(item)} to {max(item)}, and this token-to-text model knows "
                    f"[0, {self.config['num_codes']}): they come from another codec"
                )
        rows = [torch.tensor(item, device=self.device) for item in codes]
        padded = pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(item) for item in codes], device=self.device)
        return padded, torch.arange(padded.shape[1], device=self.device) < lengths[:, None]

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes (batch, time), or soft codes (batch, time, num_codes) whose rows sum to 1: (batch, time, width)."""
        return codes @ self.embedding.weight if codes.is_floating_point() else self.embedding(codes)

    def text_ids(self, texts: list[str], languages: list[str]) -> torch.Tensor:
        """Labels of texts, normalised as the error rate does, END behind each: (batch, tokens), IGNORED after it."""
        normalized = [normalize_text(text, language) for text, language in zip(texts, languages, strict=True)]
        for text, words in zip(texts, normalized, strict=True):
            if not words:
                raise InputError(f"text {text!r} is empty after Whisper's normalisation: drop it from the data set")
        rows = [torch.tensor([*self.tokenizer.encode(words).ids, END], device=self.device) for words in normalized]
        return pad_sequence(rows, batch_first=True, padding_value=IGNORED)

    def label_ids(self, column: str, values: list) -> torch.Tensor:
        """Indices of labels, (batch,); ValueError for a column or a value that training has not seen."""
        known = self.config["labels"].get(column)
        if known is None:
            there = ", ".join(self.config["labels"]) or "none"
            raise InputError(f"this token-to-text model has no head for {column!r}; it has: {there}")
        for value in values:
            if str(value) not in known:
                raise InputError(f"{column}: {value!r} was not among the labels of training: {', '.join(known)}")
        return torch.tensor([known.index(str(value)) for value in values], device=self.device)

    # --- What comes out -----------------------------------------------------------------------------------

    def encode(self, embeddings: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States of embedded codes; equal to encoding each item alone.

        Args:
            embeddings: (batch, time, width), from `embed`.
            mask: (batch, time), True where there is a code; the codes of an item stand together, from the first on.
        Returns:
            states (batch, ⌈time / 2⌉, width), 25 a second, and their mask.
        """
        halved = F.gelu(self.halve((embeddings * mask[..., None]).mT)).mT
        mask = mask[:, ::2]
        return self.t5.encoder(inputs_embeds=halved, attention_mask=mask.long()).last_hidden_state, mask

    def text_logits(self, states: torch.Tensor, mask: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
        """Teacher-forced logits of the text, (batch, tokens, vocabulary)."""
        opening = self.t5.prepare_decoder_input_ids_from_labels(labels=text_ids)
        return self.t5(encoder_outputs=(states,), attention_mask=mask.long(), decoder_input_ids=opening).logits

    def text_log_probs(self, states: torch.Tensor, mask: torch.Tensor, text_ids: torch.Tensor) -> torch.Tensor:
        """Mean log P of each text's tokens, END included: (batch,), in nats, at most 0."""
        logits = self.text_logits(states, mask, text_ids)
        nlls = F.cross_entropy(logits.flatten(0, 1), text_ids.flatten(), ignore_index=IGNORED, reduction="none")
        return -nlls.view(text_ids.shape).sum(1) / (text_ids != IGNORED).sum(1)

    def label_log_probs(self, states: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """log P of each label, by column: (batch, values). One attention-pooled state an item and column."""
        found = {}
        for column, head in self.heads.items():
            weights = self.pooling[column](states).masked_fill(~mask[..., None], -torch.inf).softmax(1)
            found[column] = head((weights * states).sum(1)).log_softmax(-1)
        return found

    def log_prob(
        self,
        codes: list[list[int]] | torch.Tensor,
        texts: list[str],
        languages: list[str] | str = "en",
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean log P of each text's tokens given the codes: (batch,), differentiable in soft codes.

        Args:
            codes: ragged; or a tensor (batch, time) or (batch, time, num_codes), with its `mask` (batch, time).
            texts: as they are written; both sides are normalised as for the error rate.
            languages: Whisper's codes, one for all or one for each.
        """
        if not isinstance(codes, torch.Tensor):
            codes, mask = self.pad(codes)
        if mask is None:
            mask = torch.ones(codes.shape[:2], dtype=torch.bool, device=codes.device)
        states, mask = self.encode(self.embed(codes), mask)
        languages = [languages] * len(texts) if isinstance(languages, str) else languages
        return self.text_log_probs(states, mask, self.text_ids(texts, languages))

    @torch.inference_mode()
    def score(self, codes: list[list[int]], texts: list[str], languages: list[str] | str = "en") -> list[float]:
        """`log_prob` of any number of rollouts, in batches; −MAX_NLL for one without codes."""
        languages = [languages] * len(texts) if isinstance(languages, str) else languages
        scores = [-MAX_NLL] * len(codes)
        # By length, so that little is padded
        spoken = sorted((i for i, item in enumerate(codes) if len(item)), key=lambda i: len(codes[i]))
        for first in range(0, len(spoken), BATCH_SIZE):
            picked = spoken[first : first + BATCH_SIZE]
            parts = [[values[i] for i in picked] for values in (codes, texts, languages)]
            for i, log_prob in zip(picked, self.log_prob(*parts).tolist(), strict=True):
                scores[i] = max(log_prob, -MAX_NLL)
        return scores

    @torch.inference_mode()
    def transcribe(self, codes: list[list[int]]) -> list[str]:
        """What the codes say, normalised, by greedy decoding; at most a token a state."""
        states, mask = self.encode(*self._embedded(codes))
        written = self.t5.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask.long(),
            max_new_tokens=states.shape[1],
            do_sample=False,
        )
        hyps = []
        for ids, length in zip(written.tolist(), mask.sum(1).tolist(), strict=True):
            said = ids[1 : 1 + length]  # PAD opens
            said = said[: said.index(END)] if END in said else said
            hyps.append(self.tokenizer.decode([token for token in said if token != PAD]).strip())
        return hyps

    @torch.inference_mode()
    def labels(self, codes: list[list[int]]) -> dict[str, list[str]]:
        """The likeliest label of each item, by column."""
        found = self.label_log_probs(*self.encode(*self._embedded(codes)))
        names = self.config["labels"]
        return {column: [names[column][i] for i in values.argmax(-1).tolist()] for column, values in found.items()}

    def _embedded(self, codes: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        padded, mask = self.pad(codes)
        return self.embed(padded), mask


class Token2TextReward:
    """exp(mean log P(text | codes) / alpha), in (0, 1]: `nll_reward` of the token-to-text model's NLL.

    The token-based R1 of arXiv 2509.18569, as the exponential of arXiv 2509.18798, so that one bad rollout does not
    stretch its group's deviation. Needs neither codec nor Whisper. A truncated rollout, or one without codes, earns 0.

    Args:
        rollout_scorer: with a token-to-text model; see reward_models/rollouts.py.
        alpha: NLL 0.6 nats a token and alpha 3 are exp(−0.2) = 0.8187.
    """

    __name__ = "token2text"
    needs = ("token2text",)

    def __init__(self, rollout_scorer, alpha: float = 3.0):
        self.rollout_scorer, self.alpha = rollout_scorer, alpha
        nll_reward(0.5, alpha)  # a bad alpha is to be found now, not after the first batch was sampled

    def __call__(self, completion_ids, text, language=None, log_metric=None, **_) -> list[float]:
        rollouts = self.rollout_scorer.score(completion_ids, text, language, log_metric)
        return [
            nll_reward(max(0.0, -log_prob), self.alpha) if codes and not truncated else 0.0
            for log_prob, truncated, codes in zip(
                rollouts.text_log_probs, rollouts.truncated, rollouts.codes, strict=True
            )
        ]
