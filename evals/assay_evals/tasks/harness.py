"""Tasks of lm-evaluation-harness, which asks, filters and scores by itself; both arms answer through its model interface.

Only what can be paired is taken: a metric that is a mean over items of scores from 0 to 1. Tasks whose scores come of running
generated code are refused. What a task's YAML names as `!function` is code, as anything in that package is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from assay.calibration import rendered
from assay.errors import AssayError, UsageError
from assay.recipe import LmEvalTask
from assay.text import Document, label
from assay_evals.evidence import Scored, ScoredItem
from assay_evals.runtimes.base import Runtime
from assay_evals.task_scoring import before_stop
from assay_evals.tasks.encoding import Encoder
from assay_evals.tasks.exact_match import generate
from assay_evals.tasks.items import picked
from assay_evals.tasks.multiple_choice import continuation_scores

_OUTPUTS = ("multiple_choice", "loglikelihood", "generate_until")
_SEED = 1234
_NEW_TOKENS = 256
_MOST_CHARACTERS = 300


@dataclass(frozen=True)
class HarnessTask:
    """A task, and which of its items are answered, by their index in its data.

    prompts: what each asks, without examples and template.  choices: how many it has, 0 where it is no choice.  config: the task's own.
    """

    task: LmEvalTask
    base: Path
    indices: tuple[int, ...]
    documents: tuple[dict[str, Any], ...]
    prompts: tuple[str, ...]
    choices: tuple[int, ...]
    config: dict[str, Any]

    def content(self, items: int) -> Any:
        """The first of its items, and how the task asks and scores, as JSON."""
        config = {name: value for name, value in self.config.items() if name != "metadata"}
        return json.loads(json.dumps([config, self.indices[:items], self.documents[:items]], default=str))

    def part(self, items: range) -> HarnessTask:
        """Some of its items alone."""
        which = slice(items.start, items.stop)
        return dataclasses.replace(
            self,
            indices=self.indices[which],
            documents=self.documents[which],
            prompts=self.prompts[which],
            choices=self.choices[which],
        )


def read_harness(task: LmEvalTask, base: Path, looks: int = 1) -> HarnessTask:
    """The items that are to be answered; UsageError when the task or its metric is none that can be paired."""
    loaded = _load(task, base)
    place = f"the task {task.name}"
    if loaded.OUTPUT_TYPE not in _OUTPUTS:
        raise UsageError(f"{place}: {task.task} is of type {loaded.OUTPUT_TYPE}; allowed: {', '.join(_OUTPUTS)}.")
    if getattr(loaded, "UNSAFE_CODE", False) or getattr(loaded, "MULTIMODAL", False):
        raise UsageError(f"{place}: {task.task} runs generated code or needs more than text; name another task.")
    means = [name for name, function in loaded.aggregation().items() if function is mean]
    if task.metric not in means or not loaded.higher_is_better().get(task.metric, True):
        raise UsageError(
            f"{place}: {task.metric!r} is no metric of {task.task} that is a mean over items and better when higher; it has: "
            f"{', '.join(means) or 'none'}."
        )
    filters = [one["name"] for one in loaded.get_config("filter_list") or [{"name": "none"}]]
    if task.filter not in filters:
        raise UsageError(f"{place}: {task.task} has no filter {task.filter!r}; it has: {', '.join(filters)}.")
    options = loaded.get_config("generation_kwargs") or {}
    if options.get("do_sample") and options.get("temperature", 1.0):
        raise UsageError(
            f"{place}: {task.task} samples its answers; arms can only be paired when they answer greedily."
        )
    if (loaded.get_config("repeats") or 1) > 1:
        raise UsageError(
            f"{place}: {task.task} asks everything {loaded.get_config('repeats')} times; one answer is paired."
        )
    found: list[tuple[int, Any]] = picked(list(enumerate(loaded.eval_docs)), task, looks)
    if not found:
        raise UsageError(f"{place}: {task.task} has no items.")
    for index, document in found:
        _label(task, document, task.group, index)
        _label(task, document, task.tag, index)
    indices, documents = zip(*found, strict=True)
    chosen = loaded.OUTPUT_TYPE == "multiple_choice"
    return HarnessTask(
        task=task,
        base=base,
        indices=indices,
        documents=documents,
        prompts=tuple(str(loaded.doc_to_text(document)) for document in documents),
        choices=tuple(len(loaded.doc_to_choice(document)) if chosen else 0 for document in documents),
        config=loaded.dump_config(),
    )


def check_fit(harness: HarnessTask, tokenizer: Any, context_length: int) -> None:
    """UsageError when what the harness asks of an item, examples included, does not fit the model's context."""
    task = harness.task
    loaded, encoder = _load(task, harness.base), Encoder(tokenizer)
    try:
        with _quiet():
            loaded.build_all_requests(
                samples=_samples(harness, loaded),
                apply_chat_template=task.chat,
                fewshot_as_multiturn=task.chat,
                chat_template=functools.partial(_templated, tokenizer) if task.chat else None,
            )
    except AssayError:
        raise
    except Exception as error:
        # Of any kind: a task is code of its own.
        raise _failed(task, error) from error
    for request in loaded.instances:
        context, asked = request.arguments
        tokens = (
            len(encoder.prompt(context)) + _limit(asked)
            if isinstance(asked, dict)
            else sum(map(len, encoder.pair(context, asked)))
        )
        if tokens > context_length:
            raise UsageError(
                f"the task {task.name}: item {harness.indices[request.doc_id]} takes {tokens:,} tokens; the model's context is "
                f"{context_length:,}. Lower fewshot, or leave the item out by samples and seed."
            )


