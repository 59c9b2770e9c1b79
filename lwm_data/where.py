"""Conditions on a record's fields, as a manifest states them: parsed to a tree of a few kinds of node, never run.

where: "clip_similarity_vitb32 > 0.3 and (pwatermark < 0.8 or licence == 'CC0') and caption != ''"

    or, and, not     names of fields     numbers and strings     < <= > >= == != in     (a, b)
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

Condition = Callable[[Mapping[str, Any]], bool]
MAX_LENGTH = 1024  # characters; a tree as deep as that is walked without trouble


def parse_where(text: str) -> Condition:
    """The condition that `text` states: a function of a record's fields.

    It raises KeyError where a record lacks a field, TypeError where a field cannot be compared. ValueError here where
    `text` is no condition.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"where: a condition of at most {MAX_LENGTH:,} characters (got {len(text):,})")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f'where: a condition like "pwatermark < 0.8 and width >= 256" (got {text!r}: {error})'
        ) from None
    try:
        return _condition(tree)
    except RecursionError:
        raise ValueError(f"where: a condition of less depth (got {text!r})") from None


def _condition(node: ast.expr) -> Condition:
    match node:
        case ast.BoolOp(op=op, values=values):
            parts = [_condition(value) for value in values]
            if isinstance(op, ast.And):
                return lambda fields: all(part(fields) for part in parts)
            return lambda fields: any(part(fields) for part in parts)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _condition(operand)
            return lambda fields: not inner(fields)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            return _comparison([_value(side) for side in (left, *comparators)], [type(op) for op in ops], node)
    raise ValueError(f"where: comparisons joined by and, or, not (got {ast.unparse(node)!r})")


def _comparison(
    sides: list[Callable[[Mapping[str, Any]], Any]], ops: list[type[ast.cmpop]], node: ast.Compare
) -> Condition:
    for op, right in zip(ops, node.comparators, strict=True):
        if op not in COMPARE:
            raise ValueError(f"where: one of < <= > >= == != in, not in (got {ast.unparse(node)!r})")
        # ('image') is no list, and 'a' in 'image' is true.
        if op in (ast.In, ast.NotIn) and isinstance(right, ast.Constant):
            raise ValueError(f"where: a list after in, as ({right.value!r},) (got {ast.unparse(node)!r})")

    def holds(fields: Mapping[str, Any]) -> bool:
        values = [side(fields) for side in sides]
        return all(COMPARE[op](a, b) for op, a, b in zip(ops, values[:-1], values[1:], strict=True))

    return holds


COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: lambda a, b: bool(a < b),
    ast.LtE: lambda a, b: bool(a <= b),
    ast.Gt: lambda a, b: bool(a > b),
    ast.GtE: lambda a, b: bool(a >= b),
    ast.Eq: lambda a, b: bool(a == b),
    ast.NotEq: lambda a, b: bool(a != b),
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def _value(node: ast.expr) -> Callable[[Mapping[str, Any]], Any]:
    match node:
        case ast.Name(id=name):
            return lambda fields: fields[name]
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return lambda _: value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return lambda _: -number
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            kind = tuple if isinstance(node, ast.Tuple) else list
            parts = [_value(element) for element in elements]
            return lambda fields: kind(part(fields) for part in parts)
    raise ValueError(f"where: a field, a number or a string (got {ast.unparse(node)!r})")
