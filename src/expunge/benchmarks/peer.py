"""open-unlearning's trainers (Dorna et al., 2506.12618), imported from a checkout and run as they are.

Their packages' `__init__` files import hydra, datasets of evaluation and more; the modules of the trainers, the collator and
the data set need none of it, so they are imported by themselves. Newer versions of transformers call `compute_loss` with one
more keyword, which is dropped on the way; nothing else is changed.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.cases.text import TextData
from expunge.errors import BadSetting


def peer_modules(checkout: str | Path, *names: str) -> list[Any]:
    """Modules of the checkout's `src`, e.g. "trainer.unlearn.npo"."""
    source = Path(checkout) / "src"
    if not (source / "trainer" / "unlearn").is_dir():
        raise BadSetting(
            f"expected a checkout of open-unlearning at {checkout}, found no src/trainer/unlearn there; clone it and pass "
            "--peer FOLDER"
        )
    for package in ("trainer", "trainer.unlearn", "data"):
        if package not in sys.modules:
            module = types.ModuleType(package)
            module.__path__ = [str(source.joinpath(*package.split(".")))]
            sys.modules[package] = module
    # all that the collator wants of a module that imports the hub's libraries
    sys.modules.setdefault("data.utils", types.SimpleNamespace(IGNORE_INDEX=-100))  # type: ignore[arg-type]
    return [importlib.import_module(name) for name in names]


class Rows(torch.utils.data.Dataset):
    """A table as the checkout's data sets serve it: unpadded tokens and labels, one row at a time."""

    def __init__(self, data: TextData, ids: list[int]):
        self.items = []
        for i in ids:
            tokens = torch.tensor(data.tokens[i])
            labels = tokens.clone()
            labels[: data.starts[i]] = -100
            self.items.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.items[i]


def peer_trainer(
    checkout: str | Path, name: str, model: nn.Module, data: TextData, forget: list[int], retain: list[int], *,
    batch_size: int, steps: int, lr: float, told: Callable[[float], None],
    precision: str | None = None, **settings: Any,
) -> Any:  # fmt: skip
    """Their trainer, ready for `.train()`. name: "npo" or "grad_diff"; told: called with each step's loss as it ends.
    precision: "bf16" for theirs of that name."""
    from transformers import TrainerCallback, TrainingArguments

    trainers, rows, collators = peer_modules(checkout, f"trainer.unlearn.{name}", "data.unlearn", "data.collators")
    theirs = {"npo": "NPO", "grad_diff": "GradDiff"}[name]

    class Trainer(getattr(trainers, theirs)):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            found = super().compute_loss(model, inputs, return_outputs)
            self.last = float((found[0] if return_outputs else found).detach())
            return found

    class Told(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            told(trainer.last)

    arguments = TrainingArguments(
        tempfile.gettempdir(), per_device_train_batch_size=batch_size, max_steps=steps, learning_rate=lr, weight_decay=0.01,
        lr_scheduler_type="constant", optim="adamw_torch", use_cpu=not torch.cuda.is_available(), report_to=[],
        save_strategy="no", logging_strategy="no", remove_unused_columns=False, disable_tqdm=True, seed=0,
        bf16=precision == "bf16",
    )  # fmt: skip
    pairs = rows.ForgetRetainDataset(Rows(data, forget), Rows(data, retain))
    collator = collators.DataCollatorForSupervisedDataset(types.SimpleNamespace(pad_token_id=data.pad))
    trainer = Trainer(
        model=model, args=arguments, train_dataset=pairs, data_collator=collator, callbacks=[Told()], **settings
    )
    return trainer
