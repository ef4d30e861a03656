"""What the cost benches share: times taken in turns, the peak memory of a process of its own, and the table that is written.

Other work on the machine must meet both sides of a ratio alike, so actions are timed in turns (A B A B ...), and the ratio is
the median of the rounds' ratios. On CPU times are processor time, which on one thread is the time that a quiet machine would
take: what the process waits while others run is not counted. Peak memory is a process's own high-water mark, so each side gets a
fresh process.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from expunge.engine.rundir import machine, versions
from expunge.files import write_atomic


@dataclass(frozen=True)
class Times:
    """Seconds of each action in each round; ratios are of one action to another of the same round."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def best(self, name: str) -> float:
        return min(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over rounds of time(name) / time(base)."""
        return median(a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True))

    def range(self, name: str, base: str) -> tuple[float, float]:
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]
        return min(ratios), max(ratios)


Clock = Callable[[], float]


def clock_of(device: str) -> Clock:
    """Processor time on CPU, wall time elsewhere."""
    return time.process_time if device == "cpu" else time.perf_counter


def in_turns(
    actions: Mapping[str, Callable[[], Any]], rounds: int, warm: bool = True, clock: Clock = time.perf_counter
) -> Times:
    """Time every action once per round, one after the other; odd rounds run in reverse order. warm: an untimed round first.

    Garbage is collected before each and collection is off inside, as `timeit` does: a cycle that one side leaves must not be
    paid for by the other.
    """
    if warm:
        for action in actions.values():
            action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds):
        for name in list(actions)[:: -1 if number % 2 else 1]:
            gc.collect()
            gc.disable()
            try:
                start = clock()
                actions[name]()
                seconds[name].append(clock() - start)
            finally:
                gc.enable()
    return Times(seconds)


def in_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments` and read the JSON of its last line."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"expected `python -m {module} {' '.join(arguments)}` to end well, found exit status {done.returncode}; its last "
            f"words:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of one shape as a markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(_text(row[n]) for n in names) + " |" for row in rows)]) + "\n"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What `make` returns, as JSON has it: read from the file where it is there, else made and left there (a killed bench goes on)."""
    if not file.exists():
        write_atomic(file, json.dumps(make()))
    return json.loads(file.read_text("utf-8"))


def publish(name: str, command: str, seconds: float, body: str, out: str | None) -> None:
    """Print the table, and write it with its command, versions and machine to `out`/<name>.md (None: print only)."""
    print(body)
    if out is not None:
        where, told = machine(), ", ".join(f"{k} {v}" for k, v in versions().items())
        head = (
            f"# {name}\n\nMade by `{command}` in {seconds:.0f} s.\n{told}.\n{where['cores']} cores ({where['processor']}), "
            f"GPU: {where['gpu'] or 'none'}, {where['threads']} torch thread(s) per process.\n\n"
        )
        write_atomic(Path(out) / f"{name}.md", head + body)


def options(name: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of a bench: its own module's text, and where the table goes."""
    parser = argparse.ArgumentParser(
        prog=f"python -m expunge.benchmarks.{name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="benchmarks-results", help="folder of the written table; '' prints only")
    return parser


def spelled(name: str, arguments: Sequence[str] | None) -> str:
    """The command as it was given, for the table's head."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return " ".join(["python -m", f"expunge.benchmarks.{name}", *(a if " " not in a else repr(a) for a in given)])
