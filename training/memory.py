"""How much memory one process of GRPO needs, before it needs it: what is held all along, and the largest phase.

A step has three phases that follow each other: sampling, scoring (codec, Whisper, token-to-text model), and the loss.
Each adds to what is held: weights, optimizer, reference. Gradients are there in the loss only, where an update ends
with them. Sizes are counted on the models themselves; activations and caches follow from the shapes of a Llama
(`loss_bytes` names the tensors that its backward keeps).
"""

from dataclasses import dataclass

import torch
from accelerate import DistributedType

from reward_models.token2text import BATCH_SIZE
from speech.tokens import CODES_PER_SECOND, SAMPLE_RATE
from training.diffro import CHUNK_LOGITS

GIB = 2**30
# TRL's fused head works in tiles of so many tokens by so many rows (trl/kernels, trl/trainer/utils.py).
TILE_TOKENS, TILE_ROWS = 4_096, 32_768
# Bytes per logit of a tile: on a GPU it is worked on in place, on a CPU by a chain of float32 copies.
CPU_TILE_BYTES = 4 * 4
# Copies of the logits while a code is drawn: the head's, float32, scaled by the temperature, softmax, and noise.
SAMPLING_COPIES = 5
# Copies of a chunk's logits in DiffRO's backward: besides one for each Gumbel draw, and for the KL over all codes
CHUNK_COPIES, KL_COPIES = 3, 3
# Float32 numbers per state of the token-to-text model, by width and width of its MLP, as measured: those that one
# layer's backward keeps, those of the front-end and the decoder, and the most that are alive where nothing is kept
LAYER_WIDTHS, FRONT_WIDTHS, SCORING_WIDTHS = (6, 7), (13, 0), (8, 4)
# Copies of the first layer's output while a speaker encoder works: its input, centred, squared, and their products
SPEAKER_COPIES = 4
# Peak over the sum of what is alive: rounding of the allocator's blocks, and workspaces of matrix products.
ALLOCATOR_SLACK = 1.03


@dataclass(frozen=True)
class Shapes:
    """What a step's memory hangs on besides the weights.

    Attributes:
        layers, hidden, intermediate, query_width, key_width, vocabulary: of the Llama; a width is heads × head_dim.
        head_rows: rows of the head that are computed (confined_head.py).
        activation_bytes: bytes of what the layers compute in, 2 under autocast or in half precision.
        residual_bytes: bytes of the residual stream; 4 where the weights are float32, under autocast too.
        rollouts: sampled at once by this process, in training or evaluation; rows: of one forward of the loss.
        prompt: tokens of the longest prompt; length: of it and a completion together.
        checkpointing: whether the backward recomputes each layer.
        on_gpu: where TRL's Triton kernels run.
    """

    layers: int
    hidden: int
    intermediate: int
    query_width: int
    key_width: int
    vocabulary: int
    head_rows: int
    activation_bytes: int
    residual_bytes: int
    rollouts: int
    rows: int
    prompt: int
    length: int
    checkpointing: bool
    on_gpu: bool


def shapes_of(model, args, length: int) -> Shapes:
    """`Shapes` of a causal LM with a ConfinedHead under a GRPOConfig; `length` as in Shapes."""
    config, head = model.config, model.get_output_embeddings()
    weights = model.get_input_embeddings().weight
    half = args.bf16 or args.fp16
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    held_out = args.per_device_eval_batch_size if evaluates else 0
    return Shapes(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        query_width=config.num_attention_heads * config.head_dim,
        key_width=config.num_key_value_heads * config.head_dim,
        vocabulary=config.vocab_size,
        head_rows=head.last_row - head.first_row,
        activation_bytes=2 if half else weights.element_size(),
        residual_bytes=weights.element_size(),
        rollouts=max(args.per_device_train_batch_size * args.steps_per_generation, held_out),
        rows=args.per_device_train_batch_size,
        prompt=length - args.max_completion_length,
        length=length,
        checkpointing=args.gradient_checkpointing,
        on_gpu=args.device.type == "cuda",
    )


