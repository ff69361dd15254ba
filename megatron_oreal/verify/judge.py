"""Asks language models whether answers are right: any servers that speak OpenAI's protocol.

Questions are spread over the servers; one that fails is put to the next, after a growing pause,
until its attempts or the time of the whole call are used up. No failure leaves this module: an
answer that no judge decided is UNVERIFIED.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import TYPE_CHECKING

import openai
from openai.types.chat import ChatCompletion

from megatron_oreal.config.errors import UserError
from megatron_oreal.types import Outcome, Verdict
from megatron_oreal.verify.judge_prompt import JudgeQuestion, messages_of, read_verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megatron_oreal.config.schema import JudgeConfig

_MAX_PAUSE_S = 30.0


class _NoReplyError(RuntimeError):
    """A server answered, but not with a finished reply."""


class Judge:
    """Puts answers before judges; holds nothing open between calls."""

    def __init__(self, config: JudgeConfig) -> None:
        """Reads the key for the servers.

        Raises:
            UserError: the environment variable that shall hold the key is not set.
        """
        self._config = config
        self._key = "none"
        if config.api_key_variable:
            if config.api_key_variable not in os.environ:
                raise UserError(
                    f"judge.api_key_variable={config.api_key_variable}: not set in the"
                    " environment; export it, or null for servers that want no key"
                )
            self._key = os.environ[config.api_key_variable]

    def ask(self, questions: Sequence[JudgeQuestion]) -> list[Verdict]:
        """Returns a verdict for each, in order, within `judge.deadline_s` for all of them."""
        return asyncio.run(self._ask_all(questions)) if questions else []

    async def _ask_all(self, questions: Sequence[JudgeQuestion]) -> list[Verdict]:
        config = self._config
        started = time.monotonic()
        places = asyncio.Semaphore(config.concurrency)
        clients = [
            openai.AsyncOpenAI(
                base_url=host, api_key=self._key, max_retries=0, timeout=config.request_deadline_s
            )
            for host in config.hosts
        ]
        tasks = [
            asyncio.create_task(self._ask_one(item, asked, clients, places))
            for item, asked in enumerate(questions)
        ]
        _, late = await asyncio.wait(tasks, timeout=config.deadline_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in clients))
        seconds = time.monotonic() - started
        reason = f"no judge answered within judge.deadline_s={config.deadline_s:g}"
        return [
            _undecided(reason, asked, seconds) if task in late else task.result()
            for task, asked in zip(tasks, questions, strict=True)
        ]

    async def _ask_one(
        self,
        item: int,
        asked: JudgeQuestion,
        clients: Sequence[openai.AsyncOpenAI],
        places: asyncio.Semaphore,
    ) -> Verdict:
        """Asks one server after another until one has replied."""
        reason = ""
        async with places:
            started = time.monotonic()
            for attempt in range(self._config.attempts):
                if attempt:
                    await asyncio.sleep(self._pause_s(item, attempt))
                try:
                    reply = await self._reply(clients[(item + attempt) % len(clients)], asked)
                except (openai.OpenAIError, _NoReplyError, TimeoutError, ValueError) as error:
                    reason = f"no judge answered: {type(error).__name__}"  # not a server's text
                    continue
                return _verdict(reply, asked, time.monotonic() - started)
            return _undecided(reason, asked, time.monotonic() - started)

    async def _reply(self, client: openai.AsyncOpenAI, asked: JudgeQuestion) -> str:
        """Returns the text of a finished reply; the deadline holds however slowly it drips in."""
        async with asyncio.timeout(self._config.request_deadline_s):
            completion = await client.chat.completions.create(
                model=self._config.model or "",
                messages=messages_of(asked),  # pyright: ignore[reportArgumentType]
                temperature=0.0,
                max_tokens=self._config.max_tokens,
            )
        choices = completion.choices if isinstance(completion, ChatCompletion) else None
        first = choices[0] if isinstance(choices, list) and choices else None
        content = getattr(getattr(first, "message", None), "content", None)
        if not isinstance(content, str) or getattr(first, "finish_reason", None) != "stop":
            raise _NoReplyError("not a finished chat completion")
        return content

    def _pause_s(self, item: int, attempt: int) -> float:
        """Returns a pause that doubles, with a share of chance so that not all come at once."""
        spread = random.Random(f"{item} {attempt}").uniform(0.5, 1.0)
        return min(self._config.backoff_s * 2.0 ** (attempt - 1), _MAX_PAUSE_S) * spread


def _verdict(reply: str, asked: JudgeQuestion, seconds: float) -> Verdict:
    outcome = read_verdict(reply)
    if outcome is None:
        return _undecided("the judge's reply holds no single verdict", asked, seconds)
    return Verdict(outcome, "judge", "the judge's verdict", asked.answer, seconds)


def _undecided(reason: str, asked: JudgeQuestion, seconds: float) -> Verdict:
    return Verdict(Outcome.UNVERIFIED, "judge", reason, asked.answer, seconds)
