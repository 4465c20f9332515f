"""The trials of a search on disk, so that a killed one goes on: JSON lines, first what they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparsec.cache import write_atomic
from sparsec.errors import OtherRun, WriteFailed
from sparsec.search_front import Trial
from sparsec.search_space import key_of

FILE = "trials.jsonl"


@dataclass
class Store:
    """``about``: what trials must share to be compared: ``{"model": sha, "data": sha, "search space": sha}``.

    ``inductor``: the seconds that the first process counted from. The file is written anew with each trial, under
    another name first, so a kill leaves whole lines.
    """

    path: Path | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    inductor: float = 1.0
    trials: dict[str, Trial] = field(default_factory=dict)

    @classmethod
    def at(cls, folder: str | os.PathLike[str] | None, about: Mapping[str, str], inductor: float = 1.0) -> Store:
        """The store of a folder, with what it holds; in memory without one. Raises OtherRun where it is another's."""
        if folder is None:
            return cls(None, about, inductor)
        path = Path(folder) / FILE
        store = cls(path, about, inductor)
        if not path.exists():
            return store
        try:
            head, *rest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            theirs, store.inductor, found = (
                head["about"],
                float(head["inductor"]),
                [Trial.from_dict(said) for said in rest],
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise OtherRun(folder=os.fspath(folder), differs="program or version", state=str(path)) from None
        if differs := [name for name in about if theirs.get(name) != about[name]]:
            raise OtherRun(folder=os.fspath(folder), differs=" and ".join(differs), state=str(path))
        store.trials = {key_of(trial.params): trial for trial in found}
        return store

    def get(self, key: str) -> Trial | None:
        return self.trials.get(key)

    def add(self, key: str, trial: Trial) -> Trial:
        """Keep it. Raises WriteFailed."""
        self.trials[key] = trial
        if self.path is not None:
            rows = [
                {"about": dict(self.about), "inductor": self.inductor},
                *(t.to_dict() for t in self.trials.values()),
            ]
            try:
                write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
            except OSError as error:
                raise WriteFailed(path=str(self.path), why=error.strerror or str(error)) from error
        return trial
