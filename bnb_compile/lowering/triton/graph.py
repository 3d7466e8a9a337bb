"""The step on a GPU in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...ops.arena import layout
from ...ops.blockwise import dynamic_map
from ...ops.step import StepOp
from .. import _inductor, triton
from .._inductor import DeviceProperties, V, lowerings
from ..node import AbstractStepNode, static_numel
from ..printer import trace_rule
from .plan import Launch, plan

def lower_triton_step(
    op: StepOp, params: Sequence[Any], grads: Sequence[Any], state: Sequence[Any], hyper: Any
) -> None:
    """Lower a step operator: a prepare kernel, and one or two step kernels whatever the number of parameters."""
    device = params[0].get_device()
    present = torch.tensor([int(grad is not None) for grad in grads])
    count = trace_rule(op.rule).count

    def empty(size: list[int], dtype: torch.dtype) -> Any:
        return lowerings[torch.ops.aten.empty.memory_format](size, dtype=dtype, device=device)

    written = [empty([len(params), 2], torch.int64), empty([len(params), count], torch.float32)]
    launches = _plan(params, grads, device)
    constants = [present]
    for launch in launches:
        constants += [launch.rows, launch.owner, *([] if launch.strides is None else [launch.strides])]
    maps = []
    if op.bits == 8:
        maps = [dynamic_map(kind.signed, torch.device("cpu")).values for kind in op.rule.states]
    read = [hyper, *(_inductor.constant(x, device) for x in (*constants, *maps))]
    TritonStepNode(op, params, grads, state, written, read, launches)


def _plan(params: Sequence[Any], grads: Sequence[Any], device: torch.device) -> list[Launch]:
    sizes = [p.get_size() for p in params]
    strides = [(p.get_stride(), (p if g is None else g).get_stride()) for p, g in zip(params, grads)]
    return plan(
        layout(static_numel(size) for size in sizes),
        sizes,
        strides,
        [_is_aligned(p) and (g is None or _is_aligned(g)) for p, g in zip(params, grads)],
        [g is not None for g in grads],
        triton.has_fast_instructions(device),
    )


def _is_aligned(x: Any) -> bool:
    offset = x.get_layout().offset * x.get_dtype().itemsize
    return V.graph.sizevars.statically_known_multiple_of(offset, 16) and (
        x.get_name() not in V.graph.unaligned_buffers
    )


class TritonStepNode(AbstractStepNode):
    """The launches of a bucket."""

    def __init__(self, *args: Any) -> None:
        *rest, self.launches = args
        super().__init__(*rest)

    def codegen(self, wrapper: Any) -> None:
        """Print the kernels and their calls."""
        op, n = self.op, len(self.params)
        *arenas, step = self.state
        addresses, shared = self.written
        hyper, present, *tables = self.read
        maps = tables[len(tables) - (len(op.rule.states) if op.bits == 8 else 0) :]

        places = [(f"p{k}", 2 * k) for k in range(n)]
        places += [(f"g{k}", 2 * k + 1) for k, grad in enumerate(self.grads) if grad is not None]
        tensors = [*self.params, *self.present]
        chunks = [
            list(zip(places[k:], tensors[k:]))[: triton.MOST_ADDRESSES]
            for k in range(0, len(tensors), triton.MOST_ADDRESSES)
        ]
        for chunk in chunks[1:]:
            name = f"triton_addresses_{wrapper.next_kernel_suffix()}"
            self._call(
                wrapper,
                name,
                triton.addresses_kernel(name, [place for place, _ in chunk]),
                {a: x.get_dtype() for (a, _), x in chunk},
                {"addresses": torch.int64},
                [*(x for _, x in chunk), addresses],
            )
        name = f"triton_{op.name}_prepare_{wrapper.next_kernel_suffix()}"
        self._call(
            wrapper,
            name,
            triton.prepare_kernel(op, name, [place for place, _ in chunks[0]]),
            {a: x.get_dtype() for (a, _), x in chunks[0]},
            {"addresses": torch.int64, **triton.prepare_arguments()},
            [*(x for _, x in chunks[0]), addresses, present, step, hyper, shared],
            programs=-(-n // triton.PREPARE),
            count=n,
        )
        rest = iter(tables)
        for launch in self.launches:
            name = f"triton_{op.name}_{wrapper.next_kernel_suffix()}"
            own = [next(rest) for _ in range(2 if launch.strides is None else 3)]
            self._call(
                wrapper,
                name,
                triton.step_kernel(op, name, self.param_dtype, self.grad_dtype, launch.variant),
                {},
                triton.step_arguments(op, launch.variant),
                [addresses, *own, *arenas, *maps, shared],
                programs=len(launch.owner),
            )

    def _call(
        self,
        wrapper: Any,
        name: str,
        kernel: str,
        tensors: dict[str, torch.dtype],
        own: dict[str, torch.dtype],
        inputs: Sequence[Any],
        programs: int = 1,
        count: int | None = None,
    ) -> None:
        """Define a kernel and call it, as Inductor does for a user's own Triton kernel.

        Args:
            wrapper: Inductor's.
            name: Of the kernel.
            kernel: Its source.
            tensors: Arguments of which only the address is taken.
            own: The other arguments, which are allocations and so begin at multiples of 16 bytes.
            inputs: What is passed for all of them.
            programs: How many are launched.
            count: Passed as the last argument, where the kernel has it.
        """
        arguments = tensors | own
        signature = {a: f"*{triton.TYPES[dtype]}" for a, dtype in arguments.items()}
        numbers = [] if count is None else [count]
        if numbers:
            signature["count"] = "i32"
        triton_meta = dict(
            signature=signature,
            device=DeviceProperties.create(self.device),
            constants={},
            configs=[{(k,): [["tt.divisibility", 16]] for k in range(len(tensors), len(arguments))}],
        )
        grid = ["_grid_0", "_grid_1", "_grid_2"]
        inductor_meta = dict(
            grid_type="FixedGrid", fixed_grid=grid, extra_launcher_args=grid, kernel_name=name
        )
        source = f"""
{triton.IMPORTS}
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties

{kernel.replace(f"@triton.jit{chr(10)}def {name}(", f"{_decorator(triton_meta, inductor_meta)}@triton.jit{chr(10)}def {name}(")}
"""
        wrapper.define_kernel(
            name,
            f"async_compile.triton({name!r}, '''{source}''', device_str={self.device.type!r})",
            None,
            gpu=True,
        )
        launch = [*numbers, programs, 1, 1]
        wrapper.generate_kernel_call(
            name,
            [*(x.codegen_reference() for x in inputs), *launch],
            arg_types=[*(x.get_dtype() for x in inputs), *[int] * len(launch)],
            raw_args=[*inputs, *launch],
            raw_keys=[*signature, "", "", ""],
            triton_meta=triton_meta,
            inductor_meta=inductor_meta,
            triton=True,
            device=self.device,
        )


def _decorator(triton_meta: dict[str, Any], inductor_meta: dict[str, Any]) -> str:
    config = {"num_warps": triton.WARPS, "num_stages": 1}
    return (
        f"@triton_heuristics.user_autotune(configs=[{config!r}], inductor_meta={inductor_meta!r}, "
        f"triton_meta={triton_meta!r}, filename=__file__, custom_kernel=True)\n"
    )
