"""The text that travels in the graph beside each weight: what to do with a weight when it is first seen.

It is an argument of the op, so every cache that hashes the graph sees it, and any process can decode it: no registry.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from sparsec.facts import Conv
from sparsec.options import Policy

RAW, PER_TOKEN, FIXED, GIVEN = range(4)  # the kinds of ``InputRule`` in ``runtime/inputs.h``

OPS = 5  # changes with the arguments of the ops: caches of compiled graphs hash the plan's text, not the ops' schemas


def input_rule(said: str) -> tuple[int, float]:
    """(kind, number) of what ``Site.x`` says: the number is the scale of FIXED, the least scale of PER_TOKEN."""
    kind, _, rest = said.partition(":")
    if not kind:
        return RAW, 0.0
    if rest == "given":
        return GIVEN, 0.0
    least, found, number = rest.partition("=")
    if found and least == "min":
        return PER_TOKEN, float(number)
    return (FIXED, float(rest)) if rest else (PER_TOKEN, 0.0)


@dataclass(frozen=True)
class Plan:
    """``name``: the layer. ``act``: folded activation. ``kind``: linear, matmul, addmm, hf_conv1d, conv2d.

    ``transposed``: the weight is stored [K, N]. ``m``: rows of x when the graph was made (0: dynamic). ``x``: how x is
    quantised, as ``Site.x`` says it. ``w``: how the weight is computed (``expression.encode``); "": it is a tensor.
    ``gates``: the loops that activation sparsity allows, ``skip`` and ``select``, each with ``=`` and the share that is
    left where the graph says it.
    ``origin``: what makes the zeros of x, as ``ActFact.origin`` says it. ``conv``: how a convolution walks; None for
    everything else.
    """

    name: str
    kind: str
    policy: Policy
    act: str = ""
    transposed: bool = False
    m: int = 0
    x: str = ""
    w: str = ""
    gates: str = ""
    conv: Conv | None = None
    origin: str = ""

    @property
    def loops(self) -> tuple[tuple[str, float | None], ...]:
        """(loop, share left or None) of ``gates``."""
        parts = (part.partition("=") for part in self.gates.split() if part)
        return tuple((loop, float(share) if share else None) for loop, _, share in parts)

    @property
    def x_rule(self) -> tuple[int, float]:
        """``input_rule`` of x."""
        return input_rule(self.x)

    @property
    def x_type(self) -> str:
        """What x is rounded to: "int8" or nothing."""
        return self.x.partition(":")[0]

    def encode(self) -> str:
        body = {"n": self.name, "k": self.kind, "a": self.act, "t": int(self.transposed), "m": self.m}
        body |= {"x": self.x, "w": self.w, "g": self.gates, "z": self.origin, "o": OPS}
        body["c"] = [*self.conv.numbers, *self.conv.image] if self.conv else []
        return json.dumps({**{k: v for k, v in body.items() if v}, "p": json.loads(self.policy.encode())})

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def decode(cls, text: str) -> Plan:
        body = json.loads(text)
        policy = Policy.decode(json.dumps(body.get("p", {})))
        act, transposed, m = body.get("a", ""), bool(body.get("t")), body.get("m", 0)
        conv = Conv.of(body["c"]) if body.get("c") else None
        x, w, gates, origin = (body.get(key, "") for key in "xwgz")
        return cls(body.get("n", ""), body["k"], policy, act, transposed, m, x, w, gates, conv, origin)
