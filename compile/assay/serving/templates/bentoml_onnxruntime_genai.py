"""A BentoML service that continues prompts with the artifact that serving.json names, by onnxruntime-genai."""

import json
from collections.abc import Iterator
from pathlib import Path

import bentoml
import onnxruntime_genai as og

ABOUT = json.loads(Path(__file__).with_name("serving.json").read_bytes())


@bentoml.service(labels={"model": ABOUT["name"], "digest": ABOUT["digest"]}, workers=1)
class Model:
    """POST /generate {"prompt": …, "max_tokens": …} streams text; GET-like POST /about tells which bytes answer."""

    def __init__(self) -> None:
        self.model = og.Model(ABOUT["artifact"])
        self.tokenizer = og.Tokenizer(self.model)

    @bentoml.api
    def about(self) -> dict[str, str]:
        return {"name": ABOUT["name"], "digest": ABOUT["digest"]}

    @bentoml.api
    def generate(self, prompt: str, max_tokens: int = 128) -> Iterator[str]:
        tokens, stream = self.tokenizer.encode(prompt), self.tokenizer.create_stream()
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=len(tokens) + max_tokens, do_sample=False)
        generator = og.Generator(self.model, params)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
            yield stream.decode(generator.get_next_tokens()[0])
