"""One kernel on one weight, without a graph: what tuning, calibration and tests call."""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsec import targets
from sparsec.cache import cache_dir
from sparsec.codegen import build, cpp
from sparsec.codegen.spec import ACTS, KernelSpec, Packed
from sparsec.facts import Conv
from sparsec.formats import Format
from sparsec.passes.graph import DTYPES
from sparsec.runtime import library
from sparsec.runtime.parts import FOREVER, route


class Direct:
    """Callable ``y = act(x @ weight.T + bias)``; x [..., K] of the weight's dtype, y [..., N].

    With ``conv`` x is images [B, C, H, W] and y [B, N, high, wide], channels_last; the weight is [N, K] all the same.

    ``packed`` may be given to share one pack between loops. Raises PackError where the weight does not fit the
    format, BuildError where the kernel cannot be made.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        format: Format,
        loop: str,
        bias: torch.Tensor | None = None,
        act: str = "",
        target: str = "auto",
        cache: str = "",
        packed: Packed | None = None,
        conv: Conv | None = None,
    ) -> None:
        library.load()
        machine = targets.resolve(target)
        dtype = DTYPES[weight.dtype]
        spec = KernelSpec.on(machine, format, loop, dtype)
        self.packed = packed or cpp.pack_verified(weight.detach(), format, "direct", x=spec.x, loop=spec.loop)
        self.kernel = build.build(spec, cache_dir(cache))
        self.bias, self.act, self.n = bias, ACTS.index(act), int(weight.shape[0])
        own = [] if self.packed.tensors else [weight.detach().contiguous()]  # kernels that read the weight itself
        self._tensors = [*self.packed.tensors, *own, self.packed.work]
        packed = replace(self.packed, tensors=(*self.packed.tensors, *own))
        self._route = route(0, FOREVER, self.kernel, packed, 0)
        self._walk = conv.numbers if conv else None

    def __call__(self, x: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        """``active``: int32, ascending; of kernels that read a part of the weight the columns or rows to read."""
        said = (x, self.bias, self._tensors, self._route, self.n, self.act)
        ops = torch.ops.sparsec
        y: torch.Tensor = ops.direct(*said, active) if self._walk is None else ops.direct_conv(*said, self._walk)
        return y


def convolve(x: torch.Tensor, weight: torch.Tensor, conv: Conv, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same convolution by PyTorch: images [B, C, H, W], weight as the matrix [N, K]."""
    above, below, left, right = conv.padding
    filters = weight.view(weight.shape[0], *conv.kernel, -1).permute(0, 3, 1, 2)
    pads = above, left
    if (above, left) != (below, right):
        x, pads = torch.nn.functional.pad(x, (left, right, above, below)), (0, 0)
    return torch.nn.functional.conv2d(x, filters, bias, conv.stride, pads, conv.dilation)
