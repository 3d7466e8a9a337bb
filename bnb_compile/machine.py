"""What a machine has to compile steps with: questions, which may raise where something is broken."""

from __future__ import annotations

import functools
import importlib
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.torch_version import TorchVersion

from .version import LEAST_TORCH, LEAST_TRITON, VERSION

_HOW_TO_COMPILE = {
    "linux": "install one (apt install g++, dnf install gcc-c++, conda install gxx), or set CXX",
    "darwin": "xcode-select --install, or set CXX",
    "win32": "install Visual Studio's Build Tools and start from their command prompt, or set CXX",
}
Answer = tuple[str, "str | None"]  # value and missing


@functools.cache
def import_error() -> Exception | None:
    """Why Inductor cannot be imported, None if it can. A second import would say something else."""
    try:
        importlib.import_module("bnb_compile.lowering")
    except Exception as error:
        return error
    return None


def _inductor() -> Any:
    error = import_error()
    if error is not None:
        raise error
    return importlib.import_module("bnb_compile.lowering._inductor")


def _torch() -> Answer:
    old = TorchVersion(torch.__version__) < LEAST_TORCH
    return str(torch.__version__), f"pip install 'torch>={LEAST_TORCH}'" if old else None


def _triton() -> Answer:
    get = f"pip install 'triton>={LEAST_TRITON}'"
    try:
        import triton
    except ImportError as error:
        return "none", f"{error}: {get}; a CPU does without" if not gpus() else f"{error}: {get}"
    old = TorchVersion(triton.__version__) < LEAST_TRITON
    return triton.__version__, get if old else None


def _compiler() -> Answer:
    inductor = _inductor()
    try:
        name = inductor.get_cpp_compiler()
    except RuntimeError:
        given = os.environ.get("CXX")
        how = _HOW_TO_COMPILE.get(sys.platform, "set CXX")
        if shutil.which("clang++"):
            how = "set CXX=clang++, which is there"
        return "none", f"{'no g++' if given is None else f'CXX={given} does not run'}: {how}"
    version = re.search(r"(gcc|clang) version [\d.]+", inductor.get_compiler_version_info(name))
    return f"{name}, {version[0] if version else 'of an unknown version'}", None


def _headers() -> Answer:
    path = Path(sysconfig.get_path("include")) / "Python.h"
    how = "kernels are Python modules: apt install python3-dev, dnf install python3-devel, or another Python"
    return (str(path), None) if path.exists() else (f"no {path}", how)


def _vectors() -> Answer:
    isa = _inductor().pick_vec_isa()
    if not isa:
        return "none", importlib.import_module("bnb_compile.lowering.cpp.source").WITHOUT_VECTORS
    by_hand = {"CPU_CAPABILITY_AVX512", "CPU_CAPABILITY_AVX2"} & set(isa.build_macro())
    codes = "by permutations" if by_hand else "in its portable form, where states='ratio8' is faster"
    return f"{isa}, {isa.nelements()} numbers at a time, the map of dynamic8 {codes}", None


def _threads() -> Answer:
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = torch.get_num_threads()
    too_many = f"they wait for one another: set OMP_NUM_THREADS={cpus}" if threads > cpus else None
    return f"{threads} threads on {cpus} CPUs", too_many


def _cache() -> Answer:
    try:  # torch makes the folder when it is imported
        folder = _inductor().cache_dir()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return "none", f"{error}: set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
    return f"{folder}, writable", None


def gpus() -> dict[str, str]:
    """The GPUs that torch sees, by device."""
    found = {}
    for kind in (torch.cuda, torch.xpu):
        name = kind.__name__.removeprefix("torch.")
        for k in range(kind.device_count() if kind.is_available() else 0):
            try:
                of = kind.get_device_properties(k)
            except RuntimeError as error:  # as of a GPU that another process has for itself
                found[f"{name}:{k}"] = f"cannot be used: {error}"
                continue
            capability = f", capability {of.major}.{of.minor}" if name == "cuda" else ""
            found[f"{name}:{k}"] = f"{of.name}{capability}, {of.total_memory / 1e9:.1f} GB"
    return found


def _triton_path() -> Answer:
    if not gpus():
        return "not needed: torch sees no GPU", None
    from torch.utils._triton import has_triton

    how = "triton must be installed, of the version of this torch, and an NVIDIA GPU have capability 7.0"
    return ("usable", None) if has_triton() else ("not usable", how)


#: What is asked, by name.
QUESTIONS: dict[str, Callable[[], Answer]] = {
    "bnb_compile": lambda: (VERSION, None),
    "Python": lambda: (f"{platform.python_version()} on {platform.platform()}", None),
    "torch": _torch,
    "triton": _triton,
    "cache": _cache,
    "C++ compiler": _compiler,
    "Python.h": _headers,
    "vector instructions": _vectors,
    "OpenMP": _threads,
    "Triton on the GPU": _triton_path,
}
