"""An audio model that compares two clips, behind any endpoint that speaks OpenAI's chat completions.

POST {url}/chat/completions, one user message with text and two `input_audio` parts (base64 of WAV), as OpenAI's audio
models and vLLM's server take them.
"""

import base64
import http.client
import json
import logging
import re
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass

from common.cli import InputError, first_line

logger = logging.getLogger(__name__)

PROMPT = (
    "You will hear two clips, A and B, of a voice that reads this text:\n\n{text}\n\nListen to both to the end. Then "
    "answer the question: {question}"
)
ANSWER = "Answer with one letter and nothing else: A, B, or C if you hear no difference."
NO_DIFFERENCE = "C"
MAX_TRIES = 6  # of a request; with the waits below, over half a minute
FIRST_WAIT_S = 1.0  # doubled with each try
LONGEST_WAIT_S = 60.0
MAX_SHOWN = 200  # characters of what a server says


class JudgeUnavailableError(Exception):
    """The endpoint is busy, broken or not there, and was so each time it was asked."""


@dataclass(frozen=True)
class Reply:
    """What the judge says of two clips.

    Attributes:
        letter: A for the first, B for the second, C for no difference; None for what cannot be read as one of these.
        text: as it came, cut to what is shown.
        input_tokens, output_tokens: as the server counts them; None where it does not.
    """

    letter: str | None
    text: str
    input_tokens: int | None
    output_tokens: int | None


def letter_of(text: str) -> str | None:
    """The letter that an answer is or begins with.

    >>> [letter_of(text) for text in ("B", " **a**. ", "Clip B", "Answer: C", "B: it is clearer", "The answer is (A)")]
    ['B', 'A', 'B', 'C', 'B', 'A']
    >>> [letter_of(text) for text in ("B, because it is clearer", "<think>A is slow.</think>\\n\\nB", "A—it rises")]
    ['B', 'B', 'A']
    >>> [letter_of(text) for text in ("A, B, or C?", "A, B", "A - and B sound the same", "A, however, is worse than B")]
    [None, None, None, None]
    >>> [letter_of(text) for text in ("", "A clip like any other", "Both are fine", "D", "Between A and B")]
    [None, None, None, None, None]
    """
    text = text.rpartition("</think>")[2]
    lead_in = r"(?:(?:my |the )?(?:final )?answer(?: is)?\W*)?(?:(?:clip|audio|option|reading)\W+)?"
    match = re.match(rf"\W*{lead_in}([ABC])(?:\W*$|[.:)*\n。]|(?P<goes_on>[,;，]|\s*[–—]|\s-\s))", text, re.IGNORECASE)
    if match is None or (match["goes_on"] and re.search(r"\b[ABC]\b", text[match.end() :])):
        return None  # what goes on and names a letter again may be "A, B, or C?"
    return match.group(1).upper()


