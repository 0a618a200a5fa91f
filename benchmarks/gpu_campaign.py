"""Everything that a machine with a GPU should be asked, in slices: correctness first, then speed.

    python3 benchmarks/gpu_campaign.py --out DIR [--phases tests layers ...] [--only GLOB] [--budget 540]
    python3 benchmarks/gpu_campaign.py --out DIR --rehearse        # all of it, tiny, on a CPU, in a minute

What `precompile.py` has compiled beforehand need not be compiled there.

On a bare checkout, with the machine's own Python, PyTorch and Triton: nothing is installed, the extension is built in
place. Call it again with the same DIR until it says that nothing is left: what is done is not done again, whatever
ended the last call, and DIR may be carried to another machine with the same GPU. Results are DIR/<device>-<phase>.json,
made to be committed under benchmarks/results/; DIR/campaign.log has what every unit printed.

Exit code 0: all that was started is right, what is left is printed. 1: a check failed; what failed has no times. (In a
rehearsal, anything that crashed counts.) 2: this machine, or DIR, cannot be used.
"""

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from campaign import runner, store, units
from campaign.state import CRASHED, DONE, PARTIAL, SETTLED, SKIPPED, TIMED_OUT, WRONG, State
from campaign.units import Settings, Unit

_MARGIN_S = 5.0  # of the budget, for what is not a unit
_SHORTEST_S = 30.0  # less is not worth starting a unit that can stop for
_LARGEST_SHARE = 0.9  # of the budget; a unit guessed to take more is started first thing, or never
_PATIENCE = 4.0  # times its guess, until a unit counts as hanging
_CORES_A_CHECK = 4  # what runs side by side, where nothing is timed


