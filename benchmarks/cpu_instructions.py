"""Count the instructions that the C++ kernels execute for 16 parameters, with each instruction set.

    pip install -e .[arm]
    python benchmarks/cpu_instructions.py

All instructions of a step of AdamW are counted, scalar ones, too, on one thread: what 16 more blocks of 256
parameters take. Those of AVX-512 and AVX2 are executed one by one by this processor, if it has them; those of
NEON and SVE by an emulator. How many are executed in a cycle, and thus the time, is another question.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bnb_compile import rules
from bnb_compile.lowering.cpp import launch
from bnb_compile.ops.operator import Arguments, Modes, StepOp
from bnb_compile.ops.step import step_op

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers import buckets

FORMATS = ("float32", "dynamic8", "dynamic8sr", "float8", "ratio8", "ratio4_8", "ratio4")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
BLOCKS = 4, 20  # of which the difference is counted
TRACE_ME, CONTINUE, SINGLE_STEP = 0, 7, 9  # of ptrace
WIDTHS = {"avx512": 16, "avx2": 8, "neon": 4, "sve": 8}


class Case(NamedTuple):
    """A kernel."""

    format: str
    dtype: torch.dtype

    @property
    def op(self) -> StepOp:
        """The operator that it is of."""
        return step_op(rules.ADAM, self.format)

    def bucket(self, blocks: int) -> buckets.Bucket:
        """A parameter of so many blocks, and its states."""
        return buckets.make(self.op, [(blocks * 256,)], self.dtype)


def step(case: Case) -> None:
    """Take a step of each size, and stop before and after it."""
    torch.set_num_threads(1)
    for blocks in BLOCKS:
        b = case.bucket(blocks)
        launcher = launch.Launcher(case.op, Arguments.of(b.arguments, b.options))
        launcher.compile(case.dtype)
        launcher(b.grads, case.dtype)  # with all that is only done once
        kernel = launch.compile_kernel(case.op, launcher.modes, case.dtype, case.dtype)
        places, tensors = launcher.places, [*launcher.tensors.values()]
        os.kill(os.getpid(), signal.SIGSTOP)
        kernel(launcher.table, 1, places.elements, places.blocks, *tensors)
        os.kill(os.getpid(), signal.SIGSTOP)


def executed_here(isa: str, case: Case) -> float:
    """Instructions for 16 parameters."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    command = [sys.executable, "-W", "ignore", __file__, "--step", case.format, DTYPES[case.dtype]]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": isa}
    process = subprocess.Popen(command, env=environment, preexec_fn=lambda: ptrace(TRACE_ME, 0, None, None))
    counts = []
    try:
        os.waitpid(process.pid, 0)  # the program has been loaded
        for _ in BLOCKS:
            run_on(process.pid)
            counts.append(run_on(process.pid, one_by_one=True))
    finally:
        process.kill()
        process.wait()
    return for_16(counts)


def run_on(pid: int, one_by_one: bool = False) -> int:
    """Let a process run to where it stops itself; how often it was let, which may be for one instruction."""
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    request, count, passed_on = SINGLE_STEP if one_by_one else CONTINUE, 0, 0
    while True:
        ptrace(request, pid, None, ctypes.c_void_p(passed_on))
        count += 1
        _, status = os.waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            raise RuntimeError(f"the process has ended, status {status}")
        if os.WSTOPSIG(status) == signal.SIGSTOP:
            return count
        passed_on = 0 if os.WSTOPSIG(status) == signal.SIGTRAP else os.WSTOPSIG(status)


def executed_on_arm(isa: str, cases: list[Case]) -> list[float]:
    """Instructions for 16 parameters in each case."""
    from helpers import aarch64

    steps = [(case.op, case.dtype, Modes(), case.bucket(blocks)) for case in cases for blocks in BLOCKS]
    with tempfile.TemporaryDirectory() as folder:
        marks = aarch64.run(aarch64.compile_program(aarch64.program_of(steps), Path(folder), isa)).marks
    counts = [end - begin for begin, end in zip(marks[::2], marks[1::2])]
    return [for_16(pair) for pair in zip(counts[::2], counts[1::2])]


def for_16(counts: Sequence[int]) -> float:
    few, many = counts
    return 16 * (many - few) / (256 * (BLOCKS[1] - BLOCKS[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--step", nargs=2, metavar=("FORMAT", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--no-arm", action="store_true", help="only what this processor has")
    args = parser.parse_args()
    if args.step:
        return step(Case(args.step[0], getattr(torch, args.step[1])))
    cases = [Case(format, dtype) for format in FORMATS for dtype in DTYPES]
    has = torch.backends.cpu.get_cpu_capability().lower()
    own = [isa for isa in ("avx512", "avx2") if isa in (has, "avx2" if has == "avx512" else "")]
    counts = {isa: [executed_here(isa, case) for case in cases] for isa in own}
    if not args.no_arm:
        counts |= {isa: executed_on_arm(isa, cases) for isa in ("sve", "neon")}
    names = [f"{isa}, {WIDTHS[isa]} lanes" for isa in counts]
    print("| AdamW | parameters | " + " | ".join(names) + " |")
    print("| --- | --- |" + " ---: |" * len(names))
    for case, of_case in zip(cases, zip(*counts.values())):
        cells = " | ".join(f"{count:.0f}" for count in of_case)
        print(f"| {case.format} | {DTYPES[case.dtype]} | {cells} |")


if __name__ == "__main__":
    main()
