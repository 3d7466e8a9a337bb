"""The types of devices that this package compiles for."""

from __future__ import annotations

import importlib.util
import os
import shutil

from .backends import BACKENDS, LOWERINGS, Backend


def _no_compiler() -> str | None:
    names = os.environ.get("CXX", "g++"), "clang++"
    return None if any(map(shutil.which, names)) else "there is no C++ compiler"


def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "there is no triton"


LOWERINGS.append("bnb_compile.lowering")
BACKENDS["cpu"] = Backend("bnb_compile.lowering.cpp", _no_compiler)
BACKENDS["cuda"] = Backend("bnb_compile.lowering.triton", _no_triton)  # ROCm too
BACKENDS["xpu"] = Backend("bnb_compile.lowering.triton", _no_triton)
