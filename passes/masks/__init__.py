"""Mask methods by name. To add one: its file in this folder (``contract.py`` says what it is) and a line here."""

from __future__ import annotations

import importlib
from typing import Any

from sparsec.errors import UnknownMethod, did_you_mean, listed

METHODS: dict[str, str] = {
    "magnitude": "sparsec.passes.masks.magnitude:Magnitude",
}


def method_class(name: str) -> type[Any]:
    """The dataclass registered under ``name``; imported now. Raises UnknownMethod."""
    if not isinstance(name, str) or name not in METHODS:
        raise UnknownMethod(name=name, nearest=did_you_mean(str(name), METHODS), known=listed(METHODS))
    module, _, attribute = METHODS[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found
