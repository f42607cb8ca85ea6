"""Work spread over the processes that `accelerate launch` or `torchrun` started; one process where neither did.

    accelerate launch --multi_gpu --num_processes 4 main.py collect

Every process runs the same program and reads the same inputs. Only `spread` splits work; what it returns is the same
on all of them, in the order of one process. Files are for the main process to write.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

Result = TypeVar("Result")


def process_count() -> int:
    """How many processes run this program, over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes files."""
    return int(os.environ.get("RANK", 0)) == 0


def on_cpu() -> bool:
    """Whether several processes share no GPU: accelerate has to be told, or each takes itself for the only one."""
    return process_count() > 1 and not torch.cuda.is_available()


def connect() -> None:
    """Join the other processes, if there are any. What they exchange are small objects, so gloo serves GPUs as well."""
    if process_count() > 1:
        PartialState(cpu=on_cpu(), backend="gloo")


def share_out(sizes: Sequence[float], processes: int) -> list[list[int]]:
    """Numbers of the pieces of work that each process takes: the largest first, always to the one with least to do.

    >>> share_out([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = min(range(processes), key=lambda process: (loads[process], process))
        shares[least].append(piece)
        loads[least] += sizes[piece]
    return [sorted(share) for share in shares]


def spread(work: Callable[[int], Result], sizes: Sequence[float], title: str | None = None) -> list[Result]:
    """`[work(0), work(1), ...]` on every process, each piece worked out by one of them; `sizes` says how long each is.

    All processes have to call it, with equal sizes. With `title` the main process shows how far its share is.
    """
    hidden = title is None or not is_main_process()
    mine: Sequence[int] = range(len(sizes))
    if process_count() > 1:
        connect()
        mine = share_out(sizes, process_count())[int(os.environ["RANK"])]
    done = [(piece, work(piece)) for piece in tqdm(mine, desc=title, leave=False, disable=hidden)]
    gathered = dict(gather_object(done) if process_count() > 1 else done)
    return [gathered[piece] for piece in range(len(sizes))]


def from_main(work: Callable[[], Result]) -> Result:
    """What `work` returns on the main process, which alone runs it, on every process."""
    if process_count() == 1:
        return work()
    connect()
    result = [work() if is_main_process() else None]
    broadcast_object_list(result)
    return result[0]


@contextmanager
def one_first() -> Iterator[None]:
    """One process of each machine goes through the block first, the others after it: they find what it downloaded."""
    if process_count() == 1:
        yield
        return
    connect()
    with PartialState().local_main_process_first():
        yield
