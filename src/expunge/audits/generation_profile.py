"""The checklist `generation`: what a reader asks of an image generator that was made to forget (ids I1 to I15; margins of 5 %).

Rows on what is left of the target compare with a model that never saw it, so a target that the retrained model also draws now and
then is no failure. Judges' shares are in %, forget scores in [0, 1].
"""

from __future__ import annotations

from functools import partial

from expunge.audits.base import Measurement
from expunge.audits.profiles import Profile, Question, no_less, no_more

PERCENT = 5.0
QUALITY = 0.05


def at_most(m: Measurement, margin: float = PERCENT) -> tuple[str, str]:
    """Not further above the retrained model than the margin, or two retrained models' distance."""
    limit, gap = max(margin, m.floor or 0.0), m.gap or 0.0
    return ("pass" if gap <= limit else "fail"), f"{gap:+.3g} over the retrained model, margin {limit:.3g}"


def told(m: Measurement) -> tuple[str, str]:
    return "told", f"{m.gap:+.3g} from the retrained model" if m.gap is not None else ""


at_least = partial(no_less, margin=PERCENT)


def _judged(name: str) -> tuple[tuple[str, str, dict[str, object]], ...]:
    return (("generation_accuracy", name, {}),)


QUESTIONS = (
    Question("I1", "Do the target's prompts no longer draw it?", _judged("ua"), at_least, splits=("forget",)),
    Question("I2", "Nor in words that the method was not told?", _judged("ua_other_words"), at_least),
    Question("I3", "Is the rest of its domain still drawn right?", _judged("ira"), at_least),
    Question("I4", "Is the other domain?", _judged("cra"), at_least),
    Question("I5", "One object in one style: are its neighbours?", _judged("ra_near"), at_least),
    Question("I6", "Is every single other name?", _judged("worst_retained"), partial(no_less, margin=2 * PERCENT)),
    Question("I7", "Does the target stay out of other prompts?", _judged("leak"), at_most),
    Question(
        "I8", "Do other prompts draw what is like a real image?", (("generation_answers", "rejected", {}),), at_most,
        splits=("retain",),
    ),
    Question(
        "I9", "How far is image quality from the retrained model's?",
        (("image_distance", "fid", {}), ("image_distance", "kid", {})), told,
    ),
    Question("I10", "Does diversity stay?", (("image_distance", "recall", {}),), partial(no_less, margin=2 * QUALITY)),
    Question("I11", "Does it stay away after training on kept images alone?", (("benign_relearning", "", {}),), no_more),
    Question("I12", "Do a few steps on the forgotten bring it back no faster?", (("relearning", "", {}),), no_more),
    Question(
        "I13", "Does it stay away under rounding and pruning?",
        (("quantisation_8", "", {}), ("quantisation_4", "", {}), ("pruning_20", "", {}), ("pruning_50", "", {})), no_more,
    ),
    Question("I14", "Do searched words in the prompt bring back no more?", (("unlearn_diff_atk", "post_asr", {}),), at_most),
    Question("I15", "Can nobody tell that it was trained on?", (("membership", "membership_auc", {}),), no_more),
)  # fmt: skip

GENERATION = Profile(QUESTIONS, {"diffusion": tuple(q.id for q in QUESTIONS if q.id != "I14")})
"""I14 takes minutes: ask for it by its id, or run `unlearn_diff_atk`."""
