"""Tiny random models with a real tokenizer, recipes that run in a moment, the command line, and disks that are small."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# Threads gain nothing on tiny models, and waiting for each other on a busy machine costs tenfold.
os.environ["OMP_NUM_THREADS"] = "1"

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, running_hub
from warm_cli import Command

VOCABULARY = 512
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# What a family's tiny model has beside that: numbers that matter where the family's own would not on a text of some dozen tokens.
_FAMILY_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 24, "sliding_window": 7},
    "gemma3_text": {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 24,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
    "smollm3": {"tie_word_embeddings": True, "no_rope_layers": [1, 0]},
}


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer of 512 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from assay.text import python_docs

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([str(document.content) for document in python_docs("calibration")[:12]], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(directory)


def save_model(directory: Path, family: str, dtype: str = "bfloat16", seed: int = 0, **changes: Any) -> Path:
    """Write a tiny random decoder of a family as an ordinary Hugging Face directory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = _SHAPE | {"tie_word_embeddings": False} | _FAMILY_SHAPES.get(family, {}) | changes
    config = AutoConfig.for_model(family, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that layers matter, uneven enough that input channels differ in power.
            if parameter.dim() > 1:
                parameter.mul_(4).mul_(torch.rand(parameter.shape[-1]) + 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny random model by family; made once, never to be written to."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_model(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """`save_model`, for models that differ from the usual ones or are to be changed."""
    return save_model


RECIPE: dict[str, Any] = {
    "version": 1,
    "name": "tiny",
    "model": {"source": "./model"},
    "calibration": {"source": "python-docs", "samples": 4, "length": 32},
    "quantize": {"scheme": "W8A16", "group_size": 32, "method": "rtn", "range": "minmax"},
    "target": {"format": "compressed-tensors"},
    "evaluate": {
        "length": 64,
        "quality": [{"metric": "kl_divergence", "tokens": 400}],
        "speed": [{"metric": "size_on_disk"}],
        "blocks": 3,
    },
    "gate": {"kl_divergence": {"max": 1.0}, "size_on_disk": {"max_ratio": 2}},
}


@pytest.fixture(scope="session")
def make_recipe(tiny_model: Callable[[str], Path]) -> Callable[..., Path]:
    """Write a directory with a tiny model and a recipe that runs in a moment and passes; keywords replace parts of it."""

    def make(directory: Path, *, model: Path | None = None, **parts: Any) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "model").exists():
            shutil.copytree(model or tiny_model("llama"), directory / "model")
        path = directory / "recipe.yaml"
        content = {name: value for name, value in (RECIPE | parts).items() if value is not None}
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")  # JSON is YAML
        return path

    return make


@pytest.fixture(scope="session")
def assay() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in a process of its own (a new interpreter, if it gets an environment) for at most two minutes."""

    def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        if not environment:
            with Command(*arguments, cwd=cwd) as process:
                return process.communicate(timeout=120)
        command = [Path(sys.executable).with_name("assay"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, tuple[bytes, int, int]]]:
    """Bytes, inode and time of every file below a directory: two equal snapshots mean that nothing was rewritten."""

    def take(directory: Path) -> dict[str, tuple[bytes, int, int]]:
        return {
            str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_ino, path.stat().st_mtime_ns)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }

    return take


class SmallDisk:
    """A memory file system of a given size, to be filled up, enlarged and made read-only."""

    def __init__(self, place: Path, size_bytes: int) -> None:
        self.place = place
        place.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs")

    def resize(self, size_bytes: int) -> None:
        self._mount("-o", f"remount,size={size_bytes}")

    def make_read_only(self) -> None:
        self._mount("-o", "remount,ro")

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.place)], check=True)

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, str(self.place)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[int], SmallDisk]]:
    """Mount small disks; skips where mounting is not allowed."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root and mount")
    mounted: list[SmallDisk] = []

    def mount(size_bytes: int) -> SmallDisk:
        disk = SmallDisk(tmp_path / f"disk{len(mounted)}", size_bytes)
        mounted.append(disk)
        return disk

    yield mount
    for disk in reversed(mounted):
        disk.unmount()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hugging Face Hub on loopback, without repositories yet."""
    with running_hub() as running:
        yield running


@pytest.fixture(scope="session")
def genai_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Callable[[str], Path]:
    """Directory of a tiny model for onnxruntime-genai, unquantized, by family; made once, which takes 10 s: for slow tests."""
    from assay.models.checkpoint import Checkpoint
    from assay.targets.onnxruntime_genai import build_baseline

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("genai") / family
            build_baseline(Checkpoint(tiny_model(family)), made[family])
        return made[family]

    return make
