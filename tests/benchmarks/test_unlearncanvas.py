"""UnlearnCanvas's protocol on a text toy of ten training steps: what is asked, of whom, and how it is counted; not its quality."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from expunge.audits.metrics.answer_set import Cell, image_seed
from expunge.audits.metrics.exam import Marks
from expunge.audits.profiles import run_profile
from expunge.audits.subjects import Subjects
from expunge.benchmarks import canvas_sequence, table_file, unlearncanvas
from expunge.benchmarks.canvas_judges import BASE, require_original
from expunge.benchmarks.unlearncanvas import Bench, configured, mini, run, table
from expunge.cli.canvas import _sheets
from expunge.errors import BadData, BadSetting, JudgeBelowFloor, OriginalBelowFloor
from expunge.methods.outcome import unlearn
from expunge.tasks.sampling import Sampling

LITTLE = ("generation_accuracy", "storage")
TINY = {"rows": 20, "steps": 10, "channels": (8, 16)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    made = mini(True, cached=False, **TINY)
    return replace(made, sampling=Sampling(3, 2.0), answer_seeds=(0,), cache=tmp_path_factory.mktemp("answers"))


def test_targets_in_words(bench: Bench) -> None:
    assert bench.target("red") == bench.target("crimson") == {"style": "red"}
    assert bench.target("three") == {"object": "three"}
    assert bench.target("red three") == {"style": "red", "object": "three"}
    with pytest.raises(BadSetting, match="two styles"):
        bench.target("red plain")
    with pytest.raises(BadSetting, match="expected a style or object"):
        bench.target("purple")


def test_cells_ask_for_everything_once_and_for_the_style_in_its_other_words(bench: Bench) -> None:
    cells = bench.cells({"style": "red"})
    assert len(cells) == 50 and len({cell.asks for cell in cells}) == 50
    assert [cell.asks for cell in cells if cell.wording][:2] == ["a crimson zero", "a crimson one"]
    assert len(bench.cells({"object": "three"})) == 40
    assert sum(cell.holds({"style": "red", "object": "three"}) for cell in bench.cells(bench.target("red three"))) == 2


def test_case_names_what_goes_in_its_first_word_and_keeps_the_rest_in_all_words(bench: Bench) -> None:
    case = bench.case("red")
    ids = case.data.column("input_ids")
    says = case.model.conditions.contains
    forget, retain = case.split("forget").ids, case.split("retain").ids
    assert bool(says(ids[forget], "red").all()) and not bool(says(ids[retain], "red").any())
    assert not bool(says(ids, "crimson").any())
    assert bool(says(ids[retain], "negative").any()) and bool(says(ids[retain], "inverted").any())
    assert len(forget) == 20 and len(retain) == 60
    assert len(case.exam.reference) == 60  # test images, none of them red
    later = bench.case("three", gone=("red",))
    assert len(later.data) == 60 and not bool(says(later.data.column("input_ids"), "red").any())


def test_methods_are_told_of_the_target(bench: Bench) -> None:
    found = dict(configured(bench, "red", ["uce", "salun_generation", ("esd", {"lr": 0.5}), "fine_tune"]))
    assert found["uce"]["concept"] == ("red",) and found["uce"]["guide"] == "plain"
    assert found["salun_generation"]["to"] == "red -> plain"
    assert found["esd"]["concept"] == "red" and found["esd"]["lr"] == 0.5
    assert "concept" not in found["fine_tune"]
    assert (
        dict(configured(bench, "red three", ["salun_generation"]))["salun_generation"]["to"]
        == "red three -> plain three"
    )
    assert "steps" not in dict(configured(bench, "red", ["esd"], toy=False))["esd"]  # its published defaults


def test_table_counts_what_the_slow_loop_counts(bench: Bench, tmp_path) -> None:
    """UA of the original, by the pipeline prompt by prompt and the judge image by image."""
    found = run(["red"], ["uce"], [0], bench=bench, small=True, folder=tmp_path, checks=LITTLE)["red"]
    ua = found.results[0].find("ua", "forget")
    model, judge = bench.original(0), bench.judges[0]
    pipe, hits = model.pipeline(), []
    pipe.set_progress_bar_config(disable=True)
    for cell in bench.cells({"style": "red"}):
        for seed in bench.answer_seeds if cell.holds({"style": "red"}) and not cell.wording else ():
            drawn = pipe(
                cell.asks, num_inference_steps=3, guidance_scale=2.0, output_type="np",
                generator=torch.Generator().manual_seed(image_seed(cell, seed)),
            ).images  # fmt: skip
            image = torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1
            hits.append(int(judge(image).argmax()) == judge.index("red"))
    assert len(hits) == 10 and ua.original == pytest.approx(100 * (1 - np.mean(hits)))
    text = table(found, unlearncanvas.control(bench, "red"))
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == [
        "original",
        "retrained",
        "random weights",
        "uce",
    ]
    assert "UA, other words" in text and "CRA" in text and "FR near" not in text
    assert found.results[0].case.notes["exam"]["sampling"]["steps"] == 3
    assert "held-out real images" in unlearncanvas.note(found, bench)
    storage = found.results[0].find("storage")
    attention = [p for n, p in model.named_parameters() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    assert storage.original == 0 and storage.unlearned == pytest.approx(sum(p.numel() * 4 for p in attention) / 2**20)


def test_a_committed_table_is_of_every_kept_run_and_says_which_command_made_which_row(bench: Bench, tmp_path) -> None:
    about = {"bench": bench, "small": True, "folder": tmp_path}
    run(["red"], ["uce"], [0], command="first", checks=LITTLE, **about)
    run(["red"], [("fine_tune", {"epochs": 1})], [0], command="second", checks=LITTLE[:1], **about)
    made = unlearncanvas.section(tmp_path / "red", bench, "red", [0])
    assert list(made.rows) == ["original", "retrained", "random weights", "uce", "fine_tune"]
    assert made.made == {"`first`": "uce", "`second`": "fine_tune"}
    place = [cell.strip() for cell in made.head[0].split("|")].index("storage MB")
    stored = {name: line.split("|")[place].strip() for name, line in made.rows.items()}
    assert float(stored["uce"]) > 0 and stored["fine_tune"] == ""  # not measured is no zero
    with pytest.raises(BadData, match="run the bench first"):
        unlearncanvas.kept(tmp_path / "red", [1])


def test_contact_sheets_show_guards_around_the_original(bench: Bench, tmp_path) -> None:
    """A guard's folder holds no pipeline: the sheet of a run that served one, and of one that changed weights."""
    run(["red"], ["negative_prompt", "uce"], [0], bench=bench, small=True, folder=tmp_path, checks=LITTLE)
    _sheets(tmp_path / "red", bench, "red", 0, 1, True)
    assert {file.name for file in (tmp_path / "red" / "pictures").iterdir()} == {"kept.png", "forgotten.png"}


