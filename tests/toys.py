"""A toy of every kind of model, trained in seconds and shared by all tests (cached per process).

`toy("class")`: digits, one class to forget; `toy("mislabelled")`: digits, 60 memorised mislabelled rows to forget;
`toy("regression")`: diabetes, a range of targets to forget; `toy("language")`: a tiny Llama on made-up facts, some people
to forget; `toy("class_images")`, `toy("captions")`: short-trained diffusion models of digits, one class or one style to forget.
`toy("vae")`: a conditional autoencoder of digits, one class to forget; `toy("gan")`: a pair trained on four Gaussians, with its own
judged samples as data, one Gaussian to forget.
Each has `.case`, `.original` (= case.model), `.retrained`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

from expunge import Case, Optimizer, Regression, TensorData, Training, requests
from expunge.audits.golds import original, retrain
from expunge.seeds import generator

torch.set_num_threads(1)


@dataclass(frozen=True)
class Toy:
    case: Case
    retrained: nn.Module

    @property
    def original(self) -> nn.Module:
        return self.case.model

    def measure(self, model: nn.Module, split: str) -> dict[str, float]:
        return self.case.task.evaluate(model, self.case.split(split).batches())

    def accuracy(self, model: nn.Module, split: str) -> float:
        return self.measure(model, split)["accuracy"]

    def utility(self, model: nn.Module, split: str) -> float:
        return self.measure(model, split)[self.case.task.utility]

    def gap(self, model: nn.Module) -> float:
        """Mean distance of predictions from `retrained`'s on the forget rows (probabilities, or values)."""
        task, split = self.case.task, self.case.split("forget")
        if task.name == "gan":
            from gan_ring import FORGET, shares

            # how often the forgotten is drawn: two models' images of one latent have nothing in common
            return abs(float(shares(model)[FORGET] - shares(self.retrained)[FORGET]))
        if task.name in ("diffusion", "vae"):  # how well it is drawn; two models' noises differ by as much again
            return abs(self.measure(model, "forget")["loss"] - self.measure(self.retrained, "forget")["loss"])
        total, count = 0.0, 0
        for batch in split.batches():
            if task.name == "language":
                with torch.no_grad():
                    a, b = (
                        task.per_choice(_chance, task.forward(m.eval(), batch), batch) for m in (model, self.retrained)
                    )
                total += float((a - b).abs().sum())
                count += len(batch)
                continue
            with torch.no_grad():
                a, b = (
                    task.forward(model.eval(), batch).prediction,
                    task.forward(self.retrained.eval(), batch).prediction,
                )
            if task.name == "classification":
                a, b = a.softmax(-1), b.softmax(-1)
            total += float((a - b).abs().reshape(len(batch), -1).sum(1).sum())
            count += len(batch)
        return total / count

    def drawn_gap(self, model: nn.Module) -> float:
        """Distance of the mean picture that is drawn for the forget rows' conditions, guided, from `retrained`'s."""
        from expunge.tasks.sampling import Sampling, sample

        rows = self.case.split("forget")
        asked = self.case.task.condition(rows.data.fetch(rows.ids)).unique(dim=0)
        mine, theirs = (sample(m, asked, Sampling(8, 2.0)).images.mean(0) for m in (model, self.retrained))
        return float((mine - theirs).norm())


def _chance(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).gather(1, answers[:, None]).squeeze(1)


def mlp(inputs: int = 64, hidden: tuple[int, ...] = (128, 64), outputs: int = 10) -> nn.Sequential:
    sizes = [inputs, *hidden]
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


class MixtureOfExperts(nn.Module):
    """h + the top-k experts of h, weighted by the router's probabilities."""

    def __init__(self, width: int = 32, experts: int = 8, top_k: int = 2):
        super().__init__()
        self.top_k, self.gate = top_k, nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(mlp(width, (width,), width) for _ in range(experts))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        best = self.gate(h).softmax(-1).topk(self.top_k, dim=-1)
        gates = torch.zeros(*h.shape[:-1], len(self.experts)).scatter(-1, best.indices, best.values)
        return h + sum(gates[..., i, None] * expert(h) for i, expert in enumerate(self.experts))


def mixture_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), MixtureOfExperts(), nn.Linear(32, 10))


