"""Pieces of Triton's text."""

from __future__ import annotations

from collections.abc import Iterable

import torch

#: Dtypes as the language calls them.
LANGUAGE = {
    torch.float32: "tl.float32",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.int8: "tl.int8",
    torch.float8_e4m3fn: "tl.float8e4nv",
    torch.float8_e5m2: "tl.float8e5",
    torch.uint8: "tl.uint8",
}


def function(name: str, arguments: Iterable[str], lines: Iterable[str]) -> str:
    """A jitted function."""
    body = "".join(f"    {line}\n" for line in lines)
    return f"@triton.jit\ndef {name}({', '.join(arguments)}):\n{body}"


def tuple_of(values: Iterable[str]) -> str:
    """A tuple of expressions."""
    return f"({''.join(f'{value}, ' for value in values)})"


def call(name: str, **arguments: object) -> str:
    """A call of a function with arguments by name."""
    return f"{name}({', '.join(f'{argument}={value}' for argument, value in arguments.items())})"
