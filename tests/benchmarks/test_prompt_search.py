"""What a table of prompt searches says of the scores it is made of."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.benchmarks.prompt_search import PLAIN, brought_back, markdown


def seed(shift: float):
    plain = {"original": 0.9, "npo": 0.1, "retrained": 0.0}
    after = {"original": 0.9, "npo": 0.5 + shift, "retrained": 0.1}
    rows = lambda value: np.full(4, value)  # noqa: E731
    return {
        PLAIN: {name: (rows(v), rows(v)) for name, v in plain.items()},
        "gcg": {name: (rows(plain[name]), rows(after[name])) for name in plain},
    }


def test_what_a_search_adds_to_any_model_is_taken_off():
    assert brought_back(seed(0.0)["gcg"], "npo") == pytest.approx(0.4 - 0.1)
    shown, back = markdown([seed(0.0), seed(0.2)])
    assert "| npo | 0.1 | 0.6 ± 1.3 |" in shown and "| retrained | 0 | 0.1 |" in shown
    assert "| npo | 0.4 ± 1.3 |" in back and "| original | -0.1 |" in back and "retrained" not in back
