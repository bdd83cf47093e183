"""Fingerprints of source files: what code ran, and which evaluator scored. Torch-free.

The trainer reports :func:`tree_hash` of the package it imported, the referee :func:`evaluator_hash`
of the files that computed the score; the harness computes the same over the tree it meant to run
and refuses a mismatch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

EVALUATOR_FILES: tuple[str, ...] = (
    "__init__.py",
    "contract.py",
    "data/__init__.py",
    "data/bytecount.py",
    "data/errors.py",
    "data/layout.py",
    "data/loader.py",
    "data/manifest.py",
    "data/shards.py",
    "evaluate.py",
    "export/__init__.py",
    "export/artifact.py",
    "export/challenge.py",
    "export/compress.py",
    "export/container.py",
    "export/errors.py",
    "export/flat.py",
    "referee.py",
    "tree.py",
)
"""The protected files, relative to the package: everything between an artifact on disk and a
val_bpb except the model and the codecs, which are what a candidate may change. ``__main__.py`` only
hands over to the referee; it is out of a candidate's reach, but no part of the figure."""

_SKIPPED_DIRS = frozenset({"__pycache__", "recipes"})


class TreeError(ValueError):
    """A source tree that cannot be fingerprinted; the message names the path."""


def package_root() -> Path:
    """The folder of the trainer package that this process imported."""
    return Path(__file__).resolve().parent


def source_files(root: Path | None = None) -> list[str]:
    """Every .py file under ``root`` as sorted POSIX paths relative to it, recipes and caches excluded."""
    base = root or package_root()
    found = (p.relative_to(base) for p in base.rglob("*.py") if p.is_file())
    return sorted(p.as_posix() for p in found if not _SKIPPED_DIRS.intersection(p.parts))


def _digest(base: Path, names: Iterable[str]) -> str:
    """SHA-256 over (path, content) pairs, each length-prefixed so that no two trees share an encoding."""
    digest = hashlib.sha256()
    for name in names:
        try:
            content = (base / name).read_bytes()
        except OSError as e:
            raise TreeError(f"{base / name}: {e.strerror or e}; a trainer tree needs this file") from e
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def tree_hash(root: Path | None = None) -> str:
    """SHA-256 (hex) over the path and content of every :func:`source_files` file.

    ``root`` is a trainer package folder, by default the imported one. Raises TreeError when it
    holds no Python file or one cannot be read.
    """
    base = root or package_root()
    names = source_files(base)
    if not names:
        raise TreeError(f"{base}: no Python files; expected the trainer package")
    return _digest(base, names)


def evaluator_hash(root: Path | None = None) -> str:
    """SHA-256 (hex) over :data:`EVALUATOR_FILES`. Raises TreeError naming a file that is missing."""
    return _digest(root or package_root(), EVALUATOR_FILES)
