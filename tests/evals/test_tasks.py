"""Items of tasks: what is refused and where, how prompts become tokens, and what both arms make of them."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Hub
from numpy.typing import NDArray

from assay.errors import UsageError
from assay.progress import Progress
from assay.recipe import Evaluate, ExactMatchTask, MultipleChoiceTask
from assay_evals.evidence import AnswerItem, ChoiceItem, TaskUsed
from assay_evals.runtimes.base import Runtime
from assay_evals.task_scoring import answer_in, before_stop, likeliest, normalized
from assay_evals.tasks.encoding import Encoder
from assay_evals.tasks.exact_match import encode_exercises, generate, read_exercises
from assay_evals.tasks.measure import ReadTask, check_tasks, measure_tasks, read_tasks, unseen_items
from assay_evals.tasks.multiple_choice import continuation_scores, encode_questions, read_questions

QUESTION = {"query": "Which statement binds a name to a value?", "choices": ["assignment", "deletion"], "gold": 0}
PROMPT = {"prompt": "The statement that binds a name is", "references": ["assignment"]}


def evaluate(*tasks: dict[str, Any]) -> Evaluate:
    return Evaluate.model_validate_json(json.dumps({"quality": [{"metric": "kl_divergence"}], "tasks": tasks}))


def choice_task(**changes: Any) -> MultipleChoiceTask:
    task = {"name": "mc", "kind": "multiple_choice", "items": {"source": "jsonl", "path": "items.jsonl"}}
    (found,) = evaluate(task | changes).tasks
    assert isinstance(found, MultipleChoiceTask)
    return found


def match_task(**changes: Any) -> ExactMatchTask:
    task = {"name": "em", "kind": "exact_match", "items": {"source": "jsonl", "path": "items.jsonl"}, "new_tokens": 8}
    (found,) = evaluate(task | changes).tasks
    assert isinstance(found, ExactMatchTask)
    return found


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Rows as items.jsonl; the directory that it lies in."""

    def make(*rows: Any) -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / "items.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return tmp_path

    return make


