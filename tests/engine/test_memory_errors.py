"""What a run says when memory ends, and the optimizer that needs a GPU."""

from __future__ import annotations

import pytest
import torch

from expunge import Optimizer, Plan, Term
from expunge.engine import execute
from expunge.engine.memory import out_of_memory
from expunge.errors import BadSetting, OutOfMemory
from expunge.parts import Edit, ascend, low_rank
from tiny_language import language_case

REAL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("Unable to allocate 8 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
]


@pytest.mark.parametrize("error", REAL, ids=lambda e: type(e).__name__)
def test_the_knobs_are_named(error):
    text = str(out_of_memory(error, Plan(Term(ascend()), batch_size=16, optimizer=Optimizer("adamw"))))
    for knob in ("chunk", "gradient_checkpointing", "batch_size below 16", "low_rank", "adamw_8bit", "fsdp2"):
        assert knob in text
    adapted = str(out_of_memory(error, Plan(Term(ascend()), scope=low_rank(4), batch_size=1)))
    assert "low_rank" not in adapted and "batch_size" not in adapted
    assert "chunk" not in str(out_of_memory(error, Edit(lambda bench: None)))


def test_other_errors_stay_what_they_are():
    assert out_of_memory(RuntimeError("shapes cannot be multiplied"), Plan(Term(ascend()))) is None

    def fails(bench):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        execute(Edit(fails), language_case())


def test_a_run_that_asks_for_too_much_says_so():
    def greedy(bench):
        torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(OutOfMemory, match="expected the run to fit into memory, found: .*allocate"):
        execute(Edit(greedy), language_case())


def test_8_bit_state_wants_a_gpu():
    with pytest.raises(BadSetting, match="CUDA device for adamw_8bit, found it on cpu; use adamw"):
        execute(Plan(Term(ascend()), optimizer=Optimizer("adamw_8bit", lr=1e-4)), language_case())
