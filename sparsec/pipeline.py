"""The compiler is this list: a Dynamo graph goes in at the top, a callable comes out at the bottom.

Each stage has one name, used in dumps (``SPARSEC_DUMP``), timings, errors, reports and tests. Stages before
``rewrite`` only read. The weights of the graph are decided and packed here when they are at hand; weights that a
later call brings (regional compilation, updates) go through the same functions in ``runtime.store``.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparsec import compat, dump, onnx, targets
from sparsec.cache import cache_dir
from sparsec.codegen import build
from sparsec.errors import NoCompiler
from sparsec.facts import Decision, Declined, Site, WeightFact
from sparsec.meter import say_at_the_end
from sparsec.options import Options, Policy
from sparsec.passes.graph import View, erase_unused
from sparsec.passes.profile.activations import annotated
from sparsec.passes.rewrite import RULES
from sparsec.passes.rewrite.activation import activation_of
from sparsec.passes.rewrite.contract import Rule
from sparsec.passes.rewrite.expression import evaluate, part_node, part_of
from sparsec.passes.rewrite.gates import only_needed
from sparsec.passes.rewrite.group import group_calls
from sparsec.passes.rewrite.inputs import Inputs, quantised_inputs, unrounded
from sparsec.plan import Plan
from sparsec.records import CompileRecord, LayerRecord, StageRecord
from sparsec.refusals import refusal_of, refused_by
from sparsec.runtime import gpu, library
from sparsec.runtime.parts import needed, spec_of
from sparsec.runtime.store import STORE
from sparsec.targets.base import Target


@dataclass
class Compilation:
    """One graph on its way through the stages. ``gm`` is a copy that may be changed; ``view`` reads it."""

    gm: torch.fx.GraphModule
    example_inputs: Sequence[Any]
    options: Options
    record: CompileRecord = field(default_factory=CompileRecord)
    sites: list[tuple[Site, Rule]] = field(default_factory=list)
    nodes: dict[str, torch.fx.Node] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    computed: dict[str, torch.Tensor] = field(default_factory=dict)
    plans: list[Plan] = field(default_factory=list)
    facts: list[WeightFact] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    compiled: Callable[..., Any] | None = None

    @functools.cached_property
    def target(self) -> Target:
        """The machine of this graph: the GPU, where the policy leaves it open and weights are there."""
        on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in self.example_inputs)
        return targets.for_weights(self.options.policy.target, on_gpu)

    def weight(self, site: Site) -> torch.Tensor:
        """The weight of a site: stored, or computed once from what is."""
        if site.w and site.node not in self.computed:
            self.computed[site.node] = evaluate(site.w, self.parts(site))
        return self.computed[site.node] if site.w else self.weights[site.weight]

    def parts(self, site: Site) -> list[torch.Tensor]:
        """The stored tensors that the op of a site is given as its weight."""
        return [self.weights[name] for name in site.parts or (site.weight,)]


def capture(c: Compilation) -> int:
    """Find the sites; everything linear that is not one keeps its reason."""
    view = View.of(c.gm, c.example_inputs, c.target.device)
    refusal = refusal_of(c.gm, c.example_inputs, c.target)
    for node in c.gm.graph.nodes:
        found, rule = _match(node, view)
        if isinstance(found, Site) and (no := refusal or refused_by(c.target, found)):
            found = Declined(no, node.name, found.fqn, found.kind)
        if isinstance(found, Site):
            found = _with_inputs(c, found, node, view)
        if isinstance(found, Declined):
            c.record.declined.append(found)
        elif found is not None and rule is not None:
            c.sites.append((found, rule))
    c.nodes = {n.name: n for n in c.gm.graph.nodes}
    names = {name for s, _ in c.sites for name in (s.weight, *s.parts)}
    c.weights = {name: part_of(name, c.nodes, view) for name in names}
    c.sites = _with_activations(_with_groups(c), c.gm.graph, view)
    c.plans = [_plan(s, c.options.policy, c.target) for s, _ in c.sites]
    return len(c.sites)


def profile(c: Compilation) -> int:
    """Read the real weights."""
    c.facts = [STORE.profiled(c.weight(s), p) for (s, _), p in zip(c.sites, c.plans, strict=True)]
    return len(c.facts)


def decide(c: Compilation) -> int:
    """Choose, per weight and range of M, the format that pays on this target; dense wins ties."""
    c.decisions = [STORE.decide(c.weight(s), f, p) for (s, _), f, p in zip(c.sites, c.facts, c.plans, strict=True)]
    _note_layers(c)
    return sum(d.ours for d in c.decisions)


def tune(c: Compilation) -> int:
    """Where the policy says so, measure on the real weights what the cost model cannot know, and decide again."""
    if c.options.policy.tune == "off":
        return 0
    before = list(c.decisions)
    for i, (site, _) in enumerate(c.sites):
        c.decisions[i] = STORE.tuned(c.weight(site), c.facts[i], before[i], c.plans[i])
    _note_layers(c)
    return sum(old != new for old, new in zip(before, c.decisions, strict=True))


def rewrite(c: Compilation) -> int:
    """Put the op in the place of every site.

    Dense weights too: the graph may serve other modules whose weights are sparse, and the op runs dense weights with
    the kernel that Inductor would call. An activation is folded only where the weight at hand is sparse. A weight that
    the graph computes, and that runs dense, stays in the graph: Inductor fuses its arithmetic.
    """
    if c.target.whole_graphs:
        return 0
    graph = c.gm.graph
    view = View.of(c.gm, c.example_inputs, c.target.device)
    ops = torch.ops.sparsec if not c.target.gpu else torch.ops.sparsec_gpu
    now: dict[str, torch.fx.Node] = {}  # what stands in the place of a node that is gone
    for i, (site, rule) in enumerate(c.sites):
        node = c.nodes[site.node]
        if _left_alone(c, i):
            continue
        folded = activation_of(node) if needed(c.decisions[i], c.plans[i]) else None
        if folded:
            c.plans[i] = replace(c.plans[i], act=folded[1])
        with graph.inserting_before(node):
            new = rule.emit(graph, node, c.plans[i].encode(), ops)
        last = folded[0] if folded else node
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        now |= {gone.name: new for gone in (last, node)}
        if folded:
            graph.erase_node(last)
        graph.erase_node(node)
        if site.w:
            new.target, weight = ops.linear_codes.default, new.args[1]
            with graph.inserting_before(new):
                parts = [part_node(name, c.nodes, graph) for name in site.parts]
            new.args = (new.args[0], parts, *new.args[2:])
            assert isinstance(weight, torch.fx.Node)
            erase_unused(graph, weight)
        if site.x:
            unrounded(graph, new, view)
    partly = [(now[s.node], now.get(s.needed) or c.nodes[s.needed]) for s in _selecting(c) if s.node in now]
    only_needed(graph, partly, ops)
    if not c.target.gpu:
        group_calls(graph)
    graph.lint()
    c.gm.recompile()
    return len(c.sites)


def generate(c: Compilation) -> int:
    """Write and compile the kernels that the decisions name, those that this machine has not compiled before."""
    if c.target.whole_graphs:
        onnx.library_path(c.options.policy.cache_dir)
        return 1
    if c.target.gpu:
        return 0  # Triton compiles a kernel at its first launch, which packing makes
    found = zip(c.sites, c.decisions, c.plans, strict=True)
    policy = c.options.policy
    parts = [(part, c.weight(site).dtype) for (site, _), decision, plan in found for part in needed(decision, plan)]
    specs = {spec_of(part, dtype, policy) for part, dtype in parts}
    if len(specs) > 1:
        with contextlib.suppress(NoCompiler):  # what an earlier compiler made may be there
            build.compile_all(specs, cache_dir(policy.cache_dir))
    return len({STORE.kernel(part, dtype, policy).spec for part, dtype in parts})


def pack(c: Compilation) -> int:
    """Pack the weights at hand, prove the packs, and put them where the op finds them."""
    if c.target.whole_graphs:
        return 0  # a session packs when it is made
    for (site, _), plan, fact, decision in zip(c.sites, c.plans, c.facts, c.decisions, strict=True):
        if site.w and not needed(decision, plan):
            continue  # it was left in the graph
        text = plan.encode()
        STORE.place(text, c.record, site)
        STORE.install(c.weight(site), text, fact, decision, c.parts(site))
    c.computed.clear()
    return sum(d.ours for d in c.decisions)


def finish(c: Compilation) -> int:
    """Inductor compiles everything, with the ops as opaque calls."""
    if c.target.whole_graphs and c.sites:
        from sparsec.onnx_backend import compile_graph  # it needs onnx

        c.compiled = compile_graph(c.gm, c.example_inputs, c.options, c.target, c.record.declined)
        return 1
    c.compiled = compat.compile_rest(c.gm, c.example_inputs, dict(c.options.inductor))
    return 1


STAGES: tuple[Callable[[Compilation], int], ...] = (
    capture,
    profile,
    decide,
    tune,
    rewrite,
    generate,
    pack,
    finish,
)


def run(c: Compilation, stop_after: str = "finish") -> Compilation:
    """Run the stages in order. An exception carries the name of its stage as ``sparsec_stage``."""
    for number, stage in enumerate(STAGES):
        name = stage.__name__
        started = time.perf_counter()
        try:
            changed = stage(c) if stage is finish else _with_real_tensors(stage, c)
        except Exception as error:
            error.sparsec_stage = name  # type: ignore[attr-defined]
            raise
        c.record.stages.append(StageRecord(name, 1e3 * (time.perf_counter() - started), changed))
        dump.stage(number, c)
        if name == stop_after:
            break
    return c


def prepare(options: Options, on_gpu: bool = False) -> None:
    """Check the target's name and make its ops exist; those of GPUs need no C++ compiler.

    ``on_gpu``: where the weights are. Raises UnknownTarget, BadOptionValue, MissingPackage, NoCompiler, CompileFailed.
    """
    target = targets.for_weights(options.policy.target, on_gpu)
    if target.gpu:
        gpu.load()
    else:
        library.load(options.policy.cache_dir)
    say_at_the_end()
    if target.whole_graphs:
        onnx.runtime()


def placed(options: Options, model: object) -> Options:
    """``options`` with the machine in place of ``auto``: the GPU where a module's weights are there."""
    tensors = model.parameters() if isinstance(model, torch.nn.Module) else ()
    if options.policy.target != "auto" or not any(t.is_cuda for t in tensors):
        return options
    return replace(options, policy=replace(options.policy, target="cuda"))


