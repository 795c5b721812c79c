"""XCodec2's weights in the layouts they are published in, as transformers' native model wants them."""

import re

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Wav2Vec2BertConfig, Xcodec2Config, Xcodec2Model

from common.cli import InputError
from speech.checkpoint_files import find_checkpoint, load_weights, read_json

ACCEPTED = "a folder with config.json and weights, 'HKUSTAudio/xcodec2' or 'HKUSTAudio/xcodec2-hf'"
SEMANTIC_LAYERS = 16  # the original reads hidden_states[16] of w2v-bert-2.0's 24 layers
HEAD_DIM = 64  # of the original's decoder: not to be seen in its weights
MOST_NAMED = 4  # tensors in an error message
# What this module, transformers and torch raise for names, shapes and sizes that make no model
UNFIT = (InputError, StrictDataclassError, ValueError, RuntimeError, ZeroDivisionError)


def load_model(id_or_path: str, dtype: torch.dtype) -> Xcodec2Model:
    """The model of a native or an original checkpoint, on the CPU; config.json tells which it is.

    Raises:
        InputError: no such folder or hub model, not an XCodec2, a file that cannot be read, or weights that do not fit.
    """
    folder = find_checkpoint(str(id_or_path), ACCEPTED)
    settings = read_json(folder / "config.json")
    is_original = "codec_decoder_hidden_size" in settings
    if not is_original and settings.get("model_type") != "xcodec2":
        raise InputError(
            f"{id_or_path}: model_type {settings.get('model_type')!r} is no XCodec2; accepted: "
            "'xcodec2' of transformers, or a checkpoint of the xcodec2 package"
        )
    weights = load_weights(folder)
    try:
        if is_original:
            weights = rename_original(weights)
            config = original_config(weights)
        else:
            config = Xcodec2Config.from_dict(settings)
        check_fit(weights, config)
    except UNFIT as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{id_or_path}: not the checkpoint of an XCodec2: {reason}. Download or save it again"
        ) from error
    return Xcodec2Model.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def check_fit(weights: dict[str, torch.Tensor], config: Xcodec2Config) -> None:
    """Raises InputError where names or shapes are not those of a model of this config.

    transformers would only warn, and fill in random weights.
    """
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in Xcodec2Model(config).state_dict().items()}
    wrong = [
        f"{name} (got {tuple(weights[name].shape)}, expected {tuple(shape)})"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    for problem, names in (
        ("missing", expected.keys() - weights.keys()),
        ("unknown", weights.keys() - expected.keys()),
        ("wrongly shaped", wrong),
    ):
        if names:
            more = " …" if len(names) > MOST_NAMED else ""
            raise InputError(f"{len(names)} {problem} tensors: {', '.join(sorted(names)[:MOST_NAMED])}{more}")


# The original's names → the native model's, every substitution tried in this order. The original
# counts its first convolution as block 0 and its residual units from 0.
_RENAMES = [
    (r"^CodecEnc\.conv_blocks\.0\.", "acoustic_encoder.conv1."),
    (r"^CodecEnc\.conv_blocks\.(\d+)\.", lambda m: f"acoustic_encoder.block.{int(m[1]) - 1}."),
    (r"(block\.\d+)\.block\.([012])\.", lambda m: f"{m[1]}.res_unit{int(m[2]) + 1}."),
    (r"(block\.\d+)\.block\.3\.", r"\1.snake1."),
    (r"(block\.\d+)\.block\.4\.", r"\1.conv1."),
    (r"(res_unit\d)\.block\.([02])\.", lambda m: f"{m[1]}.snake{int(m[2]) // 2 + 1}."),
    (r"(res_unit\d)\.block\.([13])\.", lambda m: f"{m[1]}.conv{int(m[2]) // 2 + 1}."),
    (r"^CodecEnc\.conv_final_block\.0\.", "acoustic_encoder.snake1."),
    (r"^CodecEnc\.conv_final_block\.1\.", "acoustic_encoder.conv2."),
    (r"\.act\.bias$", ".act.beta"),
    (r"\.parametrizations\.weight\.original0$", ".weight_g"),
    (r"\.parametrizations\.weight\.original1$", ".weight_v"),
    (r"^SemanticEncoder_module\.initial_conv\.", "semantic_adapter.conv1."),
    (r"^SemanticEncoder_module\.residual_blocks\.1\.", "semantic_adapter.conv2."),
    (r"^SemanticEncoder_module\.residual_blocks\.3\.", "semantic_adapter.conv3."),
    (r"^SemanticEncoder_module\.final_conv\.", "semantic_adapter.conv4."),
    (r"^semantic_model\.", "semantic_encoder."),
    (r"^fc_prior\.", "fc_encoder."),
    (r"^fc_post_a\.", "acoustic_decoder.fc."),
    (r"^generator\.quantizer\.", "quantizer."),
    (r"^generator\.head\.out\.", "acoustic_decoder.head.linear."),
    (r"^generator\.backbone\.final_layer_norm\.", "acoustic_decoder.norm."),
    (r"^generator\.backbone\.transformers\.", "acoustic_decoder.layers."),
    (r"^generator\.backbone\.", "acoustic_decoder."),
    (r"\.att_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.att\.c_proj\.", ".self_attn.o_proj."),
    (r"\.att\.c_attn\.", ".self_attn.qkv_proj."),  # split below
]
# Constants that the native model computes, and the mask of w2v-bert's pre-training.
_NOT_NEEDED = re.compile(r"\.filter$|\.istft\.window$|\.rotary_embed\.|\.masked_spec_embed$")
_SEMANTIC_LAYER = re.compile(r"semantic_model\.encoder\.layers\.(\d+)\.")


def rename_original(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The original's weights under the native model's names; unknown names pass unchanged.

    Reads them as the package saves them, and in the spelling of its training code and of older
    torch (SnakeBeta's `beta` for `bias`, `weight_g`, `weight_v` for `parametrizations.weight.*`).
    """
    native = {}
    for name, weight in original.items():
        layer = _SEMANTIC_LAYER.match(name)
        if _NOT_NEEDED.search(name) or (layer and int(layer[1]) >= SEMANTIC_LAYERS):
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        native[name] = weight
    for name in list(native):
        if name.endswith(".weight_g") and name[:-2] + "_v" in native:
            _fold_weight_norm(native, name[:-2])
        elif ".qkv_proj." in name:
            _split_qkv(native, name)
    return native


def _fold_weight_norm(native: dict[str, torch.Tensor], name: str) -> None:
    gain, direction = native.pop(name + "_g"), native.pop(name + "_v")
    if direction.ndim < 2 or gain.shape != (len(direction), *[1] * (direction.ndim - 1)):
        # torch would not check it, and write past the end of its norms
        shapes = f"{tuple(gain.shape)} and {tuple(direction.shape)}"
        raise InputError(f"gain and direction of the weight norm of {name} do not fit (got the shapes {shapes})")
    native[name] = torch._weight_norm(direction, gain, 0)


def _split_qkv(native: dict[str, torch.Tensor], name: str) -> None:
    qkv = native.pop(name)
    if qkv.ndim == 0 or len(qkv) % 3:
        raise InputError(f"{name} cannot be split into query, key and value (got the shape {tuple(qkv.shape)})")
    # As they are: the two models pair dimensions for RoPE differently, but its position is
    # the head's index, one angle for query and key, so it cancels in their product.
    for part, weight in zip("qkv", qkv.chunk(3), strict=True):
        native[name.replace("qkv", part)] = weight


def original_config(state: dict[str, torch.Tensor]) -> Xcodec2Config:
    """Every size, read off the renamed weights: the original's config.json holds few of them."""

    def sizes(name: str, dims: int) -> torch.Size:
        if name not in state:
            raise InputError(f"1 missing tensors: {name}")
        if state[name].ndim != dims:
            raise InputError(f"{name} must have {dims} dimensions (got the shape {tuple(state[name].shape)})")
        return state[name].shape

    hidden = sizes("acoustic_decoder.embed.weight", 3)[0]
    blocks = [name for name in sorted(state) if re.fullmatch(r"acoustic_encoder\.block\.\d\.conv1\.weight", name)]
    strides = [sizes(name, 3)[2] // 2 for name in blocks]  # a downsampling convolution is twice as wide as its stride
    layer = "semantic_encoder.encoder.layers.0."
    semantic_hidden, n_features = sizes("semantic_encoder.feature_projection.projection.weight", 2)
    semantic_head_dim = sizes(layer + "self_attn.distance_embedding.weight", 2)[1]
    codes = sizes("quantizer.project_in.weight", 2)
    semantic_model_config = Wav2Vec2BertConfig(
        num_hidden_layers=SEMANTIC_LAYERS,
        hidden_size=semantic_hidden,
        intermediate_size=sizes(layer + "ffn1.intermediate_dense.weight", 2)[0],
        num_attention_heads=semantic_hidden // semantic_head_dim,
        feature_projection_input_dim=n_features,
        conv_depthwise_kernel_size=sizes(layer + "conv_module.depthwise_conv.weight", 3)[2],
        mask_time_prob=0.0,  # so that it has no masked_spec_embed
    )
    return Xcodec2Config(
        hidden_size=hidden,
        intermediate_size=sizes("acoustic_decoder.layers.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=sum(name.endswith(".input_layernorm.weight") for name in state),
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        encoder_hidden_size=sizes("acoustic_encoder.conv1.weight", 3)[0],
        downsampling_ratios=strides,
        quantization_dim=codes[1],
        quantization_levels=[4] * codes[0],
        semantic_model_config=semantic_model_config,
    )
