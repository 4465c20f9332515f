"""Which machine this is, and which names mean it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from sparsec import targets
from sparsec.errors import BadOptionValue, UnknownTarget
from sparsec.targets import detect, reference
from sparsec.targets.base import Target

WIDE = detect.ISA_NEEDS["avx512"] | {detect.BF16_DOT}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    """Pretend to be a machine whose /proc/cpuinfo holds the given flags (None: it has no such file)."""

    def pretend(flags: frozenset[str] | None, model: str = "Toy CPU") -> None:
        file = tmp_path / "cpuinfo"
        file.unlink(missing_ok=True)
        if flags is not None:
            body = f"processor\t: 0\nmodel name\t: {model}\nflags\t\t: fpu {' '.join(sorted(flags))}\n"
            file.write_text(f"{body}\nprocessor\t: 1\nmodel name\t: other\nflags\t\t: fpu\n")
        monkeypatch.setattr(detect, "_CPUINFO", file)
        monkeypatch.delenv("SPARSEC_ISA", raising=False)
        clear()

    def clear() -> None:
        detect.cpu_flags.cache_clear()
        targets._resolve.cache_clear()

    yield pretend
    monkeypatch.undo()
    clear()


def test_the_widest_isa_whose_every_flag_is_there_is_taken(machine) -> None:
    machine(WIDE)
    assert (detect.detect().isa, detect.detect().bf16_dot, detect.detect().model) == ("avx512", True, "Toy CPU")
    machine(WIDE - {detect.BF16_DOT})
    assert (detect.detect().isa, detect.detect().bf16_dot) == ("avx512", False)
    machine(detect.ISA_NEEDS["avx2"])
    assert detect.detect().isa == "avx2"
    machine(detect.ISA_NEEDS["avx2"] - {"fma"})
    assert detect.detect().isa == "portable"


@pytest.mark.parametrize("missing", ["avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vbmi2"])
def test_avx512_without_one_of_its_parts_is_not_used(machine, missing: str) -> None:
    machine(WIDE - {missing})
    assert detect.detect().isa == "avx2"
    assert not detect.detect().bf16_dot


def test_without_cpuinfo_only_what_torch_proves_is_used(machine) -> None:
    machine(None)
    assert detect.detect().isa in ("avx2", "portable")
    assert detect.detect().model


def test_environment_narrows_auto_and_cpu_but_not_an_explicit_name(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(WIDE)
    monkeypatch.setenv("SPARSEC_ISA", "portable")
    assert targets.resolve("auto").isa == targets.resolve("cpu").isa == "portable"
    assert targets.resolve("cpu:avx2").isa == "avx2"
    monkeypatch.setenv("SPARSEC_ISA", "avx2")
    assert targets.resolve("auto").isa == "avx2"


def test_a_wrong_isa_in_the_environment_is_one_sentence(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(WIDE)
    monkeypatch.setenv("SPARSEC_ISA", "sse9")
    with pytest.raises(BadOptionValue, match=r"SPARSEC_ISA.*avx512, avx2, portable"):
        targets.resolve("auto")


def test_a_target_this_machine_cannot_run_is_refused_with_what_it_has(machine) -> None:
    machine(detect.ISA_NEEDS["avx2"])
    with pytest.raises(
        BadOptionValue, match=r"'cpu:avx512', but this CPU has no avx512_vbmi2.*widest it runs is 'avx2'"
    ):
        targets.resolve("cpu:avx512")


def test_unknown_targets_name_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UnknownTarget, match=r"did you mean 'cpu:avx512'.*reference"):
        targets.resolve("cpu:avx521")
    with pytest.raises(UnknownTarget, match=r"auto, cpu, cpu:avx2"):
        targets.resolve("")


def test_every_name_this_machine_can_run_resolves_once() -> None:
    able = [
        name
        for name in targets.names()
        if not name.startswith("cuda") and detect.ISA_NEEDS.get(name.partition(":")[2], set()) <= detect.cpu_flags()
    ]
    assert {"auto", "cpu", "cpu:portable", "reference"} <= set(able)
    for name in able:
        assert targets.resolve(name).isa in detect.ISA_NEEDS
        assert targets.resolve(name) is targets.resolve(name)


def test_fingerprint_tells_isa_bf16_cores_and_model_apart() -> None:
    one = Target("cpu", "avx512", True, 8, "A")
    others = [
        dataclasses.replace(one, isa="avx2", bf16_dot=False),
        dataclasses.replace(one, bf16_dot=False),
        dataclasses.replace(one, cores=4),
        dataclasses.replace(one, model="B"),
    ]
    assert len({t.fingerprint for t in (one, *others)}) == 5


def test_this_machine_has_cores_and_a_name() -> None:
    target = detect.detect()
    assert target.cores >= 1
    assert target.model
    assert target.l2_bytes >= 0


def test_reference_rates_cover_every_family_loop_and_dtype() -> None:
    rates = reference.rates(1)
    assert {(k.pattern, k.loop, k.dtype) for k in rates.kernels} == {
        (p, loop, d) for p in ("bitmap", "index", "nm", "block") for loop in ("dot", "outer") for d in ("fp32", "bf16")
    }
    for dense in rates.dense:
        assert list(dense.points) == sorted(dense.points)
