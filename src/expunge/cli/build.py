"""From the checked file to live objects: `build_case(CaseFile)` gives the library's `Case`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from expunge.cases import Case, requests
from expunge.cases.data import Data, MapData, TensorData
from expunge.cases.feedback import own_samples, verify_independent
from expunge.cases.loading import find_function, load_data, load_model, load_tokenizer
from expunge.cases.pictures import load_pictures
from expunge.cases.text import load_text
from expunge.cli.config import CaseFile, ExamPlan, Recipe, Request, Table
from expunge.errors import BadData, BadRequest, nearest
from expunge.methods.stored import load_protected
from expunge.parts.objectives.adversarial import gan_training
from expunge.parts.plan import Optimizer, Training
from expunge.tasks import task as make_task


def build_case(file: CaseFile) -> Case:
    """Load model and data, resolve the request; every check of `Case` runs here, before any compute."""
    _importable(file.base)
    if file.model.embedded:
        return embedded(file).case
    model = _model(file)
    data, told = _own_samples(file, model) if file.data.judge else (_data(file, file.data, model), {})
    exam = (
        _judged(file, data) if file.audit.judge else None if file.audit.exam is None else _exam(file, file.audit.exam)
    )
    verify_independent(getattr(exam, "judge", None), told)
    return Case(
        model=model,
        data=data,
        test=None if file.test is None else _data(file, file.test, model),
        holdout=None if file.holdout is None else _data(file, file.holdout, model),
        request=_request(file, file.request),
        exam=exam,
        task=make_task({"name": file.task.name, **file.task.settings}),
        recipe=None if file.recipe is None else training(file.recipe, file.task.name),
        build=_fresh(file),
        name=file.name,
        seed=file.seeds.case,
        notes={"feedback": told} if told else {},
    )


def training(recipe: Recipe, kind: str = "") -> Training:
    """The recipe as the library's `Training`; of a GAN, with the discriminator as the generator's player."""
    if kind == "gan":
        return gan_training(recipe.epochs, recipe.batch_size, Optimizer(**recipe.optimizer.model_dump()))
    return Training(
        recipe.epochs, recipe.batch_size, Optimizer(**recipe.optimizer.model_dump()), schedule=recipe.schedule
    )


def _importable(base: str) -> None:
    """The YAML file's folder is looked in first; a module of that name from another case's folder is let go."""
    folder = str(Path(base).resolve())
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    for name, module in list(sys.modules.items()):
        own = Path(folder, f"{name}.py")
        if "." not in name and own.exists() and getattr(module, "__file__", None) != str(own):
            del sys.modules[name]
    importlib.invalidate_caches()


def _model(file: CaseFile) -> nn.Module:
    """A folder beside the case file, a hub id, or a function with its weights; or what `protect` has made of it."""
    spec = file.model
    if spec.factory:
        model = load_model(
            {"function": spec.factory, "weights": str(file.path(str(spec.weights))), "arguments": spec.settings}
        )
    else:
        model = load_model(str(file.path(spec.path)) if spec.path else str(spec.hub))
    return model if spec.protected is None else load_protected(model, file.path(spec.protected))


def _fresh(file: CaseFile) -> Callable[[], Any] | None:
    """A factory builds an untrained model as it is; other kinds are reset layer by layer."""
    if not file.model.factory:
        return None
    function, settings = find_function(file.model.factory), dict(file.model.settings)
    return lambda: function(**settings)


def embedded(file: CaseFile) -> Any:
    """The case about an embedded model, with its golds, trained where they are not kept yet."""
    from expunge.benchmarks.embedded import Embedded

    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        torch.set_num_threads(1)  # nets this small run three times slower on two threads than on one
    request, settings = file.request, dict(file.model.settings)
    if request is None or (request.concept is None and request.label is None):
        raise BadRequest(
            "expected a request {concept: words} or {label: class} to the embedded model, found another kind; for rows of your "
            "own give model and data"
        )
    if (request.label is None) != (file.model.embedded == "text"):
        raise BadRequest(
            f"expected a {'concept' if file.model.embedded == 'text' else 'label'} for the embedded {file.model.embedded} model, "
            "found the other; correct request or model.embedded"
        )
    return Embedded(request.concept, request.label, name=file.name, seed=file.seeds.case, settings=settings)


def golds(file: CaseFile, case: Case) -> dict[str, Any]:
    """Gold and floor where they are not trained by the case's recipe: the embedded model's, folders, or none."""
    named = file.audit.gold
    if file.model.embedded and named == "retrain":
        found = embedded(file)
        return {"gold": found.retrained(), "floor": found.retrained(second=True)}
    if file.path(named).is_dir():
        second = file.audit.second
        floor = None if second is None else load_model(str(file.path(second)))
        return {"gold": load_model(str(file.path(named))), "floor": floor}
    without = case.task.name == "diffusion" and case.recipe is None and named == "retrain"
    return {"gold": "none"} if without else {}


def _exam(file: CaseFile, plan: ExamPlan) -> Any:
    """The exam of a generative model of one's own."""
    from expunge.audits.metrics.answer_set import Cell
    from expunge.audits.metrics.exam import Exam
    from expunge.benchmarks.hub_canvas import folder_judges
    from expunge.tasks.sampling import Sampling

    cells = tuple(
        Cell(p["asks"], {d: str(p[d]) for d in plan.judges if d in p}, int(p.get("wording", 0))) for p in plan.prompts
    )
    found = folder_judges({d: file.path(folder) for d, folder in plan.judges.items()}, file.path(plan.held_out))
    return Exam(
        cells, plan.target, found.judges, tuple(range(plan.seeds)), Sampling(plan.steps, plan.guidance), found.features,
        found.feature_name, found.reference(plan.target), plan.floor,
        clip=None if plan.clip is None else file.path(plan.clip),
    )  # fmt: skip


