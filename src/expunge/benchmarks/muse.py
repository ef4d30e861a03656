"""MUSE (Shi et al., 2407.06460): six things an unlearned language model should have, from any two folders of text.

    expunge bench muse --methods npo,grad_diff                                  the embedded model on two of Shakespeare's plays
    expunge bench muse --forget A/ --retain B/ --model FOLDER --folds 4         your texts, your model
    expunge bench muse --data news --model FOLDER --retrained FOLDER            MUSE's own corpora, or a folder in its hub's layout

    C1 VerbMem     does it continue a forgotten text as it was?            aim: retrained's value
    C2 KnowMem f   does it answer questions about forgotten texts?         aim: retrained's value
    C3 PrivLeak    does membership tell?                                   aim: 0
    C4 KnowMem r   does it still answer about kept texts?                  higher is better
    C5 scalability, C6 sustainability: C1 to C4 as the request grows, and after each of several requests (`scaling`)

Holdout, which membership needs, is cut out of the forget texts before training where the benchmark gives none: every second
window by default. Questions: files `forget_qa.jsonl` and `retain_qa.jsonl` ({question, answer}) beside the texts are asked with
MUSE's ten demonstrations; without them a question is a cloze, the beginning of a passage whose next words are the answer, and the
tables say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.audits.base import Measurement, run_checks
from expunge.audits.golds import original, retrain
from expunge.audits.metrics.text import few_shot_prompt
from expunge.audits.subjects import Subjects
from expunge.benchmarks.nano import CONTEXT, cache_home, joined, llama
from expunge.benchmarks.tofu import NANO_SETTINGS, configured, wanted
from expunge.cases import Case, requests
from expunge.cases.loading import data_home, load_model, load_tokenizer
from expunge.cases.muse import FOLDS, Pairs, Texts, from_folders
from expunge.cases.muse import muse as muse_texts
from expunge.cases.text import TextData, plain_text, question_answer
from expunge.errors import BadData, need_extra
from expunge.parts.plan import Optimizer, Training
from expunge.records.compare import MethodSpec, compare
from expunge.records.comparison import Comparison

WINDOW, CLOZE_GIVEN, CLOZE_ASKED, DEMONSTRATIONS, QUESTIONS, LONGEST = 64, 12, 8, 10, 100, 2048
NANO_ROWS = {"forget": 60, "retain": 240}
PLAYS = {"forget": "ROMEO:", "retain": "CORIOLANUS:"}
"""The embedded texts begin where these two first speak in EXPUNGE_DATA/text/shakespeare.txt."""

RECIPE = Training(
    epochs=45, batch_size=16,
    optimizer=Optimizer("adamw", lr=3e-3, weight_decay=0.01, clip=1.0, schedule="linear", warmup=0.055),
)  # fmt: skip
SCALED = ("verbmem", "knowmem_forget", "knowmem_retain", "privleak")
Step = dict[str, Any]
"""{"step": 1.., "scores": {measure: {subject: [value, low, high]}}}."""
HEADINGS = {
    "verbmem": "VerbMem", "knowmem_forget": "KnowMem f", "privleak": "PrivLeak", "knowmem_retain": "KnowMem r",
}  # fmt: skip
MEASURES = ("probability", "verbmem", "knowmem_forget", "knowmem_retain", "privleak", "token_membership")


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
    folded: bool = False,
) -> Case:
    """The benchmark's case: windows of the texts. Where it has no holdout, every `holdout_every`-th forget window is held out of
    training.

    rows: at most so many windows of each kind (evenly from the beginning). The column `fold` (0..3) cuts the forget rows for
    scalability and sustainability. folded: forget the texts of the benchmark's own folds, where it has some, instead of `forget`.
    """
    limit, own = rows or {}, folded and len(texts.folds) > 0
    parts = texts.folds if own else [texts.forget]
    number = {"part": [k for k, part in enumerate(parts) for _ in part]}
    windows = plain_text(tokenizer, [text for part in parts for text in part], window=window, **number)
    every = range(len(windows))
    out = [] if texts.holdout else [i for i in every if i % holdout_every == holdout_every - 1]
    forget = windows.subset(sorted(set(every) - set(out))[: limit.get("forget")])
    holdout = plain_text(tokenizer, texts.holdout, window=window) if texts.holdout else windows.subset(out)
    holdout = holdout.subset(range(min(len(holdout), limit.get("forget", len(holdout)))))
    retain = plain_text(tokenizer, texts.retain, window=window)
    retain = retain.subset(range(min(len(retain), limit.get("retain", len(retain)))))
    folds = forget.column("part").tolist() if own else [FOLDS * i // len(forget) for i in range(len(forget))]
    probes = {
        "knowmem_forget": _questions(texts.questions.get("forget"), forget, folds, tokenizer),
        "knowmem_retain": _questions(texts.questions.get("retain"), retain, [-1] * len(retain), tokenizer),
        **{f"privleak_{split}": _whole(tokenizer, found) for split, found in texts.members.items()},
    }
    if texts.verbatim:
        probes["verbmem"] = question_answer(tokenizer, *_columns(texts.verbatim), template=lambda beginning: beginning)
    data = joined(_marked(retain, [-1] * len(retain)), _marked(forget, folds))
    return Case(model, data, requests.where("fold", ">=", 0), task="language", holdout=holdout, recipe=recipe, name=name,
                probes=probes)  # fmt: skip


def _columns(pairs: Pairs) -> tuple[list[str], list[str]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


def _whole(tokenizer: Any, texts: Sequence[str]) -> TextData:
    """One row for each text, of at most MUSE's 2,048 tokens."""
    pieces = plain_text(tokenizer, texts, window=LONGEST)
    firsts = {number: row for row, number in reversed(list(enumerate(pieces.column("document").tolist())))}
    return pieces.subset(sorted(firsts.values()))


