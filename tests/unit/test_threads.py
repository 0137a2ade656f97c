"""Work shared out over threads."""

import multiprocessing
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from megatron_mile.ops.threads import share_out


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    """Allow three threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def _squares(count: int) -> tuple[list[int], set[int], set[int]]:
    """Return the squares of `count` numbers, who computed them, and with how many threads each."""
    results, workers, splits = [0] * count, set(), set()
    meeting = threading.Barrier(min(count, 3), timeout=30)

    def work(items: Iterator[int]) -> None:
        meeting.wait()  # so that no worker takes all before another starts
        workers.add(threading.get_ident())
        splits.add(torch.get_num_threads())
        for item in items:
            results[item] = item * item

    share_out(work, range(count))
    return results, workers, splits


# Fewer, as many, and more items than threads.
@pytest.mark.parametrize("count", [2, 3, 40])
def test_share_out_does_every_item_on_threads_that_compute_alone(count: int) -> None:
    results, workers, splits = _squares(count)
    assert results == [item * item for item in range(count)]
    assert len(workers) == min(count, 3)
    assert threading.get_ident() not in workers
    assert splits == {1}


@pytest.mark.parametrize("count", [0, 1])
def test_share_out_of_one_item_stays_in_the_calling_thread(count: int) -> None:
    seen: list[tuple[int, int]] = []
    share_out(lambda items: seen.extend((x, threading.get_ident()) for x in items), range(count))
    assert seen == [(0, threading.get_ident())] * count


def test_share_out_raises_what_a_thread_raised() -> None:
    def work(items: Iterator[int]) -> None:
        for item in items:
            if item == 17:
                raise KeyError("seventeen")

    with pytest.raises(KeyError, match="seventeen"):
        share_out(work, range(40))


def test_share_out_stops_all_threads_where_one_raises() -> None:
    done: list[int] = []

    def work(items: Iterator[int]) -> None:
        for item in items:
            if item == 0:
                raise ValueError("broken")
            time.sleep(0.05)
            done.append(item)

    with pytest.raises(ValueError, match="broken"):
        share_out(work, range(40))
    ended = len(done)
    time.sleep(0.2)
    assert len(done) == ended <= 3


def test_share_out_keeps_inference_mode() -> None:
    with torch.inference_mode():
        values = torch.zeros(40)

        def work(items: Iterator[int]) -> None:
            for item in items:
                values[item] = item

        share_out(work, range(40))
    assert torch.equal(values, torch.arange(40.0))


def _child(queue: "multiprocessing.Queue[int]") -> None:
    queue.put(_squares(40)[0][39])


# Newer Pythons warn of any fork beside threads; the child uses none of its parent's.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_share_out_works_in_a_forked_child() -> None:
    _squares(40)  # the parent has its threads by now
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    try:
        assert queue.get(timeout=60) == 39 * 39
    finally:
        child.kill()
        child.join()