def inspect(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> list[CompileRecord]:
    """Capture, profile and decide every graph of ``model(*args, **kwargs)``; the model runs eagerly, unchanged.

    Sizes are static, and nothing is left in Dynamo's caches.
    """
    options = placed(options, model)
    prepare(options)
    return [c.record for c in _looked_at(model, args, kwargs, options, "tune")]


def sites_of(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options) -> list[Site]:
    """The sites of every graph of ``model(*args, **kwargs)``, as in ``inspect``; no weight is read."""
    found = _looked_at(model, args, kwargs, placed(options, model), "capture")
    return [site for c in found for site, _ in c.sites]


def _looked_at(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, stop_after: str
) -> list[Compilation]:
    seen: list[Compilation] = []

    def look(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        seen.append(Compilation(gm, example_inputs, options))
        run(seen[-1], stop_after=stop_after)
        return gm.forward

    with compat.looking_only():
        looked_at: Any = torch.compile(compat.own_frame(model), backend=look)
        looked_at(*args, **kwargs)
    return seen


def _with_real_tensors(stage: Callable[[Compilation], int], c: Compilation) -> int:
    if stage is capture or stage is rewrite:  # these read fake values and must stay in Dynamo's fake mode
        return stage(c)
    with compat.real_tensors():
        return stage(c)


def _match(node: torch.fx.Node, view: View) -> tuple[Site | Declined | None, Rule | None]:
    for rule in RULES:
        found = rule.match(node, view)
        if found is not None:
            return found, rule
    return None, None


def _with_inputs(c: Compilation, site: Site, node: torch.fx.Node, view: View) -> Site:
    """The site with its rounding of x in it, where that is taken; else the reason is recorded."""
    operand = next((n for n in node.all_input_nodes if n.name == site.reads), None)
    found = quantised_inputs(operand, node, view) if operand is not None else None
    if isinstance(found, Inputs) and c.target.gpu:
        found = Declined(
            "the rounding of its inputs is not taken on GPUs so far; it stays in the graph", op="activations"
        )
    if isinstance(found, Declined):
        c.record.declined.append(replace(found, fqn=site.fqn))
    return replace(site, x=found.x, reads=found.raw.name) if isinstance(found, Inputs) else site


def _plan(s: Site, policy: Policy, target: Target) -> Plan:
    gates = "" if target.whole_graphs or s.conv else _gates(s)
    m = _rows(s.x_shape)
    if target.whole_graphs:
        policy = replace(policy, formats=onnx.formats_of(policy.formats, s.x))
    origin = s.gate.origin if s.gate and "skip" in gates else ""
    return Plan(s.fqn, s.kind, policy, "", s.transposed, m, s.x, s.w, gates, s.conv, origin)


def _gates(s: Site) -> str:
    """The loops of ``Plan.gates``. Rows are gathered from the weight as it is stored, so not from a transposed one."""
    loops = [f"skip={1 - s.gate.rate:g}" if s.gate.rate else "skip"] if s.gate and s.gate.zeros else []
    loops += ["select"] if s.needed and s.kind == "linear" and not s.w else []
    return " ".join(loops)


def _left_alone(c: Compilation, i: int) -> bool:
    return bool(c.sites[i][0].w) and not needed(c.decisions[i], c.plans[i])


def _selecting(c: Compilation) -> list[Site]:
    """The sites of which only the rows are computed whose outputs somebody reads."""
    found = zip(c.sites, c.plans, strict=True)
    return [site for (site, _), plan in found if any(loop == "select" for loop, _ in plan.loops)]


def _note_layers(c: Compilation) -> None:
    found = zip(c.sites, c.facts, c.decisions, strict=True)
    c.record.layers[:] = [LayerRecord(site.fqn, site, fact, decision) for (site, _), fact, decision in found]


def _with_groups(c: Compilation) -> list[tuple[Site, Rule]]:
    """Name the sites that read one x after the first of them: they are called together."""
    readers: dict[str, list[Site]] = {}
    for site, _ in c.sites:
        if site.reads:
            readers.setdefault(site.reads, []).append(site)
    names = {s.node: group[0].node for group in readers.values() if len(group) > 1 for s in group}
    return [(replace(site, group=names.get(site.node, "")), rule) for site, rule in c.sites]


def _with_activations(found: list[tuple[Site, Rule]], graph: torch.fx.Graph, view: View) -> list[tuple[Site, Rule]]:
    """The sites with what the graph says of zeros of x, and of results that nobody reads."""
    with compat.real_tensors():
        sites = annotated([site for site, _ in found], graph, view)
    return [(site, rule) for site, (_, rule) in zip(sites, found, strict=True)]


def _rows(shape: tuple[int | str, ...]) -> int:
    """Rows of x as [M, K]; 0 when a size is symbolic."""
    rows = 1
    for size in shape[:-1]:
        if isinstance(size, str):
            return 0
        rows *= size
    return rows
