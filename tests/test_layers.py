"""Imports only go down: no module of mambify imports one above it, no circle, no import hidden in a function.

    errors ← {fingerprint, io, language_model, machine, norm, tokenization, trimmed_head}
           ← {config, feature_input, provenance} ← layer_map ← card ← hub ← ops ← cache ← mixers ← model ← engine
           ← families ← conversion ← {data, distill, decode, evaluate, export, integrations, selection}
           ← {serve, workflows} ← experiments ← bench ← cli

Parts in braces do not import each other: stages share directories of checkpoints. Commands import inside
functions, so that ``mambify --help`` is quick, and the package's ``__init__`` resolves its public names
lazily: both are exempt from the third rule and from no other.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"

# From the bottom up; a line is a level, and the parts on one line do not import each other.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("fingerprint", "io", "language_model", "machine", "norm", "tokenization", "trimmed_head"),
    ("config", "feature_input", "provenance"),
    ("layer_map",),
    ("card",),
    ("hub",),
    ("ops",),
    ("cache",),
    ("mixers",),
    ("model",),
    ("engine",),
    ("families",),
    ("conversion",),
    ("data", "distill", "decode", "evaluate", "export", "integrations", "selection"),
    ("serve", "workflows"),
    ("experiments",),
    ("bench",),
    ("cli",),
    ("__main__",),
)
LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}

Imports = Mapping[str, Collection[str]]  # module → the mambify modules it imports, by full name


def part_of(module: str) -> str | None:
    """``mambify.ops.ssd.reference`` → ``ops``; None for ``mambify`` itself."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] or None


def unplaced(modules: Collection[str]) -> list[str]:
    """Modules whose part has no place in LEVELS yet."""
    return sorted(m for m in modules if (part := part_of(m)) is not None and part not in LEVEL_OF)


def upward(imports: Imports) -> list[str]:
    """Imports that go up, sideways between stages, or from below the CLI to the package's ``__init__``."""
    found = []
    for module, targets in imports.items():
        part = part_of(module)
        if part is None:  # the public face may name anything
            continue
        for target in targets:
            target_part = part_of(target)
            if target_part == part:
                continue
            if target_part is None:
                if LEVEL_OF[part] < LEVEL_OF["cli"]:
                    found.append(f"{module} imports {target}, the package's public face")
            elif LEVEL_OF[target_part] >= LEVEL_OF[part]:
                found.append(f"{module} imports {target}")
    return sorted(found)


def circles(imports: Imports) -> list[list[str]]:
    """Groups of modules that reach each other through imports (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in imports.get(module, ()):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1 or module in imports.get(module, ()):
                found.append(sorted(group))

    for module in imports:
        if module not in index:
            visit(module)
    return sorted(found)


def statements(tree: ast.Module) -> Iterator[tuple[ast.AST, bool]]:
    """Every node of a module, and whether it stands inside a function."""
    todo: list[tuple[ast.AST, bool]] = [(tree, False)]
    while todo:
        node, inside = todo.pop()
        yield node, inside
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        todo.extend((child, inside) for child in ast.iter_child_nodes(node))


def targets_of(node: ast.AST, module: str, is_package: bool, known: Collection[str]) -> Iterator[str]:
    """The mambify modules that one import statement names; ``import_module("…")`` counts as one."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.split(".") if is_package else module.split(".")[:-1]
            package = package[: len(package) - node.level + 1]
            base = ".".join([*package, base] if base else package)
        # the version is a constant that stands before any import: naming it depends on nothing
        names = [
            f"{base}.{a.name}" if f"{base}.{a.name}" in known else base
            for a in node.names
            if (base, a.name) != ("mambify", "__version__")
        ]
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        names = [str(node.args[0].value)] if function in {"import_module", "__import__"} else []
    else:
        names = []
    yield from (name for name in names if name.split(".")[0] == "mambify")


def read_imports(sources: Mapping[str, str], packages: Collection[str]) -> tuple[dict[str, set[str]], list[str]]:
    """All imports of the given modules, and those hidden in functions where that is not allowed."""
    imports: dict[str, set[str]] = {}
    hidden: list[str] = []
    for module, source in sources.items():
        imports[module] = set()
        may_hide = module == "mambify" or part_of(module) in {"cli", "__main__"}
        for node, inside in statements(ast.parse(source)):
            for target in targets_of(node, module, module in packages, sources):
                if inside and may_hide:
                    if module != "mambify":  # what a command imports late still has to be below it
                        imports[module].add(target)
                elif inside:
                    hidden.append(f"{module}:{getattr(node, 'lineno', 0)} imports {target} inside a function")
                else:
                    imports[module].add(target)
    return imports, sorted(hidden)


