"""Packed models in files: one safetensors file that is mapped when it is loaded, and packs nothing again.

In: a model after ``pack_``. Out: a file whose tensors are the packs and whatever stayed dense, each with a checksum in
the metadata (key ``sparsec``), and back. Loading reads each byte once, for its checksum; the tensors of the model then
are the mapped pages of the file, which the system may drop and share. Nothing of the model is touched before the whole
file was checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from sparsec import __version__, targets
from sparsec.errors import BadPack, BadPackedFile, SparsecError
from sparsec.pack_report import PackReport, PackRow
from sparsec.packable import is_packable, kind_of
from sparsec.packed import (
    ABOUT,
    META,
    PACK,
    PackedEmbedding,
    PackedWeight,
    buffer_names,
    checked,
    packed_layer,
    text_of,
)
from sparsec.passes.decide.whole import WholePlan
from sparsec.rounding import plain_but, rounded_inputs, rounding
from sparsec.runtime.packed import Meta

LAYOUT = 3  # of this file and of the packs in it; another one cannot be read
KEY = "sparsec"
NAME = "packed.safetensors"  # in a folder; not a name that other tools would take for plain weights


# ------------------------------------------------------------------------------------------------------------- save


def metadata_of(model: nn.Module, tensors: Mapping[str, torch.Tensor], shared: Mapping[str, str]) -> dict[str, str]:
    """What the file says beside its tensors. ``shared``: name -> the name under which the same tensor is stored."""
    isas = {name: targets.resolve(Meta.decode(m.get_buffer(META)).target).isa for name, m in model.named_modules()
            if isinstance(m, PackedWeight)}  # fmt: skip
    said = {
        "layout": LAYOUT,
        "version": __version__,
        "isas": isas,
        "shared": dict(shared),
        "inputs": rounded_inputs(model),
        "sums": {name: tensor_sum(name, tensor) for name, tensor in tensors.items()},
    }
    text = json.dumps(said, sort_keys=True)
    return {"format": "pt", KEY: text, f"{KEY}_sum": _hash(text.encode())}


def tensor_sum(name: str, tensor: torch.Tensor) -> str:
    """A checksum of a tensor's name, dtype, shape and bytes."""
    head = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    return _hash(head, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _hash(*parts: bytes | memoryview) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


# ------------------------------------------------------------------------------------------------------------- load


@dataclass(frozen=True)
class _Content:
    """A checked file: its tensors by every name that the model has for them, its packed layers, and which others
    round their inputs."""

    path: str
    tensors: dict[str, torch.Tensor]
    metas: dict[str, Meta]
    inputs: dict[str, str]


def is_packed_file(path: Path) -> bool:
    """Whether a file says that it holds a packed model; its content may still be damaged."""
    with contextlib.suppress(OSError, safetensors.SafetensorError), safetensors.safe_open(path, framework="pt") as f:
        return KEY in (f.metadata() or {})
    return False


def load_packed(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put the packed layers and the dense tensors of a file into ``model``, in place, and return it.

    ``model``: of the architecture that was saved, dense (on the meta device too) or packed. Dense tensors take the
    file's dtype. The file is mapped: replace it by renaming (``sparsec.save`` does), never write into it.
    Layers that rounded their inputs when they were saved do so again, packed or not.
    Raises BadPackedFile, after which the model is as it was.
    """
    content = _read(os.fspath(path))
    with rounding(model, plain_but(model, content.inputs)):
        _check_model(content, model)
        made: dict[str, PackedWeight] = {}
        for name in content.metas:
            bias, count = content.tensors.get(f"{name}.bias"), content.metas[name].tensors + 2
            pack = [content.tensors[f"{name}.{part}"] for part in buffer_names(count)]
            try:
                made[name] = packed_layer(pack, bias, content.tensors[f"{name}.{ABOUT}"])
            except BadPack as error:
                raise BadPackedFile(path=content.path, why=f"{name}: {error}") from None
    for name, layer in made.items():
        _replace(model, name, layer)
    _assign(content, model)
    return model


def report_of(path: str | os.PathLike[str]) -> PackReport:
    """The table of a saved packed model, without a model to load it into. Raises BadPackedFile."""
    content = _read(os.fspath(path))
    same: dict[int, list[str]] = {}  # layers by the tensor that they share
    for name in sorted(content.metas, key=_natural):
        same.setdefault(id(content.tensors[f"{name}.{PACK}0"]), []).append(name)
    return PackReport(Path(path).name, tuple(_row(content, names) for names in same.values()))


def _row(content: _Content, names: list[str]) -> PackRow:
    meta = content.metas[names[0]]
    said = [text_of(content.tensors[f"{name}.{ABOUT}"]) for name in names]
    about = next((a for a in said if a.get("kind") != "Embedding"), None)
    plan = None
    if about is not None:
        numbers = about.get("dense_from"), about.get("worst", 0.0), about.get("worst_at", 1)
        plan = WholePlan(meta.format, meta.routes, *numbers, 0.0, meta.reads)
    pack = [content.tensors[f"{names[0]}.{part}"] for part in buffer_names(meta.tensors + 2)]
    size = sum(t.numel() * t.element_size() for t in pack)
    dense, density = meta.n * meta.k * meta.torch_dtype.itemsize, said[0].get("density", 1.0)
    return PackRow(names[0], (meta.n, meta.k), dense, tuple(names[1:]), "", meta.format, size, plan, density)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        opened = safetensors.safe_open(path, framework="pt", device="cpu")
    except (OSError, safetensors.SafetensorError) as error:
        raise BadPackedFile(path=path, why=_first_line(error)) from None
    with opened as content:
        yield content


def _read(path: str) -> _Content:
    with _opened(path) as file:
        said = _said(file.metadata() or {}, path)
        sums, names = said["sums"], set(file.keys())
        if names != set(sums):
            odd = sorted(names ^ set(sums))[0]
            raise BadPackedFile(path=path, why=f"the file is damaged: {odd} is not what its list of tensors says")
        tensors: dict[str, torch.Tensor] = {}
        for name in sorted(names):
            try:
                tensor = file.get_tensor(name)
            except (OSError, safetensors.SafetensorError, ValueError, RuntimeError) as error:
                raise BadPackedFile(path=path, why=f"{name} cannot be read ({_first_line(error)})") from None
            if tensor_sum(name, tensor) != sums[name]:
                raise BadPackedFile(path=path, why=f"the file is damaged: {name} does not match its checksum")
            tensors[name] = tensor
    tensors.update({name: tensors[first] for name, first in said["shared"].items() if first in tensors})
    metas = {name.removesuffix(f".{META}"): name for name in tensors if name.endswith(f".{META}")}
    found = {layer: _meta(layer, tensors, said["isas"].get(layer, ""), path) for layer in sorted(metas)}
    return _Content(path, tensors, found, dict(said.get("inputs", {})))


def _said(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    text = metadata.get(KEY)
    if text is None:
        raise BadPackedFile(path=path, why="it holds no packed model", help="Load it with sparsec.load if it is dense.")
    if metadata.get(f"{KEY}_sum") != _hash(text.encode()):
        raise BadPackedFile(path=path, why="the file is damaged: its metadata does not match its checksum")
    said: dict[str, Any] = json.loads(text)
    if said.get("layout") != LAYOUT:
        why = f"it has layout version {said.get('layout')}, and sparsec {__version__} reads version {LAYOUT}"
        raise BadPackedFile(path=path, why=why, help="Pack the dense model again with this version.")
    return said


def _meta(layer: str, tensors: Mapping[str, torch.Tensor], isa: str, path: str) -> Meta:
    """The meta of a layer whose tensors are all there, of a layout that this version and this machine read."""
    again = "Pack the dense model again on this machine."
    try:
        meta = Meta.decode(tensors[f"{layer}.{META}"])
        pack = [tensors[f"{layer}.{part}"] for part in buffer_names(meta.tensors + 2)]
        if set(tensors) & {f"{layer}.{PACK}{i}" for i in range(99)} - {f"{layer}.{n}" for n in buffer_names(len(pack))}:
            raise ValueError("more tensors than the meta says")
        checked(pack)
        family = meta.family
        text_of(tensors[f"{layer}.{ABOUT}"])
    except (KeyError, ValueError, SparsecError):
        raise BadPackedFile(
            path=path, why=f"the pack of {layer} is not one that this version knows", help=again
        ) from None
    current = getattr(family, "version", 1)
    if meta.version != current:
        why = f"{layer} has version {meta.version} of the layout {meta.format}, and version {current} is read here"
        raise BadPackedFile(path=path, why=why, help=again)
    try:
        here = targets.resolve(meta.target).isa
    except SparsecError:
        why = f"{layer} was packed for {meta.target}, which this machine cannot run"
        raise BadPackedFile(path=path, why=why, help=again) from None
    if getattr(family, "isa_bound", False) and isa != here:
        why = f"the layout of {layer} ({meta.format}) is that of {isa or 'another machine'}, and this machine is {here}"
        raise BadPackedFile(path=path, why=why, help=again)
    return meta


def _check_model(content: _Content, model: nn.Module) -> None:
    """Raise BadPackedFile unless every tensor of the model is there with its shape, and none is left over."""
    modules = dict(model.named_modules(remove_duplicate=False))
    other = "Give the architecture that was saved."
    for name, meta in content.metas.items():
        module = modules.get(name)
        bias = content.tensors.get(f"{name}.bias")
        looked_up = text_of(content.tensors[f"{name}.{ABOUT}"]).get("kind") == "Embedding"
        there = f"{name} is a packed {'embedding' if looked_up else 'linear'} [{meta.n}, {meta.k}] there"
        if (
            module is None
            or not (is_packable(module) or isinstance(module, PackedWeight))
            or looked_up != isinstance(module, (nn.Embedding, PackedEmbedding))
        ):
            what = "has no such layer" if module is None else f"has a {type(module).__name__}"
            raise BadPackedFile(path=content.path, why=f"{there}, and the model {what}", help=other)
        n, k = _shape_of(module)
        if (n, k) != (meta.n, meta.k):
            raise BadPackedFile(path=content.path, why=f"{there} and [{n}, {k}] in the model", help=other)
        if (bias is not None) != (module._parameters.get("bias") is not None):
            why = f"{there} with{'out' if bias is None else ''} a bias, and in the model it is the other way"
            raise BadPackedFile(path=content.path, why=why, help=other)
    wanted, there_names = _dense_names(content, model)
    missing, left = sorted(set(wanted) - there_names), sorted(there_names - set(wanted))
    for word, names in (("misses", missing), ("has", left)):
        if names:
            why = f"it {word} {', '.join(names[:3])}: it was saved from another kind of model"
            raise BadPackedFile(path=content.path, why=why, help=other)
    for name, tensor in wanted.items():
        if content.tensors[name].shape != tensor.shape:
            shapes = f"{tuple(content.tensors[name].shape)} there and {tuple(tensor.shape)} in the model"
            raise BadPackedFile(path=content.path, why=f"{name} is {shapes}", help=other)


def _dense_names(content: _Content, model: nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The model's tensors that are not of packed layers, by name; and the names of such tensors in the file."""
    inside = tuple(f"{name}." for name in content.metas)

    def dense(name: str) -> bool:
        return not any(name.startswith(prefix) and "." not in name[len(prefix) :] for prefix in inside)

    wanted = {name: t for name, t in model.state_dict().items() if isinstance(t, torch.Tensor) and dense(name)}
    return wanted, {name for name in content.tensors if dense(name)}


def _shape_of(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, PackedWeight):
        return module.out_features, module.in_features
    weight: Any = module._parameters["weight"]
    rows, columns = (int(s) for s in weight.shape)
    return (columns, rows) if kind_of(module) == "Conv1D" else (rows, columns)


def _replace(model: nn.Module, name: str, layer: PackedWeight) -> None:
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    old = holder._modules[child]
    assert old is not None
    layer.train(old.training)
    layer._forward_hooks, layer._forward_pre_hooks = old._forward_hooks, old._forward_pre_hooks
    for module in model.modules():  # a layer in several places stays one
        for key, value in module._modules.items():
            if value is old:
                module._modules[key] = layer


def _assign(content: _Content, model: nn.Module) -> None:
    """Make the mapped tensors the model's parameters and buffers; those that share one there share one here."""
    made: dict[int, nn.Parameter] = {}
    wanted, _ = _dense_names(content, model)
    for name in wanted:
        holder, _, leaf = name.rpartition(".")
        module = model.get_submodule(holder)
        tensor = content.tensors[name]
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
            continue
        old = module._parameters[leaf]
        assert old is not None
        made.setdefault(
            id(tensor), nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
        )
        module._parameters[leaf] = made[id(tensor)]


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part) if part.isdigit() else -1, part) for part in name.split(".")]


def _first_line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
