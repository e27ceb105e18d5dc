"""scripts/bench: sides that agree, in processes that take turns, what is kept, the tables, what is refused."""

import json
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest

import sdjax

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
MODULES = ("gpu", "processes", "run", "sides.pytorch", "sides.sdjax", "stages", "table", "weights")


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield SimpleNamespace(**{name.rpartition(".")[2]: import_module(name) for name in MODULES})
        for name in [name for name, m in sys.modules.items() if str(SCRIPTS) in str(getattr(m, "__file__", ""))]:
            del sys.modules[name]  # other scripts may have modules of such names


@pytest.fixture(scope="module")
def both(scripts):
    return scripts.pytorch.PyTorch("float32", "cpu"), scripts.sdjax.Sdjax("float32", "cpu")


@pytest.fixture
def loaded(both, sd1_folder):
    for side in both:
        side.load(sd1_folder, None)
    return both


def agree(scripts, sides, folder, stage):
    arrays = scripts.stages.inputs(folder, stage)
    results = [side.array(side.prepare(stage, arrays, {})()) for side in sides]
    assert results[0].shape == results[1].shape
    np.testing.assert_allclose(*results, atol=1e-4 * np.abs(results[0]).max())
    assert np.std(results[0]) > 0.05


def test_both_sides_compute_the_same(scripts, loaded, sd1_folder):
    for stage in (*scripts.stages.HOST.values(), scripts.stages.Stage("vae_encode")):
        agree(scripts, loaded, sd1_folder, replace(stage, steps=2, size=64, batch=2))
    assert loaded[0].layouts.keys() == {"unet", "vae"}
    assert set(loaded[0].layouts.values()) <= {"contiguous", "channels_last"}


def test_operations_are_counted(scripts, loaded, sd1_folder):
    torch, counted = loaded[0], {}
    for what in ("matmul", "text_encoder", "unet", "vae", "picture"):
        stage = replace(scripts.stages.HOST[what], steps=3, size=64)
        _, counted[what] = torch.count(torch.prepare(stage, scripts.stages.inputs(sd1_folder, stage), {}))
    assert counted["matmul"] == 2 * 64**3
    unet_calls = 4  # PNDM makes one more than steps
    assert counted["picture"] == unet_calls * counted["unet"] + counted["vae"] + 2 * counted["text_encoder"]


def test_a_process_says_what_a_call_took_and_sleeps(scripts):
    with scripts.processes.Worker(OMP_NUM_THREADS="3") as worker:
        assert worker.call("os:getenv", key="OMP_NUM_THREADS").value == "3"
        reply = worker.call("processes:resident_bytes", field="VmRSS")
        assert 1e6 < reply.before <= reply.value <= reply.peak
        assert worker.call("statistics:median", data=list(range(100_000))).seconds > reply.seconds > 0
        time.sleep(0.5)
        worker.call("os:getpid")
        assert worker.idle_cores < 0.5
        with pytest.raises(RuntimeError, match=r"(?s)json:loads ended with status 1.*JSONDecodeError"):
            worker.call("json:loads", s="{")
        assert not worker.is_alive


def test_a_side_in_its_process(scripts, sd1_folder, tmp_path):
    run = {"sides": {}, "idle_cores": {}}
    stage = scripts.stages.Stage("unet", batch=2, rounds=2)
    options = str(sd1_folder), "float32", "cpu", tmp_path
    with scripts.run.started({"sdjax": sys.executable}, *options, run) as workers:
        cell = scripts.run.measure(workers, "unet", stage, "float32")
        time.sleep(0.5)
        workers["sdjax"].call("os:getpid")
    assert run["sides"]["sdjax"]["versions"]["sdjax"] == sdjax.__version__
    assert run["idle_cores"]["float32"]["sdjax"] < 0.5
    found = cell["sides"]["sdjax"]
    assert len(found["seconds"]) == 2 and 0 < max(found["seconds"]) < found["first"]
    assert 1e7 < found["before"] <= found["peak"]
    assert any((tmp_path / "jax").iterdir())


class StandIn:
    """A process whose results and seconds are given, or the problem that ends it."""

    problem = None

    def __init__(self, scripts, side, result, seconds, log):
        self._reply, self._log = scripts.processes.Reply, log
        self._side, self._result, self._seconds = side, result, seconds

    @property
    def is_alive(self):
        return not (self.problem and self._log)

    def call(self, function, stage=None, out=None, layouts=None):
        self._log.append((self._side, function.rpartition(".")[2]))
        if self.problem:
            raise self.problem
        if out:
            np.save(out, self._result)
            return self._reply({"first": 9.0, "layouts": layouts, "flops": 6}, 9.0, 10, 70)
        return self._reply({"seconds": self._seconds.pop(0), "device_peak": None}, 9.0, 20, 50)


def compared(scripts, ours, theirs, log, seconds=((3.0, 1.0), (5.0, 4.0))):
    results = {"sdjax": ours, "pytorch": theirs}
    workers = {
        side: StandIn(scripts, side, results[side], list(taken), log)
        for side, taken in zip(results, seconds, strict=True)
    }
    return scripts.run.measure(workers, "unet", scripts.stages.Stage("unet", rounds=2), "float32")


def test_sides_take_turns(scripts):
    log = []
    cell = compared(scripts, [1.0, 2.0], [1.0, 2.001], log)
    assert log == [("pytorch", "prepare"), ("sdjax", "prepare"), *[("sdjax", "measure"), ("pytorch", "measure")] * 2]
    assert cell["flops"] == 6
    assert cell["sides"]["sdjax"]["seconds"] == [3.0, 1.0]
    assert (cell["sides"]["sdjax"]["before"], cell["sides"]["sdjax"]["peak"]) == (20, 50)
    assert cell["sides"]["sdjax"]["error"] == pytest.approx(0.001 / 2.001)


