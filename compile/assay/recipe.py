"""The recipe: everything one job says, as strict frozen data (recipe_file.py reads it). Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from assay.files import canonical_json, sha256_bytes
from assay.strict import Strict

GroupedScheme = Literal["W4A16", "W4A16_ASYM", "W8A16"]
FixedScheme = Literal[
    "W8A8", "W8A8_STATIC", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16", "MXFP4", "NVFP4A16", "NVFP4"
]
SchemeName = Literal[GroupedScheme, FixedScheme]
GroupSize = Literal[32, 64, 128, "channel"]
RangeName = Literal["minmax", "mse", "activation_weighted"]
Engine = Literal["vllm", "sglang", "tensorrt-llm"]
Count = Annotated[int, Field(gt=0, le=1_000_000_000)]
Length = Annotated[int, Field(ge=8, le=131072)]
NewTokens = Annotated[int, Field(ge=8, le=1_000_000_000)]
QueryTokens = Annotated[int, Field(ge=4, le=512, description="the beginning of a text, taken out of its passage")]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


_COUNT_SCHEMA = {"type": "integer", "exclusiveMinimum": 0, "maximum": 1_000_000_000}
PromptLengths = Annotated[
    tuple[Count, ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [_COUNT_SCHEMA, {"type": "array", "items": _COUNT_SCHEMA, "minItems": 1}]}),
]


class Model(Strict):
    """Where the weights come from."""

    source: Annotated[
        str,
        Field(
            pattern=r"^(hf:[\w.-]+/[\w.-]+|package:[\w.]+/.+|(\.{1,2})?/.+)$",
            description="hf:ORG/NAME, ./directory, ./file.gguf, package:MODULE/FILE.gguf or package:MODULE/DIRECTORY",
        ),
    ]
    revision: Annotated[str, Field(min_length=1, description="branch, tag or commit of an hf: source")] | None = None
    dequantize: bool = False


class PythonDocs(Strict):
    """English prose that CPython ships as pydoc_data.topics, split by document into two disjoint parts."""

    source: Literal["python-docs"]


class TextFile(Strict):
    """A local UTF-8 text file; documents are separated by lines that hold only `---`, or else by length."""

    source: Literal["text"]
    path: Annotated[str, Field(min_length=1, description="relative to the recipe")]


class JsonLinesRows(Strict):
    """A local JSONL file."""

    source: Literal["jsonl"]
    path: Annotated[str, Field(min_length=1, description="relative to the recipe")]


class JsonLines(JsonLinesRows):
    """A local JSONL file: one document per line, in `field`; chat messages pass through the model's own template."""

    field: Annotated[str, Field(min_length=1)]


class HubRows(Strict):
    """A data set of the Hugging Face Hub (extra `datasets`)."""

    source: Literal["hf"]
    name: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$", description="ORG/NAME, or NAME")]
    config: str | None = None
    split: str = "train"
    revision: str | None = None


class HubDataset(HubRows):
    """A data set of the Hugging Face Hub: one document per row, in `field`."""

    field: Annotated[str, Field(min_length=1)]


class Sampling(Strict):
    """How many windows of how many tokens are drawn from a text, by which seed."""

    samples: Count = 64
    length: Length = 512
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 0


class PythonDocsCalibration(Sampling, PythonDocs): ...


class TextFileCalibration(Sampling, TextFile): ...


class JsonLinesCalibration(Sampling, JsonLines): ...


class HubDatasetCalibration(Sampling, HubDataset): ...


class Tagged(Strict):
    """Rows that say what kind they are: every quality metric is measured for each kind too."""

    tag: (
        Annotated[str, Field(min_length=1, description="field with a language, a task, …: one slice for each value")]
        | None
    ) = None


class TaggedJsonLines(Tagged, JsonLines): ...


class TaggedHubDataset(Tagged, HubDataset): ...


Text = Annotated[PythonDocs | TextFile | TaggedJsonLines | TaggedHubDataset, Field(discriminator="source")]
Calibration = Annotated[
    PythonDocsCalibration | TextFileCalibration | JsonLinesCalibration | HubDatasetCalibration,
    Field(discriminator="source"),
]


class Override(Strict):
    """Another scheme for the modules that a pattern names; the first match wins. `none` leaves them unquantized."""

    match: Annotated[str, Field(min_length=1, description='module name or glob: "lm_head", "*.mlp.down_proj"')]
    scheme: Literal[SchemeName, "none"]
    group_size: GroupSize | None = None