def test_one_object_in_one_style_needs_no_gold(bench: Bench, tmp_path) -> None:
    found = run(["red three"], ["uce"], [0], bench=bench, small=True, folder=tmp_path, checks=LITTLE)["red three"]
    text = table(found, unlearncanvas.control(bench, "red three"))
    assert "FR near" in text and "IRA" not in text and "retrained" not in text
    assert found.results[0].verdict.verdict == "inconclusive"
    assert "no retrained model" in found.results[0].verdict.reason


def test_requests_one_after_another(bench: Bench, tmp_path) -> None:
    """Two requests by hand: the second is served on the first's model, on rows without the first's; then as a kept run in a table."""
    targets, first = ["red", "three"], bench.case("red")
    ((_, told),) = configured(bench, "red", ["uce"], True)
    one = unlearn(first, "uce", seed=0, floor=None, **told).model
    ((_, told),) = configured(bench, "three", ["uce"], True)
    two = unlearn(bench.case("three", 0, one, ["red"]), "uce", seed=0, floor=None, **told).model
    said = canvas_sequence.serve(bench, targets, [("uce", {})], [0], tmp_path, small=True, command="a sequence")
    (rows,) = said.values()
    assert [row["removed"] for row in rows] == ["", "red", "three"]
    for row, model, gone in zip(rows, (bench.original(0), one, two), (targets, targets[:1], targets), strict=True):
        assert {name for name in row if name.startswith("UA")} == {f"UA {text}" for text in gone}
        for text in gone:
            wanted = bench.exam(bench.target(text)).marks(model).unlearned().mean()
            assert row[f"UA {text}"] == 100 * wanted
        # slow: image by image, over the cells that show no target so far, in their first words
        marks, right = bench.exam(bench.target(gone[-1])).marks(model), {"style": [], "object": []}
        for place, cell in enumerate(marks.cells):
            if cell.wording or any(cell.holds(bench.target(text)) for text in gone):
                continue
            for i in np.flatnonzero(marks.cell == place):
                for domain, hits in right.items():
                    hits.append(marks.names[domain][marks.probabilities[domain][i].argmax()] == cell.shows[domain])
        own, other = ("style", "object") if gone[-1] == "red" else ("object", "style")
        assert row["IRA"] == pytest.approx(100 * np.mean(right[own])) and len(right[own]) == 30 - 3 * (len(gone) > 1)
        assert row["CRA"] == pytest.approx(100 * np.mean(right[other]))
        assert row["SR"] == pytest.approx(100 * np.mean(np.logical_and(*right.values())))
    assert rows[1]["rebound"] == 0 and rows[2]["rebound"] == rows[1]["UA red"] - rows[2]["UA red"]

    (title,) = made = canvas_sequence.sections(tmp_path, bench, [0])
    assert title == "red, then three" and made[title].made == {"`a sequence`": "uce"}
    assert list(made[title].rows) == ["original, seed 0", "uce, seed 0, 1. red", "uce, seed 0, 2. three"]
    head = [cell.strip() for cell in made[title].head[0].split("|")]
    assert head[1:7] == ["model", "UA red", "UA three", "IRA", "CRA", "SR"]
    cells = [cell.strip() for cell in made[title].rows["uce, seed 0, 1. red"].split("|")]
    assert cells[head.index("UA three")] == "" and float(cells[head.index("UA red")]) == pytest.approx(
        rows[1]["UA red"], rel=1e-2
    )
    assert not canvas_sequence.sections(tmp_path, bench, [1])
    with pytest.raises(BadSetting, match="two targets or more"):
        canvas_sequence.serve(bench, ["red"], [("uce", {})], [0], tmp_path)


