"""A small server of OpenAI's protocol that is slow, breaks, refuses, or talks nonsense, as told."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

from aiohttp import web

WRONG = "VERDICT: INCORRECT"
RIGHT = "They are equal.\nVERDICT: CORRECT"


class Server:
    """An OpenAI-compatible server in a thread; `behaviours` are taken in turn, the last stays."""

    def __init__(self, *behaviours: Any, port: int = 0) -> None:
        self.behaviours, self._port = list(behaviours), port
        self.requests: list[dict[str, Any]] = []
        self.health, self.checks = 200, 0
        self.models: list[str] = []
        self.page: str | None = None  # said instead of the models
        self.under_way = self.most_under_way = 0
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._up.wait(30.0)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._up.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._stop())

    async def _stop(self) -> None:
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:  # those that would have slept on
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        app.router.add_get("/v1/models", self._check)
        app.router.add_get("/health", self._check)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}/v1"

    async def _check(self, _: web.Request) -> web.Response:
        self.checks += 1
        if self.page is not None:
            return web.Response(text=self.page, content_type="text/html")
        models = [{"id": name, "object": "model"} for name in self.models]
        return web.json_response({"object": "list", "data": models}, status=self.health)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            last = len(self.behaviours) == 1
            return await self._behave(
                self.behaviours[0] if last else self.behaviours.pop(0), request
            )
        finally:
            self.under_way -= 1

    async def _behave(self, behaviour: Any, request: web.Request) -> web.StreamResponse:
        if isinstance(behaviour, int):
            return web.json_response({"error": {"message": "no"}}, status=behaviour)
        if isinstance(behaviour, float):
            await asyncio.sleep(behaviour)
            return completion(RIGHT)
        if behaviour == "drop":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if behaviour == "cut":
            return completion(RIGHT, finish="length")
        if behaviour in {"{", "[]", '{"choices": 3}', '{"choices": []}', "null"}:
            return web.Response(text=behaviour, content_type="application/json")
        return completion(behaviour)


def completion(content: str, finish: str = "stop") -> web.Response:
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    return web.json_response(
        {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
    )


if __name__ == "__main__":  # PORT: agrees with every answer until it is ended
    Server(RIGHT, port=int(sys.argv[1]))
    threading.Event().wait()
