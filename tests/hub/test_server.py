"""The loopback Hub keeps to what the real one says, where the stories do not see it themselves."""

import json
import urllib.error
import urllib.request
from email.message import Message

import pytest

from tests.hub import Hub


@pytest.fixture
def hub():
    with Hub(seconds=60, page_entries=2) as hub:
        yield hub


def get(url: str, **headers: str) -> tuple[int, bytes, Message]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
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
