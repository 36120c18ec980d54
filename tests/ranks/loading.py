"""Run by torchrun: loads a sharded policy; each rank writes log-probs, buffers, whether the head is tied, or the error.

loading.py MODEL OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import mel_fast.model
from mel_fast.distributed import join_world, leave
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
        found: dict[str, Any]
        try:
            policy = load_policy(ModelConfig(path=options.model), world)
        except InputError as error:
            found = {"error": str(error)}
        else:
            with torch.no_grad():
                logp = policy(collate(random_samples(400)), None)[1]
            names = dict(policy.model.named_parameters(remove_duplicate=False))
            tied = names["lm_head.weight"] is names["model.embed_tokens.weight"]
            found = {"logp": logp, "buffers": dict(policy.model.named_buffers()), "tied": tied}
        torch.save(found, options.out / f"{world.rank}.pt")


parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out", type=Path)
main(parser.parse_args())
leave()