def _pictures(file: CaseFile, spec: Table, model: Any) -> Data:
    """Images with captions or class numbers; a concept's rows are marked in the column `concept`."""
    if spec.path is None:
        raise BadData(
            f"expected data.path, a file or folder of images, found data.hub {spec.hub}; download it and give the file"
        )
    data = load_pictures(
        file.path(spec.path), model, image=spec.image, prompt=spec.caption, label=spec.label, split=spec.split
    )
    concept = file.request.concept if file.request is not None else None
    if concept is None:
        return data
    if model.kind != "text":
        raise BadRequest(
            f"expected a label or rows for a class-conditional model, found the concept '{concept}'; write request: {{label: 3}}"
        )
    asked = model.conditions.contains(data.column("input_ids"), concept)
    columns: dict[str, Any] = {name: data.column(name) for name in data.names}
    return TensorData(**columns, concept=asked.long())


def _own_samples(file: CaseFile, model: nn.Module) -> tuple[Data, dict[str, Any]]:
    """A GAN's own samples, split by the judge that the file names, and how that was done."""
    spec, request = file.data, file.request
    if file.task.name != "gan" or request is None or request.label is None:
        raise BadRequest(
            f"expected task: gan and request: {{label: class}} with data.judge, found task {file.task.name} and "
            f"{'no request' if request is None else 'another request'}; a judge splits a generator's samples by class"
        )
    task: Any = make_task({"name": "gan", **file.task.settings})
    return own_samples(
        model, find_function(str(spec.judge)), request.label, samples=spec.samples, threshold=spec.threshold,
        seed=file.seeds.case, task=task,
    )  # fmt: skip


