"""Builds the embedded world once: tokenizer, problems, and a model warm-started by the trainer's own NLL stream.

The result is an ordinary model folder and ordinary data files, so everything after this treats them like any other.
It is kept in a cache folder named after everything that shaped it; the next run with the same settings starts at
once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

from mel_kernels import LossConfig
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerFast

from mel_fast.checkpoint import export_model
from mel_fast.distributed import World
from mel_fast.learner import Learner, OptimConfig
from mel_fast.policy import ModelConfig, load_policy
from mel_fast.prompts import Renderer
from mel_fast.templates import PLACEHOLDERS, PromptConfig
from mel_fast.tiny.build import write_data
from mel_fast.tiny.config import TinyConfig
from mel_fast.tiny.demonstrations import demonstration_batch
from mel_fast.tiny.model import build_model
from mel_fast.tiny.texts import corpus
from mel_fast.tiny.tokenizer import build_tokenizer
from mel_fast.tiny.world import World as TinyWorld


def prepare(config: TinyConfig, prompts: PromptConfig, world: World) -> Path:
    """The folder with `model/` and the data files. Collective: all ranks train the warm start together."""
    folder = _cache() / f"tiny-{_fingerprint(config, prompts)}"
    if world.broadcast((folder / "model").is_dir()):
        return folder
    partial = world.broadcast(folder.with_name(f"{folder.name}.{os.getpid()}"))
    tiny = TinyWorld(config.world)
    tokenizer = tokenizer_of(config, prompts)
    if world.main:
        partial.mkdir(parents=True)
        write_data(tiny, partial)
        build_model(config.model, tokenizer).save_pretrained(partial / "initial")
    world.barrier()
    policy = load_policy(ModelConfig(path=str(partial / "initial")), world)
    settings = config.warm_start
    optim = OptimConfig(
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        warmup_steps=settings.lr_warmup_steps,
        schedule="cosine",
        final_lr_ratio=settings.final_learning_rate / settings.learning_rate,
    )
    learner = Learner(policy, None, optim, settings.steps, world)
    renderer = Renderer(tokenizer, prompts)
    console, started, metrics = Console(), time.perf_counter(), {}
    for step in track(
        range(settings.steps), "warm start", console=console, disable=not (world.main and console.is_terminal)
    ):
        batch = [demonstration_batch(tiny, renderer, step, settings)] if world.main else None
        metrics = learner.update(batch, LossConfig())
    export_model(partial / "model", policy, tokenizer, world)
    if world.main:
        shutil.rmtree(partial / "initial")
        try:
            partial.rename(folder)
        except OSError:  # another run finished the same world first
            shutil.rmtree(partial)
        seconds = time.perf_counter() - started
        nll = metrics["nll/demonstration"]
        console.print(
            f"warm start: {settings.steps} steps, {seconds:.0f} s, NLL {nll:.3f}; kept in {folder}", soft_wrap=True
        )
    world.barrier()
    return folder


def tokenizer_of(config: TinyConfig, prompts: PromptConfig) -> PreTrainedTokenizerFast:
    """Every word of the world and of the prompts is one token."""
    return build_tokenizer([*corpus(config.world.guilds), *(getattr(prompts, name) for name in PLACEHOLDERS)])


def _cache() -> Path:
    return Path(os.environ.get("MEL_FAST_CACHE", Path.home() / ".cache" / "mel_fast"))


def _fingerprint(config: TinyConfig, prompts: PromptConfig) -> str:
    """Of the settings and of the code that gives them meaning."""
    digest = hashlib.sha256((config.model_dump_json() + prompts.model_dump_json()).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]
