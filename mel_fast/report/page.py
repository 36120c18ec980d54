"""One HTML file out of data and assets, which opens anywhere, offline.

Data are gzipped JSON in base64, in elements that a browser does not run; so no text in them can end or start an
element. The page shows them as text nodes only. Its content security policy allows the scripts that carry the page's
nonce, which is a hash of all that the page holds, and no connection to anywhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
MODULES = ("data", "dom", "charts", "overview", "marks", "viewer", "experiences", "rollouts", "main")
STYLES = ("vendor/uPlot.min.css", "style.css")
LIBRARY = "vendor/uPlot.iife.min.js"


def page(title: str, data: Mapping[str, Any]) -> str:
    """The page with each value of `data` under its name, for `load(name)` of assets/data.js."""
    blocks = "\n".join(_data(name, value) for name, value in data.items())
    modules = {f"report/{name}": _url(name) for name in MODULES}
    code = {
        "title": _text(html.escape(title)).decode(),
        "styles": "\n".join(_asset(name) for name in STYLES),
        "library": _asset(LIBRARY),
        "modules": json.dumps({"imports": modules}),
        "data": blocks,
    }
    code["nonce"] = hashlib.sha256("\0".join(code.values()).encode()).hexdigest()
    # One pass: nothing that is put in is looked at again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: code[found[1]], _asset("page.html"))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _url(module: str) -> str:
    """A module as a data: URL: an import map then resolves imports within one file, as a browser wants them."""
    source = f"{_asset(f'{module}.js')}\n//# sourceURL=report/{module}.js\n"
    return f"data:text/javascript;base64,{base64.b64encode(source.encode()).decode()}"


def _data(name: str, value: Any) -> str:
    packed = gzip.compress(
        _text(json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)), mtime=0
    )
    return f'<script type="application/gzip" id="data-{name}">{base64.b64encode(packed).decode()}</script>'


def _text(text: str) -> bytes:
    """UTF-8, with a question mark for what is no text: half a surrogate pair, as in a path that is not UTF-8."""
    return text.encode("utf-8", errors="replace")
