"""C++ for 64-bit ARM on any machine: compiled by Zig's clang, run by Unicorn, which emulates the processor.

A program is linked with all that it needs. Of an operating system it gets what writes and allocates.
"""

from __future__ import annotations

import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

STACK, STACK_SIZE = 0x7F0000000000, 1 << 20
HEAP, HEAP_SIZE = 0x600000000000, 1 << 26
PAGE = 0x1000
WRITE, WRITEV, EXIT, EXIT_GROUP, BRK, MMAP, MUNMAP = 64, 66, 93, 94, 214, 222, 215
NO_SUCH_CALL = (1 << 64) - 38

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


def compile_program(source: str, folder: Path) -> Path:
    """Compile C++ with torch's headers, vectorised for NEON."""
    for name, text in HEADERS.items():
        (folder / name).write_text(text)
    (folder / "program.cpp").write_text(source)
    include = Path(torch.__file__).parent / "include"
    folders = [folder, include, include / "torch/csrc/api/include", sysconfig.get_path("include")]
    defined = "NDEBUG", "uint=unsigned", "STANDALONE_TORCH_HEADER", "C10_USING_CUSTOM_GENERATED_MACROS"
    macros = *defined, "CPU_CAPABILITY_NEON", "CPU_CAPABILITY=NEON"
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-static"]
    command += ["-std=c++20", "-O2", "-ffp-contract=off", "-w", *(f"-I{path}" for path in folders)]
    command += [*(f"-D{macro}" for macro in macros), "program.cpp", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "program"


def run(program: Path) -> bytes:
    """What a program writes."""
    import unicorn
    from unicorn import arm64_const as arm

    machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
    machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floating point is allowed
    entry, headers = _load(machine, program.read_bytes())
    machine.mem_map(STACK - STACK_SIZE, STACK_SIZE + PAGE)
    machine.mem_map(HEAP, HEAP_SIZE)
    # No arguments, no environment, and what the C library asks for: pages' size, random bytes, its headers.
    auxiliary = [6, PAGE, 25, STACK, 3, headers[0], 4, headers[1], 5, headers[2], 0, 0]
    words = struct.pack(f"<{3 + len(auxiliary)}Q", 0, 0, 0, *auxiliary)
    bottom = STACK - 0x100 - len(words) // 16 * 16
    machine.mem_write(bottom, words)
    machine.reg_write(arm.UC_ARM64_REG_SP, bottom)
    written, used = bytearray(), [HEAP]

    def called(machine: Any, number: int, data: Any) -> None:
        if number != 2:  # not a call of the system
            machine.emu_stop()
            raise RuntimeError(f"exception {number} at {machine.reg_read(arm.UC_ARM64_REG_PC):#x}")
        x = [machine.reg_read(getattr(arm, f"UC_ARM64_REG_X{k}")) for k in range(6)]
        call, result = machine.reg_read(arm.UC_ARM64_REG_X8), 0
        if call in (EXIT, EXIT_GROUP):
            machine.emu_stop()
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

    machine.hook_add(unicorn.UC_HOOK_INTR, called)
    machine.emu_start(entry, 0)
    return bytes(written)


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
