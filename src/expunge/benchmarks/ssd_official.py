"""SSD here against SSD by its official code: the same model, the same data in the same order, the same weights selected.

    git clone https://github.com/if-loops/selective-synaptic-dampening PEER
    python -m expunge.benchmarks.ssd_official --peer PEER              # goal: time ratio <= 0.6

The official side is what its strategy file does: `ParameterPerturber` of PEER/src/ssd.py (its plotting and tracking imports are
replaced by empty modules; it uses none of them), DataLoaders over a map-style dataset of (x, _, y), the importance of the forget
loader, that of the full loader, then `modify_weight`. Batches are in the official order (`ConcatDataset` of retain and forget
rows, not shuffled). Three ratios, because they differ:

* `request`: both importances are computed here as there;
* `stored`: the importance of D is there already (`expunge.prepare`, or an earlier request's `outcome.state`), as SSD is designed: one
  pass over D, once, ever (the official comment says so too, though its strategy measures it at each request);
* `passes`: the gradient passes alone, official data loading excluded (batches made beforehand).
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

import expunge
from expunge.benchmarks.measuring import clock_of, in_turns, options, publish, spelled, table
from expunge.benchmarks.overhead import cifar_rows
from expunge.benchmarks.testbed import ResNet8, digits, mlp
from expunge.cases import Case, TensorData, requests
from expunge.engine import Workbench, fit
from expunge.errors import UnmetNeed
from expunge.methods.edited import ssd
from expunge.parts.plan import Optimizer, Training

NAME = "ssd_official"
BATCH = 64
UNUSED = ("torchvision", "matplotlib", "matplotlib.pyplot", "wandb", "tqdm", "seaborn", "scipy", "scipy.stats")


class Triples(Dataset):
    """(x, _, y), as the official loaders read."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int, Tensor]:
        return self.x[i], 0, self.y[i]


@contextmanager
def standing_in(names: tuple[str, ...]) -> Iterator[None]:
    """Empty modules under these names where the real ones are not installed, for the time of an import."""
    made = []
    for name in names:
        if name in sys.modules or ("." not in name and find_spec(name) is not None):
            continue
        module = types.ModuleType(name)
        module.__path__ = []
        for attribute in ("datasets", "models", "transforms", "tqdm", "pyplot", "stats"):
            setattr(module, attribute, None)
        sys.modules[name] = module
        made.append(name)
    try:
        yield
    finally:
        for name in made:
            sys.modules.pop(name, None)


def official(peer: Path) -> Any:
    """The module PEER/src/ssd.py."""
    file = peer / "src" / "ssd.py"
    if not file.exists():
        raise UnmetNeed(
            f"expected the official code at {file}, found none; clone if-loops/selective-synaptic-dampening there"
        )
    spec = importlib.util.spec_from_file_location("official_ssd", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with standing_in(UNUSED):
        spec.loader.exec_module(module)
    return module


class Peer:
    """The official request, in its steps."""

    def __init__(self, module: Any, case: Case, alpha: float, lam: float):
        self.module, self.case, self.alpha, self.lam = module, case, alpha, lam
        data = Triples(case.data.column("inputs"), case.data.column("labels"))
        forget = Subset(data, case.split("forget").ids.tolist())
        retain = Subset(data, case.split("retain").ids.tolist())
        self.forget = DataLoader(forget, BATCH)
        self.full = DataLoader(ConcatDataset((retain, forget)), batch_size=BATCH)

    def request(self, forget: Any = None, full: Any = None) -> tuple[nn.Module, dict[str, Tensor]]:
        """The model after `ssd_tuning`'s steps, and which weights it selected."""
        model = copy.deepcopy(self.case.model)
        parameters = {
            "lower_bound": 1, "exponent": 1, "magnitude_diff": None, "min_layer": -1, "max_layer": -1,
            "forget_threshold": 1, "dampening_constant": self.lam, "selection_weighting": self.alpha,
        }  # fmt: skip
        device = next(model.parameters()).device.type
        with redirect_stdout(StringIO()):
            perturber = self.module.ParameterPerturber(
                model, torch.optim.SGD(model.parameters(), lr=0.1), device, parameters
            )
        model.eval()
        of_forget = perturber.calc_importance(self.forget if forget is None else forget)
        of_all = perturber.calc_importance(self.full if full is None else full)
        perturber.modify_weight(of_all, of_forget)
        return model, {n: of_forget[n] > of_all[n].mul(self.alpha) for n in of_all}


def setup(kind: str, rows: int, epochs: int, device: str) -> tuple[Case, str]:
    """A trained model on the device, and the request to forget class 3; the rows stay in main memory, as the official loaders'."""
    if kind == "resnet8":
        (x, y, told), build = cifar_rows(rows), ResNet8
    else:
        x, y, _, _ = digits(rows)
        x, told = x.flatten(1), "digits"

        def build() -> nn.Module:
            return mlp(64, (256, 128), 10)

    recipe = Training(epochs=epochs, batch_size=BATCH, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9))
    case = Case(build(), TensorData(inputs=x, labels=y), requests.label(3), recipe=recipe, build=build)
    return case.with_(model=fit(case, "train", 0).to(device)), told


