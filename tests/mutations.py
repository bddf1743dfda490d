"""Small faults to put into a kernel module, one at a time: what `mutate_kernels.py` runs the tests against.

A mutant replaces one piece of the source by another, and leaves the rest as it is, comments and line numbers too. Every
function of a module is mutated, kernels and launchers alike; docstrings, annotations, decorators, messages and
`num_warps` are not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

OPERATORS = {  # each becomes each of these; << and the like have their own precedence, which only makes other mutants
    ast.Add: ("+", ("-",)),
    ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("+", "/")),
    ast.Div: ("/", ("*",)),
    ast.FloorDiv: ("//", ("*",)),
    ast.Mod: ("%", ("//",)),
    ast.BitAnd: ("&", ("|",)),
    ast.BitOr: ("|", ("&",)),
    ast.BitXor: ("^", ("|",)),
    ast.LShift: ("<<", (">>",)),
    ast.RShift: (">>", ("<<",)),
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.And: ("and", ("or",)),
    ast.Or: ("or", ("and",)),
}
SWAPS = {"fma": ((1, 2), (0, 2)), "where": ((1, 2),), "clamp": ((1, 2),)}  # arguments of tl.fma, ...
EXCHANGED = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min", "sum": "max"}
DROPPED = ("abs", "sqrt", "sqrt_rn", "exp2", "clamp", "cumsum", "ravel", "max_contiguous", "multiple_of")  # f(x) -> x
METHODS = ("to", "reshape")  # x.f(...) -> x
COMMUTE = ("max", "min")
MASK_AT = {"load": 1, "store": 2, "atomic_add": 2}  # where the mask stands; what follows it goes with it
NUMBERS = {"PLANE": "{} + 1", "CHANNELS": "{} + 1", "HISTORY": "{} + 1", "VECTOR": "2 * {}", "BLOCK": "2 * {}"}


@dataclass(frozen=True)
class Mutant:
    """One fault: `source` is the module's with it; `name` says where and what, and is the same in the next version."""

    module: str
    line: int
    name: str
    source: str


def mutants(path: Path) -> list[Mutant]:
    """All mutants of a module's functions."""
    source = path.read_text()
    seen: dict[str, int] = {}
    made = []
    tree = ast.parse(source)
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        scan = _Function(source, function, _exchanged_names(tree))
        for start, end, new in scan.edits():
            changed = source[:start] + new + source[end:]
            first = source.rfind("\n", 0, start) + 1
            before, after = (
                source[first : _line_end(source, end)],
                changed[first : _line_end(changed, start + len(new))],
            )
            name = f"{path.stem}.{function.name}: {_on_one_line(before)}  =>  {_on_one_line(after)}"
            seen[name] = seen.get(name, 0) + 1
            name += f"  ({seen[name]})" if seen[name] > 1 else ""
            made.append(Mutant(path.stem, source.count("\n", 0, start) + 1, name, changed))
    return made


def _line_end(source: str, at: int) -> int:
    end = source.find("\n", at)
    return len(source) if end < 0 else end


def _on_one_line(text: str) -> str:
    return " ".join(" ".join(line.split("  # ")[0].split()) for line in text.splitlines())


def _exchanged_names(tree: ast.Module) -> dict[str, str]:
    """What becomes of each module-level constexpr: the next of those assigned together, or one more than itself."""
    names: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and "tl.constexpr" in ast.unparse(node.value):
            group = [target.id for target in ast.walk(node.targets[0]) if isinstance(target, ast.Name)]
            names |= dict(zip(group, group[1:] + group[:1], strict=True) if len(group) > 1 else [])
            names |= {group[0]: f"({group[0]} + 1)"} if len(group) == 1 else {}
    return names


