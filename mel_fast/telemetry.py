"""What a run leaves behind: a directory of its own with its configuration, metrics, rollouts and evaluations.

runs/20260131-142501-mel/
  config.yaml        the resolved configuration
  metrics.jsonl      one line per finished step, and one per evaluation
  rollouts/          step_000001.jsonl: every episode with its trajectories and experiences
  evaluations/       every answer given
  checkpoints/       the newest few
  stacks/            rank_0.txt: where a rank was that hung, or that was ended by SIGTERM
  model/             the final policy, as transformers loads it
  report.html        curves, meta-experiences and rollouts in one file
runs/latest          a link to the newest
"""

from __future__ import annotations

import fcntl
import importlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mel_fast.dumps import read_metrics
from mel_fast.errors import InputError
from mel_fast.files import write_whole, writing


class TelemetryConfig(BaseModel):
    """Where metrics go besides metrics.jsonl and the console."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    writers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="need the packages of these names"
    )
    wandb_project: str = Field(default="mel_fast", description="writers=[wandb]: the project")
    dump_rollouts: bool = Field(
        default=True, description="write rollouts/step_*.jsonl: the report's viewers and run.mode=train live on them"
    )
    rollout_gap_alarm: float = Field(
        default=0.2, gt=0, description="warn when rollout and trainer log-probs differ by more on average"
    )
    spike_deviations: float = Field(
        default=10.0,
        gt=0,
        description="warn when loss or gradient norm is above the median of the last steps by more than so many robust "
        "standard deviations, and by the median itself",
    )
    spike_window: int = Field(default=50, ge=20, description="how many last steps those are")


class RunDirectory:
    """Creates a fresh directory, or takes over that of a run to be resumed.

    Raises:
        InputError: the run to be resumed is not there, or is still running.
        OutputError: the disk does not take it.
    """

    def __init__(self, folder: str, name: str, resume: str | None) -> None:
        if resume is None:
            self.path = _fresh(Path(folder), name)
        else:
            self.path = Path(resume).resolve()
            if not self.path.is_dir():
                raise InputError(f"--resume {resume}: no such run directory")
        with writing(self.path):
            self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{self.path} is in use by a run that has not ended") from error
        latest = self.path.parent / "latest"
        if latest.is_symlink() or not latest.exists():
            link = self.path / ".link"  # moved into place: another run may be doing the same at this moment
            with writing(latest):
                link.unlink(missing_ok=True)
                link.symlink_to(self.path.name)
                link.replace(latest)

    def file(self, *parts: str) -> Path:
        path = self.path.joinpath(*parts)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _fresh(folder: Path, name: str) -> Path:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        path = folder / f"{stamp}-{name}{suffix}"
        with writing(path):
            try:
                path.mkdir()
            except FileExistsError:
                continue
        return path
    raise InputError(f"{folder}: no free name for a run directory")


class Metrics:
    """Writes metrics of finished steps. Lines of steps after `steps_done` (from before a resume) are removed first.

    Raises:
        InputError: the library of a writer is not installed.
        OutputError: the disk does not take a line.
    """

    def __init__(
        self, directory: RunDirectory, config: TelemetryConfig, settings: dict[str, Any], steps_done: int
    ) -> None:
        path = directory.file("metrics.jsonl")
        kept = (
            [line for line in read_metrics(path) if line["step"] <= steps_done] if steps_done and path.exists() else []
        )
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._path, self._file = path, path.open("a")
        self._tensorboard = self._wandb = None
        if "tensorboard" in config.writers:
            tensorboard = _writer("tensorboard", "torch.utils.tensorboard")
            folder = str(directory.path / "tensorboard")
            self._tensorboard = tensorboard.SummaryWriter(folder, purge_step=steps_done + 1)
        if "wandb" in config.writers:
            wandb = _writer("wandb", "wandb")
            self._wandb = wandb.init(
                project=config.wandb_project,
                name=directory.path.name,
                id=directory.path.name,
                resume="allow",
                config=settings,
            )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        with writing(self._path):
            self._file.write(json.dumps({"step": step} | metrics) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)

    def close(self) -> None:
        with writing(self._path):
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _writer(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"telemetry.writers has {name!r}, which is not installed ({error}); "
            f"pip install 'mel-fast[{name}]', or leave it out"
        ) from error


class Phases:
    """Wall time of each phase of a step, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        taken = {f"time/{name}": value for name, value in self.seconds.items()}
        self.seconds = {}
        return taken
