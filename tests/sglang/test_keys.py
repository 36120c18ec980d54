"""A server with an API key: the trainer does all its work with it, and never says it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sglang_support import assert_sampled_by, generate, launched, policy, requests, wait_until, weights
from transformers import PreTrainedTokenizerBase

from mel_fast.errors import InputError
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.train import main

KEY, WRONG, VARIABLE = "k-0123456789abcdef", "k-fedcba9876543210", "SERVER_KEY"
REFUSED = r"answered 401: Unauthorized; rollout\.sglang\.api_key_variable must name"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Iterator[str]:
    """Of a server that wants the key. It reads it from a file, so that `ps` shows it to nobody."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys.yaml").write_text(f"api-key: {KEY}\n")
    config = SGLangConfig(kv_tokens=4096, arguments=("--config", str(folder / "keys.yaml")))
    [process] = launched(config, settings, folder, 1)
    process.start()
    yield process.url
    process.stop()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY + "\n")  # as from a file


def attached(url: str, settings: dict[str, Any], folder: Path, **changes: object) -> SGLangEngine:
    config = SGLangConfig.model_validate({"urls": [url], "api_key_variable": VARIABLE} | changes)
    return SGLangEngine(config, [], folder=folder, **settings)


@pytest.mark.parametrize("way", ["disk", "tensor", "group"])
def test_samples_publications_and_repairs_go_through_with_the_key(
    url: str,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    way: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    asked, model = requests(2), policy(tokenizer, 1)
    with attached(url, settings, tmp_path, weights=way) as engine:
        generate(engine, asked)
        engine.load(weights(model), 1)
        engine.servers[0].condemn("as if it had missed a publication")
        wait_until(engine.servers[0].ready.is_set, 30)
        assert_sampled_by(model, asked, generate(engine, asked)[0])
    assert KEY not in caplog.text


@pytest.mark.parametrize("changes", [{"api_key_variable": None}, {"api_key_variable": "OTHER"}])
def test_without_the_key_nothing_begins(
    url: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, object],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OTHER", WRONG)
    with pytest.raises(InputError, match=REFUSED) as refused, attached(url, settings, tmp_path, **changes):
        pass
    assert WRONG not in caplog.text + str(refused.value)


def test_a_server_that_comes_back_with_another_key_is_given_up(
    url: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with attached(url, settings, tmp_path) as engine:
        assert engine._http is not None
        engine._http.headers["Authorization"] = f"Bearer {WRONG}"
        engine.servers[0].condemn("as if it had been restarted")
        wait_until(engine.servers[0].gone.is_set, 30)
        assert "answered 401" in engine.servers[0].why_gone


def test_a_run_leaves_the_key_nowhere(
    url: str,
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Neither in its files, nor in what it prints, nor among the arguments of a process."""
    tokenizer.save_pretrained(model_folder)
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
    options = (
        "--tiny=null",
        f"--model.path={model_folder}",
        f"--data.train=[{{path: {tmp_path / 'data.jsonl'}}}]",
        "--eval.sets=[]",
        f"--run.folder={tmp_path / 'runs'}",
        "--run.steps=1",
        "--run.checkpoint_every=1",
        "--rollout.prompts_per_step=1",
        "--rollout.engine=sglang",
        f"--rollout.sglang.urls=[{url}]",
        f"--rollout.sglang.api_key_variable={VARIABLE}",
    )
    with watching_arguments(KEY) as seen:
        assert main(options) == 0
    run = tmp_path / "runs" / "latest"
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl"} <= {path.name for path in files}
    assert VARIABLE in (run / "config.yaml").read_text()
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert seen == []

    monkeypatch.setenv(VARIABLE, WRONG)
    assert main(options) == 2
    printed = capfd.readouterr()
    assert printed.err.count("error: ") == 1
    assert "answered 401" in printed.err
    assert KEY not in printed.out + printed.err
    assert WRONG not in printed.out + printed.err


@contextmanager
def watching_arguments(secret: str) -> Iterator[list[str]]:
    """Yields what becomes the list of command lines that have it in them."""
    seen: list[str] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # it has ended
                    if secret.encode() in (arguments := (process / "cmdline").read_bytes()):
                        seen.append(arguments.decode())

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    done.set()
    thread.join()
