"""``save`` and ``load``: models as ordinary checkpoints, whole or not at all.

In and out: a folder that any program reads. A transformers model becomes what its ``save_pretrained`` writes, with no
``quantization_config`` and no ``sparsity_config`` (other tools refuse models that carry one); another module becomes
``model.safetensors``. Layers that round their inputs are named in the config, or in that file (``rounding``). Beside it
lie ``recipe.yaml``, which runs again to the same masks, and ``sparsec.json``; ``sparsec sparsify`` adds
``sparsec_report.json`` and ``sparsec_report.html``.

A folder is written under a temporary name beside its place and renamed when complete. After an error nothing is left;
after a kill only a hidden folder, which the next ``save`` to the same place removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from sparsec.bitmask_file import Checkpoint
from sparsec.errors import BadModelFile, ModelNotFound, OutputExists, Unsavable, WriteFailed
from sparsec.gated_file import gate_facts, gating
from sparsec.rounding import FACTS, metadata_of, note, rounding, said_in

if TYPE_CHECKING:
    from sparsec.sparsify_report import Report

RECIPE, WEIGHTS = "recipe.yaml", "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Older readers refuse files without it. A second key makes the bytes vary by chance, so there is one only where needed.
_METADATA = {"format": "pt"}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    report: Report | None = None,
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write ``model`` to the folder ``path`` (or one ``.safetensors`` file), and the report's recipe and facts.

    ``files``: more texts for a folder, by name (``Outcome.files``).
    A folder that holds the same model pruned with the same recipe is replaced, any other only with ``overwrite``.
    A packed model becomes one file that only sparsec reads, ``packed.safetensors`` in a folder.
    Tied tensors are stored once. Raises OutputExists, or WriteFailed, after which ``path`` is as it was.
    """
    target = Path(os.path.realpath(path))
    inner = getattr(model, "_orig_mod", None)  # torch.compile(module)
    module = inner if isinstance(inner, nn.Module) else model
    sha, source = (report.recipe.sha, report.model_sha) if report else ("", "")
    check_output(path, sha, source, overwrite)
    if report and report.structured and report.structured.unsaved:
        raise Unsavable(why=report.structured.unsaved.rstrip("."))
    try:
        if target.suffix == ".safetensors":
            _write_file(module, target)
        else:
            with _new_folder(target) as folder:
                _write_folder(module, folder, report, tokenizer)
                for name, text in (files or {}).items():
                    (folder / name).write_text(text, encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as error:
        raise WriteFailed(path=os.fspath(path), why=_why(error)) from error
    return target


def check_output(path: str | os.PathLike[str], recipe_sha: str, model_sha: str, overwrite: bool = False) -> None:
    """Raise OutputExists where ``path`` holds anything but the same model pruned with the same recipe."""
    target, name = Path(path), os.fspath(path)
    if target.is_file():
        if target.suffix != ".safetensors" or not overwrite:
            raise OutputExists(path=name, what="a file")
        return
    if not target.is_dir() or not any(target.iterdir()):
        return
    facts = _facts(target)
    if facts and recipe_sha and (facts.get("recipe_sha"), facts.get("model_sha")) == (recipe_sha, model_sha):
        return
    is_checkpoint = any((target / n).exists() for n in (FACTS, WEIGHTS, _INDEX, "packed.safetensors", "config.json"))
    if overwrite and is_checkpoint and not any(p.is_dir() for p in target.iterdir()):
        return
    if overwrite:
        raise OutputExists(path=name, what="more than a checkpoint, and --overwrite replaces nothing else")
    if not facts:
        packed = (target / "packed.safetensors").exists()
        raise OutputExists(path=name, what="a packed model" if packed else "files that sparsec did not write")
    same_recipe = facts.get("recipe_sha") == recipe_sha
    raise OutputExists(
        path=name,
        what=f"{'another model' if same_recipe else 'a model'} pruned with "
        f"{'this' if same_recipe else 'another'} recipe",
    )


def _facts(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / FACTS).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _why(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its place when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"))
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # held while it is written: see _remove_abandoned
        yield folder
        for made in (folder, *folder.rglob("*")):  # temporary files are made for their owner only
            made.chmod(0o755 if made.is_dir() else 0o644)
        _take_place(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _take_place(folder: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.replace(folder, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    os.replace(target, old)
    try:
        os.replace(folder, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Remove what a killed process left: temporary folders of this target that nobody holds a lock on."""
    for left in target.parent.glob(f".{target.name}.*.tmp"):
        with contextlib.suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def _write_folder(model: nn.Module, folder: Path, report: Report | None, tokenizer: Any) -> None:
    transformers_model: Any = model
    note(model)
    if _is_packed(model):
        _write_packed_folder(transformers_model, folder)
    elif hasattr(transformers_model, "save_pretrained"):
        with _no_shard_bar():
            transformers_model.save_pretrained(folder)
    else:
        save_file(_own_tensors(model), folder / WEIGHTS, metadata={**_METADATA, **metadata_of(model)})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    facts: dict[str, Any] = gate_facts(model)
    if report is not None:
        (folder / RECIPE).write_text(report.recipe.to_yaml(), encoding="utf-8")
        facts |= {**report.recipe.made_with, **{k: v for k, v in report.to_dict().items() if k != "recipe"}}
    if facts:
        (folder / FACTS).write_text(json.dumps({"format": 1, **facts}, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _no_shard_bar() -> Iterator[None]:
    """transformers draws a bar on stderr even in a pipe."""
    from transformers.utils import logging as hf_logging

    logging: Any = hf_logging
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _write_file(model: nn.Module, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        _save_tensors(model, name)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _is_packed(model: nn.Module) -> bool:
    return any(type(m).__name__ in ("PackedLinear", "PackedEmbedding") for m in model.modules())


def _write_packed_folder(model: Any, folder: Path) -> None:
    """The packed file, and what ``from_pretrained`` would need to make the architecture again."""
    from sparsec.packed_file import NAME

    for part in ("config", "generation_config"):
        config: Any = getattr(model, part, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)
    _save_tensors(model, folder / NAME)


def _save_tensors(model: nn.Module, file: str | Path) -> None:
    own = _own_tensors(model)
    if not _is_packed(model):
        save_file(own, file, metadata={**_METADATA, **metadata_of(model)})
        return
    from sparsec.packed_file import metadata_of as metadata_of_packed

    shared = {name: names[0] for names, _ in _groups(model) for name in names[1:]}
    save_file(own, file, metadata=metadata_of_packed(model, own, shared))


def _own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with every tensor once: of tied ones the first name, and copies of those that overlap."""
    own: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for names, tensor in _groups(model):
        storage = tensor.untyped_storage().data_ptr()
        own[names[0]] = tensor.clone() if storage in storages else tensor
        own[names[0]] = own[names[0]].contiguous()
        storages.add(storage)
    return own


def _groups(model: nn.Module) -> list[tuple[list[str], torch.Tensor]]:
    """The tensors of a state dict, each with all the names it has there."""
    groups: dict[object, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise BadModelFile(path=name, why=f"it is a {type(tensor).__name__} in the model's state, not a tensor")
        if tensor.device.type == "meta":
            raise BadModelFile(path=name, why="it is on the meta device: the model has no weights yet")
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        key: object = place if tensor.numel() else name
        groups.setdefault(key, ([], tensor))[0].append(name)
    return list(groups.values())


def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Copy a saved checkpoint (folder or ``.safetensors`` file) into ``model``, in place, and return it.

    A packed model's file is mapped, not copied, and replaces the linear layers (``packed_file.load_packed``).
    Weights in compressed-tensors' ``sparse-bitmask`` and ``sparse-24-bitmask`` layouts are read too (``bitmask_file``).

    Strict: every tensor of the model must be there with its shape and none may be left over, or BadModelFile says
    which, before anything is copied. A tied tensor may be there under any one of its names. Values are converted only
    where that loses nothing (bf16 file, fp32 model). Layers that rounded their inputs when they were saved do so again,
    and gates are put in again.
    """
    inner = getattr(model, "_orig_mod", None)
    module = inner if isinstance(inner, nn.Module) else model
    facts, name = _facts(Path(path)), os.fspath(path)
    if (packed := _packed_file(path)) is not None:
        from sparsec.packed_file import load_packed

        with gating(module, facts, name):
            load_packed(packed, module)
        note(module)
        return model
    files = _files(path)
    if _is_packed(module):
        raise BadModelFile(path=name, why="it is dense and the model is packed; call sparsec.unpack_(model)")
    with (
        contextlib.ExitStack() as stack,
        torch.no_grad(),
        rounding(module, said_in(Path(path))),
        gating(module, facts, name),
    ):
        there = Checkpoint(name, [stack.enter_context(_opened(file)) for file in files])
        wanted = _matched(module, there.names, name)
        for key, tensor in wanted.items():
            _check(key, tensor, there.slice(key), name)
        for key, tensor in wanted.items():
            tensor.copy_(there.tensor(key))
    note(module)
    return model


def _packed_file(path: str | os.PathLike[str]) -> Path | None:
    """The file of a packed model at ``path`` (folder or file), if there is one."""
    from sparsec.packed_file import NAME, is_packed_file

    inside = Path(path) / NAME
    if inside.is_file():
        return inside
    return Path(path) if Path(path).is_file() and is_packed_file(Path(path)) else None


def _files(path: str | os.PathLike[str]) -> list[Path]:
    given, name = Path(path), os.fspath(path)
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise ModelNotFound(path=name, why="there is no such file or folder")
    if (given / _INDEX).is_file():
        try:
            shards = sorted(set(json.loads((given / _INDEX).read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise BadModelFile(path=name, why=f"its {_INDEX} is damaged") from None
        return [given / shard for shard in shards]
    if not (given / WEIGHTS).is_file():
        raise BadModelFile(path=name, why=f"it holds no {WEIGHTS}")
    return [given / WEIGHTS]


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        opened = safetensors.safe_open(file, framework="pt", device="cpu")
    except (OSError, safetensors.SafetensorError) as error:
        raise BadModelFile(path=str(file), why=_why(error)) from None
    with opened as content:
        yield content


def _matched(model: nn.Module, there: set[str], path: str) -> dict[str, torch.Tensor]:
    """The names to read -> the tensor of the model that each goes to."""
    wanted: dict[str, torch.Tensor] = {}
    missing: list[str] = []
    left = set(there)
    for names, tensor in _groups(model):
        found = next((name for name in names if name in there), None)
        if found is None:
            missing.append(names[0])
        else:
            wanted[found] = tensor
            left.discard(found)  # two names of one tensor in the file: it comes from a model that does not tie them
    said = [
        f"{word} {_list(names)}" for word, names in (("misses", missing), ("has unexpected", sorted(left))) if names
    ]
    if said:
        raise BadModelFile(path=path, why=f"it {' and '.join(said)}: it was saved from another kind of model")
    return wanted


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check(name: str, tensor: torch.Tensor, stored: Any, path: str) -> None:
    shape = tuple(stored.get_shape())
    if shape != tuple(tensor.shape):
        raise BadModelFile(path=path, why=f"{name} is {shape} there and {tuple(tensor.shape)} in the model")
    dtype = _DTYPES.get(stored.get_dtype())
    if dtype is not None and torch.promote_types(dtype, tensor.dtype) != tensor.dtype:
        raise BadModelFile(path=path, why=f"{name} is {dtype} there; call model.to({dtype}) before loading")
