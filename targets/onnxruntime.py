"""``onnxruntime``: graphs run in ONNX Runtime on this CPU, with our kernels as its operators.

What it can run becomes one session for each set of weights; the rest stays with Inductor.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sparsec.targets.base import Target
from sparsec.targets.detect import detect


@dataclass(frozen=True)
class OrtTarget(Target):
    """The CPU, whose kernels and measured rates it shares."""

    @property
    def whole_graphs(self) -> bool:
        return True

    @property
    def fingerprint(self) -> str:
        return detect("").fingerprint


def make(variant: str) -> Target:
    """The library of operators chooses its instructions when it is loaded, so there are no variants."""
    return OrtTarget(**{**asdict(detect("")), "name": "onnxruntime"})
