"""Waiting for free cores: the clock, the verdict, and that no wait is endless."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsec import quiet
from sparsec.quiet import others_s, short_of_cores, wait_for_cores


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "_gave_up_at", -1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """CPU seconds that others use in each second, one entry a look; the last one goes on."""
    rates: list[float] = []
    used, at = 0.0, time.monotonic()

    def look() -> float:
        nonlocal used, at
        now = time.monotonic()
        used, at = used + (rates.pop(0) if len(rates) > 1 else rates[0]) * (now - at), now
        return used

    monkeypatch.setattr(quiet, "others_s", look)
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(quiet, "_WINDOW_S", 0.01)
    return rates


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system has no /proc/stat")
def test_the_work_of_another_process_is_seen_and_our_own_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = others_s()
    assert before is not None
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    after = others_s()
    assert after is not None
    assert after - before > 0.4
    ours = time.process_time()
    monkeypatch.setattr(quiet.time, "process_time", lambda: ours + 1000.0)
    less = others_s()
    assert less is not None
    assert less < before - 500


def test_cores_that_nobody_needs_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 8)
    assert not short_of_cores(6.0, 1.0, 2)
    assert short_of_cores(6.5, 1.0, 2)
    assert short_of_cores(0.5, 1.0, 8)
    assert not short_of_cores(0.1, 1.0, 8)


def test_measuring_waits_until_the_cores_are_free(clock: list[float]) -> None:
    clock += [1.0] * 6 + [0.0]
    assert wait_for_cores(2)
    assert clock == [0.0]


def test_no_wait_is_endless_and_a_wait_in_vain_is_not_repeated_at_once(clock: list[float]) -> None:
    clock += [1.0]
    assert not wait_for_cores(2, limit_s=0.05)
    started = time.monotonic()
    assert not wait_for_cores(2, limit_s=30.0)
    assert time.monotonic() - started < 25


def test_without_a_clock_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "others_s", lambda: None)
    assert wait_for_cores(64)
