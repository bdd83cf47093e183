"""``autoresearch data``: build and check shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.common import JsonOption, WorkspaceOption, guard, print_json, whole, workspace
from harness.errors import UserError

VOCAB_SIZES = (260, 65_535)
"""trainer.data.tokenizer's MIN_VOCAB and MAX_VOCAB (a test compares them): importing it costs --help too much."""

app = typer.Typer(no_args_is_help=True, help="Build and check token shards.")


@app.command(epilog="Example: autoresearch data build --from docs.jsonl.zst --out data/mine --vocab-size 1024")
@guard
def build(
    source: Annotated[
        str,
        typer.Option("--from", metavar="SOURCE", help="embedded | FILE.jsonl | FILE.jsonl.zst | text file or folder"),
    ] = "embedded",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder to create.")] = None,
    vocab_size: Annotated[
        int,
        typer.Option(
            "--vocab-size", parser=whole(*VOCAB_SIZES), metavar="N", help="Vocabulary of the tokenizer to train."
        ),
    ] = 1024,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="MODEL", help="Use this SentencePiece model instead.")
    ] = None,
    val_docs: Annotated[
        int | None,
        typer.Option(
            "--val-docs", parser=whole(1), metavar="N", help="The first N documents are val (default: a share)."
        ),
    ] = None,
    json_: JsonOption = False,
    where: WorkspaceOption = None,
) -> None:
    """Make shards, tokenizer and manifest from the embedded corpus or from your own text."""
    from harness.data import build_with_progress

    ws = workspace(where)
    folder, manifest = build_with_progress(ws, source, out, vocab_size, tokenizer, val_docs, quiet=json_)
    rows = {
        name: {"documents": s.documents, "tokens": s.tokens, "text_bytes": s.text_bytes}
        for name, s in manifest.splits.items()
    }
    if json_:
        print_json({"folder": str(folder), "fingerprint": manifest.fingerprint, "splits": rows})
        return
    print(f"{folder}\nfingerprint {manifest.fingerprint}")
    for name, row in rows.items():
        print(f"  {name:8s} {row['documents']:7,} documents  {row['tokens']:12,} tokens  {row['text_bytes']:12,} bytes")


@app.command(epilog="Example: autoresearch data check data/datasets/fineweb10B_sp1024")
@guard
def check(
    folder: Annotated[Path, typer.Argument(help="A folder of shards: ours or a published FineWeb export.")],
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="MODEL", help="SentencePiece model, if not found beside it.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Validate headers, sizes, token ids, hashes; count tokens, documents and scored bytes."""
    from harness.data import check_report

    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds *_train_*.bin or *_val_*.bin shards")
    report, lines, ok = check_report(folder, tokenizer)
    if json_:
        print_json(report)
    else:
        print("\n".join(lines))
    if not ok:
        raise typer.Exit(1)
