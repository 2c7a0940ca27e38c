# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server in the test process, to stand in for `vllm serve`."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

from aiohttp import web


class LocalServer:
    """Answers by `routes` at `url` from when it is made, in a thread of its own, until the ``with`` block ends."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.runner, port = asyncio.run_coroutine_threadsafe(self._serve(), self.loop).result(10)
        self.url = f"http://127.0.0.1:{port}"

    def routes(self) -> Sequence[web.RouteDef]:
        raise NotImplementedError

    async def _serve(self) -> tuple[web.AppRunner, int]:
        app = web.Application(client_max_size=1 << 26)  # clips come within requests
        app.add_routes(self.routes())
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return runner, runner.addresses[0][1]

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