def answer_harness(harness: HarnessTask, tokenizer: Any, baseline: Runtime, candidate: Runtime) -> Iterator[ScoredItem]:
    """What both arms make of all items, one arm after the other."""
    task = harness.task
    arms = [_answered(harness, RuntimeModel(runtime, tokenizer)) for runtime in (baseline, candidate)]
    for document, choices, before, after in zip(harness.documents, harness.choices, *arms, strict=True):
        if (before["doc_id"], before["arguments"]) != (after["doc_id"], after["arguments"]):
            raise AssayError(f"the task {task.name}: the arms were not asked the same at item {before['doc_id']}.")
        asked, index = before["arguments"], before["doc_id"]
        generated = isinstance(asked[0][1], dict)
        yield ScoredItem(
            task=task.name,
            item=str(index),
            group=_label(task, document, task.group, index),
            tag=_label(task, document, task.tag, index),
            prompt=str(asked[0][0]),
            target=str(before["target"]),
            choices=choices,
            continuations=() if generated else tuple(str(arguments[1]) for arguments in asked),
            baseline=_scored(task, before),
            candidate=_scored(task, after),
        )


class RuntimeModel(LM):
    """An artifact on its own runtime, as lm-evaluation-harness asks models."""

    def __init__(self, runtime: Runtime, tokenizer: Any) -> None:
        super().__init__()
        self._runtime, self._tokenizer = runtime, tokenizer
        self._encoder = Encoder(tokenizer)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of each continuation after its context; those of one context together, which saves passes."""
        answers: list[tuple[float, bool]] = []
        for context, group in itertools.groupby(requests, key=lambda request: request.arguments[0]):
            pairs = [self._encoder.pair(context, request.arguments[1]) for request in group]
            scores = continuation_scores(self._runtime, pairs[0][0], [continuation for _, continuation in pairs])
            answers += [(score.log_likelihood, score.greedy) for score in scores]
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssayError("whole texts are not scored here: their metrics are no means over items.")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy text up to the first of the stop strings."""
        answers: list[str] = []
        for prompt, options in (request.arguments for request in requests):
            stop = options.get("until") or []
            stop = [word for word in ([stop] if isinstance(stop, str) else stop) if word]
            found = generate(self._runtime, self._encoder.prompt(prompt), _limit(options), stop)
            answers.append(before_stop(found.text, stop))
        return answers

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return _templated(self._tokenizer, chat_history, add_generation_prompt)


