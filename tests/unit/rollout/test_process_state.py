from __future__ import annotations

import os
import random
import warnings

import numpy as np
import pytest
import torch

from megatron_oreal.rollout.process_state import process_state_kept, random_state_kept


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def reseed() -> tuple[float, float, float]:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return draw()


def test_environment_threads_randomness_and_warnings_stand_as_before(monkeypatch):
    monkeypatch.setenv("OREAL_KEPT", "before")
    monkeypatch.setenv("OREAL_REMOVED", "before")
    set_num_threads, n_threads, filters = (
        torch.set_num_threads,
        torch.get_num_threads(),
        warnings.filters[:],
    )
    expected = reseed()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    with process_state_kept({"OREAL_KEPT": "inside", "OREAL_NEW": "inside"}):
        assert os.environ["OREAL_KEPT"] == os.environ["OREAL_NEW"] == "inside"
        del os.environ["OREAL_REMOVED"]
        os.environ["OREAL_OTHER"] = "left behind"
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        torch.set_num_threads(n_threads + 1)
        torch.set_num_threads = print
        warnings.simplefilter("ignore")
    assert os.environ["OREAL_KEPT"] == os.environ["OREAL_REMOVED"] == "before"
    assert not {"OREAL_NEW", "OREAL_OTHER"} & os.environ.keys()
    assert torch.set_num_threads is set_num_threads
    assert torch.get_num_threads() == n_threads
    assert warnings.filters == filters
    assert draw() == expected


def test_torchs_switches_stand_as_before():
    def switches() -> list[object]:
        backends = torch.backends.cuda
        return [
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            backends.cudnn_sdp_enabled(),
            backends.flash_sdp_enabled(),
            backends.mem_efficient_sdp_enabled(),
            backends.math_sdp_enabled(),
        ]

    before = switches()
    with process_state_kept({}):
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        torch.backends.cuda.enable_cudnn_sdp(not before[2])
        torch.backends.cuda.enable_flash_sdp(not before[3])
        torch.backends.cuda.enable_mem_efficient_sdp(not before[4])
        torch.backends.cuda.enable_math_sdp(not before[5])
        assert all(now != then for now, then in zip(switches(), before, strict=True))
    assert switches() == before


def test_an_error_inside_is_passed_on_and_undone(monkeypatch):
    monkeypatch.delenv("OREAL_NEW", raising=False)
    with pytest.raises(KeyError), process_state_kept({"OREAL_NEW": "inside"}):
        raise KeyError
    assert "OREAL_NEW" not in os.environ


def test_torch_draws_on_as_if_nothing_had_been_drawn():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with random_state_kept():
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected)
