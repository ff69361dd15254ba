"""CUDA requests served by the CPU: inside the context only, and all is put back on leaving."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from megatron_oreal.parallel.cuda_on_cpu import compute_device, cuda_on_cpu, has_gpu

without_gpu = pytest.mark.skipif(has_gpu(), reason="beside a GPU the context does nothing")


def what_torch_is() -> tuple[dict[str, object], dict[str, object], int]:
    """Every attribute of the modules that are touched, and how many function modes are active."""
    modes = len(_get_current_function_mode_stack())
    return dict(vars(torch.cuda)), dict(vars(torch.cuda.random)), modes


@without_gpu
def test_everything_is_put_back_on_leaving() -> None:
    before = what_torch_is()
    with cuda_on_cpu():
        assert what_torch_is() != before
        torch.cuda.synchronize()
    assert what_torch_is() == before


def test_everything_is_put_back_after_an_exception() -> None:
    before = what_torch_is()
    with pytest.raises(ZeroDivisionError), cuda_on_cpu():
        raise ZeroDivisionError
    assert what_torch_is() == before


@without_gpu
def test_outside_of_it_cuda_fails_as_ever() -> None:
    with cuda_on_cpu():
        assert torch.ones(1, device="cuda").device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):
        torch.ones(1, device="cuda")
    assert torch.ones(1).type() == "torch.FloatTensor"


@without_gpu
def test_it_nests_and_the_inner_end_leaves_the_outer_working() -> None:
    before = what_torch_is()
    with cuda_on_cpu():
        with pytest.raises(ZeroDivisionError), cuda_on_cpu():
            raise ZeroDivisionError
        with cuda_on_cpu():
            pass
        assert torch.ones(1, device="cuda").device.type == "cpu"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert what_torch_is() == before


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), 0, None, "cpu"])
def test_every_way_to_name_a_device_means_the_cpu(device: torch.device | str | int | None) -> None:
    with cuda_on_cpu():
        assert torch.arange(3, device=device).device.type == "cpu"
        tensor = torch.ones(2)
        assert tensor.to(device=device).device.type == "cpu"
        if device is not None:
            assert tensor.to(device).device.type == "cpu"


@without_gpu
def test_a_move_to_the_gpu_leaves_the_tensor_where_and_what_it_is() -> None:
    tensor = torch.ones(2)
    with cuda_on_cpu():
        assert tensor.cuda() is tensor
        assert tensor.to("cuda") is tensor
        assert tensor.to("cuda", torch.bfloat16).dtype == torch.bfloat16
        assert tensor.to(torch.bfloat16).dtype == torch.bfloat16
        assert not torch.empty(1, pin_memory=True).is_pinned()
        assert tensor.type() == "torch.cuda.FloatTensor"
        assert tensor.type(torch.float64).dtype == torch.float64
    assert compute_device() == torch.device("cpu")


@without_gpu
def test_streams_and_events_are_program_order() -> None:
    with cuda_on_cpu():
        stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream), stream:
            event.record(stream)
            stream.wait_event(event)
            torch.cuda.current_stream().wait_stream(stream)
        event.synchronize()
        assert event.query()
        assert stream.record_event().query()
        assert event.elapsed_time(torch.cuda.Event()) == 0.0
        assert not torch.cuda.is_current_stream_capturing()


@without_gpu
def test_the_random_state_is_the_cpus() -> None:
    with cuda_on_cpu():
        state = torch.cuda.get_rng_state()
        first = torch.rand(4, device="cuda")
        torch.cuda.set_rng_state(state)
        again = torch.rand(4)
        assert torch.cuda.default_generators[0] is torch.default_generator
    assert torch.equal(first, again)


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="needs a CUDA device")
def test_beside_a_gpu_it_does_nothing() -> None:
    before = what_torch_is()
    with cuda_on_cpu():
        assert what_torch_is() == before
        assert torch.ones(1, device="cuda").is_cuda
