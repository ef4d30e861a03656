"""case.yaml: one deletion request and how to serve it, as data. Needs no torch; `expunge.cli.build` makes it live.

    name: digits-threes
    model: {factory: "models:small_net", weights: digits.safetensors}   # or {path: folder}, or {hub: org/name}
    data: train.npz                          # or {path: train.npz, columns: {inputs: pixels, labels: digit}}
    test: test.npz
    request: {label: 3}                      # or {samples: [1, 5]}, {samples: ids.txt}, {where: [age, "<", 30]}
    recipe: {epochs: 30, batch_size: 64, optimizer: {name: sgd, lr: 0.05, momentum: 0.9}}
    method: {name: salun, density: 0.5}

    task: diffusion                          # without a model: an embedded one, on its own images
    request: {concept: red}
    method: {name: esd, concept: red}

Every mapping refuses unknown keys and suggests the nearest known one. `key=value` overrides go by dotted paths
(`method.density=0.3`). Relative paths are relative to the YAML file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from expunge.errors import BadSetting, nearest


class Section(BaseModel):
    """A mapping of the file. short: the key that a bare string stands for (`method: salun` is `{name: salun}`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    short: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: Any) -> Any:
        return {cls.short: value} if cls.short and isinstance(value, (str, int)) else value


class Model(Section):
    """Where the trained model is: a folder, a hub id, or a function that builds it plus its weights; or an embedded one."""

    short = "path"
    path: str | None = None
    hub: str | None = None
    embedded: Literal["text", "class"] | None = Field(
        default=None, description="a small diffusion model trained on digits: of styles in words, or of classes"
    )
    factory: str | None = Field(default=None, description="module:function that builds the network")
    weights: str | None = Field(default=None, description="safetensors file with the network's weights")
    settings: dict[str, Any] = Field(default={}, description="keywords of the factory, or of the embedded model")
    tokenizer: str | None = Field(default=None, description="folder or hub id; default: the model's")
    protected: str | None = Field(default=None, description="folder of a model that 'expunge protect' has trained")

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        given = [name for name in ("path", "hub", "factory", "embedded") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"expected one of path, hub, factory, embedded, found {', '.join(given) or 'none'}")
        if bool(self.weights) != bool(self.factory):
            raise ValueError("expected factory and weights together: a function that builds and a file that fills")
        return self


class Text(Section):
    """How a table of a language case becomes tokens (`expunge.cases.text.load_text`)."""

    question: str = "question"
    answer: str = "answer"
    text: str = Field(default="text", description="the column of plain text, where there are no questions")
    template: str | None = Field(
        default=None, description="the prompt with {question}, or chat; default: the tokenizer's"
    )
    window: int = Field(default=512, ge=2, description="tokens of a row of plain text")
    max_length: int | None = Field(default=None, ge=2, description="longest row in tokens")
    refusals: str | None = Field(default=None, description="a text file with one refusal per line")


class Table(Section):
    """Rows: a file (npz, csv, tsv, jsonl, parquet), a folder, or a name (of EXPUNGE_DATA, else of the hub)."""

    short = "path"
    path: str | None = None
    hub: str | None = None
    split: str = Field(default="train", description="which part of a folder or a hub data set")
    columns: dict[str, str] = Field(
        default={}, description="the task's column: the file's column, e.g. {inputs: pixels}"
    )
    transform: str | None = Field(default=None, description="module:function of a Data that returns a Data")
    text: Text = Text()
    image: str = Field(default="image", description="diffusion: the column of images")
    caption: str = Field(default="caption", description="diffusion: the column of prompts")
    label: str = Field(default="label", description="diffusion: the column of class numbers")
    embedded: bool = Field(default=False, description="the embedded model's own images")
    judge: str | None = Field(
        default=None,
        description="gan: module:function, images -> probabilities; rows are the model's own samples, judged",
    )
    samples: int = Field(default=5000, ge=2, description="gan: how many of them")
    threshold: float = Field(
        default=0.5, gt=0, le=1, description="gan: probability from which a sample shows request.label"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Table:
        if sum(map(bool, (self.path, self.hub, self.embedded, self.judge))) != 1:
            raise ValueError("expected one of path, hub (or judge, for a GAN)")
        return self


class Request(Section):
    """What must go. samples: row numbers, or a text file with one per line."""

    samples: list[int] | str | None = None
    label: int | None = None
    where: list[Any] | None = Field(default=None, min_length=3, max_length=3)
    concept: str | None = Field(default=None, description="words: every row whose prompt holds them")

    @model_validator(mode="after")
    def _one_kind(self) -> Request:
        given = [name for name in ("samples", "label", "where", "concept") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of samples, label, where, concept, found {', '.join(given) or 'none'}")
        return self


class Stepper(Section):
    """The fields of `expunge.Optimizer`."""

    short = "name"
    name: str = "sgd"
    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: str = "constant"
    milestones: tuple[int, ...] = ()
    decay: float = 0.1
    warmup: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)


class Recipe(Section):
    """How the model was trained, and so how `retrained` is: the fields of `expunge.Training`."""

    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=64, ge=1)
    optimizer: Stepper = Stepper(lr=0.1, momentum=0.9)
    schedule: str | None = None


