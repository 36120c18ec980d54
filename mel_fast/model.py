"""The transformers model: its settings, and how its weights come to every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mel_fast.distributed import World
from mel_fast.errors import InputError

Checkpointing = Literal["none", "selective", "full"]


class ModelConfig(BaseModel):
    """Which model, and how it computes."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    path: str = Field(description="a folder with a transformers checkpoint, or a hub name")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="compute type; master weights are always float32"
    )
    attention: Literal["auto", "padded", "varlen", "flash"] = Field(
        default="auto",
        description="auto: on CUDA in 16 bit flash, if flash-attn is installed, else varlen; padded elsewhere",
    )
    liger: bool | Literal["auto"] = Field(
        default="auto",
        description="Liger's RMSNorm, RoPE and SwiGLU; auto: on CUDA if installed and model.compile is off",
    )
    compile: bool = Field(default=False, description="torch.compile each decoder block")
    checkpointing: Checkpointing = Field(
        default="none", description="what is recomputed in the backward: nothing, about half of each block, each block"
    )
    reshard_after_forward: bool = Field(
        default=True, description="false: blocks stay gathered until their backward; less traffic, more memory"
    )
    offload: bool = Field(
        default=False,
        description="weights, gradients and AdamW's moments rest in CPU memory, where the optimizer steps too",
    )
    kernels: Literal["auto", "triton", "torch", "reference"] = Field(
        default="auto", description="back end of the fused loss; auto: triton on CUDA, torch elsewhere"
    )
    gradient_budget: float = Field(
        default=0.0, ge=0, lt=1, description="share of the logits' gradient that the head may leave out; 0 is exact"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")

    @model_validator(mode="after")
    def _one_kind_of_fusion(self) -> ModelConfig:
        if self.liger is True and self.compile:
            raise ValueError("model.liger=true and model.compile=true fuse the same operations; turn one of them off")
        return self

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def load_model(config: ModelConfig, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """The whole transformers model in CPU memory.

    Args:
        dtype: of the weights. Buffers keep their own: the frequencies of rotary embeddings stay float32.

    Raises:
        InputError: there is no such model.
    """
    with _one_clear_error(config):
        return AutoModelForCausalLM.from_pretrained(
            config.path, dtype=dtype, trust_remote_code=config.trust_remote_code, **options
        )


def empty_model(config: ModelConfig, **options: Any) -> PreTrainedModel:
    """The same model on the meta device: float32 shapes without memory. For `fill`, once it is sharded.

    Raises:
        InputError: as `load_model`.
    """
    with _one_clear_error(config):
        shape = AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            shape, dtype=torch.float32, trust_remote_code=config.trust_remote_code, **options
        )


@torch.no_grad()
def fill(model: PreTrainedModel, config: ModelConfig, world: World) -> None:
    """Gives a sharded `empty_model` memory and the checkpoint's weights. Collective.

    Rank 0 alone reads the checkpoint, into CPU memory; each parameter is then scattered on its own. Other ranks never
    hold more than their shards and one whole parameter.

    Raises:
        InputError: as `load_model`, on every rank.
    """
    source, failure = None, None
    if world.main:
        try:
            source = load_model(config)
        except InputError as error:
            failure = str(error)
    if failure := world.broadcast(failure):
        raise InputError(failure)
    model.to_empty(device="cpu" if config.offload else world.device)
    model.tie_weights()  # to_empty gives each use of a tied weight memory of its own
    weights = dict(source.named_parameters()) if source else {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        whole = weights[name].to(world.device) if source else torch.empty(parameter.shape, device=world.device)
        scattered = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=0)
        parameter.to_local().copy_(scattered.to_local())
    # What no checkpoint holds: computed buffers, such as the frequencies of rotary embeddings.
    buffers, generation = world.broadcast((dict(source.named_buffers()), source.generation_config) if source else None)
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.to(world.device))
    model.generation_config = generation


@contextmanager
def _one_clear_error(config: ModelConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # not there; there, but nothing that transformers knows
        what = (
            "no checkpoint in that folder that transformers knows"
            if Path(config.path).is_dir()
            else "no such folder, and the hub has no such name"
        )
        reason = str(error).splitlines()[0]
        raise InputError(f"model.path={config.path!r}: {what} ({reason})") from error
