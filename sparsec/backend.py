"""``torch.compile(model, backend="sparsec")`` arrives here, through the entry point, without an import of sparsec.

In: a Dynamo graph, its real example inputs, the user's options. Out: a callable. Only wrong options raise; any other
failure leaves the untouched graph to Inductor, records the reason and warns once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from sparsec import compat, dump, records
from sparsec.errors import BadOptionValue, MissingPackage, ModeAndOptions, NoCompiler, OptionError, SparsecWarning
from sparsec.options import Options

_warned: set[str] = set()


def sparsec(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend. ``options``: see README; ``mode``: one of torch.compile's, whose settings go to Inductor."""
    if mode and options:
        raise ModeAndOptions(mode=mode)
    parsed = with_mode(Options.parse(options), mode)
    from sparsec import pipeline

    try:
        pipeline.prepare(parsed, any(isinstance(x, torch.Tensor) and x.is_cuda for x in example_inputs))
        c = pipeline.Compilation(compat.copy_graph_module(gm), example_inputs, parsed)
        records.publish(c.record)
        pipeline.run(c)
        assert c.compiled is not None
        _log(c.record)
        return c.compiled
    except (OptionError, MissingPackage):
        raise
    except Exception as error:
        return _fall_back(gm, example_inputs, parsed, error)


def with_mode(options: Options, mode: str | None) -> Options:
    """Fold ``mode=`` into the Inductor settings. Raises BadOptionValue for a mode torch does not know."""
    if not mode or mode == "default":
        return options
    try:
        settings = compat.mode_options(mode)
    except RuntimeError:
        known = "default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs"
        raise BadOptionValue(key="mode", value=mode, expected=f"it must be one of {known}") from None
    return replace(options, inductor=tuple(sorted({**settings, **dict(options.inductor)}.items())))


def _fall_back(
    gm: torch.fx.GraphModule, example_inputs: list[Any], options: Options, error: Exception
) -> Callable[..., Any]:
    """Compile the untouched graph; without a compiler, run it eagerly."""
    stage = getattr(error, "sparsec_stage", "start")
    reason = f"{stage}: {type(error).__name__}: {error}" if not isinstance(error, NoCompiler) else str(error)
    records.publish(records.CompileRecord(failure=reason))
    _warn_once(reason)
    dump.reproducer(gm, example_inputs, options.policy.encode(), error)
    if os.environ.get("SPARSEC_DEBUG"):
        raise error
    if isinstance(error, NoCompiler):  # Inductor needs one too
        return gm.forward
    return compat.compile_rest(gm, example_inputs, dict(options.inductor))


def _warn_once(reason: str) -> None:
    if reason in _warned:
        return
    _warned.add(reason)
    warnings.warn(f"sparsec left a graph as it was: {reason}", SparsecWarning, stacklevel=3)


def _log(record: records.CompileRecord) -> None:
    if "explain" not in os.environ.get("SPARSEC_LOG", "").split(","):
        return
    from sparsec.explain import log_record

    print(log_record(record), file=sys.stderr)
