"""Restarts by torchrun: how the ranks of a new attempt find each other, and the run that an earlier attempt began.

`torchrun --max-restarts=3 -m mel_fast.train` starts all ranks again when one of them ends with an error. Each such
attempt meets through a store that torchrun's agent keeps as long as it lives, whatever happens to the ranks. Two things
of an attempt outlive it there: the directory of its run, and what was wrong with its input.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mel_fast.errors import InputError, LaunchError

MEETING_MINUTES = 15.0  # ranks start together; what differs is how long their imports take
POLL_S = 0.05


def connect() -> Store | None:
    """The store of this torchrun's agent, by a connection of its own; None without a torchrun that has one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timedelta(minutes=MEETING_MINUTES))
    return PrefixStore("mel_fast", store)


@cache
def lasting_store() -> Store | None:
    """`connect`, once for the process."""
    return connect()


def arguments_of(arguments: Sequence[str]) -> Sequence[str]:
    """The command line that this attempt goes by: as given, or, where an earlier attempt of this torchrun has begun a
    run from it, that run's resumption.

    Raises:
        InputError: what an earlier attempt found to be wrong with the input still is.
    """
    store = lasting_store()
    if store is not None and store.check(["refused"]):
        raise InputError(store.get("refused").decode())
    return ["--resume", store.get("run").decode()] if store is not None and store.check(["run"]) else arguments


def remember_run(directory: Path) -> None:
    """Later attempts of this torchrun go on with it."""
    if (store := lasting_store()) is not None:
        store.set("run", str(directory.resolve()))


def remember_refusal(error: InputError) -> None:
    """Later attempts of this torchrun end with the same error, at once: torchrun restarts after any exit status."""
    if (store := lasting_store()) is not None:
        store.set("refused", str(error))


def meet(store: Store, rank: int, size: int, minutes: float = MEETING_MINUTES) -> str:
    """Agrees with the other ranks of this attempt on a name for it, under which the store holds nothing yet.

    Under the names of the last attempt lie addresses of processes that are gone. Nor can TORCHELASTIC_RESTART_COUNT
    name an attempt: agents of several hosts count for themselves. So rank 0 draws a name, each rank answers with
    a sign of its own, and the meeting is over when rank 0 has confirmed them all.

    Raises:
        LaunchError: not all ranks came in time.
    """
    sign, deadline = uuid.uuid4().hex, time.monotonic() + 60 * minutes
    if rank == 0:
        name, signs = uuid.uuid4().hex, [sign]
        store.set("meeting", name)
        for other in range(1, size):
            while not store.check([f"{name}/{other}"]):
                _pause(deadline, f"rank {other} did not start within {minutes:g} minutes")
            signs.append(store.get(f"{name}/{other}").decode())
        store.set(f"{name}/present", " ".join(signs))
        return name
    while True:
        if store.check(["meeting"]):
            name = store.get("meeting").decode()  # of an earlier attempt, until rank 0 has drawn another
            store.set(f"{name}/{rank}", sign)
            if store.check([f"{name}/present"]) and sign in store.get(f"{name}/present").decode().split():
                return name
        _pause(deadline, f"rank 0 did not confirm rank {rank} within {minutes:g} minutes")


def _pause(deadline: float, otherwise: str) -> None:
    if time.monotonic() > deadline:
        raise LaunchError(f"{otherwise}; torchrun's output says how it ended")
    time.sleep(POLL_S)
