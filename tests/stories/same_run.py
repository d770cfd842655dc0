"""What is the same in two runs of which one was interrupted: everything but times, attempts and names."""

from pathlib import Path

from safetensors.numpy import load_file

from finetune.store.run import journal, row_losses

FOREIGN = {"manifest.json"}  # has the run's name, the attempt and the digest of its parent


def differences(run: Path, other: Path) -> list[str]:
    """In what the checkpoints of the same steps (bytes of every file), the last records and the row losses differ."""
    return [*_of_checkpoints(run, other), *_of_journals(run, other)]


def assert_same_run(run: Path, other: Path) -> None:
    found = differences(run, other)
    assert not found, "\n".join(found)


def _of_checkpoints(run: Path, other: Path) -> list[str]:
    """The last step must be the same; an interrupted run may have others in between."""
    one, two = ({path.name: path for path in (each / "checkpoints").iterdir()} for each in (run, other))
    found = [] if max(one) == max(two) else [f"last checkpoints: {max(one)} against {max(two)}"]
    for step in sorted(one.keys() & two.keys()):
        found += [f"{step}/{difference}" for difference in _of_directories(one[step], two[step])]
    return found


def _of_directories(checkpoint: Path, other: Path) -> list[str]:
    files, others = ({path.name for path in each.iterdir()} - FOREIGN for each in (checkpoint, other))
    if files != others:
        return [f"files {sorted(files)} against {sorted(others)}"]
    unequal = sorted(name for name in files if (checkpoint / name).read_bytes() != (other / name).read_bytes())
    return [difference for name in unequal for difference in _of_files(checkpoint / name, other / name)]


def _of_files(file: Path, other: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return [file.name]
    tensors, others = load_file(file), load_file(other)
    names = [
        name
        for name in tensors.keys() | others.keys()
        if name not in tensors or name not in others or tensors[name].tobytes() != others[name].tobytes()
    ]
    return [f"{file.name}: {name}" for name in sorted(names)] or [f"{file.name}: not its tensors"]


def _of_journals(run: Path, other: Path) -> list[str]:
    records, others = journal.read(run), journal.read(other)
    steps, other_steps = journal.steps(records), journal.steps(others)
    if steps.keys() != other_steps.keys():
        return [f"steps {sorted(steps)} against {sorted(other_steps)}"]
    found = []
    for step in steps:
        quantity = journal.difference(steps[step], other_steps[step])
        found += [f"step {step}: {quantity}"] if quantity else []
        rows, other_rows = row_losses.read_rows(run, step), row_losses.read_rows(other, step)
        is_same = str(rows) == str(other_rows) != "[]"  # as text, nan is equal to itself
        found += [] if is_same else [f"step {step}: row losses"]
    is_same = journal.evaluations(records) == journal.evaluations(others)
    return found if is_same else [*found, "held-out figures"]
