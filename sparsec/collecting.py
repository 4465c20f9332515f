"""Statistics of what layers read while something runs: hooks that reduce inputs as they come.

In: modules, the names of statistics, and a function that runs all batches. Out: the statistics of each module. Padding
is left out where the mask of the batch that is running is known.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsec.passes.masks.statistics import Collector

Marked = Callable[[], "torch.Tensor | None"]  # the mask of the batch that is running, see ``marked``


def marked(sample: Mapping[str, Any]) -> torch.Tensor | None:
    """Bool [B, T]: the positions of a batch that are no padding; None where it does not say.

    With an encoder and a decoder it is not known whose positions a layer reads.
    """
    mask = sample.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or "decoder_input_ids" in sample:
        return None
    return mask != 0


def collect(
    modules: Mapping[str, nn.Module],
    needs: Sequence[str],
    forward: Callable[[], None],
    mask: Marked = lambda: None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Run ``forward`` with a hook on each module that reduces its inputs. A module that is never called gives zeros.

    Modules that are always given the very same tensor (q, k and v; gate and up) share one reduction, and the tensors
    of their statistics. Should they part on a later batch, ``forward`` is run again with one for each.

    ``mask``: where it gives bool [B, T], inputs [B, T, K] (or [B * T, K]) count only where it is True.
    """
    for shared in (True, False):
        streams: list[_Stream] = []
        homes: dict[str, _Stream] = {}
        with ExitStack() as stack, torch.no_grad():
            for name, module in modules.items():
                see = _seer(name, needs, streams, homes, shared, mask)
                stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
            forward()
        if not shared or all(stream.together for stream in streams):
            break
    found: dict[str, dict[str, torch.Tensor]] = {}
    while streams:
        stream = streams.pop()  # its accumulators go before those of the next become statistics
        result = stream.collector.result()
        found.update((name, dict(result)) for name in stream.calls)
    unseen = {
        name: Collector(_in_features(m), needs, name).result() for name, m in modules.items() if name not in homes
    }
    return {name: found[name] if name in found else unseen[name] for name in modules}


@dataclass
class _Stream:
    """One reduction of what the modules in ``calls`` (name -> times called) read; the first of them leads."""

    leader: str
    collector: Collector
    calls: dict[str, int]
    last: weakref.ref[torch.Tensor] | None = None
    version: int = 0
    parted: bool = False

    @property
    def together(self) -> bool:
        return not self.parted and len(set(self.calls.values())) == 1

    def read(self, x: torch.Tensor) -> bool:
        """Whether ``x`` is what the leader read last, unchanged since."""
        return self.last is not None and self.last() is x and self.version == x._version

    def lead(self, module: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.calls[self.leader] += 1
        self.collector.add(rows_of(module, x, mask))
        if not x.is_inference():  # those count no versions
            self.last, self.version = weakref.ref(x), x._version

    def follow(self, name: str, x: torch.Tensor) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.parted |= not self.read(x) or self.calls[name] != self.calls[self.leader]


def _seer(
    name: str, needs: Sequence[str], streams: list[_Stream], homes: dict[str, _Stream], shared: bool, mask: Marked
) -> Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]:
    """The hook of one module; at its first call it joins a stream or opens one."""

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = given(args, kwargs)
        alone = not shared or isinstance(module, nn.Conv2d) or x.is_inference()
        if name not in homes:
            joined = None if alone else next((s for s in streams if s.calls[s.leader] == 1 and s.read(x)), None)
            if joined is None:
                joined = _Stream(name, Collector(_in_features(module), needs, name), {name: 0})
                streams.append(joined)
            homes[name] = joined
        stream = homes[name]
        if stream.leader == name:
            stream.lead(module, x, mask())
        else:
            stream.follow(name, x)

    return see


def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a layer is called with: ``self.fc(x)``, or ``self.fc(input=x)``."""
    x: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _in_features(module: nn.Module) -> int:
    weight = module.get_parameter("weight")
    return int(weight.shape[0] if hasattr(module, "nf") else weight.shape[1])  # HF's Conv1D holds [K, N]


def rows_of(module: nn.Module, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Inputs as [tokens, K], without padding; of a 1x1 convolution every position it reads is a token."""
    x = x.detach()
    if isinstance(module, nn.Conv2d):
        (high, wide), x = module.stride, x if x.dim() == 4 else x.unsqueeze(0)
        x = x[:, :, ::high, ::wide].permute(0, 2, 3, 1)
    elif mask is not None and x.shape[:-1] in (mask.shape, (mask.numel(),)):
        return x.reshape(-1, x.shape[-1])[mask.to(x.device).flatten()]
    return x.reshape(-1, x.shape[-1])
