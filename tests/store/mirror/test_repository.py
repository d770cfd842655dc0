"""A repository of the Hub as a mirror, by the real client against the loopback Hub."""

import pytest

from finetune.errors import MirrorError
from finetune.store.mirror.opening import opened
from tests.hub import Hub
from tests.hub.writes import User

TOKEN = "hf_of_the_loopback"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub
    from huggingface_hub import constants

    with Hub(seconds=280) as hub:
        hub.users[TOKEN] = User("owner")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def repository(hub):
    return opened("hf://owner/mirror/runs/a")


def test_what_is_put_is_there_after_its_commit(repository, hub) -> None:
    assert repository.read("mirror.json") is None
    assert repository.sizes("blobs") == {}
    repository.put("blobs/aa/one.bin", b"x" * 3000)
    repository.put("mirror.json", b"{}")
    assert repository.sizes("blobs") == {}
    repository.settle("Two objects")
    repo = hub.repos["model", "owner/mirror"]
    assert repo.is_private
    other = opened("hf://owner/mirror/runs/a")
    assert other.sizes("blobs") == {"blobs/aa/one.bin": 3000}
    assert other.read("mirror.json") == b"{}"
    assert other.sizes("commits") == {}
    other.remove(["blobs/aa/one.bin", "blobs/bb/never.bin"])
    other.settle("Remove")
    assert repository.sizes("blobs") == {}


def test_a_commit_of_another_host_in_between_is_noticed(repository) -> None:
    repository.put("mirror.json", b"first")
    repository.settle("First")
    assert repository.read("mirror.json") == b"first"
    other = opened("hf://owner/mirror/runs/a")
    other.put("mirror.json", b"second")
    other.settle("Second")
    repository.put("commits/one.json", b"{}")
    with pytest.raises(MirrorError, match="changed meanwhile"):
        repository.settle("Too late")
    assert repository.sizes("commits") == {}
    assert repository.read("mirror.json") == b"second"


def test_a_piece_that_was_uploaded_before_a_cut_is_not_uploaded_again(repository, hub) -> None:
    repository.put("blobs/aa/one.bin", b"x" * 3000)
    sent = hub.uploaded_bytes
    again = opened("hf://owner/mirror/runs/a")
    again.read("mirror.json")
    again.put("blobs/aa/one.bin", b"x" * 3000)
    again.settle("One")
    assert hub.uploaded_bytes == sent >= 3000


def test_a_public_repository_is_refused(repository, hub) -> None:
    hub.add("model", "owner/mirror", is_private=False, readers={TOKEN})
    with pytest.raises(MirrorError, match="is public, and a mirror must not be"):
        repository.put("mirror.json", b"{}")


def test_refusals_are_explained_and_name_no_token(repository, hub, monkeypatch) -> None:
    hub.fail("GET", "/api/models/owner/mirror", status=403, times=5)
    with pytest.raises(MirrorError, match="403, forbidden") as caught:
        repository.read("mirror.json")
    assert TOKEN not in str(caught.value)


@pytest.mark.parametrize("place", ["hf://owner", "hf://buckets/owner/name", "hf://spaces/owner/name"])
def test_other_addresses_are_refused(place) -> None:
    with pytest.raises(MirrorError, match="is not the address of a repository"):
        opened(place)
