"""How few images and steps bring a target back into a generative model, and what rounding and pruning touch there."""

from __future__ import annotations

import pytest
import torch

from expunge.audits.attacks import image_relearning
from expunge.audits.attacks.budget import Budget
from expunge.audits.attacks.image_relearning import Word, image_relearn_speed, shown_after, steps_needed
from expunge.audits.attacks.pruning import Pruning
from expunge.audits.attacks.quantisation import Quantisation, ends, matrices
from expunge.audits.subjects import Subjects
from expunge.seeds import generator
from tiny_pipelines import class_case, text_case

from .tiny_exam import ALL, forced, text


@pytest.mark.parametrize("kind", ["text", "class"])
def test_one_word_is_fitted_to_the_images_and_the_weights_stay(kind):
    case = text_case() if kind == "text" else class_case()
    before = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    rows = case.split("forget")

    def loss(word):
        """On draws that the fit never saw."""
        batch = case.task.prepare(rows.data.fetch(rows.ids), generator(1, "other draws"))
        table = case.model.text_encoder.get_input_embeddings() if kind == "text" else case.model.unet.class_embedding
        with torch.no_grad(), image_relearning.rows_added(table, word):
            if kind == "text":
                batch = batch.with_columns(prefix=word)
            else:
                batch = batch.with_columns(labels=torch.full_like(batch["labels"], len(table.weight)))
            return float(case.task.loss(case.task.forward(case.model, batch), batch).mean())

    start, found = (Word.fitted(case.model, case, rows, steps, 0.1, 0) for steps in (0, 40))
    assert found.vectors.shape == start.vectors.shape and loss(found.vectors) < loss(start.vectors)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in case.model.named_parameters())


def test_the_first_rung_that_shows_the_target_counts(monkeypatch):
    case = forced(text(ALL))
    asked_for = []

    def shown(way, model, case, about, images, steps, lr, seed):
        asked_for.append(steps)
        return 0.5 if steps < 5 else 0.6  # UA must be below one half, not at it

    monkeypatch.setattr(image_relearning, "shown_after", shown)
    assert steps_needed("full", case.model, case, 8, 3, (1, 2, 5, 10), None, 0) == 5 and asked_for == [1, 2, 5]
    assert steps_needed("full", case.model, case, 8, 3, (1, 2), None, 0) is None
    subjects = Subjects(case, case.model, case.model, case.model)
    (row,) = image_relearn_speed(subjects, images=(8,), ways=("full",), prompts=3, ladder=(1, 2))
    assert row.unlearned == 4 and "never, counted as 4: original, unlearned, retrained" in row.note
    case.exam.judges[0].probabilities.sees = ALL
    assert steps_needed("full", case.model, case, 8, 3, (1, 2), None, 0) == 0


@pytest.mark.parametrize("way", ["full", "low_rank", "word"])
def test_every_way_leaves_the_model_and_is_asked_with_what_it_learned(way, monkeypatch):
    case = forced(text(ALL))
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    seen = []
    real = image_relearning.drawn
    monkeypatch.setattr(image_relearning, "drawn", lambda *a, **k: seen.append((a[0], k)) or real(*a, **k))
    from expunge.audits.attacks.drawing import asked

    assert shown_after(way, case.model, case, asked(case, 3), 2, 2, None, 0) == 0.0
    (model, told), = seen  # fmt: skip
    if way == "word":
        assert model is case.model and told["prefix"].shape == (1, 64)
    else:
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert any(k.startswith("unet.") for k in changed) and model is not case.model
    assert all(torch.equal(v, before[k]) for k, v in case.model.state_dict().items())


def test_rounding_and_pruning_leave_the_autoencoder_and_the_words_and_reach_the_text_encoder():
    case = text_case()
    before = case.model.state_dict()
    for attack in (Quantisation(4), Pruning(0.5)):
        after = attack.run(case.model, case, Budget(), 0).state_dict()
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        assert not any(k.startswith("vae.") or "token_embedding" in k for k in changed)
        assert any(k.startswith("unet.") for k in changed) and any(k.startswith("text_encoder.") for k in changed)
        if isinstance(attack, Pruning):  # half of what draws, not the autoencoder's zeros
            kept, weights = ends(case.model), dict(case.model.named_parameters())
            live = [p for p, _ in matrices(case.model) if id(p) not in kept]
            names = [n for n, p in weights.items() if any(p is q for q in live)]
            zeros, total = sum(int((after[n] == 0).sum()) for n in names), sum(p.numel() for p in live)
            assert zeros == round(0.5 * total) and not any(n.startswith("vae.") for n in names)
