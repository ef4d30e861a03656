"""Generation audits against known answers: synthetic marks, closed forms, slow loops, real digits."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from expunge import Case, TensorData, requests
from expunge.audits.attacks.budget import Attack
from expunge.audits.battery import judge
from expunge.audits.metrics import images
from expunge.audits.metrics.answer_set import AnswerSet, Cell, answer_key, answer_set, decoded
from expunge.audits.metrics.exam import Exam, Marks
from expunge.audits.metrics.intervals import bootstrap
from expunge.audits.metrics.judges import Judge, to_uint8
from expunge.audits.subjects import Subjects
from expunge.benchmarks.canvas import digit_images
from expunge.benchmarks.canvas_judges import digit_judges
from expunge.errors import BadModel, BadSetting, JudgeBelowFloor
from expunge.tasks.conditions import ClassConditions
from expunge.tasks.sampling import Sampling

pytest.importorskip("torchmetrics")
NAMES = {"style": ("plain", "red", "ink"), "object": ("one", "two", "three", "four")}


def grid(extra: tuple[Cell, ...] = ()) -> tuple[Cell, ...]:
    cells = [Cell(f"a {s} {o}", {"style": s, "object": o}) for s in NAMES["style"] for o in NAMES["object"]]
    return (*cells, *extra)


def marks(
    change=None, target=None, seeds: int = 5, cells: tuple[Cell, ...] | None = None, confidence: float = 1.0
) -> Marks:
    """Marks of a perfect model; change(domain, cell) -> the name that the judge says instead, or None."""
    cells = cells or grid()
    cell = np.repeat(np.arange(len(cells)), seeds)
    probabilities = {}
    for domain, names in NAMES.items():
        said = [(change and change(domain, cells[c])) or cells[c].shows[domain] for c in cell]
        hot = np.eye(len(names))[[names.index(name) for name in said]]
        probabilities[domain] = hot * confidence + (1 - confidence) / len(names)
    seed = np.tile(np.arange(seeds), len(cells))
    return Marks(cells, target or {"style": "red"}, cell, seed, probabilities, NAMES, np.zeros(len(cell), dtype=bool))


# -- arithmetic on known answers ---------------------------------------------------------------------------------------
def test_one_style_fully_wrong_is_unlearned_and_nothing_else() -> None:
    found = marks(lambda domain, cell: "plain" if domain == "style" and cell.shows["style"] == "red" else None)
    assert found.unlearned().mean() == 1
    assert found.kept(["style"]).mean() == 1 and found.kept(["object"]).mean() == 1
    assert found.leaks().mean() == 0 and found.yields() == {"plain": 1.0}
    assert found.recalled().mean() == 0 and found.useful().mean() == 1


def test_ua_and_accuracy_on_the_target_add_to_one() -> None:
    odd = {"a red one", "a red three"}
    found = marks(lambda domain, cell: "ink" if domain == "style" and cell.asks in odd else None)
    accuracy = found.right("style")[found.asked].mean()
    assert found.unlearned().mean() + accuracy == 1
    assert found.unlearned().mean() == 0.5


def test_images_of_the_target_do_not_count_for_cra() -> None:
    """The target's own images show wrong objects: over all cells that would cost 4 of 12 cells, over the others nothing."""
    found = marks(lambda domain, cell: "two" if domain == "object" and cell.shows["style"] == "red" else None)
    assert found.kept(["object"]).mean() == 1
    assert found.right("object").mean() == pytest.approx(1 - 3 / 12)


def test_worst_retained_shows_the_neighbour_that_died() -> None:
    found = marks(lambda domain, cell: "plain" if domain == "style" and cell.shows["style"] != "plain" else None)
    assert found.worst() == ("ink", 0.0)
    assert found.by_name() == {"plain": 1.0, "ink": 0.0}
    assert found.kept(["style"]).mean() == 0.5


def test_leak_counts_the_target_where_it_was_not_asked_for() -> None:
    found = marks(lambda domain, cell: "red" if domain == "style" and cell.asks == "a plain one" else None)
    assert found.leaks().mean() == pytest.approx(1 / 8)


def test_other_words_are_a_route_of_their_own() -> None:
    cells = grid((Cell("a crimson one", {"style": "red", "object": "one"}, 1),))
    found = marks(
        lambda domain, cell: "ink" if domain == "style" and str(cell.asks).startswith("a red") else None, cells=cells
    )
    assert found.unlearned().mean() == 1 and found.unlearned(plain=False).mean() == 0
    assert found.recalled().sum() == 5 and len(found.recalled()) == 25  # one route of five still shows it
    assert len(found.kept(["style"])) == 40  # the other words are no retained cells


