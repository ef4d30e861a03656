"""Logits in pieces equal the full ones, loss and gradient, whatever a model does after its head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from expunge.cases.text import TextData
from expunge.parts.references import adapters_off
from expunge.tasks.head import Pieces, splits_off
from expunge.tasks.language import Language, nll, token_statistics

VOCABULARY = 97
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, final_logit_softcapping=3.0),
    "cohere": lambda: transformers.CohereConfig(**COMMON, logit_scale=0.3),
    "granite": lambda: transformers.GraniteConfig(**COMMON, logits_scaling=3.0),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4, output_router_logits=True),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    ),
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
    # torch's grouped products of experts know no float64
    return model.float() if name == "mixtral" else model.double()


def rows() -> TextData:
    g = torch.Generator().manual_seed(1)
    tokens = [torch.randint(3, VOCABULARY, (n,), generator=g).tolist() for n in (9, 14, 11, 6)]
    return TextData(tokens, [4, 3, 8, 0], pad=0)


def full_losses(model: nn.Module, batch) -> torch.Tensor:
    """(B,) the obvious way: all logits, shifted, masked."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    own = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return own.sum(1) / (labels != -100).sum(1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [None, 5])
def test_pieces_equal_full_logits(name, chunk):
    model, batch, task = model_of(name), rows().fetch(torch.arange(4)), Language(chunk=chunk)
    tolerance = 1e-6 if name == "mixtral" else 1e-10
    assert splits_off(model)
    output = task.forward(model, batch)
    assert isinstance(output, Pieces)
    losses = [full_losses(model, batch), task.loss(output, batch)]
    assert torch.allclose(*losses, atol=tolerance, rtol=0)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=losses[0].dtype)
    parameters = dict(model.named_parameters())
    gradients = [torch.autograd.grad((weights * loss).sum(), list(parameters.values())) for loss in losses]
    for key, a, b in zip(parameters, *gradients, strict=True):
        assert torch.allclose(a, b, atol=tolerance, rtol=1e-5 if name == "mixtral" else 0), key


@pytest.mark.parametrize("name", ["gemma2", "cohere"])
def test_a_head_alone_would_be_wrong(name):
    """The trap that the models' own forward avoids."""
    model, batch = model_of(name), rows().fetch(torch.arange(4))
    output = Language().forward(model, batch)
    assert not torch.allclose(model.get_output_embeddings()(output.states), output.prediction, atol=1e-3)


def test_two_outputs_and_wide_functions_in_pieces():
    model, other, batch = model_of("llama"), model_of("gpt2"), rows().fetch(torch.arange(4))
    whole, small = Language(), Language(chunk=3)
    a, b = (t.divergence(t.forward(model, batch), t.forward(other, batch), batch, 2.0) for t in (whole, small))
    assert torch.allclose(a, b, atol=1e-12)
    a, b = (t.per_choice(token_statistics, t.forward(model, batch), batch, reduce="none") for t in (whole, small))
    assert a.shape == (4, 11, 4) and torch.allclose(a, b, atol=1e-12)


def test_a_piece_is_never_larger_than_the_chunk():
    model, batch, task = model_of("llama"), rows().fetch(torch.arange(4)), Language(chunk=6)
    sizes: list[int] = []

    def noting(logits, answers):
        sizes.append(len(logits))
        return nll(logits, answers)

    task.per_choice(noting, task.forward(model, batch), batch).sum().backward()
    assert max(sizes) == 6 and sum(sizes) == 2 * int(task.choices(batch).sum())  # each once forward, once backward


def test_a_model_without_a_decoder_of_its_own_is_read_whole():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

        def forward(self, ids):
            return self.out(self.embed(ids).cumsum(1))

    model, batch = Plain().double(), rows().fetch(torch.arange(4))
    output = Language(chunk=3).forward(model, batch)
    assert not isinstance(output, Pieces)
    logits = model(batch["input_ids"])[:, :-1].transpose(1, 2)
    own = F.cross_entropy(logits, batch["labels"][:, 1:], ignore_index=-100, reduction="none").sum(1)
    assert torch.allclose(-Language(chunk=3).log_likelihood(output, batch), own)


def test_adapters_on_the_head_are_off_where_the_output_says_so():
    import peft

    model, batch, task = model_of("llama"), rows().fetch(torch.arange(4)), Language(chunk=4)
    before = task.loss(task.forward(model, batch), batch).detach()
    adapted = peft.LoraModel(model, peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"]), "default").double()
    for key, p in adapted.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(p)
    with adapters_off(adapted), torch.no_grad():
        output = task.forward(adapted, batch).under(lambda: adapters_off(adapted))
    assert torch.allclose(task.loss(output, batch), before, atol=1e-12)
    assert not torch.allclose(task.loss(output.under(lambda: torch.no_grad()), batch), before, atol=1e-3)


@pytest.mark.parametrize("hooked", [False, True])
def test_gradient_checkpointing_gives_the_same_gradient(hooked):
    """Also with a hook on a block that is gone when the backward pass comes, as a latent attack's is."""
    model, batch = model_of("llama").train(), rows().fetch(torch.arange(4))
    found = []
    for again in (False, True):
        task = replace(Language(chunk=5), gradient_checkpointing=again)
        hook = model.model.layers[1].register_forward_hook(lambda _m, _i, out: out + 0.3) if hooked else None
        output = task.forward(model, batch)
        if hook is not None:
            hook.remove()
        found.append(torch.autograd.grad(task.loss(output, batch).sum(), list(model.parameters())))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*found, strict=True))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_gradient_checkpointing_runs_blocks_again():
    model, batch = model_of("llama").train(), rows().fetch(torch.arange(4))
    assert splits_off(model)  # a trial that would count below
    forward, runs = type(model.model.layers[0].mlp).forward, []
    model.model.layers[0].mlp.forward = lambda x: runs.append(1) or forward(model.model.layers[0].mlp, x)
    for again, count in ((False, 1), (True, 2)):
        runs.clear()
        task = Language(gradient_checkpointing=again)
        task.loss(task.forward(model, batch), batch).sum().backward()
        assert len(runs) == count
