"""`finetune report`: its file, its pictures, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.compare.report import write
from finetune.compare.report.page import to_script
from finetune.compare.report.payload import Asked, Report
from finetune.errors import FinetuneError
from tests.compare.made_runs import made, step, whole
from tests.compare.report.test_payload import evaluation

PNG = b"\x89PNG\r\n"


@pytest.mark.slow
def test_the_command_writes_a_page_and_pictures(tmp_path, finetune) -> None:
    run = whole(tmp_path / "run", 8)
    made_of = finetune("report", run, "--output", tmp_path / "a.html", "--pictures", tmp_path / "pictures", "--json")
    facts = json.loads(made_of.stdout)
    assert facts["path"] == str(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!doctype html>") and "data-live" not in page and "default-src &#x27;none&#x27;" in page
    names = ["loss.png", "learning_rate.png", "grad_norm.png"]
    assert facts["pictures"] == [str(tmp_path / "pictures" / name) for name in names]
    assert all((tmp_path / "pictures" / name).read_bytes().startswith(PNG) for name in names)
    assert "wrote report.html" in finetune("report", run, cwd=tmp_path).stdout


@pytest.mark.slow
@pytest.mark.parametrize("lines", [[], [step(1, "nan")]])
def test_a_run_without_a_figure_has_pictures(tmp_path, lines) -> None:
    run = made(tmp_path / "run", 9, lines)
    write.write(Report([run], Asked()), tmp_path / "report.html", tmp_path / "pictures")
    assert (tmp_path / "pictures/loss.png").read_bytes().startswith(PNG)


def test_names_and_texts_end_no_script(tmp_path) -> None:
    run, other = whole(tmp_path / "a <!--<script>", 8), whole(tmp_path / "\udcff", 8)
    evaluation(run, 0, 0.0)
    evaluation(run, 8, 0.4, answers=["</ScRiPt><!--<script>&amp;"] * 40)
    report = Report([run, other], Asked())
    report.update()
    data = to_script(report.payload())
    assert not {*"<>&"} & {*data}
    assert json.loads(data)["samples"][0]["rows"][0]["answer_b"] == "</ScRiPt><!--<script>&amp;"
    write.write(report, tmp_path / "report.html", None)
    assert (tmp_path / "report.html").read_text().lower().count("</script>") == 3


def test_a_file_that_cannot_be_written_is_named(tmp_path) -> None:
    report = Report([whole(tmp_path / "run", 8)], Asked())
    with pytest.raises(FinetuneError, match="there is no such folder"):
        write.write(report, tmp_path / "none/report.html", None)
    with pytest.raises(FinetuneError, match="cannot write: is a directory"):
        write.write(report, tmp_path, None)
    with pytest.raises(FinetuneError, match="/dev/full: cannot write: no space left on device"):
        write.write(report, Path("/dev/full"), None)


@pytest.mark.slow
def test_neither_command_imports_torch(tmp_path) -> None:
    run = whole(tmp_path / "run", 8)
    evaluation(run, 0, 0.0)
    evaluation(run, 8, 0.1)
    script = "import sys; from finetune.cli import cli; cli.main(sys.argv[1:], standalone_mode=False); sys.exit('torch' in sys.modules)"
    for arguments in (["curves", str(run)], ["report", str(run), "--output", str(tmp_path / "report.html")]):
        subprocess.run([sys.executable, "-c", script, *arguments], check=True, env=os.environ, capture_output=True)


def test_serving_writes_no_files(tmp_path, finetune) -> None:
    refused = finetune("report", whole(tmp_path / "run", 8), "--serve", "--output", tmp_path / "a.html")
    assert (refused.returncode, "--serve writes no files" in refused.stderr) == (2, True)
