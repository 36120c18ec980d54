"""Run directories as a run leaves them behind, made in no time, and what a written report holds."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from factories import episode, experience, trajectory

from mel_fast.dumps import dump_episodes
from mel_fast.types import Episode, MetaExperience, Prompt

CONFIG = {
    "run": {"name": "mel", "folder": "runs", "seed": 0, "steps": 3},
    "model": {"path": "/nowhere/model"},
    "rollout": {"max_new_tokens": 8},
    "objective": {"algorithm": "grpo"},
    "eval": {"samples": 8},
}


def evaluation(step: int, **shares: float) -> dict[str, float]:
    line: dict[str, float] = {"step": step}
    for name, share in shares.items():
        line |= {f"eval/{name}/{key}": share for key in ("pass_at_1", "avg_at_k", "pass_at_k")}
    return line


def step(number: int, correct: float = 0.5, **more: float) -> dict[str, float]:
    return {"step": number, "reward/correct": correct, "time/collect": 1.0, "time/update": 2.0, "time/step": 3.0} | more


def settings(**changed: Any) -> dict[str, Any]:
    """CONFIG with dotted keys changed, their dots written as two underscores."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in changed.items():
        section, _, name = key.partition("__")
        config.setdefault(section, {})[name] = value
    return config


def make_run(
    folder: Path,
    lines: Sequence[Mapping[str, float]],
    dumps: Mapping[int, Sequence[Episode]] | None = None,
    config: Mapping[str, Any] | None = CONFIG,
) -> Path:
    (folder / "rollouts").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for number, episodes in (dumps or {}).items():
        dump_episodes(folder / "rollouts" / f"step_{number:06d}.jsonl", episodes)
    return folder


def case(
    kept: bool = True,
    question: str = "What is it?",
    wrong: str = "the wrong way",
    right: str = "the right way",
    memo: tuple[str, str, str] = ("the first word", "I rushed.", "When in doubt, check."),
    id: str = "p1",
    family: str = "algebra",
) -> Episode:
    """A group of a wrong and a right response, with one replayed experience."""
    found = experience(kept=kept, replay=trajectory(float(kept), text="the replay"))
    found.meta = MetaExperience(*memo)
    found.reflection.text = "\n".join(memo)
    made = episode([0, 1], experiences=[found])
    made.prompt = Prompt(id, question, "73", family)
    made.trajectories[0].text, made.trajectories[1].text = wrong, right
    return made


def embedded(report: Path) -> dict[str, Any]:
    """The data of a page by their names, as its script reads them."""
    blocks = re.findall(
        r'<script type="application/gzip" id="data-([\w-]+)">([^<]*)</script>', report.read_text("utf-8")
    )
    return {name: json.loads(gzip.decompress(base64.b64decode(text))) for name, text in blocks}


def experiences(report: Path) -> list[dict[str, Any]]:
    """The records of all experiences, in the page's order."""
    data = embedded(report)
    chunks = sorted((name for name in data if name.startswith("experiences-")), key=lambda name: int(name[12:]))
    return [record for name in chunks for record in data[name]]


def groups(report: Path) -> list[dict[str, Any]]:
    """The records of all groups."""
    data = embedded(report)
    chunks = sorted((name for name in data if name.startswith("rollouts-")), key=lambda name: int(name[9:]))
    return [record for name in chunks for record in data[name]]
