"""Token statistics and membership scores: slow loops, and the numbers open-unlearning's own functions give on one table.

The numbers marked OPEN were made by running its classes (src/evals/metrics/mia, commit d3d7cf9) on the two rows and the
two models below. It drops the last label of a text as the end of text, so these rows have theirs dropped beforehand.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from expunge.audits.metrics import token_statistics as stats
from expunge.audits.metrics.text import exact_memorisation, extraction_strength_openunlearning
from expunge.cases.data import Split
from expunge.cases.text import TextData
from expunge.errors import BadSetting
from expunge.tasks.language import Language

TOKENS = [[1, 2, 3, 4, 5, 6, 0, 2, 4], [6, 5, 1, 1, 2, 0]]
STARTS = [2, 3]
OPEN = {
    "loss": [3.698929157042961, 2.2059248257049915],  # the whole answers, their last tokens too
    "min_k_20": [6.3656392097473145, 5.068150997161865],
    "min_k_40": [5.802151679992676, 5.068150997161865],
    "min_k_pp_20": [6.392878443982877, 5.082585593070753],
    "min_k_pp_40": [5.685218228558206, 5.082585593070753],
    1: [1.3347915696577848, 1.276057984801266],
    2: [0.39522996785119796, 0.5371423845540608],
    float("inf"): [0.2080877200875851, 0.36447974380468],
    "hits": [[0, 0, 1, 0, 0, 0], [0, 1]],
}


class Formula(nn.Module):
    """Logits 3 sin(1.7 v + 0.9 t + 2.3 x_t) over 7 tokens, in float64."""

    def forward(self, input_ids, **_):
        v, t = torch.arange(7, dtype=torch.float64), torch.arange(input_ids.shape[1], dtype=torch.float64)
        return SimpleNamespace(
            logits=3 * torch.sin(1.7 * v + 0.9 * t[None, :, None] + 2.3 * input_ids[..., None].double())
        )


class Small(nn.Module):
    """Logits table[x_t] @ head.T + bias, in float64, with dropout that an audit must not draw from."""

    def __init__(self):
        super().__init__()
        v, d = torch.arange(7, dtype=torch.float64), torch.arange(3)
        self.table = nn.Parameter(torch.sin(1.3 * v[:, None] + 0.7 * d))
        self.head = nn.Parameter(torch.cos(0.9 * v[:, None] - 1.1 * d))
        self.bias = nn.Parameter(0.1 * v)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]) @ self.head.T + self.bias)


def rows(drop_last=False):
    tokens = [row[:-1] for row in TOKENS] if drop_last else TOKENS
    return Split("forget", TextData(tokens, STARTS), torch.arange(len(tokens)))


def signals(drop_last):
    batch = next(rows(drop_last).batches())
    task = Language()
    return {name: value.numpy() for name, value in task.signals(task.forward(Formula(), batch), batch).items()}


def test_scores_equal_open_unlearning_with_the_sign_turned():
    np.testing.assert_allclose(signals(False)["loss"], np.negative(OPEN["loss"]), rtol=1e-12)
    for name in ("min_k_20", "min_k_40", "min_k_pp_20", "min_k_pp_40"):
        np.testing.assert_allclose(signals(True)[name], np.negative(OPEN[name]), rtol=1e-6)  # it reduces in float32


@pytest.mark.parametrize("p", [1, 2, float("inf")])
def test_gradient_norms_equal_open_unlearning(p):
    np.testing.assert_allclose(stats.gradient_norms(Language(), Small(), rows(True), p), OPEN[p], rtol=1e-12)


def test_gradient_norms_leave_the_model_as_it_was():
    model = Small().train()
    model.bias.grad = torch.ones(7, dtype=torch.float64)
    model.dropout.eval()
    before = copy.deepcopy(model.state_dict())
    first = stats.gradient_norms(Language(), model, rows())
    assert (first == stats.gradient_norms(Language(), model, rows())).all()  # no dropout is drawn
    assert model.training and not model.dropout.training and bool((model.bias.grad == 1).all())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(BadSetting, match="norm p"):
        stats.gradient_norms(Language(), model, rows(), p=3)


def test_statistics_equal_a_slow_loop():
    found = stats.token_statistics(Language(), Formula(), rows(), batch_size=1)
    for i, (tokens, start) in enumerate(zip(TOKENS, STARTS, strict=True)):
        logits = Formula()(torch.tensor([tokens])).logits[0]
        assert len(found.log_p[i]) == len(tokens) - start
        for k, t in enumerate(range(start, len(tokens))):
            p = torch.exp(logits[t - 1]) / torch.exp(logits[t - 1]).sum()
            mean = sum(float(q) * float(q.log()) for q in p)
            spread = sum(float(q) * (float(q.log()) - mean) ** 2 for q in p) ** 0.5
            assert found.log_p[i][k] == pytest.approx(float(p[tokens[t]].log()), abs=1e-9)
            assert found.mean[i][k] == pytest.approx(mean) and found.spread[i][k] == pytest.approx(spread)
            assert found.hits[i][k] == (int(p.argmax()) == tokens[t])


def test_statistics_do_not_depend_on_batches_or_order():
    apart = stats.token_statistics(Language(), Formula(), rows(), batch_size=1)
    together = stats.token_statistics(Language(), Formula(), rows(), batch_size=2)
    turned = stats.token_statistics(Language(), Formula(), rows().subset(torch.tensor([1, 0])))
    for a, b, c in zip(apart.log_p, together.log_p, turned.log_p[::-1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
        np.testing.assert_allclose(a, c, rtol=1e-12)


def test_hits_and_open_unlearnings_extraction_strength():
    hits = stats.token_statistics(Language(), Formula(), rows(True)).hits
    assert [row.astype(int).tolist() for row in hits] == OPEN["hits"]
    np.testing.assert_allclose(extraction_strength_openunlearning(hits), [1 / 6, 1 / 2])  # its own output
    np.testing.assert_allclose(exact_memorisation(hits), [1 / 6, 1 / 2])


def slow_min_k(values, share):
    count = max(1, int(len(values) * share + 1e-9))
    return float(np.mean(np.sort(values)[:count]))


def test_min_k_keeps_at_least_one_token_and_counts_as_a_loop_does():
    found, whole = stats.token_statistics(Language(), Formula(), rows()), signals(False)
    for share in (20, 40):
        slow = [slow_min_k(row, share / 100) for row in found.log_p]
        np.testing.assert_allclose(whole[f"min_k_{share}"], slow, rtol=1e-9)
        normal = [(p - m) / s for p, m, s in zip(found.log_p, found.mean, found.spread, strict=True)]
        np.testing.assert_allclose(
            whole[f"min_k_pp_{share}"], [slow_min_k(row, share / 100) for row in normal], rtol=1e-9
        )


def test_scores_of_a_pass_of_their_own_by_hand():
    own, other = np.array([-1.0, -2.0]), np.array([-3.0, -1.0])
    np.testing.assert_allclose(stats.reference_score(own, other), [2.0, -1.0])
    np.testing.assert_allclose(stats.lower_case_score(own, other), [-1 / 3, -2.0])
    np.testing.assert_allclose(stats.recall_score(other, own), [3.0, 0.5])


def test_a_prefix_becomes_part_of_the_prompt():
    split = stats.after_prefix(rows(), [9, 9, 9])
    assert split.data.tokens[1] == [9, 9, 9, 6, 5, 1, 1, 2, 0] and split.data.starts == [5, 6]
    assert split.data.answer_ids() == rows().data.answer_ids()


def test_shots_that_fit():
    shots = [[1] * 10, [2] * 10, [3] * 10]
    assert stats.shots_that_fit(shots, 20, None) == shots
    assert stats.shots_that_fit(shots, 20, 45) == shots[:2]
    assert stats.shots_that_fit([[0] * 30, *shots], 20, 45) == shots[:2]  # too long a one is passed over
    with pytest.raises(BadSetting, match="context of 25"):
        stats.shots_that_fit(shots, 20, 25)


class Letters:
    """A tokenizer of single characters whose end is token 0."""

    eos_token_id, pad_token_id = 0, 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, tokens, **_):
        return "".join(chr(t) for t in tokens if t)


def test_lower_case_keeps_prompt_and_end():
    data = TextData([[65, 66, 67, 68, 0], [65, 97, 66, 98]], [2, 1], Letters())
    split = stats.lower_cased(Split("forget", data, torch.arange(2)))
    assert split.data.tokens == [[65, 66, 99, 100, 0], [65, 97, 98, 98]] and split.data.starts == [2, 1]
