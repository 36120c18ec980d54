"""No server outlives the run that launched it, however that ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang_support import launched, members, wait_until

from mel_fast.errors import EngineError, InputError
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.rollout.sglang.process import ServerProcess

LAUNCHER = """
import os, sys, time
from pathlib import Path
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.process import ServerProcess

process = ServerProcess(SGLangConfig(), sys.argv[1], "float32", [], Path(sys.argv[2]))
process.start()
if os.fork() == 0:  # a worker of the run that lives on
    time.sleep(60)
print(process.pid, flush=True)
time.sleep(600)
"""


def test_servers_end_with_a_parent_that_is_killed(model_folder: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(model_folder), str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    group = int(parent.stdout.readline())
    wait_until(lambda: members(group) >= 2)  # the keeper and the server
    parent.kill()
    parent.wait()
    wait_until(lambda: not members(group), 30)


def test_one_server_that_does_not_start_ends_all_and_the_error_tells_why(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    good, bad = SGLangConfig(), SGLangConfig(arguments=("--no-such-option",))
    processes = [*launched(good, settings, tmp_path / "good", 1), *launched(bad, settings, tmp_path / "bad", 1)]
    with (
        pytest.raises(EngineError, match=r"(?s)server 1 did not start.*bad/server-0\.log.*--no-such-option"),
        SGLangEngine(good, processes, folder=tmp_path, **settings),
    ):
        pass
    assert not any(members(process.pid) for process in processes)


def test_servers_listen_on_the_loopback_interface_alone_and_inherit_nothing_of_the_trainers_group(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "7")
    process = launched(SGLangConfig(), settings, tmp_path, 1)[0]
    command = process.command(20001)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    environment = process.environment()
    assert "7" not in [environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    assert "7" not in (environment.get("TORCHELASTIC_RUN_ID"), environment["PYTHONPATH"])


def test_an_interpreter_that_is_not_there_is_an_input_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such interpreter; `make sglang` makes"):
        ServerProcess(SGLangConfig(python="nowhere/python"), "model", "float32", [], tmp_path / "log")
