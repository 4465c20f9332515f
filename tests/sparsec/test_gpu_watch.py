"""Calls on a GPU leave the kernel that skips when too little is skipped, and come back, by counts that come late."""

from __future__ import annotations

import torch

from sparsec.runtime.gpu_watch import LOOK, REST, Watch

X = torch.zeros(1, 4)


def calls(watch: Watch, counts: list[int]) -> list[bool]:
    """One call for each count: what it would leave. Which of them took the kernel that skips."""
    taken = []
    for count in counts:
        skips = watch.tries(X)
        taken.append(skips)
        if skips and (asked := watch.counter(X)) is not None:
            watch.note(asked.fill_(count))
    return taken


def test_calls_with_zeros_enough_go_on_skipping_and_few_are_counted() -> None:
    watch = Watch(50, 100)
    assert all(calls(watch, [30] * 200))
    assert (watch.calls, watch.skipped) == (200, 200)
    assert watch.looked <= 200 // LOOK + 2
    assert watch.left == 30 * watch.looked


def test_too_few_zeros_end_it_after_two_counts_and_it_is_tried_again_later() -> None:
    watch = Watch(50, 100)
    taken = calls(watch, [90] * (3 + 2 * REST))
    assert taken[:3] == [True, True, False]
    assert sum(taken[3:]) == 1
    assert taken.index(True, 3) == 2 + REST


def test_one_unusual_token_changes_nothing() -> None:
    watch = Watch(50, 100)
    assert all(calls(watch, [90, *[30] * 100]))


def test_it_comes_back_when_the_zeros_do() -> None:
    watch = Watch(50, 100)
    calls(watch, [90] * 10)
    taken = calls(watch, [20] * (2 * REST))
    assert not all(taken)
    assert all(taken[REST:])


def test_a_count_that_is_on_its_way_is_waited_for_by_no_call() -> None:
    class Later:
        here = False
        host = torch.tensor([90], dtype=torch.int32)

    watch = Watch(50, 100)
    later = Later()
    for _ in range(100):
        assert watch.tries(X)
        if watch.counter(X) is not None:
            watch.coming = later  # type: ignore[assignment]
    assert watch.looked == 0
    later.here = True
    watch.tries(X)
    assert watch.looked == 1
