"""Large packs lie in large pages where the system has them, and stay the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sparsec.codegen.cpp import pack_verified
from sparsec.codegen.cpp.pages import PAGE, in_large_pages
from sparsec.formats import Format

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def in_huge_pages(address: int) -> int:
    """Bytes in pages of 2 MiB in the mapping that holds an address, by /proc/self/smaps."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="this system has no large pages to give")
def test_a_large_pack_is_in_large_pages() -> None:
    weight = torch.randn(4096, 2048)
    packed = pack_verified(weight, Format.parse("panel+fp32"), "key")
    (largest,) = sorted(packed.tensors, key=lambda t: -t.nbytes)[:1]
    granted = in_large_pages([largest])
    assert granted >= largest.nbytes - 2 * PAGE
    found = in_huge_pages(largest.data_ptr() + PAGE)
    if not found:
        pytest.skip("the kernel is older than 6.1, or has no large page free now")
    assert found >= granted // 2


@pytest.mark.parametrize("size", [0, 1, 1000, PAGE, 3 * PAGE + 8])
def test_values_stay_and_small_tensors_are_left_alone(size: int) -> None:
    tensor = torch.arange(size // 8)
    before = tensor.clone()
    granted = in_large_pages([tensor, tensor[1:]])
    assert granted % PAGE == 0
    assert granted <= 2 * tensor.nbytes
    assert torch.equal(tensor, before)


def test_where_the_system_has_no_such_call_nothing_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.codegen.cpp.pages._madvise", lambda: None)
    assert in_large_pages([torch.zeros(1 << 22)]) == 0
