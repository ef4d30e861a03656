"""Attacks on generative models: what is searched, what is written, what counts, what stops; on untrained networks."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from expunge.audits.attacks import drawing
from expunge.audits.attacks.budget import Budget, attacked
from expunge.audits.attacks.drawing import NewSeeds, OtherWordings, RandomPrefix, asked, drawn, shortened, written
from expunge.audits.attacks.unlearndiffatk import EmbeddingSearch, Search, UnlearnDiffAtk, unlearn_diff_atk
from expunge.audits.base import checks
from expunge.audits.battery import find_attacks
from expunge.audits.metrics.judges import to_uint8
from expunge.audits.residue import Evidence, attacked_residue
from expunge.audits.subjects import Subjects
from expunge.errors import BadSetting, UnmetNeed
from expunge.parts.guarded_diffusion import SafeGuidance, Safety, SoftEndTokens
from expunge.parts.prompts import denoising_errors, rows_added, word_table
from expunge.seeds import derive
from expunge.tasks.denoiser import Denoiser
from tiny_pipelines import class_case, text_case

from .tiny_exam import ALL, NONE, exam, forced, text

SMALL = {"prompts": 3, "timesteps": 3, "iterations": 2}


class Turns:
    """Sees the target in every image at first (the original's), then in those whose call number is in `yes`."""

    def __init__(self, yes=()):
        self.yes, self.calls = set(yes), 0

    def __call__(self, images):
        self.calls += 1
        first = self.calls == 1
        return np.full(len(images), first or self.calls in self.yes)


# -- what is written ---------------------------------------------------------------------------------------------------
def test_words_are_written_out_and_read_again():
    model = text_case().model
    conditions = model.conditions
    own = conditions.of(["a red three", "a plain one"])
    words = torch.tensor([conditions.words("bright dark"), conditions.words("crimson of")])
    texts, again = written(model, words, own)
    assert texts == ["bright dark a red three", "crimson of a plain one"]
    assert torch.equal(again, conditions.of(texts)) and again.shape == own.shape
    # a letter that ends no word is one with what follows: what can be typed is other tokens than those chosen
    letter = model.tokenizer.convert_tokens_to_ids("r")
    rest = conditions.of(["ed three"])
    glued, typed = written(model, torch.tensor([[letter]]), rest)
    assert glued == ["red three"] and conditions.content(typed[0]) == conditions.words("red three")
    assert conditions.content(typed[0]) != [letter, *conditions.content(rest[0])]


def test_prompts_are_cut_where_the_words_would_not_fit():
    model = text_case().model
    long = model.conditions.of(["red " * 20, "red"])
    cut = shortened(model, long, 5)
    assert [len(model.conditions.content(row)) for row in cut] == [16 - 2 - 5, 1] and cut.shape == long.shape
    with pytest.raises(BadSetting, match="at most 13 words"):
        shortened(model, long, 14)


# -- what counts -------------------------------------------------------------------------------------------------------
def test_the_original_is_never_searched(monkeypatch):
    case = text(ALL)
    attack = UnlearnDiffAtk(**SMALL)
    monkeypatch.setattr(UnlearnDiffAtk, "_descend", lambda *_, **__: pytest.fail("a gradient step"))
    found = attack.attempts(case.model, case, 0)
    assert found.before.all() and found.after.all() and found.images.tolist() == [1, 1, 1]
    assert not any(found.prompts)


def test_an_attack_ends_at_the_first_success_and_pre_is_never_above_post():
    case = text(Turns())
    asked(case, 3)
    seen = []

    def sees(images):
        """Unattacked: the first prompt. First try: none. Second: the first of those left. Third: none."""
        seen.append(len(images))
        return np.array([{1: [1, 0, 0], 2: [0, 0], 3: [1, 0], 4: [0]}[len(seen)]]).astype(bool)[0]

    case.exam.judges[0].probabilities.sees = sees
    found = UnlearnDiffAtk(**SMALL).attempts(case.model, case, 0)
    assert seen == [3, 2, 2, 1]
    assert found.before.tolist() == [True, False, False] and found.won.tolist() == [False, True, False]
    assert found.images.tolist() == [1, 3, 4]
    assert found.before.mean() == pytest.approx(1 / 3) and found.after.mean() == pytest.approx(2 / 3)
    assert bool(found.prompts[1]) and not found.prompts[0] and not found.prompts[2]


def test_prompts_are_those_that_the_original_shows_and_none_is_an_error():
    case = text(lambda images: np.arange(len(images)) % 2 == 1)
    about = asked(case, 2)
    assert len(about) == 2
    assert [case.model.tokenizer.decode(case.model.conditions.content(r)) for r in about.condition] == [
        "a red two",
        "a red one",
    ]
    images, _ = drawn(case.model, case, about.condition, about.seeds)
    assert torch.allclose(case.model.latents(images), about.latents, atol=1e-4)  # its own drawings, the same noise
    with pytest.raises(UnmetNeed, match="shows the target"):
        asked(text(NONE), 2)


def test_what_is_drawn_as_nan_is_no_success():
    case = text(ALL)
    about = asked(case, 2)
    with torch.no_grad():
        case.model.unet.conv_out.bias.fill_(float("nan"))
    assert not drawn(case.model, case, about.condition, about.seeds)[1].any()


# -- the search --------------------------------------------------------------------------------------------------------
def test_timesteps_go_up_from_half_a_stride_and_share_passes():
    model = text_case().model
    whole = UnlearnDiffAtk(timesteps=50)
    assert torch.cat(whole.times(model)).tolist() == list(range(10, 1000, 20))
    assert [t.tolist() for t in UnlearnDiffAtk(timesteps=5, together=2).times(model)] == [[100, 300], [500, 700], [900]]
    case = text(ALL)
    assert UnlearnDiffAtk(timesteps=5, together=2).allowed(model, case) == 3


def test_state_is_carried_over_timesteps(monkeypatch):
    case = forced(text(ALL))
    starts = []
    descend = UnlearnDiffAtk._descend

    def watched(self, model, about, variable, *rest):
        starts.append(variable.clone())
        descend(self, model, about, variable, *rest)

    monkeypatch.setattr(UnlearnDiffAtk, "_descend", watched)
    UnlearnDiffAtk(**SMALL).attempts(case.model, case, 0)
    assert len(starts) == 3 and torch.allclose(starts[0], torch.full_like(starts[0], 1 / starts[0].shape[-1]))
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(starts))
    assert all(torch.allclose(s.sum(-1), torch.ones(3, 2)) and float(s.min()) >= 0 for s in starts)


