from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema_data import QuestionColumns
from megatron_oreal.data.prompts import QuestionRecord
from megatron_oreal.data.records import Row, read_records
from megatron_oreal.data.sources import find_files
from tests.unit.data.conftest import write_jsonl

# Three rows that `datasets` saved with the columns and types of the released OREAL-RL-Prompts.
SAVED = Path(__file__).parent / "oreal_rl_prompts"
COLUMNS = {
    "question": ["What is $1+1$?", "What is $2\\cdot 3$?", "Solve $x^2=2$ for $x>0$."],
    "gold_answer": ["2", "6", "\\sqrt{2}"],
    "pass_rate": [0.9375, 0.5, 0.125],
}


def read(source: str | Path, key: str = "data.path", **columns: str) -> list[Row[QuestionRecord]]:
    named = asdict(QuestionColumns(**columns))
    return list(read_records(source, key, QuestionRecord, named))


def as_columns(rows: list[Row[QuestionRecord]]) -> dict[str, list[object]]:
    return {name: [getattr(row.record, name) for row in rows] for name in COLUMNS}


def write_parquet(path: Path, **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)
    return path


def test_the_released_columns_work_as_they_are(tmp_path: Path) -> None:
    kinds: list[str | Path] = [
        SAVED,
        write_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet", **COLUMNS),
        tmp_path / "hub",
        write_jsonl(
            tmp_path / "q.jsonl",
            *(dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)),
        ),
    ]
    for source in kinds:
        assert as_columns(read(source)) == COLUMNS


def test_rows_are_named_over_all_files_and_placed_in_their_own(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_parquet(tmp_path / f"{name}.parquet", question=[name, name], gold_answer=["1", "2"])
    rows = read(f"{tmp_path}/*.parquet")
    assert [(row.name, row.record.question) for row in rows] == [
        ("row-1", "a"),
        ("row-2", "a"),
        ("row-3", "b"),
        ("row-4", "b"),
    ]
    assert rows[3].where == f"data.path={tmp_path}/b.parquet, row 2"


def test_mapped_and_nested_columns(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "d.parquet",
        problem=["1+1"],
        reward_model=[{"ground_truth": 2, "style": "rule"}],
        pass_rate=[None],
    )
    (row,) = read(path, question="problem", gold_answer="reward_model.ground_truth")
    assert row.record == QuestionRecord("1+1", 2)


def test_a_wrong_column_is_one_line_with_those_there_are(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "d.parquet", problem=["1+1"], answer=["2"])
    lines = write_jsonl(tmp_path / "d.jsonl", {"problem": "1+1", "answer": "2"})
    for source, place in ((path, "d.parquet, row 1"), (lines, "d.jsonl, line 1")):
        with pytest.raises(UserError) as caught:
            read(source, question="problem")
        text = str(caught.value)
        assert f"{place}: no required field `gold_answer`; it has `problem`, `answer`" in text
        assert text.endswith("set data.columns.gold_answer")
    with pytest.raises(UserError, match=r"`rate`.*set data\.columns\.pass_rate"):
        read(path, question="problem", gold_answer="answer", pass_rate="rate")


def test_a_folder_must_hold_one_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"hub/data/{split}-0.parquet", **COLUMNS)
        shutil.copytree(SAVED, tmp_path / "saved" / split)
    (tmp_path / "saved/dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(UserError, match=r"splits test, train: .*/hub/\*\*/train\*\.parquet"):
        find_files(tmp_path / "hub", "data.path")
    with pytest.raises(UserError, match="splits test, train: name the folder of one"):
        find_files(tmp_path / "saved", "data.path")
    assert len(find_files(f"{tmp_path}/hub/**/train*.parquet", "data.path")) == 1
    assert len(read(tmp_path / "saved" / "train")) == 3


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"question": "q"}\n' * 100])
def test_what_is_not_of_its_kind_is_named(tmp_path: Path, kind: str, content: bytes) -> None:
    path = tmp_path / f"d.{kind}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"d\.{kind}: not a whole {kind} file") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    whole = (SAVED / "data-00000-of-00001.arrow").read_bytes()
    path = tmp_path / "d.arrow"
    path.write_bytes(whole[: len(whole) - 200])
    with pytest.raises(UserError, match=r"d\.arrow: not a whole arrow file"):
        read(path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file has such a name"):
        read(f"{tmp_path}/*.parquet")
    with pytest.raises(UserError, match=r"No such file.*name a readable JSONL file, or Parquet"):
        read(tmp_path / "d.parquet")
    with pytest.raises(UserError, match="the file is empty"):
        read(write_parquet(tmp_path / "d.parquet", question=[], gold_answer=[]))


def test_a_data_set_of_the_hub_is_read_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub leaves a download; the tests run with HF_HUB_OFFLINE=1."""
    commit, repo = "0" * 40, tmp_path / "datasets--someone--prompts"
    shutil.copytree(SAVED, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert as_columns(read("hf://datasets/someone/prompts")) == COLUMNS
    assert as_columns(read(f"hf://datasets/someone/prompts@{commit}/*.arrow")) == COLUMNS
    with pytest.raises(UserError, match=r"data\.path=hf://datasets/no/where: the hub does not"):
        read("hf://datasets/no/where")
    with pytest.raises(UserError, match="mend the name"):
        read("hf://datasets/..")
