"""Who may import whom. The table below is the plan of the house; this file holds the code to it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
PACKAGE = SRC / "lorikeet"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = {
    "lorikeet",
    "types",
    "errors",
    "config",
    "template",
    "adapters.configs",
    "adapters.files",
    "adapters.fields",
    "adapters.foreign",
    "adapters.safefile",
}
# room -> rooms (or modules) it may import besides itself and the ground
ROOMS: dict[str, set[str]] = {
    "ground": set(),
    "kernels": set(),
    "adapters": {"model.names", "model.shard", "model.spec"},
    "model": {"kernels", "adapters"},
    "engine": {"model", "kernels", "adapters"},
    "train": {"model", "kernels", "adapters", "data.formats", "data.synthesize"},
    "registry": set(),
    "evals": set(),
    "data": set(),
    "client": set(),
    "server": {
        "engine.link",
        "engine.lifeline",
        "job.orders",
        "job.preview",
        "model.families",
        "model.spec",
        "data.formats",
        "adapters.merge",
        "registry",
        "evals.leaderboard",
        "model.tokenizer",
        "model.sources",
        "adapters.files",
        "adapters.sources",
        "adapters.references",
        "adapters.download",
        "adapters.transport",
    },
    "simulate": {
        "engine.scheduler",
        "engine.plan",
        "engine.blocks",
        "engine.residency",
        "engine.request",
        "engine.fairness",
    },
    "bench": {"*"},
    "cli": {"*"},
    "demo": {"*"},
    "judge": {"*"},
    "job": {"*"},
    "__main__": {"*"},
}
# library -> the only files or folders that may import it
HOMES: dict[str, set[str]] = {
    "triton": {"kernels/gpu"},
    "numba": {"kernels/cpu"},
    "fastapi": {"server/"},
    "uvicorn": {"server/"},
    "starlette": {"server/"},
    "prometheus_client": {"server/"},
    "httpx": {"client.py"},
    "sklearn": {"evals/"},
    "scipy": {"simulate/fit.py"},
    "fsspec": {"adapters/sources.py", "registry/objects.py"},
    "s3fs": {"adapters/sources.py"},
    "gcsfs": {"adapters/sources.py"},
    "adlfs": {"adapters/sources.py"},
    "sqlalchemy": {"registry/"},
    "alembic": {"registry/"},
    "typer": {"cli"},
    "zmq": {"engine/"},
    "peft": set(),
    "transformers": {"model/tokenizer.py"},
}
NO_TORCH = [
    "lorikeet",
    "lorikeet.types",
    "lorikeet.errors",
    "lorikeet.config",
    "lorikeet.template",
    "lorikeet.client",
    "lorikeet.cli",
    "lorikeet.adapters.configs",
    "lorikeet.adapters.files",
    "lorikeet.adapters.compiled",
    "lorikeet.adapters.merge",
    "lorikeet.adapters.fuse",
    "lorikeet.adapters.sources",
    "lorikeet.model.spec",
    "lorikeet.model.families",
    "lorikeet.model.sources",
    "lorikeet.model.tokenizer",
    "lorikeet.engine.request",
    "lorikeet.engine.blocks",
    "lorikeet.engine.residency",
    "lorikeet.engine.scheduler",
    "lorikeet.engine.grammar",
    "lorikeet.engine.compiler",
    "lorikeet.engine.fairness",
    "lorikeet.engine.link",
    "lorikeet.server.app",
    "lorikeet.server.serve",
    "lorikeet.evals.harness",
    "lorikeet.registry.home",
    "lorikeet.simulate.run",
    "lorikeet.simulate.fit",
]
SILENT_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "base", "manager"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SRC).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def inner(module: str) -> str:
    """`lorikeet.engine.link` -> `engine.link`; the package itself stays `lorikeet`."""
    return module.removeprefix("lorikeet.")


def room_of(module: str) -> str:
    name = inner(module)
    return "ground" if name in GROUND else "cli" if name.startswith("cli_") else name.split(".")[0]


def imports(path: Path, *, with_types: bool = False) -> set[str]:
    """Modules that a file imports anywhere in it, those under `if TYPE_CHECKING` left out unless asked for."""
    tree = ast.parse(path.read_text())
    if not with_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = [ast.Pass()]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the house writes them in full"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if is_module(f"{node.module}.{alias.name}")}
    return found


def is_module(name: str) -> bool:
    path = SRC / name.replace(".", "/")
    return name.startswith("lorikeet") and (path.with_suffix(".py").exists() or (path / "__init__.py").exists())


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_walls(path: Path) -> None:
    module = module_name(path)
    room = room_of(module)
    assert room in ROOMS, f"{module} stands in no room of the plan"
    allowed = ROOMS[room]
    for target in imports(path):
        if not target.startswith("lorikeet") or "*" in allowed:
            continue
        name = inner(target)
        fine = name in GROUND or room_of(target) == room or any(name == a or name.startswith(a + ".") for a in allowed)
        # `from lorikeet.engine import link` names the package too: the package's own __init__ holds no code
        fine = fine or (
            is_module(target)
            and (SRC / target.replace(".", "/") / "__init__.py").exists()
            and any(a.startswith(name + ".") for a in allowed | GROUND)
        )
        assert fine, f"{module} ({room}) imports {target}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_libraries_live_in_one_home(path: Path) -> None:
    place = str(path.relative_to(PACKAGE))
    for target in imports(path):
        library = target.split(".")[0]
        if library in HOMES:
            assert any(place.startswith(home) for home in HOMES[library]), f"{place} imports {library}"


def test_no_import_cycles() -> None:
    graph = {module_name(p): {t for t in imports(p, with_types=False) if is_module(t)} for p in FILES}
    for module, targets in graph.items():  # a package's __init__ is entered before its modules; it imports nothing
        targets.discard(module)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, "import cycle: " + " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for target in graph.get(module, ()):
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        if module != "lorikeet":  # its names are imported lazily, on first use
            visit(module, ("",))


@pytest.mark.parametrize("module", NO_TORCH)
def test_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0, f"{module} imports torch"


def test_importing_lorikeet_is_light() -> None:
    """The bar is 0.3 s; what takes long are libraries, so the test names the ones that must stay out."""
    code = "import sys, lorikeet; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "numpy", "numba", "fastapi", "pydantic", "transformers", "tokenizers", "yaml", "zmq"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_file_names_say_something(path: Path) -> None:
    assert path.stem not in SILENT_NAMES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_one_room(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 600
