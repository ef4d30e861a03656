"""`--attacks` has one meaning for every benchmark."""

from __future__ import annotations

import pytest

from expunge.audits.battery import BY_NAME, default_attacks, find_attacks
from expunge.benchmarks import muse, tofu, unlearncanvas
from expunge.cli.bench import attacks_of
from expunge.errors import BadSetting

BENCHES = {"tofu": ("language", tofu), "muse": ("language", muse), "canvas": ("diffusion", unlearncanvas)}


@pytest.mark.parametrize("kind", ["language", "diffusion"])
def test_the_words_and_names(kind):
    every = [a.name for a in (*default_attacks(kind), *BY_NAME[kind])]
    assert attacks_of("none", kind) is False and attacks_of("default", kind) is True
    assert attacks_of("all", kind) == every and len(set(every)) == len(every) > len(default_attacks(kind))
    assert attacks_of(" relearning ,pruning_20", kind) == ["relearning", "pruning_20"]
    assert [a.name for a in find_attacks(attacks_of("all", kind), kind)] == every


@pytest.mark.parametrize(
    ("text", "told"),
    [("relerning", "'relearning'"), ("defualt", "'default'"), ("relearning,none", "stand alone"), (",", "found no name"),
     ("relearning,relearning", "twice")],
)  # fmt: skip
def test_what_is_no_attack_is_refused(text, told):
    with pytest.raises(BadSetting, match=told):
        attacks_of(text, "language")


class Stop(Exception):
    """What the bench was to run is known."""


@pytest.mark.parametrize("which", BENCHES)
@pytest.mark.parametrize(
    ("arguments", "meant"),
    [((), True), (("--no-attacks",), False), (("--attacks", "none"), False), (("--attacks", "default"), True),
     (("--attacks", "relearning,linear_probe"), ["relearning", "linear_probe"]), (("--attacks", "all"), "all")],
)  # fmt: skip
def test_every_bench_is_given_the_same(which, arguments, meant, shell, monkeypatch, tmp_path):
    kind, module = BENCHES[which]
    given = {}

    def run(*_, **settings):
        given.update(settings)
        raise Stop

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(unlearncanvas, "mini", lambda small: None)
    shell("bench", which, "--methods", "fine_tune", "--out", tmp_path, *arguments)
    assert given["attacks"] == (attacks_of("all", kind) if meant == "all" else meant)


@pytest.mark.parametrize("which", BENCHES)
def test_an_unknown_name_is_told_the_nearest_before_anything_runs(which, shell, tmp_path):
    result = shell("bench", which, "--attacks", "relerning", "--out", tmp_path / "none")
    assert result.exit_code == 2 and "'relearning'" in result.text and not (tmp_path / "none").exists()
