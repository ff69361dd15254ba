"""Each mistake at start-up ends with one line that names key, value and way out, and status 2.

Every case is a fresh process that runs the real command line. Most of them are forked from a
server that has imported it, which saves some eight seconds a case; the last ones are started as a
user starts them, alone and under torchrun.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.cli import main
from tests.integration import toy
from tests.integration.commands import COMMAND, Finished, alone, torchrun
from tests.integration.commands import run as run_command

TIMEOUT_S = 120.0
QUESTION = {"question": "1+2", "gold_answer": "1"}
Prepare = Callable[[Path], dict[str, Any]]


def write(folder: Path, content: str) -> dict[str, Any]:
    path = folder / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    return {"data__path": path}


def lines(*records: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def model_without(folder: Path, name: str) -> dict[str, Any]:
    toy.save_model(folder / "model")
    (folder / "model" / name).unlink()
    return {"model__path": folder / "model"}


def model_of(folder: Path, **config: object) -> dict[str, Any]:
    """The toy, its `config.json` changed."""
    toy.save_model(folder / "model")
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return {"model__path": folder / "model"}


def tokenizer_without_eos(folder: Path) -> dict[str, Any]:
    toy.save_model(folder / "model")
    path = folder / "model" / "tokenizer_config.json"
    declared = json.loads(path.read_text())
    del declared["eos_token"]
    path.write_text(json.dumps(declared))
    return {"model__path": folder / "model"}


def run_folder_in_use(folder: Path) -> dict[str, Any]:
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").write_text('{"kind": "train", "iteration": 0}\n')
    return {"run__folder": folder / "used"}


# (what is wrong, the command, how it comes about, what the line must name)
CASES: dict[str, tuple[str, Prepare, list[str]]] = {
    "unknown key": (
        "train",
        lambda _: {"oreal__kl_coeficient": 0.1},
        ["oreal.kl_coeficient=0.1", "did you mean oreal.kl_coefficient?"],
    ),
    "layout does not divide the world": (
        "train",
        lambda _: {"parallel__tensor": 2},
        ["tensor(2) * pipeline(1)", "WORLD_SIZE(1)", "change parallel.*"],
    ),
    "engines do not divide the world": (
        "train",
        lambda _: {"rollout__tensor_parallel": 3},
        ["rollout.tensor_parallel=3", "WORLD_SIZE(1)", "set a divisor"],
    ),
    "FP8 on a CPU": (
        "train",
        lambda _: {"model__precision": "bf16", "fp8__token_rm__recipe": "delayed"},
        ["fp8.token_rm.recipe=delayed", "a CPU has no FP8", "set none"],
    ),
    "no model folder": (
        "train",
        lambda folder: {"model__path": folder / "nowhere"},
        ["model.path=", "nowhere", "name a Hugging Face model folder"],
    ),
    "model without weights": (
        "train",
        lambda folder: model_without(folder, "model.safetensors"),
        ["model.path=", "/model", "safetensors"],
    ),
    "weights of another shape": (
        "train",
        lambda folder: model_of(folder, intermediate_size=128),
        ["/model", "model.layers.0.mlp", "128"],
    ),
    "model without config.json": (
        "train",
        lambda folder: model_without(folder, "config.json"),
        ["model.path=", "config.json", "name a Hugging Face model folder"],
    ),
    "unknown family": (
        "train",
        lambda folder: model_of(folder, model_type="mamba"),
        ["model.path=", "mamba", "qwen2"],
    ),
    "fine-tuning of an unknown family": (
        "sft",
        lambda folder: model_of(folder, model_type="mamba"),
        ["model.path=", "mamba", "qwen2"],
    ),
    "evaluation of an unknown family": (
        "evaluate",
        lambda folder: model_of(folder, model_type="mamba"),
        ["model.path=", "mamba", "qwen2"],
    ),
    "fine-tuning without weights": (
        "sft",
        lambda folder: model_without(folder, "model.safetensors"),
        ["model.path=", "/model", "safetensors"],
    ),
    "prompt longer than the window": (
        "train",
        lambda folder: write(folder, lines(QUESTION, {**QUESTION, "question": "1+" * 20})),
        ["line 2: field `question`", "42 tokens", "sampling.max_total_tokens=32: raise it"],
    ),
    "no data file": (
        "train",
        lambda folder: {"data__path": folder / "nowhere.jsonl"},
        ["data.path=", "nowhere.jsonl", "name a readable JSONL file"],
    ),
    "empty data file": (
        "train",
        lambda folder: write(folder, "\n"),
        ["data.path=", "bad.jsonl", "the file is empty"],
    ),
    "malformed line": (
        "train",
        lambda folder: write(folder, lines(QUESTION) + '{"question": "1+'),
        ["data.path=", "bad.jsonl, line 2", "JSON object with `question`, `gold_answer`"],
    ),
    "field of the wrong type": (
        "train",
        lambda folder: write(folder, lines(QUESTION, {**QUESTION, "gold_answer": [1]})),
        ["data.path=", "bad.jsonl, line 2", "gold_answer"],
    ),
    "question without gold answer": (
        "train",
        lambda folder: write(folder, lines(QUESTION, {"question": "1+3"})),
        ["data.path=", "bad.jsonl, line 2", "gold_answer"],
    ),
    "column that is not there": (
        "train",
        lambda _: {"data__columns__question": "problem"},
        ["line 1: no required field `problem`", "it has `question`", "set data.columns.question"],
    ),
    "blank gold answer": (
        "train",
        lambda folder: write(folder, lines({**QUESTION, "gold_answer": " "})),
        ["data.path=", "bad.jsonl, line 1", "`gold_answer` is blank", "fill it in"],
    ),
    "unknown stop token": (
        "train",
        lambda _: {"model__stop_token": "<stop>"},
        ["model.stop_token=<stop>", "not a token", "<end>"],
    ),
    "no stop token": (
        "train",
        tokenizer_without_eos,  # transformers then makes one up
        ["model.path=", "<|endoftext|>", "vocab_size=23", "name another model.stop_token"],
    ),
    "evaluation without a file": (
        "evaluate",
        lambda _: {"evaluation__path": "null"},
        ["evaluation.path=null", "name the JSONL file"],
    ),
    "evaluation in a run without a file": (
        "train",
        lambda _: {"evaluation__path": "null", "evaluation__at_end": "true"},
        ["evaluation.path=null", "name their file"],
    ),
    "evaluation file missing": (
        "evaluate",
        lambda folder: {"evaluation__path": folder / "nowhere.jsonl"},
        ["evaluation.path=", "nowhere.jsonl", "name a readable JSONL file"],
    ),
    "no demonstrations": (
        "sft",
        lambda _: {"sft__path": "null"},
        ["sft.path=null", "name the JSONL file"],
    ),
    "demonstrations without a response": (
        "sft",
        lambda folder: {"sft__path": write(folder, lines(QUESTION))["data__path"]},
        ["sft.path=", "bad.jsonl, line 1", "response"],
    ),
    "run folder in use": (
        "train",
        run_folder_in_use,
        ["run.folder=", "/used", "name another folder"],
    ),
}


def in_fresh_process(arguments: list[str], folder: Path) -> Finished:
    """`megatron-oreal arguments...` in a process of its own, imports already done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_oreal.trainer.train", "megatron_oreal.trainer.sft"])
    files = folder / "stdout", folder / "stderr"
    process = context.Process(target=_command, args=(arguments, *files))
    process.start()
    process.join(TIMEOUT_S)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs, f"no end after {TIMEOUT_S:g} s"
    return Finished(process.exitcode or 0, *(file.read_text() for file in files))


