"""Run by torchrun: a step that is not finite on one rank only; each rank writes what it saw.

faults.py MODEL OUT     MODEL: of tests/test_guard.py, one of whose tokens has a NaN for embedding
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from mel_kernels import LossConfig
from torch.distributed.tensor import DTensor

from mel_fast.distributed import World, join_world, leave

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_guard import POISON, clean, spoilt, state
from test_learner import learner


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Of this rank's shards."""
    shards = [[t.to_local() if isinstance(t, DTensor) else t for t in tensors] for tensors in (ours, theirs)]
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*shards, strict=True))


def look(model: Path, world: World) -> dict[str, object]:
    trained, spared = learner(model, world), learner(model, world)
    for one in (trained, spared):
        one.update([clean(1)] if world.main else None, LossConfig())
    before = state(trained)
    samples = spoilt("context")
    samples[3].rollout_logp[:] = math.nan
    mine: list[bool] = []
    trained.policy.register_forward_pre_hook(lambda _, inputs: mine.append(POISON in inputs[0].input_ids.tolist()))
    metrics = trained.update([samples] if world.main else None, LossConfig())
    untouched = equal(state(trained), before)
    blamed = trained.outcomes[0].to_blame()
    for one in (trained, spared):
        one.update([clean(2)] if world.main else None, LossConfig())
    return {
        "has the poison": any(mine),
        "metrics": metrics,
        "blamed": blamed,
        "untouched": untouched,
        "as if it had not been": equal(state(trained), state(spared)),
    }


with join_world("cpu", 5) as joined:
    (Path(sys.argv[2]) / f"{joined.rank}.json").write_text(json.dumps(look(Path(sys.argv[1]), joined)))
leave()