class Measuring(Section):
    """What is measured while the method runs: the fields of `expunge.Curves`."""

    short = "every"
    every: int = Field(default=10, ge=1, description="updates between two measurements")
    of: tuple[str, ...] = Field(
        default=("forget.loss", "forget.utility", "retain.loss", "retain.utility"), description="split.measurement"
    )
    rows: int = Field(default=1000, ge=1, description="of each split, one fixed sample")


class Named(Section):
    """A name with settings of its own; who owns the name checks the settings."""

    model_config = ConfigDict(extra="allow", frozen=True)
    short = "name"
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ExamPlan(Section):
    """What a generative model is asked and who judges it. prompts: {asks: ..., style: red, object: three} each, where the names
    are the judges'. judges: domain -> folder of an image classifier (transformers), which `held_out` images of known kinds try.
    """

    prompts: list[dict[str, Any]] = Field(min_length=2)
    target: dict[str, str] = Field(min_length=1)
    judges: dict[str, str] = Field(min_length=1)
    held_out: str = Field(description="folder of real images, <name of the first domain>/<of the second>/<number>.jpg")
    seeds: int = Field(default=5, ge=1, description="images of each prompt")
    steps: int = Field(default=50, ge=1)
    guidance: float = Field(default=7.5, ge=0, description="in diffusers' convention")
    floor: float = Field(default=0.97, gt=0, le=1, description="least held-out accuracy of a judge")
    clip: str | None = Field(default=None, description="folder of a CLIP model, for its score")


class AuditPlan(Section):
    """checks: names, or {name: ..., settings}, or a mapping of names to settings; all that fit by default. gold: what `retrained` is:
    how it is made, none, or a folder; second: the folder of another seed of it. exam: of a generative model. attacks: all, none
    (false), or names, or {name: ..., settings}. budget: of all attacks."""

    checks: list[str | Named] | dict[str, dict[str, Any] | None] | None = None
    gold: str = "retrain"
    second: str | None = None
    exam: ExamPlan | None = None
    judge: str | None = Field(
        default=None,
        description="gan, vae: module:function that scores what it draws; another than data.judge, which filters",
    )
    attacks: bool | list[str | Named] = True
    budget: dict[str, Any] = Field(default={}, description="what each attack may spend, e.g. {steps: 10}")
    shadows: int = Field(default=0, ge=0, description="models per ensemble for the checks that need distributions")
    profile: str | None = Field(default=None, description="a checklist to run as well: open_problems, generation")
    reruns: int = Field(
        default=0, ge=0, description="further runs for each of the checklist's rows on streams and seeds"
    )

    def chosen(self) -> dict[str, Any]:
        """What `expunge.audit` takes."""
        return self.asked() | {
            "gold": self.gold,
            "shadows": self.shadows,
            "profile": self.profile,
            "reruns": self.reruns,
        }

    def asked(self) -> dict[str, Any]:
        """What `expunge.audits.asked.asked` takes."""

        def plain(specs: Any) -> Any:
            return [s if isinstance(s, str) else {"name": s.name, **s.settings} for s in specs]

        return {
            "checks": plain(self.checks) if isinstance(self.checks, list) else self.checks,
            "attacks": plain(self.attacks) if isinstance(self.attacks, list) else self.attacks,
            "budget": self.budget,
        }


class Seeds(Section):
    """One number for all, or one for each: case (how test is halved), unlearning, audit (gold, attacks, bootstrap)."""

    case: int = 0
    unlearning: int = 0
    audit: int = 0

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: Any) -> Any:
        return dict.fromkeys(("case", "unlearning", "audit"), value) if isinstance(value, int) else value


