"""A guest library turns the process's knobs while it starts; afterwards they stand as before."""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
)


@contextlib.contextmanager
def process_state_kept(environment: Mapping[str, str]) -> Iterator[None]:
    """Sets these environment variables, and on leaving puts back what a library may have changed.

    That is: all environment variables, the random states of Python, NumPy and torch, torch's number
    of threads and the function that sets it, its precision of matrix products and kinds of
    attention, what its allocator on a GPU was told, and the warning filters.
    """
    switches = [(get, put, get()) for get, put in _SWITCHES]
    variables = dict(os.environ)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    set_num_threads, n_threads = torch.set_num_threads, torch.get_num_threads()
    os.environ.update(environment)
    try:
        with random_state_kept(), warnings.catch_warnings():
            yield
    finally:
        _restore_environment(variables)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(n_threads)
        for get, put, value in switches:
            if get() != value:
                put(value)
        _restore_allocator()


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Puts torch's random state, of the CPU and of this process's GPU, back on leaving."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def _restore_allocator() -> None:
    """Tells torch's allocator again what the environment says: all that vLLM leaves out is lost."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    if settings and torch.cuda.is_available():
        torch.cuda.memory._set_allocator_settings(settings)


def _restore_environment(variables: Mapping[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    for name, value in variables.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