@pytest.mark.parametrize("wrong", [[1.0, 2.1], [1.0, np.nan], [1.0]])
def test_a_wrong_result_ends_the_run(scripts, wrong):
    with pytest.raises(ArithmeticError, match="unet in float32: not PyTorch's result"):
        compared(scripts, wrong, [1.0, 2.0], [])


def found(*seconds, peak, error=0.0):
    return {"seconds": seconds, "peak": peak, "first": 30.0, "error": error, "layouts": {}}


def test_tables(scripts):
    sides = {
        "sdjax": found(9.0, 8.0, 20.0, peak=4.4e9, error=2e-6),
        "pytorch": found(12.0, 11.0, 11.5, peak=4e9) | {"layouts": {"unet": "channels_last", "vae": "contiguous"}},
        "torch.compile": found(10.8, peak=5e9, error=3e-6),
        "flax-0.35": found(22.5, peak=9e9, error=3e-6),
    }
    matmul = {"flops": 100, "sides": {"sdjax": found(0.25, 0.5, peak=1)}}
    text = scripts.table.tables({"float32": {"matmul": matmul, "unet": {"flops": 1800, "sides": sides}}})
    assert "| float32 | unet | sdjax | 9 | 8-20 | 30 | 4.40 | 2.0e-06 | 50% |" in text
    assert "| float32 | unet | pytorch channels_last | 11.5 | 11-12 | 30 | 4.00 | 0.0e+00 | 39% |" in text
    assert "| dtype | stage | flax-0.35 / sdjax | PyTorch's best time / sdjax |" in text
    assert "| float32 | unet | 2.50 | 1.20 | 1.10 |" in text


def test_what_is_measured_again_is_replaced_and_the_rest_stays(scripts, tmp_path):
    path = tmp_path / "bench.json"
    scripts.run.Record(path, "sd15", "cpu").add("float32", "unet", {"flops": 1})
    scripts.run.Record(path, "sd15", "cpu").add("float32", "vae", {"flops": 2})
    scripts.run.Record(path, "sd15", "cpu").add("float32", "unet", {"flops": 3})
    kept = json.loads(path.read_text())
    assert kept["results"] == {"float32": {"unet": {"flops": 3, "run": 2}, "vae": {"flops": 2, "run": 1}}}
    assert kept["runs"][0]["machine"]["cores"] > 0
    with pytest.raises(ValueError, match=r"bench\.json: holds results of sd15 on cpu"):
        scripts.run.Record(path, "tiny", "cpu")


def test_random_weights_are_a_folder_that_both_load(scripts, tmp_path):
    folder = scripts.weights.folder("tiny", str(tmp_path))
    assert [str(path) for path in (tmp_path / "sdjax-bench").iterdir()] == [folder]
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    ours = sdjax.StableDiffusionPipeline.from_pretrained(folder)
    assert ours.tokenizer(["a horse"])[0].tolist() == theirs.tokenizer("a horse", padding="max_length").input_ids
    kernel = ours.unet.conv_in.kernel[...]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), theirs.unet.conv_in.weight.detach().numpy())
    assert np.std(kernel) == pytest.approx((4 * 3 * 3) ** -0.5, rel=0.2)


def test_one_component_alone_of_sdxl(scripts, both, tmp_path):
    folder = Path(scripts.weights.folder("tiny-xl", str(tmp_path)))
    theirs, ours = (side.load(folder, "unet") for side in both)
    assert theirs == ours > 5e5
    agree(scripts, both, folder, scripts.stages.Stage("unet", batch=2))


def test_attention_on_this_platform_is_held_against_the_plain_form(scripts):
    row = scripts.gpu.attention("bfloat16", [2, 8, 6, 2, 8])
    assert row[:3] == ["bfloat16", "2x8x6x2x8", "plain"]
    assert 1e-4 < row[5] == row[6] < 1e-2
    assert 1e-4 < row[7] == row[8] < 2e-2


def test_a_side_that_ends_does_not_end_the_others(scripts, monkeypatch, tmp_path):
    """On a GPU that is lent once, what the others take is worth having."""
    monkeypatch.setattr(scripts.gpu, "random_weights", lambda name: name)
    workers = {side: StandIn(scripts, side, [1.0], [1.0], []) for side in ("sdjax", "torch.compile")}
    workers["torch.compile"].problem = RuntimeError("no C compiler")
    loan = scripts.gpu.Loan(tmp_path, 1.0, True)
    cell = loan._measured(workers, "unet", scripts.stages.Stage("unet"), "float32")
    assert cell["sides"].keys() == {"sdjax"}
    assert loan.failures == ["unet in float32: no C compiler"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "unet,vea"], "--only: unknown vea; known: matmul, text_encoder, unet, vae, picture"),
        (["--device", "tpu", "--sides", "pytorch"], "--sides: unknown pytorch; known: sdjax"),
        (["--peer", "flax-0.35"], "--peer and --peer-python come together"),
        (["--model", "nowhere"], "--model: a folder that exists"),
    ],
)
def test_options_that_do_not_fit_are_refused(scripts, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        scripts.run.parse(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help_says_what_a_machine_with_a_gpu_needs(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts.run.parse(["--help"])
    said = capsys.readouterr().out
    assert all(text in said for text in ("--no-index --find-links wheels", "--device gpu", "--peer-python"))
