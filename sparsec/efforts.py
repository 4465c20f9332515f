"""How much tuning measures: ``efforts.json``, the one file of these numbers, as records, least effort first.

The CPU, the GPU, the options of ``torch.compile`` and the command line all read this table; what an effort means is
changed there and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Effort:
    """What one weight is given.

    ``candidates``: sparse ways per M, best by the cost model first. ``configs``: launch configurations of each (GPU).
    ``hopeless``: ways that the model puts at more than so many times dense are not tried. ``ms``: rows of x where M
    is dynamic, powers of two. ``rounds``: of the interleaved runs at one M, at most. ``point_s``: seconds spent on
    them, at least five rounds.
    """

    name: str
    candidates: int
    configs: int
    hopeless: float
    ms: tuple[int, ...]
    rounds: int
    point_s: float

    def covers(self, other: Effort) -> bool:
        """Whether what this effort measured need not be measured again for ``other``."""
        return self.rounds >= other.rounds


def _read(path: Path) -> Mapping[str, Effort]:
    said = json.loads(path.read_text(encoding="utf-8"))
    return {name: Effort(name=name, **{**row, "ms": tuple(row["ms"])}) for name, row in said.items()}


EFFORTS: Mapping[str, Effort] = _read(Path(__file__).with_name("efforts.json"))
