"""MUSE (Shi et al., 2407.06460): texts to forget and to keep, with questions about both, from its public hub or from two folders.

    texts = muse("news")                    EXPUNGE_DATA/muse/news, then the hub (muse-bench/MUSE-News); or "books"; or a folder
    texts = from_folders("forget/", "retain/")                       one text in each .txt file

The hub's layout, as `config/split` in .json, .jsonl, .txt or .parquet:

    raw/forget, raw/retain1, raw/holdout    text            what is to go, what is kept, what nobody learned
    verbmem/forget                          prompt, gt      beginnings of forget texts, and how they go on
    knowmem/forget_qa, knowmem/retain_qa    question, answer; forget_qa_icl and retain_qa_icl are their ten demonstrations
    privleak/forget, privleak/holdout       text            whose membership is asked
    sust/forget_1 ... forget_4              text            four requests one after another (news only)

raw/retain2, which the target has learned as well, is MUSE's to evaluate on, and is handed to no method. scal/forget_k is made of
sust/forget_1 to forget_k.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.cases.loading import data_home
from expunge.errors import BadData, nearest, need_extra

HUB = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
FOLDS = 4
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Texts:
    """forget, retain: texts. holdout: texts of the forget kind that nobody learned; without them they are cut out of `forget`.
    questions: split -> pairs of question and answer, the ten demonstrations first. verbatim: pairs of a forget text's beginning and
    what follows. members: split -> texts whose membership is asked. folds: forget texts of successive requests."""

    forget: Sequence[str]
    retain: Sequence[str]
    questions: dict[str, Pairs] = field(default_factory=dict)
    holdout: Sequence[str] = ()
    verbatim: Pairs = field(default_factory=list)
    members: dict[str, list[str]] = field(default_factory=dict)
    folds: Sequence[Sequence[str]] = ()


def muse(which: str | Path = "news") -> Texts:
    """The texts of a corpus by name, or of a folder in the hub's layout; `BadData` says which file it misses."""
    folder = _folder(which)
    hub = HUB.get(str(which))

    def texts(config: str, split: str) -> list[str]:
        return [str(_only(row, ("text",), config, split)[0]) for row in _rows(folder, hub, config, split)]

    def pairs(config: str, split: str, *names: str) -> Pairs:
        found = (_only(row, names, config, split) for row in _rows(folder, hub, config, split))
        return [(str(first), str(second)) for first, second in found]

    def asked(split: str) -> Pairs:
        return [p for part in (f"{split}_qa_icl", f"{split}_qa") for p in pairs("knowmem", part, "question", "answer")]

    streams = _has(folder, "sust", "forget_1") or (folder is None and which == "news")
    return Texts(
        texts("raw", "forget"), texts("raw", "retain1"), {split: asked(split) for split in ("forget", "retain")},
        texts("raw", "holdout"), pairs("verbmem", "forget", "prompt", "gt"),
        {split: texts("privleak", split) for split in ("forget", "holdout")},
        [texts("sust", f"forget_{k + 1}") for k in range(FOLDS)] if streams else (),
    )  # fmt: skip


def from_folders(forget: str | Path, retain: str | Path) -> Texts:
    """The .txt files of two folders, and forget_qa.jsonl / retain_qa.jsonl in them where they exist."""
    found, questions = {}, {}
    for name, folder in (("forget", forget), ("retain", retain)):
        files = sorted(Path(folder).glob("*.txt"))
        if not files:
            raise BadData(f"expected .txt files in the {name} folder {folder}, found none; put one text into each file")
        found[name] = [f.read_text(encoding="utf-8") for f in files]
        asked = Path(folder) / f"{name}_qa.jsonl"
        if asked.is_file():
            rows = [json.loads(line) for line in asked.read_text("utf-8").splitlines() if line.strip()]
            questions[name] = [(row["question"], row["answer"]) for row in rows]
    return Texts(found["forget"], found["retain"], questions)


def _folder(which: str | Path) -> Path | None:
    """Where a corpus lies on this machine; None for one that is only on the hub."""
    if str(which) in HUB:
        home = data_home()
        folder = home / "muse" / str(which) if home is not None else None
        return folder if folder is not None and folder.is_dir() else None
    if not Path(which).is_dir():
        raise BadData(
            f"expected a corpus of MUSE, one of {', '.join(HUB)}, or a folder in its hub's layout, found '{which}'."
            f"{nearest(str(which), HUB)} Give one of them."
        )
    return Path(which)


def _files(folder: Path | None, config: str, split: str) -> list[Path]:
    if folder is None:
        return []
    own = [folder / config / f"{split}.{ending}" for ending in ("json", "jsonl", "parquet", "txt")]
    return [file for file in own if file.is_file()][:1] or sorted((folder / config).glob(f"{split}-*.parquet"))


def _has(folder: Path | None, config: str, split: str) -> bool:
    return bool(_files(folder, config, split))


def _rows(folder: Path | None, hub: str | None, config: str, split: str) -> list[Any]:
    files = _files(folder, config, split)
    if files:
        return [row for file in files for row in _read(file)]
    place = f"{folder}/{config}" if folder is not None else "EXPUNGE_DATA/muse"
    advice = f"expected {split}.json, .jsonl, .txt or .parquet of MUSE's {config} in {place}"
    if hub is None:
        raise BadData(f"{advice}, found none; copy the benchmark's files there as its hub has them")
    try:
        return list(need_extra("datasets", "huggingface").load_dataset(hub, config, split=split))
    except Exception as error:  # the hub raises a family of its own for each cause
        raise BadData(
            f"{advice} or on the hub ({hub}), found neither ({type(error).__name__}); download it and set EXPUNGE_DATA"
        ) from error


def _read(file: Path) -> list[Any]:
    if file.suffix == ".parquet":
        return need_extra("pyarrow.parquet", "huggingface").read_table(file).to_pylist()
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".txt":
        return [text]
    try:
        return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    except ValueError as error:
        raise BadData(f"expected {file} to hold JSON, found that it does not ({error}); fetch it again") from error


def _only(row: Any, names: Sequence[str], config: str, split: str) -> list[Any]:
    """The named fields of a row; of a bare text, itself."""
    if isinstance(row, str) and len(names) == 1:
        return [row]
    if not isinstance(row, dict) or any(name not in row for name in names):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise BadData(
            f"expected rows with {' and '.join(names)} in MUSE's {config}/{split}, found {found}; fetch the file again"
        )
    return [row[name] for name in names]


__all__ = ["HUB", "Texts", "from_folders", "muse"]
