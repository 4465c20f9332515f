"""Calibration data that a model does not take, as a sentence instead of what torch says deep inside a layer.

In: the model and its samples, around a run. Out: UnreadableCalibration where the run fails and the first sample alone
makes the model fail as well. Nothing is run where nothing goes wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsec.errors import SparsecError, UnreadableCalibration
from sparsec.passes.masks.evaluating import evaluating

_ALONE = "of a loader's (inputs, targets) pass the inputs alone, as in [x for x, y in loader]"
_NAMED = "pass dicts of forward's arguments, by name"


@contextmanager
def taken_by(model: nn.Module, samples: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """What fails in here because the model does not take ``samples`` is said in one sentence."""
    try:
        yield
    except (SparsecError, MemoryError):
        raise
    except Exception as error:
        if samples and (why := _refused(model, samples[0])):
            raise UnreadableCalibration(source="the first sample", why=why) from error
        raise


def _refused(model: nn.Module, sample: Mapping[str, Any]) -> str:
    """Why the model does not take a sample, or nothing."""
    try:
        with torch.no_grad(), evaluating(model):
            model(**sample)
    except Exception as error:  # whatever a model's forward raises
        said = (str(error).splitlines() or [""])[0].rstrip(".")
        shapes = ", ".join(f"{key} {_shape(value)}" for key, value in sample.items())
        help_ = f"; {_NAMED}" if isinstance(error, TypeError) else ""
        return f"{type(model).__name__} fails on it ({shapes}): {type(error).__name__}: {said}{help_}"
    return ""


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"[{', '.join(map(str, value.shape))}] {str(value.dtype).removeprefix('torch.')}"


@contextmanager
def pairs_explained() -> Iterator[None]:
    """Samples that are tuples are mostly (inputs, targets): say what to pass instead."""
    try:
        yield
    except UnreadableCalibration as error:
        why = str(error.fields["why"])
        if not why.startswith(("it is list,", "it is tuple,")):
            raise
        raise UnreadableCalibration(source=error.fields["source"], why=f"{why}; {_ALONE}") from None
