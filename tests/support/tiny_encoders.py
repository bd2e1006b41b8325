"""Tiny random encoders with a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 512
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 160,
    "pad_token_id": 1,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4},
    "modernbert": {
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
        "norm_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "cls_token_id": 0,
        "sep_token_id": 0,
    },
}


def save_encoder_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer of 512 tokens that puts [CLS] before and [SEP] behind every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from assay.text import python_docs

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["[CLS]", "[PAD]", "[SEP]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([str(document.content) for document in python_docs("calibration")[:12]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", pad_token="[PAD]", sep_token="[SEP]")
    fast.save_pretrained(directory)


def save_encoder(directory: Path, class_name: str = "BertModel", pooling: str | None = "mean", **changes: Any) -> Path:
    """Write a tiny random float32 encoder as an ordinary Hugging Face directory.

    pooling: as sentence-transformers' files beside it say, with a normalization; None writes no such files.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    from assay.models.encoders import ENCODERS

    torch.manual_seed(0)
    family = ENCODERS[class_name].model_type
    model = getattr(transformers, class_name)(
        AutoConfig.for_model(family, **(SHAPE | _FAMILY.get(family, {}) | changes))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    save_encoder_tokenizer(directory)
    if pooling is not None and class_name.endswith("Model"):
        kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        modules = [
            {"idx": index, "path": path, "type": f"sentence_transformers.models.{kind}"}
            for index, (path, kind) in enumerate(kinds)
        ]
        (directory / "modules.json").write_text(json.dumps(modules))
        (directory / "1_Pooling").mkdir()
        flags = {"pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_cls_token": pooling == "cls"}
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    return directory
