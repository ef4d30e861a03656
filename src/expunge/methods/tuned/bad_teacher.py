"""Bad teacher: learn from a network that knows nothing on what goes, and from the original on what stays.

Paper: Chundawat et al., "Can Bad Teaching Induce Forgetting?", AAAI 2023, https://arxiv.org/abs/2205.08096, eq. 5.

    min_theta  E_{x in D_f + part of D_r}  KL( u p_random(x) + (1 - u) p_original(x) || p_theta(x) )
    u = 1 on D_f, else 0

u is 0 or 1, so the target is one teacher or the other: two terms over one shuffled mixture ("mixed"). Only a share of
the retain data (0.3), drawn once, is passed, one epoch long. Departure: the divergence is the mean over rows; the
official code calls `kl_div` with its default reduction, which divides by the number of classes K too. Adam hides a
factor of 1/K; another optimizer would want a K times larger step to match that code.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Epochs, Lr
from expunge.parts.objectives import match
from expunge.parts.plan import Optimizer, Plan, Term


@method(
    family="tuned", needs=("retain",), intention="removal", mechanism="distillation",
    paper="Chundawat et al., AAAI 2023, 2205.08096",
)  # fmt: skip
def bad_teacher(
    lr: Lr = 1e-4,
    epochs: Epochs = 1,
    batch_size: BatchSize = 256,
    retain_share: Annotated[float, setting("share of the retain data that is passed", gt=0, le=1)] = 0.3,
    temperature: Annotated[float, setting("divides the logits of teacher and student", gt=0)] = 1.0,
) -> Plan:
    """Distil from a random network on forget and from the original on retain."""
    return Plan(
        Term(match("random", temperature), on="forget"),
        Term(match("original", temperature), on="retain"),
        optimizer=Optimizer("adam", lr=lr), epochs=epochs, batch_size=batch_size,
        rhythm="mixed", pool={"retain": float(retain_share)},
    )  # fmt: skip
