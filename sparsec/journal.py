"""The state of a run on disk, block by block, so that a killed run goes on where it was.

In: the tensors and report rows of each finished block. Out: the same bits, in a later process that does the same run:
the same model, recipe and data. One safetensors file a block, then a line in ``journal.json``; both are written under
another name and renamed, so whatever a kill leaves behind is a whole block or none.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.cache import digest, read_json, sealed, write_atomic
from sparsec.errors import JournalFailed, OtherRun, SparsecWarning

if TYPE_CHECKING:
    import torch

STATE = "sparsec_journal"  # the folder in a run's output folder
_INDEX = "journal.json"


class Journal:
    """``key`` tells runs apart: a digest of all that shapes their result. ``about`` names its parts.

    ``about`` is what an error says about another run in ``folder``: ``{"model": sha, "recipe": sha, "data": sha}``.
    Raises OtherRun where the folder holds another run, JournalFailed where it cannot be written.
    """

    def __init__(self, folder: str | Path, key: str, about: Mapping[str, str]) -> None:
        self.folder = Path(folder) / STATE
        self.taken = 0  # blocks that ``load`` gave
        self._made = not Path(folder).exists()
        found = _read(self.folder)
        if found is not None and found["key"] != key:
            raise OtherRun(folder=str(folder), differs=_differs(found["about"], about), state=str(self.folder))
        self._index: dict[str, Any] = found or {"key": key, "about": dict(about), "blocks": {}}
        if found is None:
            self._write(self.folder / _INDEX, sealed(self._index), "the first block")
        for half in self.folder.glob(".*"):  # what a killed process was writing
            half.unlink(missing_ok=True)

    @staticmethod
    def held(folder: str | Path) -> bool:
        """Whether an output folder holds an unfinished run."""
        return (Path(folder) / STATE / _INDEX).is_file()

    @property
    def done(self) -> dict[int, str]:
        """Position -> name of the blocks that were saved, in order. ``load`` may still find one damaged."""
        blocks: Mapping[str, Any] = self._index["blocks"]
        return {index: str(blocks[str(index)]["name"]) for index in sorted(map(int, blocks))}

    def save(
        self, index: int, name: str, tensors: Mapping[str, torch.Tensor], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Keep block ``index``: tensors of any shape and dtype, rows of JSON types. Raises JournalFailed."""
        from safetensors.torch import save

        data = save(_separate(tensors))
        plain = re.sub(r"[^\w.-]", "_", name)[:100]
        file = f"{index:04d}-{plain}.safetensors"
        self._write(self.folder / file, data, name)
        entry = {"name": name, "file": file, "sum": digest(data), "rows": json.loads(json.dumps(list(rows)))}
        index_now = {**self._index, "blocks": {**self._index["blocks"], str(index): entry}}
        self._write(self.folder / _INDEX, sealed(index_now), name)
        self._index = index_now

    def load(self, index: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]] | None:
        """The tensors (on the CPU) and rows of block ``index``, or None where it was not saved or is damaged."""
        from safetensors.torch import load

        entry = self._index["blocks"].get(str(index))
        if entry is None:
            return None
        path = self.folder / entry["file"]
        try:
            data = path.read_bytes()
            if digest(data) != entry["sum"]:
                raise ValueError("its checksum does not match")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            warnings.warn(f"{path} cannot be used ({why}); this block is done again", SparsecWarning, stacklevel=2)
            return None
        self.taken += 1
        return load(data), [dict(row) for row in entry["rows"]]

    def finish(self) -> None:
        """Remove the state; what else is in the output folder stays."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._made:
            with suppress(OSError):  # it holds something by now
                self.folder.parent.rmdir()

    def _write(self, path: Path, data: bytes, name: str) -> None:
        try:
            write_atomic(path, data)
        except OSError as error:
            raise JournalFailed(folder=str(self.folder), why=error.strerror or str(error), name=name) from error


def check_journal(folder: str | Path, about: Mapping[str, str]) -> None:
    """Raise OtherRun where ``folder`` holds a run that differs in anything that ``about`` names. Writes nothing."""
    state = Path(folder) / STATE
    found = _read(state)
    if found is not None and any(found["about"].get(name) != value for name, value in about.items()):
        theirs = {name: found["about"].get(name, "") for name in about}
        raise OtherRun(folder=str(folder), differs=_differs(theirs, about), state=str(state))


@contextmanager
def kept_until_done(journal: Journal | None, keep: bool = False) -> Iterator[None]:
    """A run: its state is removed at its end, unless ``keep``. Of a run that fails it stays where a block is in it."""
    try:
        yield
    except BaseException:
        if journal and not journal.done:
            journal.finish()
        raise
    if journal and not keep:
        journal.finish()


def _read(folder: Path) -> dict[str, Any] | None:
    """The index of a folder; None where there is none, or it is damaged (``read_json`` warns)."""
    if not (folder / _INDEX).is_file():
        return None
    found = read_json(folder / _INDEX)
    return found if isinstance(found, dict) and {"key", "about", "blocks"} <= set(found) else None


def _differs(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    names = [name for name in {**ours, **theirs} if theirs.get(name) != ours.get(name)]
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "run"


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As safetensors takes them: on the CPU, contiguous, no two of them in one piece of memory."""
    seen: set[int] = set()
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return made
