"""Two real SGLang servers on the CPU, shared by all tests here: a start takes half a minute.

The engine that launches them, `engine`, is the one under test where servers are lost. Other tests attach engines of
their own to the same servers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_support import CONTEXT, STOP, Attach, launched, members, policy
from transformers import PreTrainedTokenizerBase

from mel_fast.errors import InputError
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.rollout.sglang.process import find_python


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    try:
        find_python(SGLangConfig().python)
        skip = None
    except InputError as error:
        skip = pytest.mark.skip(reason=str(error))
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.sglang)
            if skip is not None:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("served")
    policy(tokenizer, 0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(tokenizer: PreTrainedTokenizerBase, model_folder: Path) -> dict[str, Any]:
    """The arguments of an engine, but for its configuration, servers and folder."""
    return {
        "model_path": str(model_folder),
        "model_bytes": 2**20,
        "dtype": torch.float32,
        "stop_ids": [STOP],
        "vocabulary": len(tokenizer),
        "context_length": CONTEXT,
    }


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Iterator[SGLangEngine]:
    config = SGLangConfig(
        servers=2,
        kv_tokens=16384,
        arguments=("--max-running-requests", "32"),
        health_every_s=1.0,
        hang_after_s=8.0,
        max_restarts=9,
    )
    folder = tmp_path_factory.mktemp("run")
    with SGLangEngine(config, launched(config, settings, folder, 2), folder=folder, **settings) as engine:
        yield engine
        groups = [process.pid for process in engine.processes]
    for group in groups:
        assert not members(group), "a server has outlived its engine"


@pytest.fixture
def attach(engine: SGLangEngine, settings: dict[str, Any], tmp_path: Path) -> Iterator[Attach]:
    """Makes an engine that is attached to the first of the running servers, or to several. Closed with the test."""
    opened: list[SGLangEngine] = []

    def make(servers: int = 1, **changes: object) -> SGLangEngine:
        urls = [process.url for process in engine.processes[:servers]]
        config = SGLangConfig.model_validate({"urls": urls, "health_every_s": 1.0, "hang_after_s": 8.0} | changes)
        opened.append(SGLangEngine(config, [], folder=tmp_path, **settings).__enter__())
        return opened[-1]

    yield make
    for one in opened:
        one.close()
