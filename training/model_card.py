"""The model card (README.md) that train.py writes beside a trained model."""

import re
from pathlib import Path

from common.run_record import git_commit
from speech.tokens import SPEECH_GENERATION_END, TEXT_GENERATION_END, asr_prompt, code_token, tts_prompt

METHODS = {
    "sft": "supervised fine-tuning on speech codes",
    "dpo": "DPO on pairs of preferences, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290), by TRL",
    "grpo": "GRPO, [arXiv 2402.03300](https://arxiv.org/abs/2402.03300), by TRL",
    "diffro": "DiffRO, a differentiable reward, [arXiv 2507.05911](https://arxiv.org/abs/2507.05911)",
    "grpo+diffro": "GRPO and DiffRO combined, [arXiv 2509.18569](https://arxiv.org/abs/2509.18569)",
}
TASKS = {"tts": "text to speech", "asr": "speech recognition", "both": "text to speech and speech recognition"}
FINAL_METRICS = ("reward", "loss", "wer", "nll", "kl", "duration_s", "frac_truncated", "frac_hallucination")
FINAL_METRICS += ("rewards/accuracies", "rewards/margins")
PUBLISHED_LICENCE = "cc-by-nc-4.0"  # of HKUSTAudio's Llasa checkpoints


def licence_of(model: str) -> str | None:
    """The licence of a model, by its own card in a folder, or by its publisher; None where neither says."""
    card = Path(model) / "README.md"
    if card.is_file():
        found = re.search(r"^license: *(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE)
        return found[1] if found else None
    return PUBLISHED_LICENCE if model.startswith("HKUSTAudio/Llasa") else None


def final_metrics(log_history: list[dict]) -> dict[str, float]:
    """The last logged value of each of FINAL_METRICS."""
    return {
        key: next(entry[key] for entry in reversed(log_history) if entry.get(key) is not None)
        for key in FINAL_METRICS
        if any(entry.get(key) is not None for entry in log_history)
    }


def model_card(
    name: str,
    base_model: str,
    method: str,
    task: str,
    dataset: str,
    rewards: dict | None,
    codec_id: str,
    log_history: list[dict],
    max_length: int,
) -> str:
    """The text of README.md.

    Args:
        name: what the card's code loads: a hub id, or the folder.
        rewards: the reward config; None for SFT and DPO.
        log_history: of the trainer.
    """
    licence = licence_of(base_model)
    header = [f"base_model: {base_model}"] if "/" in base_model and not Path(base_model).exists() else []
    header += [f"license: {licence}"] if licence else []
    header += ["library_name: transformers", f"pipeline_tag: {_pipeline(task)}", "tags: [llasa, xcodec2, llasa-grpo]"]
    metrics = final_metrics(log_history)
    step = log_history[-1]["step"] if log_history else 0
    parts = [
        "---\n" + "\n".join(header) + "\n---",
        f"# {Path(name).name}",
        f"A [Llasa](https://arxiv.org/abs/2502.04128) model for {TASKS[task]}: a Llama-3.2 over XCodec2 speech codes.",
        "\n".join(
            [
                f"- **Base model:** {base_model}",
                f"- **Method:** {METHODS[method]}; {step} steps",
                *([f"- **Rewards:** {_rewards(rewards)}"] if rewards else []),
                f"- **Data:** {dataset}",
                f"- **Codec:** {codec_id}, 50 codes a second, 16 kHz",
                f"- **Licence:** {_licence(licence, base_model)}",
                f"- **Code:** Llasa-GRPO at commit {git_commit()}; run.json has every setting",
            ]
        ),
    ]
    if metrics:
        table = "\n".join(f"| {key} | {value:.4g} |" for key, value in metrics.items())
        source = "rollouts" if rewards else "rows"
        parts.append(
            f"## At the end of training\n\nOf the training's own {source}, not of held-out texts.\n\n"
            f"| metric | value |\n|---|---|\n{table}"
        )
    parts += [_usage(name, task, codec_id, max_length)]
    return "\n\n".join(parts) + "\n"


def _pipeline(task: str) -> str:
    return "automatic-speech-recognition" if task == "asr" else "text-to-speech"


def _rewards(rewards: dict) -> str:
    shown = []
    for name, parameters in rewards.items():
        rest = ", ".join(f"{key} {value:g}" for key, value in parameters.items() if key != "weight")
        shown.append(f"`{name}` × {parameters['weight']:g}" + (f" ({rest})" if rest else ""))
    return "; ".join(shown)


def _licence(licence: str | None, base_model: str) -> str:
    return f"{licence}, as its base model" if licence else f"that of its base model, {base_model}"


def _usage(name: str, task: str, codec_id: str, max_length: int) -> str:
    ours = (
        f'python inference.py --model_name_or_path {name} --text "Did Susan find the yellow boat?" --output sample.wav'
    )
    if task == "asr":
        ours = f"python inference.py --task asr --model_name_or_path {name} --audio clip.wav"
    plain = _plain_asr(name, max_length) if task == "asr" else _plain_tts(name, max_length)
    decoding = (
        ""
        if task == "asr"
        else (
            "\nXCodec2 decodes the codes to a waveform of 16 kHz (`codec` is an `Xcodec2Model` of transformers, "
            "such as "
            "`HKUSTAudio/xcodec2-hf`):\n\n```python\n"
            "wav = codec.decode(audio_codes=torch.tensor(codes)[None, None]).audio_values[0, 0]\n```"
        )
    )
    return (
        f"## How to use\n\nWith Llasa-GRPO:\n\n```bash\n{ours}\n```\n\nWith transformers alone. The model was trained "
        "with its choice confined to the tokens of an answer, so sampling has to be confined as well:\n\n"
        f"```python\n{plain}\n```\n{decoding}".rstrip()
    )


def _plain_tts(name: str, max_length: int) -> str:
    [message] = tts_prompt("{text}")
    return f'''import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype=torch.float32).eval()
text = "Did Susan find the yellow boat?"
content = f"{message["content"]}"
prompt = [{{"role": "user", "content": content, "opening": "{message["opening"]}"}}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
end, first = tokenizer.convert_tokens_to_ids(["{SPEECH_GENERATION_END}", "<|s_0|>"])
answer_ids = [end] + [i for token, i in tokenizer.get_added_vocab().items() if token.startswith("<|s_")]
set_seed(0)
output = model.generate(
    **inputs,
    do_sample=True,
    temperature=0.8,
    top_k=0,
    max_length={max_length},
    eos_token_id=end,
    prefix_allowed_tokens_fn=lambda batch, ids: answer_ids,
)
codes = [i - first for i in output[0, inputs["input_ids"].shape[1] :].tolist() if i != end]'''


def _plain_asr(name: str, max_length: int) -> str:
    [message] = asr_prompt([0])
    content = message["content"].replace(code_token(0), "{speech}")
    return f'''import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}", dtype=torch.float32).eval()
codes = [...]  # of the clip, by XCodec2
speech = "".join(f"<|s_{{code}}|>" for code in codes)
content = f"{content}"
prompt = [{{"role": "user", "content": content, "opening": "{message["opening"]}"}}]
inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt")
end = tokenizer.convert_tokens_to_ids("{TEXT_GENERATION_END}")
answer_ids = [*range(tokenizer.vocab_size), end]
output = model.generate(
    **inputs,
    do_sample=False,
    max_length={max_length},
    eos_token_id=end,
    prefix_allowed_tokens_fn=lambda batch, ids: answer_ids,
)
text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :].tolist())
text = text.removesuffix("{TEXT_GENERATION_END}").strip()'''
