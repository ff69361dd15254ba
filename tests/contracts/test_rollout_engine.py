"""The contract of `RolloutEngine`, kept by real vLLM on two ranks; `rollout_program.py` runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

ALL = ["untied", "tied", "tied_tp2", "server"]
IN_PROCESS = ["untied", "tied", "tied_tp2"]
FAMILIES = ["qwen3", "llama"]  # a Qwen2 is behind all others
FLIPPED = "model.layers.1.mlp.down_proj.weight"
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("rollout")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.contracts.rollout_program", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "vllm" not in done.stdout.lower() + done.stderr.lower(), "vLLM logs unasked"
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("case", [*ALL, *FAMILIES])
@pytest.mark.parametrize("weights", ["old", "new"])
def test_greedy_equals_transformers_token_for_token_before_and_after_a_push(found, case, weights):
    assert found[case][f"greedy_{weights}"] == found[case][f"expected_{weights}"]


@pytest.mark.parametrize("case", [*ALL, *FAMILIES])
def test_old_and_new_weights_do_not_answer_alike(found, case):
    assert found[case]["expected_old"] != found[case]["expected_new"]


@pytest.mark.parametrize("case", [*IN_PROCESS, *FAMILIES, "bf16"])
def test_after_a_push_every_tensor_is_live_and_none_of_the_old_ones(found, case):
    differing, total = found[case]["differs_from_old"]
    assert differing == total > 20
    assert found[case]["differs_from_new"] == [0, total]


@pytest.mark.parametrize("case", [*IN_PROCESS, *FAMILIES, "bf16"])
def test_all_weights_read_back_are_those_handed_over(found, case):
    assert found[case]["read_back"] == [[], ["model.layers.0.mlp.down_proj.weight"]]


@pytest.mark.parametrize("case", ["tied", "tied_tp2", *FAMILIES])
def test_weights_lie_where_the_layout_of_an_engine_says(found, case):
    assert found[case]["misplaced"] == [[], []]


def test_a_live_model_is_plain_unless_vllm_packs_it(found):
    """Packed linears leave an empty `weight` behind: nothing is written in place there."""
    assert found["tied_tp2"]["not_plain"] == ["", ""]
    assert all("has shape (0,)" in why for why in found["tied"]["not_plain"])


@pytest.mark.parametrize(("case", "rank"), [("tied_tp2", 1), ("server", 0)])
def test_a_byte_flipped_on_its_way_is_caught_and_named(found, case, rank):
    kind, text = found[case]["flipped"]
    assert kind == "RuntimeError"
    assert text == f"weight sync: {FLIPPED} arrived changed on ranks [{rank}]"


def test_a_server_finds_what_changed_on_the_way_to_it(found):
    assert found["server"]["flipped_beyond"] == [FLIPPED]


@pytest.mark.parametrize("case", ALL)
def test_sampled_logprobs_are_those_of_the_model_itself_though_top_p_is_below_one(found, case):
    assert found[case]["logprob_difference"]["mean"] < 2e-5
    assert found[case]["logprob_difference"]["max"] < 1e-3


def test_bf16_logprobs_are_near_those_of_fp32(found):
    assert found["bf16"]["logprob_difference"]["mean"] < 0.2


@pytest.mark.parametrize("case", ALL)
def test_a_seed_draws_the_same_tokens_in_any_order_on_any_engine_and_alone(found, case):
    tokens = [rollout["tokens"] for rollout in found[case]["rollouts"]]
    assert found[case]["shuffled"] == tokens
    assert found[case]["alone"] == tokens[:8]


@pytest.mark.parametrize("case", ["tied", "tied_tp2"])
def test_what_a_bank_holds_is_not_sampled_again_and_the_rest_as_ever(found, case):
    """Nothing is banked at first; then one rank's half is lost; then nothing is missing."""
    rollouts = found[case]["rollouts"]
    banked = [entries for entries, _, _ in found[case]["banked"]]
    assert banked == [0, len(rollouts) // 2, len(rollouts)]
    # vLLM's own packed layers multiply alike in any batch; torch's, which stand in for them at
    # tp2, do not to the last bit.
    exactly = 0.0 if case == "tied" else 2.5e-5
    for _, named, got in found[case]["banked"]:
        assert not named
        for mine, theirs in zip(got, rollouts, strict=True):
            assert mine | {"logprobs": None} == theirs | {"logprobs": None}
            assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=exactly, rel=0)


def test_fp8_engines_take_whole_tensors_and_round_them_each_time(found):
    """A row that is 1.2 times as large is beyond rounding."""
    case = found["fp8"]
    assert all("weight_scale is no parameter of the layout" in why for why in case["not_plain"])
    assert 1e-4 < case["logprob_difference"]["mean"] < 1
    changed = ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight"]
    assert case["read_back"] == [[], changed]
    kind, text = case["missing"]
    assert (kind, "missing ['model.layers.1.mlp.down_proj.weight']" in text) == ("ValueError", True)