@pytest.fixture(scope="module")
def package() -> tuple[dict[str, str], set[str]]:
    sources, packages = {}, set()
    for path in sorted((SOURCE / "mambify").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
            packages.add(".".join(parts))
        sources[".".join(parts)] = path.read_text(encoding="utf-8")
    assert len(sources) > 1, f"no modules found under {SOURCE}"
    return sources, packages


def test_every_module_has_a_level(package: tuple[dict[str, str], set[str]]) -> None:
    assert unplaced(package[0]) == [], "give these a place in LEVELS"


def test_imports_only_go_down(package: tuple[dict[str, str], set[str]]) -> None:
    assert upward(read_imports(*package)[0]) == []


def test_no_circles(package: tuple[dict[str, str], set[str]]) -> None:
    assert circles(read_imports(*package)[0]) == []


def test_no_imports_hidden_in_functions(package: tuple[dict[str, str], set[str]]) -> None:
    assert read_imports(*package)[1] == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("mambify.errors", "mambify.io"),
        ("mambify.config", "mambify.model"),
        ("mambify.mixers.mamba2", "mambify.families.llama"),
        ("mambify.distill.losses", "mambify.data.packing"),
        ("mambify.evaluate.report", "mambify.distill.recipe"),
        ("mambify.export.gguf", "mambify.cli.main"),
        ("mambify.workflows.distill", "mambify.experiments.jobs"),
        ("mambify.model", "mambify"),
    ],
)
def test_a_planted_upward_import_is_caught(module: str, target: str) -> None:
    assert len(upward({module: [target]})) == 1


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("mambify.io", "mambify.errors"),
        ("mambify.ops.ssd", "mambify.ops.ssd.reference"),
        ("mambify.distill.trainer", "mambify.conversion.plan"),
        ("mambify.serve.http", "mambify.decode.generate"),
        ("mambify.cli.main", "mambify"),
        ("mambify", "mambify.serve.http"),
    ],
)
def test_an_import_that_goes_down_is_not(module: str, target: str) -> None:
    assert upward({module: [target]}) == []


def test_a_planted_circle_is_caught() -> None:
    ring = {"mambify.a": ["mambify.b"], "mambify.b": ["mambify.c"], "mambify.c": ["mambify.a"]}
    assert circles(ring | {"mambify.d": ["mambify.a"]}) == [["mambify.a", "mambify.b", "mambify.c"]]
    assert circles({"mambify.a": ["mambify.b", "mambify.c"], "mambify.b": ["mambify.c"]}) == []


def test_statements_are_read_as_python_reads_them() -> None:
    sources = {
        "mambify": "def __getattr__(name):\n    return import_module('mambify.model')\n",
        "mambify.errors": "",
        "mambify.model": "",
        "mambify.ops": "from .ssd import scan\nfrom .. import errors, __version__\nimport mambify.errors\n",
        "mambify.ops.ssd": "if TYPE_CHECKING:\n    from mambify import model\n",
        "mambify.cli": "def main():\n    from mambify.model import HybridForCausalLM\n",
        "mambify.data": "class A:\n    def f(self):\n        from mambify.errors import UsageError\n",
        "mambify.decode": "def f():\n    return __import__('mambify.model')\n",
    }
    imports, hidden = read_imports(sources, packages={"mambify", "mambify.ops"})
    assert imports == {
        "mambify": set(),
        "mambify.errors": set(),
        "mambify.model": set(),
        "mambify.ops": {"mambify.ops.ssd", "mambify.errors"},
        "mambify.ops.ssd": {"mambify.model"},
        "mambify.cli": {"mambify.model"},
        "mambify.data": set(),
        "mambify.decode": set(),
    }
    assert hidden == [
        "mambify.data:3 imports mambify.errors inside a function",
        "mambify.decode:2 imports mambify.model inside a function",
    ]


def test_a_module_without_a_level_is_caught() -> None:
    assert unplaced(["mambify", "mambify.model", "mambify.helpers.misc"]) == ["mambify.helpers.misc"]
