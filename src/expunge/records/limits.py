"""What a run does not prove, in plain words. The certificate signs this list and the report shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expunge.records.results import Results

_ALWAYS = (
    (
        "It says nothing about other models: copies, fine-tuned children, distilled students, or a pretrained backbone "
        "that saw the same data, unless each has a certificate of its own."
    ),
    "It says nothing about data outside these weights: the data set, backups, caches, logs, embeddings, indexes.",
    "It says nothing about near-duplicates or derived data that the request did not name.",
    (
        "It shows that this code, with these settings, reported these measurements; it does not show that the "
        "machine that ran it was honest. Whoever doubts it can run it again from the recorded seeds."
    ),
    "It is no statement of law: whether a duty to erase is met is for people to decide.",
)

_EMPIRICAL = (
    "It is a statement about the attacks that were run. Other attacks may bring the forgotten back.",
    "Each attack had a budget (steps, examples, queries). A bigger budget may succeed where this one failed.",
    (
        "Measurements are statistical: they hold for these seeds and examples, within the intervals printed. A single "
        "forgotten example may stand out although the average does not."
    ),
    "No distance between the weights and those of a retrained model was bounded.",
)

_CERTIFIED = (
    (
        "The bound holds under its assumptions (those of the method's paper: for instance a convex loss, a bounded "
        "gradient and the given number of removals). Outside them it says nothing."
    ),
    "The bound is a probability statement with the printed epsilon and delta; it is not zero influence.",
    "Attacks beyond those that were run are covered only as far as the bound goes.",
)

_EXACT = (
    (
        "The weights equal those of a retraining without the data, so these attacks add nothing to the proof; the "
        "proof is only as good as the list of rows that was removed and the randomness being independent of them."
    ),
    "Retraining without the data does not remove what the remaining data also teach.",
)

_SUPPRESSION = "The method hides behaviour rather than removing knowledge: the knowledge may still be in the weights."


def limits_of(results: Results) -> list[str]:
    """Those of one run: a method that claims removal is told as suppression where the audit has seen nothing more."""
    verdict, intention = results.verdict, results.method.intention
    if verdict is not None:
        observed = verdict.numbers.get("observed_intention", {}).get("observed")
        if verdict.verdict == "suppressed" or observed == "suppression":
            intention = "suppression"
    return limits(results.method.guarantee, intention)


def limits(guarantee: str, intention: str = "removal") -> list[str]:
    """Sentences for a guarantee ("exact", "certified", else empirical) and an intention ("removal", "suppression")."""
    own = {"exact": _EXACT, "certified": _CERTIFIED}.get(guarantee, _EMPIRICAL)
    return [*([_SUPPRESSION] if intention == "suppression" else []), *own, *_ALWAYS]
