"""The configuration: files, bases, overrides, what is refused and how it is said, and the plan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mel_fast.config import Config, ConfigError, load_config, overrides, parse_arguments
from mel_fast.errors import InputError
from mel_fast.plan import SHAPES, count_parameters, model_shape, plan
from mel_fast.train import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "model": {"path": "Qwen/Qwen3-0.6B-Base"},
    "data": {"train": [{"path": "train.jsonl"}]},
    "eval": {"sets": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]},
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return str(path)


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def load(path: str, *arguments: str) -> Config:
    return parse_arguments(["--config", path, *arguments], "test")[1]


def refusal(path: str, *arguments: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- files and bases --------------------------------------------------------------------------------------------------


def test_a_base_is_overridden_key_by_key_over_any_number_of_levels(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", "ground.yaml", yaml.safe_dump(SMALL | {"optim": {"lr": 1.0, "eps": 0.5}}))
    write(tmp_path / "shared", "middle.yaml", "base: ground.yaml\noptim: {lr: 2.0}\nrun: {name: middle, seed: 5}\n")
    top = write(tmp_path, "top.yaml", "base: shared/middle.yaml\nrun: {name: top}\neval: {sets: [{path: c.jsonl}]}\n")
    config = load(top)
    assert (config.run.name, config.run.seed, config.optim.lr, config.optim.eps) == ("top", 5, 2.0, 0.5)
    assert [source.path for source in config.eval.sets] == ["c.jsonl"]  # lists are replaced


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "not valid YAML"),
        ("run: {a: 1\nmodel: x: y", "not valid YAML"),
        ("- a\n- b", "expected sections such as 'run:' and 'model:', found list"),
        ("base: nowhere.yaml", "base 'nowhere.yaml' does not exist"),
        ("base: [a, b]", "base ['a', 'b'] does not exist"),
        ("base: broken.yaml", "its own base"),
        ("", "model: Field required"),
        ("3: 4", "3"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, "broken.yaml", text)
    message = refusal(path)
    assert "broken.yaml" in message
    assert said in message


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "not valid YAML" in refusal(str(tmp_path / "binary.yaml"))


def test_a_missing_file_is_an_error_that_names_it() -> None:
    assert refusal("configs/no_such.yaml") == "configs/no_such.yaml: no such configuration file"


def test_a_run_is_resumed_with_its_own_configuration(tmp_path: Path) -> None:
    write(tmp_path, "config.yaml", yaml.safe_dump(SMALL | {"run": {"seed": 7}}))
    options, config = parse_arguments(["--resume", str(tmp_path), "--run.steps=3"], "test")
    assert options.resume == str(tmp_path)
    assert (config.run.seed, config.run.steps) == (7, 3)


def test_configurations_of_the_package_are_found_from_any_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("configs/tiny.yaml").run.name == "tiny"
    assert parse_arguments([], "test")[1].run.name == "tiny"  # the default


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_are_yaml_values_in_either_form(small: str) -> None:
    config = load(
        small,
        "--optim.lr=1e-5",
        "--optim.weight_decay",
        "0.1",
        "--mel.enabled=false",
        "--objective.clip_low=null",
        "--telemetry.writers=[tensorboard]",
        "--eval.sets",
        "[{path: c.jsonl, name: c}]",
        "--optim.betas=[0.8, 0.9]",
        "--mel.internalise={heuristic: 0.5}",
        '--prompts.system="Reason, then answer: a=b"',
        "--verify.function=",
    )
    assert (config.optim.lr, config.optim.weight_decay, config.optim.betas) == (1e-5, 0.1, (0.8, 0.9))
    assert config.mel.enabled is False
    assert config.objective.clip_low is None
    assert config.telemetry.writers == ("tensorboard",)
    assert [(s.path, s.name) for s in config.eval.sets] == [("c.jsonl", "c")]
    assert (config.mel.internalise.heuristic, config.mel.internalise.retrospective) == (0.5, 1.0)
    assert config.prompts.system == "Reason, then answer: a=b"
    assert config.verify.function is None


def test_options_and_overrides_may_come_in_any_order(small: str) -> None:
    options, config = parse_arguments(["--run.seed=3", "--dry-run", "--config", small, "--run.steps", "9"], "test")
    assert options.dry_run
    assert (config.run.seed, config.run.steps) == (3, 9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stray"], "unexpected argument 'stray'"),
        (["--run.seed"], "--run.seed has no value"),
        (["--run.seed=[1"], "not a YAML value"),
        (["--run=3", "--run.seed=1"], "'run' was given a value"),
        (["--dry=1"], "unknown key 'dry'"),  # options are not abbreviated
    ],
)
def test_an_argument_that_cannot_be_used_is_named(small: str, arguments: list[str], said: str) -> None:
    assert said in refusal(small, *arguments)


def test_the_last_of_two_overrides_holds() -> None:
    assert overrides(["--run.seed=1", "--run.steps=5", "--run.seed=2"]) == {"run": {"seed": 2, "steps": 5}}


# --- what is refused, and how it is said ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--modle.path=x", "unknown key 'modle'; did you mean 'model'?"),
        ("--run.step=3", "unknown key 'run.step'; did you mean 'run.steps'?"),
        ("--run.lr=3", "unknown key 'run.lr'; did you mean 'optim.lr'?"),
        ("--mel.internalise.heuristics=1", "'mel.internalise.heuristics'; did you mean 'mel.internalise.heuristic'?"),
        ("--eval.sets=[{pth: a}]", "unknown key 'eval.sets[0].pth'; did you mean 'eval.sets[0].path'?"),
        (
            "--data.train=[{path: a}, {path: b, fields: {answers: x}}]",
            "unknown key 'data.train[1].fields.answers'; did you mean 'data.train[1].fields.answer'?",
        ),
        ("--tiny.world.sed=1", "unknown key 'tiny.world.sed'; did you mean 'tiny.world.seed'?"),
        ("--qqqqqq=1", "unknown key 'qqqqqq'"),
    ],
)
def test_an_unknown_key_names_the_nearest_valid_one(small: str, argument: str, said: str) -> None:
    assert said in refusal(small, argument)


@pytest.mark.parametrize(
    ("argument", "key", "got"),
    [
        ("--run.steps=many", "run.steps", "'many'"),
        ("--run.steps=1.5", "run.steps", "1.5"),
        ("--mel.enabled=7", "mel.enabled", "7"),
        ("--model=5", "model", "5"),
        ("--eval.sets=5", "eval.sets", "5"),
        ("--run.steps=0", "run.steps", "0"),
        ("--optim.lr=0", "optim.lr", "0"),
        ("--objective.algorithm=ppo", "objective.algorithm", "'ppo'"),
        ("--objective.clip_low=2", "clip_low", "2"),
        ("--rollout.temperature=-1", "rollout.temperature", "-1"),
        ("--run.name=a/b", "run.name", "'a/b'"),
        ("--telemetry.writers=[mlflow]", "telemetry.writers[0]", "'mlflow'"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(small: str, argument: str, key: str, got: str) -> None:
    message = refusal(small, argument)
    assert key in message
    assert got in message


def test_all_problems_are_told_at_once(small: str) -> None:
    message = refusal(small, "--run.steps=0", "--optim.lrr=1")
    assert "run.steps" in message
    assert "optim.lrr" in message


@pytest.mark.parametrize("arguments", [["--run.mode=train"], ["--run.rollouts=somewhere"]])
def test_training_from_dumps_needs_their_folder_and_nothing_else_does(small: str, arguments: list[str]) -> None:
    assert refusal(small, *arguments).count("run.rollouts") == 1
    load(small, "--run.mode=train", "--run.rollouts=somewhere")


def test_a_bad_template_is_named_once(small: str) -> None:
    assert refusal(small, "--prompts.solve=hello").count("prompts.solve") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rollout.mode=async"], "rollout.mode=async needs rollout.engine=sglang"),
        (
            ["--rollout.mode=async", "--rollout.engine=sglang"],
            "set objective.tis_cap",
        ),
        (
            ["--rollout={engine: sglang, mode: async, sglang: {release_memory: true}}", "--objective.tis_cap=2"],
            "release_memory needs rollout.mode=sync",
        ),
        (["--rollout.sglang={urls: [host:30000]}"], "'host:30000' is not a URL"),
        (["--rollout.sglang={urls: ['http://a:1', 'http://a:1']}"], "named twice"),
        (["--rollout.sglang={api_key_variable: KEY}"], "api_key_variable is for servers named in urls"),
        (["--rollout.sglang={gpus: [0, 1, 2], tp: 2}"], "not a multiple of tp=2"),
    ],
)
def test_settings_of_rollout_servers_that_do_not_go_together(small: str, options: list[str], message: str) -> None:
    assert message in refusal(small, *options)


# --- the resolved configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_dry_run_prints_loads_back_to_the_same_configuration(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(path), "--dry-run", "--optim.lr=1e-5"]) == 0
    printed = capsys.readouterr().out
    assert "# plan" in printed
    resolved = write(tmp_path, "resolved.yaml", printed)
    assert load(resolved) == load(str(path), "--optim.lr=1e-5")


def test_odd_texts_survive_the_resolved_configuration(small: str, tmp_path: Path) -> None:
    config = load_config(
        small, {"prompts": {"system": "a: b # c\n\n  é\t'\"{} 1e5 \\boxed{}\u2028 "}, "run": {"name": "1e5"}}
    )
    assert load(write(tmp_path, "again.yaml", config.to_yaml())) == config


def test_the_folder_of_the_embedded_world_is_filled_into_paths() -> None:
    config = load("configs/tiny.yaml").with_tiny_folder(Path("/somewhere"))
    assert config.model.path == "/somewhere/model"
    assert all(s.path.startswith("/somewhere/") for s in (*config.data.train, *config.eval.sets))
    assert config.prompts == load("configs/tiny.yaml").prompts


@pytest.mark.parametrize("size", ["4b", "8b", "14b"])
def test_the_papers_runs_and_their_twins_differ_in_meta_experience_alone(size: str) -> None:
    mel, grpo = (load(f"configs/{name}_qwen3_{size}.yaml").model_dump() for name in ("mel", "grpo"))
    assert mel["model"]["path"] == f"Qwen/Qwen3-{size.upper()}-Base"
    assert (mel["mel"].pop("enabled"), grpo["mel"].pop("enabled")) == (True, False)
    assert mel["run"].pop("name") != grpo["run"].pop("name")
    assert mel == grpo
    rollout, optim = mel["rollout"], mel["optim"]
    assert (rollout["prompts_per_step"], rollout["group_size"], rollout["temperature"], optim["lr"]) == (
        128,
        8,
        1,
        1e-6,
    )
    assert len(mel["eval"]["sets"]) == 5


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "billions"), [("0.6B", 0.596), ("1.7B", 1.72), ("4B", 4.02), ("8B", 8.19), ("14B", 14.77)]
)
def test_parameters_of_the_known_shapes_are_right(small: str, model: str, billions: float) -> None:
    shape, origin = model_shape(load(small, f"--model.path=Qwen/Qwen3-{model}-Base"))
    assert origin == "built-in table" or "config.json" in origin
    assert count_parameters(shape) / 1e9 == pytest.approx(billions, rel=0.01)


def test_the_plan_counts_what_a_step_asks_for(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = load(
        small,
        "--rollout={prompts_per_step: 10, group_size: 4, max_prompt_tokens: 100, max_new_tokens: 200}",
        "--mel.pairs_per_prompt=3",
        "--objective.updates_per_batch=2",
        "--optim={epochs: 3, token_budget: 600}",
    )
    text = plan(config)
    trained = 40 * 300 + 30 * (100 + 2 * 200 + 200)  # responses, and reflections on two full solutions
    assert "10 prompts x 4 responses, 30 reflections and replays at most, 6 update(s)" in text
    assert f"{40 * 200 + 30 * 2 * 200:,} sampled, {trained:,} trained on" in text
    assert f"{-(-trained // 2400)} per rank of 600 tokens" in text
    assert "exceed the token budget" in text
    assert "0 reflections" in plan(load(small, "--mel.enabled=false"))


def test_contrasts_beyond_the_models_context_are_announced(small: str) -> None:
    assert "are dropped and counted" in plan(load(small, "--rollout.max_new_tokens=20000"))
    assert "are dropped and counted" not in plan(load(small))


def test_memory_is_shared_out_over_ranks(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def gib(line: str) -> float:
        return float(next(row for row in plan(load(small)).splitlines() if line in row).split()[-2])

    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = gib("optimizer")
    assert alone == pytest.approx(8 * 0.596e9 / 2**30, rel=0.01)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert gib("optimizer") == pytest.approx(alone / 2, abs=0.01)


@pytest.mark.parametrize("path", ["nobody/no-such-model", "no/such/folder", "{folder}"])
def test_a_model_of_unknown_size_is_an_error_that_names_it(small: str, tmp_path: Path, path: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = path.format(folder=tmp_path)
    with pytest.raises(InputError, match=r"model\.path.*download it first") as error:
        plan(load(small, f"--model.path={path}"))
    assert path in str(error.value)
    assert "Qwen/Qwen3-4B-Base" in SHAPES


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_ends_with_0_or_with_2_and_one_line_of_error(small: str) -> None:
    def train(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mel_fast.train", "--config", small, "--dry-run", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)

    done, failed = train(), train("--run.step=3")
    out, _ = done.communicate(timeout=120)
    assert done.returncode == 0
    assert yaml.safe_load(out)["model"]["path"] == "Qwen/Qwen3-0.6B-Base"
    out, errors = failed.communicate(timeout=120)
    assert (failed.returncode, out) == (2, "")
    assert errors.splitlines() == [f"error: {small}: unknown key 'run.step'; did you mean 'run.steps'?"]


@pytest.mark.parametrize(
    ("rollout", "engine"),
    [
        ("{engine: local, dtype: bfloat16}", "1.11 GiB"),
        ("{engine: sglang, sglang: {memory_fraction: 0.5}}", "40.00 GiB"),
        ("{engine: sglang, sglang: {memory_fraction: 0.5, release_memory: true}}", "0.00 GiB"),
        ("{engine: sglang, sglang: {urls: ['http://host:30000']}}", "0.00 GiB"),
    ],
)
def test_the_plan_counts_what_the_engine_holds_during_an_update(small: str, rollout: str, engine: str) -> None:
    options = ("--model.path=Qwen/Qwen3-0.6B-Base", "--run.device_memory_gib=80", f"--rollout={rollout}")
    lines = {line[1:20].strip(): line[21:].strip() for line in plan(load(small, *options)).splitlines()}
    assert lines["engine"] == engine
