"""A run as the loop in `train.py` sees it: what happens around the method's steps. `setup.py` puts one together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mel_fast import weights
from mel_fast.checkpoint import export_model, save_checkpoint
from mel_fast.config import Config
from mel_fast.console import Display
from mel_fast.distributed import World
from mel_fast.dumps import dump_episodes, load_episodes
from mel_fast.evaluate import evaluate
from mel_fast.feed import Feed
from mel_fast.guard import Diverged, Spikes, hardest, write_skipped
from mel_fast.learner import Learner
from mel_fast.metrics import rollout_metrics, staleness_metrics
from mel_fast.objective import Batch, build_batch
from mel_fast.prompts import Renderer
from mel_fast.report import summarise, write_report
from mel_fast.rollout.engine import Engine
from mel_fast.telemetry import Metrics, Phases, RunDirectory
from mel_fast.types import Episode, Prompt, Trajectory
from mel_fast.verify import Verifier
from mel_fast.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sampling:
    """What it takes to sample and to judge; there is none in mode=train."""

    engine: Engine
    verifier: Verifier
    feed: Feed
    evaluation: dict[str, list[Prompt]]  # by the name of the data set


@dataclass(slots=True)
class Desk:
    """The books of the run. Only rank 0 has a desk."""

    directory: RunDirectory
    metrics: Metrics
    display: Display
    renderer: Renderer
    spikes: Spikes
    sampling: Sampling | None


@dataclass(slots=True)
class Run:
    """The same on every rank, but for the desk."""

    config: Config
    world: World
    folder: Path  # the run directory, which rank 0 made
    tokenizer: PreTrainedTokenizerBase
    learner: Learner
    desk: Desk | None
    steps_done: int
    watchdog: Watchdog
    phases: Phases = field(default_factory=Phases)

    def publish(self, version: int) -> None:
        """The policy's weights -> the engine. Nothing when nothing ever changes or samples."""
        if self.config.run.mode == "full":
            with self._together("publish"):
                engine = self.desk.sampling.engine if self.desk and self.desk.sampling else None
                weights.publish(self.learner.policy, engine, version)

    def collect(self) -> list[Episode]:
        """Rank 0: samples the next step's episodes (or reads dumped ones). Empty on other ranks."""
        if self.desk is None:
            return []
        with self._phase("collect"):
            sampling, step = self.desk.sampling, self.steps_done
            if sampling is None:
                vocabulary = self.learner.policy.model.config.vocab_size
                return load_episodes(Path(self.config.run.rollouts or "") / _dump_name(step), vocabulary)
            episodes = sampling.feed.take(step)
            if self.config.telemetry.dump_rollouts or self.config.run.mode == "rollout":
                dump_episodes(self.desk.directory.file("rollouts", _dump_name(step)), episodes)
            return episodes

    def build_batch(self, episodes: Sequence[Episode]) -> Batch | None:
        """Rank 0: episodes -> samples. None on other ranks."""
        if self.desk is None:
            return None
        with self._phase("build_batch"):
            config = self.config
            return build_batch(
                episodes,
                config.objective,
                config.mel.internalise,
                config.mel.nll_weight_at(self.steps_done),
                config.rollout.max_new_tokens,
                config.rollout.temperature,
                self.desk.renderer,
            )

    def update(self, batch: Batch | None) -> dict[str, float]:
        """All ranks: one optimizer step per mini-batch of the batch. Nothing in mode=rollout."""
        if self.config.run.mode == "rollout":
            return {}
        with self._together("update"):
            if self.desk and self.desk.sampling:
                self.desk.sampling.engine.release()
            return self.learner.update(batch.updates if batch else None, self.config.objective.loss)

    def observe(self, episodes: Sequence[Episode], batch: Batch | None, learned: dict[str, float]) -> None:
        """Ends the step: counts it and writes down what was seen.

        Raises:
            Diverged: on all ranks, when `optim.max_skipped` optimizer steps in a row were not finite.
        """
        self.steps_done += 1
        told = "rank 0 says where their samples are"
        if self.desk is not None and batch is not None:
            self._write_metrics(self.desk, episodes, batch, learned)
            told = self._write_skipped(self.desk)
        if self.learner.stuck:
            raise Diverged(
                f"step {self.steps_done}: {self.config.optim.max_skipped} optimizer steps in a row were skipped (not "
                f"finite: loss or gradient); {told}. Where many prompts are named, weights or settings are to blame: "
                "go on from the last checkpoint with --resume and a lower optim.lr. Where it is one, take it out"
            )

    def _write_metrics(self, desk: Desk, episodes: Sequence[Episode], batch: Batch, learned: dict[str, float]) -> None:
        sampling, config = desk.sampling, self.config
        times = self.phases.take()
        seconds = sum(times.values())
        sampled = sum(len(t.output_ids) for e in episodes for t in _all_trajectories(e))
        metrics = rollout_metrics(episodes) | batch.metrics | learned | times
        metrics |= {
            "time/step": seconds,
            "perf/sampled_tokens": float(sampled),
            "perf/sampled_tokens_per_s": sampled / seconds,
        }
        if sampling is not None:
            metrics["data/epoch"] = float(sampling.feed.epoch)
            metrics |= sampling.engine.take_metrics()
            if config.run.mode == "full":
                metrics |= staleness_metrics(episodes, self.steps_done - 1)
        desk.metrics.write(self.steps_done, metrics)
        desk.display.row(self.steps_done, metrics)
        if (gap := metrics.get("policy/rollout_gap", 0.0)) > config.telemetry.rollout_gap_alarm:
            log.warning("step %d: rollout and trainer log-probs differ by %.3f on average", self.steps_done, gap)
        if leaps := desk.spikes.look(metrics):
            pulling = hardest(self.learner.outcomes)
            log.warning("step %d: %s; prompts that pull hardest: %s", self.steps_done, "; ".join(leaps), pulling)

    def _write_skipped(self, desk: Desk) -> str:
        """Dumps the samples of skipped optimizer steps, if any, and says where."""
        outcomes, step = self.learner.outcomes, self.steps_done
        if not (skipped := sum(not outcome.finite for outcome in outcomes)):
            return ""
        path = desk.directory.file("skipped", f"step_{step:06d}.jsonl")
        prompts = write_skipped(path, step, outcomes, desk.renderer.decode)
        names = ", ".join(prompts[:3]) + (f" and {len(prompts) - 3} more" if len(prompts) > 3 else "")
        told = f"{path} has the samples that they come from, of the prompts {names}"
        log.warning("step %d: %d of %d updates skipped, not finite; %s", step, skipped, len(outcomes), told)
        return told

    def evaluate_when_due(self) -> None:
        """Rank 0, with the engine's weights: before the first step, after the last, and every `eval.every` steps."""
        settings, done = self.config.eval, self.steps_done
        due = settings.every > 0 and 0 < done < self.config.run.steps and done % settings.every == 0
        at_end = settings.at_ends and done in (0, self.config.run.steps)
        if self.desk is None or self.desk.sampling is None or not self.desk.sampling.evaluation or not (due or at_end):
            return
        sampling, directory = self.desk.sampling, self.desk.directory
        with self._phase("evaluate"):
            scores = evaluate(
                sampling.evaluation,
                sampling.engine,
                self.desk.renderer,
                sampling.verifier,
                settings,
                self.config.rollout.max_new_tokens,
                self.config.run.seed,
                directory.file("evaluations", f"step_{done:06d}.jsonl"),
            )
        flat = {f"eval/{name}/{key}": value for name, score in scores.items() for key, value in asdict(score).items()}
        self.desk.metrics.write(done, flat | self.phases.take())
        self.desk.display.scores(done, scores, settings.samples)

    def checkpoint_when_due(self) -> None:
        """All ranks: every `run.checkpoint_every` steps and after the last."""
        settings, done = self.config.run, self.steps_done
        if settings.mode == "rollout":
            return
        if done == settings.steps or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
            state: dict[str, object] = {}
            if self.desk and self.desk.sampling:
                state["cursor"] = self.desk.sampling.feed.state()
            with self._together("checkpoint"):
                save_checkpoint(
                    self.folder / "checkpoints", done, self.learner, state, settings.keep_checkpoints, self.world
                )
            self.phases.take()  # it ends no step, so it belongs to none

    def finish(self) -> None:
        """All ranks: exports the policy; rank 0 writes the report."""
        if self.config.run.mode != "rollout":
            with self._together("export"):
                export_model(self.folder / "model", self.learner.policy, self.tokenizer, self.world)
        if self.desk is not None:
            summary = summarise(self.folder)
            if summary.evaluations:
                k = self.config.eval.samples
                heading = ["data set", "Pass@1", f"Avg@{k}", f"Pass@{k}"]
                self.desk.display.table("before -> after", heading, summary.rows())
            self.desk.display.files(write_report(self.folder))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Timed, and watched: `run.collective_timeout_minutes`."""
        with self.watchdog.phase(name, self.steps_done), self.phases(name):
            yield

    def _together(self, name: str) -> AbstractContextManager[None]:
        """A phase of all ranks, watched by `run.phase_timeout_minutes`, in which no time for rollouts is included."""
        self.world.broadcast(None)  # comes when rank 0 does
        return self._phase(name)


def _dump_name(step: int) -> str:
    return f"step_{step + 1:06d}.jsonl"


def _all_trajectories(episode: Episode) -> list[Trajectory]:
    more = [t for x in episode.experiences for t in (x.reflection, x.replay) if t is not None]
    return [*episode.trajectories, *more]
