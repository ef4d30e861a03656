"""Files that are either whole or absent.

`write_atomic` writes beside the target, forces the bytes to the disk and then renames, so a reader (or a process killed
at any moment) sees the old file or the new one, never half of one. Nothing here needs torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from expunge.errors import BadModel, DiskFull

_FULL = {errno.ENOSPC, errno.EDQUOT}


def write_atomic(path: str | os.PathLike[str], data: bytes | str, mode: int | None = None) -> Path:
    """Replace the file at `path` by `data` (text as UTF-8) in one step; the folder is made if it is missing.

    `mode`: permission bits, by default those of the file being replaced, or of any new file (umask).
    Raises `DiskFull` when there is no room: the temporary file is gone and what was there before is intact.
    """
    target = Path(path)
    content = data.encode("utf-8") if isinstance(data, str) else bytes(data)
    temporary: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # The same folder, because a rename is atomic only within one file system.
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        try:
            os.fchmod(handle, _mode_for(target) if mode is None else mode)
            _write_all(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"Expected room for {len(content)} bytes to write {target.name}, and the disk is full "
                f"({os.strerror(error.errno)}). Free some space or choose another folder, then run the same command "
                "again; what was there before is intact."
            ) from error
        raise
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return target


def digest_bytes(data: bytes | str) -> str:
    """SHA-256 of `data` (text as UTF-8), 64 hex digits."""
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).hexdigest()


def digest_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, 64 hex digits, read in pieces so that large weights do not fill the memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_all(handle: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _mode_for(target: Path) -> int:
    try:
        return target.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems refuse to sync a folder; the file's own bytes are already safe
    finally:
        os.close(handle)


def digest_weights(source: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    """SHA-256 of named tensors, the same for a state dict in memory and for the safetensors file made from it.

    source: a state dict (name -> tensor), a `.safetensors` file, or a folder whose `*.safetensors` files (a diffusers
    pipeline's: those of its networks' folders) together hold the tensors. What is hashed, for each tensor in the order of the
    names' UTF-8 bytes: one line of JSON `[name, dtype, shape]` (dtype as safetensors spells it), a newline, then the raw
    little-endian bytes. So the order
    of the entries, the metadata of the file and the way it is cut into shards do not matter. Files need no torch.
    """
    digest = hashlib.sha256()
    if isinstance(source, Mapping):
        for name in sorted(source, key=str.encode):
            tensor = source[name].detach().cpu().contiguous()
            _hash_head(digest, name, _dtype_name(str(tensor.dtype)), list(tensor.shape))
            digest.update(_raw_bytes(tensor))
        return digest.hexdigest()
    tensors = _safetensors_index(Path(source))
    for name in sorted(tensors, key=str.encode):
        file, start, entry = tensors[name]
        _hash_head(digest, name, entry["dtype"], entry["shape"])
        begin, end = entry["data_offsets"]
        with open(file, "rb") as handle:
            handle.seek(start + begin)
            for size in _pieces(end - begin):
                digest.update(handle.read(size))
    return digest.hexdigest()


PIPELINE_NETWORKS = ("unet", "transformer", "text_encoder", "vae")
"""Folders of a diffusers pipeline whose weights make the image; their tensors' names begin with the folder's."""


def is_pipeline(folder: Path) -> bool:
    """Whether a diffusers pipeline was saved in this folder."""
    return (folder / "model_index.json").exists()


def _hash_head(digest: hashlib._Hash, name: str, dtype: str, shape: list[int]) -> None:
    digest.update((json.dumps([name, dtype, shape], ensure_ascii=False, separators=(",", ":")) + "\n").encode("utf-8"))


def _raw_bytes(tensor: Any) -> memoryview:
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def _dtype_name(dtype: str) -> str:
    name = dtype.removeprefix("torch.")
    return _DTYPES.get(name, name)


def _safetensors_index(path: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """name -> (file, offset of the file's data, header entry), over one file or all files of a folder."""
    files = [("", file) for file in sorted(path.glob("*.safetensors"))] if path.is_dir() else [("", path)]
    if is_pipeline(path):
        files = [
            (f"{part}.", file) for part in PIPELINE_NETWORKS for file in sorted((path / part).glob("*.safetensors"))
        ]
    if not files:
        raise BadModel(
            f"Expected weights as *.safetensors in the folder {path.name}, found none. Save them there first."
        )
    found: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for prefix, file in files:
        try:
            with open(file, "rb") as handle:
                length = int.from_bytes(handle.read(8), "little")
                if length > file.stat().st_size - 8:
                    raise ValueError("its header is longer than the file")
                header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                found[prefix + name] = (
                    file,
                    8 + length,
                    {key: entry[key] for key in ("dtype", "shape", "data_offsets")},
                )
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if 8 + length + end != file.stat().st_size:
                raise ValueError("its size does not fit its header")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise BadModel(
                f"Expected a whole safetensors file, found {file.name} which is not one ({error}). "
                "Copy it again, or give the weights as safetensors."
            ) from error
    return found


def _pieces(total: int, size: int = 1 << 22) -> Iterator[int]:
    while total > 0:
        yield min(size, total)
        total -= size
