"""General utility by EleutherAI's lm-evaluation-harness: the compared models, as they are in memory, on its tasks.

    checks()["lm_eval"](subjects, tasks=("arc_easy", "piqa"), limit=200, shots=0)

The harness builds prompts, scores and standard errors; here they are only set side by side. A task's main metric is the
first it lists of which more is better (`acc` of most). All models see the same questions and the same demonstrations. The
tasks' data comes from the hub or its cache; `include_path` names a folder with tasks of your own (the harness's YAML files).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from expunge.audits.base import Measurement, check
from expunge.cases.data import Split
from expunge.errors import BadData, BadModel, BadSetting, UnmetNeed, nearest, need_extra
from expunge.tasks.base import evaluating

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

NORMAL = 1.96
"""Standard errors from a value to the ends of its 95% interval."""
DIRECTIONS = {True: "higher", False: "lower", None: "match"}


@check("lm_eval", direction="higher", kinds=("language",), source="EleutherAI, lm-evaluation-harness")
def lm_eval(
    subjects: Subjects,
    tasks: Sequence[str] = ("mmlu",),
    limit: int | None = None,
    shots: int | None = None,
    include_path: str | None = None,
    batch_size: int = 8,
) -> list[Measurement]:
    """General utility: main metric of tasks of the lm-evaluation-harness, with its standard errors (library of an extra).

    limit: questions of each task; None: all. shots: demonstrations; None: the task's own number (one of 0 stays 0).
    """
    asked = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    manager = _ready(subjects, asked, include_path)

    def results(subject: str) -> dict[str, Any]:
        def run(model: nn.Module, rows: Split) -> dict[str, Any]:
            return evaluate(
                model, rows.data.tokenizer, asked, manager, limit=limit, shots=shots, batch_size=batch_size,
                seed=subjects.seed, resamples=subjects.resamples,
            )  # fmt: skip

        return subjects.over(("lm_eval", asked, limit, shots, include_path), subject, "train", run)

    found = []
    for task, (key, direction) in main_metrics(results("original")).items():
        metric, _, answers_by = key.partition(",")
        error = f"{metric}_stderr,{answers_by}"

        def sample(subject: str, task=task, key=key, error=error) -> np.ndarray:
            """(2,) value, standard error."""
            own = results(subject)["results"][task]
            return np.array([own[key], own[error]])

        known = all(_number(results(s)["results"][task].get(error)) for s in subjects.compared)
        measured = (
            subjects.measure(
                sample, lambda row: row[0], lambda row: (row[0] - NORMAL * row[1], row[0] + NORMAL * row[1])
            )
            if known
            else subjects.compute(lambda subject, task=task, key=key: results(subject)["results"][task][key])
        )
        found.append(
            lm_eval.measurement(
                measured, name=f"lm_eval_{task}", split=task, direction=direction, unit=metric,
                range=(0.0, 1.0) if metric.startswith(("acc", "exact_match")) else (None, None),
                note=_note(results("original"), task, answers_by),
            )
        )  # fmt: skip
    return found


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, Any]:
    """The harness's results of a model of transformers in memory. Model, tokenizer and global random state stay as they were."""
    if not (hasattr(model, "config") and hasattr(model, "device") and hasattr(model, "tie_weights")):
        raise BadModel(
            f"expected a model of transformers for the lm-evaluation-harness, found {type(model).__name__}; leave the check "
            "'lm_eval' out, or pass AutoModelForCausalLM.from_pretrained(...)"
        )
    harness, huggingface = need_extra("lm_eval", "harness"), need_extra("lm_eval.models.huggingface", "harness")
    with evaluating(model), _random_state():
        # a copy, since the harness gives a tokenizer without padding one
        wrapped = huggingface.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        return harness.simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit, log_samples=False,
            bootstrap_iters=resamples, random_seed=seed, numpy_random_seed=seed % 2**32, torch_random_seed=seed,
            fewshot_random_seed=seed,
        )  # fmt: skip


def main_metrics(results: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Task -> (its main metric as the harness keys it, "acc,none", and the direction). Groups stand for their members."""
    numbers = {
        name: [key for key, value in own.items() if "," in key and "_stderr," not in key and _number(value)]
        for name, own in results["results"].items()
    }
    members = {m for group, own in results.get("group_subtasks", {}).items() if numbers.get(group) for m in own}
    better = results.get("higher_is_better", {})
    found = {}
    for name, keys in numbers.items():
        if keys and name not in members:
            known = [better.get(name, {}).get(key.partition(",")[0]) for key in keys]
            place = known.index(True) if True in known else 0
            found[name] = (keys[place], DIRECTIONS[known[place]])
    return found


def _ready(subjects: Subjects, tasks: tuple[str, ...], include_path: str | None) -> Any:
    """The harness's task manager, once library, tokenizer, tasks and their data are known to be there."""
    need_extra("lm_eval", "harness")
    if getattr(subjects.case.data, "tokenizer", None) is None:
        raise UnmetNeed(
            "expected the case's data to have its tokenizer for the lm-evaluation-harness, found none; make the data with "
            "question_answer(tokenizer, ...) or plain_text(tokenizer, ...), or pass TextData(..., tokenizer)"
        )
    if not tasks:
        raise BadSetting("expected tasks of the lm-evaluation-harness, found none; name some, e.g. tasks=('arc_easy',)")
    make = need_extra("lm_eval.tasks", "harness").TaskManager
    manager = make(include_path=include_path, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # the harness's own tasks are thousands of files: read where asked for
        manager = make(include_path=include_path, include_defaults=True)
    known = manager.all_tasks
    for name in tasks:
        if name not in known:
            raise BadSetting(
                f"expected tasks that the lm-evaluation-harness knows, found '{name}'.{nearest(name, known)} `lm-eval ls tasks` "
                "lists them; include_path=... adds a folder of your own"
            )
        try:
            with _random_state():
                manager.load([name])
        except Exception as error:  # the hub, its cache and the tasks' own code each have errors of their own
            raise BadData(
                f"expected the data of the harness task '{name}' at hand or the hub in reach, found {type(error).__name__}: "
                f"{error}; run it once where there is a network and keep the cache (HF_HOME), or name a local task"
            ) from error
    return manager


@contextmanager
def _random_state() -> Iterator[None]:
    """The harness seeds every global generator; afterwards they go on as if it had not."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def _note(results: Mapping[str, Any], task: str, answers_by: str) -> str:
    count, shots = results.get("n-samples", {}).get(task, {}), results.get("n-shot", {}).get(task)
    said = [f"{count['effective']} of {count['original']} questions"] if count else []
    said += [f"{shots} shots"] if shots is not None else []
    said += [f"version {results['versions'][task]}"] if results.get("versions", {}).get(task) is not None else []
    said += [f"answers by '{answers_by}'"] if answers_by not in ("", "none") else []
    return "; ".join(said)
