"""Train a small GPT under FSDP2 with 8-bit AdamW, on one mesh, and go on from its checkpoint on others.

    python examples/distributed.py                            two processes, then one and three; no launcher
    torchrun --nproc-per-node 2 examples/distributed.py       one run, of the processes that there are

`train` below is what a script needs: shard the model, make the optimizer of its parameters, save both with
torch.distributed.checkpoint. Nothing in it is of this package but the class of the optimizer.
"""

import argparse
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from gpt import GPT, Size, loss_of
from text import read_text, windows
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bnb_compile.optim import AdamW8bit

SIZE = Size(layers=2)
BATCH = 12  # windows of all processes together


def make_mesh(args: argparse.Namespace, device: str) -> DeviceMesh:
    """All processes, in a mesh of the dimensions that are asked for."""
    world = dist.get_world_size()
    inner = 2 if args.tp or args.hsdp else 1
    if world % inner:
        raise SystemExit(f"{world} processes, must be a multiple of 2 with --tp and --hsdp")
    if args.tp:
        return init_device_mesh(device, (world // 2, 2), mesh_dim_names=("shard", "tensor"))
    if args.hsdp:
        return init_device_mesh(device, (world // 2, 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (world,), mesh_dim_names=("shard",))


def shard(model: nn.Module, mesh: DeviceMesh, args: argparse.Namespace) -> None:
    """Distribute the parameters of a model."""
    if args.tp:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, mesh["tensor"], plan)
    of_fsdp = mesh["shard"] if args.tp else mesh
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if args.offload else {}
    for block in model.blocks:
        fully_shard(block, mesh=of_fsdp, **options)
    fully_shard(model, mesh=of_fsdp, **options)


def train(args: argparse.Namespace, text: Tensor) -> list[float]:
    """Take the steps from the checkpoint on, or all; returns the losses, the same in every process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, mesh = dist.get_rank(), make_mesh(args, device)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.manual_seed(0)
    model = GPT(SIZE).to(device)
    shard(model, mesh, args)
    optimizer = AdamW8bit(model.parameters(), lr=1e-3, weight_decay=0.1, max_grad_norm=1.0)
    begin = 0
    if args.resume:
        begin = args.steps // 2
        saved: dict[str, Any] = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        checkpoint.load(saved, checkpoint_id=args.checkpoint)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])

    # Clipping is a part of the step; torch's clip_grad_norm_ cannot add norms of several meshes (--tp).
    step = torch.compile(optimizer.step, fullgraph=True)
    # The processes that have the same part of the batch are those of tensor parallelism.
    parts = dist.get_world_size() // (2 if args.tp else 1)
    part = rank // (2 if args.tp else 1)
    losses = []
    for k in range(begin, args.steps):
        if k == args.steps // 2 and not args.resume:
            model_state, optimizer_state = get_state_dict(model, optimizer)
            checkpoint.save(
                {"model": model_state, "optimizer": optimizer_state}, checkpoint_id=args.checkpoint
            )
        generator = torch.Generator().manual_seed(k)
        starts = torch.randint(len(text) - SIZE.context, (BATCH,), generator=generator)
        x, y = windows(text, starts.chunk(parts)[part], SIZE.context)
        loss = loss_of(model, x.to(device), y.to(device))
        loss.backward()
        step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / dist.get_world_size())
        if rank == 0 and (k + 1) % max(1, args.steps // 6) == 0:
            print(f"  step {k + 1:4}   loss {losses[-1]:.4f}", flush=True)
    return losses


def process(rank: int, world: int, port: int, args: argparse.Namespace, text: Tensor, out: str) -> None:
    """One process of a run without a launcher."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=rank, world_size=world)
    losses = train(args, text)
    if rank == 0:
        torch.save(losses, out)
    dist.destroy_process_group()


def run(world: int, args: argparse.Namespace, text: Tensor, **options: Any) -> list[float]:
    """Train in processes of its own."""
    args = argparse.Namespace(**{**vars(args), **options})
    with socket.socket() as found, tempfile.TemporaryDirectory() as folder:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        out = f"{folder}/losses.pt"
        torch.multiprocessing.spawn(process, (world, port, args, text, out), nprocs=world)
        return torch.load(out)


def plot(curves: dict[str, tuple[int, list[float]]], path: Path) -> None:
    """Draw loss curves on top of each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for width, (name, (begin, losses)) in zip((6, 3, 1.5), curves.items()):
        axes.plot(range(begin + 1, begin + 1 + len(losses)), losses, label=name, linewidth=width, alpha=0.7)
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tp", action="store_true", help="tensor parallelism in pairs, under FSDP")
    parser.add_argument("--hsdp", action="store_true", help="shard in pairs, replicate over the pairs")
    parser.add_argument("--offload", action="store_true", help="parameters and states in the host's memory")
    parser.add_argument("--data", type=Path, help="a file or folder of text")
    parser.add_argument("--out", type=Path, default=Path("runs/distributed"))
    parser.add_argument("--resume", action="store_true", help="with torchrun: go on from the checkpoint")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.checkpoint = str(args.out / "checkpoint")
    text, _ = read_text(args.data, SIZE.context + 1)
    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        train(args, text)
        dist.destroy_process_group()
        return
    pairs = 2 if args.tp or args.hsdp else 1
    worlds = [2 * pairs, pairs, 3 * pairs]
    curves = {}
    for world in worlds:
        resumes = world != worlds[0]
        print(f"{world} processes" + (f", from the checkpoint of {worlds[0]}" if resumes else ""), flush=True)
        losses = run(world, args, text, resume=resumes)
        curves[f"{world} processes"] = (args.steps // 2 if resumes else 0, losses)
    first = curves[f"{worlds[0]} processes"][1][args.steps // 2 :]
    print("| resumed on | last loss | largest difference of a loss |\n|---|--:|--:|")
    for name, (begin, losses) in curves.items():
        apart = max(abs(a - b) for a, b in zip(losses[-len(first) :], first))
        print(f"| {name}{'' if begin else ', not interrupted'} | {losses[-1]:.4f} | {apart:.1e} |")
    plot(curves, args.out / "loss.png")
    print(f"curves: {args.out / 'loss.png'}")
    if any(abs(losses[-1] - first[-1]) > 0.05 for _, losses in curves.values()):
        sys.exit("the curves are not on top of each other")


if __name__ == "__main__":
    main()
