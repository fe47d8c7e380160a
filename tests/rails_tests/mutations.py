"""Hostile replies: bytes of real ones changed at random, and the shapes that break parsers, drawn by a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

REAL = [json.loads(line) for line in (Path(__file__).parent / "replies.jsonl").read_text().splitlines()]
"""Replies of SmolLM2-135M-Instruct to the prompts of two bundled campaigns, at three temperatures."""
DEEP = 10_000
HOMOGLYPHS = {"a": "\u0430", "d": "\u0501", "e": "\u0435", "i": "\u0456", "l": "\u04cf", "o": "\u043e", "r": "\u027c"}
NEAR: dict[str, list[object]] = {
    "lr": [1e-5, 1e-3, 0.01, 0.0003, 0.02, 1],
    "n_head": [4, 8, 16, 16.0, 32],
    "d_model": [96, 100, 104, 128, 192, 256, 512],
    "precision": ["bf16", "fp8", "int4"],
    "layers": [1, 2, 3, 5, True],
}
"""Values of the test's knobs that rails judge differently."""
REASONS = ["", "x" * 500, "x" * 501, "\U0001f600" * 500, "\ud800", 'say "no"\n', 3, None]
TOKENS = [
    "{", "}", "[", "]", '"', ":", ",", "\\", "\0", "\\u0000", "\\ud800", "\\udc00\\ud800", "\\ud83d\\ude00", "\ud800",
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0", "0.0", "true", "null", "9" * 30, "9" * 5_000,
    "0." + "3" * 400, "1" + "0" * 400 + "e-399", "\ufeff", "\u2028", "\u202e", "\x0b", "\x7f", "//", "/*", "'",
    "```json\n", "\n```", '"knob":', '"new_value":', '"reason":', '"knob": "lr",', '"__proto__":', "lr", "n_head",
    "d_model", "[" * DEEP, "]" * DEEP, '{"a":' * DEEP, " " * 70_000, "x" * 70_000, "\U0001f600" * 600,
]  # fmt: skip


def proposal(draw: random.Random, knobs: Sequence[str]) -> str:
    """A well-formed reply, or one with a single thing wrong in it."""
    odd: list[object] = [
        draw.uniform(0, 0.02), 16.0, True, None, "bf16", "16", "0.001", -1, 10 ** draw.randint(1, 400), [], {}, [[1]],
        {"a": 1}, 1e308, "\0", "",
    ]  # fmt: skip
    knob = draw.choice(knobs)
    value = draw.choice(odd) if draw.random() < 0.4 else draw.choice(NEAR.get(knob, odd))
    reason = draw.choice(REASONS) if draw.random() < 0.4 else "it may help"
    pairs: list[tuple[str, object]] = [("knob", knob), ("new_value", value), ("reason", reason)]
    if draw.random() < 0.1:
        pairs.append(draw.choice([("knob", "lr"), ("extra", 1), ("reason", ""), ("Knob", "lr")]))
    if draw.random() < 0.1:
        pairs.remove(draw.choice(pairs))
    draw.shuffle(pairs)
    ascii_only, indent = draw.random() < 0.5, draw.choice([None, 2])
    comma = "," if indent is None else ",\n  "
    members = (f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=ascii_only)}" for key, item in pairs)
    return "{" + comma.join(members) + "}"


def homoglyphs(draw: random.Random, text: str, knobs: Sequence[str]) -> str:
    """The same to the eye: some letters of the knobs' names replaced by others that look alike."""
    for knob in filter(None, knobs):
        other = "".join(HOMOGLYPHS.get(char, char) if draw.random() < 0.5 else char for char in knob)
        text = text.replace(f'"{knob}"', f'"{other}"')
    return text


def mutated(draw: random.Random, text: str) -> str:
    """Change some bytes of a reply; what is no UTF-8 afterwards comes as lone surrogates."""
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        at = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << draw.randrange(8)
            case 1:
                data[at:at] = bytes([draw.randrange(256)])
            case 2:
                del data[at : at + draw.choice([1, 1, 1, 5, 40])]
            case 3:
                data[at:at] = data[at : at + draw.randrange(60)]
            case 4:
                data[at:at] = draw.choice(TOKENS).encode("utf-8", "surrogatepass")
            case _:
                end = draw.randrange(at, len(data) + 1)
                data[at:end] = draw.choice(TOKENS[:34]).encode("utf-8", "surrogatepass")
    return bytes(data).decode("utf-8", draw.choice(["surrogateescape", "replace"]))


def hostile(draw: random.Random, knobs: Sequence[str]) -> str:
    """One reply: a real or well-formed one as it is, in homoglyphs, padded, spliced, or with bytes changed."""
    text = draw.choice(REAL) if draw.random() < 0.15 else proposal(draw, knobs)
    match draw.randrange(16):
        case 0 | 1 | 2 | 3 | 4 | 5:
            return text
        case 6 | 7:
            return homoglyphs(draw, text, knobs)
        case 8:
            return text + " " * draw.choice([1, 60_000, 64 * 1024, 70_000])
        case 9:
            other = proposal(draw, knobs)
            return text[: draw.randrange(len(text) + 1)] + other[draw.randrange(len(other)) :]
        case _:
            return mutated(draw, text)
