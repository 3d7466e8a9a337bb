"""What this machine has to compile optimizer steps with, tried: ``python -m bnb_compile.doctor``."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .machine import QUESTIONS, gpus, import_error
from .optim import AdamW8bit


class Finding(NamedTuple):
    """What there is of something.

    Attributes:
        name: Of what.
        value: What was found.
        missing: What is missing or makes steps slow, and what to do; None if nothing.
    """

    name: str
    value: str
    missing: str | None = None


class Trial(NamedTuple):
    """A step of AdamW8bit that was made.

    Attributes:
        device: Where.
        ran: "kernel", "eager reference", or "nothing" if it raised.
        seconds: What it took, compiling included.
        why: It was no kernel, or a wrong one; None if neither.
    """

    device: str
    ran: str
    seconds: float
    why: str | None = None


class Report(NamedTuple):
    """What `examine` returns."""

    findings: list[Finding]
    trials: list[Trial]

    @property
    def compiles(self) -> bool:
        """Whether a kernel ran somewhere, and was right."""
        return any(trial.ran == "kernel" and trial.why is None for trial in self.trials)

    def __str__(self) -> str:
        lines = []
        for name, value, missing in self.findings:
            lines += [f"{name:20} {value}"] + [f"{'':20} -> {missing}"] * bool(missing)
        for device, ran, seconds, why in self.trials:
            package = backends.BACKENDS[device.partition(":")[0]].package
            by = f"{ran} ({package})" if ran == "kernel" else ran
            lines += [f"{'step on ' + device:20} {by}, {seconds:.1f} s with compiling"]
            lines += [f"{'':20} -> {why}"] * bool(why)
        lines += ["steps are compiled" if self.compiles else "nothing can be compiled"]
        return "\n".join(lines)


def examine() -> Report:
    """Look at everything that compiling needs, and make a step on each device."""
    found = [_find(name) for name in QUESTIONS]
    found += [Finding(device, text) for device, text in gpus().items()] or [Finding("GPU", "none")]
    return Report(found, [_try(device) for device in ("cpu", *gpus())])


def _find(name: str) -> Finding:
    try:
        return Finding(name, *QUESTIONS[name]())
    except Exception as error:  # whatever: that is what is wrong here
        return Finding(name, "unknown", f"{type(error).__name__}: {error}")


def _try(device: str) -> Trial:
    start, before = time.perf_counter(), dict(backends.counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says what they do
        try:
            found = _step(device, "auto")
            seconds = time.perf_counter() - start
            compiled = backends.counts["kernel"] > before.get("kernel", 0)
            why = None if compiled else backends.why_uncompiled(torch.device(device).type)
            distance = (found - _step(device, False)).abs().max().item()
            if not distance < 1e-5:
                why = f"the parameter is {distance:g} from the eager reference: please report this"
            return Trial(device, "kernel" if compiled else "eager reference", seconds, why)
        except Exception as raised:  # whatever, too
            error = import_error() or raised
            why = f"{type(error).__name__}: {error}"
            return Trial(device, "nothing", time.perf_counter() - start, why)


def _step(device: str, compile: bool | str) -> Tensor:
    param = torch.nn.Parameter(torch.linspace(-1, 1, 4096, device=device))
    param.grad = torch.linspace(1, -2, 4096, device=device)
    AdamW8bit([param], lr=0.1, compile=compile).step()
    return param.detach().cpu()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if nothing can be compiled, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bnb_compile.doctor", description="Try what compiles.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    as_json = parser.parse_args(arguments).json
    report = examine()
    if as_json:
        found = {key: [x._asdict() for x in rows] for key, rows in report._asdict().items()}
        print(json.dumps({**found, "compiles": report.compiles}, indent=2))
    else:
        print(report)
    return 0 if report.compiles else 1


if __name__ == "__main__":
    sys.exit(main())
