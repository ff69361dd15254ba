"""The vocabulary head: same numbers however it is spread, no more memory than chunks need."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_oreal.engine.heads import LogprobHead
from megatron_oreal.engine.micro_batch import lay_out
from megatron_oreal.models.heads import Fields, HeadSettings, vocab_logprobs, vocab_shard
from megatron_oreal.parallel.cuda_on_cpu import cuda_on_cpu
from megatron_oreal.types import Trajectory
from tests.ranks import RankPools
from tests.toy_models import make_config, make_reference, open_models, pack, write_toy
from tools.bench.head import LiveBytes

pytestmark = pytest.mark.parallel

TOKENS, HIDDEN, VOCAB = 37, 16, 50


def objective(logprobs: torch.Tensor, fields: Fields) -> torch.Tensor:
    """Curved on purpose: its slope differs at every token."""
    return fields["factor"] * (logprobs.exp() + 0.1 * logprobs**2)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """All of them numbers that bf16 has."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16().float()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16().float()
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    return hidden, weight, targets, {"factor": torch.randn(TOKENS, generator=generator)}


def expected() -> tuple[torch.Tensor, ...]:
    hidden, weight, targets, fields = inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_softmax = (hidden @ weight.T).log_softmax(dim=1)
    logprobs = log_softmax[torch.arange(TOKENS), targets]
    entropy = -(log_softmax.exp() * log_softmax).sum(dim=1)
    loss = objective(logprobs, {"factor": fields["factor"].double()}).sum()
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return tuple(x.detach().float() for x in (loss, logprobs, entropy, hidden.grad, weight.grad))


def sharded(
    padded_rows: int,
    settings: HeadSettings,
    dtype: torch.dtype = torch.float32,
    into_main_grad: bool = False,
) -> tuple[torch.Tensor, ...]:
    hidden, weight, targets, fields = inputs()
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    world = dist.group.WORLD
    assert world is not None
    shard = vocab_shard(padded_rows, VOCAB, world)
    rows = torch.full(
        (padded_rows, HIDDEN), 1e4, dtype=dtype
    )  # what lies in padding must not matter
    rows[: shard.rows] = weight[shard.start : shard.start + shard.rows]
    hidden.requires_grad_()
    rows.requires_grad_()
    main_grad = torch.zeros(rows.shape) if into_main_grad else None
    rows.main_grad = main_grad  # pyright: ignore[reportAttributeAccessIssue]
    out = vocab_logprobs(
        hidden,
        rows,
        targets,
        shard,
        settings,
        objective=objective,
        fields=fields,
    )
    (out.loss * 2).backward()  # as a loss scale would
    assert hidden.grad is not None
    weight_grad = rows.grad if main_grad is None else main_grad
    assert weight_grad is not None
    assert rows.grad is not None, "Megatron's hook must find one"
    dist.all_reduce(hidden.grad)
    gathered = [torch.zeros_like(weight_grad) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, weight_grad)
    with torch.no_grad():
        again = vocab_logprobs(hidden, rows, targets, shard, settings)
    assert torch.equal(again.logprobs, out.logprobs)
    assert torch.equal(again.entropy, out.entropy)
    weight_grad = torch.cat(gathered)
    assert not weight_grad[VOCAB:].any()
    return (
        out.loss.detach(),
        out.logprobs,
        out.entropy,
        hidden.grad / 2,
        weight_grad[:VOCAB] / 2,
    )


