"""Where a mirror is: objects under a prefix of an object store, in a folder, or in a repository of the Hub.

An object appears whole or not at all. Credentials are those of the store's own client; nothing here reads or writes them.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from finetune.errors import FinetuneError, MirrorError
from finetune.store.durable import failures, make_directory, replace_file
from finetune.store.told import told

TIMEOUTS = {"connect_timeout": 20, "read_timeout": 60}  # seconds


class Client(NamedTuple):
    """The library for the addresses of one scheme."""

    package: str
    extra: str | None
    """That of `pyproject.toml`; None if finetune depends on it anyway."""
    credentials: str
    options: dict[str, object]


CLIENTS = {
    "s3": Client(
        "s3fs",
        "s3",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role or `aws configure`; AWS_ENDPOINT_URL for another store than Amazon's",
        {"config_kwargs": TIMEOUTS},
    ),
    "gs": Client(
        "gcsfs", "gs", "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`", {}
    ),
    "hf": Client("huggingface_hub", None, "set HF_TOKEN to a token with write access, or run `hf auth login`", {}),
    "file": Client("fsspec", None, "check that the folder is mounted, and its owner and permissions", {}),
}


class Bucket(Protocol):
    """Objects by name, with `/` between folders. Each method raises MirrorError if the store fails or refuses."""

    place: str
    """The address."""
    parallel: int
    """How many calls of `put` and `read` may run at once."""

    def sizes(self, folder: str) -> dict[str, int]:
        """The bytes of each object below a folder, by its whole name."""

    def read(self, name: str) -> bytes | None:
        """None if there is no such object."""

    def put(self, name: str, content: bytes) -> None:
        """Other readers may see it only after `settle`."""

    def remove(self, names: Collection[str]) -> None:
        """The same. Names of objects that are gone are no error."""

    def settle(self, title: str) -> None:
        """Returns when all that was put and removed is so for every reader. Of one call, a reader sees all changes or none, or `put`
        made them visible in order."""


def is_installed(place: str) -> bool:
    return find_spec(CLIENTS[place.partition("://")[0]].package) is not None


@contextmanager
def asked(place: str, hint: str) -> Iterator[None]:
    """One call of a client. Whatever it raises becomes a MirrorError with its message, without secrets."""
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:  # of a client, which may raise anything
        raise MirrorError(f"the mirror does not answer as it should: {told(error)}", where=place, hint=hint) from error


class ObjectStore:
    """An object store, by its client for fsspec. A put of an object is atomic there."""

    parallel = 4

    def __init__(self, place: str, client: Client):
        self.place = place
        self._hint = client.credentials
        with self._asked():
            fsspec: Any = import_module("fsspec")
            # Without its caches of listings and instances: another host writes there too.
            options = {**client.options, "use_listings_cache": False, "skip_instance_cache": True}
            self._fs = fsspec.filesystem(place.partition("://")[0], **options)
            self._root = self._fs._strip_protocol(place).rstrip("/")

    def sizes(self, folder: str) -> dict[str, int]:
        with self._asked():
            try:
                found = self._fs.find(f"{self._root}/{folder}", detail=True)
            except FileNotFoundError:
                return {}
        return {name.removeprefix(f"{self._root}/"): facts["size"] for name, facts in found.items()}

    def read(self, name: str) -> bytes | None:
        with self._asked():
            try:
                return bytes(self._fs.cat_file(f"{self._root}/{name}"))
            except FileNotFoundError:
                return None

    def put(self, name: str, content: bytes) -> None:
        with self._asked():
            try:
                self._fs.pipe_file(f"{self._root}/{name}", content)
            except FileNotFoundError:
                hint = "make the bucket first, or correct the address"
                raise MirrorError("there is no such bucket", where=self.place, hint=hint) from None

    def remove(self, names: Collection[str]) -> None:
        with self._asked():
            for name in names:
                try:
                    self._fs.rm_file(f"{self._root}/{name}")
                except FileNotFoundError:
                    continue

    def settle(self, title: str) -> None:
        """Every put has settled already."""

    def _asked(self) -> AbstractContextManager[None]:
        return asked(self.place, self._hint)


class Folder:
    """A folder, mounted from elsewhere as a rule. Objects are written beside their names and renamed, durably."""

    parallel = 2

    def __init__(self, place: str):
        self.place = place
        self._root = Path(place.removeprefix("file://"))

    def sizes(self, folder: str) -> dict[str, int]:
        with self._failures():
            found = [path for path in (self._root / folder).rglob("*") if path.is_file() and path.suffix != ".tmp"]
            return {path.relative_to(self._root).as_posix(): path.stat().st_size for path in found}

    def read(self, name: str) -> bytes | None:
        with self._failures():
            try:
                return (self._root / name).read_bytes()
            except FileNotFoundError:
                return None

    def put(self, name: str, content: bytes) -> None:
        path = self._root / name
        with self._failures():
            make_directory(path.parent)
            replace_file(path, content)

    def remove(self, names: Collection[str]) -> None:
        with self._failures():
            for name in names:
                (self._root / name).unlink(missing_ok=True)

    def settle(self, title: str) -> None:
        """Every put has settled already."""

    def _failures(self) -> AbstractContextManager[None]:
        return failures(self._root, MirrorError, what="the mirror cannot be used")


Alive = Callable[[], object]
"""Called after each answer of a bucket: a client that does not answer any more can then be told from a slow one."""
