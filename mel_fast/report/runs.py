"""The runs of a report: what each is called, how its settings differ from the others', and which are seeds of one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mel_fast.errors import InputError
from mel_fast.report.summary import Summary, summarise

NAMING = ("run.name", "run.folder")  # settings that say where a run is, not what it does


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory and what was read of it."""

    path: Path
    config: dict[str, Any]  # as in config.yaml; empty when there is none
    summary: Summary

    @property
    def name(self) -> str:
        return self.path.name

    def setting(self, key: str) -> Any:
        """The value of a dotted key; None when it is not set."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def whole(self, key: str) -> int | None:
        """The same where it is a whole number; None where it is anything else."""
        return value if type(value := self.setting(key)) is int else None


def open_run(path: Path) -> Run:
    """Reads settings and metrics of a run, finished or not.

    Raises:
        InputError: it is not a run directory, or nothing has been measured yet.
    """
    summary = summarise(path)
    if not summary.lines:
        raise InputError(f"{path}: no step has finished and no evaluation was taken yet, so there is nothing to report")
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or the 45th of a month
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected sections such as 'run:' and 'model:'")
    return Run(path, config, summary)


def dotted(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Every setting under its dotted key, as JSON."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            number = not isinstance(value, float) or math.isfinite(value)  # JavaScript knows no other in JSON
            flat[prefix + str(key)] = json.dumps(value if number else str(value), ensure_ascii=False, default=str)
    return flat


def group_seeds(runs: Sequence[Run]) -> list[list[int]]:
    """Indices of runs that differ in nothing but seeds (any setting called `seed`), names and folders, together."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        same = {k: v for k, v in dotted(run.config).items() if k not in NAMING and k.rpartition(".")[2] != "seed"}
        groups.setdefault(json.dumps(same, sort_keys=True) if same else str(index), []).append(index)
    return list(groups.values())


def differences(runs: Sequence[Run], groups: Sequence[Sequence[int]]) -> list[dict[str, str]]:
    """For each group its settings that are not the same in all groups."""
    flats = [dotted(runs[group[0]].config) for group in groups]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    ignored = {key for key in keys if key in NAMING or key.rpartition(".")[2] == "seed"}
    differing = [key for key in keys if key not in ignored and len({flat.get(key) for flat in flats}) > 1]
    return [{key: flat.get(key, "not set") for key in differing} for flat in flats]


def labels(runs: Sequence[Run], groups: Sequence[Sequence[int]]) -> list[str]:
    """A short name for each group: its differing settings where they tell the groups apart, else the runs' names."""
    if len(groups) == 1:
        return [str(runs[groups[0][0]].setting("run.name") or runs[groups[0][0]].name)]
    short = [
        ", ".join(
            f"{key.rpartition('.')[2] if key.count('.') > 1 else key}={value[:24]}" for key, value in found.items()
        )
        for found in differences(runs, groups)
    ]
    if all(0 < len(label) <= 60 for label in short) and len(set(short)) == len(short):
        return short
    return [" + ".join(runs[i].name for i in group) for group in groups]