class Campaign:
    """One slice: runs units while the budget lasts."""

    def __init__(self, args: argparse.Namespace, settings: Settings, cache: str) -> None:
        self.args, self.settings, self.out = args, settings, args.out
        self.end = time.monotonic() + args.budget
        self.state = State(args.out)
        self.log = args.out / "campaign.log"
        self.cache = Path(cache)
        self.commit = args.commit or os.environ.get("RESNET_FAST_COMMIT") or _git_commit() or "unknown"
        self.waiting: list[str] = []
        self.blocked = False
        self.lock = threading.Lock()

    def run(self) -> int:
        """The exit code."""
        reason = self.look()
        if reason is not None:
            print(f"gpu_campaign: error: {reason}", file=sys.stderr)
            return 2
        for phase in units.PHASES:
            if phase in self.args.phases and phase != "environment":
                self.phase(phase)
        return self.conclude()

    def look(self) -> str | None:
        """Find out what this machine is; returns why it cannot be used."""
        (unit,) = units.of_phase("environment", self.settings)
        outcome = runner.run(unit.module, unit.args, self.variables(), 120.0, self.log)
        if outcome.status != DONE:
            return outcome.reason
        known, found = self.state.data["device"], outcome.data["device"]
        if known and known["name"] != found["name"]:
            return f"{self.out} holds the results of {known['name']}, and this is {found['name']}: name another --out"
        environment = outcome.data["environment"]
        environment["commit"] = self.args.commit or environment["commit"] or self.commit
        self.commit = environment["commit"]
        self.state.data |= {**outcome.data, "environment": environment}
        self.note(unit, outcome)
        return None

    def phase(self, phase: str) -> None:
        """Run what is to be done of a phase. Unless it is of networks, the later ones wait until it is finished."""
        todo = [unit for unit in units.of_phase(phase, self.settings) if self.wanted(unit)]
        if self.blocked:
            self.waiting += [unit.name for unit in todo]
            return
        cores = len(os.sched_getaffinity(0))
        with ThreadPoolExecutor(max(1, cores // _CORES_A_CHECK) if phase == "tests" else 1) as pool:
            list(pool.map(self.unit, todo))
        self.blocked = bool(self.waiting) and phase not in ("networks", "training")

    def unit(self, unit: Unit) -> None:
        """Run one unit, if what it needs is there and it fits into what is left of the budget."""
        missing = [name for name in unit.needs if not self.state.data["packages"].get(name)]
        if missing:
            self.note(unit, runner.Outcome(SKIPPED, f"{', '.join(missing)} not installed"))
            return
        limit = self.limit(unit)
        outcome = None if limit is None else self.execute(unit, limit)
        if outcome is not None:
            self.note(unit, outcome)
        if outcome is None or outcome.status == PARTIAL:
            self.waiting.append(unit.name)

    def wanted(self, unit: Unit) -> bool:
        if not any(fnmatch.fnmatch(unit.name, glob) for glob in self.args.only):
            return False
        status = self.state.status(unit.name)
        if unit.name == "build" and status == DONE and not self.settings.rehearse:
            return not any((runner.ROOT / "resnet_fast").glob("_C.*so"))  # done, but on another machine
        return status not in SETTLED or (self.args.again and status != DONE)

    def limit(self, unit: Unit) -> float | None:
        """Seconds that the unit may take; None if it had better wait for the next slice."""
        left = self.end - time.monotonic() - _MARGIN_S
        guess = self.guess(unit)
        if unit.stoppable:
            return left if left >= min(_SHORTEST_S, guess) else None
        if min(guess, _LARGEST_SHARE * self.args.budget) > left:
            return None
        return min(left, max(60.0, _PATIENCE * max(guess, unit.seconds)))

    def guess(self, unit: Unit) -> float:
        """What the longest of its kind took; the first guess where none has come to an end."""
        ended = [done for done in self.state.units.values() if done["status"] in (DONE, WRONG, TIMED_OUT)]
        return max((done["seconds"] for done in ended if done["kind"] == unit.kind), default=unit.seconds)

    def execute(self, unit: Unit, limit: float) -> runner.Outcome:
        args = list(unit.args)
        if unit.writes:
            args += ["--output", str(store.path_of(self.out, self.state, unit.file).resolve())]
        if unit.stoppable:
            args += ["--budget", f"{limit:.0f}"]
        if unit.phase in ("networks", "training", "profile"):
            self.share_table()
        print(f"{unit.name} ...", flush=True)
        limit += _MARGIN_S if unit.stoppable else 0.0
        outcome = runner.run(unit.module, args, self.variables(), limit, self.log)
        if unit.writes:
            store.stamp(store.path_of(self.out, self.state, unit.file), self.commit)
        elif outcome.rows:
            with self.lock:
                store.put(self.out, self.state, unit.file, unit.name, outcome.rows)
        return outcome

    def share_table(self) -> None:
        """Put the layers' table where the package looks for a user's."""
        table = store.path_of(self.out, self.state, "layers")
        if table.exists():
            target = self.cache / "tuned" / f"{self.state.data['device']['slug']}.json"
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(table, target)

    def variables(self) -> dict[str, str]:
        """Environment variables of every unit."""
        found = {"RESNET_FAST_CACHE": str(self.cache), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        if self.settings.rehearse:
            found |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return found

    def note(self, unit: Unit, outcome: runner.Outcome) -> None:
        """Remember and print what became of a unit."""
        fields = {"status": outcome.status, "reason": outcome.reason, "summary": outcome.summary}
        fields |= {"seconds": outcome.seconds, "kind": unit.kind, "check": unit.check, "commit": self.commit}
        with self.lock:
            self.state.record(unit.name, **fields)
        said = "; ".join(filter(None, (outcome.reason, outcome.summary)))
        print(f"{unit.name}: {outcome.status} in {outcome.seconds:.0f} s{': ' if said else ''}{said}", flush=True)

    def conclude(self) -> int:
        """Print what is left and what is wrong."""
        failed = False
        for name, unit in self.state.units.items():
            if unit["status"] in (WRONG, CRASHED, TIMED_OUT):
                counts = unit["status"] == WRONG or unit["check"] or self.settings.rehearse
                failed |= counts
                print(f"{'FAILED' if counts else 'not measured'} {name}: {unit['status']}: {unit['reason']}")
        names = ", ".join(self.waiting[:6]) + (f" and {len(self.waiting) - 6} more" if len(self.waiting) > 6 else "")
        print(f"left: {len(self.waiting)} units: {names}; run it again" if self.waiting else "nothing left")
        return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run one slice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--out", required=True, type=Path, metavar="DIR")
    flag("--phases", nargs="+", choices=units.PHASES, default=list(units.PHASES), metavar="PHASE")
    only = "units whose name matches one of these, as in 'networks/ours/resnet50-*'"
    flag("--only", nargs="+", default=["*"], metavar="GLOB", help=only)
    flag("--budget", type=float, default=540.0, metavar="SECONDS", help="of this slice (default: 540)")
    flag("--again", action="store_true", help="run again what was wrong, crashed or timed out")
    flag("--commit", metavar="HASH", help="where there is no .git (default: RESNET_FAST_COMMIT)")
    flag("--rehearse", action="store_true", help="tiny, on the CPU, under Triton's interpreter")
    defaults = Settings()
    flag("--models", nargs="+", default=defaults.models, metavar="NAME")
    flag("--dtypes", nargs="+", default=defaults.dtypes, metavar="DTYPE")
    flag("--batches", nargs="+", type=int, default=defaults.batches, metavar="N", help="of inference")
    flag("--train-batches", nargs="+", type=int, default=defaults.train_batches, metavar="N")
    flag("--top", type=int, default=defaults.top, metavar="N", help="configurations of each layer, by the cost model")
    args = parser.parse_args(argv)
    sizes = tuple(args.batches), tuple(args.train_batches)
    settings = Settings(tuple(args.models), tuple(args.dtypes), *sizes, top=args.top)
    settings = Settings.rehearsal() if args.rehearse else settings
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as cache:
            return Campaign(args, settings, cache).run()
    except ValueError as error:
        print(f"gpu_campaign: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_campaign: interrupted; run it again to go on", file=sys.stderr)
        return 130


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=runner.ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
