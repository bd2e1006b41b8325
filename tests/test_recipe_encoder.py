"""Recipes of encoders: what cannot be true together, and what the model's kind refuses; decoders' recipes keep their digests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_encoders import save_encoder

from assay.compatibility import check_model
from assay.errors import NotSupportedError, RecipeError
from assay.models.sentence import read_sentence_settings
from assay.recipe import Gate
from assay.recipe_file import load_recipe

RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "encoder",
    "model": {"source": "./model"},
    "calibration": {"source": "python-docs", "samples": 4, "length": 32},
    "quantize": {"scheme": "W8A8", "method": "rtn"},
    "target": {"format": "onnxruntime"},
    "evaluate": {
        "length": 64,
        "quality": [{"metric": "embedding_cosine", "texts": 20}],
        "speed": [{"metric": "encode_latency"}, {"metric": "size_on_disk"}],
    },
    "gate": {"embedding_cosine": {"min": 0.9}},
}
DECODERS = {
    "quality": [{"metric": "kl_divergence"}],
    "speed": [{"metric": "decode_tokens_per_second"}],
}


def problems(directory: Path, fetch: bool | None = None, **parts: Any) -> list[str]:
    """What is wrong with the recipe when parts of it are replaced; of the file alone, or with its model."""
    recipe = copy.deepcopy(RECIPE)
    for name, part in parts.items():
        recipe[name] = part if not isinstance(part, dict) or name == "gate" else {**recipe.get(name, {}), **part}
    path = directory / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))
    try:
        loaded, document = load_recipe(path)
        if fetch is not None:
            check_model(loaded, document, directory, fetch)
    except RecipeError as error:
        return [problem.message for problem in error.problems]
    return []


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_model: Any) -> dict[str, Path]:
    """A directory for a recipe beside each kind of model."""
    root = tmp_path_factory.mktemp("recipes")
    for name in ("BertModel", "RobertaModel", "BertForSequenceClassification", "BertForMaskedLM"):
        (root / name).mkdir()
        save_encoder(root / name / "model", name)
    (root / "decoder").mkdir()
    (root / "decoder" / "model").symlink_to(tiny_model("llama"))
    return {path.name: path for path in root.iterdir()}


def test_a_sound_recipe_is_accepted(places: dict[str, Path]) -> None:
    assert problems(places["BertModel"], fetch=False) == []
    classes = {"quality": [{"metric": "class_agreement"}]}
    found = problems(
        places["BertForSequenceClassification"], False, evaluate=classes, gate={"class_agreement": {"min": 0.9}}
    )
    assert found == []


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"evaluate": DECODERS, "gate": {"kl_divergence": {"max": 1}}},
            "kl_divergence means nothing for an encoder, which onnxruntime takes; there are: embedding_cosine",
        ),
        ({"evaluate": {"speed": [{"metric": "time_to_first_token"}]}}, "there are: encode_latency, encode_throughput"),
        ({"target": {"format": "compressed-tensors"}}, "is measured on encoders, which target onnxruntime takes"),
        ({"evaluate": {"structured": {}}}, "structured asks for text, which an encoder does not write; remove it."),
        (
            {"evaluate": {"quality": [{"metric": "embedding_cosine"}, {"metric": "class_agreement"}]}},
            "a model gives classes or embeddings, not both",
        ),
        (
            {
                "evaluate": {"quality": [{"metric": "class_accuracy", "label": "kind"}]},
                "gate": {"class_accuracy": {"max_drop": 0.1}},
            },
            "classes are known of rows only; let evaluate.text be of source jsonl or hf.",
        ),
        (
            {
                "evaluate": {
                    "quality": [
                        {"metric": "embedding_cosine"},
                        {"metric": "retrieval_agreement", "query_tokens": 8},
                        {"metric": "retrieval_accuracy", "query_tokens": 9},
                    ]
                }
            },
            "both retrieval metrics take the same queries; give them the same query_tokens.",
        ),
        (
            {
                "evaluate": {
                    "quality": [{"metric": "embedding_cosine"}, {"metric": "retrieval_agreement", "query_tokens": 40}]
                }
            },
            "a query of 40 tokens leaves too little of a text of 64 to be found. Lower it, or raise evaluate.length.",
        ),
    ],
)
def test_what_cannot_be_true_together_is_said(tmp_path: Path, parts: dict[str, Any], said: str) -> None:
    assert any(said in message for message in problems(tmp_path, **parts)), problems(tmp_path, **parts)


@pytest.mark.parametrize(
    ("kind", "parts", "said"),
    [
        ("decoder", {}, "LlamaForCausalLM is a decoder, and onnxruntime takes encoders; use onnxruntime-genai."),
        (
            "BertModel",
            {"target": {"format": "onnxruntime-genai"}, "evaluate": DECODERS, "gate": {"kl_divergence": {"max": 1}}},
            "BertModel is an encoder, and onnxruntime-genai takes decoders; use onnxruntime.",
        ),
        ("BertForMaskedLM", {}, "BertForMaskedLM is no bare encoder (masked language model); onnxruntime takes"),
        ("BertForSequenceClassification", {}, "BertForSequenceClassification gives classes, not embeddings"),
        (
            "BertModel",
            {"evaluate": {"quality": [{"metric": "class_agreement"}]}, "gate": {"class_agreement": {"min": 0.9}}},
            "BertModel gives embeddings, not classes; measure those.",
        ),
        ("BertModel", {"quantize": {"scheme": "FP8"}}, "onnxruntime cannot hold FP8; schemes that work: W4A16"),
        ("BertModel", {"quantize": {"kv_cache": "fp8"}}, "onnxruntime runs encoders, which have no key/value cache"),
        ("RobertaModel", {"evaluate": {"length": 160}}, "160 tokens exceed what the encoder has positions for, 158."),
        (
            "BertModel",
            {"evaluate": {"speed": [{"metric": "encode_latency", "shapes": [{"batch": 1, "tokens": 512}]}]}},
            "512 tokens exceed what the encoder has positions for, 160.",
        ),
        (
            "BertModel",
            {"quantize": {"overrides": [{"match": "lm_head", "scheme": "none"}]}},
            "the override 'lm_head' matches no module; there are in each layer, attention.self.query",
        ),
    ],
)
def test_what_a_model_cannot_be_is_said(places: dict[str, Path], kind: str, parts: dict[str, Any], said: str) -> None:
    found = problems(places[kind], False, **parts)
    assert any(said in message for message in found), found


def test_gates_that_are_not_asked_for_are_no_part_of_a_digest() -> None:
    gate = Gate.model_validate_json('{"kl_divergence": {"max": 0.1}}').model_dump(mode="json")
    assert "embedding_cosine" not in gate and "encode_latency" not in gate
    assert "top1_agreement" in gate, "as it always was"


def test_the_digest_of_the_demo_is_the_one_it_was_published_with() -> None:
    recipe, _ = load_recipe(Path(__file__).parents[1] / "recipes" / "smollm2-135m-w4a16-ort.yaml")
    assert recipe.digest() == "sha256:ce79d5866d8b7832ff784a8511a0026b283a2181672a3948a42c2515e0537f76"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"pooling_mode_max_tokens": True}, "it pools by max_tokens; supported: mean, cls."),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "it pools by mean and cls"),
        ({"pooling_mode": "lasttoken"}, "it pools by lasttoken"),
    ],
)
def test_a_pooling_that_the_graph_would_lack_is_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    directory = save_encoder(tmp_path / "model")
    assert read_sentence_settings(directory).pooling == "mean"
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotSupportedError, match=said):
        read_sentence_settings(directory)
    modules = json.loads((directory / "modules.json").read_text())
    modules.append({"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(NotSupportedError, match="the module Dense follows the encoder"):
        read_sentence_settings(directory)
