"""The main job on images: the example's case file, on the embedded model cut to ten training steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

from expunge.cli.config import check_case
from expunge.cli.main import app
from expunge.records.results import Results

EXAMPLE = Path(__file__).parents[2] / "examples" / "erase.yaml"
SMALL = [
    "model={embedded: text, settings: {steps: 10, channels: [8, 16], rows: 20, answers: 2, sampling_steps: 3}}", "method.steps=2",
    "method.batch_size=2", "method.sampling_steps=3", "audit.attacks=[pruning_20]",
    "audit.checks=[generation_accuracy, forget_score, pruning_20]",
]  # fmt: skip


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_the_example_erases_a_style_and_leaves_an_ordinary_pipeline(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    out = tmp_path / "run"
    said = invoke("run", EXAMPLE, *SMALL, "--out", out)
    assert "generation_accuracy: ua" in said and "verdict" in said and "pruning_20" in said
    pipeline = DiffusionPipeline.from_pretrained(out / "model", local_files_only=True)
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    results = Results.load(out / "results.json")
    assert results.find("ua", "forget") is not None and results.find("ira", "retain") is not None
    page = (out / "report.html").read_text("utf-8")
    assert [f.name for f in (out / "pictures").iterdir()] == ["kept.png"]  # of what stays alone
    assert page.count("data:image/png;base64,") == 1 and "What must stay" in page
    again = invoke("audit", out, "--no-attacks", "--checks", "generation_accuracy")  # from the folder alone
    assert "generation_accuracy: ua" in again


def test_a_diffusion_case_without_a_model_is_about_the_embedded_one() -> None:
    words = check_case({"task": "diffusion", "request": {"concept": "red"}})
    assert words.model.embedded == "text" and words.data.embedded
    assert check_case({"task": {"name": "diffusion"}, "request": {"label": 3}}).model.embedded == "class"
    own = check_case(
        {"task": "diffusion", "model": "folder", "data": {"path": "p", "caption": "text"}, "request": {"concept": "x"}}
    )
    assert own.model.path == "folder" and own.data.caption == "text"


def test_requests_of_the_wrong_kind_are_told(tmp_path: Path) -> None:
    for override in ("request={where: [style, '==', 1]}", "model={embedded: class}"):
        result = CliRunner().invoke(app, ["validate", str(EXAMPLE), override])
        assert result.exit_code == 2 and "expected a" in result.output
