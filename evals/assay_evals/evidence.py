"""Evidence: the raw measurements of one run, from which its verdict can be recomputed.

    evidence/
      evidence.json    what was compared, on which text and machine, by which recipe; digests of the two files below
      quality.jsonl    one JSON object a line: a window of text, a cloze question, a continuation, a structured output, an item of a task
                       or what an encoder made of a text
      speed.jsonl      one JSON object a line: a fresh process

A measurement that is not a finite number is kept as null, here None: it never passes for a number, and the gate makes
the run INVALID. This module only keeps and checks the form; what the numbers mean is the gate's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from assay.errors import IntegrityError
from assay.files import atomic_directory, readable_json, sha256_bytes
from assay.recipe import Evaluate, Gate

EVIDENCE_VERSION = 1
HEADER_NAME = "evidence.json"
QUALITY_NAME = "quality.jsonl"
SPEED_NAME = "speed.jsonl"

Measured = Annotated[float, Field(allow_inf_nan=False)] | None
_STRICT = ConfigDict(extra="forbid", strict=True)
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class RecipeUsed:
    """The recipe that asked: its gate and its samples were fixed before anything was measured."""

    __pydantic_config__ = _STRICT
    name: str
    digest: str
    gate: Gate
    evaluate: Evaluate


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the two artifacts compared, named by the digest of its bytes.

    model_digest: of what the runtime loads, without manifest and lock.  dtype: of the unquantized weights as the runtime has them.
    bits_per_weight: of the quantized weights.
    """

    __pydantic_config__ = _STRICT
    bundle_digest: str
    model_digest: str
    runtime: str
    size_bytes: int
    scheme: str
    dtype: str
    bits_per_weight: Measured


@dataclass(frozen=True, kw_only=True)
class TextUsed:
    """The text that quality was measured on.  tags: the slice of each document that was measured, where the text has any."""

    __pydantic_config__ = _STRICT
    source: str
    digest: str
    documents: int
    tags: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class TaskUsed:
    """The items of a task: where they are from, a digest of those that were to be answered, and how many these are.

    looks: how often the gate could have looked at it, with more items each time, as was fixed before any was answered.
    """

    __pydantic_config__ = _STRICT
    source: str
    digest: str
    items: int
    looks: Annotated[int, Field(ge=1, exclude_if=lambda looks: looks == 1)] = 1


@dataclass(frozen=True, kw_only=True)
class Check:
    """Something that must hold for the measurement to mean anything; one false check makes the run INVALID."""

    __pydantic_config__ = _STRICT
    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Header:
    """What evidence.json says, but for its version and file digests."""

    __pydantic_config__ = _STRICT
    recipe: RecipeUsed
    candidate: Arm
    baseline: Arm
    text: TextUsed
    checks: tuple[Check, ...]
    environment: dict[str, Any]
    tasks: dict[str, TaskUsed] = field(default_factory=dict[str, TaskUsed])


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of a document that both arms read: per-token KL(baseline ‖ candidate) in nats, mean nll in nats."""

    __pydantic_config__ = _STRICT
    kind: Literal["window"] = "window"
    document: str
    window: int
    tokens: int
    kl: tuple[Measured, ...]
    agreed: tuple[Literal[0, 1], ...]
    nll_baseline: Measured
    nll_candidate: Measured

    def __post_init__(self) -> None:
        if not 0 < self.tokens == len(self.kl) == len(self.agreed):
            lengths = f"{self.tokens} tokens, {len(self.kl)} divergences, {len(self.agreed)} agreements"
            raise ValueError(f"a window needs one divergence and one agreement per token; this one has {lengths}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one arm answered to a cloze question."""

    __pydantic_config__ = _STRICT
    correct: bool
    answer: str


@dataclass(frozen=True, kw_only=True)
class Cloze:
    """One question: which word follows this context."""

    __pydantic_config__ = _STRICT
    kind: Literal["cloze"] = "cloze"
    document: str
    window: int
    position: int
    word: str
    context: str
    baseline: Answer
    candidate: Answer


