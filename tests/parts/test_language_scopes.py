"""FILA, expert and traced scopes, the drift weight and the bounded best epoch, each against a closed form or the slow way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from expunge import Case, Optimizer, Plan, Term, requests
from expunge.engine import Workbench, run_plan
from expunge.errors import BadModel, BadSetting, UnmetNeed
from expunge.parts import fit
from expunge.parts.blocks import block_names, block_parts
from expunge.parts.mixture import affinities, mixtures, most_used
from expunge.parts.rewind import lowest_joint
from expunge.parts.schedules import Drift
from expunge.parts.scopes import blocks, experts, fisher_low_rank, low_rank, traced
from expunge.parts.scopes.fila import answer_fisher, weighted_split
from expunge.parts.scopes.low_rank import adaptable
from expunge.parts.scopes.tracing import (
    Fact,
    chances,
    find_subject,
    subject_deviation,
    trace,
    window_around,
)
from tiny_language import language_case, llama, mixtral
from toys import digits, mlp

pytest.importorskip("transformers")
TOKENS = torch.tensor([[5, 9, 14, 3, 22, 7], [31, 8, 8, 12, 4, 6]])


def bench_of(case, seed: int = 0) -> Workbench:
    return Workbench(case, copy.deepcopy(case.model), seed)


def loud(model: nn.Module, factor: float = 6.0) -> nn.Module:
    """Untrained weights made larger, so that outputs differ by more than rounding."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor) if p.dim() > 1 else None
    return model


# -- FILA --------------------------------------------------------------------------------------------------------------
def test_fila_leaves_the_tail_singular_values_and_no_other_pair_does_better():
    g = torch.Generator().manual_seed(0)
    W, r = torch.randn(9, 7, generator=g, dtype=torch.float64), torch.rand(9, generator=g, dtype=torch.float64) + 0.1
    A, B = weighted_split(W, r, rank=3, scaling=2.0)
    left = (r[:, None] * (W - 2.0 * B @ A)).norm()
    tail = torch.linalg.svdvals(r[:, None] * W)[3:].norm()
    assert torch.allclose(left, tail, atol=1e-12)
    for _ in range(50):
        other = torch.randn(9, 3, generator=g, dtype=torch.float64) @ torch.randn(
            3, 7, generator=g, dtype=torch.float64
        )
        assert (r[:, None] * (W - other)).norm() >= left
        near = B + 0.05 * torch.randn(9, 3, generator=g, dtype=torch.float64)
        assert (r[:, None] * (W - 2.0 * near @ A)).norm() >= left - 1e-12


def test_fila_is_the_papers_formula_and_plain_svd_where_all_weights_matter_alike():
    W = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    r = torch.tensor([0.5, 1.0, 2.0, 0.3, 1.5, 0.7], dtype=torch.float64)
    A, B = weighted_split(W, r, rank=2, scaling=2.0)
    U, S, Vt = torch.linalg.svd(r[:, None] * W, full_matrices=False)
    paper = (U[:, :2] * (S[:2] / 2.0).sqrt()) / r[:, None] @ ((S[:2] / 2.0).sqrt()[:, None] * Vt[:2])
    assert torch.allclose(B @ A, paper, atol=1e-12)
    A, B = weighted_split(W, torch.full((6,), 3.0, dtype=torch.float64), rank=2)
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(B @ A, U[:, :2] * S[:2] @ Vt[:2], atol=1e-12)


def test_fila_rows_without_importance_and_ranks_beyond_the_matrix():
    W, r = torch.randn(4, 3, generator=torch.Generator().manual_seed(2)), torch.tensor([0.0, 1.0, 0.0, 2.0])
    A, B = weighted_split(W, r, rank=5)
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    assert torch.count_nonzero(B[[0, 2]]) == 0
    assert torch.allclose(B[[1, 3]] @ A, W[[1, 3]], atol=1e-5)  # rank 2 holds two rows exactly
    assert A.shape == (5, 3) and B.shape == (4, 5)
    nothing = weighted_split(W, torch.zeros(4), rank=2)
    assert torch.count_nonzero(nothing[0]) == 0 and torch.count_nonzero(nothing[1]) == 0


