"""Checkpoints: everything that the rest of a run depends on, written by all ranks, replaced atomically; and HF export.

A checkpoint is a folder `checkpoints/step_000040` with DCP's files (model, optimizer) and `state.json` (counters,
data cursor, model fingerprint). It is written under a temporary name and renamed when complete, so a folder with the
final name is whole. The run's random numbers need no state: every seed follows from (step, prompt, sample).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mel_fast.distributed import World
from mel_fast.errors import InputError
from mel_fast.policy import Policy
from mel_fast.weights import full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mel_fast.learner import Learner


class CheckpointError(InputError):
    """A checkpoint that cannot be used, with its path and what to do."""


def save_checkpoint(folder: Path, step: int, learner: Learner, state: dict[str, Any], keep: int, world: World) -> Path:
    """Writes the state after `step` finished steps, and removes all but the `keep` newest checkpoints.

    Args:
        folder: the run's `checkpoints`.
        state: JSON values of rank 0: the data cursor and the like.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f".writing_{final.name}"
    if world.main:
        for left in folder.glob(".writing_*"):  # by runs that were killed here
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    world.barrier()
    state_dict_saver.save(_tensors(learner), checkpoint_id=partial)
    if world.main:
        own = {"updates_done": learner.updates_done, "skipped_in_row": learner.skipped_in_row}
        own |= {"optimizers": list(_optimizers(learner))}
        meta = state | {"step": step, "model": fingerprint(learner.policy)} | own
        with (partial / "state.json").open("w") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)  # left by a run that went on from an earlier checkpoint
        partial.rename(final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old.rename(partial.with_name(f".writing_{old.name}")))  # never half of it under its name
    world.barrier()
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def load_checkpoint(path: Path, learner: Learner) -> dict[str, Any]:
    """Restores the learner on every rank and returns the saved state.

    Raises:
        CheckpointError: the folder is not a checkpoint, or one of another model.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a complete checkpoint ({error})") from error
    own = fingerprint(learner.policy)
    if state["model"] != own:
        differing = sorted(
            name for name in own.keys() | state["model"].keys() if own.get(name) != state["model"].get(name)
        )
        name = differing[0]
        raise CheckpointError(
            f"{path}: checkpoint of another model: {len(differing)} parameters differ, first {name} "
            f"(checkpoint {state['model'].get(name, 'has none')}, model {own.get(name, 'has none')}); "
            "check model.path, or start a new run"
        )
    optimizers = _optimizers(learner)
    if (saved := state.get("optimizers", ["optimizer"])) != list(optimizers):
        raise CheckpointError(
            f"{path}: has the moments of {', '.join(saved)}, the run wants those of "
            f"{', '.join(optimizers)}: optim.nll_lr must be set, or null, as it was when the checkpoint was written"
        )
    tensors = _tensors(learner)
    state_dict_loader.load(tensors, checkpoint_id=path)
    set_model_state_dict(learner.policy, tensors["model"])
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(learner.policy, optimizer, tensors[name])
    learner.updates_done = int(state["updates_done"])
    learner.skipped_in_row = int(state.get("skipped_in_row", 0))
    return state


def fingerprint(policy: Policy) -> dict[str, list[int]]:
    """Name and global shape of each parameter."""
    return {name: list(parameter.shape) for name, parameter in policy.named_parameters()}


def export_model(folder: Path, policy: Policy, tokenizer: PreTrainedTokenizerBase, world: World) -> None:
    """Writes a checkpoint that transformers' `AutoModelForCausalLM` loads (safetensors, tokenizer). Collective."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in full_weights(policy):
        if world.main:
            state[name] = tensor.detach().cpu().clone()
    if world.main:
        policy.model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
    world.barrier()


def _tensors(learner: Learner) -> dict[str, Any]:
    states = {name: get_optimizer_state_dict(learner.policy, o) for name, o in _optimizers(learner).items()}
    return {"model": get_model_state_dict(learner.policy)} | states


def _optimizers(learner: Learner) -> dict[str, torch.optim.Optimizer]:
    first: dict[str, torch.optim.Optimizer] = {"optimizer": learner.optimizer}
    return first if learner.nll_optimizer is None else first | {"nll_optimizer": learner.nll_optimizer}
