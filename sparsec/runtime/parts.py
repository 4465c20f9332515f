"""What a plan and a decision say of one weight: which ranges run on our kernels, from which pack, on which machine.

No state: the store keeps what these functions name.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsec import targets
from sparsec.codegen import cpp, triton
from sparsec.codegen.spec import Kernel, KernelSpec, Packed
from sparsec.facts import Decision, Range, WeightFact
from sparsec.formats import Format
from sparsec.options import Policy
from sparsec.passes.decide.candidates import PARTS_OF_WEIGHT
from sparsec.passes.graph import DTYPES
from sparsec.passes.rewrite.expression import evaluate
from sparsec.plan import Plan
from sparsec.targets.base import Target

FOREVER = 2**62  # rows of x that no call has
LOOPS = ("", *PARTS_OF_WEIGHT)  # the positions are the numbers of ``Loop`` in ``table.h``


def needed(decision: Decision, plan: Plan) -> list[Range]:
    """The ranges that run on our kernels; of a graph made for one M only that one, so that nothing else is packed."""
    ranges = [decision.at(plan.m)] if plan.m else decision.ranges
    return [*gated(decision, plan), *(r for r in ranges if r.format != "dense")]


def gated(decision: Decision, plan: Plan) -> list[Range]:
    """The ranges that serve calls whose activations are sparse; of a graph made for one M only that one."""
    return [r for r in decision.gated if not plan.m or r.holds(plan.m)]


def of_whole(part: Range, fact: WeightFact) -> int:
    """How many columns or outputs a range that reads a part of the weight could leave out."""
    return fact.k if part.kernel == "skip" else fact.n


def most_left(part: Range, fact: WeightFact) -> int:
    """Up to how many of them such a range pays."""
    return int(part.below * of_whole(part, fact))


def runs_dense(decision: Decision, plan: Plan) -> bool:
    ranges = [decision.at(plan.m)] if plan.m else decision.ranges
    return any(r.format == "dense" for r in ranges)


def computed(parts: Sequence[torch.Tensor], plan_text: str) -> torch.Tensor:
    """The weight that a plan makes of the tensors its op is given: the one of them, or what they compute."""
    text = Plan.decode(plan_text).w
    return evaluate(text, parts) if text else parts[0]


def target_of(weight: torch.Tensor, policy: Policy) -> Target:
    """The machine that runs a weight: what the policy names, and with ``auto`` the one that the weight is on."""
    return targets.for_weights(policy.target, weight.is_cuda)


def pack_key(part: Range, target: Target) -> str:
    """What ranges must have in common to share a pack: the format, what its kernels do to x, and on GPUs the family
    that reads it."""
    if not target.gpu:
        return f"{part.format}/{rounds(part)}/{cpp.pack_of(part.kernel)}"
    return f"{part.format} {triton.kind_of(Format.parse(part.format), part.kernel)}"


def rounds(part: Range) -> str:
    """What the kernel of a range rounds x to: "int8" of ``dot/int8``."""
    return part.kernel.partition("/")[2]


def spec_of(part: Range, dtype: torch.dtype, policy: Policy) -> KernelSpec:
    """The kernel of a range on the CPU that a policy means."""
    return KernelSpec.on(targets.resolve(policy.target), Format.parse(part.format), part.kernel, DTYPES[dtype])


def matrix(weight: torch.Tensor, plan: Plan) -> torch.Tensor:
    """The weight as [N, K], a view where the layout allows one."""
    weight = weight.detach()
    if plan.transposed:
        return weight.t()
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1) if plan.conv else weight


def route(m_lo: int, m_hi: int, kernel: Kernel, packed: Packed, first: int, most: int = 0) -> list[int]:
    """The twelve integers of a route in ``table.h``. ``most``: columns or rows up to which activation sparsity pays."""
    tiles = packed.work.numel() - 1
    addresses = [kernel.run, kernel.prepare, kernel.prepare_units, kernel.scratch]
    loop = LOOPS.index(kernel.spec.loop) if kernel.spec.loop in LOOPS else 0
    x8 = int(kernel.spec.x == "int8")
    return [m_lo, m_hi, *addresses, first, len(packed.tensors), tiles, x8, loop, most]
