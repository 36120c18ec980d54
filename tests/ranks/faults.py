"""Run by torchrun: a step that is not finite on one rank only, a disk that is full for one, a damaged shard of one;
each rank writes what it saw.

faults.py MODEL OUT     MODEL: of tests/test_guard.py, one of whose tokens has a NaN for embedding
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from mel_kernels import LossConfig
from torch.distributed.tensor import DTensor

from mel_fast.checkpoint import newest_sound, save_checkpoint
from mel_fast.distributed import World, join_world, leave
from mel_fast.errors import OutputError
from mel_fast.learner import Learner

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_disk import flip, full_disk
from test_guard import POISON, clean, spoilt, state
from test_learner import learner


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Of this rank's shards."""
    shards = [[t.to_local() if isinstance(t, DTensor) else t for t in tensors] for tensors in (ours, theirs)]
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*shards, strict=True))


def checkpoints_of(trained: Learner, folder: Path, world: World) -> dict[str, object]:
    """Step 2 cannot be written by rank 1; then it is, and rank 1's shard of it is damaged."""
    save_checkpoint(folder, 1, trained, {}, 2, world)
    told = ""
    try:
        with nullcontext() if world.main else full_disk(1000):
            save_checkpoint(folder, 2, trained, {}, 2, world)
    except OutputError as error:
        told = str(error)
    world.barrier()
    left = sorted(path.name for path in folder.glob("*step*"))
    world.barrier()
    save_checkpoint(folder, 2, trained, {}, 2, world)
    sound = [newest_sound(folder, world)]
    world.barrier()
    if world.main:
        flip(folder / "step_000002" / "__1_0.distcp")
    world.barrier()
    sound.append(newest_sound(folder, world))
    return {"told": told, "left": left, "sound": [path.name for path in sound if path]}


def look(model: Path, out: Path, world: World) -> dict[str, object]:
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
    return checkpoints_of(trained, out, world) | {
        "has the poison": any(mine),
        "metrics": metrics,
        "blamed": blamed,
        "untouched": untouched,
        "as if it had not been": equal(state(trained), state(spared)),
    }


with join_world("cpu", 5) as joined:
    seen = look(Path(sys.argv[1]), Path(sys.argv[2]), joined)
    (Path(sys.argv[2]) / f"{joined.rank}.json").write_text(json.dumps(seen))
leave()
