"""A few seconds of `tools/fuzz_verifier.py`; `make fuzz` gives it minutes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "fuzz_verifier.py"


def test_fuzz(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(TOOL))["main"]
    assert main(["--minutes", "0.05", "--workers", "1"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["extracted"] > 0
    assert {"correct", "incorrect", "unverified"} <= counts.keys()
