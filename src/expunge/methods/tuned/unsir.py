"""UNSIR: forget a class without its data, by teaching noise in its name, then repair.

Paper: Tarun et al., "Fast Yet Effective Machine Unlearning", TNNLS 2023, https://arxiv.org/abs/2111.08947, eq. 4 and
alg. 1.

    noise     min_n  -loss(f_o(n), c) + penalty * mean ||n||^2     for every forgotten class c
    impair    min_theta  mean loss over retain rows and noise rows labelled c, one epoch
    repair    min_theta  mean loss over retain rows, one epoch

No forget row is read, only which classes go. Departures: the official notebook labels all noise class 0 even when it
forgets {0, 2}; here each noise row carries its own class. The 20 copies of a 256-row noise batch among 9 x 1,000
retain rows are a constant share of every batch (`noise_share`, in one joint forward), drawn with replacement; the
retain rows are drawn over all classes, not 1,000 from each.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Epochs, Lr
from expunge.parts.objectives import beside, class_noise, fit, worst_inputs
from expunge.parts.plan import Optimizer, Plan, Term


@method(
    family="tuned", needs=("retain", "labels", "class_request"), kinds=("classification",), intention="removal",
    mechanism="noise", paper="Tarun et al., TNNLS 2023, 2111.08947",
)  # fmt: skip
def unsir(
    noise_rows: Annotated[int, setting("learned noise inputs per class", ge=1)] = 256,
    noise_lr: Lr = 0.1,
    noise_epochs: Annotated[int, setting("epochs of noise training", ge=1)] = 5,
    noise_steps: Annotated[int, setting("steps of an epoch of noise training", ge=1)] = 8,
    penalty: Annotated[float, setting("weight of the noise's squared norm", ge=0)] = 0.1,
    noise_share: Annotated[float, setting("share of noise in an impair batch", gt=0, lt=1)] = 0.36,
    retain_rows: Annotated[int, setting("retain rows that impair and repair may use", ge=1)] = 9000,
    impair_lr: Lr = 0.02,
    impair_epochs: Epochs = 1,
    repair_lr: Lr = 0.01,
    repair_epochs: Epochs = 1,
    batch_size: BatchSize = 256,
) -> Plan:
    """Learn noise that the model takes for anything but the class, teach it as the class, repair on retain."""
    beside_it = max(round(noise_share * batch_size), 1)
    return Plan(phases=(
        Plan(
            Term(worst_inputs(penalty), on="retain"), trains=class_noise(noise_rows),
            pool={"retain": noise_steps}, batch_size=1, epochs=noise_epochs,
            optimizer=Optimizer("adam", lr=noise_lr), name="noise",
        ),
        Plan(
            Term(beside(beside_it), on="retain"), pool={"retain": retain_rows},
            batch_size=max(batch_size - beside_it, 1), epochs=impair_epochs,
            optimizer=Optimizer("adam", lr=impair_lr), name="impair",
        ),
        Plan(
            Term(fit(), on="retain"), pool={"retain": retain_rows}, batch_size=batch_size,
            epochs=repair_epochs, optimizer=Optimizer("adam", lr=repair_lr), name="repair",
        ),
    ))  # fmt: skip
