"""A certificate must fail for every way of lying that we could think of, and say which."""

from __future__ import annotations

import json
import stat
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from expunge.errors import BadData, BadModel, BadSetting, VerificationFailed
from expunge.files import digest_weights
from expunge.records.certificate import certify, inspect_certificate, source_digest, verify
from expunge.records.keys import fingerprint, new_key, private_key
from expunge.records.limits import limits, limits_of
from expunge.records.results import Results
from record_fixtures import SECRET, results_dict


@pytest.fixture
def signed(tmp_path):
    """A folder with key, results, weights before and after, and the certificate that binds them."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    state = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.zeros(2), "count": torch.tensor(3)}
    save_file(state, tmp_path / "before.safetensors")
    after = {**state, "layer.bias": torch.ones(2)}
    save_file(after, tmp_path / "after.safetensors")
    data = results_dict()
    data["weights"] = {"before": digest_weights(state), "after": digest_weights(after)}
    data["case"]["request"]["ids"] = [17, 4, 123456]
    run = Results.from_dict(data)
    run.save(tmp_path / "results.json")
    new_key(tmp_path / "key.pem")
    certify(
        run, tmp_path / "certificate.json", tmp_path / "key.pem",
        config={"note": SECRET}, ids=[17, 4, 123456], row_digests=["ff" * 32], gold="retrained, seed 0",
    )  # fmt: skip
    return tmp_path


def rewrite(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_an_honest_certificate_verifies_with_everything_given(signed):
    found = verify(
        signed / "certificate.json", signed / "after.safetensors", signed / "results.json", signed / "key.pem.pub"
    )
    assert found.signature_valid and found.key_trusted and all(item.holds for item in found.statements)
    assert "Other attacks may bring the forgotten back" in str(found)


def test_signature_and_trust_are_two_statements(signed):
    alone = verify(signed / "certificate.json")
    assert alone.signature_valid is True and alone.key_trusted is None
    new_key(signed / "other.pem")
    other = inspect_certificate(signed / "certificate.json", trusted_key=signed / "other.pem.pub")
    assert other.signature_valid is True and other.key_trusted is False
    with pytest.raises(VerificationFailed, match="trust in the key: signed with key"):
        verify(signed / "certificate.json", trusted_key=signed / "other.pem.pub")
    own = fingerprint(private_key(signed / "key.pem").public_key())
    assert verify(signed / "certificate.json", trusted_key=f"sha256:{own}").key_trusted is True


SECTIONS = ("code", "case", "request", "method", "config", "weights", "results", "verdict", "gold", "seeds", "issued")


@pytest.mark.parametrize("section", [*SECTIONS, "does_not_prove"])
def test_a_changed_section_is_named(signed, section):
    rewrite(signed / "certificate.json", lambda c: c["sections"].update({section: "removed (proved)"}))
    with pytest.raises(VerificationFailed, match=f"fields: changed after signing: {section}"):
        verify(signed / "certificate.json") if section != "weights" else _only_fields(signed)


def _only_fields(folder):
    rewrite(folder / "certificate.json", lambda c: c["sections"].update(weights={"after": "00" * 32}))
    verify(folder / "certificate.json")


@pytest.mark.parametrize("key", ["verdict", "does_not_prove"])
def test_a_left_out_or_added_section_is_named(signed, key):
    rewrite(signed / "certificate.json", lambda c: (c["sections"].pop(key), c["sections"].update(extra=1)))
    with pytest.raises(VerificationFailed, match=f"(?=.*extra)(?=.*{key})"):
        verify(signed / "certificate.json")


def test_changing_section_and_digest_together_breaks_the_signature(signed):
    from expunge.records.canonical import digest

    def forge(certificate):
        certificate["sections"]["gold"] = "none was needed"
        certificate["digests"]["gold"] = digest("none was needed")

    rewrite(signed / "certificate.json", forge)
    with pytest.raises(VerificationFailed, match="signature: it was not made by the embedded key"):
        verify(signed / "certificate.json")


def test_another_key_in_the_certificate_breaks_the_signature(signed):
    from expunge.records.keys import public_pem

    other = Ed25519PrivateKey.generate().public_key()
    change = {"public_key": public_pem(other), "fingerprint": fingerprint(other)}
    rewrite(signed / "certificate.json", lambda c: c["signature"].update(change))
    found = inspect_certificate(signed / "certificate.json", trusted_key=signed / "key.pem.pub")
    assert found.signature_valid is False and found.key_trusted is False


def test_a_borrowed_fingerprint_gains_no_trust(signed):
    """A forger signs with an own key and writes the trusted fingerprint beside it."""
    new_key(signed / "forger.pem")
    run = Results.load(signed / "results.json")
    certify(run, signed / "forged.json", signed / "forger.pem")
    own = fingerprint(private_key(signed / "key.pem").public_key())
    rewrite(signed / "forged.json", lambda c: c["signature"].update(fingerprint=own))
    found = inspect_certificate(signed / "forged.json", trusted_key=own)
    assert found.key_trusted is False and found.signature_valid is False


def test_swapped_weights_are_named(signed):
    with pytest.raises(VerificationFailed, match="weights: before.safetensors holds the weights from before"):
        verify(signed / "certificate.json", weights=signed / "before.safetensors")
    raw = bytearray((signed / "after.safetensors").read_bytes())
    raw[-1] ^= 1
    (signed / "after.safetensors").write_bytes(raw)
    with pytest.raises(VerificationFailed, match="weights: after.safetensors has digest"):
        verify(signed / "certificate.json", weights=signed / "after.safetensors")
    (signed / "after.safetensors").write_bytes(raw[:-3])
    with pytest.raises(BadModel, match="size does not fit"):
        verify(signed / "certificate.json", weights=signed / "after.safetensors")


def test_files_are_bound_by_their_bytes_too(signed):
    """Tied weights: the file has one tensor less than the state dict, so only its bytes can be compared."""
    run = Results.load(signed / "results.json")
    model = signed / "model"
    model.mkdir()
    (signed / "after.safetensors").rename(model / "model.safetensors")
    data = {**run.to_dict(), "weights": {"before": "1a" * 32, "after": "2b" * 32}}
    files = [model / "model.safetensors"]
    certify(Results.from_dict(data), signed / "tied.json", signed / "key.pem", weight_files=files)
    assert verify(signed / "tied.json", weights=model) and verify(signed / "tied.json", weights=files[0])
    (model / "more.safetensors").write_bytes((signed / "before.safetensors").read_bytes())
    with pytest.raises(VerificationFailed, match="weights: model has digest"):
        verify(signed / "tied.json", weights=model)


def test_changed_results_are_named_by_their_part(signed):
    rewrite(signed / "results.json", lambda r: r["measurements"][0].update(unlearned=0.0))
    with pytest.raises(VerificationFailed, match="results: results.json differs in: measurements"):
        verify(signed / "certificate.json", results=signed / "results.json")


def test_layout_of_the_results_file_does_not_matter(signed):
    rewrite(signed / "results.json", lambda r: None)  # other spaces, same content
    assert verify(signed / "certificate.json", results=signed / "results.json")


def test_every_difference_is_told_at_once(signed):
    rewrite(signed / "results.json", lambda r: r["warnings"].append("x"))
    rewrite(signed / "certificate.json", lambda c: c["sections"].update(gold="x"))
    with pytest.raises(VerificationFailed, match="3 differences: fields.*weights.*results"):
        verify(signed / "certificate.json", signed / "before.safetensors", signed / "results.json")


def test_neither_ids_nor_content_are_in_it(signed):
    text = (signed / "certificate.json").read_text()
    assert SECRET not in text and "123456" not in text and "17," not in text
    request = json.loads(text)["sections"]["request"]
    assert set(request) == {"kind", "count", "digest", "ids", "rows"} and len(request["ids"]) == 64


def test_verifying_needs_no_torch(signed):
    """In a process where importing torch (or SQLAlchemy, or jinja2) is an error."""
    code = (
        "import sys\n"
        "for name in ('torch', 'sqlalchemy', 'jinja2', 'safetensors'): sys.modules[name] = None\n"
        "from expunge.records import verify\n"
        "print(verify(*sys.argv[1:5]).key_trusted)"
    )
    names = ("certificate.json", "after.safetensors", "results.json", "key.pem.pub")
    command = [sys.executable, "-c", code, *(str(signed / name) for name in names)]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert done.stdout.strip() == "True", done.stderr


def test_the_private_key_is_kept(signed, tmp_path):
    assert stat.S_IMODE((signed / "key.pem").stat().st_mode) == 0o600
    with pytest.raises(BadSetting, match="free place"):
        new_key(signed / "key.pem")
    (signed / "key.pem").chmod(0o644)
    with pytest.raises(BadSetting, match="chmod 600"):
        private_key(signed / "key.pem")
    with pytest.raises(BadSetting, match="Ed25519 private key"):
        private_key(signed / "key.pem.pub")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema": "expunge.certificate/1"}', "\x00"])
def test_something_else_is_no_certificate(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(VerificationFailed, match=r"Expected a certificate.*found.*Give"):
        verify(tmp_path / "c.json")


def test_no_certificate_without_weights(signed):
    data = {**results_dict(), "weights": {}}
    with pytest.raises(BadData, match="digests of the weights"):
        certify(Results.from_dict(data), signed / "c.json", signed / "key.pem")


def test_the_source_digest_sees_content_and_names(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    first = source_digest(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_text("compiled")
    assert source_digest(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = source_digest(tmp_path)
    (tmp_path / "b.py").write_text("x = 2")
    assert len({first, renamed, source_digest(tmp_path)}) == 3


def test_what_is_not_proved_depends_on_the_guarantee():
    exact, certified, empirical = (set(limits(g)) for g in ("exact", "certified", "empirical"))
    assert len(exact & certified & empirical) >= 4 and exact != certified != empirical != exact
    assert any("budget" in line for line in empirical) and not any("budget" in line for line in exact)
    assert any("hides" in line for line in limits("empirical", "suppression"))


@pytest.mark.parametrize(("verdict", "observed"), [("suppressed", None), ("retained", "suppression")])
def test_a_claim_of_removal_is_told_as_what_the_audit_saw(verdict, observed):
    data = results_dict()
    data["method"]["intention"] = "removal"
    data["verdict"] |= {"verdict": "removed", "numbers": {}}
    assert not any("hides" in line for line in limits_of(Results.from_dict(data)))
    data["verdict"] |= {"verdict": verdict, "numbers": {"observed_intention": {"observed": observed}}}
    assert any("hides" in line for line in limits_of(Results.from_dict(data)))
