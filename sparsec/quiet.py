"""Whether other work takes the cores that a measurement needs: the system's CPU clock in, a verdict out.

The first ``torch.compile`` of a process starts Inductor's pool of compile workers, which load torch for seconds on
every core: just when rates are measured. So measuring waits for a quiet moment, and says whether it had one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_SHARE = 0.25  # of one core; less than that is a system's usual noise
_WINDOW_S = 0.1  # the clock ticks every 10 ms
_LONGEST_S = 10.0
_PATIENCE_S = 60.0  # after waiting in vain, how long not to wait again

_gave_up_at = -_PATIENCE_S


def others_s() -> float | None:
    """CPU seconds that all but this process have used since the system started, with those that the host of a virtual
    machine took; None where the system has no ``/proc/stat``."""
    try:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
    except (OSError, ValueError):
        return None


def short_of_cores(used_s: float, elapsed_s: float, threads: int) -> bool:
    """Whether others, who used ``used_s`` CPU seconds of ``elapsed_s``, left fewer than ``threads`` cores free."""
    spare = max((os.cpu_count() or threads) - threads, 0)
    return used_s > (spare + _SHARE) * max(elapsed_s, _WINDOW_S)


def wait_for_cores(threads: int, limit_s: float = _LONGEST_S) -> bool:
    """Sleep until ``threads`` cores are free, at most ``limit_s``; whether they are. Without a clock, at once True."""
    global _gave_up_at
    started = time.monotonic()
    while True:
        before, at = others_s(), time.monotonic()
        if before is None:
            return True
        time.sleep(_WINDOW_S)
        now = time.monotonic()
        if not short_of_cores((others_s() or before) - before, now - at, threads):
            return True
        if now - _gave_up_at < _PATIENCE_S:
            return False
        if now - started > limit_s:
            _gave_up_at = now
            return False
