from __future__ import annotations

import pytest
import torch

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.rollout.server_client import Server
from megatron_oreal.rollout.server_link import chunks
from megatron_oreal.rollout.vllm_arguments import server_command

SERVED = ["model.path=m", "data.path=d", "rollout.backend=vllm_server"]


def test_a_server_is_started_as_the_engine_in_a_rank_is():
    settings = ["model.path=m", "model.precision=fp32", "rollout.enforce_eager=true"]
    config = load_config([], [*settings, "rollout.tensor_parallel=2"], optional=("data.path",))
    command = server_command(config, "127.0.0.1", 8123)
    text = " ".join(command)
    assert "-m vllm.entrypoints.openai.api_server --model m --skip-tokenizer-init" in text
    for flag in (
        *("--dtype float32", "--tensor-parallel-size 2", "--max-model-len 16384", "--seed 0"),
        *("--enforce-eager", "--no-enable-chunked-prefill", "--logprobs-mode raw_logprobs"),
        *("--generation-config vllm", '--weight-transfer-config {"backend": "megatron_oreal"}'),
        *("--host 127.0.0.1", "--port 8123"),
    ):
        assert flag in text


def test_importance_weights_ask_for_the_distribution_that_is_sampled_from():
    settings = ["model.path=m", "sampling.top_p=1", "oreal.importance.level=token"]
    command = server_command(load_config([], settings, optional=("data.path",)), "127.0.0.1", 1)
    assert "--logprobs-mode processed_logprobs" in " ".join(command)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r"rollout.server_hosts=\[\]: name servers, http://host:port"),
        (["rollout.server_hosts=[host:8000]"], "name each server once, http://host:port"),
        (["rollout.server_hosts=[http://a:1,http://a:1]"], "name each server once"),
        (
            ["rollout.server_hosts=[http://a:1]", "rollout.backend=vllm"],
            "set rollout.backend=vllm_server",
        ),
        (
            [
                *("rollout.server_hosts=[http://a:1]", "rollout.server_transfer=nccl"),
                "rollout.quantization=fp8",
            ],
            "rollout.server_transfer=nccl: its servers compare live weights",
        ),
    ],
)
def test_hosts_that_cannot_be_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        load_config([], [*SERVED, *settings])


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match=r"http://127.0.0.1:1 is not ready after 0 s") as caught:
        Server("http://127.0.0.1:1/").wait(0)
    assert "\n" not in str(caught.value)


def test_tensors_go_in_runs_of_bounded_size_and_a_larger_one_alone():
    """Sizes in bytes: 4, 8, 20, 4, with 12 allowed."""
    tensors = {name: torch.zeros(size) for name, size in zip("abcd", (1, 2, 5, 1), strict=True)}
    runs = [list(run) for run in chunks(iter(tensors.items()), 12)]
    assert runs == [["a", "b"], ["c"], ["d"]]
    assert list(chunks(iter(()), 12)) == []