def test_one_object_in_one_style_has_neighbours_and_a_rest() -> None:
    found = marks(
        lambda domain, cell: "two" if domain == "object" and cell.asks in ("a red one", "a ink one") else None,
        target={"style": "red", "object": "one"},
    )
    domains = ["style", "object"]
    assert found.unlearned().mean() == 1
    assert found.near.sum() == 5 * (2 + 3) and found.kept(domains, found.near).mean() == pytest.approx(4 / 5)
    assert found.kept(domains, ~found.near & ~found.asked).mean() == 1


def test_target_probability_and_entropy() -> None:
    found = marks(confidence=0.4)
    assert found.target_probability()[found.asked] == pytest.approx(0.4 + 0.6 / 3)
    p = np.array([0.6, 0.2, 0.2])
    assert found.entropy() == pytest.approx(-(p * np.log(p)).sum())


def test_mush_is_neither_forgotten_nor_kept() -> None:
    found = marks()
    rejected = Marks(**{**found.__dict__, "rejected": np.ones(len(found.cell), dtype=bool)})
    assert found.recalled().mean() == 1 and found.useful().mean() == 1
    assert rejected.recalled().mean() == 0 and rejected.useful().mean() == 0
    assert rejected.unlearned().mean() == 0  # the judge still says red: ua alone would not tell
    assert rejected.yields() == {"rejected": 1.0}


def test_what_is_seen_instead_is_one_name_that_is_not_the_target() -> None:
    instead = {"a red one": "ink", "a red two": "ink", "a red three": "plain"}
    found = marks(lambda domain, cell: instead.get(cell.asks) if domain == "style" else None)
    name, hits = found.substitute()
    held = [cell.asks for cell in found.cells if cell.holds(found.target)]
    assert name == "ink" and len(hits) == 5 * len(held)
    assert hits.mean() == pytest.approx(sum(instead.get(a) == "ink" for a in held) / len(held))
    mush = Marks(**{**found.__dict__, "rejected": np.ones(len(found.cell), dtype=bool)})
    assert mush.substitute()[1].mean() == 0 and marks().substitute()[0] == ""


def test_order_of_images_changes_nothing() -> None:
    found = marks(lambda domain, cell: "ink" if domain == "style" and cell.asks == "a red one" else None)
    order = np.random.default_rng(0).permutation(len(found.cell))
    other = Marks(
        found.cells, found.target, found.cell[order], found.seed[order],
        {d: p[order] for d, p in found.probabilities.items()}, found.names, found.rejected[order],
    )  # fmt: skip
    for read in (
        lambda m: m.unlearned().mean(),
        lambda m: m.kept(["style"]).mean(),
        lambda m: m.worst(),
        lambda m: m.yields(),
    ):
        assert read(found) == read(other)


def test_intervals_cover_and_shrink_with_the_root_of_n() -> None:
    rng = np.random.default_rng(0)
    covered, widths = 0, {}
    for n in (40, 160):
        widths[n] = []
        for run in range(200 if n == 40 else 40):
            values = (rng.random(n) < 0.7).astype(float)
            low, high = bootstrap((values,), seed=run, resamples=150)
            widths[n].append(high - low)
            covered += n == 40 and low <= 0.7 <= high
    assert 180 <= covered <= 200  # 95% of 200, four standard errors
    assert np.mean(widths[40]) / np.mean(widths[160]) == pytest.approx(2, rel=0.15)


# -- a generator of real digits ----------------------------------------------------------------------------------------
@cache
def bank() -> torch.Tensor:
    """(10, 30, 1, 8, 8) held-out digits of each class."""
    found, labels = digit_images("test")
    return torch.stack([found[labels == c][:30] for c in range(10)])


class Drawer(nn.Module):
    """Draws real digits of the class it is told, chosen by the noise; class `gone` is drawn as noise or as NaN."""

    shape = (1, 8, 8)
    device = torch.device("cpu")
    conditions = ClassConditions(10, 10)

    def __init__(self, gone: int | None = None, how: str = "noise"):
        super().__init__()
        self.bank = nn.Parameter(bank().clone())
        self.gone, self.how = gone, how

    def encode(self, condition, prefix=None, words=None):
        return condition

    def draw(self, noise, encoded):
        chosen = (noise.flatten(1).abs().sum(1) * 1e4).long() % 30
        found = self.bank.detach()[encoded, chosen].clone()
        bad = (
            encoded == self.gone
            if self.gone is not None and self.gone >= 0
            else torch.full_like(encoded, self.gone == -1).bool()
        )
        found[bad] = noise[bad] if self.how == "noise" else float("nan")
        return found

    def images(self, latents):
        return latents.clamp(-1, 1)


