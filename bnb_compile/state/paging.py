"""Optimizer states in CUDA managed memory, which the driver pages between the GPU and the host.

The CUDA runtime is called through `cuda.bindings.runtime` of the package cuda-bindings, 12.8 or later, on
which CUDA builds of torch depend. It is imported when it is first needed.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def available(device: torch.device) -> bool:
    """Whether states can be paged on a device; warns once if not."""
    reason = unavailable(device)
    if reason is not None:
        warnings.warn(f"paged optimizer states are in ordinary memory: {reason}", stacklevel=2)
    return reason is None


def unavailable(device: torch.device) -> str | None:
    """Why `managed_zeros` cannot work on a device, or None if it can."""
    if device.type != "cuda":
        return f"{device.type} has no CUDA managed memory"
    if importlib.util.find_spec("numpy") is None:
        return "torch needs NumPy to wrap CUDA memory, and it is not installed"
    try:
        managed = _attribute("ManagedMemory", device)
    except ImportError as error:
        return f"cuda-bindings cannot be imported ({error})"
    except RuntimeError as error:  # of the CUDA runtime: no driver, or one too old for the bindings
        return str(error)
    return None if managed else f"{device} does not support managed memory (cudaDevAttrManagedMemory is 0)"


def managed_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros in managed memory.

    Args:
        numel: Number of elements, 0 or more.
        dtype: Of the elements.
        device: The GPU whose tensor it is.

    Returns:
        A tensor of shape (numel,). Its memory is not torch's: torch.cuda.memory_allocated does not count it.

    Raises:
        ImportError: There is no cuda-bindings.
        RuntimeError: An error of the CUDA runtime, with its name.
    """
    return _as_tensor(_Memory(numel * dtype.itemsize, device), device).zero_().view(dtype)


def prefetch(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Have the driver move managed tensors to a GPU, in the order of its current stream.

    The host does not wait. This is a hint: kernels give the same results without it. Nothing is done where
    it is impossible: while the stream is being captured, as CUDA graphs have no node for a prefetch, and on
    devices that cannot page on demand (cudaDevAttrConcurrentManagedAccess is 0).

    Args:
        tensors: Contiguous tensors in managed memory; others raise cudaErrorInvalidValue.
        device: The GPU.

    Raises:
        RuntimeError: An error of the CUDA runtime, with its name.
    """
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing() or not _attribute("ConcurrentManagedAccess", device):
            return
        target = _prefetch_target(_index(device))
        stream = torch.cuda.current_stream().cuda_stream
        for tensor in tensors:
            if tensor.numel():
                _call("cudaMemPrefetchAsync", tensor.data_ptr(), tensor.nbytes, *target, stream)


class _Memory:
    """Managed memory, freed when this object dies, under the interface that torch.as_tensor wraps.

    The storage of that tensor refers to this object until it dies itself, so views keep the memory too. At
    the interpreter's exit nothing is freed: tensors may still be in use, and the driver cleans up.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        at_least_one = max(1, nbytes)  # CUDA has no empty allocations
        with torch.cuda.device(device):  # the current device becomes the tensor's
            (pointer,) = _call("cudaMallocManaged", at_least_one, _runtime().cudaMemAttachGlobal)
        weakref.finalize(self, _free, pointer, device).atexit = False
        data = pointer, False  # not read-only
        self.__cuda_array_interface__ = dict(shape=(nbytes,), typestr="|u1", data=data, version=2)


def _as_tensor(memory: _Memory, device: torch.device) -> Tensor:
    return torch.as_tensor(memory, device=device)


def _free(pointer: int, device: torch.device) -> None:
    with torch.cuda.device(device):  # else a thread that never used CUDA makes a context on the first GPU
        _call("cudaFree", pointer)


def _prefetch_target(index: int) -> tuple[Any, ...]:
    """The arguments of cudaMemPrefetchAsync that name a GPU; CUDA 13 changed them."""
    runtime = _runtime()
    if runtime.CUDART_VERSION < 13000:
        return (index,)
    location = runtime.cudaMemLocation()
    location.type, location.id = runtime.cudaMemLocationType.cudaMemLocationTypeDevice, index
    return location, 0  # no flags


def _attribute(name: str, device: torch.device) -> int:
    attribute = getattr(_runtime().cudaDeviceAttr, f"cudaDevAttr{name}")
    (value,) = _call("cudaDeviceGetAttribute", attribute, _index(device))
    return value


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _call(name: str, *args: Any) -> list[Any]:
    """What a function of the CUDA runtime returns after its error code, which must be success."""
    error, *values = getattr(_runtime(), name)(*args)
    if error != 0:
        raise RuntimeError(f"{name} failed: {error.name}")
    return values


def _runtime() -> Any:
    return importlib.import_module("cuda.bindings.runtime")
