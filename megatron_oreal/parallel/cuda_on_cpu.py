"""Lets Megatron-Core run on CPU tensors: inside the context the CPU serves its CUDA requests.

Megatron asks for `torch.cuda` devices, streams, events and random states while it builds and steps
models. On a machine without a GPU each of those requests has one honest CPU answer: the tensor
stays where it is, a stream is the program order, an event has happened. The context gives those
answers around Megatron calls only and puts everything back on leaving. Where there is a GPU it does
nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


@functools.cache
def has_gpu() -> bool:
    """Whether this process computes on a GPU; asked once, outside of any replacement."""
    return torch.cuda.is_available()


def compute_device() -> torch.device:
    """The device that models live on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else _CPU


class _Event:
    """Program order on a CPU: whatever was recorded has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _other: _Event) -> float:
        return 0.0


class _Stream:
    """The one stream a CPU has."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, *_: Any) -> None: ...

    def wait_event(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *_: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Generators:
    """Every device's generator is the CPU's."""

    def __getitem__(self, _index: int) -> torch.Generator:
        return torch.default_generator


def _nothing(*_: Any, **__: Any) -> None: ...


def _replacements() -> dict[str, Any]:
    return {
        "current_device": lambda: _CPU,
        "set_device": _nothing,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "_lazy_init": _nothing,
        "_lazy_call": lambda call, **_: call(),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "default_generators": _Generators(),
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda *_, **__: _Stream(),
        "stream": lambda _stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
    }


def _on_cpu(device: Any) -> Any:
    names_cuda = isinstance(device, str | torch.device) and str(device).startswith("cuda")
    return _CPU if names_cuda or isinstance(device, int) else device


class _ServeOnCpu(TorchFunctionMode):
    """Rewrites the device of every torch call from CUDA to the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "cuda":
            return args[0]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if name == "to" and len(args) > 1 and isinstance(args[1], int | str | torch.device):
            args = (args[0], _on_cpu(args[1]), *args[2:])
        if name == "type" and len(args) == 1 and not kwargs:
            # The distributed optimizer accepts parameters of the type torch.cuda.FloatTensor only.
            return func(*args).replace("torch.cuda.", "torch.").replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Serves CUDA requests from the CPU until the block ends; nests; does nothing beside a GPU."""
    if has_gpu():
        yield
        return
    places = [(torch.cuda, name, value) for name, value in _replacements().items()]
    places += [
        (torch.cuda.random, name, value)
        for name, value in _replacements().items()
        if name in {"get_rng_state", "set_rng_state"}
    ]
    saved = [(module, name, getattr(module, name)) for module, name, _ in places]
    for module, name, value in places:
        setattr(module, name, value)
    try:
        with _ServeOnCpu():
            yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
