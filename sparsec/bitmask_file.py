"""Checkpoints in compressed-tensors' ``sparse-bitmask`` and ``sparse-24-bitmask`` layouts, which it no longer reads.

In: the tensors that stand for one weight. Out: the dense one. A weight [..., K] is stored as ``<layer>.compressed``
(its kept values in row order; [N, K/2] for 2:4), ``<layer>.bitmask`` (uint8 [..., ceil(K/8)], the least significant bit
first), ``<layer>.shape`` (int64) and, for sparse-bitmask, ``<layer>.row_offsets`` (int64 [...], where each row starts
in the values). The parts of one weight may lie in different shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sparsec.errors import BadModelFile

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
PARTS = ("shape", "compressed", "bitmask", "row_offsets")
_BAND = 1 << 22  # positions that are unpacked to a byte each at a time
_MOST = 1 << 48  # positions of a weight; more is damage


class Checkpoint:
    """Opened safetensors files as dense tensors by name, whether they are stored dense or by bits."""

    def __init__(self, path: str, files: Sequence[Any]) -> None:
        """``files``: what ``safetensors.safe_open`` gives, all shards of a checkpoint."""
        self._path = path
        self._place = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        prefixes = [name.removesuffix(".bitmask") for name in self._place if name.endswith(".bitmask")]
        self._prefix = {p if p.endswith(".weight") else f"{p}.weight": p for p in prefixes}
        parts = {f"{prefix}.{part}" for prefix in prefixes for part in PARTS}
        self.names = (set(self._place) - parts) | set(self._prefix)

    def slice(self, name: str) -> Any:
        """What has ``get_shape`` and ``get_dtype``; weights stored by bits are also checked. Raises BadModelFile."""
        prefix = self._prefix.get(name)
        return self._place[name].get_slice(name) if prefix is None else self._bits(prefix)

    def tensor(self, name: str) -> torch.Tensor:
        """The dense tensor, every value bit for bit. Raises BadModelFile."""
        prefix = self._prefix.get(name)
        found: torch.Tensor = self._place[name].get_tensor(name) if prefix is None else self._bits(prefix).dense()
        return found

    def _bits(self, prefix: str) -> Bits:
        missing = [part for part in PARTS[:3] if f"{prefix}.{part}" not in self._place]
        if missing:
            raise BadModelFile(path=self._path, why=f"it has {prefix}.bitmask and no {prefix}.{missing[0]}")
        there = {part: f"{prefix}.{part}" for part in PARTS if f"{prefix}.{part}" in self._place}
        tensors = {part: self._place[name].get_tensor(name) for part, name in there.items()}
        return Bits(self._path, prefix, self._place[there["compressed"]].get_slice(there["compressed"]), **tensors)


class Bits:
    """One weight stored by bits. Raises BadModelFile where its parts do not fit together."""

    def __init__(
        self,
        path: str,
        name: str,
        values: Any,
        shape: torch.Tensor,
        compressed: torch.Tensor,
        bitmask: torch.Tensor,
        row_offsets: torch.Tensor | None = None,
    ) -> None:
        """``values``: the safetensors slice of ``compressed``, for its dtype's name."""
        self._shape, self._dtype = tuple(int(s) for s in shape.flatten().tolist()), str(values.get_dtype())

        def wrong(why: str) -> BadModelFile:
            return BadModelFile(path=path, why=f"{name}{why}")

        if not self._shape or min(self._shape) < 0 or math.prod(self._shape) > _MOST:
            raise wrong(f".shape says {self._shape}, which no weight has")
        rows, columns = math.prod(self._shape[:-1]), self._shape[-1]
        width = -(-columns // 8)
        if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (*self._shape[:-1], width):
            raise wrong(f".bitmask is {tuple(bitmask.shape)} for a weight of {self._shape}")
        self._masks, self._values = bitmask.reshape(rows, width).numpy(), compressed.flatten()
        counts = _counts(self._masks, columns)
        if int(counts.sum()) != self._values.numel():
            raise wrong(f".bitmask keeps {int(counts.sum())} values and {name}.compressed has {self._values.numel()}")
        self._start = np.concatenate([[0], np.cumsum(counts)])
        if row_offsets is not None and not np.array_equal(row_offsets.flatten().numpy(), self._start[:-1]):
            raise wrong(".row_offsets are not where the rows of its bitmask start")

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        return self._dtype

    def dense(self) -> torch.Tensor:
        """The weight, unpacked in bands of rows."""
        raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self._values.element_size()]
        kept = self._values.view(raw).numpy()  # as bits: any dtype, fp8 too, and a NaN stays as it is
        (rows, _), columns = self._masks.shape, self._shape[-1]
        out = torch.zeros(rows, columns, dtype=raw)
        step = max(1, _BAND // max(columns, 1))
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            where = np.unpackbits(self._masks[begin:end], axis=-1, count=columns, bitorder="little").view(bool)
            out.numpy()[begin:end][where] = kept[self._start[begin] : self._start[end]]
        return out.view(self._values.dtype).reshape(self._shape)


def _counts(masks: Any, columns: int) -> Any:
    """Kept values of each row; bits past the last column do not count."""
    if masks.shape[1] and columns % 8:
        masks = masks.copy()
        masks[:, -1] &= (1 << columns % 8) - 1
    return np.bitwise_count(masks).sum(axis=1, dtype=np.int64)


def format_in(config: Mapping[str, Any]) -> str:
    """The bitmask format that a Hugging Face config names, or nothing."""
    for key in ("quantization_config", "compression_config"):
        said = config.get(key)
        sparsity = said.get("sparsity_config") if isinstance(said, Mapping) else None
        if isinstance(sparsity, Mapping) and sparsity.get("format") in FORMATS:
            return str(sparsity["format"])
    alone = config.get("sparsity_config")
    return str(alone["format"]) if isinstance(alone, Mapping) and alone.get("format") in FORMATS else ""
