"""Signatures in the format of OpenSSF Model Signing, judged by the official verifier."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from finetune.errors import PackageError
from finetune.package.attest import signing


def written(key, place: Path) -> tuple[Path, Path]:
    private, public = place.with_suffix(".pem"), place.with_suffix(".pub")
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


SLOW = [pytest.param(curve, marks=pytest.mark.slow) for curve in (ec.SECP384R1, ec.SECP521R1)]


@pytest.fixture(params=[ec.SECP256R1, *SLOW])
def keys(request, tmp_path) -> tuple[Path, Path]:
    return written(ec.generate_private_key(request.param()), tmp_path / "key")


@pytest.fixture
def package(merged, tmp_path) -> Path:
    shutil.copytree(merged.directory, tmp_path / "package")
    return tmp_path / "package"


def official(package: Path, public: Path) -> int:
    command = [sys.executable, "-m", "model_signing", "verify", "key", package]
    command += ["--signature", package / "model.sig", "--public_key", public]
    return subprocess.run([str(word) for word in command], capture_output=True).returncode


@pytest.mark.slow
def test_the_official_verifier_accepts_and_rejects_what_ours_does(package, keys) -> None:
    private, public = keys
    signing.sign(package, private)
    assert (official(package, public), list(signing.findings(package, public))) == (0, [])
    with (package / "README.md").open("a") as card:
        card.write("A person corrected this card.\n")
    assert (official(package, public), list(signing.findings(package, public))) == (0, [])
    content = bytearray((package / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (package / "model.safetensors").write_bytes(content)
    (found,) = signing.findings(package, public)
    assert (found.file, found.message) == ("model.safetensors", "is not the file that was signed")
    assert official(package, public) == 1


@pytest.mark.slow
def test_what_was_signed_by_somebody_else_or_edited_afterwards_is_found(package, keys, tmp_path) -> None:
    private, public = keys
    signing.sign(package, private)
    _, other = written(ec.generate_private_key(ec.SECP256R1()), tmp_path / "other")
    assert [one.message for one in signing.findings(package, other)] == ["was made with another key"]
    bundle = json.loads((package / "model.sig").read_text())
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = "AAAA"
    (package / "model.sig").write_text(json.dumps(bundle))
    assert [one.message for one in signing.findings(package, public)] == ["does not hold"]
    (package / "NOTICE").write_text("more")
    assert [one.file for one in signing.findings(package, None)] == ["NOTICE"]
    (package / "model.sig").write_text("{}")
    assert "cannot be read" in next(signing.findings(package, public)).message


def test_what_is_no_key_is_told(package, tmp_path) -> None:
    (tmp_path / "key.pem").write_text("not a key")
    with pytest.raises(PackageError, match="is no private key"):
        signing.sign(package, tmp_path / "key.pem")
    private, _ = written(rsa.generate_private_key(65537, 2048), tmp_path / "rsa")
    with pytest.raises(PackageError, match="is no key on a P-256"):
        signing.sign(package, private)
    assert not (package / "model.sig").exists()
