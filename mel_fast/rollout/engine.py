"""What the trainer asks of a rollout engine, and the settings of sampling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.types import Completion, Request


class RolloutConfig(BaseModel):
    """Sampling of the groups."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: Literal["local", "sglang"] = Field(
        default="local", description="local: transformers, in this process; sglang: servers, launched or attached to"
    )
    mode: Literal["sync", "async"] = Field(
        default="sync",
        description="sync: strictly on-policy; async: the next step is sampled, by weights at most one step old, while "
        "this one trains",
    )
    prompts_per_step: int = Field(default=128, ge=1, description="prompts of a step")
    group_size: int = Field(default=8, ge=1, description="G: responses per prompt")
    temperature: float = Field(default=1.0, gt=0, description="of sampling responses")
    max_prompt_tokens: int = Field(
        default=1024, ge=1, description="of a problem's prompt; reflections and replays may be longer"
    )
    max_new_tokens: int = Field(default=4096, ge=1, description="per response, reflection or replay")
    long_prompts: Literal["error", "drop"] = Field(
        default="error", description="what to do with prompts over max_prompt_tokens"
    )
    max_batch: int = Field(default=256, ge=1, description="local engine: sequences decoded side by side")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="type of the engine's weights")
    sglang: SGLangConfig = SGLangConfig()

    @model_validator(mode="after")
    def _async_needs_servers(self) -> RolloutConfig:
        if self.mode == "async" and self.engine == "local":
            raise ValueError("rollout.mode=async needs rollout.engine=sglang: the local engine computes here")
        if self.mode == "async" and self.sglang.takes_turns:
            raise ValueError(
                "rollout.sglang.release_memory needs rollout.mode=sync; in async mode servers sample during the update"
            )
        return self


class Session(Protocol):
    """The sampling of one prompt: its rollouts, reflections and replays."""

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order."""
        ...


class Engine(Protocol):
    """Samples from weights of its own, which the trainer publishes to it with a version number."""

    context_length: int  # prompt and response together, in tokens

    def session(self, key: str) -> AbstractAsyncContextManager[Session]:
        """Opens the sampling of one prompt. What one session asks for shares prefixes, so it stays in one place."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes over full weights under the model's parameter names. Later completions carry this version."""
        ...

    def release(self) -> None:
        """Nothing is asked for before the next `load`: memory that others need may be freed until then."""
        ...

    def take_metrics(self) -> dict[str, float]:
        """What happened to the engine since the last call, as metrics called `engine/...`."""
        ...
