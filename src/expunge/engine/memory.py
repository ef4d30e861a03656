"""Running out of memory, told as what to turn."""

from __future__ import annotations

from expunge.errors import OutOfMemory
from expunge.parts.plan import Action, Plan
from expunge.parts.scopes.low_rank import LowRank

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "alloc_failed")


def out_of_memory(error: BaseException, action: Action) -> OutOfMemory | None:
    """What to tell where the error is of that kind, else None."""
    if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in SIGNS):
        return None
    if isinstance(error, OutOfMemory):
        return error
    words = str(error).strip().splitlines() or ["no more memory"]
    return OutOfMemory(f"expected the run to fit into memory, found: {words[0][:200]}; {advice(action)}")


def advice(action: Action) -> str:
    """What saves memory, what costs least first."""
    if not isinstance(action, Plan):
        return "use a smaller model or a machine with more memory: this method works on all weights at once"
    plans = action.phases or (action,)
    size = max(p.batch_size for p in plans)
    whole = not any(isinstance(p.scope, LowRank) for p in plans)
    adaptive = any(p.optimizer.name in ("adam", "adamw") for p in plans)
    knobs = [
        "of language models: a smaller chunk, e.g. Language(chunk=256) (logits), or "
        "Language(gradient_checkpointing=True) (activations, for about a third more time)",
        f"batch_size below {size} (activations)" if size > 1 else "",
        "scope=low_rank(8) (gradients, optimizer state and the second model)" if whole else "",
        "optimizer adamw_8bit on CUDA, or sgd (optimizer state)" if adaptive and whole else "",
        "mixed_precision='bf16' on a GPU (activations)",
        "several processes with configs/accelerate/fsdp2.yaml (everything)",
    ]
    return "turn, what costs least first: " + "; ".join(f"{i}. {k}" for i, k in enumerate(filter(None, knobs), 1))
