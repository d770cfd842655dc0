"""The strategies by name: how the devices of a training share its work."""

from finetune.training.state import Strategy
from finetune.training.strategy.ddp import DDP
from finetune.training.strategy.fsdp import FSDP
from finetune.training.strategy.hsdp import HSDP

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in (DDP, FSDP, HSDP)}
