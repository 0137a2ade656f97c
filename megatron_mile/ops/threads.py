"""Independent items of CPU work, shared out over threads that wait for each other only at the end.

torch itself splits every single operation over its threads and waits for all of them before the
next one. For operations on blocks in cache these are thousands of waits per call, and where other
processes use the cores too, each may cost a time slice of the scheduler. Here an item stays with
one thread through all its operations.
"""

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


def share_out(work: Callable[[Iterator[T]], None], items: Iterable[T]) -> None:
    """Run `work` on up to torch.get_num_threads() threads, each with an iterator of its items.

    A thread takes the next item when it is done with one, so which thread gets which is open. An
    exception of any thread is raised here. Tensors of autograd must come detached.
    """
    queue = deque(items)
    allowed = torch.get_num_threads()
    threads = min(allowed, len(queue))
    if threads <= 1:
        return work(_drain(queue))
    inference = torch.is_inference_mode_enabled()  # a state of the thread

    def run() -> None:
        try:
            with torch.inference_mode(inference):
                work(_drain(queue))
        except BaseException:
            queue.clear()  # the others stop too, and nobody writes after the caller goes on
            raise

    pool = _pool(allowed, os.getpid())
    futures = [pool.submit(run) for _ in range(threads)]
    wait(futures)
    for future in futures:
        future.result()


def _drain(queue: "deque[T]") -> Iterator[T]:
    """Yield items until none is left; popleft is safe among threads."""
    while True:
        try:
            item = queue.popleft()
        except IndexError:
            return
        yield item


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of this process (a forked child has none of its parent's)."""
    pool = ThreadPoolExecutor(threads, "megatron_mile", _compute_alone)
    all_started = threading.Barrier(threads)
    for _ in pool.map(lambda _: all_started.wait(), range(threads)):
        pass
    torch.set_num_threads(threads)  # as it was: the setting of new threads is shared by all
    return pool


def _compute_alone() -> None:
    """Keep torch from splitting the operations of the calling thread once more."""
    torch.get_num_threads()  # the first call of a thread sets it up, and would undo the next line
    torch.set_num_threads(1)