@pytest.mark.parametrize("chunk_tokens", [5, 64])
@pytest.mark.parametrize(("world", "padded_rows"), [(1, 50), (1, 64), (2, 25), (2, 32), (4, 20)])
def test_any_spread_of_the_vocabulary_gives_the_plain_result(
    ranks: RankPools, world: int, padded_rows: int, chunk_tokens: int
) -> None:
    for result in ranks(world).run(sharded, padded_rows, HeadSettings(chunk_tokens)):
        for got, want in zip(result, expected(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fp32_weight_grad", [False, True])
@pytest.mark.parametrize("fp32_logits", [False, True])
def test_bf16_inputs_give_the_plain_result_within_their_rounding(
    ranks: RankPools, fp32_logits: bool, fp32_weight_grad: bool
) -> None:
    """Logits up to 16 in bf16 are off by 2^-5, as are probabilities, and gradients by them.

    The weight's gradient in fp32 goes where Megatron adds gradients up.
    """
    settings = HeadSettings(5, fp32_logits, fp32_weight_grad)
    scored = 1e-5 if fp32_logits else 2**-4
    for result in ranks(2).run(sharded, 32, settings, torch.bfloat16, fp32_weight_grad):
        *scores, hidden_grad, weight_grad = zip(result, expected(), strict=True)
        for got, want in scores[1:]:
            torch.testing.assert_close(got, want, rtol=scored, atol=scored)
        for got, want in (hidden_grad, weight_grad):
            assert (got.float() - want).norm() < (2**-7 if fp32_logits else 2**-5) * want.norm()


def no_tokens() -> tuple[float, bool]:
    hidden, weight, targets, _ = inputs()
    world = dist.group.WORLD
    assert world is not None
    hidden.requires_grad_()
    weight.requires_grad_()
    out = vocab_logprobs(
        hidden[:0],
        weight,
        targets[:0],
        vocab_shard(VOCAB, VOCAB, world),
        HeadSettings(8),
        objective=objective,
        fields={"factor": torch.empty(0)},
    )
    out.loss.backward()
    assert weight.grad is not None
    return float(out.loss.detach()), bool(weight.grad.any())


def test_a_micro_batch_without_response_tokens_has_a_live_graph_and_no_gradient(
    ranks: RankPools,
) -> None:
    assert ranks(1).run(no_tokens) == [(0.0, False)]


def peak_bytes(tokens: int, vocab: int, hidden_size: int, chunk_tokens: int) -> tuple[int, int]:
    """Returns peak live bytes inside the head, both passes, and what gradients need of it."""
    world = dist.group.WORLD
    assert world is not None
    rows = vocab // world.size()
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(rows, hidden_size, requires_grad=True)
    fields = {"factor": torch.ones(tokens)}
    targets = torch.randint(0, vocab, (tokens,))
    dist.broadcast(targets, src=0)
    with LiveBytes() as count:
        out = vocab_logprobs(
            hidden,
            weight,
            targets,
            vocab_shard(rows, vocab, world),
            HeadSettings(chunk_tokens),
            objective=objective,
            fields=fields,
        )
        out.loss.backward()
    return count.peak, 4 * (hidden.numel() + weight.numel())


@pytest.mark.parametrize("world", [1, 2])
def test_peak_memory_is_one_chunk_of_logits(ranks: RankPools, world: int) -> None:
    tokens, vocab, chunk_tokens = 2048, 16384, 256
    for peak, gradients in ranks(world).run(peak_bytes, tokens, vocab, 64, chunk_tokens):
        one_chunk = chunk_tokens * vocab // world * 4
        chunks = (peak - gradients) / one_chunk
        assert 1 < chunks <= 1.25, "the logits of a chunk are counted, and little else"


def engine_peak_bytes(folder: Path, chunk_tokens: int) -> tuple[int, int, int]:
    """Returns peak live bytes inside the engine's head, what gradients need, tokens scored here."""
    config = make_config(folder, head_chunk_tokens=chunk_tokens)
    source = open_models(config)
    stage = make_reference(source).model.stages[-1]
    generator = torch.Generator().manual_seed(2)
    trajectories = tuple(
        Trajectory(str(i), tuple(torch.randint(99, (517,), generator=generator).tolist()), 5, 1, 1)
        for i in range(4)
    )
    batch = pack(list(trajectories))
    laid = lay_out(batch, batch.micro_batches[0][0], source.topology.cut)
    held = len(laid.tokens) // (source.topology.tp_size if config.parallel.sequence_parallel else 1)
    hidden = torch.randn(held, 1, source.dims.hidden, requires_grad=True)
    settings = HeadSettings(chunk_tokens)
    head = LogprobHead(stage, source.topology, source.dims.vocab, settings, lambda x, _: x)
    with cuda_on_cpu(), LiveBytes() as count:
        head(hidden, laid).loss.backward()
    gathered = len(laid.tokens) * source.dims.hidden
    gradients = 4 * (4 * gathered + stage.output_weight().numel())
    return count.peak, gradients, len(laid.targets)


def test_the_bound_holds_where_vocabulary_and_sequences_are_shared(
    ranks: RankPools, tmp_path: Path
) -> None:
    vocab, chunk_tokens = 16384, 128
    folder = write_toy(tmp_path / "hf", "qwen2", vocab_size=vocab, num_hidden_layers=1)
    found = ranks(4).run(engine_peak_bytes, folder, chunk_tokens, tp=2, cp=2)
    for peak, gradients, tokens in found:
        assert tokens == pytest.approx(4 * 512 / 2, rel=0.05), "half of the response tokens"
        assert 1 < (peak - gradients) / (chunk_tokens * vocab / 2 * 4) <= 1.25
