"""The planner against parameter counts that are known, layouts built elsewhere, and hand sums."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_oreal.cli import main
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config, ParallelConfig
from megatron_oreal.models.qwen2 import QWEN2
from megatron_oreal.models.registry import read_model
from megatron_oreal.planner.activations import LayerActivations
from megatron_oreal.planner.duration import (
    assumptions_for,
    decode_seconds,
    plan_duration,
    response_lengths,
)
from megatron_oreal.planner.hardware import GIB, GPUS, Cluster
from megatron_oreal.planner.memory import kv_bytes, plan_memory, plan_stage
from megatron_oreal.planner.plan import plan_run, ranked_runs
from megatron_oreal.planner.search import layout_of, nearest_that_fit
from megatron_oreal.planner.sizes import engine_parameters, parameters, stage_parameters
from megatron_oreal.weights.cluster import MegatronLayout, plan_of_run
from megatron_oreal.weights.vllm_layout import vllm_regions
from tests.unit.weights.toy import DIMS, TIED

ROOT = Path(__file__).parents[3]
A100, H100 = Cluster(GPUS["a100-80"], 32), Cluster(GPUS["h100-80"], 128)
_, QWEN_7B = read_model(ROOT / "configs/models/qwen2.5-7b")
_, QWEN_32B = read_model(ROOT / "configs/models/qwen2.5-32b")
CLUSTERS = {"oreal_7b": A100, "oreal_dsr1_7b": A100, "oreal_32b": H100}


def recipe(name: str, *overrides: str) -> Config:
    return load_config([ROOT / "configs" / f"{name}.yaml"], ["data.path=d", *overrides])


def test_parameters_are_the_published_counts() -> None:
    assert parameters(QWEN_7B) == 7_615_616_512
    assert parameters(QWEN_32B) == 32_763_876_352


@pytest.mark.parametrize("dims", [replace(DIMS, layers=4), replace(TIED, layers=4)])
@pytest.mark.parametrize(
    ("tensor", "pipeline", "last"),
    [(1, 1, None), (2, 1, None), (4, 2, None), (1, 4, None), (2, 2, 1)],
)
def test_a_rank_holds_what_its_layout_says(
    dims, tensor: int, pipeline: int, last: int | None
) -> None:
    cut = ParallelConfig(tensor=tensor, pipeline=pipeline, last_stage_layers=last)
    layout = MegatronLayout(QWEN2, dims, tensor * pipeline, cut)
    for stage in range(pipeline):
        held = sum(math.prod(shape) for shape in layout.shapes(stage).values())
        assert stage_parameters(dims, cut, stage, "vocab") == held


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_an_engine_holds_what_its_layout_says(tensor: int) -> None:
    """Two key-value heads: four ranks hold each twice."""
    dims = replace(DIMS, layers=4, vocab=64)
    held = sum(region.box.size for region in vllm_regions(QWEN2, dims, 0, tensor))
    assert engine_parameters(dims, tensor) == held


def test_memory_of_the_7b_recipe_by_hand() -> None:
    """TP 4, DP 8; a rank has 1,904,021,376 parameters of the policy, 136,245,760 of its head."""
    memory = plan_memory(recipe("oreal_7b"), QWEN_7B, A100)
    parts = memory.phases["policy"]
    policy = (7_615_616_512 - 57 * 3584) // 4 + 57 * 3584  # norms lie on every rank
    token_rm = policy - 152_064 * 3584 // 4 + 3584
    assert parts["weights"] == 2 * (2 * policy + token_rm)
    assert parts["gradients"] == 4 * (policy + token_rm)
    assert parts["optimizer"] == math.ceil(12 * policy / 8) + math.ceil(12 * token_rm / 8)
    # A token and layer keep (4 h + 3 (q + kv)) / 4 + 4 d elements of two bytes: MLPs are computed
    # again. The last norm keeps 2 h / 4.
    kept = (4 * 3584 + 3 * (3584 + 512)) // 4 + 4 * 128
    assert parts["activations"] == 16_384 * 2 * (28 * kept + 2 * 3584 // 4)
    # Hidden states twice and their gradient, the logits of a chunk, the output's gradient in fp32.
    output = 152_064 // 4
    chunk = (448 << 20) // (2 * output)
    assert chunk == 6178
    assert parts["head"] == 16_384 * 3 * 2 * 3584 + chunk * 2 * output + 4 * output * 3584
    other = recipe("oreal_7b", "engine.head_logits_fp32=true", "engine.head_grad_fp32=false")
    head = plan_memory(other, QWEN_7B, A100).phases["policy"]["head"]
    assert head == 16_384 * 3 * 2 * 3584 + chunk // 3 * 6 * output + 2 * output * 3584
    # The layer at work computes 5 f / 4 again and has gradients of 2 (f + h) / 4, two whole hidden
    # states, and the gradient of its largest matrix, 2 f h / 4.
    at_work = 16_384 * 2 * (7 * 18_944 // 4 + 2 * 3584 // 4 + 2 * 3584) + 2 * 18_944 * 3584 // 4 * 2
    assert parts["layer at work"] == at_work - parts["head"]
    assert memory.phases["sync"]["staging"] == 2 << 28
    # While models train the engine sleeps; the most is held while it is awake.
    assert "KV cache" not in parts
    assert memory.peak_phase == "generate"
    resident = sum(parts[part] for part in ("weights", "gradients", "optimizer", "reserve"))
    assert memory.peak == pytest.approx(resident + 0.4 * A100.gpu.memory)
    assert kv_bytes(recipe("oreal_7b"), QWEN_7B) == 2 * 28 * 2 * 128 * 2


def test_activations_of_other_layouts_by_hand() -> None:
    """Elements of two bytes that a token of the recipe above keeps in a layer, by tensor ranks."""
    plain, cut = 4 * 128, (4 * 3584 + 3 * (3584 + 512) + 5 * 18_944) // 4
    tokens = 16_384 * 2
    layer, norm = tokens * (plain + cut), tokens * 2 * 3584 // 4

    def activations(*overrides: str) -> int:
        config = recipe("oreal_7b", "engine.recompute=none", *overrides)
        return plan_stage(config, QWEN_7B, A100, 0).phases["policy"]["activations"]

    assert activations() == 28 * layer + norm
    assert activations("engine.recompute=full") == 28 * tokens * 3584 // 4 + norm
    assert activations("parallel.context=2") == (28 * layer + norm) // 2
    # The first of two stages of 14 layers has two micro-batches in flight; interleaved by two, five
    # of seven layers each.
    assert activations("parallel.pipeline=2") == 28 * layer
    interleaved = ("parallel.pipeline=2", "parallel.virtual_pipeline=2")
    assert activations(*interleaved) == 14 * 5 * layer // 2


def test_layers_of_torch_modules_keep_more() -> None:
    """Norms three hidden states, not two; attention a further q, its output in parts; masks."""
    config = recipe("oreal_7b", "engine.recompute=none")
    other = Cluster(A100.gpu, A100.ranks, "torch")
    layers = [LayerActivations(config, QWEN_7B, c.modules) for c in (A100, other)]
    assert layers[1].whole - layers[0].whole == 16_384 * 2 * (2 * 3584 + 3584) // 4
    shared = recipe("oreal_7b", "engine.recompute=none", "parallel.context=2")
    masks = 4 * 5 / 16 * 16_384 * 16_384
    fewer = (3 * 3584 + 4 * 512 - 4 * 3584 - 3 * 512) // 4  # keys and values of both ranks
    found = LayerActivations(shared, QWEN_7B, "torch").whole
    assert found == layers[1].whole // 2 + 16_384 * fewer + masks


@pytest.mark.parametrize(("name", "ranks"), [("oreal_7b", 32), ("oreal_32b", 128)])
def test_staging_covers_what_the_weight_plan_needs(name: str, ranks: int) -> None:
    config = recipe(name, f"model.path={ROOT}/configs/models/qwen2.5-{name.removeprefix('oreal_')}")
    plan = plan_of_run(config, ranks=ranks, ranks_per_node=8, whole_tensors=False, rollout_ranks=0)
    assert 0 < plan.summary().peak_staging <= 2 * config.rollout.sync_round_mib << 20


def test_context_parallel_ranks_share_the_optimizer() -> None:
    plain, shared = (
        plan_memory(recipe("oreal_7b", f"parallel.context={cp}"), QWEN_7B, A100) for cp in (1, 2)
    )
    assert plain.phases["policy"]["optimizer"] == shared.phases["policy"]["optimizer"]


def test_a_run_without_a_token_reward_model_holds_one_model_less() -> None:
    whole = plan_memory(recipe("oreal_7b"), QWEN_7B, A100)
    without = plan_memory(recipe("oreal_7b_no_token_rm"), QWEN_7B, A100)
    assert "token_rm" not in without.phases
    assert without.peak < whole.peak - 10 * GIB


def test_what_is_offloaded_is_there_in_its_phase_alone() -> None:
    switches = ("optimizer", "gradients", "reference", "token_rm")
    keys = [f"offload.{switch}=true" for switch in switches]
    plain = plan_memory(recipe("oreal_7b"), QWEN_7B, A100).phases
    away = plan_memory(recipe("oreal_7b", *keys), QWEN_7B, A100).phases
    policy = (7_615_616_512 - 57 * 3584) // 4 + 57 * 3584
    token_rm = policy - 152_064 * 3584 // 4 + 3584
    # The policy's weights alone stay: they leave for the engines.
    for phase in ("generate", "sync"):
        assert (away[phase]["weights"], away[phase]["gradients"]) == (2 * policy, 0)
        assert sum(away[phase].values()) < sum(plain[phase].values()) - 25 * GIB
    assert away["reference"]["weights"] == 2 * 2 * policy
    assert away["reference"]["gradients"] == 0
    assert away["token_rm"]["weights"] == 2 * (policy + token_rm)
    assert away["token_rm"]["gradients"] == 4 * token_rm
    assert away["policy"]["weights"] == 2 * policy
    assert away["policy"]["gradients"] == 4 * policy
    assert {parts["optimizer"] for parts in away.values()} == {0}
    # A step's optimizer, 1.5 bytes a parameter of eight shares, is less than what it comes after.
    assert "optimizer at its step" not in away["policy"]
    few = plan_memory(
        recipe("oreal_7b", *keys, "engine.tokens_per_micro_batch=16384"),
        QWEN_7B,
        Cluster(A100.gpu, 4),
    ).phases["policy"]
    gone = sum(few[part] for part in ("activations", "head", "layer at work"))
    assert few["optimizer at its step"] == 12 * policy - gone


def test_fp8_keeps_rounded_copies_and_is_faster() -> None:
    plain = recipe("oreal_32b")
    fp8 = recipe("oreal_32b", "fp8.policy.recipe=delayed", "fp8.reference.recipe=tensorwise")
    matrices = (2 * 5120 + 2 * 1024 + 3 * 27_648) * 5120 // 8  # of a layer, on one of eight ranks
    copies = plan_memory(fp8, QWEN_32B, H100).phases["generate"]["FP8 copies"]
    assert copies == 16 * matrices * (2 + 1)  # the reference needs none that is turned
    assert "FP8 copies" not in plan_memory(plain, QWEN_32B, H100).phases["policy"]
    seconds, faster = (plan_run(config, QWEN_32B, H100).duration.phases for config in (plain, fp8))
    assert faster["policy"] < 0.8 * seconds["policy"]
    assert faster["reference"] < 0.8 * seconds["reference"]
    assert faster["token_rm"] == seconds["token_rm"]


def test_a_cluster_that_cannot_compute_it_is_refused() -> None:
    config = recipe("oreal_7b", "fp8.policy.recipe=delayed")
    with pytest.raises(
        UserError, match=r"^fp8\.policy\.recipe=delayed: .* a100-80 has 8\.0; set none"
    ):
        plan_run(config, QWEN_7B, A100)


@pytest.mark.parametrize("name", CLUSTERS)
@pytest.mark.parametrize("end", ["", "_no_token_rm"])
def test_every_recipe_fits_its_cluster(name: str, end: str) -> None:
    config, cluster = recipe(name + end), CLUSTERS[name]
    _, dims = read_model(ROOT / config.model.path)
    plan = plan_run(config, dims, cluster)
    assert plan.memory.peak <= cluster.gpu.memory
    assert plan.duration.slots * 1000 < plan.memory.kv_tokens
    peak, seconds = plan.memory.peak / GIB, plan.duration.iteration
    planned = f"# Planned:      {peak:.1f} GiB of a GPU at most, {seconds:.0f} s an iteration, "
    assert planned in (ROOT / "configs" / f"{name + end}.yaml").read_text()


def test_the_published_run_within_a_factor_of_two() -> None:
    """OREAL-7B: 90 iterations on 32 A100 in nine hours (arXiv:2502.06781)."""
    hours = plan_run(recipe("oreal_7b"), QWEN_7B, A100).duration.run / 3600
    assert 4.5 <= hours <= 18


def test_the_published_run_by_the_arithmetic_of_the_docs() -> None:
    """docs/planner.md, "Against the published run", line by line."""
    plan = plan_run(recipe("oreal_7b"), QWEN_7B, A100)
    phases = plan.duration.phases
    # Generating: 64 responses an engine of two GPUs, all at once.
    lengths = response_lengths(64, plan.config, plan.given)
    assert plan.duration.slots > 64
    read = (7_615_616_512 - 2 * 152_064 * 3584) + 152_064 * 3584  # all but the embedding
    a_step = read / 2 * 2 / (2039e9 * 0.45) + 56 * 15e-6
    a_token = 28_672 / (2039e9 * 0.45)  # 2 k v, 28 layers, 2 heads of 128, 2 bytes, of the cache
    steps, tokens = max(lengths), sum(lengths)
    cached = sum(300 * n + n * n / 2 for n in lengths)
    by_hand = steps * a_step + tokens * 20e-6 + cached * a_token
    assert phases["generate"] == pytest.approx(by_hand, rel=0.01)
    # Training: 64 x 1.6 trajectories, 300 tokens of question each, over eight ranks.
    mean = 300 + tokens / 64
    reach = sum((300 + n) ** 2 for n in lengths) / (64 * mean)
    assert math.ceil(102.4 * mean / 14_745.6 / 8) == 5
    operations = 2 * read + 2 * 3584 * reach * 28
    summed = 4 * 3584 * 3 / 4 * 2 * 28 / (300e9 * 0.7)
    one_pass = 5 * 14_745.6 * (operations / 4 / (312e12 * 0.4) + summed)
    assert phases["reference"] == pytest.approx(one_pass)
    assert phases["policy"] == pytest.approx(4 * one_pass, rel=0.1)
    others = 300 + 9 * 2 * 12 * 7_615_616_512 / 2e9
    run = 80 * plan.duration.iteration + 10 * sum(plan.duration.frozen.values()) + others
    assert plan.duration.run == pytest.approx(run)


def test_a_layout_that_does_not_fit_is_refused_with_three_that_do() -> None:
    config = recipe("oreal_32b", "parallel.pipeline=1", "rollout.tensor_parallel=4")
    with pytest.raises(UserError) as caught:
        plan_run(config, QWEN_32B, H100)
    text = str(caught.value)
    assert "\n" not in text
    assert "does not fit 128 x h100-80: phase generate needs" in text
    assert text.count(" | ") == 2
    near = nearest_that_fit(config, QWEN_32B, H100)
    assert len(near) == 3
    for other in near:
        assert plan_run(other, QWEN_32B, H100).memory.fits


def test_a_cache_too_small_for_one_response_is_refused() -> None:
    config = recipe("oreal_7b", "rollout.gpu_memory_utilization=0.13")
    with pytest.raises(UserError, match=r"the cache holds \d+ tokens, one response may have 16384"):
        plan_run(config, QWEN_7B, A100)


def test_where_nothing_fits_the_refusal_says_so() -> None:
    small = Cluster(GPUS["a100-40"], 8)
    with pytest.raises(UserError, match="no layout fits: take more or larger GPUs"):
        plan_run(recipe("oreal_7b"), QWEN_7B, small)


def test_the_search_ranks_what_fits() -> None:
    config = recipe("oreal_7b")
    plans = ranked_runs(config, QWEN_7B, A100, assumptions_for(config))
    assert all(plan.memory.fits for plan in plans)
    hours = [plan.duration.run for plan in plans]
    assert hours == sorted(hours)
    assert hours[0] <= plan_run(config, QWEN_7B, A100).duration.run
    layouts = {tuple(layout_of(plan.config).values())[:-1] for plan in plans}
    assert len(layouts) == len(plans) > 100


class Constant:
    """A step of one second, whatever it does."""

    prompt = 0

    def seconds(self, sequences: int, kv_tokens: float) -> float:
        del sequences, kv_tokens
        return 1.0


def test_an_engine_takes_as_long_as_its_longest_response_or_its_queue() -> None:
    assert decode_seconds([3, 10, 4], 3, Constant()) == 10  # pyright: ignore[reportArgumentType]
    assert decode_seconds([5, 5, 5, 5], 1, Constant()) == 20  # pyright: ignore[reportArgumentType]
    assert decode_seconds([5, 5, 5, 5], 2, Constant()) == 10  # pyright: ignore[reportArgumentType]


def test_lengths_are_quantiles_cut_at_the_limit() -> None:
    config = recipe("oreal_7b")
    lengths = response_lengths(1000, config, assumptions_for(config))
    assert max(lengths) == 14_000
    assert 0.9 * 14_000 / 3 < sum(lengths) / 1000 < 14_000 / 3


def test_a_frozen_iteration_trains_only_the_token_reward_model() -> None:
    config = recipe("oreal_7b")
    kv = plan_memory(config, QWEN_7B, A100).kv_tokens
    duration = plan_duration(config, QWEN_7B, A100, kv, assumptions_for(config))
    assert duration.frozen["token_rm"] == duration.phases["token_rm"]
    assert duration.frozen["policy"] == duration.phases["reference"]
    assert duration.frozen["sync"] == duration.phases["sync"] > 0


def arguments(*more: str) -> list[str]:
    model = f"model.path={ROOT}/configs/models/qwen2.5-7b"
    return ["plan", "--config", f"{ROOT}/configs/oreal_7b.yaml", "--ranks", "32", *more, model]


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("--gpu", "a100-80")) == 0
    out = capsys.readouterr().out
    assert "32 x a100-80" in out
    assert "taken for granted (docs/planner.md)" in out
    assert "fits: the peak, " in out
    assert "tokens/s while it generates" in out
    assert main(arguments("--json", "--mean-response-tokens", "2000")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["assumptions"]["mean_response_tokens"] == 2000
    assert found["bytes"]["peak"] == sum(found["bytes"]["phases"]["generate"].values())
    assert found["tokens_per_s"]["generate"] > found["tokens_per_s"]["iteration"]


def test_the_command_refuses_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments("parallel.tensor=1", "engine.recompute=none")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nearest that fit: parallel.tensor=" in line


def test_engines_in_servers_are_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    served = arguments("rollout.backend=vllm_server", "rollout.server_hosts=[http://a:1]")
    assert main(served) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "rollout.backend=vllm_server: plans are of engines inside the training ranks" in line


def test_planning_imports_no_torch() -> None:
    program = f"""
import sys
from megatron_oreal.cli import main
assert main({arguments()}) == 0
sys.exit(bool({{"torch", "transformers", "vllm"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False)
    assert done.returncode == 0
