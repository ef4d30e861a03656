"""What the cards measured and call assertable, asked of the committed tables: a table made anew must still say it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from scipy.stats import binomtest

from expunge.benchmarks.table_file import Section, read

RESULTS = Path(__file__).parents[2] / "benchmarks-results"


def sections(name: str) -> dict[str, Section]:
    return read((RESULTS / f"{name}.md").read_text("utf-8"))


def number(section: Section, row: str, column: str) -> float:
    """The mean that stands in a cell."""
    place = [cell.strip() for cell in section.head[0].split("|")].index(column)
    return float(re.split("±", section.rows[row].split("|")[place])[0].strip().replace("−", "-"))


def half(section: Section, row: str, column: str) -> float:
    """Half the interval that stands in a cell."""
    place = [cell.strip() for cell in section.head[0].split("|")].index(column)
    return float(section.rows[row].split("|")[place].partition("±")[2].strip() or 0)


NPO = "npo (beta=0.03, epochs=20, lr=0.0002, schedule=constant)"


@pytest.mark.parametrize("by", ["npo (beta=0.1, epochs=10, lr=0.0003, schedule=linear)", NPO, "wga", "pdu"])
def test_what_bounds_the_forget_term_keeps_more_than_ascent(by: str):
    """npo.md, baselines.md: retain probability above ascent's, and above ascent with a retain term, at one budget."""
    fixed = sections("language")["fixed"]
    for unbounded in ("grad_ascent", "grad_diff"):
        assert number(fixed, by, "P retain") > number(fixed, unbounded, "P retain") + 0.2


def test_npo_forgets_to_the_retrained_models_level_and_keeps():
    fixed = sections("language")["fixed"]
    assert number(fixed, NPO, "P forget") < 0.01 and number(fixed, NPO, "P retain") > 0.97


def test_npo_keeps_more_than_ascent_where_both_reach_the_level():
    """npo.md: at equal forgetting; the level is 0.05, and ascent has gone further below it."""
    matched, gentle = sections("language")["matched"], "npo (beta=0.03, epochs=20, lr=0.0002)"
    assert number(matched, gentle, "P forget") < 0.05 and number(matched, "grad_ascent", "P forget") < 0.05
    assert number(matched, gentle, "P retain") > number(matched, "grad_ascent", "P retain") + 0.1


def test_smoothers_that_look_along_the_gradient_come_back_less_at_equal_steps():
    """smooth.md: SAM below 0.65 of plain NPO at equal steps, retain within 0.02; its two kin (gradient penalty, curvature) as well."""
    fixed = sections("language")["fixed"]
    plain = "npo (beta=0.05, epochs=20, lr=0.0002, schedule=constant)"
    smooth = {
        kind: next(row for row in fixed.rows if row.endswith(f"smoother={kind})")) for kind in ("sam", "gp", "cr")
    }
    for row in smooth.values():
        assert abs(number(fixed, row, "P retain") - number(fixed, plain, "P retain")) < 0.02
        assert number(fixed, row, "P forget") < 0.02
        assert number(fixed, row, "relearned") < 0.7 * number(fixed, plain, "relearned")


def test_a_part_of_the_forget_set_brings_the_rest_back_where_it_was_not_removed():
    """attacks.md: relearning on a part brings back what was held out; the retrained model stays flat."""
    fixed = sections("language")["fixed"]
    assert number(fixed, "retrained", "relearned") < 0.02 < 0.2 < number(fixed, NPO, "relearned")


def test_attacks_have_power_on_the_original_and_none_on_the_retrained_model():
    attacks = sections("language")["attacks"]
    names = [cell.strip() for cell in attacks.head[0].split("|")[2:-3]]
    assert {"relearning", "benign relearning", "quantisation 8", "quantisation 4", "logit lens"} <= set(names)
    for name in names:
        assert number(attacks, "original", name) > 0.9 and number(attacks, "retrained", name) < 0.01
    # what rounding cannot bring back, a few updates do
    assert number(attacks, NPO, "quantisation 4") < 0.01 < 0.2 < number(attacks, NPO, "relearning")


def test_sharpness_awareness_comes_back_less_in_every_seed():
    """smooth.md: NPO with SAM (rho 0.05) recovers below 0.65 of what NPO does at equal steps, and keeps as much."""
    sam = sections("language")["sam"]
    seeds = sorted({row.split(",")[0] for row in sam.rows})
    back = {s: [number(sam, f"{s}, npo{with_}", "relearned") for with_ in (" + sam", "")] for s in seeds}
    less = [own < plain for own, plain in back.values()]
    assert len(seeds) >= 5 and binomtest(sum(less), len(less), alternative="greater").pvalue < 0.05
    for s in seeds:
        assert back[s][0] < 0.65 * back[s][1]
        assert number(sam, f"{s}, npo + sam", "P retain") == pytest.approx(
            number(sam, f"{s}, npo", "P retain"), abs=0.02
        )


