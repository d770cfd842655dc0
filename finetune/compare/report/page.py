"""The page of a report: its data, its style and its scripts in one file, and a policy that lets nothing else run or load.

Charts are drawn by uPlot 1.6 (MIT, 51 kB, kept in `assets/`): libraries with more kinds of charts have megabytes, and no Python package
carries it.
"""

import base64
import hashlib
import json
from functools import cache
from html import escape
from importlib.resources import files

from finetune.compare.report.payload import Payload
from finetune.store.strict_json import strict

SCRIPTS = ("base.js", "series.js", "chart.js", "heat.js", "words.js", "main.js")


def page(payload: Payload, is_live: bool = False) -> str:
    """The page as HTML. A live one asks its own server for news."""
    plot, script = _asset("uPlot.js"), _script()
    style = _asset("uPlot.css") + _asset("page.css")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(plot)} {_hash(script)}; base-uri 'none'; form-action 'none'"
    policy += "; connect-src 'self'" if is_live else ""
    runs = ", ".join(run["name"] for run in payload["runs"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(as_unicode(runs))}</title>\n<style>{style}</style>\n</head>\n"
        f'<body{" data-live=1" if is_live else ""}>\n<main id="report"></main>\n<noscript>This report needs JavaScript.</noscript>\n'
        f'<script type="application/json" id="data">{to_script(payload)}</script>\n'
        f"<!--\n{_asset('uPlot.LICENSE')}-->\n<script>{plot}</script>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def to_script(payload: Payload) -> str:
    """JSON that ends no script element and begins no comment in one."""
    text = as_unicode(json.dumps(strict(payload), allow_nan=False, ensure_ascii=False, separators=(",", ":")))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def as_unicode(text: str) -> str:
    """Without halves of surrogate pairs, which names of files may have and UTF-8 has not."""
    return text.encode("utf-8", "replace").decode()


@cache
def _script() -> str:
    return '"use strict";\n(() => {\n' + "\n".join(map(_asset, SCRIPTS)) + "})();\n"


@cache
def _asset(name: str) -> str:
    return (files("finetune.compare.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
