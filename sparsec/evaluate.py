"""What a change to a model cost, measured so that small differences can be told from noise.

In: a loaded model, the dense one it came from, a text. Out: an ``Evaluation`` whose rows carry the value, its standard
error over windows, and the difference from the dense model *paired per window* with a 95 % interval: the windows'
own difficulty, which is most of the spread, cancels.

ppl          exp(mean negative log-likelihood per token) over consecutive windows; each window is a context of its own.
kl           mean over tokens of KL(dense || model) in nats, and how often both prefer the same next token (top1).
similarity   cosine between the mean-pooled embeddings of the model and of the dense one, per paragraph (encoders).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sparsec.errors import BadOptionValue, InputError, did_you_mean
from sparsec.models import LoadedModel

if TYPE_CHECKING:
    import torch

TASKS = {"ppl": "causal", "kl": "causal", "similarity": "encoder"}  # task -> kind of model it is for
NEED_DENSE = ("kl", "similarity")
WINDOW = 256
ROUNDING = 1e-6  # fp32 sums differ by as much between two runs of one model
MOST_CHARACTERS = 16  # per token wanted; a tokenizer needs no more of a long text
Step = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Result:
    """One metric. ``value`` ± ``stderr`` over ``n`` windows; ``dense`` is the dense model's value of the same windows.

    ``delta``: model - dense, mean of paired differences, in nats per token for ppl (where value is exp of that scale)
    and in the metric's unit otherwise; ``interval``: its 95 % interval (Student's t over windows). For kl, top1 and
    similarity the dense model compared with itself is exactly 0, 1 and 1, so delta is the distance from that.
    ``verdict``: better, worse, not separable, or "" without a dense model or with fewer than two windows.
    """

    task: str
    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None
    n: int
    dense: float | None = None
    delta: float | None = None
    interval: tuple[float, float] | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Evaluation:
    """All rows and what they were measured on. ``text``: the file's name; ``window``: tokens of a window."""

    model: str
    dense: str
    text: str
    tokenizer: str
    window: int
    tokens: int
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: LoadedModel,
    dense: LoadedModel | None,
    text: str,
    tasks: Sequence[str] = (),
    *,
    limit: int | None = None,
    window: int | None = None,
    batch: int = 4,
    text_name: str = "",
    step: Step | None = None,
) -> Evaluation:
    """Run ``tasks`` (default: all that fit) on the first ``limit`` windows of ``text``.

    ``window``: tokens, default 256 or the model's context where that is shorter. ``batch`` windows run at once; it
    changes no value beyond rounding. Raises BadOptionValue, InputError (text too short, tokenizers that differ).
    """
    tasks = check_tasks(tasks, model, dense)
    window = check_window(window, model)
    if limit is not None and limit < 1:
        raise BadOptionValue(key="limit", value=limit, expected="it must be at least 1")
    causal = model.kind == "causal"
    batches = list(_batches(_windows(model, dense, text, window, limit, causal), batch))
    measure = _Measures(model, dense, tasks)
    for i, inputs in enumerate(batches):
        if step:
            step(i, len(batches), "windows")
        measure.add(inputs)
    tokens = sum(int(b["attention_mask"].sum()) for b in batches)
    return Evaluation(
        model.name,
        dense.name if dense else "",
        text_name,
        type(_tokenizer(model, dense)).__name__ if _tokenizer(model, dense) else "bytes",
        window,
        tokens,
        tuple(measure.results()),
    )


def check_tasks(tasks: Sequence[str], model: LoadedModel, dense: LoadedModel | None) -> tuple[str, ...]:
    """The tasks to run. Raises BadOptionValue for one that is unknown, or that this model cannot do."""
    if not tasks:
        chosen = tuple(t for t, kind in TASKS.items() if kind == model.kind and (dense or t not in NEED_DENSE))
        if not chosen:
            need = "name the dense model with --against" if model.kind == "encoder" else "it needs token ids"
            raise BadOptionValue(
                key="tasks", value="", expected=f"no task fits {model.name} ({model.kind}) alone; {need}"
            )
        return chosen
    for task in tasks:
        if task not in TASKS:
            known = ", ".join(TASKS)
            raise BadOptionValue(key="tasks", value=task, expected=f"the tasks are {known}{did_you_mean(task, TASKS)}")
        if TASKS[task] != model.kind:
            fits = ", ".join(t for t, kind in TASKS.items() if kind == model.kind) or "none"
            expected = f"it is for {TASKS[task]} models and {model.name} is {model.kind}; what fits: {fits}"
            raise BadOptionValue(key="tasks", value=task, expected=expected)
        if task in NEED_DENSE and dense is None:
            raise BadOptionValue(key="tasks", value=task, expected="it compares with a dense model: --against DENSE")
    return tuple(dict.fromkeys(tasks))


