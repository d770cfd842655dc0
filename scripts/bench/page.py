"""The benchmarks as a page: `docs/benchmarks.md`, from the reports of one or several sessions."""

import textwrap
from statistics import median

import comparison
from cells import parse
from figures import SCALES, Goal

GIB = 2**30
INTRODUCTION = """# Benchmarks

Read here how fast finetune trains, beside the tools you would use instead. We gave all of them the
same rows with the same tokens an update, in turns on one machine.
`scripts/bench/throughput.py --write docs/benchmarks.md --from REPORT…` writes this page; we entered
nothing by hand. To measure your own machine, run the command you find above each table. You find
the cost of a save in [checkpoints.md](checkpoints.md#what-a-save-costs).
"""
RULES = """## What is compared

**The training.** We train SmolLM2-135M-Instruct (134,515,008 parameters, the quickstart's base),
every token supervised, with fused AdamW at a constant learning rate, clipping at 1.0, and no
accumulation. bf16 is autocast over fp32 weights. An update has four rows of source text of Python's
standard library, 900 to 1,024 tokens. Every contestant trains on the same rows in the same step,
and starts with the same weights and adapters (rank 16 beside all linear layers).

**The runs.** Each run is a separate process. Runs of all contestants alternate, in another order
each round. All have the same threads and the same malloc settings. So you can compare figures
within a table. Do not compare them across tables: the machine's speed changes between sessions.

**The figures.**

- You see tokens without padding, counted from the end of the second step to the end of the last. So
  everything between steps counts.
- Ratios are medians over rounds of the ratio within a round, with the spread.
- MFU counts the matrix products with weights (6 N a token; LoRA 4 N and 6 of the adapter's). It
  compares them with the best 2,048-square matrix product of the session.
- `malloc plain` in a cell means: we set nothing from outside. finetune sets glibc's malloc itself
  when you train on a CPU. So this cell shows you the worth of that alone; the other contestants do
  not have it.
- Memory is the peak resident memory of the process, without the staging buffers of saves.
  `ready for a save` has those.

| contestant | settings, and reasons |
|---|---|
| bare loop, padded | written by hand, rows filled up to the longest, no mask (a causal model needs none) |
| bare loop, packed | rows best-fit into sequences of the cell's length, positions restart, block-diagonal mask of transformers |
| bare, packed, chunked loss | the same; logits of 512 tokens at a time, each chunk differentiated at once, nothing computed twice |
| the same, attention per row | one sequence, attention computed row by row |
| Trainer | transformers' collator, padded to the longest; `optim=adamw_torch_fused`, `bf16`, no logging, no saving, no evaluation |
| SFTTrainer, padded | TRL's collator; gradient checkpointing, on by default in TRL, as the cell says; its chunked log-probabilities and metrics stay |
| SFTTrainer, packed | TRL's `pack_dataset` (`bfd`), set to pack the rows of one step together, and its padding-free collator |
| finetune | `finetune train` with the same numbers in the recipe, else defaults: journal and row losses included; the final commit counts for memory, after the last step |

In a cell you see only the contestants we ran in it. With activation checkpointing, Trainer also
computes the gradient of the embeddings' output under LoRA, as its documentation says. finetune and
the bare loops do not.

finetune and the bare loops store the frozen weights of LoRA in bf16, as autocast casts them: the
same bits. We give Trainer and SFTTrainer the model in fp32, from
`from_pretrained(dtype=float32)`. If you load it in bf16, they compute another loss.
"""

REMAINS = """## What remains above the bare loop

In both profiles you see half of the time in products with weights, and a quarter in attention.
finetune alone adds little: the norm of the gradients by dot products (`aten::dot`), the losses of
rows as one stacked sum (`aten::stack`, `aten::cat`), seeds and collation, and a line in the
journal. You see all of it as the tenths of a millisecond of *overhead* above.

You find the casts of autocast (`aten::copy_`) in both: it casts weights once a step. The loss is
cheaper than the bare loop's. finetune makes the gradient of a chunk of logits from its
log-probabilities in place, and autograd keeps both. Clipping is one multiplication inside the fused
update.

You see longer starts in the cells than in *start*: we measured *start* later. By then finetune
imported without the garbage collector, and the cache kept the findings about a base (packing keeps
its rows apart, the needs of its loss). We ran *start* beside other work, at a higher priority.
"""


def whole(reports: list[dict], titles: dict[str, str]) -> str:
    """The page. Reports of several sessions stand one after the other."""
    sections = [INTRODUCTION, summary(reports), RULES]
    for report in reports:
        if report.get("runs"):
            sections += [conditions(report), throughput(report, titles)]
    for report in reports:
        for name, part in report["parts"].items():
            body = operators(part) if isinstance(part, list) else quantities(part)
            sections.append(f"## {name[0].upper()}{name[1:]}\n\n{body}")
    if any("profile" in name for report in reports for name in report["parts"]):
        sections.append(REMAINS)
    return "\n".join(section.rstrip() + "\n" for section in sections)


