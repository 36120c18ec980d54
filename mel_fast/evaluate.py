"""Evaluation: Pass@1 at temperature 0, Avg@k and Pass@k at a temperature. Also a command:

python -m mel_fast.evaluate --config runs/latest/config.yaml --model.path=runs/latest/model
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mel_fast.data import Source
from mel_fast.errors import EngineError, InputError, OutputError
from mel_fast.experience import seed_of
from mel_fast.files import write_whole
from mel_fast.prompts import Renderer
from mel_fast.rollout.engine import Engine
from mel_fast.types import Prompt, Request
from mel_fast.verify import Verifier


class EvalConfig(BaseModel):
    """When and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sets: tuple[Source, ...] = ()
    every: int = Field(default=20, ge=0, description="steps between evaluations; 0: never during training")
    at_ends: bool = Field(default=True, description="evaluate before the first step and after the last")
    samples: int = Field(default=8, ge=1, description="k of Avg@k and Pass@k")
    temperature: float = Field(default=0.6, gt=0, description="of the drawn answers")
    max_new_tokens: int | None = Field(default=None, ge=1, description="null: rollout.max_new_tokens")

    @model_validator(mode="after")
    def _names_differ(self) -> EvalConfig:
        names = [source.name or Path(source.path).stem for source in self.sets]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"eval.sets has two data sets called {twice!r}; give each a name of its own")
        return self


@dataclass(frozen=True, slots=True)
class Score:
    """Shares in [0, 1] over the problems of one set."""

    pass_at_1: float
    avg_at_k: float
    pass_at_k: float


def evaluate(
    sets: Mapping[str, Sequence[Prompt]],
    engine: Engine,
    renderer: Renderer,
    verifier: Verifier,
    config: EvalConfig,
    max_new_tokens: int,
    seed: int,
    dump: Path | None = None,
) -> dict[str, Score]:
    """One greedy answer and `samples` drawn ones to every problem.

    Args:
        sets: problems by the name of their data set.
        dump: a jsonl file for every answer and its verdict.

    Returns:
        A score for each set. The same seed draws the same samples whatever the step, so curves differ by the policy
        alone.
    """
    limit = config.max_new_tokens or max_new_tokens

    async def attempt(name: str, prompt: Prompt) -> tuple[str, list[bool], list[dict[str, object]]]:
        ids = renderer.solve(prompt)
        seeds = [seed_of(seed, "evaluate", name, prompt.id, index) for index in range(config.samples + 1)]
        requests = [Request(ids, s, limit, config.temperature if index else 0.0) for index, s in enumerate(seeds)]
        async with engine.session(prompt.id) as session:
            completions = await session.generate(requests)
        texts = [renderer.decode(completion.output_ids) for completion in completions]
        verdicts = await asyncio.gather(*(verifier.score(text, prompt.answer, prompt) for text in texts))
        rows: list[dict[str, object]] = [
            {
                "set": name,
                "id": prompt.id,
                "source": prompt.source,
                "temperature": r.temperature,
                "text": t,
                "correct": v.correct,
            }
            for r, t, v in zip(requests, texts, verdicts, strict=True)
        ]
        return name, [verdict.correct for verdict in verdicts], rows

    async def everything() -> list[tuple[str, list[bool], list[dict[str, object]]]]:
        return await asyncio.gather(*(attempt(name, prompt) for name, prompts in sets.items() for prompt in prompts))

    results = asyncio.run(everything())
    if dump is not None:
        dump.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for _, _, rows in results for row in rows)
        write_whole(dump, "".join(lines))
    verdicts: dict[str, list[list[bool]]] = defaultdict(list)
    for name, correct, _ in results:
        verdicts[name].append(correct)
    return {name: _score(rows) for name, rows in verdicts.items()}


def _score(rows: Sequence[Sequence[bool]]) -> Score:
    """Each row: the greedy verdict, then the drawn ones."""
    return Score(
        pass_at_1=sum(row[0] for row in rows) / len(rows),
        avg_at_k=sum(sum(row[1:]) / len(row[1:]) for row in rows) / len(rows),
        pass_at_k=sum(any(row[1:]) for row in rows) / len(rows),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates `model.path` on `eval.sets` and prints the table; every answer goes to `evaluation.jsonl`."""
    from mel_fast.config import parse_arguments  # these rooms build on this one
    from mel_fast.console import Display
    from mel_fast.setup import open_evaluation

    try:
        _, config = parse_arguments(sys.argv[1:] if arguments is None else arguments, "mel_fast.evaluate")
        with open_evaluation(config) as (engine, renderer, verifier, sets):
            limit, seed, dump = config.rollout.max_new_tokens, config.run.seed, Path("evaluation.jsonl")
            scores = evaluate(sets, engine, renderer, verifier, config.eval, limit, seed, dump)
    except (InputError, EngineError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    k = config.eval.samples
    rows = [[name, f"{s.pass_at_1:.3f}", f"{s.avg_at_k:.3f}", f"{s.pass_at_k:.3f}"] for name, s in scores.items()]
    Display(1, 0).table(config.model.path, ["data set", "Pass@1", f"Avg@{k}", f"Pass@{k}"], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
