"""From the address of a mirror to its bucket."""

from finetune.errors import MirrorError
from finetune.recipe.addresses import problem_of
from finetune.store.mirror.bucket import CLIENTS, Bucket, Folder, ObjectStore, is_installed
from finetune.store.mirror.repository import RepositoryBucket


def opened(place: str) -> Bucket:
    """The bucket at an address like `s3://bucket/prefix`. MirrorError if it is not one, or its client is not installed."""
    if problem := problem_of(place):
        raise MirrorError(f"the address of a mirror {problem}")
    scheme = place.partition("://")[0]
    client = CLIENTS[scheme]
    if not is_installed(place):
        message = f"`{scheme}://` needs the package `{client.package}`, which is not installed"
        raise MirrorError(message, where=place, hint=f"pip install 'finetune[{client.extra}]'")
    if scheme == "hf":
        return RepositoryBucket(place)
    return Folder(place) if scheme == "file" else ObjectStore(place, client)
