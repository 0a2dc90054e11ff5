"""Runs a function, or a script, on several gloo processes of this machine."""

import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(ranks: int, function: Callable[..., object], *arguments: object) -> list[object]:
    """`function(rank, *arguments)` on each rank; what each returns, in order.

    An exception on any rank raises here; a rank that waits in vain fails within a minute.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        queue = context.SimpleQueue()
        processes = [
            context.Process(target=_work, args=(queue, folder, rank, ranks, function, arguments))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        results = dict(queue.get() for _ in processes)
        for process in processes:
            process.join()
    for rank, (error, _) in results.items():
        assert error is None, f"rank {rank}:\n{error}"
    return [results[rank][1] for rank in range(ranks)]


def _work(queue, folder: str, rank: int, ranks: int, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    # Results are small, and go through the queue by value.
    mp.set_sharing_strategy("file_system")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=60),
        )
        torch.manual_seed(0)
        queue.put((rank, (None, function(rank, *arguments))))
    except BaseException:
        queue.put((rank, (traceback.format_exc(), None)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# Threads of gloo may outlive the process group, and the end of the interpreter aborts on them.
END = """
import os, sys
sys.stderr.flush()
os._exit(0)
"""


def start_two(script: str, folder: Path, *arguments: str) -> list[subprocess.Popen]:
    """The script in two processes as `torchrun` starts them, its first argument the folder."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-c", script + END, str(folder), *arguments],
            cwd=folder,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": "2",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for all of them; one that failed is an error with what it wrote."""
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
