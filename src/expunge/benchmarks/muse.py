"""MUSE (Shi et al., 2407.06460): six things an unlearned language model should have, from any two folders of text.

    expunge bench muse --methods npo,grad_diff                                  the embedded model on two of Shakespeare's plays
    expunge bench muse --forget A/ --retain B/ --model FOLDER --folds 4         your texts, your model

    C1 VerbMem     does it continue a forgotten text as it was?            aim: retrained's value
    C2 KnowMem f   does it answer questions about forgotten texts?         aim: retrained's value
    C3 PrivLeak    does membership tell?                                   aim: 0
    C4 KnowMem r   does it still answer about kept texts?                  higher is better
    C5 scalability, C6 sustainability: C1 and C4 as the request grows, and after each of several requests (`scaling`)

Holdout, which membership needs, is cut out of the forget texts before training: every second window by default. Questions:
files `forget_qa.jsonl` and `retain_qa.jsonl` ({question, answer}) beside the texts are asked with MUSE's ten demonstrations;
without them a question is a cloze, the beginning of a passage whose next words are the answer, and the tables say so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from expunge.audits.golds import original
from expunge.audits.metrics.text import few_shot_prompt
from expunge.benchmarks.nano import CONTEXT, cache_home, joined, llama
from expunge.benchmarks.tofu import NANO_SETTINGS, configured, wanted
from expunge.cases import Case, requests
from expunge.cases.loading import data_home, load_model, load_tokenizer
from expunge.cases.text import TextData, plain_text, question_answer
from expunge.errors import BadData, need_extra
from expunge.parts.plan import Optimizer, Training
from expunge.records.compare import MethodSpec, compare
from expunge.records.comparison import Comparison

WINDOW, CLOZE_GIVEN, CLOZE_ASKED, DEMONSTRATIONS, QUESTIONS = 64, 12, 8, 10, 100
NANO_ROWS = {"forget": 60, "retain": 240}
PLAYS = {"forget": "ROMEO:", "retain": "CORIOLANUS:"}
"""The embedded texts begin where these two first speak in EXPUNGE_DATA/text/shakespeare.txt."""

RECIPE = Training(
    epochs=45, batch_size=16,
    optimizer=Optimizer("adamw", lr=3e-3, weight_decay=0.01, clip=1.0, schedule="linear", warmup=0.055),
)  # fmt: skip
MEASURES = ("probability", "verbmem", "knowmem_forget", "knowmem_retain", "privleak", "token_membership")


@dataclass(frozen=True)
class Texts:
    """forget, retain: texts. questions: split -> (question, answer) pairs, where there are some."""

    forget: Sequence[str]
    retain: Sequence[str]
    questions: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


def from_folders(forget: Path, retain: Path) -> Texts:
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


def plays() -> Texts:
    """Two plays of Shakespeare, from EXPUNGE_DATA/text."""
    home = data_home()
    file = home / "text" / "shakespeare.txt" if home is not None else None
    if file is None or not file.is_file():
        raise BadData(
            "expected two folders of texts, or shakespeare.txt in EXPUNGE_DATA/text for the embedded benchmark, found neither; "
            "pass --forget DIR --retain DIR, or set EXPUNGE_DATA"
        )
    text = file.read_text(encoding="utf-8")
    return Texts(*([text[text.index(start) :][:60_000]] for start in PLAYS.values()))


@cache
def nano_tokenizer() -> Any:
    """A byte-level BPE of 1,200 tokens, trained on the embedded plays."""
    tokenizers, transformers = need_extra("tokenizers", "language"), need_extra("transformers", "language")
    texts = plays()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.train_from_iterator(
        [*texts.forget, *texts.retain],
        tokenizers.trainers.BpeTrainer(
            vocab_size=1200, special_tokens=["<pad>", "<eos>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", model_max_length=CONTEXT
    )


def muse_case(
    texts: Texts,
    model: Any,
    tokenizer: Any,
    *,
    window: int = WINDOW,
    holdout_every: int = 2,
    rows: dict[str, int] | None = None,
    recipe: Training | None = RECIPE,
    name: str = "muse",
) -> Case:
    """The benchmark's case: windows of the texts; every `holdout_every`-th forget window is held out of training.

    rows: at most so many windows of each kind (evenly from the beginning). The column `fold` (0..3) cuts the forget rows for
    scalability and sustainability.
    """
    limit = rows or {}
    windows = plain_text(tokenizer, texts.forget, window=window)
    out = [i for i in range(len(windows)) if i % holdout_every == holdout_every - 1]
    kept = [i for i in range(len(windows)) if i % holdout_every != holdout_every - 1]
    forget = windows.subset(kept[: limit.get("forget")])
    holdout = windows.subset(out[: limit.get("forget")])
    retain = plain_text(tokenizer, texts.retain, window=window)
    retain = retain.subset(range(min(len(retain), limit.get("retain", len(retain)))))
    folds = [4 * i // len(forget) for i in range(len(forget))]
    data = joined(_marked(retain, [-1] * len(retain)), _marked(forget, folds))
    probes = {
        "knowmem_forget": _questions(texts.questions.get("forget"), forget, tokenizer),
        "knowmem_retain": _questions(texts.questions.get("retain"), retain, tokenizer),
    }
    return Case(model, data, requests.where("fold", ">=", 0), task="language", holdout=holdout, recipe=recipe, name=name,
                probes=probes)  # fmt: skip


def _marked(table: TextData, folds: Sequence[int]) -> TextData:
    return TextData(table.tokens, table.starts, table.tokenizer, pad=table.pad, fold=list(folds),
                    zlib_bytes=[int(v) for v in table.column("zlib_bytes")])  # fmt: skip


def _questions(pairs: Sequence[tuple[str, str]] | None, windows: TextData, tokenizer: Any) -> TextData:
    """Pairs as few-shot questions; without pairs, clozes: a passage from inside a window, its next tokens the answer."""
    if pairs:
        shown, asked = pairs[:DEMONSTRATIONS], pairs[DEMONSTRATIONS : DEMONSTRATIONS + QUESTIONS]
        return question_answer(
            tokenizer, [q for q, _ in asked], [a for _, a in asked], template=lambda q: few_shot_prompt(shown, q)
        )
    rows, starts = [], []
    for row in windows.tokens:
        first = len(row) // 3  # not the window's own beginning: that would be VerbMem again
        passage = row[first : first + CLOZE_GIVEN + CLOZE_ASKED]
        if len(passage) == CLOZE_GIVEN + CLOZE_ASKED:
            rows.append(passage)
            starts.append(CLOZE_GIVEN)
    return TextData(rows[:QUESTIONS], starts[:QUESTIONS], tokenizer, pad=windows.pad)


@cache
def nano_muse(seed: int = 0) -> Case:
    """The embedded benchmark with its trained original of one seed, kept by content."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = llama()
    torch.random.set_rng_state(state)
    case = muse_case(plays(), model, nano_tokenizer(), rows=NANO_ROWS, recipe=RECIPE, name="nano-muse")
    return case.with_(model=original(case, seed, cache_home() / "muse").model)


