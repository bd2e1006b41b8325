"""What cannot be true together in what a recipe says of speed: every prompt length is one request, which all metrics share."""

from __future__ import annotations

from assay.errors import Problem
from assay.recipe import DecodeMetric, Evaluate, PrefixReuseMetric, request_lengths
from assay.recipe_yaml import Document, Location


def speed_contradictions(evaluate: Evaluate, document: Document) -> list[Problem]:
    """One problem for each contradiction, at its line."""
    problems: list[Problem] = []

    def add(key: Location, message: str) -> None:
        problems.append(document.problem(("evaluate", *key), message))

    asked: dict[int, tuple[str, int]] = {}
    for index, metric in enumerate(evaluate.speed):
        prompts = getattr(metric, "prompt_tokens", ())
        for place, length in enumerate(prompts if isinstance(prompts, tuple) else ()):
            if length in prompts[:place]:
                message = f"the prompt length {length} is there already; remove one of the two."
                add(("speed", index, "prompt_tokens", place), message)
        if isinstance(metric, PrefixReuseMetric) and metric.prefix_tokens >= metric.prompt_tokens:
            add(
                ("speed", index, "prefix_tokens"),
                f"a prefix of {metric.prefix_tokens} tokens leaves nothing of a prompt of {metric.prompt_tokens} to compute; "
                "make it shorter than prompt_tokens.",
            )
        for length, new_tokens in request_lengths(metric).items() if hasattr(metric, "new_tokens") else ():
            first, already = asked.setdefault(length, (metric.metric, new_tokens))
            if new_tokens != already:
                add(
                    ("speed", index, "new_tokens"),
                    f"{metric.metric} asks for {new_tokens} new tokens after a prompt of {length}, {first} for {already}; one request "
                    "serves both, so give them the same new_tokens, or prompts of other lengths.",
                )
    if evaluate.price_per_hour is None and evaluate.currency is not None:
        add(("currency",), "a currency belongs to a price; add price_per_hour, or remove this line.")
    if evaluate.price_per_hour is not None and not any(isinstance(metric, DecodeMetric) for metric in evaluate.speed):
        add(
            ("price_per_hour",),
            "what tokens cost follows from decode_tokens_per_second, which is not measured; add {metric: decode_tokens_per_second} to "
            "evaluate.speed, or remove this line.",
        )
    return problems
