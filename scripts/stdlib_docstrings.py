"""Writes the quickstart's data: functions of the running interpreter's standard library, and their docstrings, as chat rows.

`python scripts/stdlib_docstrings.py DIR` writes DIR/train.jsonl and DIR/holdout.jsonl; the same interpreter gives the same bytes.
Modules are parsed, never imported. Train and held-out rows come from different modules and share no code and no answer.
"""

import ast
import hashlib
import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION = "Write the docstring of this Python function, in one sentence."
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "turtledemo", "site-packages"}
LONGEST_CODE = 1000  # characters; about 350 tokens, so that the answer is not cut off at 512
HOLDOUT_SHARE = 0.1  # of all rows; the held-out modules have about this many ...
HOLDOUT_ROWS = 120  # ... and this many of them are written: enough to compare models, quick to evaluate on two cores
MOST_EQUAL_ANSWERS = 2

# The first words of a clean answer: it says what the function does ("Return ..."), not what it is ("A helper ...").
VERBS = """
Accept Acquire Activate Add Adjust Allow Append Arrange Assert Bind Block Build Calculate Call Cancel Change Check Choose Clean
Clear Close Collect Combine Compare Compile Compress Compute Configure Connect Construct Convert Copy Create Customize Debug
Decide Decode Decompress Define Delegate Delete Destroy Determine Disable Disassemble Discard Display Divide Draw Dump Encode
Ensure Escape Execute Expand Extract Fail Fetch Fill Find Finish Flush Format Generate Get Guess Handle Identify Import Indent
Indicate Initialize Insert Inspect Install Instantiate Interpret Invert Invoke Iterate Load Locate Make Mark Modify Move
Normalize Open Override Parse Perform Place Pop Prepare Print Process Produce Provide Push Put Query Quote Raise Read Receive
Register Release Remove Rename Replace Report Represent Request Reset Resolve Restore Retrieve Return Round Run Scan Schedule
Search Select Send Separate Serialize Serve Set Shift Show Signal Skip Specify Split Start Stop Store Strip Subtract Take Test
Transform Translate Truncate Try Turn Unbind Unlock Unset Update Use Validate Verify Wait Wake Walk Wrap Write Yield
"""
IMPERATIVES = frozenset(VERBS.split())

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(node: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, Function]]:
    """The functions of a module, and the methods of its classes, with their dotted names."""
    for child in node.body:
        if isinstance(child, Function):
            yield f"{name}.{child.name}", child
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{name}.{child.name}")


def answer_of(docstring: str) -> str | None:
    """The first paragraph on one line, if it is a single imperative sentence of 20 to 300 characters."""
    answer = " ".join(docstring.split("\n\n")[0].split())
    is_one_sentence = answer.endswith(".") and not re.search(r"[.:;!?] [A-Z]|>>>|XXX|:param", answer)
    return answer if is_one_sentence and 20 <= len(answer) <= 300 and answer.split()[0] in IMPERATIVES else None


def does_something(body: list[ast.stmt]) -> bool:
    """Whether code without its docstring is more than `pass`, `...` or a refusal: otherwise there is nothing to describe."""
    return not all(isinstance(node, ast.Pass | ast.Raise) or ast.unparse(node) == "..." for node in body)


def rows_of(library: Path) -> Iterator[dict]:
    """One chat row for each function with a usable docstring, in the order of the files; no two have the same body."""
    bodies: set[str] = set()
    answers: Counter[str] = Counter()
    for path in sorted(library.rglob("*.py")):
        place = path.parent if path.name == "__init__.py" else path.with_suffix("")
        parts = place.relative_to(library).parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        for source, function in functions(ast.parse(path.read_bytes()), ".".join(parts)):
            answer = answer_of(ast.get_docstring(function) or "")
            function.body = function.body[1:]  # without the docstring
            if answer is None or answers[answer] == MOST_EQUAL_ANSWERS or not does_something(function.body):
                continue
            code, body = ast.unparse(function), ast.unparse(ast.Module(function.body, type_ignores=[]))
            if len(code) > LONGEST_CODE or body in bodies:
                continue
            bodies.add(body)
            answers[answer] += 1
            prompt = {"role": "user", "content": f"{INSTRUCTION}\n\n{code}"}
            yield {"messages": [prompt, {"role": "assistant", "content": answer}], "source": source}


def top_level(row: dict) -> str:
    return row["source"].split(".")[0]


def held_out_modules(rows: list[dict]) -> set[str]:
    """Modules in the order of their hashes until they have enough rows; none has over a quarter of them, so they are many."""
    sizes = Counter(map(top_level, rows))
    enough = HOLDOUT_SHARE * len(rows)
    modules: set[str] = set()
    for module in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sum(sizes[name] for name in modules) < enough and sizes[module] <= enough / 4:
            modules.add(module)
    return modules


def split(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """Training and held-out rows; an answer on both sides is removed from the training rows."""
    modules = held_out_modules(rows)
    held_out = [row for row in rows if top_level(row) in modules]
    answers = {row["messages"][1]["content"] for row in held_out}
    train = [row for row in rows if top_level(row) not in modules and row["messages"][1]["content"] not in answers]
    count = min(HOLDOUT_ROWS, len(held_out))
    return train, [held_out[index * len(held_out) // count] for index in range(count)]


def main(folder: Path) -> None:
    train, holdout = split(list(rows_of(Path(sysconfig.get_path("stdlib")))))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("holdout", holdout)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/stdlib_docstrings.py DIR")
    main(Path(sys.argv[1]))
