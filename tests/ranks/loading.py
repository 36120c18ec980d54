"""Run by torchrun: loads sharded policies; each rank writes log-probs, buffers, whether the head is tied, or the error,
by folder.

loading.py OUT MODEL...
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import mel_fast.model
from mel_fast.distributed import World, join_world, leave
from mel_fast.errors import InputError
from mel_fast.model import ModelConfig
from mel_fast.packing import collate
from mel_fast.policy import load_policy

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import random_samples


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("a rank other than 0 reads the whole model")


def main(options: argparse.Namespace) -> None:
    with join_world("cpu", 5) as world:
        if not world.main:
            mel_fast.model.load_model = never
        torch.save({folder: look(folder, world) for folder in options.models}, options.out / f"{world.rank}.pt")


def look(folder: str, world: World) -> dict[str, Any]:
    try:
        policy = load_policy(ModelConfig(path=folder), world)
    except InputError as error:
        return {"error": str(error)}
    with torch.no_grad():
        logp = policy(collate(random_samples(400)), None)[1]
    names = dict(policy.model.named_parameters(remove_duplicate=False))
    tied = names["lm_head.weight"] is names["model.embed_tokens.weight"]
    return {"logp": logp, "buffers": dict(policy.model.named_buffers()), "tied": tied}


parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("models", nargs="+")
main(parser.parse_args())
leave()
