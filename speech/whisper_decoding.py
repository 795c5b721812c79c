"""Whisper's decoder on a batch of windows: greedy transcripts, and the NLL of texts the windows may hold.

The transcripts are those of `whisper.decode` at temperature 0 without timestamps, token for token, for less work:
the sound's keys and values are made once; logits only where a token is chosen; a window that is done leaves the
batch; and a text that is given (a draft) is read in one pass, which says how far the greedy transcript agrees with
it, so that decoding starts where the two part. A clip that says its text well needs no step at all.
"""

from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
import whisper
from whisper.decoding import DecodingTask

# Positions whose logits exist at a time, 13 MB of float32. From 32 on, a CPU no longer waits for the token embedding
# (20 MB in tiny/, 265 MB in large-v3) to be read; from 160 on, 32 MiB, glibc maps fresh pages at every allocation.
LOGIT_ROWS = 64
# Vocabulary of one matrix product on a CPU: all 51,866 at once, times a few positions, run a third slower there.
VOCABULARY_PIECE = 8_192


@dataclass(frozen=True)
class Reading:
    """What one window holds: its greedy transcript, and the NLL of its draft."""

    tokens: list[int]  # without the end-of-text
    nll: float  # nats, summed over `nll_tokens`
    nll_tokens: int  # the draft's and its end-of-text, or as many of them as the decoder's context can predict


