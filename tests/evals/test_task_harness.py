"""lm-evaluation-harness asks, both arms answer, and what it makes of them is what its own model would have given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from assay.errors import AssayError, UsageError
from assay.progress import Progress
from assay.recipe import Evaluate
from assay_evals.evidence import AnswerItem, ChoiceItem, ScoredItem
from assay_evals.runtimes.base import Runtime
from assay_evals.task_scoring import likeliest
from assay_evals.tasks.harness import RuntimeModel, read_harness
from assay_evals.tasks.measure import check_tasks, measure_tasks, read_tasks

CHOICES = ["assignment", "deletion of names", "import", "it is bound by the call"]
CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
WRITE = {
    "output_type": "generate_until",
    "doc_to_text": "{{query}} is",
    "doc_to_target": "{{choices[gold]}}",
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def arms(runtime: Runtime, other: Runtime) -> tuple[Runtime, Runtime]:
    return runtime, other


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two dozen items, and tasks of the harness that read them from where they lie."""
    directory = tmp_path_factory.mktemp("harness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", directory / "cache")
        yield make_tasks(directory)


def make_tasks(directory: Path) -> Path:
    rows = [
        {
            "query": f"The statement of line {number} ",
            "choices": CHOICES[: 2 + number % 3],
            "gold": number % 2,
            "kind": "ab"[number % 2],
        }
        for number in range(24)
    ]
    (directory / "items.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    (directory / "tasks").mkdir()
    add(directory, "choose", CHOOSE)
    add(directory, "write", WRITE)
    return directory


def add(directory: Path, name: str, task: dict[str, Any]) -> None:
    files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(directory / "items.jsonl")}}}
    content = {"task": name, "test_split": "test"} | files | task
    (directory / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def evaluate(*tasks: dict[str, Any]) -> Evaluate:
    defaults = {"name": "lm", "kind": "lm_eval", "include": "tasks"}
    declared = [task if "kind" in task else defaults | task for task in tasks]
    return Evaluate.model_validate_json(json.dumps({"quality": [{"metric": "kl_divergence"}], "tasks": declared}))


def measured(base: Path, tokenizer: Any, arms: tuple[Runtime, Runtime], *tasks: dict[str, Any]) -> list[Any]:
    return list(measure_tasks(read_tasks(evaluate(*tasks), base), tokenizer, *arms, Progress()))


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_choices_are_scored_as_our_own_multiple_choice_does(
    base: Path, tokenizer: Any, arms: tuple[Runtime, Runtime], metric: str
) -> None:
    """Item by item: the same log-likelihoods, and right by the same rule."""
    own = {"name": "mc", "kind": "multiple_choice", "items": {"source": "jsonl", "path": "items.jsonl"}}
    theirs = {"task": "choose", "metric": metric, "tag": "kind"}
    rows = measured(base, tokenizer, arms, own, theirs)
    questions, scored = ([row for row in rows if isinstance(row, kind)] for kind in (ChoiceItem, ScoredItem))
    assert len(questions) == len(scored) == 24
    for question, item in zip(questions, scored, strict=True):
        assert isinstance(question, ChoiceItem) and isinstance(item, ScoredItem)
        assert (item.prompt, item.target, item.choices) == (question.prompt, str(question.gold), len(question.choices))
        assert item.tag == "ab"[int(item.item) % 2]
        for values, arm in ((question.baseline, item.baseline), (question.candidate, item.candidate)):
            assert values == arm.responses
            finite = [value for value in values if value is not None]
            picked = likeliest(finite, question.choices, normalized=metric == "acc_norm")
            assert arm.score == float(picked == question.gold)
    assert {item.baseline.score for item in scored} == {0.0, 1.0}


def test_text_is_generated_up_to_the_tasks_stop_strings(
    base: Path, tokenizer: Any, arms: tuple[Runtime, Runtime]
) -> None:
    own = {
        "name": "em",
        "kind": "exact_match",
        "items": {"source": "jsonl", "path": "items.jsonl"},
        "prompt": "query",
        "references": "query",
        "new_tokens": 6,
    }
    rows = measured(base, tokenizer, arms, own, {"task": "write", "metric": "exact_match", "samples": 3})
    plain = [row for row in rows if isinstance(row, AnswerItem)]
    scored = [row for row in rows if isinstance(row, ScoredItem)]
    assert len(scored) == 3 and len(plain) == 24
    for item in scored:
        (text,) = item.baseline.responses
        found = arms[0].generate(tokenizer(item.prompt, add_special_tokens=False).input_ids, 6, stops=True)
        whole = arms[0].decode(list(found.tokens))
        assert isinstance(text, str) and whole.startswith(text) and not {"\n", "."} & set(text)
        assert (item.continuations, item.choices, item.baseline.score) == ((), 0, 0.0)


def test_samples_are_drawn_by_a_seed_and_examples_are_the_same_for_both_arms(
    base: Path, tokenizer: Any, arms: tuple[Runtime, Runtime]
) -> None:
    task = {"task": "choose", "samples": 5, "seed": 3, "fewshot": 1}
    rows = measured(base, tokenizer, arms, task)
    assert [row.item for row in rows] == [str(index) for index in read_harness_indices(base, task)]
    assert rows == measured(base, tokenizer, arms, task)
    assert len({row.item for row in rows}) == 5 and all(row.prompt.count("The statement of line") == 2 for row in rows)


def read_harness_indices(base: Path, task: dict[str, Any]) -> tuple[int, ...]:
    (declared,) = evaluate(task).tasks
    assert declared.kind == "lm_eval"
    return read_harness(declared, base).indices


def test_prompts_pass_through_the_template_when_asked_to(
    base: Path, tokenizer: Any, arms: tuple[Runtime, Runtime]
) -> None:
    (row,) = measured(base, tokenizer, arms, {"task": "choose", "samples": 1, "chat": True})
    assert row.prompt == "[user] The statement of line 0 \n" and row.continuations == (
        "assignment",
        "deletion of names",
    )


@pytest.mark.slow
def test_the_harness_own_model_says_the_same(
    base: Path, tokenizer: Any, arms: tuple[Runtime, Runtime], tiny_model: Callable[[str], Path]
) -> None:
    """lm_eval's Hugging Face model in float32 on the same directory."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs: Any = HFLM(pretrained=str(tiny_model("llama")), device="cpu", dtype="float32", batch_size=1)
    pairs = [
        (f"The statement of line {number}{' ' * (number % 2)}", f"{' ' * (1 - number % 2)}{choice}")
        for number in range(6)
        for choice in CHOICES
    ]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    found = RuntimeModel(arms[0], tokenizer).loglikelihood(requests)
    for ours, expected in zip(found, theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert ours[0] == pytest.approx(expected[0], abs=2e-4) and ours[1] == expected[1]
    options = {"until": ["\n"], "max_gen_toks": 8}
    texts = [Instance("generate_until", {}, (f"The statement {number}", options), 0) for number in range(4)]
    assert RuntimeModel(arms[0], tokenizer).generate_until(texts) == theirs.generate_until(texts, disable_tqdm=True)


# What is refused

SAMPLED = {"until": ["."], "do_sample": True, "temperature": 0.7}


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ({"task": "absent"}, {}, r"the task lm: lm-evaluation-harness finds no 'absent'"),
        ({"task": "one", "include": "nowhere"}, {}, r"finds no 'one' \(.*nowhere is no directory\)"),
        ({"task": "one", "metric": "f1"}, {}, r"'f1' is no metric of one that is a mean .* it has: acc, acc_norm"),
        ({"task": "one", "filter": "strict"}, {}, r"one has no filter 'strict'; it has: none"),
        ({"task": "one", "samples": 25}, {}, r"the task lm has 24 items; the recipe asks for 25"),
        ({"task": "one", "tag": "lang"}, {}, r"the task lm, item 0: there is no field 'lang'; it has: choices, gold, kind, query"),
        ({"task": "one"}, {"output_type": "loglikelihood_rolling", "doc_to_choice": None}, r"is of type loglikelihood_rolling; allowed: "),
        ({"task": "one"}, {"unsafe_code": True}, r"one runs generated code"),
        ({"task": "one", "metric": "exact_match"}, WRITE | {"doc_to_choice": None, "generation_kwargs": SAMPLED}, r"one samples its answers"),
        ({"task": "one", "metric": "acc"}, {"repeats": 3}, r"one asks everything 3 times"),
        ({"task": "one"}, {"doc_to_text": "{{ missing.field }}"}, r"lm-evaluation-harness failed: "),
    ],
)  # fmt: skip
def test_what_cannot_be_paired_is_refused(
    base: Path, tmp_path: Path, task: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "items.jsonl").write_bytes((base / "items.jsonl").read_bytes())
    add(tmp_path, "one", {name: value for name, value in (CHOOSE | changes).items() if value is not None})
    with pytest.raises((UsageError, AssayError), match=message):
        read_tasks(evaluate(task), tmp_path)


def test_a_group_of_tasks_is_refused_with_its_names(base: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "items.jsonl").write_bytes((base / "items.jsonl").read_bytes())
    for name in ("one", "two"):
        add(tmp_path, name, CHOOSE)
    (tmp_path / "tasks" / "both.yaml").write_text("{group: both, task: [one, two]}", encoding="utf-8")
    with pytest.raises(UsageError, match="both is a group; name one of its tasks: one, two"):
        read_tasks(evaluate({"task": "both"}), tmp_path)


def test_what_does_not_fit_the_context_is_refused(base: Path, tokenizer: Any) -> None:
    for task in ({"task": "choose", "fewshot": 2}, {"task": "write", "metric": "exact_match"}):
        tasks = read_tasks(evaluate(task), base)
        check_tasks(tasks, tokenizer, 256, [])
        with pytest.raises(UsageError, match=r"the task lm: item \d+ takes \d+ tokens; the model's context is 14"):
            check_tasks(tasks, tokenizer, 14, [])
