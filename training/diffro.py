"""DiffRO: the reward as a differentiable function of the policy's output, alone or beside GRPO.

Each rollout o_1 … o_T is given to the policy once more. At every step it draws a code õ_t from P(· | o_<t) by
Gumbel-softmax, and a token-to-text model (reward_models/token2text.py) reads these: R = mean log P(text | õ_1 … õ_T).
Forward a drawn code is one code, backward it is the softmax it was drawn from (straight-through), so ∂R/∂õ_t reaches
the policy's logits at once: one parallel pass, no sampling inside, neither codec nor Whisper.

    diffro       loss = −R + β · KL(policy ‖ reference), over all tokens of the confined head   (arXiv 2507.05911)
    grpo+diffro  loss = GRPO + λ · (−R where the sample filter keeps the rollout)               (arXiv 2509.18569)

Stated by the papers: the hard forward (2509.18569), the context o_<t (arXiv 2505.17589, §2.2), the KL over the whole
distribution at each step (same place), the filter "advantage > 0". Not stated, and chosen here: R is a mean over the
text's tokens and the KL one over the rollout's; noise is added to the logits that sampling divides by its temperature;
temperature 1 of the Gumbel-softmax (arXiv 2606.28249 takes 2 → 1 → 0.8); λ = 1; a rollout that the filter drops counts
0 in a mean over all. R may be the mean over several draws of each rollout: on the first toy setup the noise of a single
one is most of the gradient (docs/experiments/first_toy/gradient_noise.md), and further draws cost passes of the small
token-to-text model, none of the policy. Beside GRPO the KL is GRPO's own and is not added twice. END is drawn in no õ:
what R rewards about an end reaches the policy by GRPO alone.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from common.cli import InputError
from reward_models.token2text import Token2Text
from speech.measures import is_repetitive
from speech.tokens import SpeechTokens
from training.grpo_trainer import SpeechGRPOTrainer

METHODS = ("diffro", "grpo+diffro")
FILTERS = ("none", "positive", "clean")

# Logits that exist at once: 128 MiB in float32 for each of the half dozen copies of a backward pass, which are 512
# positions of Llasa's 65,537 rows; each further draw keeps one copy more. All of 8 × 1,000 positions would be 2 GiB for
# each.
CHUNK_LOGITS = 2**25


def straight_through(
    logits: torch.Tensor, embedding: torch.Tensor, temperature: float, hard: bool = True
) -> torch.Tensor:
    """Embeddings of codes drawn by Gumbel-softmax.

    Args:
        logits: (positions, num_codes); they need not be normalised.
        embedding: (num_codes, width), frozen, of the model that reads the codes.
        temperature: of the softmax; it does not change which code is drawn.
        hard: the drawn code's embedding forward, the mixture's gradient backward; else the mixture both ways.
    Returns:
        (positions, width).
    """
    # −ln(−ln u) is Gumbel noise; in place, for it is as large as the logits.
    noise = torch.rand_like(logits).clamp_(min=torch.finfo(logits.dtype).tiny).log_().neg_().log_()
    scores = logits - noise
    if hard:
        return _CodeForwardMixtureBackward.apply(scores, embedding, temperature)
    with torch.autocast(scores.device.type, enabled=False):  # in half precision the mixture would be rounded
        return (scores / temperature).softmax(-1) @ embedding


class _CodeForwardMixtureBackward(torch.autograd.Function):
    """The straight-through estimator, without the mixture forward, which only its gradient needs."""

    @staticmethod
    def forward(ctx, scores: torch.Tensor, embedding: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.save_for_backward(scores, embedding)
        ctx.temperature = temperature
        return embedding[scores.argmax(-1)]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        """∂(softmax(scores / temperature) @ embedding) / ∂scores, of a frozen embedding."""
        scores, embedding = ctx.saved_tensors
        mixture = (scores / ctx.temperature).softmax(-1)
        to_codes = gradient @ embedding.T
        along = (to_codes * mixture).sum(-1, keepdim=True)
        return to_codes.sub_(along).mul_(mixture).div_(ctx.temperature), None, None


def draw_chunk(
    hidden: torch.Tensor,
    reference_hidden: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    reference_weight: torch.Tensor | None,
    embedding: torch.Tensor,
    first_row: int,
    sampling_temperature: float,
    gumbel_temperature: float,
    hard: bool,
    measured: bool,
    draws: int = 1,
) -> tuple[torch.Tensor, ...]:
    """Embeddings of drawn codes, (positions, draws, width); if `measured`, KL to the reference (0 without one) and
    entropy, (positions,)."""
    logits = _in_full(F.linear(hidden, weight, bias)) / sampling_temperature
    of_codes = logits[:, first_row:]
    drawn = [straight_through(of_codes, embedding, gumbel_temperature, hard) for _ in range(draws)]
    drawn = torch.stack(drawn, dim=1)
    if not measured:
        return (drawn,)
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1).detach()
    if reference_hidden is None:
        return drawn, torch.zeros_like(entropy), entropy
    reference = _in_full(F.linear(reference_hidden, reference_weight, bias)) / sampling_temperature
    return drawn, (probs * (log_probs - reference.log_softmax(-1))).sum(-1), entropy


def _in_full(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def draw_codes(
    hidden: torch.Tensor, reference_hidden: torch.Tensor | None, weight: torch.Tensor, *settings
) -> tuple[torch.Tensor, ...]:
    """`draw_chunk` of any number of positions; if they are more than a chunk, the logits of each are computed twice.

    Args:
        hidden: (positions, hidden size), at least one.
        reference_hidden: the reference model's, of the same shape, or None.
        weight: (rows, hidden size), the confined head's; `settings` are the other arguments of `draw_chunk`.
    """
    size = max(1, CHUNK_LOGITS // len(weight))
    if len(hidden) <= size:
        return draw_chunk(hidden, reference_hidden, weight, *settings)
    references = [None] * math.ceil(len(hidden) / size)
    if reference_hidden is not None:
        references = reference_hidden.split(size)
    # The noise is drawn again as it was: checkpoint restores the state of the random generator.
    parts = [
        checkpoint(draw_chunk, part, reference, weight, *settings, use_reentrant=False)
        for part, reference in zip(hidden.split(size), references, strict=True)
    ]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def sample_filter(name: str, advantages: list[float], codes: list[list[int]], truncated: list[bool]) -> list[bool]:
    """Which rollouts DiffRO learns from (arXiv 2509.18569). One without codes is never among them.

    "none": all. "positive": those whose advantage is above 0. "clean": of these, those neither truncated nor repetitive
    (`is_repetitive`): the paper's reason for the filter, which a positive advantage does not rule out.
    """
    kept = []
    for advantage, item, cut_off in zip(advantages, codes, truncated, strict=True):
        keep = len(item) > 0
        if name in ("positive", "clean"):
            keep = keep and advantage > 0
        if name == "clean":
            keep = keep and not cut_off and not is_repetitive(item)
        kept.append(keep)
    return kept


class DiffROTrainer(SpeechGRPOTrainer):
    """DiffRO, alone or beside GRPO on the same rollouts; see the module's docstring.

    The rows of the data set need `text`, may have `language` (Whisper's code; English if not), and have the columns
    of `label_columns`.

    Args:
        tokens: of the policy's tokenizer.
        token2text: the frozen reward model; it is moved to the policy's device.
        method: "diffro" (GRPO's loss is not computed, rewards serve the log and the filter) or "grpo+diffro".
        diffro_weight: λ, above 0; only for "grpo+diffro".
        filter: "none", "positive" or "clean"; see `sample_filter`.
        gumbel_temperature: at the first step; and, if `gumbel_temperature_end` is given, linear to that at the last.
        gumbel_hard: straight-through, as the paper; False reads mixtures of codes.
        gumbel_draws: R is the mean over so many independent draws; one in the papers.
        label_columns: columns whose label's log-probability is added to R (the multi-task reward, MTR).
    Logs:
        diffro_reward (mean R of the rollouts kept), diffro_frac_kept, gumbel_temperature; for "diffro" also
        entropy and, with a β, kl, in nats per token, of the rollouts kept.
    Raises:
        InputError: an unknown method or filter, a number out of its range, a token-to-text model of another codebook
            or without a head for a label, ZeRO-3 or cast_lm_head_to_fp32.
    """

    def __init__(
        self,
        *args,
        tokens: SpeechTokens,
        token2text: Token2Text,
        method: str = "grpo+diffro",
        diffro_weight: float = 1.0,
        filter: str = "clean",
        gumbel_temperature: float = 1.0,
        gumbel_temperature_end: float | None = None,
        gumbel_hard: bool = True,
        gumbel_draws: int = 1,
        label_columns: tuple[str, ...] = (),
        **kwargs,
    ):
        for name, value, known in (("method", method, METHODS), ("filter", filter, FILTERS)):
            if value not in known:
                raise InputError(f"{name} {value!r} is none of {', '.join(known)}")
        end = gumbel_temperature if gumbel_temperature_end is None else gumbel_temperature_end
        numbers = {
            "diffro_weight": diffro_weight,
            "gumbel_temperature": gumbel_temperature,
            "gumbel_temperature_end": end,
        }
        for name, value in numbers.items():
            if not 0 < value < math.inf:
                raise InputError(f"{name} must be above 0, got {value}")
        if gumbel_draws < 1:
            raise InputError(f"gumbel_draws must be at least 1, got {gumbel_draws}")
        token2text.check_codebook(tokens.num_codes)
        for column in label_columns:
            token2text.label_ids(column, [])
        super().__init__(*args, allowed_ids=tokens.speech_ids, **kwargs)
        if self.args.cast_lm_head_to_fp32 or self._zero_stage() == 3:
            raise InputError(
                "DiffRO recomputes the head's logits in the backward pass, which neither ZeRO-3 nor "
                "cast_lm_head_to_fp32 allows; use DDP, ZeRO-2 or FSDP2, and leave cast_lm_head_to_fp32 off"
            )
        self.tokens, self.method, self.filter, self.label_columns = tokens, method, filter, label_columns
        self.diffro_weight = diffro_weight
        self.gumbel_temperatures, self.gumbel_hard = (gumbel_temperature, end), gumbel_hard
        self.gumbel_draws = gumbel_draws
        self.token2text = token2text.to(self.accelerator.device)
        self.diffro_beta = 0.0
        if method == "diffro":  # TRL would compute the sampled estimate of a KL that is computed in full here
            self.diffro_beta, self.beta = self.beta, 0.0

    def _zero_stage(self) -> int:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin.zero_stage if plugin else 0

    @property
    def gumbel_temperature(self) -> float:
        """Of the present step."""
        start, end = self.gumbel_temperatures
        return start + (end - start) * min(1.0, self.state.global_step / max(1, self.state.max_steps - 1))

    # --- Rollouts -----------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        """TRL's batch, and what DiffRO needs of each row; TRL shuffles and divides both in the same way."""
        output = super()._generate_and_score_completions(inputs)
        masks = output["completion_mask"].bool()
        completions = [ids[mask].tolist() for ids, mask in zip(output["completion_ids"], masks, strict=True)]
        codes, truncated = zip(*map(self.tokens.codes, completions), strict=True)
        kept = sample_filter(self.filter, output["advantages"].tolist(), codes, truncated)
        output["diffro_kept"] = torch.tensor(kept, device=masks.device)
        output["diffro_text"] = [row["text"] for row in inputs]
        output["diffro_language"] = [row.get("language") or "en" for row in inputs]
        for column in self.label_columns:
            output[f"diffro_{column}"] = [row[column] for row in inputs]
        return output

    # --- Loss ---------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs: dict) -> torch.Tensor:
        if self.method == "diffro":
            return self._diffro_loss(model, inputs)
        rows = inputs["diffro_kept"].nonzero()[:, 0]
        draw = self._draw(self._positions(inputs, rows))
        drawn = []

        def shared_pass(**kwargs):
            from_head = (lambda hidden, *head: draw(hidden[rows], *head)) if len(rows) else None
            output = model(**kwargs, from_head=from_head)
            drawn.append(output.from_head)
            return output

        loss = super()._compute_loss(shared_pass, inputs)
        rewards = self._rewards(drawn.pop()[0], inputs, rows) if len(rows) else loss.new_zeros(0)
        self._log_diffro(inputs, diffro_reward=rewards)
        return loss - self.diffro_weight * self._mean_over_batch(rewards, inputs)

    def _diffro_loss(self, model, inputs: dict) -> torch.Tensor:
        """−R + β · KL; the policy reads the rollouts kept and no others."""
        rows = inputs["diffro_kept"].nonzero()[:, 0]
        nothing_kept = not len(rows)
        if nothing_kept:  # the other processes wait for this one's gradients, though they are 0
            rows = rows.new_zeros(1)
        positions = self._positions(inputs, rows)
        positions[:, 0] = True  # a rollout kept has one anyway; the stand-in may be masked
        batch = {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)[rows],
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)[rows],
        }
        with self.accelerator.autocast():
            reference = self._reference(batch, positions) if self.diffro_beta else (None, None)
            drawn, kls, entropies = model(**batch, from_head=self._draw(positions, *reference, measured=True)).from_head
        if nothing_kept:
            losses = (drawn.sum() + kls.sum())[None] * 0
            rewards = kls = entropies = drawn.new_zeros(0)
        else:
            rewards = self._rewards(drawn, inputs, rows)
            measures = kls.new_zeros(2, *positions.shape)
            measures[:, positions] = torch.stack([kls, entropies])
            kls, entropies = measures.sum(-1) / positions.sum(-1)
            losses = self.diffro_beta * kls - rewards
        logged = {"kl": kls} if self.diffro_beta else {}
        self._log_diffro(inputs, diffro_reward=rewards, entropy=entropies, **logged)
        return self._mean_over_batch(losses, inputs)

    def _positions(self, inputs: dict, rows: torch.Tensor) -> torch.Tensor:
        """(rows, completion length): True where there is a token, END included."""
        return inputs["completion_mask"][rows].bool()

    def _draw(self, positions: torch.Tensor, reference_states=None, reference_weight=None, measured: bool = False):
        """What `score_confined` is to make of the hidden states: `draw_codes` at `positions`."""
        first_row = self.tokens.first_code_id - min(self.tokens.speech_ids)
        temperatures = self.temperature, self.gumbel_temperature

        def draw(hidden, weight, bias):
            states = hidden[:, -positions.shape[1] :][positions]
            head = states, reference_states, weight, bias, reference_weight
            settings = self.token2text.embedding.weight, first_row, *temperatures, self.gumbel_hard, measured
            return draw_codes(*head, *settings, self.gumbel_draws)

        return draw

    @torch.no_grad()
    def _reference(self, batch: dict, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference model's hidden states at `positions`, and its head's weight."""

        def states(hidden, weight, bias):
            if self.is_fsdp_enabled:  # it frees a gathered weight when the forward ends
                weight = weight.clone()
            return hidden[:, -positions.shape[1] :][positions], weight

        if self.ref_model is not None:
            return self.ref_model(**batch, from_head=states).from_head
        # With PEFT the reference is the policy without its adapter, or with the adapter as it was.
        policy = self.accelerator.unwrap_model(self.model)
        adapter = "ref" if "ref" in policy.peft_config else None
        with (
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            use_adapter(policy, adapter_name=adapter),
        ):
            return self.model(**batch, from_head=states).from_head

    def _rewards(self, drawn: torch.Tensor, inputs: dict, rows: torch.Tensor) -> torch.Tensor:
        """R of each of `rows`, the mean over draws of: mean log P per text token, and log P of its labels.

        Args:
            drawn: embeddings at all positions of `rows`, (positions, draws, width).
        """
        positions, ids = self._positions(inputs, rows), inputs["completion_ids"][rows]
        spoken = positions & (ids != self.tokens.end_id)

        def of_rows(name: str) -> list:
            return [inputs[name][i] for i in rows.tolist()]

        rewards = []
        with torch.autocast(drawn.device.type, enabled=False):
            text_ids = self.token2text.text_ids(of_rows("diffro_text"), of_rows("diffro_language"))
            for embeddings in drawn.unbind(dim=1):
                spread = embeddings.new_zeros(*positions.shape, embeddings.shape[-1])
                spread[positions] = embeddings
                states, mask = self.token2text.encode(spread, spoken)
                rewards.append(self.token2text.text_log_probs(states, mask, text_ids))
                if self.label_columns:
                    log_probs = self.token2text.label_log_probs(states, mask)
                for column in self.label_columns:
                    labels = self.token2text.label_ids(column, of_rows(f"diffro_{column}"))
                    rewards[-1] = rewards[-1] + log_probs[column].gather(1, labels[:, None])[:, 0]
        return torch.stack(rewards).mean(dim=0)

    def _mean_over_batch(self, values: torch.Tensor, inputs: dict) -> torch.Tensor:
        """The mean over all rows, those not kept counting 0; a share of it where gradients are accumulated."""
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        return values.sum() / len(inputs["completion_ids"]) / accumulated

    def _log_diffro(self, inputs: dict, **values: torch.Tensor) -> None:
        """Means over the kept rows of all processes, each of which has to come here."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        kept = inputs["diffro_kept"].float()
        sums = [kept.sum(), kept.new_tensor(len(kept)), *(v.detach().float().sum() for v in values.values())]
        num_kept, num_rows, *sums = self.accelerator.reduce(torch.stack(sums), reduction="sum").tolist()
        metrics["diffro_frac_kept"].append(num_kept / num_rows)
        metrics["gumbel_temperature"].append(self.gumbel_temperature)
        for name, total in zip(values, sums, strict=True):
            metrics[name].append(total / num_kept if num_kept else math.nan)
