"""Puts a run together from its configuration: world, data, policy, engine, books."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mel_fast.checkpoint import checkpoints, load_checkpoint
from mel_fast.config import Config
from mel_fast.console import Display
from mel_fast.data import Cursor, Source, load_prompts
from mel_fast.distributed import World, join_world
from mel_fast.errors import InputError
from mel_fast.experience import Collector
from mel_fast.learner import Learner
from mel_fast.model import ModelConfig, load_model
from mel_fast.policy import load_policy
from mel_fast.prompts import Renderer
from mel_fast.rollout.engine import Engine
from mel_fast.rollout.local import LocalEngine
from mel_fast.run import Desk, Run, Sampling
from mel_fast.telemetry import Metrics, RunDirectory
from mel_fast.tiny.prepare import prepare
from mel_fast.types import Prompt
from mel_fast.verify import Verifier

log = logging.getLogger(__name__)


@contextmanager
def open_run(config: Config, resume: str | None) -> Iterator[Run]:
    """A run ready for its next step, closed again in every case.

    Args:
        config: resolved settings.
        resume: a run directory to go on with from its newest checkpoint, or None for a new run.

    Raises:
        InputError: data, model or checkpoint that cannot be used.
    """
    with ExitStack() as stack:
        world = stack.enter_context(join_world(config.run.device, config.run.collective_timeout_minutes))
        config = saved = config.with_absolute_paths()
        if config.tiny is not None:
            config = config.with_tiny_folder(prepare(config.tiny, config.prompts, world))
        torch.manual_seed(config.run.seed)
        tokenizer = load_tokenizer(config.model)
        renderer = Renderer(tokenizer, config.prompts)
        # Sampling comes first: it finds what is wrong with the data before the large model is loaded.
        sampling = open_sampling(config, renderer, world, stack) if world.main and config.run.mode != "train" else None
        policy = load_policy(config.model, world)
        reference = load_policy(config.model, world).requires_grad_(False) if config.objective.kl_coef > 0 else None
        updates = config.run.steps * config.objective.updates_per_batch * config.optim.epochs
        learner = Learner(policy, reference, config.optim, updates, world)
        steps_done = 0
        # Only now, so that a run that cannot start leaves nothing behind and `latest` stays what it was.
        directory = RunDirectory(config.run.folder, config.run.name, resume) if world.main else None
        if directory is not None:
            directory.file("config.yaml").write_text(saved.to_yaml())
        found = world.broadcast(checkpoints(directory.path / "checkpoints") if directory else None)
        if resume is not None and found:
            state = load_checkpoint(found[-1], learner)
            steps_done = int(state["step"])
            if sampling is not None:
                sampling.cursor.restore(state["cursor"])
        desk = None
        if directory is not None:
            metrics = Metrics(directory, config.telemetry, config.model_dump(mode="json"), steps_done)
            stack.callback(metrics.close)
            display = stack.enter_context(Display(config.run.steps, steps_done))
            desk = Desk(directory, metrics, display, renderer, sampling)
            display.say(
                f"run directory {directory.path}" + (f", going on after step {steps_done}" if steps_done else "")
            )
        yield Run(config, world, tokenizer, learner, desk, steps_done)


def open_sampling(config: Config, renderer: Renderer, world: World, stack: ExitStack) -> Sampling:
    """Engine, data and verifier."""
    engine = open_engine(config, renderer, world)
    sources = config.data.train
    train = [prompt for source in sources for prompt in fitting_prompts(source, config, renderer, engine)]
    evaluation = load_evaluation(config, renderer, engine)
    verifier = stack.enter_context(Verifier(config.verify))
    collector = Collector(engine, renderer, verifier, config.rollout, config.mel, config.run.seed)
    return Sampling(engine, verifier, collector, Cursor(train, config.run.seed), evaluation)


@contextmanager
def open_evaluation(config: Config) -> Iterator[tuple[Engine, Renderer, Verifier, dict[str, list[Prompt]]]]:
    """What an evaluation alone needs, in a world of one rank.

    Raises:
        InputError: as `open_run`; also when there is no data set to evaluate on.
    """
    with join_world(config.run.device, config.run.collective_timeout_minutes) as world:
        if config.tiny is not None:
            config = config.with_tiny_folder(prepare(config.tiny, config.prompts, world))
        if not config.eval.sets:
            raise InputError("eval.sets is empty, so there is nothing to evaluate on; name data sets there")
        renderer = Renderer(load_tokenizer(config.model), config.prompts)
        engine = open_engine(config, renderer, world)
        with Verifier(config.verify) as verifier:
            yield engine, renderer, verifier, load_evaluation(config, renderer, engine)


def open_engine(config: Config, renderer: Renderer, world: World) -> Engine:
    """The engine, with the weights of `model.path`."""
    rollout = config.rollout
    model = load_model(config.model, getattr(torch, rollout.dtype))
    nn.Module.to(model, world.device)
    engine = LocalEngine(model, renderer.stop_ids, rollout.max_batch)
    if rollout.max_new_tokens >= engine.context_length:
        raise InputError(
            f"rollout.max_new_tokens={rollout.max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{engine.context_length} tokens; lower it"
        )
    return engine


def load_evaluation(config: Config, renderer: Renderer, engine: Engine) -> dict[str, list[Prompt]]:
    """The evaluation problems, by the name of their data set."""
    sets = config.eval.sets
    return {s.name or Path(s.path).stem: fitting_prompts(s, config, renderer, engine) for s in sets}


def fitting_prompts(source: Source, config: Config, renderer: Renderer, engine: Engine) -> list[Prompt]:
    """The prompts of a data set that fit into `rollout.max_prompt_tokens` and the model's context.

    Raises:
        InputError: one is longer and `rollout.long_prompts` is "error", or none is left.
    """
    rollout = config.rollout
    longest = max(rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    limit = min(engine.context_length - longest, rollout.max_prompt_tokens)
    prompts, fit = load_prompts(source), []
    for prompt in prompts:
        tokens = len(renderer.solve(prompt))
        if tokens <= limit:
            fit.append(prompt)
        elif rollout.long_prompts == "error":
            raise InputError(
                f"{source.path}: prompt {prompt.id!r} has {tokens} tokens, over the limit of {limit} (the smaller of "
                "rollout.max_prompt_tokens and the model's context less the response limit); raise it, or set "
                "rollout.long_prompts=drop"
            )
    if not fit:
        raise InputError(f"{source.path}: no prompt of at most {limit} tokens is left; raise rollout.max_prompt_tokens")
    if dropped := len(prompts) - len(fit):
        log.warning("%s: %d of %d prompts dropped, over %d tokens", source.path, dropped, len(prompts), limit)
    return fit


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"model.path={config.path!r}: no tokenizer could be loaded from there: {first}") from error
