"""How much memory this process holds, and how much more a piece of work made it hold at most.

Linux keeps the highest resident size of a process and lets it be reset; elsewhere only the highest of its whole life is
known, and what a piece of work added is then seen only where it went beyond that.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path

_SELF = Path("/proc/self")


class Resident:
    """Bytes from here on: ``before`` now, ``highest()`` since then. ``peak()`` is of the process's whole life."""

    def __init__(self) -> None:
        self._life = _highest()
        reset = False
        with suppress(OSError):  # not Linux, or a container that forbids it
            (_SELF / "clear_refs").write_text("5")
            reset = True
        self.before = (_status("VmRSS") if reset else 0) or self._life

    def highest(self) -> int:
        return _highest()

    def peak(self) -> int:
        return max(self._life, _highest())


def _highest() -> int:
    if found := _status("VmHWM"):
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(key: str) -> int:
    """Bytes by /proc/self/status; 0 where it does not say."""
    with suppress(OSError, ValueError, IndexError):
        for line in (_SELF / "status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0
