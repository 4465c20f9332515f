"""The store: what is known, decided and packed for each weight, found by the weight's identity.

In: weights that the C++ op meets for the first time (or again after a change). Out: an entry in the op's table that
serves every later call without Python. Facts and packs are shared by content, so tied or copied weights are packed
once. Nothing here keeps a weight alive.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from sparsec.activation_rates import rate_of
from sparsec.cache import cache_dir
from sparsec.codegen import build, cpp, reference, triton
from sparsec.codegen.spec import ACTS, Kernel, Packed
from sparsec.compat import is_fake
from sparsec.errors import SparsecWarning, VerifyError
from sparsec.facts import Decision, Range, Site, WeightFact
from sparsec.formats import Format
from sparsec.options import Policy
from sparsec.passes.decide import decide, dense_decision
from sparsec.passes.decide.candidates import PARTS_OF_WEIGHT
from sparsec.passes.decide.conv import conv_rates
from sparsec.passes.graph import DTYPES
from sparsec.passes.profile.weights import profile
from sparsec.plan import Plan
from sparsec.records import CompileRecord, LayerRecord
from sparsec.runtime import gpu
from sparsec.runtime.gpu_watch import Watch
from sparsec.runtime.parts import (
    FOREVER,
    computed,
    matrix,
    most_left,
    needed,
    of_whole,
    pack_key,
    rounds,
    route,
    runs_dense,
    spec_of,
    target_of,
)
from sparsec.targets.base import Rates, Target
from sparsec.targets.cuda import GpuTarget

# A weight that changed after fewer uses than this is served dense for `uses * 2` calls before it is packed again:
# packing costs about as much as a hundred dense calls.
MIN_USES = 16
MAX_WAIT = 4096
# Weights in a row that died after one use, at one place of one graph: they are made anew for every call (offloading,
# functional_call), so later ones are served dense without being looked at. Compiling again starts afresh.
MAX_SHORT_LIVED = 4
CONV_MS = (64, 1024)  # rows at which a convolution of images of any size is measured: pixels, not tokens


@dataclass
class Held:
    """What the store keeps for one living weight and plan."""

    packs: list[Packed] = field(default_factory=list)
    wait: int = MIN_USES


class Store:
    """One per process; every method may be called from several threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held: dict[tuple[int, str], Held] = {}
        self._packs: weakref.WeakValueDictionary[tuple[str, str], Packed] = weakref.WeakValueDictionary()
        self._places: dict[str, tuple[weakref.ref[CompileRecord], Site]] = {}
        self._short_lived: dict[str, int] = {}
        self._watched: set[int] = set()
        self.verified = 0  # comparisons made under verify=True
        self.packed_count = 0  # packs made in this process, for tests and `doctor`

    # ------------------------------------------------------------------------------------------ called by the op

    def resolve(self, weight: torch.Tensor, plan_text: str) -> None:
        """Decide, pack and install one stored weight; see ``resolve_parts``."""
        self.resolve_parts([weight], plan_text)

    def resolve_parts(self, parts: Sequence[torch.Tensor], plan_text: str) -> None:
        """Decide, pack and install one weight: a stored tensor, or what the plan computes from several.

        Any failure installs dense, with the reason recorded.
        """
        with self._lock, torch.no_grad():
            plan = Plan.decode(plan_text)
            if self._changes_too_fast(parts, plan_text):
                return
            try:
                weight = computed(parts, plan_text)
                fact, decision = self.decided(weight, plan)
                self.install(weight, plan_text, fact, decision, parts)
            except Exception as error:  # the answer must come out whatever happens here
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"sparsec runs {plan.name or 'a layer'} dense: {reason}", SparsecWarning, stacklevel=2)
                fact, decision = None, dense_decision(reason, "fallback")
                self._install_dense(parts, plan_text)
            self._note(plan_text, fact, decision)

    def verify(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        y: torch.Tensor,
        plan_text: str,
        x_scale: float = 0.0,
    ) -> None:
        """Compare one result with the reference. Raises VerifyError; counts comparisons in ``verified``.

        ``x_scale``: as in ``reference.linear``, where the plan quantises x.
        """
        plan = Plan.decode(plan_text)
        w = matrix(weight, plan)
        wide = reference.quantised(x, x_scale) if plan.x else x.float()
        expected = reference.linear(wide, w, bias, plan.act).to(x.dtype).float()
        scale = reference.linear(wide.abs(), w.abs().float(), bias.abs().float() if bias is not None else None, "")
        rounding = 2.0**-7 if x.dtype == torch.bfloat16 else 0.0
        # dense products of bf16 round the quantised x to it, which the reference does not
        share = 2e-5 if x.dtype == torch.float32 else 2.0**-8 if plan.x else 1e-3
        allowed = share * scale + rounding * expected.abs() + 1e-30
        off = ((y.float() - expected).abs() / allowed).masked_fill(y.float() == expected, 0.0)
        off = torch.nan_to_num(off, nan=float("inf"))
        finite = bool(x.isfinite().all())  # zero weights skip x, so 0 * inf is 0 here and NaN in dense
        worst = float(off.max()) if off.numel() and finite else 0.0
        self.verified += 1
        if worst > 1.0:
            raise VerifyError(where=plan.name, format=plan.kind, error=worst, allowed=1.0)

    # ---------------------------------------------------------------------------------- called by the pipeline

    def decided(self, weight: torch.Tensor, plan: Plan) -> tuple[WeightFact, Decision]:
        """Profile a weight and decide how it runs; measure where the policy says so."""
        fact = self.profiled(weight, plan)
        return fact, self.tuned(weight, fact, self.decide(weight, fact, plan), plan)

    def profiled(self, weight: torch.Tensor, plan: Plan) -> WeightFact:
        return profile(matrix(weight, plan).cpu())

    def decide(self, weight: torch.Tensor, fact: WeightFact, plan: Plan) -> Decision:
        """By the cost model, with the rates of this machine."""
        target, dtype = target_of(weight, plan.policy), DTYPES[weight.dtype]
        rates = _rates(fact, dtype, target, plan)
        return decide(fact, dtype, target, rates, plan.policy, x=plan.x_type, gates=gates_of(fact, plan))

    def tuned(self, weight: torch.Tensor, fact: WeightFact, decision: Decision, plan: Plan) -> Decision:
        """The decision again, by measurements on this very weight; unchanged where the policy does not tune."""
        policy = plan.policy
        if policy.tune == "off":
            return decision
        from sparsec.tune import measured_for

        target, dtype = target_of(weight, policy), DTYPES[weight.dtype]
        ms = (plan.m,) if plan.m else CONV_MS if plan.conv else ()
        rates, gates = _rates(fact, dtype, target, plan), gates_of(fact, plan)
        said = ms, plan.x_type, plan.conv, gates
        measured = measured_for(matrix(weight, plan), fact, dtype, target, policy, *said)
        return decide(fact, dtype, target, rates, policy, measured, plan.x_type, gates)

    def install(
        self,
        weight: torch.Tensor,
        plan_text: str,
        fact: WeightFact,
        decision: Decision,
        made_of: Sequence[torch.Tensor] = (),
    ) -> None:
        """Pack what the decision names, build its kernels and put both into the op's table.

        ``made_of``: what the op is given as its weight, where that is not ``weight`` itself.
        """
        plan = Plan.decode(plan_text)
        owners = made_of or [weight]
        if any(is_fake(tensor) for tensor in owners):
            return
        target = target_of(weight, plan.policy)
        parts = needed(decision, plan)
        packs: dict[str, Packed] = {}
        for part in parts:
            key = pack_key(part, target)
            packs[key] = packs.get(key) or self.packed(matrix(weight, plan), fact, part, target)
        held = self._held.setdefault((owners[0]._cdata, plan_text), Held())
        held.packs = list(packs.values())
        if isinstance(target, GpuTarget):
            routes = tuple(_route_on_gpu(p, packs[pack_key(p, target)], weight, fact, plan, target) for p in parts)
            self._put_on_gpu(weight, plan_text, routes, target)
            return
        tensors: list[torch.Tensor] = []
        table: list[int] = []
        for part in parts:
            packed = packs[pack_key(part, target)]
            kernel = self.kernel(part, weight.dtype, plan.policy)
            hi = FOREVER if part.m_hi is None else part.m_hi
            table += route(part.m_lo, hi, kernel, packed, len(tensors), most_left(part, fact))
            tensors += [*packed.tensors, packed.work]
        dense = weight if plan.w and (plan.policy.verify or runs_dense(decision, plan)) else None
        self._put(owners, plan_text, weight, tensors, table, dense=dense)

    def packed(self, weight: torch.Tensor, fact: WeightFact, part: Range, target: Target) -> Packed:
        """The proven pack of a [N, K] weight, on its device; made once per content, format and device."""
        key = (fact.key, f"{pack_key(part, target)} {weight.device}")
        known = self._packs.get(key)
        if known is not None:
            return known
        format = Format.parse(part.format)
        if target.gpu:
            packed = triton.pack_verified(weight, format, fact.key, part.kernel)
        else:
            packed = cpp.pack_verified(weight.detach(), format, fact.key, x=rounds(part), loop=part.kernel)
        self._packs[key] = packed
        self.packed_count += 1
        return packed

    def kernel(self, part: Range, dtype: torch.dtype, policy: Policy) -> Kernel:
        """The compiled kernel of one range of a decision; made once per process, compiled once per machine."""
        return build.build(spec_of(part, dtype, policy), cache_dir(policy.cache_dir))

    def place(self, plan_text: str, record: CompileRecord, site: Site) -> None:
        """Remember which layer a plan belongs to, so that weights seen later are reported under its name."""
        self._places[plan_text] = (weakref.ref(record), site)
        self._short_lived.pop(plan_text, None)

    def forget(self, weight: torch.Tensor) -> None:
        """Drop everything known about one weight; it is looked at again at the next call."""
        with self._lock:
            self._drop(weight._cdata)

    # ------------------------------------------------------------------------------------------------- inside

    def _put(
        self,
        parts: Sequence[torch.Tensor],
        plan_text: str,
        weight: torch.Tensor,
        tensors: list[torch.Tensor],
        table: list[int],
        wait: int = 0,
        dense: torch.Tensor | None = None,
    ) -> None:
        plan = Plan.decode(plan_text)
        n, k = matrix(weight, plan).shape
        x_kind, x_number = plan.x_rule
        facts = [ACTS.index(plan.act), int(plan.transposed), int(plan.policy.verify), n, k, wait]
        facts += [int(bool(plan.w)), int(weight.dtype == torch.bfloat16), x_kind]
        facts += plan.conv.numbers if plan.conv else ()
        torch.ops.sparsec.install(list(parts), plan_text, facts, x_number, tensors, table, dense)
        self._watch(parts[0], plan_text)

    def _put_on_gpu(
        self, weight: torch.Tensor, plan_text: str, routes: tuple[gpu.Route, ...], target: GpuTarget, wait: int = 0
    ) -> None:
        plan = Plan.decode(plan_text)
        entry = gpu.Entry(
            weakref.ref(weight), weight.data_ptr(), gpu.version_of(weight), plan.transposed, plan.act,
            target.capability, plan.policy.verify, wait, routes,
        )  # fmt: skip
        gpu.TABLE.put(weight, plan_text, entry)
        self._watch(weight, plan_text)

    def _watch(self, weight: torch.Tensor, plan_text: str) -> None:
        if weight._cdata not in self._watched:
            self._watched.add(weight._cdata)
            weakref.finalize(weight, _died, weight._cdata, plan_text).atexit = False

    def _install_dense(self, parts: Sequence[torch.Tensor], plan_text: str, wait: int = 0) -> None:
        """No kernel; a weight that is computed is computed at every call, as the graph did."""
        lead, plan = parts[0], Plan.decode(plan_text)
        self._held.setdefault((lead._cdata, plan_text), Held()).packs = []
        target = target_of(lead, plan.policy)
        if isinstance(target, GpuTarget):
            self._put_on_gpu(lead, plan_text, (), target, wait)
        else:
            self._put(parts, plan_text, computed(parts, plan_text), [], [], wait)

    def _changes_too_fast(self, parts: Sequence[torch.Tensor], plan_text: str) -> bool:
        """Serve dense, without looking at the values, a weight whose packs never live long enough to pay."""
        if self._short_lived.get(plan_text, 0) >= MAX_SHORT_LIVED:
            self._install_dense(parts, plan_text)
            return True
        lead = parts[0]._cdata
        held = self._held.get((lead, plan_text))
        if held is None or not held.packs:
            return False
        if uses(lead, plan_text) >= MIN_USES:
            held.wait = MIN_USES
            return False
        held.wait = min(2 * held.wait, MAX_WAIT)
        self._install_dense(parts, plan_text, held.wait)
        return True

    def _note(self, plan_text: str, fact: WeightFact | None, decision: Decision) -> None:
        reference_, site = self._places.get(plan_text, (None, None))
        record = reference_() if reference_ is not None else None
        if record is None or site is None or fact is None:
            return
        record.layers.append(LayerRecord(site.fqn, site, fact, decision))

    def _drop(self, impl: int) -> int:
        self._watched.discard(impl)
        for key in [key for key in self._held if key[0] == impl]:
            del self._held[key]
        ours = int(torch.ops.sparsec.forget(impl)) if hasattr(torch.ops.sparsec, "forget") else 0
        return ours + gpu.TABLE.forget(impl)


