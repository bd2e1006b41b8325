"""Generate from a pulled artifact with onnxruntime-genai alone: python scripts/generate_plain.py DIRECTORY PROMPT [NEW_TOKENS]."""

import sys

import onnxruntime_genai as og

directory, prompt, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 40
model = og.Model(directory)
tokenizer = og.Tokenizer(model)
tokens = tokenizer.encode(prompt)
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(tokens) + new_tokens, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokens)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
