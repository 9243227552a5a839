"""The structure of kd/: the README's tree is the tree on disk, files and functions stay short."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "kd").rglob("*.py"))
KERNELS = Path("kd/losses/kernels")


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    readme = (ROOT / "README.md").read_text()
    lines = re.search(r"^```\n(kd/\n.*?)^```", readme, re.DOTALL | re.MULTILINE)[1].splitlines()
    named, rooms = set(), []
    for line in lines:
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        rooms[depth:] = [name.rstrip("/")]
        if name.endswith(".py"):
            named.add(Path(*rooms))
    assert named == {path for path in FILES if not path.name.startswith("__")}


def test_the_top_of_the_package_has_at_most_ten_files():
    assert len([path for path in FILES if len(path.parts) == 2]) <= 10


def test_files_and_functions_outside_the_kernels_are_short():
    long = []
    for path in FILES:
        text = (ROOT / path).read_text()
        if KERNELS in path.parents:
            continue
        if text.count("\n") > 400:
            long.append(str(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                long.append(f"{path}:{node.name}")
    assert long == []
