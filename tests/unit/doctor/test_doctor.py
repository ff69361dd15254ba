"""What the doctor makes of what it reads; that it reads it is tested under torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import JudgeConfig
from megatron_oreal.doctor.judges import check_judges
from megatron_oreal.doctor.machine import cards_by_gpu, check_machine, links, network_cards
from megatron_oreal.doctor.packages import _compared, _required
from megatron_oreal.doctor.ranks import clock_finding, differences, rate_findings
from megatron_oreal.doctor.report import Finding, Level, as_json, as_table, exit_status
from megatron_oreal.doctor.storage import check_folder, check_inputs
from megatron_oreal.doctor.variables import check_variables, shared_variables
from megatron_oreal.parallel.bandwidth import Rate
from megatron_oreal.verify.judge_check import check_judges as check_judge_before_a_run
from tests.contracts.judge_server import RIGHT, Server

ROOT = Path(__file__).parents[3]
FINE, NOTE, MISSING = Level.FINE, Level.NOTE, Level.MISSING


@pytest.mark.parametrize(("level", "status"), [(FINE, 0), (NOTE, 0), (MISSING, 1)])
def test_only_what_is_missing_fails(level: Level, status: int) -> None:
    findings = [Finding("a", "b", FINE, "c"), Finding("a", "d", level, "e", "f")]
    assert exit_status(findings) == status
    assert as_json(findings)["status"] == status
    assert as_json(findings)["findings"][1]["level"] == str(level)
    assert as_table(findings).row_count == 3


@pytest.mark.parametrize(
    ("found", "level"),
    [("2.13.0+cpu", FINE), ("2.13.0", FINE), ("2.13.1", NOTE), ("2.13.00", NOTE)],
)
def test_versions_are_compared_with_the_tested_ones(found: str, level: Level) -> None:
    assert _compared("torch", found, ("2.13.0",)).level is level


def test_a_package_that_is_not_there_is_missing() -> None:
    assert _required("no-such-package-at-all", ("1",)).level is MISSING


TOPOLOGY = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity
GPU0\t X \t{link}\tPXB\t0-31
GPU1\t{link}\t X \tSYS\t0-31
NIC0\tPXB\tSYS\t X
"""


@pytest.mark.parametrize(
    ("link", "level", "says"),
    [("NV12", FINE, "NVLink (NV12) between all pairs"), ("SYS", NOTE, "not all NVLink: SYS")],
)
def test_gpus_are_joined_by_nvlink_or_not(link: str, level: Level, says: str) -> None:
    finding = links(TOPOLOGY.format(link=link))
    assert (finding.level, finding.found) == (level, says)


def test_a_topology_that_says_nothing_is_unknown() -> None:
    assert links("").found == "not all NVLink: unknown"


def test_ports_are_listed_with_their_state(tmp_path: Path) -> None:
    for card, state in (("mlx5_0", "4: ACTIVE"), ("mlx5_1", "1: DOWN")):
        port = tmp_path / card / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    first, second = network_cards(tmp_path, needed=True)
    assert (first.level, first.found) == (FINE, "4: ACTIVE, 400 Gb/sec (4X NDR)")
    assert second.level is NOTE
    assert network_cards(tmp_path / "none", needed=True)[0].level is NOTE
    assert network_cards(tmp_path / "none", needed=False)[0].level is FINE


def test_unlike_gpus_are_noted() -> None:
    one, other = "NVIDIA A100, 81920, 550", "NVIDIA H100, 81559, 550"
    assert check_machine([one, one])[0].level is FINE
    assert check_machine([one, other])[0].level is NOTE


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"OMP_NUM_THREADS": "1"}, ["variables"]),
        ({"OMP_NUM_THREADS": "1", "NCCL_P2P_DISABLE": "0"}, ["variables"]),
        ({"OMP_NUM_THREADS": "1", "NCCL_P2P_DISABLE": "1"}, ["NCCL_P2P_DISABLE"]),
        ({"NCCL_DEBUG": "TRACE"}, ["NCCL_DEBUG", "OMP_NUM_THREADS"]),
    ],
)
def test_variables_that_hurt_are_named(variables: dict[str, str], names: list[str]) -> None:
    assert [finding.name for finding in check_variables(variables, gpus=False)] == names