def _templated(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    return rendered(Document("the task", messages), tokenizer, answering=add_generation_prompt)


def _limit(options: dict[str, Any]) -> int:
    """How many new tokens a task asks for."""
    return next((options[name] for name in ("max_gen_toks", "max_new_tokens") if name in options), _NEW_TOKENS)


def _samples(harness: HarnessTask, loaded: Any) -> list[int] | None:
    """As the harness names them; None for all, because looking up every item of many takes it long."""
    return None if len(harness.indices) == len(loaded.eval_docs) else list(harness.indices)


def _answered(harness: HarnessTask, model: LM) -> Sequence[dict[str, Any]]:
    """The harness's own log of each item, in their order."""
    task = harness.task
    loaded = _load(task, harness.base)
    samples = _samples(harness, loaded)
    try:
        with _quiet():
            found: Any = evaluate(
                model,
                {"tasks": {loaded.task_name: loaded}},
                samples=None if samples is None else {loaded.task_name: samples},
                bootstrap_iters=0,
                apply_chat_template=task.chat,
                fewshot_as_multiturn=task.chat,
            )
    except AssayError:
        raise
    except Exception as error:
        # Of any kind: a task is code of its own.
        raise _failed(task, error) from error
    logged = [sample for sample in found["samples"][loaded.task_name] if sample["filter"] == task.filter]
    return sorted(logged, key=lambda sample: sample["doc_id"])


def _scored(task: LmEvalTask, sample: dict[str, Any]) -> Scored:
    score = sample.get(task.metric)
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise AssayError(
            f"the task {task.name}: {task.metric} of item {sample['doc_id']} is {str(score)[:_MOST_CHARACTERS]}, not a number from 0 to 1; "
            "name another metric."
        )
    responses = [response[0] for response in sample["resps"]]
    plain = tuple(str(one) if isinstance(one, str) else float(one[0]) for one in responses)
    return Scored(score=float(score), responses=plain)


def _load(task: LmEvalTask, base: Path) -> Any:
    """The task as the harness has it, new each time: it draws examples from a stream of its own."""
    try:
        with _quiet():
            found = _manager(None if task.include is None else base / task.include).load([task.task])["tasks"]
    except (KeyError, FileNotFoundError) as error:
        raise UsageError(
            f"the task {task.name}: lm-evaluation-harness finds no {task.task!r} ({_short(error)})."
        ) from error
    except Exception as error:
        raise _failed(task, error) from error
    if len(found) != 1:
        raise UsageError(
            f"the task {task.name}: {task.task} is a group; name one of its tasks: {', '.join(sorted(found))}."
        )
    (loaded,) = found.values()
    if task.fewshot is not None or loaded.get_config("num_fewshot") is None:
        loaded.set_config(key="num_fewshot", value=task.fewshot or 0)
    loaded.set_fewshot_seed(seed=_SEED)
    return loaded


@functools.cache
def _manager(include: Path | None) -> TaskManager:
    """Where tasks are found by name: in the recipe's own directory of them, or in the harness. Reading those takes seconds."""
    if include is not None and not include.is_dir():
        raise FileNotFoundError(f"{include} is no directory")
    return TaskManager(include_path=include, include_defaults=include is None)


def _failed(task: LmEvalTask, error: Exception) -> AssayError:
    return AssayError(f"the task {task.name}: lm-evaluation-harness failed: {type(error).__name__}: {_short(error)}")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:_MOST_CHARACTERS]


def _label(task: LmEvalTask, document: dict[str, Any], field: str | None, index: int) -> str | None:
    if field is None:
        return None
    place = f"the task {task.name}, item {index}"
    if field not in document:
        raise UsageError(f"{place}: there is no field {field!r}; it has: {', '.join(sorted(document))}.")
    return label(document[field], place, field)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without the harness's progress bars and its warnings about defaults; what fails is an exception."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
