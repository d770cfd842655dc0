import os, shutil, subprocess, sys
from tests.conftest import copied
from tests.stories.same_run import assert_same_run
def test_real(recipe_file, tmp_path):
    sections = {"steps": 3, "batch_size": 6, "precision": "fp32", "micro_batch_tokens": 128, "compile": True}
    recipe = recipe_file(train=sections, checkpoint={"every": "1 steps", "keep": {"last": 9}})
    def run(path, cache):
        done = subprocess.run([sys.executable, "-m", "finetune", "train", str(recipe), "--run", str(path), "--quiet"], env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return path
    whole = run(tmp_path / "whole", "a")
    again = copied(whole, tmp_path / "again")
    for step in (2, 3): shutil.rmtree(again / f"checkpoints/step-0000000{step}")
    run(again, "b")
    assert_same_run(again, whole)
