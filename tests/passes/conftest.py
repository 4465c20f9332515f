"""Fixtures of tests that compile graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """No graph of another test, the same random numbers, and no gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
