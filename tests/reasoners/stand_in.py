"""A real HTTP server that speaks as much of OpenAI's chat API as is asked for, and fails on demand. Test code."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = {"rationale": "the cube is lower", "direction": "down", "amount": "full", "gripper": "open"}


@dataclass
class Fault:
    """What to answer instead, once.

    Attributes:
        status: of HTTP.
        headers: beside it.
        text: the answer's content, where the status is 200.
        body: the whole body, where it isn't the API's at all.
        hang: wait until the test is over, as if the server had died.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    body: bytes | None = None
    hang: bool = False


@dataclass
class StandIn:
    """The server's side."""

    url: str
    answer: Callable[[dict[str, Any]], str]
    faults: deque[Fault] = field(default_factory=deque)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def stand_in(answer: Callable[[dict[str, Any]], str] | None = None) -> Iterator[StandIn]:
    state: StandIn

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            assert not request.get("stream")
            state.requests.append(request)
            key = self.headers.get("Authorization", "")
            state.keys.append(key)
            fault = state.faults.popleft() if state.faults else Fault()
            if fault.hang:
                state.over.wait(30)
                return
            body = fault.body
            if body is None and fault.status != 200:
                # Some servers send back what they were sent: nothing of it may reach a log.
                body = json.dumps({"error": {"message": f"failed for {key}", "type": "stand-in"}}).encode()
            elif body is None:
                text = state.answer(request) if fault.text is None else fault.text
                message = {"role": "assistant", "content": text, "refusal": None}
                body = json.dumps(
                    {
                        "id": "stand-in",
                        "object": "chat.completion",
                        "created": 0,
                        "model": request["model"],
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
                        "usage": {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100},
                    }
                ).encode()
            self.send_response(fault.status)
            for name, value in {"Content-Type": "application/json", **fault.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = StandIn(f"http://127.0.0.1:{server.server_address[1]}/v1", answer or (lambda _: json.dumps(GOOD)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
