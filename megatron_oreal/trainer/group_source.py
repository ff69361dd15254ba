"""Algorithm 1, lines 5 and 6: judged groups, sampled from the policy or read from a record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from megatron_oreal.checkpoint.run_state import decisive_config
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config
from megatron_oreal.parallel.collectives import (
    agree,
    all_gather_bytes,
    broadcast_bytes,
    world_rank,
)
from megatron_oreal.rollout.bank import Bank, BankedSampler, Banks
from megatron_oreal.rollout.engine import RolloutEngine
from megatron_oreal.rollout.frames import DamagedRecord
from megatron_oreal.rollout.groups import generate_groups
from megatron_oreal.rollout.pace import PacedSampler, pace_metrics
from megatron_oreal.rollout.record import (
    FORMAT,
    RecordHeader,
    decode_groups,
    read_header,
    record_path,
    write_groups,
)
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.judging import Judging
from megatron_oreal.types import Prompt, RolloutGroup
from megatron_oreal.verify.cascade import Verifier

# What decides which groups come of a question, besides the header's own fields.
_DECISIVE = (
    *("model.", "sampling.", "verifier.", "judge.", "data.system_prompt"),
    *("rollout.quantization", "rollout.kv_cache_dtype"),
)


class GroupSource(Protocol):
    """Answers the questions of an iteration."""

    def answer(self, prompts: Sequence[Prompt], iteration: int) -> list[RolloutGroup]:
        """Returns one judged group a prompt, in their order; collective over the world."""
        ...

    def keep(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """Leaves a record of an iteration's groups, where there is none yet; not collective."""
        ...

    def forget(self, before: int) -> None:
        """Removes what only a run that resumes before this iteration needs; not collective."""
        ...


