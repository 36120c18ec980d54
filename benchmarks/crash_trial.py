"""One rank of a run that is killed again and again; `crash_soak.py` starts it.

    torchrun --max-restarts=N -m benchmarks.crash_trial PLAN LOG SETTINGS...

Runs `mel_fast.train` with the settings, and ends this process by SIGKILL, as `kill -9` does: no handler runs, nothing
is flushed. Where, the plan says: a list of faults, one for each attempt of torchrun. LOG gets a line of JSON for
each fault just before it strikes, and one when an attempt begins to collect.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

RANK = int(os.environ.get("RANK", "0"))
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
SGLANG = "mel_fast.rollout.sglang"


@dataclass(frozen=True, slots=True)
class Fault:
    """`count` is which call of a point's function it is, or for the point "time" the seconds since training began."""

    rank: int
    point: str
    count: float
    hang: bool = False  # stop answering instead


@dataclass(frozen=True, slots=True)
class Point:
    """A function within which a fault may strike, when it has been called so many times."""

    module: str
    name: str
    calls: int  # of a whole attempt, roughly: up to this many are waited for
    every_rank: bool = False
    path: str = ""  # only calls for a path with this in its name
    engine: str = ""  # only with this one


POINTS = {
    "setup": Point("mel_fast.setup", "load_policy", 1, every_rank=True),
    "resume: checkpoint read": Point("mel_fast.setup", "load_checkpoint", 1, every_rank=True),
    "resume: metrics rewritten": Point("pathlib", "Path.replace", 1, path=".writing_metrics.jsonl"),
    "decoding": Point("mel_fast.rollout.local", "sample", 250, engine="local"),
    "server starts": Point(f"{SGLANG}.client", "Client.healthy", 1, engine="sglang"),
    "server's first weights": Point(f"{SGLANG}.publisher", "Publisher.restore", 1, engine="sglang"),
    "generation": Point(f"{SGLANG}.client", "Client.generate", 250, engine="sglang"),
    "verification": Point("mel_fast.verify", "Verifier.score", 40),
    "reflection": Point("mel_fast.experience", "Collector._reflect", 16),
    "replay": Point("mel_fast.experience", "Collector._replay", 16),
    "rollouts written": Point("pathlib", "Path.rename", 4, path=".partial"),
    "batch": Point("mel_fast.run", "build_batch", 4),
    "packing": Point("mel_fast.learner", "pack", 4),
    "forward": Point("mel_fast.policy", "Policy.forward", 4, every_rank=True),
    "backward": Point("torch", "Tensor.backward", 4, every_rank=True),
    "optimizer step": Point("torch.optim", "AdamW.step", 4, every_rank=True),
    "publication": Point("mel_fast.weights", "full_weights", 5, every_rank=True),
    "publication: servers paused": Point(f"{SGLANG}.transport", "Copy.add", 5, engine="sglang"),
    "publication: files sent": Point(f"{SGLANG}.publisher", "send_files", 5, engine="sglang"),
    "publication: servers go on": Point(f"{SGLANG}.publisher", "Publisher._end", 5, engine="sglang"),
    "metrics line": Point("mel_fast.telemetry", "Metrics.write", 4),
    "evaluation": Point("mel_fast.run", "evaluate", 2),
    "checkpoint: tensors": Point("torch.distributed.checkpoint.filesystem", "_write_item", 60, every_rank=True),
    "checkpoint: state": Point("mel_fast.checkpoint", "json.dump", 2),
    "checkpoint: rename": Point("pathlib", "Path.rename", 2, path=".writing_step"),
    "checkpoint: removal": Point("mel_fast.checkpoint", "shutil.rmtree", 1, path=".writing_step"),
    "export": Point("mel_fast.run", "export_model", 1, every_rank=True),
    "report": Point("mel_fast.run", "write_report", 1),
    "servers end": Point(f"{SGLANG}.process", "ServerProcess.stop", 1, engine="sglang"),
}
LAST = ("export", "report", "servers end")  # in this order: what ends a run


def points(engine: str) -> dict[str, Point]:
    """Those that a run with this engine passes."""
    return {name: point for name, point in POINTS.items() if point.engine in ("", engine)}


