"""The constraint language: arithmetic, comparisons and `and`/`or`/`not` over knobs and numbers; nothing else parses.

A rule such as `d_model % n_head == 0` is read once with Python's own parser into a tree of allowed nodes and then
interpreted here. There is no call, attribute, subscript or name lookup outside the given names, so that a stranger's
campaign file stays data. Powers are left out: `9**9**9` would stop the loop.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from overnight.store.errors import MenuError
from overnight.store.records import KnobValue

MAX_RULE_CHARS = 500
_ARITHMETIC: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISON: Mapping[type[ast.cmpop], Callable[[KnobValue, KnobValue], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Constraint:
    """A named rule that every configuration has to keep."""

    id: str
    rule: str
    doc: str = ""
    _tree: ast.expr = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Parse the rule.

        Raises:
            MenuError: it is not a comparison in the language above.
        """
        object.__setattr__(self, "_tree", _parse(self.id, self.rule))

    @property
    def names(self) -> frozenset[str]:
        """The knobs and numbers that the rule speaks of."""
        return frozenset(node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name))

    def holds(self, names: Mapping[str, KnobValue]) -> bool:
        """Say whether the rule is true of `names`; a division by zero or a comparison of unlike types is not."""
        try:
            return bool(_value(self._tree, names))
        except (ZeroDivisionError, TypeError, OverflowError):
            return False


def _parse(constraint_id: str, rule: str) -> ast.expr:
    where = f"constraint `{constraint_id}`"
    if len(rule) > MAX_RULE_CHARS:
        raise MenuError(f"{where}: `rule` is longer than {MAX_RULE_CHARS} characters")
    try:
        tree = ast.parse(rule.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MenuError(
            f"{where}: `{rule}` does not parse; write a comparison such as `d_model % n_head == 0`"
        ) from error
    if not isinstance(tree, ast.Compare | ast.BoolOp | ast.UnaryOp):
        raise MenuError(f"{where}: `{rule}` is not a comparison; write one such as `d_model % n_head == 0`")
    for node in ast.walk(tree):
        if not _allowed(node):
            raise MenuError(
                f"{where}: `{rule}` uses {type(node).__name__}; only + - * / // %, comparisons, and/or/not, numbers, "
                "quoted words and knob names are allowed"
            )
    return tree


def _allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float | str) and not isinstance(node.value, bool)
    if isinstance(node, ast.BinOp):
        return type(node.op) in _ARITHMETIC
    if isinstance(node, ast.Compare):
        return all(type(op) in _COMPARISON for op in node.ops)
    plain = (
        ast.Name
        | ast.Load
        | ast.BoolOp
        | ast.And
        | ast.Or
        | ast.UnaryOp
        | ast.Not
        | ast.USub
        | ast.operator
        | ast.cmpop
    )
    return isinstance(node, plain)


def _value(node: ast.expr, names: Mapping[str, KnobValue]) -> KnobValue:
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Name(id=name):
            return names[name]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, names)
        case ast.UnaryOp(operand=operand):
            return -_number(_value(operand, names))
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_number(_value(left, names)), _number(_value(right, names)))
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part, names) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_value(part, names) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            value = _value(left, names)
            for comparison, right in zip(ops, rights, strict=True):
                following = _value(right, names)
                if not _COMPARISON[type(comparison)](value, following):
                    return False
                value = following
            return True
    raise TypeError(f"{type(node).__name__} is not part of the constraint language")


def _number(value: KnobValue) -> float:
    if isinstance(value, str):
        raise TypeError(f"{value!r} is not a number")
    return value