class _Function:
    """The edits of one function: (start, end, new text), as offsets into the module's source."""

    def __init__(self, source: str, function: ast.FunctionDef, names: dict[str, str]) -> None:
        self.source, self.function, self.names = source, function, names
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.bound = {arg.arg for arg in ast.walk(function.args) if isinstance(arg, ast.arg)}

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:  # the sources are ASCII: columns are characters
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def edits(self) -> Iterator[tuple[int, int, str]]:
        arguments = self.function.args
        for default in (*arguments.defaults, *(d for d in arguments.kw_defaults if d is not None)):
            yield from self.visit(default)
        for statement in self.function.body:
            yield from self.visit(statement)

    def visit(self, node: ast.AST) -> Iterator[tuple[int, int, str]]:
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            return
        handler = getattr(self, f"of_{type(node).__name__}", None)
        if handler is not None:
            yield from handler(node)
        for field, child in ast.iter_fields(node):
            for part in child if isinstance(child, list) else [child]:
                callee = isinstance(node, ast.Call) and field == "func" and isinstance(part, ast.Name)
                tuning = isinstance(part, ast.keyword) and part.arg == "num_warps"
                if isinstance(part, ast.AST) and field != "annotation" and not callee and not tuning:
                    yield from self.visit(part)

    def between(self, left: ast.expr, right: ast.expr, operator: ast.AST) -> Iterator[tuple[int, int, str]]:
        """The operator between two expressions, exchanged."""
        if type(operator) not in OPERATORS:
            return
        sign, others = OPERATORS[type(operator)]
        at = self.source.index(sign, self.span(left)[1], self.span(right)[0])
        yield from ((at, at + len(sign), other) for other in others)

    def swapped(self, a: ast.expr, b: ast.expr) -> Iterator[tuple[int, int, str]]:
        (start, middle), (again, end) = self.span(a), self.span(b)
        if self.text(a) != self.text(b):
            yield start, end, self.text(b) + self.source[middle:again] + self.text(a)

    def of_BinOp(self, node: ast.BinOp) -> Iterator[tuple[int, int, str]]:
        yield from self.between(node.left, node.right, node.op)

    def of_BoolOp(self, node: ast.BoolOp) -> Iterator[tuple[int, int, str]]:
        for left, right in pairwise(node.values):
            yield from self.between(left, right, node.op)

    def of_Compare(self, node: ast.Compare) -> Iterator[tuple[int, int, str]]:
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            yield from self.between(left, right, operator)

    def of_UnaryOp(self, node: ast.UnaryOp) -> Iterator[tuple[int, int, str]]:
        yield *self.span(node), self.text(node.operand)

    def of_If(self, node: ast.If) -> Iterator[tuple[int, int, str]]:
        yield from self.negated(node.test)

    def of_IfExp(self, node: ast.IfExp) -> Iterator[tuple[int, int, str]]:
        yield from self.negated(node.test)

    def negated(self, test: ast.expr) -> Iterator[tuple[int, int, str]]:
        if not isinstance(test, ast.Compare):  # a comparison's opposite is among the operators
            yield *self.span(test), f"not ({self.text(test)})"

    def of_Constant(self, node: ast.Constant) -> Iterator[tuple[int, int, str]]:
        if isinstance(node.value, bool):
            yield *self.span(node), str(not node.value)
        elif isinstance(node.value, int | float):
            yield *self.span(node), str(node.value + 1)
            if node.value >= 1:
                yield *self.span(node), str(node.value - 1)

    def of_Name(self, node: ast.Name) -> Iterator[tuple[int, int, str]]:
        if node.id in self.names and node.id not in self.bound and isinstance(node.ctx, ast.Load):
            yield *self.span(node), self.names[node.id]

    def of_Attribute(self, node: ast.Attribute) -> Iterator[tuple[int, int, str]]:
        if isinstance(node.value, ast.Name) and node.value.id == "const" and node.attr.isupper():
            yield *self.span(node), f"({self.text(node)} + 1)"

    def of_AugAssign(self, node: ast.AugAssign) -> Iterator[tuple[int, int, str]]:
        yield from self.between(node.target, node.value, node.op)
        yield *self.span(node), "pass"

    def of_Assign(self, node: ast.Assign) -> Iterator[tuple[int, int, str]]:
        names = {target.id for target in ast.walk(node.targets[0]) if isinstance(target, ast.Name)}
        if names <= self.bound:  # else nothing would be left to compute with
            yield *self.span(node), "pass"
        self.bound |= names

    def of_Expr(self, node: ast.Expr) -> Iterator[tuple[int, int, str]]:
        yield *self.span(node), "pass"

    def of_Return(self, node: ast.Return) -> Iterator[tuple[int, int, str]]:
        values = node.value.elts if isinstance(node.value, ast.Tuple) else []
        for a, b in pairwise(values):
            yield from self.swapped(a, b)

    def of_Call(self, node: ast.Call) -> Iterator[tuple[int, int, str]]:
        launch = isinstance(node.func, ast.Subscript) or any(k.arg and k.arg.isupper() for k in node.keywords)
        positional = [arg for arg in node.args if not isinstance(arg, ast.Starred)]
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        triton = bool(method) and ast.unparse(node.func) == f"tl.{method}"
        if triton:
            yield from self.of_triton(node, method)
        elif method in METHODS and isinstance(node.func, ast.Attribute):
            yield *self.span(node), self.text(node.func.value)
        elif len(positional) == len(node.args) and ast.unparse(node.func) not in COMMUTE:
            for a, b in pairwise(positional):
                yield from self.swapped(a, b)
        for keyword in node.keywords:
            if launch and keyword.arg and keyword.arg.isupper() and keyword.arg != "PASS":
                text = f"({self.text(keyword.value)})"
                yield *self.span(keyword.value), NUMBERS.get(keyword.arg, "not {}").format(text)
            elif not launch and keyword.arg and (triton or isinstance(node.func, ast.Name)) and keyword.arg != "other":
                yield *self.span(node), self.call(node, node.args, [k for k in node.keywords if k is not keyword])

    def of_triton(self, node: ast.Call, name: str) -> Iterator[tuple[int, int, str]]:
        for i, j in SWAPS.get(name, ()):
            yield from self.swapped(node.args[i], node.args[j])
        if name in EXCHANGED:
            start = self.span(node)[0] + len("tl.")
            yield start, start + len(name), EXCHANGED[name]
        if name in DROPPED:
            yield *self.span(node), self.text(node.args[0])
        if name in MASK_AT and len(node.args) > MASK_AT[name]:
            others = [k for k in node.keywords if k.arg != "other"]
            yield *self.span(node), self.call(node, node.args[: MASK_AT[name]], others)

    def call(self, node: ast.Call, args: list[ast.expr], keywords: list[ast.keyword]) -> str:
        """The call with other arguments."""
        given = [self.text(arg) for arg in args] + [f"{k.arg}={self.text(k.value)}" for k in keywords]
        return f"{self.text(node.func)}({', '.join(given)})"