class CaseFile(Section):
    """The whole file. base: the folder that relative paths are relative to; default: the YAML file's own."""

    name: str = "case"
    model: Model
    data: Table
    samples: bool = Field(default=False, description="contact sheets of what was to be forgotten as well")
    test: Table | None = None
    holdout: Table | None = None
    task: Named = Named(name="classification")
    request: Request | None = None
    recipe: Recipe | None = None
    method: Named | None = None
    audit: AuditPlan = AuditPlan()
    seeds: Seeds = Seeds()
    curves: Measuring | None = None
    state: str | None = Field(
        default=None, description="folder of `expunge prepare`, or of an earlier run of a method that keeps something"
    )
    floor: float | None = Field(
        default=0.5, gt=0, le=1, description="share of utility that must stay; null for no floor"
    )
    out: str | None = None
    base: str = "."

    @model_validator(mode="before")
    @classmethod
    def _embedded(cls, value: Any) -> Any:
        """A diffusion case without a model is about the embedded one, and about its own images."""
        task = value.get("task") if isinstance(value, Mapping) else None
        if (task.get("name") if isinstance(task, Mapping) else task) != "diffusion":
            return value
        request, found = value.get("request"), dict(value)
        kind = "class" if isinstance(request, Mapping) and request.get("label") is not None else "text"
        found.setdefault("model", {"embedded": kind})
        if isinstance(found["model"], Mapping) and found["model"].get("embedded"):
            found.setdefault("data", {"embedded": True})
        return found

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.-]+", value):
            raise ValueError("expected letters, digits, '.', '_' and '-' (it names the run's folder)")
        return value

    @property
    def run_folder(self) -> Path:
        """`out` beside the file, or runs/<name> where the command is called."""
        return self.path(self.out) if self.out else Path("runs") / self.name

    def path(self, value: str) -> Path:
        return Path(self.base) / Path(value).expanduser()


# -- reading -----------------------------------------------------------------------------------------------------------
class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as text, which nobody who writes a learning rate means."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_case(file: str | os.PathLike[str], overrides: Iterable[str] = ()) -> CaseFile:
    """The file with its overrides, checked. Every problem is told in one `BadSetting`."""
    path = Path(file)
    try:
        content = yaml.load(path.read_text("utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(
            f"expected a case file at {path}, found none that can be read ({error}); check the path"
        ) from error
    except yaml.YAMLError as error:
        raise BadSetting(f"expected YAML in {path.name}, found a syntax error: {error}; correct that line") from error
    if not isinstance(content, dict):
        raise BadSetting(
            f"expected a mapping with model, data, request, ... in {path.name}, found {type(content).__name__}"
        )
    apply_overrides(content, overrides)
    base = Path(content.get("base") or ".")
    content["base"] = str(base if base.is_absolute() else path.parent / base)
    return check_case(content, path.name)


def apply_overrides(content: dict[str, Any], overrides: Iterable[str]) -> None:
    """Set `a.b=value` in place; values are read as YAML."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise BadSetting(f"expected overrides as key=value, found '{text}'; write e.g. method.density=0.3")
        *parents, last = key.split(".")
        place: Any = content
        for depth, name in enumerate(parents):
            if isinstance(place.get(name), str):  # a short form, e.g. method: salun
                place[name] = {_short(parents[: depth + 1]): place[name]}
            elif not isinstance(place.get(name), Mapping):
                place[name] = {}
            place = place[name]
        place[last] = parse_value(value)


def parse_value(text: str) -> Any:
    """One value as YAML spells it."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise BadSetting(f"expected a value as YAML spells it, found {text!r}; quote it") from error


def check_case(content: Mapping[str, Any], source: str = "the case") -> CaseFile:
    """A checked case from a mapping; one `BadSetting` with every problem, unknown keys with the nearest known."""
    try:
        return CaseFile.model_validate(content)
    except ValidationError as error:
        problems = list(dict.fromkeys(_sentence(item) for item in error.errors()))
        raise BadSetting(
            f"expected a case file that fits its schema, found in {source}:\n- " + "\n- ".join(problems)
        ) from error


def save_case(case: CaseFile, folder: Path) -> Path:
    """Keep the case in the run's folder, so that `expunge audit RUN` finds it; `base` then points back, relatively."""
    from expunge.files import write_atomic

    content = case.model_dump(exclude_none=True)
    base = Path(case.base).resolve()
    content["base"], content["out"] = os.path.relpath(base, folder.resolve()), os.path.relpath(folder.resolve(), base)
    content["floor"] = case.floor
    for name in ("method", "task"):
        if name in content:
            content[name] = {"name": getattr(case, name).name, **getattr(case, name).settings}
    return write_atomic(folder / "case.yaml", yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True))


def _sentence(item: Any) -> str:
    where = ".".join(map(str, item["loc"])) or "the file"
    if item["type"] == "extra_forbidden":
        *parents, last = item["loc"]
        known = list(_section(parents).model_fields)
        place = f" of {'.'.join(map(str, parents))}" if parents else ""
        return f"unknown key '{where}': expected a key{place} among {', '.join(known)}.{nearest(str(last), known)}"
    if item["type"] == "missing":
        return f"{where}: expected a value, found none; add it"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}; found {item['input']!r}"[:400]


def _section(path: Iterable[Any]) -> type[BaseModel]:
    """The section's class at a path of keys."""
    found: type[BaseModel] = CaseFile
    for name in path:
        annotation = found.model_fields[str(name)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        found = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), found)
    return found


def _short(path: list[str]) -> str:
    try:
        section = _section(path)
    except KeyError:
        return "name"
    return getattr(section, "short", "") or "name"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