def _marked(table: TextData, folds: Sequence[int]) -> TextData:
    return TextData(table.tokens, table.starts, table.tokenizer, pad=table.pad, fold=list(folds),
                    zlib_bytes=[int(v) for v in table.column("zlib_bytes")])  # fmt: skip


def _questions(pairs: Pairs | None, windows: TextData, folds: Sequence[int], tokenizer: Any) -> TextData:
    """Pairs as few-shot questions; without pairs, clozes: a passage from inside a window, its next tokens the answer, with its
    window's fold."""
    if pairs:
        shown, asked = pairs[:DEMONSTRATIONS], pairs[DEMONSTRATIONS : DEMONSTRATIONS + QUESTIONS]
        return question_answer(tokenizer, *_columns(asked), template=lambda q: few_shot_prompt(shown, q))
    rows, own = [], []
    for row, fold in zip(windows.tokens, folds, strict=True):
        first = len(row) // 3  # not the window's own beginning: that would be VerbMem again
        passage = row[first : first + CLOZE_GIVEN + CLOZE_ASKED]
        if len(passage) == CLOZE_GIVEN + CLOZE_ASKED:
            rows.append(passage)
            own.append(fold)
    count = min(QUESTIONS, len(rows))
    return TextData(rows[:count], [CLOZE_GIVEN] * count, tokenizer, pad=windows.pad, fold=own[:count])


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
    data: str | Path | None = None,
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
    """The comparison of all methods and seeds. data: a corpus as `cases.muse` takes it; or forget, retain: folders of .txt files.
    model: a folder that has learned both, retrained and second: two seeds that have learned `retain` alone (default: trained by the
    recipe); without texts and model the embedded ones. settings: of `muse_case`."""
    case = the_case(data, forget, retain, model, **settings)
    if model is None:
        methods = configured(methods, NANO_SETTINGS)
    golds = {name: load_model(place) for name, place in (("gold", retrained), ("second", second)) if place is not None}
    return compare(
        case, methods, seeds, workers=workers, folder=folder, report=report, floor=None, command=command,
        checks=wanted(case(seeds[0]), checks or MEASURES, attacks),
        attacks=attacks, cache=cache_home() / "muse", **golds,
    )  # fmt: skip


