"""How a command line is read."""

from __future__ import annotations

import pytest

from megatron_oreal.arguments import read_arguments


def test_settings_stand_anywhere_after_the_command() -> None:
    line = "train run.seed=1 --config a.yaml run.seed=2 --config b.yaml run.name=x"
    options = read_arguments(line.split())
    assert options.settings == ["run.seed=1", "run.seed=2", "run.name=x"]
    assert [str(path) for path in options.config] == ["a.yaml", "b.yaml"]


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("train --config a.yaml run.seed=1 --sed=2", "--sed=2"),
        ("train run.seed=1 --config a.yaml stray", "stray"),
        ("report runs/a --watch --iteration 2 run.seed=1", "run.seed=1"),
    ],
)
def test_what_is_unknown_is_named(
    line: str, unknown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        read_arguments(line.split())
    assert f"unrecognized arguments: {unknown}" in capsys.readouterr().err


def test_a_plan_is_of_a_run_unless_it_says_otherwise() -> None:
    assert read_arguments(["plan", "--ranks", "8", "run.seed=1"]).subject == "run"
    assert read_arguments(["plan", "weights", "--ranks", "8", "run.seed=1"]).subject == "weights"
