import json, pytest
from pathlib import Path
def test_retention(recipe_file, train, tmp_path, capsys):
    r = recipe_file(checkpoint={"every": "4 steps", "keep": {"last": 1}}, data=None) if False else recipe_file(checkpoint={"every": "4 steps", "keep": {"last": 1}})
    run = train(r, tmp_path/"run", "checkpoint.keep.last=3")
    print(sorted(p.name for p in (run/"checkpoints").iterdir()))
    f = run/"checkpoints/step-00000010/optimizer.safetensors"
    b = bytearray(f.read_bytes()); b[-5]^=1; f.chmod(0o644); f.write_bytes(b)
    from finetune.recorder import Recorder
    train(r, run, "checkpoint.keep.last=1", "checkpoint.every=1 steps")
    print(sorted(p.name for p in (run/"checkpoints").iterdir()))
    print(capsys.readouterr().err)

def test_two(recipe_file, train, tmp_path, finetune):
    a = train(recipe_file(), tmp_path/"a")
    b = train(recipe_file(train={"steps":3,"batch_size":6,"precision":"bf16"}), tmp_path/"b")
    r = finetune("evaluate", f"{a}@last", f"{b}@last")
    print(r.returncode, r.stdout[-500:], r.stderr[-1500:])
    r = finetune("evaluate", f"{a}@last", "--set", "data.holdout=5")
    print(r.returncode, r.stdout[-500:], r.stderr[-1500:])
