from __future__ import annotations

import torch

from megatron_oreal.weights.geometry import Box, Region
from megatron_oreal.weights.transport import lasting_view

REGION = Region("w", Box((2, 0), (4, 3)), "local", Box((1, 0), (3, 3)))


def test_a_view_is_of_the_tensor_and_made_once():
    tensors = {"local": torch.arange(12.0).view(4, 3)}
    view = lasting_view(tensors)
    view(REGION).fill_(-1)
    assert tensors["local"].tolist() == [[0, 1, 2], [-1, -1, -1], [-1, -1, -1], [9, 10, 11]]
    assert view(REGION) is view(REGION)


def test_a_tensor_that_has_moved_is_found_where_it_is():
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    view = lasting_view({"local": parameter})
    assert view(REGION).sum() == 0
    parameter.data = torch.ones(4, 3)
    assert view(REGION).sum() == 6
    assert not view(REGION).requires_grad
