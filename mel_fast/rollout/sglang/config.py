"""Settings of `rollout.engine: sglang`."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class SGLangConfig(BaseModel):
    """Servers to attach to (`urls`), or to launch and keep. With `urls`, settings marked `launch` mean nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    urls: tuple[str, ...] = Field(default=(), description="running servers to attach to; empty: launch")
    python: str = Field(default=".venv-sglang/bin/python", description="launch: interpreter that has SGLang")
    servers: int | None = Field(default=None, ge=1, description="launch: how many; null: GPUs / tp, one on a CPU")
    gpus: tuple[int, ...] | None = Field(default=None, description="launch: on which GPUs; null: all visible ones")
    tp: int = Field(default=1, ge=1, description="tensor-parallel ranks of each server")
    memory_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="launch: the server's share of GPU memory; null: SGLang's choice"
    )
    kv_tokens: int | None = Field(
        default=None, ge=1, description="launch: size of the KV pool; null: what memory allows, 65536 on a CPU"
    )
    arguments: tuple[str, ...] = Field(default=(), description="launch: more arguments of sglang.launch_server")
    api_key_variable: str | None = Field(
        default=None, description="attach: environment variable that holds the servers' API key"
    )

    max_in_flight: int = Field(default=1024, ge=1, description="requests at one server at a time")
    prefix_gate: bool = Field(default=True, description="send one request of a common prefix first, the others after")
    gate_patience_s: float = Field(default=30.0, gt=0, description="longest wait for a prefix before going without")
    gate_min_tokens: int = Field(default=8, ge=1, description="fewest shared tokens worth waiting for")
    window: float = Field(
        default=0.6, gt=0, le=1, description="share of the KV pool that prompts under way may fill together"
    )

    weights: Literal["disk", "tensor", "group"] = Field(
        default="disk",
        description="how weights travel: files in a folder that both see, over HTTP (CUDA IPC on the same GPU), or a "
        "NCCL/gloo group",
    )
    weights_folder: str | None = Field(
        default=None, description="null: shared memory when it has room for two copies, else the run directory"
    )
    recovery_copy: bool = Field(
        default=True, description="tensor, group: keep a copy in weights_folder to restore a lost server from"
    )
    verify_weights: bool = Field(default=True, description="several servers: compare checksums after publication")
    bucket_mib: int = Field(default=512, ge=1, description="weights sent at a time")
    release_memory: bool = Field(
        default=False, description="launch: free the servers' GPU memory during the update (same GPUs, mode sync)"
    )

    start_timeout_s: float = Field(default=900.0, gt=0, description="longest start of a server")
    health_every_s: float = Field(default=10.0, gt=0, description="time between two looks at a server's health")
    hang_after_s: float = Field(default=120.0, gt=0, description="a server silent for so long is lost")
    load_timeout_s: float = Field(default=600.0, gt=0, description="longest publication of weights to a server")
    max_restarts: int = Field(default=3, ge=0, description="how often each server may be lost in a run")

    @field_validator("urls")
    @classmethod
    def _plain_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not a URL such as http://host:30000")
            if "@" in url:  # it would be in logs and in the resolved configuration
                raise ValueError("a URL has a password in it: use rollout.sglang.api_key_variable")
        plain = tuple(url.rstrip("/") for url in urls)
        if len(set(plain)) < len(plain):
            raise ValueError("a server is named twice")
        return plain

    @field_validator("arguments")
    @classmethod
    def _no_secrets(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        for argument in arguments:
            if re.match(r"--(admin-)?api-key(=|$)", argument):  # it would be in config.yaml, in W&B and in `ps`
                raise ValueError(
                    "an API key must not be among the arguments: launched servers listen on the loopback interface and "
                    "need none; start servers of your own with one, and attach to them with urls and api_key_variable"
                )
        return arguments

    @model_validator(mode="after")
    def _launch_or_attach(self) -> SGLangConfig:
        if self.api_key_variable is not None and not self.urls:
            raise ValueError("rollout.sglang.api_key_variable is for servers named in urls")
        if self.gpus is not None and len(self.gpus) % self.tp:
            raise ValueError(f"rollout.sglang.gpus names {len(self.gpus)} GPUs, not a multiple of tp={self.tp}")
        return self

    @property
    def takes_turns(self) -> bool:
        """Whether the servers' memory is free while the trainer computes."""
        return self.release_memory and not self.urls
