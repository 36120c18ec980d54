"""Checkpoints: everything that the rest of a run depends on, written by all ranks, replaced atomically; and HF export.

A checkpoint is a folder `checkpoints/step_000040` with DCP's files (model, optimizer) and `state.json` (counters,
data cursor, model fingerprint). It is written under a temporary name, sealed by a manifest (files.py) and renamed when
complete, so a folder with the final name is whole, and damage that the disk does to it later is found. The run's random
numbers need no state: every seed follows from (step, prompt, sample).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from mel_fast.distributed import World
from mel_fast.errors import OutputError
from mel_fast.files import MANIFEST, damage, seal, settle, writing
from mel_fast.policy import Policy
from mel_fast.safe_checkpoint import CheckpointError, load_tensors
from mel_fast.weights import full_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mel_fast.learner import Learner


log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, learner: Learner, state: dict[str, Any], keep: int, world: World) -> Path:
    """Writes the state after `step` finished steps, and removes all but the `keep` newest checkpoints up to it.
    Collective.

    Args:
        folder: the run's `checkpoints`.
        state: JSON values of rank 0: the data cursor and the like.

    Raises:
        OutputError: on every rank, when the disk does not take it on one. All earlier checkpoints are still there.
    """
    final = folder / f"step_{step:06d}"
    partial = folder / f".writing_{final.name}"
    try:
        with world.together():
            if world.main:
                _clear(folder)
                partial.mkdir(parents=True)
        _write_tensors(partial, learner)
        with world.together():
            if world.main:
                own = {"updates_done": learner.updates_done, "skipped_in_row": learner.skipped_in_row}
                own |= {"optimizers": list(_optimizers(learner))}
                meta = state | {"step": step, "model": fingerprint(learner.policy)} | own
                with (partial / "state.json").open("w") as file:
                    json.dump(meta, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
        seal(partial, world)
        with world.together():
            if world.main:
                if final.exists():  # left by a run that went on from an earlier checkpoint
                    final.rename(folder / f".writing_old_{final.name}")
                partial.rename(final)
                settle(folder)
    except OutputError as error:
        earlier = [path.name for path in checkpoints(folder)]
        # torch does not always say that the disk is full.
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free // 2**20
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)  # it must not keep the room that is lacking
        raise OutputError(
            f"{final}: the checkpoint cannot be written: {error} ({free} MiB are free there). "
            + (f"{earlier[-1]} is untouched" if earlier else "There is none before it")
            + "; give the disk room or rights, then go on with --resume"
        ) from error
    with world.together():
        if world.main:  # only now that the new one is whole, on the disk, and has its name
            for old in [path for path in checkpoints(folder) if path.name <= final.name][:-keep]:
                old.rename(folder / f".writing_{old.name}")  # never half of it under its name
            _clear(folder)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / MANIFEST).is_file())


def newest_sound(folder: Path, world: World) -> Path | None:
    """The newest checkpoint of a run whose every byte is as it was written, the same on every rank; None if there never
    was one. Those that are passed over are named in a warning; what a killed run left half written or half removed is
    cleared away. Collective.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    with world.together():
        if world.main:
            _clear(folder)
    found = sorted(folder.glob("step_*"), reverse=True) if world.main else None
    damaged: list[str] = []
    for path in world.broadcast(found):
        if (told := damage(path, world)) is None:
            if damaged and world.main:
                log.warning("not used: %s. Going on from %s instead", "; ".join(damaged), path)
            return path
        damaged.append(f"{path}: {told}")
    if damaged:
        raise CheckpointError(
            f"no checkpoint can be used: {'; '.join(damaged)}. Put back a copy, or start a new run without --resume"
        )
    return None


def load_checkpoint(path: Path, learner: Learner) -> dict[str, Any]:
    """Restores the learner on every rank and returns the saved state.

    Raises:
        CheckpointError: the folder is not a checkpoint, or one of another model. Its bytes are not checked here: see
            `newest_sound`.
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
    load_tensors(path, tensors, learner.world)
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
    """Writes a checkpoint that transformers' `AutoModelForCausalLM` loads (safetensors, tokenizer). Collective.

    Raises:
        OutputError: on every rank, when the disk does not take it.
    """
    state: dict[str, torch.Tensor] = {}
    for name, tensor in full_weights(policy):
        if world.main:
            state[name] = tensor.detach().cpu().clone()
    with world.together(), writing(folder):
        if world.main:
            try:
                policy.model.save_pretrained(folder, state_dict=state)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            tokenizer.save_pretrained(folder)


def _write_tensors(folder: Path, learner: Learner) -> None:
    try:
        state_dict_saver.save(_tensors(learner), checkpoint_id=folder)
    except CheckpointException as error:  # of any rank, on every rank
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OutputError(f"rank {rank}: {reason}") from error


def _clear(folder: Path) -> None:
    """Removes what is being written or removed, by this run or by one that was killed."""
    for left in folder.glob(".writing_*"):
        shutil.rmtree(left)


def _tensors(learner: Learner) -> dict[str, Any]:
    optimizers = _optimizers(learner)
    fresh = [optimizer for optimizer in optimizers.values() if not optimizer.state]
    states = {name: get_optimizer_state_dict(learner.policy, o) for name, o in optimizers.items()}
    # DCP has given an optimizer without moments some, by a step on zeros. It must not count: the first true step would
    # be scaled as a second one.
    for moments in (moments for optimizer in fresh for moments in optimizer.state.values()):
        moments["step"].zero_()
    return {"model": get_model_state_dict(learner.policy)} | states


def _optimizers(learner: Learner) -> dict[str, torch.optim.Optimizer]:
    first: dict[str, torch.optim.Optimizer] = {"optimizer": learner.optimizer}
    return first if learner.nll_optimizer is None else first | {"nll_optimizer": learner.nll_optimizer}
