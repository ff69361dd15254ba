"""What a replay refuses, each with one line that names the folder, the file and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import (
    Config,
    DataConfig,
    MonitorConfig,
    OrealConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    ScheduleConfig,
)
from megatron_oreal.config.schema_importance import ImportanceConfig
from megatron_oreal.rollout.record import record_path, write_groups
from megatron_oreal.trainer.group_source import RecordedGroups, expected_header
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.types import Outcome, Prompt, Rollout, RolloutGroup, Verdict

ITERATIONS, SAMPLES, VOCABULARY = 3, 2, "digest of a vocabulary"
PROMPTS = [Prompt("a", "1+1", "0", (2, 3)), Prompt("b", "1+2", "1", (2, 4))]
GROUPS = [
    RolloutGroup(
        prompt,
        tuple(Rollout((5, 1), (-0.5, -0.25), "\\boxed{0}", stopped=True) for _ in range(SAMPLES)),
        tuple(Verdict(Outcome.CORRECT, "rule", "", "0", 0.0) for _ in range(SAMPLES)),
    )
    for prompt in PROMPTS
]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Of a run that replays what `recorded` holds."""
    return Config(
        run=RunConfig(folder=str(tmp_path / "run"), seed=7),
        data=DataConfig(questions_per_iteration=len(PROMPTS)),
        sampling=SamplingConfig(samples_per_question=SAMPLES),
        rollout=RolloutConfig(replay=str(tmp_path / "recorded")),
        schedule=ScheduleConfig(iterations=ITERATIONS, freeze_iterations=0, warmup_iterations=0),
        monitor=MonitorConfig(wandb="disabled"),
    )


@pytest.fixture
def recorded(tmp_path: Path, config: Config) -> Path:
    folder = tmp_path / "recorded"
    for iteration in range(ITERATIONS):
        write_groups(folder, expected_header(config, VOCABULARY, iteration), GROUPS)
    return folder


@pytest.fixture
def opened(world_of_one: None, config: Config) -> Iterator[Callable[..., RecordedGroups]]:
    journal = Journal(config, ITERATIONS)
    yield lambda config=config, vocabulary=VOCABULARY: RecordedGroups(config, journal, vocabulary)
    journal.close()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("rollout.replay=")
    return text


def test_the_recorded_groups_come_back(opened, recorded: Path) -> None:
    source = opened()
    source.check(0)
    for iteration in range(ITERATIONS):
        assert source.answer(PROMPTS, iteration) == GROUPS
    source.keep(GROUPS, 0)
    assert len(list(recorded.iterdir())) == ITERATIONS


def test_missing_records_are_named(opened, recorded: Path, config: Config) -> None:
    record_path(recorded, 2).unlink()
    assert "set schedule.iterations=2 or record more" in refusal(lambda: opened().check(0))
    record_path(recorded, 0).unlink()
    assert "name a folder that a run recorded" in refusal(lambda: opened().check(0))
    assert "set schedule.iterations=2 or record more" in refusal(lambda: opened().check(1))
    assert "iteration_000000.groups: No such file" in refusal(lambda: opened().answer(PROMPTS, 0))
    elsewhere = replace(config, rollout=RolloutConfig(replay=str(recorded / "nowhere")))
    assert "name a folder that a run recorded" in refusal(lambda: opened(elsewhere).check(0))


# (section, key, another value, what the line names)
OTHERWISE = {
    "samples": ("sampling", "samples_per_question", 4, "sampling.samples_per_question=2, not 4"),
    "questions": ("data", "questions_per_iteration", 9, "data.questions_per_iteration=2, not 9"),
    "seed": ("run", "seed", 8, "run.seed=7, not 8"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_settings_are_named(opened, recorded: Path, config: Config, name: str) -> None:
    section, key, value, named = OTHERWISE[name]
    other = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    assert named in refusal(lambda: opened(other).check(0))


def test_importance_weights_need_samples_of_the_policy_itself(
    opened, recorded: Path, config: Config
) -> None:
    oreal = OrealConfig(importance=ImportanceConfig(level="token"))
    weighing = replace(config, oreal=oreal, sampling=replace(config.sampling, top_p=1.0))
    named = "oreal.importance.level=token weighs samples of temperature and top_p 1, these have 1"
    assert f"{named} and 0.9; record again" in refusal(lambda: opened(weighing).check(0))
    for iteration in range(ITERATIONS):
        write_groups(recorded, expected_header(weighing, VOCABULARY, iteration), GROUPS)
    opened(weighing).check(0)


def test_another_tokenizer_and_other_questions_are_named(opened, recorded: Path) -> None:
    named = "another tokenizer than that of model.path"
    assert named in refusal(lambda: opened(vocabulary="another").check(0))
    named = "answers other questions than the `data` section gives"
    assert named in refusal(lambda: opened().answer(PROMPTS[::-1], 0))
    other_template = [replace(prompt, tokens=(9, *prompt.tokens)) for prompt in PROMPTS]
    assert named in refusal(lambda: opened().answer(other_template, 0))


def test_damage_is_found_before_or_when_it_is_read(opened, recorded: Path) -> None:
    path = record_path(recorded, 1)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    opened().check(0)  # looks at headers alone
    assert opened().answer(PROMPTS, 0) == GROUPS
    named = "iteration_000001.groups: record 2 has changed since it was written; restore it"
    assert named in refusal(lambda: opened().answer(PROMPTS, 1))
    path.write_bytes(b"not a record")
    assert "does not begin like a file of records" in refusal(lambda: opened().check(0))
    path.unlink()
    path.mkdir()
    assert "Is a directory" in refusal(lambda: opened().check(0))


def test_a_record_under_another_name_is_refused(opened, recorded: Path) -> None:
    record_path(recorded, 1).write_bytes(record_path(recorded, 2).read_bytes())
    assert "is of iteration 2; put it back" in refusal(lambda: opened().check(0))