def test_memorised_plays_are_told_from_unseen_ones():
    muse = sections("muse")["muse"]
    assert number(muse, "original", "PrivLeak") < -60
    assert number(muse, "original", "VerbMem") > 2 * number(muse, "retrained", "VerbMem")


def test_erasers_of_a_class_redirect_and_ascent_destroys():
    """salun-generation.md: UA >= 95 at a retain accuracy of the base's less 3, 50 above fine-tuning, retain 30 above ascent's; the mask
    does not show in either at this size. baselines.md: the class is gone and the other nine are there."""
    rows = sections("class_erasers")["erasers"]
    base, left = number(rows, "original", "IRA"), number(rows, "fine_tune", "UA")
    masked, free = "salun_generation (density=0.5)", "salun_generation (density=1.0)"
    for name in (masked, free, "erasediff", "scissorhands", "selective_amnesia"):
        assert number(rows, name, "UA") >= max(95, left + 50) and number(rows, name, "IRA") >= base - 3
        assert number(rows, name, "IRA") >= number(rows, "grad_ascent", "IRA") + 30
        assert number(rows, name, "FID") < number(rows, "grad_ascent", "FID") / 10
    assert number(rows, masked, "one other") >= 80  # drawn as what it was told to be
    for column in ("FID", "KID"):  # what the mask is for, at equal UA
        assert number(rows, masked, column) < number(rows, free, column)
    assert number(rows, "doco (surgery=true)", "IRA") > number(rows, "doco (surgery=none)", "IRA") + 20


def test_a_generator_of_one_call_forgets_and_draws_the_rest():
    """sfd.md: (a) the class gone, drawn as the other one; (b) the rest within ten points of the teacher at fifty guided steps; (c) far
    nearer to real images than the teacher at one step, though not within 1.5 times its distance at fifty; (d) two stages are nearer
    than one at as many steps of the second; (e) without forget terms the class stays."""
    section = sections("class_erasers")["distillation"]
    whole, brief, staged, unforgetting = (
        f"sfd (distil_steps={d}, g_f={g}, steps={n}, w_f={g})"
        for d, g, n in ((0, 1.0, 250), (0, 1.0, 50), (150, 1.0, 50), (0, 0.0, 100))
    )
    teacher = {
        int(steps): (float(ira), float(fid))
        for steps, ira, fid in re.findall(r"in (\d+) guided steps?: IRA ([\d.]+), FID (\d+\.\d+)", section.note)
    }
    assert number(section, whole, "UA") >= 95 and number(section, whole, "one other") >= 80
    assert number(section, whole, "IRA") >= teacher[50][0] - 10
    assert number(section, whole, "FID") < teacher[1][1] / 10
    assert number(section, staged, "UA") >= 90 and number(section, staged, "FID") < number(section, brief, "FID") / 2
    assert number(section, unforgetting, "UA") <= 10


def test_a_search_of_words_beats_random_words_and_finds_nothing_in_the_retrained_model():
    """unlearndiffatk.md, and testbed.md's table for UCE and ESD: prompts before, random words, the search."""
    red = sections("canvas")["red"]
    assert number(red, "retrained", "ASR") == number(red, "retrained", "random words") == 0
    for name in ("esd", "uce"):
        before, random, searched = (number(red, name, c) for c in ("ASR unattacked", "random words", "ASR"))
        assert before <= random < searched
    for name in (
        "seot (iterations=0, start=0.0)",
        "sld (preset=medium)",
    ):  # behind a guard the weights are what they were
        assert number(red, name, "random words") + 20 < number(red, name, "ASR")
    assert number(red, "seot (iterations=0, start=0.0)", "other wordings") == 100
    assert all(number(red, "fine_tune", c) == 100 for c in ("ASR unattacked", "ASR"))
    for name in ("salun_generation", "concept_ablation", "doco", "erasediff", "scissorhands"):
        assert number(red, name, "UA") > 95 and number(red, name, "ASR") < number(red, "uce", "ASR") / 2
    assert number(red, "uce", "UA") - number(red, "uce", "UA, other words") > 20  # the second word is a route


