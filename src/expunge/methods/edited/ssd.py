"""SSD: shrink the weights that matter far more to the forget data than to all data. No gradient step is taken.

Paper: "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", Foster et al., AAAI 2024,
https://arxiv.org/abs/2308.07707. With B batches b of all data D (and likewise I_F over the forget data):

    I_D     = (1/B) sum_b ( d/dtheta mean_{i in b} loss_i )^2        squared gradient of the batch mean, eval mode
    beta    = min( lam I_D / I_F, 1 )
    theta_p <- beta_p theta_p   where I_F,p > alpha I_D,p            all other weights stay, bit for bit

`lfssd` is the label-free variant (Foster et al., "Loss-Free Machine Unlearning", 2402.19308): mean_i ||f(x_i)||^2 in
place of the loss, and |gradient| in place of its square.

Departure: D is passed shuffled. The official code passes retain then forget rows, grouped by class where a class goes
(`order="grouped"`). The order decides what a batch mean is, and so which alpha is useful. The importance of D is measured
once, ever: before any request by `expunge.prepare`, or at the first, and `outcome.state` carries it to the next. It belongs
to the weights and the data it was measured on: it is used again only for the same, unless `stored="always"` (no retain data
at request time, at the price of staleness).

A limit to know: with importances per example, or of batches that are the same in D and D_f, I_D >= (|D_f|/N) I_F, so
nothing could be selected once alpha >= N/|D_f|. What is selected there lives off how shuffling mixes batches; a
warning says so.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from expunge.cases.data import Split
from expunge.engine.execute import weights_digest
from expunge.engine.layout import channels_last
from expunge.engine.workbench import Workbench
from expunge.errors import BadSetting, EmptyScope, ExpungeWarning, UnmetNeed
from expunge.methods.registry import method, setting
from expunge.parts.plan import Edit

if TYPE_CHECKING:
    from expunge.cases.case import Case
    from expunge.parts.step import Step

Importance = dict[str, Tensor]
"""Parameter name -> importance >= 0, of the parameter's shape."""

Alpha = Annotated[
    float, setting("how many times more important to the forget data a weight must be to be selected", ge=0)
]
Lam = Annotated[float, setting("dampening: a selected weight is multiplied by min(lam I_D / I_F, 1)", ge=0)]
BatchSize = Annotated[int, setting("rows per batch gradient; changes the importances", ge=1)]
Order = Annotated[
    Literal["shuffled", "grouped"], setting("order of the rows; grouped: retain by class, then forget, as officially")
]
Stored = Annotated[
    Literal["same_weights", "always", "never"],
    setting("when a stored importance of D serves: measured on the same weights, data and settings, always, or never"),
]


def selected(I_D: Tensor, I_F: Tensor, alpha: float) -> Tensor:
    """Weights with I_F > alpha I_D, as bool. I_F = 0 is never selected."""
    return torch.gt(I_F, alpha * I_D)


def dampen(theta: Tensor, I_D: Tensor, I_F: Tensor, alpha: float, lam: float) -> Tensor:
    """min(lam I_D / I_F, 1) theta where I_F > alpha I_D, else theta; tensors of one shape."""
    beta = (lam * I_D / I_F).clamp(max=1.0)  # 0/0 where I_F = 0, which is never selected
    return torch.where(selected(I_D, I_F, alpha), beta.to(theta.dtype) * theta, theta)


def output_energy(step: Step) -> Tensor:
    """||f(x_i)||^2, (B,): what LFSSD differentiates instead of the loss."""
    return step.output.prediction.reshape(len(step.batch), -1).square().sum(1)


def all_rows(bench: Workbench, by_class: bool) -> Split:
    """D as the official loaders concatenate it: retain rows (grouped by class if asked), then forget rows."""
    retain, forget = bench.splits["retain"].ids, bench.splits["forget"].ids
    if by_class:
        labels = bench.case.data.column(getattr(bench.task, "labels", "labels"))
        if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
            retain = retain[torch.sort(labels[retain], stable=True).indices]
    return Split("train", bench.case.data, torch.cat([retain, forget]))


def importance(bench: Workbench, on: str | Split, **measured: Any) -> Importance:
    """`Workbench.importance` in the layout that is fastest."""
    with channels_last(bench.model):
        found = bench.importance(on, **measured)
    return {name: value.contiguous() for name, value in found.items()}


