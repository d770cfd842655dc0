"""What the Hub's answers mean, by status, for bases, data sets and publishing alike; and that a silent Hub is said to be waited for."""

import threading

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from finetune.data.sources.hub import HubDataset, pin_dataset
from finetune.errors import FinetuneError
from finetune.model.base import hub as base_hub
from finetune.package.publish.repository import Repository
from finetune.recipe.schema import Source
from finetune.store import hub

STATUSES = [400, 401, 402, 403, 404, 409, 412, 413, 422, 429, 451, 500, 502, 503, 504]
PIN = "0" * 40


def answer(status: int, reason: str = "as the Hub words it") -> HfHubHTTPError:
    http = hub.http()
    response = http.Response(status, request=http.Request("GET", "https://hub.test/api/models/tiny/base"))
    return HfHubHTTPError(f"{status} of the client", response=response, server_message=reason)


def raises(error: Exception):
    def call(*arguments, **options):
        raise error

    return call


def asked(monkeypatch, error: Exception) -> list[FinetuneError]:
    """What each of those who ask the Hub makes of an error."""
    import datasets

    monkeypatch.setattr("finetune.package.publish.repository.FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", raises(error))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raises(error))
    monkeypatch.setattr(datasets, "load_dataset", raises(error))
    repository, source = Repository("tiny/base"), Source(dataset="tiny/base", revision=PIN)
    monkeypatch.setattr(repository._api, "model_info", raises(error))
    monkeypatch.setattr(repository._api, "whoami", raises(error))
    calls = [
        lambda: base_hub.commit_of("tiny/base", None),
        lambda: base_hub.download("tiny/base", PIN, ("*",)),
        lambda: base_hub.has_files("tiny/base", PIN, ("*",)),
        lambda: pin_dataset(source),
        lambda: HubDataset(source, PIN),
        repository.whoami,
        repository.facts,
    ]
    told = []
    for call in calls:
        with pytest.raises(FinetuneError) as caught:
            call()
        told.append(caught.value)
    return told


@pytest.mark.parametrize("status", STATUSES)
def test_each_status_is_named_with_the_hubs_own_words_and_a_hint_wherever_it_is_met(status, monkeypatch) -> None:
    told = asked(monkeypatch, answer(status))
    expected = hub.refusal(answer(status))
    assert {(one.message, one.hint) for one in told} == {(expected.message, expected.hint)}
    assert f"as the Hub words it ({status}" in expected.message and expected.hint
    assert "cannot be reached" not in expected.message


def test_a_status_within_the_error_of_another_library_is_found(monkeypatch) -> None:
    wrapped = ConnectionError("could not reach it")
    wrapped.__cause__ = answer(402, "the organisation's plan is over")
    for one in asked(monkeypatch, wrapped):
        assert one.message == "the Hub refuses: the organisation's plan is over (402, payment required)"


def test_a_hub_that_does_not_answer_at_all_cannot_be_reached(monkeypatch) -> None:
    for one in asked(monkeypatch, hub.http().ConnectTimeout("timed out")):
        assert one.message.startswith("the Hub cannot be reached") and one.hint


def test_without_a_token_there_is_one_error_with_a_hint(monkeypatch) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    repository = Repository("tiny/new")
    monkeypatch.setattr(repository._api, "whoami", raises(LocalTokenNotFoundError("no token")))
    with pytest.raises(FinetuneError) as caught:
        repository.whoami()
    assert str(caught.value) == (
        "tiny/new: there is no token for the Hub\n"
        "hint: set HF_TOKEN to a token with write access, or run `hf auth login`"
    )


def test_what_is_waited_for_is_said_by_everything_that_asks_the_hub(monkeypatch, capsys) -> None:
    import datasets

    monkeypatch.setattr(hub, "QUIET_SECONDS", 0.01)
    said, is_said = [], threading.Event()

    def heard(*words, **where) -> None:
        said.append(words[0])
        is_said.set()

    def silent(*arguments, **options):
        is_said.clear()
        assert is_said.wait(60), "nothing was said"
        raise answer(404)

    monkeypatch.setattr(hub, "print", heard, raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "resolve_revision", silent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    monkeypatch.setattr(datasets, "load_dataset", silent)
    repository, source = Repository("tiny/base"), Source(dataset="tiny/base", revision=PIN)
    monkeypatch.setattr(repository._api, "model_info", silent)
    calls = [
        (lambda: base_hub.commit_of("tiny/base", None), "which commit tiny/base is at"),
        (lambda: base_hub.download("tiny/base", PIN, ("*",)), "files of tiny/base"),
        (lambda: base_hub.has_files("tiny/base", PIN, ("*",)), "what tiny/base has"),
        (lambda: pin_dataset(source), "which commit the data set tiny/base is at"),
        (lambda: HubDataset(source, PIN), "rows of the data set tiny/base"),
        (repository.facts, "an answer about tiny/base"),
    ]
    for call, what in calls:
        with pytest.raises(FinetuneError):
            call()
        assert said[-1].startswith("waiting for the Hub for ") and said[-1].endswith(f" s: {what}")
