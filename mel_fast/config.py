"""The configuration: one frozen model, filled from a YAML file and dotted overrides.

    torchrun -m mel_fast.train --config configs/tiny.yaml --optim.lr=1e-4 --mel.enabled=false

Each room defines its own section; this file joins them. A YAML file may name a `base` (a path relative to itself),
whose values it overrides. An unknown key is an error that names the nearest valid one.
"""

from __future__ import annotations

import argparse
import difflib
import re
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mel_fast.data import Source
from mel_fast.errors import InputError
from mel_fast.evaluate import EvalConfig
from mel_fast.experience import MelConfig
from mel_fast.learner import OptimConfig
from mel_fast.model import ModelConfig
from mel_fast.objective import ObjectiveConfig
from mel_fast.readers import is_file
from mel_fast.rollout.engine import RolloutConfig
from mel_fast.telemetry import TelemetryConfig
from mel_fast.templates import PromptConfig
from mel_fast.tiny.config import TinyConfig
from mel_fast.verify import VerifyConfig

DEFAULT = "configs/tiny.yaml"
_SHORT = reprlib.Repr()  # YAML's aliases make gigabytes of a few lines
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 2


class ConfigError(InputError):
    """A configuration that cannot be used: the file, the key and what to do."""


class RunConfig(BaseModel):
    """The run as a whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(default="mel", pattern=r"^[^/]+$", description="part of the run directory's name")
    folder: str = Field(default="runs", description="where run directories are made; each run has one of its own")
    seed: int = Field(default=0, description="of the order of prompts and of all sampling")
    steps: int = Field(default=100, ge=1, description="batches of prompts")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU where there is one")
    mode: Literal["full", "rollout", "train"] = Field(
        default="full", description="rollout: sample and dump, no update; train: update from dumped rollouts, no engine"
    )
    rollouts: str | None = Field(
        default=None, description="mode=train: the folder of dumped rollouts, e.g. runs/latest/rollouts"
    )
    checkpoint_every: int = Field(default=20, ge=0, description="steps between checkpoints; 0: only at the end")
    keep_checkpoints: int = Field(default=2, ge=1, description="the newest ones; older ones are removed")
    collective_timeout_minutes: float = Field(
        default=240,
        gt=0,
        description="how long ranks wait for rank 0's rollouts, or it for them, until the run ends itself",
    )
    phase_timeout_minutes: float = Field(
        default=60,
        gt=0,
        description="how long an update, a publication, a checkpoint or the export may take until the run ends itself",
    )
    device_memory_gib: float | None = Field(
        default=None, gt=0, description="--dry-run: memory of a device to plan for; unset: that of this machine's GPU"
    )

    @model_validator(mode="after")
    def _train_needs_rollouts(self) -> RunConfig:
        if (self.mode == "train") != (self.rollouts is not None):
            raise ValueError("run.rollouts must name a folder of dumped rollouts if and only if run.mode=train")
        return self


class DataConfig(BaseModel):
    """Where training problems come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: tuple[Source, ...]


class Config(BaseModel):
    """Everything that decides a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    prompts: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    verify: VerifyConfig = VerifyConfig()
    mel: MelConfig = MelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    tiny: TinyConfig | None = Field(
        default=None, description="build the embedded world first; `{tiny}` in paths then stands for its folder"
    )

    @model_validator(mode="after")
    def _async_is_off_policy(self) -> Config:
        if self.rollout.mode == "async" and self.objective.tis_cap is None and self.objective.algorithm != "rft":
            raise ValueError(
                "rollout.mode=async samples from weights up to one update old: set objective.tis_cap (2 is usual; gspo "
                "takes none, so it needs rollout.mode=sync)"
            )
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)

    def with_tiny_folder(self, folder: Path) -> Config:
        """Puts the built world's folder in place of `{tiny}`."""
        return self._with_paths(lambda path: path.replace("{tiny}", str(folder)))

    def with_absolute_paths(self) -> Config:
        """Names what exists by its absolute path: `runs/latest/model` means another folder once this run has begun."""
        return self._with_paths(lambda path: str(Path(path).resolve()) if Path(path).exists() else path)

    def _with_paths(self, change: Callable[[str], str]) -> Config:
        dump = self.model_dump()
        sections: list[dict[str, Any]] = [dump["model"], *dump["data"]["train"], *dump["eval"]["sets"]]
        for section in sections:
            section["path"] = change(section["path"])
        if dump["run"]["rollouts"] is not None:
            dump["run"]["rollouts"] = change(dump["run"]["rollouts"])
        return Config.model_validate(dump)


