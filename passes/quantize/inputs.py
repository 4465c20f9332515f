"""Quantised inputs: layers that round what they read to int8, as plain PyTorch that any eager program runs.

In: an ``nn.Linear`` (or transformers' ``Conv1D``). Out: the same module, of a subclass that says ``y = layer(x')``::

    s  = max|x| / 127 over a token, or one number for the whole tensor (``x_scale``)
    q  = clamp(round(x / s), -127, 127)
    x' = q * s, in the dtype of x

The compiler recognises these lines, whoever wrote them. Parameters, hooks, names and the ``state_dict`` stay as they
were, but for the buffer ``x_scale`` of a static scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TOP = 127.0


def quantized(x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] of any float dtype, rounded to the nearest of 255 steps in fp32; gives the shape and dtype of x.

    ``scale``: fp32, one number, which clips what is beyond 127 steps. None: max|x| / 127 of each token, and 1 where
    that is zero. Source: Xiao et al., "SmoothQuant", 2023, equation 1 (per-token and per-tensor, symmetric).
    """
    wide = x.float()
    if scale is None:
        scale = wide.abs().amax(-1, keepdim=True) / TOP
        scale = torch.where(scale == 0, 1.0, scale)
    q = (wide / scale).round().clamp(-TOP, TOP)
    return (q * scale).to(x.dtype)


class QuantizesInput(nn.Module):
    """The half that layers share; stands before the class of the layer itself."""

    x_scale: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(quantized(x, self.x_scale))  # type: ignore[misc]
        return y

    def extra_repr(self) -> str:
        how = "per token" if self.x_scale is None else f"x_scale={float(self.x_scale):.4g}"
        own = super().extra_repr()
        return ", ".join(filter(None, [own, f"x=int8, {how}"]))


class QuantizedInputLinear(QuantizesInput, nn.Linear):
    """``nn.Linear`` whose input is rounded to int8 first."""


def refusal(module: nn.Module) -> str:
    """Why the inputs of a module cannot be quantised; "" where they can, or are already."""
    if isinstance(module, QuantizesInput):
        return ""
    if "forward" in vars(module):
        return "its forward was replaced"
    if type(module) is nn.Linear or _is_conv1d(module):
        return ""
    return f"it is a {type(module).__name__}, and only nn.Linear and Conv1D quantise their inputs"


def quantize_inputs(module: nn.Module, scale: float | None = None) -> None:
    """Make a layer round its inputs to int8, in place: the class of the module changes, its tensors do not.

    ``scale``: of the whole tensor; None: of each token. A layer that rounds already gets the new scale. Raises
    ValueError with the words of ``refusal``, or for a scale that is no positive finite number.
    """
    if why := refusal(module):
        raise ValueError(why)
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"the scale of inputs is {scale}, and must be a positive number")
    if not isinstance(module, QuantizesInput):
        module.__class__ = _class_for(module)
    weight = module._parameters["weight"]
    device = None if weight is None else weight.device
    said = None if scale is None else torch.tensor(scale, dtype=torch.float32, device=device)
    module.register_buffer("x_scale", said)


def inputs_of(module: nn.Module) -> str:
    """``int8``, ``int8:0.05`` (the scale as repr gives it), or "" for a layer that reads its inputs as they are."""
    if not isinstance(module, QuantizesInput):
        return ""
    return "int8" if module.x_scale is None else f"int8:{float(module.x_scale)!r}"


def set_inputs(module: nn.Module, said: str) -> None:
    """Make ``inputs_of(module)`` be ``said``; "" makes the layer plain again. Raises as ``quantize_inputs``."""
    if said:
        quantize_inputs(module, scale_in(said))
    elif isinstance(module, QuantizesInput):
        del module._buffers["x_scale"]
        module.__class__ = plain_class(type(module))


def plain_class(kind: type[Any]) -> type[Any]:
    """The class of a layer as it was before it rounded its inputs; any other as it is."""
    return next(cls for cls in kind.__mro__ if not issubclass(cls, QuantizesInput))


def scale_in(said: str) -> float | None:
    """The static scale in what ``inputs_of`` gives."""
    _, found, number = said.partition(":")
    return float(number) if found else None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _class_for(module: nn.Module) -> type[nn.Module]:
    if type(module) is nn.Linear:
        return QuantizedInputLinear
    from sparsec.passes.quantize.inputs_conv1d import QuantizedInputConv1D  # it imports transformers

    return QuantizedInputConv1D
