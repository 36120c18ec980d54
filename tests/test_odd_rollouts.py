"""Whole runs whose engine samples next to nothing to learn from: nothing hangs, all is finite, the counters are right.

The model is a table of what comes next after the last token. So the last token of a question decides what happens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import make_model, torchrun
from tokenizers import AddedToken

from mel_fast.dumps import load_episodes, read_jsonl
from mel_fast.evaluate import main as evaluate_main
from mel_fast.tiny.texts import corpus
from mel_fast.tiny.tokenizer import EOS, build_tokenizer
from mel_fast.train import main

TRAINS = str(Path(__file__).parent / "ranks" / "trains.py")
ONE, TWO, THREE, ON = "\\boxed{1}", "\\boxed{2}", "\\boxed{3}", " and so on"
BIFURCATION, HEURISTICS = "Bifurcation: the start.\n", "Heuristics: when lost, the answer is 3."
CRITIQUES = ("Critique: I rushed.\n", "Critique: I guessed.\n")
NEXT: dict[str, tuple[str, ...]] = {  # all equally likely
    "[sure]": (ONE,),
    "[unsure]": (ONE, TWO),
    "[lost]": (TWO, THREE),
    "[silent]": (EOS,),
    "[halting]": (ONE, EOS),
    "[endless]": (ON,),
    "[again]": (ONE,),  # the end of a replay's prompt
    "[reflect]": (BIFURCATION,),
    BIFURCATION: CRITIQUES,
    **dict.fromkeys(CRITIQUES, (HEURISTICS,)),
    **dict.fromkeys((ONE, TWO, THREE, HEURISTICS), (EOS,)),
    ON: (ON,),
}
PROMPTS = {
    "solve": "{question}",
    "reflect": "{question} {wrong} {right}[reflect]",
    "replay": "{experience} {question}[again]",
    "chat": False,
}

Line = dict[str, float]
NOTHING: Line = {"mel/pairs": 0, "batch/samples": 0, "taken": 0}
MIXED: Line = {"groups/mixed": 1, "mel/pairs": 2, "response/truncated": 0, "taken": 1}
KINDS: dict[str, tuple[str, str, Line]] = {  # question, answer, and what a step of four responses to it reports
    "all right": ("[sure]", "1", {"groups/all_right": 1, "reward/correct": 1, "response/length_max": 2} | NOTHING),
    "all wrong": ("[sure]", "2", {"groups/all_wrong": 1, "reward/correct": 0, "verify/no_answer": math.nan} | NOTHING),
    "all truncated": ("[endless]", "1", {"response/truncated": 1, "response/length_mean": 8} | NOTHING),
    "all empty": ("[silent]", "1", {"response/length_max": 1, "verify/no_answer": 4, "groups/all_wrong": 1} | NOTHING),
    "some empty": ("[halting]", "1", MIXED | {"mel/kept": 2, "rows/nll": 8, "batch/samples": 6}),
    "all kept": ("[unsure]", "1", MIXED | {"mel/kept": 2, "mel/retention": 1, "rows/nll": 8, "rows/policy": 8}),
    "none kept": ("[unsure]", "2", MIXED | {"mel/replayed": 2, "mel/kept": 0, "rows/nll": 0, "rows/policy": 8}),
    "all malformed": ("[lost]", "3", MIXED | {"mel/malformed/leaks_answer": 2, "mel/replayed": 0, "rows/nll": 0}),
}
EACH, CUT, SAME = "one prompt a step", "cut off at one token", "one prompt three times"
RUNS: dict[str, tuple[list[str], int, dict[str, Any]]] = {  # prompts, steps, settings
    EACH: (list(KINDS), len(KINDS), {}),
    CUT: (
        ["all kept", "all empty"],
        2,
        {
            "rollout": {"prompts_per_step": 2, "max_new_tokens": 1, "max_batch": 1},
            "objective": {"overlong": "mask", "kl_coef": 0.1, "updates_per_batch": 2},
            "optim": {"nll_lr": 1e-4},
        },
    ),
    SAME: (
        ["all kept"],
        1,
        {
            "rollout": {"prompts_per_step": 3},
            "objective": {"algorithm": "rft"},
            "mel": {"internalise": {"retrospective": 1.0, "heuristic": 1.0, "shuffled": True}},
        },
    ),
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose blocks add nothing: the last token's embedding lies along an axis of its own, and the head's
    column for it holds the logits of what comes next."""
    tokenizer: Any = build_tokenizer(corpus())
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in NEXT])
    model: Any = make_model(len(tokenizer), layers=1, tied=False)
    embedding, head, ids = model.model.embed_tokens.weight, model.lm_head.weight, tokenizer.convert_tokens_to_ids
    length = math.sqrt(32)  # of what comes into the head
    with torch.no_grad():
        block = model.model.layers[0]
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
        for place, (word, following) in enumerate(NEXT.items()):
            embedding[ids(word)] = length * torch.eye(32)[place]
            head[:, place] = 0
            head[ids(list(following)), place] = 45 / length
    folder = tmp_path_factory.mktemp("table")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def configuration(model: Path, folder: Path, run: str) -> str:
    """The file of one of RUNS, evaluated on sets of one problem."""
    kinds, steps, sections = RUNS[run]
    folder.mkdir()
    for name, chosen in (("train", kinds), ("easy", ["all right"]), ("mute", ["all empty"])):
        rows = [{"id": kind, "question": f"{kind}? {KINDS[kind][0]}", "answer": KINDS[kind][1]} for kind in chosen]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "run": {"steps": steps, "folder": str(folder / "runs"), "checkpoint_every": 0},
        "model": {"path": str(model)},
        "data": {"train": [{"path": str(folder / "train.jsonl")}]},
        "prompts": PROMPTS,
        "rollout": {"prompts_per_step": 1, "group_size": 4, "max_new_tokens": 8},
        "optim": {"lr": 1e-4},
        "eval": {"sets": [{"path": str(folder / f"{name}.jsonl")} for name in ("easy", "mute")], "samples": 1},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "run.yaml")


