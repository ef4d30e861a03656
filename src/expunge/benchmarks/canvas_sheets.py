"""Contact sheets of a canvas benchmark: what original, unlearned and retrained models draw under the same noise, a row per prompt.

Images of what was to be forgotten are drawn only where they are asked for; those of other prompts always may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.audits.attacks.budget import Attack
from expunge.audits.attacks.drawing import DrawingAttack, asked
from expunge.audits.metrics.answer_set import Cell
from expunge.audits.metrics.exam import Exam
from expunge.records.sheets import Sheet, write_sheet
from expunge.seeds import derive

PROMPTS = 6


def sheet_cells(exam: Exam, forgotten: bool, count: int = PROMPTS) -> list[Cell]:
    """Evenly chosen cells: those of the target, in all of its words, or the others."""
    cells = [cell for cell in exam.cells if cell.holds(exam.target) == forgotten and (forgotten or cell.wording == 0)]
    places = {round(i * (len(cells) - 1) / max(count - 1, 1)) for i in range(count)}
    return [cells[place] for place in sorted(places)]


def sheets(
    exam: Exam, models: Mapping[str, Any], samples: int = 3, forgotten: bool = False, count: int = PROMPTS
) -> list[Sheet]:
    """The kept prompts' sheet, and (forgotten) the target's. samples: images of a prompt and model side by side."""
    from expunge.audits.metrics.answer_set import answer_set

    found = []
    for target in (False, True) if forgotten else (False,):
        cells = sheet_cells(exam, target, count)
        seeds = exam.seeds[:samples]
        columns = {
            name: answer_set(model, cells, seeds, exam.sampling, exam.cache).images.unflatten(
                0, (len(cells), len(seeds))
            )
            for name, model in models.items()
        }
        title = "what was to be forgotten" if target else "what must stay"
        found.append(Sheet(title, tuple(str(cell.asks) for cell in cells), columns))
    return found


def write(folder: Path, drawn: Sequence[Sheet]) -> list[Path]:
    """kept.png, and forgotten.png where it is there, into the folder's `pictures`."""
    return [
        write_sheet(folder / "pictures" / f"{name}.png", sheet)
        for name, sheet in zip(("kept", "forgotten"), drawn, strict=False)
    ]


def write_attacked(folder: Path, auditor: Any, model: Any) -> list[Path]:
    """The gallery of an audit's attacks on the unlearned model, of those that apply. attacked.png: the target's prompts after each attack
    that changes weights. asked.png: for each prompt that is attacked by others, the image that ended each attack on it."""
    case, exam, subjects, found = auditor.case, auditor.case.exam, auditor.subjects(model), []
    changed: dict[str, Any] = {"unlearned": model}
    asking: list[DrawingAttack] = []
    for attack in auditor.attacks:
        if attack.skipped(subjects) is not None:
            continue
        if isinstance(attack, DrawingAttack):
            asking.append(attack)
        elif type(attack).run is not Attack.run:  # a probe leaves no model behind
            changed[attack.name] = attack.run(model, case, auditor.budget.of(attack.name), _seed(auditor, attack))
    if len(changed) > 1:
        sheet = sheets(exam, changed, samples=2, forgotten=True)[1]
        found.append(write_sheet(folder / "pictures" / "attacked.png", sheet))
    if asking:
        rows = min(PROMPTS, *(len(asked(case, attack.prompts)) for attack in asking))
        about, words = asked(case, asking[0].prompts), model.conditions
        prompts = [words.text(words.content(row)) if model.kind == "text" else str(int(row)) for row in about.condition]
        columns = {
            a.name: a.attempts(model, case, _seed(auditor, a)).last[:rows, None] for a in asking
        }  # the audit's own
        found.append(
            write_sheet(folder / "pictures" / "asked.png", Sheet("by prompts", tuple(prompts[:rows]), columns))
        )
    return found


def _seed(auditor: Any, attack: Attack) -> int:
    return derive(auditor.seed, "attack", attack.name)