class Scheme(Strict):
    """The number format of the weights, and how the range of each group is found."""

    scheme: SchemeName
    group_size: Annotated[
        GroupSize | None, Field(description="input channels that share a scale; 64 where the scheme leaves it open")
    ] = None
    range: RangeName = "activation_weighted"
    transform: Annotated[
        Literal["none", "awq", "smoothquant"],
        Field(description="factors per channel that are moved into the module before"),
    ] = "none"
    strength: Annotated[
        Annotated[float, Field(ge=0, le=1)] | Literal["search"] | None,
        Field(description="smoothquant's migration strength; search: the best of each layer, which is the default"),
    ] = None
    overrides: tuple[Override, ...] = ()
    kv_cache: Annotated[
        Literal["fp8"] | None, Field(description="format of the key/value cache, with one calibrated scale per layer")
    ] = None


class Rtn(Scheme):
    """Round to nearest."""

    method: Literal["rtn"]


class Gptq(Scheme):
    """GPTQ (Frantar et al. 2022), columns in order of input power."""

    method: Literal["gptq"]
    damping: Annotated[float, Field(gt=0, le=1, description="fraction of the mean diagonal of the Gram matrix")] = 0.01
    correction: Annotated[
        float, Field(ge=0, le=1, description="share of the way towards weights that undo the errors of earlier layers")
    ] = 0.5


Quantize = Annotated[Rtn | Gptq, Field(discriminator="method")]


class OnnxRuntimeGenai(Strict):
    """A directory that onnxruntime-genai loads."""

    format: Literal["onnxruntime-genai"]
    device: Literal["cpu"] = "cpu"
    accuracy_level: Annotated[
        Literal[0, 1, 4], Field(description="MatMulNBits arithmetic: 0 as the weights, 1 float32, 4 int8 activations")
    ] = 4


class OnnxRuntime(Strict):
    """An encoder as one ONNX graph, pooling included, which ONNX Runtime runs."""

    format: Literal["onnxruntime"]
    device: Literal["cpu"] = "cpu"
    accuracy_level: Annotated[
        Literal[0, 1, 4],
        Field(description="arithmetic of weight-only schemes: 0 as the weights, 1 float32, 4 int8 activations"),
    ] = 4


class CheckpointTarget(Strict):
    """A flat Hugging Face directory, which serving engines load."""

    device: Literal["cpu"] = "cpu"
    engine: Annotated[
        Engine | None,
        Field(description="what is to serve it: schemes that this engine is known not to read are refused"),
    ] = None


class CompressedTensors(CheckpointTarget):
    """The format of vLLM's own tools: every scheme, different ones side by side."""

    format: Literal["compressed-tensors"]


class AwqCheckpoint(CheckpointTarget):
    """AutoAWQ's GEMM layout: 4-bit weights, whatever method chose them."""

    format: Literal["awq"]


class GptqCheckpoint(CheckpointTarget):
    """AutoGPTQ's layout: 4- and 8-bit weights, whatever method chose them."""

    format: Literal["gptq"]


class ModelOptCheckpoint(CheckpointTarget):
    """The format of NVIDIA's ModelOpt, TensorRT-LLM's own: 8- and 4-bit floats."""

    format: Literal["modelopt"]


Target = Annotated[
    OnnxRuntimeGenai | OnnxRuntime | CompressedTensors | AwqCheckpoint | GptqCheckpoint | ModelOptCheckpoint,
    Field(discriminator="format"),
]


class KlDivergenceMetric(Strict):
    """KL(baseline ‖ candidate) over the whole vocabulary, nats per token."""

    metric: Literal["kl_divergence"]
    tokens: Count = 20000


class Top1AgreementMetric(Strict):
    """Share of positions at which baseline and candidate put the same token first."""

    metric: Literal["top1_agreement"]
    tokens: Count = 20000


class ClozeAccuracyMetric(Strict):
    """Share of passages whose last word the model completes greedily."""

    metric: Literal["cloze_accuracy"]
    samples: Count = 1000


class GreedyAgreementMetric(Strict):
    """Share of prompts that both arms continue with the same tokens, each on its own, as when they are served."""

    metric: Literal["greedy_agreement"]
    prompts: Count = 32
    prompt_tokens: Count = 64
    new_tokens: Count = 32


