"""The model card: content, origin and figures of a package (https://huggingface.co/docs/hub/model-cards).

A pure function of the run's record: it must hold no clock, no path, no host, no row.
"""

import re

from finetune.package.card import figures, record, reported
from finetune.package.card.facts import Facts, hub_base, lies_on, method
from finetune.package.card.metadata import FrontMatter
from finetune.package.card.notes import NOTES_BEGIN, NOTES_END, marked
from finetune.plan.plan import Parent, PinnedSource, Plan
from finetune.recipe.load import to_yaml
from finetune.recipe.schema import Source
from finetune.store.checkpoints.manifest import Manifest
from finetune.store.run.records import MemberRecord

LIMITS = (
    "Checked is that these are the weights that were trained, and how they predict held-out rows of the same kind. Not checked: other tasks, "
    "other languages, what it knows, whether it is safe or fair, and what the base brought with it."
)
SEEN = "Held-out figures are better on such rows than on new ones."


def card(facts: Facts) -> str:
    """The whole README.md."""
    parts = [
        f"---\n{to_yaml(_front_matter(facts))}---",
        f"# {_title(facts.plan)}",
        _summary(facts),
        "## Figures",
        figures.shown(facts.figures, facts.manifest.step, facts.plan.recipe.task.figures),
        *reported.warned(facts.plan, facts.report is not None),
        *(f"**{record.public_line(item.told(facts.rows))}.** {SEEN}" for item in facts.seen),
        "![Training and held-out loss over steps](training/loss.png)",
        "Every step and evaluation: [training/journal.jsonl](training/journal.jsonl).",
        "## How to use it",
        _usage(facts),
        "## How it was made",
        _recipe(facts),
        "## Checks",
        "Made when the package was written; without every one of them there would be no package.",
        figures.table(("check", "found"), [(check["name"], check["message"]) for check in facts.checks]),
        "## Lineage",
        _lineage(facts),
        "## Limits",
        _limits(facts),
        "## Facts for those who have to document it",
        "What is known of data and compute; no legal advice.",
        _facts(facts),
        f"{NOTES_BEGIN}\n{NOTES_END}",
    ]
    return marked("\n\n".join(parts) + "\n")


def _front_matter(facts: Facts) -> FrontMatter:
    recipe, hub = facts.plan.recipe, hub_base(facts.plan)
    datasets = list(dict.fromkeys(source.dataset for source in recipe.data.train if source.dataset))
    is_adapter = facts.form == "adapter"
    return {
        **(facts.licence or {}),
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": recipe.task.pipeline_tag,
        **({"base_model": hub[0], "base_model_relation": "adapter" if is_adapter else "finetune"} if hub else {}),
        **({"datasets": datasets} if datasets else {}),
        **(
            {"model-index": index}
            if (index := figures.model_index(facts.figures, facts.manifest.step, _title(facts.plan), recipe.task))
            else {}
        ),
        "tags": [
            "finetune",
            *(recipe.adapter.tags if recipe.adapter else []),
            *recipe.task.tags,
        ],
    }


def _title(plan: Plan) -> str:
    if plan.recipe.publish:
        return plan.recipe.publish.repo.partition("/")[2]
    hub = hub_base(plan)
    base = hub[0] if hub else record.public_name(plan.recipe.base.checkpoint)
    return f"{base.rpartition('/')[2].removesuffix('.gguf')}, fine-tuned"


