"""Why a graph, or one of its sites, is not taken: "" or a sentence for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsec import compat
from sparsec.facts import Site
from sparsec.targets.base import Target

_OF_GRAPHS = ("linear", "matmul", "addmm", "hf_conv1d")  # sites that targets of whole graphs take


def refusal_of(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], target: Target) -> str:
    """Why no site of a graph may be taken, if so."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        return "gradients are on; run under torch.no_grad() or torch.inference_mode()"
    if compat.turns_gradients_on(gm.graph):
        return "the function turns gradients on inside; only inference is taken"
    if torch.is_autocast_enabled(target.device) or compat.enters_autocast(gm.graph):
        return "autocast is on; convert the model instead: model.to(torch.bfloat16)"
    return ""


def refused_by(target: Target, site: Site) -> str:
    """Why a target does not take a site, if so."""
    if target.whole_graphs and site.kind not in _OF_GRAPHS:
        return "ONNX Runtime runs it with its own operator"
    if target.whole_graphs and site.w:
        return "the weight is computed, which ONNX Runtime does once and runs dense"
    if target.gpu and site.w:
        return "the weight is computed from integers, which is not taken on GPUs so far"
    if target.gpu and site.conv and not site.conv.pointwise:
        return "only 1x1 convolutions of stride 1 without padding are taken on GPUs so far"
    return ""