def _died(impl: int, plan_text: str) -> None:
    """A weight was collected: free its packs, and remember whether it was used often enough to have paid."""
    with STORE._lock:
        uses = STORE._drop(impl)
        STORE._short_lived[plan_text] = STORE._short_lived.get(plan_text, 0) + 1 if uses <= 1 else 0


def _route_on_gpu(
    part: Range, packed: Packed, weight: torch.Tensor, fact: WeightFact, plan: Plan, target: GpuTarget
) -> gpu.Route:
    tuned: tuple[tuple[int, gpu.Config], ...] = ()
    if plan.policy.tune != "off":
        from sparsec.tune_gpu import tuned_configs

        dtype = DTYPES[weight.dtype]
        known = matrix(weight, plan), fact, dtype, part, packed, target, plan.policy
        tuned = tuned_configs(*known, gates_of(fact, plan))
    watch = Watch(most_left(part, fact), of_whole(part, fact)) if part.kernel in PARTS_OF_WEIGHT else None
    return gpu.Route(part.m_lo, part.m_hi or FOREVER, packed, part.kernel, tuned=tuned, watch=watch)


def uses(impl: int, plan_text: str) -> int:
    """How often a weight was used under a plan; -1 where it is not known."""
    known = gpu.TABLE.uses(impl, plan_text)
    if known >= 0 or not hasattr(torch.ops.sparsec, "uses"):
        return known
    return int(torch.ops.sparsec.uses(impl, plan_text))


