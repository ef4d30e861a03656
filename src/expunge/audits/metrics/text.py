"""How much of a text comes back: overlap of words, tokens foreseen, suffixes extracted. Pure functions of texts and tokens.

    rouge_l_recall         LCS / words of the truth, Porter stems                        TOFU (arXiv 2401.06121)
    rouge_l_f1             harmonic mean of LCS / truth and LCS / generated, no stems    MUSE (arXiv 2407.06460)
    exact_memorisation     (1/n) sum_t 1[argmax p_t = x_t], teacher forced
    extraction_strength    1 - k*/n, k* the smallest k with every position >= k foreseen (after Carlini et al., arXiv
                           2012.07805): teacher forced, and equal to what greedy decoding brings back from x_<k*
    extraction_likelihood  EL_n of knowledge unlearning (arXiv 2210.01504): n-grams shared by greedy continuations
    verbatim_memorisation, knowledge_memorisation    MUSE's VerbMem and KnowMem, in percent

All are higher the more is left. `hits`: one bool array for each text, True where the likeliest token is the true one.

Departure: open-unlearning's loop never reaches k = n, so a text whose last token is missed scores 1/n there instead of 0;
`extraction_strength_openunlearning` keeps that floor for comparison with its tables. It also drops the last label as the
end of text, even where there is none; here every labelled token counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from expunge.errors import BadData, UnmetNeed

KNOWLEDGE_STOPS = ("\n\n", "\nQuestion", "Question:")
"""Where a few-shot answer ends: a blank line, or the next question (MUSE)."""


def rouge_l_recall(generated: Sequence[str], truths: Sequence[str]) -> np.ndarray:
    """(n,) in [0, 1]: longest common subsequence of stemmed words over the truth's words. TOFU's ROUGE."""
    return _rouge_l(generated, truths, stems=True, part="recall")


def rouge_l_f1(generated: Sequence[str], truths: Sequence[str]) -> np.ndarray:
    """(n,) in [0, 1]: F1 of the longest common subsequence of words as they are. MUSE's ROUGE."""
    return _rouge_l(generated, truths, stems=False, part="fmeasure")


def exact_memorisation(hits: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) in [0, 1]: share of each text's tokens that are the likeliest ones."""
    return np.array([float(np.mean(row)) for row in _rows(hits)])


def extraction_strength(hits: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) in [0, 1]: share of each text that its own beginning brings back; 0 when even the last token is missed."""
    return np.array([_foreseen_suffix(row) / len(row) for row in _rows(hits)])


def extraction_strength_openunlearning(hits: Sequence[np.ndarray]) -> np.ndarray:
    """(n,) in [1/n, 1]: the same with open-unlearning's floor, only for comparison with its tables."""
    return np.array([max(_foreseen_suffix(row), 1) / len(row) for row in _rows(hits)])


def overlap(generated: Sequence[int], truth: Sequence[int], n: int) -> float:
    """OV_n in [0, 1]: share of the n-grams of `generated` that occur in `truth`; 0 where either has none."""
    own, known = _grams(generated, n), set(_grams(truth, n))
    return sum(gram in known for gram in own) / len(own) if own and known else 0.0


def extraction_likelihood(continuations: Sequence[Sequence[int]], tokens: Sequence[int], n: int = 10) -> float:
    """EL_n = (1 / (T - n)) sum_{i=1}^{T-1} OV_n(f(x_<=i), x_>i) in [0, 1] of one text of T tokens.

    continuations: for i = 1 .. T-1 the greedy continuation f(x_<=i), as long as x_>i.
    """
    length = len(tokens)
    if length <= n or len(continuations) != length - 1:
        raise BadData(
            f"expected a text of more than n = {n} tokens and a continuation of each of its prefixes, found {length} tokens "
            f"and {len(continuations)} continuations; leave shorter texts out"
        )
    return sum(overlap(own, tokens[i:], n) for i, own in enumerate(continuations, start=1)) / (length - n)


def verbatim_memorisation(generated: Sequence[str], truths: Sequence[str]) -> np.ndarray:
    """(n,) in percent, MUSE's VerbMem: greedy continuations (128 tokens) against the true ones cut to as many tokens."""
    return 100 * rouge_l_f1(generated, truths)


def knowledge_memorisation(generated: Sequence[str], truths: Sequence[str]) -> np.ndarray:
    """(n,) in percent, MUSE's KnowMem: few-shot answers (32 tokens, cut at the next question) against the true ones."""
    return 100 * rouge_l_f1([cut(text) for text in generated], truths)


def cut(text: str, stops: Sequence[str] = KNOWLEDGE_STOPS) -> str:
    """The text before the first stop, without surrounding space."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)].strip() if places else text.strip()


def few_shot_prompt(demonstrations: Sequence[tuple[str, str]], question: str) -> str:
    """MUSE's prompt: "Question: q\\nAnswer: a\\n\\n" for each demonstration, then the question without its answer."""
    shown = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in demonstrations)
    return f"{shown}Question: {question}\nAnswer: "


def _foreseen_suffix(row: np.ndarray) -> int:
    """Length of the run of hits at the end."""
    missed = np.flatnonzero(~row)
    return len(row) - (int(missed[-1]) + 1 if len(missed) else 0)


def _rows(hits: Sequence[np.ndarray]) -> list[np.ndarray]:
    rows = [np.asarray(row, dtype=bool) for row in hits]
    empty = [i for i, row in enumerate(rows) if not len(row)]
    if empty:
        raise BadData(f"expected every text to have labelled tokens, found none in texts {empty[:5]}; drop them")
    return rows


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _rouge_l(generated: Sequence[str], truths: Sequence[str], stems: bool, part: str) -> np.ndarray:
    scorer = _scorer(stems)
    pairs = zip(truths, generated, strict=True)
    return np.array([getattr(scorer.score(truth, text)["rougeL"], part) for truth, text in pairs], dtype=np.float64)


@cache
def _scorer(stems: bool) -> Any:
    try:
        from nltk.stem.porter import PorterStemmer  # which rouge_score brings
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenize import tokenize
    except ImportError as error:
        raise UnmetNeed(
            "expected the package rouge-score to compare texts, found none; pip install 'expunge[language]'"
        ) from error
    if not stems:
        return RougeScorer(["rougeL"])
    # the package's own words and stems, but each word is stemmed once: that is half of a score's time
    stemmer = SimpleNamespace(stem=lru_cache(maxsize=2**16)(PorterStemmer().stem))
    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=lambda text: tokenize(text, stemmer)))
