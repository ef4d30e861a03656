"""Whole or absent, also on a full disk; one digest for the same tensors however they are stored."""

from __future__ import annotations

import errno
import hashlib
import os
import struct

import pytest

from expunge import files
from expunge.errors import BadModel, DiskFull


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch, call, number):
    target = files.write_atomic(tmp_path / "a.json", "old")

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskFull, match=r"Expected room for 3 bytes.*disk is full.*Free some space"):
        files.write_atomic(target, "new")
    monkeypatch.undo()
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_other_errors_stay_what_they_are_and_leave_no_rest(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="broken") as caught:
        files.write_atomic(tmp_path / "a", b"x")
    assert not isinstance(caught.value, DiskFull) and os.listdir(tmp_path) == []


def test_a_disk_that_takes_one_byte_at_a_time(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data[:1])))
    assert files.write_atomic(tmp_path / "deep" / "a", "h\u00e9llo").read_text("utf-8") == "h\u00e9llo"


def test_permissions_are_kept_or_set(tmp_path):
    target = files.write_atomic(tmp_path / "a", "1", mode=0o640)
    files.write_atomic(target, "2")
    assert target.stat().st_mode & 0o777 == 0o640


def test_digest_of_a_file_is_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert files.digest_file(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_digest_of_weights_by_hand():
    torch = pytest.importorskip("torch")
    state = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor([[3]], dtype=torch.int64)}
    spelled = b'["a","I64",[1,1]]\n' + struct.pack("<q", 3) + b'["b","F32",[2]]\n' + struct.pack("<2f", 1, -2)
    assert files.digest_weights(state) == hashlib.sha256(spelled).hexdigest()


def test_digest_of_weights_is_one_for_memory_file_and_shards(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    kinds = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    state = {f"layer.{i}": torch.arange(6).reshape(2, 3).to(kind) for i, kind in enumerate(kinds)}
    state |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "turned": torch.arange(6.0).reshape(2, 3).t()}
    expected = files.digest_weights(state)
    assert files.digest_weights(dict(reversed(state.items()))) == expected
    whole = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(whole, tmp_path / "all.safetensors", metadata={"format": "pt"})
    assert files.digest_weights(tmp_path / "all.safetensors") == expected
    shards = tmp_path / "shards"
    shards.mkdir()
    for part in (0, 1):
        some = {name: tensor for i, (name, tensor) in enumerate(whole.items()) if i % 2 == part}
        save_file(some, shards / f"model-{part}.safetensors")
    assert files.digest_weights(shards) == expected
    state["layer.0"][0, 0] = 1e-30
    assert files.digest_weights(state) != expected


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04.", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"[]"]
)
def test_what_is_no_safetensors_is_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(BadModel, match="safetensors"):
        files.digest_weights(tmp_path / "w.safetensors")
