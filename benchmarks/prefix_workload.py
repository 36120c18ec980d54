"""Reflections of a training step as prompts of random tokens: who shares what with whom is a step's, the text is not.

A prompt is (instruction, question, wrong solution, right solution, end). Lengths of solutions are log-normal. A group
has 8 of them; which are contrasted is decided by the trainer's own rule (`experience.contrast_pairs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.timed_servers import VOCABULARY
from mel_fast.experience import contrast_pairs
from mel_fast.rollout.prefixes import as_bytes, distinct_tokens, shareable_tokens
from mel_fast.types import Request

GROUP = 8
INSTRUCTION, BETWEEN, END = 200, 8, 12  # tokens
LONGEST = 900  # tokens of a solution


@dataclass(frozen=True)
class Query:
    """One prompt of the step, and the reflections on its group."""

    key: str
    reflections: list[Request]


def make_queries(count: int, new_tokens: int, seed: int = 0) -> list[Query]:
    """`count` queries with 4 and 5 reflections in turn, of about `new_tokens` (log-normal).

    Answers that end together would let the next prompts in together, and nothing would be shared.
    """
    random = np.random.default_rng(seed)

    def tokens(length: float) -> list[int]:
        return random.integers(8, VOCABULARY, int(length)).tolist()

    instruction, between, end = tokens(INSTRUCTION), tokens(BETWEEN), tokens(END)
    queries: list[Query] = []
    for number in range(count):
        question = tokens(np.clip(random.lognormal(np.log(110), 0.4), 40, 400))
        solutions = [tokens(np.clip(random.lognormal(np.log(230), 0.5), 40, LONGEST)) for _ in range(GROUP)]
        right = random.permutation(GROUP)[: random.integers(3, GROUP)].tolist()
        wrong = [i for i in range(GROUP) if i not in right]
        pairs = contrast_pairs(wrong, right, [len(s) for s in solutions], 4 + number % 2)
        prompts = [[*instruction, *question, *between, *solutions[w], *between, *solutions[r], *end] for w, r in pairs]
        lengths = np.clip(random.lognormal(np.log(new_tokens), 0.5, len(prompts)), 8, 4 * new_tokens)
        asked = [Request(ids, number, int(length)) for ids, length in zip(prompts, lengths, strict=True)]
        queries.append(Query(f"query {number}", asked))
    return queries


def make_rollouts(count: int, new_tokens: int, seed: int = 1) -> list[Request]:
    """Long ones, which share nothing with reflections."""
    random = np.random.default_rng(seed)
    prompts = random.integers(8, VOCABULARY, (count, 150)).tolist()
    return [Request(ids, i, new_tokens) for i, ids in enumerate(prompts)]


def describe(queries: Sequence[Query]) -> dict[str, int]:
    prompts = [as_bytes(request.prompt_ids) for query in queries for request in query.reflections]
    return {
        "queries": len(queries),
        "prompts": len(prompts),
        "tokens": sum(len(prompt) // 4 for prompt in prompts),
        "distinct_tokens": distinct_tokens(prompts),
        "shareable_tokens": shareable_tokens(prompts),
    }