def test_a_table_has_the_kept_sequences_of_this_and_earlier_commands(bench: Bench, tmp_path, monkeypatch) -> None:
    from expunge.cli import canvas

    monkeypatch.setattr(unlearncanvas, "mini", lambda small: bench)
    monkeypatch.setattr(canvas, "_sheets", lambda *_: None)
    monkeypatch.setattr(unlearncanvas, "run", partial(unlearncanvas.run, checks=LITTLE))
    given = {
        "small": True, "model": None, "retrained": None, "second": None, "data": None, "judges": None, "attacks": False, "prompts": False,
        "p4d": False, "told_attacks": "none", "samples": 0, "show_forgotten": False, "workers": 1, "table": tmp_path / "table.md",
    }  # fmt: skip
    canvas.bench("uce", [0], tmp_path / "runs", targets="red,three", sequence=True, **given)
    canvas.bench("uce", [0], tmp_path / "runs", targets="red", sequence=False, **given)
    found = table_file.read((tmp_path / "table.md").read_text("utf-8"))
    assert list(found) == ["red", "red, then three"]
    (command,) = found["red, then three"].made
    assert (
        command == "`expunge bench canvas --targets red,three --methods uce --seeds 1 --small --no-attacks --sequence`"
    )
    assert list(found["red, then three"].rows)[-1] == "uce, seed 0, 2. three"
    with pytest.raises(BadSetting, match="two targets or more"):
        canvas.bench("uce", [0], tmp_path / "other", targets="red", sequence=True, **given)
    assert not (tmp_path / "other").exists()


def test_the_checklist_compares_with_the_retrained_model(bench: Bench) -> None:
    case, gold = bench.case("red"), bench.retrained(0, "red")
    report = run_profile("generation", Subjects(case, case.model, gold, gold, gold), ids=("I1", "I3", "I5", "I7", "I8"))
    assert [report[id].result for id in ("I1", "I3", "I7", "I8")] == ["pass"] * 4
    assert report["I5"].result == "not run"  # the target is no object in a style
    assert (
        report["I1"].unlearned
        == report["I1"].retrained
        == 100 * bench.exam({"style": "red"}).marks(gold).unlearned().mean()
    )


