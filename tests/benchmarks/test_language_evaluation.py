"""Smoke tests of the benches of language audits: small sizes, and both sides of a comparison must say the same."""

import pytest
from tests.audits.test_language_checks import perturbed
from tests.toys import language_table, tiny_llama, words_tokenizer

from expunge.benchmarks import membership_cost, tofu_official
from expunge.cases import Case, requests
from expunge.cases.tofu import candidates
from expunge.errors import UnmetNeed


def test_membership_cost_compares_equal_scores():
    times = membership_cost.compare(tiny_llama(len(words_tokenizer())), language_table(range(4)), 8, 1, "cpu")
    assert set(times.seconds) == {"bare", "scores"} and times.ratio("scores", "bare") > 0


def test_the_whole_tofu_evaluation_of_one_model(monkeypatch):
    def table(people):
        return candidates(words_tokenizer(), perturbed(people), template="{question}")

    probes = {
        "forget_perturbed": table(range(4, 6)), "retain_perturbed": table(range(4)),
        "real_authors": table(range(6, 9)), "world_facts": table(range(9, 12)),
    }  # fmt: skip
    case = Case(
        tiny_llama(len(words_tokenizer())), language_table(range(6)), requests.where("person", ">=", 4), task="language",
        holdout=language_table(range(30, 32)), probes=probes,
    )  # fmt: skip
    monkeypatch.setattr(tofu_official, "NEW_TOKENS", 4)
    found = tofu_official.here(case, case.model)
    assert all(0 <= value <= 1 for value in found.values())
    assert (
        found["extraction_strength"] <= found["extraction_strength_openunlearning"]
    )  # an untrained model extracts nothing


def test_the_peer_must_be_there(tmp_path):
    with pytest.raises(UnmetNeed, match="locuslab/open-unlearning"):
        tofu_official.official(tmp_path)