def the_case(
    data: str | Path | None = None,
    forget: Path | None = None,
    retain: Path | None = None,
    model: str | Path | None = None,
    **settings: Any,
) -> Callable[[int], Case]:
    """The case of a seed: of one's own texts and model (whatever the seed), or the embedded one."""
    if model is not None and data is not None and forget is retain is None:
        texts, network = muse_texts(data), load_model(model)
        longest = getattr(getattr(network, "config", None), "max_position_embeddings", LONGEST)
        settings = {"window": min(LONGEST, longest), "name": f"muse-{Path(data).name}", **settings}
    elif model is not None and data is None and forget is not None and retain is not None:
        texts, network = from_folders(forget, retain), load_model(model)
    elif data is forget is retain is model is None:
        return nano_muse  # its folds are cut out of its own forget texts
    else:
        raise BadData(
            "expected --data news|books|DIR with --model FOLDER, or --forget DIR, --retain DIR and --model FOLDER together, or none of "
            "them for the embedded benchmark, found only some; a model must have learned the very texts that it is asked to forget"
        )
    own = muse_case(texts, network, load_tokenizer(model), **settings)
    return lambda seed: own


def scaling(
    case: Case,
    method: str,
    settings: dict[str, Any],
    seed: int = 0,
    folds: int = FOLDS,
    retrained: nn.Module | None = None,
    checks: Sequence[str] = SCALED,
    report: Callable[[str, int, int], None] | None = None,
) -> dict[str, list[Step]]:
    """C5 and C6: the scores after each of `folds` steps, with 95% bootstrap intervals, beside those of the retrained model.

    scalability: one request for folds 0..k, each from the original. sustainability: requests for fold k one after another, each
    from the model that the last one left; earlier folds are out of the data, as they would be. Both are measured on all that is to
    be gone by then. retrained: a model that learned none of the folds, for all steps; default: one for each step, by the recipe.
    """
    from expunge.methods.outcome import unlearn

    fold = case.data.column("fold")
    found: dict[str, list[Step]] = {"scalability": [], "sustainability": []}
    model = case.model
    for k in range(folds):
        if report is not None:
            report(f"{method}: fold {k + 1} of {folds}, at once and in turn", k, folds)
        gone = _gone_by(case, k)
        gold = retrained if retrained is not None else retrain(gone, seed + 1001, cache_home() / "muse").model

        def step(left: nn.Module, gone: Case = gone, gold: nn.Module | None = gold, k: int = k) -> Step:
            subjects = Subjects(gone, case.model, left, gold, seed=seed)
            return {"step": k + 1, "scores": {m.name: _score(m) for m in run_checks(subjects, checks)}}

        found["scalability"].append(step(unlearn(gone, method, seed=seed, floor=None, **settings).model))
        rows = ((fold < 0) | (fold >= k)).nonzero().flatten()
        now = case.with_(
            model=model, data=case.data.subset(rows), request=requests.where("fold", "==", k), holdout=case.holdout
        )  # type: ignore[attr-defined]
        model = unlearn(now, method, seed=seed, floor=None, **settings).model
        found["sustainability"].append(step(model))
    return found


def _gone_by(case: Case, k: int) -> Case:
    """The case whose request is folds 0..k, with the questions about them (of questions that know their fold)."""
    fold = case.data.column("fold")
    rows = ((fold >= 0) & (fold <= k)).nonzero().flatten().tolist()
    probes = {
        name: table.subset([i for i, own in enumerate(table.column("fold").tolist()) if own <= k])
        if "fold" in table.names else table for name, table in case.probes.items()
    }  # fmt: skip
    return case.with_(request=requests.samples(rows), probes=probes)


def _score(measured: Measurement) -> dict[str, Any]:
    """subject -> [value, low, high] (its 95% interval; the value itself where there is none)."""
    return {
        subject: [value, *(measured.intervals.get(subject) or (value, value))]
        for subject, value in (("original", measured.original), ("unlearned", measured.unlearned), ("retrained", measured.retrained))
    }  # fmt: skip


def spelled(score: dict[str, list[float]]) -> str:
    """`40.1 [33.0, 47.2] (12.5)`: the unlearned model's with its interval, the retrained one's in brackets."""
    value, low, high = score["unlearned"]
    return f"{value:.1f} [{low:.1f}, {high:.1f}] ({score['retrained'][0]:.1f})"
