"""Run by torchrun: whole runs one after the other, in the same processes, as `mel_fast.train` does one.

trains.py CONFIG...
"""

from __future__ import annotations

import sys

from mel_fast.config import load_config
from mel_fast.distributed import leave
from mel_fast.setup import open_run
from mel_fast.train import train


def main(paths: list[str]) -> None:
    for path in paths:
        with open_run(load_config(path), resume=None) as run:
            train(run)


if __name__ == "__main__":  # the verifier's workers import this file
    main(sys.argv[1:])
    leave()
