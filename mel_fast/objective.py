"""Episodes -> samples: advantages, streams, weights, global denominators.

Everything that tells one algorithm from another happens here, on rank 0, over the whole batch. The weights that leave
this room already carry every coefficient and denominator, so the loss is a plain sum over rows and does not depend on
how rows are packed, batched or spread over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from mel_kernels import LossConfig, Stream
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mel_fast.gspo import SequenceLoss
from mel_fast.internalise import Internalise, meta_experience_samples
from mel_fast.prompts import Renderer
from mel_fast.types import Episode, Sample, Trajectory, make_sample


class ObjectiveConfig(BaseModel):
    """J_RLVR. Dr.GRPO is grpo with normalise_std=false and aggregation=constant; DAPO's loss is aggregation=token and
    clip_high=0.28; gspo has the ratio of whole sequences and wants clips of some 3e-4."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    algorithm: Literal["grpo", "gspo", "rloo", "reinforce++", "rft"] = Field(
        default="grpo", description="how advantages are made; rft: likelihood of right responses"
    )
    normalise_std: bool = Field(default=True, description="grpo: divide by the group's standard deviation")
    group_baseline: bool = Field(
        default=False, description="reinforce++: subtract the group's mean before the global normalisation"
    )
    aggregation: Literal["sequence", "token", "constant"] = Field(
        default="sequence", description="1/|y| per response, 1/all tokens, or 1/max_new_tokens per response"
    )
    clip_low: float | None = Field(default=0.2, gt=0, description="the importance ratio's clip below 1; null: none")
    clip_high: float | None = Field(default=0.2, gt=0, description="the importance ratio's clip above 1; null: none")
    dual_clip: float | None = Field(
        default=None, gt=1, description="bound of the ratio for negative advantages; null: none"
    )
    kl_coef: float = Field(default=0.0, ge=0, description="k3 KL to the initial policy; > 0 keeps a frozen copy of it")
    entropy_coef: float = Field(default=0.0, ge=0, description="weight of the entropy bonus")
    tis_cap: float | None = Field(default=None, gt=0, description="cap of the truncated importance weight; null: off")
    updates_per_batch: int = Field(
        default=1, ge=1, description="mini-batches a batch of prompts is cut into, one optimizer step each"
    )
    overlong: Literal["keep", "mask", "penalise"] = Field(
        default="keep", description="what a response cut off at its limit does"
    )
    overlong_penalty: float = Field(
        default=1.0, ge=0, description="penalise: subtracted from the reward of a truncated response"
    )
    overlong_buffer: int = Field(
        default=0, ge=0, description="penalise: the penalty grows linearly over this many last tokens"
    )

    @model_validator(mode="after")
    def _the_loss_takes_them(self) -> ObjectiveConfig:
        _ = self.loss
        return self

    @property
    def loss(self) -> LossConfig | SequenceLoss:
        if self.algorithm == "gspo":
            if self.dual_clip is not None or self.tis_cap is not None:
                raise ValueError("gspo has no dual_clip and no tis_cap (its ratio is the sequence's); leave them null")
            return SequenceLoss(self.clip_low, self.clip_high, self.kl_coef, self.entropy_coef)
        return LossConfig(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            kl_coef=self.kl_coef,
            entropy_coef=self.entropy_coef,
            tis_cap=self.tis_cap,
        )


@dataclass(slots=True)
class Batch:
    """What the learner gets: one list of samples per optimizer step, and what was counted on the way."""

    updates: list[list[Sample]]
    metrics: dict[str, float] = field(default_factory=dict)


def build_batch(
    episodes: Sequence[Episode],
    config: ObjectiveConfig,
    internalise: Internalise,
    nll_weight: float,
    max_new_tokens: int,
    temperature: float,
    renderer: Renderer,
) -> Batch:
    """Episodes of one step -> samples, cut into `updates_per_batch` mini-batches of whole groups.

    Args:
        nll_weight: the weight of R_MEL in this step, warm-up included; 0 builds no meta-experience sample.
        max_new_tokens: the response limit, the denominator of aggregation=constant and the end of the overlong buffer.
        temperature: at which the responses were sampled.

    Returns:
        At least one update. An update may be empty of samples when nothing in it can move the policy.
    """
    rewards = [[shaped_reward(t, config, max_new_tokens) for t in e.trajectories] for e in episodes]
    advantages = group_advantages(rewards, config)
    count = min(config.updates_per_batch, max(1, len(episodes)))
    cuts = np.linspace(0, len(episodes), count + 1).astype(int)
    batch = Batch([])
    totals: dict[str, int] = dict.fromkeys(
        (
            "batch/groups",
            "batch/groups_without_signal",
            "batch/policy_tokens",
            "batch/policy_tokens_dropped",
            "batch/masked_overlong",
            "batch/forms_dropped",
            "saved/zero_advantage",  # prompts included: sequences that no pass sees
        ),
        0,
    )
    for start, end in pairwise(cuts):
        chosen, their = episodes[start:end], advantages[start:end]
        policy = (
            _rft(chosen, totals)
            if config.algorithm == "rft"
            else _policy(chosen, their, config, max_new_tokens, temperature, totals)
        )
        learnt, missing = meta_experience_samples(chosen, internalise, nll_weight, renderer)
        totals["batch/forms_dropped"] += missing
        batch.updates.append(policy + learnt)
    batch.metrics = {name: float(value) for name, value in totals.items()}
    samples = [sample for update in batch.updates for sample in update]
    batch.metrics["batch/samples"] = float(len(samples))
    batch.metrics["batch/tokens"] = float(sum(len(sample.ids) for sample in samples))
    return batch


