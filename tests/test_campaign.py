"""`benchmarks/gpu_campaign.py`: all of it rehearsed on this CPU, and what it does when units fail, hang or wait."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_campaign.py"
sys.path.append(str(SCRIPT.parent))  # behind tests/, which has a conftest too

import gpu_campaign  # noqa: E402
from campaign import gpu_tests, layers, runner, sanitizer, store, units  # noqa: E402
from campaign.runner import Outcome  # noqa: E402
from campaign.state import CRASHED, DONE, PARTIAL, SKIPPED, TIMED_OUT, WRONG, State  # noqa: E402
from campaign.units import Settings, Unit  # noqa: E402

MACHINE = Outcome(
    DONE,
    data={
        "device": {"name": "NVIDIA H200", "label": "h200", "slug": "nvidia-h200"},
        "environment": {"versions": {"torch": "2.11.0"}, "commit": None},
        "packages": dict.fromkeys(("rich", "torchvision", "pytest"), True),
    },
)


def script(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, env=inherited, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    pytest.importorskip("triton")
    if os.environ.get("RESNET_FAST_GATE") != "all":
        pytest.skip("a rehearsal of everything takes minutes: make gate")
    folder = tmp_path_factory.mktemp("campaign")
    done = script("--out", folder, "--rehearse", "--commit", "cafe")
    assert done.returncode == 0, done.stdout + done.stderr + (folder / "campaign.log").read_text()[-4000:]
    return folder, done.stdout


@pytest.mark.slow
def test_the_rehearsal_runs_every_phase(rehearsal):
    folder, printed = rehearsal
    assert "nothing left" in printed
    state = json.loads((folder / "campaign.json").read_text())
    assert {name.split("/")[0] for name in state["units"]} == set(units.PHASES)
    optional = {name: unit["reason"] for name, unit in state["units"].items() if unit["status"] == SKIPPED}
    assert set(optional.values()) <= {"jax not installed"}
    assert all(unit["status"] == DONE for name, unit in state["units"].items() if name not in optional)
    assert all(unit["commit"] for unit in state["units"].values())


@pytest.mark.slow
def test_every_file_says_what_it_was_made_on(rehearsal):
    folder, _ = rehearsal
    phases = ("ceilings", "layers", "networks", "profile", "tests")
    assert sorted(path.name for path in folder.glob("*.json")) == sorted(
        ["campaign.json", *(f"rehearsal-{phase}.json" for phase in phases)]
    )
    assert len(list(folder.iterdir())) <= 8  # as many as come back from a lent machine
    for path in folder.glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        assert environment["versions"]["torch"]
        assert environment["commit"]
    assert "== networks" in (folder / "campaign.log").read_text()


@pytest.mark.slow
def test_rows_are_verified_and_timed(rehearsal):
    folder, _ = rehearsal
    found = json.loads((folder / "rehearsal-networks.json").read_text())["rows"]
    rows = [row for row in found if row["unit"].startswith("networks/")]
    names = {row["contender"] for row in rows}
    assert {"eager_channels_last", "fast", "frozen_conv", "frozen_tail", "frozen_graph", "compile_default"} <= names
    assert all(row["match"] and row["median_ms"] > 0 and row["ratio"] > 0 for row in rows)
    assert all(row["unit"].endswith("resnet_tiny-float32-b1") for row in rows)
    curves = [row for row in found if row["unit"] == "training/convergence"]
    assert {row["curve"] for row in curves} > {"stock", "stage 1", "stage 4"}
    assert all(row["distance"] <= row["allowed"] for row in curves)
    training = [row for row in found if row["unit"].startswith("training/") and row not in curves]
    names = {row["contender"] for row in training}
    stages = {f"fast_stage{stage}" for stage in (2, 4)}
    assert names == {"eager_channels_last", "compile_default", "fast"} | stages
    assert all(row["match"] and row["median_per_s"] > 0 and row["saved_mb_per_item"] > 0 for row in training)
    verify, tests = json.loads((folder / "rehearsal-tests.json").read_text())["rows"]
    assert verify["passed"] > 0
    assert verify["failed"] == tests["failed"] == 0
    assert sum(tests["skip_reasons"].values()) == tests["skipped"] > 0
    ceilings = json.loads((folder / "rehearsal-ceilings.json").read_text())["rows"]
    assert [row["what"] for row in ceilings] == ["matmul", "copy"]
    table = json.loads((folder / "rehearsal-layers.json").read_text())
    assert table["left"] == 0
    assert len(table["rows"]) == 3
    assert sum("+statistics" in key for key in table["rows"]) == 1


@pytest.mark.slow
def test_what_is_done_is_not_done_again(rehearsal):
    folder, _ = rehearsal
    before = {path: path.stat().st_mtime_ns for path in folder.glob("rehearsal-*")}
    done = script("--out", folder, "--rehearse")
    assert done.returncode == 0
    assert "..." not in done.stdout  # no unit was started
    assert {path: path.stat().st_mtime_ns for path in folder.glob("rehearsal-*")} == before


class Slice:
    """Runs `gpu_campaign.main` with units and outcomes as given, in this process."""

    def __init__(self, monkeypatch, tmp_path):
        self.out, self.plan, self.outcomes, self.started = tmp_path / "out", {}, {}, []
        self.machine = MACHINE
        monkeypatch.setattr(units, "of_phase", self.units)
        monkeypatch.setattr(runner, "run", self.run)

    def add(self, name, outcome=None, **fields):
        """A unit and what will become of it."""
        self.plan[name] = Unit(name, name, kind=name, **fields)
        self.outcomes[name] = outcome or Outcome(DONE)
        return self

    def units(self, phase, settings):
        if phase == "environment":
            return [Unit("environment", "environment", kind="environment")]
        return [unit for unit in self.plan.values() if unit.phase == phase]

    def run(self, module, args, variables, limit, log):
        if module == "environment":
            return self.machine
        self.started.append((module, limit))
        outcome = self.outcomes[module]
        return outcome(args) if callable(outcome) else outcome

    def __call__(self, *arguments):
        self.started.clear()
        return gpu_campaign.main(["--out", str(self.out), "--commit", "cafe", *map(str, arguments)])

    @property
    def names(self):
        return [name for name, _ in self.started]

    def status(self, name):
        return State(self.out).status(name)


@pytest.fixture
def campaign(monkeypatch, tmp_path):
    return Slice(monkeypatch, tmp_path)


def test_a_spent_budget_starts_nothing_and_says_what_is_left(campaign, capsys):
    campaign.add("build", seconds=10.0).add("networks/a", seconds=10.0)
    assert campaign("--budget", 5) == 0
    assert campaign.names == []
    assert "left: 2 units: build, networks/a; run it again" in capsys.readouterr().out
    assert campaign("--budget", 60) == 0
    assert campaign.names == ["build", "networks/a"]
    assert "nothing left" in capsys.readouterr().out


def test_what_fits_goes_before_what_does_not(campaign):
    campaign.add("networks/large", seconds=400.0).add("networks/small", seconds=10.0).add("profile", seconds=10.0)
    campaign("--budget", 120)
    assert campaign.names == ["networks/large", "networks/small", "profile"]  # as large as the slice: first or never
    campaign.plan["networks/other"] = Unit("networks/other", "networks/large", kind="other", seconds=100.0)
    campaign("--budget", 100)
    assert campaign.names == ["networks/large"]
    assert campaign.started[0][1] <= 95


def test_an_unfinished_phase_keeps_the_next_ones_waiting(campaign, capsys):
    campaign.add("layers/a", Outcome(PARTIAL), stoppable=True).add("networks/a").add("profile")
    assert campaign() == 0
    assert campaign.names == ["layers/a"]
    assert "left: 3 units" in capsys.readouterr().out
    campaign.outcomes["layers/a"] = Outcome(DONE)
    campaign()
    assert campaign.names == ["layers/a", "networks/a", "profile"]


def test_a_wrong_result_fails_the_campaign_and_is_kept(campaign, capsys):
    wrong = Outcome(WRONG, "frozen_tail: logits far off", rows=[{"contender": "frozen_tail", "median_ms": None}])
    campaign.add("networks/a", wrong).add("networks/b")
    assert campaign() == 1
    assert campaign.names == ["networks/a", "networks/b"]  # the others still run
    assert "FAILED networks/a: wrong: frozen_tail: logits far off" in capsys.readouterr().out
    assert campaign() == 1  # and it is not forgotten
    assert campaign.names == []
    campaign.outcomes["networks/a"] = Outcome(DONE, rows=[{"contender": "frozen_tail", "median_ms": 1.0}])
    assert campaign("--again") == 0
    assert campaign.names == ["networks/a"]
    (row,) = json.loads((campaign.out / "h200-networks.json").read_text())["rows"]
    assert row == {"unit": "networks/a", "contender": "frozen_tail", "median_ms": 1.0}


@pytest.mark.parametrize("status", [CRASHED, TIMED_OUT])
def test_a_crash_costs_one_unit_but_tests_must_run(campaign, capsys, status):
    campaign.add("networks/a", Outcome(status, "SIGSEGV")).add("networks/b")
    assert campaign() == 0
    assert campaign.names == ["networks/a", "networks/b"]
    assert f"not measured networks/a: {status}: SIGSEGV" in capsys.readouterr().out
    campaign.add("tests/a", Outcome(status, "SIGSEGV"), check=True)
    assert campaign() == 1
    assert campaign.names == ["tests/a"]


def test_a_missing_package_skips_until_it_is_there(campaign):
    campaign.add("networks/jax", needs=("jax",))
    assert campaign() == 0
    assert campaign.names == []
    assert campaign.status("networks/jax") == SKIPPED
    MACHINE.data["packages"]["jax"] = True
    try:
        campaign()
    finally:
        del MACHINE.data["packages"]["jax"]
    assert campaign.names == ["networks/jax"]


def test_phases_and_only_choose(campaign):
    campaign.add("tests/a").add("layers/a").add("layers/b").add("networks/a")
    campaign("--phases", "layers", "networks", "--only", "*/a")
    assert campaign.names == ["layers/a", "networks/a"]


def test_networks_and_profile_see_the_tuned_table(campaign, monkeypatch):
    seen = []

    def tune(args):
        Path(args[args.index("--output") + 1]).write_text('{"rows": {}, "environment": {"commit": null}}')
        return Outcome(DONE)

    def run(module, args, variables, limit, log):
        found = Path(variables["RESNET_FAST_CACHE"]) / "tuned" / "nvidia-h200.json"
        seen.append((module, found.exists() and json.loads(found.read_text())["environment"]["commit"]))
        return Slice.run(campaign, module, args, variables, limit, log)

    monkeypatch.setattr(runner, "run", run)
    campaign.add("layers/a", tune, writes=True).add("networks/a")
    campaign()
    assert seen == [("environment", False), ("layers/a", False), ("networks/a", "cafe")]


def test_the_next_guess_is_what_the_last_took(campaign):
    campaign.add("layers/a", Outcome(DONE, seconds=99.0), seconds=5.0)
    campaign()
    assert campaign.started == [("layers/a", 60.0)]
    campaign.add("layers/b", seconds=5.0)
    campaign.plan["layers/b"] = Unit("layers/b", "layers/b", kind="layers/a", seconds=5.0)
    campaign()
    assert campaign.started == [("layers/b", 4 * 99.0)]


def test_another_gpus_folder_is_refused(campaign, capsys):
    assert campaign() == 0
    device = {"name": "NVIDIA A100", "label": "a100", "slug": "nvidia-a100"}
    campaign.machine = Outcome(DONE, data={**MACHINE.data, "device": device})
    assert campaign() == 2
    assert "holds the results of NVIDIA H200, and this is NVIDIA A100" in capsys.readouterr().err


def test_no_gpu_and_a_foreign_folder_are_refused(campaign, capsys):
    campaign.machine = Outcome(CRASHED, "no CUDA device")
    assert campaign() == 2
    (campaign.out / "campaign.json").write_text("[]")
    assert campaign() == 2
    assert "is not a resnet_fast.campaign/1 file" in capsys.readouterr().err


@pytest.fixture
def child(tmp_path, monkeypatch):
    """child(source, limit): run `source` as a unit's process."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "_GRACE_S", 1)
    (tmp_path / "benchmarks" / "campaign").mkdir(parents=True)
    (tmp_path / "benchmarks" / "campaign" / "__init__.py").touch()
    monkeypatch.setattr(runner, "ROOT", tmp_path)

    def run(source, limit=60.0):
        (tmp_path / "benchmarks" / "campaign" / "made.py").write_text(f"import json, os, sys, time\n{source}\n")
        return runner.run("made", ["--flag"], {"MARK": "1"}, limit, tmp_path / "log")

    return run


