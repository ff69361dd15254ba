"""The servers of a judge: which of them answer, and which has the least to do."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import openai

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron_oreal.config.schema import JudgeConfig

_OWN_FAULT = 500  # the status from which on the server is at fault, not the request


class Host:
    """One server; it counts as healthy until a request or a health check shows otherwise."""

    def __init__(self, url: str, key: str, timeout_s: float) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=url, api_key=key, max_retries=0, timeout=timeout_s
        )
        self.healthy = True
        self.under_way = 0
        self.checked_at = float("-inf")

    @contextmanager
    def request(self) -> Iterator[openai.AsyncOpenAI]:
        """Yields the client for one request; one that fails by the server's fault marks it."""
        self.under_way += 1
        try:
            yield self.client
        except (openai.OpenAIError, TimeoutError) as error:
            self.healthy = self.healthy and not _servers_fault(error)
            raise
        finally:
            self.under_way -= 1

    async def check(self, timeout_s: float) -> None:
        """Asks for the list of models, which costs a server nothing, and notes if it answers."""
        self.checked_at = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                await self.client.models.list()
        except (openai.OpenAIError, TimeoutError, ValueError) as error:
            self.healthy = not _servers_fault(error)
        else:
            self.healthy = True


class Hosts:
    """Spreads requests over the servers that answer; lives in one event loop."""

    def __init__(self, config: JudgeConfig, key: str) -> None:
        self._interval_s = config.health_check_s
        self._timeout_s = min(config.health_check_s, config.request_deadline_s)
        self._hosts = [Host(url, key, config.request_deadline_s) for url in config.hosts]
        self._checks: set[asyncio.Task[None]] = set()

    def pick(self, last: Host | None = None) -> Host:
        """Returns the server for a request, and has those checked that were not for a while.

        That is a healthy one where there is one, rather not the `last`, of them the least busy.
        """
        for host in self._hosts:
            if time.monotonic() - host.checked_at >= self._interval_s:
                host.checked_at = time.monotonic()
                check = asyncio.create_task(host.check(self._timeout_s))
                self._checks.add(check)
                check.add_done_callback(self._checks.discard)
        return min(self._hosts, key=lambda h: (not h.healthy, h is last, h.under_way))

    async def close(self) -> None:
        """Closes all connections."""
        for check in self._checks:
            check.cancel()
        await asyncio.gather(*self._checks, return_exceptions=True)
        await asyncio.gather(*(host.client.close() for host in self._hosts))


def _servers_fault(error: Exception) -> bool:
    """Whether a server is gone, silent or broken; one that refuses a request is not."""
    return not isinstance(error, openai.APIStatusError) or error.status_code >= _OWN_FAULT
