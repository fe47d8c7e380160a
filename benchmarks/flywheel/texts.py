"""The four texts of the flywheel's tasks: on any machine with Python, or made by a seeded generator.

    python -P benchmarks/flywheel/texts.py FOLDER

`python` is the standard library's source, `english` the language reference and the docstrings that come with Python,
`records` are JSON lines and server logs, `algebra` is arithmetic worked out step by step. Only numbers measured on
them are kept in the repository, never the texts.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

SIZE = 1_500_000
"""Bytes of each text, about; a trial reads far less."""
SKIPPED = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3", "pydoc_data"}


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if SKIPPED.isdisjoint(path.relative_to(root).parts):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")


def python() -> Iterator[str]:
    """Yield the standard library's modules, comments and all, in a fixed but mixed order."""
    sources = [text for _, text in _sources()]
    random.Random(0).shuffle(sources)
    yield from sources


def english() -> Iterator[str]:
    """Yield the language reference's topics, then docstrings of the standard library."""
    from pydoc_data.topics import topics

    pieces = [str(text) for _, text in sorted(topics.items())]
    for _, source in _sources():
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        pieces += [text for text in found if text and len(text) > 200]
    random.Random(1).shuffle(pieces)
    yield from pieces


def records() -> Iterator[str]:
    """Yield documents of forty JSON lines or forty log lines about invented orders and requests."""
    rng = random.Random(2)
    names = ["ada", "bo", "chen", "dana", "eli", "femi", "gus", "hana"]
    items = ["lamp", "desk", "chair", "cable", "screen", "mouse", "stand"]
    paths = ["/cart", "/login", "/items/7", "/items/12", "/orders", "/health"]
    while True:
        as_json = rng.random() < 0.5
        lines = []
        clock = rng.randrange(10**6)
        for _ in range(40):
            clock += rng.randrange(1, 90)
            day, time = f"2026-03-{clock // 86400 % 28 + 1:02d}", f"{clock // 3600 % 24:02d}:{clock // 60 % 60:02d}"
            stamp = f"{day}T{time}:{clock % 60:02d}Z"
            if as_json:
                order = {
                    "id": rng.randrange(10**6),
                    "at": stamp,
                    "user": {"name": rng.choice(names), "vip": rng.random() < 0.2},
                    "items": [
                        {"sku": rng.choice(items), "n": rng.randrange(1, 5), "price": rng.randrange(100, 9999) / 100}
                        for _ in range(rng.randrange(1, 4))
                    ],
                }
                lines.append(json.dumps(order))
            else:
                level = rng.choices(["INFO", "WARN", "ERROR"], [8, 2, 1])[0]
                status = {"INFO": 200, "WARN": 404, "ERROR": 500}[level]
                lines.append(
                    f"{stamp} {level} 10.0.{rng.randrange(4)}.{rng.randrange(256)} "
                    f"{rng.choice(['GET', 'POST'])} {rng.choice(paths)} {status} {rng.randrange(2, 900)}ms"
                )
        yield "\n".join(lines) + "\n"


def algebra() -> Iterator[str]:
    """Yield sheets of expressions, each rewritten one operation at a time down to its value."""
    rng = random.Random(3)

    def expression(depth: int) -> object:
        if depth == 0 or rng.random() < 0.2:
            return rng.randrange(10)
        return (rng.choice("+-*"), expression(depth - 1), expression(depth - 1))

    def shown(node: object) -> str:
        return str(node) if not isinstance(node, tuple) else f"({shown(node[1])}{node[0]}{shown(node[2])})"

    def step(node: object) -> object:
        if not isinstance(node, tuple):
            return node
        sign, left, right = node
        if isinstance(left, tuple):
            return (sign, step(left), right)
        if isinstance(right, tuple):
            return (sign, left, step(right))
        return left + right if sign == "+" else left - right if sign == "-" else left * right

    while True:
        lines = []
        for _ in range(12):
            node = expression(3)
            lines.append(shown(node))
            while isinstance(node, tuple):
                node = step(node)
                lines.append("= " + shown(node))
        yield "\n".join(lines) + "\n"


KINDS: dict[str, Callable[[], Iterator[str]]] = {
    "python": python,
    "english": english,
    "records": records,
    "algebra": algebra,
}


def write_texts(folder: Path) -> None:
    """Write each kind into `folder`/KIND/NNNN.txt, documents of at most 20,000 characters, `SIZE` bytes in all."""
    for name, documents in KINDS.items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        total = 0
        for number, text in enumerate(documents()):
            data = text[:20_000].encode()
            (target / f"{number:04d}.txt").write_bytes(data)
            total += len(data)
            if total >= SIZE:
                break


if __name__ == "__main__":
    write_texts(Path(sys.argv[1]))
