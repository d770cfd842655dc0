"""The kernel's name of this boot: facts from an earlier boot may no longer hold."""

from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str | None:
    """None if the system does not name its boots."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else None
