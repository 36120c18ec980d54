"""Puts a run together from its configuration: world, data, policy, engine, books."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mel_fast.checkpoint import CheckpointError, load_checkpoint, newest_sound
from mel_fast.config import Config, RunConfig
from mel_fast.console import Display
from mel_fast.data import Cursor, Source, load_prompts
from mel_fast.distributed import World, join_world
from mel_fast.dumps import read_metrics
from mel_fast.elastic import remember_run
from mel_fast.errors import InputError
from mel_fast.experience import Collector
from mel_fast.feed import Feed
from mel_fast.files import write_whole
from mel_fast.guard import Spikes
from mel_fast.learner import Learner
from mel_fast.model import ModelConfig, empty_model
from mel_fast.policy import load_policy
from mel_fast.prompts import Renderer
from mel_fast.rollout.engine import Engine
from mel_fast.rollout.launch import check_engine, open_engine
from mel_fast.run import Desk, Run, Sampling
from mel_fast.telemetry import Metrics, RunDirectory
from mel_fast.tiny.prepare import prepare
from mel_fast.types import Prompt
from mel_fast.verify import Verifier
from mel_fast.watchdog import Watchdog

log = logging.getLogger(__name__)

SPARE_MINUTES = 5.0  # until collectives fail by themselves; the watchdog, which can say more, comes first


@contextmanager
def open_run(config: Config, resume: str | None) -> Iterator[Run]:
    """A run ready for its next step, closed again in every case.

    Args:
        config: resolved settings.
        resume: a run directory to go on with from its newest checkpoint, or None for a new run.

    Raises:
        InputError: data, model or checkpoint that cannot be used.
        EngineError: rollout servers that do not start.
        LaunchError: a rank that does not start.
    """
    with ExitStack() as stack:
        longest = max(config.run.collective_timeout_minutes, config.run.phase_timeout_minutes)
        world = stack.enter_context(join_world(config.run.device, longest + SPARE_MINUTES))
        watchdog = stack.enter_context(Watchdog(world, config.run))
        config = saved = config.with_absolute_paths()
        if config.tiny is not None:
            config = config.with_tiny_folder(prepare(config.tiny, config.prompts, world))
        torch.manual_seed(config.run.seed)
        tokenizer = load_tokenizer(config.model)
        renderer = Renderer(tokenizer, config.prompts)
        samples = world.main and config.run.mode != "train"
        # Data come first: what is wrong with them is found before the large model is loaded.
        data = open_data(config, renderer) if samples else None
        policy = load_policy(config.model, world)
        reference = load_policy(config.model, world).requires_grad_(False) if config.objective.kl_coef > 0 else None
        updates = config.run.steps * config.objective.updates_per_batch * config.optim.epochs
        learner = Learner(policy, reference, config.optim, updates, world)
        steps_done = 0
        # Only now, so that a run that cannot start leaves nothing behind and `latest` stays what it was.
        directory = RunDirectory(config.run.folder, config.run.name, resume) if world.main else None
        if directory is not None:
            write_whole(directory.file("config.yaml"), saved.to_yaml())
            remember_run(directory.path)
        path = world.broadcast(directory.path if directory else None)
        watchdog.write_to(path / "stacks")
        if resume is not None and (found := newest_sound(path / "checkpoints", world)):
            state = load_checkpoint(found, learner)
            steps_done = int(state["step"])
            if data is not None:
                data.cursor.restore(state["cursor"])
        desk = None
        if directory is not None:
            if resume is not None and not steps_done:
                may_start_anew(path, config.run)
            metrics = Metrics(directory, config.telemetry, config.model_dump(mode="json"), steps_done)
            stack.callback(metrics.close)
            display = stack.enter_context(Display(config.run.steps, steps_done))
            display.say(
                f"run directory {directory.path}"
                + (f", going on after step {steps_done}" if steps_done else "")
                + (", which has no checkpoint yet: from the first step" if resume and not steps_done else "")
            )
            sampling = open_sampling(config, renderer, data, directory, world, stack) if data else None
            known = read_metrics(directory.path / "metrics.jsonl")
            spikes = Spikes(config.telemetry.spike_deviations, config.telemetry.spike_window, known)
            desk = Desk(directory, metrics, display, renderer, spikes, sampling)
        yield Run(config, world, path, tokenizer, learner, desk, steps_done, watchdog)


def may_start_anew(path: Path, config: RunConfig) -> None:
    """Raises CheckpointError when a run without a checkpoint must have had one: its steps are not thrown away."""
    file = path / "metrics.jsonl"
    done = max((line["step"] for line in read_metrics(file)), default=0) if file.exists() else 0
    if config.mode != "rollout" and 0 < config.checkpoint_every < done:
        raise CheckpointError(
            f"{path / 'checkpoints'}: there is no checkpoint, although {done} steps are done and one is written every "
            f"{config.checkpoint_every}; put them back, or start a new run without --resume"
        )


@dataclass(frozen=True, slots=True)
class Data:
    """Prompts that fit into the engine's context, and where the run stands in them."""

    cursor: Cursor
    evaluation: dict[str, list[Prompt]]


