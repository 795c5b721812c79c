"""Whisper's decoder on a batch of windows: greedy transcripts, and the NLL of reference texts.

The transcripts are those of `whisper.decode` at temperature 0 without timestamps, token for token, at less cost:

- the keys and values of the audio are computed once;
- logits are computed only where a token is chosen;
- a window whose transcript is complete leaves the batch;
- a reference text (the draft) is teacher-forced in one pass, which shows how far the greedy transcript agrees with it;
  decoding starts where the two part, as in speculative decoding. An intelligible clip needs no decoding step at all.
"""

from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
import whisper
from whisper.decoding import DecodingTask

from speech.word_times import token_frames

# Positions whose logits exist at a time: 13 MB of float32. Below 32, a CPU waits for the token embedding (20 MB in
# tiny/, 265 MB in large-v3) to be read; from 160 on, 32 MiB, glibc maps fresh pages at every allocation.
LOGIT_ROWS = 64
# Rows of the vocabulary per matrix product on a CPU: all 51,866 at once, times a few positions, are a third slower.
VOCABULARY_PIECE = 8_192


@dataclass(frozen=True)
class Reading:
    """The greedy transcript of one window, and the NLL of its draft."""

    tokens: list[int]  # without the end-of-text
    nlls: list[float]  # nats, of the draft and its end-of-text, or of as many tokens as the context can predict
    # Of the same tokens, the encoder position at which each begins; None unless asked for
    frames: list[int] | None = None