@pytest.mark.parametrize("case", ["tied", "tied_tp2", "fp8"])
def test_an_engine_that_slept_samples_what_a_fresh_one_does(found, case):
    again = [rollout["tokens"] for rollout in found[case]["rest"]["rollouts"]]
    assert again == [rollout["tokens"] for rollout in found[case]["rollouts"]]


@pytest.mark.parametrize("case", ["tied", "tied_tp2"])
def test_steps_out_of_order_are_refused_and_name_the_state(found, case):
    """The steps twice each: none of them is refused where it is done already."""
    first, asleep, awake, last = found[case]["rest"]["states"]
    assert not first
    assert not last
    needs, ask, wake_cache = asleep
    assert needs
    kind = "WrongOrderError"
    assert ask == [kind, "rollout engine: generate while asleep, not generating"]
    assert wake_cache == [kind, "rollout engine: wake_cache while asleep, not weights written"]
    needs, ask, wake_cache, sleep = awake
    assert needs
    assert ask == [kind, "rollout engine: generate while weights awake, not generating"]
    assert wake_cache[1] == "rollout engine: wake_cache while weights awake, not weights written"
    assert sleep == [kind, "rollout engine: sleep while weights awake, not generating"]


@pytest.mark.parametrize("case", FAMILIES)
def test_an_engine_started_without_weights_waits_for_them(found, case):
    """What it then samples is compared with transformers, like that of all others."""
    needs, kind, text = found[case]["unfilled"]
    assert needs
    assert (kind, text) == (
        "WrongOrderError",
        "rollout engine: generate while asleep, not generating",
    )


def test_a_server_rests_without_losing_anything(found):
    first, asleep, awake, last = found["server"]["rest"]["states"]
    accepted = ["", "accepted"]
    assert [first, last] == [False, False]
    assert asleep == [False, accepted, accepted]
    assert awake == [False, accepted, accepted, accepted]


@pytest.mark.parametrize("other", ["tied_tp2", "server"])
def test_two_ranks_of_one_engine_or_a_server_sample_what_one_rank_samples(found, other):
    one, two = (
        [rollout["tokens"] for rollout in found[case]["rollouts"]] for case in ("tied", other)
    )
    assert one == two


@pytest.mark.parametrize("case", ALL)
def test_samples_of_one_prompt_differ(found, case):
    tokens = [tuple(rollout["tokens"]) for rollout in found[case]["rollouts"]]
    assert all(len(set(tokens[i : i + 4])) == 4 for i in range(0, 20, 4))


def test_only_the_stop_token_stops_a_response_and_it_stands_at_its_end(found):
    stop, end_of_config = 1, 2
    rollouts = [rollout for case in ALL for rollout in found[case]["rollouts"]]
    assert {rollout["stopped"] for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        tokens = rollout["tokens"]
        assert rollout["stopped"] == (tokens[-1] == stop)
        assert stop not in tokens[:-1]
        assert rollout["stopped"] or len(tokens) == 24
        assert len(rollout["logprobs"]) == len(tokens)
        assert rollout["text"] == " ".join(map(str, tokens))
    assert any(end_of_config in rollout["tokens"][:-1] for rollout in rollouts)


def test_groups_hold_the_samples_of_each_prompt(found):
    groups = found["untied"]["groups"]
    assert [name for name, _ in groups] == ["0", "1", "2", "3", "4"]
    assert all(len(samples) == 4 for _, samples in groups)
    assert len({tuple(tokens) for _, samples in groups for tokens in samples}) > 15


def test_no_requests_are_no_rollouts(found):
    assert found["untied"]["nothing_asked"] == []


@pytest.mark.parametrize("moment", ["start", "generate", "close"])
def test_the_process_stands_as_before(found, moment):
    assert all(found["untied"]["state_kept"][moment]), found["untied"]["state_kept"][moment]


@pytest.mark.parametrize(
    ("case", "key", "expected"),
    [
        ("untied", "too_long", ["UserError", "sampling.max_total_tokens=200: a prompt of 200"]),
        ("untied", "missing", ["ValueError", "missing ['model.norm.weight']"]),
        ("server", "too_long", ["UserError", "sampling.max_total_tokens=200: a prompt of 200"]),
        ("server", "missing", ["ValueError", "missing ['model.norm.weight']"]),
        ("server", "nobody", ["UserError", "is not ready after 0 s"]),
        ("server", "other_dtype", ["UserError", "has dtype=float32, the run bfloat16"]),
        ("server", "other_model", ["UserError", "has model.num_key_value_heads=1, the run 2"]),
        ("tp3", "refusal", ["UserError", "rollout.tensor_parallel=3: set a divisor of the 2"]),
    ],
)
def test_refusals_name_what_is_wrong(found, case, key, expected):
    kind, text = found[case][key]
    assert kind == expected[0]
    assert expected[1] in text
    assert "\n" not in text
