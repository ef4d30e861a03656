"""Text metrics: worked by hand, against slow loops, against TOFU's published logs, and open-unlearning's numbers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from expunge.audits.metrics import text
from expunge.errors import BadData

DATA = os.environ.get("EXPUNGE_DATA")


def test_rouge_by_hand():
    # LCS "the cat sat" = 3 of the truth's 4 words and of the 5 generated: F1 = 2 * 3/4 * 3/5 / (3/4 + 3/5) = 2/3
    assert text.rouge_l_recall(["the old cat sat there"], ["The cat sat down."])[0] == 0.75
    assert text.rouge_l_f1(["the old cat sat there"], ["The cat sat down."])[0] == pytest.approx(2 / 3)
    assert text.rouge_l_f1([""], ["a truth"])[0] == 0.0


def test_recall_stems_and_f1_does_not():
    # Porter: writing, writes -> write, write; a long generation does not hurt recall but hurts F1
    generated, truth = ["she writes novels and many other things too"], ["writing novel"]
    assert text.rouge_l_recall(generated, truth)[0] == 1.0
    assert text.rouge_l_f1(generated, truth)[0] == 0.0
    assert (
        text.rouge_l_recall(["a b c d e f"], ["a b"])[0] == 1.0 and text.rouge_l_f1(["a b c d e f"], ["a b"])[0] == 0.5
    )


@pytest.mark.data
@pytest.mark.skipif(DATA is None, reason="needs EXPUNGE_DATA (tofu_eval_logs)")
def test_rouge_recall_reproduces_every_score_of_the_published_logs():
    log = json.loads((Path(DATA) / "tofu_eval_logs" / "phi_full.json").read_text())
    for name in ("eval_log_forget.json", "eval_real_author_wo_options.json"):
        generations, published = log[name]["generated_text"], log[name]["rougeL_recall"]
        found = text.rouge_l_recall([g[1] for g in generations.values()], [g[2] for g in generations.values()])
        np.testing.assert_allclose(found, [published[key] for key in generations], atol=1e-12)


HITS = [[0, 0, 1, 0, 0, 0], [0, 1], [1, 1, 1], [1, 0, 1, 1], [0, 0]]


def test_memorisation_by_hand():
    rows = [np.array(row, dtype=bool) for row in HITS]
    np.testing.assert_allclose(text.exact_memorisation(rows), [1 / 6, 0.5, 1, 0.75, 0])
    np.testing.assert_allclose(text.extraction_strength(rows), [0, 0.5, 1, 0.5, 0])


def test_the_floor_of_open_unlearning_is_not_copied():
    """Its extraction_strength on these very hits gives 1/6 and 1/2 for the first two rows: where the last token is missed its
    loop ends at k = n - 1. (Run on logits 3 sin(1.7 v + 0.9 t + 2.3 x_t), tokens as in test_token_statistics.)"""
    rows = [np.array(row, dtype=bool) for row in HITS]
    np.testing.assert_allclose(text.extraction_strength_openunlearning(rows), [1 / 6, 0.5, 1, 0.5, 0.5])
    assert text.extraction_strength(rows)[0] == 0.0


def slow_extraction_strength(hits):
    n = len(hits)
    return 1 - next(k for k in range(n + 1) if all(hits[k:])) / n


def test_extraction_strength_equals_its_definition():
    rng = np.random.default_rng(0)
    rows = [rng.random(rng.integers(1, 9)) < 0.7 for _ in range(200)]
    np.testing.assert_allclose(text.extraction_strength(rows), [slow_extraction_strength(row) for row in rows])


def test_texts_without_tokens_are_refused():
    with pytest.raises(BadData, match=r"texts \[1\]"):
        text.exact_memorisation([np.array([True]), np.array([], dtype=bool)])


def test_overlap_by_hand():
    # bigrams of the continuation: 12, 23, 39; the truth has 12 and 23
    assert text.overlap([1, 2, 3, 9], [0, 1, 2, 3], 2) == pytest.approx(2 / 3)
    assert text.overlap([1], [1, 2, 3], 2) == 0.0 and text.overlap([1, 2], [1], 2) == 0.0


def test_extraction_likelihood_of_perfect_and_of_no_memory():
    tokens = list(range(20, 32))
    perfect = [tokens[i:] for i in range(1, len(tokens))]
    assert text.extraction_likelihood(perfect, tokens, n=3) == pytest.approx((len(tokens) - 3) / (len(tokens) - 3))
    assert text.extraction_likelihood([[0] * len(row) for row in perfect], tokens, n=3) == 0.0
    # Remembered only from the fourth token on: the first three prefixes of T - n = 9 bring nothing.
    late = [[0] * len(row) if i < 3 else row for i, row in enumerate(perfect)]
    assert text.extraction_likelihood(late, tokens, n=3) == pytest.approx(6 / 9)
    with pytest.raises(BadData, match="more than n = 12"):
        text.extraction_likelihood(perfect, tokens, n=12)


def test_muse_metrics():
    assert text.few_shot_prompt([("a?", "b")], "c?") == "Question: a?\nAnswer: b\n\nQuestion: c?\nAnswer: "
    assert text.cut("Paris\n\nQuestion: next") == "Paris" and text.cut(" Rome \nQuestion: x") == "Rome"
    assert text.knowledge_memorisation(["Paris\n\nQuestion: and Rome?"], ["Paris"])[0] == 100.0
    assert text.verbatim_memorisation(["a b x y"], ["a b c d"])[0] == pytest.approx(50.0)
