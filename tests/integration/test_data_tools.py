"""Pass rates and demonstrations by the real engine and verifier, with a stop in between."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.data.demonstrations import load_demonstrations
from megatron_oreal.data.prompts import load_prompts
from megatron_oreal.data.tokenizer import load_tokenizer
from tests.integration import toy
from tests.integration.commands import ROOT, run
from tests.integration.conftest import FineTuning

QUESTIONS, SAMPLES = 24, 4


def tool(name: str, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / f"{name}.py"), "--json"]
    finished = run([*command, *map(str, arguments)])
    assert finished.status == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.vllm
def test_a_survey_goes_on_and_serves_both_tools(root: Path, fine_tuning: FineTuning) -> None:
    lines = (root / "questions.jsonl").read_text().splitlines()[:QUESTIONS]
    asked = root / "asked.jsonl"
    asked.write_text("\n".join(lines))
    more = {"data__path": asked, "sampling__samples_per_question": SAMPLES}
    settings = toy.settings(root, "surveyed", fine_tuning.model, **more)

    rated = root / "rated.jsonl"
    counts = tool("estimate_pass_rates", "--output", rated, *settings)
    assert (counts["questions"], counts["without_pass_rate"]) == (QUESTIONS, 0)
    tokenizer = load_tokenizer(fine_tuning.model)
    prompts = load_prompts(rated, tokenizer, None, max_total_tokens=toy.WINDOW)
    rates = [prompt.pass_rate for prompt in prompts]
    assert all(rate is not None and (rate * SAMPLES).is_integer() for rate in rates)

    first, _, last = sorted((root / "surveyed" / "survey").iterdir())
    before, answers = first.stat().st_mtime_ns, last.read_bytes()
    last.unlink()
    demonstrations = root / "sampled.jsonl"
    counts = tool("rejection_sample", "--output", demonstrations, *settings)
    assert (first.stat().st_mtime_ns, counts["responses"]) == (before, QUESTIONS * SAMPLES)
    assert len(last.read_bytes()) == pytest.approx(len(answers), abs=QUESTIONS)  # times differ
    assert counts["correct"] == sum(rate * SAMPLES for rate in rates if rate is not None)

    (stop,) = tokenizer.encode("<end>", add_special_tokens=False)
    learnt = load_demonstrations(demonstrations, tokenizer, None, stop, max_total_tokens=toy.WINDOW)
    assert len(learnt) == counts["written"] > 0
