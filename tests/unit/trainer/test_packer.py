from __future__ import annotations

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.trainer.packer import Packer
from tests.unit.trajectories import trajectory


def test_the_budget_counts_prompt_and_response():
    long, short = trajectory(*range(6), prompt=4), trajectory(*range(4), prompt=1)
    batch = Packer(data_ranks=1, tokens_per_micro_batch=10).pack([long, short])
    assert batch.trajectories == (long, short)
    assert batch.micro_batches == (((0, 1),),)
    assert Packer(1, 9).pack([long, short]).micro_batches == (((0,), (1,)),)


def test_ranks_without_a_trajectory_get_an_empty_micro_batch():
    batch = Packer(data_ranks=3, tokens_per_micro_batch=8).pack([trajectory(1, 2, prompt=1)])
    assert batch.micro_batches == (((0,),), ((),), ((),))
    assert batch.fields == {}


def test_what_no_micro_batch_holds_names_the_key():
    with pytest.raises(UserError, match=r"engine\.tokens_per_micro_batch=4 .* 5 tokens"):
        Packer(1, 4).pack([trajectory(*range(5), prompt=1)])
