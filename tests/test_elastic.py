"""Ranks that torchrun restarts meet anew, go on with their own run, and do not try bad input again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch._C._distributed_c10d import HashStore

from mel_fast import elastic
from mel_fast.elastic import arguments_of, meet, remember_refusal, remember_run
from mel_fast.errors import InputError, LaunchError
from mel_fast.files import write_whole
from mel_fast.train import main

GIVEN = ["--optim.lr=1e-4"]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> HashStore:
    """Stands in for the agent's store, which outlives the ranks."""
    store = HashStore()
    monkeypatch.setattr(elastic, "lasting_store", lambda: store)
    return store


def attempt(store: HashStore, ranks: int) -> str:
    """All ranks meet, the last one first; the name that they agree on."""
    with ThreadPoolExecutor(ranks) as pool:
        names = set(pool.map(lambda rank: meet(store, rank, ranks, minutes=1), reversed(range(ranks))))
    (name,) = names
    return name


def test_every_attempt_gets_a_name_of_its_own(store: HashStore) -> None:
    names = [attempt(store, ranks) for ranks in (3, 3, 2, 1)]
    assert len(set(names)) == 4


def test_an_attempt_that_broke_off_while_its_ranks_met_does_not_confuse_the_next(store: HashStore) -> None:
    with pytest.raises(LaunchError, match="rank 0 did not confirm rank 1"):
        meet(store, 1, 2, minutes=0.002)
    with pytest.raises(LaunchError, match="rank 1 did not start"):
        meet(store, 0, 2, minutes=0.002)
    assert attempt(store, 2) != attempt(store, 2)


def test_a_missing_rank_is_named(store: HashStore) -> None:
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(meet, store, 1, 3, 0.02)
        with pytest.raises(LaunchError, match=r"rank 2 did not start within 0\.02 minutes"):
            meet(store, 0, 3, minutes=0.02)
        with pytest.raises(LaunchError, match="rank 0 did not confirm rank 1"):
            second.result()


def test_a_restarted_attempt_goes_on_with_the_run_of_its_own_torchrun(store: HashStore, tmp_path: Path) -> None:
    assert arguments_of(GIVEN) == GIVEN
    remember_run(tmp_path)
    assert arguments_of(GIVEN) == ["--resume", str(tmp_path)]


def test_bad_input_is_not_tried_again(store: HashStore, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--optim.lrr=1"]) == 2
    assert "did you mean 'optim.lr'?" in capsys.readouterr().err
    assert main([]) == 2, "an attempt that follows does not even read its arguments"
    assert "did you mean 'optim.lr'?" in capsys.readouterr().err


def test_without_torchrun_nothing_is_remembered(tmp_path: Path) -> None:
    remember_run(tmp_path)
    remember_refusal(InputError("bad"))
    assert arguments_of(GIVEN) == GIVEN


def test_a_file_that_is_replaced_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("old")

    def killed(*_: object) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, "new")
    assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"
