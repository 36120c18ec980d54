"""Runs a command in a process group that ends with its parent, however that ends (`kill -9` too).

    python keeper.py PARENT_PID COMMAND...

When the parent is gone, the command ends, or this process gets SIGTERM, the whole group is ended: SIGTERM, a few
seconds' patience, SIGKILL. The parent starts it as the leader of a session, so that the group is the keeper, the
command, and all that the command starts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

PATIENCE_S = 5.0


def main() -> None:
    parent, asked = int(sys.argv[1]), False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    command = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    while command.poll() is None:
        if asked or os.getppid() != parent:
            os.killpg(0, signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE_S
            while command.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            break
        time.sleep(0.1)
    else:
        print(f"server process ended with status {command.returncode}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)  # what is left of the group, this process included


if __name__ == "__main__":
    main()