@pytest.fixture(scope="module")
def runs(table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """The run directories, by run and number of ranks."""
    folders = {(run, ranks): tmp_path_factory.mktemp("odd") / "run" for run in RUNS for ranks in (1, 2)}
    configs = {key: configuration(table, folder, key[0]) for key, folder in folders.items()}
    for run in RUNS:
        assert main(["--config", configs[run, 1]]) == 0
    done = torchrun(2, TRAINS, *(configs[run, 2] for run in RUNS), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return {key: folder / "runs" / "latest" for key, folder in folders.items()}


def steps_of(run: Path) -> list[Line]:
    """The metrics of each step, with the optimizer steps `taken` in it."""
    lines, before = [], 0.0
    for line in read_jsonl(run / "metrics.jsonl"):
        if "groups/all" in line:
            lines.append(line | {"taken": line.get("optim/updates", before) - before})
            before += lines[-1]["taken"]
    return lines


def assert_reports(line: Line, expected: Line) -> None:
    """NaN is expected of what is not there."""
    assert {name: line.get(name, math.nan) for name in expected} == pytest.approx(expected, nan_ok=True)
    assert line["optim/skipped_updates"] == 0
    assert ("loss/total" in line) == (line["taken"] > 0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_one_odd_prompt_counts_it_right(runs: dict[tuple[str, int], Path], ranks: int, kind: str) -> None:
    run = runs[EACH, ranks]
    dumps = [load_episodes(path) for path in sorted((run / "rollouts").iterdir())]
    (step,) = (index for index, (episode,) in enumerate(dumps) if episode.prompt.id == kind)
    assert_reports(steps_of(run)[step], {"groups/all": 1} | KINDS[kind][2])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_limit_of_one_token_leaves_the_kl_of_responses_that_end_at_once(
    runs: dict[tuple[str, int], Path], ranks: int
) -> None:
    expected: Line = {"groups/mixed": 1, "groups/all_wrong": 1, "response/truncated": 0.5, "batch/masked_overlong": 4}
    expected |= {"mel/pairs": 2, "mel/malformed/truncated": 2, "rows/policy": 4, "rows/nll": 0, "taken": 1}
    for line in steps_of(runs[CUT, ranks]):
        assert_reports(line, expected)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_only_prompt_is_sampled_anew_each_time_and_has_no_other_to_shuffle_with(
    runs: dict[tuple[str, int], Path], ranks: int
) -> None:
    episodes = load_episodes(runs[SAME, ranks] / "rollouts" / "step_000001.jsonl")
    right = sum(t.correct for episode in episodes for t in episode.trajectories)
    pairs = sum(len(episode.experiences) for episode in episodes)
    (line,) = steps_of(runs[SAME, ranks])
    expected: Line = {"groups/all": 3, "mel/pairs": pairs, "mel/kept": pairs, "batch/forms_dropped": 2 * pairs}
    assert_reports(line, expected | {"rows/nll": 2 * right, "batch/policy_tokens_dropped": 2 * (12 - right)})
    assert len({tuple(t.text for t in episode.trajectories) for episode in episodes}) > 1


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_see_what_one_sees_and_all_of_it_is_finite(runs: dict[tuple[str, int], Path], run: str) -> None:
    one, two = (read_jsonl(runs[run, ranks] / "metrics.jsonl") for ranks in (1, 2))
    assert len(one) == len(two) == RUNS[run][1] + 2  # evaluated before and after
    for ours, theirs in zip(two, one, strict=True):
        assert [name for name, value in ours.items() if not math.isfinite(value)] == []
        names = [name for name in theirs if not name.startswith(("time/", "perf/", "balance/"))]
        assert {name: ours[name] for name in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-5, abs=1e-5)


def test_rollouts_alone_and_training_from_them_alone_count_the_same(
    runs: dict[tuple[str, int], Path], table: Path, tmp_path: Path
) -> None:
    common = ["--config", configuration(table, tmp_path / "run", EACH)]
    assert main([*common, "--run.mode=rollout"]) == 0
    sampled = (tmp_path / "run" / "runs" / "latest").resolve()
    assert main([*common, "--run.mode=train", f"--run.rollouts={sampled / 'rollouts'}"]) == 0
    trained = tmp_path / "run" / "runs" / "latest"
    for whole, rolled, learnt in zip(*map(steps_of, (runs[EACH, 1], sampled, trained)), strict=True):
        names = [name for name in rolled if name.startswith(("groups/", "reward/", "mel/", "response/", "batch/"))]
        assert {name: rolled[name] for name in names} == {name: whole[name] for name in names}
        names += [name for name in learnt if name.startswith(("rows/", "optim/updates"))]
        assert {name: learnt[name] for name in names} == {name: whole[name] for name in names}


def test_sets_of_one_problem_are_evaluated(
    runs: dict[tuple[str, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_, last = read_jsonl(runs[EACH, 2] / "metrics.jsonl")
    for line in (first, last):
        assert (line["eval/easy/pass_at_1"], line["eval/easy/avg_at_k"], line["eval/easy/pass_at_k"]) == (1, 1, 1)
        assert (line["eval/mute/pass_at_1"], line["eval/mute/avg_at_k"], line["eval/mute/pass_at_k"]) == (0, 0, 0)
    monkeypatch.chdir(tmp_path)
    assert evaluate_main(["--config", str(runs[EACH, 2] / "config.yaml")]) == 0
    assert [row["text"] for row in read_jsonl(tmp_path / "evaluation.jsonl")] == [ONE, ONE, "", ""]