def test_a_large_matrix_is_split_by_a_seeded_random_decomposition(monkeypatch):
    from expunge.parts.scopes import fila

    monkeypatch.setattr(fila, "LARGEST_EXACT", 8)
    g = torch.Generator().manual_seed(3)
    W = torch.randn(40, 4, generator=g) @ torch.randn(4, 30, generator=g)  # of rank 4
    r = torch.rand(40, generator=g) + 0.5
    torch.manual_seed(7)
    A, B = weighted_split(W, r, rank=4)
    assert torch.allclose(B @ A, W, atol=1e-3)
    torch.manual_seed(7)
    assert torch.equal(A, weighted_split(W, r, rank=4)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_entering_fila_does_not_change_the_function_and_leaving_gives_back_the_same_kind(tied):
    pytest.importorskip("peft")
    case = language_case(loud(llama(tied=tied)))
    bench, scope = bench_of(case), fisher_low_rank(4)
    before = bench.model(TOKENS).logits
    adapted = scope.enter(bench.model, bench)
    assert (adapted(TOKENS).logits - before).abs().max() < 1e-4
    moved = adapted.model.model.layers[0].mlp.up_proj.base_layer.weight - case.model.model.layers[0].mlp.up_proj.weight
    assert moved.abs().max() > 1e-3  # the base really lost its share
    back = scope.leave(adapted)
    assert type(back) is type(case.model) and back.state_dict().keys() == case.model.state_dict().keys()
    assert (back(TOKENS).logits - before).abs().max() < 1e-4


def test_fila_on_a_classifier_and_with_frozen_layers():
    pytest.importorskip("peft")
    x, y, *_ = digits(60)
    torch.manual_seed(0)
    model = mlp(hidden=(16, 8))
    model[0].requires_grad_(False)
    case = Case(model, (x, y), requests.samples(range(10)))
    bench = bench_of(case)
    plan = Plan(Term(fit(), "retain"), scope=fisher_low_rank(20), optimizer=Optimizer("adam", lr=0.01), epochs=2)
    assert adaptable(model) == ["2", "4"]
    run_plan(plan, bench)
    assert torch.equal(bench.model[0].weight, case.model[0].weight)
    assert not torch.allclose(bench.model[2].weight, case.model[2].weight, atol=1e-4)
    assert [p.requires_grad for p in bench.model.parameters()] == [p.requires_grad for p in model.parameters()]


def test_the_information_is_weighted_by_answer_tokens():
    case = language_case()
    bench = bench_of(case)
    weight = bench.model.model.layers[0].mlp.up_proj.weight
    split = bench.splits["forget"]
    found = answer_fisher(bench, bench.model, split, [weight], batch_size=1)[0]
    total, tokens = torch.zeros_like(weight), 0.0
    for i in split.ids.tolist():
        batch = bench.fill(split.data.fetch(torch.tensor([i])))
        n = float(case.task.choices(batch))
        loss = case.task.loss(case.task.forward(bench.model, batch), batch).mean()
        total += n * torch.autograd.grad(loss, weight)[0] ** 2
        tokens += n
    assert torch.allclose(found, total / tokens, rtol=1e-4, atol=1e-12)


def test_adapters_stay_off_tied_heads_output_layers_and_frozen_weights():
    tied = llama(layers=1, tied=True)
    names = adaptable(tied)
    assert len(names) == 7 and "lm_head" not in names
    assert "lm_head" not in adaptable(llama(layers=1))
    assert adaptable(mlp(hidden=(8,))) == ["0", "2"]  # a classifier's last layer is a layer like others
    case = language_case(loud(tied))
    bench = bench_of(case)
    scope = low_rank(2)
    before = bench.model(TOKENS).logits
    assert (scope.leave(scope.enter(bench.model, bench))(TOKENS).logits - before).abs().max() < 1e-5


# -- experts -----------------------------------------------------------------------------------------------------------
class Listed(nn.Module):
    """A mixture whose experts are a list of modules."""

    def __init__(self, experts: int = 3):
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(6, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(experts))

    def forward(self, h):
        p = self.gate(h).softmax(-1)
        best = p.topk(2, dim=-1)
        kept = torch.zeros_like(p).scatter(-1, best.indices, best.values)
        return h + sum(kept[..., i, None] * expert(h) for i, expert in enumerate(self.experts))


@pytest.mark.parametrize("kind", ["fused", "listed"])
def test_only_the_chosen_expert_and_its_router_move(kind):
    if kind == "fused":
        case = language_case(mixtral())
        layer = "model.layers.1.mlp"
    else:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), Listed(), nn.Linear(6, 3))
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(30, 4, generator=g), torch.randint(3, (30,), generator=g)
        case, layer = Case(model, (x, y), requests.samples(range(10))), "1"
    bench = bench_of(case)
    plan = Plan(Term(fit(), "forget"), scope=experts(chosen=((layer, 2),)), epochs=3, batch_size=4,
                optimizer=Optimizer("adamw", lr=0.01, weight_decay=0.1))  # fmt: skip
    run_plan(plan, bench)
    after = dict(bench.model.named_parameters())
    for name, before in case.model.named_parameters():
        if name == f"{layer}.gate.weight":
            assert not torch.equal(before, after[name])
        elif kind == "fused" and name.startswith(f"{layer}.experts."):
            rows = (before != after[name]).flatten(1).any(1)
            assert rows.tolist() == [False, False, True, False]
        elif name.startswith(f"{layer}.experts.2."):
            assert not torch.equal(before, after[name])
        else:
            assert torch.equal(before, after[name]), name


