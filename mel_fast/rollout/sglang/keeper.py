"""Runs a command in a process group that ends with its parent, however that ends (`kill -9` too).

    python keeper.py COMMAND...

The parent keeps this process's standard input open. When it closes, or the command ends, the whole group is ended:
SIGTERM, a few seconds' patience, SIGKILL. The parent starts it as the leader of a session, so that the group is the
keeper, the command, and all that the command starts.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

PATIENCE_S = 5.0


def main() -> None:
    # A handler, not SIG_IGN: the command would inherit the latter.
    signal.signal(signal.SIGTERM, lambda *_: None)
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    while command.poll() is None:
        readable, _, _ = select.select([sys.stdin], [], [], 0.2)
        if readable and not os.read(sys.stdin.fileno(), 1024):
            os.killpg(0, signal.SIGTERM)
            deadline = time.monotonic() + PATIENCE_S
            while command.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            break
    else:
        print(f"server process ended with status {command.returncode}", file=sys.stderr, flush=True)
    os.killpg(0, signal.SIGKILL)  # what is left of the group, this process included


if __name__ == "__main__":
    main()
