"""`expunge`: the commands. Each is a thin reading of a library function, and heavy libraries load inside it.

Every `ExpungeError` is shown as one panel and ends with exit code 2; `--debug` shows where it was raised.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from expunge.cli import show
from expunge.errors import ExpungeError


class Commands(TyperGroup):
    """The group of all commands: one place where errors become panels. `--debug` may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--debug" in args:
            args = ["--debug", *(a for a in args if a != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ExpungeError as error:
            if ctx.params.get("debug"):
                raise
            show.error_panel(error)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Remove data from a trained model, prove it, keep it out.",
)  # fmt: skip

CaseArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CASE.yaml", help="the case: model, data, request, recipe, method; or a folder that protect left"
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. method.density=0.3")]
Out = Annotated[Path | None, typer.Option("--out", help="folder of the run; default: out of the case, or runs/<name>")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: where the model is")]
KeyOption = Annotated[
    Path | None,
    typer.Option("--key", help="private key that signs; default: signing-key.pem beside the run's folder"),
]


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="show where an error was raised")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from expunge import __version__

        typer.echo(__version__)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the report")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="fewer epochs and methods")] = False,
) -> None:
    """Real digits: two requests, all methods, one table, a report and a certificate."""
    from expunge.cli import work

    work.demo(out, quick)


@app.command()
def run(
    case: CaseArgument,
    overrides: Overrides = None,
    out: Out = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print plan, unmet needs and cost, and stop")] = False,
    device: Device = None,
    audit: Annotated[bool, typer.Option("--audit/--no-audit", help="audit the result")] = True,
    key: KeyOption = None,
    ledger: Annotated[str | None, typer.Option(help="enter request, run and lineage here, e.g. sqlite:///l.db")] = None,
) -> None:
    """Forget what the case requests, then audit it. A killed run resumes by the same command."""
    from expunge.cli import work

    if dry_run:
        work.dry_run(case, overrides or [])
    else:
        work.run(case, overrides or [], out, device, audit, key, ledger)


@app.command()
def audit(
    run: RunArgument,
    checks: Annotated[str | None, typer.Option(help="names with commas between; default: all that fit")] = None,
    gold: Annotated[str | None, typer.Option(help="what `retrained` is; default: the case's")] = None,
    attacks: Annotated[bool | None, typer.Option("--attacks/--no-attacks", help="default: the case's")] = None,
    seed: Annotated[int | None, typer.Option(help="of the audit; default: the case's")] = None,
    key: KeyOption = None,
) -> None:
    """Audit a finished run (again): results.json, report.html and certificate.json in its folder."""
    from expunge.cli import work

    work.audit(run, checks.split(",") if checks else None, gold, attacks, seed, key)


@app.command()
def compare(
    case: CaseArgument,
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="names with commas between; settings as 'salun:density=0.3:lr=0.01'")
    ] = "",
    seeds: Annotated[str, typer.Option(help="how many (3), or which (0,1,7)")] = "1",
    workers: Annotated[int, typer.Option(min=1, help="processes at once")] = 1,
    out: Out = None,
) -> None:
    """Methods x seeds on one case: a table with intervals and a report."""
    from expunge.cli import work

    work.compare(case, overrides or [], methods, seeds, workers, out)


@app.command()
def search(
    case: CaseArgument,
    overrides: Overrides = None,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", help="lr=1e-4..0.1:log, or policy=other,uniform; once for each setting"),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="settings to try")] = 30,
    least: Annotated[float, typer.Option(help="share of utility that the choice must keep")] = 0.97,
    out: Out = None,
) -> None:
    """Settings of the method, by search on half of the rows; the other half is not read."""
    from expunge.cli import searching

    searching.search(case, overrides or [], over or [], trials, least, out)


@app.command()
def report(run: RunArgument) -> None:
    """Write report.html of a run or a comparison anew from its records."""
    from expunge.cli import records

    records.report(run)


@app.command()
def verify(
    certificate: Annotated[
        Path, typer.Argument(metavar="CERTIFICATE", help="certificate.json, or the folder of a run")
    ],
    weights: Annotated[Path | None, typer.Option(help="safetensors file or folder said to be the result")] = None,
    results: Annotated[Path | None, typer.Option(help="results.json")] = None,
    key: Annotated[str | None, typer.Option(help="the signer's public key file or fingerprint, from elsewhere")] = None,
) -> None:
    """Check a certificate. Needs no torch."""
    from expunge.cli import records

    records.verify(certificate, weights, results, key)