def test_megatron_wants_one_connection_on_gpus() -> None:
    assert check_variables({}, gpus=True)[0].name == "CUDA_DEVICE_MAX_CONNECTIONS"
    assert check_variables({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, gpus=True)[0].level is FINE


def test_secrets_and_what_is_a_ranks_own_are_not_compared() -> None:
    variables = {"HF_TOKEN": "s", "NCCL_DEBUG": "WARN", "CUDA_VISIBLE_DEVICES": "3", "HOME": "/r"}
    assert shared_variables(variables) == {"NCCL_DEBUG": "WARN"}


def test_differences_name_the_ranks() -> None:
    hosts = ["a", "a", "b", "b"]
    same = {"NCCL_DEBUG": "INFO"}
    assert differences([same, same], hosts)[0].level is FINE
    (finding,) = differences([same, same, {"NCCL_DEBUG": "WARN"}, {}], hosts)
    assert (finding.name, finding.level) == ("NCCL_DEBUG", NOTE)
    assert finding.found == "INFO on rank 0, 1 (a); WARN on rank 2 (b); not set on rank 3 (b)"


def test_versions_that_differ_fail() -> None:
    (finding,) = differences([{"torch": "2.11.0"}, {"torch": "2.13.0"}], ["a", "b"])
    assert finding.level is MISSING
    assert finding.found == "2.11.0 on rank 0 (a); 2.13.0 on rank 1 (b)"
    assert "install the same everywhere" in finding.says


def test_a_slow_network_is_noted_on_gpus() -> None:
    fast, slow = Rate(8, 256 << 20, 230e9), Rate(16, 256 << 20, 2e9)
    within, across = rate_findings(fast, slow, gpus=True)
    assert (within.name, within.level) == ("all-reduce in a node", FINE)
    assert within.found == "230.00 GB/s, 256 MiB over 8 ranks, NCCL"
    assert (across.name, across.level) == ("all-reduce across nodes", NOTE)
    assert "InfiniBand" in across.says
    assert [f.level for f in rate_findings(slow, None, gpus=False)] == [FINE]


@pytest.mark.parametrize(
    ("cell", "level", "found"),
    [("PXB", FINE, "a card of 1 near each GPU"), ("SYS", NOTE, "none near GPU1")],
)
def test_network_cards_are_near_their_gpus(cell: str, level: Level, found: str) -> None:
    text = TOPOLOGY.format(link="NV12").replace("X \tSYS", f"X \t{cell}")
    (finding,) = cards_by_gpu(text)
    assert (finding.level, finding.found) == (level, found)
    assert cards_by_gpu("") == []


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(RIGHT)
    yield server
    server.close()


def judge_config(*hosts: str, **more: Any) -> JudgeConfig:
    return JudgeConfig(hosts=hosts, model="judge", health_check_s=5.0, **more)


GONE = "http://127.0.0.1:9/v1"


def test_a_judge_that_can_be_asked_is_fine(server: Server) -> None:
    fine, gone = check_judges(judge_config(server.url, GONE))
    assert (fine.level, fine.found) == (FINE, "serves judge")
    assert (gone.level, gone.found) == (NOTE, "cannot be reached")
    check_judge_before_a_run(judge_config(server.url, GONE))


def test_a_judge_that_cannot_be_asked_is_missing(server: Server) -> None:
    server.health = 503
    config = judge_config(server.url, GONE)
    assert [finding.level for finding in check_judges(config)] == [MISSING, MISSING]
    with pytest.raises(UserError) as caught:
        check_judge_before_a_run(config)
    text = str(caught.value)
    assert f"{server.url} answers with status 503, {GONE} cannot be reached; start" in text
    assert check_judges(JudgeConfig()) == []
    check_judge_before_a_run(judge_config(GONE, when="never"))


def test_a_server_of_something_else_is_missing(server: Server) -> None:
    server.models = ["other", "another"]
    (finding,) = check_judges(judge_config(server.url))
    assert finding.found == "serves other, another, not judge.model=judge"
    server.models = ["other", "judge"]
    assert check_judges(judge_config(server.url))[0].level is FINE
    server.page = "<html>welcome</html>"
    (finding,) = check_judges(judge_config(server.url))
    assert finding.found == "does not speak OpenAI's protocol"


def test_a_key_that_is_not_set_is_missing(server: Server) -> None:
    (finding,) = check_judges(judge_config(server.url, api_key_variable="NO_SUCH_KEY"))
    assert finding.level is MISSING
    assert "NO_SUCH_KEY" in finding.found


def test_a_clock_that_is_off_is_named() -> None:
    hosts = ["a", "a", "b"]
    assert clock_finding([0.0, 0.001, -0.002], hosts).level is FINE
    finding = clock_finding([0.0, 0.001, -7.0], hosts)
    assert finding.level is NOTE
    assert "rank 2 on b is -7.0 s off" in finding.says


def test_a_recipe_without_weights_and_questions_is_missing_them(tmp_path: Path) -> None:
    config = load_config(
        [ROOT / "configs/oreal_7b.yaml"],
        [
            f"model.path={ROOT}/configs/models/qwen2.5-7b",
            f"data.path={tmp_path}/none.jsonl",
            f"run.folder={tmp_path}/runs/a",
        ],
    )
    model, data = check_inputs(config)
    assert (model.level, data.level) == (MISSING, MISSING)
    assert "7.62e9 parameters" in model.found
    assert "has no weights and no tokenizer" in model.says
    speed, space = check_folder(config)
    assert "MiB/s" in speed.found
    assert "a run of it needs about" in space.says
    assert not (tmp_path / "runs").exists()