class EmbeddingCosineMetric(Strict):
    """Cosine of an encoder's embedding of a text and the baseline's, and the smallest ones."""

    metric: Literal["embedding_cosine"]
    texts: Count = 400


class SimilarityRankMetric(Strict):
    """Rank correlation (Spearman) of the similarities of a text to others, between the two arms."""

    metric: Literal["similarity_rank"]
    texts: Count = 400


class RetrievalAgreementMetric(Strict):
    """Share of the passages nearest to a query, the first `top` of them, that both arms find, each in an index of its own."""

    metric: Literal["retrieval_agreement"]
    queries: Count = 300
    query_tokens: QueryTokens = 16
    top: Annotated[int, Field(ge=1, le=100)] = 10


class RetrievalAccuracyMetric(Strict):
    """Share of queries whose nearest passage is the one that they were taken out of (inverse cloze)."""

    metric: Literal["retrieval_accuracy"]
    queries: Count = 300
    query_tokens: QueryTokens = 16


class ClassAgreementMetric(Strict):
    """Share of texts that both arms of a classifier put into the same class."""

    metric: Literal["class_agreement"]
    texts: Count = 400


class ClassAccuracyMetric(Strict):
    """Share of texts that a classifier puts into the class that their row names."""

    metric: Literal["class_accuracy"]
    texts: Count = 400
    label: Annotated[str, Field(min_length=1, description="field of evaluate.text with a class's name or number")]


class DecodeMetric(Strict):
    """Tokens per second after the first token: (n − 1) / (time of the last − time of the first)."""

    metric: Literal["decode_tokens_per_second"]
    prompt_tokens: Count = 256
    new_tokens: NewTokens = 64


class InterTokenLatencyMetric(Strict):
    """Seconds between one token and the next: the mean gap of a process, all requests pooled, and how long the slow ones take."""

    metric: Literal["inter_token_latency"]
    prompt_tokens: PromptLengths = (256,)
    new_tokens: NewTokens = 64


class TimePerOutputTokenMetric(Strict):
    """Seconds per token after the first, for each request: (time of the last − time of the first) / (n − 1)."""

    metric: Literal["time_per_output_token"]
    prompt_tokens: PromptLengths = (256,)
    new_tokens: NewTokens = 64


class EndToEndLatencyMetric(Strict):
    """Seconds from the request to its last token."""

    metric: Literal["end_to_end_latency"]
    prompt_tokens: PromptLengths = (256,)
    new_tokens: NewTokens = 64


class TimeToFirstTokenMetric(Strict):
    """Seconds from the request to the first generated token."""

    metric: Literal["time_to_first_token"]
    prompt_tokens: PromptLengths = (256,)


class PrefillMetric(Strict):
    """Tokens of the prompt per second until the first generated token."""

    metric: Literal["prefill_tokens_per_second"]
    prompt_tokens: PromptLengths = (256,)


class PrefixReuseMetric(Strict):
    """Seconds to the first token when an earlier request left the prompt's first `prefix_tokens` in the cache."""

    metric: Literal["prefix_reuse"]
    prompt_tokens: Count = 256
    prefix_tokens: Count = 192


class EnergyMetric(Strict):
    """Joules per generated token, by the processor's own counters (RAPL), the prompt's share included."""

    metric: Literal["energy_per_output_token"]
    prompt_tokens: Count = 256
    new_tokens: NewTokens = 64


class BatchShape(Strict):
    """What an encoder is given at once: so many texts of so many tokens each."""

    batch: Annotated[int, Field(ge=1, le=4096)]
    tokens: Annotated[int, Field(ge=2, le=131072)]


BatchShapes = Annotated[tuple[BatchShape, ...], Field(min_length=1)]


class EncodeLatencyMetric(Strict):
    """Seconds in which an encoder computes a batch of each shape."""

    metric: Literal["encode_latency"]
    shapes: BatchShapes = (BatchShape(batch=1, tokens=128),)


class EncodeThroughputMetric(Strict):
    """Texts per second of an encoder at each shape, one batch after the other."""

    metric: Literal["encode_throughput"]
    shapes: BatchShapes = (BatchShape(batch=8, tokens=128),)


class LoadTimeMetric(Strict):
    """Seconds in which a fresh process loads the model."""

    metric: Literal["load_time"]


class PeakMemoryMetric(Strict):
    """Peak resident memory of a fresh process that loads the model and generates."""

    metric: Literal["peak_memory"]