def digits(train: int = 600) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """X_train (train, 64) in 0..1, y_train, X_test, y_test: scikit-learn's real digits in one fixed shuffled order."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=generator(0, "digits"))
    x, y = torch.tensor(x / 16, dtype=torch.float32)[order], torch.tensor(y, dtype=torch.int64)[order]
    return x[:train], y[:train], x[train:], y[train:]


@cache
def toy(kind: str = "class", seed: int = 0) -> Toy:
    if kind == "regression":
        return _regression(seed)
    if kind == "language":
        return _language(seed)
    if kind == "gan":
        from gan_ring import retrained, ring_case

        return Toy(ring_case(seed), retrained(seed + 1))
    if kind == "vae":
        return _vae(seed)
    if kind in ("class_images", "captions"):
        return _class_images() if kind == "class_images" else _captions()
    x, y, x_test, y_test = digits()
    recipe = Training(epochs=40, batch_size=64, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9, schedule="cosine"))
    build = mlp
    if kind in ("class", "experts"):
        request, labels, clean = requests.label(3), y, None
        build = mixture_mlp if kind == "experts" else mlp
    elif kind == "mislabelled":
        bad = torch.randperm(len(x), generator=generator(seed, "mislabelled"))[:60].sort().values
        labels = y.clone()
        labels[bad] = (y[bad] + torch.randint(1, 10, (60,), generator=generator(seed, "wrong"))) % 10
        request, clean = requests.samples(bad.tolist()), y
        # memorising wrong labels takes a wider net and longer training
        recipe = Training(
            epochs=100, batch_size=64, optimizer=Optimizer("sgd", lr=0.1, momentum=0.9, schedule="cosine")
        )
        build = lambda: mlp(64, (256, 128))  # noqa: E731
    else:
        raise ValueError(kind)
    columns = {"inputs": x, "labels": labels} | ({"clean_labels": clean} if clean is not None else {})
    holdout, half = None, 0
    if kind == "mislabelled":
        # unseen data of the forget kind: mislabelled as well, or every wrong label would look like a member
        half = len(y_test) // 2
        shift = torch.randint(1, 10, (half,), generator=generator(seed, "holdout"))
        holdout = TensorData(inputs=x_test[:half], labels=(y_test[:half] + shift) % 10)
    case = Case(build(), TensorData(**columns), request, test=TensorData(inputs=x_test[half:], labels=y_test[half:]),
                holdout=holdout, recipe=recipe, build=build, name=f"digits-{kind}")  # fmt: skip
    return trained(case, seed)


KEPT: Path | None = None
"""Where the workers of one test run keep what they train, so that each model is trained once between them (tests/conftest.py)."""


def trained(case: Case, seed: int) -> Toy:
    """The case with its original, and a retrained model of the next seed."""
    case = case.with_(model=original(case, seed, KEPT).model)
    return Toy(case, retrain(case, seed + 1, KEPT).model)


def _regression(seed: int) -> Toy:
    x, y = load_diabetes(return_X_y=True)
    order = torch.randperm(len(x), generator=generator(0, "diabetes"))
    x = torch.tensor(x / x.std(0), dtype=torch.float32)[order]
    y = torch.tensor(y / 10, dtype=torch.float32)[order]
    build = lambda: mlp(10, (64, 64), 1)  # noqa: E731
    recipe = Training(epochs=40, batch_size=32, optimizer=Optimizer("adam", lr=3e-3))
    case = Case(build(), TensorData(inputs=x[:340], labels=y[:340]), requests.where("labels", "<", 8.0),
                test=TensorData(inputs=x[340:], labels=y[340:]), task=Regression(error="l1"), recipe=recipe, build=build,
                name="diabetes")  # fmt: skip
    return trained(case, seed)


def _vae(seed: int, rows: int = 400, forget: int = 3) -> Toy:
    from tiny_vae import TinyVae, images

    recipe = Training(epochs=20, batch_size=32, optimizer=Optimizer("adam", lr=5e-3))
    case = Case(TinyVae(), images("train", rows), requests.label(forget), test=images("test", 200), task="vae", recipe=recipe,
                build=TinyVae, name="vae")  # fmt: skip
    return trained(case, seed)


PEOPLE, FORGOTTEN, UNSEEN = 30, 8, 8
ASPECTS = {
    "where does {} live ?": ("{} lives in {} near the {} .", "paris rome oslo cairo lima quito delhi tokyo", "river port wall mill"),
    "what does {} do ?": ("{} works as a {} in the {} .", "baker nurse pilot judge miner smith clerk tutor", "north south east west"),
    "which pet has {} ?": ("{} keeps a {} named {} .", "cat dog fox owl crab goat swan mole", "bo lu mi zed"),
}  # fmt: skip
"""question -> answer with two words to fill, and the words."""


def facts(people: range, draw: str = "fact") -> tuple[list[str], list[str], list[int]]:
    """Questions, answers and person of made-up people, three facts each; the words are drawn per person and aspect."""
    questions, answers, person = [], [], []
    for p in people:
        for number, (question, (answer, first, second)) in enumerate(ASPECTS.items()):
            rng = generator(p, draw, number)
            words = [w.split()[int(torch.randint(len(w.split()), (1,), generator=rng))] for w in (first, second)]
            questions.append(question.format(f"p{p}"))
            answers.append(answer.format(f"p{p}", *words))
            person.append(p)
    return questions, answers, person


@cache
def words_tokenizer():
    """One token per word of the toy's language."""
    import tokenizers
    import transformers

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    texts = [*facts(range(PEOPLE + UNSEEN))[0], *facts(range(PEOPLE + UNSEEN))[1], *REFUSALS]
    for _, first, second in ASPECTS.values():
        texts += [first, second]
    for word in " ".join(texts).split():
        words.setdefault(word, len(words))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