# What is refused


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"query": "?", "choices": ["a", "b"]}, {}, r"items\.jsonl:2: there is no field 'gold'; the line has: choices, query\."),
        ([], {}, r":2: there is no field 'query'; the line has: no object"),
        ("{", {}, r":2: not valid JSON"),
        (QUESTION | {"query": " \n"}, {}, r":2: 'query' is empty"),
        (QUESTION | {"query": 3}, {}, r":2: 'query' must be a text, or a list of chat messages"),
        (QUESTION | {"query": [{"role": "user", "content": "?"}]}, {}, r":2: 'query' holds chat messages; write chat: true"),
        (QUESTION | {"choices": ["a"]}, {}, r":2: 'choices' has 1 of them; a question needs two choices or more"),
        (QUESTION | {"choices": "ab"}, {}, r":2: 'choices' must be a list of texts"),
        (QUESTION | {"choices": ["a", 1]}, {}, r":2: 'choices' must be a list of texts"),
        (QUESTION | {"choices": ["a", " "]}, {}, r":2: a choice in 'choices' is empty"),
        (QUESTION | {"gold": 2}, {}, r":2: 'gold' is 2; it must be the index of a choice, 0 to 1, or its text"),
        (QUESTION | {"gold": -1}, {}, r":2: 'gold' is -1;"),
        (QUESTION | {"gold": True}, {}, r":2: 'gold' is True;"),
        (QUESTION | {"gold": "neither"}, {}, r":2: 'gold' is 'neither';"),
        (QUESTION | {"choices": ["a", "a"], "gold": "a"}, {}, r":2: 'gold' is 'a';"),
        (QUESTION, {"tag": "kind"}, r":2: there is no field 'kind'"),
        (QUESTION | {"doc": 1.5}, {"group": "doc"}, r":2: 'doc' must be a text or a whole number"),
        (QUESTION | {"key": 7}, {"id": "key"}, r":2: the id '7' is that of .*items\.jsonl:1 too"),
    ],
)  # fmt: skip
def test_a_bad_question_is_named_by_its_line(
    write: Callable[..., Path], row: Any, changes: dict[str, str], message: str
) -> None:
    first = QUESTION | ({"key": 7, "kind": "a", "doc": "d"} if changes else {})
    with pytest.raises(UsageError, match=message):
        read_questions(choice_task(**changes), write(first, row))


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"prompt": "?"}, {}, r"items\.jsonl:1: there is no field 'references'; the line has: prompt"),
        (PROMPT | {"references": []}, {}, r":1: 'references' must be a text, or a list of one text or more"),
        (PROMPT | {"references": ["a", 1]}, {}, r":1: 'references' must be a text"),
        (PROMPT | {"references": ["a", " "]}, {}, r":1: 'references' holds ' ', of which nothing is left to compare"),
        (PROMPT | {"references": "!"}, {"normalize": ["punctuation"]}, r":1: 'references' holds '!'"),
    ],
)
def test_a_bad_exercise_is_named_by_its_line(
    write: Callable[..., Path], row: Any, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_exercises(match_task(**changes), write(row))


def test_a_file_that_is_empty_or_not_there(write: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"items\.jsonl: cannot be read"):
        read_questions(choice_task(), tmp_path)
    with pytest.raises(UsageError, match=r"the task mc has no items: items\.jsonl is empty"):
        read_questions(choice_task(), write())


def test_what_does_not_fit_the_context_is_named(write: Callable[..., Path], tokenizer: Any) -> None:
    base = write(QUESTION, QUESTION | {"choices": ["short", "long " * 300]})
    questions = read_questions(choice_task(), base)
    with pytest.raises(UsageError, match=r"items\.jsonl:2: query and choice are .* tokens; the model's context is 256"):
        encode_questions(choice_task(), questions, tokenizer, 256)
    exercises = read_exercises(match_task(), write(PROMPT))
    needed = len(encode_exercises(match_task(), exercises, tokenizer, 256)[0].tokens) + 8
    assert encode_exercises(match_task(), exercises, tokenizer, needed)
    with pytest.raises(UsageError, match=rf"items\.jsonl:1: the prompt's {needed - 8} tokens and 8 new ones exceed"):
        encode_exercises(match_task(), exercises, tokenizer, needed - 1)


# Which items


def test_samples_are_the_first_or_drawn_by_a_seed(write: Callable[..., Path]) -> None:
    base = write(*(QUESTION | {"query": str(number)} for number in range(50)))

    def asked(**changes: Any) -> list[str]:
        return [str(one.item.prompt) for one in read_questions(choice_task(**changes), base)]

    assert asked() == [str(number) for number in range(50)]
    assert asked(samples=3) == ["0", "1", "2"]
    drawn = asked(samples=20, seed=1)
    assert drawn == asked(samples=20, seed=1) != asked(samples=20, seed=2)
    assert len(set(drawn)) == 20 and drawn == sorted(drawn, key=int) != asked(samples=20)
    with pytest.raises(UsageError, match="the task mc has 50 items; the recipe asks for 51"):
        asked(samples=51)


def test_fields_have_the_names_that_the_recipe_gives(write: Callable[..., Path]) -> None:
    row = {"q": "Good?", "answer": "no", "key": "k1", "lang": "en", "page": 4}
    task = choice_task(query="q", labels=["yes", "no"], gold="answer", id="key", tag="lang", group="page")
    (found,) = read_questions(task, write(row))
    assert (found.choices, found.gold) == (("yes", "no"), 1)
    assert (found.item.name, found.item.tag, found.item.group, found.item.prompt) == ("k1", "en", "4", "Good?")


def test_the_digest_tells_items_apart(write: Callable[..., Path]) -> None:
    declared = evaluate(choice_task().model_dump(mode="json"))
    first = read_tasks(declared, write(QUESTION))[0].used()
    assert first == read_tasks(declared, write(QUESTION))[0].used() and first.items == 1
    for change in ({"query": "?"}, {"choices": ["a", "b"]}, {"gold": 1}):
        assert read_tasks(declared, write(QUESTION | change))[0].used().digest != first.digest


READ_HUB = """
import json, sys
from pathlib import Path
from assay.errors import AssayError
from assay.recipe import Evaluate
from assay_evals.tasks.multiple_choice import read_questions
(task,) = Evaluate.model_validate_json(sys.argv[1]).tasks
try:
    print(json.dumps([[one.item.name, one.item.prompt, one.choices, one.gold] for one in read_questions(task, Path())]))
except AssayError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [["questions#0", "Who?", ["a", "b"], 1], ["questions#1", "Where?", ["c", "d", "e"], 0]]),
        ({"samples": 3}, "the task mc has 2 items; the recipe asks for 3. Lower samples, or give more items."),
        ({"gold": "right"}, "org/questions#0: there is no field 'right'; the line has: choices, gold, query."),
    ],
)
@pytest.mark.slow
def test_items_of_a_data_set_of_the_hub(hub: Hub, tmp_path: Path, changes: dict[str, Any], expected: Any) -> None:
    rows = [
        {"query": "Who?", "choices": ["a", "b"], "gold": 1},
        {"query": "Where?", "choices": ["c", "d", "e"], "gold": 0},
    ]
    data = "\n".join(map(json.dumps, rows)).encode()
    hub.add("datasets", "org/questions", {"README.md": b"# Questions", "data/test.jsonl": data})
    items = {"source": "hf", "name": "org/questions", "split": "test"}
    declared = evaluate({"name": "mc", "kind": "multiple_choice", "items": items} | changes).model_dump_json()
    command = [sys.executable, "-c", READ_HUB, declared]
    done = subprocess.run(
        command, env=hub.environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


# Tokens


@pytest.fixture(scope="module")
def beginning(tokenizer: Any) -> Any:
    """The same tokenizer, but it puts its first token before every text, as Llama's and Gemma's do."""
    import copy

    from tokenizers import processors

    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return made


PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Paris"),
    ("Question: dresser\n", " replace drawer with bobby pin"),
    ("Answer:\n\n ", "naïve café"),
    ("return", "ed by the call"),
    ("a", "b"),
    ("", " on its own"),
    ("<|endoftext|>It begins", " with it"),
]


@pytest.mark.parametrize("name", ["tokenizer", "beginning"])
@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_are_tokenized_as_lm_evaluation_harness_does(
    name: str, pair: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    """Its own code, with the tokenizer's defaults, as its Hugging Face model has them."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM

    tokenizer = request.getfixturevalue(name)
    asked: list[tuple[list[int], list[int]]] = []

    class Reference(TemplateLM):
        eot_token_id = tokenizer.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if string.startswith("<|endoftext|>"):
                add_special_tokens = False
            return tokenizer(string, add_special_tokens=add_special_tokens is not False).input_ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> Any:
            asked.extend((context, continuation) for _, context, continuation in requests)
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, *_: Any) -> Any: ...
        def generate_until(self, *_: Any) -> Any: ...

    Reference().loglikelihood([Instance("loglikelihood", {}, pair, 0)], disable_tqdm=True)
    assert [Encoder(tokenizer).pair(*pair)] == asked


