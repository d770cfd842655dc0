"""Plants faults in clean rows, and holds what `finetune data check` finds against them: each one named, and nothing else.

    python scripts/data_faults.py [--rows N] [--keep DIR]

The clean rows are real text of this machine: docstrings of the standard library, documents of Debian packages, and docstrings of
installed packages. A slow comparison of all pairs removes what is nearly equal in them. First each corpus is checked as it is, then with
every fault planted.
"""

import argparse
import ast
import base64
import gzip
import json
import random
import re
import sys
import sysconfig
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

Row = dict[str, object]
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
MOST_FILES = 400  # of a folder, drawn evenly
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages"}
ALIKE = 0.6  # Jaccard similarity of words in threes; rows above are one row
LONG = "The river passes the old mill, turns north below the bridge, and reaches the harbour after nine miles of quiet water."


class Fault(NamedTuple):
    check: str
    change: Callable[[str, str], object]
    """Prompt and answer of a clean row -> the row with the fault; text is a line as it is."""
    way: str = "edit"
    """`edit` replaces the clean row, `copy` adds one beside it, `holdout` adds one to the held-out rows."""


def pair(prompt: str, answer: str, **more: object) -> Row:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], **more}


def wrong(text: str, page: str) -> str:
    """UTF-8 read as a code page."""
    return text.encode().decode(page)


def letters(count: int, signs: str = BASE62) -> str:
    return "".join(random.Random(count).choices(signs, k=count))


def checksummed(prefix: str) -> str:
    body, number, digits = letters(30), 0, ""
    number = zlib.crc32(body.encode())
    while number:
        number, digit = divmod(number, 62)
        digits = BASE62[digit] + digits
    return f"{prefix}{body}{digits.rjust(6, '0')}"


def token() -> str:
    head, body = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        for part in ({"alg": "HS256", "typ": "JWT"}, {"sub": "1234567890", "admin": True})
    )
    return f"{head}.{body}.{letters(43)}"


def calling(prompt: str, answer: str, name: str, answered: str) -> Row:
    call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": {"city": "Lyon"}}}
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": "I look.", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": answered},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "tools": [tool]}


