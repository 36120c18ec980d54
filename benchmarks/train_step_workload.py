"""What the train-step benchmark trains on: recorded trajectories of one step, and models with random weights.

A step is made of groups of 8 responses to prompts of 50 to 400 tokens. Response lengths are log-normal (median 1000,
deviation 0.8 of the logarithm) and end at 8192. Every third group has a single outcome, so that its advantages are 0;
the others have 1 to 7 right responses. In the workload `mel` each of these gives one meta-experience: about 500 tokens
after a context of a template, the question, a wrong and a right response. `rl` is the same step without them. These are
assumptions about a run, not measurements. Token ids are random; everything follows from the seed, and a fingerprint of
it stands in the result file. The shape `tiny` has all lengths divided by 16.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import Qwen3Config

from mel_fast.types import Episode, Experience, MetaExperience, Prompt, Trajectory

GROUP = 8
LONGEST = 8192
TEMPLATE = 200  # tokens of the reflection prompt's own words
WORKLOADS = ("rl", "mel")


@dataclass(frozen=True)
class Shape:
    """A model, and the size of its step."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocab: int
    groups: int = 16
    shorter: int = 1  # lengths are divided by it
    token_budget: int = 16384

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )


SHAPES = {
    "tiny": Shape(128, 384, 4, 4, 2, 32, 2048, groups=6, shorter=16, token_budget=1024),
    "0.6b": Shape(1024, 3072, 28, 16, 8, 128, 151936),
    "1.7b": Shape(2048, 6144, 28, 16, 8, 128, 151936),
    "4b": Shape(2560, 9728, 36, 32, 8, 128, 151936),
}


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence, for trainers that know no streams. Its share of the loss is the mean over the target's tokens over
    the number of items of its kind."""

    context: list[int]
    target: list[int]
    advantage: float
    policy: bool  # else: negative log-likelihood

    @property
    def length(self) -> int:
        return len(self.context) + len(self.target)


def make_episodes(shape: Shape, workload: str, seed: int) -> list[Episode]:
    """The step's groups, the same for the same arguments; `mel` differs from `rl` in the experiences alone."""
    random = np.random.default_rng(seed)

    def tokens(length: float) -> list[int]:
        return random.integers(1, shape.vocab, max(2, round(length / shape.shorter))).tolist()

    def answer(context: list[int], length: float, right: bool) -> Trajectory:
        ids = tokens(length)
        return Trajectory(
            context, ids, [-1.0] * len(ids), "stop", [(0, len(ids))], "", reward=float(right), correct=right
        )

    episodes: list[Episode] = []
    for number in range(shape.groups):
        question = tokens(int(random.integers(50, 401)))
        right = GROUP * int(random.integers(2)) if number % 3 == 2 else int(random.integers(1, GROUP))
        lengths = np.minimum(random.lognormal(np.log(1000), 0.8, GROUP), LONGEST)
        group = [answer(question, length, index < right) for index, length in enumerate(lengths)]
        context = tokens(TEMPLATE) + question + group[-1].output_ids + group[0].output_ids
        memo = answer(context, random.lognormal(np.log(500), 0.3), True)
        found = [Experience(GROUP - 1, 0, memo, MetaExperience("", "", ""), kept=True)] if 0 < right < GROUP else []
        prompt = Prompt(str(number), "", "")
        episodes.append(Episode(0, prompt, group, found if workload == "mel" else []))
    return episodes


def subset(episodes: Sequence[Episode]) -> list[Episode]:
    """What the gate is tried on: of the groups with both outcomes and of those with one, the shortest."""

    def size(episode: Episode) -> int:
        return sum(len(t.output_ids) for t in episode.trajectories)

    mixed = [e for e in episodes if len({t.correct for t in e.trajectories}) == 2]
    alike = [e for e in episodes if len({t.correct for t in e.trajectories}) == 1]
    return [min(mixed, key=size), min(alike, key=size)]


def items(episodes: Sequence[Episode]) -> list[Item]:
    """Policy items in order of collection, then the others. Advantages are GRPO's (arXiv 2402.03300)."""
    found: list[Item] = []
    for episode in episodes:
        rewards = np.array([t.reward for t in episode.trajectories])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        found += [
            Item(t.prompt_ids, t.output_ids, float(a), True)
            for t, a in zip(episode.trajectories, advantages, strict=True)
        ]
    memos = [x.reflection for e in episodes for x in e.experiences]
    return found + [Item(t.prompt_ids, t.output_ids, 1.0, False) for t in memos]


def weights(work: Sequence[Item]) -> list[float]:
    """One per item: that of each of its target's tokens in the loss."""
    policy = sum(item.policy for item in work)
    return [1 / ((policy if item.policy else len(work) - policy) * len(item.target)) for item in work]


def describe(work: Sequence[Item]) -> dict[str, object]:
    """Counts of the workload, and a fingerprint of every token and advantage in it."""
    content = json.dumps([(i.context, i.target, round(i.advantage, 6), i.policy) for i in work])
    idle = [i.length for i in work if i.advantage == 0]
    return {
        "sequences": len(work),
        "tokens": sum(i.length for i in work),
        "tokens_with_loss": sum(len(i.target) for i in work),
        "longest": max(i.length for i in work),
        "zero_advantage": {"sequences": len(idle), "tokens": sum(idle)},
        "memos": {"sequences": sum(not i.policy for i in work), "tokens": sum(i.length for i in work if not i.policy)},
        "fingerprint": hashlib.sha256(content.encode()).hexdigest()[:16],
    }


def padded_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cuts lengths, in their order, into runs whose padded size, count x longest, is within the budget (or that are
    alone). Returns lists of indices."""
    batches: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if not batches or (len(batches[-1]) + 1) * longest > token_budget:
            batches.append([])
            longest = length
        batches[-1].append(index)
    return batches
