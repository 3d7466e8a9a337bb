"""Vectors in C++: what each instruction set adds to ATen's, a file each; any.h lists what it must have."""

from __future__ import annotations

import functools
from pathlib import Path

#: Where the file of an instruction set holds.
_CONDITIONS = {
    "avx512": "defined(CPU_CAPABILITY_AVX512)",
    "avx2": "defined(CPU_CAPABILITY_AVX2)",
    "sve": "defined(CPU_CAPABILITY_SVE256)",
    "neon": "defined(__aarch64__)",
}
_OWN_MASKS = ("avx512", "sve")


@functools.cache
def text() -> str:
    """All of it; the compiler chooses."""
    lines = [_read("any")]
    lines += [f"#if !({' || '.join(_CONDITIONS[name] for name in _OWN_MASKS)})", _read("masks"), "#endif"]
    for k, (name, condition) in enumerate(_CONDITIONS.items()):
        lines += [f"#{'elif' if k else 'if'} {condition}", _read(name)]
    return "\n".join([*lines, "#else", _read("portable"), "#endif"])


def _read(name: str) -> str:
    return (Path(__file__).parent / f"{name}.h").read_text()
