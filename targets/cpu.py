"""``cpu``, ``cpu:avx512``, ``cpu:avx2``, ``cpu:portable``: the CPU of this machine, or a narrower part of it."""

from __future__ import annotations

from sparsec.targets.base import Target
from sparsec.targets.detect import detect


def make(variant: str) -> Target:
    """``variant``: an ISA, or empty for SPARSEC_ISA or else the widest. Raises BadOptionValue."""
    return detect(variant)