def test_a_second_request_leaves_the_first_answered():
    """unlearncanvas.md, sequential unlearning: a closed-form edit holds the first request and the rest through the second."""
    rows = sections("canvas")["red, then three"]
    for seed in range(3):
        after = f"uce, seed {seed}, 2. three"
        assert number(rows, after, "UA red") >= 90 and number(rows, after, "UA three") >= 95
        assert number(rows, after, "rebound") <= 5 and number(rows, after, "SR") >= 95
    three = sections("canvas")["three"]
    assert number(three, "uce", "UA") == number(three, "uce", "IRA") == 100 and number(three, "uce", "ASR") == 0
    assert number(three, "esd", "ASR") > number(three, "esd", "ASR unattacked")


def test_what_is_trained_under_attack_is_brought_back_less_and_its_retain_term_keeps_the_rest():
    """advunlearn.md: below ESD in the same scope, and that below ESD in cross-attention; IRA and CRA with the retain term above those
    without."""
    red = sections("canvas")["red"]
    adversarial, plain, unkept = (
        f"advunlearn (attack_steps={n}, retain_w={w})" for n, w in ((3, 0.3), (0, 0.3), (3, 0.0))
    )
    assert number(red, adversarial, "ASR") < number(red, plain, "ASR") <= number(red, "esd", "ASR")
    assert all(number(red, adversarial, c) > number(red, unkept, c) + 20 for c in ("IRA", "CRA"))


@pytest.mark.parametrize(
    "name", ["esd", "uce", "concept_ablation", "salun_generation", "doco", "erasediff", "scissorhands"]
)
def test_an_eraser_of_a_style_removes_it_and_keeps_the_rest(name: str):
    """unlearncanvas.md, baselines.md: UA >= 80, IRA and CRA within 15 of the original's, 50 above fine-tuning; controls fail."""
    red = sections("canvas")["red"]
    assert number(red, "original", "UA") <= 15 and number(red, name, "UA") >= max(
        80, 50 + number(red, "fine_tune", "UA")
    )
    assert all(number(red, name, c) >= number(red, "original", c) - 15 for c in ("IRA", "CRA"))
    three = lambda row: sum(number(red, row, c) for c in ("UA", "IRA", "CRA")) / 3  # noqa: E731
    assert three(name) > max(three("random weights"), three("grad_ascent")) + 30
    assert number(red, "doco", "UA") >= number(red, "concept_ablation", "UA") - 5


def test_repulsion_keeps_digits_digits_where_extrapolation_does_not():
    """adapt-then-unlearn.md: at equal unlearning."""
    gan = sections("gan")["digits"]
    other = "extrapolation, at el2's PUL"
    assert number(gan, other, "PUL %") == pytest.approx(number(gan, "adapt_then_unlearn, el2", "PUL %"), abs=5)
    for column in ("FID", "like no real %"):
        assert number(gan, "adapt_then_unlearn, el2", column) < number(gan, other, column)
    strict = number(gan, "adapt_then_unlearn, el2, strict", "PUL %")
    assert strict >= 80 and strict > number(gan, "fine_tune_positives, strict", "PUL %")
    for row in ("el2", "il2", "el2, strict"):  # bounded forms; the unbounded one collapses
        assert gan.rows[f"adapt_then_unlearn, {row}"].rstrip(" |").endswith("| 0 of 3")
        assert number(gan, f"adapt_then_unlearn, {row}", "entropy") >= 0.8
    assert gan.rows["adapt_then_unlearn, nl2"].rstrip(" |").endswith("| 3 of 3")


def test_selective_amnesia_leaves_an_autoencoder_nothing_of_the_digit_and_the_other_nine():
    """baselines.md: entropy >= 1.5 nats and forget probability <= 0.2, in the means and at the far ends of their intervals; ascent
    destroys, fine-tuning forgets nothing; the replay, or the penalty, is what keeps the other nine."""
    vae = sections("vae")["digits"]
    for row in ("selective_amnesia", "selective_amnesia, lam 100/256"):
        assert number(vae, row, "entropy") - half(vae, row, "entropy") >= 1.5
        assert number(vae, row, "P(0)") + half(vae, row, "P(0)") <= 0.2
        assert number(vae, row, "others %") >= 99 and number(vae, row, "like no real %") == 100
    assert number(vae, "original", "P(0)") > 0.98 and number(vae, "fine_tune", "P(0)") > 0.98
    assert number(vae, "grad_ascent", "others %") < 60
    assert number(vae, "selective_amnesia, neither", "others %") < number(vae, "selective_amnesia", "others %") - 10
    for row in ("selective_amnesia, no replay", "selective_amnesia, neither"):
        assert number(vae, row, "others like no real %") > number(vae, "selective_amnesia", "others like no real %")
