"""A rank that waits in vain ends, names who did not come, and every rank leaves its stacks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

RANKS = 4


@dataclass
class Ended:
    """What is left of the ranks of ranks/hang.py."""

    status: list[int]
    errors: list[str]
    folder: Path

    def stacks(self, rank: int) -> str:
        return (self.folder / f"rank_{rank}.txt").read_text()


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """This process is their torchrun: it has the store, and sends SIGTERM to whom it ends."""
    folder = tmp_path_factory.mktemp("stacks")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(RANKS),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    script = Path(__file__).parent / "ranks" / "hang.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, folder],
            env=os.environ | agent | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        first = processes[0].communicate(timeout=600)[1]
        processes[3].wait(timeout=600)
        processes[2].send_signal(signal.SIGTERM)
        processes[2].wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
    errors = [first, *(process.communicate()[1] for process in processes[1:])]
    return Ended([process.returncode for process in processes], errors, folder)


def test_the_waiting_rank_ends_and_names_who_is_missing(ended: Ended) -> None:
    assert ended.status[0] == 1
    (message,) = re.findall("^error: .*", ended.errors[0], re.MULTILINE)
    assert "rank 0 is in 'update' after 7 finished steps for longer than run.phase_timeout_minutes=0.04" in message
    assert "rank 1 gives no sign of life, it was last seen in 'update' after 7 finished steps" in message
    assert "rank 2 did not arrive, it is in 'collect' after 7 finished steps for" in message
    assert "rank 3 gives no sign of life" in message
    assert str(ended.folder / "rank_0.txt") in message


def test_the_waiting_rank_leaves_its_stacks_on_standard_error_and_in_a_file(ended: Ended) -> None:
    for told in (ended.errors[0], ended.stacks(0)):
        assert "in barrier" in told
        assert "watchdog.py" in told


def test_a_rank_stuck_in_c_code_ends_by_itself_and_leaves_its_stacks(ended: Ended) -> None:
    assert ended.status[3] == 1
    assert "hang.py" in ended.stacks(3)


def test_a_rank_that_torchrun_ends_leaves_its_stacks(ended: Ended) -> None:
    assert ended.status[2] == -signal.SIGTERM
    assert "in rests_in_python" in ended.stacks(2)


def test_a_stopped_rank_is_left_to_torchrun(ended: Ended) -> None:
    assert ended.status[1] == -signal.SIGKILL
