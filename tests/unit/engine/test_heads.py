from __future__ import annotations

import torch

from megatron_oreal.engine.heads import mean_by_sequence


def test_each_sequence_has_its_own_mean():
    values = torch.tensor([1.0, 10.0, 3.0, 5.0])
    means = mean_by_sequence(values, torch.tensor([0, 1, 0, 0]), torch.tensor([3, 1]))
    assert means.tolist() == [3.0, 10.0]


def test_each_token_gets_its_share_of_the_slope():
    values = torch.tensor([1.0, 3.0, 10.0], requires_grad=True)
    means = mean_by_sequence(values, torch.tensor([0, 0, 1]), torch.tensor([2, 1]))
    (means * torch.tensor([4.0, 7.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2.0, 2.0, 7.0]


def test_no_sequences_have_no_means():
    none = torch.empty(0)
    assert mean_by_sequence(none, none.long(), none.long()).shape == (0,)
