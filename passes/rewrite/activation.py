"""linear followed by one activation function -> the kernel's epilogue.

Before: y = gelu(linear(x, w, b))        the linear has no other user
After:  y = sparsec.linear(x, w, b, plan)       plan names the activation
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import Node

_PLAIN = {torch.relu: "relu", F.relu: "relu", torch.relu_: "relu", F.silu: "silu"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_of(node: Node) -> tuple[Node, str] | None:
    """The activation node that may be folded into ``node``, and its name in ``codegen.spec.ACTS``."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if not user.args or user.args[0] is not node:
        return None
    if user.op == "call_method" and user.target == "relu":
        return user, "relu"
    if user.op != "call_function":
        return None
    if user.target in _PLAIN:
        return user, _PLAIN[user.target]  # type: ignore[index]
    if user.target is F.gelu:
        kind = user.kwargs.get("approximate", user.args[1] if len(user.args) > 1 else "none")
        return (user, _GELU[kind]) if kind in _GELU else None  # type: ignore[index]
    return None
