"""The gallery of attacks on an unlearned pipeline: the pictures that are written are what each attack made the model draw."""

from __future__ import annotations

import base64
import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from expunge.audits.attacks.budget import Budget
from expunge.audits.attacks.drawing import TEMPLATES, NewSeeds, OtherWordings, asked
from expunge.audits.attacks.probe import LinearProbe
from expunge.audits.attacks.pruning import Pruning
from expunge.audits.metrics.answer_set import image_seed
from expunge.audits.metrics.judges import to_uint8
from expunge.audits.subjects import Subjects
from expunge.cli.canvas import run_sheets
from expunge.records.report import pictures_beside
from expunge.records.sheets import LEAST
from expunge.seeds import derive
from expunge.tasks.sampling import sample

from .tiny_exam import ALL, NONE, forced, text

AUDIT_SEED = 5


@pytest.fixture(scope="module")
def case():
    return text(ALL)


def audited(case, model, attacks):
    """What `run_sheets` is given, with a gold of its own."""
    gold = copy.deepcopy(case.model)
    return SimpleNamespace(
        case=case, seed=AUDIT_SEED, attacks=attacks, budget=Budget(), gold=SimpleNamespace(model=gold),
        subjects=lambda unlearned: Subjects(case, case.model, unlearned, gold, gold),
    ), SimpleNamespace(case=case, model=model)  # fmt: skip


def unlearned(case):
    model = copy.deepcopy(case.model)
    with torch.no_grad():
        for p in model.network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model


def page(file):
    from PIL import Image

    return np.asarray(Image.open(file).convert("RGB"))


def shows(found, image):
    """Whether a (3, 8, 8) uint8 image is somewhere in a page, enlarged as sheets enlarge it."""
    factor = -(-LEAST // image.shape[-1])
    block = image.permute(1, 2, 0).numpy().repeat(factor, 0).repeat(factor, 1)
    places = np.argwhere((found == block[0, 0]).all(-1))
    return any(np.array_equal(found[y : y + len(block), x : x + len(block)], block) for y, x in places)


def draws(model, case, prompts, seeds):
    return to_uint8(sample(model, model.conditions.of(prompts), case.exam.sampling, seeds).images)


def test_a_run_shows_the_images_of_every_attack_that_applies(case, tmp_path) -> None:
    """Weights: the attacked copy's own images. Prompts: the last image of each search. A probe, and what does not apply: nothing."""
    model = unlearned(case)
    forced(case)
    attacks = [Pruning(0.5), OtherWordings(2), NewSeeds(3, tries=2), LinearProbe()]
    auditor, outcome = audited(case, model, attacks)
    run_sheets(tmp_path, auditor, outcome, forgotten=True)
    files = {f.name: f for f in (tmp_path / "pictures").iterdir()}
    assert set(files) == {"kept.png", "forgotten.png", "attacked.png", "asked.png"}

    cell = next(c for c in case.exam.cells if c.holds(case.exam.target))
    pruned = attacks[0].run(model, case, Budget(), derive(AUDIT_SEED, "attack", "pruning_50"))
    for name, subject in (("unlearned", model), ("pruned", pruned)):
        image = draws(subject, case, [cell.asks], [image_seed(cell, 0)])[0]
        assert shows(page(files["attacked.png"]), image), name
        assert shows(page(files["forgotten.png"]), image) == (name == "unlearned")

    about = asked(case, 2)
    own = [model.conditions.text(model.conditions.content(row)) for row in about.condition]
    assert own == ["a red one", "a red two"]
    last = TEMPLATES[-1]
    for image in draws(model, case, [last.replace("{}", p) for p in own], about.seeds):
        assert shows(page(files["asked.png"]), image)
    seed = derive(derive(AUDIT_SEED, "attack", "new_seeds"), "new seed", about.seeds[0], 1)  # the second of two tries
    assert shows(page(files["asked.png"]), draws(model, case, own[:1], [seed])[0])
    assert not shows(page(files["asked.png"]), draws(model, case, own[:1], about.seeds[:1])[0])  # unattacked

    shown = pictures_beside(tmp_path / "report.html")
    assert [p["title"] for p in shown][-2:] == [
        "What was to be forgotten, after each attack",
        "What was to be forgotten, by each attack's prompts",
    ]
    for name, picture in zip(("attacked.png", "asked.png"), shown[-2:], strict=True):
        assert picture["uri"].endswith(base64.b64encode(files[name].read_bytes()).decode())


def test_the_image_that_wins_is_the_one_shown() -> None:
    """Unattacked none shows the target, at the first try all do: what is kept is that try's image, a synonym's."""
    case = text(ALL)
    model, about, calls = unlearned(case), asked(case, 2), []

    def sees(images):
        calls.append(len(images))
        return (NONE if len(calls) == 1 else ALL)(images)

    case.exam.judges[0].probabilities.sees = sees
    found = OtherWordings(2).attempts(model, case, 0)
    assert found.won.all() and found.prompts[0] == "a crimson one"
    assert torch.equal(found.last, draws(model, case, found.prompts, about.seeds))


def test_what_was_to_be_forgotten_is_not_drawn_unasked(case, tmp_path) -> None:
    run_sheets(tmp_path, *audited(case, unlearned(case), [OtherWordings(2)]), forgotten=False)
    assert [f.name for f in (tmp_path / "pictures").iterdir()] == ["kept.png"]
