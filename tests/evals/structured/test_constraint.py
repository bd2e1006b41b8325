"""The schema enforced: on what every runtime computes, and on nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assay.errors import UsageError
from assay_evals.runtimes.base import Runtime, open_runtime
from assay_evals.structured.constraint import Enforcer, SchemaError, enforcing_library
from assay_evals.structured.outputs import judged

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["left", "right"]}, "sure": {"type": "boolean"}, "of": {"const": 3}},
    "required": ["kind", "sure", "of"],
    "additionalProperties": False,
    # A random model likes white space, of which JSON allows any amount.
    "x-guidance": {"whitespace_flexible": False},
}
RUNTIMES = [
    pytest.param("transformers"),
    pytest.param("onnxruntime-genai", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def opened(tiny_model: Callable[[str], Path], genai_model: Callable[[str], Path]) -> Callable[[str], Runtime]:
    def open_one(name: str) -> Runtime:
        return open_runtime(name, (genai_model if name == "onnxruntime-genai" else tiny_model)("llama"))

    return open_one


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_random_model_follows_the_schema_when_it_is_enforced(
    opened: Callable[[str], Runtime], tokenizer: Any, name: str
) -> None:
    runtime = opened(name)
    constraint = Enforcer(tokenizer, runtime.ends).compile(SCHEMA)
    prompt = runtime.encode("The value is")
    text = runtime.decode(list(runtime.generate(prompt, 60, stops=True).tokens))
    assert not judged(text, SCHEMA, None, ordered=True).parsed
    written = runtime.generate_picked(prompt, 120, constraint.pick).tokens
    assert judged(runtime.decode(list(written)), SCHEMA, None, ordered=True).valid
    # One more pick than tokens, for the end of the text, and the first one is the compilation's.
    assert len(constraint.step_seconds) in (len(written), len(written) - 1)
    assert constraint.compile_seconds > 0 and min(constraint.step_seconds) > 0


@pytest.mark.parametrize("name", RUNTIMES)
def test_picking_the_likeliest_is_what_the_runtime_does_by_itself(opened: Callable[[str], Runtime], name: str) -> None:
    runtime = opened(name)
    prompt = runtime.encode("The value of the")
    picked = runtime.generate_picked(prompt, 12, lambda scores: int(scores.argmax()))
    assert picked.tokens == runtime.generate(prompt, 12).tokens
    assert len(picked.token_seconds) == 12 and sorted(picked.token_seconds) == list(picked.token_seconds)
    assert runtime.generate_picked(prompt, 12, lambda _: None).tokens == ()
    with pytest.raises(UsageError, match="exceed the model's context"):
        runtime.generate_picked(prompt, 1000, lambda _: 1)


@pytest.mark.slow
def test_it_gives_the_tokens_that_onnxruntime_genais_own_guidance_gives(
    genai_model: Callable[[str], Path], tokenizer: Any
) -> None:
    import onnxruntime_genai

    og: Any = onnxruntime_genai
    directory = genai_model("llama")
    runtime = open_runtime("onnxruntime-genai", directory)
    prompt = runtime.encode("The value is")
    ours = runtime.generate_picked(prompt, 60, Enforcer(tokenizer, runtime.ends).compile(SCHEMA).pick).tokens
    model = og.Model(str(directory))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + 60, do_sample=False)
    params.set_guidance("json_schema", json.dumps(SCHEMA))
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    theirs = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    assert list(ours) == [token for token in theirs if token not in runtime.ends]


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex"),
    ],
)
def test_what_cannot_be_enforced_is_named(tokenizer: Any, schema: Any, named: str) -> None:
    with pytest.raises(SchemaError, match=named) as caught:
        Enforcer(tokenizer, [0]).compile(schema)
    assert "\n" not in str(caught.value)


def test_scores_of_padding_are_never_picked(tokenizer: Any) -> None:
    constraint = Enforcer(tokenizer, [0]).compile({"const": 3})
    scores = np.zeros(len(tokenizer) + 64, dtype=np.float32)
    scores[len(tokenizer) :] = 100
    assert tokenizer.decode([constraint.pick(scores)]).strip() in ("", "3")


@pytest.mark.parametrize("absent", ["llguidance", "jsonschema"])
def test_a_library_that_is_absent_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    version = metadata.version

    def without(name: str) -> str:
        if name == absent:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    assert enforcing_library() == f"llguidance {version('llguidance')}"
    monkeypatch.setattr(metadata, "version", without)
    with pytest.raises(UsageError, match=rf"needs {absent}, which is not installed: pip install 'assay\[structured\]'"):
        enforcing_library()
