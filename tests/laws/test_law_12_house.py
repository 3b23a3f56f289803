"""Law 12: imports obey the table, `__all__` is complete, each path in the tour exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "trimode"
FLOORS = [
    {"errors", "_native"},
    {"device"},
    {"model", "text", "diffusion"},
    {"decoding", "checkpoint"},
    {"engine", "training"},
    {"server", "evaluation"},
    {"viz"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module or ""]
            if node.module == "trimode":
                names = [f"trimode.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("trimode.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_room_imports_only_from_floors_below(path):
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in FLOOR_OF, f"{room} is not in the table of the design: add it there first"
    for other in imported_rooms(path) - {room}:
        if other == "__version__":
            continue
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} must not import {other}"


def test_decoding_sees_views_and_never_the_model():
    for path in (SOURCE / "decoding").glob("*.py"):
        found = re.findall(r"from (trimode\.model[.\w]*) import", path.read_text())
        assert set(found) <= {"trimode.model.views"}, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_all_names_what_a_module_shows(path):
    tree = ast.parse(path.read_text())
    exported = None
    defined = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            exported = ast.literal_eval(node.value)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            defined.append(node.name)
    if exported is None:
        assert not defined or room_of(path) == "cli", f"{path} has no __all__"
        return
    assert len(exported) == len(set(exported))
    missing = [name for name in exported if name not in path.read_text().replace("__all__", "")]
    assert not missing


@pytest.mark.parametrize("document", ["README.md", "docs/tour.md", "docs/log.md"])
def test_each_path_in_the_documents_exists(document):
    text = (ROOT / document).read_text()
    paths = re.findall(r"`((?:src|docs|tests|benchmarks|examples|recipes)/[\w./-]+)`", text)
    for path in paths:
        assert (ROOT / path).exists(), f"{document} names {path}"


def test_the_tour_has_six_files_in_reading_order():
    text = (ROOT / "docs" / "tour.md").read_text()
    assert len(re.findall(r"^## \d\. `src/", text, flags=re.MULTILINE)) == 6
