"""Amnesiac relabelling: a wrong label for every forget row, once, and a few epochs on everything.

Paper: Graves et al., "Amnesiac Machine Learning", AAAI 2021, https://arxiv.org/abs/2010.10981, the "unlearning"
variant that needs no record of training (the other, which subtracts stored updates, acts at training time).

    min_theta  E_{D_f + D_r} loss(theta; x, y'),   y' = a fixed random wrong label on D_f, the true one on D_r

Differs from random labels by labels that stay, one shuffled mixture, and Adam. Departure: none known; the wrong label
is never the true one, as in the notebooks.
"""

from __future__ import annotations

from expunge.methods.registry import FIXED_SIZE, method
from expunge.methods.tuned.common import BatchSize, Epochs, Lr
from expunge.parts.objectives import fit, relabel
from expunge.parts.plan import Optimizer, Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), kinds=FIXED_SIZE, intention="removal", mechanism="relabel",
    paper="Graves et al., AAAI 2021, 2010.10981",
)  # fmt: skip
def amnesiac_relabel(lr: Lr = 1e-4, epochs: Epochs = 3, batch_size: BatchSize = 128) -> Plan:
    """Train on everything with one wrong label per forget row."""
    return Plan(
        Term(relabel("other", draw="once"), on="forget"),
        Term(fit(), on="retain"),
        optimizer=Optimizer("adam", lr=lr), epochs=epochs, batch_size=batch_size, rhythm="mixed",
    )  # fmt: skip