class ChatJudge:
    """Compares two clips of a text; may be asked from several threads.

    Args:
        url: of the API, what stands before /chat/completions.
        question: what to judge by.
        api_key: sent as a bearer token; None sends none.
    """

    def __init__(
        self, url: str, model: str, question: str, max_tokens: int, timeout_s: float, api_key: str | None = None
    ):
        self.url, self.model, self.question, self.max_tokens = url.rstrip("/"), model, question, max_tokens
        self.timeout_s, self.api_key = timeout_s, api_key
        self.stopped = threading.Event()  # set: nothing more is asked
        self._failure: Exception | None = None
        self._opener = urllib.request.build_opener(_NoRedirects)

    def compare(self, text: str, first_wav: bytes, second_wav: bytes) -> Reply:
        """The judge's answer; a busy or broken server is asked again, MAX_TRIES times in all.

        After a failure nothing more is asked: it is raised in every thread.

        Args:
            first_wav, second_wav: WAV files.
        Raises:
            InputError: the server refuses the request (no such model, wrong key, …), or is no such server.
            JudgeUnavailableError: see there.
        """
        body = json.dumps(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": self._content(text, first_wav, second_wav)}],
                "temperature": 0,
                "max_tokens": self.max_tokens,
            }
        ).encode()
        try:
            return self._ask_until_answered(body)
        except (InputError, JudgeUnavailableError) as error:
            self._failure = self._failure or error
            self.stopped.set()
            raise self._failure from None

    def _ask_until_answered(self, body: bytes) -> Reply:
        for attempt in range(1, MAX_TRIES + 1):
            if self.stopped.is_set():
                raise JudgeUnavailableError(f"{self.url}: is asked no more")
            try:
                return self._ask(body)
            except _TryAgain as error:
                if attempt == MAX_TRIES:
                    raise JudgeUnavailableError(f"{self.url}: {error}, after {attempt} tries") from error
                wait_s = min(error.retry_after_s or FIRST_WAIT_S * 2 ** (attempt - 1), LONGEST_WAIT_S)
                logger.warning("%s: %s; asking again in %g s", self.url, error, wait_s)
                self.stopped.wait(wait_s)

    def _content(self, text: str, first_wav: bytes, second_wav: bytes) -> list[dict]:
        def words(text: str) -> dict:
            return {"type": "text", "text": text}

        def sound(wav: bytes) -> dict:
            return {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav).decode(), "format": "wav"}}

        prompt = PROMPT.format(text=text, question=self.question)
        return [words(prompt), words("Clip A:"), sound(first_wav), words("Clip B:"), sound(second_wav), words(ANSWER)]

    def _ask(self, body: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                return self._reply(response.read())
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, http.client.HTTPException) as error:  # refused, timed out, cut off, no such host
            raise _TryAgain(first_line(getattr(error, "reason", error)) or type(error).__name__) from error

    def _reply(self, body: bytes) -> Reply:
        try:
            completion = json.loads(body)
            text = completion["choices"][0]["message"]["content"] or ""
            usage = completion.get("usage") or {}
            tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            return Reply(letter_of(text), text[:MAX_SHOWN], *tokens)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(
                f"--judge_url {self.url}: the answer is no chat completion (got {self._shown(body)!r}). Use the URL of "
                "an API, such as http://localhost:8000/v1"
            ) from error

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            body = error.read()
        except (OSError, http.client.HTTPException):
            body = b""
        code, said = error.code, f"HTTP {error.code}: {self._shown(body) or error.reason}"
        if code in (408, 429) or code >= 500:
            after = error.headers.get("Retry-After", "")
            return _TryAgain(said, float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else None)
        if code in (401, 403):
            what = "is not valid here" if self.api_key else "is not set"
            return InputError(f"--judge_url {self.url}: {said}. The environment variable OPENAI_API_KEY {what}")
        if 300 <= code < 400:
            return InputError(
                f"--judge_url {self.url}: leads on to {error.headers.get('Location')}. Use that URL if you trust it"
            )
        if code == 404:
            return InputError(
                f"--judge_url {self.url}: {said}. It must be what stands before /chat/completions, often ending in "
                f"/v1, and serve --judge_model {self.model}"
            )
        return InputError(f"--judge_url {self.url}: refuses the request ({said})")

    def _shown(self, body: bytes) -> str:
        """What a server says, for a message: {"error": {"message": …}}, or the text; never the key."""
        text = body.decode("utf-8", errors="replace")
        try:
            error = json.loads(text)["error"]
            text = error if isinstance(error, str) else str(error["message"])
        except (ValueError, KeyError, TypeError):
            pass
        text = " ".join(text.split())[:MAX_SHOWN]
        return text.replace(self.api_key, "…") if self.api_key else text


class _TryAgain(Exception):
    """A request that may succeed later, after as many seconds as the server says, if it says so."""

    def __init__(self, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: urllib would make a GET of the POST, and send the key wherever it leads."""

    def redirect_request(self, *_) -> None:
        return None