def test_a_unit_reports(child, tmp_path):
    report = "open(sys.argv[2], 'w').write(json.dumps({'status': 'done'}))"
    found = child(f"print('hello', os.environ['MARK'], sys.argv[3]); {report}")
    assert (found.status, found.rows) == (DONE, [])
    assert "hello 1 --flag" in (tmp_path / "log").read_text()


def test_a_unit_that_dies_is_a_crash_with_its_last_words(child):
    found = child("sys.exit('out of luck')")
    assert (found.status, found.reason) == (CRASHED, "exit code 1: out of luck")
    assert child("os.abort()").reason.startswith("ended by SIGABRT")


def test_a_unit_that_hangs_is_ended_with_what_it_started(child, tmp_path):
    worker = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    started = time.monotonic()
    source = f"import subprocess; subprocess.Popen([sys.executable, '-c', {worker!r}]); time.sleep(60)"
    assert child(source, limit=1.0).status == TIMED_OUT
    assert time.monotonic() - started < 20
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_tests_are_counted(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(
        "<testsuites><testsuite><testcase classname='t' name='a'/>"
        "<testcase classname='t' name='b'><failure/></testcase><testcase classname='t' name='c'><error/></testcase>"
        "<testcase classname='t' name='d'><skipped message='no'/></testcase></testsuite></testsuites>"
    )
    assert gpu_tests.counted(report) == {
        "passed": 1, "failed": 2, "skipped": 1, "failures": ["t::b", "t::c"], "skip_reasons": {"no": 1}
    }  # fmt: skip


WATCHED = layers._watched
TUNE = """
import json, pathlib, sys
path = pathlib.Path({path!r})
table = json.loads(path.read_text()) if path.exists() else {{"rows": {{}}, "crashed": {{}}, "failed": {{}}, "left": 2}}
runs = table["runs"] = table.get("runs", 0) + 1
row = {{"config": {{}}, "rejected": {{}}}}
{body}
path.write_text(json.dumps(table))
sys.exit(code)
"""


def tune(monkeypatch, tmp_path, body, budget=60.0):
    """The layers unit's report, with a command in the place of `tune` that does `body`."""
    table, result = tmp_path / "table.json", tmp_path / "result.json"
    source = TUNE.format(path=str(table), body=body)
    monkeypatch.setattr(layers, "_watched", lambda command, path: WATCHED([sys.executable, "-c", source], path))
    monkeypatch.setattr(layers, "_MARGIN_S", 0.1)
    arguments = ["--result", result, "--output", table, "--budget", budget, "--model", "m", "--dtype", "float16"]
    arguments += ["--batch-size", 8, "--img-size", 224, "--device", "cuda"]
    monkeypatch.setattr(sys, "argv", ["layers", *map(str, arguments)])
    layers.main()
    return json.loads(result.read_text()), json.loads(table.read_text())


def test_tune_is_started_again_behind_what_it_died_of(monkeypatch, tmp_path):
    body = """
if runs == 1:
    table["crashed"], code = {"conv n8 x float16": {"kernel": "illegal access"}}, 1
elif runs == 2:
    table["trying"], code = ["conv n8 x float16", "other"], -9
else:
    table |= {"left": 0, "trying": None, "rows": {"conv n8 x float16": row, "conv n8 x bfloat16": row}}
    table["crashed"]["conv n8 x float16"]["other"], code = "died", 0
"""
    report, table = tune(monkeypatch, tmp_path, body)
    assert (report["status"], table["runs"]) == (DONE, 3)
    assert report["summary"] == "1 layers, Triton fastest in 1, 0 left, 0 failed, 2 kernels crashed"


def test_tune_that_stops_for_its_budget_is_partial_and_a_wrong_kernel_is_wrong(monkeypatch, tmp_path):
    report, table = tune(monkeypatch, tmp_path, "table['left'], code = 1, 0")
    assert (report["status"], table["runs"]) == (PARTIAL, 1)
    wrong = "row['rejected']['kernel'], code = 'wrong: y', 1\ntable |= {'left': 0, 'rows': {'conv n8 x float16': row}}"
    report, _ = tune(monkeypatch, tmp_path, wrong)
    assert (report["status"], report["reason"]) == (WRONG, "conv n8 x float16: kernel")


def test_tune_that_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(layers, "_HANG_S", 1.0)
    body = """
if runs == 1:
    table["trying"] = ["conv n8 x float16", "kernel"]
    path.write_text(json.dumps(table))
    import time
    time.sleep(60)
table |= {"left": 0, "trying": None, "crashed": {"conv n8 x float16": {"kernel": "died"}}}
code = 0
"""
    report, table = tune(monkeypatch, tmp_path, body)
    assert (report["status"], table["runs"]) == (DONE, 2)


def test_tune_that_refuses_is_a_crash(monkeypatch, tmp_path):
    report, table = tune(monkeypatch, tmp_path, "code = 2")
    assert (report["status"], table["runs"]) == (CRASHED, 1)


PASSED = "9 passed, 2 skipped, 30 deselected in 61.20s (0:01:01)\n"


@pytest.mark.parametrize(
    ("code", "said", "status", "word"),
    [
        (0, PASSED + "========= ERROR SUMMARY: 0 errors\n", DONE, ""),
        (86, PASSED + "========= ERROR SUMMARY: 3 errors\n", WRONG, "memcheck: 3 errors"),
        (86, PASSED + "========= RACECHECK SUMMARY: 1 hazard displayed\n", WRONG, "1 hazard displayed"),
        (1, "1 failed, 8 passed in 3.10s\n========= ERROR SUMMARY: 0 errors\n", WRONG, "exit code 1"),
        (5, "30 deselected in 0.10s\n", WRONG, "no test ran"),
    ],
)
def test_what_compute_sanitizer_says_is_judged(code, said, status, word):
    found, reason, row = sanitizer.judged("memcheck", code, said)
    assert found == status
    assert word in reason
    assert row["tool"] == "memcheck"
    if said.startswith(PASSED):
        assert (row["passed"], row["failed"], row["skipped"]) == (9, 0, 2)


def test_compute_sanitizer_watches_our_kernels_only():
    command = sanitizer.watched("/cuda/bin/compute-sanitizer", "racecheck")
    assert command[:3] == ["/cuda/bin/compute-sanitizer", "--tool", "racecheck"]
    assert command[command.index("--kernel-name") + 1] == "kernel_substring=resnet_fast"
    kernels = (ROOT / "csrc" / "cuda").glob("*.cu")
    assert all("namespace resnet_fast::cuda" in path.read_text() for path in kernels)
    names = {unit.name for unit in units.of_phase("tests", Settings())}
    assert {f"tests/sanitizer-{tool}" for tool in sanitizer.TOOLS} <= names


def test_units_ask_for_everything_once_ours_first():
    found = units.of_phase("networks", Settings())
    assert len({unit.name for unit in found}) == len(found) == 3 * 2 * 3 * len(units.GROUPS)
    assert all(unit.name.startswith("networks/ours/") for unit in found[:18])
    assert found[0].name == "networks/ours/resnet50-bfloat16-b256"
    assert [unit.name for unit in units.of_phase("layers", Settings(batches=(1,), train_batches=(256,)))] == [
        "layers/bfloat16-b1",
        "layers/float16-b1",
        "layers/train-bfloat16-b256",
        "layers/train-float16-b256",
    ]
    assert [unit.check for unit in found] == [unit.name.startswith("networks/ours/") for unit in found]
    assert "tests/test_gpu" in {unit.name for unit in units.of_phase("tests", Settings())}


def test_training_is_asked_in_every_stage_beside_eager_and_compile():
    from campaign import training

    curves, *found = units.of_phase("training", Settings())
    assert (curves.name, curves.check) == ("training/convergence", True)
    assert len({unit.name for unit in found}) == len(found) == 3 * 2 * 2 * len(units.TRAINING_GROUPS)
    assert units.TRAINING_GROUPS.keys() == training.GROUPS.keys()
    assert found[0].name == "training/ours/resnet50-bfloat16-b256"
    assert [unit.check for unit in found] == [unit.name.startswith("training/ours/") for unit in found]
    assert training.GROUPS["ours"][2] == (1, 4)  # "auto" is 3, and 2 is close
    assert "compile" in training.GROUPS["compile"][0]


def test_what_others_compilers_fail_at_is_no_fault_of_ours():
    from campaign import networks

    def row(contender, reason):
        return networks.harness.Row(contender, contender, False, None, "logits", reason)

    assert networks.excused(row("compile_max-autotune", "raised RuntimeError: no"))
    assert not networks.excused(row("compile_max-autotune", "rmse 3, allowed 1"))
    assert not networks.excused(row("frozen_tail", "raised RuntimeError: no"))


def test_a_stamp_is_put_once_and_only_where_it_is_missing(tmp_path):
    path = tmp_path / "file.json"
    store.stamp(path, "cafe")
    path.write_text('{"commit": null}')
    store.stamp(path, "cafe")
    store.stamp(path, "beef")
    assert json.loads(path.read_text()) == {"commit": "cafe"}
