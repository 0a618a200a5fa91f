"""`resnet-fast tune`: what it measures, what it accepts, what survives a crash, and the file that it leaves."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from resnet_fast import cli, freeze, gpus, planner
from resnet_fast.backends import triton as triton_backend
from resnet_fast.cli import UserError, tune, tuning, workloads
from resnet_fast.cli.tuned_file import DIED, TunedFile
from resnet_fast.cli.workloads import inference
from resnet_fast.cli.workloads.workload import Workload
from resnet_fast.kernels import configs, tables
from resnet_fast.problems import ConvProblem, GramDgradProblem, PoolProblem, PrologueProblem, StemProblem, TailProblem
from resnet_fast.shapes import Conv

H200 = gpus.KNOWN["h200"]
CONV = ConvProblem(Conv(2, 64, 8, 8, 64, (3, 3), padding=(1, 1)), "float32")
TAIL = TailProblem(CONV.conv, Conv(2, 64, 8, 8, 256), "float16", next_conv=Conv(2, 256, 8, 8, 64))


def run(*arguments):
    return cli.main(["tune", *map(str, arguments)])


def asked(**changes):
    usual = {
        "model": ["resnet50"],
        "batch_size": [2],
        "img_size": 64,
        "dtype": ["bfloat16"],
        "fusion": ["conv", "tail"],
        "task": ["infer"],
    }
    return Namespace(**usual | changes)


class Measured:
    """Stands in for one problem's workload: results as given, and which ran how often.

    candidates: label -> what is added to the right result, or an exception to raise; "library" ones are the library's.
    """

    def __init__(self, candidates, device_lost=()):
        self.candidates, self.device_lost = candidates, device_lost
        self.ran = dict.fromkeys(["stock", *candidates], 0)
        self.labels, self.tried, self.alive = {}, [], True
        self.exact = torch.arange(8, dtype=torch.float64)

    def make(self, problem, device):
        names = iter([name for name in self.candidates if not name.startswith("library")])

        def stock():
            self.ran["stock"] += 1
            return {"y": self.exact.float()}

        def triton(config):
            name = next(names)
            self.labels[name] = tuning.label_of(config)
            return lambda: self.result(name)

        library = {
            name.removeprefix("library "): lambda name=name: self.result(name)
            for name in self.candidates
            if name.startswith("library")
        }
        return Workload(lambda: {"y": self.exact}, stock, triton, library, {"y": torch.empty(8)})

    def result(self, name):
        self.ran[name] += 1
        found = self.candidates[name]
        if isinstance(found, BaseException):
            self.alive = name not in self.device_lost
            raise found
        return {"y": (self.exact + found).float()}

    def install(self, monkeypatch, microseconds):
        """microseconds: name -> time; "stock" too."""
        monkeypatch.setattr(workloads, "of", self.make)
        monkeypatch.setattr(tuning, "_usable", lambda device: self.alive)

        def time(run, device):
            before = dict(self.ran)
            run()
            ran = [name for name in self.ran if self.ran[name] != before[name]]
            return tuning.Timing(*[microseconds[name] for name in ran] * 3 or [0.0] * 3)

        monkeypatch.setattr(tuning, "time", time)
        return self

    def measure(self, problem, top, crashed=()):
        return tuning.measure(problem, H200, "cpu", top=top, crashed=dict(crashed), trying=self.tried.append)


def test_without_a_gpu_it_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("resnet-fast tune: error: tuning needs a GPU")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h200"], "goes with --list"),
        (["--list", "--gpu", "voodoo"], "h200"),
        (["--list", "--gpu", "h200", "--model", "resnet18", "--only", "nothing"], "matches no problem"),
        (["--list", "--gpu", "h200", "--model", "vgg11"], "resnet"),
        (["--device", "cpu", "--dtype", "float16"], "in float32 and bfloat16 alone"),
    ],
)
def test_what_cannot_be_asked(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(triton_backend, "interpreted", lambda: False)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_list_names_every_problem_and_writes_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    assert run("--list", "--gpu", "h200", "--model", "resnet50", "-b", 256, "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    keys = [
        problem.key for problem in tune.problems(asked(batch_size=[256], img_size=224, task=["infer", "train"]), H200)
    ]
    assert all(key in out for key in keys)
    assert f"{len(keys)} problems" in out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_every_problem_that_a_planner_weighs_is_measured(monkeypatch, model):
    weighed = set()  # those that there is something to choose for
    choose = planner.choose

    def watching(problem, gpu):
        weighed.update([problem.key] if configs.candidates(problem, gpu) else [])
        return choose(problem, gpu)

    monkeypatch.setattr(planner, "choose", watching)
    with torch.device("meta"):
        section = planner.Section.of_resnet(freeze(tune.networks.untrained(model).eval(), dtype=torch.bfloat16))
    for fusion in planner.FUSIONS:
        planner.build(section, (2, 3, 64, 64), "bfloat16", H200, fusion=fusion)
    monkeypatch.undo()
    assert weighed <= {problem.key for problem in tune.problems(asked(model=[model]), H200)}


def test_problems_are_distinct_in_the_order_asked_for_with_tails_last():
    found = tune.problems(asked(batch_size=[8, 2]), H200)
    keys = [problem.key for problem in found]
    assert len(set(keys)) == len(keys)
    assert not any(isinstance(problem, PoolProblem) for problem in found)
    assert ["n8" in key.split() for key in keys] == sorted(("n8" in key.split() for key in keys), reverse=True)
    for tail in (problem for problem in found if isinstance(problem, TailProblem)):
        steps = [step.key for step in tune.separate_steps(tail)]
        assert all(keys.index(step) < keys.index(tail.key) for step in steps)
    alone = tune.problems(asked(fusion=["conv"]), H200)
    assert not any(isinstance(problem, TailProblem) for problem in alone)


def test_training_steps_are_asked_beside_inference_or_alone():
    both, training, inference = (
        [problem.key for problem in tune.problems(asked(task=task), H200)]
        for task in (["infer", "train"], ["train"], ["infer"])
    )
    assert set(both) == {*training, *inference}
    assert both[: len(inference)] == inference
    for kind in ("+statistics no-relu", "+residual joined", "+bn(residual) joined"):
        assert any(key.endswith(kind) for key in training)
    assert any(key.startswith("gram_dgrad") for key in training)
    assert not any("+statistics" in key or "joined" in key for key in inference)
    conv = next(problem for problem in tune.problems(asked(task=["train"]), H200) if "f3" in problem.key)
    assert conv.key == "conv n2 64x16x16 k64 f3 p1 bfloat16 +statistics no-relu"


TRAINING = [
    replace(CONV, relu=False, statistics=True),
    PrologueProblem(Conv(2, 64, 8, 8, 128), "float32", statistics=True),
    PrologueProblem(Conv(2, 64, 8, 8, 128), "float32", joined=True, residual=True),
    PrologueProblem(Conv(2, 64, 8, 8, 128), "float32", joined=True, residual=True, residual_norm=True),
    GramDgradProblem(Conv(2, 64, 8, 8, 128), "float32"),
    GramDgradProblem(Conv(2, 64, 8, 8, 128), "float32", prologue=True, add=True),
]


@pytest.mark.parametrize("problem", TRAINING, ids=lambda problem: problem.key)
def test_a_workload_of_training_is_its_problem(problem):
    work = workloads.of(problem, "cpu")
    stock, exact = work.stock(), work.reference()
    shape = problem.conv.x_shape if isinstance(problem, GramDgradProblem) else problem.conv.y_shape
    assert stock["y"].shape == shape
    assert stock["y"].dtype == torch.float32
    assert ("running_var" in stock) == getattr(problem, "statistics", False)
    assert stock.keys() == exact.keys()
    for name, tensor in stock.items():
        assert exact[name].dtype == torch.float64
        assert exact[name].std() > 0.01
        torch.testing.assert_close(tensor.double(), exact[name], rtol=1e-4, atol=1e-4)
    assert list(work.library) == ["library"]


@pytest.mark.parametrize(
    "problem",
    [
        CONV,
        replace(CONV, residual=True),
        replace(CONV, shortcut=Conv(2, 32, 16, 16, 64, stride=(2, 2))),
        replace(CONV, relu=False, conv=replace(CONV.conv, groups=4)),
        StemProblem(Conv(2, 3, 16, 16, 64, (7, 7), (2, 2), (3, 3)), "float32"),
        TAIL,
        replace(TAIL, shortcut=Conv(2, 32, 16, 16, 256, stride=(2, 2)), next_conv=None),
    ],
    ids=lambda problem: problem.key,
)
def test_a_workload_is_its_problem(problem):
    work = workloads.of(problem, "cpu")
    stock, exact = work.stock(), work.reference()
    assert stock.keys() == exact.keys() == work.outputs.keys()
    for name, tensor in stock.items():
        assert tensor.shape == exact[name].shape == work.outputs[name].shape
        assert tensor.dtype == work.outputs[name].dtype
        assert exact[name].dtype == torch.float64
        assert exact[name].std() > 0.1
        assert (tensor.double() - exact[name]).abs().max() < 0.05
    work.poison()
    assert all(tensor.isnan().all() for tensor in work.outputs.values())
    for library in work.library.values():
        torch.testing.assert_close(library()["y"], stock["y"], rtol=1e-4, atol=1e-4)


def test_the_reference_does_its_images_in_parts(monkeypatch):
    whole = workloads.of(CONV, "cpu").reference()["y"]
    monkeypatch.setattr(inference, "_IMAGES_AT_ONCE", 1)
    assert torch.equal(workloads.of(CONV, "cpu").reference()["y"], whole)


def test_the_fastest_right_candidate_is_chosen(monkeypatch):
    candidates = {"slow": 0.0, "wrong": 0.5, "broken": RuntimeError("no\nway"), "fast": 0.0, "library a": 0.0}
    times = {"stock": 1, "slow": 9, "wrong": 2, "fast": 5, "library a": 6}
    measured = Measured(candidates).install(monkeypatch, times)
    row = measured.measure(CONV, top=4)
    labels = measured.labels
    assert row["config"] == configs.to_dict(configs.candidates(CONV, H200)[3])
    assert (row["us"], row["library_us"], row["variant"], row["kernel"]) == (5, 6, "a", labels["fast"])
    assert row["times"] == {"PyTorch": 1, labels["slow"]: 9, labels["fast"]: 5, "library a": 6}
    assert row["rejected"].keys() == {labels["wrong"], labels["broken"]}
    assert row["rejected"][labels["wrong"]].startswith("wrong: y: rmse")
    assert row["rejected"][labels["broken"]] == "RuntimeError: no"
    assert measured.ran["wrong"] == 1  # verified and not timed
    assert measured.tried == ["PyTorch", *(labels[name] for name in ("slow", "wrong", "broken", "fast")), "library a"]
    tried = frozenset(label.split()[0] for label in ("PyTorch", "library a", *labels.values()))
    assert tables._row(row) == tables.Row(configs.candidates(CONV, H200)[3], 5.0, 6.0, "a", tried)


def test_the_library_is_chosen_where_it_is_faster(monkeypatch):
    times = {"stock": 1, "only": 9, "library a": 6, "library b": 5}
    measured = Measured({"only": 0.0, "library a": 0.0, "library b": 0.0}).install(monkeypatch, times)
    row = measured.measure(CONV, top=1)
    assert (row["config"], row["us"], row["library_us"], row["variant"]) == (None, 5, 5, "b")


def test_where_nothing_is_right_the_row_says_that_no_kernel_is(monkeypatch):
    measured = Measured({"wrong": 1.0}).install(monkeypatch, {"stock": 7})
    row = measured.measure(TAIL, top=1)
    assert (row["config"], row["us"], row["library_us"], row["kernel"]) == (None, 7, None, tuning.STOCK)
    assert tables._row(row).config is None


def test_a_candidate_that_writes_nothing_is_not_taken_for_right(monkeypatch):
    exact = {"y": torch.ones(8, dtype=torch.float64)}
    stock = {"y": torch.ones(8)}
    outputs = {"y": torch.ones(8)}  # as a candidate before it might have left them
    work = Workload(lambda: exact, lambda: stock, lambda config: lambda: outputs, {}, outputs)
    monkeypatch.setattr(workloads, "of", lambda problem, device: work)
    row = tuning.measure(CONV, H200, "cpu", top=1, crashed={})
    assert row["config"] is None
    assert [reason.startswith("wrong: y: 8 NaN") for reason in row["rejected"].values()] == [True]


def test_what_crashed_is_not_run_again(monkeypatch):
    measured = Measured({"fatal": 0.0, "fine": 0.0}).install(monkeypatch, {"stock": 1, "fine": 3})
    fatal = tuning.label_of(configs.candidates(CONV, H200)[0])
    row = measured.measure(CONV, top=2, crashed={fatal: DIED})
    assert row["kernel"] == measured.labels["fine"]
    assert row["rejected"] == {fatal: DIED}
    assert measured.ran["fatal"] == 0


@pytest.fixture
def rehearsing(monkeypatch, tmp_path):
    """tune(*arguments) in this process, without Triton; with the file that it writes."""
    monkeypatch.setattr(triton_backend, "interpreted", lambda: True)
    monkeypatch.setattr(triton_backend, "available", lambda: None)
    path = tmp_path / "table.json"
    usual = ("--device", "cpu", "--output", path, "--model", "resnet18", "-b", 1, "--img-size", 32)
    usual += ("--dtype", "float32", "--task", "infer", "--only", "conv n1 64x8x8 k64 *")

    def rehearse(*arguments):
        code = run(*usual, *arguments)
        return code, json.loads(path.read_text()) if path.exists() else None

    return rehearse


def test_what_takes_the_gpu_down_is_left_out_by_the_next_run(capsys, monkeypatch, rehearsing):
    candidates = {"fatal": RuntimeError("illegal memory access"), "fine": 0.0}
    measured = Measured(candidates, device_lost=["fatal"])
    measured.install(monkeypatch, {"stock": 9, "fine": 3})
    code, table = rehearsing("--top", 2)
    assert code == 1
    assert "illegal memory access took the GPU down" in capsys.readouterr().out
    assert list(table["crashed"].values()) == [{measured.labels["fatal"]: "RuntimeError: illegal memory access"}]
    assert (table["left"], table["rows"]) == (2, {})
    measured.alive = True  # another process
    code, table = rehearsing("--top", 2)
    assert (code, table["left"], len(table["rows"])) == (1, 1, 1)  # now the second problem's
    measured.alive = True
    code, table = rehearsing("--top", 2)
    assert (code, table["left"], len(table["rows"])) == (0, 0, 2)
    assert measured.ran["fatal"] == 2
    assert all(row["kernel"] == measured.labels["fine"] for row in table["rows"].values())


def test_budget_resume_and_again(capsys, monkeypatch, rehearsing):
    measured = Measured({"fine": 0.0})
    measured.install(monkeypatch, {"stock": 9, "fine": 3})
    code, table = rehearsing("--budget", 0)
    assert (code, table["left"], table["rows"]) == (0, 2, {})
    assert "2 problems left" in capsys.readouterr().out
    code, table = rehearsing("--top", 1)
    assert (code, table["left"], len(table["rows"])) == (0, 0, 2)
    assert "nothing left" in capsys.readouterr().out
    verified = measured.ran["fine"]
    assert rehearsing("--top", 1) == (0, table)
    assert measured.ran["fine"] == verified
    code, _ = rehearsing("--top", 1, "--again")
    assert (code, measured.ran["fine"]) == (0, 2 * verified)


def test_left_is_of_this_request(monkeypatch, rehearsing):
    measured = Measured({"fine": 0.0})
    measured.install(monkeypatch, {"stock": 9, "fine": 3})
    rehearsing("--top", 1, "--img-size", 32)
    assert rehearsing("--budget", 0, "--only", "conv n1 64x16x16 k64 *", "--img-size", 64)[1]["left"] == 2
    assert rehearsing()[1]["left"] == 0


def test_a_wrong_candidate_is_told_and_fails_the_run(capsys, monkeypatch, rehearsing):
    measured = Measured({"wrong": 1.0, "fine": 0.0})
    measured.install(monkeypatch, {"stock": 9, "fine": 3})
    code, table = rehearsing("--top", 2)
    assert code == 1
    assert capsys.readouterr().out.count("WRONG conv n1 64x8x8 k64") == 2
    assert all(row["kernel"] == measured.labels["fine"] for row in table["rows"].values())


def test_a_problem_that_cannot_be_measured_costs_itself_alone(monkeypatch, rehearsing):
    measure, calls = tuning.measure, []

    def first_fails(problem, *rest, **keywords):
        calls.append(problem)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("too large")
        return measure(problem, *rest, **keywords)

    monkeypatch.setattr(tuning, "measure", first_fails)
    measured = Measured({"fine": 0.0})
    measured.install(monkeypatch, {"stock": 9, "fine": 3})
    code, table = rehearsing("--top", 1)
    assert (code, table["left"], len(table["rows"])) == (0, 0, 1)
    assert table["failed"] == {calls[0].key: "OutOfMemoryError: too large"}


def test_an_interrupt_blames_no_candidate(monkeypatch, rehearsing):
    measured = Measured({"fine": KeyboardInterrupt()})
    measured.install(monkeypatch, {"stock": 9, "fine": 3})
    code, table = rehearsing("--top", 1)
    assert code == 130
    assert measured.ran["fine"] == 1
    assert (table["trying"], table["crashed"], table["left"]) == (None, {}, 2)


def test_the_file_is_the_table_that_the_package_reads(monkeypatch, tmp_path):
    path = tmp_path / "tuned" / "table.json"
    file = TunedFile(path, H200, {"commit": None})
    config = configs.candidates(CONV, H200)[0]
    file.rows[CONV.key] = {"config": configs.to_dict(config), "us": 2.5, "library_us": None, "variant": "", "more": 1}
    file.save()
    assert tables.read(path, H200) == {CONV.key: tables.Row(config, 2.5, None)}
    assert [entry.name for entry in path.parent.iterdir()] == ["table.json"]
    assert sum(line.startswith(f'"{CONV.key}"') for line in path.read_text().splitlines()) == 1
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    path.rename(tables.paths(H200)[0])
    tables.forget()
    try:
        assert tables.lookup(CONV, H200) == (tables.Row(config, 2.5, None), CONV.key)
    finally:
        monkeypatch.undo()
        tables.forget()


def test_a_rehearsal_is_no_table(tmp_path):
    path = tmp_path / "table.json"
    file = TunedFile(path, tune.REHEARSAL, {}, rehearsal=True)
    file.rows["key"] = {"config": None, "us": 1.0, "library_us": 1.0}
    file.save()
    assert tables.read(path, H200) == {}
    assert TunedFile(path, tune.REHEARSAL, {}, rehearsal=True).rows == file.rows
    assert tables.paths(tune.REHEARSAL)[0].name not in {tables.paths(gpu)[0].name for gpu in gpus.KNOWN.values()}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other/1", "gpu": "NVIDIA H200"}'])
def test_another_file_is_not_overwritten(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(UserError, match="name another --output"):
        TunedFile(path, H200, {})
    assert path.read_text() == text


def test_another_gpus_table_is_not_added_to(tmp_path):
    TunedFile(tmp_path / "table.json", H200, {}).save()
    with pytest.raises(UserError, match="results of NVIDIA H200"):
        TunedFile(tmp_path / "table.json", gpus.KNOWN["h100"], {})


def test_a_process_that_died_leaves_what_it_was_trying(tmp_path):
    path = tmp_path / "table.json"
    TunedFile(path, H200, {}).begin("problem", "kernel")
    after = TunedFile(path, H200, {})
    assert after.crashed == {"problem": {"kernel": DIED}}
    assert TunedFile(path, H200, {}).trying is None
    after.forget("problem")
    assert after.crashed == {}


def test_kernels_under_the_interpreter(tmp_path):
    """The whole command, in a process whose kernels are interpreted: convolutions and a tail, then nothing to do."""
    pytest.importorskip("triton")
    path = tmp_path / "table.json"
    command = [sys.executable, "-m", "resnet_fast", "tune", "--device", "cpu", "--output", str(path), "--top", "1"]
    command += ["--model", "resnet50", "-b", "1", "--img-size", "32", "--dtype", "float16"]
    command += ["--only", "* n1 64x8x8 k64 f3 p1 *float16*"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for seconds in (300, 100):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing left" in done.stdout
    assert tables.read(path, H200) == {}
    table = json.loads(path.read_text())
    assert "not of a GPU" in table["schema"]
    kernels = {label.split()[0] for row in table["rows"].values() for label in row["times"]}
    assert {"bottleneck_tail", "library", "PyTorch"} < kernels
    assert all(row["us"] > 0 and not row["rejected"] for row in table["rows"].values())
    tails = [row for key, row in table["rows"].items() if key.startswith("tail")]
    assert tails
    assert all(row["library_us"] is None and row["config"]["kernel"] == "bottleneck_tail" for row in tails)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("problem", [CONV, TAIL], ids=["conv", "tail"])
def test_on_a_gpu(problem, dtype):
    pytest.importorskip("triton")
    problem, gpu = replace(problem, dtype=dtype), gpus.of_device(torch.cuda.current_device())
    row = tuning.measure(problem, gpu, "cuda", top=3, crashed={})
    assert not row["rejected"]
    assert len(row["times"]) == 1 + min(3, row["candidates"]) + (2 if problem.key.startswith("conv") else 0)
    assert all(us > 0 for us in row["times"].values())
    assert row["p20_us"] <= row["us"] <= row["p80_us"]
    assert tuning.launch_time("cuda").us < 1000
