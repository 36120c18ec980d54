"""Opens the engine that a configuration asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from mel_fast.distributed import World
from mel_fast.errors import InputError
from mel_fast.model import ModelConfig, empty_model, load_model
from mel_fast.rollout.engine import Engine, RolloutConfig
from mel_fast.rollout.local import LocalEngine
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.rollout.sglang.process import ServerProcess, find_python


def check_engine(config: RolloutConfig) -> None:
    """Raises InputError for an engine that cannot be opened here, before anything costly is done."""
    if config.engine == "sglang" and not config.sglang.urls:
        find_python(config.sglang.python)
        _server_gpus(config)


@contextmanager
def open_engine(
    config: RolloutConfig, model: ModelConfig, stop_ids: Sequence[int], folder: Path, seed: int, world: World
) -> Iterator[Engine]:
    """The engine, with the weights of `model.path`.

    Args:
        stop_ids: tokens that end a response.
        folder: for logs of servers that are launched, and for weights where shared memory is short.

    Raises:
        InputError: see `check_engine`.
        EngineError: a server does not start.
    """
    dtype = getattr(torch, config.dtype)
    if config.engine == "local":
        local = load_model(model, dtype)
        nn.Module.to(local, world.device)
        yield LocalEngine(local, stop_ids, config.max_batch)
        return
    served = empty_model(model)
    processes = [
        ServerProcess(config.sglang, model.path, config.dtype, gpus, folder / f"server-{index}.log", seed + index)
        for index, gpus in enumerate(_server_gpus(config))
    ]
    with SGLangEngine(
        config.sglang,
        processes,
        model_path=model.path,
        model_bytes=served.num_parameters() * dtype.itemsize,
        dtype=dtype,
        stop_ids=stop_ids,
        vocabulary=served.config.vocab_size,
        context_length=served.config.max_position_embeddings,
        folder=folder,
    ) as engine:
        yield engine


def _server_gpus(config: RolloutConfig) -> list[list[str]]:
    """The GPUs of each server to launch, as CUDA_VISIBLE_DEVICES names them: none of them on a CPU."""
    settings = config.sglang
    if settings.urls:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if not torch.cuda.is_available():
        if settings.gpus is not None:
            raise InputError("rollout.sglang.gpus names GPUs, but torch sees no CUDA device here")
        return [[] for _ in range(settings.servers or 1)]
    chosen = settings.gpus if settings.gpus is not None else tuple(range(len(names)))
    if unknown := [index for index in chosen if not 0 <= index < len(names)]:
        raise InputError(f"rollout.sglang.gpus={unknown}: this machine has {len(names)} visible GPUs, counted from 0")
    count = settings.servers or max(1, len(chosen) // settings.tp)
    if count * settings.tp > len(chosen):
        raise InputError(
            f"{count} rollout server(s) of tp={settings.tp} need {count * settings.tp} GPUs, {len(chosen)} are there; "
            "lower rollout.sglang.servers or .tp"
        )
    ours = [names[index] for index in chosen]
    return [ours[start : start + settings.tp] for start in range(0, count * settings.tp, settings.tp)]
