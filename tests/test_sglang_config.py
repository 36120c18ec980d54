"""Settings of rollout servers that cannot work are refused before anything is started."""

from __future__ import annotations

import pytest

from mel_fast.rollout.sglang.config import SGLangConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"urls": ["host:30000"]}, "not a URL such as http://host:30000"),
        ({"urls": ["http://host:30000", "http://host:30000/"]}, "a server is named twice"),
        ({"urls": ["http://me:word@host:30000"]}, "a URL has a password in it: use rollout.sglang.api_key_variable"),
        ({"api_key_variable": "KEY"}, "for servers named in urls"),
        ({"gpus": [0, 1, 2], "tp": 2}, "3 GPUs, not a multiple of tp=2"),
        ({"window": 0}, "greater than 0"),
        ({"ulrs": []}, "ulrs"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SGLangConfig.model_validate(settings)
