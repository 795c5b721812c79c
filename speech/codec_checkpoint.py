"""XCodec2's weights in the layouts they are published in, as transformers' native model wants them."""

import re

import torch
from transformers import Wav2Vec2BertConfig, Xcodec2Config

ACCEPTED = "a folder with config.json and weights, 'HKUSTAudio/xcodec2' or 'HKUSTAudio/xcodec2-hf'"
SEMANTIC_LAYERS = 16  # the original reads hidden_states[16] of w2v-bert-2.0's 24 layers
HEAD_DIM = 64  # of the original's decoder: not to be seen in its weights

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
        if name.endswith(".weight_g") and name[:-2] + "_v" in native:  # fold the weight norm
            gain, direction = native.pop(name), native.pop(name[:-2] + "_v")
            native[name[:-2]] = torch._weight_norm(direction, gain, 0)
        elif ".qkv_proj." in name:
            # As they are: the two models pair dimensions for RoPE differently, but its position is
            # the head's index, one angle for query and key, so it cancels in their product.
            for part, weight in zip("qkv", native.pop(name).chunk(3), strict=True):
                native[name.replace("qkv", part)] = weight
    return native


def original_config(state: dict[str, torch.Tensor]) -> Xcodec2Config:
    """Every size, read off the renamed weights: the original's config.json holds few of them."""
    shapes = {name: weight.shape for name, weight in state.items()}
    hidden = shapes["acoustic_decoder.embed.weight"][0]
    strides = {  # a downsampling convolution is twice as wide as its stride
        name: shape[-1] // 2
        for name, shape in shapes.items()
        if re.fullmatch(r"acoustic_encoder\.block\.\d\.conv1\.weight", name)
    }
    layer = "semantic_encoder.encoder.layers.0."
    semantic_hidden, n_features = shapes["semantic_encoder.feature_projection.projection.weight"]
    semantic_head_dim = shapes[layer + "self_attn.distance_embedding.weight"][1]
    semantic_model_config = Wav2Vec2BertConfig(
        num_hidden_layers=SEMANTIC_LAYERS,
        hidden_size=semantic_hidden,
        intermediate_size=shapes[layer + "ffn1.intermediate_dense.weight"][0],
        num_attention_heads=semantic_hidden // semantic_head_dim,
        feature_projection_input_dim=n_features,
        conv_depthwise_kernel_size=shapes[layer + "conv_module.depthwise_conv.weight"][-1],
        mask_time_prob=0.0,  # so that it has no masked_spec_embed
    )
    return Xcodec2Config(
        hidden_size=hidden,
        intermediate_size=shapes["acoustic_decoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=sum(name.endswith(".input_layernorm.weight") for name in shapes),
        num_attention_heads=hidden // HEAD_DIM,
        num_key_value_heads=hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        encoder_hidden_size=shapes["acoustic_encoder.conv1.weight"][0],
        downsampling_ratios=[strides[name] for name in sorted(strides)],
        quantization_dim=shapes["quantizer.project_in.weight"][1],
        quantization_levels=[4] * shapes["quantizer.project_in.weight"][0],
        semantic_model_config=semantic_model_config,
    )
