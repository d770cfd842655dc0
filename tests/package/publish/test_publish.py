"""Packages go to a Hub on the loopback, by the real client: the old tree or the new one at every moment, and nothing twice."""

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune.package.attest import provenance
from finetune.package.attest.provenance import sha256
from finetune.package.card.notes import NOTES_BEGIN, NOTES_END
from tests.forks import Popen
from tests.hub import Hub
from tests.hub.client import environment, in_turn
from tests.hub.forks import Forks
from tests.hub.repos import File
from tests.hub.writes import User
from tests.lengths import length

TOKEN = "hf_" + "w" * 34


def statement(files: dict[str, bytes]) -> bytes:
    """What is left of a provenance when only the names and hashes of files are wanted."""
    subjects = [{"name": name, "digest": {"sha256": hashlib.sha256(text).hexdigest()}} for name, text in files.items()]
    said = {"_type": provenance.STATEMENT, "predicateType": provenance.PREDICATE, "subject": subjects}
    return json.dumps(said).encode()


OURS = {"model.safetensors": b"old weights", "old.txt": b"gone"}
OLD = {  # an earlier publish, which recorded what it put there
    "README.md": f"---\nlicense: mit\n---\n# Old\n\n{NOTES_BEGIN}\n{NOTES_END}\n".encode(),
    provenance.FILE: statement(OURS),
    **OURS,
}
XORBS = "xet/xorbs/xorbs"
CARD = "---\nlicense: mit\nlibrary_name: transformers\n---\n# New\n"


@pytest.fixture
def hub():
    with Hub(seconds=890) as hub:
        hub.users[TOKEN] = User("tiny")
        hub.add = partial(hub.add, is_private=True, readers={TOKEN})
        yield hub