def module_bytes(*modules: torch.nn.Module, trainable: bool = False) -> int:
    """Bytes of all parameters and buffers, tied ones once; of the trainable parameters alone if `trainable`.

    Whisper's alignment heads, a sparse buffer of a few hundred bytes, count as if they were dense.
    """
    tensors = {}
    for module in modules:
        for tensor in module.parameters() if trainable else [*module.parameters(), *module.buffers()]:
            if tensor.requires_grad or not trainable:
                tensors[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(tensors.values())


def linear_bytes(model) -> int:
    """What autocast's half-precision copies of a model's matrices take, the head's rows included."""
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return 2 * (sum(m.weight.numel() for m in linears) + (head.last_row - head.first_row) * head.weight.shape[1])


def layer_bytes(s: Shapes) -> int:
    """Bytes per token that one layer's backward keeps.

    Both RMSNorms keep their input and the normalised value in float32, and what follows them keeps its input; the
    attention keeps queries, keys, values and its output; the MLP keeps gate, its SiLU, up, and their product.
    """
    norms = 2 * s.hidden * (4 + 4 + s.activation_bytes)
    attention = 2 * (s.query_width + s.key_width) * s.activation_bytes
    return norms + attention + 4 * s.intermediate * s.activation_bytes


def loss_bytes(s: Shapes, trained_head: bool, diffro: int) -> int:
    """Bytes the loss of one micro-batch adds at its peak; `diffro`: what `diffro_bytes` says, if it is part of it."""
    tokens = s.rows * s.length
    layer = layer_bytes(s) * tokens
    stored = s.layers * s.hidden * s.residual_bytes * tokens + layer if s.checkpointing else s.layers * layer
    logit = s.activation_bytes if s.on_gpu else CPU_TILE_BYTES
    tile = min(tokens, TILE_TOKENS) * min(s.head_rows, TILE_ROWS) * logit
    # Gradients of the rows in float32, and of the whole tied matrix, which they are written into
    head = s.head_rows * s.hidden * 4 + s.vocabulary * s.hidden * s.residual_bytes if trained_head else 0
    return stored + max(tile, diffro) + head


def diffro_bytes(s: Shapes, token2text, draws: int, exact_kl: bool) -> int:
    """Bytes of DiffRO beside the policy's pass: the token-to-text model's activations, or a chunk of logits.

    Args:
        draws: Gumbel draws of each rollout; exact_kl: whether the KL over all codes is part of the loss.
    """
    completion = s.length - s.prompt
    chunk = 4 * min(s.rows * completion * s.head_rows, CHUNK_LOGITS)
    copies = draws + CHUNK_COPIES + (KL_COPIES if exact_kl else 0)
    config = token2text.t5.config
    per_state = config.num_layers * _widths(config, LAYER_WIDTHS) + _widths(config, FRONT_WIDTHS)
    return max(copies * chunk, draws * 4 * s.rows * -(-completion // 2) * per_state)


def _widths(config, times: tuple[int, int]) -> int:
    return times[0] * config.d_model + times[1] * config.d_ff


def sampling_bytes(s: Shapes) -> int:
    """Keys and values of every rollout at full length, and the prompts' pass or the logits of one step."""
    cache = 2 * s.layers * s.key_width * s.activation_bytes * s.rollouts * s.length
    # All prompts go through at once. In the MLP of a layer are alive: its input, its product's factors and product,
    # and of the residual stream the layer's input, the attention's output and the embeddings
    prompts = s.rollouts * s.prompt * (4 * s.hidden * s.residual_bytes + 3 * s.intermediate * s.activation_bytes)
    return cache + max(prompts, SAMPLING_COPIES * 4 * s.rollouts * s.vocabulary)


def optimizer_copies(args) -> int:
    """Numbers that the optimizer keeps for each weight: the two moments of AdamW, and none of SGD without momentum."""
    return 0 if args.optim == "sgd" else 2


def gradients_while_sampling(args) -> bool:
    """Whether rollouts are sampled between the micro-batches of one update; after an update gradients are freed."""
    return args.steps_per_generation * args.num_iterations % args.gradient_accumulation_steps > 0


def scoring_bytes(scorer) -> int:
    """What a `WhisperScorer` adds for one batch: keys and values of its cross-attention, and an encoder layer."""
    dims = scorer.model.dims
    cross = 2 * dims.n_text_layer * dims.n_audio_ctx * dims.n_text_state
    encoder = 6 * dims.n_audio_ctx * dims.n_audio_state  # the stream, and an MLP four times as wide
    return scorer.batch_size * (cross + encoder) * scorer.dtype.itemsize


def token2text_scoring_bytes(token2text, codes: int) -> int:
    """What scoring one batch of rollouts of `codes` codes adds."""
    return 4 * BATCH_SIZE * -(-codes // 2) * _widths(token2text.t5.config, SCORING_WIDTHS)


def speaker_scoring_bytes(encoder, codes: int) -> int:
    """What a `SpeakerEncoder` adds for one batch: the first layer's frames over and over, the most there are."""
    config = encoder.model.config
    seconds = max(encoder.batch_seconds, codes / CODES_PER_SECOND)
    frames = seconds * SAMPLE_RATE / config.conv_stride[0]
    return int(SPEAKER_COPIES * 4 * frames * config.conv_dim[0])


def estimate(
    policy,
    reference,
    reward_models: list,
    scoring: int,
    shapes: Shapes,
    ddp: bool = False,
    token2text=None,
    diffro: int = 0,
    sampling_with_gradients: bool = False,
    optimizer_copies: int = 2,
) -> dict[str, int]:
    """Bytes by part: what is held, then the three phases, of which the largest counts, then the peak of all.

    Args:
        policy: the causal LM, adapters included; reference: another one, or None.
        reward_models: the modules that score and stay on the device; scoring: what is added while rollouts are scored,
            in bytes, models that come for it included.
        ddp: whether several GPUs average their gradients by DDP.
        token2text: the token-to-text model, which stays there; diffro: see `loss_bytes`.
        sampling_with_gradients: see `gradients_while_sampling`; optimizer_copies: see the function of that name.
    """
    trainable = module_bytes(policy, trainable=True)
    mixed = shapes.activation_bytes < shapes.residual_bytes
    copies = linear_bytes(policy) if mixed else 0
    held = {
        "policy": module_bytes(policy),
        "DDP's buckets": trainable if ddp else 0,  # a second copy of all gradients
        "optimizer": optimizer_copies * trainable,
        "reference": 0 if reference is None else module_bytes(reference),
        "reward models": module_bytes(*reward_models),
        "token2text": 0 if token2text is None else module_bytes(token2text),
    }
    gradients = {"gradients": trainable}
    phases = {
        "sampling": copies + sampling_bytes(shapes),
        "scoring": scoring,
        "loss": copies + loss_bytes(shapes, policy.get_output_embeddings().weight.requires_grad, diffro),
    }
    with_gradients = {
        name: size + trainable for name, size in phases.items() if name == "loss" or sampling_with_gradients
    }
    peak = int(ALLOCATOR_SLACK * (sum(held.values()) + max((phases | with_gradients).values())))
    return held | gradients | phases | {"peak": peak}


def estimate_run(
    policy, reference, rollout_scorer, training_args, longest: int, draws: int = 0, exact_kl: bool = False
) -> dict[str, int]:
    """`estimate` of a run of GRPO, DiffRO or both.

    Args:
        rollout_scorer: a `SpeechRolloutScorer`, or a `TranscriptScorer`, which has no models.
        longest: tokens of the longest prompt and completion together.
        draws, exact_kl: see `diffro_bytes`; no draws: no DiffRO.
    """
    names = ("codec", "whisper", "token2text", "speaker_encoder")
    codec, whisper, token2text, speaker_encoder = (getattr(rollout_scorer, name, None) for name in names)
    shapes, codes = shapes_of(policy, training_args, longest), training_args.max_completion_length
    # Whisper and the token-to-text model work one after the other; behind them, the speaker encoder with the codec
    by_whisper = scoring_bytes(whisper) if whisper else 0
    by_token2text = token2text_scoring_bytes(token2text, codes) if token2text else 0
    passes = [([codec, whisper], max(by_whisper, by_token2text))]
    if speaker_encoder:
        passes.append(([codec, speaker_encoder], speaker_scoring_bytes(speaker_encoder, codes)))
    if codec and rollout_scorer.offload:  # each pass has its models brought, and taken away again
        kept, scoring = [], max(module_bytes(*modules(models)) + added for models, added in passes)
    else:
        kept, scoring = modules([codec, whisper, speaker_encoder]), max(added for _, added in passes)
    return estimate(
        policy,
        reference,
        kept,
        scoring,
        shapes,
        ddp=training_args.distributed_state.distributed_type == DistributedType.MULTI_GPU,
        token2text=token2text,
        diffro=diffro_bytes(shapes, token2text, draws, exact_kl) if draws else 0,
        sampling_with_gradients=gradients_while_sampling(training_args),
        optimizer_copies=optimizer_copies(training_args),
    )


def with_vllm(parts: dict[str, int], training_args, gpu_bytes: int) -> dict[str, int]:
    """`parts` of `estimate`, and what vLLM holds on the same GPU: the share of it that it was given.

    A server's is on other GPUs. With --vllm_enable_sleep_mode it gives most of it back after sampling; counted whole.
    """
    if not training_args.use_vllm or training_args.vllm_mode != "colocate":
        return parts
    share = int(training_args.vllm_gpu_memory_utilization * gpu_bytes)
    return parts | {"vLLM": share, "peak": parts["peak"] + share}


def modules(scorers: list) -> list[torch.nn.Module]:
    """The models of those scorers that there are."""
    return [scorer.model for scorer in scorers if scorer]


def report(parts: dict[str, int]) -> str:
    """Two lines: the peak, and its parts (phases follow each other, so they do not add up), in GiB."""
    pieces = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if name != "peak" and size)
    return f"memory: about {parts['peak'] / GIB:.1f} GiB at the peak\n  {pieces}"
