"""Tests that need a GPU: ``make gpu-test``. Without one they are skipped with the reason; a table ends the run."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

# Machines with a GPU often hold many packages, and one that some library installed as "tests" hides this folder.
_path: Any = importlib.import_module("tests").__path__
if not any(Path(place).resolve() == Path(__file__).resolve().parents[1] for place in _path):
    _path.insert(0, str(Path(__file__).resolve().parents[1]))


def reason() -> str:
    """Why nothing can run here; empty where it can."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is for kernels on CPU tensors"
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no NVIDIA GPU"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = reason()
    if not why:
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=why))


TABLE = pytest.StashKey[list[tuple[str, ...]]]()


@pytest.fixture(scope="session")
def gpu_table(request: pytest.FixtureRequest) -> list[tuple[str, ...]]:
    """Lines for the table at the end: family, format, loop, cases, worst error, same bits, verdict."""
    return request.config.stash.setdefault(TABLE, [])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(TABLE, [])
    if not rows:
        return
    head = ("family", "format", "loop", "cases", "worst error / allowed", "same bits", "verdict")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    terminalreporter.section(f"kernels on {torch.cuda.get_device_name()}")
    for row in (head, *sorted(rows)):
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
