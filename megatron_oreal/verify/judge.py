"""Asks language models whether answers are right: any servers that speak OpenAI's protocol.

Questions are spread over the servers that answer; one that fails is put to another, after a growing
pause, until its attempts or its time are used up. No failure leaves this module: an answer that no
judge decided is UNVERIFIED. All requests live in one thread, so that the trainer does not wait.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from typing import TYPE_CHECKING, TypeVar

import openai
from openai.types.chat import ChatCompletion

from megatron_oreal.config.errors import UserError
from megatron_oreal.types import Outcome, Verdict
from megatron_oreal.verify.futures import known, results
from megatron_oreal.verify.judge_hosts import Host, Hosts
from megatron_oreal.verify.judge_prompt import JudgeQuestion, messages_of, read_verdict

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from concurrent.futures import Future

    from megatron_oreal.config.schema import JudgeConfig

T = TypeVar("T")

_MAX_PAUSE_S = 30.0
_TEMPERATURES = (0.0, 0.7)  # of the first vote and of the second, which shall not be its echo


class UnfinishedReplyError(RuntimeError):
    """A server answered, but not with a finished reply."""


class Judge:
    """Puts answers before judges; holds a thread and connections until it is closed."""

    def __init__(self, config: JudgeConfig) -> None:
        """Reads the key for the servers and starts the thread; asks no server yet.

        Raises:
            UserError: the environment variable that shall hold the key is not set.
        """
        self._config = config
        key = read_key(config.api_key_variable)
        self._waiting = 0
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()
        self._hosts, self._places = self._begin(self._open(key)).result()

    def close(self) -> None:
        """Drops what is under way and ends the thread."""
        self._begin(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, questions: Sequence[JudgeQuestion]) -> list[Verdict]:
        """Returns a verdict for each, in order, within `judge.deadline_s`."""
        return results([self.submit(asked) for asked in questions])

    def submit(self, asked: JudgeQuestion) -> Future[Verdict]:
        """Begins to ask; known within `judge.deadline_s`, from any thread, and never fails.

        Beyond `judge.queue` questions that wait or are under way, one is UNVERIFIED at once.
        """
        with self._lock:
            if self._waiting >= self._config.queue:
                reason = f"judge.queue={self._config.queue} is full"
                return known(_undecided(reason, asked, 0.0))
            self._waiting += 1
        verdict = self._begin(self._ask(asked))
        verdict.add_done_callback(self._leave)
        return verdict

    def _leave(self, _: Future[Verdict]) -> None:
        with self._lock:
            self._waiting -= 1

    def _begin(self, work: Coroutine[None, None, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self, key: str) -> tuple[Hosts, asyncio.Semaphore]:
        return Hosts(self._config, key), asyncio.Semaphore(self._config.concurrency)

    async def _close(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._hosts.close()

    async def _ask(self, asked: JudgeQuestion) -> Verdict:
        """Returns the verdict of one vote, or of two where the first contradicts the rule."""
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._config.deadline_s), self._places:
                first = await self._vote(asked, _TEMPERATURES[0])
                disagree = {first.outcome, asked.rule} == {Outcome.CORRECT, Outcome.INCORRECT}
                if not (self._config.second_vote and disagree):
                    return first
                second = await self._vote(asked, _TEMPERATURES[1])
        except TimeoutError:
            reason = f"no judge answered within judge.deadline_s={self._config.deadline_s:g}"
            return _undecided(reason, asked, time.monotonic() - started)
        if second.outcome is not first.outcome:
            return _undecided("two votes of the judge differ", asked, first.seconds)
        return second

    async def _vote(self, asked: JudgeQuestion, temperature: float) -> Verdict:
        """Asks one server after another until one has replied."""
        started = time.monotonic()
        reason, host = "", None
        for attempt in range(self._config.attempts):
            if attempt:
                await asyncio.sleep(self._pause_s(asked, attempt))
            host = self._hosts.pick(host)
            try:
                reply = await self._reply(host, asked, temperature)
            except (openai.OpenAIError, UnfinishedReplyError, TimeoutError, ValueError) as error:
                reason = f"no judge answered: {type(error).__name__}"  # not a server's text
                continue
            return _verdict(reply, asked, time.monotonic() - started)
        return _undecided(reason, asked, time.monotonic() - started)

    async def _reply(self, host: Host, asked: JudgeQuestion, temperature: float) -> str:
        """Returns the text of a finished reply; the deadline holds however slowly it drips in."""
        with host.request() as client:
            async with asyncio.timeout(self._config.request_deadline_s):
                completion = await client.chat.completions.create(
                    model=self._config.model or "",
                    messages=messages_of(asked),  # pyright: ignore[reportArgumentType]
                    temperature=temperature,
                    max_tokens=self._config.max_tokens,
                )
        choices = completion.choices if isinstance(completion, ChatCompletion) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        content = getattr(getattr(first, "message", None), "content", None)
        if not isinstance(content, str) or getattr(first, "finish_reason", None) != "stop":
            raise UnfinishedReplyError("not a finished chat completion")
        return content

    def _pause_s(self, asked: JudgeQuestion, attempt: int) -> float:
        """Returns a pause that doubles, with a share of chance so that not all come at once."""
        spread = random.Random(f"{asked} {attempt}").uniform(0.5, 1.0)
        return min(self._config.backoff_s * 2.0 ** (attempt - 1), _MAX_PAUSE_S) * spread


def read_key(variable: str | None) -> str:
    """Returns what servers want to be shown; a `UserError` where the variable is not set."""
    if not variable:
        return "none"
    if variable not in os.environ:
        raise UserError(
            f"judge.api_key_variable={variable}: not set in the environment; export it, or null"
            " for servers that want no key"
        )
    return os.environ[variable]


def _verdict(reply: str, asked: JudgeQuestion, seconds: float) -> Verdict:
    outcome = read_verdict(reply)
    if outcome is None:
        return _undecided("the judge's reply holds no single verdict", asked, seconds)
    return Verdict(outcome, "judge", "the judge's verdict", asked.answer, seconds)


def _undecided(reason: str, asked: JudgeQuestion, seconds: float) -> Verdict:
    return Verdict(Outcome.UNVERIFIED, "judge", reason, asked.answer, seconds)
