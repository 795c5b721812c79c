"""A server with OpenAI's chat completions on this machine, whose model compares two clips as it is told to."""

import base64
import io
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import soundfile

Wavs = tuple[np.ndarray, np.ndarray]


def pitch_hz(wav: np.ndarray) -> float:
    """Of a tone: its crossings of zero, at 16 kHz."""
    return np.count_nonzero(np.diff(np.signbit(wav))) / 2 / (len(wav) / 16_000)


def prefers_the_higher(first: np.ndarray, second: np.ndarray) -> str:
    """A judge that hears the clips: the tone of the higher pitch is better."""
    return "A" if pitch_hz(first) > pitch_hz(second) else "B"


class FakeJudge:
    """Use as a context manager; `url` is its --judge_url.

    Args:
        choose: from the two clips to the answer.
        key: what it wants as bearer token.
        faults: (status, headers) of its first answers, before it begins to judge.
    """

    def __init__(
        self, choose: Callable[..., str | None] = prefers_the_higher, key: str | None = None, faults: tuple = ()
    ):
        self.choose, self.key, self.faults, self.requests = choose, key, list(faults), []
        self.lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                judge.answer(self, json.loads(body))

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, handler: BaseHTTPRequestHandler, request: dict) -> None:
        with self.lock:
            self.requests.append(request)
            fault = self.faults.pop(0) if self.faults else None
        if fault:
            return self.send(handler, fault[0], {"error": {"message": "not now"}}, fault[1])
        if handler.path != "/v1/chat/completions":
            return self.send(handler, 404, {"detail": "Not Found"})
        given = handler.headers.get("Authorization")
        if self.key and given != f"Bearer {self.key}":
            return self.send(handler, 401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        if request["model"] != "judge":
            return self.send(handler, 404, {"error": {"message": f"The model {request['model']} does not exist"}})
        text = self.choose(*wavs_of(request))
        usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
        message = {"role": "assistant", "content": text}
        self.send(handler, 200, {"choices": [{"index": 0, "message": message}], "usage": usage})

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, status: int, content: dict, headers: dict | None = None) -> None:
        body = json.dumps(content).encode()
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)


def wavs_of(request: dict) -> Wavs:
    """The clips of a request, checked as OpenAI's API checks its parts."""
    [message] = request["messages"]
    assert message["role"] == "user" and {part["type"] for part in message["content"]} == {"text", "input_audio"}
    sounds = [part["input_audio"] for part in message["content"] if part["type"] == "input_audio"]
    assert len(sounds) == 2 and all(sound["format"] == "wav" for sound in sounds)
    return tuple(soundfile.read(io.BytesIO(base64.b64decode(sound["data"], validate=True)))[0] for sound in sounds)


def prompt_of(request: dict) -> str:
    return "\n".join(part["text"] for part in request["messages"][0]["content"] if part["type"] == "text")
