from finetune.cli.functions import compare as compare
from finetune.cli.functions import evaluate as evaluate
from finetune.cli.functions import package as package
from finetune.cli.functions import plan as plan
from finetune.cli.functions import train as train
from finetune.errors import FinetuneError as FinetuneError

__version__: str
VERBS: tuple[str, ...]

def version(package: str) -> str: ...
def also_a_command(module: str) -> None: ...
