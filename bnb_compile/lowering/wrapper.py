"""Defining and calling a kernel in the code that Inductor writes, its wrapper.

Beside `_inductor` the only place that knows Inductor's private interface; both languages are here so that a
new torch breaks, and is mended, in one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._inductor import DeviceProperties, V


def cpp_name(code: Any, name: str) -> str:
    """A name for a C++ kernel that no other kernel of the graph has."""
    return f"{name}_{code.next_kernel_suffix()}"


def cpp_function(name: str) -> str:
    """Name of the function of a C++ kernel: Inductor's Python bindings expect their own."""
    return name if V.graph.cpp_wrapper else "kernel"


def call_cpp(code: Any, name: str, source: str, types: Sequence[str], inputs: Sequence[Any]) -> None:
    """Define a C++ kernel and call it.

    Args:
        code: Inductor's wrapper.
        name: From `cpp_name`.
        source: Of the kernel, whose function is `cpp_function(name)`.
        types: Of its arguments, all pointers.
        inputs: A buffer for each.
    """
    declaration = None
    if V.graph.cpp_wrapper:
        for dtype in {x.get_dtype() for x in inputs}:
            code.codegen_dtype(dtype)  # the C++ wrapper declares only dtypes announced to it
        # With a declaration the kernel is in a file of its own; the wrapper's is compiled with -O1.
        declaration = f'extern "C" void {name}({", ".join(types)});\n'
    else:
        source = f"async_compile.cpp_pybinding({list(types)!r}, r'''{source}''')"
    code.define_kernel(name, source, None, gpu=False, cpp_definition=declaration)
    code.generate_kernel_call(
        name,
        [x.codegen_reference() for x in inputs],
        arg_types=list(types),
        triton=False,
        device=inputs[0].get_device(),
    )


def call_triton(
    code: Any,
    name: str,
    source: str,
    pointers: dict[str, Any],
    types: dict[torch.dtype, str],
    warps: int,
    fused: bool,
    programs: int = 1,
    count: int | None = None,
    unaligned: Sequence[str] = (),
) -> None:
    """Define a Triton kernel and call it, as Inductor does for a user's own.

    Args:
        code: Inductor's wrapper.
        name: Of the kernel, in `source`.
        source: Module with the kernel, whose last function it is.
        pointers: The buffer for each argument, in their order.
        types: Triton's name of each dtype.
        warps: Of a program.
        fused: Whether ``a * b + c`` is rounded once.
        programs: How many are launched.
        count: Passed as the last argument, where the kernel has it.
        unaligned: Arguments that need not begin at multiples of 16 bytes.
    """
    inputs = list(pointers.values())
    device = inputs[0].get_device()
    signature = {argument: f"*{types[x.get_dtype()]}" for argument, x in pointers.items()}
    aligned = [k for k, argument in enumerate(pointers) if argument not in unaligned]
    numbers = [] if count is None else [count]
    if numbers:
        signature["count"] = "i32"
    triton_meta = dict(
        signature=signature,
        device=DeviceProperties.create(device),
        constants={},
        configs=[{(k,): [["tt.divisibility", 16]] for k in aligned}],
        enable_fp_fusion=fused,
    )
    grid = ["_grid_0", "_grid_1", "_grid_2"]
    inductor_meta = dict(grid_type="FixedGrid", fixed_grid=grid, extra_launcher_args=grid, kernel_name=name)
    head = f"@triton.jit\ndef {name}("
    before, _, after = source.partition(head)
    decorated = f"""
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties

{before}{_decorator(triton_meta, inductor_meta, warps)}{head}{after}
"""
    code.define_kernel(
        name,
        f"async_compile.triton({name!r}, '''{decorated}''', device_str={device.type!r})",
        None,
        gpu=True,
    )
    launch = [*numbers, programs, 1, 1]
    code.generate_kernel_call(
        name,
        [*(x.codegen_reference() for x in inputs), *launch],
        arg_types=[*(x.get_dtype() for x in inputs), *[int] * len(launch)],
        raw_args=[*inputs, *launch],
        raw_keys=[*signature, "", "", ""],
        triton_meta=triton_meta,
        inductor_meta=inductor_meta,
        triton=True,
        device=device,
    )


def _decorator(triton_meta: dict[str, Any], inductor_meta: dict[str, Any], warps: int) -> str:
    config = {"num_warps": warps, "num_stages": 1}
    return (
        f"@triton_heuristics.user_autotune(configs=[{config!r}], inductor_meta={inductor_meta!r}, "
        f"triton_meta={triton_meta!r}, filename=__file__, custom_kernel=True)\n"
    )
