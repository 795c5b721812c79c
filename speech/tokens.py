"""The Llasa format: special tokens, the prompts, and codes as token ids. Written here and nowhere else.

A Llasa policy is a Llama whose tokenizer carries one plain added token `<|s_N|>` per speech code and eight
markers. A prompt is a user turn followed by the *opening* of the assistant's turn. Text to speech ("tts"):

    user       Convert the text to speech:<|TEXT_UNDERSTANDING_START|>{text}<|TEXT_UNDERSTANDING_END|>
    assistant  <|SPEECH_GENERATION_START|>{codes of the voice prompt, if any}

and the policy answers with codes and `<|SPEECH_GENERATION_END|>` (Llasa, arXiv 2502.04128). Speech to text ("asr", by
the same model, §4.3 there; the paper does not print this prompt, it is the first one mirrored):

    user       Convert the speech to text:<|SPEECH_UNDERSTANDING_START|>{codes}<|SPEECH_UNDERSTANDING_END|>
    assistant  <|TEXT_GENERATION_START|>

and the policy answers with text and `<|TEXT_GENERATION_END|>`. TRL renders every prompt with a generation prompt
after it, so the opening of the assistant's turn travels with the user's message and is written by the chat template
(`prepare_tokenizer`); an assistant message at the end of the prompt would be closed and ignored.
"""

import re
from dataclasses import dataclass

from common.cli import InputError, check_unicode
from speech.confined_head import confine_head

SAMPLE_RATE = 16_000  # Hz: the codec's and Whisper's
HOP_LENGTH = 320  # samples per code
CODES_PER_SECOND = SAMPLE_RATE // HOP_LENGTH  # 50, so 256 new tokens are 5.1 s of speech

TEXT_GENERATION_START = "<|TEXT_GENERATION_START|>"
TEXT_GENERATION_END = "<|TEXT_GENERATION_END|>"
TEXT_UNDERSTANDING_START = "<|TEXT_UNDERSTANDING_START|>"
TEXT_UNDERSTANDING_END = "<|TEXT_UNDERSTANDING_END|>"
SPEECH_GENERATION_START = "<|SPEECH_GENERATION_START|>"
SPEECH_GENERATION_END = "<|SPEECH_GENERATION_END|>"
SPEECH_UNDERSTANDING_START = "<|SPEECH_UNDERSTANDING_START|>"
SPEECH_UNDERSTANDING_END = "<|SPEECH_UNDERSTANDING_END|>"
# In the order of their ids in Llasa-1B: 128256 … 128263; `<|s_0|>` follows at 128264.
SPECIAL_TOKENS = (
    TEXT_GENERATION_START,
    TEXT_GENERATION_END,
    TEXT_UNDERSTANDING_START,
    TEXT_UNDERSTANDING_END,
    SPEECH_GENERATION_START,
    SPEECH_GENERATION_END,
    SPEECH_UNDERSTANDING_START,
    SPEECH_UNDERSTANDING_END,
)
XCODEC2_CODES = 65_536  # its codebook: 4**8
TASKS = ("tts", "asr")
MAX_LENGTH = 2_048  # tokens of prompt and answer together, Llasa's context
# Tokens of an answer: speech of up to 30 s, Whisper's window; a transcript of 30 s, some 150 words
MAX_COMPLETION_LENGTH = {"tts": 1_500, "asr": 256}

# Llama-3.2's own template writes today's date into the system turn unless it is given one: a policy
# trained in May would see another prompt in June.
_DATE_PIN = "{%- set date_string = '26 Jul 2024' %}"
_OPEN_ANSWER = "{%- if add_generation_prompt %}{{- messages[-1]['opening'] }}{%- endif %}"


def code_token(code: int) -> str:
    return f"<|s_{code}|>"


