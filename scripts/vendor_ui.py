"""Re-create the page's vendored libraries from npm, or check that they are what npm has.

    python scripts/vendor_ui.py            # write src/lorikeet/ui/vendor and tests/ui/vendor
    python scripts/vendor_ui.py --check    # download again and compare; exit code 1 on a difference

Node's `npm` is needed here and nowhere else. A tarball whose hash is not the pinned one is refused.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "src/lorikeet/ui/vendor"
TESTS = ROOT / "tests/ui/vendor"
NO_MAP = "//# sourceMappingURL="


@dataclass(frozen=True)
class Package:
    """`files`: path in the package -> name it gets here. `edits`: what is replaced in them, and with what."""

    name: str
    version: str
    sha512: str  # of the tarball, as npm's `dist.integrity` gives it
    folder: Path
    files: dict[str, str]
    edits: dict[str, str] = field(default_factory=dict)
    append: dict[str, str] = field(default_factory=dict)  # path in the package -> last line


PACKAGES = [
    Package(
        "preact", "11.2.0",
        "/HfHI/7N84e6GrWBJ3J280z3mLaRJiDcSvj/A+y/4AbLnND/1UlGHe1sR6oYuTGwId0nP7dqDU9OnLxMPZ7xBg==", PAGE,
        {"dist/preact.mjs": "preact.js", "hooks/dist/hooks.mjs": "preact-hooks.js", "LICENSE": "preact.LICENSE"},
        {'from"preact"': 'from"./preact.js"'},  # browsers resolve no bare names without an inline import map
    ),
    Package(
        "htm", "3.1.1",
        "983Vyg8NwUE7JkZ6NmOqpCZ+sh1bKv2iYTlUkzlWmA5JD2acKoxd4KVxbMmxX/85mtfdnDmTFoNKcg5DGAvxNQ==", PAGE,
        {"dist/htm.module.js": "htm.js", "LICENSE": "htm.LICENSE"},
    ),
    Package(
        "uplot", "1.6.32",
        "KIMVnG68zvu5XXUbC4LQEPnhwOxBuLyW1AHtpm6IKTXImkbLgkMy+jabjLgSLMasNuGGzQm/ep3tOkyTxpiQIw==", PAGE,
        {"dist/uPlot.iife.min.js": "uplot.js", "dist/uPlot.min.css": "uplot.css", "LICENSE": "uplot.LICENSE"},
        append={"dist/uPlot.iife.min.js": "export default uPlot;\n"},  # its own ES module is not minified
    ),
    Package(
        "axe-core", "4.14.1",
        "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==", TESTS,
        {"axe.min.js": "axe.min.js", "LICENSE": "axe.LICENSE", "LICENSE-3RD-PARTY.txt": "axe.LICENSE-3RD-PARTY.txt"},
    ),
]  # fmt: skip


def fetch(package: Package) -> dict[Path, bytes]:
    """Destination -> content. Raises `SystemExit` for a tarball that is not the pinned one."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", f"{package.name}@{package.version}", "--silent", "--pack-destination", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (tarball,) = Path(folder).glob("*.tgz")
        found = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
        if found != package.sha512:
            raise SystemExit(f"{package.name}@{package.version}: sha512 is {found}, pinned is {package.sha512}")
        with tarfile.open(tarball) as archive:
            return {package.folder / name: _take(package, archive, path) for path, name in package.files.items()}


def _take(package: Package, archive: tarfile.TarFile, path: str) -> bytes:
    member = archive.extractfile(f"package/{path}")
    assert member is not None, f"{package.name} has no {path}"
    content = member.read()
    if not path.endswith(("js", ".css")):
        return content
    lines = [line for line in content.decode().splitlines() if not line.startswith(NO_MAP)]
    text = "\n".join(lines) + "\n" + package.append.get(path, "")
    for old, new in package.edits.items():
        text = text.replace(old, new)
    return text.encode()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    wrong = 0
    for package in PACKAGES:
        for path, content in fetch(package).items():
            if check:
                same = path.exists() and path.read_bytes() == content
                wrong += not same
                print("same     " if same else "DIFFERENT", path.relative_to(ROOT))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                print(f"{len(content):8,d} B  {path.relative_to(ROOT)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
