"""C++ for 64-bit ARM on any machine: compiled by Zig's clang, run by Unicorn, which emulates the processor.

A program is linked with all that it needs. Of an operating system it gets what writes and allocates.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnb_compile.formats import layout
from bnb_compile.lowering.cpp import source
from bnb_compile.ops.operator import Modes, StepOp

from .buckets import Bucket

STACK, STACK_SIZE = 0x7F0000000000, 1 << 20
HEAP, HEAP_SIZE = 0x600000000000, 1 << 26
PAGE = 0x1000
WRITE, WRITEV, EXIT, EXIT_GROUP, BRK, MMAP, MUNMAP = 64, 66, 93, 94, 214, 222, 215
NO_SUCH_CALL = (1 << 64) - 38
#: What allows SVE and sets its vectors to 256 bits: CRn, CRm, op0, op1, op2 and the value.
SVE_REGISTERS = {
    "cptr_el3": (1, 1, 3, 6, 2, 1 << 8),
    "zcr_el3": (1, 2, 3, 6, 0, 1),
    "zcr_el2": (1, 2, 3, 4, 0, 1),
    "zcr_el1": (1, 2, 3, 0, 0, 1),
}

#: What Inductor's header asks for and a program of one thread does without.
HEADERS = {
    "omp.h": """
inline int omp_get_max_threads() { return 1; }
inline int omp_get_num_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
inline int omp_in_parallel() { return 0; }
""",
    "assert.h": "#undef assert\n#define assert(x) ((void)0)\n",  # musl declares what torch's headers do
}


#: What Inductor passes for NEON, and for SVE with vectors of 256 bits; without instructions for bfloat16,
#: which Unicorn does not know, and without the library sleef.
FLAGS = {
    "neon": ["-DCPU_CAPABILITY_NEON", "-DCPU_CAPABILITY=NEON"],
    "sve": [
        "-DCPU_CAPABILITY_SVE",
        "-DCPU_CAPABILITY_SVE256",
        "-DCPU_CAPABILITY=SVE256",
        "-mcpu=generic+sve",
        "-msve-vector-bits=256",
    ],
}


def program_of(steps: Sequence[tuple[StepOp, torch.dtype, Modes, Bucket]]) -> str:
    """A program that takes the step of each bucket, and marks its begin and end.

    Args:
        steps: The operator, the dtype of parameters and gradients, the modes, and the bucket: contiguous, and
            with all gradients.

    Returns:
        str: C++. It writes what has become of the parameters, arenas and steps of each bucket in turn.
    """
    texts, calls = ["#include <cstdio>", "#include <unistd.h>"], []
    kernels: dict[tuple, str] = {}
    for k, (op, dtype, modes, b) in enumerate(steps):
        if (op, dtype, modes) not in kernels:
            kernels[op, dtype, modes] = name = f"kernel{k}"
            table = "const int64_t* table, int64_t count, int64_t elements, int64_t blocks"
            rows = "const Parameter* rows = (const Parameter*)table;"
            texts.append(source.kernel(op, modes, name, dtype, dtype, table, rows))
        places = layout(p.numel() for p in b.params)
        arenas = {f"{arena.name}": x for arena, x in zip(op.arenas, b.arenas)}
        tensors = arenas | {"step": b.step, "hyper": b.hyper}
        tensors |= {key: x for key, x in b.options.items() if isinstance(x, Tensor)}
        given = source.state_arguments(op, modes)
        texts += [_array(f"k{k}_{key}", tensors[key]) for key in given]
        texts += [_array(f"k{k}_p{j}", p) for j, p in enumerate(b.params)]
        texts += [_array(f"k{k}_g{j}", g) for j, g in enumerate(b.grads) if g is not None]
        fields = [
            f"(int64_t)k{k}_p{j}, (int64_t)k{k}_g{j}, {s.numel}, {s.offset}, {s.block}, 0, 0, "
            + ", ".join(map(str, source.of_row(s)))
            for j, s in enumerate(places.slots)
        ]
        tensors_given = ", ".join(f"({kind})k{k}_{key}" for key, kind in given.items())
        mark = "write(2, nullptr, 0);"
        calls += [
            f"const int64_t table{k}[] = {{{', '.join(fields)}}};",
            mark,
            f"{kernels[op, dtype, modes]}"
            f"(table{k}, {len(b.params)}, {places.elements}, {places.blocks}, {tensors_given});",
            mark,
        ]
        written = [f"p{j}" for j in range(len(b.params))] + [*arenas, "step"]
        calls += [f"fwrite(k{k}_{key}, 1, sizeof k{k}_{key}, stdout);" for key in written]
    return "\n".join([*texts, "int main() {", *calls, "}"])


def _array(name: str, tensor: Tensor) -> str:
    """A tensor's bytes as C++."""
    data = ", ".join(map(str, tensor.contiguous().view(-1).view(torch.uint8).tolist()))
    return f"alignas(64) unsigned char {name}[] = {{{data}}};"


