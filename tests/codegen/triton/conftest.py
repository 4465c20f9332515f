"""Numerics of GPU kernels in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 before triton is imported.

One process either interprets or compiles, so these run in a second call of pytest: ``make test`` makes both.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REASON = "runs in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/codegen/triton (make test does)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=REASON))