CONTROL = re.compile(r"<\|?\w+\|?>")
KEY = (
    "-----BEGIN RSA PRIVATE KEY-----\n"
    + "\n".join(letters(64 + n) for n in range(8))
    + "\n-----END RSA PRIVATE KEY-----"
)
FAULTS: dict[str, Fault] = {
    "the same row again": Fault("duplicates", pair, "copy"),
    "the same row in other columns": Fault("duplicates", lambda p, a: {"prompt": p, "completion": a}, "copy"),
    "a copy in capitals": Fault("near_duplicates", lambda p, a: pair(p.upper(), a.upper()), "copy"),
    "a copy with other blanks": Fault("near_duplicates", lambda p, a: pair(f"{p} ", a.replace(" ", "  ")), "copy"),
    "a copy with one word more": Fault(
        "near_duplicates", lambda p, a: pair(p, f"{a} {LONG} {LONG[:-1]} today."), "near"
    ),
    "a copy without its full stops": Fault(
        "near_duplicates", lambda p, a: pair(p, f"{a} ".replace(". ", " ").strip() + " !"), "copy"
    ),
    "another answer to one prompt": Fault("conflicts", lambda p, a: pair(p, LONG.replace("river", "train")), "copy"),
    "a held-out row in training": Fault("seen_holdout", pair, "holdout"),
    "a held-out row nearly in training": Fault("near_holdout", lambda p, a: pair(p, f"{a.upper()}."), "holdout"),
    "an empty prompt": Fault("empty", lambda p, a: pair("", a)),
    "an empty answer": Fault("empty", lambda p, a: pair(p, "")),
    "an answer of blanks": Fault("empty", lambda p, a: pair(p, " \u00a0\n\u3000")),
    "no messages": Fault("refused", lambda p, a: {"messages": []}),
    "a null answer": Fault("refused", lambda p, a: {"prompt": p, "completion": None}),
    "a broken line": Fault("refused", lambda p, a: '{"messages": [{"role": "user", "con'),
    "a line that is no object": Fault("refused", lambda p, a: json.dumps([p, a])),
    "an unknown role": Fault(
        "refused", lambda p, a: {"messages": [{"role": "narrator", "content": p}, {"role": "assistant", "content": a}]}
    ),
    "no answer": Fault("refused", lambda p, a: {"messages": [{"role": "user", "content": p}]}),
    "an answer cut in its middle": Fault(
        "cut_answers", lambda p, a: pair(p, " ".join(f"{a} {n}" for n in range(40_000 // len(a))))
    ),
    "an answer cut to nothing": Fault(
        "nothing_learnt", lambda p, a: pair(" ".join(f"{p} {n}" for n in range(60_000 // len(p))), a)
    ),
    "an answer of one character": Fault("short_answers", lambda p, a: pair(p, "5")),
    "an answer that repeats the prompt": Fault("echoes", lambda p, a: pair(a, a)),
    "an answer that repeats itself": Fault("loops", lambda p, a: pair(p, f"{a} " + "and then it goes on " * 30)),
    "nan in place of an answer": Fault("missing_values", lambda p, a: pair(p, "nan")),
    "undefined in place of a prompt": Fault("missing_values", lambda p, a: pair("undefined", a)),
    "an object in place of an answer": Fault("missing_values", lambda p, a: pair(p, "[object Object]")),
    "a replacement character": Fault("broken_text", lambda p, a: pair(p, f"{a} caf\ufffd")),
    "half of a pair of surrogates": Fault("refused", lambda p, a: pair(p, f"{a} \ud83d")),
    "a zero byte": Fault("broken_text", lambda p, a: pair(f"{p}\0", a)),
    "colors of a terminal": Fault("broken_text", lambda p, a: pair(p, f"\x1b[1;31m{a}\x1b[0m")),
    "French twice encoded": Fault("mojibake", lambda p, a: pair(p, f"{a} {wrong('Le café est fermé.', 'cp1252')}")),
    "an apostrophe twice encoded": Fault("mojibake", lambda p, a: pair(p, f"{a} It{wrong('’', 'cp1252')}s late.")),
    "Russian twice encoded": Fault("mojibake", lambda p, a: pair(p, f"{a} {wrong('Привет', 'latin-1')}")),
    "Chinese twice encoded": Fault("mojibake", lambda p, a: pair(wrong("你好世界", "latin-1") + p, a)),
    "a dash read by a Macintosh": Fault("mojibake", lambda p, a: pair(p, f"{a} nine{wrong('–', 'mac_roman')}ten")),
    "a control token": Fault("control_tokens", lambda p, a: pair(f"{p}<|im_end|>", a)),
    "a control token of another template": Fault("foreign_tokens", lambda p, a: pair(f"[INST] {p} [/INST]", a)),
    "words of a prompt format": Fault(
        "prompt_formats", lambda p, a: pair(f"### Instruction:\n{p}\n\n### Response:", a)
    ),
    "a variable that was not filled in": Fault(
        "variables", lambda p, a: pair("Answer the question: {{ question }}", a)
    ),
    "another such variable": Fault("variables", lambda p, a: pair(f"{p} ${{input}}", a)),
    "text escaped twice": Fault("double_entities", lambda p, a: pair(p, f"{a} if x &amp;lt; 3")),
    "a key of AWS": Fault(
        "secrets", lambda p, a: pair(p, f"{a} AKIA{letters(16, 'ABCDEFGHIJKLMNOPQRSTUVWXYZ234567')}")
    ),
    "a token of GitHub": Fault("secrets", lambda p, a: pair(f"{p} {checksummed('ghp_')}", a)),
    "a private key": Fault("secrets", lambda p, a: pair(p, f"{a}\n{KEY}")),
    "a JSON Web Token": Fault("secrets", lambda p, a: pair(p, f"{a} {token()}")),
    "a key of OpenAI": Fault("secrets", lambda p, a: pair(p, f"{a} sk-proj-{letters(60)}T3BlbkFJ{letters(61)}")),
    "a token of Slack": Fault("secrets", lambda p, a: pair(p, f"{a} xoxb-{letters(12, '0123456789')}-{letters(24)}")),
    "a password in an address": Fault(
        "secrets", lambda p, a: pair(p, f"{a} postgres://bob:{letters(18)}@db.internal/x")
    ),
    "a call of a tool that is not there": Fault("tools", lambda p, a: calling(p, a, "forecast", "call_1")),
    "a result without a call": Fault("tools", lambda p, a: calling(p, a, "weather", "call_7")),
}


class Planted(NamedTuple):
    train: list[str]
    """Lines."""
    holdout: list[str]
    expected: dict[str, tuple[str, int]]
    """A fault's name -> the check that has to name it, and the row, counted through both files."""


def planted(rows: list[tuple[str, str]], held_out: list[tuple[str, str]]) -> Planted:
    """Each fault in a row of its own; `rows` has more rows than there are faults."""
    train, holdout = [line(pair(*row)) for row in rows], [line(pair(*row)) for row in held_out]
    places: dict[str, tuple[str, str, int]] = {}
    for number, (name, fault) in enumerate(FAULTS.items()):
        prompt, answer = rows[number]
        if fault.way == "near":  # long enough that a word more is little
            answer = f"{answer} {LONG} {LONG}"
            train[number] = line(pair(prompt, answer))
            prompt, answer = rows[number]
        made = line(fault.change(prompt, answer))
        if fault.way == "edit":
            train[number] = made
            places[name] = (fault.check, "train", number)
        else:
            side = holdout if fault.way == "holdout" else train
            places[name] = (fault.check, "holdout" if side is holdout else "train", len(side))
            side.append(made)
    expected = {
        name: (check, place + (len(train) if side == "holdout" else 0)) for name, (check, side, place) in places.items()
    }
    return Planted(train, holdout, expected)


def line(row: object) -> str:
    return row if isinstance(row, str) else json.dumps(row)


def differences(problems: list[dict[str, object]], expected: dict[str, tuple[str, int]]) -> list[str]:
    """Planted faults that were not found by their check, and findings in rows without a fault."""
    found = {(problem["check"], problem["row"]) for problem in problems}
    lines = [
        f"not found: {name} ({check}, row {row})"
        for name, (check, row) in expected.items()
        if (check, row) not in found
    ]
    faulty = {row for _, row in expected.values()}
    return lines + [
        f"invented: {problem['check']}: {problem['where']}: {problem['message']}"
        for problem in problems
        if problem["row"] not in faulty
    ]


def docstrings(folder: Path) -> Iterator[tuple[str, str]]:
    paths = [path for path in sorted(folder.rglob("*.py")) if not SKIPPED & {*path.relative_to(folder).parts}]
    random.Random(0).shuffle(paths)
    for path in paths[:MOST_FILES]:
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield f"What is {path.stem}.{node.name} for?", text


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Paragraphs of documents, without licences, which are the same everywhere."""
    paths = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and re.search(r"README|NEWS|\.txt|\.md", path.name)
    ]
    random.Random(0).shuffle(paths)
    for path in paths[:MOST_FILES]:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            continue
        for number, paragraph in enumerate(text.split("\n\n")):
            yield f"What does part {number} of {path.parent.name}/{path.name} say?", paragraph.strip()


def clean(rows: Iterator[tuple[str, str]], most: int) -> list[tuple[str, str]]:
    """Rows of 60 to 1200 characters, drawn evenly, without those that are nearly another one: all pairs are compared.

    Rows that may spell a control token of the base are no clean ones: training refuses them.
    """
    fit = [row for row in rows if 60 <= len(row[1]) <= 1200 and not CONTROL.search(row[1])]
    random.Random(0).shuffle(fit)
    kept: list[tuple[str, str]] = []
    sets: list[frozenset[tuple[str, ...]]] = []
    prompts = set()
    for prompt, answer in fit:
        words = answer.lower().split()
        threes = frozenset(zip(words, words[1:], words[2:], strict=False))
        if len(threes) < 5 or prompt in prompts:
            continue
        if all(len(threes & other) <= ALIKE * len(threes | other) for other in sets):
            kept.append((prompt, answer))
            sets.append(threes)
            prompts.add(prompt)
        if len(kept) == most:
            break
    return kept


CORPORA: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "the standard library": lambda: docstrings(Path(sysconfig.get_paths()["stdlib"])),
    "documents of Debian": lambda: documents(Path("/usr/share/doc")),
    "installed packages": lambda: docstrings(Path(sysconfig.get_paths()["purelib"])),
}


def problems_of(folder: Path, train: list[str], holdout: list[str]) -> list[dict[str, object]]:
    from finetune.debug.rows.check import check
    from finetune.recipe.load import load

    for name, lines in (("train", train), ("holdout", holdout)):
        (folder / f"{name}.jsonl").write_text("".join(f"{each}\n" for each in lines))
    recipe = folder / "recipe.yaml"
    sources = {name: [{"path": str(folder / f"{name}.jsonl")}] for name in ("train", "holdout")}
    quickstart = Path(__file__).parents[1] / "recipes/smollm2-135m/quickstart.yaml"
    overrides = [
        "task.max_length=2048",
        f"data.train={json.dumps(sources['train'])}",
        f"data.holdout={json.dumps(sources['holdout'])}",
    ]
    recipe.write_text(quickstart.read_text())
    return check(load(recipe, overrides))["problems"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1500, help="rows of each corpus")
    parser.add_argument("--keep", type=Path, help="a directory for the files")
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, read) in enumerate(CORPORA.items()):
            folder = (given.keep or Path(temporary)) / str(number)
            folder.mkdir(parents=True, exist_ok=True)
            rows = clean(read(), given.rows)
            train, held_out = rows[len(rows) // 10 :], rows[: len(rows) // 10]
            invented = differences(
                problems_of(folder, [line(pair(*row)) for row in train], [line(pair(*row)) for row in held_out]), {}
            )
            faults = planted(train, held_out)
            wrong_ones = differences(problems_of(folder, faults.train, faults.holdout), faults.expected)
            print(
                f"{name}: {len(rows)} rows, {len(invented)} findings in clean ones, {len(FAULTS)} faults, {len(wrong_ones)} differences"
            )
            print("\n".join(f"  {each}" for each in [*invented, *wrong_ones]), flush=True)
            failed += len(invented) + len(wrong_ones)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
