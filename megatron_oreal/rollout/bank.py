"""What of a generation is done already, on the disk, so that a crash costs only what is not.

One file an iteration and rank, `bank_file` of msgpack: each response under the number of its
request, once when it is finished and once more, with its verdict, when it is judged. Every entry
names the generation it belongs to by a digest of all that decides it, the policy's weights among
it: another policy's responses are never taken for this one's, whatever lies in the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from megatron_oreal.parallel.collectives import (
    all_gather_bytes,
    broadcast_bytes,
    world_rank,
    world_size,
)
from megatron_oreal.rollout.bank_file import BankFile, read_bank_file
from megatron_oreal.types import Rollout, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from megatron_oreal.config.schema import SamplingConfig
    from megatron_oreal.rollout.engine import Finished, Request, Sampler
    from megatron_oreal.rollout.record import RecordHeader
    from megatron_oreal.types import Advance, Prompt


class Entry(msgspec.Struct, frozen=True):
    """The response to a request of a generation, and its verdict once there is one."""

    generation: bytes
    index: int
    rollout: Rollout
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Bank:
    """The bank of one generation.

    Attributes:
        entries: what was there when it was opened, by request; alike on every rank.
        problems: what could not be read, each named; alike on every rank.
    """

    generation: bytes
    entries: Mapping[int, Entry]
    problems: tuple[str, ...]
    file: BankFile

    @property
    def verdicts(self) -> dict[int, Verdict]:
        """The verdicts that are there, by request."""
        verdicts = {index: entry.verdict for index, entry in self.entries.items()}
        return {index: verdict for index, verdict in verdicts.items() if verdict is not None}

    def put(self, index: int, rollout: Rollout, verdict: Verdict | None = None) -> None:
        """Keeps a response, or a response and its verdict; local to a rank, returns at once."""
        entry = Entry(self.generation, index, rollout, verdict)
        self.file.append(msgspec.msgpack.encode(entry))


@dataclass(frozen=True)
class BankedSampler:
    """Samples what is not in a bank and puts it there as it comes; see `Sampler`."""

    sampler: Sampler
    bank: Bank

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        advance: Advance,
        finished: Finished = lambda _index, _rollout: None,
    ) -> list[Rollout]:
        """Samples one response a request, of those that the bank was opened for.

        What a backend that does not stream samples is not banked.
        """
        rollouts = {index: entry.rollout for index, entry in self.bank.entries.items()}
        if rollouts:
            advance(len(rollouts))
        for index in sorted(rollouts)[world_rank() :: world_size()]:
            finished(index, rollouts[index])
        missing = [index for index in range(len(requests)) if index not in rollouts]

        def take(position: int, rollout: Rollout) -> None:
            self.bank.put(missing[position], rollout)
            finished(missing[position], rollout)

        asked = [requests[index] for index in missing]
        sampled = self.sampler.generate(asked, sampling, advance, take)
        rollouts |= dict(zip(missing, sampled, strict=True))
        return [rollouts[index] for index in range(len(requests))]


@dataclass(frozen=True)
class Banks:
    """The banks of a run, in a folder that all ranks see."""

    folder: Path

    @contextlib.contextmanager
    def open(self, header: RecordHeader, prompts: Sequence[Prompt]) -> Iterator[Bank]:
        """Reads what is there of a generation and takes more; to open is collective, the world.

        Args:
            header: of the iteration, with all that decides its responses and verdicts.
            prompts: the questions, in order.
        """
        key = msgspec.msgpack.encode((header, [(prompt.id, prompt.tokens) for prompt in prompts]))
        generation = hashlib.blake2b(key, digest_size=16).digest()
        entries, problems = self._read(header.iteration, generation)
        name = f"{_prefix(header.iteration)}rank_{world_rank():05d}"
        file = BankFile(self.folder / name)
        try:
            yield Bank(generation, entries, problems, file)
        finally:
            file.close()

    def forget(self, before: int) -> None:
        """Removes the banks of all iterations before this one; on one rank, not collective."""
        for path in self.folder.glob("iteration_*.rank_*"):
            if path.name < _prefix(before):
                path.unlink()

    def _read(self, iteration: int, generation: bytes) -> tuple[dict[int, Entry], tuple[str, ...]]:
        """Reads each file on one rank and returns what all of them hold; collective, the world."""
        found = sorted(path.name for path in self.folder.glob(f"{_prefix(iteration)}rank_*"))
        names = msgspec.json.decode(broadcast_bytes(msgspec.json.encode(found)), type=list[str])
        if not names:
            return {}, ()
        mine, problems = _read_files(self.folder / n for n in names[world_rank() :: world_size()])
        share = ([entry for entry in mine if entry.generation == generation], problems)
        entries: dict[int, Entry] = {}
        all_problems: list[str] = []
        for payload in all_gather_bytes(msgspec.msgpack.encode(share)):
            theirs, problems = msgspec.msgpack.decode(payload, type=tuple[list[Entry], list[str]])
            all_problems += problems
            for entry in theirs:
                # With a verdict it is whole: a response and the verdict on it go together.
                if entry.index not in entries or entry.verdict is not None:
                    entries[entry.index] = entry
        return entries, tuple(all_problems)


def _prefix(iteration: int) -> str:
    return f"iteration_{iteration:06d}."


def _read_files(paths: Iterable[Path]) -> tuple[list[Entry], list[str]]:
    entries, problems = [], []
    for path in paths:
        try:
            contents, damage = read_bank_file(path.read_bytes())
        except OSError as error:
            contents, damage = [], [str(error.strerror)]
        for content in contents:
            try:
                entries.append(msgspec.msgpack.decode(content, type=Entry))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                damage.append(f"a record is no entry ({error})")
        problems += [f"{path}: {what}; its responses are sampled again" for what in damage]
    return entries, problems