def _judged(file: CaseFile, data: Data) -> Any:
    """Who scores what a GAN or a variational autoencoder draws; the real images that a GAN's are compared with are those of `test`."""
    from expunge.audits.metrics.class_samples import ClassExam
    from expunge.audits.metrics.gan import GanExam

    if file.task.name not in ("gan", "vae") or file.request is None or file.request.label is None:
        raise BadRequest(
            f"expected task: gan or vae, and request: {{label: class}}, with audit.judge, found task {file.task.name}; for diffusion "
            "describe audit.exam"
        )
    judge = find_function(str(file.audit.judge))
    if file.task.name == "vae":
        task: Any = make_task({"name": "vae", **file.task.settings})
        return ClassExam(judge, file.request.label, int(torch.as_tensor(data.column(task.labels)).max()) + 1, task=task)
    real = None if file.test is None else _data(file, file.test, None)
    named: dict[str, Any] = {} if real is None else {"reference": real.column("inputs")}
    if real is not None and "labels" in real.names:
        named["labels"] = real.column("labels")
    return GanExam(judge, file.request.label, **named)


def _data(file: CaseFile, spec: Table, model: Any) -> Data:
    if file.task.name == "language":
        return _texts(file, spec)
    if file.task.name == "diffusion":
        return _pictures(file, spec, model)
    data = load_data(str(file.path(spec.path)) if spec.path else str(spec.hub), split=spec.split)
    if spec.columns:
        data = _renamed(data, spec.columns)
    if spec.transform:
        data = find_function(spec.transform)(data)
        if not isinstance(data, Data):
            raise BadData(
                f"expected {spec.transform} to return a Data, found {type(data).__name__}; wrap it with as_data"
            )
    return data


def _texts(file: CaseFile, spec: Table) -> Data:
    """Questions and answers, or plain text, in the tokens of the model's own tokenizer."""
    about = spec.text
    source = file.model.tokenizer or file.model.path or file.model.hub
    if source is None:
        raise BadData("expected a tokenizer for the texts, found none; add model.tokenizer: folder or hub id")
    if spec.path is None:
        raise BadData(
            f"expected data.path, a file or folder of texts, found data.hub {spec.hub}; download it and give the file"
        )
    local = file.path(source)
    tokenizer = load_tokenizer(local if local.is_dir() else source)
    lines = file.path(about.refusals).read_text("utf-8").splitlines() if about.refusals else []
    return load_text(
        file.path(spec.path), tokenizer, question=about.question, answer=about.answer, text=about.text,
        template=about.template, window=about.window, max_length=about.max_length,
        refusals=[line.strip() for line in lines if line.strip()],
    )  # fmt: skip


def _renamed(data: Data, columns: dict[str, str]) -> Data:
    """columns: task's name -> file's name. Columns that are not named keep their names."""
    for theirs in columns.values():
        if theirs not in data.names:
            raise BadData(f"expected a column '{theirs}', found {', '.join(data.names)}.{nearest(theirs, data.names)}")
    ours = {theirs: name for name, theirs in columns.items()}
    if isinstance(data, TensorData):
        return TensorData(shared=data.shared, **{ours.get(k, k): v for k, v in data.columns.items()})
    if isinstance(data, MapData):
        read = data.columns
        return MapData(data.dataset, lambda example: {ours.get(k, k): v for k, v in read(example).items()})
    raise BadData(f"expected rows that can be renamed, found {type(data).__name__}; rename in a transform instead")


def _request(file: CaseFile, spec: Request | None) -> requests.Request:
    if spec is None:
        return requests.none()
    if spec.label is not None:
        return requests.label(spec.label)
    if spec.where is not None:
        return requests.where(*spec.where)
    if spec.concept is not None:
        return requests.where("concept", "==", 1)
    if isinstance(spec.samples, str):
        path = file.path(spec.samples)
        try:
            return requests.samples(int(word) for word in path.read_text("utf-8").replace(",", " ").split())
        except (OSError, ValueError) as error:
            raise BadRequest(
                f"expected row numbers in the text file {path.name}, one per line, found {error}; correct the file"
            ) from error
    return requests.samples(spec.samples or [])
