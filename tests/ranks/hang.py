"""One of four ranks that update together after 7 finished steps: rank 1 is stopped, rank 2 collects for ever, rank 3
never leaves C code. Rank 0 waits for them.

hang.py FOLDER    RANK and the rest in the environment, as from torchrun
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mel_fast import watchdog
from mel_fast.distributed import join_world

LIMITS: Any = SimpleNamespace(phase_timeout_minutes=0.04, collective_timeout_minutes=5)
watchdog.BEAT_S = 0.5
watchdog.GRACE_S = 5.0 if os.environ["RANK"] == "3" else 60.0  # after rank 0, whom its end would tell


def rests_in_python() -> None:
    time.sleep(600)


with join_world("cpu", 5) as world, watchdog.Watchdog(world, LIMITS) as dog:
    dog.write_to(Path(sys.argv[1]))
    world.barrier()
    with dog.phase("collect" if world.rank == 2 else "update", 7):
        time.sleep(1.5)  # long enough to be seen
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        elif world.rank == 2:
            rests_in_python()
        elif world.rank == 3:
            ctypes.PyDLL(None).sleep(600)  # unlike CDLL, it keeps the interpreter locked
        world.barrier()