def compile_program(source: str, folder: Path, isa: str = "neon") -> Path:
    """Compile C++ with torch's headers for one of FLAGS."""
    for name, text in HEADERS.items():
        (folder / name).write_text(text)
    (folder / "program.cpp").write_text(source)
    include = Path(torch.__file__).parent / "include"
    folders = [folder, include, include / "torch/csrc/api/include", sysconfig.get_path("include")]
    defined = "NDEBUG", "uint=unsigned", "STANDALONE_TORCH_HEADER", "C10_USING_CUSTOM_GENERATED_MACROS"
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-static"]
    command += ["-std=c++20", "-O2", "-ffp-contract=off", "-w", *(f"-I{path}" for path in folders)]
    command += [*(f"-D{macro}" for macro in defined), *FLAGS[isa], "program.cpp", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "program"


class Run(NamedTuple):
    """What came of a program.

    Attributes:
        written: Its output.
        marks: How many instructions it had executed whenever it wrote to the standard error output.
    """

    written: bytes
    marks: list[int]


def run(program: Path) -> Run:
    """Run a program to its end."""
    import unicorn
    from unicorn import arm64_const as arm

    machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
    machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20 | 3 << 16)  # floating point and SVE are allowed
    for name in ("cptr_el3", "zcr_el3", "zcr_el2", "zcr_el1"):
        machine.reg_write(arm.UC_ARM64_REG_CP_REG, SVE_REGISTERS[name])
    entry, headers = _load(machine, program.read_bytes())
    machine.mem_map(STACK - STACK_SIZE, STACK_SIZE + PAGE)
    machine.mem_map(HEAP, HEAP_SIZE)
    # No arguments, no environment, and what the C library asks for: pages' size, random bytes, its headers.
    auxiliary = [6, PAGE, 25, STACK, 3, headers[0], 4, headers[1], 5, headers[2], 0, 0]
    words = struct.pack(f"<{3 + len(auxiliary)}Q", 0, 0, 0, *auxiliary)
    bottom = STACK - 0x100 - len(words) // 16 * 16
    machine.mem_write(bottom, words)
    machine.reg_write(arm.UC_ARM64_REG_SP, bottom)
    written, marks, used, executed = bytearray(), [], [HEAP], 0

    def called(machine: Any, number: int, data: Any) -> None:
        if number != 2:  # not a call of the system
            machine.emu_stop()
            raise RuntimeError(f"exception {number} at {machine.reg_read(arm.UC_ARM64_REG_PC):#x}")
        x = [machine.reg_read(getattr(arm, f"UC_ARM64_REG_X{k}")) for k in range(6)]
        call, result = machine.reg_read(arm.UC_ARM64_REG_X8), 0
        if call in (EXIT, EXIT_GROUP):
            machine.emu_stop()
        elif call == WRITE and x[0] == 2:
            marks.append(executed)
        elif call == WRITE:
            written.extend(machine.mem_read(x[1], x[2]))
            result = x[2]
        elif call == WRITEV:
            for k in range(x[2]):
                place, size = struct.unpack("<QQ", machine.mem_read(x[1] + 16 * k, 16))
                written.extend(machine.mem_read(place, size))
                result += size
        elif call == MMAP:
            result, used[0] = used[0], used[0] + -(-x[1] // PAGE) * PAGE
        elif call not in (BRK, MUNMAP):
            result = NO_SUCH_CALL
        machine.reg_write(arm.UC_ARM64_REG_X0, result)

    def entered(machine: Any, address: int, size: int, data: Any) -> None:
        nonlocal executed
        executed += size // 4

    machine.hook_add(unicorn.UC_HOOK_INTR, called)
    machine.hook_add(unicorn.UC_HOOK_BLOCK, entered)
    machine.emu_start(entry, 0)
    return Run(bytes(written), marks)


def _load(machine: Any, elf: bytes) -> tuple[int, tuple[int, int, int]]:
    """Put a program where it wants to be: where it begins; where its headers are, their size and number."""
    entry, offset = struct.unpack_from("<QQ", elf, 24)
    size, count = struct.unpack_from("<HH", elf, 54)
    first = None
    mapped: set[int] = set()
    for k in range(count):
        kind, _, place, address, _, length, in_memory, _ = struct.unpack_from(
            "<IIQQQQQQ", elf, offset + k * size
        )
        if kind != 1:
            continue
        for page in range(address // PAGE, -(-(address + in_memory) // PAGE)):
            if page not in mapped:
                machine.mem_map(page * PAGE, PAGE)
                mapped.add(page)
        machine.mem_write(address, elf[place : place + length])
        first = address - place if first is None else first
    return entry, ((first or 0) + offset, size, count)
