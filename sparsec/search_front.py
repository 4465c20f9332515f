"""What a search found, as plain numbers: budgets, trials, and the front of those that nothing beats in both.

In: a budget as text, trials with an accuracy loss and seconds. Out: the Pareto front and the fastest trial within the
budget. No model and no torch here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsec.errors import BadOptionValue

_NUMBER = r"(\d+(?:\.\d*)?|\.\d+)"
_BUDGETS = ((re.compile(rf"ppl\s*<=\s*{_NUMBER}(x?)"), "ppl"), (re.compile(rf"cos\s*>=\s*{_NUMBER}()"), "cos"))
_SPELLINGS = "a budget is written ppl<=1.02x (times the dense model's), ppl<=12.9 or cos>=0.95"


@dataclass(frozen=True)
class Budget:
    """The least accuracy. ``bound``: a perplexity, with ``relative`` times the dense model's, or a mean cosine."""

    metric: str
    bound: float
    relative: bool = False

    @classmethod
    def parse(cls, text: object) -> Budget:
        """Raises BadOptionValue for what is no budget, or one that no pruned model can or must keep."""
        if isinstance(text, Budget):
            return text
        for pattern, metric in _BUDGETS:
            if found := pattern.fullmatch(str(text).strip()):
                return cls(metric, float(found[1]), bool(found[2]))._checked(str(text))
        raise BadOptionValue(key="budget", value=text, expected=_SPELLINGS)

    def _checked(self, text: str) -> Budget:
        if self.metric == "cos" and not 0.0 < self.bound <= 1.0:
            raise BadOptionValue(key="budget", value=text, expected="a cosine to keep lies between 0 and 1")
        if self.metric == "ppl" and self.bound < 1.0:
            why = "the dense model itself would miss it" if self.relative else "no perplexity is below 1"
            raise BadOptionValue(key="budget", value=text, expected=why)
        return self

    def limit(self, dense: float) -> float:
        """The largest loss (see ``Trial``) within the budget, where the dense model's value is ``dense``."""
        if self.metric == "cos":
            return 1.0 - self.bound
        return (self.bound if self.relative else self.bound / dense) - 1.0

    def __str__(self) -> str:
        if self.metric == "cos":
            return f"cos>={self.bound:g}"
        return f"ppl<={self.bound:g}{'x' if self.relative else ''}"


@dataclass(frozen=True)
class Check:
    """A loss on windows that the search did not choose by, with its paired 95 % interval."""

    loss: float
    low: float
    high: float

    def verdict(self, limit: float) -> str:
        """``within``, ``over``, or ``not separable`` where the interval holds the limit."""
        if self.high <= limit:
            return "within"
        return "over" if self.low > limit else "not separable"


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried; ``params`` name it in the space.

    ``loss``: of perplexity the ratio to the dense model's minus 1, of embeddings 1 - mean cosine. ``seconds``: all
    linear layers, as expected. ``zeros``: their share. ``failed``: why there are no numbers, or nothing.
    """

    params: Mapping[str, Any]
    loss: float = math.inf
    seconds: float = math.inf
    zeros: float = 0.0
    check: Check | None = None
    took: float = field(default=0.0, compare=False)
    failed: str = ""

    @property
    def name(self) -> str:
        """``owl + sparsegpt 70% + reconstruct``; no parameters are the dense model."""
        if not self.params:
            return "dense"
        parts = [self.params[key] for key in ("allocator", "method", "repair") if self.params[key] != "none"]
        pattern = self.params["pattern"]
        share = f"{self.params['sparsity']:.0%}" if pattern == "unstructured" else pattern
        at = parts.index(self.params["method"])
        parts[at] = f"{parts[at]} {share}"
        return " + ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """JSON types; infinities are None. ``from_dict`` gives the same trial."""
        said = asdict(self)
        for key in ("loss", "seconds"):
            said[key] = said[key] if math.isfinite(said[key]) else None
        return {**said, "params": dict(self.params)}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Trial:
        made = {**said, **{k: math.inf for k in ("loss", "seconds") if said[k] is None}}
        return cls(**{**made, "check": Check(**said["check"]) if said["check"] else None})


def dominates(a: Trial, b: Trial) -> bool:
    """Whether ``a`` is as good as ``b`` in both and better in one."""
    no_worse = a.loss <= b.loss and a.seconds <= b.seconds
    return no_worse and (a.loss < b.loss or a.seconds < b.seconds)


def front(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Those that no other dominates, the slowest first; of equals the first. Failed trials are in no front."""
    best = math.inf
    found = []
    for trial in sorted((t for t in trials if not t.failed), key=lambda t: (t.seconds, t.loss)):
        if trial.loss < best:
            best = trial.loss
            found.append(trial)
    return tuple(reversed(found))


def fastest(trials: Iterable[Trial], limit: float, dense_seconds: float) -> Trial | None:
    """The fastest trial within ``limit`` that is faster than dense; of equally fast ones the most accurate."""
    good = [t for t in trials if not t.failed and t.loss <= limit and t.seconds < dense_seconds]
    return min(good, key=lambda t: (t.seconds, t.loss), default=None)
