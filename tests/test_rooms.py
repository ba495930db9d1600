"""The rooms of `post_training/` and `data/`: what each may import, how full it is, how long a file is.

    python tests/test_rooms.py      the floors, each with its rooms and their sizes

A room is a folder; its floor says what it may import: rooms of lower floors only, not even its neighbours.
The order is read from the code's imports, those inside functions and those for type checkers among them.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "post_training")
# What lies on top of both.
ABOVE = ("finetune", "model_provider", "scripts")

# From the ground up; "" is what lies in the package itself.
FLOORS: dict[str, list[list[str]]] = {
    "data": [
        ["errors"],
        ["sources", "rows", "images"],
        ["templates", "documents"],
        ["masking"],
        ["tokenise"],
        ["prepare"],
        ["packs"],
        ["features"],
        ["arguments", "preview", ""],
    ],
    "post_training": [
        ["errors"],
        ["files", "tensors"],
        ["machine", "hf", "recipes", "platform/patches"],
        ["platform/cpu", "platform/checkpoints", "adapters"],
        ["platform", "layout"],
        ["quantisation"],
        ["arguments", "metrics"],
        ["batch", "job"],
        ["model", "checkpoint"],
        ["training", "inference"],
        ["distillation", "hf_models"],
        ["knowledge", "tasks"],
        ["export"],
    ],
}
MOST_FILES = 12
LONGEST_FILE = 400
LONGEST_MEDIAN = 160


def modules() -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def room_of(module: str, path: Path) -> str:
    """The room of a module: its folder below the package, or for a file on no floor of its own the file."""
    package, *rest = module.split(".")
    if path.name == "__init__.py":
        return "/".join(rest)
    return "/".join(rest[:-1]) or rest[0]


def imported(path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Modules of the project that a file imports, with the line: statements and names in strings.

    An f-string that begins with a room's name counts as that room, whatever it ends with.
    """
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            names = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if name in known else module for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value.partition(":")[0].rstrip(".")] if "." in node.value else []
        yield from ((line, n) for n in names if n in known or n.partition(".")[0] in ABOVE)


def floor_of(package: str, room: str) -> int:
    """The floor that a room is on.

    Raises:
        LookupError: nobody has said where the room is.
    """
    for floor, rooms in enumerate(FLOORS[package]):
        if room in rooms:
            return floor
    raise LookupError(f"{package}/{room} is on no floor: add it to FLOORS in tests/test_rooms.py")


def upward_imports() -> list[str]:
    """Imports that do not go down, a line each."""
    known, wrong = modules(), []
    for module, path in known.items():
        package, room = module.partition(".")[0], room_of(module, path)
        if package == "data" and module == "data":
            continue  # the package's own names are those of its rooms
        for line, target in imported(path, known):
            other = target.partition(".")[0]
            at = f"{path.relative_to(ROOT)}:{line} imports {target}"
            if other in ABOVE:
                wrong.append(f"{at}: it is above {package}/")
                continue
            there = room_of(target, known[target])
            if other != package:
                if package == "data":
                    wrong.append(f"{at}: data/ needs nothing of {other}/")
            elif room != there and floor_of(package, there) >= floor_of(package, room):
                wrong.append(f"{at}: {room or package} is below {there or package} or beside it")
    return wrong


def circles() -> list[str]:
    """Modules that import each other, at whatever distance, one circle a line."""
    known = modules()
    uses = {
        module: {t for _, t in imported(path, known) if t not in (module, "data") and t in known}
        for module, path in known.items()
        if module != "data"
    }
    found, done = [], set()

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            found.append(" -> ".join([*way[way.index(module) :], module]))
        elif module not in done:
            for target in sorted(uses.get(module, ())):
                visit(target, [*way, module])
            done.add(module)

    for module in sorted(uses):
        visit(module, [])
    return found


def sizes() -> dict[str, list[tuple[int, Path]]]:
    """Lines of each room's files."""
    rooms: dict[str, list[tuple[int, Path]]] = {}
    for module, path in modules().items():
        if path.name != "__init__.py" or module in PACKAGES:
            room = str(path.parent.relative_to(ROOT))
            rooms.setdefault(room, []).append((len(path.read_text().splitlines()), path))
    return rooms


def test_imports_go_down():
    assert upward_imports() == []


def test_no_module_imports_itself_by_a_detour():
    assert circles() == []


def test_every_room_has_its_sentence():
    for package in PACKAGES:
        for rooms in FLOORS[package]:
            for room in rooms:
                path = ROOT / package / room / "__init__.py"
                if (ROOT / package / room).is_dir():
                    assert (ast.get_docstring(ast.parse(path.read_text())) or "").endswith("."), (
                        path
                    )


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_are_not_crowded(package):
    for room, files in sizes().items():
        if room.partition("/")[0] == package:
            assert len(files) <= MOST_FILES, f"{room} holds {len(files)} files"


def test_files_are_short():
    lines = [count for files in sizes().values() for count, _ in files]
    longest = [str(path) for files in sizes().values() for n, path in files if n > LONGEST_FILE]
    assert not longest and statistics.median(lines) <= LONGEST_MEDIAN


def test_an_import_upwards_is_seen(tmp_path, monkeypatch):
    """Of every kind: at the top, inside a function, for type checkers, by a name in a string."""
    for name, text in {
        "data/__init__.py": "",
        "data/sources/__init__.py": "",
        "data/sources/files.py": "def f():\n    from data.packs import plan\n",
        "data/sources/hub.py": "from ..packs import plan\n",
        "data/sources/chunks.py": "import_module(f'data.packs.{name}')\n",
        "data/sources/digest.py": "from scripts.preview import main\n",
        "data/packs/__init__.py": "",
        "data/packs/plan.py": "import data.errors\n",
        "data/errors.py": "X = 'data.sources.files:f'\n",
        "post_training/__init__.py": "",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert [line.partition(":")[0] for line in upward_imports()] == [
        "data/errors.py",
        "data/sources/chunks.py",
        "data/sources/digest.py",
        "data/sources/files.py",
        "data/sources/hub.py",
    ]
    assert len(circles()) == 1


def show() -> None:
    """Print the floors from the top down."""
    rooms = sizes()
    for package in reversed(PACKAGES):
        for floor, names in reversed(list(enumerate(FLOORS[package]))):
            for name in names:
                files = rooms.get(f"{package}/{name}".rstrip("/"), [])
                if (ROOT / package / f"{name}.py").is_file():
                    files = [(len((ROOT / package / f"{name}.py").read_text().splitlines()), ROOT)]
                lines = sum(count for count, _ in files)
                print(f"{floor}  {package}/{name:24} {len(files):3} files {lines:6} lines")
    everything = sorted(count for files in rooms.values() for count, _ in files)
    fullest = max(rooms, key=lambda room: len(rooms[room]))
    print(
        f"fullest room: {fullest} with {len(rooms[fullest])} files; median file "
        f"{statistics.median(everything):.0f} lines, longest {everything[-1]}, all {sum(everything)}"
    )


if __name__ == "__main__":
    show()
    sys.exit("\n".join(upward_imports() + circles()) or 0)