def test_a_prompts_search_does_not_depend_on_the_others(monkeypatch):
    case = forced(text(ALL))
    together, alone = [], []
    for out, count in ((together, 3), (alone, 1)):
        monkeypatch.setattr(
            drawing,
            "drawn",
            lambda m, c, ids, seeds, vectors=None, out=out: (
                torch.zeros(len(ids), 3, 8, 8),
                out.append(ids) or np.zeros(len(ids), bool),
            ),
        )
        monkeypatch.setattr(drawing, "asked", lambda c, n, count=count: _first(asked(case, 10), count))
        UnlearnDiffAtk(**SMALL | {"prompts": count, "lr": 0.3}).attempts(case.model, case, 5)
    assert all(torch.equal(a[:1], b) for a, b in zip(together, alone, strict=True))


def _first(about, count):
    return drawing.Asked(about.condition[:count], about.seeds[:count], about.latents[:count], about.places[:count])


def test_the_best_single_word_is_nearly_that_of_the_exhaustive_search(monkeypatch):
    """k = 1 on a trained toy: every word of the vocabulary tried before "three", on an image of a red three."""
    from expunge.benchmarks.canvas import mini_canvas
    from expunge.benchmarks.image_models import small_text_toy

    model = Denoiser(small_text_toy()).eval()
    prompt = model.conditions.of(["three"])
    about = drawing.Asked(prompt, [7], model.latents(mini_canvas("test").of(style=2, object=3)[:1]), np.array([0]))
    words, short, time = drawing.vocabulary(model), shortened(model, prompt, 1), torch.full((8,), 700)
    noise = torch.randn(1, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        told = model.encode(short.expand(len(words), -1), word_table(model).weight[words][:, None])
        errors = torch.cat([
            denoising_errors(model, *(v.expand(len(part), *v.shape[1:]) for v in (about.latents, noise)), time, part).mean(1)
            for part in told.split(64)
        ])  # fmt: skip
    assert float(errors.median()) > 1.08 * float(errors.min())  # most words are not as good
    monkeypatch.setattr(UnlearnDiffAtk, "times", lambda *_: [time[:1]])
    attack = UnlearnDiffAtk(prompts=1, tokens=1, iterations=40, lr=0.05)
    propose = attack.proposer(model, text_case(model), about, 0)
    found = propose(0, torch.tensor([0]))
    rest = model.conditions.content(short[0])
    chosen = [i for i, w in enumerate(words.tolist()) if model.tokenizer.decode([w, *rest]) == found.prompts[0]]
    assert len(chosen) == 1 and float(errors[chosen[0]]) <= 1.05 * float(errors.min())


@pytest.mark.parametrize("kind", ["class", "p4d"])
def test_a_step_of_a_search_goes_downhill(kind, monkeypatch):
    """Along what one step of Adam moved, the objective falls on the very draws that the step was taken on."""
    case = class_case() if kind == "class" else text_case()
    case = case.with_(exam=exam(case, ALL, "red"))
    attack = {"class": UnlearnDiffAtk, "p4d": EmbeddingSearch}[kind](
        prompts=2, timesteps=1, iterations=1, lr=1e-3, weight_decay=0.0
    )
    seen = []
    real = Search._descend
    monkeypatch.setattr(Search, "after", lambda *_: None)  # without the projection: the step alone
    monkeypatch.setattr(UnlearnDiffAtk, "after", lambda *_: None)

    def watched(self, model, about, variable, mover, seed, number, left, told, aim=None):
        before = variable.detach().clone()
        real(self, model, about, variable, mover, seed, number, left, told, aim)
        seen.append((before, variable.detach() - before, aim))

    monkeypatch.setattr(Search, "_descend", watched)
    model, about = case.model, _first(asked(case, 2), 2)
    left = torch.arange(2)
    attack.proposer(model, case, about, 3)(0, left)
    ((before, moved, aim),) = seen
    times, noise = attack.times(model)[0], attack.noise(about, left, 1, 3, 0, 0)
    wanted = None if aim is None else aim(about.latents, noise, times)

    def objective(step: float) -> torch.Tensor:
        if kind == "class":
            table = drawing.class_table(model)
            ids = len(table.weight) + left
            with rows_added(table, (before + step * moved) @ table.weight[:10].detach()):
                return denoising_errors(model, about.latents, noise, times, model.encode(ids), "l2", wanted)
        table = word_table(model).weight.detach()[drawing.vocabulary(model)]
        nearest = table[(F.normalize(before, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)]
        told = model.encode(shortened(model, about.condition, attack.tokens), nearest + step * moved)
        return denoising_errors(model, about.latents, noise, times, told, "l2", wanted)

    with torch.no_grad():
        assert (
            moved.abs().max() > 0
            and (objective(1.0) < objective(0.0)).all()
            and (objective(-1.0) > objective(0.0)).all()
        )


@pytest.mark.parametrize("guard", ["safe_guidance", "soft_end_tokens"])
def test_a_guard_is_searched_through_what_it_says(guard):
    """A guard is told apart by its `saved_as`, and what it is conditioned on is its base's: settings that change nothing give the
    base's words, others do not."""
    case = forced(text(ALL))

    def words(strength: float) -> list[str]:
        model = {
            "safe_guidance": lambda: SafeGuidance(case.model, "red", Safety(0, strength, 1.0, 0.0, 0.0)),
            "soft_end_tokens": lambda: SoftEndTokens(case.model, "red", alpha=strength, start=0.0),
        }[guard]()
        assert model.kind == "text" and model.saved_as == guard
        return (
            UnlearnDiffAtk(**SMALL | {"lr": 0.3}).proposer(model, case, asked(case, 3), 0)(0, torch.arange(3)).prompts
        )

    base = (
        UnlearnDiffAtk(**SMALL | {"lr": 0.3}).proposer(case.model, case, asked(case, 3), 0)(0, torch.arange(3)).prompts
    )
    assert words(0.0) == base
    if guard == "soft_end_tokens":  # it acts on what the network is told; the other one in guidance alone
        assert words(3.0) != base


def test_the_search_leaves_the_weights_alone():
    case = forced(text(ALL))
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    for attack in (UnlearnDiffAtk(**SMALL), EmbeddingSearch(**SMALL)):
        attack.attempts(case.model, case, 0)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in case.model.named_parameters())
    assert [p.requires_grad for p in case.model.parameters()] == [
        p.requires_grad for p in text_case().model.parameters()
    ]


def test_p4d_aims_at_what_the_original_says():
    """On the original itself, the plain prompt with its own words cut off: the aim is reached by no prefix better than itself."""
    case = forced(text(ALL))
    attack, seen = EmbeddingSearch(**SMALL | {"prompts": 1}), []
    import expunge.audits.attacks.unlearndiffatk as module

    real = module.denoising_errors
    try:
        module.denoising_errors = lambda *a: seen.append(a) or real(*a)
        attack.attempts(case.model, case, 0)
    finally:
        module.denoising_errors = real
    model, clean, noise, times, _, _, aim = seen[0]
    kept = model.scheduler.alphas_cumprod[times[0]]
    noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise[:, 0]
    with torch.no_grad():
        said = case.model(noisy, times[0], case.model.encode(asked(case, 10).condition[:1]))
    assert torch.allclose(aim[:, 0], said, atol=1e-5)


def test_a_class_model_is_searched_by_a_mix_of_its_classes():
    case = class_case()
    case = case.with_(exam=exam(case, ALL, "red"))
    asked(case, 10)
    case.exam.judges[0].probabilities.sees = NONE
    attack = UnlearnDiffAtk(prompts=2, timesteps=2, iterations=5, lr=0.2)
    offers = []
    propose = attack.proposer(case.model, case, _first(asked(case, 10), 2), 0)
    for number in range(2):
        offers.append(propose(number, torch.tensor([0, 1])))
    table = case.model.unet.class_embedding.weight[:10].detach()
    assert offers[0].condition.tolist() == [11, 12] and offers[0].vectors.shape == (2, table.shape[1])
    mix = torch.linalg.lstsq(table.T, offers[1].vectors.T).solution.T  # the table's rows are independent
    assert torch.allclose(mix.sum(1), torch.ones(2), atol=1e-3) and float(mix.min()) > -1e-3
    assert not torch.allclose(mix, torch.full_like(mix, 0.1), atol=1e-3)
    images, _ = drawn(case.model, case, offers[1].condition, [1, 2], vectors=table[[4, 7]])
    plain, _ = drawn(case.model, case, torch.tensor([4, 7]), [1, 2])
    assert torch.allclose(images, plain, atol=1e-5)


# -- controls ----------------------------------------------------------------------------------------------------------
def test_controls_spend_as_many_images_and_ask_in_their_ways(monkeypatch):
    case = forced(text(ALL))
    made = {}
    real = drawing.drawn

    def watched(model, case, ids, seeds, prefix=None, vectors=None):
        made.setdefault(now[0], []).append((ids, seeds))
        return real(model, case, ids, seeds, prefix, vectors)

    monkeypatch.setattr(drawing, "drawn", watched)
    now = [""]
    for attack in (RandomPrefix(2, 3), NewSeeds(2, 3), OtherWordings(2)):
        now[0] = attack.name
        found = attack.attempts(case.model, case, 0)
        assert not found.after.any() and found.images.tolist() == [1 + attack.allowed(case.model, case)] * 2
    conditions, about = case.model.conditions, _first(asked(case, 10), 2)
    decode = case.model.tokenizer.decode
    texts = {n: [decode(conditions.content(ids[0])) for ids, _ in calls[1:]] for n, calls in made.items()}
    random = texts["random_prefix"]
    assert len(set(random)) == 3 and all(t.endswith("a red one") and t != "a red one" for t in random)
    assert texts["new_seeds"] == ["a red one"] * 3
    seeds = [s for _, own in made["new_seeds"][1:] for s in own]
    assert len(set(seeds)) == 6 and not set(seeds) & set(about.seeds)
    assert texts["other_wordings"][0] == "a crimson one" and "an image of a red one" in texts["other_wordings"]
    assert all(own == about.seeds for n in ("random_prefix", "other_wordings") for _, own in made[n])


def test_the_check_tells_pre_and_post_and_controls_and_feeds_the_verdict():
    case = text(ALL)
    asked(case, 3)
    sees = {"n": 0}

    def later(images):
        sees["n"] += 1
        return np.full(len(images), sees["n"] % 3 == 0)

    case.exam.judges[0].probabilities.sees = later
    other = text_case().model
    subjects = Subjects(case, case.model, other, other, other)
    found = {m.name: m for m in unlearn_diff_atk(subjects, attack=UnlearnDiffAtk(**SMALL))}
    assert list(found) == ["pre_asr", "post_asr", "random_prefix_asr", "new_seeds_asr", "other_wordings_asr"]
    for subject in ("original", "unlearned", "retrained"):
        assert getattr(found["pre_asr"], subject) <= getattr(found["post_asr"], subject)
    assert "3 images for each prompt" in found["post_asr"].note and "won" in found["post_asr"].note
    assert len(found["post_asr"].per_example["unlearned"]) == 3
    assert {a.name for a in find_attacks(None, "diffusion")} >= {"unlearn_diff_atk", "other_wordings"}
    assert {"random_prefix", "new_seeds", "p4d"} <= set(checks("diffusion", attack=True))
    scores = UnlearnDiffAtk(**SMALL).scores(other, case, Budget(), 0)
    assert scores.shape == (3,) and set(scores) <= {0.0, 1.0}


def test_p4d_stands_beside_it_with_the_same_words_steps_and_images():
    case = text(ALL)
    asked(case, 3)
    bright = lambda images: images.flatten(1).double().mean(1).numpy()  # noqa: E731
    level = np.quantile(bright(asked(case, 10).latents), 0.5)
    case.exam.judges[0].probabilities.sees = lambda images: bright(images) > level
    other = text_case().model
    with torch.no_grad():
        other.unet.conv_out.bias += 0.05
    settings = SMALL | {"tokens": 1, "lr": 0.5, "together": 2}
    found = {m.name: m for m in unlearn_diff_atk(
        Subjects(case, case.model, other, other, other), attack=UnlearnDiffAtk(**settings), controls=False, p4d=True
    )}  # fmt: skip
    assert list(found) == ["pre_asr", "post_asr", "p4d_asr"]
    same = EmbeddingSearch(**settings)
    by_hand = same.attempts(other, case, derive(0, "attack", "p4d"))
    assert (
        found["p4d_asr"].unlearned == 100 * by_hand.after.mean()
        and found["pre_asr"].unlearned == 100 * by_hand.before.mean()
    )
    assert found["p4d_asr"].note == "2 images for each prompt" and "2 images" in found["post_asr"].note


def test_the_verdict_compares_attacked_prompts_with_the_same_answers_unattacked():
    """Fewer prompts than answers: what is scored is told by its places, in any words and under any seed of the exam."""
    red = lambda images: images.flatten(1).double().mean(1).numpy()  # noqa: E731
    level = np.quantile(red(text(ALL).exam.answers(text_case().model).images), 0.3)
    case = text(lambda images: red(images) > level)
    about, recalled = asked(case, 4), case.exam.recalled(case.model)
    assert len(about) < len(recalled) and (recalled[about.places] == 1).all()
    answers = case.exam.answers(case.model)
    held = answers.images[[case.exam.cells[c].holds(case.exam.target) for c in answers.cell.tolist()]]
    for place, condition, seed in zip(about.places.tolist(), about.condition, about.seeds, strict=True):
        images = drawn(case.model, case, condition[None], [seed])[0]
        assert torch.equal(to_uint8(images)[0], held[place])

    other, second = text_case().model, text_case().model
    subjects = Subjects(case, case.model, other, other, second)
    attack = OtherWordings(4)
    after = attacked(subjects, attack, Budget())
    assert after.rows.tolist() == about.places.tolist() and len(after.unlearned) == len(about)
    scores = (recalled, np.zeros_like(recalled), np.zeros_like(recalled), np.zeros_like(recalled))
    found = attacked_residue(Evidence(*scores, attacks={attack.name: after}), attack.name, resamples=20)
    assert found.n == len(about)


def test_what_cannot_be_attacked_says_why():
    case = text(ALL)
    blind = Subjects(text_case(), case.model, case.model, case.model)
    assert "questions to the model" in UnlearnDiffAtk().skipped(blind)
    classes = class_case()
    classes = classes.with_(exam=exam(classes, ALL))
    subjects = Subjects(classes, classes.model, classes.model, classes.model)
    assert "text-conditional" in RandomPrefix().skipped(subjects) and UnlearnDiffAtk().skipped(subjects) is None
    subjects.models["unlearned"].draw = SimpleNamespace()
    assert "one-step" in UnlearnDiffAtk().skipped(subjects)
    with pytest.raises(BadSetting, match="l2 or l1"):
        UnlearnDiffAtk(criterion="linf")


def test_words_of_a_tokenizer_that_was_read_back_from_files_are_written_without_its_marks(tmp_path):
    """Its decoder is lost on the way, and "red</w>" would be read again as letters and signs."""
    transformers = pytest.importorskip("transformers")
    model = text_case().model
    model.tokenizer.save_pretrained(tmp_path)
    model.others["tokenizer"] = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    own = model.conditions.of(["a red three"])
    texts, again = written(model, torch.tensor([model.conditions.words("bright dark")]), own)
    assert texts == ["bright dark a red three"] and torch.equal(again, model.conditions.of(texts))
