"""The relations that papers and earlier measurements state about masks on small models. Nothing here is tuned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.accuracy.relations import Kind, Pair, Relation


def chain(*rows: str, kind: Kind = "less") -> tuple[Pair, ...]:
    """Each costs less than the next."""
    return tuple(Pair(a, b, kind) for a, b in itertools.pairwise(rows))


def labelled(labels: Sequence[str], *methods: str, kind: Kind = "less") -> tuple[Pair, ...]:
    """The same chain of methods at each label."""
    return tuple(p for label in labels for p in chain(*(f"{m} {label}" for m in methods), kind=kind))


CORE = ("50%", "70%", "2:4", "8:16")


def claims() -> list[Relation]:
    return [*_masks(), *_repairs(), *_knobs(), *_others(), *_encoder()]


def _masks() -> list[Relation]:
    few = (Pair("wanda(segments=1) 50%", "sparsegpt(segments=1) 50%"),)
    enough = (Pair("sparsegpt(segments=8) 50%", "wanda(segments=8) 50%"),)
    return [
        Relation(
            "SparseGPT < Wanda", "at small scale; either sign at 7B", labelled(CORE, "sparsegpt", "wanda"), hard=True
        ),
        Relation("Wanda < magnitude", "Sun et al., 2023", labelled(CORE, "wanda", "magnitude")),
        Relation("magnitude < random", "control", chain("magnitude 50%", "random 50%"), hard=True),
        Relation("with 1 calibration segment Wanda < SparseGPT", "few tokens harm second order", few),
        Relation("with 8 segments SparseGPT < Wanda", "8 tokens for each in-feature are enough", enough),
        *(
            Relation(
                f"{name}: unstructured < 8:16 < 4:8 < 2:4",
                "freer patterns cost less",
                chain(*(f"{name} {label}" for label in ("50%", "8:16", "4:8", "2:4"))),
                hard=True,
            )
            for name in ("wanda", "sparsegpt", "magnitude")
        ),
        Relation("RIA ≤ Wanda", "Zhang et al., 2024", labelled(CORE, "ria", "wanda", kind="no more")),
        Relation("RIA < Wanda", "Zhang et al., 2024", labelled(("70%", "2:4"), "ria", "wanda")),
        Relation("GBLM ≤ Wanda", "Das et al., 2023", labelled(("50%", "70%"), "gblm", "wanda", kind="no more")),
        Relation("OWL helps at 70 %", "Yin et al., 2023", _owl()),
        Relation(
            "V:N:M costs more than unstructured of equal sparsity", "freer patterns cost less",
            chain("wanda 75%", "wanda 64:2:8"), hard=True,
        ),
    ]  # fmt: skip


def _owl() -> tuple[Pair, ...]:
    return tuple(Pair(f"owl+{m} 70%", f"{m} 70%") for m in ("wanda", "sparsegpt"))


def _repairs() -> list[Relation]:
    both = ("2:4", "70%")
    salient = chain(*(f"wanda(outliers={k}:256) 2:4" for k in (16, 8, 4)), "wanda 2:4")
    barber = tuple(Pair(f"{m}+barber(10%) 70%", f"{m} 70%") for m in ("wanda", "magnitude"))
    return [
        Relation("Wanda's mask refitted < Wanda", "small models", labelled(both, "wanda+reconstruct", "wanda")),
        Relation(
            "variance correction helps", "Maximov et al., 2025", labelled(both, "wanda+variance", "wanda")
        ),
        Relation(
            "one factor a row ≤ one a layer", "earlier measurement",
            labelled(both, "wanda+variance", "wanda+variance(layer)", kind="no more"),
        ),
        Relation("2:4 with k:256 outliers < 2:4, more with more", "Maximov et al., 2025; see bits", salient),
        Relation(
            "at 9.0 and 9.1 bits a weight: unstructured < 2:4 with 4:256 outliers", "freer patterns cost less",
            chain("wanda 50%", "wanda(outliers=4:256) 2:4"),
        ),
        Relation("LLM-Barber at 10 % helps", "Su et al., 2024", barber),
        Relation("LLM-Barber at 1 % helps", "Su et al., 2024", chain("wanda+barber 70%", "wanda 70%")),
        Relation("EBFT helps", "Guo et al., 2024", chain("wanda+ebft 70%", "wanda 70%")),
    ]  # fmt: skip


def _knobs() -> list[Relation]:
    blocks = tuple(
        Pair(f"sparsegpt(blocksize=16) {label}", f"sparsegpt(blocksize=128) {label}") for label in ("50%", "70%")
    )
    speed_only = tuple(Pair(p.a, p.b, "same") for p in blocks)
    propagate = tuple(
        Pair(f"{m} {label}", f"{m}(dense inputs) {label}") for m in ("wanda", "sparsegpt") for label in ("50%", "70%")
    )
    return [
        Relation("SparseGPT's block size changes speed only", "often assumed", speed_only),
        Relation("smaller blocks are better in narrow layers", "earlier measurement", blocks),
        Relation("calibrating on pruned inputs helps", "common practice", propagate),
        Relation(
            "equalising before RIA changes nothing", "neutral to slightly worse before",
            labelled(("2:4", "8:16"), "equalize+ria", "ria", kind="same"),
        ),
        Relation(
            "planted outlier channels change no mask of Wanda and SparseGPT", "algebra",
            tuple(Pair(f"{m}(planted) 50%", f"{m} 50%", "same") for m in ("wanda", "sparsegpt")), hard=True,
        ),
        Relation(
            "planted outlier channels harm magnitude", "algebra", chain("magnitude 50%", "magnitude(planted) 50%")
        ),
    ]  # fmt: skip


def _others() -> list[Relation]:
    return [
        Relation("BESA helps", "Xu et al., 2024", labelled(("50%", "70%"), "besa+wanda", "wanda")),
        Relation("E-Sparse ≤ Wanda", "Li et al., 2023", (Pair("esparse 50%", "wanda 50%", "no more"),)),
        Relation("proximal 2:4 < Wanda 2:4", "Kübler et al., 2025", chain("proximal 2:4", "wanda 2:4")),
        Relation("channel permutation helps RIA at 2:4", "Zhang et al., 2024", chain("permute+ria 2:4", "ria 2:4")),
        Relation(
            "pruned, then quantised ≤ quantised, then pruned", "Harma et al., 2024, a theorem", _orders(), hard=True
        ),
        Relation(
            "SmoothQuant < W8A8 by rounding, where activations have outlier channels", "Xiao et al., 2023",
            (Pair("wanda+smoothquant(planted) 50%", "wanda+rtn(W8A8)(planted) 50%"),),
        ),
        Relation(
            "an exact refit ≤ the OBS update", "a theorem for each layer alone",
            (Pair("wanda+reconstruct(exact) 2:4", "wanda+reconstruct 2:4", "no more"),),
        ),
    ]  # fmt: skip


def _orders() -> tuple[Pair, ...]:
    cases = (("4 bits", "50%"), ("3 bits", "50%"), ("3 bits", "2:4"))
    return tuple(Pair(f"wanda+rtn({bits}) {label}", f"rtn({bits})+wanda {label}", "no more") for bits, label in cases)


def _encoder() -> list[Relation]:
    e = "encoder"
    both = ("2:4", "70%")
    flat = (Pair("wanda 70%", "owl(flat=1)+wanda 70%"),)
    return [
        Relation("SparseGPT < Wanda", "at small scale", labelled(CORE, "sparsegpt", "wanda"), e, hard=True),
        Relation("Wanda < magnitude", "Sun et al., 2023", labelled(CORE, "wanda", "magnitude"), e),
        Relation("magnitude < random", "control", chain("magnitude 50%", "random 50%"), e, hard=True),
        Relation("RIA ≤ Wanda", "Zhang et al., 2024", labelled(CORE, "ria", "wanda", kind="no more"), e),
        Relation("without its test of flatness OWL harms here", "outlier shares are flat", flat, e),
        Relation(
            "with it OWL is uniform here", "outlier shares are flat", (Pair("owl+wanda 70%", "wanda 70%", "same"),), e
        ),
        Relation("Wanda's mask refitted < Wanda", "small models", labelled(both, "wanda+reconstruct", "wanda"), e),
        Relation("variance correction helps", "Maximov et al., 2025", labelled(both, "wanda+variance", "wanda"), e),
    ]
