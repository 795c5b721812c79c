"""The Llasa format: special tokens, the prompt, and codes as token ids. Written here and nowhere else.

A Llasa policy is a Llama whose tokenizer carries one plain added token `<|s_N|>` per speech code and eight
markers. A text-to-speech prompt is a user turn followed by the *opening* of the assistant's turn:

    user       Convert the text to speech:<|TEXT_UNDERSTANDING_START|>{text}<|TEXT_UNDERSTANDING_END|>
    assistant  <|SPEECH_GENERATION_START|>{codes of the voice prompt, if any}

and the policy answers with codes and `<|SPEECH_GENERATION_END|>` (Llasa, arXiv 2502.04128). TRL renders every
prompt with a generation prompt after it, so the opening of the assistant's turn lives in the chat template
(`prepare_tokenizer`); an assistant message at the end of the prompt would be closed and ignored.
"""

import re
from dataclasses import dataclass

from confined_head import confine_head

SAMPLE_RATE = 16_000  # Hz: the codec's and Whisper's
HOP_LENGTH = 320  # samples per code
CODES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH  # 50, so 256 new tokens are 5.1 s of speech

TEXT_UNDERSTANDING_START = "<|TEXT_UNDERSTANDING_START|>"
TEXT_UNDERSTANDING_END = "<|TEXT_UNDERSTANDING_END|>"
SPEECH_GENERATION_START = "<|SPEECH_GENERATION_START|>"
SPEECH_GENERATION_END = "<|SPEECH_GENERATION_END|>"
# In the order of their ids in Llasa-1B: 128256 … 128263; `<|s_0|>` follows at 128264.
SPECIAL_TOKENS = (
    "<|TEXT_GENERATION_START|>",
    "<|TEXT_GENERATION_END|>",
    TEXT_UNDERSTANDING_START,
    TEXT_UNDERSTANDING_END,
    SPEECH_GENERATION_START,
    SPEECH_GENERATION_END,
    "<|SPEECH_UNDERSTANDING_START|>",
    "<|SPEECH_UNDERSTANDING_END|>",
)

# Llama-3.2's own template writes today's date into the system turn unless it is given one: a policy
# trained in May would see another prompt in June.
_DATE_PIN = "{%- set date_string = '26 Jul 2024' %}"
_OPEN_SPEECH = (
    "{%- if add_generation_prompt %}"
    "{{- '" + SPEECH_GENERATION_START + "' + (messages[-1]['ref_speech'] or '') }}"
    "{%- endif %}"
)


def code_token(code: int) -> str:
    return f"<|s_{code}|>"


def tts_prompt(
    text: str, ref_text: str | None = None, ref_codes: list[int] | None = None
) -> list[dict[str, str]]:
    """The conversation that asks for `text` as speech, in the voice of the reference if there is one.

    Args:
        text: what to say.
        ref_text: transcript of the voice prompt; goes before `text`.
        ref_codes: codes of the voice prompt; the assistant's turn opens with them, so the policy
            continues in that voice.
    Returns:
        One user message. `ref_speech` is read by the chat template that `prepare_tokenizer` sets.
    Raises:
        ValueError: an empty text, a text with a `<|…|>` marker in it, or half a voice prompt.
    """
    if (ref_text is None) != (ref_codes is None):
        raise ValueError(
            "a voice prompt needs both its transcript (ref_text) and its codes (ref_codes); "
            f"got ref_text={ref_text!r} and {'no' if ref_codes is None else len(ref_codes)} codes"
        )
    spoken = text.strip() if ref_text is None else f"{ref_text.strip()} {text.strip()}"
    for name, value in (("text", text), ("ref_text", ref_text)):
        if value is None:
            continue
        if not value.strip():
            raise ValueError(f"{name} is empty ({value!r}); give at least one word to say")
        if re.search(r"<\|[^|]*\|>", value):
            raise ValueError(f"{name} holds a control token: {value!r}; give plain text without <|…|>")
    content = f"Convert the text to speech:{TEXT_UNDERSTANDING_START}{spoken}{TEXT_UNDERSTANDING_END}"
    return [
        {
            "role": "user",
            "content": content,
            "ref_speech": "".join(map(code_token, ref_codes or [])),
        }
    ]