class SizeOnDiskMetric(Strict):
    """Bytes of all files of the artifact."""

    metric: Literal["size_on_disk"]


EncoderMetric = (
    EmbeddingCosineMetric
    | SimilarityRankMetric
    | RetrievalAgreementMetric
    | RetrievalAccuracyMetric
    | ClassAgreementMetric
    | ClassAccuracyMetric
)
RetrievalMetric = RetrievalAgreementMetric | RetrievalAccuracyMetric
ClassMetric = ClassAgreementMetric | ClassAccuracyMetric
EncoderSpeedMetric = EncodeLatencyMetric | EncodeThroughputMetric
QualityMetric = Annotated[
    KlDivergenceMetric | Top1AgreementMetric | ClozeAccuracyMetric | GreedyAgreementMetric | EncoderMetric,
    Field(discriminator="metric"),
]
SpeedMetric = Annotated[
    DecodeMetric
    | InterTokenLatencyMetric
    | TimePerOutputTokenMetric
    | EndToEndLatencyMetric
    | TimeToFirstTokenMetric
    | PrefillMetric
    | PrefixReuseMetric
    | EnergyMetric
    | EncoderSpeedMetric
    | LoadTimeMetric
    | PeakMemoryMetric
    | SizeOnDiskMetric,
    Field(discriminator="metric"),
]


class Extraction(Strict):
    """Short notes that ship with Assay, whose facts are to be given as JSON; for models with a chat template."""

    source: Literal["extraction"]


class StructuredJsonLines(Strict):
    """A local JSONL file: on each line a prompt (a text, or chat messages), a JSON Schema, and where known what is right."""

    source: Literal["jsonl"]
    path: Annotated[str, Field(min_length=1, description="relative to the recipe")]
    prompt_field: Annotated[str, Field(min_length=1)] = "prompt"
    schema_field: Annotated[str, Field(min_length=1)] = "schema"
    expected_field: Annotated[
        str, Field(min_length=1, description="the right object, or some of its properties; a line may do without")
    ] = "expected"


class Structured(Strict):
    """Output that has to follow a JSON Schema: what both arms write on their own, and with the schema enforced."""

    items: Annotated[Extraction | StructuredJsonLines, Field(discriminator="source")] = Extraction(source="extraction")
    samples: Annotated[int, Field(ge=2, le=1_000_000_000, description="the first items, this many")] = 50
    new_tokens: Count = 256
    ordered_arrays: Annotated[bool, Field(description="whether the order of an expected array matters")] = True


def request_lengths(metric: Strict) -> dict[int, int]:
    """Tokens of the prompt → new tokens, of every request that a metric asks for."""
    prompts = getattr(metric, "prompt_tokens", ())
    return dict.fromkeys((prompts,) if isinstance(prompts, int) else prompts, getattr(metric, "new_tokens", 1))


FieldName = Annotated[str, Field(min_length=1, description="the name of a field of every item")]
Rows = Annotated[JsonLinesRows | HubRows, Field(discriminator="source")]


class DeclaredTask(Strict):
    """Items with known answers, which both arms answer.

    samples: how many, the first of them, or some at random by `seed`; all where it is left out. With evaluate.looks there may be more, up to
    all.  group: items that share its value count
    as one cluster.  tag: one slice for each value.
    """

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$", description="letters, digits, dashes and underscores"),
    ]
    samples: Count | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    group: FieldName | None = None
    tag: FieldName | None = None
    chat: Annotated[bool, Field(description="whether the prompt passes through the model's own chat template")] = False


class MultipleChoiceTask(DeclaredTask):
    """A question with choices, of which the model's likeliest is its answer.  labels: the choices, where all items have the same ones."""

    kind: Literal["multiple_choice"]
    items: Rows
    id: FieldName | None = None
    query: FieldName = "query"
    choices: FieldName = "choices"
    gold: FieldName = "gold"
    labels: Annotated[tuple[str, ...], Field(min_length=2)] | None = None
    delimiter: Annotated[
        str | None, Field(description="between query and choice: a space, or nothing with chat, where it is left out")
    ] = None
    normalized: Annotated[bool, Field(description="whether the gate judges log-likelihoods per character")] = True


class ExactMatchTask(DeclaredTask):
    """A prompt that is continued greedily; right when the answer in the continuation is one of the references."""

    kind: Literal["exact_match"]
    items: Rows
    id: FieldName | None = None
    prompt: FieldName = "prompt"
    references: FieldName = "references"
    new_tokens: Count = 64
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    extract: (
        Annotated[str, Field(min_length=1, description="regular expression; its first group, or its match")] | None
    ) = None
    normalize: tuple[Literal["strip", "casefold", "punctuation"], ...] = ("strip",)


