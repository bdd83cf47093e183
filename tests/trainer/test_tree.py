"""trainer.tree: fingerprints of source trees."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.tree import EVALUATOR_FILES, TreeError, evaluator_hash, package_root, source_files, tree_hash


def make_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


BASE = {"__init__.py": "", "a.py": "x = 1\n", "sub/b.py": "y = 2\n"}


def test_same_content_same_hash_wherever_it_lies(tmp_path: Path) -> None:
    one = make_tree(tmp_path / "one", BASE)
    two = make_tree(tmp_path / "other/two", dict(reversed(BASE.items())))
    assert tree_hash(one) == tree_hash(two)


@pytest.mark.parametrize("change", [
    {"a.py": "x = 2\n"},  # content
    {"c.py": ""},  # one more file, empty
    {"a.py": "x = 1\n\n"},
])
def test_any_change_of_source_changes_the_hash(tmp_path: Path, change: dict[str, str]) -> None:
    before = tree_hash(make_tree(tmp_path / "t", BASE))
    assert tree_hash(make_tree(tmp_path / "t", change)) != before


def test_moving_text_between_name_and_content_changes_the_hash(tmp_path: Path) -> None:
    merged = make_tree(tmp_path / "1", {"a.py": "b.py1"})  # names and contents run together are the same bytes
    assert tree_hash(merged) != tree_hash(make_tree(tmp_path / "2", {"a.py": "", "b.py": "1"}))
    one = make_tree(tmp_path / "3", {"a.py": "1", "b.py": ""})
    two = make_tree(tmp_path / "4", {"a.py": "", "b.py": "1"})
    assert tree_hash(one) != tree_hash(two)


def test_caches_recipes_and_other_files_take_no_part(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "t", BASE)
    before = tree_hash(root)
    make_tree(root, {"__pycache__/a.py": "z", "recipes/pocket.py": "z", "sub/__pycache__/q.py": "z", "notes.txt": "z"})
    assert tree_hash(root) == before
    assert source_files(root) == sorted(BASE)


def test_a_folder_without_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TreeError, match="no Python files"):
        tree_hash(tmp_path)


def test_evaluator_hash_looks_at_protected_files_only(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "t", {name: name for name in EVALUATOR_FILES})
    before = evaluator_hash(root)
    make_tree(root, {"model/gpt.py": "new", "export/codecs.py": "new"})
    assert evaluator_hash(root) == before
    make_tree(root, {"evaluate.py": "return 0"})
    assert evaluator_hash(root) != before
    (root / "referee.py").unlink()
    with pytest.raises(TreeError, match=r"referee\.py"):
        evaluator_hash(root)


def test_protected_list_is_sorted_unique_and_closed_under_top_level_imports() -> None:
    """What a protected file imports when it is loaded is protected too, or listed here with a reason."""
    assert list(EVALUATOR_FILES) == sorted(set(EVALUATOR_FILES))
    root = package_root()
    candidates = {
        "export/codecs.py", "export/policy.py",  # a candidate may add codecs; container checks what they decode
        "knobs/__init__.py",  # new knob declarations are allowed; knob values are checked against the artifact
    }
    for name in EVALUATOR_FILES:
        if not (root / name).is_file():
            continue
        for node in ast.parse((root / name).read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer"):
                stem = "/".join((node.module or "").split(".")[1:])
                options = {f"{stem}.py", f"{stem}/__init__.py", *(f"{stem}/{a.name}.py" for a in node.names)}
                assert options & ({*EVALUATOR_FILES} | candidates), f"{name} imports {node.module}"


def test_the_real_tree_has_a_hash_and_importing_it_needs_no_torch() -> None:
    code = (
        "import sys, trainer.tree, trainer.export, trainer.export.codesize, trainer.export.policy;"
        "print(trainer.tree.tree_hash()); sys.exit('torch' in sys.modules)"
    )
    root = package_root().parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == tree_hash()