@dataclass(frozen=True)
class SpeechTokens:
    """Where the speech codes live in a tokenizer's vocabulary.

    Attributes:
        start_id, end_id: SPEECH_GENERATION_START and _END.
        first_code_id: id of `<|s_0|>`; code c is `first_code_id + c`.
        num_codes: size of the codebook (65,536 for XCodec2).
    """

    start_id: int
    end_id: int
    first_code_id: int
    num_codes: int

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "SpeechTokens":
        """Read the ids; raises ValueError where the tokenizer has no (contiguous) speech codes."""
        vocab = tokenizer.get_added_vocab()
        codes = {
            int(match[1]): token_id
            for token, token_id in vocab.items()
            if (match := re.fullmatch(r"<\|s_(\d+)\|>", token))
        }
        missing = [token for token in SPECIAL_TOKENS if token not in vocab]
        if missing or not codes:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} is not a Llasa one: it lacks "
                f"{', '.join(missing) or 'the speech codes <|s_0|>, <|s_1|>, …'}. Use a Llasa checkpoint "
                "(HKUSTAudio/Llasa-1B-Multilingual, or tiny/llasa) or one trained from it"
            )
        first = codes.get(0, -1)
        if sorted(codes.items()) != [(c, first + c) for c in range(len(codes))]:
            raise ValueError(
                f"the speech codes of {tokenizer.name_or_path!r} are not one run of ids from <|s_0|> on; "
                "only Llasa's layout is supported"
            )
        return cls(vocab[SPEECH_GENERATION_START], vocab[SPEECH_GENERATION_END], first, len(codes))

    @property
    def speech_ids(self) -> list[int]:
        """All that a speaking policy may sample: END and the codes."""
        return [self.end_id, *range(self.first_code_id, self.first_code_id + self.num_codes)]

    def ids(self, codes: list[int]) -> list[int]:
        """Codes to token ids; raises ValueError for a code outside the codebook."""
        bad = [code for code in codes if not 0 <= code < self.num_codes]
        if bad:
            raise ValueError(
                f"code {bad[0]} is not in [0, {self.num_codes}): these codes come from another codec "
                "than the policy's"
            )
        return [self.first_code_id + code for code in codes]

    def codes(self, completion_ids: list[int]) -> tuple[list[int], bool]:
        """A completion's ids to its codes, and whether it ended.

        Args:
            completion_ids: what was sampled after the prompt, without padding.
        Returns:
            (codes before END, True if END came).
        Raises:
            ValueError: an id that is neither a code nor END. Sampling is confined to those
                (`prepare_model`), so this is never the policy's doing.
        """
        ended = self.end_id in completion_ids
        spoken = completion_ids[: completion_ids.index(self.end_id)] if ended else completion_ids
        codes = [token_id - self.first_code_id for token_id in spoken]
        if any(not 0 <= code < self.num_codes for code in codes):
            raise ValueError(
                f"the completion holds ids outside the speech codes [{self.first_code_id}, "
                f"{self.first_code_id + self.num_codes}): was prepare_model called?"
            )
        return codes, ended


def prepare_tokenizer(tokenizer) -> SpeechTokens:
    """Make `tokenizer` render, stop and pad as a Llasa policy needs. In place, idempotent.

    - the chat template opens the assistant's speech (see the module's docstring) and pins the date;
    - EOS is SPEECH_GENERATION_END, which is what TRL cuts and counts completions by;
    - the padding token is another one than EOS, else the end would be masked as padding.

    Raises:
        ValueError: no speech tokens, or no chat template.
    """
    tokens = SpeechTokens.from_tokenizer(tokenizer)
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template")
    if _OPEN_SPEECH not in tokenizer.chat_template:
        tokenizer.chat_template = _DATE_PIN + tokenizer.chat_template + _OPEN_SPEECH
    tokenizer.eos_token = SPEECH_GENERATION_END
    if tokenizer.pad_token in (None, SPEECH_GENERATION_END):
        padding = [t for t in ("<|finetune_right_pad_id|>", "<|end_of_text|>") if t in tokenizer.get_vocab()]
        if not padding:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no padding token besides EOS; "
                "set tokenizer.pad_token to an unused token and save it"
            )
        tokenizer.pad_token = padding[0]
    return tokens


def prompt_ids(tokenizer, prompt: list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt from `tts_prompt`: the very call that TRL makes."""
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]


def prepare_model(model, tokenizer, tokens: SpeechTokens) -> None:
    """Confine the model to speech codes and END, and write END and the padding token into its configs."""
    confine_head(model, tokens.speech_ids)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokens.end_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
