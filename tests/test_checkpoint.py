"""A resumed run is the uninterrupted one; an exported policy is the policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from curves import Case, Curve, assert_same_curve, on_ranks, train
from mel_kernels import LossConfig
from support import make_model, random_samples
from test_learner import learner
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mel_fast.checkpoint import (
    CheckpointError,
    checkpoints,
    export_model,
    load_checkpoint,
    newest_sound,
    save_checkpoint,
)
from mel_fast.distributed import World
from mel_fast.packing import collate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def curves(folder: Path, model_folder: Path) -> dict[int, dict[str, Curve]]:
    """By number of ranks: four steps in one go; two steps and a checkpoint; two more after that of one or two ranks."""
    model = str(model_folder)
    cases = {
        ranks: {
            "whole": Case(model),
            "begun": Case(model, steps=(0, 2), save=str(folder / f"of_{ranks}"), export=str(folder / f"model_{ranks}")),
        }
        | {f"after {before}": Case(model, steps=(2, 4), load=str(folder / f"of_{before}")) for before in (1, 2)}
        for ranks in (1, 2)
    }
    alone = World(0, 1, torch.device("cpu"))
    one = {name: train(cases[1][name], alone) for name in ("whole", "begun", "after 1")}
    two = on_ranks(2, cases[2], folder / "two.json")
    return {1: one | {"after 2": train(cases[1]["after 2"], alone)}, 2: two}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_resumed_on_the_same_or_another_number_of_ranks(
    curves: dict[int, dict[str, Curve]], before: int, after: int
) -> None:
    whole, rest = curves[before]["whole"], curves[after][f"after {before}"]
    assert_same_curve(rest, whole[2:], tolerance=0 if before == after else 1e-6)
    assert rest[-1]["optim/updates"] == whole[-1]["optim/updates"]


def test_state_comes_back_and_only_the_newest_are_kept(model_folder: Path, tmp_path: Path, world: World) -> None:
    trained = learner(model_folder, world)
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, trained, {"cursor": {"position": step}}, 2, world)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000003", "step_000004"]
    assert load_checkpoint(checkpoints(tmp_path)[-1], trained)["cursor"] == {"position": 4}


def test_a_checkpoint_before_the_first_optimizer_step_changes_nothing(
    model_folder: Path, tmp_path: Path, world: World
) -> None:
    """AdamW scales a first step otherwise than a second one, and writing the moments down makes some."""
    samples, curves = random_samples(400), []
    for saved, loaded in ((False, False), (True, False), (True, True)):
        trained = learner(model_folder, world, nll_lr=2e-3)
        if saved:
            save_checkpoint(tmp_path, 1, trained, {}, 2, world)
        if loaded:
            trained = learner(model_folder, world, nll_lr=2e-3)
            load_checkpoint(checkpoints(tmp_path)[-1], trained)
        curves.append([trained.update([samples], LossConfig()) for _ in range(3)])
    assert_same_curve(curves[1], curves[0], tolerance=0)
    assert_same_curve(curves[2], curves[0], tolerance=0)


def test_the_nlls_own_moments_are_part_of_a_checkpoint(model_folder: Path, tmp_path: Path, world: World) -> None:
    alone = {"nll_lr": 2e-3}
    model = str(model_folder)
    whole = train(Case(model, optim=alone), world)
    train(Case(model, optim=alone, steps=(0, 2), save=str(tmp_path)), world)
    assert_same_curve(train(Case(model, optim=alone, steps=(2, 4), load=str(tmp_path)), world), whole[2:], tolerance=0)
    with pytest.raises(CheckpointError, match=r"nll_optimizer.*optim\.nll_lr must be set, or null"):
        load_checkpoint(checkpoints(tmp_path)[-1], learner(model_folder, world))


def test_a_checkpoint_cut_off_while_it_was_written_is_not_one(model_folder: Path, tmp_path: Path, world: World) -> None:
    trained = learner(model_folder, world)
    whole = save_checkpoint(tmp_path, 1, trained, {}, 2, world)
    (tmp_path / ".writing_step_000002").mkdir()
    (tmp_path / ".writing_step_000009" / "part").mkdir(parents=True)  # of a run with another plan
    (tmp_path / "step_000003").mkdir()  # no state.json
    assert checkpoints(tmp_path) == [whole]
    save_checkpoint(tmp_path, 2, trained, {}, 2, world)  # what is left of the attempt is no obstacle
    assert len(checkpoints(tmp_path)) == 2
    assert not list(tmp_path.glob(".writing_*"))


def test_a_checkpoint_cut_off_while_it_was_removed_is_not_one(
    model_folder: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = learner(model_folder, world)
    old = save_checkpoint(tmp_path, 1, trained, {}, 1, world)

    def killed(path: Path, **_: object) -> None:
        for file in path.glob("*.distcp"):
            file.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr("mel_fast.checkpoint.shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, trained, {}, 1, world)
    assert not old.exists()
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000002"]
    save_checkpoint(tmp_path, 3, trained, {}, 1, world)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003"]


def test_a_run_that_goes_on_clears_away_what_a_killed_one_left(
    model_folder: Path, tmp_path: Path, world: World
) -> None:
    """A run that was killed while it removed an old checkpoint after its last step saves no more."""
    whole = save_checkpoint(tmp_path, 2, learner(model_folder, world), {}, 2, world)
    (tmp_path / ".writing_step_000001").mkdir()
    assert newest_sound(tmp_path, world) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000002"]


def test_a_checkpoint_of_another_model_is_refused(
    model_folder: Path, tmp_path: Path, world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    make_model(len(tokenizer), layers=1).save_pretrained(tmp_path / "other")
    path = save_checkpoint(tmp_path / "c", 1, learner(tmp_path / "other", world), {}, 2, world)
    with pytest.raises(CheckpointError, match=r"another model: 11 parameters differ, first model\.model\.layers\.1"):
        load_checkpoint(path, learner(model_folder, world))


def test_what_is_not_a_checkpoint_is_named(model_folder: Path, tmp_path: Path, world: World) -> None:
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path, learner(model_folder, world))


def test_the_export_loads_in_transformers_and_gives_the_policys_log_probs(
    model_folder: Path, tmp_path: Path, world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    trained = learner(model_folder, world)
    samples = random_samples(400)
    trained.update([samples], LossConfig())
    export_model(tmp_path, trained.policy, tokenizer, world)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.from_numpy(samples[0].ids)
    with torch.no_grad():
        logits = exported(input_ids=ids[None]).logits[0]
        logp = trained.policy(collate(samples[:1]), None)[1]
    rows = torch.from_numpy(samples[0].stream[1:] != 0)
    theirs = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None]).squeeze(1)[rows]
    torch.testing.assert_close(logp, theirs, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("When amber comes up") == tokenizer.encode(
        "When amber comes up"
    )


@pytest.mark.usefixtures("curves")
def test_the_export_of_two_ranks_is_that_of_one(folder: Path) -> None:
    one, two = (AutoModelForCausalLM.from_pretrained(folder / f"model_{n}").state_dict() for n in (1, 2))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert json.loads((folder / "model_2" / "config.json").read_text())["tie_word_embeddings"] is True
