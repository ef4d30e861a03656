"""Commands that work on models: each reads the case file, calls the library and prints what came back."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from expunge.audits.asked import asked
from expunge.cases import Case
from expunge.cli import show
from expunge.cli.build import build_case, golds
from expunge.cli.config import CaseFile, Named, parse_value, read_case, save_case
from expunge.cli.estimate import estimate, retraining
from expunge.engine import weights_digest
from expunge.engine.distribution import disband, follows
from expunge.engine.measured import Curves
from expunge.errors import BadData, BadSetting, UnmetNeed
from expunge.methods import find
from expunge.methods.outcome import Outcome, unlearn
from expunge.methods.stored import save_protected
from expunge.parts.guarded import load_saved


def run(
    file: Path,
    overrides: list[str],
    out: Path | None,
    device: str | None,
    audited: bool,
    key: Path | None,
    ledger: str | None = None,
) -> None:
    """Unlearn in a run folder, then audit."""
    case_file = _read(file, overrides)
    if file.is_dir() and (out is None or out.resolve() == file.resolve()):
        raise BadSetting(
            f"expected --out with another folder than {file}, found {'none' if out is None else 'the same'}; a request is "
            "served into a run folder of its own"
        )
    method, folder = _method(case_file), out or case_file.run_folder
    curves = None if case_file.curves is None else Curves(**case_file.curves.model_dump())
    with show.Report() as report:
        case = build_case(case_file)
        _check_request(case_file)
        outcome = unlearn(
            case, method.name, seed=case_file.seeds.unlearning, run=folder, device=device, floor=case_file.floor,
            report=report, curves=curves, state=None if case_file.state is None else case_file.path(case_file.state),
            **method.settings,
        )  # fmt: skip
    disband()
    if follows():
        return
    save_case(case_file, folder)
    _tell(outcome, folder)
    if audited:
        _audit(case_file, outcome, folder, key, case_file.audit.chosen(), case_file.seeds.audit, ledger)


def dry_run(file: Path, overrides: list[str]) -> None:
    """The plan, its formula, unmet needs and the counted cost; exit code 2 where a need is unmet."""
    case_file = _read(file, overrides)
    case, console = build_case(case_file), show.out()
    _describe(case)
    configured = find(_method(case_file).name).configure(**_method(case_file).settings)
    about = configured.method
    kind = f"{about.family}, {about.intention}, {about.guarantee}"
    console.print(f"[bold]method[/]    {about.name} ({kind}): {escape(about.summary)}", soft_wrap=True)
    settings = ", ".join(f"{k}={v}" for k, v in configured.values.items())
    console.print(f"[bold]settings[/]  {escape(settings or 'none')}", soft_wrap=True)
    unmet = configured.unmet(case)
    if unmet:
        for line in unmet:
            console.print(f"[bold red]unmet[/]     {escape(line)}", soft_wrap=True)
        raise UnmetNeed(
            f"expected the case to have what {about.name} needs, found {len(unmet)} unmet; meet the needs listed above"
        )
    action = configured.action(case)
    console.print(f"[bold]formula[/]   {escape(str(action))}", soft_wrap=True)
    console.print("[bold]needs[/]     all met")
    cost = estimate(action, case)
    rows = " + ".join(f"{count} {name}" for name, count in cost.rows.items()) or "none counted"
    console.print(
        f"[bold]cost[/]      {cost.updates} updates, rows passed: {rows}" + (f" ({cost.note})" if cost.note else "")
    )
    if case.recipe is not None:
        whole = retraining(case.recipe, len(case.split("retain")))
        part = "not told" if cost.fraction is None else f"{100 * cost.fraction:.3g} %"
        console.print(
            f"[bold]retrain[/]   {whole.updates} updates, {whole.rows['retain']} rows: this run is {part} of it"
        )
    else:
        console.print("[bold]retrain[/]   not counted: the case has no recipe")


def audit(
    run: Path, checks: list[str] | None, gold: str | None, attacks: bool | None, seed: int | None, key: Path | None
) -> None:
    """Audit what a finished run left in its folder."""
    stored, finished = run / "case.yaml", run / "outcome.json"
    missing = [file.name for file in (stored, finished) if not file.exists()]
    if missing:
        raise BadData(
            f"expected a finished run in {run}, found no {' and no '.join(missing)}; finish it with "
            f"'expunge run CASE.yaml --out {run}'"
        )
    case_file = read_case(stored)
    method = _method(case_file)
    with show.Report():
        case = build_case(case_file)
        left = json.loads(finished.read_text("utf-8"))
        record = left["record"]
        known = record["weights"]["before"], record["case"]["data"]["fingerprint"]
        if known != (weights_digest(case.model), case.data.fingerprint()):
            raise BadData(
                f"expected the model and the data of the run in {run}, found that they have changed since; "
                "bring them back, or run again"
            )
        model = load_saved(run / "model", copy.deepcopy(case.model))
        configured = find(method.name).configure(**method.settings)
        outcome = Outcome(model, record, configured, case, proof=left.get("proof"))
    given = {"checks": checks, "gold": gold, "attacks": attacks}
    plan = case_file.audit.model_copy(update={name: value for name, value in given.items() if value is not None})
    _audit(case_file, outcome, run, key, plan.chosen(), case_file.seeds.audit if seed is None else seed)


def compare(file: Path, overrides: list[str], methods: str, seeds: str, workers: int, out: Path | None) -> None:
    """Every method with every seed on the case."""
    from expunge.records.compare import compare as comparing
    from expunge.records.terminal import comparison_table

    case_file = read_case(file, overrides)
    chosen = method_specs(methods) if methods else [(_method(case_file).name, _method(case_file).settings)]
    folder = out or (case_file.run_folder.parent / f"{case_file.name}-compare")
    with show.Report() as report:
        case = build_case(case_file)
        _check_request(case_file)
        comparison = comparing(
            case, chosen, seed_numbers(seeds), workers=workers, folder=folder, report=report, floor=case_file.floor,
            cache=_golds(folder), **case_file.audit.chosen(),
        )  # fmt: skip
    show.out().print(comparison_table(comparison))
    show.out().print(f"report: {escape(str(folder / 'report.html'))}", soft_wrap=True)


def validate(file: Path, overrides: list[str]) -> None:
    """Everything that can be wrong before any training."""
    case_file = _read(file, overrides)
    case = build_case(case_file)
    _check_request(case_file)
    _describe(case)
    if case_file.method is not None:
        find(case_file.method.name).configure(**case_file.method.settings).check(case)
    asked(**case_file.audit.asked(), kind=case.task.name)
    show.out().print(
        "[green]valid[/]: case, model, data" + (" and method fit together" if case_file.method else " fit together")
    )


def protect(file: Path, overrides: list[str], out: Path | None) -> None:
    """Train by a method that acts at training time; if the case has a request, serve it with the model at once."""
    from expunge.methods.outcome import protect as protecting

    case_file = read_case(file, overrides)
    method, folder = _method(case_file), out or case_file.run_folder
    with show.Report() as report:
        case = build_case(case_file)
        report(f"training by {method.name}", 0, 1)
        model = protecting(case, method.name, seed=case_file.seeds.unlearning, **method.settings)
        report(f"training by {method.name}", 1, 1)
        save_protected(model, folder / "protected")
    case_file = _protected_by(case_file, folder / "protected")
    save_case(case_file, folder)
    utility = case.task.evaluate(model, case.split("test" if "test" in case.splits else "train").batches())
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in utility.items())
    show.out().print(f"protected model: {escape(str(folder / 'protected'))} ({numbers})", soft_wrap=True)
    if case_file.request is None:
        show.out().print(
            f"serve a request: expunge run {escape(str(folder))} 'request={{samples: [...]}}' --out DIR", soft_wrap=True
        )
        return
    served = replace(case, model=model)
    with show.Report() as report:
        outcome = unlearn(
            served, method.name, seed=case_file.seeds.unlearning, run=folder, floor=case_file.floor, report=report,
            **method.settings,
        )  # fmt: skip
    _tell(outcome, folder)
    _audit(case_file, outcome, folder, None, case_file.audit.chosen(), case_file.seeds.audit)


def prepare(file: Path, overrides: list[str], out: Path | None) -> None:
    """What the method can measure before any request, into DIR/state.safetensors."""
    from expunge.methods.outcome import prepare as preparing

    case_file = read_case(file, overrides)
    method, folder = _method(case_file), out or case_file.run_folder
    with show.Report() as report:
        case = build_case(case_file)
        preparing(case, method.name, seed=case_file.seeds.unlearning, run=folder, report=report, **method.settings)
    show.out().print(f"kept for later requests: {escape(str(folder))}", soft_wrap=True)
    show.out().print(
        f"serve one: expunge run {escape(str(file))} state={escape(str(folder.resolve()))} 'request={{samples: [...]}}' out=DIR",
        soft_wrap=True,
    )


def demo(folder: Path, quick: bool) -> None:
    """Run the demo, print a table for each of its requests, and where the page and the certificate are."""
    from expunge.benchmarks.demo import run as running
    from expunge.records.terminal import comparison_table

    with show.Report() as report:
        found = running(folder, quick=quick, report=report)
    for comparison in found.values():
        show.out().print(comparison_table(comparison))
    _where(folder)


# -- protected models --------------------------------------------------------------------------------------------------
def _read(file: Path, overrides: list[str]) -> CaseFile:
    """A case file; or a folder of `protect`, or of a run that served one of its requests: its case with its newest model."""
    if not file.is_dir():
        return read_case(file, overrides)
    newest = next((file / name for name in ("model", "protected") if (file / name / "protected.json").exists()), None)
    if newest is None:
        raise BadSetting(
            f"expected a case file, or a folder that 'expunge protect' or a request to its model has left, found {file} "
            "without protected.json; give CASE.yaml"
        )
    return _protected_by(read_case(file / "case.yaml", overrides), newest)


def _protected_by(case_file: CaseFile, folder: Path) -> CaseFile:
    """The case with the model that is kept in the folder."""
    place = os.path.relpath(folder.resolve(), Path(case_file.base).resolve())
    return case_file.model_copy(update={"model": case_file.model.model_copy(update={"protected": place})})


# -- shared ------------------------------------------------------------------------------------------------------------
def _audit(
    case_file: CaseFile,
    outcome: Outcome,
    folder: Path,
    key: Path | None,
    chosen: dict[str, Any],
    seed: int,
    ledger: str | None = None,
) -> None:
    """Audit, save, print the table and the verdict."""
    from expunge.records.audit import Auditor

    with show.Report() as report:
        given = chosen | golds(case_file, outcome.case)
        auditor = Auditor(outcome.case, seed=seed, cache=_golds(folder), report=report, **given)
        audited = auditor.audit(outcome)
        if outcome.case.task.name == "diffusion":
            from expunge.cli.canvas import run_sheets

            run_sheets(folder, auditor, outcome, case_file.samples)
        audited.save(folder, key)
    console = show.out()
    console.print(audited.table())
    console.print(
        f"[bold]verdict[/]   {escape(audited.verdict.verdict)}: {escape(audited.verdict.reason)}", soft_wrap=True
    )
    _where(folder)
    if ledger is not None:
        console.print(f"ledger:      run {audited.enter(ledger, folder)} in {escape(ledger)}", soft_wrap=True)


def _where(folder: Path) -> None:
    """The files a person opens next."""
    console, page, certificate = show.out(), folder / "report.html", folder / "certificate.json"
    console.print(f"report:      {escape(str(page))}", soft_wrap=True)
    console.print(
        f"certificate: {escape(str(certificate))} (expunge verify {escape(str(certificate))})", soft_wrap=True
    )


def _golds(folder: Path) -> Path:
    """Golds are kept beside the runs, under digests of what they depend on, so that runs of one case share them."""
    return folder.parent / ".golds"


def _method(case_file: CaseFile) -> Named:
    if case_file.method is None:
        raise BadSetting(
            "expected a method in the case file, found none; add 'method: {name: salun}' or pass method=salun "
            "(expunge ls methods lists them)"
        )
    return case_file.method


def _check_request(case_file: CaseFile) -> None:
    if case_file.request is None:
        raise BadSetting("expected a request in the case file, found none; add e.g. 'request: {label: 3}'")


def _describe(case: Case) -> None:
    about, console = case.describe(), show.out()
    console.print(f"[bold]case[/]      {about['name']} ({about['task']}), {escape(about['request']['summary'])}")
    sizes = ", ".join(f"{name} {count}" for name, count in about["splits"].items())
    console.print(f"[bold]splits[/]    {sizes}")


def _tell(outcome: Outcome, folder: Path) -> None:
    console, record = show.out(), outcome.record
    console.print(f"[bold]{outcome.name}[/]  {escape(outcome.formula)}", soft_wrap=True)
    cost = record["cost"]["seconds"]
    console.print(
        f"{record['ended']}; {record['updates']} updates in {cost:.3g} s; model: {escape(str(folder / 'model'))}",
        soft_wrap=True,
    )


def method_specs(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`salun:density=0.3,ssd` as [("salun", {"density": 0.3}), ("ssd", {})]."""
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, *settings = word.split(":")
        pairs = [item.partition("=") for item in settings]
        if any(not equals for _, equals, _ in pairs):
            raise BadSetting(f"expected settings as name:key=value, found '{word}'; write e.g. salun:density=0.3")
        found.append((name, {key: parse_value(value) for key, _, value in pairs}))
    return found


def seed_numbers(text: str) -> list[int]:
    """`3` as [0, 1, 2]; `0,4,7` as it stands."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadSetting(f"expected seeds as a count (3) or a list (0,1,7), found '{text}'; correct it") from error
    if len(numbers) == 1 and numbers[0] < 1:
        raise BadSetting(f"expected at least one seed, found {numbers[0]}; write --seeds 3")
    return list(range(numbers[0])) if len(numbers) == 1 else numbers