def run(
    methods: Sequence[MethodSpec],
    seeds: Sequence[int] = (0,),
    *,
    forget: Path | None = None,
    retain: Path | None = None,
    model: str | Path | None = None,
    retrained: str | Path | None = None,
    second: str | Path | None = None,
    folder: str | Path = "runs/muse",
    checks: Sequence[str] | None = None,
    attacks: bool | Sequence[str] | None = None,
    workers: int = 1,
    command: str = "",
    report: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> Comparison:
    """The comparison of all methods and seeds. forget, retain: folders of .txt files; model: a folder that has learned both,
    retrained and second: two seeds that have learned `retain` alone (default: trained by the recipe); without texts and model the
    embedded ones. settings: of `muse_case`."""
    case = the_case(forget, retain, model, **settings)
    if model is None:
        methods = configured(methods, NANO_SETTINGS)
    golds = {name: load_model(place) for name, place in (("gold", retrained), ("second", second)) if place is not None}
    return compare(
        case, methods, seeds, workers=workers, folder=folder, report=report, floor=None, command=command,
        checks=wanted(case(seeds[0]), checks or MEASURES, attacks),
        attacks=attacks, cache=cache_home() / "muse", **golds,
    )  # fmt: skip


def the_case(
    forget: Path | None = None, retain: Path | None = None, model: str | Path | None = None, **settings: Any
) -> Callable[[int], Case]:
    """The case of a seed: of one's own texts and model (whatever the seed), or the embedded one."""
    if forget is not None and retain is not None and model is not None:
        own = muse_case(from_folders(forget, retain), load_model(model), load_tokenizer(model), **settings)
        return lambda seed: own
    if forget is not None or retain is not None or model is not None:
        raise BadData(
            "expected --forget DIR, --retain DIR and --model FOLDER together, or none of them for the embedded benchmark, found "
            "only some; a model must have learned the very texts that it is asked to forget"
        )
    return nano_muse


def scaling(
    case: Case, method: str, settings: dict[str, Any], seed: int = 0, folds: int = 4
) -> dict[str, list[dict[str, float]]]:
    """C5 and C6: after each of `folds` steps, forget and retain probability of the model.

    scalability: one request for folds 0..k, each from the original. sustainability: requests for fold k one after another, each
    from the model that the last one left; earlier folds are out of the data, as they would be.
    """
    from expunge.methods.outcome import unlearn

    fold = case.data.column("fold")
    found: dict[str, list[dict[str, float]]] = {"scalability": [], "sustainability": []}
    for k in range(folds):
        grown = case.with_(request=requests.samples(((fold >= 0) & (fold <= k)).nonzero().flatten().tolist()))
        found["scalability"].append(_both(grown, unlearn(grown, method, seed=seed, floor=None, **settings).model, k))
    model = case.model
    for k in range(folds):
        rows = ((fold < 0) | (fold >= k)).nonzero().flatten()
        data = case.data.subset(rows)  # type: ignore[attr-defined]
        now = case.with_(model=model, data=data, request=requests.where("fold", "==", k), holdout=case.holdout)
        model = unlearn(now, method, seed=seed, floor=None, **settings).model
        gone = case.with_(request=requests.samples(((fold >= 0) & (fold <= k)).nonzero().flatten().tolist()))
        found["sustainability"].append(_both(gone, model, k))
    return found


def _both(case: Case, model: Any, k: int) -> dict[str, float]:
    values = {"step": float(k + 1)}
    for split in ("forget", "retain"):
        values[split] = case.task.evaluate(model, case.split(split).batches())["probability"]
    return values
