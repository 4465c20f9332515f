"""What a piece of work adds to the memory of this process, beside what the process had used before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsec import resident
from sparsec.resident import Resident

SIZE = 64 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/clear_refs")


@linux
def test_what_was_freed_before_does_not_hide_what_work_adds() -> None:
    script = f"""
import mmap
from sparsec.resident import Resident
def hold(size):
    with mmap.mmap(-1, size) as held:
        for i in range(0, size, 4096):
            held[i] = 1
hold(4 * {SIZE})
here = Resident()
hold({SIZE})
print(here.before, here.highest(), here.peak())
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, highest, peak = map(int, told.stdout.split())
    assert SIZE * 0.9 < highest - before < SIZE * 1.5
    assert peak > highest + 2 * SIZE


def test_without_a_way_to_reset_it_the_most_of_the_whole_life_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resident, "_SELF", tmp_path / "none")
    here = Resident()
    torch.ones(1000)
    assert here.before > 0
    assert here.highest() >= here.before
    assert here.peak() >= here.highest()
