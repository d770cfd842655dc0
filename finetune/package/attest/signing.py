"""A signature over a package in the format of OpenSSF Model Signing v1.0 (https://github.com/ossf/model-signing-spec).

A Sigstore bundle v0.3 around a DSSE envelope (https://github.com/secure-systems-lab/dsse) around an in-toto statement. It skips the
card, because people correct it. Needs `cryptography`, the extra `signing`.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import PackageError
from finetune.package.verify.contents import CARD, Finding, files_of, sha256

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

FILE = "model.sig"
PREDICATE = "https://model_signing/signature/v1.0"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
IGNORED = (".git", ".gitattributes", ".github", ".gitignore", FILE, CARD)
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}


def sign(directory: Path, key: Path) -> None:
    """Writes model.sig. `key` is an elliptic-curve private key as PEM, without a password; otherwise raises PackageError."""
    private = _private(key)
    payload = json.dumps(_statement(directory), sort_keys=True).encode()
    signature = private.sign(_encoded(payload), _algorithm(private.public_key(), key))
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": _hint(private.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    (directory / FILE).write_text(json.dumps(bundle) + "\n")


def findings(directory: Path, key: Path | None) -> Iterator[Finding]:
    """The problems of a signature. Without a public key, only the files are compared with the signed ones; the signer stays unknown."""
    try:
        bundle = json.loads((directory / FILE).read_text())
        envelope = bundle["dsseEnvelope"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        statement = json.loads(payload)
        signed = {item["name"]: item["digest"] for item in statement["predicate"]["resources"]}
        hint = bundle["verificationMaterial"]["publicKey"]["hint"]
    except FileNotFoundError:
        yield Finding("signature", FILE, None, "is missing")
        return
    except (ValueError, KeyError, TypeError, IndexError) as error:
        yield Finding("signature", FILE, None, f"cannot be read: {error!r}")
        return
    if key:
        yield from _of_key(payload, signature, hint, key)
    there = {item["name"]: item["digest"] for item in _resources(directory)}
    for name in sorted(signed.keys() | there.keys()):
        if signed.get(name) != there.get(name):
            what = "is not the file that was signed" if name in signed and name in there else "was not signed"
            yield Finding("signature", name, None, what if name in there else "is missing, and was signed")


def _of_key(payload: bytes, signature: bytes, hint: object, key: Path) -> Iterator[Finding]:
    from cryptography.exceptions import InvalidSignature

    public = _public(key)
    if hint != _hint(public):
        yield Finding("signature", FILE, None, "was made with another key")
        return
    try:
        public.verify(signature, _encoded(payload), _algorithm(public, key))
    except InvalidSignature:
        yield Finding("signature", FILE, None, "does not hold")


def _statement(directory: Path) -> dict[str, object]:
    resources = _resources(directory)
    whole = hashlib.sha256(b"".join(bytes.fromhex(item["digest"]) for item in resources)).hexdigest()
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(IGNORED)}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "model", "digest": {"sha256": whole}}],
        "predicateType": PREDICATE,
        "predicate": {"serialization": serialization, "resources": resources},
    }


def _resources(directory: Path) -> list[dict[str, str]]:
    files = sorted(files_of(directory).items())
    return [
        {"name": name, "algorithm": "sha256", "digest": sha256(path)}
        for name, path in files
        if name.partition("/")[0] not in IGNORED
    ]


def _encoded(payload: bytes) -> bytes:
    """The signed bytes: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _private(path: Path) -> "ec.EllipticCurvePrivateKey":
    _need_cryptography(path)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _read(path, "private", lambda content: serialization.load_pem_private_key(content, password=None))
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _of_no_curve(path)
    _algorithm(key.public_key(), path)
    return key


def _public(path: Path) -> "ec.EllipticCurvePublicKey":
    _need_cryptography(path)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _read(path, "public", serialization.load_pem_public_key)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise _of_no_curve(path)
    _algorithm(key, path)
    return key


def _need_cryptography(path: Path) -> None:
    if not find_spec("cryptography"):
        hint = "install the extra: pip install '.[signing]'"
        raise PackageError("signatures need the package `cryptography`", where=str(path), hint=hint)


def _read(path: Path, kind: str, load: Callable[[bytes], object]) -> object:
    try:
        return load(path.read_bytes())
    except (ValueError, TypeError, OSError) as error:
        hint = f"name a {kind} key on a P-256, P-384 or P-521 curve, as PEM, without a password"
        raise PackageError(f"is no {kind} key: {error}", where=str(path), hint=hint) from None


def _of_no_curve(path: Path) -> PackageError:
    hint = "make one: openssl ecparam -name prime256v1 -genkey -noout -out key.pem"
    return PackageError("is no key on a P-256, P-384 or P-521 curve", where=str(path), hint=hint)


def _algorithm(public: "ec.EllipticCurvePublicKey", path: Path) -> "ec.ECDSA":
    """ECDSA with the hash for the curve."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    if public.curve.name not in CURVES:
        raise _of_no_curve(path)
    return ec.ECDSA(getattr(hashes, CURVES[public.curve.name])())


def _hint(public: "ec.EllipticCurvePublicKey") -> str:
    """SHA-256 of the public key as PEM."""
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(public.public_bytes(serialization.Encoding.PEM, form)).hexdigest()
