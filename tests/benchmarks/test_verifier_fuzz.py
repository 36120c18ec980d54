"""The verifier under attack, in miniature: the curated lists, hundreds of drawn outputs, every kind of attack."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.verifier_cases import Case, attacks, corpus, curated
from benchmarks.verifier_fuzz import faults, off_the_main_thread, score_all, throughput
from mel_fast.verify import Verdict, Verifier, VerifyConfig


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(VerifyConfig(workers=2, timeout_s=3.0)) as verifier:
        yield verifier


def faults_of(verifier: Verifier, cases: list[Case]) -> list[str]:
    return faults(cases, [verdict for verdict, _ in score_all(verifier, cases)])


def test_what_is_never_right_and_what_always_is(verifier: Verifier) -> None:
    assert faults_of(verifier, curated()) == []


@pytest.mark.parametrize("seed", [11, 12])
def test_drawn_outputs_get_their_scores(verifier: Verifier, seed: int) -> None:
    cases = list(corpus(150, seed, 0.0, ""))
    assert set(Counter(case.kind for case in cases)) == {"right", "wrong", "hedged", "damaged"}
    assert faults_of(verifier, cases) == []


def test_every_attack_scores_zero_and_ordinary_answers_between_them_do_not(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    draw = random.Random(3)
    hostile = [Case("hostile", name, make(draw), "1729.5", 0.0) for name, make in attacks(str(canary)).items()]
    fine = Case("right", "1/2", r"\boxed{\frac{1}{2}}", "0.5", 1.0)
    cases = [case for attack in hostile for case in (attack, fine)]
    with Verifier(VerifyConfig(workers=2, timeout_s=0.5)) as verifier:
        found = [verdict for verdict, _ in score_all(verifier, cases)]
    assert faults(cases, found) == []
    assert found[1::2] == [Verdict(1.0, True, "")] * len(hostile)
    reasons = Counter(verdict.reason for verdict in found[::2])
    assert {"timeout", "unclear", "no answer"} <= set(reasons)
    assert not canary.exists()


def test_the_same_verdicts_off_the_main_thread() -> None:
    assert off_the_main_thread(40, seed=5)["faults"] == []


def test_a_share_of_attacks_is_mixed_in_and_nothing_else_is_undecided() -> None:
    found = throughput(20, seed=6, hostile=0.1, workers=2, timeout_s=1.0)
    assert (found["ordinary"], found["attacks"], found["faults"]) == (20, 2, [])


def test_a_fault_is_seen() -> None:
    case = Case("wrong", "x", r"\boxed{7}", "5", 0.0)
    assert faults([case], [Verdict(0.0, False, "")]) == []
    assert len(faults([case], [Verdict(1.0, True, "")])) == 1
    assert len(faults([case], [Verdict(0.0, False, "timeout")])) == 1
