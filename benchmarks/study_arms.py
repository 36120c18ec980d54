"""What the study compares: arms (ways to learn) in worlds (what there is to learn), as settings of the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STEPS = 30
RATES = (3e-4, 6e-4)
SWEEP_SEEDS = (101, 102)
"""Worlds in which an arm's learning rate is chosen; never among those in which it is judged."""
SEEDS = (1, 2, 3, 4, 5)
"""Each of a world, a warm start and a run of its own, the same for every arm: arms are compared in pairs."""

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to learn."""

    title: str
    settings: Settings
    role: str = "MEL"  # baseline, MEL, control or attempt
    base: str = "GRPO"  # the arm without meta-experience that it adds to
    worlds: tuple[str, ...] = ("plain",)


def learns(**weights: float) -> Settings:
    """R_MEL of these forms instead of the paper's."""
    return {"mel.internalise.retrospective": 0.0} | {f"mel.internalise.{form}": w for form, w in weights.items()}


EVERYWHERE = ("plain", "tacit", "guilds")
OFF: Settings = {"mel.enabled": False}
REINFORCE: Settings = {"objective.algorithm": "reinforce++"}
RFT: Settings = {"objective.algorithm": "rft"}

ARMS: dict[str, Arm] = {
    "GRPO": Arm("GRPO", OFF, "baseline", worlds=EVERYWHERE),
    "MEL": Arm("+ MEL as in the paper: M given question, wrong and right", {}, worlds=EVERYWHERE),
    "heuristic": Arm("+ MEL, heuristics given the question", learns(heuristic=1.0)),
    "replay": Arm("+ MEL, replay's solution given the question", learns(replay=1.0)),
    "paper+heuristic": Arm("+ MEL, paper's form and heuristics", {"mel.internalise.heuristic": 1.0}),
    "paper+replay": Arm(
        "+ MEL, paper's form and replay's solution", {"mel.internalise.replay": 1.0}, worlds=EVERYWHERE
    ),
    "heuristic+replay": Arm("+ MEL, heuristics and replay", learns(heuristic=1.0, replay=1.0)),
    "REINFORCE++": Arm("REINFORCE++", REINFORCE | OFF, "baseline", base="REINFORCE++"),
    "REINFORCE++ MEL": Arm("+ MEL as in the paper", REINFORCE, base="REINFORCE++"),
    "RFT": Arm("RFT", RFT | OFF, "baseline", base="RFT"),
    "RFT MEL": Arm("+ MEL as in the paper", RFT, base="RFT"),
    "unvalidated": Arm("paper's form without replay validation", {"mel.validate_by_replay": False}, "control"),
    "critique": Arm(
        "critique of one wrong solution, without contrast",
        {"mel.reflect_on": "wrong", "mel.pairs_per_prompt": 3},
        "control",
    ),
    "shuffled": Arm("paper's form, M of another prompt", {"mel.internalise.shuffled": True}, "control"),
    "right": Arm("right solution given the question, no reflection", learns(right=1.0), "control", worlds=EVERYWHERE),
    "opening": Arm("its recall line alone, no reflection", learns(opening=1.0), "control"),
    "conclusion": Arm("paper's form, NLL on the heuristics only", learns(conclusion=1.0), "attempt"),
    "heuristic x 0.1": Arm(
        "heuristics given the question, NLL weight 0.1",
        learns(heuristic=1.0) | {"mel.nll_weight": 0.1},
        "attempt",
    ),
    "paper+heuristic x 0.3": Arm(
        "paper's form at weight 1, heuristics given the question at 0.3",
        {"mel.internalise.heuristic": 0.3},
        "attempt",
        worlds=EVERYWHERE,
    ),
    "heuristic, own steps": Arm(
        "heuristics given the question, optimizer of their own, lr 3e-5",
        learns(heuristic=1.0) | {"optim.nll_lr": 3e-5},
        "attempt",
    ),
    "paper, own steps x 3": Arm(
        "paper's form, optimizer of its own, 3 rounds of reuse",
        {"optim.nll_lr": "{lr}", "optim.nll_epochs": 3},
        "attempt",
    ),
}

WORLDS: dict[str, tuple[str, Settings]] = {
    "plain": ("solutions name the rule that they follow", {}),
    "tacit": ("solutions do not name the rule, reflections do", {"tiny.world.tacit": True}),
    "guilds": (
        "topics of a guild share a rule, heuristics speak of the guild; half of a trained guild's topics are prompts",
        {"tiny.world.guilds": True, "tiny.world.trained": 32},
    ),
}


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the trainer."""

    world: str
    arm: str
    rate: float
    seed: int
    judged: bool = True  # evaluated at both ends; false: a run of the sweep

    @property
    def folder(self) -> str:
        return f"{self.world}/{self.arm}/{self.rate:g}/{self.seed}"

    def options(self) -> list[str]:
        """Command line of the trainer."""
        sets = ["heldout", "sibling"] if self.world == "guilds" else ["heldout"]
        settings: Settings = world_settings(self.world, self.seed) | {
            "run.seed": self.seed,
            "run.steps": STEPS,
            "run.checkpoint_every": 0,
            "optim.lr": self.rate,
            "verify.workers": 1,
            "eval.every": 0,
            "eval.at_ends": self.judged,
            "eval.sets": "[" + ", ".join(f'{{path: "{{tiny}}/{name}.jsonl"}}' for name in sets) + "]",
        }
        settings |= ARMS[self.arm].settings
        return [
            f"--{name}={str(value).format(lr=self.rate) if value == '{lr}' else value}"
            for name, value in settings.items()
        ]


def world_settings(world: str, seed: int) -> Settings:
    """Of the embedded world; the policy has also seen critiques, which one arm asks for."""
    seeds: Settings = {f"tiny.{part}.seed": seed for part in ("world", "model", "warm_start")}
    return seeds | {"tiny.warm_start.critique": 4} | WORLDS[world][1]
