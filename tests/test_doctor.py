"""What `bnb_compile.doctor` says of machines that have everything, and of ones that lack something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bnb_compile import doctor, machine
from bnb_compile.version import LEAST_TORCH, LEAST_TRITON

pytestmark = pytest.mark.quick

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def run(before: str = "pass", **env: str) -> tuple[int, dict[str, Any], dict[str, dict[str, Any]]]:
    """Exit status of ``python -m bnb_compile.doctor --json``, what it printed, and its findings by name."""
    code = (
        "import runpy, sys; sys.argv[1:] = ['--json']; "
        f"{before}; runpy.run_module('bnb_compile.doctor', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    report = json.loads(done.stdout)
    return done.returncode, report, {x["name"]: x for x in report["findings"]}


@pytest.mark.long
def test_a_machine_with_everything() -> None:
    status, report, found = run()
    assert status == 0 and report["compiles"]
    (trial,) = (trial for trial in report["trials"] if trial["device"] == "cpu")
    assert trial["ran"] == "kernel" and trial["why"] is None and trial["seconds"] > 0
    assert [found[name]["missing"] for name in ("torch", "C++ compiler", "Python.h", "cache")] == [None] * 4
    assert found["torch"]["value"] == torch.__version__
    assert re.search("(gcc|clang) version [0-9]", found["C++ compiler"]["value"])
    assert " numbers at a time" in found["vector instructions"]["value"]
    assert found["cache"]["value"].startswith(os.environ["TORCHINDUCTOR_CACHE_DIR"])


@pytest.mark.long
def test_a_machine_without_compiler_and_triton() -> None:
    missing = "sys.modules['triton'] = None"
    status, report, found = run(missing, PATH="", CXX="/nowhere/c++")
    assert status == 1 and not report["compiles"]
    (trial,) = report["trials"][:1]
    assert (trial["ran"], trial["why"]) == ("eager reference", "there is no C++ compiler")
    assert found["C++ compiler"]["value"] == found["triton"]["value"] == "none"
    assert found["C++ compiler"]["missing"].startswith("CXX=/nowhere/c++ does not run: ")
    assert re.search("install|CXX", found["C++ compiler"]["missing"].partition(": ")[2])
    assert f"pip install 'triton>={LEAST_TRITON}'" in found["triton"]["missing"]


@pytest.mark.long
def test_a_machine_without_a_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, report, found = run(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file" / "folder"))
    assert status == 1
    assert "set TORCHINDUCTOR_CACHE_DIR to a folder" in found["cache"]["missing"]
    # torch itself cannot be imported whole then; the first error says why, a second one would not.
    assert "NotADirectoryError" in report["trials"][0]["why"]


def test_compilers_that_are_not_asked_for_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> str:
        raise RuntimeError

    monkeypatch.setattr(machine, "_inductor", lambda: SimpleNamespace(get_cpp_compiler=no_compiler))
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.delenv("CXX", raising=False)
    assert machine.QUESTIONS["C++ compiler"]() == ("none", "no g++: set CXX=clang++, which is there")


def test_a_cpu_without_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_inductor", lambda: SimpleNamespace(pick_vec_isa=lambda: None))
    value, missing = machine.QUESTIONS["vector instructions"]()
    assert value == "none" and missing and "20 times slower" in missing


def test_more_threads_than_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    value, missing = machine.QUESTIONS["OpenMP"]()
    assert value.startswith("10000 threads on ") and missing and "set OMP_NUM_THREADS=" in missing


def test_versions_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert machine.QUESTIONS["torch"]() == ("2.9.1+cpu", f"pip install 'torch>={LEAST_TORCH}'")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.0"))
    assert machine.QUESTIONS["triton"]() == ("3.5.0", f"pip install 'triton>={LEAST_TRITON}'")


def test_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=150_754_820_096)

    def properties(k: int) -> Any:
        if k:
            raise RuntimeError("busy")
        return card

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    first = "NVIDIA H200, capability 9.0, 150.8 GB"
    assert machine.gpus() == {"cuda:0": first, "cuda:1": "cannot be used: busy"}


def test_a_question_that_raises_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    def question() -> machine.Answer:
        raise AttributeError("gone")

    monkeypatch.setattr(doctor, "QUESTIONS", {"torch": question})
    monkeypatch.setattr(doctor, "_try", lambda device: doctor.Trial(device, "kernel", 1.0))
    report = doctor.examine()
    assert report.findings[0] == doctor.Finding("torch", "unknown", "AttributeError: gone")
    assert "-> AttributeError: gone" in str(report) and "step on cpu " in str(report)


def test_a_kernel_that_is_wrong_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(device: str, compile: bool | str) -> torch.Tensor:
        doctor.backends.counts["kernel"] += compile == "auto"
        return torch.full((3,), float("nan") if compile else 0.0)

    monkeypatch.setattr(doctor, "_step", step)
    trial = doctor._try("cpu")
    assert trial.ran == "kernel" and trial.why and "nan from the eager reference" in trial.why
    assert not doctor.Report([], [trial]).compiles


def test_a_step_that_raises_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(device: str, compile: bool | str) -> torch.Tensor:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(doctor, "_step", step)
    assert doctor._try("cuda:0")[::3] == ("cuda:0", "RuntimeError: CUDA error")


@pytest.mark.skipif(not PROJECT.exists(), reason="not run from a checkout")
def test_pyproject_asks_for_the_same_versions() -> None:
    asked = dict(re.findall(r'"(torch|triton)>=([\d.]+)', PROJECT.read_text()))
    assert asked == {"torch": LEAST_TORCH, "triton": LEAST_TRITON}