def shaped_reward(trajectory: Trajectory, config: ObjectiveConfig, max_new_tokens: int) -> float:
    """The verdict's reward less the overlong penalty (DAPO, arXiv 2503.14476, eq. 13, when there is a buffer)."""
    if config.overlong != "penalise":
        return trajectory.reward
    if trajectory.finish_reason == "length":
        return trajectory.reward - config.overlong_penalty
    into_buffer = len(trajectory.output_ids) - (max_new_tokens - config.overlong_buffer)
    share = min(1.0, max(0.0, into_buffer / config.overlong_buffer)) if config.overlong_buffer else 0.0
    return trajectory.reward - config.overlong_penalty * share


def group_advantages(rewards: Sequence[Sequence[float]], config: ObjectiveConfig) -> list[np.ndarray]:
    """One advantage per response, for each group.

    grpo, gspo (arXiv 2402.03300): (r - mean) / std over the group, population std; without normalise_std it is
    Dr.GRPO's
        (arXiv 2503.20783).
    rloo (arXiv 2402.14740): r less the mean of the group's other rewards.
    reinforce++ (arXiv 2501.03262): normalised over the whole batch, optionally less the group's mean first.
    rft: no advantages (zeros).
    """
    groups = [np.asarray(group, dtype=np.float64) for group in rewards]
    if config.algorithm == "rft":
        return [np.zeros_like(group) for group in groups]
    if config.algorithm == "rloo":
        return [_exact_zero((group - group.mean()) * len(group) / max(1, len(group) - 1)) for group in groups]
    if config.algorithm in ("grpo", "gspo"):
        centred = [group - group.mean() for group in groups]
        # An all-equal group has a std of rounding noise at most; it must give exactly zero, not noise / noise.
        return [
            _exact_zero(c) if not config.normalise_std or np.ptp(c) < 1e-9 else c / (c.std() + 1e-6) for c in centred
        ]
    if config.group_baseline:
        groups = [group - group.mean() for group in groups]
    if not groups:
        return []
    everything = np.concatenate(groups)
    spread = everything.std()
    return [_exact_zero((group - everything.mean()) / (spread + 1e-6)) for group in groups]


def _exact_zero(advantages: np.ndarray) -> np.ndarray:
    return np.where(np.abs(advantages) < 1e-9, 0.0, advantages)


def _policy(
    episodes: Sequence[Episode],
    advantages: Sequence[np.ndarray],
    config: ObjectiveConfig,
    max_new_tokens: int,
    temperature: float,
    totals: dict[str, int],
) -> list[Sample]:
    """The surrogate's samples. Denominators count every response; what has no gradient is left out, and counted."""
    responses = [t for e in episodes for t in e.trajectories]
    all_tokens = sum(len(t.output_ids) for t in responses)
    every_row_matters = config.kl_coef > 0 or config.entropy_coef > 0  # even those without advantage
    samples: list[Sample] = []
    for episode, group in zip(episodes, advantages, strict=True):
        totals["batch/groups"] += 1
        totals["batch/groups_without_signal"] += int(not group.any())
        for trajectory, advantage in zip(episode.trajectories, group, strict=True):
            length = len(trajectory.output_ids)
            totals["batch/policy_tokens"] += length
            masked = config.overlong == "mask" and trajectory.finish_reason == "length"
            totals["batch/masked_overlong"] += int(masked)
            idle = bool(advantage == 0) and not every_row_matters
            if length == 0 or masked or idle:
                totals["batch/policy_tokens_dropped"] += length
                totals["saved/zero_advantage"] += idle * (len(trajectory.prompt_ids) + length)
                continue
            per_response = len(episodes) * len(episode.trajectories)
            denominator = {
                "sequence": per_response * length,
                "token": all_tokens,
                "constant": per_response * max_new_tokens,
            }[config.aggregation]
            ids, origin = (trajectory.prompt_ids, trajectory.output_ids), episode.prompt.id
            sample = make_sample(*ids, Stream.POLICY, 1 / denominator, "policy", origin)
            sample.advantage[len(trajectory.prompt_ids) :] = advantage
            sample.rollout_logp[len(trajectory.prompt_ids) :] = trajectory.logprobs
            sample.temperature = temperature
            samples.append(sample)
    return samples


def _rft(episodes: Sequence[Episode], totals: dict[str, int]) -> list[Sample]:
    """Rejection-sampling fine-tuning: the NLL of the right responses, mean over responses of the mean over tokens. The
    others are left out, and counted."""
    right = [(e.prompt.id, t) for e in episodes for t in e.trajectories if t.correct and t.output_ids]
    totals["batch/groups"] += len(episodes)
    totals["batch/groups_without_signal"] += sum(not any(t.correct for t in e.trajectories) for e in episodes)
    all_tokens = sum(len(t.output_ids) for e in episodes for t in e.trajectories)
    totals["batch/policy_tokens"] += all_tokens
    totals["batch/policy_tokens_dropped"] += all_tokens - sum(len(t.output_ids) for _, t in right)
    return [
        make_sample(t.prompt_ids, t.output_ids, Stream.NLL, 1 / (len(right) * len(t.output_ids)), "rft", origin)
        for origin, t in right
    ]
