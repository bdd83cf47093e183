"""``python -P -m trainer train SPEC.json`` and ``python -P -m trainer score SCORE_SPEC.json``.

Exit codes: 0 the result file holds a result; 2 the spec is bad (one line on stderr, no result file);
3 the result file holds a Failure.
"""

from __future__ import annotations

import signal
import sys
import time
import traceback
from pathlib import Path

STARTED = time.perf_counter()
EXIT_DONE, EXIT_BAD_SPEC, EXIT_FAILED = 0, 2, 3
USAGE = """usage: python -P -m trainer train SPEC.json        train one run (RunSpec in, result.json out)
       python -P -m trainer score SCORE_SPEC.json  score an artifact (ScoreSpec in, score.json out)"""


def main_train(spec_path: Path) -> int:
    """Run the RunSpec in ``spec_path``; leaves result.json and events.jsonl in its ``out_dir``."""
    from trainer.contract import EVENTS_FILE, RESULT_FILE, ContractError, Failure, RunSpec, dump, load
    from trainer.knobs import REGISTRY, KnobError

    # The spec is read, and its knobs resolved, before torch is imported: a bad one fails in milliseconds.
    try:
        spec = load(RunSpec, spec_path)
        REGISTRY.resolve(spec.knobs)
        out_dir = Path(spec.out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / RESULT_FILE).unlink(missing_ok=True)
    except (ContractError, KnobError, OSError) as e:
        print(f"train: {e}", file=sys.stderr)
        return EXIT_BAD_SPEC
    from trainer.data.errors import DataError
    from trainer.runtime import EventStream, RunFailed, is_out_of_memory
    from trainer.train import run

    with EventStream(out_dir / EVENTS_FILE) as events:
        try:
            dump(run(spec, events, STARTED), out_dir / RESULT_FILE)
            events.emit("finished")
            return EXIT_DONE
        except (ContractError, KnobError) as e:
            print(f"train: {e}", file=sys.stderr)
            return EXIT_BAD_SPEC
        except RunFailed as e:
            kind, text = e.kind, str(e)
        except DataError as e:
            kind, text = "infra", str(e)
        except Exception as e:
            kind, text = ("oom" if is_out_of_memory(e) else "crash"), f"{type(e).__name__}: {e}"
            traceback.print_exc()
        text = " ".join(text.split())[:1000]
        dump(Failure(run_id=spec.run_id, failure=kind, error=text), out_dir / RESULT_FILE)
        events.emit("failed", reason=kind, error=text)
        print(f"train: {kind}: {text}", file=sys.stderr)
        return EXIT_FAILED


def main(argv: list[str]) -> int:
    """Dispatch ``argv`` (without the program's name)."""
    # A parent may have left SIGTERM ignored, which is inherited: the supervisor's signal must end us.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if len(argv) == 2 and argv[0] == "train":
        return main_train(Path(argv[1]))
    if len(argv) == 2 and argv[0] == "score":
        from trainer.referee import main_score

        return main_score(Path(argv[1]))
    print(USAGE, file=sys.stderr)
    return EXIT_BAD_SPEC


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