def check_window(window: int | None, model: LoadedModel) -> int:
    """Tokens of a window. Raises BadOptionValue where the model cannot take as many."""
    context = model.context or WINDOW
    if window is None:
        return min(WINDOW, context)
    if not 2 <= window <= context:
        raise BadOptionValue(key="window", value=window, expected=f"{model.name} takes 2 to {context} tokens")
    return window


def paired(differences: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean and 95 % interval (Student's t) of paired differences; no interval from fewer than two."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    half = t_quantile(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, (mean - half, mean + half)


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for 1 and 2, else its expansion in 1/freedom (A&S 26.7.5)."""
    if freedom == 1:
        return 12.706204736
    if freedom == 2:
        return 4.302652730
    z = 1.959963985
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom ** (i + 1)) for i, term in enumerate(terms))


def text_windows(
    model: LoadedModel, text: str, *, window: int | None = None, limit: int | None = None
) -> list[list[int]]:
    """Token ids of ``text`` as ``evaluate`` cuts it. Raises BadOptionValue, InputError (text too short)."""
    return _windows(model, None, text, check_window(window, model), limit, model.kind == "causal")


def read_windows(
    model: LoadedModel, windows: Sequence[list[int]], *, batch: int = 4, step: Step | None = None
) -> torch.Tensor:
    """What a model says of each window: mean negative log-likelihoods [windows] (causal), else embeddings
    [windows, hidden]; fp64 on the CPU. Kept while the model is changed and read again, no second model is needed.
    """
    import torch

    device = next((p.device for p in model.model.parameters()), None)
    found = []
    with torch.no_grad():
        for i, group in enumerate(_batches(windows, batch)):
            if step:
                step(i * batch, len(windows), "windows")
            inputs = {key: value.to(device) for key, value in group.items()}
            if model.kind == "causal":
                values = _nll(_log_probabilities(model, inputs), inputs["input_ids"])
            else:
                values = _embedding(model, inputs)
            found.append(values.double().cpu())
    return torch.cat(found)


def compare_windows(before: torch.Tensor, after: torch.Tensor) -> tuple[Result, tuple[float, ...]]:
    """Two readings of the same windows as one row (ppl, or similarity), and the difference of each window.

    Raises InputError where a reading is not finite.
    """
    if before.dim() == 1:
        ours, theirs = _finite(after, "ppl"), _finite(before, "ppl")
        differences = tuple(a - b for a, b in zip(ours, theirs, strict=True))
        return _perplexity(ours, theirs), differences
    cosine = _finite(_cosine(after, before), "cosine")
    found = _result("similarity", "cosine", True, cosine, [1.0] * len(cosine))
    return found, tuple(value - 1.0 for value in cosine)


class _Measures:
    """Runs both models on each batch and keeps one number per window and metric."""

    def __init__(self, model: LoadedModel, dense: LoadedModel | None, tasks: Sequence[str]) -> None:
        self.model, self.dense, self.tasks = model, dense, tasks
        self.ours: dict[str, list[float]] = {}
        self.theirs: dict[str, list[float]] = {}

    def add(self, inputs: dict[str, torch.Tensor]) -> None:
        import torch

        with torch.no_grad():
            if self.model.kind == "causal":
                self._add_causal(inputs)
            else:
                self._keep(self.ours, "cosine", _cosine(_embedding(self.model, inputs), self._dense(inputs)))

    def _dense(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        assert self.dense is not None
        return _embedding(self.dense, inputs)

    def _add_causal(self, inputs: dict[str, torch.Tensor]) -> None:
        ids = inputs["input_ids"]
        ours = _log_probabilities(self.model, inputs)
        theirs = _log_probabilities(self.dense, inputs) if self.dense else None
        if "ppl" in self.tasks:
            self._keep(self.ours, "ppl", _nll(ours, ids))
            if theirs is not None:
                self._keep(self.theirs, "ppl", _nll(theirs, ids))
        if "kl" in self.tasks and theirs is not None:
            self._keep(self.ours, "kl", (theirs.exp() * (theirs - ours)).sum(-1).mean(-1))
            self._keep(self.ours, "top1", (theirs.argmax(-1) == ours.argmax(-1)).float().mean(-1))

    @staticmethod
    def _keep(where: dict[str, list[float]], metric: str, values: torch.Tensor) -> None:
        where.setdefault(metric, []).extend(_finite(values, metric))

    def results(self) -> Iterator[Result]:
        for metric, values in self.ours.items():
            if metric == "ppl":
                yield _perplexity(values, self.theirs.get("ppl"))
            else:
                ideal = 0.0 if metric == "kl" else 1.0
                task = "similarity" if metric == "cosine" else "kl"
                yield _result(task, metric, metric != "kl", values, [ideal] * len(values))


def _finite(values: torch.Tensor, metric: str) -> list[float]:
    numbers: list[float] = values.double().tolist()
    if not all(map(math.isfinite, numbers)):
        raise InputError(detail=f"a model's output is not finite ({metric}); look for NaN or infinite weights in it")
    return numbers


def _perplexity(values: Sequence[float], dense: Sequence[float] | None) -> Result:
    """Windows hold mean negative log-likelihoods; value and stderr go to the perplexity's scale (delta method)."""
    found = _result("ppl", "ppl", False, values, dense)
    value = math.exp(min(found.value, 700.0))
    return Result(
        **{
            **vars(found),
            "value": value,
            "stderr": None if found.stderr is None else value * found.stderr,
            "dense": None if found.dense is None else math.exp(min(found.dense, 700.0)),
        }
    )


def _result(task: str, metric: str, higher: bool, values: Sequence[float], dense: Sequence[float] | None) -> Result:
    n = len(values)
    stderr = statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    if dense is None:
        return Result(task, metric, higher, statistics.fmean(values), stderr, n)
    delta, interval = paired([ours - theirs for ours, theirs in zip(values, dense, strict=True)])
    verdict = ""
    if interval is not None:
        above, below = interval[0] > ROUNDING, interval[1] < -ROUNDING
        verdict = "not separable" if not (above or below) else "better" if above == higher else "worse"
    return Result(
        task, metric, higher, statistics.fmean(values), stderr, n, statistics.fmean(dense), delta, interval, verdict
    )


def _log_probabilities(loaded: LoadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[batch, tokens - 1, vocabulary] fp32: what each position says about the next token."""
    logits = loaded.model(**inputs, use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1)  # type: ignore[no-any-return]


def _nll(log_probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return -log_probabilities.gather(-1, ids[:, 1:, None]).squeeze(-1).mean(-1)


def _embedding(loaded: LoadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[batch, hidden]: the mean of the last hidden states over real tokens (as sentence encoders pool)."""
    hidden = loaded.model(**inputs)[0].float()
    if hidden.dim() == 2:  # the model pools, or classifies
        return hidden  # type: ignore[no-any-return]
    mask = inputs["attention_mask"][..., None].float()
    return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)  # type: ignore[no-any-return]


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)


def _tokenizer(model: LoadedModel, dense: LoadedModel | None) -> Any:
    return (dense.tokenizer if dense else None) or model.tokenizer


def _windows(
    model: LoadedModel, dense: LoadedModel | None, text: str, window: int, limit: int | None, causal: bool
) -> list[list[int]]:
    """Token ids: consecutive windows of equal length (causal), or one list per paragraph (encoders)."""
    if dense is not None and dense.config.vocab_size != model.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {dense.config.vocab_size}"
        raise InputError(
            detail=f"{model.name} and {dense.name} have other vocabularies ({sizes} tokens); compare a "
            "model with the one it was made from"
        )
    encode = _encoder(model, dense)
    if causal:
        if limit is not None:
            text = text[: limit * window * MOST_CHARACTERS]
        ids = encode(text)
        found = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
    else:
        found = [ids[:window] for p in text.split("\n\n") if (ids := encode(p.strip()))]
    if not found:
        raise InputError(detail=f"the text is too short: it does not fill one window of {window} tokens")
    return found[:limit]


def _encoder(model: LoadedModel, dense: LoadedModel | None) -> Callable[[str], list[int]]:
    tokenizer = _tokenizer(model, dense)
    if tokenizer is not None:
        special = model.kind != "causal"  # a window in the middle of a text has no beginning-of-text

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

        return encode
    if model.config.vocab_size < 256:
        raise InputError(
            detail=f"{model.name} has no tokenizer and less than 256 tokens, so text cannot be read as bytes"
        )
    return lambda text: list(text.encode())


def _batches(windows: Iterable[list[int]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Groups of ``size`` windows as ids and mask [size, longest]; only paragraphs need padding."""
    import torch

    rows = list(windows)
    for i in range(0, len(rows), max(size, 1)):
        group = rows[i : i + max(size, 1)]
        longest = max(len(row) for row in group)
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in group])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in group])
        yield {"input_ids": ids, "attention_mask": mask}
