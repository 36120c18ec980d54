"""Launching one SGLang server: its command, its environment, its log, its end."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from mel_fast.errors import EngineError, InputError
from mel_fast.rollout.sglang.config import SGLangConfig

HERE = Path(__file__).parent
PORTS = range(20000, 22000)
# torchrun's, which would make the server take part in the trainer's group; and what is meant for the trainer's Python.
NOT_FOR_SERVERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "PYTHON", "TRITON_")


class ServerProcess:
    """Args:
    config: settings.
    model_path, dtype: what it serves, as what.
    gpus: device numbers as CUDA_VISIBLE_DEVICES names them; empty on a CPU.
    log: file that its output is appended to.

    Raises:
        InputError: the interpreter that should have SGLang is not there.
    """

    def __init__(
        self, config: SGLangConfig, model_path: str, dtype: str, gpus: list[str], log: Path, seed: int = 0
    ) -> None:
        self.config, self.gpus, self.log, self.seed = config, gpus, log, seed
        self.python = find_python(config.python)
        self.model_path, self.dtype = model_path, dtype
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """On a free port of the loopback interface."""
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "keeper.py"), str(os.getpid()), *self.command(port)],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the keeper, which is also the number of the process group."""
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Ends the server in good order, or by force after a while."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self.kill()

    def kill(self) -> None:
        """Returns when all its processes have ended, and with them their memory is free."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):  # the group has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + 30
        while _running(self._process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)

    def tail(self, lines: int = 15) -> str:
        """The last lines of the log, for an error message."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def command(self, port: int) -> list[str]:
        config, cpu = self.config, not self.gpus
        command = [str(self.python), "-m", "sglang.launch_server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--model-path", self.model_path, "--dtype", self.dtype, "--tp-size", str(config.tp)]
        command += ["--skip-tokenizer-init", "--weight-version", "0", "--random-seed", str(self.seed)]
        if cpu:
            command += ["--device", "cpu", "--sleep-on-idle"]
        if cpu or config.kv_tokens is not None:
            command += ["--max-total-tokens", str(config.kv_tokens or 65536)]
        if config.memory_fraction is not None:
            command += ["--mem-fraction-static", str(config.memory_fraction)]
        if config.release_memory:
            command += ["--enable-memory-saver"]
        return [*command, *config.arguments]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(NOT_FOR_SERVERS)}
        if self.gpus:
            return kept | {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        return {"OMP_NUM_THREADS": "1"} | kept | {"PYTHONPATH": str(HERE / "cpu_shims"), "SGLANG_USE_CPU_ENGINE": "1"}


def _free_port() -> int:
    """Not from the range that the system takes the ports of outgoing connections from: it is bound only much later."""
    for port in random.SystemRandom().sample(PORTS, 64):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise EngineError(f"no free port among {PORTS.start}-{PORTS.stop - 1} for a rollout server")


def _running(group: int) -> bool:
    """Whether a process of the group has not ended. One that has, but nobody asked after (a zombie), holds nothing."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended while we looked
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


def find_python(path: str) -> Path:
    """The interpreter as named, or beside the package in a checkout."""
    for candidate in (Path(path), HERE.parents[2] / path):
        if candidate.is_file():
            return candidate.absolute()  # not resolved: the link is what makes it the environment's
    raise InputError(
        f"rollout.sglang.python={path!r}: no such interpreter; `make sglang` makes an environment with SGLang, or name "
        "one that has it, or name running servers in rollout.sglang.urls"
    )
