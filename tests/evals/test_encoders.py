"""A whole job on a tiny encoder, and what its evaluator sees: texts, queries, padding, a tokenizer that is another one."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_encoders import save_encoder, save_encoder_tokenizer

from assay.calibration import frame_of, framed_tokens
from assay.errors import UsageError
from assay.job import load_tokenizer
from assay.models.checkpoint import Checkpoint
from assay.models.encoders import encoder_shape
from assay.progress import Progress
from assay.recipe import Evaluate, PythonDocsCalibration
from assay.targets import onnxruntime as target
from assay.text import Document, python_docs
from assay_evals.encoders.checks import padding_invariance, same_tokens, unseen_texts
from assay_evals.encoders.compared import encoder_requests
from assay_evals.encoders.measure import measure_classes, measure_embeddings, measure_retrieval
from assay_evals.encoders.texts import EncoderText, select_queries, select_texts
from assay_evals.speed.measure import measure_speed

RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "tiny-encoder",
    "model": {"source": "./model"},
    "calibration": {"source": "python-docs", "samples": 4, "length": 32},
    "quantize": {"scheme": "W8A8", "method": "rtn"},
    "target": {"format": "onnxruntime"},
    "evaluate": {
        "length": 32,
        "quality": [
            {"metric": "embedding_cosine", "texts": 60},
            {"metric": "retrieval_agreement", "queries": 40, "query_tokens": 8, "top": 3},
        ],
        "speed": [{"metric": "size_on_disk"}],
        "blocks": 3,
    },
    "gate": {"embedding_cosine": {"min": 0.9}, "size_on_disk": {"max_ratio": 2}},
    "publish": {"registry": "store"},
}


class Encoder:
    """Stands in for a runtime: a text's vector is a sum over its tokens' own, and over padding where that is not masked."""

    name, task, max_tokens, labels = "none", "embedding", 512, tuple(f"class {number}" for number in range(16))

    def __init__(self, seed: int = 0, noise: float = 0.0, masked: bool = True) -> None:
        self._table = np.random.default_rng(seed).normal(0, 1, (600, 16))
        self._table += noise * np.random.default_rng(9).normal(0, 1, (600, 16))
        self._masked = masked

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 600 for letter in text]

    def compute(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        longest = max(map(len, batch))
        padded = [list(ids) + ([] if self._masked else [1] * (longest - len(ids))) for ids in batch]
        return np.array([self._table[ids].sum(0) for ids in padded], dtype=np.float32)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_encoder_tokenizer(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return python_docs("evaluation")[:30]


def asking(*quality: dict[str, Any], length: int = 32) -> Evaluate:
    return Evaluate.model_validate_json(json.dumps({"length": length, "quality": quality}))


COSINE = {"metric": "embedding_cosine", "texts": 50}
RETRIEVAL = {"metric": "retrieval_agreement", "queries": 40, "query_tokens": 8, "top": 5}


def test_calibration_has_the_encoders_own_tokens_around_every_window(tokenizer: Any) -> None:
    assert frame_of(tokenizer) == ([0], [2])
    sampling = PythonDocsCalibration(source="python-docs", samples=5, length=24)
    tokens = framed_tokens(python_docs("calibration"), tokenizer, sampling)
    assert tokens.shape == (5, 24)
    assert (tokens[:, 0] == 0).all() and (tokens[:, -1] == 2).all()
    assert not (tokens[:, 1:-1] < 3).any()


def test_texts_are_of_many_documents_and_queries_are_not_in_their_passages(
    tokenizer: Any, documents: list[Document]
) -> None:
    texts = select_texts(documents, tokenizer, asking(COSINE))
    assert len({text.document for text in texts[:30]}) == 30
    assert all(len(text.tokens) <= 32 and text.tokens[0] == 0 and text.tokens[-1] == 2 for text in texts)
    queries = select_queries(documents, tokenizer, asking(COSINE, RETRIEVAL))
    whole = {text.name: text.tokens for text in select_texts(documents, tokenizer, asking(COSINE | {"texts": 200}))}
    for one in queries:
        assert (*one.query.tokens[:-1], *one.passage.tokens[1:]) == whole[one.query.name]
        assert len(one.query.tokens) == 8 + 2
    with pytest.raises(UsageError, match=r"gives 30 texts of up to 32 tokens; the recipe declares 400"):
        select_texts(documents, tokenizer, asking({"metric": "class_agreement"}))
    with pytest.raises(UsageError, match="retrieval asks for 9999 queries"):
        select_queries(documents, tokenizer, asking(RETRIEVAL | {"queries": 9999}))


def test_what_is_measured_is_what_the_vectors_say(tokenizer: Any, documents: list[Document]) -> None:
    arms = (Encoder(), Encoder(noise=0.3))
    texts = select_texts(documents, tokenizer, asking(COSINE))
    rows = list(measure_embeddings(arms, texts, Progress()))
    before, after = (arm.compute([texts[7].tokens])[0].astype(float) for arm in arms)
    assert rows[7].cosine == pytest.approx(before @ after / np.linalg.norm(before) / np.linalg.norm(after), abs=1e-6)
    other = arms[1].compute([texts[0].tokens])[0].astype(float)
    assert rows[7].candidate[0] == pytest.approx(
        after @ other / np.linalg.norm(after) / np.linalg.norm(other), abs=1e-6
    )
    assert (len(rows[7].baseline), len(rows[40].baseline)) == (31, 32), "no text is compared with itself"
    same = list(measure_embeddings((Encoder(), Encoder()), texts, Progress()))
    assert min(row.cosine or 0 for row in same) > 0.999999

    queries = select_queries(documents, tokenizer, asking(RETRIEVAL))
    found = list(measure_retrieval(arms, queries, 5, Progress()))
    passages = np.stack([arms[0].compute([one.passage.tokens])[0] for one in queries]).astype(float)
    asked = arms[0].compute([queries[3].query.tokens])[0].astype(float)
    nearest = np.argsort(-(passages @ asked) / np.linalg.norm(passages, axis=1))[:5]
    assert found[3].baseline == tuple(queries[place].passage.name for place in nearest)
    assert any(row.baseline != row.candidate for row in found)

    given = list(measure_classes((Encoder(), Encoder()), texts[:5], {texts[0].document: "class 3"}, Progress()))
    assert {row.classes for row in given} == {16} and given[0].label == "class 3" and given[1].label is None


def test_a_lost_mask_and_another_tokenizer_are_noticed(tokenizer: Any, documents: list[Document]) -> None:
    texts = select_texts(documents, tokenizer, asking(COSINE))
    assert padding_invariance({"baseline": Encoder(), "candidate": Encoder()}, texts).passed
    assert not padding_invariance({"baseline": Encoder(), "candidate": Encoder(masked=False)}, texts).passed
    found = same_tokens({"baseline": Encoder()}, tokenizer, texts)
    assert not found.passed and "the baseline's tokenizer cuts the text" in found.detail


def test_rules_of_tables_are_no_text_in_common() -> None:
    dashes = EncoderText("a", 0, (0, *[9] * 40, 5, 2), "----", None)
    assert unseen_texts([[0, *[9] * 40, 7, 2]], [dashes]).passed
    words = EncoderText("a", 0, tuple(range(40)), "words", None)
    assert not unseen_texts([list(range(40))], [words]).passed


@pytest.mark.slow
def test_an_encoder_goes_from_recipe_to_registry(assay: Any, tmp_path: Path) -> None:
    save_encoder(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(json.dumps(RECIPE))
    done = assay("compile", "recipe.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"]["verdict"] == "PASS" and found["published"]["digest"].startswith("sha256:")
    rows = {row["metric"]: row for row in (*found["verdict"]["gates"], *found["verdict"]["reported"])}
    assert 0.99 < rows["embedding_cosine"]["candidate"] < 1
    run = Path(found["run"]) if Path(found["run"]).is_absolute() else tmp_path / found["run"]
    manifest = json.loads((run / "artifact" / "manifest.json").read_text())
    assert manifest["coverage"] == 1.0 and manifest["opset"] == 20
    assert manifest["encoder"] == {
        "version": 1,
        "task": "embedding",
        "max_tokens": 160,
        "pad_token_id": 1,
        "pooling": "mean",
        "normalized": True,
    }
    assert "Embeddings that moved most" in (run / "report.html").read_text()
    assert assay("gate", run, cwd=tmp_path).returncode == 0
    again = assay("compile", "recipe.yaml", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["verdict"] == found["verdict"], "a second run finds everything in the cache"


@pytest.mark.slow
def test_batches_of_every_shape_are_timed_in_fresh_processes(
    tmp_path: Path, tokenizer: Any, documents: list[Document]
) -> None:
    target.build_baseline(Checkpoint(save_encoder(tmp_path / "model"), encoder_shape), tmp_path / "built")
    shapes = [{"batch": 2, "tokens": 16}, {"batch": 1, "tokens": 24}]
    speed = [{"metric": "encode_latency", "shapes": shapes}, {"metric": "encode_throughput", "shapes": shapes[:1]}]
    evaluate = Evaluate.model_validate_json(json.dumps({"quality": [COSINE], "speed": speed}))
    requests = encoder_requests(evaluate, documents, tokenizer)
    assert [(len(one["batch"]), len(one["batch"][0])) for one in requests] == [(2, 16), (1, 24)]
    assert all(ids[0] == 0 and ids[-1] == 2 for one in requests for ids in one["batch"])
    arms: Any = {"baseline": tmp_path / "built", "candidate": tmp_path / "built"}
    runs = list(measure_speed(arms, "onnxruntime", requests, range(1), Progress()))
    assert [len(run.encodings) for run in runs] == [2] * 4
    for run in runs:
        assert [(one.batch, one.tokens, len(one.seconds)) for one in run.encodings] == [(2, 16, 10), (1, 24, 10)]
        assert all(seconds > 0 for one in run.encodings for seconds in one.seconds if seconds is not None)
        assert run.generations == () and run.peak_memory_bytes > 10**7


def test_memory_and_load_time_have_a_batch_to_load_for(tokenizer: Any, documents: list[Document]) -> None:
    evaluate = Evaluate.model_validate_json(json.dumps({"quality": [COSINE], "speed": [{"metric": "load_time"}]}))
    assert len(encoder_requests(evaluate, documents, tokenizer)) == 1
    silent = Evaluate.model_validate_json(json.dumps({"quality": [COSINE], "speed": [{"metric": "size_on_disk"}]}))
    assert encoder_requests(silent, documents, tokenizer) == []


@pytest.mark.slow
def test_a_classifier_is_judged_by_its_classes(assay: Any, tmp_path: Path) -> None:
    save_encoder(
        tmp_path / "model", "BertForSequenceClassification", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}
    )
    texts = [str(document.content)[:200] for document in python_docs("evaluation")[:30]]
    rows = [{"text": text, "kind": index % 2} for index, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = copy.deepcopy(RECIPE) | {"gate": {"class_agreement": {"min": 0.5}}}
    quality = [{"metric": "class_agreement", "texts": 30}, {"metric": "class_accuracy", "texts": 30, "label": "kind"}]
    recipe["evaluate"] = {
        "text": {"source": "jsonl", "path": "rows.jsonl", "field": "text"},
        "length": 64,
        "quality": quality,
        "speed": [{"metric": "size_on_disk"}],
        "blocks": 3,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    done = assay("compile", "recipe.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = json.loads(done.stdout)["verdict"]
    found = {row["metric"]: row for row in (*verdict["gates"], *verdict["reported"])}
    assert found["class_agreement"]["n"] == found["class_accuracy"]["n"] == 30
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"kind": "maybe"}) + "\n" for row in rows))
    wrong = assay("compile", "recipe.yaml", cwd=tmp_path)
    assert (
        wrong.returncode == 2 and "holds 'maybe', which is no class of the model; it has: 0, 1, no, yes" in wrong.stderr
    )
