from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.suites import SuiteChoice, choose_suites

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("aime24", "math500"):
        (tmp_path / f"{name}.jsonl").touch()
    return tmp_path


def test_names_and_their_numbers_of_responses(folder: Path) -> None:
    assert choose_suites("math500, aime24:32", folder, 4) == [
        SuiteChoice("math500", f"{folder}/math500.jsonl", 4),
        SuiteChoice("aime24", f"{folder}/aime24.jsonl", 32),
    ]


def test_a_missing_suite_is_one_line_with_those_there_are(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        choose_suites("math500,olympiad", folder, 4)
    text = str(caught.value)
    assert text.startswith("--suite=olympiad: no such file in evaluation.suites_folder=")
    assert "which has aime24, math500" in text
    assert f"python tools/fetch_suites.py olympiad --output {folder}" in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["nowhere/x", "../secret"])
def test_a_suite_is_a_name_in_its_folder(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        choose_suites(name, folder, 4)
    with pytest.raises(UserError, match="which has none"):
        choose_suites("math500", folder / "nowhere", 4)


@pytest.mark.parametrize("wanted", ["", "math500,", "math500,math500:2"])
def test_each_name_once(folder: Path, wanted: str) -> None:
    with pytest.raises(UserError, match="name each suite once"):
        choose_suites(wanted, folder, 4)


@pytest.mark.parametrize("number", ["0", "-1", "x", "", "1.5"])
def test_a_number_of_responses_is_1_or_more(folder: Path, number: str) -> None:
    with pytest.raises(UserError, match="write NAME:RESPONSES"):
        choose_suites(f"math500:{number}", folder, 4)
