"""A Truss config.yaml: `trt_llm.build`, which has a checkpoint quantized by ModelOpt and built for TensorRT-LLM.

Keys and defaults as in truss 0.18, `base/trt_llm_config.py`. What is of serving stays in that file.
"""

from __future__ import annotations

from typing import Any

from assay.importing.reading import Draft, Reading, shown
from assay.recipe_yaml import Location

_BUILD: Location = ("trt_llm", "build")
_ATTENTION_FLOAT = [{"match": "*.self_attn.*", "scheme": "none"}]
_TYPES: dict[str, dict[str, Any]] = {
    "fp8": {"scheme": "FP8"},
    "fp8_kv": {"scheme": "FP8", "kv_cache": "fp8"},
    "fp8_mlp_only": {"scheme": "FP8", "overrides": _ATTENTION_FLOAT},
    "fp4": {"scheme": "NVFP4"},
    "fp4_kv": {"scheme": "NVFP4", "kv_cache": "fp8"},
    "fp4_mlp_only": {"scheme": "NVFP4", "overrides": _ATTENTION_FLOAT},
}
_LEGACY = ("weights_int8", "weights_kv_int8", "weights_int4", "weights_int4_kv_int8", "smooth_quant")
_DECODERS = ("decoder", "llama", "mistral", "qwen")
_OTHER_MODELS = ("encoder", "encoder_bert", "palmyra", "deepseek", "whisper")
_SOURCES = ("HF", "GCS", "S3", "AZURE", "LOCAL", "REMOTE_URL", "BASETEN_TRAINING")
_READ = ("base_model", "checkpoint_repository", "quantization_type", "quantization_config")
_OF_SERVING = [
    "max_seq_len",
    "max_batch_size",
    "max_num_tokens",
    "max_beam_width",
    "max_prompt_embedding_table_size",
    "gather_all_token_logits",
    "strongly_typed",
    "tensor_parallel_count",
    "pipeline_parallel_count",
    "moe_expert_parallel_option",
    "sequence_parallel_count",
    "plugin_configuration",
    "num_builder_gpus",
    "speculator",
    "lora_adapters",
    "lora_configuration",
    "skip_build_result",
]
_NEWS, _NEWS_VERSION = "abisee/cnn_dailymail", "3.0.0"
_CALIBRATION = {"calib_size": 1024, "calib_dataset": _NEWS, "calib_max_seq_length": 1536}


def is_truss(data: dict[str, Any]) -> bool:
    """Whether a file looks like a Truss config."""
    return any(key in data for key in ("trt_llm", "model_name", "model_framework", "base_image", "docker_server"))


def read_truss(reading: Reading, model_given: bool) -> Draft:
    """The quantization that a Truss config asks for; RecipeError with all that has no like here.

    model_given: whether the model is named otherwise; where the config has it is then left out.
    """
    data = reading.document.data
    if "trt_llm" not in data:
        reading.refuse((), "there is no trt_llm: this Truss quantizes nothing. There is nothing to import.")
        reading.give_up()
    engine = reading.mapping(data["trt_llm"], ("trt_llm",))
    build = reading.mapping(engine.get("build"), _BUILD)
    for key in build:
        if key in _OF_SERVING:
            reading.leave_out((*_BUILD, key), "it is of the engine and of serving, not of the checkpoint.")
        elif key not in _READ:
            reading.unknown((*_BUILD, key), (*_READ, *_OF_SERVING))
    for key in engine:
        if key != "build":
            reading.leave_out(("trt_llm", key), "it is of serving.")
    for key in data:
        if key not in ("trt_llm", "model_name"):
            reading.leave_out((key,), "it is of the deployment.")
    if (kind := str(build.get("base_model", "decoder"))) not in _DECODERS:
        known = kind in _OTHER_MODELS
        message = (
            f"base_model {shown(kind)} is {'no decoder' if known else 'unknown'}; allowed: {', '.join(_DECODERS)}."
        )
        reading.refuse((*_BUILD, "base_model"), message)
    quantization = _quantization(reading, build.get("quantization_type", "no_quant"))
    model = _model(reading, build, model_given)
    calibration = _calibration(reading, build)
    name = reading.text(data["model_name"], ("model_name",)) if data.get("model_name") is not None else None
    reading.give_up()
    return Draft(
        {"scheme": quantization["scheme"], "method": "rtn", "range": "minmax"} | quantization,
        {"format": "modelopt", "engine": "tensorrt-llm"},
        name,
        model,
        calibration,
        remarks={"range": "as ModelOpt does it; activation_weighted, which is Assay's default, loses less"},
    )


def _quantization(reading: Reading, given: Any) -> dict[str, Any]:
    place = (*_BUILD, "quantization_type")
    allowed = ", ".join(_TYPES)
    if isinstance(given, str) and given in _TYPES:
        return _TYPES[given]
    if given == "no_quant":
        reading.refuse(place, f"no_quant quantizes nothing, so there is nothing to judge; choose one of {allowed}.")
    elif given in _LEGACY:
        reading.refuse(place, f"{given} is a type that Truss itself no longer builds; choose one of {allowed}.")
    else:
        reading.refuse(place, f"quantization_type is {shown(given)}; allowed: {allowed}.")
    return {"scheme": None}


def _model(reading: Reading, build: dict[str, Any], model_given: bool) -> dict[str, Any] | None:
    place = (*_BUILD, "checkpoint_repository")
    if build.get("checkpoint_repository") is None:
        if not model_given:
            message = "there is no checkpoint_repository; name the model: --model hf:ORG/NAME, or --model ./directory."
            reading.refuse(_BUILD, message)
        return None
    repository = reading.mapping(build["checkpoint_repository"], place)
    if model_given:
        reading.leave_out(place, "--model says where the model comes from.")
        return None
    for key in repository:
        if key == "runtime_secret_name":
            reading.leave_out((*place, key), "where a token is kept is no part of a recipe (HF_TOKEN).")
        elif key not in ("source", "repo", "revision"):
            reading.unknown((*place, key), ("source", "repo", "revision", "runtime_secret_name"))
    source = repository.get("source")
    if source != "HF":
        known = "Assay does not fetch from there" if source in _SOURCES else f"allowed: {', '.join(_SOURCES)}"
        message = f"source is {shown(source)}; {known}. Fetch the checkpoint and name it: --model ./directory."
        reading.refuse((*place, "source"), message)
        return None
    name = reading.text(repository.get("repo"), (*place, "repo"))
    revision = repository.get("revision")
    if revision is not None:
        revision = reading.text(revision, (*place, "revision"))
    return {"source": f"hf:{name}"} | ({"revision": revision} if revision else {})


def _calibration(reading: Reading, build: dict[str, Any]) -> dict[str, Any]:
    """Truss's text: by default news, and the column `text` of any other data set."""
    place = (*_BUILD, "quantization_config")
    given = reading.mapping(build.get("quantization_config"), place)
    for key in given:
        if key not in _CALIBRATION:
            reading.unknown((*place, key), _CALIBRATION)
    found = _CALIBRATION | given
    samples = reading.number(found["calib_size"], (*place, "calib_size"), 1, 10**6, whole=True)
    length = reading.number(found["calib_max_seq_length"], (*place, "calib_max_seq_length"), 8, 131072, whole=True)
    name = reading.text(found["calib_dataset"], (*place, "calib_dataset"))
    news = name in (_NEWS, "cnn_dailymail")
    text = {"source": "hf", "name": _NEWS if news else name} | ({"config": _NEWS_VERSION} if news else {})
    return text | {"split": "train", "field": "article" if news else "text", "samples": samples, "length": length}