def test_a_template_writes_its_own_beginning(beginning: Any) -> None:
    assert Encoder(beginning).beginning == [0]
    assert Encoder(beginning).prompt("it")[0] == 0 and Encoder(beginning).prompt("it")[1] != 0
    assert Encoder(beginning, templated=True).prompt("it") == Encoder(beginning).prompt("it")[1:]


def test_chat_prompts_pass_through_the_template(write: Callable[..., Path], tokenizer: Any) -> None:
    base = write(
        QUESTION, QUESTION | {"query": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]}
    )
    task = choice_task(chat=True)
    plain, messages = encode_questions(task, read_questions(task, base), tokenizer, 256)
    assert plain.prompt == f"[user] {QUESTION['query']}\n" and messages.prompt == "[system] Be brief.\n[user] ?\n"
    # The line's end belongs to the choice, without a space.
    assert tokenizer.decode(plain.continuations[0]) == "\nassignment"


# Multiple choice


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    rows = logits.astype(np.float64)
    shifted = rows - rows.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Counting:
    """A runtime that keeps the sequences it was asked for."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime, self.sequences = runtime, list[list[int]]()

    def logits(self, tokens: list[int]) -> NDArray[np.float32]:
        self.sequences.append(tokens)
        return self._runtime.logits(tokens)


@pytest.mark.parametrize(
    ("continuations", "passes"),
    [
        ([[5], [6], [7], [8]], 1),
        ([[5, 6, 7], [5, 6, 8], [5, 6]], 1),
        ([[9, 10], [5], [5, 6, 7], [5, 11]], 2),
        ([[5, 6], [6, 5], [7, 5]], 3),
    ],
)
def test_scores_are_those_of_one_pass_for_each_choice(
    runtime: Runtime, continuations: list[list[int]], passes: int
) -> None:
    context = list(range(20, 40))
    counting: Any = Counting(runtime)
    found = continuation_scores(counting, context, continuations)
    assert len(counting.sequences) == passes
    for score, tokens in zip(found, continuations, strict=True):
        rows = log_softmax(runtime.logits(context + tokens))[len(context) - 1 : -1]
        assert score.log_likelihood == pytest.approx(rows[np.arange(len(tokens)), tokens].sum(), abs=1e-4)
        assert score.greedy == (rows.argmax(-1).tolist() == tokens)
    greedy = list(runtime.generate(context, 3).tokens)
    assert continuation_scores(runtime, context, [greedy])[0].greedy


def test_a_model_without_numbers_gives_none(runtime: Runtime) -> None:
    class Broken:
        def logits(self, tokens: list[int]) -> NDArray[np.float32]:
            return np.full((len(tokens), 512), np.nan, np.float32)

    broken: Any = Broken()
    assert np.isnan(continuation_scores(broken, [1, 2], [[3]])[0].log_likelihood)


def test_the_likeliest_choice_by_sum_or_by_character() -> None:
    choices, values = ("no", "it certainly does", "dö"), [-2.0, -6.0, -1.9]
    assert likeliest(values, choices, normalized=False) == 2
    assert likeliest(values, choices, normalized=True) == 1
    assert likeliest([-1.0, -1.0], ("a", "b"), normalized=True) == 0
    # Characters, not bytes: -1.9 / 2 is more than -3.0 / 3, and -1.9 / 3 would be more than either.
    assert likeliest([-1.9, -2.4], ("dö", "dot"), normalized=True) == 1


# Exact match


@pytest.mark.parametrize(
    ("text", "changes", "answer"),
    [
        ("  42 \n", {}, "42"),
        ("  42 \n", {"normalize": []}, "  42 \n"),
        ("Straße", {"normalize": ["casefold"]}, "strasse"),
        ("Yes, it is! (sure)", {"normalize": ["punctuation", "casefold"]}, "yes it is sure"),
        ("one\nQ: two", {"stop": ["Q:", "\n"]}, "one"),
        ("it is 42, or 43", {"extract": r"\d+"}, "42"),
        ("Answer: B. Answer: C", {"extract": r"Answer: (\w)"}, "B"),
        ("none at all", {"extract": r"\d+"}, ""),
        ("x\n7", {"stop": ["\n"], "extract": r"\d+"}, ""),
        ("maybe", {"extract": r"may(x)?be"}, ""),
    ],
)
def test_the_answer_in_a_text(text: str, changes: dict[str, Any], answer: str) -> None:
    assert answer_in(text, match_task(**changes)) == answer


def test_references_are_normalized_but_not_searched() -> None:
    task = match_task(normalize=["strip", "casefold", "punctuation"], extract=r"\d+", stop=["."])
    assert normalized(" No. 7 ", task) == "no 7"
    assert before_stop("a.b", []) == "a.b"


def test_text_is_generated_up_to_a_stop_string(runtime: Runtime, tokenizer: Any) -> None:
    prompt = tokenizer("The following statement binds the name", add_special_tokens=False).input_ids
    whole = generate(runtime, prompt, 12, [])
    assert (whole.tokens, whole.ended) == (12, False)
    stop = runtime.decode(list(runtime.generate(prompt, 5).tokens))[-2:]
    found = generate(runtime, prompt, 12, ["not to be met", stop])
    assert found.ended and found.tokens < 12 and stop in found.text and whole.text.startswith(found.text)
    before = runtime.decode(list(runtime.generate(prompt, found.tokens - 1).tokens)) if found.tokens > 1 else ""
    assert stop not in before


def test_a_look_adds_as_many_items_as_there_were_while_there_are_any(write: Callable[..., Path]) -> None:
    base = write(*(QUESTION | PROMPT | {"query": str(number), "prompt": str(number)} for number in range(50)))

    def asked(looks: int, **changes: Any) -> list[str]:
        return [str(one.item.prompt) for one in read_questions(choice_task(**changes), base, looks)]

    assert asked(3, samples=10) == [str(number) for number in range(40)]
    assert asked(4, samples=10) == asked(3) == [str(number) for number in range(50)]
    # The first look is that of a recipe without others; the next ones are drawn from the rest.
    parts = [asked(looks, samples=10, seed=3) for looks in (1, 2, 3, 4)]
    assert [len(part) for part in parts] == [10, 20, 40, 50] and len(set(parts[3])) == 50
    for earlier, later in itertools.pairwise(parts):
        assert later[: len(earlier)] == earlier
        assert later[len(earlier) :] == sorted(later[len(earlier) :], key=int)
    several = evaluate(*(task(samples=20).model_dump(mode="json") for task in (choice_task, match_task)))
    for task in read_tasks(several.model_copy(update={"looks": 4}), base):
        assert task.counts == (20, 40, 50) and [used.looks for used in task.looks] == [3, 3, 3]
        assert [task.added(look) for look in (1, 2, 3, 4)] == [range(20), range(20, 40), range(40, 50), range(50, 50)]
    (alone,) = read_tasks(evaluate(choice_task(samples=20).model_dump(mode="json")), base)
    assert alone.looks[0] == replace(task_at(several, base), looks=1)


def task_at(declared: Evaluate, base: Path) -> TaskUsed:
    return read_tasks(declared.model_copy(update={"looks": 4}), base)[0].used(1)


# Both arms


def measured(base: Path, tokenizer: Any, arms: tuple[Runtime, Runtime], *tasks: dict[str, Any]) -> list[Any]:
    return list(measure_tasks(read_tasks(evaluate(*tasks), base), tokenizer, *arms, Progress()))


def test_a_further_look_answers_what_it_adds(
    write: Callable[..., Path], tokenizer: Any, runtime: Runtime, other: Runtime
) -> None:
    base = write(*(QUESTION | PROMPT | {"prompt": f"The {number} is"} for number in range(5)))
    declared = [task(samples=2, id=None).model_dump(mode="json") for task in (choice_task, match_task)]
    tasks = read_tasks(evaluate(*declared).model_copy(update={"looks": 3}), base)
    for look, lines in ((1, [1, 2]), (2, [3, 4]), (3, [5])):
        rows = list(measure_tasks(tasks, tokenizer, runtime, other, Progress(), look=look))
        assert [(row.task, row.item) for row in rows] == [
            (task, f"items.jsonl:{line}") for task in ("mc", "em") for line in lines
        ]


def test_both_arms_answer_the_same_items(
    write: Callable[..., Path], tokenizer: Any, runtime: Runtime, other: Runtime
) -> None:
    base = write(
        *(QUESTION | PROMPT | {"query": f"Question {number}?", "prompt": f"The {number} is"} for number in range(3))
    )
    tasks = [choice_task().model_dump(mode="json"), match_task().model_dump(mode="json")]
    rows = measured(base, tokenizer, (runtime, other), *tasks)
    assert [(row.task, row.item) for row in rows] == [
        (task, f"items.jsonl:{line}") for task in ("mc", "em") for line in (1, 2, 3)
    ]
    encoder = Encoder(tokenizer)
    for row in rows:
        if isinstance(row, ChoiceItem):
            for arm, found in ((runtime, row.baseline), (other, row.candidate)):
                pairs = [encoder.pair(row.prompt, f" {choice}") for choice in row.choices]
                scores = continuation_scores(arm, pairs[0][0], [tokens for _, tokens in pairs])
                assert found == tuple(score.log_likelihood for score in scores)
        else:
            assert isinstance(row, AnswerItem)
            assert row.baseline == generate(runtime, encoder.prompt(row.prompt), 8, [])
            assert row.candidate == generate(other, encoder.prompt(row.prompt), 8, [])


# Items that were calibrated on


def of_texts(*texts: str) -> ReadTask:
    used = TaskUsed(source="s", digest="d", items=len(texts))
    return ReadTask("mc", (used,), texts, lambda *_: None, lambda *_: iter(()))


def test_items_that_stand_in_the_calibration_text_are_noticed(tokenizer: Any) -> None:
    rng = np.random.default_rng(0)
    words = [f"{word}{rng.integers(1000)}" for word in ("name", "value", "call", "loop", "list", "key", "line") * 300]
    texts = [" ".join(words[start : start + 20]) for start in range(0, 2000, 20)]
    instruction = "Read the following statement with care and say which of the names in it is bound to a value: "
    tokens = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    task = of_texts(*(instruction + text for text in texts))
    assert unseen_items([list(range(300))], [task], tokenizer).passed
    # What all items share was calibrated on: that says nothing of any.
    shared = tokenizer(instruction, add_special_tokens=False).input_ids
    assert len(shared) > 20 and unseen_items([shared], [task], tokenizer).passed
    assert unseen_items([tokens[0]], [task], tokenizer).passed
    seen = unseen_items([tokens[0] + tokens[1]], [task], tokenizer)
    assert not seen.passed and "2 of the 100 items of mc" in seen.detail
    with pytest.raises(UsageError, match="tasks were calibrated on: 2 of the 100 items of mc"):
        check_tasks([task], tokenizer, 256, [tokens[0] + tokens[1]])
    # A passage that a few items share is their own.
    passage = f"{texts[0]} {texts[1]}"
    asked = of_texts(*(f"{passage} {text}" if number < 5 else text for number, text in enumerate(texts[2:])))
    assert (
        "5 of the 98 items"
        in unseen_items([tokenizer(passage, add_special_tokens=False).input_ids], [asked], tokenizer).detail
    )
    short = unseen_items([tokens[0]], [replace(task, texts=("yes", *texts[2:]))], tokenizer)
    assert short.passed and re.search(r"0 of the 99 items of mc \(1 are too short to tell\)", short.detail)
