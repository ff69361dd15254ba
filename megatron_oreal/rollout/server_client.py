"""Rollout servers over HTTP: vLLM's own routes; what goes wrong is one line that names the host."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import msgspec

from megatron_oreal.config.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ResultT = TypeVar("ResultT")

_CONNECT_S = 10.0
_CONTROL_S = 900.0  # for a route that moves weights
_POLL_S = 0.5


class ServerLost(UserError):  # noqa: N818  an event elsewhere, which the caller waits out
    """A server has died, or cannot be reached."""


class Asked(msgspec.Struct, frozen=True):
    """A request under a number: prompt tokens, and vLLM's sampling parameters by name."""

    index: int
    tokens: tuple[int, ...]
    parameters: dict[str, Any]


class Sample(msgspec.Struct, frozen=True):
    """One response of a server: token ids, their raw log-probabilities, why it ended."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stopped: bool


class _Logprob(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Logprob]


class _Choice(msgspec.Struct):
    token_ids: tuple[int, ...]
    logprobs: _Logprobs
    finish_reason: str


class _Answer(msgspec.Struct):
    choices: list[_Choice]


class Server:
    """One server, by its URL."""

    def __init__(self, host: str) -> None:
        """Names the server; nothing is asked yet."""
        self.host = host.rstrip("/")

    @property
    def address(self) -> tuple[str, int]:
        """Host name and port."""
        url = httpx.URL(self.host)
        return url.host, url.port or (443 if url.scheme == "https" else 80)

    def wait(self, seconds: float) -> None:
        """Waits until the server is ready to generate.

        Raises:
            UserError: It was not within this time.
        """
        deadline, why = time.monotonic() + seconds, ""
        while True:
            try:
                why = f"status {httpx.get(f'{self.host}/health', timeout=_CONNECT_S).status_code}"
                if why == "status 200":
                    return
            except httpx.HTTPError as error:
                why = _text(error)
            if time.monotonic() >= deadline:
                raise UserError(
                    f"rollout.server_hosts: {self.host} is not ready after {seconds:g} s ({why}):"
                    " start it with `megatron-oreal serve`, or raise rollout.server_wait_s"
                )
            time.sleep(_POLL_S)

    @property
    def is_ready(self) -> bool:
        """Whether the server says that it can generate."""
        try:
            return httpx.get(f"{self.host}/health", timeout=_CONNECT_S).is_success
        except httpx.HTTPError:
            return False

    def get(self, path: str) -> Any:
        """Returns the JSON that a route answers with."""
        return self._call("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Returns the JSON that a route answers with, None where it has none."""
        return self._call("POST", path, body)

    def ask_workers(self, method: str, *arguments: str) -> list[Any]:
        """Returns what a method of `vllm_served.ServedModel` returns in each worker."""
        answer = self.post("/collective_rpc", {"method": method, "args": list(arguments)})
        return answer["results"]

    async def sample(self, client: httpx.AsyncClient, asked: Asked) -> Sample:
        """Samples one response to a prompt.

        Raises:
            ServerLost: The server does not answer.
            UserError: It refuses.
        """
        path = "/inference/v1/generate"
        body = {"token_ids": asked.tokens, "sampling_params": asked.parameters}
        try:
            answer = await client.post(f"{self.host}{path}", json=body)
        except httpx.HTTPError as error:
            raise self._lost("stopped answering", _text(error)) from error
        self._refuse(answer, path)
        (choice,) = msgspec.json.decode(answer.content, type=_Answer).choices
        logprobs = tuple(entry.logprob for entry in choice.logprobs.content)
        return Sample(choice.token_ids, logprobs, choice.finish_reason == "stop")

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        timeout = httpx.Timeout(_CONTROL_S, connect=_CONNECT_S)
        try:
            answer = httpx.request(method, f"{self.host}{path}", json=body, timeout=timeout)
        except httpx.HTTPError as error:
            raise self._lost(f"does not answer {path}", _text(error)) from error
        self._refuse(answer, path)
        return msgspec.json.decode(answer.content) if answer.content else None

    def _refuse(self, answer: httpx.Response, path: str) -> None:
        if answer.is_error:
            what, why = f"refuses {path}", f"{answer.status_code} {answer.text[:500]}"
            # A server whose engine has died still says so for a moment.
            if answer.is_server_error and not self.is_ready:
                raise self._lost(what, why)
            raise UserError(self._line(what, why))

    def _lost(self, what: str, why: str) -> ServerLost:
        return ServerLost(self._line(what, why))

    def _line(self, what: str, why: str) -> str:
        why = " ".join(why.split())
        return f"rollout.server_hosts: {self.host} {what}: {why}; look into its log"


def alongside(
    calls: Sequence[Callable[[], ResultT]], own: Callable[[], None] = lambda: None
) -> list[ResultT]:
    """Makes calls in threads and `own` in this one; returns what the calls return.

    Raises:
        ServerLost: A server has died; what follows from that is not said.
        UserError: A call failed, or `own` for want of a peer.
    """
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        problem = None
        try:
            own()
        except RuntimeError as error:
            problem = UserError(f"rollout.server_hosts: no weights can be sent: {error}")
    failures = [error for future in futures if (error := future.exception())]
    failures.sort(key=lambda error: not isinstance(error, ServerLost))
    if problem:
        failures.append(problem)  # what a server says explains more
    if failures:
        raise failures[0]
    return [future.result() for future in futures]


def sample_all(
    shares: Sequence[tuple[Server, Sequence[Asked]]],
    concurrency: int,
    done: Callable[[int, Sample], None],
) -> str:
    """Samples one response a request, of all servers that live.

    Returns why requests are left, where servers have died; empty where none is.

    Args:
        shares: What each server is asked, in this order.
        concurrency: Requests under way at one time, of each server.
        done: Told the number of a request and its response as they come.

    Raises:
        UserError: A server refuses; all other requests are given up.
    """
    lost: list[str] = []

    async def work(client: httpx.AsyncClient, server: Server, waiting: list[Asked]) -> None:
        while waiting:
            asked = waiting.pop()
            done(asked.index, await server.sample(client, asked))

    async def ask(client: httpx.AsyncClient, server: Server, share: Sequence[Asked]) -> None:
        waiting = list(reversed(share))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(concurrency, len(share))):
                    group.create_task(work(client, server, waiting))
        except* ServerLost as failures:
            lost.append(str(failures.exceptions[0]))

    async def run() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=_CONNECT_S)
        async with (
            httpx.AsyncClient(limits=limits, timeout=timeout) as client,
            asyncio.TaskGroup() as group,
        ):
            for server, share in shares:
                group.create_task(ask(client, server, share))

    try:
        asyncio.run(run())
    except ExceptionGroup as failures:
        raise _first(failures) from failures
    return lost[0] if lost else ""


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    (first, *_) = failures.exceptions
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _text(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__
