"""Checks who may publish where, and who would see it. Ask before a training, before an upload, and right before a commit."""

import sys
from typing import Any

from finetune.errors import PublishError
from finetune.package.publish.repository import Repository, UnreachableError
from finetune.package.publish.shown import Visibility
from finetune.recipe.schema import Recipe
from finetune.store.checkpoints.refs import parse


def preflight(recipe: Recipe) -> None:
    """Checks that the recipe's `publish` section can work: token, rights, visibility, and whether the base may go there.

    Raises PublishError if not. If the Hub is out of reach, one line on stderr says that this is unknown.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if recipe.publish is None:
        return
    asked, base = recipe.publish, parse(recipe.base.checkpoint)
    reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else None
    try:
        if reason is None:
            repository = Repository(asked.repo)
            refuse_no_right(repository.whoami(), asked.repo)
            refuse_visible(repository, asked.private, base.repo if base.kind == "hub" else None)
    except UnreachableError as error:
        reason = error.message
    if reason:
        print(f"not known whether {asked.repo} can be published to: {reason}", file=sys.stderr, flush=True)


def refuse_no_right(user: dict[str, Any], name: str) -> None:
    """Raises PublishError if the Hub's `whoami` shows that a token may not write to a repository."""
    token = user.get("auth", {}).get("accessToken") or {}
    owner, organisations = name.partition("/")[0], {one["name"]: one for one in user.get("orgs", [])}
    why = None
    if token.get("role") == "read":
        why = f"the token of {user['name']} only reads"
    elif owner not in (user["name"], *organisations):
        why = f"{user['name']} is not of {owner}"
    elif organisations.get(owner, {}).get("roleInOrg") == "read":
        why = f"{user['name']} only reads in {owner}"
    elif token.get("role") == "fineGrained" and not _is_granted(token, owner, name):
        why = f"the token of {user['name']} is not granted write access to it"
    if why:
        hint = "use a token that may write there, or remove `publish` and publish by hand"
        raise PublishError(f"cannot be published to: {why}", where=name, hint=hint)


def _is_granted(token: dict[str, Any], owner: str, name: str) -> bool:
    """Whether a fine-grained token may write to a repository; True if it does not say."""
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if scopes is None:
        return True  # unknown
    names = [scope for scope in scopes if scope.get("entity", {}).get("name") in (owner, name)]
    return any("repo.write" in scope.get("permissions", ()) for scope in names)


def refuse_visible(repository: Repository, is_private: bool, base: str | None) -> Visibility | None:
    """The Hub's facts of a repository (None: it is not there). Raises PublishError if too many people could see the package.

    `base` is the Hub checkpoint under the package: a gated one must not become public.
    """
    there = repository.facts()
    if is_private:
        repository.refuse_public(there)
    is_open = not is_private if there is None else not (there["private"] or there["gated"])
    if base and is_open and (of_base := Repository(base).facts()) and of_base["gated"]:
        hint = "publish it privately, or make the repository yourself and gate it as the base is"
        raise PublishError(
            f"would be open to everybody, and its base {base} is gated", where=repository.name, hint=hint
        )
    return there
