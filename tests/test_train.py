import importlib
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 30


pytestmark = pytest.mark.usefixtures("one_thread")  # bitwise equal only where sums have one order


@pytest.fixture(scope="module")
def train():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        module = importlib.import_module("train")
        patch.setattr(module, "SIZE", module.Size(layers=1, width=64, heads=2, context=32))
        yield module


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"the square of {i} is {i * i}\n" for i in range(500)))
    return path


@pytest.fixture(scope="module")
def arguments(text):
    return ["--data", str(text), "--steps", str(STEPS), "--lr", "1e-2"]


@pytest.fixture(scope="module")
def finished(train, arguments, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    # In a process of its own, where nothing but its graphs is counted.
    script = (
        "import sys, torch, train; torch.set_num_threads(1); "
        f"train.SIZE = train.{train.SIZE!r}; sys.exit(train.main(sys.argv[1:]))"
    )
    run = [sys.executable, "-c", script, *arguments, "--out", str(out)]
    path = os.pathsep.join(map(str, (EXAMPLES, EXAMPLES.parent)))
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cells = {}
    for line in done.stdout.splitlines():
        if match := re.fullmatch(r"(\S.*?)  +([\d,.]+) +([\d,.]+)", line):
            cells[match[1]] = [float(cell.replace(",", "")) for cell in match.groups()[1:]]
    return SimpleNamespace(out=out, cells=cells)


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", ["torch", "8bit"])
def test_loss_falls(finished, name):
    losses = load(finished.out / f"{name}.pt")["losses"]
    assert len(losses) == STEPS
    assert losses[0] > 5.0  # log(256) for a model that knows nothing
    assert losses[-1] < 3.0


def test_runs_differ_by_the_optimizer_only(finished):
    ours, torchs = (load(finished.out / f"{name}.pt")["losses"] for name in ("8bit", "torch"))
    assert ours[0] == torchs[0]
    assert ours != torchs
    assert ours == pytest.approx(torchs, rel=0.02)


def test_table_shows_one_graph_one_kernel_for_each_state_format_and_a_third_of_the_memory(finished):
    cells = finished.cells
    assert cells["graphs"] == [1, 1]
    assert cells["recompiles"] == [0, 0]
    assert cells["optimizer kernels per step"] == [1, 2]
    for name in ("training loss", "validation loss", "compile, s", "optimizer step, ms"):
        assert all(0 < cell < math.inf for cell in cells[name])
    torchs, ours = cells["optimizer state, bytes"]
    elements = sum(p.numel() for p in load(finished.out / "8bit.pt")["model"].values())
    assert torchs == pytest.approx(8 * elements, rel=0.01)
    assert ours < torchs / 3


def test_loss_curves_are_drawn(finished):
    assert (finished.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_finished_run_resumes_to_the_same_table(train, finished, arguments, capsys):
    assert train.main([*arguments, "--out", str(finished.out), "--resume"]) == 0
    assert f"{finished.cells['compile, s'][1]:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["torch", "8bit"])
def test_interrupted_run_resumes_exactly(train, finished, arguments, tmp_path, monkeypatch, capsys, name):
    next_batch = train.Run.next_batch
    stop = STEPS // 2 + 1  # not where a checkpoint is due anyway

    def interrupted_batch(run, text):
        if len(run.losses) == stop - 1:
            signal.raise_signal(signal.SIGINT)
        return next_batch(run, text)

    arguments = [*arguments, "--optimizer", name, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "next_batch", interrupted_batch)
        assert train.main(arguments) == 130
    assert f"stopped at step {stop}" in capsys.readouterr().err
    assert len(load(tmp_path / f"{name}.pt")["losses"]) == stop
    assert train.main([*arguments, "--resume"]) == 0
    resumed, whole = load(tmp_path / f"{name}.pt"), load(finished.out / f"{name}.pt")
    assert resumed["losses"] == whole["losses"]
    assert resumed["validation"] == whole["validation"]
    for key, weight in whole["model"].items():
        assert torch.equal(resumed["model"][key], weight), key


def test_loss_that_is_not_finite_stops_and_leaves_the_last_good_checkpoint(train, text, tmp_path):
    arguments = ["--data", str(text), "--steps", "40", "--lr", "1e30"]
    with pytest.raises(SystemExit, match=r"loss is nan at step 2; .*8bit\.pt"):
        train.main([*arguments, "--optimizer", "8bit", "--out", str(tmp_path)])
    saved = load(tmp_path / "8bit.pt")
    assert len(saved["losses"]) == 0
    assert all(weight.abs().max() < 10 for weight in saved["model"].values())


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data", "nowhere.txt"], r"nowhere\.txt"),
        (["--data", "short.txt"], r"too little text in .*short\.txt: 4 bytes to validate on"),
        (["--no-such-option"], "--no-such-option"),
        (["--steps", "0"], "must be positive"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--lr", "inf"], "must be positive and finite"),
        (["--optimizer", "sgd"], "invalid choice: 'sgd'"),
        (["--resume"], "no checkpoint in"),
        (["--out", "short.txt"], r"short\.txt"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    train, arguments, tmp_path, monkeypatch, capsys, extra, message
):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("a" * 40)
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--out", "run", *extra])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        (None, ["--steps", "31"], "with steps 30, not 31"),
        (b"nothing of the kind", [], "is not a checkpoint"),
    ],
)
def test_unfit_checkpoint_is_refused(train, finished, arguments, tmp_path, capsys, content, extra, message):
    content = content or (finished.out / "8bit.pt").read_bytes()
    (tmp_path / "8bit.pt").write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments, "--out", str(tmp_path), "--resume", *extra])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_checkpoint_survives_a_failed_write(train, arguments, tmp_path, monkeypatch):
    args = train.make_parser().parse_args([*arguments, "--out", str(tmp_path)])
    run = train.Run("8bit", args, {})
    run.save()
    before = run.path.read_bytes()

    def full_disk(saved, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        run.save()
    assert run.path.read_bytes() == before


def test_script_exits_with_2_for_missing_data():
    command = [sys.executable, str(EXAMPLES / "train.py"), "--data", "nowhere.txt"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "train.py: error: [Errno 2] No such file or directory: 'nowhere.txt'\n"


def test_every_tenth_file_of_a_folder_is_for_validation(train, tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(chr(ord("a") + i) * 50)
    training, validation = train.read_text(tmp_path, least=33)
    assert bytes(validation.tolist()) == b"j" * 50 + b"t" * 50
    assert not set(training.tolist()) & set(validation.tolist())
    assert len(training) == 900


def test_standard_library_is_the_default_text(train):
    training, validation = train.read_text(None, least=33)
    assert len(training) > 10 * len(validation) / 3 > 100_000
    assert b"import" in bytes(validation.tolist())


# -- fine-tuning ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finetune():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        module = importlib.import_module("finetune")
        patch.setattr(module, "SIZE", module.Size(layers=2, width=128, heads=2, context=24))
        yield module


def test_finetune_compares_memory_and_losses(finetune, text, tmp_path):
    memory = importlib.import_module("memory")
    titles = ["torch AdamW, bfloat16", "ours, releasing"]
    with torch._dynamo.config.patch(trace_autograd_ops=True):  # which compare_one sets for its own process
        rows = {title: finetune.compare_one(title, text, 4) for title in titles}
    for row in rows.values():
        assert len(row["losses"]) == 4 and math.isfinite(row["losses"][-1])
        assert row["peak"]["weights"] == 2 * row["numel"]
    kept, released = (row["peak"] for row in rows.values())
    assert kept["gradients"] > 1.7 * row["numel"]
    assert released["gradients"] < 0.4 * kept["gradients"]  # a layer of two, and no embedding
    assert kept["states"] > 1.9 * released["states"]
    shown = memory.table(rows, row["numel"])
    assert all(f"| {title} |" in shown for title in titles)
    memory.plot(rows, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 10_000