def plan(random_: random.Random, ranks: int, length: int, seconds: float, engine: str) -> list[Fault]:
    """Half of the faults at a point, the others at any time within so many seconds."""
    faults: list[Fault] = []
    for attempt in range(length):
        names = [name for name in points(engine) if attempt > 0 or not name.startswith("resume")]
        name = random_.choice(["time"] * len(names) + names)
        anyone = name == "time" or POINTS[name].every_rank
        rank = random_.randrange(ranks) if anyone else 0
        count = random_.uniform(0, seconds) if name == "time" else random_.randint(1, POINTS[name].calls)
        faults.append(Fault(rank, name, count))
    return faults


def matrix(ranks: int, engine: str) -> list[Fault]:
    """Every point once on rank 0, and once more on another rank where others pass it, too, each at its first call: so
    the run gets no further than it must, and the next fault finds work left. What ends a run comes last."""
    names = points(engine)
    begun = [name for name in names if not name.startswith("resume") and name not in LAST]
    resumed = [name for name in names if name.startswith("resume")]  # there is a checkpoint behind the evaluation
    other = range(1, min(ranks, 2))
    faults = [Fault(0, name, 1) for name in (*begun, *resumed)]
    faults += [Fault(rank, name, 1) for name in (*begun, *resumed) for rank in other if POINTS[name].every_rank]
    faults += [Fault(rank, "export", 1) for rank in (0, *other)]
    return [*faults, *(Fault(0, name, 1) for name in LAST[1:] if name in names)]


class Trial:
    """The fault of this attempt, if it is this rank's, and the log."""

    def __init__(self, faults: list[Fault], log: Path) -> None:
        self._told = False
        mine = faults[ATTEMPT] if len(faults) > ATTEMPT and faults[ATTEMPT].rank == RANK else None
        self.fault, self.log = mine, log

    def prepare(self) -> None:
        if RANK == 0:
            wrap("mel_fast.run", "Run.collect", self._begun)
        if self.fault is None:
            return
        wrap("mel_fast.run", "Run.finish", self._strike_at_last)
        if self.fault.point == "time":
            timer = threading.Timer(self.fault.count, self.strike)
            timer.daemon = True
            timer.start()
            return
        point, left = POINTS[self.fault.point], self.fault.count

        def count(*arguments: Any) -> None:
            nonlocal left
            if point.path in str(arguments[0] if arguments else ""):
                left -= 1
                if left == 0:
                    self._half_done(arguments)
                    self.strike()

        wrap(point.module, point.name, count)

    def strike(self) -> None:
        assert self.fault is not None
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        names = [f.name for f in traceback.extract_stack(frame) if "/mel_fast/" in f.filename]
        inside = names[names.index("train") + 1 :] if "train" in names else [n for n in names if n != "main"]
        self._write(
            "hang" if self.fault.hang else "kill",
            phase=(inside or ["the rest"])[0],
            **asdict(self.fault),
        )
        if self.fault.hang:
            time.sleep(3600)
        end()

    def _strike_at_last(self, *_: Any) -> None:
        """The steps are done, and what the fault waited for has not come: no attempt but the last is spared."""
        if self.fault is not None and self.fault.point not in LAST:
            self.strike()

    def _half_done(self, arguments: tuple[Any, ...]) -> None:
        assert self.fault is not None
        if self.fault.point == "metrics line":
            arguments[0]._file.write('{"step": 3, "loss/tot')
            arguments[0]._file.flush()
        elif self.fault.point == "checkpoint: removal":
            next(arguments[0].iterdir()).unlink()
        elif self.fault.point == "checkpoint: state":
            arguments[1].write('{"cursor": {')
            arguments[1].flush()

    def _begun(self, *_: Any) -> None:
        if not self._told:
            self._told = True
            self._write("collect")

    def _write(self, event: str, **more: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps({"event": event, "attempt": ATTEMPT, "time": time.time()} | more) + "\n")


def wrap(module: str, name: str, before: Callable[..., None]) -> None:
    """Calls `before` with the arguments whenever the function is called; in a generator, at its third value."""
    owner: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    function = getattr(owner, last)

    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        if last == "full_weights":
            return generator(function(*arguments, **keywords))
        before(*arguments)
        return function(*arguments, **keywords)

    def generator(values: Iterator[Any]) -> Iterator[Any]:
        for index, value in enumerate(values):
            if index == 3:
                before()
            yield value

    setattr(owner, last, wrapped)


def end() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL was survived")


if __name__ == "__main__":
    from mel_fast.train import main  # not in the verifier's workers, which run this module as well

    faults, log, *settings = sys.argv[1:]
    Trial([Fault(**fault) for fault in json.loads(Path(faults).read_text())], Path(log)).prepare()
    sys.exit(main(settings))
