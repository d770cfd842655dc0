"""`data show --html`: one self-contained page. Row text is never markup: everything is escaped, and no other script may run."""

import base64
import hashlib
from collections.abc import Iterator
from html import escape

from finetune.data.visible import visible
from finetune.debug.rows.show import Shown, ShownExample, Token
from finetune.debug.rows.terminal import kind_of
from finetune.errors import counted

STYLE = """
:root { color-scheme: light dark; --learnt: #bdebc4; --cut: #f6c9c9; --on: #1f5fd0; --line: #8888; }
@media (prefers-color-scheme: dark) { :root { --learnt: #1d5a2a; --cut: #6b2626; --on: #8ab4ff; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto 6rem; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 2rem 0 .3rem; }
pre { font: 14px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line);
  border-radius: 4px; padding: .6rem; margin: 0; }
pre:focus { outline: 2px solid var(--on); }
.t { border-left: 1px dotted var(--line); } .t.on { outline: 2px solid var(--on); }
.learnt { background: var(--learnt); font-weight: 600; } .cut { background: var(--cut); text-decoration: line-through; }
#why { position: fixed; left: 0; right: 0; bottom: 0; padding: .6rem 1rem; background: Canvas; color: CanvasText;
  border-top: 2px solid var(--on); font: 14px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
.refused { font-weight: 600; }
"""
SCRIPT = """
const why = document.getElementById("why");
let now = null;
function choose(token) {
  if (now) now.classList.remove("on");
  now = token;
  now.classList.add("on");
  why.textContent = "token " + token.dataset.n + " (id " + token.dataset.id + "): " + token.title;
}
document.addEventListener("mouseover", event => { const token = event.target.closest(".t"); if (token) choose(token); });
document.addEventListener("click", event => { const token = event.target.closest(".t"); if (token) choose(token); });
document.addEventListener("keydown", event => {
  const example = document.activeElement.closest("pre");
  if (!example) return;
  const tokens = [...example.querySelectorAll(".t")], place = tokens.indexOf(now);
  const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (next === undefined || !tokens.length) return;
  event.preventDefault();
  choose(tokens[Math.max(0, Math.min(tokens.length - 1, next))]);
  now.scrollIntoView({ block: "nearest" });
});
"""


def page(shown: Shown, title: str) -> str:
    """The page as HTML. A policy in its head lets only the style and the script of this file run."""
    policy = (
        f"default-src 'none'; style-src {_hash(STYLE)}; script-src {_hash(SCRIPT)}; base-uri 'none'; form-action 'none'"
    )
    body = "\n".join(line for example in shown["examples"] for line in _example(example))
    notes = "".join(f"<p>{_safe(note)}</p>" for note in shown["notes"])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{_safe(title)}</h1>\n"
        '<p><span class="learnt">Learnt</span> text, <span class="cut">cut</span> text, and the rest. '
        "Point at a token, or use the arrow keys in a row, to see why.</p>\n"
        f'{notes}{body}\n<div id="why" role="status" aria-live="polite">no token is chosen</div>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _example(example: ShownExample) -> Iterator[str]:
    yield f"<h2>row {example['row']:,} of {_safe(example['source'])}, {_safe(example['where'])}</h2>"
    if example["refused"] is not None:
        yield f'<p class="refused">refused: {_safe(example["refused"])}</p>'
        if example["hint"]:
            yield f"<p>hint: {_safe(example['hint'])}</p>"
        return
    cut = f", {example['cut']:,} cut away" if example["cut"] else ""
    yield f"<p>{counted(len(example['tokens']), 'token')}, {example['learnt']:,} learnt{cut}</p>"
    yield f'<pre tabindex="0" aria-label="row {example["row"]}">{"".join(_tokens(example))}</pre>'


def _tokens(example: ShownExample) -> Iterator[str]:
    place = 0
    for number, token in enumerate(example["tokens"]):
        start, end = max(place, token["start"]), max(place, token["end"])
        yield _safe(visible(example["text"], place, start))
        written = visible(example["text"], start, end)
        # Of several tokens for one character only the first has it.
        yield _token(token, number, written or "▫")
        place = end
    yield _safe(visible(example["text"], place))


def _token(token: Token, number: int, written: str) -> str:
    state = "learnt" if token["trained"] else "not learnt"
    names = " ".join(filter(None, ("t", kind_of(token))))
    title = f"{visible(token['text'])!r} {state}: {token['reason']}"
    return f'<span class="{names}" data-n="{number}" data-id="{token["id"]}" title="{_safe(title)}">{_safe(written)}</span>'


def _safe(text: str) -> str:
    return escape(text.encode("utf-8", "replace").decode())


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
