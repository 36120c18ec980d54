"""What the five prompts say (see `prompts.py`), and the settings that let them say something else."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, model_validator

PLACEHOLDERS = {
    "solve": ("question",),
    "reflect": ("question", "wrong", "right"),
    "replay": ("experience", "question"),
    "recall": ("question",),
    "critique": ("question", "wrong"),
}

SOLVE = """{question}

Think it through step by step and give the final answer in \\boxed{}."""

REFLECT = """Below are a problem and two attempts at it. The first attempt was marked wrong, the second was marked \
right. The marks speak of the final answer only: a step of the wrong attempt may be sound, and a step of the right one \
may be loose.
Compare the attempts and write down what is worth remembering, in exactly these three sections:

Bifurcation: the first step at which the wrong attempt leaves the path that the right one follows.
Critique: the cause underneath the failure (not the slip it shows up as), what the right attempt did that avoided it, \
and, speaking as "I", what you will do differently.
Heuristics: one or more named rules of the form "when ..., check or do ...". They must help with other problems of \
this kind, so they must not contain this problem's numbers, names or answer.

Problem:
{question}

Attempt marked wrong:
{wrong}

Attempt marked right:
{right}

Now write the three sections."""

REPLAY = """Here is something you learnt from earlier attempts at a problem. Take it in, then solve the problem \
afresh, with your full reasoning; do not refer to the notes in your solution.

Notes:
{experience}

Problem:
{question}

Think it through step by step and give the final answer in \\boxed{}."""

CRITIQUE = """Below are a problem and an attempt at it that was marked wrong. The mark speaks of the final answer \
only: a step of the attempt may be sound.
Examine the attempt and write down what is worth remembering, in exactly these three sections:

Bifurcation: the first step at which the attempt goes wrong.
Critique: the cause underneath the failure (not the slip it shows up as) and, speaking as "I", what you will do \
differently.
Heuristics: one or more named rules of the form "when ..., check or do ...". They must help with other problems of \
this kind, so they must not contain this problem's numbers, names or answer.

Problem:
{question}

Attempt marked wrong:
{wrong}

Now write the three sections."""

RECALL = """{question}

Do not solve this yet. Which rules should be kept in mind for a problem of this kind?"""


class PromptConfig(BaseModel):
    """Templates. `chat`: null uses the tokenizer's chat template when it has one; false shows the bare text (for base
    models)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chat: bool | None = Field(
        default=None,
        description="null: the tokenizer's chat template where it has one; false: the bare text (for base models)",
    )
    system: str = Field(default="", description="system message under a chat template, else text before the prompt")
    solve: str = Field(default=SOLVE, description="asks for a solution")
    reflect: str = Field(default=REFLECT, description="asks for a meta-experience")
    replay: str = Field(default=REPLAY, description="asks for a solution with a meta-experience at hand")
    recall: str = Field(
        default=RECALL, description="asks for the rules to keep in mind: the prompt of mel.internalise.heuristic"
    )
    critique: str = Field(
        default=CRITIQUE, description="asks for a meta-experience without a right solution (mel.reflect_on=wrong)"
    )
    opening_end: str = Field(
        default="\n", min_length=1, description="where the opening of a solution ends (mel.internalise.opening)"
    )

    @model_validator(mode="after")
    def _placeholders_once_and_in_order(self) -> PromptConfig:
        for name, wanted in PLACEHOLDERS.items():
            found = tuple(re.findall(r"\{(question|wrong|right|experience)\}", getattr(self, name)))
            if found != wanted:
                order = ", ".join("{" + field + "}" for field in wanted)
                raise ValueError(f"prompts.{name} must contain {order} once each, in this order; it has {list(found)}")
        return self
