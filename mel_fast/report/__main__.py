"""python -m mel_fast.report RUN [RUN ...]: writes report.html anew, of runs that have ended or go on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mel_fast.errors import InputError, OutputError
from mel_fast.report import Limits, write_report


def main() -> int:
    parser = argparse.ArgumentParser(prog="mel_fast.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory, e.g. runs/latest")
    parser.add_argument(
        "--out", type=Path, help="the file to write (default: RUN/report.html; of several runs ./report.html)"
    )
    defaults = Limits()
    parser.add_argument(
        "--rollout-steps",
        type=_count,
        default=defaults.rollout_steps,
        help="steps whose rollouts are embedded, evenly spaced",
    )
    parser.add_argument("--experiences", type=_count, default=defaults.experiences, help="most experiences to embed")
    parser.add_argument("--tokens", type=_count, default=defaults.tokens, help="most tokens of rollouts to embed")
    chosen = parser.parse_args()
    limits = Limits(experiences=chosen.experiences, rollout_steps=chosen.rollout_steps, tokens=chosen.tokens)
    try:
        print(write_report(*chosen.runs, out=chosen.out, limits=limits).resolve())
    except (InputError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(main())
