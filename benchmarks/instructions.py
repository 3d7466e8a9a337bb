"""Count the machine instructions that a parameter costs in each optimizer kernel; needs no GPU.

    python benchmarks/instructions.py --sm 90
    python benchmarks/instructions.py --gfx gfx942      # one of AMD's: ours only

Everything is compiled for an NVIDIA GPU with the ptxas inside the triton wheel and disassembled:
our step kernels, the kernel that bitsandbytes' wheel contains, and the one that Inductor emits for torchao's
AdamW8bit (both only where they are installed). The count is all instructions of the kernel, divided by the
parameters that a thread updates.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bnb_compile.ops.operator import Modes, StepOp

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import fake_gpu
from helpers.buckets import OTHER_OPS, STEP_OPS

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Row(NamedTuple):
    """One kernel."""

    kernel: str
    param: str
    instructions: float  # for each parameter
    registers: int
    stack: int  # bytes


def ours(processor: int | str) -> Iterator[Row]:
    for (rule, format), op in {**STEP_OPS, **OTHER_OPS}.items():
        name = f"bnb_compile {rule}, {format}{' bits' if isinstance(format, int) else ''}"
        nvidia = isinstance(processor, int)
        kinds = {"": False}  # formats without shared numbers have one variant
        if op.shared_in_blocks and nvidia:
            kinds = {", fast": True, ", portable": False}
        for kind, fast in kinds.items():
            for dtype in DTYPES:
                yield _built(name + kind, op, dtype, processor, fast)
        # What a trust ratio costs besides: the first of two phases.
        for dtype in DTYPES:
            yield _built(f"{name}, measured for a trust ratio", op, dtype, processor, nvidia, measure=True)


def _built(
    name: str, op: StepOp, dtype: torch.dtype, processor: int | str, fast: bool, measure: bool = False
) -> Row:
    modes = Modes(max_unorm=measure and not op.rule.means, means=bool(op.rule.means))
    built, instructions = fake_gpu.assemble_step(op, dtype, processor, fast, modes, measure)
    return Row(name, DTYPES[dtype], instructions, built.registers, built.stack + built.local)


def bitsandbytes(sm: int) -> Iterator[Row]:
    """Its block-wise 8-bit Adam kernel, whose threads update one parameter each."""
    import bitsandbytes

    library = sorted(Path(bitsandbytes.__file__).parent.glob("libbitsandbytes_cuda13*.so"))[0]
    adam = r"kOptimizerStatic8bit2StateBlockwiseI(f|6__half|13__nv_bfloat16)Li0ELi256ELi1E"
    dtypes = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
    with tempfile.TemporaryDirectory() as folder:
        fake_gpu.nvidia_tool("cuobjdump", "-xelf", f"sm_{sm}", str(library), cwd=folder)
        (cubin,) = Path(folder).iterdir()
        usage = fake_gpu.nvidia_tool("cuobjdump", "-res-usage", str(cubin))
        listing = fake_gpu.nvidia_tool("nvdisasm", "-c", str(cubin))
    for section in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.M)[1:]:
        match = re.match(rf"\w*{adam}", section)
        if match is None:
            continue
        name = re.match(r"\w+", section)[0]
        used = dict(re.findall(r"(\w+):(\d+)", usage[usage.index(name + ":") :].splitlines()[1]))
        yield Row(
            "bitsandbytes AdamW8bit",
            dtypes[match[1]],
            fake_gpu.count_instructions(section),
            int(used["REG"]),
            int(used["STACK"]) + int(used["LOCAL"]),
        )


def torchao(sm: int) -> Iterator[Row]:
    """The kernels that Inductor emits for its step of one matrix, with tiles that it might choose."""
    from torchao.optim.adam import single_param_adam
    from torchao.optim.subclass_8bit import OptimState8bit

    def step(p, grad, steps, lr, *state):
        moments = [
            OptimState8bit(codes, scale, qmap, signed)
            for codes, scale, qmap, signed in zip(state[::3], state[1::3], state[2::3], (True, False))
        ]
        single_param_adam(p, grad, steps, *moments, None, lr, 0.9, 0.999, 0.01, 1e-8, True, False)

    def empty(*size, dtype=torch.float32):
        return torch.empty(*size, dtype=dtype, device="cuda:0")

    def arguments(dtype):
        numel = 4096 * 4096
        states = [
            x
            for _ in range(2)
            for x in (empty(4096, 4096, dtype=torch.uint8), empty(numel // 256), empty(256))
        ]
        return (
            empty(4096, 4096, dtype=dtype),
            empty(4096, 4096, dtype=dtype),
            torch.empty(()),
            empty(()),
            *states,
        )

    for dtype, short in DTYPES.items():
        # Folding constants would run a kernel.
        source = fake_gpu.emit(step, functools.partial(arguments, dtype), joint_graph_constant_folding=False)
        signatures = re.findall(r"'signature': ({.*?})", source)
        total, registers, stack = 0.0, 0, 0
        texts = fake_gpu.kernels(source)
        for (name, text), signature in zip(texts.items(), map(ast.literal_eval, signatures)):
            # 8 elements for a thread; the kernel that copies scales has one for 256 parameters.
            sizes = dict(XBLOCK=4, R0_BLOCK=256) if "R0_BLOCK" in signature else dict(XBLOCK=1024)
            built = fake_gpu.assemble(fake_gpu.load(text, name), signature, 4, sm, **sizes)
            scales_only = len(signature) == 4
            total += built.instructions / (8 * 256 if scales_only else 8)
            registers = max(registers, built.registers)
            stack = max(stack, built.stack + built.local)
        yield Row(f"torchao AdamW8bit, {len(texts)} kernels", short, total, registers, stack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sm", type=int, default=90, help="compute capability times 10")
    parser.add_argument("--gfx", help="name of a processor of AMD's, in place of it")
    args = parser.parse_args()
    counted = (ours,) if args.gfx else (ours, bitsandbytes, torchao)
    print(
        f"| kernel on {args.gfx or f'sm_{args.sm}'} | parameter | instructions | registers | stack, bytes |"
    )
    print("| --- | --- | ---: | ---: | ---: |")
    for count in counted:
        try:
            for row in count(args.gfx or args.sm):
                numbers = f"{row.instructions:.1f} | {row.registers} | {row.stack}"
                print(f"| {row.kernel} | {row.param} | {numbers} |", flush=True)
        except ImportError as missing:
            print(f"{count.__name__} left out: {missing}", file=sys.stderr)


if __name__ == "__main__":
    main()