def importance_of_all(bench: Workbench, about: dict[str, Any], measured: dict[str, Any], stored: str) -> Importance:
    """I_D, from `bench.state` where that serves, else measured; and kept there with what it is about."""
    about = {**about, "weights": weights_digest(bench.model), "data": bench.case.data.fingerprint()}
    kept, kept_about = bench.state.get("importance"), bench.state.get("importance_about", {})
    shapes = {n: p.shape for n, p in bench.model.named_parameters() if p.requires_grad}
    fits = kept is not None and {n: t.shape for n, t in kept.items()} == shapes
    if stored == "always" and not fits:
        raise UnmetNeed(
            "expected a stored importance of all data for this model's parameters (stored='always'), found "
            f"{'none' if kept is None else 'one of other parameters'}; pass state: an earlier request's outcome.state or run folder"
        )
    reused = fits and (stored == "always" or (stored == "same_weights" and kept_about == about))
    bench.note("stored_importance_used", reused)
    if reused:
        stale = "" if kept_about == about else ", and on other weights, data or settings: it is stale"
        bench.warn(
            f"the importance of all data was measured before this request{stale}; the pass over all data is not in its cost",
            ExpungeWarning,
        )
        return {n: t.to(bench.device) for n, t in kept.items()}
    rows = all_rows(bench, by_class="energy" not in measured) if about["order"] == "grouped" else "train"
    found = importance(bench, rows, **measured)
    bench.state["importance"], bench.state["importance_about"] = found, about
    return found


def measuring(batch_size: int, order: str, label_free: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """How an importance is measured: what its keeper has to know of that, and the keywords of `Workbench.importance`."""
    about = {"batch_size": batch_size, "order": order, "label_free": label_free}
    measured: dict[str, Any] = {"batch_size": batch_size, "shuffled": order == "shuffled"}
    if label_free:
        measured |= {"power": 1, "energy": output_energy}
    return about, measured


def prepared(
    case: Case,
    seed: int,
    device: str | None,
    report: Any,
    batch_size: int,
    order: str,
    label_free: bool = False,
    **_: Any,
) -> dict[str, Any]:
    """I_D before any request ("once, ever"): the state of a request that would have measured it."""
    if order == "grouped":
        raise BadSetting(
            "expected order='shuffled' before a request, found 'grouped', which passes the forget rows last; choose shuffled, or "
            "let the first request measure"
        )
    model = copy.deepcopy(case.model)
    place = torch.device(device) if device else next(model.parameters()).device
    bench = Workbench(case, model.to(place), seed, place, report=report)
    importance_of_all(bench, *measuring(batch_size, order, label_free), stored="never")
    return bench.state


def ssd_edit(alpha: float, lam: float, batch_size: int, order: str, stored: str, label_free: bool) -> Edit:
    """The edit of both variants."""
    about, measured = measuring(batch_size, order, label_free)

    @torch.no_grad()
    def apply(bench: Workbench) -> None:
        rows, forget = len(bench.splits["train"]), len(bench.splits["forget"])
        if alpha >= rows / forget:
            bench.warn(
                f"expected alpha < N/|D_f| = {rows / forget:.3g}, found {alpha:g}: per example nothing could be "
                "selected, and what is selected depends on how batches mix; lower alpha, or judge by "
                "the noted selected_fraction",
                ExpungeWarning,
            )
        I_D = importance_of_all(bench, about, measured, stored)
        I_F = importance(bench, "forget", **measured)
        count, total = 0, 0
        for name, theta in bench.model.named_parameters():
            if name in I_F:
                count += int(selected(I_D[name], I_F[name], alpha).sum())
                total += theta.numel()
                theta.copy_(dampen(theta, I_D[name], I_F[name], alpha, lam))
        bench.note("selected_fraction", count / max(total, 1))
        if count == 0:
            bench.warn(f"I_F > {alpha:g} I_D holds for none of {total} weights; lower alpha", EmptyScope)

    formula = f"θ ← min({lam:g}·I_D/I_F, 1)·θ where I_F > {alpha:g}·I_D"
    return Edit(apply, formula + (" (I of ‖f(x)‖²)" if label_free else ""))


@method(
    family="edited", needs=("labels",), intention="removal", mechanism="dampening",
    paper="Foster et al., AAAI 2024, 2308.07707", prepare=prepared,
)  # fmt: skip
def ssd(
    alpha: Alpha = 10.0, lam: Lam = 1.0, batch_size: BatchSize = 64, order: Order = "shuffled",
    stored: Stored = "same_weights",
) -> Edit:  # fmt: skip
    """Dampen the weights that matter far more to the forget data than to all data."""
    return ssd_edit(alpha, lam, batch_size, order, stored, label_free=False)


@method(
    family="edited", intention="removal", mechanism="dampening", paper="Foster et al., 2024, 2402.19308",
    prepare=partial(prepared, label_free=True),
)  # fmt: skip
def lfssd(
    alpha: Alpha = 10.0, lam: Lam = 1.0, batch_size: BatchSize = 64, order: Order = "shuffled",
    stored: Stored = "same_weights",
) -> Edit:  # fmt: skip
    """SSD without labels: importances are those of the squared norm of the output."""
    return ssd_edit(alpha, lam, batch_size, order, stored, label_free=True)
