"""2:4 products by cuSPARSELt, through the operators that torch has for it: the peer of our own kernels, and a choice.

  y^T = W x^T: the sparse operand of the hardware is the left one, W [N, K]; the library writes y [M, N] itself

Which of its algorithms is best for a shape, only trying tells; that is done once for each (N, K, rows, dtype) and kept
while the process lives. torch pins a version of the library, and of one NVIDIA says that it is slow (notes of 0.8.1):
``doubtful`` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sparsec.codegen.reference import ACT
from sparsec.compat import CsltOps, cslt_ops

DTYPES = (torch.bfloat16, torch.float16)
SPARSE, DENSE = 16, 8  # N and K are multiples of the first, rows of x of the second
SLOW = {800: "0.8.0 is slower on H100 and L4 than the versions before and after it"}  # as the library writes them


@dataclass(frozen=True)
class Compressed:
    """A 2:4 weight as cuSPARSELt has it. ``shape``: [N, K] before padding; ``rows``: N after it."""

    tensor: torch.Tensor
    shape: tuple[int, int]
    rows: int
    columns: int


def unavailable() -> str:
    """Why cuSPARSELt cannot be used here, in a sentence; empty where it can."""
    if not torch.cuda.is_available():
        return "cuSPARSELt runs on NVIDIA GPUs, and torch sees none"
    if not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} was built without cuSPARSELt"
    if torch.backends.cusparselt.version() is None:
        return "cuSPARSELt does not say its version, so its library could not be loaded"
    if torch.cuda.get_device_capability() < (8, 0):
        return "cuSPARSELt needs sparse tensor cores, which begin with sm_80"
    return ""


def doubtful() -> str:
    """What is known to be slow about the version that is loaded; empty for nothing."""
    version = torch.backends.cusparselt.version()
    return f"cuSPARSELt {version}: {SLOW[version]}" if version in SLOW else ""


def unfit(weight: torch.Tensor) -> str:
    """Why this [N, K] weight cannot be compressed, in a sentence; empty where it can. Its pattern is not looked at."""
    if weight.ndim != 2 or not weight.numel():
        return f"cuSPARSELt takes a matrix, not {tuple(weight.shape)}"
    if weight.dtype not in DTYPES:
        return f"cuSPARSELt is used for bf16 and fp16, not {str(weight.dtype).removeprefix('torch.')}"
    return ""


@dataclass
class Cslt:
    """``ops``: torch's own operators, or stand-ins. ``found``: the best algorithm of (N, K, M, dtype) after padding."""

    ops: CsltOps = field(default_factory=cslt_ops)
    found: dict[tuple[int, int, int, torch.dtype], int] = field(default_factory=dict)

    def compress(self, weight: torch.Tensor) -> Compressed:
        """weight: 2:4, [N, K], bf16 or fp16 on a GPU; padded to multiples of 16. Raises ValueError with ``unfit``."""
        why = unfit(weight)
        if why:
            raise ValueError(why)
        n, k = weight.shape
        padded = _padded(weight.detach(), (SPARSE, SPARSE))
        # -0.0 is taken for a value by the library, and would push one out: adding zero makes it 0.0.
        return Compressed(self.ops.compress(padded + 0.0), (n, k), *padded.shape)

    def linear(
        self, x: torch.Tensor, weight: Compressed, bias: torch.Tensor | None = None, act: str = ""
    ) -> torch.Tensor:
        """act(x @ W.T + bias). x: [M, K] of the weight's dtype; bias: [N] or None; act: a name in ``spec.ACTS``.

        The activation is of the rounded sum, as eager PyTorch has it. Searches where the shape is new.
        """
        (m, k), (n, columns) = x.shape, weight.shape
        if k != columns:
            raise ValueError(f"x has {k} columns, and the weight {columns}")
        if not m:
            return x.new_empty((0, n))
        padded = _padded(x, (DENSE, SPARSE), weight.columns)
        wide = None if bias is None else _padded(bias[None], (1, SPARSE))[0]
        key = (weight.rows, weight.columns, len(padded), x.dtype)
        algorithm = self.found.get(key)
        if algorithm is None:
            algorithm = self.found[key] = self.ops.search(weight.tensor, padded.t(), wide)
        y = self.ops.multiply(weight.tensor, padded.t(), wide, algorithm)  # [M, N]: the library transposes
        activation: Callable[[torch.Tensor], torch.Tensor] = ACT[act]
        return activation(y[:m, :n])


def _padded(of: torch.Tensor, multiples: Sequence[int], columns: int = 0) -> torch.Tensor:
    """[a, b] with zeros up to multiples of ``multiples``, contiguous; itself where nothing is missing."""
    rows = -(-of.shape[0] // multiples[0]) * multiples[0]
    columns = columns or -(-of.shape[1] // multiples[1]) * multiples[1]
    right, below = columns - of.shape[1], rows - of.shape[0]
    return torch.nn.functional.pad(of, (0, right, 0, below)).contiguous() if right or below else of.contiguous()
