"""Outliers aside: a few weights are kept beside the pattern's quota. In: ``"16:256"`` or ``0.005``. Out: a ``Choose``.

The best weights by the method's own score are set aside, the pattern then chooses among the rest as if they were
zeros; the mask is the union of both. A recipe's mask step says ``outliers: 16:256`` or ``outliers: 0.005``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.errors import BadOutliers
from sparsec.passes.masks.pattern import MaskPattern

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.contract import Choose


@dataclass(frozen=True)
class Outliers:
    """Either ``count`` of each ``width`` in-features of a row (structured, k:256), or ``share`` of the layer's weights.

    Source: Maximov et al., 2025, arXiv 2507.03052, "salient weights": 4, 8 or 16 of 256. Where the in-features are not
    a multiple of ``width``, and where a method chooses column block by column block, the part of a group of which
    ``r`` columns are seen gets its share, round(count * r / width) in all: never more than ``count``.
    """

    count: int = 0
    width: int = 0
    share: float = 0.0

    def __str__(self) -> str:
        return f"{self.count}:{self.width}" if self.width else f"{self.share:g}"

    @classmethod
    def parse(cls, said: object) -> Outliers | None:
        """Read the recipe's ``outliers``; None for None and "none". Raises BadOutliers."""
        if said is None or said == "none":
            return None
        if isinstance(said, cls):
            return said
        if isinstance(said, str):
            grouped = re.fullmatch(r"(\d+):(\d+)", said)
            if grouped:
                return cls._structured(said, int(grouped[1]), int(grouped[2]))
        return cls(share=_share(said))

    @classmethod
    def _structured(cls, said: str, count: int, width: int) -> Outliers:
        if not 0 < count < width:
            raise BadOutliers(
                value=said, why=f"keeps {count} of {width}, which sets {'all' if count else 'none'} aside"
            )
        return cls(count, width)

    def check(self, pattern: MaskPattern) -> None:
        """Raise BadOutliers where single weights beside the pattern mean nothing to it."""
        if pattern.kind in ("block", "vnm"):
            raise BadOutliers(
                value=str(self), why=f"cannot go with {pattern}: only N:M and unstructured leave them room"
            )

    def aside(self, score: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Bool [N, width]: the weights set aside, from scores [N, width] of the in-features from ``start`` on."""
        import torch

        from sparsec.passes.masks.select import select

        if not self.width:
            return select(score, MaskPattern(), 1.0 - self.share, start=start)
        keep = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
        for first, last, count in self._groups(start, start + score.shape[1]):
            columns = slice(first - start, last - start)
            keep[:, columns] = select(score[:, columns], MaskPattern("nm", (count, last - first)), 0.0)
        return keep

    def rest(self, score: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The scores with -inf for what is set aside, so that the pattern chooses it last. A new tensor, fp32."""
        return score.float().masked_fill(self.aside(score, start), -math.inf)

    def _groups(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first, last, count) of the groups, whole or not, between two columns; parts add up to a group's count."""
        first = start
        while first < stop:
            origin = first - first % self.width
            last = min(origin + self.width, stop)
            yield first, last, self._until(last - origin) - self._until(first - origin)
            first = last

    def _until(self, columns: int) -> int:
        return (2 * self.count * columns + self.width) // (2 * self.width)  # to the nearest, a half upwards


@dataclass(frozen=True)
class WithOutliers:
    """``Choose``: what ``outliers`` sets aside, and what ``choose`` takes of the rest."""

    choose: Choose
    outliers: Outliers

    @property
    def pattern(self) -> MaskPattern:
        """That of the rest."""
        return getattr(self.choose, "pattern", MaskPattern())

    def __call__(self, score: torch.Tensor, start: int = 0) -> torch.Tensor:
        aside = self.outliers.aside(score, start)
        return self.choose(score.float().masked_fill(aside, -math.inf), start) | aside


def with_outliers(choose: Choose, outliers: Outliers | None) -> Choose:
    """``choose`` with its quota for the weights that are not set aside: 8:16 with 16:256 keeps 1/2 + 1/16 of each row.

    An unstructured quota counts alike: sparsity 0.5 with outliers 0.005 keeps 0.505 of a layer. With a threshold over
    a pool of layers (``select_pool``), the pool's scores must be ``outliers.rest(score)`` too. Raises BadOutliers
    where ``choose`` has a pattern that outliers cannot go with.
    """
    if outliers is None:
        return choose
    pattern = getattr(choose, "pattern", None)
    if isinstance(pattern, MaskPattern):
        outliers.check(pattern)
    return WithOutliers(choose, outliers)


def _share(said: object) -> float:
    try:
        share = float(said) if isinstance(said, (int, float, str)) and not isinstance(said, bool) else math.nan
    except ValueError:
        share = math.nan
    if math.isnan(share):
        raise BadOutliers(value=said, why="is neither a share nor k:M")
    if share >= 60 and share == int(share):
        raise BadOutliers(value=said, why="is no share (YAML 1.1 reads 4:32 as 272: put it in quotes)")
    if not 0 < share < 1:
        raise BadOutliers(value=said, why="is not between 0 and 1")
    return share
