"""A model as it is while it is calibrated: no dropout, no key-value cache; afterwards as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and without a key-value cache inside the block."""
    training = [module for module in model.modules() if module.training]
    cached = [(config, config.use_cache) for config in _configs(model) if getattr(config, "use_cache", None)]
    model.eval()
    for config, _ in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config, said in cached:
            config.use_cache = said
        for module in training:
            module.training = True


def _configs(model: nn.Module) -> list[Any]:
    """Every config in the model, each once: that of a model of images and text only holds those of its parts, and it
    is the part that reads ``use_cache``."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        text = getattr(config, "get_text_config", None)
        inner = None
        if callable(text):
            with suppress(ValueError):  # it has several; their modules carry them
                inner = text()
        found.update({id(c): c for c in (config, inner) if c is not None})
    return list(found.values())
