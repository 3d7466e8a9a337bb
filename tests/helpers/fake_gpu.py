"""Inductor's GPU code on a machine without a GPU: emit it, run it under Triton's interpreter, assemble it.

`emit` gives the source that Inductor would run for fake "cuda" tensors. `load` imports a kernel of it, which
under TRITON_INTERPRET=1 runs on CPU tensors. `assemble` compiles a kernel with the ptxas of the triton wheel
and counts what came out. Tried with torch 2.13.0 (CPU build) and triton 3.7.1.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bnb_compile.ops.operator import Modes, StepOp

# A CPU build of torch has no device guard for CUDA, a CUDA build without a driver one that raises, and even
# fake operations ask for one.
_GUARD = r"""
#include <c10/core/impl/DeviceGuardImplInterface.h>
struct NoGpuGuard final : public c10::impl::DeviceGuardImplInterface {
  using D = c10::Device;
  using S = c10::Stream;
  static constexpr c10::DeviceType T = c10::DeviceType::CUDA;
  c10::DeviceType type() const override { return T; }
  D exchangeDevice(D) const override { return D(T, 0); }
  D getDevice() const override { return D(T, 0); }
  void setDevice(D) const override {}
  void uncheckedSetDevice(D) const noexcept override {}
  S getStream(D) const noexcept override { return S(S::DEFAULT, D(T, 0)); }
  S exchangeStream(S s) const noexcept override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, NoGpuGuard)
void loaded() {}
"""


class _Properties:
    """What Inductor reads of ``torch.cuda.get_device_properties``, for an H200."""

    name, major, minor, gcnArchName = "NVIDIA H200", 9, 0, ""
    multi_processor_count, max_threads_per_multi_processor, max_threads_per_block = 132, 2048, 1024
    regs_per_multiprocessor, warp_size, total_memory, L2_cache_size = 65536, 32, 141 << 30, 60 << 20
    shared_memory_per_block, shared_memory_per_block_optin = 49152, 232448
    shared_memory_per_multiprocessor = 233472


class _Driver:
    """An active Triton driver for a GPU that is not there."""

    @staticmethod
    def get_current_target() -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    get_current_device = staticmethod(lambda: 0)
    get_device_capability = staticmethod(lambda *a: (9, 0))
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
    get_device_interface = staticmethod(lambda: torch.cuda)
    is_active = staticmethod(lambda: True)


@contextlib.contextmanager
def _pretend_cuda() -> Iterator[None]:
    import torch._inductor.fx_passes.joint_graph as joint_graph
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils.cpp_extension import load_inline
    from triton.runtime import driver

    if not torch.cuda.is_available():  # a CUDA build without a driver has a guard, which raises
        load_inline("no_gpu_guard", [_GUARD], functions=["loaded"])
        torch._C._cuda_getCurrentRawStream = lambda *a: 0

    def always(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    cuda = dict(
        get_device_properties=always(_Properties),
        get_device_capability=always((9, 0)),
        current_device=always(0),
        device_count=always(1),
        is_available=always(True),
        synchronize=always(None),
        is_initialized=always(False),
        _lazy_init=always(None),
        _exchange_device=always(0),
        _maybe_exchange_device=always(0),
        get_rng_state=lambda *a, **k: torch.zeros(16, dtype=torch.uint8),
        set_rng_state=always(None),
    )
    interface = dict(
        get_compute_capability=staticmethod(always(90)),
        is_available=staticmethod(always(True)),
        current_device=staticmethod(always(0)),
        get_device_properties=staticmethod(always(_Properties)),
        is_bf16_supported=staticmethod(always(True)),
        is_triton_capable=staticmethod(always(True)),
        raise_if_triton_unavailable=staticmethod(always(None)),
    )
    worker = dict(
        get_device_properties=staticmethod(always(_Properties)), current_device=staticmethod(always(0))
    )
    patches = [
        (torch.version, dict(cuda="13.0")),
        (torch.cuda, cuda),
        (fake_tensor, dict(init_gpu_context=always(None))),  # which allocates one
        (joint_graph, dict(lazy_init=always(None))),  # its attention patterns allocate real cuda tensors
        (CudaInterface, interface),
        (CudaInterface.Worker, worker),
    ]
    _forget_triton()
    active = driver._active if hasattr(driver, "_active") else None
    driver.set_active(_Driver())
    with contextlib.ExitStack() as stack:
        for owner, values in patches:
            stack.enter_context(mock.patch.multiple(owner, **values))
        yield
    driver._active = active
    _forget_triton()


def _forget_triton() -> None:
    """Have torch look again whether Triton works: it remembers the answer."""
    for function in vars(torch.utils._triton).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


class _Stop(Exception):
    pass


#: By name: the tensors that the last emitted source uses as constants.
constants: dict[str, torch.Tensor] = {}


def _fake_constant(data: torch.Tensor, device: torch.device) -> Any:
    from torch._inductor.virtualized import V

    with V.fake_mode:  # the offset keeps Inductor from taking two constants for one
        k = len(constants)
        fake = torch.empty(data.numel() + k, dtype=data.dtype, device=device)[k:].view(data.shape)
        box = V.graph.add_tensor_constant(fake)
    constants[box.get_name()] = data
    return box


def emit(
    function: Callable[..., Any], make_arguments: Callable[[], Any], fast: bool = True, **config: Any
) -> str:
    """Source that Inductor would run for ``function(*make_arguments())``.

    Args:
        function: Updates its arguments, or returns tensors.
        make_arguments: Creates its tensors on device "cuda:0"; they will be fake.
        fast: Whether the step kernels may use NVIDIA's instructions, which the interpreter does not know.
        config: Inductor's configuration.
    """
    import torch._inductor.compile_fx as compile_fx
    from torch._inductor import config as inductor_config
    from torch._inductor import graph

    from bnb_compile.lowering import _inductor
    from bnb_compile.lowering.triton import source as triton_source

    sources: list[str] = []
    constants.clear()

    def keep(self: Any) -> None:
        wrapper, _ = self.codegen()
        sources.append(getattr(wrapper, "value", wrapper))
        raise _Stop

    with (
        _pretend_cuda(),
        FakeTensorMode(allow_non_fake_inputs=True),
        warnings.catch_warnings(),
    ):
        # Inductor asks constants for their addresses.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        flat, spec = torch.utils._pytree.tree_flatten(make_arguments())

        tensors = [x for x in flat if isinstance(x, torch.Tensor)]

        def flat_function(*tensors: torch.Tensor) -> Any:
            given = iter(tensors)
            full = [next(given) if isinstance(x, torch.Tensor) else x for x in flat]
            return function(*torch.utils._pytree.tree_unflatten(full, spec)) or ()

        module = make_fx(flat_function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
        with (
            mock.patch.object(graph.GraphLowering, "compile_to_module", keep),
            mock.patch.object(_inductor, "constant", _fake_constant),
            mock.patch.object(triton_source, "has_fast_instructions", lambda device: fast),
            inductor_config.patch(fx_graph_cache=False, **config),
        ):
            try:
                compile_fx.compile_fx(module, tensors)(*tensors)
            except Exception:
                if not sources:
                    raise
    return sources[0]


def kernels(source: str) -> dict[str, str]:
    """Every Triton kernel of emitted source by name, without Inductor's heuristics."""
    found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", source, re.S)
    heuristics = re.compile(r"@triton_heuristics\.\w+\(.*?\n?\)\n(?=@triton\.jit)", re.S)
    return {
        name: heuristics.sub("", body).replace("triton_helpers.set_driver_to_gpu()", "")
        for name, body in found
    }


