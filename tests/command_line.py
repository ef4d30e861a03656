"""The command line as a user has it: a case's file, and a command in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from expunge.cli.main import app


def written(folder: Path, content: dict[str, Any]) -> Path:
    """case.yaml in a folder."""
    file = folder / "case.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def command(*arguments: Any, code: int = 0) -> str:
    """What a command prints; it must end with the code."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output
