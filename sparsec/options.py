"""``options=`` of ``torch.compile(..., backend="sparsec")``: checked once, then frozen.

``Options`` is what the user said. ``Policy`` is the part of it that a weight's decision depends on; its text travels
inside the graph (as an argument of the op), so caches that hash the graph see it and any process can decode it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from sparsec.efforts import EFFORTS
from sparsec.errors import BadOptionValue, UnknownOption, did_you_mean, listed
from sparsec.formats import Format, Pattern


@dataclass(frozen=True)
class Policy:
    """How a weight is decided when it is first seen. ``formats`` empty means every format is allowed."""

    target: str = "auto"
    formats: tuple[str, ...] = ()
    tune: str = "off"
    tune_budget_s: float = 60.0
    min_speedup: float = 1.05
    verify: bool = False
    cache_dir: str = ""

    def encode(self) -> str:
        """Short, sorted JSON that holds only what differs from the defaults."""
        default = asdict(Policy())
        return json.dumps({k: v for k, v in asdict(self).items() if v != default[k]}, sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> Policy:
        said = json.loads(text)
        if "formats" in said:
            said["formats"] = tuple(said["formats"])
        return cls(**said)


@dataclass(frozen=True)
class Options:
    """Everything the user may say. ``inductor`` is handed to Inductor as its config patches."""

    policy: Policy = field(default_factory=Policy)
    inductor: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def parse(cls, said: Mapping[str, Any] | None) -> Options:
        """Check a user's dict. Raises UnknownOption, BadOptionValue, UnknownFormat (and UnknownTarget later)."""
        said = dict(said or {})
        known = [f.name for f in fields(Policy)] + ["inductor"]
        for key in said:
            if key not in known:
                raise UnknownOption(key=key, nearest=did_you_mean(str(key), known), known=listed(known))
        inductor = said.pop("inductor", None) or {}
        _check_inductor(inductor)
        checked: dict[str, Any] = {key: _CHECKS[key](key, value) for key, value in said.items()}
        policy = replace(Policy(), **checked)
        if os.environ.get("SPARSEC_VERIFY", "0") not in ("", "0"):
            policy = replace(policy, verify=True)
        return cls(policy, tuple(sorted(inductor.items())))

    def to_dict(self) -> dict[str, Any]:
        """What ``parse`` reads back, without what is as by default."""
        said: dict[str, Any] = json.loads(self.policy.encode())
        return said | ({"inductor": dict(self.inductor)} if self.inductor else {})


def _text(key: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise BadOptionValue(key=key, value=value, expected="a text is needed")
    return os.fspath(value)


def _effort(key: str, value: Any) -> str:
    if value is False:  # YAML reads a bare `off` as False
        return "off"
    if value not in EFFORTS:
        raise BadOptionValue(key=key, value=value, expected=f"it must be one of {', '.join(EFFORTS)}")
    return str(value)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise BadOptionValue(key=key, value=value, expected="a number of at least 0 is needed")
    return float(value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadOptionValue(key=key, value=value, expected="True or False is needed")
    return value


def _formats(key: str, value: Any) -> tuple[str, ...]:
    if value in ("auto", None):
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, str) for n in names):
        raise BadOptionValue(key=key, value=value, expected='"auto", a format name or a list of names is needed')
    for name in names:
        Format.parse(name) if "+" in name else Pattern.parse(name)
    return tuple(sorted(set(names)))


def _check_inductor(patches: Any) -> None:
    if not isinstance(patches, Mapping):
        raise BadOptionValue(key="inductor", value=patches, expected="a dict of torch._inductor.config names is needed")
    if not patches:
        return
    from torch._inductor import config

    known = list(config.get_config_copy())
    for key in patches:
        name = str(key).replace("-", "_")
        if name not in known:
            raise UnknownOption(
                key=f"inductor.{key}",
                nearest=did_you_mean(name, known),
                known="the names in torch._inductor.config",
            )


_CHECKS = {
    "target": _text,
    "formats": _formats,
    "tune": _effort,
    "tune_budget_s": _number,
    "min_speedup": _number,
    "verify": _flag,
    "cache_dir": _text,
}
