"""Managed memory: on any machine against a fake of cuda-bindings, on a GPU the real thing."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import sys
import threading
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bnb_compile.state import paging
from bnb_compile.state.paging import managed_zeros, prefetch, unavailable

pytestmark = pytest.mark.quick

GPU = torch.device("cuda", 1)
STREAM = 0x5EED


class Error(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35


class FakeRuntime(ModuleType):
    """What `paging` uses of cuda.bindings.runtime, with the host's memory for the managed."""

    cudaMemAttachGlobal = 1
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrManagedMemory=83, cudaDevAttrConcurrentManagedAccess=89)
    cudaMemLocationType = SimpleNamespace(cudaMemLocationTypeDevice=1)
    cudaMemLocation = SimpleNamespace

    def __init__(self, version: int) -> None:
        super().__init__("cuda.bindings.runtime")
        self.CUDART_VERSION = version
        self.device = 0  # the current one
        self.capturing = False
        self.attributes = {83: 1, 89: 1}
        self.failing: dict[str, Error] = {}
        self.memory: dict[int, Any] = {}
        self.sizes: list[int] = []
        self.freed_on: list[int] = []
        self.prefetches: list[tuple[Any, ...]] = []
        if version < 13000:
            self.cudaMemPrefetchAsync = self._prefetch_12
        else:
            self.cudaMemPrefetchAsync = self._prefetch_13

    def _error(self, name: str) -> Error:
        return self.failing.get(name, Error.cudaSuccess)

    def cudaMallocManaged(self, size: int, flags: int) -> tuple[Error, int | None]:
        if error := self._error("cudaMallocManaged"):
            return error, None
        if size == 0:
            return Error.cudaErrorInvalidValue, None
        assert flags == self.cudaMemAttachGlobal and self.device == GPU.index
        buffer = ctypes.create_string_buffer(b"\xaa" * size, size)  # not zeros
        self.memory[ctypes.addressof(buffer)] = buffer
        self.sizes.append(size)
        return Error.cudaSuccess, ctypes.addressof(buffer)

    def cudaFree(self, pointer: int) -> tuple[Error]:
        del self.memory[pointer]
        self.freed_on.append(self.device)
        return (Error.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Error, int | None]:
        if error := self._error("cudaDeviceGetAttribute"):
            return error, None
        assert device == GPU.index
        return Error.cudaSuccess, self.attributes[attribute]

    def _prefetch_12(self, pointer: int, count: int, device: int, stream: int) -> tuple[Error]:
        self.prefetches.append((pointer, count, device, stream, self.device))
        return (self._error("cudaMemPrefetchAsync"),)

    def _prefetch_13(
        self, pointer: int, count: int, location: SimpleNamespace, flags: int, stream: int
    ) -> tuple[Error]:
        assert location.type == 1 and flags == 0
        return self._prefetch_12(pointer, count, location.id, stream)


def as_cpu_tensor(memory: Any, device: torch.device) -> Tensor:
    """In place of the one line that needs a GPU; NumPy and torch keep `memory` as torch.as_tensor does."""
    assert device == GPU
    view = SimpleNamespace(__array_interface__=memory.__cuda_array_interface__, memory=memory)
    return torch.from_numpy(np.asarray(view))


@pytest.fixture(params=[12080, 13000])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime(request.param)

    @contextlib.contextmanager
    def current(device: torch.device) -> Iterator[None]:
        before, fake.device = fake.device, device.index
        yield
        fake.device = before

    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: GPU.index)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(paging, "_as_tensor", as_cpu_tensor)
    return fake


@pytest.mark.parametrize("numel", [0, 1, 1000])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_managed_zeros(runtime: FakeRuntime, dtype: torch.dtype, numel: int) -> None:
    x = managed_zeros(numel, dtype, GPU)
    assert torch.equal(x, torch.zeros(numel, dtype=dtype)) and x.dtype == dtype
    assert runtime.sizes == [max(1, numel * dtype.itemsize)]
    assert numel == 0 or x.data_ptr() in runtime.memory
    del x
    assert not runtime.memory and runtime.freed_on == [GPU.index] and runtime.device == 0


def test_views_keep_the_memory(runtime: FakeRuntime) -> None:
    x = managed_zeros(8, torch.float32, GPU)
    view = x[4:].view(2, 2)
    del x
    assert len(runtime.memory) == 1
    view.fill_(1)
    del view
    assert not runtime.memory


def test_failed_allocation_raises(runtime: FakeRuntime) -> None:
    runtime.failing["cudaMallocManaged"] = Error.cudaErrorMemoryAllocation
    with pytest.raises(RuntimeError, match="cudaMallocManaged failed: cudaErrorMemoryAllocation"):
        managed_zeros(1, torch.uint8, GPU)