def open_data(config: Config, renderer: Renderer) -> Data:
    """Raises InputError for data, or an engine, that cannot be used; nothing large is loaded before that is known."""
    check_engine(config.rollout)
    context = context_length(config)
    train = [p for source in config.data.train for p in fitting_prompts(source, config, renderer, context)]
    return Data(Cursor(train, config.run.seed), load_evaluation(config, renderer, context))


def open_sampling(
    config: Config, renderer: Renderer, data: Data, directory: RunDirectory, world: World, stack: ExitStack
) -> Sampling:
    """Engine, verifier and the feed of episodes."""
    rollout, run, folder = config.rollout, config.run, directory.path / "servers"
    engine = stack.enter_context(open_engine(rollout, config.model, renderer.stop_ids, folder, run.seed, world))
    verifier = stack.enter_context(Verifier(config.verify))
    collector = Collector(engine, renderer, verifier, rollout, config.mel, run.seed)
    ahead = rollout.mode == "async"
    feed = Feed(collector, data.cursor, rollout.prompts_per_step, ahead=ahead, steps=run.steps)
    return Sampling(engine, verifier, stack.enter_context(feed), data.evaluation)


@contextmanager
def open_evaluation(config: Config) -> Iterator[tuple[Engine, Renderer, Verifier, dict[str, list[Prompt]]]]:
    """What an evaluation alone needs, in a world of one rank.

    Raises:
        InputError: as `open_run`; also when there is no data set to evaluate on.
        EngineError: as `open_run`.
    """
    with join_world(config.run.device, config.run.collective_timeout_minutes) as world:
        if config.tiny is not None:
            config = config.with_tiny_folder(prepare(config.tiny, config.prompts, world))
        if not config.eval.sets:
            raise InputError("eval.sets is empty, so there is nothing to evaluate on; name data sets there")
        renderer = Renderer(load_tokenizer(config.model), config.prompts)
        check_engine(config.rollout)
        sets = load_evaluation(config, renderer, context_length(config))
        folder = Path(config.run.folder) / "evaluation-servers"
        engine = open_engine(config.rollout, config.model, renderer.stop_ids, folder, config.run.seed, world)
        with engine as opened, Verifier(config.verify) as verifier:
            yield opened, renderer, verifier, sets


def context_length(config: Config) -> int:
    """Of the model: prompt and response together, in tokens."""
    context = int(empty_model(config.model).config.max_position_embeddings)
    if config.rollout.max_new_tokens >= context:
        raise InputError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt in the model's "
            f"context of {context} tokens; lower it"
        )
    return context


def load_evaluation(config: Config, renderer: Renderer, context: int) -> dict[str, list[Prompt]]:
    """The evaluation problems, by the name of their data set."""
    sets = config.eval.sets
    return {s.name or Path(s.path).stem: fitting_prompts(s, config, renderer, context) for s in sets}


def fitting_prompts(source: Source, config: Config, renderer: Renderer, context: int) -> list[Prompt]:
    """The prompts of a data set that fit into `rollout.max_prompt_tokens` and the model's context of so many tokens.

    Raises:
        InputError: one is longer and `rollout.long_prompts` is "error", or none is left.
    """
    rollout = config.rollout
    longest = max(rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    limit = min(context - longest, rollout.max_prompt_tokens)
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
