"""Settings of the embedded world. Every number that shapes it stands here, with the reason for it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorldConfig(_Settings):
    """The problems, and how well the warm start may know them.

    Topics come in three groups, each spread evenly over the four families of problems: `sure` ones are demonstrated
    with their right rule only, `trained` ones are the prompts of reinforcement learning, `untrained` ones never are.
    Whatever is gained on the last group was not learnt but leaked.
    """

    seed: int = 0
    sure: Count = 32
    trained: PositiveInt = 64
    untrained: Count = 32
    belief_low: Probability = 0.15
    belief_high: Probability = 0.45
    """Demonstrations of an unsure topic follow its right rule with a probability drawn from [belief_low, belief_high].
    One probability for all topics would teach a short cut: "take the second likeliest rule"."""
    tacit: bool = False
    """Solutions do not name the rule that they follow; only reflections and heuristics do."""
    guilds: bool = False
    """Topics belong to guilds that share a rule, four in each family, and heuristics speak of the guild. Of each
    family's guilds one is sure, two are trained (half of their topics are: `trained`; the others are `siblings`) and
    one is untrained. What is learnt about a topic may so hold for others."""
    reserved_numbers: PositiveInt = 200
    """How many of the 1000 triples of digits only evaluation shows: never demonstrated, never trained on."""
    train_rows_per_topic: PositiveInt = 64
    heldout_rows: PositiveInt = 128
    sure_rows: Count = 64
    untrained_rows: Count = 64
    sibling_rows: Count = 64

    @model_validator(mode="after")
    def _fits_the_families(self) -> WorldConfig:
        groups = (self.sure, self.trained, self.untrained)
        if self.guilds and groups != (32, 32, 32):
            raise ValueError(
                "tiny.world: with guilds, sure, trained and untrained must be 32 each: one, two halves and one guild "
                f"of eight topics in each of the four families; got {groups}"
            )
        if any(size % 4 for size in groups) or sum(groups) > 128:
            raise ValueError(
                "tiny.world: sure, trained and untrained must be multiples of 4 (there are four families) and "
                f"128 topics at most together; got {groups}"
            )
        if self.belief_low > self.belief_high:
            raise ValueError(f"tiny.world: belief_low {self.belief_low} exceeds belief_high {self.belief_high}")
        if self.reserved_numbers + self.train_rows_per_topic > 1000:
            raise ValueError("tiny.world: reserved_numbers + train_rows_per_topic exceed the 1000 triples of digits")
        return self


class TinyModelConfig(_Settings):
    """A Qwen3 with tied embeddings, small enough for one CPU thread."""

    seed: int = 0
    hidden_size: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    key_value_heads: PositiveInt = 2
    head_dim: PositiveInt = 32
    intermediate_size: PositiveInt = 256
    max_positions: PositiveInt = 512
    initializer_range: PositiveFloat = 0.06
    """Large for a language model, but 0.02 is too small for so narrow a one: it learns arithmetic much later."""


class WarmStartConfig(_Settings):
    """Supervised steps that make a policy out of random weights: it can solve, reflect, use a hint and recall a rule,
    but holds wrong beliefs about three quarters of the topics."""

    seed: int = 0
    steps: PositiveInt = 600
    learning_rate: PositiveFloat = 3e-3
    final_learning_rate: Weight = 3e-4
    """Where the cosine decay ends."""
    lr_warmup_steps: Count = 40
    beta1: Probability = 0.9
    beta2: Probability = 0.95
    weight_decay: Weight = 0.0
    clip: PositiveFloat = 1.0

    solve: PositiveInt = 20
    """Demonstrations of each kind per batch, and below the weight of each kind's mean in the loss. Batches are small:
    more updates teach more here than cleaner gradients."""
    reflect: PositiveInt = 8
    replay: PositiveInt = 20
    recall: PositiveInt = 4
    critique: Count = 0
    """Reflections on a wrong attempt alone; only a policy that has seen some can be asked for a critique."""
    solve_weight: Weight = 1.0
    reflect_weight: Weight = 0.5
    replay_weight: Weight = 1.0
    recall_weight: Weight = 0.15
    critique_weight: Weight = 0.5

    slip: Probability = 0.05
    """Reflections and replays on an arithmetic slip, about as rare as slips are; the others are about a rule."""
    mistaken: Probability = 0.15
    """Of the reflections on a rule, those that mix the two attempts up and recommend the wrong one's rule: so
    validation by replay has something to reject."""
    closed_book: Probability = 0.2
    """Of the reflections on a rule, those that recommend what the writer believes, whatever the right attempt says."""
    other_topic: Probability = 0.15
    """Replays with a note on another topic, which the demonstration ignores. A model of this size seldom learns to
    compare the topics within so few steps: it follows such notes nearly as readily as others."""
    new_numbers: Probability = 0.5
    """Replays with other numbers than those that the note was written on."""


class TinyConfig(_Settings):
    """The embedded default world."""

    world: WorldConfig = WorldConfig()
    model: TinyModelConfig = TinyModelConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