def summary(reports: list[dict]) -> str:
    """A line for each cell as often as it was measured with all contestants of the first one: the ratios that were promised, and in bold
    those that were missed."""
    columns, lines = None, []
    for report in reports:
        for key in comparison.keys_of(report.get("runs", [])):
            judged = comparison.goals_of(comparison.by_contestant(report["runs"], key), parse(key[0]))
            names = [goal.name for goal, _ in judged]
            columns = columns or names
            if names != columns:  # a check among a few
                continue
            shown = [f"{goal.value:.2f}" if goal.is_reached else f"**{goal.value:.2f}**" for goal, _ in judged]
            rounds = 1 + max(run["round"] for run in report["runs"])
            name = key[0] if key[1] == "tuned" else f"{key[0]}, malloc {key[1]}"
            lines.append(f"| {name} | {' | '.join(shown)} | {rounds} |")
    if not columns:
        return ""
    head = [f"| cell | {' | '.join(columns)} | rounds |", "|---" * (len(columns) + 2) + "|"]
    last = "\nBold figures miss their goal. Each cell has its table, its goals and its spread below.\n"
    return "\n".join(["## Summary\n", *head, *lines, last])


def conditions(report: dict) -> str:
    machine, runs = report["machine"], report["runs"]
    versions = machine["versions"] | next((run["versions"] for run in runs if run.get("versions")), {})
    peaks = {name: _spread([run["matmul"][name] for run in runs], 0) for name in ("bf16", "fp32")}
    others = [run["others_busy_cores"] for run in runs]
    return "\n".join(
        [
            "## On this machine\n",
            _wrapped(
                f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / GIB:.0f} GiB, no GPU; Linux {machine['kernel']}; "
                f"Python {machine['python']}; {', '.join(f'{name} {number}' for name, number in versions.items())}; "
                f"{machine['threads']} threads. Matrix product, GFLOP/s, before each run: bf16 {peaks['bf16']}, fp32 {peaks['fp32']}. "
                f"Other processes kept {_spread(others, 2)} cores busy."
            )
            + "\n",
            f"```text\npython scripts/bench/throughput.py {report['command']}\n```",
        ]
    )


def throughput(report: dict, titles: dict[str, str]) -> str:
    """A table a cell."""
    runs, lines = report["runs"], []
    peaks = {name: max(run["matmul"][name] for run in runs) for name in ("bf16", "fp32")}
    for key in comparison.keys_of(runs):
        cell, contestants = parse(key[0]), comparison.by_contestant(runs, key)
        rows = report["rows"][cell.name]
        differences = comparison.loss_differences(contestants)
        lines += [
            f"\n### {cell.name}, malloc {key[1]}\n",
            _wrapped(
                f"{rows['rows']} rows, median {rows['median']:.0f}, ninth decile {rows['ninth_decile']}, longest {rows['longest']} tokens; "
                f"{rows['tokens_of_update']:.0f} tokens an update, {rows['share_of_padded_positions']:.0%} of the positions when padded."
            )
            + "\n",
            "| contestant | tokens/s | MFU | peak GiB | ready for a save, GiB | start to first step, s | loss differs by |",
            "|---|---|---|---|---|---|---|",
        ]
        for name in [name for name in titles if name in contestants]:
            mine = contestants[name]
            shares = [comparison.mfu(cell, run, peaks[cell.precision]) for run in mine]
            columns = [
                titles[name],
                _spread([comparison.tokens_per_second(run) for run in mine], 0),
                f"{median(shares):.2f}",
                _spread([comparison.peak_bytes(run) / GIB for run in mine], 2),
                f"{median(run['staged_bytes'] for run in mine) / GIB:.2f}",
                _spread([comparison.first_step_seconds(run) for run in mine], 1),
                f"{differences[name]:.1g}" if name in differences else "",
            ]
            lines.append(f"| {' | '.join(columns)} |")
        judged = comparison.goals_of(contestants, cell)
        lines += ["", *(_wrapped(f"{line(goal)}; rounds: {_spread(found, 2)}", "  ") for goal, found in judged)]
    return "\n".join(lines)


def run_line(run: dict) -> str:
    """A run, for the terminal."""
    return (
        f"{comparison.tokens_per_second(run):7.1f} tokens/s {comparison.peak_bytes(run) / GIB:6.2f} GiB "
        f"{comparison.first_step_seconds(run):6.1f} s to the first step, others {run['others_busy_cores']:.2f}"
    )


def line(goal: Goal) -> str:
    return f"- {' '.join(goal.show().split())}"


def quantities(part: dict) -> str:
    """A part with samples: a table for each of its quantities."""
    lines = []
    for quantity in part["quantities"]:
        unit = quantity["shown_in"]
        lines += [f"{quantity['title']} ({unit}):\n", "| | median | min | max | samples |", "|---|---|---|---|---|"]
        for name, row in quantity["contestants"].items():
            figures = [row["median"], min(row["samples"]), max(row["samples"])]
            shown = [f"{figure * SCALES[unit]:.3g}" for figure in figures]
            lines.append(f"| {' | '.join([name.strip(), *shown, str(row['count'])])} |")
        lines.append("")
    lines += [f"- {name}: {value}" for name, value in part["facts"].items()]
    fields = ("name", "value", "limit", "unit", "is_floor")
    lines += [line(Goal(**{field: goal[field] for field in fields})) for goal in part["goals"]]
    return "\n".join(lines)


def operators(found: list[dict]) -> str:
    """A profiled step."""
    total = sum(operator["seconds"] for operator in found)
    lines = [
        f"{total:.2f} seconds of CPU time in operators.\n",
        "| operator | share | seconds | calls |",
        "|---|---|---|---|",
    ]
    for operator in found:
        name, share = operator["name"].replace("|", "\\|"), f"{operator['share']:.1%}"
        lines.append(f"| `{name}` | {share} | {operator['seconds']:.3f} | {operator['calls']} |")
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _spread(samples: list[float], digits: int) -> str:
    middle, least, most = (f"{figure:.{digits}f}" for figure in (median(samples), min(samples), max(samples)))
    return middle if least == most else f"{middle} ({least}..{most})"
