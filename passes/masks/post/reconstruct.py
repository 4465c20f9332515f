"""Reconstruction: with the masks fixed, new values for the kept weights so that each layer's outputs are as before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field

from sparsec.errors import SingularHessian
from sparsec.passes.masks import obs
from sparsec.passes.masks.post.layers import write

if TYPE_CHECKING:
    from sparsec.passes.masks.block import Block

_CHUNK = 1 << 27  # bytes of normal equations that are solved together


@dataclass(frozen=True)
class Reconstruct:
    """Keep the mask and update the kept weights: least ||X (W - W')||.

    By the OBS solver of SparseGPT with its mask given (Frantar & Alistarh, 2023, algorithm 1: a column's error is
    repaired by later columns only), or with ``exact`` by the normal equations of each row, H_SS w' = H_S: w for the
    kept columns S, which is the minimum. W is the dense weight, H = X X^T + damp * mean(diag) * I: damping draws kept
    weights towards their dense values, and weights of inputs that were always zero stay as they were.
    Source of its worth: methods with no update of their own, Wanda's ablation (Sun et al., 2023, section 5) and RIA's
    ``reconstruction``. A layer that no token reached is left as it is.
    """

    role: ClassVar[str] = "post"
    needs: ClassVar[tuple[str, ...]] = ("xxt",)
    moves_masks: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    source: ClassVar[str] = "Frantar & Alistarh, 2023, mask given"
    cost: ClassVar[str] = "as SparseGPT; exact: N (kept columns)^3 / 3 a layer"

    exact: bool = field(default=False, metadata={"doc": "solve each row's least squares exactly; much slower"})
    damp: Annotated[float, Field(ge=0)] = field(
        default=0.01, metadata={"doc": "share of the mean of the Hessian's diagonal that is added to it"}
    )

    @torch.no_grad()
    def refine(self, block: Block) -> None:
        """Write the new values of every layer of the block that has a mask. Raises SingularHessian."""
        for layer in block.layers:
            xxt = layer.stats["xxt"]
            if layer.keep is not None and bool(xxt.any()):
                write(layer, self.values(layer.dense, xxt, layer.keep))

    def values(self, dense: torch.Tensor, xxt: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """The kept weights' new values, fp32 [N, K], zero elsewhere."""
        if self.exact:
            return least_squares(dense, obs.damped_hessian(xxt, self.damp)[0], keep)
        values = obs.prune(dense, obs.inverse_factor(xxt, self.damp)[0], keep).values
        assert values is not None
        return values


def least_squares(dense: torch.Tensor, hessian: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """For each row the w' on its kept columns with the least (w - w') H (w - w')^T; fp32 [N, K], zero elsewhere.

    ``hessian``: [K, K] fp64. Rows are solved together, in fp64; rows that keep fewer columns than others of their
    chunk are filled up with equations x = 0. Raises SingularHessian.
    """
    wanted = dense.double() @ hessian
    values = torch.zeros_like(wanted)
    counts = keep.sum(1)
    rows = max(1, _CHUNK // (8 * max(1, int(counts.max())) ** 2))
    for chunk in torch.split(counts.argsort(stable=True), rows):
        most = int(counts[chunk].max())
        places = keep[chunk].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        spare = torch.arange(most, device=keep.device) >= counts[chunk, None]
        system = hessian[places[:, :, None], places[:, None, :]]
        system.masked_fill_(spare[:, :, None] | spare[:, None, :], 0.0)
        system.diagonal(dim1=1, dim2=2).add_(spare)
        lower, info = torch.linalg.cholesky_ex(system)
        if bool(info.any()):
            raise SingularHessian(
                why="the X X^T of the kept ones is singular", help="raise damp, or use more calibration tokens"
            )
        right = wanted[chunk].gather(1, places).masked_fill_(spare, 0.0)
        solved = torch.cholesky_solve(right[:, :, None], lower)[:, :, 0]
        values[chunk] = values[chunk].scatter_(1, places, solved)
    return values.float()
