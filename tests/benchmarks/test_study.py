"""The study: its arms are settings that the trainer takes, its figures are paired, its probes see what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import make_model

from benchmarks import study_report
from benchmarks.study_arms import ARMS, RATES, SEEDS, STEPS, SWEEP_SEEDS, Trial
from benchmarks.study_figures import Figures, bootstrap, correct_at, probability
from benchmarks.study_trial import ALONE, probes, sequence_logps, summary
from mel_fast.config import parse_arguments
from mel_fast.model import ModelConfig
from mel_fast.policy import load_policy
from mel_fast.prompts import Renderer
from mel_fast.tiny.prepare import tokenizer_of
from mel_fast.tiny.world import World


@pytest.mark.parametrize("arm", ARMS)
def test_the_trainer_takes_the_settings_of_every_arm(arm: str) -> None:
    for world in ARMS[arm].worlds:
        _, config = parse_arguments(Trial(world, arm, 3e-4, 1).options(), "study")
        assert config.optim.lr == 3e-4
        assert config.tiny is not None
        assert config.tiny.world.seed == config.run.seed == 1
        assert config.mel.enabled == (ARMS[arm].role != "baseline")
    assert ARMS[ARMS[arm].base].role == "baseline"


def test_rates_are_chosen_in_worlds_of_their_own() -> None:
    assert not set(SWEEP_SEEDS) & set(SEEDS)


@pytest.mark.parametrize("world", ["plain", "tacit", "guilds"])
def test_probes_are_the_probabilities_of_what_they_say(tmp_path: Path, world: str) -> None:
    """Against the model's own next-token distributions, taken one token at a time."""
    _, config = parse_arguments(Trial(world, "GRPO", 3e-4, 1).options(), "study")
    assert config.tiny is not None
    tokenizer = tokenizer_of(config.tiny, config.prompts)
    model = make_model(len(tokenizer))
    model.save_pretrained(tmp_path)
    renderer, embedded = Renderer(tokenizer, config.prompts), World(config.tiny.world)
    found = probes(embedded, "untrained", renderer, config.tiny)
    assert set(found) == {"solution", "recall"} | ({"rule"} if world != "tacit" else set())
    topics = {topic.name: topic for topic in embedded.group("untrained")}
    for name, samples in found.items():
        sample = samples[0]
        target = [int(token) for token, stream in zip(sample.ids, sample.stream, strict=True) if stream]
        text, told = renderer.decode(sample.ids.tolist()), renderer.decode(target)
        topic = next(topic for word, topic in topics.items() if f" {word} " in text)
        if name == "solution":
            assert told.endswith("}.")
        else:
            assert told == f" {topic.rule.name}"
        (logp,) = sequence_logps(load_policy(ModelConfig(path=str(tmp_path)), ALONE), [sample])
        assert logp == pytest.approx(_by_hand(model, sample.ids.tolist(), len(target)), abs=1e-4)


def _by_hand(model: Any, ids: list[int], targets: int) -> float:
    with torch.no_grad():
        rows = [model(torch.tensor([ids[:end]])).logits[0, -1].log_softmax(-1) for end in range(1, len(ids))]
    return sum(row[token].item() for row, token in zip(rows[-targets:], ids[-targets:], strict=True))


# --- figures ----------------------------------------------------------------------------------------------------------


def trial(arm: str, seed: int, gain: float, tokens: float = 100.0) -> dict[str, Any]:
    """A run that is `gain` better than a base of seed/10, at so many sampled tokens per step."""
    level = seed / 10 + gain
    scores = {f"eval/heldout/{name}": level for name in ("pass_at_1", "avg_at_k", "pass_at_k")}
    return {
        "world": "plain",
        "arm": arm,
        "rate": RATES[0],
        "seed": seed,
        "sampled_tokens": [tokens] * 20,
        "correct": [level * step / 20 for step in range(1, 21)],
        "means": {"mel/retention": 0.5, "mel/pairs": 3.0, "rows/nll": 7.0},
        "evaluations": {"0": {}, str(STEPS): scores},
        "probabilities": {"rule/trained": level, "rule/untrained": 0.3},
    }


def report(gain: dict[int, float], tokens: float = 100.0) -> dict[str, Any]:
    return {
        "date": "2026-01-01",
        "command": "python -m benchmarks.study",
        "device": {"name": "a machine", "versions": {"torch": "2"}},
        "steps": STEPS,
        "before": {f"plain/{seed}": {"rule/untrained": 0.25} for seed in gain},
        "sweep": [{"seed": 101}],
        "trials": [trial("GRPO", seed, 0.0) for seed in gain] + [trial("MEL", s, g, tokens) for s, g in gain.items()],
        "gradients": [
            {"seed": 1, "term": term, "norm": 1.0, "cosine_helpful": 0.5, "cosine_surrogate": 0.1}
            for term in ("a", "b")
        ],
    }


def test_arms_are_compared_in_pairs() -> None:
    """Worlds differ by far more than the arms do; their differences are alike."""
    found = Figures(report({1: 0.1, 5: 0.1, 9: 0.1})).difference("plain", "MEL", probability("rule/trained"))
    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_any_two_arms_can_be_compared() -> None:
    figures = Figures(report({1: 0.1, 2: 0.2}))
    backwards = figures.difference("plain", "GRPO", probability("rule/trained"), base="MEL")
    assert backwards.each == pytest.approx((-0.1, -0.2))


def test_an_interval_is_wider_than_its_spread_is_small() -> None:
    narrow, wide = bootstrap([0.1, 0.11, 0.09]), bootstrap([0.4, -0.3, 0.2])
    assert narrow.low > 0
    assert wide.low < 0 < wide.mean < wide.high
    assert bootstrap([0.4, -0.3, 0.2]) == wide


def test_at_equal_tokens_an_arm_that_samples_more_is_read_earlier() -> None:
    assert correct_at(trial("MEL", 5, 0.0, tokens=200.0), 2000) == pytest.approx(0.5 * 10 / 20)
    equal = Figures(report({5: 0.0}, tokens=200.0)).at_equal_tokens("plain", "MEL")
    # The base's last window, steps 16 to 20 with the middle at 1800 tokens, against the arm's steps 7 to 11.
    assert equal.mean == pytest.approx(0.5 * 9 / 20 - 0.5 * 18 / 20)


def test_leaks_are_gains_where_nothing_was_trained() -> None:
    assert Figures(report({1: 0.1, 2: 0.2})).leak("plain", "MEL").mean == pytest.approx(0.05)


def test_a_run_is_summarised_from_what_it_left_behind(tmp_path: Path) -> None:
    rows: list[dict[str, float]] = [{"step": 0, "eval/heldout/pass_at_1": 0.1}]
    rows += [
        {"step": s, "reward/mean": 0.5, "reward/correct": 0.5, "perf/sampled_tokens": 9.0, "mel/kept": s}
        for s in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = summary(tmp_path)
    assert found["sampled_tokens"] == [9.0, 9.0]
    assert found["evaluations"] == {"0": {"eval/heldout/pass_at_1": 0.1}}
    assert math.isclose(found["means"]["mel/kept"], 1.5)


def test_the_report_has_a_row_per_arm_and_its_plots(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps(report({1: 0.1, 2: 0.2})))
    written = study_report.write(file)
    assert all(path.stat().st_size > 0 for path in written)
    text = written[0].read_text()
    assert ARMS["MEL"].title in text
    assert "+0.150" in text
    assert [path.suffix for path in written] == [".md", ".svg", ".svg", ".svg"]
