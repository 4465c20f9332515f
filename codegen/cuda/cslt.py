"""2:4 products by cuSPARSELt, through the operators that torch has for it: the peer of our own kernels, and a choice.

  y^T = W x^T: the sparse operand of the hardware is the left one, W [N, K]; the library writes y [M, N] itself

e4m3: scales of weight rows are the library's vector ``alpha``. It has none for rows of x, so those, the bias and the
activation follow as torch operations. The product is asked for in bf16, where y is fp16 in fp32: sums of x before
its scale may be too large for fp16.

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
from sparsec.grid import OnFp8

E4M3 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, E4M3)
SPARSE, DENSE = 16, 8  # N and K are multiples of the first, rows of x of the second; of e4m3 twice as much
FP8_SINCE = 602
SLOW = {800: "0.8.0 is slower on H100 and L4 than the versions before and after it"}  # as the library writes them


@dataclass(frozen=True)
class Compressed:
    """A 2:4 weight as cuSPARSELt has it. ``shape``: [N, K] before padding; ``rows``: N after it.

    ``scale``: of e4m3 weights, fp32 [rows], ones where rows were added.
    """

    tensor: torch.Tensor
    shape: tuple[int, int]
    rows: int
    columns: int
    scale: torch.Tensor | None = None


def unavailable(fp8: bool = False) -> str:
    """Why cuSPARSELt cannot be used here, in a sentence; empty where it can. ``fp8``: for products of e4m3."""
    if not torch.cuda.is_available():
        return "cuSPARSELt runs on NVIDIA GPUs, and torch sees none"
    if not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} was built without cuSPARSELt"
    version = torch.backends.cusparselt.version()
    if version is None:
        return "cuSPARSELt does not say its version, so its library could not be loaded"
    if torch.cuda.get_device_capability() < (8, 0):
        return "cuSPARSELt needs sparse tensor cores, which begin with sm_80"
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        return "products of e4m3 begin with sm_89"
    if fp8 and version < FP8_SINCE:
        return f"cuSPARSELt takes e4m3 from version {FP8_SINCE} on, and this is {version}"
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
        return f"cuSPARSELt is used for bf16, fp16 and e4m3, not {str(weight.dtype).removeprefix('torch.')}"
    return ""


@dataclass
class Cslt:
    """``ops``: torch's own operators, or stand-ins. ``found``: the best algorithm of N, K and M after padding, and the
    dtypes of x and y."""

    ops: CsltOps = field(default_factory=cslt_ops)
    found: dict[tuple[int, int, int, torch.dtype, torch.dtype], int] = field(default_factory=dict)

    def compress(self, weight: torch.Tensor) -> Compressed:
        """weight: 2:4, [N, K], bf16 or fp16 on a GPU; padded to multiples of 16. Raises ValueError with ``unfit``."""
        why = unfit(weight) or ("e4m3 needs scales" if weight.dtype == E4M3 else "")
        if why:
            raise ValueError(why)
        n, k = weight.shape
        padded = _padded(weight.detach(), (SPARSE, SPARSE))
        # -0.0 is taken for a value by the library, and would push one out: adding zero makes it 0.0.
        return Compressed(self.ops.compress(padded + 0.0), (n, k), *padded.shape)

    def compress_fp8(self, weight: OnFp8) -> Compressed:
        """A 2:4 weight of e4m3 values and scales of rows, on a GPU; padded to multiples of 32."""
        why = unfit(weight.q)
        if why:
            raise ValueError(why)
        n, k = weight.q.shape
        codes = weight.q.view(torch.uint8)
        unsigned = torch.where(codes == 128, 0, codes)  # -0.0, as above
        padded = _padded(unsigned, (2 * SPARSE, 2 * SPARSE)).view(E4M3)
        scale = torch.nn.functional.pad(weight.scale, (0, len(padded) - n), value=1.0)
        rows, columns = padded.shape
        return Compressed(self.ops.compress(padded), (n, k), rows, columns, scale)

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
        y = self._product(weight, padded, wide, None)
        return _activated(y[:m, :n], act)

    def linear_fp8(
        self, x: torch.Tensor, x_scale: torch.Tensor, weight: Compressed, bias: torch.Tensor | None, act: str,
        dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """act((x * x_scale) @ W.T + bias), ``dtype`` (bf16 or fp16) [M, N]. x: e4m3 [M, K or more], x_scale: fp32 [M].

        Columns of x beyond K are zeros. Searches where the shape is new.
        """
        m, n = len(x), weight.shape[0]
        if x.dtype != E4M3 or weight.scale is None or not weight.shape[1] <= x.shape[1] <= weight.columns:
            raise ValueError(f"x is {x.dtype} [{m}, {x.shape[1]}] for a weight of {weight.shape[1]} columns of e4m3")
        if not m:
            return x.new_empty((0, n), dtype=dtype)
        padded = _padded(x.view(torch.uint8), (2 * DENSE, 1), weight.columns).view(E4M3)
        product = self._product(weight, padded, None, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        y = product[:m, :n].float() * x_scale[:, None]
        return _activated(y if bias is None else y + bias.float(), act).to(dtype)

    def _product(
        self, weight: Compressed, x: torch.Tensor, bias: torch.Tensor | None, out: torch.dtype | None
    ) -> torch.Tensor:
        """[M, N], by the best algorithm: the library transposes. ``out``: its dtype, x's where None."""
        key = (weight.rows, weight.columns, len(x), x.dtype, out or x.dtype)
        said = (weight.tensor, x.t(), bias, weight.scale, out)
        algorithm = self.found.get(key)
        if algorithm is None:
            algorithm = self.found[key] = self.ops.search(*said)
        return self.ops.multiply(*said, algorithm)


def _activated(y: torch.Tensor, act: str) -> torch.Tensor:
    activation: Callable[[torch.Tensor], torch.Tensor] = ACT[act]
    return activation(y)


def _padded(of: torch.Tensor, multiples: Sequence[int], columns: int = 0) -> torch.Tensor:
    """[a, b] with zeros up to multiples of ``multiples``, contiguous; itself where nothing is missing."""
    rows = -(-of.shape[0] // multiples[0]) * multiples[0]
    columns = columns or -(-of.shape[1] // multiples[1]) * multiples[1]
    right, below = columns - of.shape[1], rows - of.shape[0]
    return torch.nn.functional.pad(of, (0, right, 0, below)).contiguous() if right or below else of.contiguous()
