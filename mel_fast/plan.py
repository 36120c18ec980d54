"""What a configuration asks for: tokens per step, parameters, memory. Printed by `--dry-run`; nothing is loaded."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from mel_fast.config import Config
from mel_fast.errors import InputError
from mel_fast.memory import GIB, SPARE, Planner
from mel_fast.model import ModelConfig

MOMENTS = {"head": "head's gradient", "blocks": "backward of a block", "end": "end of the backward"}

# Shapes of the paper's models, so that a plan needs no download: hidden, layers, heads, MLP, tied embeddings.
SHAPES = {
    "Qwen/Qwen3-0.6B-Base": (1024, 28, 16, 3072, True),
    "Qwen/Qwen3-1.7B-Base": (2048, 28, 16, 6144, True),
    "Qwen/Qwen3-4B-Base": (2560, 36, 32, 9728, True),
    "Qwen/Qwen3-8B-Base": (4096, 36, 32, 12288, False),
    "Qwen/Qwen3-14B-Base": (5120, 40, 40, 17408, False),
}


def plan(config: Config) -> str:
    """The plan as text, each line a YAML comment, so that all that `--dry-run` prints is a configuration file.

    Raises:
        InputError: the model's shape is not known (no such folder, not in the hub's cache, not in the built-in table).
    """
    model, origin = model_shape(config)
    rollout, size = config.rollout, int(os.environ.get("WORLD_SIZE", "1"))
    parameters = count_parameters(model)
    responses = rollout.prompts_per_step * rollout.group_size
    reflections = rollout.prompts_per_step * config.mel.pairs_per_prompt if config.mel.enabled else 0
    sampled = (responses + 2 * reflections) * rollout.max_new_tokens  # a reflection and its replay each
    context = rollout.max_prompt_tokens + 2 * rollout.max_new_tokens  # question and two solutions
    updates, budget = config.objective.updates_per_batch * config.optim.epochs, config.optim.token_budget
    trained = responses * (rollout.max_prompt_tokens + rollout.max_new_tokens)
    trained += reflections * (context + rollout.max_new_tokens)
    lines = [
        "plan (upper bounds; every response at its limit)",
        f"  ranks              {size}",
        f"  model              {config.model.path} ({origin}), {parameters / 1e6:,.1f} M parameters",
        f"  per step           {rollout.prompts_per_step} prompts x {rollout.group_size} responses, "
        f"{reflections} reflections and replays at most, {updates} update(s)",
        f"  tokens per step    {sampled:,} sampled, {trained:,} trained on",
        f"  micro-batches      {-(-trained // (budget * size))} per rank of {budget} tokens",
    ]
    lines += memory(config, model, parameters, size)
    longest = (
        context + rollout.max_new_tokens if config.mel.enabled else rollout.max_prompt_tokens + rollout.max_new_tokens
    )
    if longest > model.max_position_embeddings:
        lines.append(
            f"  note: a reflection of two full-length solutions needs {longest} tokens, the model's context is "
            f"{model.max_position_embeddings}; such contrasts are dropped and counted"
        )
    if longest > budget:
        lines.append(
            f"  note: samples of up to {longest} tokens exceed the token budget; each gets a micro-batch of its own"
        )
    return "\n".join(f"# {line}" for line in lines)


def model_shape(config: Config) -> tuple[Any, str]:
    """The transformers configuration of the model, and where it is known from."""
    if config.tiny is not None:
        from mel_fast.tiny.model import model_config
        from mel_fast.tiny.prepare import tokenizer_of

        return model_config(config.tiny.model, tokenizer_of(config.tiny, config.prompts)), "embedded world"
    return named_shape(config.model)


def named_shape(config: ModelConfig) -> tuple[Any, str]:
    """As `model_shape`, for a folder or a hub name."""
    try:
        found = AutoConfig.from_pretrained(
            config.path, local_files_only=True, trust_remote_code=config.trust_remote_code
        )
        return found, "its own config.json"
    except (OSError, ValueError) as error:  # not there; there, but nothing that transformers knows
        if config.path not in SHAPES:
            raise InputError(
                f"model.path={config.path!r}: neither a local checkpoint nor in the hub's cache, so its size is "
                f"unknown; download it first (known without: {', '.join(SHAPES)})"
            ) from error
    hidden, layers, heads, mlp, tied = SHAPES[config.path]
    shape = Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=mlp,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )
    return shape, "built-in table"


def count_parameters(shape: Any) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(shape).parameters())


def memory(config: Config, shape: Any, parameters: int, ranks: int) -> list[str]:
    """Memory of rank 0, and the token budget that would fit. On a GPU these figures have not been checked yet; against
    the same update on fake tensors they are within 10%."""
    device, reference = device_memory(config), config.objective.kl_coef > 0
    engine, uncounted = engine_memory(config, parameters, device)
    optimizers = 1 if config.optim.nll_lr is None else 2
    planner = Planner.of(config.model, shape, ranks, reference=reference, engine=engine, optimizers=optimizers)
    budget = config.optim.token_budget
    parts, moments = planner.resident(), planner.moments(budget)
    worst = max(moments, key=moments.__getitem__)
    lines = [f"  {name:<18} {size / GIB:,.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'update':<18} {moments[worst] / GIB:,.2f} GiB on top, at the {MOMENTS[worst]}")
    lines.append(f"  {'peak':<18} {planner.peak(budget) / GIB:,.2f} GiB")
    if config.model.offload:
        host = (8 + 8 * optimizers) * parameters / ranks / GIB
        lines.append(f"  {'host memory':<18} {host:,.2f} GiB for weights, gradients, optimizer")
    if uncounted:
        lines.append(f"  note: {uncounted}")
    if device is None:
        lines.append("  note: no GPU here; --run.device_memory_gib=80 says which token budget would fit one of 80 GiB")
    elif largest := planner.largest_budget(device):
        lines.append(
            f"  largest budget     {largest:,} tokens in {device / GIB:,.0f} GiB, of which {SPARE:.0%} are left free"
        )
    else:
        lines.append(
            f"  note: no token budget fits {device / GIB:,.0f} GiB with {SPARE:.0%} left free; use more ranks, "
            "model.checkpointing=full or model.offload=true"
        )
    return lines


def engine_memory(config: Config, parameters: int, device: float | None) -> tuple[float, str]:
    """Bytes that the engine holds on a rank's device during an update, and what is not counted in them."""
    rollout, servers = config.rollout, config.rollout.sglang
    weights = parameters * (4.0 if rollout.dtype == "float32" else 2.0)
    if config.run.mode == "train" or (rollout.engine == "sglang" and (servers.urls or servers.takes_turns)):
        return 0.0, ""
    if rollout.engine == "local":
        return weights, ""
    if servers.gpus is not None:
        return 0.0, "the servers' GPUs (rollout.sglang.gpus) are taken to be others than the trainer's"
    if device is not None and servers.memory_fraction is not None:
        return servers.memory_fraction * device, ""
    return weights / servers.tp, "the servers' KV pool is not counted; set rollout.sglang.memory_fraction"


def device_memory(config: Config) -> float | None:
    """Bytes of the device to plan for, if one is known."""
    if config.run.device_memory_gib is not None:
        return config.run.device_memory_gib * GIB
    if config.run.device == "cpu" or not torch.cuda.is_available():
        return None
    return float(torch.cuda.get_device_properties(0).total_memory)