def load(source: str, name: str) -> Any:
    """Import a kernel; Triton reads its source from a file, which stays until the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="kernel_"))
    (folder / f"{name}.py").write_text(source)
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def interpret(source: str, arguments: Any) -> list[torch.Tensor]:
    """Run emitted source under Triton's interpreter, in a process of its own.

    Args:
        source: From `emit`, whose arguments these are; its kernels must be portable (``fast=False``).
        arguments: As of the emitted function, with CPU tensors; updated in place.

    Returns:
        What the emitted function returns.
    """
    inputs = [x for x in torch.utils._pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    with tempfile.TemporaryDirectory() as folder:
        job, result = os.path.join(folder, "job.pt"), os.path.join(folder, "result.pt")
        torch.save((source, inputs, dict(constants)), job)
        subprocess.run(
            [sys.executable, __file__, job, result], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True
        )
        updated, returned = torch.load(result)
    for x, new in zip(inputs, updated):
        if not torch.equal(x, new):  # what overlaps itself cannot be written
            x.copy_(new)
    return returned


def _interpret_job(job: str, result: str) -> None:
    source, inputs, own = torch.load(job)
    names: dict[str, Any] = {f"arg{k}_1": x for k, x in enumerate(inputs)} | own
    names |= {
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        "reinterpret_tensor": torch.ops.inductor._reinterpret_tensor,
        "torch": torch,
        "raw_stream0": None,
        "stream0": None,  # before torch 2.13
    }
    for name, text in kernels(source).items():
        # The interpreter has no libdevice.
        names[name] = _Interpreted(load(text.replace("libdevice.floor(", "tl.floor("), name))
    returned = "()"
    for line in source[source.index("def call(") :].splitlines():
        if re.match(r"\s+\w+\.run\(|\s+buf\d+ = ", line):
            exec(line.strip(), names)
        elif match := re.match(r"\s+return (\(.*\))", line):
            returned = match[1]
    torch.save((inputs, list(eval(returned, names))), result)


class _Interpreted:
    """A kernel as the emitted source calls it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def run(self, *args: Any, stream: Any) -> None:
        names = self.kernel.arg_names
        if "XBLOCK" not in names:  # ours: the grid comes last
            self.kernel[args[-3:]](*args[:-3])
            return
        block = 8 if "r0_numel" in names else 1024
        self.kernel[(-(-args[names.index("xnumel")] // block),)](*args, XBLOCK=block)


class Assembly(NamedTuple):
    """What became of a kernel."""

    instructions: int
    registers: int
    stack: int  # bytes, of spills too
    local: int
    accesses: set[str]  # ld.global... and st.global... of the PTX, or what AMD's assembler has of them


def nvidia_tool(name: str, *arguments: str, **options: Any) -> str:
    """Output of a tool inside the triton wheel."""
    import triton

    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True, **options).stdout


def count_instructions(listing: str) -> int:
    """Machine instructions in what nvdisasm prints."""
    return len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", listing, re.M))


def assemble_step(
    op: StepOp,
    dtype: torch.dtype,
    processor: int | str,
    fast: bool = True,
    modes: Modes | None = None,
    measure: bool = False,
) -> tuple[Assembly, float]:
    """The kernel of a step where all accesses are vectors, and its instructions for each parameter.

    Args:
        op: The operator.
        dtype: Of parameters and gradients.
        processor: A compute capability times 10, or the name of one of AMD's.
        fast: Whether it has NVIDIA's own instructions.
        modes: What it is compiled for.
        measure: Whether it is the kernel that measures.
    """
    from bnb_compile.lowering.triton import source

    modes = modes or Modes(means=bool(op.rule.means))
    variant = source.Variant(aligned=True, dims=0, long=False, fast=fast)
    given = op, modes, "kernel", dtype, dtype, variant
    text = source.measure_kernel(*given, base=0) if measure else source.step_kernel(*given)
    dtypes = source.argument_dtypes(op, modes)
    names = source.step_arguments(op, modes, variant, measure)
    signature = {name: f"*{source.TYPES[dtypes[name]]}" for name in names}
    to_assemble = load(source.IMPORTS + text, "kernel"), signature, source.WARPS
    if isinstance(processor, str):
        assembly, lanes = assemble_amd(*to_assemble, processor), 64
    else:
        assembly, lanes = assemble(*to_assemble, processor), 32
    return assembly, assembly.instructions * lanes * source.WARPS / (source.blocks_of(op) * 256)


def assemble(kernel: Any, signature: dict[str, str], num_warps: int, sm: int, **constants: int) -> Assembly:
    """Compile a kernel for an NVIDIA GPU, here without one.

    Args:
        kernel: A ``triton.jit`` function (not under the interpreter).
        signature: Triton type of each argument; pointers are taken to be multiples of 16.
        num_warps: Warps of a program.
        sm: Compute capability times 10, such as 90.
        constants: Values of the arguments whose type is "constexpr".
    """
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    compiled = _compile(kernel, signature, ("cuda", sm, 32), options, constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled["cubin"])
        file.flush()
        usage = dict(re.findall(r"(\w+):(\d+)", nvidia_tool("cuobjdump", "-res-usage", file.name)))
        listing = nvidia_tool("nvdisasm", "-c", file.name)
    return Assembly(
        instructions=count_instructions(listing),
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local=int(usage["LOCAL"]),
        accesses=set(re.findall(r"(?:ld|st)\.global[.\w:]*", compiled["ptx"])),
    )


def assemble_amd(kernel: Any, signature: dict[str, str], num_warps: int, gfx: str) -> Assembly:
    """Compile a kernel for an AMD GPU, such as the gfx942.

    Args:
        kernel: As of `assemble`.
        signature: As of `assemble`.
        num_warps: Wavefronts of a program, of 64 threads.
        gfx: Name of the processor.
    """
    listing = _compile(kernel, signature, ("hip", gfx, 64), {"num_warps": num_warps}, {})["amdgcn"]
    usage = dict(re.findall(r"; (NumVgprs|ScratchSize): (\d+)", listing))
    return Assembly(
        instructions=len(re.findall(r"^\s+(?:s|v|ds|global|buffer|flat)_\w+", listing, re.M)),
        registers=int(usage["NumVgprs"]),
        stack=int(usage["ScratchSize"]),
        local=0,
        accesses=set(re.findall(r"(?:global|buffer)_(?:load|store)_\w+", listing)),
    )


def _compile(
    kernel: Any,
    signature: dict[str, str],
    target: tuple[str, int | str, int],
    options: dict[str, Any],
    constants: dict[str, int],
) -> Any:
    """What the compiler makes on the way, by name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(signature)
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name not in constants}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    return triton.compile(source, target=GPUTarget(*target), options=options).asm


if __name__ == "__main__":
    _interpret_job(*sys.argv[1:])