class LmEvalTask(DeclaredTask):
    """A task of lm-evaluation-harness (extra `lm-eval`), judged by one of its metrics."""

    kind: Literal["lm_eval"]
    task: Annotated[str, Field(min_length=1)]
    metric: Annotated[str, Field(min_length=1)] = "acc"
    filter: Annotated[str, Field(min_length=1)] = "none"
    fewshot: Annotated[int, Field(ge=0)] | None = None
    include: Annotated[str, Field(min_length=1, description="directory with tasks, relative to the recipe")] | None = (
        None
    )


Task = Annotated[MultipleChoiceTask | ExactMatchTask | LmEvalTask, Field(discriminator="kind")]


class Baseline(Strict):
    """What the candidate is compared with: the same model on the same runtime, unquantized."""

    scheme: Literal["none"] = "none"


class Evaluate(Strict):
    """What is measured, on which text, with how many samples."""

    baseline: Baseline = Baseline()
    text: Text = PythonDocs(source="python-docs")
    length: Annotated[Length, Field(description="tokens per evaluation window")] = 512
    quality: Annotated[tuple[QualityMetric, ...], Field(min_length=1)]
    structured: Structured | None = None
    tasks: tuple[Task, ...] = ()
    speed: tuple[SpeedMetric, ...] = ()
    blocks: Annotated[int, Field(ge=3, description="ABBA blocks of four fresh processes each")] = 8
    looks: Annotated[
        int,
        Field(
            ge=1,
            le=5,
            description="how often the gate may look, at twice the samples each time, while it is INCONCLUSIVE",
        ),
    ] = 1
    price_per_hour: Annotated[
        float | None, Field(gt=0, description="of such a machine, to tell what a million tokens cost")
    ] = None
    currency: Annotated[
        str | None, Field(pattern="^[A-Z]{3}$", description="the price's currency as three letters, such as EUR")
    ] = None

    unreachable: Annotated[
        Literal["measure", "refuse"],
        Field(description="what to do when a gate's samples are too few for its margin, by the plan's assumptions"),
    ] = "measure"

    def at(self, look: int) -> Evaluate:
        """What is measured when the gate looks for the n-th time: 2ⁿ⁻¹ times the samples that are declared."""
        factor = 2 ** (look - 1)

        def more(metric: QualityMetric) -> QualityMetric:
            counts = {
                name: getattr(metric, name, 0) * factor for name in ("tokens", "samples", "prompts", "texts", "queries")
            }
            return metric.model_copy(update={name: count for name, count in counts.items() if count})

        changed: dict[str, Any] = {
            "quality": tuple(more(metric) for metric in self.quality),
            "blocks": self.blocks * factor,
        }
        if self.structured is not None:
            changed["structured"] = self.structured.model_copy(update={"samples": self.structured.samples * factor})
        return self.model_copy(update=changed)


class MaxDrop(Strict):
    """The candidate may score at most this much lower than the baseline (absolute)."""

    max_drop: Annotated[float, Field(gt=0, lt=1)]


class MaxMean(Strict):
    """The mean must stay at or below this."""

    max: Annotated[float, Field(gt=0)]


class MinMean(Strict):
    """The mean must stay at or above this."""

    min: Annotated[float, Field(gt=0, lt=1)]


class MinSpeedup(Strict):
    """The candidate must be at least this many times as fast as the baseline."""

    min_speedup: Annotated[float, Field(gt=0)]


class MaxRatio(Strict):
    """Candidate divided by baseline must stay at or below this."""

    max_ratio: Annotated[float, Field(gt=0)]


class MaxNewInvalid(Strict):
    """At most this many outputs that were valid from the baseline may be invalid from the candidate."""

    max_new_invalid: Annotated[float, Field(ge=0)]


class StructuredGates(Strict):
    """What must hold of structured output without enforcement, which would hide the damage."""

    max_new_invalid: Annotated[
        int | None, Field(ge=0, description="outputs that were valid from the baseline and are not from the candidate")
    ] = None
    max_drop: Annotated[float | None, Field(gt=0, lt=1, description="of the share of right outputs")] = None

    def declared(self) -> dict[str, Strict]:
        """Metric name → its criterion."""
        found: dict[str, Strict] = {}
        if self.max_new_invalid is not None:
            found["structured.new_invalid"] = MaxNewInvalid(max_new_invalid=float(self.max_new_invalid))
        if self.max_drop is not None:
            found["structured.correct"] = MaxDrop(max_drop=self.max_drop)
        return found


