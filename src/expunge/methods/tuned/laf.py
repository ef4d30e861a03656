"""LAF: unlearning without any label, by making the forget representations unlikely and the others stay where they are.

Paper: "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models", Shen et al., ICLR 2024,
https://arxiv.org/abs/2404.00506. With e = g(x) the representation at a layer, h_D and h_f variational autoencoders
of the representations of all training data and of the forget data (trained first, then frozen), per pair of batches:

    L_UE = sum_{s in D_r} phi(q_{h_D}(g(s))) - sum_{u in D_f} phi(q_{h_f}(g(u))),   phi(q) = exp(q/(q+1)), q_h(e) =
    ||h(e) - e||^2 L_RA = sum_{s in D_r} log( exp(c_s) / sum_{u in D_f} exp(c_u/tau) ),            c = 1 - cos(g(x),
    g_original(x))

L_UE and L_RA alternate at every step, each by an Adam of its own on all weights; an epoch is one pass of the forget
data. LAF+R (`laf_r`) adds one pass of supervised training on the retain data.

Departures. The decoder's output is the identity; the official code ends it in a sigmoid, so that signed representations
cannot be reconstructed (`decoder="sigmoid"` reproduces it). The representation is what goes into the last linear layer
unless a layer is named; the paper's is the output of the first layer of the head, without activation. As in the
paper, the density that stands for the remaining data is trained on all data, forget rows included.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import FIXED_SIZE, method, setting
from expunge.parts.architecture import representation, width
from expunge.parts.objectives import fit
from expunge.parts.objectives.density import VAE, align, atypical, reconstruct, typical
from expunge.parts.plan import Auxiliary, Optimizer, Plan, Term

Layer = Annotated[str | None, setting("layer of the representation; default: what goes into the last linear layer")]
Epochs = Annotated[int, setting("passes over the forget data", ge=1)]
LrUnlearn = Annotated[float, setting("Adam's step size for L_UE", gt=0)]
LrAlign = Annotated[float, setting("Adam's step size for L_RA", gt=0)]
Tau = Annotated[float, setting("temperature of the pushed rows", gt=0)]
Latent = Annotated[int, setting("latent numbers of the density models", ge=1)]
Hidden = Annotated[tuple[int, ...], setting("hidden widths of the density models' encoder", min_length=1)]
Decoder = Annotated[
    Literal["identity", "sigmoid"], setting("last activation of the density models; the official code has sigmoid")
]
DensityEpochs = Annotated[int, setting("passes to train each density model", ge=1)]
BatchSize = Annotated[
    int, setting("rows per step; losses are sums, so it changes the balance of a short last batch", ge=1)
]
Repair = Annotated[int, setting("passes of supervised training on the retain data afterwards", ge=1)]
LrRepair = Annotated[float, setting("Adam's step size of the repair", gt=0)]

PAPER = "Shen et al., ICLR 2024, 2404.00506"


@method(
    family="tuned", needs=("retain",), kinds=FIXED_SIZE, intention="removal", mechanism="representation", paper=PAPER
)  # fmt: skip
def laf(
    case: Case, layer: Layer = None, epochs: Epochs = 20, lr_unlearn: LrUnlearn = 5e-5, lr_align: LrAlign = 1e-4,
    tau: Tau = 20.0, latent: Latent = 8, hidden: Hidden = (128, 32), decoder: Decoder = "identity",
    density_epochs: DensityEpochs = 10, batch_size: BatchSize = 32,
) -> Plan:  # fmt: skip
    """Label-free: push the forget representations out of their density, hold the others in theirs."""
    layer = layer or representation(case.task, case.model, case.data)

    def density(name: str, on: str) -> Plan:
        def build(case: Case, seed: int) -> VAE:
            return VAE(width(case.task, case.model, case.data, layer), latent, hidden, decoder)

        return Plan(
            Term(reconstruct(layer), on=on), trains=Auxiliary(name, build), optimizer=Optimizer("adam", lr=1e-3),
            epochs=density_epochs, batch_size=batch_size,
        )  # fmt: skip

    move = Plan(
        Term(typical(layer, "density_all"), on="retain"),
        Term(atypical(layer, "density_forget"), on="forget"),
        Term(align(layer, tau), on="retain", optimizer=Optimizer("adam", lr=lr_align)),
        optimizer=Optimizer("adam", lr=lr_unlearn),
        epochs=epochs, batch_size=batch_size, epoch_of="forget", mode="eval",
    )  # fmt: skip
    return Plan(phases=(density("density_all", "train"), density("density_forget", "forget"), move))


@method(
    family="tuned", needs=("retain", "labels"), kinds=FIXED_SIZE, intention="removal", mechanism="representation", paper=PAPER
)  # fmt: skip
def laf_r(
    case: Case, layer: Layer = None, epochs: Epochs = 20, lr_unlearn: LrUnlearn = 5e-5, lr_align: LrAlign = 1e-4,
    tau: Tau = 20.0, latent: Latent = 8, hidden: Hidden = (128, 32), decoder: Decoder = "identity",
    density_epochs: DensityEpochs = 10, batch_size: BatchSize = 32, repair: Repair = 1, lr_repair: LrRepair = 1e-3,
) -> Plan:  # fmt: skip
    """LAF, then a short supervised repair on the retain data."""
    plan = laf(case, layer, epochs, lr_unlearn, lr_align, tau, latent, hidden, decoder, density_epochs, batch_size)
    mend = Plan(
        Term(fit(), on="retain"), optimizer=Optimizer("adam", lr=lr_repair), epochs=repair, batch_size=batch_size
    )  # fmt: skip
    return Plan(phases=(*plan.phases, mend))
