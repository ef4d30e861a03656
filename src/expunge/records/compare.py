"""Methods x seeds on one case (or on the case of each seed), side by side with `original` and `retrained`."""

from __future__ import annotations

import concurrent.futures
import inspect
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from expunge.cases.case import Case
from expunge.errors import BadSetting
from expunge.records.audit import Auditor
from expunge.records.comparison import Comparison
from expunge.records.results import Results

MethodSpec = str | tuple[str, Mapping[str, Any]] | Mapping[str, Any]
Report = Callable[[str, int, int], None]


def compare(
    case: Case | Callable[[int], Case],
    methods: Iterable[MethodSpec],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    workers: int = 1,
    folder: str | Path | None = None,
    report: Report | None = None,
    floor: float | None = 0.5,
    command: str = "",
    second: Any = None,
    **audit_settings: Any,
) -> Comparison:
    """Unlearn and audit every method with every seed.

    Args:
        case: one case, whose original stays and only unlearning, gold and audit are seeded; or a function of the seed, for
            originals trained anew with each seed (same data, same request).
        methods: names, or (name, settings), or {"name": ..., **settings}.
        workers: processes. Each takes a seed at a time, so that golds and attacked references are made once per seed. With
            a GPU one worker is used.
        folder: each run's results are kept under folder/<method>/seed<k>/ and the comparison's report at its top.
        audit_settings: of `Auditor` (checks, gold, attacks, thresholds, ...); gold and floor may be functions of the seed too.
        second: `Auditor`'s floor, under another name because `floor` is the utility's here.
    """
    from expunge.methods.registry import find

    if second is not None:
        audit_settings["second"] = second
    chosen = [_spec(m) for m in methods]
    if not chosen or not seeds:
        raise BadSetting(f"expected at least one method and one seed, found {len(chosen)} and {len(seeds)}; name some")
    for name, settings in chosen:
        find(name).configure(**settings)  # a wrong name or setting is told before any compute
    total = len(chosen) * len(seeds)
    found: dict[int, list[Results]] = {}
    where = None if folder is None else Path(folder)
    jobs = [(case, chosen, seed, where, floor, command, audit_settings) for seed in seeds]
    if _workers(workers) > 1 and len(seeds) > 1:
        # fork: cases hold closures (build functions) that do not pickle; results come back as plain data
        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(
            _workers(workers), mp_context=context, initializer=_one_thread
        ) as pool:
            _JOBS[:] = jobs
            running = {pool.submit(_numbered, i): seed for i, seed in enumerate(seeds)}
            for future in concurrent.futures.as_completed(running):
                seed = running[future]
                found[seed] = [Results.from_dict(item) for item in future.result()]
                if report is not None:
                    report("compare", sum(map(len, found.values())), total)
    else:
        for number, (job, seed) in enumerate(zip(jobs, seeds, strict=True)):
            done = number * len(chosen)

            def tell(text: str, step: int, _: int, done: int = done) -> None:
                if report is not None:
                    report(text, done + step, total)

            found[seed] = _one_seed(*job, tell)
    comparison = Comparison.of([r for seed in seeds for r in found[seed]], command=command)
    if folder is not None:
        save(comparison, folder)
    return comparison


def save(comparison: Comparison, folder: str | Path) -> Path:
    """comparison.json and report.html; returns the report's path."""
    from expunge.records.report import write_report

    comparison.save(Path(folder) / "comparison.json")
    return write_report(Path(folder) / "report.html", comparison)


def _one_seed(
    case: Case | Callable[[int], Case], methods: Sequence[tuple[str, dict[str, Any]]], seed: int, folder: Path | None,
    floor: float | None, command: str, audit_settings: Mapping[str, Any], report: Report | None = None,
) -> list[Results]:  # fmt: skip
    from expunge.engine.execute import forget_peak_memory
    from expunge.methods.outcome import unlearn

    own = case if isinstance(case, Case) else case(seed)
    of_seed = {name: value(seed) if inspect.isfunction(value) else value for name, value in audit_settings.items()}
    if "second" in of_seed:
        of_seed["floor"] = of_seed.pop("second")
    auditor = Auditor(own, seed=seed, **of_seed)
    found = []
    for number, (name, settings) in enumerate(methods):
        if report is not None:
            report(f"{name}, seed {seed}", number, len(methods))
        forget_peak_memory()
        outcome = unlearn(own, name, seed=seed, floor=floor, **settings)
        audited = auditor.audit(outcome)
        audited = replace(audited, results=audited.results.model_copy(update={"command": command}))
        if folder is not None:
            audited.save(folder / _label(name, settings, methods) / f"seed{seed}")
        found.append(audited.results)
    if report is not None:
        report(f"seed {seed}", len(methods), len(methods))
    return found


_JOBS: list[tuple[Any, ...]] = []


def _numbered(index: int) -> list[dict[str, Any]]:
    return [results.to_dict() for results in _one_seed(*_JOBS[index])]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _workers(wanted: int) -> int:
    import torch

    return 1 if torch.cuda.is_available() else max(1, int(wanted))


def _spec(which: MethodSpec) -> tuple[str, dict[str, Any]]:
    if isinstance(which, str):
        return which, {}
    if isinstance(which, Mapping):
        settings = dict(which)
        return str(settings.pop("name", "")), settings
    label, given = which
    return label, dict(given)


def _label(name: str, settings: Mapping[str, Any], methods: Sequence[tuple[str, dict[str, Any]]]) -> str:
    same = [s for n, s in methods if n == name]
    return name if len(same) == 1 else f"{name}-{same.index(dict(settings))}"
