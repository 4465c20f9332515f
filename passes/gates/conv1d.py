"""transformers' ``Conv1D`` (GPT-2's linear layer) with gates; apart, because it imports transformers."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from sparsec.passes.gates.layers import Gated
from sparsec.passes.quantize.inputs_conv1d import QuantizedInputConv1D


class GatedConv1D(Gated, Conv1D):
    """``Conv1D`` that zeroes some of what it reads or gives."""


class GatedQuantizedConv1D(Gated, QuantizedInputConv1D):
    """``Conv1D`` that zeroes some of its input, then rounds the rest to int8."""