@dataclass(frozen=True)
class SampledGroups:
    """Samples from the engines' weights and has every answer judged, then records the groups.

    An answer is judged as soon as its engine has it, while others still generate. Both are banked
    as they come: a run that resumes asks and judges only what is not done.

    Attributes:
        weights: tells the weights that the engines sample from; collective over the world.
    """

    config: Config
    engine: RolloutEngine
    verifier: Verifier
    journal: Journal
    vocabulary: str
    weights: Callable[[], str]

    def answer(self, prompts: Sequence[Prompt], iteration: int) -> list[RolloutGroup]:
        """See `GroupSource.answer`."""
        header = decisive_header(self.config, self.vocabulary, iteration, self.weights())
        groups = self.sample(prompts, header)
        if self.config.rollout.record:
            self._record(groups, iteration)
        return groups

    def sample(self, prompts: Sequence[Prompt], header: RecordHeader) -> list[RolloutGroup]:
        """Does the same for an iteration of that header and records nothing; collective, world."""
        with Banks(self.journal.folder.bank).open(header, prompts) as bank:
            self._say_what_is_banked(bank, header)
            judging = Judging(
                self.verifier, prompts, header.samples, known=bank.verdicts, judged=bank.put
            )
            groups = self._generate(prompts, header.iteration, judging, bank)
            groups = self._judge(groups, judging)
        for problem in filter(None, all_gather_bytes(bank.file.problem.encode())):
            self.journal.say(f"iteration {header.iteration} is not banked: {problem.decode()}")
        return groups

    def keep(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """See `GroupSource.keep`."""
        if not self.config.rollout.record:
            self._record(groups, iteration)

    def forget(self, before: int) -> None:
        """See `GroupSource.forget`."""
        if world_rank() == 0:
            with self.journal.told("removal of old banks"):
                Banks(self.journal.folder.bank).forget(before)

    def _say_what_is_banked(self, bank: Bank, header: RecordHeader) -> None:
        for problem in bank.problems:
            self.journal.say(problem)
        if bank.entries:
            self.journal.say(
                f"iteration {header.iteration}: {len(bank.entries)} of"
                f" {header.questions * header.samples} responses and {len(bank.verdicts)} verdicts"
                " are in the bank"
            )

    def _generate(
        self, prompts: Sequence[Prompt], iteration: int, judging: Judging, bank: Bank
    ) -> list[RolloutGroup]:
        sampling = self.config.sampling
        responses = len(prompts) * sampling.samples_per_question
        paced = PacedSampler(self.engine)
        with self.journal.phase("generate", responses, paced) as advance:
            groups = generate_groups(
                BankedSampler(paced, bank),
                prompts,
                sampling,
                seed=self.config.run.seed,
                iteration=iteration,
                advance=advance,
                finished=judging.take,
            )
        tokens = sum(len(rollout.tokens) for group in groups for rollout in group.rollouts)
        banked = sum(len(entry.rollout.tokens) for entry in bank.entries.values())
        self.journal.generated(tokens - banked)
        rates = [float(rate) for rate in all_gather_bytes(str(paced.rate).encode())]
        self.journal.add(pace_metrics(rates))
        return groups

    def _judge(self, groups: Sequence[RolloutGroup], judging: Judging) -> list[RolloutGroup]:
        answers = sum(len(group.rollouts) for group in groups)
        unit = f"answers, at most {judging.longest_wait_s:.0f} s"
        with self.journal.phase("verify", answers, unit) as advance:
            groups = judging.judge(groups, advance)
        self.journal.add(judging.metrics)
        return groups

    def _record(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """Writes the groups on the first rank; a disk that refuses costs the record alone."""
        folder = self.journal.folder.recorded
        with self.journal.phase("record"):
            if world_rank() == 0:
                header = expected_header(self.config, self.vocabulary, iteration)
                with self.journal.told(f"record of iteration {iteration}"):
                    write_groups(folder, header, groups)


@dataclass(frozen=True)
class RecordedGroups:
    """Reads what another run sampled and judged, so that this one needs neither.

    Rank 0 alone reads files; every rank checks what it is handed.
    """

    config: Config
    journal: Journal
    vocabulary: str

    def check(self, first_iteration: int) -> None:
        """Looks at the header of every iteration that will be asked for.

        Collective over the world.

        Raises:
            UserError: One is missing, damaged, or was sampled under other settings.
        """
        with agree():
            if world_rank() == 0:
                for iteration in range(first_iteration, self.config.schedule.iterations):
                    self._check_header(iteration, first_iteration)

    def answer(self, prompts: Sequence[Prompt], iteration: int) -> list[RolloutGroup]:
        """See `GroupSource.answer`.

        Raises:
            UserError: The record is damaged, or answers other questions.
        """
        with self.journal.phase("replay"), agree():
            groups = self._decode(self._read(iteration), iteration)
            self._check_prompts(groups, prompts, iteration)
        return groups

    def keep(self, groups: Sequence[RolloutGroup], iteration: int) -> None:
        """Does nothing: what came from a record has one."""

    def forget(self, before: int) -> None:
        """Does nothing: the record is another run's."""

    def _read(self, iteration: int) -> bytes:
        """Reads on rank 0 what every rank returns; collective over the world."""
        content = b""
        with agree():
            if world_rank() == 0:
                try:
                    content = self._path(iteration).read_bytes()
                except OSError as error:
                    raise self._refusal(iteration, f"{error.strerror}; restore it") from error
        return broadcast_bytes(content)

    def _decode(self, content: bytes, iteration: int) -> list[RolloutGroup]:
        try:
            header, groups = decode_groups(content)
        except DamagedRecord as error:
            raise self._refusal(iteration, f"{error}; restore it or record it again") from error
        self._compare(header, iteration)
        return groups

    def _check_header(self, iteration: int, first_iteration: int) -> None:
        path = self._path(iteration)
        try:
            header = read_header(path)
        except FileNotFoundError as error:
            fix = "no such record; name a folder that a run recorded, with all iterations"
            if iteration > first_iteration:
                fix = f"no such record; set schedule.iterations={iteration} or record more"
            raise self._refusal(iteration, fix) from error
        except OSError as error:
            raise self._refusal(iteration, f"{error.strerror}; name a readable folder") from error
        except DamagedRecord as error:
            raise self._refusal(iteration, f"{error}; restore it or record it again") from error
        self._compare(header, iteration)

    def _compare(self, header: RecordHeader, iteration: int) -> None:
        expected = expected_header(self.config, self.vocabulary, iteration)
        keys = {
            "samples": "sampling.samples_per_question",
            "questions": "data.questions_per_iteration",
            "seed": "run.seed",
        }
        for field, key in keys.items():
            theirs, ours = getattr(header, field), getattr(expected, field)
            if theirs != ours:
                raise self._refusal(iteration, f"recorded with {key}={theirs}, not {ours}; set it")
        if header.vocabulary != expected.vocabulary:
            why = "recorded with another tokenizer than that of model.path"
            raise self._refusal(iteration, f"{why}; name a model that has it")
        level = self.config.oreal.importance.level
        if level != "none" and not header.temperature == header.top_p == 1:
            why = f"oreal.importance.level={level} weighs samples of temperature and top_p 1"
            found = f"these have {header.temperature:g} and {header.top_p:g}"
            raise self._refusal(iteration, f"{why}, {found}; record again, or set level=none")
        if header.iteration != iteration:
            raise self._refusal(iteration, f"is of iteration {header.iteration}; put it back")

    def _check_prompts(
        self, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt], iteration: int
    ) -> None:
        for group, prompt in zip(groups, prompts, strict=True):
            if (group.prompt.id, group.prompt.tokens) != (prompt.id, prompt.tokens):
                why = "answers other questions than the `data` section gives"
                raise self._refusal(iteration, f"{why}; set it as it was when they were recorded")

    def _path(self, iteration: int) -> Path:
        assert self.config.rollout.replay is not None
        return record_path(Path(self.config.rollout.replay), iteration)

    def _refusal(self, iteration: int, why: str) -> UserError:
        path = self._path(iteration)
        return UserError(f"rollout.replay={path.parent}: {path.name}: {why}")


def expected_header(config: Config, vocabulary: str, iteration: int) -> RecordHeader:
    """Returns the header of what a run of this config samples in an iteration."""
    return RecordHeader(
        format=FORMAT,
        iteration=iteration,
        seed=config.run.seed,
        questions=config.data.questions_per_iteration,
        samples=config.sampling.samples_per_question,
        vocabulary=vocabulary,
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
    )


def decisive_header(
    config: Config, vocabulary: str, iteration: int, weights: str = ""
) -> RecordHeader:
    """Returns the same with a digest of all else that decides which groups come of a question.

    `weights` tells those of the engines where they are not the checkpoint's of `model.path`.
    """
    decisive = msgspec.json.encode((decisive_config(config, _DECISIVE), weights))
    digest = hashlib.blake2b(decisive, digest_size=16).hexdigest()
    return msgspec.structs.replace(
        expected_header(config, vocabulary, iteration), sampled_by=digest
    )
