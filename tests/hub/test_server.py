"""The loopback Hub keeps to what the real one says, where the stories do not see it themselves."""

import hashlib
import json
import urllib.error
import urllib.request
from email.message import Message

import hf_xet
import pytest

from tests.hub import Hub
from tests.hub.writes import User

TOKEN = "hf_writer"
WEIGHTS = b"0123456789" * 3


@pytest.fixture
def hub():
    with Hub(seconds=60, page_entries=2) as hub:
        yield hub


def get(url: str, **headers: str) -> tuple[int, bytes, Message]:
    return ask("GET", url, None, **headers)


def ask(method: str, url: str, body: bytes | None, **headers: str) -> tuple[int, bytes, Message]:
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [("bytes=2-4", 206, b"234"), ("bytes=7-", 206, b"789"), ("bytes=-2", 206, b"89"), ("bytes=10-", 416, b"")],
)
def test_a_range_of_a_file_is_that_range(hub, asked, status, content) -> None:
    commit = hub.add("model", "tiny/base").commit({"model.safetensors": b"0123456789"})
    answered, body, headers = get(f"{hub.url}/tiny/base/resolve/main/model.safetensors", Range=asked)
    assert (answered, body, headers["X-Repo-Commit"], headers["X-Linked-Size"]) == (status, content, commit, "10")


def test_a_gated_file_is_for_its_readers_and_its_facts_are_for_all(hub) -> None:
    hub.add("dataset", "tiny/rows", is_gated=True, readers={"hf_reader"}).commit({"train.jsonl": b"{}"})
    file = f"{hub.url}/datasets/tiny/rows/resolve/main/train.jsonl"
    for token, status in ((None, 401), ("hf_other", 403), ("hf_reader", 200)):
        answered, _, headers = get(file, **({"Authorization": f"Bearer {token}"} if token else {}))
        assert (answered, headers["X-Error-Code"]) == (status, None if status == 200 else "GatedRepo")
    assert json.loads(get(f"{hub.url}/api/datasets/tiny/rows")[1])["gated"] == "manual"


def test_a_long_tree_comes_in_pages(hub) -> None:
    hub.add("model", "tiny/base").commit({"a.json": b"{}", "b/c.json": b"{}", "d.json": b"{}"})
    url, paths = f"{hub.url}/api/models/tiny/base/tree/main?recursive=true", []
    while url:
        _, body, headers = get(url)
        paths += [entry["path"] for entry in json.loads(body)]
        url = headers["Link"] and headers["Link"].partition(">")[0].removeprefix("<")
    assert paths == ["a.json", "b", "b/c.json", "d.json"]


def test_an_ordered_fault_happens_once(hub) -> None:
    hub.add("model", "tiny/base")
    hub.fail("GET", "/api/models/tiny/base", status=503)
    assert [get(f"{hub.url}/api/models/tiny/base")[0] for _ in range(2)] == [503, 200]


def test_a_closed_hub_refuses_connections(hub) -> None:
    hub.close()
    with pytest.raises(urllib.error.URLError):
        get(hub.url)


def announced(hub: Hub, content: bytes) -> tuple[str, dict]:
    """Tells a new repository that an object is to come: its hash, and where it is to go."""
    hub.users[TOKEN] = User("tiny")
    hub.add("model", "tiny/new")
    oid = hashlib.sha256(content).hexdigest()
    asked = json.dumps({"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]}).encode()
    _, body, _ = ask("POST", f"{hub.url}/tiny/new.git/info/lfs/objects/batch", asked, Authorization=f"Bearer {TOKEN}")
    return oid, json.loads(body)["objects"][0]["actions"]["upload"]


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ({1: WEIGHTS[:12], 2: WEIGHTS[12:24], 3: WEIGHTS[24:]}, 200),
        ({3: WEIGHTS[24:], 1: WEIGHTS[:12], 2: WEIGHTS[12:24]}, 200),
        ({1: WEIGHTS[:12], 2: WEIGHTS[12:24]}, 422),
        ({1: WEIGHTS[:12], 2: b"x" * 12, 3: WEIGHTS[24:]}, 422),
    ],
    ids=["in order", "in another order", "one missing", "one different"],
)
def test_a_large_object_is_what_its_pieces_are_if_that_has_its_hash(hub, pieces, status) -> None:
    hub.multipart_bytes = 12
    oid, upload = announced(hub, WEIGHTS)
    header = upload["header"]
    assert header.pop("chunk_size") == "12" and sorted(header) == ["1", "2", "3"]
    etags = {number: ask("PUT", header[str(number)], piece)[2]["ETag"] for number, piece in pieces.items()}
    told = [{"partNumber": number, "etag": etag} for number, etag in sorted(etags.items())]
    assert ask("POST", upload["href"], json.dumps({"oid": oid, "parts": told}).encode())[0] == status
    assert hub.repos["model", "tiny/new"].objects == ({oid: WEIGHTS} if status == 200 else {})


def test_an_etag_that_no_piece_has_completes_nothing(hub) -> None:
    hub.multipart_bytes = 15
    oid, upload = announced(hub, WEIGHTS)
    first = ask("PUT", upload["header"]["1"], WEIGHTS[:15])[2]["ETag"]
    ask("PUT", upload["header"]["2"], WEIGHTS[15:])
    told = [{"partNumber": 1, "etag": first}, {"partNumber": 2, "etag": "other"}]
    status, body, _ = ask("POST", upload["href"], json.dumps({"oid": oid, "parts": told}).encode())
    assert (status, json.loads(body)["error"]) == (422, "the pieces do not have this hash")
    assert not hub.repos["model", "tiny/new"].objects


def test_an_object_of_the_size_of_a_piece_goes_whole(hub) -> None:
    hub.multipart_bytes = len(WEIGHTS)
    oid, upload = announced(hub, WEIGHTS)
    assert "header" not in upload
    assert [ask("PUT", upload["href"], content)[0] for content in (b"x", WEIGHTS)] == [422, 200]
    assert hub.repos["model", "tiny/new"].objects == {oid: WEIGHTS}


def test_a_commit_takes_from_the_xet_store_what_has_its_hash_and_nothing_else(hub, tmp_path) -> None:
    hub.xet_directory = tmp_path
    oid, _ = announced(hub, WEIGHTS)
    with hf_xet.XetSession().new_upload_commit(endpoint=f"local://{tmp_path}") as upload:
        uploads = [upload.start_upload_bytes(content, hf_xet.COMPUTE_SHA256) for content in (WEIGHTS, b"x" * 30)]
    right, other = (one.result().xet_info.hash for one in uploads)
    lines = [
        {"key": "header", "value": {"summary": "by Xet", "description": ""}},
        {"key": "lfsFile", "value": {"path": "a.safetensors", "algo": "sha256", "oid": oid, "size": len(WEIGHTS)}},
    ]
    address, body = f"{hub.url}/api/models/tiny/new/commit/main", "\n".join(map(json.dumps, lines)).encode()
    for known, status, said in (
        ({}, 400, f"a.safetensors: the LFS object {oid} was not uploaded"),
        ({oid: "0" * 64}, 400, f"the Xet object of {oid} was not uploaded"),
        ({oid: other}, 400, f"the Xet object of {oid} is another one"),
        ({oid: right}, 200, "commitOid"),
    ):
        hub.xet_hashes = known
        answered, told, _ = ask("POST", address, body, Authorization=f"Bearer {TOKEN}")
        assert answered == status and said in told.decode()
    assert hub.repos["model", "tiny/new"].at("main").file("a.safetensors").content == WEIGHTS
