"""Shared by tests: a small model with weights large enough to show a wrong mask, samples of a step, and torchrun."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch
from mel_kernels import Stream
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from mel_fast.types import Sample

FAMILIES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


def make_model(
    vocabulary: int, seed: int = 0, layers: int = 2, context: int = 256, tied: bool = True, family: str = "qwen3"
) -> PreTrainedModel:
    shape = FAMILIES[family](
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        **({} if family == "qwen2" else {"head_dim": 8}),
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
            elif "norm" not in name:
                parameter.mul_(12.0)  # at the usual scale attention is nearly uniform, whatever the mask
    return model


def random_samples(vocabulary: int, seed: int = 0, count: int = 10, longest: int = 40) -> list[Sample]:
    """Policy, NLL and context-only samples of mixed lengths, as a step has them."""
    random = np.random.default_rng(seed)
    samples: list[Sample] = []
    for index in range(count):
        length = int(random.integers(4, longest))
        start = int(random.integers(1, length - 1))
        stream = np.zeros(length, dtype=np.int8)
        kind = ("policy", "retrospective", "policy")[index % 3]
        stream[start:] = Stream.POLICY if kind == "policy" else Stream.NLL
        stream[start + 1 : start + 2] = Stream.NONE if index % 4 == 0 else stream[start]
        samples.append(
            Sample(
                ids=random.integers(0, vocabulary, length),
                stream=stream,
                advantage=np.full(length, random.normal(), dtype=np.float32),
                weight=random.uniform(0.001, 0.02, length).astype(np.float32),
                rollout_logp=random.normal(-3, 1, length).astype(np.float32),
                kind=kind,
            )
        )
    return samples


def torchrun(
    ranks: int, *arguments: str, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Real processes, as a user starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )
