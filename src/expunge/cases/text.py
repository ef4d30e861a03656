"""Text as a table of token rows of different lengths, each a prompt and its answer, padded only within a batch.

    question_answer(tokenizer, questions, answers, author=authors)      prompts are masked, the end of an answer is not
    plain_text(tokenizer, texts, window=512)                            windows of a text, every token is an answer

Prompt and answer are tokenised apart and joined, so that no token straddles the boundary and the prompt's tokens are the
same with and without its answer.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.cases.data import Data
from expunge.cases.tables import read_columns
from expunge.errors import BadData
from expunge.tasks.base import Batch
from expunge.tasks.language import padded

TEMPLATE = "Question: {question}\nAnswer: "
"""The prompt of TOFU for models without a chat format of their own."""
Template = str | Callable[[str], str] | None


class TextData(Data):
    """Token rows. Row i is `tokens[i]`, of which the first `starts[i]` are the prompt.

    tokenizer: of transformers, for texts and the special tokens; None where tokens are all there is.
    columns: name -> one entry per row; numbers go into batches, texts only answer `column(name)` (requests, reports).
    refusals: token rows that decline to answer. alternates: for each row, token rows of other answers to its prompt.
    """

    def __init__(
        self,
        tokens: Sequence[Sequence[int]],
        starts: Sequence[int],
        tokenizer: Any = None,
        *,
        refusals: Sequence[Sequence[int]] = (),
        alternates: Sequence[Sequence[Sequence[int]]] | None = None,
        pad: int | None = None,
        **columns: Any,
    ):
        self.tokens = [list(map(int, row)) for row in tokens]
        self.starts, self.tokenizer = list(map(int, starts)), tokenizer
        self.refusals = [list(map(int, row)) for row in refusals]
        self.alternates = None if alternates is None else [[list(map(int, a)) for a in own] for own in alternates]
        self.pad = pad if pad is not None else padding_token(tokenizer)
        self._columns = {name: _column(name, values, len(self.tokens)) for name, values in columns.items()}
        empty = [
            i for i, (row, start) in enumerate(zip(self.tokens, self.starts, strict=True)) if len(row) <= max(start, 1)
        ]
        if empty:
            raise BadData(
                f"expected every row to have at least one token to predict, found {len(empty)} without (rows {empty[:5]}); "
                "drop rows with empty answers or texts of a single token"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def names(self) -> list[str]:
        return ["input_ids", "labels", *self._columns]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.tokens]

    def fetch(self, ids: Tensor) -> Batch:
        rows = ids.tolist()
        columns: dict[str, Any] = padded([self.tokens[i] for i in rows], [self.starts[i] for i in rows], self.pad)
        columns |= {name: values[ids] for name, values in self._columns.items() if isinstance(values, Tensor)}
        columns["_pad"] = self.pad
        if self.refusals:
            columns["_refusals"] = self.refusals
        if self.alternates is not None:
            columns["_alternates"] = self.alternates
        return Batch(ids, columns)

    def column(self, name: str) -> Tensor | list[Any]:
        if name == "input_ids":
            return self.tokens
        if name == "labels":
            return [row[start:] for row, start in zip(self.tokens, self.starts, strict=True)]
        if name not in self._columns:
            raise BadData(f"expected a column among {self.names}, found '{name}'; use one of them")
        return self._columns[name]

    def row_digests(self, ids: Tensor | Sequence[int]) -> list[str]:
        digests = []
        for i in torch.as_tensor(ids).tolist():
            hasher = hashlib.sha256(f"{self.starts[i]}:".encode())
            hasher.update(torch.tensor(self.tokens[i], dtype=torch.int64).numpy().tobytes())
            digests.append(hasher.hexdigest())
        return digests

    def telling_rows(self) -> Tensor:
        """The first rows, the shortest, the longest and the one with the largest token: what one forward should see to find
        rows that do not fit (a tokenizer of another model is found wherever its tokens are)."""
        order = sorted(range(len(self)), key=lambda i: len(self.tokens[i]))
        largest = max(range(len(self)), key=lambda i: max(self.tokens[i]))
        return torch.tensor(sorted({*range(min(4, len(self))), order[0], order[-1], largest}))

    def save_beside(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    # -- texts -----------------------------------------------------------------------------------------------------
    def prompt_ids(self, ids: Tensor | Sequence[int] | None = None) -> list[list[int]]:
        """Prompts as tokens, of all rows or of some."""
        rows = range(len(self)) if ids is None else torch.as_tensor(ids).tolist()
        return [self.tokens[i][: self.starts[i]] for i in rows]

    def answer_ids(self, ids: Tensor | Sequence[int] | None = None) -> list[list[int]]:
        """Answers as tokens, their end included."""
        rows = range(len(self)) if ids is None else torch.as_tensor(ids).tolist()
        return [self.tokens[i][self.starts[i] :] for i in rows]

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones left out."""
        if self.tokenizer is None:
            raise BadData("expected a tokenizer to write tokens as text, found none; pass TextData(..., tokenizer)")
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    @property
    def end(self) -> int | None:
        """The token that ends an answer."""
        return None if self.tokenizer is None else self.tokenizer.eos_token_id

    def subset(self, ids: Sequence[int] | Tensor) -> TextData:
        """These rows as a table of their own; row numbers begin again."""
        rows = torch.as_tensor(ids).tolist()
        columns = {n: v[rows] if isinstance(v, Tensor) else [v[i] for i in rows] for n, v in self._columns.items()}
        return TextData(
            [self.tokens[i] for i in rows], [self.starts[i] for i in rows], self.tokenizer, refusals=self.refusals,
            alternates=None if self.alternates is None else [self.alternates[i] for i in rows], pad=self.pad, **columns,
        )  # fmt: skip


def question_answer(
    tokenizer: Any,
    questions: Sequence[str],
    answers: Sequence[str],
    *,
    template: Template = None,
    max_length: int | None = None,
    refusals: Sequence[str] = (),
    alternates: Sequence[Sequence[str]] | None = None,
    **columns: Any,
) -> TextData:
    """A table of questions and answers.

    Args:
        template: the prompt as a text with {question}, or a function of the question; `"chat"`: the tokenizer's chat
            template; default: the chat template where there is one, else "Question: ...\\nAnswer: ".
        max_length: longest row in tokens; longer answers are cut (their end is then not learned), and a prompt that
            leaves no room for an answer is an error.
        refusals: answers that decline. alternates: for each question, other answers.
        columns: further columns, e.g. author=[...].
    """
    if len(questions) != len(answers):
        raise BadData(f"expected one answer for each question, found {len(questions)} and {len(answers)}; pair them")
    empty = [i for i, text in enumerate(answers) if not str(text).strip()]
    if empty:
        raise BadData(f"expected answers with text, found {len(empty)} empty ones (rows {empty[:5]}); drop these rows")
    ask = _prompter(tokenizer, template)
    prompts = [encode(tokenizer, ask(question)) for question in questions]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    endings = [encode(tokenizer, text) + end for text in answers]
    if max_length is not None:
        long = [i for i, p in enumerate(prompts) if len(p) >= max_length]
        if long:
            raise BadData(
                f"expected prompts below {max_length} tokens, found {len(long)} longer ones (rows {long[:5]}); raise max_length "
                "(up to the model's context) or drop these rows"
            )
        endings = [a[: max_length - len(p)] for p, a in zip(prompts, endings, strict=True)]
    return TextData(
        [p + a for p, a in zip(prompts, endings, strict=True)], [len(p) for p in prompts], tokenizer,
        refusals=[encode(tokenizer, line) + end for line in refusals],
        alternates=None if alternates is None else [[encode(tokenizer, a) + end for a in own] for own in alternates],
        zlib_bytes=[compressed_bytes(text) for text in answers], **columns,
    )  # fmt: skip


def plain_text(
    tokenizer: Any, texts: Sequence[str], *, window: int = 512, smallest: int = 8, **columns: Any
) -> TextData:
    """Texts cut into windows of tokens; every token is learned. Windows never reach over two texts, so that a row is of
    one text (column `document`: its number); a last window below `smallest` tokens joins no row. columns: one per text."""
    if window < 2:
        raise BadData(
            f"expected a window of at least 2 tokens, found {window}; a token is predicted from those before it"
        )
    rows, document, size = [], [], []
    for number, text in enumerate(texts):
        tokens = encode(tokenizer, text)
        for start in range(0, len(tokens), window):
            piece = tokens[start : start + window]
            if len(piece) >= min(smallest, window) or (start == 0 and len(piece) > 1):
                rows.append(piece)
                document.append(number)
                size.append(compressed_bytes(tokenizer.decode(piece)))
    if not rows:
        raise BadData(f"expected texts of at least 2 tokens, found none in {len(texts)} texts; pass longer texts")
    spread: dict[str, Any] = {name: [values[i] for i in document] for name, values in columns.items()}
    return TextData(rows, [0] * len(rows), tokenizer, document=document, zlib_bytes=size, **spread)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text, without the special ones that a tokenizer puts around whole inputs."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # quiet about a context's length


def padding_token(tokenizer: Any) -> int:
    """The tokenizer's padding token, else its end token, else 0: padding is masked, so any token will do."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def compressed_bytes(text: str) -> int:
    """Length of the text after zlib, what the zlib membership score divides by."""
    return len(zlib.compress(text.encode("utf-8")))


def _prompter(tokenizer: Any, template: Template) -> Callable[[str], str]:
    own = getattr(tokenizer, "chat_template", None)
    if template == "chat" and not own:
        raise BadData(
            "expected a tokenizer with a chat template, found one without; pass template='Question: {question}\\nAnswer: ' or "
            "set tokenizer.chat_template"
        )
    if template == "chat" or (template is None and own):
        return lambda question: tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    if callable(template):
        return template
    form = TEMPLATE if template is None else template
    if "{question}" not in form:
        raise BadData(f"expected a template with {{question}} in it, found {form!r}; say where the question goes")
    return lambda question: form.replace("{question}", question)


def _column(name: str, values: Any, rows: int) -> Tensor | list[Any]:
    if len(values) != rows:
        raise BadData(f"expected {rows} entries in the column '{name}', found {len(values)}; give one for each row")
    if isinstance(values, Tensor):
        return values
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return torch.tensor(values) if numbers and rows else list(values)


def load_text(
    source: str | os.PathLike[str],
    tokenizer: Any,
    *,
    question: str = "question",
    answer: str = "answer",
    text: str = "text",
    template: Template = None,
    window: int = 512,
    max_length: int | None = None,
    refusals: Sequence[str] = (),
) -> TextData:
    """A text table from a file or a folder.

    Args:
        source: .jsonl, .json (lines), .csv, .tsv or .parquet with the columns `question` and `answer`, or `text`; a .txt
            file, or a folder of them, each one text.
        window: tokens of a row of plain text. The other settings are those of `question_answer`. Further columns of the
            file stay as columns (for requests by predicate).
    """
    path = Path(source).expanduser()
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(f.is_file() for f in files):
        raise BadData(f"expected a file of texts at '{source}', or a folder of .txt files, found none; check the path")
    if files[0].suffix == ".txt":
        texts = [f.read_text(encoding="utf-8") for f in files]
        return plain_text(tokenizer, texts, window=window, file=[f.stem for f in files])
    columns = read_columns(files[0])
    rest: dict[str, Any] = {n: v for n, v in columns.items() if n not in (question, answer, text) and _plain(v)}
    if question in columns and answer in columns:
        return question_answer(
            tokenizer, list(map(str, columns[question])), list(map(str, columns[answer])), template=template,
            max_length=max_length, refusals=refusals, **rest,
        )  # fmt: skip
    if text in columns:
        return plain_text(tokenizer, list(map(str, columns[text])), window=window, **rest)
    raise BadData(
        f"expected the columns '{question}' and '{answer}', or '{text}', in {files[0].name}, found {', '.join(columns)}; name "
        "yours: question=..., answer=..., text=..."
    )


def _plain(values: Sequence[Any]) -> bool:
    return all(isinstance(v, (int, float, str)) for v in values)
