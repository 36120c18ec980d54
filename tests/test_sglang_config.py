"""Settings of rollout servers that cannot work are refused before anything is started."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aiohttp import web

from mel_fast.config import ConfigError, load_config, overrides
from mel_fast.errors import EngineError, InputError
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


class KeyedServer:
    """Knows what the trainer asks of a server before its first request, and wants the key for it."""

    def __init__(self) -> None:
        self.refused = 0

    async def start(self) -> str:
        app = web.Application()
        app.router.add_get("/health_generate", self._alive)  # needs no key, as SGLang's
        app.router.add_route("*", "/{path}", self._answer)
        self.runner = web.AppRunner(app)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def _alive(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _answer(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            self.refused += 1
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response({"page_size": 1, "max_total_num_tokens": 4096, "success": True})


@pytest.fixture
def keyed() -> Iterator[tuple[KeyedServer, str]]:
    loop, server = asyncio.new_event_loop(), KeyedServer()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server, asyncio.run_coroutine_threadsafe(server.start(), loop).result()
    asyncio.run_coroutine_threadsafe(server.runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


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


def test_the_key_is_sent_and_never_said(
    keyed: tuple[KeyedServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, url = keyed
    caplog.set_level("DEBUG")
    monkeypatch.setenv("SERVER_KEY", KEY + "\n")
    with attached(url, tmp_path) as engine:
        assert engine.take_metrics()["engine/servers"] == 1
    assert server.refused == 0
    monkeypatch.setenv("SERVER_KEY", "k-wrong")
    with pytest.raises(EngineError, match="answered 401: Unauthorized") as refused, attached(url, tmp_path):
        pass
    assert KEY not in caplog.text + str(refused.value)
    assert "k-wrong" not in caplog.text + str(refused.value)


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
