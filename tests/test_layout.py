"""The tree: only scripts at the top, and imports that run one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "collect_preferences",
    "create_dataset",
    "evaluation",
    "inference",
    "iterate_preferences",
    "judge_preferences",
    "make_preferences",
    "reward_whisper",
    "sample_preferences",
    "select_rl_data",
    "train",
    "train_preference_model",
    "train_token2text",
}
# A module may import from its own room and from those after it. reward_whisper.py is a script and a room.
ROOMS = ("scripts", "training", "metrics", "reward_models", "reward_whisper", "speech", "common")
SIDE_BY_SIDE = {("training", "metrics"), ("metrics", "training")}  # neither needs the other


def room_of(module: str) -> str | None:
    """Of a module of the project; None for any other."""
    top = module.split(".")[0]
    if top in ROOMS:
        return top
    return "scripts" if top in SCRIPTS else None


def imports(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def test_the_top_level_is_what_one_runs():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS
    for name in SCRIPTS:
        assert 'if __name__ == "__main__":' in (ROOT / f"{name}.py").read_text(encoding="utf-8"), name


SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
SOURCES += sorted(ROOT.glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        room = room_of(module)
        if room is None:
            continue
        assert ROOMS.index(room) >= ROOMS.index(here), f"{path.name} ({here}) imports {module} ({room})"
        assert (here, room) not in SIDE_BY_SIDE, f"{path.name} ({here}) imports {module} ({room})"


def test_scripts_do_not_import_scripts():
    for name in SCRIPTS:
        others = {module for module in imports(ROOT / f"{name}.py") if room_of(module) == "scripts"}
        assert not others, f"{name}.py imports {others}"


def test_tests_mirror_the_tree():
    for room in ("training", "metrics", "reward_models", "speech", "common"):
        for test in (ROOT / "tests" / room).glob("test_*.py"):
            module = test.stem.removeprefix("test_")
            assert (ROOT / room / f"{module}.py").exists() or module == "config", test


@pytest.mark.parametrize("name, most", [("train.py", 280), ("reward_whisper.py", 180), ("README.md", 130)])
def test_what_is_read_first_is_short(name, most):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= most
