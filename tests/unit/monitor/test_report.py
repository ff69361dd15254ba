"""What the page is told: numbers that a person can check; `tests/browser` looks at the page."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest

from megatron_oreal.cli import main
from megatron_oreal.config.errors import UserError
from megatron_oreal.monitor.report import answers, build
from megatron_oreal.monitor.report.choose import choose
from megatron_oreal.monitor.report.pack import COLUMNS
from megatron_oreal.monitor.report.read import Head, Place, read_run
from tests import report_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_run.make_run(tmp_path_factory.mktemp("runs") / "tiny")


def places(iterations: int, length: int) -> list[Place]:
    """Four questions an iteration: two trained pairs, one solved, one failed."""
    return [
        Place(Path(f"{i}"), line, Head(i, f"q{q}", k, length, rate, 1.0 if ok else -1.0, ok, pair))
        for i in range(iterations)
        for line, (q, k, rate, ok, pair) in enumerate(
            [
                *((0, k, 0.5, ok, True) for k, ok in enumerate(("correct", "incorrect"))),
                *((1, k, 0.25, ok, True) for k, ok in enumerate(("correct", "incorrect"))),
                (2, 0, 1.0, "correct", False),
                (3, 0, 0.0, "incorrect", False),
            ]
        )
    ]


def test_everything_is_shown_where_there_is_room() -> None:
    assert len(choose(places(3, 10), max_tokens=180, seed=0)) == 18


def test_a_sample_is_spread_over_the_run_and_keeps_pairs_whole() -> None:
    chosen = choose(places(90, 100), max_tokens=20_000, seed=0)
    assert sum(place.head.response_length for place in chosen) == 20_000
    stretches = {place.head.iteration // 3 for place in chosen}
    assert len(stretches) == 30
    assert {place.head.pass_rate for place in chosen} == {0.0, 0.25, 0.5, 1.0}
    pairs = [(p.head.iteration, p.head.prompt_id) for p in chosen if p.head.trained]
    assert all(pairs.count(pair) == 2 for pair in pairs)
    assert choose(places(90, 100), 20_000, seed=0) == chosen != choose(places(90, 100), 20_000, 1)


def test_the_blamed_token() -> None:
    scores = np.array(report_run.SCORES)
    # running means: 1 throughout, then (8 - 15) / 9
    index, before, after = answers.blamed_token(scores, score_is_before=True) or (0, 0, 0)
    assert (index, before) == (report_run.FALL, pytest.approx(1 / (1 + math.exp(-1))))
    assert after == pytest.approx(1 / (1 + math.exp(7 / 9)))
    assert (answers.blamed_token(scores, score_is_before=False) or [0])[0] == report_run.FALL + 1
    assert answers.blamed_token(scores[:1], score_is_before=True) is None
    assert answers.blamed_token(scores * np.nan, score_is_before=True) is None


def test_calibration_by_hand() -> None:
    rows = answers.calibration([(0.0, True), (0.0, False), (20.0, True)])
    assert rows == [
        {"p": 0.5, "correct": 0.5, "count": 2},
        {"p": pytest.approx(1), "correct": 1, "count": 1},
    ]


def test_the_overview_in_words(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["learned"]["verdict"] == "Yes"
    assert said["learned"]["said"][0].endswith("rose from 25.0 to 75.0 percent (+50.0).")
    assert said["learned"]["said"][1].endswith("stayed from 50.0 to 50.0 percent (+0.0).")
    assert (
        said["time"][0] == "37 s on the first rank's clock: generate 65%, policy 32%, evaluate 3%."
    )
    alarms = [(alarm["kind"], alarm["iteration"], alarm["ended"]) for alarm in said["alarms"]]
    assert alarms == [("unverified", 1, 2), ("entropy", 3, None)]
    assert [item["blamed"]["index"] for item in said["blamed"]] == [report_run.FALL] * 2
    assert said["blamed"][0]["blamed"]["context"] == ["\\(2+3\\)=\\boxed{", "6", "}"]
    assert said["blamed"][0]["blamed"]["heaviest"] == 8
    assert said["blamed"][0]["blamed"]["heaviest_weight"] == 0.5
    assert said["transcripts"]["shown"] == said["transcripts"]["written"] == 24
    assert (run / "report.html").stat().st_size < 600_000


def test_tokens_come_back_from_the_page(run: Path) -> None:
    data, chunks = build.read(build.Request((run,)))
    item = next(item for item in data["items"] if item["trained"] and item["reward"] < 0)
    raw, n = zlib.decompress(chunks[item["chunk"]]), item["n"]
    start = item["start"] * (4 + 2 * len(COLUMNS))
    indices = np.frombuffer(raw, np.int32, n, start)
    assert [data["ids"][i] for i in indices] == list(report_run.WRONG)
    assert "".join(data["pieces"][i] for i in indices).encode("latin-1") == b"\\(2+3\\)=\\boxed{6}"
    column = start + 4 * n + 2 * n * COLUMNS.index("token_weight")
    assert np.frombuffer(raw, np.float16, n, column).tolist() == [i / 16 for i in range(n)]


def test_one_iteration_is_shown_whole(run: Path) -> None:
    data, _ = build.read(build.Request((run,), iteration=2, max_tokens=None))
    assert {item["iteration"] for item in data["items"]} == {2}
    assert len(data["items"]) == 6


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no metrics.jsonl; name the folder of a run" in capsys.readouterr().err


def test_what_cannot_be_shown_or_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--iteration", "99"]) == 2
    assert "--iteration 99: has no transcripts" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(run / "metrics.jsonl" / "page.html")]) == 2
    assert "page.html: cannot be written (" in capsys.readouterr().err


def test_a_transcript_that_is_none(tmp_path: Path) -> None:
    root = report_run.make_run(tmp_path / "run", iterations=1)
    (root / "rollouts" / "iter_000000.jsonl").write_text('{"iteration": "no"}\n')
    with pytest.raises(UserError, match=r"iter_000000\.jsonl:1: no transcript"):
        read_run(root)


def test_watch_writes_until_the_run_is_finished(tmp_path: Path) -> None:
    root = report_run.make_run(tmp_path / "run", iterations=1, finished=False)
    out, said = tmp_path / "page.html", []
    waits = iter([lambda: None, lambda: report_run.RunFolder(root).write_summary({})])
    build.watch(build.Request((root,), refresh_s=1), out, said.append, lambda _: next(waits)())
    assert said == [f"{out}: tiny 1 of 1 iterations"] * 2
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["page.html"]