def _rates(fact: WeightFact, dtype: str, target: Target, plan: Plan) -> Rates:
    from sparsec.measure import rates_for  # it runs kernels, so it imports this package

    cache, threads = cache_dir(plan.policy.cache_dir), torch.get_num_threads()
    loops = tuple(loop for loop, _ in plan.loops)
    found = rates_for(fact, dtype, target, threads, cache, plan.policy.formats, plan.x_type, loops)
    return conv_rates(found, plan.conv)


def gates_of(fact: WeightFact, plan: Plan) -> tuple[tuple[str, float | None], ...]:
    """(loop, share left) of each loop that the plan allows: as calibrated for this weight, else as the graph says."""
    counted = rate_of(fact.key, plan.origin, plan.policy.cache_dir) if plan.loops and fact.key else None
    left = 1.0 - counted.at(max(plan.m, 1)) if counted else None
    return tuple((loop, left if loop == "skip" and left is not None else said) for loop, said in plan.loops)


def invalidate(model: torch.nn.Module | torch.Tensor) -> int:
    """Look again at every weight of ``model``, after an edit that nothing can see (``p.data.mul_(...)``).

    Returns the number of weights that were forgotten. Edits in place, ``load_state_dict`` and swapped parameters are
    noticed without this.
    """
    tensors = [model] if isinstance(model, torch.Tensor) else [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        STORE.forget(tensor)
        if parts := sys.modules.get("sparsec.runtime.onnx_parts"):  # only where that target was used
            parts.forget(tensor)
    return len(tensors)


@contextlib.contextmanager
def borrowed(model: object) -> Iterator[None]:
    """Forget at the end those weights of a module that were not known before: a trial keeps no packs."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, torch.nn.Module) else []
    strangers = [t for t in tensors if t._cdata not in STORE._watched]
    try:
        yield
    finally:
        for tensor in strangers:
            if tensor._cdata in STORE._watched:
                STORE.forget(tensor)


STORE = Store()
