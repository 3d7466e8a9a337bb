"""Tests in several processes: a function runs in each rank of a group, and a rank that fails ends the test.

The processes are started once and kept; each call makes a process group of the first of them, over gloo.
"""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

#: Seconds for a call, and for any wait of a rank for another.
LIMIT = 300


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


_workers: list[_Worker] = []


def _stop() -> None:
    while _workers:
        _workers.pop().stop()


atexit.register(_stop)


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(*args)`` in every rank of a group of `world` processes.

    Args:
        world: Number of processes.
        function: Of a module's top level; `torch.distributed` is initialised around it.
        args: Its arguments, which are pickled, as its results are.

    Returns:
        list: The results by rank.

    Raises:
        AssertionError: If a rank raised something, died, or took too long; all processes are stopped then.
    """
    while len(_workers) < world:
        _workers.append(_Worker())
    ranks = _workers[:world]
    with tempfile.TemporaryDirectory() as folder:
        for rank, worker in enumerate(ranks):
            worker.pipe.send((os.path.join(folder, "store"), rank, world, function, args))
        waiting = {worker.pipe: rank for rank, worker in enumerate(ranks)}
        results: dict[int, Any] = {}
        while waiting:
            for pipe in multiprocessing.connection.wait(list(waiting), LIMIT) or [None]:
                rank = waiting.pop(pipe, None)
                try:
                    failed, result = (True, f"no answer after {LIMIT} s") if pipe is None else pipe.recv()
                except EOFError:
                    failed, result = True, "the process died"
                if failed:
                    _stop()
                    raise AssertionError(f"rank {rank} of {world}: {result}")
                results[rank] = result
    return [results[rank] for rank in range(world)]


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    # Ranks compile the same kernels at once otherwise, into the same files.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    while True:
        try:
            store, rank, world, function, args = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=LIMIT),
            )
            result = False, function(*args)
            dist.destroy_process_group()
        except BaseException:
            # The others may wait for this one: nothing is tidied up, they are all stopped.
            result = True, traceback.format_exc()
        pipe.send(result)