def parse_arguments(arguments: Sequence[str], prog: str) -> tuple[argparse.Namespace, Config]:
    """The command line of `mel_fast.train` and `mel_fast.evaluate`.

    Raises:
        ConfigError: a file that is not there or not YAML, an unknown key, a value out of range.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Settings are given as --section.key=value; see the YAML files in configs/.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help=f"YAML file (default: {DEFAULT})")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run directory, e.g. runs/latest")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, then stop"
    )
    known, rest = parser.parse_known_args(arguments)
    path = known.config or (str(Path(known.resume) / "config.yaml") if known.resume else DEFAULT)
    return known, load_config(path, overrides(rest))


def overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--a.b=1` or `--a.b 1` -> {"a": {"b": 1}}; values are YAML."""
    result: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected argument {word!r}; settings are given as --section.key=value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"--{key} has no value; write --{key}=value")
            value = words.pop(0)
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--{key}: {parent!r} was given a value of its own before it")
        try:
            section[last] = _parse(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"--{key}={value}: not a YAML value ({_in_one_line(error)})") from error
    return result


def load_config(path: str, overriding: dict[str, Any] | None = None) -> Config:
    """A YAML file, its bases, and overrides on top -> a checked configuration.

    Raises:
        ConfigError: as `parse_arguments`.
    """
    values = _merge(_read(_locate(path)), overriding or {})
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_explain(problem) for problem in error.errors())) from error


def _locate(path: str) -> Path:
    """The file as named, or the one that comes with the package: configs/ lies beside it in a checkout, in it in a
    wheel."""
    package = Path(__file__).parent
    for candidate in (Path(path), package.parent / path, package / path):
        if is_file(candidate):
            return candidate
    raise ConfigError(f"{path}: no such configuration file")


def _read(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigError(f"{path}: it is its own base, by way of {above[-1]}")
    try:
        values = _parse(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or the 45th of a month
        raise ConfigError(f"{path}: not valid YAML: {_in_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'run:' and 'model:', found {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or not is_file(path.parent / base):
        raise ConfigError(f"{path}: its base {base!r} does not exist (paths are relative to this file)")
    return _merge(_read(path.parent / base, (*above, path.resolve())), values)


class _Loader(yaml.SafeLoader):
    """YAML takes the last of two equal keys; a section that is there twice is a slip."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # a safe one


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _explain(problem: Any) -> str:
    key = ""
    for part in problem["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        secret = re.search(r"password|API key", message)  # then it is in the value, and must not get into logs
        got = (
            f" (got {_SHORT.repr(problem['input'])})"
            if key and not secret and not isinstance(problem["input"], dict)
            else ""
        )
        return (message if message.startswith(f"{key}.") else f"{key}: {message}") + got
    # A slip of the pen is likelier than a wrong section: the section's own keys come first, then the word elsewhere.
    section, _, last = key.rpartition(".")
    prefix = re.sub(r"\[\d+\]", "", section) + "." if section else ""
    keys = _keys(Config)
    siblings = [name for name in (k.removeprefix(prefix) for k in keys if k.startswith(prefix)) if "." not in name]
    near = [key.removesuffix(last) + name for name in difflib.get_close_matches(last, siblings, n=1)]
    near = near or [name for name in keys if name.endswith(f".{last}")]
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
    return f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a model."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for nested in candidates:
            if isinstance(nested, type) and issubclass(nested, BaseModel):
                keys += _keys(nested, f"{prefix}{name}.")
    return keys
