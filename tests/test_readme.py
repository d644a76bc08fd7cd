"""The README's tree names every source file, in its room, and nothing that is not there."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tree_in_the_readme_is_the_tree_on_disk():
    tree = (ROOT / "README.md").read_text().split("```\nsrc/tropism/\n")[1].split("```")[0]
    room, named = "", set()
    for line in tree.splitlines():
        if not line.startswith(" "):
            break
        name = line.split()[0]
        if name.endswith("/"):
            room = name
        else:
            named.add(name if line.index(name) == 4 else room + name)
    there = {str(path.relative_to(ROOT / "src/tropism")) for path in (ROOT / "src/tropism").rglob("*.py")}
    assert named == {path for path in there if not path.endswith("__init__.py")}
