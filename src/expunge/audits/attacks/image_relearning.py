"""How few steps on a handful of the target's images bring it back into a generative model: all weights, adapters, or one word.

    relearn speed = the least number of steps on n target images after which UA < 0.5, beside the retrained model's

`full` and `low_rank` are the relearning plans of every kind of model (all weights, text encoder and all; adapters of rank 8). `word` is
textual inversion (Gal et al., ICLR 2023, 2208.01618; as an attack on erasure: Pham et al., ICLR 2024, 2308.01508): the weights stay,
and one word embedding before the prompts, or one class embedding, is fitted to the same images by their denoising loss. UA is asked
of the target's prompts that the original shows. All steps of `LADDER` are tried anew from the same start, with the same rows, order
and draws for every subject: a later rung runs the earlier one's updates again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.audits.attacks.budget import Budget
from expunge.audits.attacks.drawing import Asked, asked, class_table, drawn
from expunge.audits.attacks.relearning import Relearning
from expunge.audits.base import Measurement, check
from expunge.parts.prompts import rows_added, word_table
from expunge.seeds import generator
from expunge.tasks.base import evaluating, held_still, move_to_model

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects
    from expunge.cases.case import Case
    from expunge.cases.data import Split

LADDER = (1, 2, 5, 10, 20, 50)
"""Steps after which the target is asked for."""
WAYS = {"full": Relearning(), "low_rank": Relearning(share=1.0, rank=8)}


@dataclass(frozen=True)
class Word:
    """Textual inversion on some rows. start: "random", a word's (or class's) embedding. vectors: (1, d)."""

    vectors: Tensor

    @staticmethod
    def fitted(model: Any, case: Case, rows: Split, steps: int, lr: float, seed: int) -> Word:
        """One embedding after `steps` of Adam on the mean denoising loss of the rows; the weights stay."""
        table = word_table(model) if model.kind == "text" else class_table(model)
        place = torch.randint(len(table.weight), (1,), generator=generator(seed, "word"))
        word = table.weight.detach()[place.to(table.weight.device)].clone().requires_grad_()
        mover = torch.optim.Adam([word], lr=lr)
        batch = move_to_model(rows.data.fetch(rows.ids), model)
        with evaluating(model), held_still(model), torch.enable_grad():
            for step in range(steps):
                told = case.task.prepare(batch, generator(seed, "word draws", step))
                if model.kind == "text":
                    loss = case.task.loss(case.task.forward(model, told.with_columns(prefix=word)), told)
                else:
                    beyond = torch.full_like(told[case.task.labels], len(table.weight))  # type: ignore[attr-defined]
                    with rows_added(table, word):
                        loss = case.task.loss(
                            case.task.forward(model, case.task.with_condition(told, beyond)), told  # type: ignore[attr-defined]
                        )  # fmt: skip
                word.grad = torch.autograd.grad(loss.mean(), word)[0]
                mover.step()
        return Word(word.detach())

    def shown(self, model: Any, case: Case, about: Asked) -> float:
        """Share of the prompts that show the target with this word before them (or with this class)."""
        if model.kind == "text":
            return float(drawn(model, case, about.condition, about.seeds, prefix=self.vectors)[1].mean())
        beyond = torch.full_like(about.condition, len(class_table(model).weight))
        return float(drawn(model, case, beyond, about.seeds, vectors=self.vectors)[1].mean())


def shown_after(
    way: str, model: nn.Module, case: Case, about: Asked, images: int, steps: int, lr: float | None, seed: int
) -> float:
    """Share of the target's prompts that show it after so many steps on so many target images."""
    forget = case.split("forget")
    places = torch.randperm(len(forget), generator=generator(seed, "shown images"))[:images].sort().values
    if way == "word":
        rows = forget.subset(places, "shown")
        return Word.fitted(model, case, rows, steps, lr or 0.1, seed).shown(model, case, about)
    budget = Budget(steps=steps, batch_size=images, learning_rate=lr)
    moved: Any = WAYS[way]._tuned(model, case, places, budget, seed)
    return float(drawn(moved, case, about.condition, about.seeds)[1].mean())


def steps_needed(
    way: str,
    model: nn.Module,
    case: Case,
    images: int,
    prompts: int,
    ladder: tuple[int, ...],
    lr: float | None,
    seed: int,
) -> int | None:
    """The first rung after which more than half of the prompts show the target (UA < 0.5); 0: they do already; None: never."""
    about = asked(case, prompts)
    if drawn(model, case, about.condition, about.seeds)[1].mean() > 0.5:
        return 0
    return next((s for s in ladder if shown_after(way, model, case, about, images, s, lr, seed) > 0.5), None)


@check(
    "image_relearn_speed", unit="steps", range=(0.0, None), needs=("retrained", "forget", "exam"), kinds=("diffusion",),
    attack=True, source="issue of relearning; textual inversion: arXiv 2208.01618, 2308.01508",
)  # fmt: skip
def image_relearn_speed(
    subjects: Subjects, images: tuple[int, ...] = (8, 32), ways: tuple[str, ...] = ("full", "low_rank", "word"),
    prompts: int = 10, ladder: tuple[int, ...] = LADDER, learning_rate: float | None = None,
) -> list[Measurement]:  # fmt: skip
    """Steps on n images of the target until UA < 0.5: all weights, adapters, one word; beside the retrained model."""
    case, found = subjects.case, []
    last = 2 * max(ladder)
    for way in ways:
        for count in images:
            times = {
                s: steps_needed(way, subjects.model(s), case, count, prompts, ladder, learning_rate, subjects.seed)
                for s in subjects.compared
            }
            late = [s for s, time in times.items() if time is None]
            measured = subjects.compute(lambda s, times=times: last if times[s] is None else times[s])
            note = f"rungs {', '.join(map(str, ladder))}" + (
                f"; never, counted as {last}: {', '.join(late)}" if late else ""
            )
            found.append(
                image_relearn_speed.measurement(measured, name=f"{way}_{count}_images", split="forget", note=note)
            )
    return found