def test_affinities_by_the_slow_loop_and_their_sums():
    case = language_case(mixtral(), n=10, forget=5)
    split = case.split("forget")
    found = affinities(case.task, case.model, split.batches(2))
    again = affinities(case.task, case.model, split.batches(5), renormalised=True)
    for number, layer in enumerate(mixtures(case.model)):
        seen = {}
        block = case.model.model.layers[number].mlp
        hook = block.register_forward_pre_hook(lambda _m, inputs: seen.update(h=inputs[0]))
        total = torch.zeros(4)
        for i in split.ids.tolist():
            tokens = torch.tensor([split.data.tokens[i]])
            with torch.no_grad():
                case.model(tokens)
                p = (seen["h"][0] @ block.gate.weight.T).softmax(-1)
            for row in p:
                for e in row.topk(2).indices.tolist():
                    total[e] += row[e] / len(p)
        hook.remove()
        assert torch.allclose(found[layer.name], total / len(split), atol=1e-6)
        assert found[layer.name].sum() <= 1 and torch.isclose(again[layer.name].sum(), torch.tensor(1.0), atol=1e-5)
    (layer, expert), *_ = most_used(found)
    assert float(found[layer][expert]) == max(float(v.max()) for v in found.values())


def test_a_dense_model_is_refused_and_names_are_checked():
    case = language_case()
    with pytest.raises(UnmetNeed, match="LlamaForCausalLM, which is dense"):
        experts().select(bench_of(case))
    case = language_case(mixtral())
    with pytest.raises(BadSetting, match=r"model\.layers\.0\.mlp"):
        experts(chosen=(("model.layers.9.mlp", 0),)).select(bench_of(case))
    with pytest.raises(BadSetting, match=r"0\.\.3"):
        experts(chosen=(("model.layers.0.mlp", 4),)).select(bench_of(case))


@pytest.mark.parametrize("architecture", ["Qwen2Moe", "Olmoe", "DeepseekV2", "GptOss"])
def test_mixtures_are_found_in_other_architectures(architecture):
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
             "intermediate_size": 16, "max_position_embeddings": 32}  # fmt: skip
    special = {
        "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
                     "shared_expert_intermediate_size": 8},
        "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
        "DeepseekV2": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "first_k_dense_replace": 1,
                       "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
                       "qk_nope_head_dim": 4, "v_head_dim": 4, "n_shared_experts": 1},
        "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    }[architecture]  # fmt: skip
    config = getattr(transformers, f"{architecture}Config", None)
    if config is None:
        pytest.skip("this version of transformers does not have it")
    model = getattr(transformers, f"{architecture}ForCausalLM")(config(**sizes, **special)).eval()
    found = mixtures(model)
    assert [m.count for m in found] == [4] * len(found) and found[-1].name == "model.layers.1.mlp"
    assert len(found) == (1 if architecture == "DeepseekV2" else 2)  # DeepSeek's first layer is dense
    assert all(m.top_k == 2 for m in found)


# -- tracing -----------------------------------------------------------------------------------------------------------
FACT = Fact(prompt=(5, 9, 14, 3, 22), answer=7, subject=(1, 3))


def noise_for(model: nn.Module, seed: int = 0) -> torch.Tensor:
    return 3 * subject_deviation(model, [FACT]) * torch.randn(10, 2, 16, generator=torch.Generator().manual_seed(seed))