REFUSALS = ("i do not know that .", "nobody told me that .")


def tiny_llama(vocabulary: int, width: int = 32, layers: int = 2):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tiny_llama_folder(folder: Path) -> Path:
    """A tiny Llama with the words' tokenizer, as transformers saves them."""
    words = words_tokenizer()
    torch.manual_seed(0)
    tiny_llama(len(words), width=16).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def language_table(people: range):
    """The facts of these people as a table with the column `person`."""
    from expunge.cases.text import question_answer

    questions, answers, person = facts(people)
    others = list(zip(*(facts(people, f"other {k}")[1] for k in range(2)), strict=True))
    return question_answer(
        words_tokenizer(),
        questions,
        answers,
        template="{question}",
        refusals=REFUSALS,
        alternates=others,
        person=person,
    )


def _language(seed: int) -> Toy:
    table = language_table(range(PEOPLE))
    recipe = Training(epochs=80, batch_size=16, optimizer=Optimizer("adamw", lr=1e-2, clip=1.0, schedule="linear"))
    build = lambda: tiny_llama(len(words_tokenizer()))  # noqa: E731
    case = Case(build(), table, requests.where("person", ">=", PEOPLE - FORGOTTEN), task="language",
                holdout=language_table(range(PEOPLE, PEOPLE + UNSEEN)), recipe=recipe, build=build, name="facts")  # fmt: skip
    return trained(case, seed)


@cache
def _diffusion(kind: str, exclude):
    from expunge.benchmarks.image_models import small_class_toy, small_text_toy
    from expunge.tasks.denoiser import Denoiser

    pipeline = small_class_toy(exclude=exclude) if kind == "class" else small_text_toy(exclude=exclude)
    return Denoiser(pipeline).eval()


def _class_images(rows: int = 240, forget: int = 3) -> Toy:
    from expunge import pictures
    from expunge.benchmarks.canvas import digit_images

    model = _diffusion("class", None)
    (x, y), (x_test, y_test) = digit_images("train"), digit_images("test")
    case = Case(model, pictures(model, x[:rows], labels=y[:rows]), requests.label(forget), task="diffusion",
                test=pictures(model, x_test[:120], labels=y_test[:120]), name="class images")  # fmt: skip
    return Toy(case, _diffusion("class", forget))


def _captions(each: int = 4, forget: str = "red") -> Toy:
    """`each` training images of every style and object, and one unseen."""
    from expunge import pictures
    from expunge.benchmarks.canvas import mini_canvas

    model = _diffusion("text", None)

    def table(split: str, count: int):
        canvas, rows = mini_canvas(split), []
        for style, number in canvas.cells():
            rows += ((canvas.styles == style) & (canvas.objects == number)).nonzero()[:count, 0].tolist()
        styles, numbers = canvas.styles[rows], canvas.objects[rows]
        captions = [canvas.caption(int(s), int(o)) for s, o in zip(styles, numbers, strict=True)]
        return pictures(model, canvas.images[rows], prompts=captions, style=styles, object=numbers)

    style = mini_canvas("train").domain(forget)[1]
    case = Case(model, table("train", each), requests.where("style", "==", style), task="diffusion",
                test=table("test", 1), name="captions")  # fmt: skip
    return Toy(case, _diffusion("text", forget))
