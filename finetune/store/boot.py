"""The name that the kernel gives a boot of this machine: what was seen before another one may no longer hold."""

from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str | None:
    """None where the system has no name for its boots."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else None
