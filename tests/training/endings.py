"""A pair of processes that exchange something and end: `python endings.py HOW FOLDER`, with HOW they part.

Fails if gloo's threads are there when Python goes down: one that still holds a tensor then aborts its process. The
processes keep to the interpreter until they wait for something, so that it often does hold one.
"""

import atexit
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from psenet import ranks


def threads() -> list[str]:
    """Return the names of this process's threads, as Linux knows them."""
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]


def fail_if_gloo_is_there() -> None:
    if left := [name for name in threads() if "gloo" in name]:
        print("left at the end:", *left, flush=True)
        os._exit(1)


def exchange(how: str, rank: int, meeting: Path) -> None:
    atexit.register(fail_if_gloo_is_there)  # which is called after what is registered later
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    layer = nn.Linear(50, 50)
    layer(torch.ones(3, 50)).sum().backward()
    ranks.average_gradients(layer)
    ranks.average_statistics(nn.BatchNorm1d(4))
    assert any("gloo" in name for name in threads())
    if how == "leave":
        ranks.leave()
    elif how == "destroy":
        dist.destroy_process_group()
    else:
        assert how == "nothing"


def main(how: str, folder: str) -> None:
    torch.set_num_threads(1)
    sys.setswitchinterval(1000)
    children = []
    for rank in (0, 1):
        child = os.fork()
        if not child:
            exchange(how, rank, Path(folder) / "meeting")
            return
        children.append(child)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))


if __name__ == "__main__":
    main(*sys.argv[1:])