CLASSES = tuple(Cell(c, {"digit": str(c)}) for c in range(10))


@pytest.fixture(scope="module")
def exam() -> Exam:
    judges = digit_judges()
    real, labels = digit_images("train")
    return Exam(
        CLASSES, {"digit": "3"}, (judges.digit,), tuple(range(8)), features=judges.features, feature_name="cnn",
        reference=to_uint8(real[labels != 3]),
    )  # fmt: skip


def test_answers_are_every_cell_under_every_seed_once() -> None:
    found = answer_set(Drawer(), CLASSES, seeds=(3, 1, 4))
    names = found.names()
    assert len(found) == 30 and len(set(names)) == 30
    for name, cell, seed in zip(names, found.cell.tolist(), found.seed.tolist(), strict=True):
        assert decoded(name) == {"digit": str(cell), "wording": "0", "seed": str(seed)}
    assert found.images.dtype == torch.uint8
    assert torch.equal(found.images, answer_set(Drawer(), CLASSES, seeds=(3, 1, 4)).images)


def test_a_cells_images_do_not_depend_on_what_else_is_asked() -> None:
    whole, alone = answer_set(Drawer(), CLASSES, (0, 1)), answer_set(Drawer(), CLASSES[4:5], (0, 1))
    assert torch.equal(whole.images[whole.cell == 4], alone.images)


