"""Tiny random models of each supported family, with a real tokenizer trained on Python's documentation."""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    config = AutoConfig.for_model(family, **(_SHAPE | {"tie_word_embeddings": family == "llama"} | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough that layers matter, uneven enough that input channels differ in power.
            if parameter.dim() == 2:
                parameter.mul_(4).mul_(torch.rand(parameter.shape[1]) + 0.5)
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