@pytest.fixture
def env(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return environment(hub, tmp_path, HF_TOKEN=TOKEN)


@pytest.fixture
def forks(hub: Hub, tmp_path: Path) -> Forks:
    return Forks(hub, tmp_path, TOKEN)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Looks like a package: what is in it is not publish's to judge."""
    directory = tmp_path / "package"
    directory.mkdir()
    save_file({"a": torch.arange(4096.0)}, directory / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({"b": torch.arange(99.0)}, directory / "model-00002-of-00002.safetensors", {"format": "pt"})
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (directory / "config.json").write_text('{"model_type": "none"}\n')
    (directory / "README.md").write_text(CARD)
    return directory


def files(package: Path) -> dict[str, bytes]:
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*") if path.is_file()}


def content(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    return {name: file.content for name, file in hub.repos["model", "tiny/new"].at(revision).files.items()}


def publish(env: dict[str, str], package: Path, *more: str) -> dict:
    ((code, printed, said),) = in_turn(env, ("publish", package, "--to", "tiny/new", "--json", *more))
    assert code == 0, said
    return json.loads(printed)


def test_a_package_is_published_staged_promoted_and_tagged(hub, env, package) -> None:
    facts = publish(env, package, "--tag", "v1")
    repo = hub.repos["model", "tiny/new"]
    assert content(hub) == files(package) and repo.is_private
    assert repo.tags == {"v1": repo.branches["main"]} and facts["revision"] == repo.branches["main"]
    assert list(repo.branches) == ["main"], "what was staged is gone"
    assert facts["commits"] == 2 and len(repo.commits) == 3  # the first one came with the repository
    assert hub.uploaded_bytes == sum(map(len, files(package).values())) + sum(
        len(text) for name, text in files(package).items() if not name.endswith(".safetensors")
    ), "weights once, small files with each of the two commits"


def test_the_same_package_again_changes_nothing_and_uploads_nothing(hub, env, package) -> None:
    first = publish(env, package, "--tag", "v1")
    before, commits = hub.uploaded_bytes, len(hub.repos["model", "tiny/new"].commits)
    again = publish(env, package, "--tag", "v1")
    assert (again["commits"], again["uploaded_bytes"], again["revision"]) == (0, 0, first["revision"])
    assert (hub.uploaded_bytes, len(hub.repos["model", "tiny/new"].commits)) == (before, commits)


def test_what_is_not_in_the_package_goes_from_the_repository(hub, env, package) -> None:
    hub.add("model", "tiny/new").commit(OLD | {".gitattributes": b"* text"})
    (text, facts) = (in_turn(env, ("publish", package, "--to", "tiny/new", "--dry-run"))[0][1], publish(env, package))
    assert "  removed: old.txt" in text and "  changed: README.md" in text and "would make 2 commits" in text
    assert facts["changes"]["old.txt"] == "removed"
    assert content(hub) == files(package) | {".gitattributes": b"* text"}


def test_a_dry_run_asks_and_writes_nothing(hub, env, package) -> None:
    facts = publish(env, package, "--dry-run")
    assert facts["is_new"] and facts["private"] and facts["commits"] == 2
    assert not hub.repos and not [request for request in hub.requests if request.method != "GET"]


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        ({"status": 503}, 1),
        ({"status": 504, "is_landed": True}, 1),
        ({"cut_after_bytes": 3}, 1),
        ({"status": 429, "headers": {"RateLimit": '"api";r=0;t=0'}}, 2),
        ({"status": 409}, 1),
        ({"status": 412}, 1),
        ({"seconds": 1.0}, 1),
    ],
    ids=["unavailable", "landed", "cut", "limited", "locked", "moved and back", "slow"],
)
def test_a_commit_that_went_wrong_once_lands_once(hub, env, package, fault, times) -> None:
    hub.add("model", "tiny/new").commit(OLD)
    how = dict(fault)
    hub.fail("POST", "/commit/main$", how.pop("status", None), times=times, **how)
    hub.fail("POST", "/commit/staging", fault.get("status"), times=times, **how)
    publish(env, package)
    assert content(hub) == files(package)
    assert len(hub.repos["model", "tiny/new"].commits) == 4, "two before, one staged, one promoted"


def test_a_branch_that_somebody_else_moved_is_left_as_it_is(hub, env, package) -> None:
    repo = hub.add("model", "tiny/new")
    repo.commit(OLD)
    hub.fail("POST", "/commit/main$", None, call=lambda: repo.commit({"theirs.txt": b"1"}))
    ((code, printed, _),) = in_turn(env, ("publish", package, "--to", "tiny/new", "--json"))
    error = json.loads(printed)["error"]
    assert (code, error["code"], error["message"]) == (1, "publish", "main was moved by somebody else")
    assert content(hub) == OLD | {"theirs.txt": b"1"}


def test_what_the_hub_lost_or_changed_is_not_promoted(hub, env, package) -> None:
    repo = hub.add("model", "tiny/new")
    repo.commit(OLD)

    def spoil() -> None:
        oid = next(oid for name, oid in repo.branches.items() if name.startswith("staging"))
        stored = repo.commits[oid]
        repo.commits[oid] = replace(stored, files={**stored.files, "config.json": File(b"[]", False)})

    hub.fail("POST", "/commit/staging", None, is_landed=True, call=spoil)
    ((code, _, said),) = in_turn(env, ("publish", package, "--to", "tiny/new"))
    assert code == 1 and "does not have what was uploaded: config.json" in said
    assert content(hub) == OLD


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_requests_in_turn_the_target_is_old_or_new_and_a_second_call_finishes(hub, forks, package) -> None:
    repo = hub.add("model", "tiny/new")
    weights = sum(path.stat().st_size for path in package.glob("*.safetensors"))
    command = ("publish", package, "--to", "tiny/new", "--tag", "v1")
    stride, killed, number = length(3, 1), 0, 0
    while True:
        repo.commits, repo.branches, repo.tags, repo.objects = {}, {}, {}, {}
        repo.__post_init__()
        repo.commit(OLD)
        hub.uploaded_bytes, before = 0, len(hub.requests)
        is_landed = number % 2 == 1
        hub.faults = []
        hub.fail(".*", "", None if is_landed else 503, skip=number // 2, is_landed=is_landed, call=forks.kill)
        if (code := forks.run(*command)) == 0:
            break
        assert code == -signal.SIGKILL, forks.said.read_text()
        killed += 1
        hub.faults = []
        assert content(hub) in (OLD, files(package)), f"request {number // 2}: neither old nor new"
        assert forks.run(*command) == 0, forks.said.read_text()
        assert content(hub) == files(package) and repo.tags == {"v1": repo.branches["main"]}
        assert list(repo.branches) == ["main"]
        assert len(repo.commits) == 4, f"request {number // 2}: a commit was made twice"
        assert sum(len(r.body) for r in hub.requests[before:] if r.method == "PUT") <= 2 * weights
        number += stride  # odd: a request is lost now before, now after it was done
    assert killed > 40 // stride


@pytest.mark.slow
def test_no_right_and_no_name_are_told_before_anything_is_sent(hub, env, package) -> None:
    hub.users["hf_" + "r" * 34] = User("reader", "read")
    without = {name: value for name, value in env.items() if name != "HF_TOKEN"}
    cases = [
        (env | {"HF_TOKEN": "hf_" + "x" * 34}, "tiny/new", "the Hub refuses: Invalid user token"),
        (env | {"HF_TOKEN": "hf_" + "r" * 34}, "tiny/new", "cannot be published to: the token of reader only reads"),
        (env, "other/new", "other/new: cannot be published to: tiny is not of other"),
        (without, "tiny/new", "tiny/new: there is no token for the Hub"),
    ]
    for user, target, message in cases:
        command = ("publish", package, "--to", target)
        results = in_turn(user, command, (*command, "--dry-run", "--json"))
        for code, _, said in results:
            assert code == 1 and message in said and "hint: " in said and "Traceback" not in said
        assert json.loads(results[1][1])["error"]["hint"]
        assert TOKEN not in said and not hub.repos and hub.uploaded_bytes == 0


def test_a_folder_is_a_target_as_well(env, package, tmp_path) -> None:
    target = f"folder:{tmp_path}/out/copy"
    first, again = (json.loads(in_turn(env, ("publish", package, "--to", target, "--json"))[0][1]) for _ in range(2))
    assert files(tmp_path / "out/copy") == files(package) and [path.name for path in (tmp_path / "out").iterdir()] == [
        "copy"
    ]
    assert (first["commits"], again["commits"], again["uploaded_bytes"]) == (1, 0, 0)
    (tmp_path / "out/copy/config.json").write_text("[]")
    ((code, _, said),) = in_turn(env, ("publish", package, "--to", target))
    assert code == 1 and "has something else" in said, "without a provenance nobody knows whose it is"


@pytest.mark.slow
def test_what_people_wrote_into_the_card_stays_and_is_no_change(hub, env, package) -> None:
    empty = f"{CARD}\n{NOTES_BEGIN}\n{NOTES_END}\n"
    (package / "README.md").write_text(empty)
    publish(env, package)
    noted = empty.replace(NOTES_END, f"Mind the gap.\n{NOTES_END}")
    hub.repos["model", "tiny/new"].commit({"README.md": noted.encode()})
    assert publish(env, package)["commits"] == 0
    (package / "README.md").write_text(empty.replace("# New", "# Newer"))
    publish(env, package)
    assert content(hub)["README.md"].decode() == noted.replace("# New", "# Newer")


@pytest.mark.slow
def test_a_repository_that_everybody_sees_is_refused_before_anything_is_sent(hub, env, package) -> None:
    repo = hub.add("model", "tiny/new", is_private=False)
    repo.commit(OLD)
    command = ("publish", package, "--to", "tiny/new")
    cases = [command, (*command, "--dry-run"), (*command, "--branch", "next"), (*command, "--public")]
    *refused, (code, _, said) = in_turn(env, *cases)
    for code_, _, said_ in refused:
        assert code_ == 1 and "tiny/new: is public, and the package is to be private\nhint: --public" in said_
    assert code == 0 and content(hub) == files(package), said
    first = next(number for number, request in enumerate(hub.requests) if request.method != "GET")
    assert len([r for r in hub.requests[:first] if r.path.endswith("whoami-v2")]) == 4, "nothing before the last call"


@pytest.mark.parametrize("when", ["staged", "uploaded", "promoted"])
def test_a_repository_that_becomes_public_in_between_gets_nothing_more(when, hub, env, package) -> None:
    repo = hub.add("model", "tiny/new")
    repo.commit(OLD)
    at = {"staged": ("POST", "/branch/staging"), "uploaded": ("PUT", ""), "promoted": ("GET", "/tree/")}[when]
    skip = 2 if when == "promoted" else 0
    hub.fail(*at, None, is_landed=True, skip=skip, call=lambda: setattr(repo, "is_private", False))
    ((code, _, said),) = in_turn(env, ("publish", package, "--to", "tiny/new"))
    assert code == 1 and "is public, and the package is to be private" in said and not hub.faults[0].times
    assert content(hub) == OLD
    commits = [request for request in hub.requests if request.method == "POST" and "/commit/" in request.path]
    assert len(commits) == (1 if when == "promoted" else 0)


def test_what_people_added_on_the_hub_stays_and_what_an_earlier_publish_had_goes(hub, env, package) -> None:
    theirs = {"model-q4.gguf": b"GGUF", "images/plot.png": b"\x89PNG", "checkpoints.json": b"{}", "notes.txt": b"mine"}
    hub.add("model", "tiny/new").commit(OLD | theirs)
    facts = publish(env, package)
    assert content(hub) == files(package) | theirs
    assert {name for name, what in facts["changes"].items() if what == "removed"} == {*OURS, provenance.FILE}
    assert publish(env, package)["commits"] == 0


@pytest.mark.slow
def test_what_people_changed_is_named_and_overwritten_only_where_that_is_asked_for(hub, env, package) -> None:
    theirs = {"config.json": b"{}", "old.txt": b"their notes", "added.txt": b"stays"}
    hub.add("model", "tiny/new").commit(OLD | theirs)
    command = ("publish", package, "--to", "tiny/new", "--json")
    results = in_turn(env, command, (*command, "--dry-run"), (*command, "--replace"))
    for code, printed, _ in results[:2]:
        error = json.loads(printed)["error"]
        told = "would overwrite what people changed or added: config.json, old.txt"
        assert (code, error["message"]) == (1, told) and "--replace" in error["hint"]
    assert results[2][0] == 0 and json.loads(results[2][1])["overwritten"] == ["config.json", "old.txt"]
    assert content(hub) == files(package) | {"added.txt": b"stays"}


def test_a_card_of_somebody_is_not_overwritten_unasked(hub, env, package) -> None:
    hub.add("model", "tiny/new").commit({"README.md": b"---\nlicense: mit\n---\n# By hand\n"})
    command = ("publish", package, "--to", "tiny/new")
    (code, _, said), (after, _, _) = in_turn(env, command, (*command, "--replace"))
    assert code == 1 and "would overwrite what people changed or added: README.md" in said
    assert after == 0 and content(hub) == files(package)


def test_large_weights_go_in_pieces_and_a_piece_that_was_lost_goes_again(hub, env, package) -> None:
    hub.multipart_bytes = 5000
    hub.fail("PUT", "/2$", 503)
    publish(env, package)
    assert content(hub) == files(package)
    numbers = [int(request.path.rpartition("/")[2]) for request in hub.seen("PUT", "/lfs/.*/[0-9]+$")]
    assert sorted(numbers) == [1, 2, 2, 3, 4] and len(hub.seen("POST", "/complete$")) == 1


def test_pieces_that_arrive_damaged_are_no_object_and_nothing_is_committed(hub, env, package) -> None:
    hub.add("model", "tiny/new").commit(OLD)
    hub.multipart_bytes = 5000

    def spoil() -> None:
        (parts,) = hub.repos["model", "tiny/new"].parts.values()
        parts[1] = (parts[1][0], b"x" * 5000)

    hub.fail("POST", "/complete$", None, call=spoil)
    ((code, _, said),) = in_turn(env, ("publish", package, "--to", "tiny/new"))
    assert code == 1 and "the pieces do not have this hash" in said
    assert content(hub) == OLD
    publish(env, package)
    assert content(hub) == files(package)


@pytest.fixture
def xet(hub, env, package, tmp_path) -> dict[str, str]:
    """A user whose uploads go by Xet, to a store in a folder."""
    import hf_xet

    hub.xet_directory = tmp_path / "cas"
    hub.xet_directory.mkdir()
    paths = sorted(package.glob("*.safetensors"))
    hashes = hf_xet.hash_files([str(path) for path in paths])
    hub.xet_hashes = {sha256(path): one.hash for path, one in zip(paths, hashes, strict=True)}
    return env | {"HF_HUB_DISABLE_XET": "0"}


def stored(hub: Hub, folder: str = "") -> dict[str, bytes]:
    """What the Xet store has, by path; the contents of files are in XORBS."""
    paths = (hub.xet_directory / folder).rglob("*")
    return {str(path.relative_to(hub.xet_directory)): path.read_bytes() for path in paths if path.is_file()}


def test_weights_go_by_xet_and_nothing_is_stored_twice(hub, xet, package) -> None:
    publish(xet, package, "--tag", "v1")
    assert content(hub) == files(package) and hub.seen("GET", "xet-write-token") and not hub.seen("PUT", "")
    before, tokens = stored(hub), len(hub.seen("GET", "xet-write-token"))
    assert stored(hub, XORBS)
    again = publish(xet, package, "--tag", "v1")
    assert (again["commits"], again["uploaded_bytes"]) == (0, 0) and stored(hub) == before
    assert len(hub.seen("GET", "xet-write-token")) == tokens


@pytest.mark.slow
def test_a_xet_store_that_cannot_be_written_is_one_error_and_nothing_is_committed(hub, xet, package) -> None:
    hub.add("model", "tiny/new").commit(OLD)
    place, hub.xet_directory = hub.xet_directory, Path("/proc/nothing")
    ((code, _, said),) = in_turn(xet, ("publish", package, "--to", "tiny/new"))
    assert code == 1 and "the upload failed: " in said and "hint: try again" in said and content(hub) == OLD
    hub.xet_directory = place
    publish(xet, package)
    assert content(hub) == files(package)


@pytest.mark.slow
def test_what_came_by_xet_is_read_back_by_xet_past_a_fault_or_refused_with_one_error(hub, xet, package) -> None:
    publish(xet, package)
    hub.fail("HEAD", "model-00001", 503)
    verify = ("verify", "hub:tiny/new", "--json")
    ((code, printed, said),) = in_turn(xet, verify)
    assert code == 0 and json.loads(printed)["ok"] and not hub.faults[0].times, said
    assert hub.seen("GET", "xet-read-token") and not hub.seen("GET", "model-0")
    hub.xet_directory = Path("/proc/nothing")
    ((code, _, said),) = in_turn(xet, verify)
    assert code == 1 and "tiny/new: the download failed: " in said and "hint: try again" in said


@pytest.mark.parametrize(
    ("method", "path", "how"),
    [
        ("GET", "xet-write-token", {"status": 503}),
        ("POST", "/commit/staging", {"status": 504, "is_landed": True}),
        ("POST", "/commit/main", {"cut_after_bytes": 3, "status": None}),
    ],
    ids=["no token", "staged, unheard", "promoted, cut"],
)
def test_a_publish_by_xet_survives_faults_and_commits_once(hub, xet, package, method, path, how) -> None:
    hub.add("model", "tiny/new").commit(OLD)
    hub.fail(method, path, **how)
    told = in_turn(xet, *[("publish", package, "--to", "tiny/new", "--json")] * 2)
    assert [code for code, _, _ in told] == [0, 0], told
    assert content(hub) == files(package) and not hub.faults[0].times, "the fault happened"
    assert json.loads(told[1][1])["commits"] == 0
    assert len(hub.repos["model", "tiny/new"].commits) == 4, "two before, one staged, one promoted"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "status"), [("/commit/staging", 503), ("/commit/main$", None)], ids=["uploaded", "promoted, unheard"]
)
def test_a_publish_by_xet_that_was_killed_is_finished_by_the_next_call(hub, xet, package, path, status) -> None:
    repo = hub.add("model", "tiny/new")
    repo.commit(OLD)
    command = [sys.executable, "-m", "finetune", "publish", str(package), "--to", "tiny/new"]
    child = Popen(command, env=xet, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    hub.fail("POST", path, status, call=child.kill)
    _, said = child.communicate(timeout=60)
    assert child.returncode == -9, said.decode()
    uploaded = stored(hub, XORBS)
    publish(xet, package)
    assert content(hub) == files(package) and list(repo.branches) == ["main"]
    assert len(repo.commits) == 4, "two before, one staged, one promoted"
    assert uploaded and stored(hub, XORBS) == uploaded


@pytest.mark.slow
def test_what_the_hubs_scanners_found_is_told_and_what_waits_is_no_fault(hub, env, package) -> None:
    publish(env, package)
    hub.scans = {"config.json": "safe", "model-00001-of-00002.safetensors": "queued"}
    ((code, printed, said),) = in_turn(env, ("verify", "hub:tiny/new", "--json"))
    facts = json.loads(printed)
    assert code == 0 and "scan" in facts["checks"], said
    assert facts["not_made"]["scan"] == "the Hub has not looked at model-00001-of-00002.safetensors yet"
    hub.scans["model-00002-of-00002.safetensors"] = "unsafe"
    ((code, printed, _),) = in_turn(env, ("verify", "hub:tiny/new", "--json"))
    (found,) = json.loads(printed)["problems"]
    assert (code, found["check"], found["message"]) == (1, "scan", "is called unsafe by the Hub's scanners")
