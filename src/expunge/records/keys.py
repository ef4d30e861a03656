"""Ed25519 keys as PEM files. The private key is readable by its owner only and is never overwritten."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from expunge.errors import BadSetting
from expunge.files import digest_bytes, write_atomic

_HEX = set("0123456789abcdef")


def new_key(path: str | os.PathLike[str]) -> Path:
    """Make a private key at `path` (mode 0600) and its public half at `path` + ".pub", which others can be given."""
    target = Path(path)
    if target.exists():
        raise BadSetting(
            f"Expected a free place for a new key, found a file at {target.name}. "
            "Choose another name; a key that has signed certificates must not be lost."
        )
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomic(target, private, mode=0o600)
    write_atomic(Path(f"{target}.pub"), public_pem(key.public_key()), mode=0o644)
    return target


def private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """Read a private key; one that others can read is refused."""
    target = Path(path)
    key = _read_pem(target.read_bytes(), target.name) if target.exists() else None
    if not isinstance(key, Ed25519PrivateKey):
        found = "no file" if key is None else "a public key or a key of another kind"
        raise BadSetting(
            f"Expected an Ed25519 private key at {target.name}, found {found}. "
            "Make one with: expunge.records.new_key(path)"
        )
    if os.name == "posix" and target.stat().st_mode & 0o077:
        raise BadSetting(
            f"Expected a private key that only its owner can read, found mode {target.stat().st_mode & 0o777:04o} "
            f"on {target.name}. Run: chmod 600 {target.name} (and make a new key if others may have read this one)."
        )
    return key


def public_pem(key: Ed25519PublicKey) -> str:
    """The public key as PEM text."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def public_from_pem(pem: str | bytes) -> Ed25519PublicKey:
    """A public key from PEM text (of the public key, or of the private key it belongs to)."""
    key = _read_pem(pem.encode() if isinstance(pem, str) else pem, "the given text")
    if isinstance(key, Ed25519PrivateKey):
        return key.public_key()
    if isinstance(key, Ed25519PublicKey):
        return key
    raise BadSetting("Expected an Ed25519 key, found a key of another kind. Give the .pub file made by new_key.")


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the 32 raw bytes of the public key, 64 hex digits."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return digest_bytes(raw)


def trusted_fingerprint(trusted: str | os.PathLike[str] | bytes) -> str:
    """The fingerprint of a trusted key given as a fingerprint, as PEM text, or as the path of a PEM file."""
    if isinstance(trusted, bytes):
        return fingerprint(public_from_pem(trusted))
    text = os.fspath(trusted)
    bare = text.strip().lower().removeprefix("sha256:")
    if len(bare) == 64 and set(bare) <= _HEX:
        return bare
    if text.lstrip().startswith("-----BEGIN"):
        return fingerprint(public_from_pem(text))
    if not Path(text).is_file():
        raise BadSetting(
            f"Expected the trusted key as a fingerprint (64 hex digits) or a PEM file, found {text!r}. "
            "Give the .pub file of the signer."
        )
    return fingerprint(public_from_pem(Path(text).read_bytes()))


def _read_pem(pem: bytes, name: str) -> object:
    try:
        if b"PRIVATE KEY" in pem:
            return serialization.load_pem_private_key(pem, password=None)
        return serialization.load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadSetting(
            f"Expected a key in PEM form, found {name} which is not ({error}). Give another file."
        ) from error