def _summary(facts: Facts) -> str:
    plan, step = facts.plan, facts.manifest.step
    what = name if (name := figures.named(facts.figures, step)).startswith("step") else f"the {name}"
    form = f"the adapter alone, {facts.dtype}" if facts.form == "adapter" else f"whole weights, {facts.dtype}"
    if facts.form == "merged" and plan.recipe.is_adapted:
        form += ", the adapter merged in"
    lines = [
        f"A language model made by {method(plan)} of {_base(plan)}; this is {what} of {plan.steps} ({form}).",
        "It was trained on:\n\n" + "\n".join(map(_source, plan.recipe.data.train, plan.train, facts.data_licences)),
        f"{figures.number(plan.counts.examples)} examples, {figures.number(plan.counts.tokens)} tokens, of them "
        f"{figures.number(plan.counts.supervised_tokens)} with a loss.",
    ]
    if plan.recipe.base.origin and plan.base.kind != "hub":
        lines.append(f"The base was a local checkpoint that the recipe declares equal to `{plan.recipe.base.origin}`.")
    if under := lies_on(plan):
        is_stored = plan.base.stored and facts.form == "adapter"
        about = "" if is_stored else ": the numbers that the quantized files stand for, not the files themselves"
        lines.append(f"It lies on {under}{about}.")
    if facts.licence is None:
        lines.append(
            "The licence is not known: the base does not state one. Ask its authors before you pass this model on."
        )
    return "\n\n".join(lines)


def _limits(facts: Facts) -> str:
    lines = [LIMITS]
    counts = facts.plan.counts
    if counts.cut_rows:
        lines.append(
            f"Rows longer than {facts.plan.recipe.task.max_length} tokens were cut: {figures.number(counts.cut_rows)} of them."
        )
    if counts.left_out_rows:
        lines.append(
            f"{figures.number(counts.left_out_rows)} rows were left out, since nothing that counts was within that length."
        )
    if counts.bad_rows:
        lines.append(f"{figures.number(counts.bad_rows)} rows were skipped, since they could not be read.")
    return "\n\n".join(lines)


def _facts(facts: Facts) -> str:
    plan = facts.plan
    rows = figures.cost(facts.figures, plan, facts.manifest.world.get("world_size", 1))
    for source, pinned, stated in zip(plan.recipe.data.train, plan.train, facts.data_licences, strict=True):
        name = f"{source.dataset} at `{pinned.revision}`" if source.dataset else f"`{record.public_name(pinned.name)}`"
        told = f"{name}, {figures.number(pinned.rows)} rows, licence {stated or 'not stated'}"
        rows.append(("training data", f"{told}, content `{pinned.fingerprint}`"))
    rows.append(("licence of the base", facts.base_licence or "not stated by the base"))
    return figures.table(("", ""), rows)


def _base(plan: Plan) -> str:
    hub, settings = hub_base(plan), plan.recipe.base
    if settings.random_weights is not None:
        at = f" at revision `{plan.base.revision}`" if plan.base.revision else f" (`{plan.base.digest}`)"
        like = f"the config of `{record.public_name(settings.checkpoint)}`{at}"
        return f"random weights, drawn with the seed {settings.random_weights} for {like}"
    if hub:
        return f"[{hub[0]}](https://huggingface.co/{hub[0]})" + (f" at revision `{hub[1]}`" if hub[1] else "")
    return f"the local checkpoint `{record.public_name(plan.recipe.base.checkpoint)}` (`{plan.base.digest}`)"


def _source(source: Source, pinned: PinnedSource, licence: str | None) -> str:
    if source.dataset:
        place = f"[{source.dataset}](https://huggingface.co/datasets/{source.dataset}) at revision `{pinned.revision}`"
        place += f", split `{source.split or 'train'}`"
    else:
        place = f"`{record.public_name(pinned.name)}`"
    weight = f", weight {source.weight:g}" if isinstance(source.weight, float) else ""
    weight += f", weights {' then '.join(f'{each:g}' for each in source.stage_weights)}" if source.stage_weights else ""
    weight += f", {source.epochs:g} times an epoch" if source.epochs else ""
    stated = f", licence {licence or 'not stated by its card'}" if source.dataset else ""
    return f"- {place}: {figures.number(pinned.rows)} rows{weight}{stated}, content `{pinned.fingerprint}`"


