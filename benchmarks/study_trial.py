"""One run of the study: trains by the trainer's own entry, then looks into the policy without sampling.

The probabilities are those of the policy at temperature 1, averaged over topics and numbers that training never showed:

- `solution`: of the whole right solution given the question;
- `rule`: of the right rule at the place where a solution names it (not in a tacit world, whose solutions do not);
- `recall`: of the right rule at the place where heuristics, asked for alone, name it.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mel_kernels import Stream
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.study_arms import Trial
from mel_fast import train
from mel_fast.config import Config, parse_arguments
from mel_fast.distributed import World
from mel_fast.dumps import read_jsonl
from mel_fast.model import ModelConfig
from mel_fast.packing import collate
from mel_fast.policy import Policy, load_policy
from mel_fast.prompts import Renderer
from mel_fast.tiny.config import TinyConfig
from mel_fast.tiny.demonstrations import prompt
from mel_fast.tiny.prepare import prepare
from mel_fast.tiny.texts import RECALL_SLOT, RULE_SLOT, rule_heuristics, solution
from mel_fast.tiny.world import Group, Problem, Topic
from mel_fast.tiny.world import World as TinyWorld
from mel_fast.types import Sample, make_sample

ALONE = World(0, 1, torch.device("cpu"))
NUMBERS = 4
"""Triples of digits per topic behind a noise-free figure."""
REPORTED = (
    "mel/retention",
    "mel/malformed",
    "mel/pairs",
    "mel/kept",
    "rows/policy",
    "rows/nll",
    "grad/head_policy",
    "grad/head_nll",
)


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """Trains and measures; `folder/result.json` holds what is returned. A finished trial is read, not run again.

    Raises:
        RuntimeError: the trainer did not finish; names its log.
    """
    place = folder / trial.folder
    result = place / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    torch.set_num_threads(1)
    options = [f"--run.folder={place}", "--run.name=trial", *trial.options()]
    with (place / "log.txt").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        status = train.main(options)
    if status:
        raise RuntimeError(f"{trial.folder}: the trainer ended with status {status}, see {place / 'log.txt'}")
    _, config = parse_arguments(options, "study")
    found = summary(place / "latest") | {"probabilities": probabilities(config, place / "latest" / "model")}
    for heavy in ("model", "checkpoints"):
        shutil.rmtree(place / "latest" / heavy)
    result.write_text(json.dumps(found))
    return found


def warm_up(trial: Trial) -> dict[str, Any]:
    """The world of a trial is in the cache, warm-started; its probabilities before any reinforcement learning."""
    torch.set_num_threads(1)
    disable_progress_bar()
    _, config = parse_arguments(trial.options(), "study")
    assert config.tiny is not None
    return probabilities(config, prepare(config.tiny, config.prompts, ALONE) / "model")


def summary(run_folder: Path) -> dict[str, Any]:
    """Curves of a run, by step: what was sampled, trained on and scored."""
    rows = read_jsonl(run_folder / "metrics.jsonl")
    steps = [row for row in rows if "reward/mean" in row]
    return {
        "sampled_tokens": [row["perf/sampled_tokens"] for row in steps],
        "correct": [row["reward/correct"] for row in steps],
        "means": {name: sum(row.get(name, 0.0) for row in steps) / len(steps) for name in REPORTED},
        "evaluations": {
            str(row["step"]): {name: value for name, value in row.items() if name.startswith("eval/")}
            for row in rows
            if any(name.startswith("eval/") for name in row)
        },
    }


def probabilities(config: Config, model: Path) -> dict[str, float]:
    """Noise-free figures of a policy, `solution/trained` and so on, for each group of topics."""
    assert config.tiny is not None
    renderer = Renderer(AutoTokenizer.from_pretrained(model), config.prompts)
    policy = load_policy(ModelConfig(path=str(model)), ALONE)
    world = TinyWorld(config.tiny.world)
    found: dict[str, float] = {}
    groups: list[Group] = sorted({topic.group for topic in world.topics})
    for group in groups:
        for name, samples in probes(world, group, renderer, config.tiny).items():
            logps = sequence_logps(policy, samples)
            found[f"{name}/{group}"] = sum(map(math.exp, logps)) / len(logps)
    return found


def probes(world: TinyWorld, group: Group, renderer: Renderer, config: TinyConfig) -> dict[str, list[Sample]]:
    """Samples whose summed log-probs are those of the figures of the module's docstring."""
    problems = [Problem(t, n) for t in world.group(group) for n in world.reserved_numbers[:NUMBERS]]
    solve = [(p, renderer.solve(prompt(p)), solution(p, p.topic.rule)) for p in problems]
    recall = [(p, renderer.recall(prompt(p)), rule_heuristics(p.topic, p.topic.rule)) for p in problems]
    found = {
        "solution": [make_sample(ids, renderer.answer(text), Stream.NLL, 1.0, "right") for _, ids, text in solve],
        "recall": [_slot(RECALL_SLOT, p.topic, ids, text, renderer) for p, ids, text in recall],
    }
    if not config.world.tacit:
        found["rule"] = [_slot(RULE_SLOT, p.topic, ids, text, renderer) for p, ids, text in solve]
    return found


def _slot(slot: str, topic: Topic, prompt_ids: list[int], text: str, renderer: Renderer) -> Sample:
    """Loss on the one token behind the slot."""
    target = renderer.encode(text)
    called = topic.guild or topic.name if slot == RECALL_SLOT else topic.name
    place = len(renderer.encode(slot.format(topic=called)))
    return make_sample(prompt_ids + target[:place], [target[place]], Stream.NLL, 1.0, "opening")


@torch.no_grad()
def sequence_logps(policy: Policy, samples: list[Sample]) -> list[float]:
    """Summed log-prob of each sample's target."""
    sums: list[float] = []
    for some in _slices(samples, 64):
        logp = policy(collate(some), None)[1]
        sums += [part.sum().item() for part in logp.split([int((s.stream != 0).sum()) for s in some])]
    return sums


def _slices(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