def _command(arguments: list[str], stdout: Path, stderr: Path) -> None:
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        stream.flush()
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, stream.fileno())
    sys.exit(main(arguments))


def assert_refused(finished: Finished, named: list[str]) -> None:
    assert finished.status == 2, finished.stderr
    (line,) = finished.lines()
    missing = [text for text in named if text not in line]
    assert not missing, f"{missing} not in: {line}"
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_key_value_and_way_out(case: str, root: Path, tmp_path: Path) -> None:
    command, prepare, named = CASES[case]
    settings = toy.settings(root, str(tmp_path / "run"), **prepare(tmp_path))
    finished = in_fresh_process([command, *settings], tmp_path)
    assert_refused(finished, named)
    assert finished.stderr == f"{finished.lines()[0]}\n"  # and nothing beside it


def test_a_missing_suite(root: Path, tmp_path: Path) -> None:
    settings = toy.settings(root, str(tmp_path / "run"), evaluation__suites_folder="suites")
    finished = in_fresh_process(["evaluate", "--suite", "mixed48,aime", *settings], tmp_path)
    assert_refused(finished, ["--suite=aime", "which has mixed48", "python tools/fetch_suites.py"])


def test_a_refused_run_leaves_its_folder_free(root: Path, tmp_path: Path) -> None:
    model = model_without(tmp_path, "model.safetensors")
    wrong = toy.settings(root, str(tmp_path / "run"), **model)
    for _ in range(2):  # the second time it is still the weights, not the folder
        assert_refused(in_fresh_process(["train", *wrong], tmp_path), ["model.path="])