def _usage(facts: Facts) -> str:
    repo = facts.plan.recipe.publish.repo if facts.plan.recipe.publish else "path/to/this/folder"
    task = facts.plan.recipe.task
    made = f'generate = pipeline("{task.pipeline_tag}", model'
    if facts.form == "merged":
        lines = ["from transformers import pipeline", "", f'{made}="{repo}")']
    else:
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer, pipeline",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{repo}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
            f"{made}=model, tokenizer=tokenizer)",
        ]
    return "\n".join(
        ["```python", *lines, f'print(generate({task.prompt}, max_new_tokens=128)[0]["generated_text"])', "```"]
    )


def _recipe(facts: Facts) -> str:
    world = facts.manifest.world
    environment = [(name, version) for name, version in facts.manifest.versions.items()]
    environment += [(name.replace("_", " "), str(value)) for name, value in world.items()]
    return "\n\n".join(
        [
            f"```console\n{_commands(facts)}\n```",
            "with [training/recipe.yaml](training/recipe.yaml); files are named without their folders:",
            f"```yaml\n{record.recipe(facts.plan)}```",
            *_beginning(facts.plan),
            "Environment of the training:",
            figures.table(("", ""), environment),
        ]
    )


def _commands(facts: Facts) -> str:
    train, step = "finetune train training/recipe.yaml --run runs/again\n", facts.manifest.step
    if facts.manifest.kind == "average":
        made = f"{_members(facts.manifest)} {facts.manifest.method}".rstrip()
        return f"{train}finetune average {made} --output runs/again/averages/it\nfinetune package runs/again/averages/it again"
    others = "".join(f" --average {other.step}" for other in facts.averaged)
    return f"{train}finetune package runs/again@{step} again{others}"


def _members(manifest: Manifest) -> str:
    """The refs of an average, as a command has them: of a window, and of the last commits, the last one."""
    of_run = manifest.parent["ref"].rpartition("@")[0] if manifest.parent else ""
    refs = [each["ref"] for each in manifest.members]
    if "--with-base" in manifest.method:
        refs = refs[1:]
    refs = refs[-1:] if re.search("--(like|last) ", manifest.method) else refs
    return " ".join(f"runs/again{ref.removeprefix(of_run)}" if ref.startswith(f"{of_run}@") else ref for ref in refs)


def _beginning(plan: Plan) -> list[str]:
    """For a branch: the recipe holds only from a step on."""
    if not plan.parent or not plan.parent.step:
        return []
    ref = plan.parent.ref
    text = f"The training branched off `{ref}`: up to that step the recipe of that run holds, and these commands train all steps by this one."
    return [text + " `finetune branch` of that checkpoint gives the same weights."]


def _lineage(facts: Facts) -> str:
    manifest, parent = facts.manifest, facts.manifest.parent
    rows = [
        ("base", _base(facts.plan)),
        ("plan", f"`{manifest.plan_id}`"),
        ("run", f"`{manifest.run}`"),
        ("checkpoint", f"{figures.named(facts.figures, manifest.step)}, manifest `{manifest.digest}`"),
        *((f"averaged with step {other.step}", f"manifest `{other.digest}`") for other in facts.averaged),
        *((f"averaged with weight {each['weight']:.6g}", _member(each)) for each in manifest.members),
        *([("branched from", _branch(facts.plan.parent))] if facts.plan.parent else []),
        ("checkpoint before it", f"`{parent['ref']}`, manifest `{parent['digest']}`" if parent else "none"),
    ]
    return figures.table(("", ""), rows)


def _member(member: MemberRecord) -> str:
    return f"`{member['ref']}`" + (f", `{member['digest']}`" if member["digest"] else ", made by replay")


def _branch(parent: Parent) -> str:
    digest = f", manifest `{parent.digest}`" if parent.digest else ""
    changes = "; ".join(record.public_line(line) for line in parent.changes)
    return f"`{parent.ref}`{digest}" + (f", with {changes}" if changes else "")
