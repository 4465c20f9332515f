"""What a convolution costs on this machine: dense at a few sizes, and what gathering patches adds to a kernel of ours.

In: a target and a cache. Out: ``Rates.conv`` and ``Rates.gather``. One weight is used again and again: from 49 rows on
it is arithmetic that takes the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from sparsec.codegen.spec import KernelSpec
from sparsec.errors import BuildError, PackError
from sparsec.facts import Conv
from sparsec.formats import Format
from sparsec.measure_calls import best_seconds_alone_too, plausible
from sparsec.measure_kernels import TORCH, direct
from sparsec.runtime.direct import convolve
from sparsec.targets.base import DenseRate, Target

_CHANNELS = 256
_SIDES = (7, 14, 28)  # of square images: 49, 196 and 784 rows
_WALK = Conv((3, 3), padding=(1, 1, 1, 1))


def dense_conv(name: str, overhead: float) -> tuple[DenseRate, bool]:
    """Seconds per weight of a 3x3 convolution of channels_last images by the library, and whether the machine was
    busy."""
    k = 9 * _CHANNELS
    weight = torch.randn(_CHANNELS, k).mul_(0.02).to(TORCH[name])
    calls: dict[str, Callable[[], object]] = {}
    for side in _SIDES:
        calls[str(side * side)] = partial(convolve, image(1, _CHANNELS, side, side, TORCH[name]), weight, _WALK)
    seconds, _, busy = best_seconds_alone_too(calls, budget_s=0.4)
    size = weight.numel()
    return DenseRate(name, plausible([(int(m), max(s - overhead, 0.1 * s) / size) for m, s in seconds.items()])), busy


def gather_rate(target: Target, cache: Path) -> float:
    """Seconds for each value of a patch that is gathered; 0 where no kernel can be built."""
    weight = torch.zeros(16, 9 * _CHANNELS)
    weight[:, ::64] = 1.0
    spec = KernelSpec(Format.parse("bitmap+fp32"), "dot", "fp32", target.isa)
    x = image(1, _CHANNELS, 14, 14, torch.float32)
    rows = torch.randn(196, weight.shape[1])
    try:
        plain = direct(weight, spec, target, cache)
        walking = direct(weight, spec, target, cache, plain.packed, _WALK)
    except (BuildError, PackError):
        return 0.0
    calls: Mapping[str, Callable[[], object]] = {"rows": lambda: plain(rows), "patches": lambda: walking(x)}
    _, alone, _ = best_seconds_alone_too(calls, budget_s=0.2)
    return max(alone["patches"] - alone["rows"], 0.0) / rows.numel()


def image(batch: int, channels: int, high: int, wide: int, dtype: torch.dtype) -> torch.Tensor:
    """Random images [batch, channels, high, wide], channels_last."""
    made = torch.randn(batch, high, wide, channels, generator=torch.Generator().manual_seed(0))
    return made.to(dtype).permute(0, 3, 1, 2)
