"""Whatever a step has sampled, its counters agree with each other and with what reaches the loss: nothing is lost."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from factories import episode, experience
from hypothesis import given
from hypothesis import strategies as st
from mel_kernels import Stream
from transformers import PreTrainedTokenizerBase

from mel_fast.internalise import Internalise
from mel_fast.learner import by_kind
from mel_fast.metrics import rollout_metrics, saved_metrics
from mel_fast.objective import Batch, ObjectiveConfig, build_batch
from mel_fast.packing import Cost, PackedBatch, pack
from mel_fast.prompts import Renderer
from mel_fast.templates import PromptConfig
from mel_fast.types import Episode, Experience

FORMS = ("retrospective", "heuristic", "replay", "right")  # the last is made of responses


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerBase) -> Renderer:
    return Renderer(tokenizer, PromptConfig(chat=False))


@st.composite
def experiences(draw: st.DrawFn) -> Experience:
    made = experience(kept=draw(st.booleans()), memo=draw(st.integers(1, 5)))
    if draw(st.booleans()):
        made.meta, made.malformed = None, draw(st.sampled_from(["no critique", "leaks answer", "truncated"]))
    if made.meta is None or draw(st.booleans()):
        made.replay, made.kept = None, False
    elif not made.kept and draw(st.booleans()):
        made.kept = True  # without validation
    return made


@st.composite
def episodes(draw: st.DrawFn) -> list[Episode]:
    made: list[Episode] = []
    for place in range(draw(st.integers(0, 3))):
        size = draw(st.integers(1, 4))
        rewards = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=size, max_size=size))
        lengths = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
        found = draw(st.lists(experiences(), max_size=2))
        group = episode(rewards, lengths, found, id=f"p{place}")
        for trajectory in group.trajectories:
            trajectory.finish_reason = draw(st.sampled_from(["stop", "length"]))
        if unplayed := sum(x.meta is not None and x.replay is None for x in found):
            group.dropped["replay_beyond_context"] = unplayed
        made.append(group)
    return made


objectives = st.builds(
    ObjectiveConfig,
    algorithm=st.sampled_from(["grpo", "rloo", "reinforce++", "rft"]),
    aggregation=st.sampled_from(["sequence", "token", "constant"]),
    overlong=st.sampled_from(["keep", "mask", "penalise"]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    updates_per_batch=st.integers(1, 4),
)
internalised = st.builds(Internalise, **dict.fromkeys(FORMS, st.sampled_from([0.0, 0.5])), shuffled=st.booleans())


@given(episodes())
def test_every_group_and_every_experience_is_counted_once(made: list[Episode]) -> None:
    line = Counter(rollout_metrics(made))
    assert line["groups/all"] == line["groups/all_right"] + line["groups/all_wrong"] + line["groups/mixed"]
    assert line["mel/pairs"] == line["mel/malformed"] + line["mel/replayed"] + line["mel/dropped/replay_beyond_context"]
    assert line["mel/malformed"] == sum(count for name, count in line.items() if name.startswith("mel/malformed/"))
    assert line["mel/kept"] <= line["mel/replayed"]
    assert all(math.isfinite(value) and value >= 0 for value in line.values())


@given(episodes(), objectives, internalised, st.integers(2, 20), st.integers(1, 3))
def test_every_token_is_in_the_loss_or_counted_as_left_out(
    renderer: Renderer, made: list[Episode], objective: ObjectiveConfig, forms: Internalise, budget: int, ranks: int
) -> None:
    rolled = rollout_metrics(made)
    batch = build_batch(made, objective, forms, 1.0, 5, 1.0, renderer)
    line, rows = batch.metrics, rows_of(batch, budget, ranks)
    responses = sum(len(e.trajectories) for e in made)
    assert line["batch/groups"] == rolled["groups/all"] >= line["batch/groups_without_signal"]
    assert line["batch/policy_tokens"] == pytest.approx(rolled["response/length_mean"] * responses)
    assert rows["policy"] + rows["rft"] == line["batch/policy_tokens"] - line["batch/policy_tokens_dropped"]
    context = saved_metrics(batch.updates, epochs=1, old_logps=False, reference=False)["saved/head_rows"]
    assert sum(rows.values()) == line["batch/tokens"] - context
    on = [form for form in FORMS[:3] if forms.forms()[form]]
    learnt = sum(sample.kind in on for update in batch.updates for sample in update)
    assert learnt + line["batch/forms_dropped"] == rolled["mel/kept"] * len(on)
    assert all(math.isfinite(value) and value >= 0 for value in line.values())


def rows_of(batch: Batch, budget: int, ranks: int) -> Counter[str]:
    """Rows with loss by kind of sample, over the micro-batches of all ranks."""
    rows: Counter[str] = Counter()
    packs: list[PackedBatch] = []
    for samples in filter(None, batch.updates):
        packs += [one for share in pack(samples, budget, ranks, Cost(1.0)) for one in share]
    for one in packs:
        zeros = torch.zeros(len(one.rows))
        counted = by_kind(one, zeros, zeros)
        found = {name.split("/")[1]: int(count) for name, count in counted.items() if name.endswith("/rows")}
        assert found["policy"] == int((one.stream == Stream.POLICY).sum())
        rows.update(found)
    return rows
