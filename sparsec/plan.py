"""The text that travels in the graph beside each weight: what to do with a weight when it is first seen.

It is an argument of the op, so every cache that hashes the graph sees it, and any process can decode it: no registry.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from sparsec.options import Policy


@dataclass(frozen=True)
class Plan:
    """``name``: the layer. ``act``: folded activation. ``kind``: linear, matmul, addmm, hf_conv1d, conv1x1.

    ``transposed``: the weight is stored [K, N]. ``m``: rows of x when the graph was made (0: dynamic).
    """

    name: str
    kind: str
    policy: Policy
    act: str = ""
    transposed: bool = False
    m: int = 0

    def encode(self) -> str:
        body = {"n": self.name, "k": self.kind, "a": self.act, "t": int(self.transposed), "m": self.m}
        return json.dumps({**{k: v for k, v in body.items() if v}, "p": json.loads(self.policy.encode())})

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def decode(cls, text: str) -> Plan:
        body = json.loads(text)
        policy = Policy.decode(json.dumps(body.get("p", {})))
        return cls(body.get("n", ""), body["k"], policy, body.get("a", ""), bool(body.get("t")), body.get("m", 0))
