"""A certificate binds one run: code, case, request, weights before and after, the audit and its verdict.

Form (JSON, schema "expunge.certificate/1"):

    sections    plain facts: code, case, request, method, weights, results, gold, seeds, issued, does_not_prove
    digests     section -> SHA-256 of its canonical JSON (RFC 8785, see `canonical`)
    signature   Ed25519 over the canonical JSON of {"schema", "digests", "key"}, with the public key and its fingerprint

Because the signature covers the digests and the digests cover the sections, a changed fact is named by its section.
Checking needs `cryptography` and no torch. Two statements are kept apart: that the signature is valid (the holder of
the embedded key signed exactly this), and that the key is one you trust (which no file can say about itself).

The request appears as its kind, its count and digests; never ids, never data. Note that a digest of few or
guessable ids can be confirmed by whoever guesses them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature

from expunge.errors import BadData, BadSetting, VerificationFailed
from expunge.files import digest_bytes, digest_file, digest_weights, write_atomic
from expunge.records import keys
from expunge.records.canonical import canonical, digest, digest_ids, plain
from expunge.records.limits import limits_of
from expunge.records.results import Results

SCHEMA = "expunge.certificate/1"


def source_digest(package: str | os.PathLike[str] | None = None) -> str:
    """SHA-256 of a package's source tree (default: the running expunge): the digest of {relative path: file digest}
    over all files but compiled ones."""
    root = Path(package) if package is not None else Path(__file__).resolve().parents[1]
    files = (path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return digest({path.relative_to(root).as_posix(): digest_file(path) for path in files if path.suffix != ".pyc"})


def certify(
    results: Results,
    path: str | os.PathLike[str],
    key: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    ids: Iterable[int | str] | None = None,
    row_digests: Iterable[str] | None = None,
    weight_files: Iterable[str | os.PathLike[str]] = (),
    gold: str = "",
) -> dict[str, Any]:
    """Write the signed certificate of a run to `path` and return it.

    key: private key file (`new_key`). config: the run's configuration, bound by digest. ids, row_digests: the forgotten
    examples; only the digest of each set enters. weight_files: files of the weights after, bound by their bytes too.
    gold: where `retrained` came from, in words.
    """
    if not results.weights.before or not results.weights.after:
        raise BadData(
            "Expected the digests of the weights before and after in the results, found none. "
            "Record them with expunge.files.digest_weights, then certify."
        )
    request, verdict = results.case.request, results.verdict
    sections = {
        "code": {"package": "expunge", "version": _version(), "source": source_digest()},
        "case": results.case.model_dump(exclude={"request", "notes"}),
        "request": {
            "kind": str(request.get("kind", "")),
            "count": results.case.splits.get("forget"),
            "digest": digest(request),
            "ids": request.get("ids_digest") if ids is None else digest_ids(ids),
            "rows": None if row_digests is None else digest_ids(row_digests),
        },
        "method": results.method.model_dump(),
        "config": {"digest": None if config is None else digest(config)},
        "weights": {
            "before": results.weights.before,
            "after": results.weights.after,
            "files": {Path(file).name: digest_file(file) for file in weight_files},
        },
        "results": {"digest": results.digest(), "parts": _parts(results.to_dict())},
        "verdict": None if verdict is None else verdict.model_dump(),
        "gold": gold,
        "seeds": results.seeds.model_dump(),
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "does_not_prove": limits_of(results),
    }
    private = keys.private_key(key)
    public = private.public_key()
    certificate = {
        "schema": SCHEMA,
        "sections": plain(sections),
        "digests": {name: digest(section) for name, section in sections.items()},
        "signature": {
            "algorithm": "Ed25519",
            "public_key": keys.public_pem(public),
            "fingerprint": keys.fingerprint(public),
        },
    }
    certificate["signature"]["value"] = base64.b64encode(private.sign(_message(certificate))).decode("ascii")
    write_atomic(path, json.dumps(certificate, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return certificate


@dataclass(frozen=True)
class Statement:
    """One thing that was checked: `holds` is None where nothing was given to check it with."""

    name: str
    holds: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """What checking a certificate found."""

    certificate: dict[str, Any]
    statements: tuple[Statement, ...]

    @property
    def problems(self) -> list[str]:
        return [f"{item.name}: {item.detail}" for item in self.statements if item.holds is False]

    @property
    def signature_valid(self) -> bool:
        return self._holds("signature") is True

    @property
    def key_trusted(self) -> bool | None:
        """None when no trusted key was given: the signature alone does not say who signed."""
        return self._holds("trust in the key")

    @property
    def does_not_prove(self) -> list[str]:
        return list(self.certificate.get("sections", {}).get("does_not_prove") or [])

    def _holds(self, name: str) -> bool | None:
        return next((item.holds for item in self.statements if item.name == name), None)

    def __str__(self) -> str:
        marks = {True: "ok ", False: "NO ", None: "-- "}
        lines = [f"{marks[item.holds]} {item.name}: {item.detail}" for item in self.statements]
        return "\n".join([*lines, "This does not prove:", *(f"  * {line}" for line in self.does_not_prove)])


def verify(
    path: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    results: str | os.PathLike[str] | None = None,
    trusted_key: str | os.PathLike[str] | bytes | None = None,
) -> Verification:
    """Check a certificate; `VerificationFailed` names all that differs. Arguments as in `inspect_certificate`."""
    found = inspect_certificate(path, weights, results, trusted_key)
    if found.problems:
        raise VerificationFailed(
            f"Expected {Path(path).name} and what was given with it to agree, found {len(found.problems)} difference"
            f"{'s' if len(found.problems) > 1 else ''}: {'; '.join(found.problems)}. "
            "Do not rely on this certificate; ask its issuer for the original files."
        )
    return found


def inspect_certificate(
    path: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    results: str | os.PathLike[str] | None = None,
    trusted_key: str | os.PathLike[str] | bytes | None = None,
) -> Verification:
    """Check everything that can be checked and return it as statements, without raising on a difference.

    weights: the `.safetensors` file (or folder) said to hold the weights after. results: the `results.json`.
    trusted_key: a public key file, PEM text or fingerprint that you have from the signer by another way.
    """
    certificate = _read(path)
    sections, digests = certificate["sections"], certificate["digests"]
    statements = [_check_signature(certificate), _check_trust(certificate, trusted_key)]
    changed = [
        name
        for name in sorted({*sections, *digests})
        if name not in sections or digest(sections[name]) != digests.get(name)
    ]
    detail = f"changed after signing: {', '.join(changed)}" if changed else f"all {len(sections)} as signed"
    statements.append(Statement("fields", not changed, detail))
    statements.append(_check_weights(sections.get("weights") or {}, weights))
    statements.append(_check_results(sections, results))
    return Verification(certificate, tuple(statements))


def _check_signature(certificate: dict[str, Any]) -> Statement:
    signature = certificate["signature"]
    try:
        public = keys.public_from_pem(signature["public_key"])
        public.verify(base64.b64decode(signature["value"], validate=True), _message(certificate))
    except (InvalidSignature, BadSetting, binascii.Error, ValueError, TypeError, AttributeError):
        return Statement("signature", False, "it was not made by the embedded key over these digests")
    if keys.fingerprint(public) != signature["fingerprint"]:
        return Statement("signature", False, "the fingerprint is not that of the embedded key")
    return Statement("signature", True, f"made by the embedded key {signature['fingerprint'][:16]}...")


def _check_trust(certificate: dict[str, Any], trusted: str | os.PathLike[str] | bytes | None) -> Statement:
    if trusted is None:
        return Statement("trust in the key", None, "no trusted key was given, so who signed is not known")
    wanted = keys.trusted_fingerprint(trusted)
    try:  # from the key itself: the fingerprint written beside it could be another's
        found = keys.fingerprint(keys.public_from_pem(certificate["signature"]["public_key"]))
    except (BadSetting, AttributeError):
        found = "unreadable"
    if found == wanted:
        return Statement("trust in the key", True, f"it is the trusted key {wanted[:16]}...")
    return Statement("trust in the key", False, f"signed with key {found[:16]}..., trusted is {wanted[:16]}...")


def _check_weights(bound: Mapping[str, Any], weights: str | os.PathLike[str] | None) -> Statement:
    if weights is None:
        return Statement("weights", None, "no weights were given")
    path = Path(weights)
    # By their bytes first: a format that leaves out tied tensors has another digest than the state dict in memory.
    files, signed = sorted(path.glob("*.safetensors")) if path.is_dir() else [path], bound.get("files") or {}
    if signed and {digest_file(file) for file in files if file.is_file()} == set(signed.values()):
        return Statement("weights", True, f"{path.name} holds the certified files")
    found = digest_weights(path)
    if found == bound.get("after"):
        return Statement("weights", True, f"{path.name} holds the certified weights")
    if found == bound.get("before"):
        return Statement("weights", False, f"{path.name} holds the weights from before the unlearning")
    after = str(bound.get("after"))
    return Statement("weights", False, f"{path.name} has digest {found[:16]}..., certified is {after[:16]}...")


def _check_results(sections: Mapping[str, Any], results: str | os.PathLike[str] | None) -> Statement:
    if results is None:
        return Statement("results", None, "no results were given")
    data = Results.load(results).to_dict()
    bound = sections.get("results") or {}
    if digest(data) == bound.get("digest"):
        return Statement("results", True, f"{Path(results).name} holds the certified measurements")
    parts, signed = _parts(data), bound.get("parts") or {}
    differ = [name for name in sorted({*parts, *signed}) if parts.get(name) != signed.get(name)]
    return Statement("results", False, f"{Path(results).name} differs in: {', '.join(differ) or 'its digest'}")


def _parts(results: Mapping[str, Any]) -> dict[str, str]:
    return {name: digest(value) for name, value in results.items()}


def _message(certificate: Mapping[str, Any]) -> bytes:
    return canonical(
        {
            "schema": certificate["schema"],
            "digests": certificate["digests"],
            "key": digest_bytes(certificate["signature"]["public_key"]),
        }
    )


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The certificate as a dict with the shape that checking relies on."""
    try:
        certificate = json.loads(Path(path).read_text("utf-8"))
        problem = None if certificate["schema"] == SCHEMA else f"schema {certificate['schema']!r}"
        shape = [certificate["sections"], certificate["digests"], certificate["signature"]]
        if not all(isinstance(part, dict) for part in shape):
            problem = "sections that are not objects"
        missing = {"algorithm", "public_key", "fingerprint", "value"} - set(certificate["signature"])
        problem = f"a signature without {', '.join(sorted(missing))}" if missing else problem
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"a file that cannot be read as one ({type(error).__name__}: {error})"
    if problem:
        raise VerificationFailed(
            f"Expected a certificate of schema {SCHEMA} in {Path(path).name}, found {problem}. "
            "Give the certificate.json of a run, unchanged."
        )
    return certificate


def _version() -> str:
    try:
        return metadata.version("expunge")
    except metadata.PackageNotFoundError:
        return "source tree"