def test_memory_that_torch_does_not_take_is_freed(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(memory: Any, device: torch.device) -> Tensor:
        raise RuntimeError("refused")

    monkeypatch.setattr(paging, "_as_tensor", refuse)
    with pytest.raises(RuntimeError, match="refused"):
        managed_zeros(1, torch.uint8, GPU)
    assert runtime.sizes == [1] and not runtime.memory


def test_prefetch(runtime: FakeRuntime) -> None:
    codes, empty, absmax = torch.zeros(5, dtype=torch.uint8), torch.zeros(0), torch.zeros(3)
    prefetch(iter([codes, empty, absmax]), GPU)
    assert runtime.prefetches == [
        (codes.data_ptr(), 5, GPU.index, STREAM, GPU.index),
        (absmax.data_ptr(), 12, GPU.index, STREAM, GPU.index),
    ]


def test_prefetch_does_nothing_in_a_capture(runtime: FakeRuntime) -> None:
    runtime.capturing = True
    prefetch([torch.zeros(1)], GPU)
    assert not runtime.prefetches


def test_prefetch_does_nothing_without_paging_on_demand(runtime: FakeRuntime) -> None:
    runtime.attributes[89] = 0
    prefetch([torch.zeros(1)], GPU)
    assert not runtime.prefetches


def test_failed_prefetch_raises(runtime: FakeRuntime) -> None:
    runtime.failing["cudaMemPrefetchAsync"] = Error.cudaErrorInvalidValue
    with pytest.raises(RuntimeError, match="cudaMemPrefetchAsync failed: cudaErrorInvalidValue"):
        prefetch([torch.zeros(1)], GPU)


@pytest.mark.parametrize("device", [GPU, torch.device("cuda")], ids=str)
def test_available(runtime: FakeRuntime, device: torch.device) -> None:
    assert unavailable(device) is None


def test_unavailable_on_other_devices() -> None:
    assert unavailable(torch.device("cpu")) == "cpu has no CUDA managed memory"


@pytest.mark.parametrize(
    ("module", "reason"),
    [("cuda.bindings.runtime", "cuda-bindings cannot be imported"), ("numpy", "torch needs NumPy")],
)
def test_unavailable_without_a_package(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, module: str, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert (unavailable(GPU) or "").startswith(reason)


def test_unavailable_where_the_device_says_so(runtime: FakeRuntime) -> None:
    runtime.attributes[83] = 0
    assert unavailable(GPU) == "cuda:1 does not support managed memory (cudaDevAttrManagedMemory is 0)"


def test_unavailable_without_a_driver(runtime: FakeRuntime) -> None:
    runtime.failing["cudaDeviceGetAttribute"] = Error.cudaErrorInsufficientDriver
    assert unavailable(GPU) == "cudaDeviceGetAttribute failed: cudaErrorInsufficientDriver"


# -- on a GPU ------------------------------------------------------------------------------------------------

NUMEL = 1 << 18  # whole pages


@pytest.fixture
def gpu() -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := unavailable(device):
        pytest.skip(reason)
    return device


def is_managed(pointer: int) -> bool:
    runtime = paging._runtime()
    (attributes,) = paging._call("cudaPointerGetAttributes", pointer)
    return attributes.type == runtime.cudaMemoryType.cudaMemoryTypeManaged


@pytest.mark.gpu
@pytest.mark.parametrize("numel", [0, NUMEL])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_gpu_tensor(gpu: torch.device, dtype: torch.dtype, numel: int) -> None:
    before = torch.cuda.memory_allocated()
    x = managed_zeros(numel, dtype, gpu)
    assert torch.cuda.memory_allocated() == before
    assert (x.device, x.dtype, x.shape) == (gpu, dtype, (numel,))
    assert numel == 0 or is_managed(x.data_ptr())
    assert not x.any()
    x += 3
    assert torch.equal(x.cpu(), torch.full((numel,), 3, dtype=dtype))


@pytest.mark.gpu
def test_gpu_memory_lives_as_long_as_its_views(gpu: torch.device) -> None:
    x = managed_zeros(NUMEL, torch.uint8, gpu)
    pointer, views = x.data_ptr(), [x[NUMEL // 2 :]]
    del x
    assert is_managed(pointer)
    thread = threading.Thread(target=views.clear)  # where torch has no current device yet
    thread.start()
    thread.join()
    assert not is_managed(pointer)


@pytest.mark.gpu
def test_gpu_prefetch(gpu: torch.device) -> None:
    runtime = paging._runtime()
    x = managed_zeros(NUMEL, torch.float32, gpu)
    if not paging._attribute("ConcurrentManagedAccess", gpu):
        pytest.skip("no paging on demand")

    def last_prefetch() -> int:
        attribute = runtime.cudaMemRangeAttribute.cudaMemRangeAttributeLastPrefetchLocation
        return paging._call("cudaMemRangeGetAttribute", 4, attribute, x.data_ptr(), x.nbytes)[0]

    assert last_prefetch() != gpu.index
    with torch.cuda.stream(torch.cuda.Stream()):
        prefetch([x, x[:0]], gpu)
    torch.cuda.synchronize()
    assert last_prefetch() == gpu.index and not x.any()


@pytest.mark.gpu
def test_gpu_prefetch_is_harmless_in_a_cuda_graph(gpu: torch.device) -> None:
    x = managed_zeros(NUMEL, torch.float32, gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prefetch([x], gpu)
        x += 1
    for _ in range(3):
        graph.replay()
    assert (x == 3).all()


@pytest.mark.gpu
def test_gpu_prefetch_refuses_ordinary_memory(gpu: torch.device) -> None:
    if not paging._attribute("ConcurrentManagedAccess", gpu):
        pytest.skip("no paging on demand")
    with pytest.raises(RuntimeError, match="cudaMemPrefetchAsync failed: cudaErrorInvalidValue"):
        prefetch([torch.zeros(NUMEL, device=gpu)], gpu)
