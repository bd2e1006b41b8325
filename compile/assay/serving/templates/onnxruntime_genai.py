"""Continue a prompt with the artifact that serving.json names, by onnxruntime-genai alone: python generate.py PROMPT [NEW_TOKENS]."""

import json
import sys
from pathlib import Path

import onnxruntime_genai as og

about = json.loads(Path(__file__).with_name("serving.json").read_bytes())
prompt, new_tokens = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 40
model = og.Model(about["artifact"])
tokenizer = og.Tokenizer(model)
stream = tokenizer.create_stream()
tokens = tokenizer.encode(prompt)
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(tokens) + new_tokens, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokens)
sys.stdout.write(prompt)
while not generator.is_done():
    generator.generate_next_token()
    sys.stdout.write(stream.decode(generator.get_next_tokens()[0]))
    sys.stdout.flush()
sys.stdout.write("\n")
