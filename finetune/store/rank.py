"""The rank of this process, by its launcher's variables: one rank prints for all."""

from collections.abc import Mapping


def is_first(environment: Mapping[str, str]) -> bool:
    """Whether this process is rank 0, or the only one."""
    return environment.get("RANK", "0") == "0"


def is_alone(environment: Mapping[str, str]) -> bool:
    """Whether this process trains without others."""
    return environment.get("WORLD_SIZE", "1") == "1"
