"""Settings of rollout servers that cannot work are refused before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mel_fast.config import ConfigError, load_config, overrides
from mel_fast.errors import InputError
from mel_fast.rollout.sglang.config import SGLangConfig
from mel_fast.rollout.sglang.engine import SGLangEngine, _api_key


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"urls": ["host:30000"]}, "not a URL such as http://host:30000"),
        ({"urls": ["http://host:30000", "http://host:30000/"]}, "a server is named twice"),
        ({"urls": ["http://me:word@host:30000"]}, "a URL has a password in it: use rollout.sglang.api_key_variable"),
        ({"api_key_variable": "KEY"}, "for servers named in urls"),
        ({"arguments": ["--api-key", "s3cret"]}, "an API key must not be among the arguments"),
        ({"arguments": ["--admin-api-key=s3cret"]}, "an API key must not be among the arguments"),
        ({"gpus": [0, 1, 2], "tp": 2}, "3 GPUs, not a multiple of tp=2"),
        ({"window": 0}, "greater than 0"),
        ({"ulrs": []}, "ulrs"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SGLangConfig.model_validate(settings)


@pytest.mark.parametrize("secret", ["{urls: ['http://me:s3cret@host:30000']}", "{arguments: [--api-key=s3cret]}"])
def test_a_refused_secret_is_not_repeated(secret: str) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.") as refused:
        load_config("configs/tiny.yaml", overrides([f"--rollout.sglang={secret}"]))
    assert "s3cret" not in str(refused.value)


KEY = "k-0123456789abcdef"


def attached(url: str, folder: Path) -> SGLangEngine:
    config = SGLangConfig(urls=(url,), api_key_variable="SERVER_KEY", weights_folder=str(folder))
    return SGLangEngine(
        config,
        [],
        model_path="model",
        model_bytes=1,
        dtype=torch.float32,
        stop_ids=[0],
        vocabulary=8,
        context_length=8,
        folder=folder,
    )


@pytest.mark.parametrize(("value", "words"), [("", "is not set"), ("s3 cret", "no key has"), ("s3crét", "no key has")])
def test_what_cannot_be_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, words: str
) -> None:
    monkeypatch.setenv("SERVER_KEY", value)
    with pytest.raises(InputError, match=words) as refused, attached("http://127.0.0.1:9", tmp_path):
        pass
    assert "s3c" not in str(refused.value)
    assert "s3 c" not in str(refused.value)


def test_a_key_on_an_open_line_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    urls = ("http://far:1", "https://far:2", "http://127.0.0.1:3")
    assert _api_key(SGLangConfig(urls=urls, api_key_variable="SERVER_KEY")) == KEY
    assert [record.args for record in caplog.records] == [("http://far:1",)]
    assert KEY not in caplog.text
