"""trainer.export.codesize: which modules count, and that the figure is what its text says."""

from __future__ import annotations

import ast
import base64
import lzma
import re
from pathlib import Path

import pytest

from trainer.export.codesize import CodeSizeError, active_modules, code_bytes, packed_script
from trainer.tree import package_root

TREE = {
    "__init__.py": "",
    "train.py": (
        '"""Doc."""\nfrom __future__ import annotations\nimport trainer.optim.muon\nfrom trainer.model import gpt\n'
        "from trainer.knobs import REGISTRY\nfrom trainer.data.build import x\n"
        'def f():\n    """Doc string of f."""\n    # a comment\n    from . import lazy\n    return "kept", 1\n'
    ),
    "referee.py": "from .evaluate import score\nfrom trainer.contract import ScoreSpec\n",
    "evaluate.py": "class A:\n    'only a doc string'\n",
    "lazy.py": "import os\n",
    "contract.py": "ScoreSpec = 1\n",
    "model/__init__.py": "",
    "model/gpt.py": "from ..techniques import TECHNIQUES\n",
    "model/unused.py": "BIG = 1\n",
    "optim/__init__.py": "",
    "optim/muon.py": "from trainer.optim.helper import a, b\n",
    "optim/helper.py": "a = b = 1\n",
    "knobs/__init__.py": "REGISTRY = 1\n",
    "data/__init__.py": "",
    "data/build.py": "x = 1\n",
    "techniques/__init__.py": "TECHNIQUES = ()\n",
    "techniques/_shared.py": "z = 1\n",
    "techniques/smear_gate.py": "from trainer.techniques._shared import z\n",
    "techniques/resid_norm.py": "q = 1\n",
}
PLAIN = [
    "trainer", "trainer.data", "trainer.evaluate", "trainer.lazy", "trainer.model", "trainer.model.gpt",
    "trainer.optim", "trainer.optim.helper", "trainer.optim.muon", "trainer.referee", "trainer.techniques",
    "trainer.train",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        path = tmp_path / "trainer" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "trainer"


def unpacked(script: str) -> str:
    """What the stub would run, taken apart here by hand."""
    match = re.search(r"b85decode\('(.*)'\)", script)
    assert match is not None
    return lzma.decompress(base64.b85decode(match[1])).decode()


def test_modules_that_are_reached_and_no_others(root: Path) -> None:
    assert active_modules(root=root) == PLAIN


def test_only_the_techniques_that_are_on_count(root: Path) -> None:
    on = active_modules({"smear_gate": True, "muon_wd": 0.1}, root)  # muon_wd has no file in this tree
    assert set(on) - set(PLAIN) == {"trainer.techniques.smear_gate", "trainer.techniques._shared"}
    assert code_bytes({"smear_gate": True}, root) > code_bytes(None, root)


def test_comments_doc_strings_and_unreached_files_weigh_nothing(root: Path) -> None:
    before = code_bytes(root=root)
    (root / "lazy.py").write_text('"""A long story.\n\nMore of it."""\n\n# note\nimport os  # why\n\n\n')
    (root / "model/unused.py").write_text("BIG = " + repr("x" * 5000))
    (root / "contract.py").write_text("ScoreSpec = " + repr("y" * 5000))
    assert code_bytes(root=root) == before
    (root / "lazy.py").write_text("import os\nimport re, json, hashlib, typing\n")
    assert code_bytes(root=root) > before


def test_code_survives_minification(root: Path) -> None:
    """Every counted module parses again to the same tree, doc strings and future imports aside."""
    text = unpacked(packed_script({"num_layers": 4}, root))
    assert 'K={"num_layers":4}' in text and '"kept"' in text.replace("'", '"')
    assert "Doc" not in text and "comment" not in text and "__future__" not in text
    parts = dict(re.findall(r"^#(trainer\S*)\n(.*?)(?=^#trainer|^K=)", text, re.M | re.S))
    assert sorted(parts) == PLAIN
    scope: dict[str, object] = {}
    exec(parts["trainer.evaluate"], scope)  # a class of which only the doc string is gone still is a class
    assert "A" in scope
    f = next(n for n in ast.parse(parts["trainer.train"]).body if isinstance(n, ast.FunctionDef))
    want = next(n for n in ast.parse(TREE["train.py"]).body if isinstance(n, ast.FunctionDef))
    assert [ast.dump(n) for n in f.body] == [ast.dump(n) for n in want.body[1:]]


def test_the_figure_is_the_length_and_repeats(root: Path) -> None:
    script = packed_script(None, root)
    assert code_bytes(None, root) == len(script) and script.isascii() and packed_script({}, root) == script
    compile(script, "script", "exec")


def test_broken_trees_are_named(root: Path) -> None:
    (root / "lazy.py").write_text("def (:\n")
    with pytest.raises(CodeSizeError, match=r"lazy\.py"):
        code_bytes(root=root)
    (root / "train.py").unlink()
    with pytest.raises(CodeSizeError, match=r"trainer\.train is missing"):
        code_bytes(root=root)


def test_the_real_tree() -> None:
    if not (package_root() / "train.py").is_file():
        pytest.skip("trainer/train.py is not there")
    plain = active_modules()
    assert {"trainer.model.gpt", "trainer.evaluate", "trainer.export.codecs", "trainer.train"} <= set(plain)
    assert not [m for m in plain if m.startswith(("trainer.knobs", "trainer.data.build"))]
    assert not [m for m in plain if m.startswith("trainer.techniques.")]
    assert "trainer.techniques.smear_gate" in active_modules({"smear_gate": True})
    assert 5_000 < code_bytes() < 100_000  # the records' packed scripts: 16 to 32 KB
