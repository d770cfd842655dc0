"""What the Hub answers to those who write: names and rights, uploads, commits with a parent guard, branches and tags.

Every change is one step under the Hub's lock: a request that fails, or never comes, leaves the tree that was there.
"""

import base64
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from ruamel.yaml import YAML, YAMLError

from tests.hub.answers import Answer, Refused, Request, as_json
from tests.hub.repos import File, MissingError, Repo, is_lfs

if TYPE_CHECKING:
    from tests.hub.server import Hub

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class User:
    """Whom a token belongs to, and what it allows."""

    name: str
    role: Literal["read", "write"] = "write"
    organisations: tuple[str, ...] = field(default=())

    def may_write(self, repo: str) -> bool:
        return self.role == "write" and repo.partition("/")[0] in (self.name, *self.organisations)


def user_of(hub: "Hub", request: Request) -> User:
    user = hub.users.get(request.token or "")
    if user is None:
        raise Refused(401, "Unauthorized", "Invalid credentials in Authorization header")
    return user


def writable(hub: "Hub", request: Request, kind: str, name: str) -> Repo:
    user = user_of(hub, request)
    repo = hub.repo(request, kind, name)
    if not user.may_write(name):
        raise Refused(403, "Forbidden", f"You have no write access to {name}")
    return repo


def whoami(hub: "Hub", request: Request) -> Answer:
    user = user_of(hub, request)
    token = {"displayName": "a token", "role": user.role}
    facts = {
        "type": "user",
        "name": user.name,
        "fullname": user.name,
        "orgs": [{"name": n} for n in user.organisations],
    }
    return as_json(facts | {"auth": {"type": "access_token", "accessToken": token}})


def create(hub: "Hub", request: Request) -> Answer:
    asked = json.loads(request.body)
    user, kind = user_of(hub, request), asked.get("type") or "model"
    name = f"{asked.get('organization') or user.name}/{asked['name']}"
    if not user.may_write(name):
        raise Refused(403, "Forbidden", f"You have no right to create {name}")
    is_there = (kind, name) in hub.repos
    if not is_there:
        is_private = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.add(kind, name, is_private=is_private, readers={request.token})
    return as_json({"url": f"{hub.url}/{name}"}, 409 if is_there else 200)


def delete(hub: "Hub", request: Request) -> Answer:
    asked = json.loads(request.body)
    kind, name = asked.get("type") or "model", f"{asked['organization']}/{asked['name']}"
    writable(hub, request, kind, name)
    del hub.repos[kind, name]
    return as_json({})


def validate_yaml(hub: "Hub", request: Request) -> Answer:
    """POST /api/validate-yaml: a few of the rules by which the Hub refuses cards."""
    errors = _problems_of_card(json.loads(request.body)["content"])
    facts = {"errors": [{"message": error} for error in errors], "warnings": []}
    return as_json(facts, 400 if errors else 200)


