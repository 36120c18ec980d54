"""Data files of the world, in the format that `mel_fast.data` reads for any other data set.

Training shows trained topics alone. Every evaluation file uses reserved numbers, which neither the warm start nor
training ever shows, so that no answer can be remembered.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from mel_fast.tiny.world import Numbers, Problem, Topic, World


def write_data(world: World, folder: Path) -> None:
    """Writes `train.jsonl`, `heldout.jsonl` (trained topics, other numbers), `sure.jsonl` and `untrained.jsonl`;
    with guilds also `sibling.jsonl`.

    Args:
        world: its seed decides the rows; the same world gives the same bytes.
        folder: created when it is missing.
    """
    config, random = world.config, Random(f"data {world.config.seed}")
    trained = world.group("trained")
    train = [
        Problem(topic, numbers)
        for topic in trained
        for numbers in random.sample(world.numbers, config.train_rows_per_topic)
    ]
    random.shuffle(train)
    files = {
        "train": train,
        "heldout": _evenly(trained, config.heldout_rows, world.reserved_numbers, random),
        "sure": _evenly(world.group("sure"), config.sure_rows, world.reserved_numbers, random),
        "untrained": _evenly(world.group("untrained"), config.untrained_rows, world.reserved_numbers, random),
    }
    if config.guilds:
        files["sibling"] = _evenly(world.group("sibling"), config.sibling_rows, world.reserved_numbers, random)
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in files.items():
        (folder / f"{name}.jsonl").write_text("".join(_lines(name, problems)), encoding="utf-8")


def _evenly(topics: list[Topic], rows: int, numbers: list[Numbers], random: Random) -> list[Problem]:
    """Every topic in turn; numbers repeat for none before all have been used."""
    if not topics:
        return []
    shuffled = {topic.name: random.sample(numbers, len(numbers)) for topic in topics}
    turns = [(topics[row % len(topics)], row // len(topics)) for row in range(rows)]
    return [Problem(topic, shuffled[topic.name][turn % len(numbers)]) for topic, turn in turns]


def _lines(name: str, problems: Iterable[Problem]) -> Iterable[str]:
    for index, problem in enumerate(problems):
        topic = problem.topic
        row = {
            "id": f"{name}-{index:05d}",
            "question": problem.question,
            "answer": problem.answer,
            "source": topic.family.name,
            "topic": topic.name,
        }
        yield json.dumps(row) + "\n"
