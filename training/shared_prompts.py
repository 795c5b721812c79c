"""A prompt that is long beside its completions, speech to be recognised, is read once for all its rollouts."""

import torch


def groups_together(batches: list[dict]) -> list[dict]:
    """Micro-batches of one update with the rows of a prompt side by side, where prompts are longer than completions.

    TRL shuffles the rollouts before it divides them: 8 of 64 rollouts of 8 clips are of 5 clips, and `shared_prompts`
    finds little to share. Where the update is a sum over all rows (`_order_is_free`) their order does not matter.

    Args:
        batches: TRL's, of equal size: tensors and lists of rows; what has no rows stays where it is.
    """
    prompts = torch.cat([batch["prompt_ids"] for batch in batches])
    if len(batches) == 1 or prompts.shape[1] <= batches[0]["completion_ids"].shape[1]:
        return batches
    _, groups = torch.unique(prompts, dim=0, return_inverse=True)
    order, size = groups.argsort(stable=True), len(prompts) // len(batches)
    regrouped = [dict(batch) for batch in batches]
    for name, first in batches[0].items():
        if isinstance(first, list):
            rows = [value for batch in batches for value in batch[name]]
            rows = [rows[i] for i in order.tolist()]
        elif isinstance(first, torch.Tensor) and first.ndim:
            rows = torch.cat([batch[name] for batch in batches])[order]
        else:
            continue
        for number, batch in enumerate(regrouped):
            batch[name] = rows[number * size : (number + 1) * size]
    return regrouped


PACKED_FRAC = 0.5  # of the tokens: attention to a packed row costs more than to a causal one


def shared_prompts(model, inputs: dict, prompt_length: int) -> torch.Tensor | None:
    """The prompt of each row by number, shape (rows,), where reading each prompt once is worth it; else None.

    Speech of 5 s has 250 tokens and its transcript 20: of 8 rollouts of one clip nine tenths are the same tokens.
    """
    given = {name for name, value in inputs.items() if value is not None}  # PEFT adds arguments that are None
    if given != {"input_ids", "attention_mask"} or model.config._attn_implementation != "sdpa":
        return None  # packed rows need a mask of their own
    prompts = torch.cat([inputs[name][:, :prompt_length] for name in ("input_ids", "attention_mask")], dim=1)
    unique, groups = torch.unique(prompts, dim=0, return_inverse=True)
    rows, length = inputs["input_ids"].shape
    packed = len(unique) * (prompt_length + int(groups.bincount().max()) * (length - prompt_length))
    return groups if packed <= PACKED_FRAC * rows * length else None


def states_of_groups(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, prompt_length: int, groups: torch.Tensor
) -> torch.Tensor:
    """Last hidden states as the model gives them row by row, each prompt read once for all rows that share it.

    A packed row is one prompt and behind it its completions, none of which sees another: [prompt, c_1, c_2, …], every
    c_i at the positions that follow the prompt. Equal to the model's own up to rounding.

    Args:
        input_ids, attention_mask: (rows, length), prompts padded on the left to `prompt_length`.
        groups: from `shared_prompts`.
    Returns:
        (rows, length − 1, hidden size); 0 before the prompt's last token, where nothing is scored.
    """
    rows, length = input_ids.shape
    room, device = length - prompt_length, input_ids.device
    same = groups[:, None] == groups
    slots = same.tril(-1).sum(dim=1)  # how many rows of the prompt come before
    num_slots = int(slots.max()) + 1
    columns = prompt_length + slots[:, None] * room + torch.arange(room, device=device)

    packed = input_ids.new_zeros(int(groups.max()) + 1, prompt_length + num_slots * room)
    valid = torch.zeros_like(packed, dtype=torch.bool)
    for target, source in ((packed, input_ids), (valid, attention_mask.bool())):
        target[groups, :prompt_length] = source[:, :prompt_length]
        target[groups[:, None], columns] = source[:, prompt_length:]

    slot = torch.arange(num_slots, device=device).repeat_interleave(room)
    segments = torch.cat([slot.new_full((prompt_length,), -1), slot])
    after = torch.arange(room, device=device).repeat(num_slots) + prompt_length
    positions = torch.cat([torch.arange(prompt_length, device=device), after])
    own = (segments == -1) | (segments == segments[:, None])
    # Padding sees itself: a softmax of nothing is NaN.
    seen = (own.tril() & valid[:, None]) | torch.eye(len(segments), dtype=torch.bool, device=device)
    states = model.base_model(
        input_ids=packed, attention_mask=seen[:, None], position_ids=positions[None], use_cache=False
    ).last_hidden_state

    before = torch.cat([columns.new_full((rows, 1), prompt_length - 1), columns[:, :-1]], dim=1)
    hidden = states.new_zeros(rows, length - 1, states.shape[-1])
    hidden[:, prompt_length - 1 :] = states[groups[:, None], before]
    return hidden