def _problems_of_card(text: str) -> list[str]:
    match = re.match(r"\A---\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = YAML(typ="safe", pure=True).load(match[1]) if match else {}
    except YAMLError as error:
        return [f"invalid YAML: {error}"]
    errors = [f'"{name}" must not be empty' for name, value in metadata.items() if value is None]
    for key in ("base_model", "datasets"):
        values = metadata.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            if not HUB_ID.fullmatch(str(value)):
                errors.append(f'"{key}" with value "{value}" is not valid. Use a model id from https://hf.co/models.')
    return errors


def preupload(hub: "Hub", request: Request, kind: str, name: str, revision: str) -> Answer:
    """Which files go by LFS, and what is stored under their names now."""
    commit = writable(hub, request, kind, name).at(revision)
    files = []
    for asked in json.loads(request.body)["files"]:
        path, stored = asked["path"], commit.files.get(asked["path"])
        mode = "lfs" if is_lfs(path, asked["size"]) else "regular"
        known = {"oid": stored.etag} if stored else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return as_json({"files": files})


def batch(hub: "Hub", request: Request, folder: str, name: str) -> Answer:
    """The Git LFS batch API: where to put what is not here yet."""
    repo = writable(hub, request, "dataset" if folder else "model", name)
    answers = []
    for asked in json.loads(request.body)["objects"]:
        place = f"{hub.url}/lfs/{repo.kind}s/{name}/{asked['oid']}"
        upload = {"href": place}
        if hub.multipart_bytes and asked["size"] > hub.multipart_bytes:
            numbers = range(1, -(-asked["size"] // hub.multipart_bytes) + 1)
            addresses = {str(number): f"{place}/{number}" for number in numbers}
            upload = {"href": f"{place}/complete", "header": {"chunk_size": str(hub.multipart_bytes), **addresses}}
        actions = {"actions": {"upload": upload, "verify": {"href": f"{place}/verify"}}}
        answers.append({"oid": asked["oid"], "size": asked["size"]} | ({} if asked["oid"] in repo.objects else actions))
    return as_json({"transfer": "basic", "objects": answers})


def put(hub: "Hub", request: Request, kind: str, name: str, oid: str) -> Answer:
    """An upload; what does not have the hash of its name is refused. The address itself is the right to write."""
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(422, "WrongDigest", "the content does not have this hash")
    hub.repos[kind, name].objects[oid] = request.body
    hub.uploaded_bytes += len(request.body)
    return Answer()


def put_part(hub: "Hub", request: Request, kind: str, name: str, oid: str, number: str) -> Answer:
    """A piece of a large upload; its ETag is asked for when all are there."""
    etag = hashlib.md5(request.body).hexdigest()
    hub.repos[kind, name].parts.setdefault(oid, {})[int(number)] = (etag, request.body)
    hub.uploaded_bytes += len(request.body)
    return Answer(headers={"ETag": etag})


def complete(hub: "Hub", request: Request, kind: str, name: str, oid: str) -> Answer:
    """The pieces become one object, which must have the hash of its name."""
    repo = hub.repos[kind, name]
    parts = repo.parts.pop(oid, {})
    told = {part["partNumber"]: part["etag"] for part in json.loads(request.body)["parts"]}
    content = b"".join(parts[number][1] for number in sorted(parts))
    if told != {number: etag for number, (etag, _) in parts.items()} or hashlib.sha256(content).hexdigest() != oid:
        raise Refused(422, "WrongDigest", "the pieces do not have this hash")
    repo.objects[oid] = content
    return Answer()


def verify(hub: "Hub", request: Request, kind: str, name: str, oid: str) -> Answer:
    content = writable(hub, request, kind, name).objects.get(oid)
    if content is None or len(content) != json.loads(request.body)["size"]:
        raise Refused(404, "EntryNotFound", "nothing like it was uploaded")
    return as_json({})


def commit(hub: "Hub", request: Request, kind: str, name: str, revision: str) -> Answer:
    """POST …/commit/{revision}: all of it or nothing, on the head that the client knows."""
    repo = writable(hub, request, kind, name)
    lines = [json.loads(line) for line in request.body.splitlines()]
    (header,) = [line["value"] for line in lines if line["key"] == "header"]
    if revision not in repo.branches:
        raise MissingError("RevisionNotFound")
    if header.get("parentCommit") not in (None, repo.branches[revision]):
        raise Refused(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
    changes: dict[str, File | None] = {}
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            content = (
                base64.b64decode(value["content"]) if value.get("encoding") == "base64" else value["content"].encode()
            )
            hub.uploaded_bytes += len(content)
            changes[value["path"]] = File(content, False)
        elif line["key"] == "lfsFile":
            if value["oid"] not in repo.objects and value["oid"] in hub.xet_hashes:
                repo.objects[value["oid"]] = _from_xet(hub, value["oid"], value["size"])
            if value["oid"] not in repo.objects:
                raise Refused(400, "BadRequest", f"{value['path']}: the LFS object {value['oid']} was not uploaded")
            changes[value["path"]] = File(repo.objects[value["oid"]], True)
        elif line["key"] == "deletedFile":
            repo.at(revision).file(value["path"])
            changes[value["path"]] = None
    for path, file in changes.items():
        if path == "README.md" and file and (errors := _problems_of_card(file.content.decode())):
            raise Refused(400, "BadRequest", "; ".join(errors))
    oid = repo.change(changes, revision, header["summary"])
    return as_json({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})


def _from_xet(hub: "Hub", oid: str, size: int) -> bytes:
    """Reads an object back from the Xet store. The real Hub learns which Xet hash belongs to a SHA-256 from what was uploaded; here the
    test tells. Refused where it is not there, or is another one."""
    import hf_xet

    with TemporaryDirectory() as folder:
        target = Path(folder, "object")
        try:
            with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{hub.xet_directory}") as group:
                group.start_download_file(hf_xet.XetFileInfo(hub.xet_hashes[oid], size), str(target))
        except (RuntimeError, OSError, hf_xet.XetObjectNotFoundError) as error:
            raise Refused(400, "BadRequest", f"the Xet object of {oid} was not uploaded: {error}") from None
        content = target.read_bytes()
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refused(400, "BadRequest", f"the Xet object of {oid} is another one")
    return content


def add_branch(hub: "Hub", request: Request, kind: str, name: str, branch: str) -> Answer:
    repo = writable(hub, request, kind, name)
    if branch in repo.branches:
        raise Refused(409, "Conflict", "Reference already exists")
    repo.branches[branch] = repo.at(json.loads(request.body or b"{}").get("startingPoint") or "main").oid
    return as_json({})


def remove_branch(hub: "Hub", request: Request, kind: str, name: str, branch: str) -> Answer:
    if writable(hub, request, kind, name).branches.pop(branch, None) is None:
        raise MissingError("RevisionNotFound")
    return as_json({})


def add_tag(hub: "Hub", request: Request, kind: str, name: str, revision: str) -> Answer:
    repo, tag = writable(hub, request, kind, name), json.loads(request.body)["tag"]
    if tag in repo.tags:
        raise Refused(409, "Conflict", "Tag already exists")
    repo.tags[tag] = repo.at(revision).oid
    return as_json({})


def remove_tag(hub: "Hub", request: Request, kind: str, name: str, revision: str) -> Answer:
    if writable(hub, request, kind, name).tags.pop(revision, None) is None:
        raise MissingError("RevisionNotFound")
    return as_json({})


def xet_token(hub: "Hub", request: Request, kind: str, name: str, revision: str) -> Answer:
    """Xet uploads go to a folder in place of a server; a commit reads them back from it."""
    writable(hub, request, kind, name)
    facts = {"accessToken": "xet", "exp": int(time.time()) + 3600, "casUrl": f"local://{hub.xet_directory}"}
    return as_json(facts) if hub.xet_directory else as_json({"error": "no Xet here"}, 404)


_REPO = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
_OBJECT = r"/lfs/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
ROUTES = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("DELETE", r"/api/repos/delete", delete),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", rf"{_REPO}/preupload/(?P<revision>[^/]+)", preupload),
    ("POST", r"/(?P<folder>datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
    ("PUT", _OBJECT, put),
    ("POST", rf"{_OBJECT}/verify", verify),
    ("PUT", rf"{_OBJECT}/(?P<number>\d+)", put_part),
    ("POST", rf"{_OBJECT}/complete", complete),
    ("POST", rf"{_REPO}/commit/(?P<revision>[^/]+)", commit),
    ("POST", rf"{_REPO}/branch/(?P<branch>[^/]+)", add_branch),
    ("DELETE", rf"{_REPO}/branch/(?P<branch>[^/]+)", remove_branch),
    ("POST", rf"{_REPO}/tag/(?P<revision>[^/]+)", add_tag),
    ("DELETE", rf"{_REPO}/tag/(?P<revision>[^/]+)", remove_tag),
    ("GET", rf"{_REPO}/xet-write-token/(?P<revision>[^/]+)", xet_token),
]
