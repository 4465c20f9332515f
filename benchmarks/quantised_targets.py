"""The speedups that the project set itself for quantised weights: over the best dense peer of the same values.

In: what a case is. Out: a ratio, or None where nothing is claimed. Dense peers are ONNX Runtime's int8 and MatMulNBits,
torch's int8 and int4, and products of the float weights.
"""

from __future__ import annotations

VALUE_BYTES = {"int8": 1.0, "int4g128": 0.5 + 2 / 128, "ternary": 0.25}  # of a dense weight, with its scales

# (weights, pattern, M, sparsity) -> speedup; x rounded to int8, hot and cold weights alike.
TARGETS = {
    **{("int8", "", 1, s): r for s, r in ((0.5, 1.65), (0.8, 2.4), (0.9, 3.0))},
    **{("int8", "", 64, s): r for s, r in ((0.0, 0.95), (0.5, 0.95), (0.8, 1.2), (0.9, 1.2))},
    ("int8", "block:16x16", 64, 0.9): 4.0,
    ("ternary", "", 1, 0.5): 1.1,
}
INT4 = {True: 1.6, False: 1.1}  # cold, hot; M = 1 at 80 % zeros: fewer bytes than four bits a weight


def quantised_target(
    kind: str, weights: str, pattern: str, x8: bool, m: int, sparsity: float, cold: bool
) -> float | None:
    """The target of a linear layer whose input is int8, too; other cases are shown without one."""
    if kind != "linear" or not x8:
        return None
    if (weights, m, sparsity) == ("int4g128", 1, 0.8):
        return INT4[cold]
    return TARGETS.get((weights, pattern, m, sparsity))
