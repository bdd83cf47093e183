"""Data folders of a workspace: the embedded corpus is built at first use; any other is checked, never guessed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.tracks import Track, data_problem
from harness.workspace import Workspace
from trainer.data.build import build
from trainer.data.errors import DataError
from trainer.data.manifest import Manifest, load_manifest

EMBEDDED = "embedded"


def embedded_dir(ws: Workspace) -> Path:
    """One folder per Python: its standard library is the corpus."""
    return ws.data / f"{EMBEDDED}-py{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"


def ensure_data(ws: Workspace, track: Track, note: Callable[[str], None]) -> tuple[Path, str]:
    """(folder, fingerprint) of a track's data; builds the embedded corpus when it is not there yet.

    Raises UserError or DataError when the folder is missing or not what its manifest says.
    """
    if track.data != EMBEDDED:
        folder = ws.data / track.data
        if not folder.is_dir():
            raise UserError(f"track {track.name} {data_problem(track, ws.data)}")
        manifest = load_manifest(folder)
        manifest.verify(folder, full=True)  # every byte: a damaged shard must not pass under the good fingerprint
        return folder, manifest.fingerprint
    folder = embedded_dir(ws)
    if not folder.is_dir():
        note("building the embedded corpus from the Python standard library (once, about half a minute)")
    shown: set[str] = set()

    def progress(stage: str, share: float) -> None:
        if stage not in shown and stage in ("tokenizer", "encode"):
            shown.add(stage)
            note({"tokenizer": "  training the tokenizer", "encode": "  writing shards"}[stage])

    try:
        manifest = build(EMBEDDED, folder, progress=progress)
        manifest.verify(folder, full=True)
    except DataError as e:
        if not folder.is_dir():
            raise
        # Ours to mend: the folder is a cache of this project, damaged or made by an older builder.
        old = folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%dT%H%M%S')}")
        note(f"the embedded corpus is built anew ({e}); the old one is kept in {old.name}")
        folder.rename(old)
        manifest = build(EMBEDDED, folder, progress=progress)
    if shown:
        tokens = {name: s.tokens for name, s in manifest.splits.items()}
        note("  " + ", ".join(f"{name} {n:,} tokens" for name, n in tokens.items()))
    return folder, manifest.fingerprint


def build_with_progress(
    ws: Workspace, source: str, out: Path | None, vocab_size: int, tokenizer: Path | None, val_docs: int | None,
    quiet: bool = False,
) -> tuple[Path, Manifest]:
    """``data build`` with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    if source != EMBEDDED and out is None:
        raise UserError("--out: name the folder to create, for example --out .autoresearch/data/mine")
    if source != EMBEDDED and not Path(source).exists():
        raise UserError(f"--from {source}: no such file or folder; valid: embedded, a .jsonl or .jsonl.zst of "
                        '{"text": ...} lines, a text file, or a folder of text files')
    if tokenizer is not None and not tokenizer.is_file():
        raise UserError(f"--tokenizer {tokenizer}: no such file; give a SentencePiece .model, or leave it out")
    folder = out or embedded_dir(ws)
    columns = (TextColumn("{task.description:24s}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("start", total=1.0)

        def progress(stage: str, share: float) -> None:
            bar.update(task, description=stage, completed=share)

        size = None if tokenizer else vocab_size
        manifest = build(source, folder, size, tokenizer_model=tokenizer, val_docs=val_docs, progress=progress)
    return folder, manifest


def check_report(folder: Path, tokenizer: Path | None) -> tuple[dict[str, Any], list[str], bool]:
    """(JSON-able report, lines for people, sound?) of ``trainer.data.check``."""
    from trainer.data.check import check

    report = check(folder, tokenizer=tokenizer)
    return report.to_dict(), report.lines(), report.ok