@dataclass(frozen=True, kw_only=True)
class Continued:
    """What one arm made of a prompt: how many tokens, without the one that ends the text; whether it ended it; and the text."""

    __pydantic_config__ = _STRICT
    tokens: int
    ended: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """A prompt that both arms continued greedily, each on its own.

    prompt: the end of its text.  same: how many tokens they have in common before they part, and together: their text.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["continuation"] = "continuation"
    document: str
    window: int
    prompt_tokens: int
    new_tokens: int
    prompt: str
    same: int
    together: str
    baseline: Continued
    candidate: Continued

    def __post_init__(self) -> None:
        if not 0 <= self.same <= min(self.baseline.tokens, self.candidate.tokens) <= self.new_tokens:
            raise ValueError("two continuations have no more tokens in common than either has")

    @property
    def alike(self) -> bool:
        """Whether they are the same to their ends."""
        return (
            self.same == self.baseline.tokens == self.candidate.tokens and self.baseline.ended == self.candidate.ended
        )


@dataclass(frozen=True, kw_only=True)
class Written:
    """What one arm wrote for a prompt with a schema.  cut_off: it reached the limit.  correct: None where nothing is expected."""

    __pydantic_config__ = _STRICT
    tokens: int
    cut_off: bool
    parsed: bool
    valid: bool
    correct: bool | None
    text: str

    def __post_init__(self) -> None:
        if (self.valid and not self.parsed) or (self.correct and not self.valid):
            raise ValueError("only JSON can be valid, and only what is valid can be correct")


@dataclass(frozen=True, kw_only=True)
class StructuredRow:
    """A prompt with a JSON Schema, answered by both arms, on their own and with the schema enforced.

    refused: why the schema cannot be enforced; then nothing is.  compile_seconds, step_seconds: what enforcing took on the candidate,
    before the first token and at each one after it.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["structured"] = "structured"
    item: str
    prompt: str
    schema: str
    expected: str | None
    refused: str | None
    baseline: Written
    candidate: Written
    baseline_enforced: Written | None
    candidate_enforced: Written | None
    compile_seconds: Measured
    step_seconds: tuple[Measured, ...]

    def __post_init__(self) -> None:
        written = [one for one in (self.baseline_enforced, self.candidate_enforced) if one is not None]
        if len(written) != (2 if self.refused is None else 0):
            raise ValueError("both arms write with the schema enforced, or it is said why none does")
        if len({one.correct is None for one in (self.baseline, self.candidate, *written)}) > 1:
            raise ValueError("what is correct is known for all outputs of an item, or for none")


@dataclass(frozen=True, kw_only=True)
class TaskItem:
    """An item of a task.  group: the cluster that it belongs to, if it shares one; tag: its slice."""

    __pydantic_config__ = _STRICT
    task: str
    item: str
    group: str | None
    tag: str | None
    prompt: str


@dataclass(frozen=True, kw_only=True)
class ChoiceItem(TaskItem):
    """A question with choices: each arm's log-likelihood of each choice after the prompt, in nats, summed over its tokens."""

    kind: Literal["choice"] = "choice"
    choices: tuple[str, ...]
    gold: int
    baseline: tuple[Measured, ...]
    candidate: tuple[Measured, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.choices) == len(self.baseline) == len(self.candidate) or not all(self.choices):
            raise ValueError("a question needs two choices or more, none empty, and a log-likelihood of each per arm")
        if not 0 <= self.gold < len(self.choices):
            raise ValueError(f"gold is {self.gold}, but there are {len(self.choices)} choices")


@dataclass(frozen=True, kw_only=True)
class AnswerItem(TaskItem):
    """A prompt that both arms answered greedily, with at most `new_tokens`.  Continued.text: before it is cut and normalized."""

    kind: Literal["answer"] = "answer"
    references: tuple[str, ...]
    new_tokens: int
    baseline: Continued
    candidate: Continued

    def __post_init__(self) -> None:
        if not self.references:
            raise ValueError("an answer needs a reference")
        if max(self.baseline.tokens, self.candidate.tokens) > self.new_tokens:
            raise ValueError("an answer has no more tokens than were asked for")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What lm-evaluation-harness made of an arm's responses: a score from 0 to 1.

    responses: the log-likelihood of each continuation, or the generated text.
    """

    __pydantic_config__ = _STRICT
    score: Measured
    responses: tuple[Measured | str, ...]


@dataclass(frozen=True, kw_only=True)
class ScoredItem(TaskItem):
    """An item of a task of lm-evaluation-harness.

    choices: how many it has, 0 where it is no choice.  continuations: what likelihoods were asked of; none where text was generated.
    """

    kind: Literal["scored"] = "scored"
    target: str
    choices: int
    continuations: tuple[str, ...]
    baseline: Scored
    candidate: Scored


TaskRow = ChoiceItem | AnswerItem | ScoredItem


@dataclass(frozen=True, kw_only=True)
class EncoderItem:
    """A text that both arms of an encoder read, or a part of one.  text: its beginning."""

    __pydantic_config__ = _STRICT
    document: str
    window: int
    tokens: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Embedded(EncoderItem):
    """cosine: of the two arms' embeddings.  baseline, candidate: each arm's similarities to the same other texts."""

    kind: Literal["embedding"] = "embedding"
    cosine: Measured
    baseline: tuple[Measured, ...]
    candidate: tuple[Measured, ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.baseline) == len(self.candidate):
            raise ValueError("both arms compare a text with the same other texts, two or more")


@dataclass(frozen=True, kw_only=True)
class Retrieved(EncoderItem):
    """A query, taken out of the passage `own`: the names of the passages nearest to it by each arm's own index, of so many."""

    kind: Literal["retrieval"] = "retrieval"
    own: str
    passages: int
    baseline: tuple[str, ...]
    candidate: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.baseline) == len(self.candidate) <= self.passages:
            raise ValueError("both arms name as many passages, one or more, and no more than there are")
        if len(set(self.baseline)) < len(self.baseline) or len(set(self.candidate)) < len(self.candidate):
            raise ValueError("no passage is found twice for a query")


