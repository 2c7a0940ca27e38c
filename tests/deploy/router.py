# SPDX-License-Identifier: Apache-2.0
"""A small router before several servers: a request goes where others went that begin alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from evs_vllm.serving import routing_key


class Router:
    """Chooses the server that has seen a request's routing key, else the one that got the fewest requests.

    Args:
        urls: The servers' base URLs.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = list(urls)
        self.sent = [0] * len(self.urls)
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()

    def choose(self, body: dict[str, Any]) -> str:
        key = routing_key(body)
        with self._lock:
            chosen = self._seen.setdefault(key, self.sent.index(min(self.sent)))
            self.sent[chosen] += 1
        return self.urls[chosen]


@contextmanager
def routing(urls: Sequence[str]) -> Iterator[tuple[str, Router]]:
    """Runs a router while the block lasts; its base URL and itself."""
    router = Router(urls)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            url = router.choose(json.loads(content)) + self.path
            kind = {"Content-Type": "application/json"}
            answer = httpx.post(url, content=content, headers=kind, timeout=120, trust_env=False)
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", router
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
