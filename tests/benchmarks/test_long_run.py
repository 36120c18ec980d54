"""The long run's figures: what grows is found, what does not is left alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.long_run import faults, growth, summary, watch

WRITER = """
import json, sys, time
from pathlib import Path
held = bytearray(100 << 20)
lines = [json.dumps({"step": step, "time/step": 0.01}) for step in (1, 2, 3)]
Path(sys.argv[1]).write_text("\\n".join(lines)[:-4])
time.sleep(600)
"""


def run(leak_mb: float = 0.0, files: float = 0.0) -> dict[str, Any]:
    """The summary of 1000 steps, with so much growth per 1000 steps."""
    steps = [{"step": n, "time/step": 0.1} for n in range(1, 1001)]
    seen = [
        {
            "step": n,
            "read_s": 0.001,
            "rss_mb": 500 + leak_mb * n / 1000 + (n * 7919 % 5),  # and some noise
            "files": 20 + files * n / 1000,
            "threads": 8,
            "children": 2,
            "cpu_s": 0.05 * n,
        }
        for n in range(10, 1001, 10)
    ]
    return summary(seen, steps)


def test_a_slope_is_per_thousand_steps() -> None:
    assert growth([(0, 1.0), (500, 2.0), (1000, 3.0)]) == pytest.approx(2.0)


def test_what_grows_is_found_and_noise_is_not() -> None:
    assert faults(run()) == []
    assert run()["cpu_ms"]["end"] == pytest.approx(50.0)
    (leak,) = faults(run(leak_mb=200))
    assert "rss_mb grows by 200" in leak
    assert len(faults(run(leak_mb=200, files=30))) == 2


def test_a_process_is_looked_at_from_outside_and_ended_when_its_time_is_up(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stderr=subprocess.DEVNULL)
    while not path.exists() or not path.read_text():
        time.sleep(0.02)
    seen = watch(process, path, every=0.02, minutes=0.0)
    assert process.wait() != 0
    assert [s["step"] for s in seen] == [2], "the line that is half written does not count"
    assert seen[0]["rss_mb"] > 100
    assert (seen[0]["threads"], seen[0]["children"]) == (1, 0)
