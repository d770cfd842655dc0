"""How much memory a training takes."""

import psutil
import torch


def used_bytes() -> int:
    """The most that tensors of this process took of its accelerator so far; without one, the memory that the process holds now."""
    if torch.accelerator.current_accelerator(check_available=True):
        return torch.accelerator.max_memory_allocated()
    return int(psutil.Process().memory_info().rss)
