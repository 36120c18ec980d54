"""Run by torchrun: trains each case in turn, in one process group; rank 0 writes the curves.

updates.py CASES OUT    CASES: JSON, {name: fields of curves.Case}
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from curves import Case, train

from mel_fast.distributed import World, join_world, leave


def main(cases: dict[str, Case], out: Path) -> None:
    curves = {}
    with join_world("cpu", 5) as world:
        for name, case in cases.items():
            if not case.alone:
                curves[name] = train(case, world)
            elif world.main:
                curves[name] = train(case, World(0, 1, torch.device("cpu")))
        if world.main:
            out.write_text(json.dumps(curves))


main({name: Case(**fields) for name, fields in json.loads(sys.argv[1]).items()}, Path(sys.argv[2]))
leave()