class WindowReader:
    """Reads windows of one language."""

    def __init__(self, model: whisper.Whisper, language: str):
        task = DecodingTask(model, whisper.DecodingOptions(language=language, without_timestamps=True))
        self.model = model
        self.prompt, self.end = list(task.initial_tokens), task.tokenizer.eot
        self.room = model.dims.n_text_ctx - len(self.prompt) + 1  # the last is predicted from a full context
        # What the library's own rules forbid at the first position, and at all others
        forbidden = torch.zeros(2, model.dims.n_vocab, device=model.device)
        for row, num_tokens in zip(forbidden, (task.sample_begin, task.sample_begin + 1), strict=True):
            for rule in task.logit_filters:
                rule.apply(row[None], torch.zeros(1, num_tokens))
        self.forbidden_first, self.forbidden = (row.isinf().nonzero()[:, 0] for row in forbidden)

    @torch.inference_mode()
    def read(self, features: torch.Tensor, drafts: list[list[int]], max_tokens: list[int]) -> list[Reading]:
        """Each window's greedy transcript, which is the same with any draft, and the NLL of its draft.

        Args:
            features: the encoder's, shape (windows, n_audio_ctx, n_state).
            drafts: text tokens without the end-of-text, one list a window.
            max_tokens: the most a window's transcript may have; 0 where only the NLL is asked for.
        """
        limits = [min(limit, self.room) for limit in max_tokens]
        targets = [[*draft, self.end][: self.room] for draft in drafts]
        before = len(self.prompt) - 1  # positions before the one that predicts the first token
        decoder = _Decoder(self.model, features, before + max(chain(map(len, targets), limits)))
        nlls, choices = self._read_drafts(decoder, targets)
        tokens = []
        for target, choice in zip(targets, choices, strict=True):
            agrees = [a == b for a, b in zip(target, choice, strict=True)]
            agreed = agrees.index(False) if False in agrees else len(target)
            tokens.append(target[:agreed] + choice[agreed : agreed + 1])

        def unfinished(row: int) -> bool:
            return tokens[row][-1] != self.end and len(tokens[row]) < limits[row]

        active = list(range(len(tokens)))
        while going_on := [n for n, row in enumerate(active) if unfinished(row)]:
            if len(going_on) < len(active):
                decoder.keep(going_on)
                active = [active[n] for n in going_on]
            last = [tokens[row][-1:] for row in active]
            hidden = decoder.forward(last, [before + len(tokens[row]) for row in active])[:, 0]
            for row, token in zip(active, self._choose(self._logits(hidden)).tolist(), strict=True):
                tokens[row].append(token)
        return [
            Reading([token for token in row[:limit] if token != self.end], nll, len(target))
            for row, limit, nll, target in zip(tokens, limits, nlls, targets, strict=True)
        ]

    def _read_drafts(self, decoder: "_Decoder", targets: list[list[int]]) -> tuple[list[float], list[list[int]]]:
        """For each target its summed NLL, and what would be chosen in the place of each of its tokens."""
        before, longest = len(self.prompt) - 1, max(map(len, targets))
        # Behind a target's end is padding, and no position looks ahead.
        inputs = [[*self.prompt, *target[:-1], *[self.end] * (longest - len(target))] for target in targets]
        hidden = decoder.forward(inputs, [0] * len(targets))
        places = torch.tensor(
            [(row, n, token) for row, target in enumerate(targets) for n, token in enumerate(target)],
            device=hidden.device,
        )
        losses, choices = [], []
        for row, n, token in (part.T for part in places.split(LOGIT_ROWS)):
            logits = self._logits(hidden[row, before + n])
            # Not cross_entropy: on a CPU its running float32 sum drops tokens below 1e-7 of the likeliest, of which
            # there are 50,000: up to 3e-4 nats a token in tiny/, 2e-3 where the vocabulary is not the last axis.
            losses.append(logits.logsumexp(dim=1) - logits.gather(1, token[:, None])[:, 0])
            choices.append(self._choose(logits, first=n == 0))
        nlls = hidden.new_zeros(len(targets), dtype=torch.float32).index_add_(0, places[:, 0], torch.cat(losses))
        choices = iter(torch.cat(choices).tolist())
        return nlls.tolist(), [[next(choices) for _ in target] for target in targets]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(positions, n_state) to float32 (positions, n_vocab)."""
        weight = self.model.decoder.token_embedding.weight.to(hidden.dtype)
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
        features: the sound of each row, shape (rows, n_audio_ctx, n_state).
        num_positions: the most a row will have.
    """

    def __init__(self, model: whisper.Whisper, features: torch.Tensor, num_positions: int):
        self.decoder = model.decoder
        self.dtype = features.dtype
        self.sound, self.text = [], []  # keys and values of each layer, shape (rows, positions, n_state)
        for block in self.decoder.blocks:
            self.sound.append((block.cross_attn.key(features), block.cross_attn.value(features)))
            shape = (len(features), num_positions, model.dims.n_text_state)
            self.text.append((features.new_zeros(shape), features.new_zeros(shape)))

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, device=self.text[0][0].device)
        for layers in (self.sound, self.text):
            for layer, (keys, values) in enumerate(layers):  # one by one: old and new need not exist together
                layers[layer] = keys[index], values[index]

    def forward(self, tokens: list[list[int]], starts: list[int]) -> torch.Tensor:
        """Hidden states, shape (rows, n, n_state), of each row's next n tokens, which follow `starts` positions."""
        device = self.text[0][0].device
        rows = torch.arange(len(tokens), device=device)[:, None]
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(len(tokens[0]), device=device)
        used = max(starts) + len(tokens[0])
        visible = (torch.arange(used, device=device) <= positions[..., None])[:, None]  # what came before, and itself
        x = self.decoder.token_embedding(torch.tensor(tokens, device=device))
        x = (x + self.decoder.positional_embedding[positions]).to(self.dtype)
        for block, (keys, values), sound in zip(self.decoder.blocks, self.text, self.sound, strict=True):
            normed = block.attn_ln(x)
            keys[rows, positions], values[rows, positions] = block.attn.key(normed), block.attn.value(normed)
            x = x + _attend(block.attn, normed, keys[:, :used], values[:, :used], visible)
            x = x + _attend(block.cross_attn, block.cross_attn_ln(x), *sound)
            x = x + block.mlp(block.mlp_ln(x))
        return self.decoder.ln(x)


def _attend(
    attention: torch.nn.Module,
    x: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a `whisper.model.MultiHeadAttention` returns for x, shape (rows, n, n_state), given keys and values."""
    heads = [part.unflatten(2, (attention.n_head, -1)).transpose(1, 2) for part in (attention.query(x), keys, values)]
    return attention.out(F.scaled_dot_product_attention(*heads, attn_mask=visible).transpose(1, 2).flatten(2))