def test_no_table_of_an_original_that_does_not_draw_what_it_is_asked(bench: Bench, tmp_path) -> None:
    """The toy of ten training steps passes on purpose alone; its numbers are 1 - UA, IRA and CRA, and nothing has run before it fails."""
    with pytest.raises(
        OriginalBelowFloor, match=r"draws what it is asked.*found accuracy 0\..*needs 0\.85.*train it longer"
    ):
        run(["red"], ["uce"], [0], bench=replace(bench, base=None), small=True, folder=tmp_path, checks=LITTLE)
    with pytest.raises(JudgeBelowFloor, match="style judge with at least"):  # nor with judges that err
        run(["red"], ["uce"], [0], bench=replace(bench, floor=1.01), small=True, folder=tmp_path, checks=LITTLE)
    assert not list(tmp_path.iterdir())
    exam, model = bench.exam({"style": "red"}), bench.original(0)
    marks = exam.marks(model)
    found = require_original(exam, model, 0.0)
    assert found["red"] == 1 - marks.unlearned().mean()
    assert found["style of the rest"] == marks.kept(marks.domains).mean()
    assert found["object of the rest"] == marks.kept(marks.other_domains).mean()
    least = min(found.values())
    assert require_original(exam, model, least) == found
    with pytest.raises(OriginalBelowFloor):
        require_original(exam, model, least + 1e-6)
    assert mini(True, cached=False, **TINY).base == 0 and mini(rows=20, cached=False).base is None


class Said:
    """An exam of one domain, whose marks are the answers it is made with, two of each class."""

    target = {"digit": "0"}

    def __init__(self, answers):
        self.answers = np.array(answers)

    def marks(self, _):
        cells, names = tuple(Cell(c, {"digit": str(c)}) for c in range(3)), tuple("012")
        sure = np.eye(3)[self.answers]
        return Marks(
            cells,
            self.target,
            np.repeat(range(3), 2),
            np.tile((0, 1), 3),
            {"digit": sure},
            {"digit": names},
            np.zeros(6, bool),
        )


def test_a_class_model_must_draw_every_class() -> None:
    """Means hide a class that is never drawn: five of six answers are right, and one class only half the time."""
    assert BASE["digit"] == 0.9 and require_original(Said([0, 0, 1, 1, 2, 2]), None) == {
        "0": 1,
        "1, the worst of the rest": 1,
    }
    with pytest.raises(OriginalBelowFloor, match=r"0\.500 on 2, the worst of the rest \(needs 0\.90\)"):
        require_original(Said([0, 0, 1, 1, 2, 1]), None)
    with pytest.raises(OriginalBelowFloor, match=r"0\.500 on 0 \(needs 0\.90\)"):
        require_original(Said([0, 1, 1, 1, 2, 2]), None)


# -- the public data set's layout --------------------------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path):
    """Two styles x two objects x seven flat pictures whose brightness tells the number, and two untrained ViT judges."""
    transformers = pytest.importorskip("transformers")
    from PIL import Image

    for s, style in enumerate(("Blue_Ink", "Seed_Images")):
        for o, name in enumerate(("Cats", "Dogs")):
            folder = tmp_path / "data" / style / name
            folder.mkdir(parents=True)
            for number in range(1, 12):
                Image.new("RGB", (20, 16), (20 * number, 100 * s, 100 * o)).save(folder / f"{number}.png")
    for domain, names in (("style", ("Blue Ink", "Seed Images")), ("object", ("Cats", "Dogs"))):
        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=8,
            id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
        )  # fmt: skip
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "judges" / domain)
    return tmp_path


def test_the_public_layout_is_read_with_its_captions_and_reference_images(hub, bench: Bench) -> None:
    from expunge.benchmarks.hub_canvas import from_folders, read_canvas

    train, test = (read_canvas(hub / "data", (3, 8, 8), split) for split in ("train", "test"))
    assert len(test) == 4 * 5 and len(train) == 4 * 6
    assert train.caption(0, 1) == "A Dogs image in Blue Ink style."
    reds = (test.of(0, 0)[:, 0, 4, 4] + 1) * 127.5
    assert reds.round().tolist() == [20, 40, 60, 80, 100]  # numbers 1 to 5, not 1, 10, 11, 2, 3
    bench.original(0).save_pretrained(hub / "pipeline")
    pieces = from_folders(hub / "pipeline", hub / "data", hub / "judges")
    assert pieces.target("Blue_Ink Dogs") == {"style": "Blue_Ink", "object": "Dogs"}
    assert [judge.names for judge in pieces.judges] == [("Blue_Ink", "Seed_Images"), ("Cats", "Dogs")]
    assert all(judge.tested == 20 for judge in pieces.judges)
    with pytest.raises(JudgeBelowFloor, match="held-out real images"):  # untrained: its table is refused
        pieces.case("Blue_Ink")
    assert len(replace(pieces, floor=0.0).case("Blue_Ink").split("forget")) == 2 * 2
    with pytest.raises(BadSetting, match="--judges"):
        from_folders(hub / "pipeline", hub / "data", None)
    with pytest.raises(BadData, match="style/object/number.jpg"):
        read_canvas(hub / "pipeline", (3, 8, 8))
