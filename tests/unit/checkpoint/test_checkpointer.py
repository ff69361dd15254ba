"""The newest whole checkpoint is resumed from; none is ever passed over in silence."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from megatron_oreal.checkpoint.checkpointer import Checkpointer
from megatron_oreal.checkpoint.folder import folder_name, open_partial
from megatron_oreal.checkpoint.saving import Outcome
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config

pytestmark = pytest.mark.usefixtures("world_of_one")


class Note(msgspec.Struct):
    text: str


def make(root: Path, *settings: str) -> Checkpointer:
    paths = ["model.path=m", "data.path=d.jsonl"]
    return Checkpointer(load_config([], [*paths, *settings]), "train", root)


def try_to_save(root: Path, iteration: int) -> Outcome:
    checkpointer = make(root)
    outcome = checkpointer.save(
        iteration,
        {},
        metrics_bytes=100 + iteration,
        seconds={"a": 1.5},
        progress=Note("ü"),
        wandb_id="w1",
    )
    outcome = outcome or checkpointer.settle()
    assert outcome is not None
    return outcome


def save(root: Path, iteration: int) -> Path:
    assert not try_to_save(root, iteration).problem
    return root / folder_name(iteration)


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert make(tmp_path / "absent").find() is None


def test_the_newest_is_found_with_all_it_holds(tmp_path: Path) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    found = make(tmp_path).find()
    assert found is not None
    assert (found.folder, found.remarks) == (newest, ())
    assert found.state.iteration == 10
    assert found.state.metrics_bytes == 110
    assert found.state.seconds == {"a": 1.5}
    assert found.state.wandb_id == "w1"
    assert msgspec.json.decode(found.state.progress, type=Note) == Note("ü")


def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    before, newest = save(tmp_path, 5), save(tmp_path, 10)
    (newest / "state.json").write_text("{}")
    found = make(tmp_path).find()
    assert found is not None
    assert found.folder == before
    assert found.remarks[0].startswith(f"{newest} is damaged, passed over: state.json has 2 bytes")


def test_a_checkpoint_under_a_wrong_name_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 5).rename(tmp_path / "iteration_000009")
    with pytest.raises(UserError, match=r"no checkpoint is whole .*state\.json is of iteration 5"):
        make(tmp_path).find()


def test_none_whole_is_no_fresh_start(tmp_path: Path) -> None:
    for iteration in (5, 10):
        (save(tmp_path, iteration) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"^run\.folder=.*no checkpoint is whole .*10.*5 is dam"):
        make(tmp_path).find()


def test_an_unfinished_one_is_named(tmp_path: Path) -> None:
    whole = save(tmp_path, 5)
    open_partial(tmp_path, 10)
    found = make(tmp_path).find()
    assert found is not None
    assert found.folder == whole
    assert found.remarks == (".iteration_000010.partial was never finished, passed over",)


def test_never_looks_at_none(tmp_path: Path) -> None:
    save(tmp_path, 5)
    assert make(tmp_path, "checkpoint.resume=never").find() is None


def test_other_mathematics_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(UserError, match=r"^oreal\.kl=k1: the run was started with k3"):
        make(tmp_path, "oreal.kl=k1").find()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in try_to_save(tmp_path / "file", 5).problem


@pytest.mark.parametrize(
    ("every", "due"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (9, [5])]
)
def test_when_one_is_due(tmp_path: Path, every: int, due: list[int]) -> None:
    checkpointer = make(tmp_path, f"checkpoint.every={every}")
    assert [i for i in range(1, 6) if checkpointer.is_due(i, last=5)] == due