def grouped_without_sorting(case: Case) -> Case:
    """The same rows with retain sorted by class, so that our `order="grouped"` and the official loaders pass them alike."""
    y = case.data.column("labels")
    order = torch.sort(y, stable=True).indices
    columns = {name: case.data.column(name)[order] for name in case.data.names}
    return case.with_(data=TensorData(**columns))


def measure(
    peer: Any, kind: str, rows: int, epochs: int, rounds: int, alpha: float, lam: float, device: str = "cpu"
) -> dict[str, Any]:
    """One row of the table."""
    case, told = setup(kind, rows, epochs, device)
    case = grouped_without_sorting(case)
    theirs = Peer(peer, case, alpha, lam)
    settings: dict[str, Any] = {"alpha": alpha, "lam": lam, "batch_size": BATCH, "order": "grouped"}
    first = expunge.unlearn(case, "ssd", floor=None, device=device, **settings)
    action = expunge.methods.registry.find("ssd").configure(**settings).action(case)

    def ours(state: dict[str, Any]) -> Workbench:
        bench = Workbench(case, copy.deepcopy(case.model), device=torch.device(device), state=dict(state))
        action.apply(bench)
        return bench

    ready = [list(theirs.forget), list(theirs.full)]
    sides: dict[str, Callable[[], object]] = {
        "official": theirs.request, "official, batches ready": lambda: theirs.request(*ready),
        "request": lambda: ours({}), "stored": lambda: ours(first.state),
    }  # fmt: skip

    def whole(side: Callable[[], object]) -> None:
        side()
        if device == "cuda":
            torch.cuda.synchronize()

    times = in_turns({name: partial(whole, side) for name, side in sides.items()}, rounds, clock=clock_of(device))
    model, masks = theirs.request()
    bench = ours({})
    of_all, of_forget = (
        bench.state["importance"],
        ssd.importance(Workbench(case, case.model, device=torch.device(device)), "forget", batch_size=BATCH),
    )
    one_side = sum(int((masks[n] != (of_forget[n] > alpha * of_all[n])).sum()) for n in masks)
    total = sum(m.numel() for m in masks.values())
    reached = dict(model.named_parameters())
    again = dict(ours(first.state).model.named_parameters())
    low, high = times.range("request", "official")
    return {
        "model": kind, "device": device, "data": told, "rows": rows,
        "official, s": times.median("official"), "ours, s": times.median("request"),
        "request": times.ratio("request", "official"), "range": f"{low:.2f}..{high:.2f}",
        "stored": times.ratio("stored", "official"), "passes": times.ratio("request", "official, batches ready"),
        "selected": sum(int(m.sum()) for m in masks.values()) / total, "selected by one side only": one_side,
        "largest weight difference": max(float((p - reached[n]).detach().abs().max()) for n, p in bench.model.named_parameters()),
        "stored equals request": all(torch.equal(p, again[n]) for n, p in bench.model.named_parameters()),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = options(NAME, __doc__)
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of if-loops/selective-synaptic-dampening")
    parser.add_argument("--kinds", nargs="+", choices=("resnet8", "mlp"), default=["resnet8", "mlp"])
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=4, help="of training the model that forgets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alpha", type=float, default=2.0)
    parser.add_argument("--lam", type=float, default=1.0)
    parser.add_argument("--device", default="cpu", help="cpu (processor time) or cuda (wall time)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    peer, start = official(given.peer), time.perf_counter()
    rows = [
        measure(peer, k, given.rows, given.epochs, given.rounds, given.alpha, given.lam, given.device)
        for k in given.kinds
    ]
    body = (
        "Columns `request`, `stored` and `passes` are times of ours over the official code's request (median of rounds in turns; goal "
        "<= 0.6): with both importances computed; with the importance of D measured before, once for all requests, as SSD is "
        "designed (`expunge.prepare`, or an earlier request); and, as the first, over the official code with its batches made "
        f"beforehand.\n\n{table(rows)}"
    )
    publish(
        NAME,
        spelled(NAME, arguments).replace(str(given.peer), "PEER"),
        time.perf_counter() - start,
        body,
        given.out or None,
    )
    return rows


if __name__ == "__main__":
    main()
