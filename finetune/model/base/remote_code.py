"""The config keys that make a loader run code.

Known ones: `auto_map`; `trust_remote_code` in a config, because it overrode the caller (CVE-2026-5241);
`_attn_implementation_internal` and kernels named as repositories: these are downloaded and run (CVE-2026-4372).
"""

from collections.abc import Iterator

KEYS = ("auto_map", "trust_remote_code", "_attn_implementation_internal", "custom_pipelines")
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")


def asked_by(config: object) -> Iterator[str]:
    """The keys, on every level."""
    if isinstance(config, list):
        for item in config:
            yield from asked_by(item)
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key in KEYS or (key in KERNEL_KEYS and "/" in str(value)):
            yield key
        yield from asked_by(value)