def tts_prompt(text: str, ref_text: str | None = None, ref_codes: list[int] | None = None) -> list[dict[str, str]]:
    """The conversation that asks for `text` as speech, in the voice of the reference if there is one.

    Args:
        text: what to say.
        ref_text: transcript of the voice prompt; goes before `text`.
        ref_codes: codes of the voice prompt; the assistant's turn opens with them, so the policy
            continues in that voice.
    Returns:
        One user message. `opening` is read by the chat template that `prepare_tokenizer` sets.
    Raises:
        InputError: an empty text, a text with a `<|…|>` marker in it, or half a voice prompt.
    """
    if (ref_text is None) != (ref_codes is None):
        raise InputError(
            "a voice prompt needs both its transcript (ref_text) and its codes (ref_codes); "
            f"got ref_text={ref_text!r} and {'no' if ref_codes is None else len(ref_codes)} codes"
        )
    transcript = text.strip() if ref_text is None else f"{ref_text.strip()} {text.strip()}"
    for name, value in (("text", text), ("ref_text", ref_text)):
        if value is None:
            continue
        check_unicode(value)
        if not value.strip():
            raise InputError(
                f"{name} is empty ({value!r}). Use a text with at least one word; clips without speech are for ASR"
            )
        if re.search(r"<\|[^|]*\|>", value):
            raise InputError(f"{name} holds a control token: {value!r}. Use plain text without <|…|>")
    content = f"Convert the text to speech:{TEXT_UNDERSTANDING_START}{transcript}{TEXT_UNDERSTANDING_END}"
    opening = SPEECH_GENERATION_START + "".join(map(code_token, ref_codes or []))
    return [{"role": "user", "content": content, "opening": opening}]


def asr_prompt(codes: list[int]) -> list[dict[str, str]]:
    """The conversation that asks for the transcript of `codes`; one user message, as from `tts_prompt`.

    Raises:
        InputError: no codes.
    """
    if not codes:
        raise InputError("there is no speech to read: the list of codes is empty")
    speech = "".join(map(code_token, codes))
    content = f"Convert the speech to text:{SPEECH_UNDERSTANDING_START}{speech}{SPEECH_UNDERSTANDING_END}"
    return [{"role": "user", "content": content, "opening": TEXT_GENERATION_START}]


@dataclass(frozen=True)
class SpeechTokens:
    """Where speech codes and text live in a tokenizer's vocabulary.

    Attributes:
        start_id, end_id: SPEECH_GENERATION_START and _END.
        first_code_id: id of `<|s_0|>`; code c is `first_code_id + c`.
        num_codes: size of the codebook (65,536 for XCodec2).
        num_text_ids: text is the ids [0, num_text_ids), the vocabulary without any added token.
        text_end_id: TEXT_GENERATION_END.
    """

    start_id: int
    end_id: int
    first_code_id: int
    num_codes: int
    num_text_ids: int
    text_end_id: int

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "SpeechTokens":
        """Read the ids; raises InputError where the tokenizer has no (contiguous) speech codes."""
        vocab = tokenizer.get_added_vocab()
        codes = {
            int(match[1]): token_id
            for token, token_id in vocab.items()
            if (match := re.fullmatch(r"<\|s_(\d+)\|>", token))
        }
        missing = [token for token in SPECIAL_TOKENS if token not in vocab]
        if missing or not codes:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path!r} is not a Llasa one: it lacks "
                f"{', '.join(missing) or 'the speech codes <|s_0|>, <|s_1|>, …'}. Use a Llasa checkpoint "
                "(HKUSTAudio/Llasa-1B-Multilingual, or tiny/llasa) or one trained from it"
            )
        first = codes.get(0, -1)
        if sorted(codes.items()) != [(c, first + c) for c in range(len(codes))]:
            raise InputError(
                f"the speech codes of {tokenizer.name_or_path!r} are not one run of ids from <|s_0|> on; "
                "only Llasa's layout is supported"
            )
        return cls(
            start_id=vocab[SPEECH_GENERATION_START],
            end_id=vocab[SPEECH_GENERATION_END],
            first_code_id=first,
            num_codes=len(codes),
            num_text_ids=tokenizer.vocab_size,
            text_end_id=vocab[TEXT_GENERATION_END],
        )

    @property
    def speech_ids(self) -> list[int]:
        """All that a TTS policy may sample: END and the codes."""
        return [self.end_id, *range(self.first_code_id, self.first_code_id + self.num_codes)]

    @property
    def text_ids(self) -> list[int]:
        """All that an ASR policy may sample: text and TEXT_GENERATION_END."""
        return [*range(self.num_text_ids), self.text_end_id]

    def answer_ids(self, task: str) -> list[int]:
        """All that a policy may sample in a task of TASKS; in "both", for training only, either."""
        return {"tts": self.speech_ids, "asr": self.text_ids, "both": self.text_ids + self.speech_ids}[task]

    def answer_end_id(self, task: str) -> int:
        """What an answer ends with."""
        return self.text_end_id if task == "asr" else self.end_id

    def ids(self, codes: list[int]) -> list[int]:
        """Codes to token ids; raises InputError for a code outside the codebook."""
        bad = [code for code in codes if not 0 <= code < self.num_codes]
        if bad:
            raise InputError(
                f"code {bad[0]} is not in [0, {self.num_codes}): these codes come from another codec than the policy's"
            )
        return [self.first_code_id + code for code in codes]

    def codes(self, completion_ids: list[int]) -> tuple[list[int], bool]:
        """A completion's ids to its codes, and whether it was truncated.

        Args:
            completion_ids: what was sampled after the prompt, without padding.
        Returns:
            (codes before END, True if END never came).
        Raises:
            ValueError: an id that is neither a code nor END. Sampling is confined to those
                (`prepare_model`), so this is never the policy's doing.
        """
        ended = self.end_id in completion_ids
        before_end = completion_ids[: completion_ids.index(self.end_id)] if ended else completion_ids
        codes = [token_id - self.first_code_id for token_id in before_end]
        if any(not 0 <= code < self.num_codes for code in codes):
            raise ValueError(
                f"the completion holds ids outside the speech codes [{self.first_code_id}, "
                f"{self.first_code_id + self.num_codes}): was prepare_model called?"
            )
        return codes, not ended


