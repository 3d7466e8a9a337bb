"""Draw the pictures of the documentation from what was measured, each for light and for dark pages.

    make pictures                     reads benchmarks/results/, writes docs/images/

Of each kind of result the last file by name counts: memory-DATE.json (of examples/finetune.py),
scaling-DATE.json (benchmarks/scaling.py) and formats-DATE.jsonl (benchmarks/formats.py).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

#: Told apart by people who see few colours, on white and on black (Okabe & Ito's).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999"]
THEMES = {
    "light": {"text": "#24292f", "grid": "#d0d7de"},
    "dark": {"text": "#e6edf3", "grid": "#484f58"},
}


def latest(pattern: str) -> Path:
    """The last file by name.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = sorted(RESULTS.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{RESULTS} has no {pattern}: see the docstring for what writes it")
    return found[-1]


def memory(axis: Axes) -> None:
    """Bytes of a train step by what they are for, a bar for each optimizer."""
    rows = json.loads(latest("memory-*.json").read_text())
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    kinds = list(next(iter(rows.values()))["peak"])
    for kind, colour in zip(kinds, COLOURS):
        sizes = [rows[name]["peak"][kind] / 1e9 for name in names]
        axis.barh(names, sizes, left=left, label=kind, color=colour, height=0.65)
        left = [a + b for a, b in zip(left, sizes)]
    for k, total in enumerate(left):
        axis.text(total + 0.05, k, f"{total:.2f}", va="center")
    numel = next(iter(rows.values()))["numel"]
    axis.set(xlabel=f"GB at the peak of a train step of {numel / 1e6:.0f} million parameters")
    axis.set_xlim(0, max(left) * 1.12)
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower right")


def times(axis: Axes) -> None:
    """Nanoseconds a parameter of a step, by the number of parameters."""
    found = json.loads(latest("scaling-*.json").read_text())
    elements = [int(n) for n in found["steps"]]
    for (name, colour), marker in zip(zip(next(iter(found["steps"].values())), COLOURS), "os^Dv"):
        each = [1e6 * found["steps"][str(n)][name] / n for n in elements]
        axis.plot(elements, each, color=colour, marker=marker, markersize=5, label=name)
    axis.set(xscale="log", yscale="log", xlabel="elements of one float32 tensor")
    axis.set_ylabel(f"ns an element, {found['threads']} threads")
    axis.legend()


def compiling(axis: Axes) -> None:
    """Seconds of a first step, by the number of tensors."""
    found = json.loads(latest("scaling-*.json").read_text())
    tensors = [int(n) for n in found["first steps"]]
    for (name, colour), marker in zip(zip(next(iter(found["first steps"].values())), COLOURS), "os^"):
        seconds = [found["first steps"][str(n)][name] for n in tensors]
        axis.plot(
            tensors, [math.nan if s is None else s for s in seconds], color=colour, marker=marker, label=name
        )
    axis.set(xscale="log", xlabel="tensors of 40 shapes", ylabel="s, the first step with nothing cached")
    axis.set_ylim(bottom=0)
    axis.legend()


def displacement(axis: Axes) -> None:
    """Error of 2,000 steps of AdamW beside float64, a group for each kind of gradients."""
    rows = [json.loads(line) for line in latest("formats-*.jsonl").read_text().splitlines()]
    cases = {"iid": "Gaussian", "mean": "strong mean", "t2": "heavy tails", "log4": "4 decades\na block",
             "sparse": "sparse", "rows": "rare rows", "drift": "drift"}  # fmt: skip
    wanted = ("dynamic8", "dynamic8sr", "ratio8", "ratio4_8", "ratio4")
    moved = {row["format"]: row["cases"] for row in rows if row["part"] == "displacement"}
    width = 0.8 / len(wanted)
    for j, (name, colour) in enumerate(zip(wanted, COLOURS)):
        errors = [moved[name][case]["error"] for case in cases]
        places = [k + (j - (len(wanted) - 1) / 2) * width for k in range(len(cases))]
        axis.bar(places, errors, width, label=name, color=colour)
    axis.set_xticks(range(len(cases)), cases.values())
    axis.set(yscale="log", ylabel="error of the displacement")
    axis.grid(axis="x", visible=False)
    axis.legend(ncols=len(wanted), loc="upper center", bbox_to_anchor=(0.5, 1.12))


def losses(axis: Axes) -> None:
    """Validation loss of a small GPT less float32's, the mean of the seeds with its standard error."""
    rows = [json.loads(line) for line in latest("formats-*.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["part"] == "train" and row["task"] == "gpt"]
    base = {row["seed"]: row["curve"] for row in trained if row["format"] == "float32"}
    steps, count = trained[0]["steps"], len(next(iter(base.values())))
    places = [steps * (k + 1) / count for k in range(count)]
    names = [name for name in dict.fromkeys(row["format"] for row in trained) if name != "float32"]
    for name, colour in zip(names, COLOURS):
        curves = [
            [a - b for a, b in zip(row["curve"], base[row["seed"]])]
            for row in trained
            if row["format"] == name and row["seed"] in base
        ]
        means = [statistics.mean(of_step) for of_step in zip(*curves)]
        axis.plot(places, means, color=colour, label=f"{name}, {len(curves)} seeds")
        if len(curves) > 1:
            errors = [statistics.stdev(of_step) / len(curves) ** 0.5 for of_step in zip(*curves)]
            below, above = zip(*((m - e, m + e) for m, e in zip(means, errors)))
            axis.fill_between(places, below, above, color=colour, alpha=0.15, linewidth=0)
    axis.axhline(0, color="gray", linewidth=1)
    axis.set(xlabel="steps", ylabel="validation loss less float32's")
    axis.legend()


PICTURES: dict[str, Callable[[Axes], None]] = {
    "memory": memory, "times": times, "compiling": compiling, "displacement": displacement, "losses": losses
}  # fmt: skip


def style(theme: dict[str, str]) -> dict[str, Any]:
    """Matplotlib's settings for a page; the background is the page's own."""
    of_text = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme["text"])
    return {
        **of_text,
        "axes.edgecolor": theme["grid"],
        "grid.color": theme["grid"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 11,
        "figure.figsize": (8, 3.8),
        "figure.constrained_layout.use": True,
        "savefig.transparent": True,
        "savefig.dpi": 130,
    }


def draw(names: list[str], folder: Path) -> Iterator[Path]:
    """Draw pictures, each in both themes; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for theme, colours in THEMES.items():
            with pyplot.rc_context(style(colours)):
                figure, axis = pyplot.subplots()
                PICTURES[name](axis)
                path = folder / f"{name}-{theme}.png"
                figure.savefig(path)
                pyplot.close(figure)
                yield path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--only", nargs="+", choices=PICTURES, default=list(PICTURES))
    args = parser.parse_args()
    for path in draw(args.only, args.out):
        print(path)


if __name__ == "__main__":
    main()
