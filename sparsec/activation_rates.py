"""Measured rates of zeros on disk, beside the tuning database: one file a weight, found by what the weight holds.

In: ``Rates`` of one weight. Out: the same in any later process. A file is written whole or not at all, so that any
number of processes may share the directory, and the newest count stays; a damaged one is a sentence, and not used.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsec.cache import cache_dir, digest, sealed, wanted_dir, write_atomic
from sparsec.errors import SparsecWarning, TuningNotKept
from sparsec.facts import Rates

FOLDER = "activation_rates"
_DIGITS = 10_000  # channels are kept as whole numbers of these
_said: set[Path] = set()


def rate_of(key: str, origin: str = "", cache: str = "") -> Rates | None:
    """What was counted for the weight with this content key (``WeightFact.key``), or None.

    ``origin``: what makes the zeros now; what was counted of zeros of another origin is not given. ``cache``: as the
    option ``cache_dir``; a directory that cannot be written is read as well.
    """
    for folder in dict.fromkeys((cache_dir(cache), wanted_dir(cache))):
        found = _read(folder / FOLDER / f"{key}.json")
        if found is not None and (not origin or not found.origin or found.origin == origin):
            return found
    return None


def keep(rates: Rates, cache: str = "") -> Path:
    """Write rates where ``rate_of`` finds them. Raises TuningNotKept where nothing can be written."""
    path = cache_dir(cache) / FOLDER / f"{rates.key}.json"
    value = asdict(rates) | {"channels": [int(share * _DIGITS) for share in rates.channels]}
    try:
        write_atomic(path, sealed(value))
    except OSError as error:
        raise TuningNotKept(path=str(path), why=error.strerror or str(error)) from error
    return path


def _read(path: Path) -> Rates | None:
    try:
        wrapped = json.loads(path.read_bytes())
        value = wrapped["value"]
        if wrapped["sum"] != digest(json.dumps(value, sort_keys=True)):
            raise ValueError("its checksum does not match")
        return _rates(value, path.stem)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if path not in _said:
            _said.add(path)
            what = "it is not used; sparsec.calibrate(model, data) writes it anew"
            warnings.warn(f"the activation rates in {path} are damaged ({error}); {what}", SparsecWarning, stacklevel=3)
        return None


def _rates(value: Mapping[str, Any], key: str) -> Rates:
    """Raises ValueError, KeyError or TypeError for what is none."""
    rates = Rates(
        key=str(value["key"]),
        origin=str(value["origin"]),
        tokens=int(value["tokens"]),
        zeros=float(value["zeros"]),
        rows=tuple((int(m), float(share)) for m, share in value["rows"]),
        channels=tuple(int(share) / _DIGITS for share in value["channels"]),
        when=float(value["when"]),
    )
    shares = (rates.zeros, *(share for _, share in rates.rows), *rates.channels)
    if rates.key != key or not all(0 <= share <= 1 for share in shares):
        raise ValueError("it holds rates of another weight, or none")
    return rates
