"""Takes out of bitsandbytes' wheel what is for other devices than one version of CUDA: of 43 MB, 4 stay. `slim.py FOLDER cuda130`."""

import base64
import csv
import hashlib
import io
import re
import sys
import zipfile
from pathlib import Path

OTHERS = re.compile(r"libbitsandbytes_(cuda|rocm|xpu)")


def slim(wheel: Path, kept: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not OTHERS.search(name) or kept in name]
        files = {name: archive.read(name) for name in names}
    record = next(name for name in files if name.endswith(".dist-info/RECORD"))
    files[record] = _record(files, record).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def _record(files: dict[str, bytes], record: str) -> str:
    """What a wheel says of its files: name, digest, size."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.writerow([name, "", ""] if name == record else [name, f"sha256={digest}", len(content)])
    return text.getvalue()


if __name__ == "__main__":
    for path in Path(sys.argv[1]).glob("bitsandbytes-*.whl"):
        slim(path, sys.argv[2])