@app.command("ls")
def listing(
    what: Annotated[str, typer.Argument(help="methods, tasks, audits, attacks, scopes or objectives")],
    name: Annotated[str | None, typer.Argument(help="one of them: its settings and paper")] = None,
    kind: Annotated[str | None, typer.Option(help="only what serves this task")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="the table for documents")] = False,
) -> None:
    """List what there is."""
    from expunge.cli import listing as lists

    lists.listing(what, name, kind, markdown)


@app.command()
def validate(case: CaseArgument, overrides: Overrides = None) -> None:
    """Check a case file, its data, its model and its method's needs, without any training."""
    from expunge.cli import work

    work.validate(case, overrides or [])


@app.command()
def protect(case: CaseArgument, overrides: Overrides = None, out: Out = None) -> None:
    """Train a model by the case's method so that it can serve later requests (SISA, ACU, ...)."""
    from expunge.cli import work

    work.protect(case, overrides or [], out)


@app.command()
def prepare(case: CaseArgument, overrides: Overrides = None, out: Out = None) -> None:
    """Measure what the case's method can before any request (SSD's importance of all data), and keep it for state: DIR."""
    from expunge.cli import work

    work.prepare(case, overrides or [], out)


@app.command()
def bench(
    which: Annotated[str, typer.Argument(metavar="BENCHMARK", help="tofu, muse or canvas")],
    methods: Annotated[str, typer.Option(help="names with commas between; settings as 'npo:beta=0.05:lr=1e-5'")] = "",
    split: Annotated[
        str, typer.Option(help="what to forget: forget01, forget05, forget10; nano (embedded model)")
    ] = "",
    seeds: Annotated[str, typer.Option(help="how many (3), or which (0,1,7)")] = "1",
    model: Annotated[str | None, typer.Option(help="folder or hub id; default: the embedded small Llama")] = None,
    retrained: Annotated[str | None, typer.Option(help="folder of the model trained without the forget data")] = None,
    second: Annotated[str | None, typer.Option(help="folder of another seed of it, the noise floor")] = None,
    forget: Annotated[Path | None, typer.Option(help="muse: folder of texts to forget")] = None,
    retain: Annotated[Path | None, typer.Option(help="muse: folder of texts to keep")] = None,
    folds: Annotated[
        int, typer.Option(min=0, max=4, help="muse: scalability and sustainability over so many folds")
    ] = 0,
    attacks: Annotated[
        str, typer.Option(help="all, default (the battery of the kind of model), none, or names with commas between")
    ] = "default",
    no_attacks: Annotated[bool, typer.Option("--no-attacks", help="the same as --attacks none")] = False,
    targets: Annotated[
        str, typer.Option(help="canvas: styles, objects, or both of one ('red three'), with commas between")
    ] = "red,three",
    small: Annotated[bool, typer.Option("--small", help="canvas: the tests' model and budgets")] = False,
    sequence: Annotated[bool, typer.Option("--sequence", help="canvas: the targets one after another as well")] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="canvas: folder of style/object/number.jpg; muse: news, books, or a folder as on its hub"),
    ] = None,
    judges: Annotated[
        Path | None, typer.Option(help="canvas: folder with the ViT classifiers style/ and object/")
    ] = None,
    prompt_attacks: Annotated[
        bool, typer.Option("--prompt-attacks", help="canvas: UnlearnDiffAtk and its controls without the battery")
    ] = False,
    p4d: Annotated[bool, typer.Option("--p4d", help="canvas: P4D beside UnlearnDiffAtk, at as many images")] = False,
    table: Annotated[
        Path | None,
        typer.Option(help="canvas: file to write a table to, of every run of these seeds kept in the folder"),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="sample answers to kept questions, side by side")] = 0,
    show_forgotten: Annotated[
        bool, typer.Option("--show-forgotten", help="samples of forgotten questions too")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="processes at once")] = 1,
    out: Annotated[Path | None, typer.Option("--out", help="folder; default: runs/<benchmark>")] = None,
) -> None:
    """A published benchmark: methods x seeds beside original and retrained, with attacks, verdicts and a report."""
    from expunge.cli import bench as benches

    benches.bench(
        which, methods, split=split, seeds=seeds, model=model, retrained=retrained, second=second, forget=forget, retain=retain,
        folds=folds, attacks="none" if no_attacks else attacks, samples=samples, show_forgotten=show_forgotten, workers=workers, out=out,
        targets=targets, small=small, sequence=sequence, data=data, judges=judges, table=table, prompts=prompt_attacks, p4d=p4d,
    )  # fmt: skip


def main() -> None:
    app(prog_name="expunge")


__all__ = ["app", "main"]
