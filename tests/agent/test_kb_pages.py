"""The committed knowledge base: clean, complete, and its exact figures."""

from __future__ import annotations

import re

import pytest

from agent.knowledge import Knowledge, lint, load
from tests.agent.support import KB, REPO_ROOT
from trainer.knobs import REGISTRY


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return load(KB)


def test_lint_is_clean() -> None:
    assert [str(p) for p in lint(KB)] == []


def test_the_lines_asked_for_are_active_and_use_declared_knobs(knowledge: Knowledge) -> None:
    touched = {name for line in knowledge.active() for move in line.moves for name in move.names}
    assert touched >= {
        "matrix_lr", "tied_embed_lr", "scalar_lr", "warmdown_frac", "min_lr", "beta2", "muon_momentum",
        "muon_momentum_warmup_frac", "grad_clip_norm", "resid_norm", "qk_gain_init", "mlp_neg_slope",
        "smear_gate", "attn_out_gate", "muon_wd", "ema_decay", "num_layers", "model_dim", "mlp_mult",
        "int8_clip_quantile", "compressor", "muon_backend_steps", "tied_embed_init_std", "logit_softcap",
    }
    assert all(name in REGISTRY for name in touched)


def test_every_verdict_and_base_is_consistent_with_its_difference(knowledge: Knowledge) -> None:
    """Where base and record both hold val_bpb in one regime and nothing else was stated, the difference is theirs."""
    checked = 0
    for record in knowledge.evidence.values():
        base = knowledge.evidence.get(record.base)
        if base is None or record.delta_bpb is None or base.regime != record.regime or "base_bpb" in record.metrics:
            continue
        if "val_bpb" not in base.metrics or "val_bpb" not in record.metrics:
            continue
        difference = record.metrics["val_bpb"] - base.metrics["val_bpb"]
        assert difference == pytest.approx(record.delta_bpb, abs=2e-4), record.id
        checked += 1
    assert checked > 70


FIGURES = {  # spot checks, copied by hand from the sources
    "seed3.compressrt_w005": {"val_bpb": 2.06085837, "bytes": 6839798},
    "seed3.compw0045": {"val_bpb": 1.89258040, "bytes": 15906874},
    "seed3.h100_8x_d576_l14": {"val_bpb": 1.19816494, "bytes": 30904580, "steps": 6821},
    "seed3.sp4096swap": {"val_bpb": 1.89591231, "bytes": 16627470},
    "seed2.exp54b": {"val_bpb": 1.2708, "pre_quant_bpb": 1.2642, "artifact_mb": 15.54},
    "seed2.improved_parallel": {"ttt_bpb": 1.07438, "bytes": 15959005},
    "record.baseline": {"val_bpb": 1.22436570, "bytes": 15863489, "steps": 13780},
    "record.pr1855": {"val_bpb": 1.0611},
}


@pytest.mark.parametrize("name", FIGURES)
def test_known_figures(knowledge: Knowledge, name: str) -> None:
    assert {k: knowledge.evidence[name].metrics[k] for k in FIGURES[name]} == FIGURES[name]


def test_every_figure_of_the_seed_is_in_evidence(knowledge: Knowledge) -> None:
    """Eight-decimal scores and eight-digit sizes of the shared research tracks, one by one."""
    source = REPO_ROOT.parent / "shared" / "seeds" / "research_tracks.md"
    if not source.is_file():
        pytest.skip("the shared seeds are not beside this checkout")
    text = source.read_text(encoding="utf-8")
    values = {f"{abs(v):.8f}" for e in knowledge.evidence.values() for v in (*e.metrics.values(), e.delta_bpb or 0.0)}
    scores = set(re.findall(r"\b\d\.\d{8}\b", text))
    assert len(scores) > 60 and scores <= values
    numbers = {f"{int(v):,}" for e in knowledge.evidence.values() for v in e.metrics.values() if v == int(v)}
    sizes = set(re.findall(r"`(\d{1,2},\d{3},\d{3})` bytes", text))
    assert len(sizes) > 30 and sizes <= numbers


def test_no_page_copies_a_sentence_of_the_seeds() -> None:
    """No run of twelve words is shared with a source page (names and figures aside)."""
    seeds = REPO_ROOT.parent / "shared" / "seeds"
    if not seeds.is_dir():
        pytest.skip("the shared seeds are not beside this checkout")

    def shingles(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z']+", text.lower())
        return {tuple(words[i:i + 12]) for i in range(len(words) - 11)}

    source = set().union(*(shingles(p.read_text(encoding="utf-8")) for p in seeds.glob("*.md")))
    for page in KB.glob("*.md"):
        assert not shingles(page.read_text(encoding="utf-8")) & source, page.name


def test_links_between_pages_lead_somewhere() -> None:
    for page in KB.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (KB / target).exists(), f"{page.name} -> {target}"
