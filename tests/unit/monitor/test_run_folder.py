from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor.run_folder import RunFolder, atomic_write_text

if TYPE_CHECKING:
    from pathlib import Path


def test_a_write_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "a longer first text\n")
    atomic_write_text(path, "zweitens: ü\n")
    assert path.read_bytes() == "zweitens: ü\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"


def test_create_makes_the_whole_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.create("run:\n  seed: 0\n")
    assert sorted(p.name for p in folder.root.iterdir()) == [
        "bank",
        "checkpoints",
        "config.yaml",
        "hf",
        "ranks",
        "recorded",
        "rollouts",
    ]
    assert folder.config.read_text(encoding="utf-8") == "run:\n  seed: 0\n"


def test_a_folder_that_holds_a_run_is_kept_unless_resumed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create("first")
    folder.metrics.write_text("{}\n")
    with pytest.raises(UserError, match=r"^run\.folder=.*: holds a run already"):
        folder.create("second")
    assert folder.config.read_text(encoding="utf-8") == "first"
    folder.create("second", resume=True)
    assert folder.config.read_text(encoding="utf-8") == "second"


def test_a_folder_whose_run_was_refused_at_its_start_is_free(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create("first")
    folder.metrics.touch()
    folder.create("second")
    assert folder.config.read_text(encoding="utf-8") == "second"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"^run\.folder=.*file/x: cannot be written \(Not a directory"
    ):
        RunFolder(tmp_path / "file" / "x").create("")


def test_the_summary_is_strict_json(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_summary({"pass_at_1": {"before": 0.5, "after": math.nan}})
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"pass_at_1": {"before": 0.5, "after": "nan"}}