def _later() -> Any:
    """A gate that a release added: where it is not asked for nothing is said of it, so that older recipes keep their digest."""
    return Field(default=None, exclude_if=lambda value: value is None)


class QualityGates(Strict):
    """What must hold of quality."""

    kl_divergence: MaxMean | None = None
    top1_agreement: MinMean | None = None
    cloze_accuracy: MaxDrop | None = None
    greedy_agreement: MinMean | None = None
    embedding_cosine: MinMean | None = _later()
    similarity_rank: MinMean | None = _later()
    retrieval_agreement: MinMean | None = _later()
    retrieval_accuracy: MaxDrop | None = _later()
    class_agreement: MinMean | None = _later()
    class_accuracy: MaxDrop | None = _later()

    def declared(self) -> dict[str, Strict]:
        """Metric name → its criterion, in the order of the schema."""
        found: dict[str, Strict] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, StructuredGates):
                found |= value.declared()
            elif value is not None and name not in ("slices", "tasks"):
                found[name] = value
        return found


class SliceGates(QualityGates):
    """What must hold in every slice: of the text, by evaluate.text.tag, and of tasks, each by a tag of its own."""

    # Where it is not asked for nothing is said of it, so that older recipes keep their digest.
    tasks: Annotated[
        dict[str, MaxDrop] | None,
        Field(exclude_if=lambda value: value is None, description="by name, as in gate.tasks"),
    ] = None


class Gate(QualityGates):
    """What must hold for a PASS. Every gate named here has to pass; a metric without a gate is only reported."""

    structured: StructuredGates | None = None
    decode_tokens_per_second: MinSpeedup | None = None
    inter_token_latency: MaxRatio | None = None
    time_per_output_token: MaxRatio | None = None
    end_to_end_latency: MaxRatio | None = None
    time_to_first_token: MaxRatio | None = None
    prefill_tokens_per_second: MinSpeedup | None = None
    prefix_reuse: MaxRatio | None = None
    energy_per_output_token: MaxRatio | None = None
    encode_latency: MaxRatio | None = _later()
    encode_throughput: MinSpeedup | None = _later()
    load_time: MaxRatio | None = None
    peak_memory: MaxRatio | None = None
    size_on_disk: MaxRatio | None = None
    slices: Annotated[
        SliceGates | None, Field(description="what must hold in every slice: of evaluate.text.tag, or of a task's tag")
    ] = None
    tasks: Annotated[dict[str, MaxDrop] | None, Field(description="what must hold of evaluate.tasks, by name")] = None


class Publish(Strict):
    """Where a PASS goes."""

    registry: Annotated[str, Field(min_length=1, description="a directory (from where you run) or oci://HOST/PATH")]
    tags: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")], ...],
        Field(description="letters, digits, dots, dashes and underscores, at most 128, not a dot or a dash first"),
    ] = ("latest",)
    key: Annotated[
        str | None,
        Field(
            min_length=1,
            description="whoever signs: a private key in PEM (a file, from where you run, or env:NAME), or sigstore",
        ),
    ] = None


class Recipe(Strict):
    """One job, from model to verdict."""

    version: Literal[1]
    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9]([a-z0-9._-]{0,98}[a-z0-9])?$",
            description="a-z, 0-9, dots, dashes and underscores, at most 100, a letter or digit first and last",
        ),
    ]
    model: Model
    calibration: Calibration
    quantize: Quantize
    target: Target
    evaluate: Evaluate
    gate: Gate
    publish: Publish | None = None

    def judged_content(self) -> dict[str, Any]:
        """What the recipe says about model, build, measurements and gate: all but where a PASS goes."""
        return self.model_dump(mode="json", exclude={"publish"})

    def digest(self) -> str:
        """Digest of what is built and judged, whatever the file's layout, its comments and where it publishes to."""
        return sha256_bytes(canonical_json(self.judged_content()))


QUALITY_GATES = tuple(QualityGates.model_fields)
SPEED_GATES = tuple(
    name for name in Gate.model_fields if name not in QUALITY_GATES and name not in ("slices", "structured", "tasks")
)
