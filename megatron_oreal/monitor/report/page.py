"""One HTML file out of data: styles, scripts and data inlined, the network forbidden."""

from __future__ import annotations

import base64
import hashlib
import html
import zlib
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from megatron_oreal.monitor.metrics import to_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LIBRARIES = ("uPlot.iife.min.js", "katex.min.js")
_STYLES = ("vendor/uPlot.min.css", "static/style.css")
# In the order of their use: all are one scope, closed to the page.
_SCRIPTS = ("text", "data", "charts", "overview", "rollouts", "tokens", "health", "main")


def render(title: str, data: dict[str, Any], chunks: Sequence[bytes] = ()) -> Iterator[bytes]:
    """Yields the parts of the page, UTF-8.

    What is shown travels as deflated JSON in base64: no text of a model is part of the markup.
    Scripts run by their digests alone, so that none can be slipped in.

    Args:
        title: of the window.
        data: what `static/data.js` expects.
        chunks: deflated columns of tokens, see `pack.Packed`.
    """
    scripts = [*(_text(f"vendor/{name}") for name in _LIBRARIES), _program()]
    head = _text("static/page.html").format(
        title=html.escape(title),
        policy=_policy(scripts),
        style="\n".join(_text(name) for name in _STYLES),
    )
    yield head.encode()
    packed = zlib.compress(to_json(data).encode())
    for name, blob in (("data", packed), *((f"chunk-{i}", c) for i, c in enumerate(chunks))):
        yield f'<script type="text/plain" id="{name}">'.encode()
        yield base64.b64encode(blob)
        yield b"</script>\n"
    for script in scripts:
        yield f"<script>{script}</script>\n".encode()
    yield b"</body>\n</html>\n"


def _program() -> str:
    parts = "\n".join(_text(f"static/{name}.js") for name in _SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();\n'


def _policy(scripts: Sequence[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline';"
        " base-uri 'none'; form-action 'none'"
    )


def _text(name: str) -> str:
    text = (files("megatron_oreal.monitor.report") / name).read_text(encoding="utf-8")
    if "</script" in text.lower():
        raise ValueError(f"{name}: would end the element that it is put in")
    return text