@dataclass(frozen=True, kw_only=True)
class ClassGiven:
    """The class that an arm puts a text into, and its probability."""

    __pydantic_config__ = _STRICT
    name: str
    share: Measured


@dataclass(frozen=True, kw_only=True)
class Classified(EncoderItem):
    """A text put into one of so many classes.  label: the right one, where it is known."""

    kind: Literal["class"] = "class"
    classes: int
    label: str | None
    baseline: ClassGiven
    candidate: ClassGiven


EncoderRow = Embedded | Retrieved | Classified


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One request: seconds from the request to each new token.

    first_token: its id.  joules: what the processor took for all of it, where that can be read.
    """

    __pydantic_config__ = _STRICT
    prompt_tokens: int
    token_seconds: tuple[Measured, ...]
    first_token: int | None = None
    joules: Measured = None


@dataclass(frozen=True, kw_only=True)
class PrefixHit:
    """The same prompt once more, its first `prefix_tokens` in the cache: seconds to the first new token, and its id."""

    __pydantic_config__ = _STRICT
    prompt_tokens: int
    prefix_tokens: int
    seconds: Measured
    first_token: int


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """An encoder's work on one batch of so many texts of so many tokens: the seconds that each repetition took."""

    __pydantic_config__ = _STRICT
    batch: int
    tokens: int
    seconds: tuple[Measured, ...]


def _nothing(value: tuple[Any, ...]) -> bool:
    return not value


