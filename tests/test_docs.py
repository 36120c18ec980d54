"""What the documentation says is so: settings and metrics are complete, and its examples run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from factories import episode, experience
from support import torchrun

from mel_fast.config import load_config
from mel_fast.data import load_prompts
from mel_fast.dumps import dump_episodes, load_episodes

DOCS = Path(__file__).parent.parent / "docs"
SMALL = ("--run.steps=1", "--rollout.prompts_per_step=4", "--rollout.group_size=2", "--rollout.max_new_tokens=8")


def documented() -> list[str]:
    """The names in the first column of METRICS.md's tables, as patterns."""
    rows = re.findall(r"^\|([^|]*)\|", (DOCS / "METRICS.md").read_text("utf-8"), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row) if "/" in name]
    return [re.sub(r"SET|PHASE|\.\.\.", "*", name) for name in names]


def undocumented(run: Path) -> set[str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line} - {"step"}
    assert len(names) > 30
    return {name for name in names if not any(fnmatchcase(name, known) for known in documented())}


def files_of(page: str, folder: Path) -> None:
    """Writes every block that a page gives the name of a file to."""
    blocks = re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", (DOCS / page).read_text("utf-8"), re.DOTALL)
    for name, text in blocks:
        (folder / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of BRING_YOUR_OWN.md."""
    folder = tmp_path_factory.mktemp("own")
    files_of("BRING_YOUR_OWN.md", folder)
    return folder


def test_the_reference_of_settings_is_up_to_date() -> None:
    script = DOCS / "config_reference.py"
    printed = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, timeout=120).stdout
    told = "docs/CONFIG.md is out of date: python docs/config_reference.py > docs/CONFIG.md"
    assert (DOCS / "CONFIG.md").read_text("utf-8") == printed, told


def test_data_of_another_layout_are_read_as_the_page_says(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    sources = load_config("other_run.yaml").data.train
    assert [p.answer for source in sources for p in load_prompts(source)] == ["12", "42", "63"]
    other = load_prompts(sources[0])[0]
    assert (other.id, other.question, other.source) == ("a1", "What is 6 + 6?", "sums")


@pytest.mark.slow
def test_data_reward_and_model_of_ones_own_run_and_every_metric_is_documented(
    own: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own)
    commands = re.findall(r"^torchrun (-m .*)$", (DOCS / "BRING_YOUR_OWN.md").read_text("utf-8"), re.MULTILINE)
    assert len(commands) == 2
    model = (f"--model.path={model_folder}", "--model.dtype=float32", f"--run.folder={tmp_path}")
    shorter = ("--rollout.max_prompt_tokens=128", "--eval.samples=2", *SMALL)
    for command in commands:
        done = torchrun(1, *command.split(), *model, *shorter)
        assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "latest"
    assert (run / "report.html").is_file()
    assert {p.prompt.question for p in load_episodes(run / "rollouts" / "step_000001.jsonl")} == {
        json.loads(line)["question"] for line in (own / "my_problems.jsonl").read_text().splitlines()
    }
    assert undocumented(run) == set()


@pytest.mark.slow
def test_metrics_of_every_term_are_documented(own: Path, model_folder: Path, tmp_path: Path) -> None:
    """An update with experiences of each form, from a dump, since a model of random weights has none to keep."""
    (tmp_path / "dumps").mkdir()
    made = [episode([0, 1], experiences=[experience()]), episode([0, 1], experiences=[experience(kept=False)])]
    made[0].trajectories[0].finish_reason = "length"
    made[1].experiences[0].malformed = "no critique"
    dump_episodes(tmp_path / "dumps" / "step_000001.jsonl", made)
    terms = {
        "run": {"mode": "train", "rollouts": str(tmp_path / "dumps"), "steps": 1, "folder": str(tmp_path)},
        "model": {"path": str(model_folder), "gradient_budget": 0.1},
        "data": {"train": [{"path": str(own / "my_problems.jsonl")}]},
        "rollout": {"max_new_tokens": 8},
        "mel": {"internalise": {"retrospective": 1, "heuristic": 1, "replay": 1}},
        "objective": {"kl_coef": 0.1, "tis_cap": 2, "dual_clip": 3, "overlong": "mask", "updates_per_batch": 2},
    }
    (tmp_path / "terms.yaml").write_text(yaml.safe_dump(terms))
    done = torchrun(1, "-m", "mel_fast.train", "--config", str(tmp_path / "terms.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "latest"
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"nll/retrospective", "nll/heuristic", "nll/replay", "policy/kl", "policy/tis", "budget/rows"} <= set(line)
    assert undocumented(run) == set()