def prepare_tokenizer(tokenizer, task: str = "tts") -> SpeechTokens:
    """Make `tokenizer` render, stop and pad as a Llasa policy needs in a task. In place, idempotent.

    - the chat template opens the assistant's answer (see the module's docstring) and pins the date;
    - EOS is the END of the task's answers, which is what TRL cuts and counts completions by;
    - the padding token is another one than EOS, else the end would be masked as padding.

    Raises:
        InputError: no speech tokens, no chat template, or one that does not render a prompt as this module has it.
    """
    tokens = SpeechTokens.from_tokenizer(tokenizer)
    if task != "tts" and min(tokenizer.get_added_vocab().values()) < tokens.num_text_ids:  # text would not be one run
        raise InputError(
            f"the added tokens of {tokenizer.name_or_path!r} do not follow its text vocabulary of "
            f"{tokens.num_text_ids}; --task {task} supports Llasa's layout only"
        )
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template")
    if _OPEN_ANSWER not in tokenizer.chat_template:
        tokenizer.chat_template = _DATE_PIN + tokenizer.chat_template + _OPEN_ANSWER
    _check_rendering(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens.answer_end_id(task))
    if tokenizer.pad_token in (None, SPEECH_GENERATION_END, TEXT_GENERATION_END):
        padding = [t for t in ("<|finetune_right_pad_id|>", "<|end_of_text|>") if t in tokenizer.get_vocab()]
        if not padding:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no padding token besides EOS; "
                "set tokenizer.pad_token to an unused token and save it"
            )
        tokenizer.pad_token = padding[0]
    return tokens


def _check_rendering(tokenizer) -> None:
    """InputError where the chat template opens the answer itself as well, or changes the user's turn.

    Nothing else would show: the policy answers any prompt, only less well.
    """
    prompt = tts_prompt("a")
    rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    content, opening = prompt[0]["content"], prompt[0]["opening"]
    if not rendered.endswith(opening) or rendered.count(opening) != 1 or rendered.count(content) != 1:
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} renders a prompt as {rendered!r}; it should hold "
            f"{content!r} once, and {opening!r} once, at its end. The template was changed by another tool or version. "
            "Use the chat_template.jinja of the model it was trained from"
        )


def prompt_ids(tokenizer, prompt: list[dict[str, str]]) -> list[int]:
    """Token ids of a prompt from `tts_prompt` or `asr_prompt`: the very call that TRL makes."""
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
        "input_ids"
    ]


def written_text(tokenizer, completion_ids: list[int], end_id: int) -> tuple[str, bool]:
    """A completion's ids to the text before END, and whether it was truncated (END never came).

    Other control tokens are kept: what the policy wrote is to be seen as it is.
    """
    ended = end_id in completion_ids
    written = completion_ids[: completion_ids.index(end_id)] if ended else completion_ids
    return tokenizer.decode(written, skip_special_tokens=False).strip(), not ended


def prepare_model(model, tokenizer, tokens: SpeechTokens, task: str = "tts") -> None:
    """Confine the model to the tokens of a task's answers, and write END and padding into its configs."""
    confine_head(model, tokens.answer_ids(task))
    model.config.eos_token_id = model.generation_config.eos_token_id = tokens.answer_end_id(task)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