def test_restoring_everything_is_the_clean_run_and_restoring_nothing_the_corrupted_one():
    torch.manual_seed(0)
    model = loud(llama())
    noise = noise_for(model)
    clean = float(model(torch.tensor([FACT.prompt])).logits[0, -1].softmax(-1)[FACT.answer].detach())
    corrupted = chances(model, FACT, noise)
    assert float(corrupted[0]) == pytest.approx(clean, abs=1e-6)  # row 0 has no noise
    assert (corrupted[1:] - clean).abs().max() > 1e-3
    everywhere = [(name, range(5)) for name in block_names(model)]
    assert (chances(model, FACT, noise, everywhere) - clean).abs().max() < 1e-6
    assert torch.equal(chances(model, FACT, noise, [(name, ()) for name in block_names(model)]), corrupted)


def test_a_trace_is_the_slow_loop_of_restorations():
    torch.manual_seed(0)
    model = loud(llama())
    deviation = 3 * subject_deviation(model, [FACT])
    found = trace(
        model, FACT, deviation, kind="mlp", window=2, positions=range(5), rng=torch.Generator().manual_seed(0)
    )
    noise = noise_for(model)
    embedded = model.model.embed_tokens(torch.tensor([FACT.prompt]))
    states = {}
    hooks = [
        block.mlp.register_forward_hook(lambda _m, _i, out, i=i: states.update({i: out.detach()}))
        for i, block in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(inputs_embeds=embedded)
        for hook in hooks:
            hook.remove()
        for t in range(5):
            for b in range(3):
                window, values = [i for i in (b - 1, b) if i >= 0], []
                for copy_noise in noise:
                    x = embedded.clone()
                    x[0, 1:3] += copy_noise

                    def put_back(_m, _i, out, i, t=t):
                        out = out.clone()
                        out[0, t] = states[i][0, t]
                        return out

                    own = [
                        model.model.layers[i].mlp.register_forward_hook(lambda m, a, o, i=i: put_back(m, a, o, i))
                        for i in window
                    ]
                    values.append(float(model(inputs_embeds=x).logits[0, -1].softmax(-1)[FACT.answer]))
                    for hook in own:
                        hook.remove()
                assert float(found.effect[t, b]) == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert found.indirect.shape == (5, 3)
    # nothing can come back through a position before the noise, nor by restoring what the noise did not reach
    assert float(found.indirect[0].abs().max()) < 1e-6


def test_windows_are_the_papers():
    assert list(window_around(10, 10, 32)) == list(range(5, 15))  # l-5 to l+4
    assert list(window_around(2, 10, 32)) == list(range(0, 7))
    assert list(window_around(1, 1, 3)) == [1]


def test_the_deviation_is_that_of_all_subjects_embeddings():
    model = llama()
    other = Fact((4, 4, 30), 8, (2, 3))
    numbers = model.model.embed_tokens.weight[[9, 14, 30]].flatten()
    assert subject_deviation(model, [FACT, other]) == pytest.approx(float(numbers.std()), rel=1e-6)


class Letters:
    """A tokenizer of pieces: token i is the i-th of these."""

    pieces = ["", "Who", " is", " Ann", "a", " Bell", "?", " In", " Anna"]

    def decode(self, tokens, **_):
        return "".join(self.pieces[t] for t in tokens)


def test_subjects_are_found_in_the_tokens():
    assert find_subject(Letters(), [1, 2, 3, 4, 5, 6], "Anna Bell") == (3 - 1, 5)
    assert find_subject(Letters(), [7, 8, 5], "Anna Bell") == (1, 3)
    assert find_subject(Letters(), [1, 2], "Anna") is None


class Planted(nn.Module):
    """Four blocks of which only block 1's mlp reads the tokens' embeddings into the answer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(12, 12), nn.ModuleList(PlantedBlock(i == 1) for i in range(4))
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(12))
        self.lm_head = nn.Linear(24, 12, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.cat([torch.zeros(12, 12), 8 * torch.eye(12)], 1))

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **_):
        from types import SimpleNamespace

        h = torch.cat([self.embed(input_ids), torch.zeros(*input_ids.shape, 12)], -1)
        for layer in self.layers:
            h = layer(h)
        # the answer is read where the subject ends: position 1 of these prompts
        return SimpleNamespace(logits=self.lm_head(h[:, 1:2].expand(-1, h.shape[1], -1)))


class PlantedBlock(nn.Module):
    def __init__(self, knows: bool):
        super().__init__()
        self.mlp = nn.Linear(24, 24, bias=False)
        with torch.no_grad():
            self.mlp.weight.zero_()
            if knows:  # token k -> answer k + 1
                self.mlp.weight[12:, :12] = torch.eye(12).roll(1, 0)

    def forward(self, h):
        return h + self.mlp(h)


def test_tracing_finds_the_block_that_was_planted():
    from expunge.cases.text import TextData

    class Words:
        eos_token_id, pad_token_id = 2, 0

        def decode(self, tokens, **_):
            return " ".join(f"w{t}" for t in tokens)

    tokens = [[4, k, 5, k + 1, 2] for k in (6, 7, 8, 9)] + [[4, k, 5, 11, 2] for k in (3, 10)]
    data = TextData(tokens, [3] * 6, Words(), subject=["w6", "w7", "w8", "w9", "w3", "w10"])
    case = Case(Planted(), data, requests.samples(range(4)), task="language")
    bench = bench_of(case)
    mask = traced(top=1, window=1).select(bench)
    assert bench.notes["blocks"] == [1] and bench.notes["facts_traced"] == 4
    assert {n for n, m in mask.items() if m} == {"layers.1.mlp.weight"}
    effects = bench.notes["indirect_effect"]
    assert effects[1] > 0.3 and all(abs(e) < 1e-6 for i, e in enumerate(effects) if i != 1)


def test_block_scopes_by_number_and_what_they_say_when_they_cannot():
    case = language_case()
    bench = bench_of(case)
    mask = blocks(0, 2, kind="attention").select(bench)
    assert {n.split(".")[2] for n, m in mask.items() if m} == {"0", "2"} and all(
        "self_attn" in n for n, m in mask.items() if m
    )
    with pytest.raises(BadSetting, match=r"0\.\.2"):
        blocks(3).select(bench)
    with pytest.raises(UnmetNeed, match="subject"):
        traced().select(bench)
    with pytest.raises(BadModel, match="Sequential"):
        block_parts(mlp(), "mlp")


# -- the weight that answers to drift, and the best epoch ----------------------------------------------------------------
def test_drift_weight_by_hand():
    rule = Drift()
    assert [rule.of(d) for d in (0.0, -1.0, 0.5, 1.0)] == [1.2, 1.2, 1.5, 2.3]  # .3+.8=1.1 and .3*6+.8=2.6 are clipped
    assert rule.of(1e6) == 2.3
    state = rule.start
    for loss in (1.0, 2.0, 6.0):
        state = rule.next(state, loss, 0)
        assert rule.value(state) == 1.2
    assert state[1] == pytest.approx(3.0)  # the mean over updates; divided by the examples (8 each) it would be 0.375
    assert rule.value(rule.next(state, 3.5, 1)) == 1.5
    assert rule.value(rule.next(state, 2.9, 1)) == 1.2


def test_drift_runs_in_the_loop_and_its_weight_reaches_the_record():
    case = language_case()
    bench = bench_of(case)
    plan = Plan(Term(fit(), "retain", Drift(low=0.5, high=0.9, shift=0.2)), epochs=3, batch_size=8,
                optimizer=Optimizer("sgd", lr=1.0))  # fmt: skip
    trace_ = run_plan(plan, bench)
    losses = [next(iter(h["losses"].values())) for h in trace_.history]
    weights = [h["multipliers"]["0"] for h in trace_.history]
    rule, baseline = Drift(low=0.5, high=0.9, shift=0.2), sum(losses[:2]) / 2
    assert weights == [0.5, 0.5] + [rule.of(x - baseline) for x in losses[2:]]


def test_the_best_epoch_is_bounded():
    rule = lowest_joint(weight=1.2, bound=4.0)
    measured = iter([(0.1, 1.0), (0.2, 4.5), (0.9, 60.0)])
    values = []
    for retain, forget in measured:
        table = {("retain", "loss"): retain, ("forget", "loss"): forget}
        values.append(rule.value(lambda split, key, t=table: t[split, key]))
    assert values == pytest.approx([0.12 - 1.0, 0.24 - 4.0, 1.08 - 4.0])
    assert rule.choose(values, 0.0) == 1
    unbounded = [1.2 * 0.1 - 1.0, 1.2 * 0.2 - 4.5, 1.2 * 0.9 - 60.0]
    assert min(range(3), key=lambda e: unbounded[e]) == 2  # what the rule without a bound would take: the wreck
