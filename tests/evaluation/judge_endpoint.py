"""Somebody else's endpoint: it speaks the OpenAI protocol, and fails in the ways endpoints fail."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PERFECT = {
    "sentiment": "positive",
    "instructions": "followed",
    "cooperation": "cooperative",
    "moralising": "none",
    "refusal": "none",
}


class Endpoint:
    """Answers in turn by `script`; its last entry goes on for ever. An entry is a status, a delay, or a content."""

    def __init__(self, *script: Any) -> None:
        self.script, self.seen, self.lock = list(script), [], threading.Lock()
        self.url = ""

    def next(self, body: dict[str, Any]) -> Any:
        with self.lock:
            self.seen.append(body)
            return self.script[min(len(self.seen), len(self.script)) - 1]


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[Endpoint]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            entry = endpoint.next(body)
            if isinstance(entry, float):
                time.sleep(entry)
                entry = PERFECT
            if entry == "drip":
                self.send_response(200)
                self.end_headers()
                for _ in range(200):
                    try:
                        self.wfile.write(b" ")
                        self.wfile.flush()
                    except OSError:
                        return
                    time.sleep(0.05)
                return
            if isinstance(entry, int):
                self.send_response(entry)
                self.end_headers()
                self.wfile.write(b'{"error": {"message": "no"}}')
                return
            if isinstance(entry, bytes):
                reply = entry
            else:
                content = entry if isinstance(entry, str) else json.dumps(entry)
                message = {"role": "assistant", "content": content}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                reply = json.dumps(whole).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
