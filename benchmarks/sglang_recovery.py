"""How long does it take until work goes on after a rollout server is lost?

    python -m benchmarks.sglang_recovery

Real SGLang servers on the CPU with a tiny model and an imposed minimum time of each forward pass (timed_servers), kept
by the trainer's own engine. 32 sessions ask without pause; then all processes of one server are killed (`kill -9`), or
stopped (SIGSTOP: it hangs, its connections stay open). Needs the servers' environment (`make sglang`).

Figures, in seconds from the fault. `noticed`: no more requests go to the server. `first`: the first answer to a request
that was at it then. `all`: the last of those. `back`: it was restarted, has the newest weights, and is asked again. A
restart is mostly SGLang's own start, so it depends on the machine; a hang is noticed after `hang_after_s` (here 5).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.loss_measure import load_average, machine
from benchmarks.timed_servers import VOCABULARY, TimedServer, Times, engine_for, save_model
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.engine import SGLangEngine, SGLangSession
from mel_fast.types import Request

SESSIONS, TOKENS = 32, 150
CASES = ((1, "killed"), (2, "killed"), (1, "hung"), (2, "hung"))


class Load:
    """Sessions that ask without pause, and when each of their answers came."""

    def __init__(self, engine: SGLangEngine) -> None:
        self.engine, self.stopped = engine, False
        self.asking: dict[int, SGLangSession] = {}  # by number of the request
        self.answered: dict[int, float] = {}

    def run(self) -> None:
        async def sessions() -> None:
            await asyncio.gather(*(self._ask(number) for number in range(SESSIONS)))

        asyncio.run(sessions())

    async def _ask(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        while not self.stopped:
            prompt = torch.randint(0, VOCABULARY, (64,), generator=generator).tolist()
            async with self.engine.session(str(number)) as session:
                self.asking[number] = session
                (completion,) = await session.generate([Request(prompt, number, TOKENS)])
                assert len(completion.output_ids) == TOKENS
                self.answered[number] = time.monotonic()
            del self.asking[number]
            number += SESSIONS


def measure(count: int, fault: str, folder: Path) -> dict[str, Any]:
    """One server of `count` is lost while all are busy."""
    model = save_model(folder)
    config = SGLangConfig(servers=count, hang_after_s=5.0, health_every_s=10.0, weights="disk")
    servers = [TimedServer(config, str(model), "float32", [], folder / f"server-{index}.log") for index in range(count)]
    with engine_for(config, servers, str(model), folder) as engine, ThreadPoolExecutor(1) as pool:
        weights = list(AutoModelForCausalLM.from_pretrained(model).named_parameters())
        engine.load(weights, 1)
        load = Load(engine)
        done = pool.submit(load.run)
        try:
            _wait(lambda: len(load.answered) >= 2 * SESSIONS)
            lost = engine.servers[0]
            hit = [number for number, session in list(load.asking.items()) if session.server is lost]
            os.killpg(servers[0].pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
            began = time.monotonic()
            noticed = _wait(lambda: not lost.ready.is_set()) - began
            back = _wait(lost.ready.is_set) - began
            _wait(lambda: all(number in load.answered for number in hit))
        finally:
            load.stopped = True
        done.result()
        after = sorted(load.answered[number] - began for number in hit)
        return {
            "servers": count,
            "fault": fault,
            "noticed": noticed,
            "first": after[0],
            "all": after[-1],
            "back": back,
            "requests_hit": len(hit),
            "load": load_average(),
        }


def _wait(condition: Callable[[], bool]) -> float:
    """Returns when it came true, on time.monotonic."""
    while not condition():
        time.sleep(0.005)
    return time.monotonic()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("killed", "hung"), help="default: both")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine(torch.device('cpu'))}; {Times().describe()}")
    found: list[dict[str, Any]] = []
    for count, fault in CASES:
        if options.only in (None, fault):
            with tempfile.TemporaryDirectory() as scratch:
                found.append(measure(count, fault, Path(scratch)))
            print(", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in found[-1].items()))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