def test_without_vllm(root: Path, tmp_path: Path) -> None:
    """A path finder that knows no vLLM stands where Python's own stood, before anything ran."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class WithoutVllm(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        vllm = name.partition('.')[0] == 'vllm'\n"
        "        return None if vllm else super().find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutVllm\n"
    )
    settings = toy.settings(root, str(tmp_path / "run"), monitor__wandb="disabled")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    finished = alone("train", *settings, variables={"PYTHONPATH": path})
    assert_refused(finished, ["rollout.backend=vllm", "not installed", "Install"])


@pytest.fixture(scope="module")
def rank_outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Finished]]:
    """Runs two ranks under torchrun and returns what each of them wrote."""

    def start(*arguments: str) -> list[Finished]:
        logs = tmp_path_factory.mktemp("ranks")
        program = ("--redirects", "3", "--log-dir", str(logs), *COMMAND)
        finished = run_command(torchrun(2, *arguments, program=program))
        assert finished.status == 1, finished.stderr  # torchrun's own
        assert "exitcode  : 2 " in finished.stderr  # ours
        return [
            Finished(2, *(log.read_text() for log in sorted(folder.glob("std*.log"))[::-1]))
            for folder in sorted(logs.glob("*/*/[01]"))
        ]

    return start


def test_two_ranks_and_heads_that_cannot_be_cut(
    root: Path, tmp_path: Path, rank_outputs: Callable[..., list[Finished]]
) -> None:
    model = model_of(tmp_path, num_attention_heads=3, num_key_value_heads=1, hidden_size=96)
    first, second = rank_outputs(
        "train", *toy.settings(root, str(tmp_path / "run"), parallel__tensor=2, **model)
    )
    assert_refused(first, ["parallel.tensor=2", "3 attention heads", "set a divisor"])
    assert second.stderr == ""


def test_two_ranks_one_of_which_sees_the_mistake(
    root: Path, tmp_path: Path, rank_outputs: Callable[..., list[Finished]]
) -> None:
    """Rank 0 alone makes the run's folder: the other must hear of it, and not wait for ever."""
    (tmp_path / "file").write_text("")
    first, second = rank_outputs(
        "train", *toy.settings(root, str(tmp_path / "file" / "run"), parallel__tensor=2)
    )
    assert_refused(first, ["run.folder=", "file/run", "Not a directory", "name another folder"])
    assert second.stderr == ""
