"""``compile_(model)``: a Hugging Face model whose calls, and ``generate``, run through sparsec.

Why it is needed: ``generate`` compiles by itself only on GPUs (transformers' list of devices), and passes a ``mode``
along. So the model's own call is compiled here, ``generate`` is told to keep a cache of one size (``static``: shapes do
not grow with every token) and not to compile a second time around ours. A first ``generate`` then makes two graphs, one
for the prompt and one for a token; a second prompt length makes the prompt's graph dynamic, and later ones reuse it.

Importing this file imports neither transformers nor torch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from sparsec.errors import MissingPackage, OffloadedModel, SparsecWarning
from sparsec.options import Options

if TYPE_CHECKING:
    import torch

ModelT = TypeVar("ModelT", bound="torch.nn.Module")
_MARK = "_sparsec_compiled"


def compile_(
    model: ModelT, *, max_cache_len: int | None = None, _backend: str | Callable[..., Any] = "sparsec", **options: Any
) -> ModelT:
    """Compile a ``PreTrainedModel`` in place for calls, ``generate`` and pipelines; returns the same model.

    ``options`` are those of ``torch.compile(backend="sparsec")`` (target, formats, tune, ...). ``max_cache_len``: room
    for the longest prompt plus answer to come; without it a longer one makes a larger cache, and the graph of a token
    is compiled again. A second call with the same options does nothing, one with others starts again from the plain
    model. Copies, pickles and saved files of the model are plain.

    Warns where the model's config says that layers round their inputs, and they do not (``sparsec.restore``).
    Raises UnknownOption and its kin, OffloadedModel, MissingPackage.
    """
    import torch

    from sparsec.rounding import warning_of

    _need_transformers()
    Options.parse(options)
    if offloaded := next(_offloaded(model), ""):
        raise OffloadedModel(name=offloaded)
    if said := warning_of(model):
        warnings.warn(said, SparsecWarning, stacklevel=2)
    wanted = (_backend, tuple(sorted((k, repr(v)) for k, v in options.items())))
    if getattr(model, _MARK, None) != wanted or model._compiled_call_impl is None:
        arguments: dict[str, Any] = {"backend": _backend}
        if options:
            arguments["options"] = dict(options)
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            # The frames that get compiled are shared by all models; without this, so is their limit of 8 graphs.
            arguments["isolate_recompiles"] = True
        model.compile(**arguments)
        setattr(model, _MARK, wanted)
    _prepare_generation(model, max_cache_len)
    return model


def _need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise MissingPackage(feature="sparsec.integrations.transformers", package="transformers", extra="hf") from None


def _prepare_generation(model: torch.nn.Module, max_cache_len: int | None) -> None:
    config = getattr(model, "generation_config", None)
    if config is None:  # encoders and vision models do not generate
        return
    if config.cache_implementation is None:  # what the user chose stays
        config.cache_implementation = "static"
    config.disable_compile = True
    if max_cache_len is not None:
        config.max_cache_len = max(max_cache_len, getattr(config, "max_cache_len", None) or 0)


def _offloaded(model: torch.nn.Module) -> Iterator[str]:
    """Names of modules whose weights accelerate moves in and out around each call."""
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        parts = getattr(hook, "hooks", (hook,))  # a SequentialHook holds several
        if any(getattr(part, "offload", False) for part in parts):
            yield name or type(model).__name__