class WindowReader:
    """Reads windows of one language."""

    def __init__(self, model: whisper.Whisper, language: str):
        task = DecodingTask(model, whisper.DecodingOptions(language=language, without_timestamps=True))
        self.model = model
        self.prompt, self.end = list(task.initial_tokens), task.tokenizer.eot
        self.room = model.dims.n_text_ctx - len(self.prompt) + 1  # the last is predicted from a full context
        # The tokens that the library's own rules forbid at the first position, and at all others
        forbidden = torch.zeros(2, model.dims.n_vocab, device=model.device)
        for row, num_tokens in zip(forbidden, (task.sample_begin, task.sample_begin + 1), strict=True):
            for rule in task.logit_filters:
                rule.apply(row[None], torch.zeros(1, num_tokens))
        self.forbidden_first, self.forbidden = (row.isinf().nonzero()[:, 0] for row in forbidden)

    @torch.inference_mode()
    def read(
        self,
        features: torch.Tensor,
        drafts: list[list[int]],
        max_tokens: list[int],
        num_frames: list[int] | None = None,
    ) -> list[Reading]:
        """Each window's greedy transcript, which is the same with any draft, and the NLL of its draft.

        Args:
            features: the encoder's, shape (windows, n_audio_ctx, n_state).
            drafts: text tokens without the end-of-text, one list a window.
            max_tokens: length of a window's transcript at most; 0 where only the NLL is needed.
            num_frames: encoder positions that a window's clip fills; with them the readings have `frames`.
        """
        limits = [min(limit, self.room) for limit in max_tokens]
        targets = [[*draft, self.end][: self.room] for draft in drafts]
        before = len(self.prompt) - 1  # positions before the one that predicts the first token
        decoder = _Decoder(self.model, features, before + max(chain(map(len, targets), limits)))
        nlls, choices, frames = self._read_drafts(decoder, targets, num_frames)
        tokens = []
        for target, choice in zip(targets, choices, strict=True):
            agrees = [a == b for a, b in zip(target, choice, strict=True)]
            agreed = agrees.index(False) if False in agrees else len(target)
            tokens.append(target[:agreed] + choice[agreed : agreed + 1])

        def unfinished(row: int) -> bool:
            return tokens[row][-1] != self.end and len(tokens[row]) < limits[row]

        active = list(range(len(tokens)))
        while True:
            remaining = [n for n, row in enumerate(active) if unfinished(row)]
            if not remaining:
                break
            if len(remaining) < len(active):
                decoder.keep(remaining)
                active = [active[n] for n in remaining]
            last = [tokens[row][-1:] for row in active]
            hidden = decoder.forward(last, [before + len(tokens[row]) for row in active])[:, 0]
            for row, token in zip(active, self._choose(self._logits(hidden)).tolist(), strict=True):
                tokens[row].append(token)
        return [
            Reading([token for token in row[:limit] if token != self.end], nll, starts)
            for row, limit, nll, starts in zip(tokens, limits, nlls, frames, strict=True)
        ]

    def _read_drafts(
        self, decoder: "_Decoder", targets: list[list[int]], num_frames: list[int] | None
    ) -> tuple[list[list[float]], list[list[int]], list[list[int] | None]]:
        """For each token of each target its NLL, the greedy choice in its place, and its start."""
        before = len(self.prompt) - 1  # positions before the one that predicts the first token
        longest = max(map(len, targets))
        # After a target's end is padding, and no position looks ahead.
        inputs = [[*self.prompt, *target[:-1], *[self.end] * (longest - len(target))] for target in targets]
        attention = None if num_frames is None else []
        hidden = decoder.forward(inputs, [0] * len(targets), attention)
        frames = [None] * len(targets)
        if attention is not None:
            attention = torch.cat(attention, dim=1)
            for row, target in enumerate(targets):
                positions = slice(before + len(target))
                frames[row] = token_frames(attention[row, :, positions, : max(1, num_frames[row])], before)
        places = torch.tensor(
            [(row, n, token) for row, target in enumerate(targets) for n, token in enumerate(target)],
            device=hidden.device,
        )
        losses, choices = [], []
        for row, n, token in (part.T for part in places.split(LOGIT_ROWS)):
            logits = self._logits(hidden[row, before + n])
            # Not cross_entropy: on a CPU its running float32 sum drops tokens below 1e-7 of the likeliest, of which
            # there are 50,000: up to 3e-4 nats per token in tiny/, 2e-3 where the vocabulary is not the last axis.
            losses.append(logits.logsumexp(dim=1) - logits.gather(1, token[:, None])[:, 0])
            choices.append(self._choose(logits, first=n == 0))
        losses, choices = (torch.cat(parts).split([len(target) for target in targets]) for parts in (losses, choices))
        return [part.tolist() for part in losses], [part.tolist() for part in choices], frames

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(positions, n_state) to float32 (positions, n_vocab)."""
        weight = self.model.decoder.token_embedding.weight.to(hidden.dtype)
        if hidden.device.type == "cuda" and hidden.dtype != torch.float32:
            # Summed in float32 and left there: in float16 a logit of 16 to 32 is a multiple of 1/64.
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        pieces = weight.split(VOCABULARY_PIECE if hidden.device.type == "cpu" else len(weight))
        return torch.cat([F.linear(hidden, piece) for piece in pieces], dim=1).float()

    def _choose(self, logits: torch.Tensor, first: torch.Tensor | None = None) -> torch.Tensor:
        """The likeliest token that is allowed; changes `logits`. `first`: which rows are first positions."""
        logits[:, self.forbidden] = -torch.inf
        if first is not None:
            logits[:, self.forbidden_first] = logits[:, self.forbidden_first].masked_fill(first[:, None], -torch.inf)
        return logits.argmax(dim=-1)


class _Decoder:
    """`model.decoder` with keys and values kept; unlike the library's, its rows may be at different positions.

    Args:
        features: the encoder's output of each row, shape (rows, n_audio_ctx, n_state).
        num_positions: tokens of a row at most.
    """

    def __init__(self, model: whisper.Whisper, features: torch.Tensor, num_positions: int):
        self.decoder = model.decoder
        self.dtype = features.dtype
        self.alignment_heads = model.alignment_heads.to_dense().to(features.device)  # bool, (layers, heads)
        # Keys and values of each layer, shape (rows, positions, n_state)
        self.audio_cache = []
        self.text_cache = []
        for block in self.decoder.blocks:
            self.audio_cache.append((block.cross_attn.key(features), block.cross_attn.value(features)))
            shape = (len(features), num_positions, model.dims.n_text_state)
            self.text_cache.append((features.new_zeros(shape), features.new_zeros(shape)))

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, device=self.text_cache[0][0].device)
        for layers in (self.audio_cache, self.text_cache):
            for layer, (keys, values) in enumerate(layers):  # layer by layer: old and new caches never exist together
                layers[layer] = keys[index], values[index]

    def forward(
        self, tokens: list[list[int]], starts: list[int], attention: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Hidden states, shape (rows, n, n_state), of each row's next n tokens, which follow `starts` positions.

        Args:
            attention: filled, layer by layer, with the alignment heads' logits over the audio, float32, shape
                (rows, heads, n, n_audio_ctx).
        """
        device = self.text_cache[0][0].device
        rows = torch.arange(len(tokens), device=device)[:, None]
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(len(tokens[0]), device=device)
        used = max(starts) + len(tokens[0])
        visible = (torch.arange(used, device=device) <= positions[..., None])[:, None]  # earlier positions, and itself
        x = self.decoder.token_embedding(torch.tensor(tokens, device=device))
        x = (x + self.decoder.positional_embedding[positions]).to(self.dtype)
        layers = zip(self.decoder.blocks, self.text_cache, self.audio_cache, self.alignment_heads, strict=True)
        for block, (keys, values), audio, heads in layers:
            normed = block.attn_ln(x)
            keys[rows, positions], values[rows, positions] = block.attn.key(normed), block.attn.value(normed)
            x = x + _attend(block.attn, normed, keys[:, :used], values[:, :used], visible)
            normed = block.cross_attn_ln(x)
            if attention is not None:
                attention.append(_attention_logits(block.cross_attn, normed, audio[0], heads))
            x = x + _attend(block.cross_attn, normed, *audio)
            x = x + block.mlp(block.mlp_ln(x))
        return self.decoder.ln(x)


def _attend(
    attention: torch.nn.Module,
    x: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """Output of a `whisper.model.MultiHeadAttention` for x, shape (rows, n, n_state), with cached keys and values."""
    heads = [part.unflatten(2, (attention.n_head, -1)).transpose(1, 2) for part in (attention.query(x), keys, values)]
    return attention.out(F.scaled_dot_product_attention(*heads, attn_mask=visible).transpose(1, 2).flatten(2))


def _attention_logits(
    attention: torch.nn.Module, x: torch.Tensor, keys: torch.Tensor, heads: torch.Tensor
) -> torch.Tensor:
    """Logits of these heads (bool, shape (n_head,)), float32, shape (rows, heads, n, positions)."""
    queries, keys = (
        part.unflatten(2, (attention.n_head, -1)).transpose(1, 2)[:, heads].float()
        for part in (attention.query(x), keys)
    )
    return queries @ keys.mT / queries.shape[-1] ** 0.5
