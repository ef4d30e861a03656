"""case.yaml: what it accepts, what it refuses and in which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from expunge.cli.config import apply_overrides, check_case, parse_value, read_case, save_case
from expunge.errors import BadSetting

GOOD = {
    "model": {"factory": "m:f", "weights": "w.safetensors"},
    "data": "train.npz",
    "request": {"label": 3},
    "method": "salun",
}


def test_short_forms_are_the_long_ones():
    case = check_case(GOOD)
    assert case.data.path == "train.npz" and case.method.name == "salun" and case.task.name == "classification"
    assert check_case(GOOD | {"seeds": 7}).seeds.audit == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metod": "ssd"}, ["'metod'", "Did you mean 'method'?"]),
        ({"recipe": {"epoch": 3}}, ["'recipe.epoch'", "Did you mean 'epochs'?"]),
        ({"recipe": {"optimizer": {"name": "sgd", "momntum": 0.9}}}, ["optimizer", "Did you mean 'momentum'?"]),
        ({"data": {"path": "a.npz", "colums": {}}}, ["'data.colums'", "Did you mean 'columns'?"]),
        ({"request": {"label": 3, "samples": [1]}}, ["request", "expected one of samples, label, where"]),
        ({"request": {"where": ["age", "<"]}}, ["request.where"]),
        ({"model": {"factory": "m:f"}}, ["factory and weights together"]),
        ({"model": {"path": "a", "hub": "b"}}, ["expected one of path, hub, factory, embedded, found path, hub"]),
        ({"floor": 2}, ["floor", "less than or equal to 1"]),
        ({"name": "../up"}, ["name", "names the run's folder"]),
        ({"recipe": {"epochs": 0}}, ["recipe.epochs", "greater than or equal to 1"]),
    ],
)
def test_what_is_wrong_is_said(change, words):
    with pytest.raises(BadSetting) as error:
        check_case(GOOD | change)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_every_problem_at_once():
    with pytest.raises(BadSetting) as error:
        check_case({"modle": {}, "request": {}, "data": "x"})
    text = str(error.value)
    assert "modle" in text and "model: expected a value" in text and "request" in text


def test_overrides_are_yaml_in_dotted_paths():
    content = {"method": "salun", "recipe": {"epochs": 3}}
    apply_overrides(content, ["method.density=0.3", "recipe.epochs=5", "request.samples=[1, 2]", "floor=null"])
    assert content == {
        "method": {"name": "salun", "density": 0.3},
        "recipe": {"epochs": 5},
        "request": {"samples": [1, 2]},
        "floor": None,
    }
    with pytest.raises(BadSetting, match="key=value"):
        apply_overrides({}, ["method"])


def test_an_exponent_is_a_number():
    assert parse_value("1e-4") == 1e-4 and parse_value("5E3") == 5000.0 and parse_value("1e") == "1e"


def test_a_stored_case_reads_back_the_same(tmp_path: Path):
    (tmp_path / "case.yaml").write_text(
        "model: {path: net}\ndata: d.npz\nrequest: {where: [age, '<', 3]}\nmethod: {name: ssd, alpha: 5}\nfloor: null\n"
    )
    case = read_case(tmp_path / "case.yaml")
    run = tmp_path / "runs" / "x"
    again = read_case(save_case(case, run))
    assert again.path("net").resolve() == case.path("net").resolve()
    assert again.run_folder.resolve() == run.resolve()
    assert again.method.settings == {"alpha": 5} and again.floor is None
    drop = {"base", "out"}
    assert again.model_dump(exclude=drop) == case.model_dump(exclude=drop)


@pytest.mark.parametrize("text", ["[1, 2]", "model: {", "\tname: x"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str):
    (tmp_path / "case.yaml").write_text(text)
    with pytest.raises(BadSetting):
        read_case(tmp_path / "case.yaml")
    with pytest.raises(BadSetting, match="check the path"):
        read_case(tmp_path / "none.yaml")


def test_curves_have_a_short_form_and_limits(tmp_path: Path):
    assert check_case(GOOD | {"curves": 5}).curves.every == 5 and check_case(GOOD).curves is None
    case = check_case(GOOD | {"curves": {"of": ["forget.loss"], "rows": 64}})
    assert case.curves.of == ("forget.loss",) and read_case(save_case(case, tmp_path)).curves == case.curves
    with pytest.raises(BadSetting, match="Did you mean 'every'"):
        check_case(GOOD | {"curves": {"evry": 3}})