@dataclass(frozen=True, kw_only=True)
class SpeedRun:
    """One fresh process: a block is four of them, in the order ABBA or BAAB (A = baseline, B = candidate)."""

    __pydantic_config__ = _STRICT
    block: int
    position: Literal[0, 1, 2, 3]
    arm: Literal["baseline", "candidate"]
    load_seconds: Measured
    peak_memory_bytes: int
    generations: tuple[Generation, ...]
    prefix_hits: tuple[PrefixHit, ...] = ()
    encodings: Annotated[tuple[Encoding, ...], Field(exclude_if=_nothing)] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything measured in one run; `digest` is that of evidence.json, which holds the digests of the rest."""

    header: Header
    windows: tuple[Window, ...]
    clozes: tuple[Cloze, ...]
    runs: tuple[SpeedRun, ...]
    digest: str
    continuations: tuple[Continuation, ...] = ()
    structured: tuple[StructuredRow, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    encoded: tuple[EncoderRow, ...] = ()

    @property
    def embeddings(self) -> tuple[Embedded, ...]:
        return tuple(row for row in self.encoded if isinstance(row, Embedded))

    @property
    def retrievals(self) -> tuple[Retrieved, ...]:
        return tuple(row for row in self.encoded if isinstance(row, Retrieved))

    @property
    def classes(self) -> tuple[Classified, ...]:
        return tuple(row for row in self.encoded if isinstance(row, Classified))

    @property
    def quality(self) -> tuple[QualityRow, ...]:
        """All that was measured of quality, as quality.jsonl has it."""
        return (*self.windows, *self.clozes, *self.continuations, *self.structured, *self.tasks, *self.encoded)


_HEADER = TypeAdapter(Header)
QualityRow = Window | Cloze | Continuation | StructuredRow | TaskRow | EncoderRow
_QUALITY: TypeAdapter[QualityRow] = TypeAdapter(Annotated[QualityRow, Field(discriminator="kind")])
_SPEED = TypeAdapter(SpeedRun)


def write_evidence(
    directory: Path, header: Header, quality: Iterable[QualityRow], runs: Iterable[SpeedRun]
) -> Evidence:
    """Write an evidence directory, whole or not at all, and return it as a reader will see it.

    The same measurements give the same bytes. Numbers that are not finite are written as null.
    """
    with atomic_directory(directory) as temporary:
        files = {QUALITY_NAME: _lines(_QUALITY, quality), SPEED_NAME: _lines(_SPEED, runs)}
        for name, data in files.items():
            (temporary / name).write_bytes(data)
        digests = {name: sha256_bytes(data) for name, data in files.items()}
        (temporary / HEADER_NAME).write_bytes(readable_json(_header_json(header, digests)))
        return read_evidence(temporary)


def read_evidence(directory: Path) -> Evidence:
    """Read an evidence directory; IntegrityError when a file is missing, changed, or not of the promised form."""
    header_bytes = _read(directory / HEADER_NAME)
    header, digests = _parse_header(directory / HEADER_NAME, header_bytes)
    quality = _parse_lines(_QUALITY, directory / QUALITY_NAME, digests[QUALITY_NAME])
    runs = _parse_lines(_SPEED, directory / SPEED_NAME, digests[SPEED_NAME])
    return Evidence(
        header=header,
        windows=tuple(row for row in quality if isinstance(row, Window)),
        clozes=tuple(row for row in quality if isinstance(row, Cloze)),
        continuations=tuple(row for row in quality if isinstance(row, Continuation)),
        structured=tuple(row for row in quality if isinstance(row, StructuredRow)),
        tasks=tuple(row for row in quality if isinstance(row, TaskItem)),
        encoded=tuple(row for row in quality if isinstance(row, EncoderItem)),
        runs=tuple(runs),
        digest=sha256_bytes(header_bytes),
    )


def _lines(adapter: TypeAdapter[Row], rows: Iterable[Row]) -> bytes:
    """One JSON object a line, keys in the order of the class; pydantic writes NaN and infinities as null."""
    return b"".join(adapter.dump_json(row, warnings="error") + b"\n" for row in rows)


def _header_json(header: Header, digests: dict[str, str]) -> dict[str, Any]:
    value = _HEADER.dump_python(header, mode="json", warnings="error")
    value["recipe"]["gate"] = header.recipe.gate.model_dump(mode="json", exclude_none=True)
    return {"version": EVIDENCE_VERSION, "files": digests, **value}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: missing. Evidence is three files: take them all, or measure again.") from error


def _parse_header(path: Path, data: bytes) -> tuple[Header, dict[str, str]]:
    try:
        value = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise IntegrityError(f"{path}: not valid JSON ({error}). The file was damaged: measure again.") from error
    if not isinstance(value, dict) or value.get("version") != EVIDENCE_VERSION:
        raise IntegrityError(f"{path}: not version {EVIDENCE_VERSION} evidence; use the Assay release that wrote it.")
    digests = value.pop("files", None)
    if not isinstance(digests, dict) or set(digests) != {QUALITY_NAME, SPEED_NAME}:
        raise IntegrityError(f"{path}: `files` must hold the digests of {QUALITY_NAME} and {SPEED_NAME}, and no other.")
    del value["version"]
    try:
        return _HEADER.validate_json(json.dumps(value)), digests
    except ValidationError as error:
        raise IntegrityError(f"{path}: {_first(error)}") from error


def _parse_lines(adapter: TypeAdapter[Row], path: Path, digest: str) -> list[Row]:
    data = _read(path)
    if (found := sha256_bytes(data)) != digest:
        raise IntegrityError(f"{path}: the digest is {found}, but {HEADER_NAME} promises {digest}. It was changed.")
    if data and not data.endswith(b"\n"):
        raise IntegrityError(f"{path}: the last line is cut short.")
    rows: list[Row] = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            rows.append(adapter.validate_json(line))
        except ValidationError as error:
            raise IntegrityError(f"{path}:{number}: {_first(error)}") from error
    return rows


def _first(error: ValidationError) -> str:
    """The first of pydantic's complaints, as "where: what"."""
    detail = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(part) for part in detail["loc"])
    return f"{place}: {detail['msg']}" if place else detail["msg"]
