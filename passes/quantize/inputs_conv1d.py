"""transformers' ``Conv1D`` (GPT-2's linear layer) with int8 inputs; apart, because it imports transformers."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from sparsec.passes.quantize.inputs import QuantizesInput


class QuantizedInputConv1D(QuantizesInput, Conv1D):
    """``Conv1D`` whose input is rounded to int8 first."""
