"""Checkpoint folders that ``from_pretrained`` cannot read: packed models, and weights stored by bits.

In: a folder with a ``config.json``. Out: the model, made from its config and filled by ``sparsec.load``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsec.bitmask_file import format_in
from sparsec.errors import BadModelFile
from sparsec.packed_file import NAME

_KEYS = ("quantization_config", "compression_config", "sparsity_config")


def needs_rebuilding(folder: Path) -> bool:
    """Whether the folder holds a packed model or weights stored by bits."""
    return (folder / NAME).is_file() or bool(format_in(_config_of(folder)))


def rebuilt(folder: Path, maker: Any, config: Any, dtype: str) -> torch.nn.Module:
    """The model. ``maker``: an auto class or a model class of transformers; ``config``: what it reads from the folder.

    ``dtype``: ``auto`` or the name of a torch dtype; a packed model keeps its own. Raises BadModelFile, BadPackedFile.
    """
    from sparsec.io import load

    said = _config_of(folder)
    quantised = [key for key in _KEYS if isinstance(said.get(key), Mapping) and said[key].get("config_groups")]
    if quantised and not (folder / NAME).is_file():
        why = f"its weights are stored by bits ({format_in(said)}) and quantised too ({quantised[0]}.config_groups)"
        raise BadModelFile(path=str(folder), why=f"{why}; only real values are read")
    for key in _KEYS:
        if hasattr(config, key):
            delattr(config, key)
    name = said.get("dtype") or said.get("torch_dtype") or "float32"
    stored = getattr(torch, str(name), torch.float32)
    make = maker.from_config if hasattr(maker, "from_config") else maker._from_config
    model: torch.nn.Module = make(config, dtype=stored)
    load(folder, model)
    if dtype != "auto" and getattr(torch, dtype) != stored:
        model.to(getattr(torch, dtype))
    return model


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