def test_kept_answers_are_read_back_and_keyed_by_all_they_depend_on(tmp_path) -> None:
    model = Drawer()
    first = answer_set(model, CLASSES, (0, 1), cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 10
    model.draw = None  # what is kept is not drawn again
    assert torch.equal(answer_set(model, CLASSES, (0, 1), cache=tmp_path).images, first.images)
    base = answer_key(Drawer(), CLASSES[0], (0, 1), Sampling())
    other = Drawer()
    with torch.no_grad():
        other.bank[0, 0, 0, 0, 0] += 1e-3
    scheduled = Drawer()
    scheduled.scheduler = torch.optim.SGD([torch.zeros(1)], 1.0)
    keys = {
        base, answer_key(other, CLASSES[0], (0, 1), Sampling()), answer_key(scheduled, CLASSES[0], (0, 1), Sampling()),
        answer_key(Drawer(), CLASSES[1], (0, 1), Sampling()), answer_key(Drawer(), CLASSES[0], (0, 2), Sampling()),
        answer_key(Drawer(), CLASSES[0], (0, 1), Sampling(steps=26)), answer_key(Drawer(), CLASSES[0], (0, 1), Sampling(guidance=3.0)),
        answer_key(Drawer(), CLASSES[0], (0, 1), Sampling(scheduler="ddim")), answer_key(Drawer(), CLASSES[0], (0, 1), Sampling(eta=1.0)),
        answer_key(Drawer(), CLASSES[0], (0, 1), Sampling(convention="ddpm")),
    }  # fmt: skip
    assert len(keys) == 10 and base == answer_key(Drawer(), CLASSES[0], (0, 1), Sampling())


def test_a_perfect_generator_and_one_of_noise(exam: Exam) -> None:
    """Noise is called something by the judge, so ua alone looks like success; utility and the reject test say mush."""
    perfect, noise = exam.marks(Drawer()), exam.marks(Drawer(gone=-1))
    assert perfect.unlearned().mean() < 0.05 and perfect.kept(["digit"]).mean() > 0.97
    assert noise.unlearned().mean() >= 0.8 - 0.35 and noise.kept(["digit"]).mean() < 0.35
    assert noise.rejected.mean() > 0.8 and noise.useful().mean() < 0.1 and perfect.rejected.mean() < 0.1


def test_constant_images_are_rejected(exam: Exam) -> None:
    for value in (0, 128, 255):
        assert bool(exam.judges[0].rejected(torch.full((4, 1, 8, 8), value, dtype=torch.uint8)).all())


def test_a_class_drawn_as_noise_alone_is_unlearned(exam: Exam) -> None:
    found = exam.marks(Drawer(gone=3))
    assert found.recalled().mean() == 0 and found.useful().mean() > 0.95
    assert found.yields()["rejected"] > 0.8


def test_answers_with_nan_are_dropped_and_counted(exam: Exam) -> None:
    model = Drawer(gone=3, how="nan")
    found = exam.marks(model)
    assert found.dropped == 8 and len(found.cell) == 72
    assert len(exam.recalled(model)) == 8 and exam.recalled(model).sum() == 0  # one score each all the same
    assert len(exam.useful(model)) == 72


def test_judge_below_its_floor_refuses() -> None:
    judge = digit_judges().digit
    weak = Judge(**{**judge.__dict__, "accuracy": 0.9})
    with pytest.raises(JudgeBelowFloor, match="0.97"):
        Exam(CLASSES, {"digit": "3"}, (weak,))
    assert Exam(CLASSES, {"digit": "3"}, (weak,), floor=0.8).target == {"digit": "3"}


def test_targets_that_no_judge_knows_are_refused() -> None:
    judge = digit_judges().digit
    with pytest.raises(BadSetting, match="expected a judge of 'style'"):
        Exam(CLASSES, {"style": "red"}, (judge,))
    with pytest.raises(BadSetting, match="expected a digit of"):
        Exam(CLASSES, {"digit": "eleven"}, (judge,))
    with pytest.raises(BadSetting, match="cells that do not"):
        Exam(CLASSES[3:4], {"digit": "3"}, (judge,))


# -- distances ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real() -> torch.Tensor:
    return to_uint8(digit_images("train")[0])


def test_fid_of_a_set_with_itself_is_zero_and_equals_the_closed_form(real, exam) -> None:
    from scipy.linalg import sqrtm

    assert abs(images.fid(exam.features, real[:300], real[:300])) < 1e-3
    a, b = real[:400], real[400:800] // 2
    x, y = (exam.features(part).double().numpy() for part in (a, b))
    s1, s2 = np.cov(x.T), np.cov(y.T)
    closed = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert images.fid(exam.features, a, b) == pytest.approx(closed, rel=1e-2)


def test_kid_equals_the_double_loop_and_is_unbiased(real, exam) -> None:
    a, b = real[:40], 255 - real[40:80]
    x, y = (exam.features(part).double().numpy() for part in (a, b))

    def kernel(u, v):
        return (u @ v / len(u) + 1) ** 3

    def within(z):
        return np.mean([kernel(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    slow = within(x) + within(y) - 2 * np.mean([kernel(u, v) for u in x for v in y])
    assert images.kid(exam.features, a, b) == pytest.approx(slow, rel=1e-3)
    halves = [images.kid(exam.features, *images.halves(real[:200], seed)) for seed in range(8)]
    assert min(halves) < 0 < max(halves) or abs(np.mean(halves)) < 0.02 * slow


def test_distances_grow_from_real_to_worse_and_real_images_are_at_zero(real, exam) -> None:
    real = real[:400]
    half, other = images.halves(real)
    noise = torch.randint(0, 256, other.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    worn = (0.8 * other.float() + 0.2 * noise.float()).round().to(torch.uint8)
    for distance in (images.fid, images.kid):
        found = [distance(exam.features, half, part) for part in (other, worn, noise)]
        assert found[0] < found[1] < found[2]
        less, floor = images.corrected(distance, exam.features, real, other)
        assert less == pytest.approx(0, abs=1e-6) and floor == pytest.approx(found[0])


def test_precision_and_recall_tell_quality_from_diversity(real, exam) -> None:
    labels = digit_images("train")[1]
    half, other = real[:600], real[600:1200]
    few = real[1200:][labels[1200:] <= 1]  # two classes of ten: real, and not diverse
    p, r = images.precision_recall(exam.features, half, other)
    p_few, r_few = images.precision_recall(exam.features, half, few)
    assert p > 0.8 and r > 0.8 and p_few > 0.8 and r_few < 0.4
    noise = torch.randint(0, 256, half.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert images.precision_recall(exam.features, half, noise)[0] < 0.2
    # the slow loop, on few images
    a, b = exam.features(half[:30]).double(), exam.features(other[:30]).double()
    inside = 0
    for point in b:
        hit = False
        for one in a:
            radius = sorted(float((one - another).norm()) for another in a)[3]
            hit |= float((point - one).norm()) <= radius
        inside += hit
    assert images.precision_recall(exam.features, half[:30], other[:30])[0] == pytest.approx(inside / 30)


def test_feature_distance_is_zero_for_the_same_images(real, exam) -> None:
    assert images.feature_distance(exam.features, real[:5], real[:5]).tolist() == [0] * 5
    x, y = exam.features(real[:5]).double(), exam.features(real[5:10]).double()
    expected = [(float((u - v).square().sum())) ** 0.5 for u, v in zip(x, y, strict=True)]
    assert images.feature_distance(exam.features, real[:5], real[5:10]).tolist() == pytest.approx(expected)


def test_clip_score_is_a_hundred_cosines(real) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )  # fmt: skip
    model = transformers.CLIPModel(config).eval()

    class Processor:
        """What torchmetrics asks of a CLIPProcessor."""

        def __call__(self, text=None, images=None, return_tensors="pt", padding=True, **_):
            found = {}
            if text is not None:
                ids = [[0, *(2 + ord(c) % 40 for c in t), 1] for t in text]
                width = max(map(len, ids))
                found["input_ids"] = torch.tensor([i + [1] * (width - len(i)) for i in ids])
                found["attention_mask"] = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i in ids])
            if images is not None:
                found["pixel_values"] = torch.stack([i.float() / 255 for i in images])
            return found

    pictures = real[:4].expand(-1, 3, -1, -1)
    prompts = ["a one", "a two", "b", "cc"]
    processor = Processor()
    with torch.no_grad():
        inputs = processor(prompts, list(pictures))
        seen = model.get_image_features(pixel_values=inputs["pixel_values"])
        said = model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    seen, said = (v if isinstance(v, torch.Tensor) else v.pooler_output for v in (seen, said))
    cosines = torch.nn.functional.cosine_similarity(seen, said)
    expected = max(100 * float(cosines.mean()), 0)
    assert images.clip_score(pictures, prompts, lambda: (model, processor)) == pytest.approx(expected, abs=1e-3)


def test_a_clip_folder_of_a_pickle_is_refused_and_not_run(tmp_path, real) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 50}, vision_config=small | {"image_size": 8, "patch_size": 4}
    )
    config.architectures = ["CLIPModel"]
    config.save_pretrained(tmp_path)

    class Bomb:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"logit_scale": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(BadModel, match="a pickle is never read"):
        images.clip_score(real[:2].expand(-1, 3, -1, -1), ["a", "b"], tmp_path)
    assert not (tmp_path / "ran").exists()


# -- the verdict rests on what is drawn --------------------------------------------------------------------------------
def test_an_answer_set_keeps_only_finite_images() -> None:
    found = answer_set(Drawer(gone=3, how="nan"), CLASSES, (0, 1))
    assert isinstance(found, AnswerSet) and found.dropped == 2 and len(found.finite_only()) == 18
    assert bool((found.finite_only().cell != 3).all())


class Switch(nn.Module):
    """A classifier whose images are told by three numbers: whether it shows the target, is of use, and hides what an attack finds."""

    def __init__(self, shows: float, useful: float = 1.0, hidden: float = 0.0):
        super().__init__()
        self.line = nn.Linear(4, 2)
        nn.init.eye_(self.line.weight)
        nn.init.zeros_(self.line.bias)
        self.register_buffer("told", torch.tensor([shows, useful, hidden]))

    def forward(self, inputs):
        return self.line(inputs)


class SwitchExam:
    def recalled(self, model):
        return np.full(60, float(model.told[0]))

    def useful(self, model):
        return np.full(60, float(model.told[1]))


class Finder(Attack):
    """Brings back what a model hides."""

    name = "finder"

    def run(self, model, case, budget, seed):
        found = copy.deepcopy(model)
        found.told[0] = max(found.told[0], found.told[2])
        return found

    def positions(self, case, budget, seed):
        return torch.arange(1)  # of the forget rows: an exam's answers are scored whole all the same


@pytest.mark.parametrize(
    ("unlearned", "word"),
    [
        (Switch(0.0), "removed"),
        (Switch(0.0, hidden=1.0), "suppressed"),
        (Switch(1.0), "retained"),
        (Switch(0.0, useful=0.0), "collapsed"),
    ],
)
def test_the_verdict_rests_on_what_is_drawn(unlearned: Switch, word: str) -> None:
    torch.manual_seed(0)
    data, test = (TensorData(inputs=torch.randn(n, 4), labels=torch.arange(n) % 2) for n in (2400, 2400))
    case = Case(Switch(1.0, hidden=1.0), data, requests.samples(range(1000)), test=test, exam=SwitchExam(),
                build=lambda: Switch(0.0, 0.0))  # fmt: skip
    subjects = Subjects(case, case.model, unlearned, Switch(0.0), Switch(0.0))
    assert subjects.forget_scores("original", "forget").mean() == 1 and len(subjects.forget_scores("original")) == 60
    found = judge(subjects, [Finder()], resamples=200)
    assert found.verdict == word, found.reason
    if word == "suppressed":
        assert found.worst_attack == "finder" and found.attacked["finder"].value == 1
