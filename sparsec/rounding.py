"""Which layers round their inputs, kept with a model: beside its weights in files, and put back into its modules.

That a layer rounds is its class (``passes.quantize.inputs``), and no checkpoint holds classes. So it is said in words,
``{name: "int8" or "int8:0.05"}``, where words survive: in the config of a Hugging Face model (``sparsec.inputs``),
which ``save_pretrained`` writes and ``from_pretrained`` reads; in the metadata of our own ``.safetensors`` files; and
in ``sparsec.json``. ``from_pretrained`` makes plain layers all the same, so ``restore`` makes them round again, and
``forgotten`` says where that was not done.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
from torch import nn

from sparsec.errors import BadModelFile
from sparsec.passes.quantize.inputs import QuantizesInput, inputs_of, refusal, set_inputs

KEY, METADATA, FACTS = "sparsec", "sparsec_inputs", "sparsec.json"
ModelT = TypeVar("ModelT", bound=nn.Module)


def rounded_inputs(model: nn.Module) -> dict[str, str]:
    """The layers that round their inputs by themselves, packed ones not among them: name -> ``inputs_of``."""
    return {name: said for name, module in model.named_modules() if (said := inputs_of(module))}


@contextlib.contextmanager
def rounding(model: nn.Module, said: Mapping[str, str]) -> Iterator[None]:
    """Make the layers of ``model`` round their inputs as ``said``; as before, where the block does not end well.

    "" makes a layer plain. Layers that ``said`` does not name, or that cannot round, stay as they are.
    """
    modules = dict(model.named_modules())
    layers = {modules[name]: word for name, word in said.items() if name in modules and not refusal(modules[name])}
    before = {module: inputs_of(module) for module in layers}
    try:
        for module, word in layers.items():
            set_inputs(module, word)
        yield
    except BaseException:
        for module, word in before.items():
            set_inputs(module, word)
        raise


def plain_but(model: nn.Module, said: Mapping[str, str]) -> dict[str, str]:
    """``said``, and "" for every other layer that rounds now."""
    return {**{name: "" for name, m in model.named_modules() if isinstance(m, QuantizesInput)}, **said}


# ------------------------------------------------------------------------------------------- what a config says


def noted(model: nn.Module) -> dict[str, str]:
    """What the config of a Hugging Face model says, by the names of this model's modules; {} for any other model."""
    config = getattr(model, "config", None)
    found = getattr(config, KEY, None)
    said = found.get("inputs") if isinstance(found, Mapping) else None
    if not isinstance(said, Mapping):
        return {}
    names = {name for name, _ in model.named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def here(name: str) -> str:
        """The name in a base model of what was saved with a head, and the other way."""
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), name)

    return {here(str(name)): str(word) for name, word in said.items()}


def note(model: nn.Module) -> None:
    """Let the config of a Hugging Face model say which layers round now; other models have none."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return
    said = {name: word for name, module in model.named_modules() if (word := _said_of(module))}
    found = getattr(config, KEY, None)
    rest = {k: v for k, v in found.items() if k != "inputs"} if isinstance(found, Mapping) else {}
    if said or rest:
        setattr(config, KEY, {**rest, **({"inputs": said} if said else {})})
    elif hasattr(config, KEY):
        delattr(config, KEY)


@contextlib.contextmanager
def noting(model: nn.Module) -> Iterator[None]:
    """``note`` at the end of a block, however it ends."""
    try:
        yield
    finally:
        note(model)


def forgotten(model: nn.Module) -> tuple[str, ...]:
    """The layers that a model's config says round their inputs, and that do not, or by another scale."""
    modules = dict(model.named_modules())
    return tuple(name for name, word in noted(model).items() if name not in modules or _said_of(modules[name]) != word)


def restore(model: ModelT) -> ModelT:
    """Make the layers of a Hugging Face model round their inputs as its config says, in place; returns the model.

    ``from_pretrained`` gives plain layers, whatever was saved: call this after it. A model whose config says nothing
    stays as it is. Raises BadModelFile where a layer that should round is not there, or is none that can; the model is
    then as it was.
    """
    said, modules = noted(model), dict(model.named_modules())
    for name in forgotten(model):
        why = refusal(modules[name]) if name in modules else "the model has no such layer"
        if why:
            where = str(getattr(model, "name_or_path", "") or type(model).__name__)
            raise BadModelFile(path=where, why=f"its config says that {name} rounds its inputs, and {why}")
    with rounding(model, said):
        return model


def restore_from(folder: Path | None, model: nn.Module) -> None:
    """``restore``; and what a folder says whose config does not, since it was saved before configs said it."""
    restore(model)
    with rounding(model, said_in(folder) if folder else {}):
        note(model)


def warning_of(model: nn.Module) -> str:
    """What to tell whoever runs a model whose config was forgotten; "" where it was not."""
    names = forgotten(model)
    if not names:
        return ""
    what = f"{names[0]} rounds its" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more round their"
    return (
        f"the model's config says that {what} inputs to int8, and that is not so here: from_pretrained makes plain "
        "layers. Call sparsec.restore(model) after it"
    )


def _said_of(module: nn.Module) -> str:
    if type(module).__name__ == "PackedLinear":
        return str(getattr(module, "inputs", ""))
    return inputs_of(module)


# --------------------------------------------------------------------------------------------- what files say


def said_in(path: Path) -> dict[str, str]:
    """Which layers rounded their inputs when the checkpoint (folder or file) was saved; "" for those that did not."""
    found: dict[str, str] = {}
    for row in _json(path / FACTS).get("layers", ()):
        found[row["name"]] = row.get("inputs", "")
    config = _json(path / "config.json").get(KEY)
    found |= config.get("inputs", {}) if isinstance(config, dict) else {}
    file = path if path.is_file() else path / "model.safetensors"
    with contextlib.suppress(OSError, ValueError, safetensors.SafetensorError), safetensors.safe_open(file, "pt") as f:
        found |= json.loads((f.metadata() or {}).get(METADATA, "{}"))
    return found


def metadata_of(model: nn.Module) -> dict[str, str]:
    """What a file says besides its tensors; nothing for a model that rounds no inputs."""
    said = rounded_inputs(model)
    return {METADATA: json.dumps(said, sort_keys=True)} if said else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
