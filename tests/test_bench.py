"""scripts/bench.py: sides that agree, taking turns, what is kept, the tables, what is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest

import sdjax

SCRIPTS = Path(__file__).parents[1] / "scripts"
WHATS = ("matmul", "text_encoder", "unet", "vae", "picture")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import bench
    import bench_sdjax
    import bench_stages
    import bench_table
    import bench_torch
    import full_size

    return SimpleNamespace(
        bench=bench,
        stages=bench_stages,
        table=bench_table,
        sides=(bench_torch, bench_sdjax),
        full_size=full_size,
    )


class StandIn:
    """A child whose results and seconds are given."""

    def __init__(self, side, result, seconds, log):
        self.side, self._result, self._seconds, self._log = side, result, seconds, log

    def ask(self, prepare=None, measure=None, out=None, layouts=None):
        self._log.append((self.side, "prepare" if prepare else "measure"))
        if prepare:
            np.save(out, self._result)
            return {"first": 9.0, "layouts": layouts, "flops": 6, "peak": 70}
        return {"seconds": self._seconds.pop(0), "peak": 50, "before": 20}


def test_both_sides_compute_the_same(scripts, sd1_folder):
    torch, ours = (module.load("pytorch", sd1_folder, "float32", "cpu") for module in scripts.sides)
    for what in WHATS:
        stage = replace(scripts.stages.HOST[what], steps=2, size=64, batch=2)
        arrays = scripts.stages.inputs(sd1_folder, stage)
        results = [side.array(side.prepare(stage, arrays, {})()) for side in (torch, ours)]
        assert results[0].shape == results[1].shape
        np.testing.assert_allclose(*results, atol=1e-4 * np.abs(results[0]).max())
        assert np.std(results[0]) > 0.05
    assert torch.layouts(stage).keys() == {"unet", "vae"}
    assert {name for known in torch.layouts(stage).values() for name in known} == {"contiguous", "channels_last"}


def test_operations_are_counted(scripts, sd1_folder):
    torch, _ = (module.load("pytorch", sd1_folder, "float32", "cpu") for module in scripts.sides)
    counted = {}
    for what in ("matmul", "unet", "vae", "picture"):
        stage = replace(scripts.stages.HOST[what], steps=3, size=64)
        torch.prepare(stage, scripts.stages.inputs(sd1_folder, stage), {})
        counted[what] = torch.flops(stage)
    assert counted["matmul"] == 2 * 64**3
    assert counted["picture"] == 3 * counted["unet"] + counted["vae"]


def test_a_side_answers_line_by_line_and_sleeps(scripts, sd1_folder, tmp_path):
    child = scripts.bench.Child("sdjax", sys.executable, sd1_folder, "float32", "cpu", cache=tmp_path / "cache")
    try:
        assert child.hello["versions"]["sdjax"] == sdjax.__version__
        prepared = child.ask(prepare="unet", out=str(tmp_path / "out.npy"), layouts={})
        reply = child.ask(measure="unet")
        assert np.load(tmp_path / "out.npy").shape == (2, 8, 8, 4)
        assert 0 < reply["seconds"] < prepared["first"]
        assert 1e7 < reply["before"] <= reply["peak"]
        assert child.idle_cpu < 0.5
        assert any((tmp_path / "cache" / "jax").iterdir())
    finally:
        child.close()


def test_a_side_that_fails_says_why(scripts, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)sdjax ended with status 1.*FileNotFoundError"):
        scripts.bench.Child("sdjax", sys.executable, tmp_path / "nothing", "float32", "cpu")


def test_sides_take_turns(scripts):
    log = []
    sides = [StandIn("sdjax", [1.0, 2.0], [3.0, 1.0], log), StandIn("pytorch", [1.0, 2.001], [5.0, 4.0], log)]
    cell = scripts.bench.measure(sides, "unet", 2, "float32")
    assert log == [("pytorch", "prepare"), ("sdjax", "prepare"), *[("sdjax", "measure"), ("pytorch", "measure")] * 2]
    assert cell["flops"] == 6
    assert cell["sides"]["sdjax"]["seconds"] == [3.0, 1.0]
    assert cell["sides"]["sdjax"]["error"] == pytest.approx(0.001 / 2.001)


@pytest.mark.parametrize("wrong", [[1.0, 2.1], [1.0, np.nan], [1.0]])
def test_a_wrong_result_ends_the_run(scripts, wrong):
    sides = [StandIn("sdjax", wrong, [], []), StandIn("pytorch", [1.0, 2.0], [], [])]
    with pytest.raises(ArithmeticError, match="unet in float32: not PyTorch's result"):
        scripts.bench.measure(sides, "unet", 1, "float32")


def found(*seconds, peak, error=0.0):
    return {"seconds": seconds, "peak": peak, "first": 30.0, "error": error, "layouts": {}}


def test_tables(scripts):
    layouts = {"unet": {"contiguous": 12.0, "channels_last": 11.0}}
    sides = {
        "sdjax": found(9.0, 8.0, 20.0, peak=4.4e9, error=2e-6),
        "pytorch": found(12.0, 11.0, 11.5, peak=4e9) | {"layouts": layouts},
        "torch.compile": found(10.8, peak=5e9, error=3e-6),
        "flax-0.35": found(22.5, peak=9e9, error=3e-6),
    }
    matmul = {"flops": 100, "sides": {"sdjax": found(0.25, 0.5, peak=1)}}
    text = scripts.table.tables({"float32": {"matmul": matmul, "unet": {"flops": 1800, "sides": sides}}})
    assert "| float32 | unet | sdjax | 9 | 8-20 | 30 | 4.40 | 2.0e-06 | 50% |" in text
    assert "| float32 | unet | pytorch channels_last | 11.5 | 11-12 | 30 | 4.00 | 0.0e+00 | 39% |" in text
    assert "| float32 | unet | 1.20 | 1.10 | 2.50 |" in text


def test_what_is_measured_again_is_replaced_and_the_rest_stays(scripts, tmp_path):
    path = tmp_path / "bench.json"
    scripts.bench.Record(path, "sd15", "cpu").add("float32", "unet", {"flops": 1})
    scripts.bench.Record(path, "sd15", "cpu").add("float32", "vae", {"flops": 2})
    scripts.bench.Record(path, "sd15", "cpu").add("float32", "unet", {"flops": 3})
    kept = json.loads(path.read_text())
    assert kept["results"] == {"float32": {"unet": {"flops": 3, "run": 2}, "vae": {"flops": 2, "run": 1}}}
    assert kept["runs"][0]["machine"]["cores"] > 0
    with pytest.raises(ValueError, match=r"bench\.json: holds results of sd15 on cpu"):
        scripts.bench.Record(path, "narrow", "cpu")


def test_random_weights_are_a_folder_that_both_load(scripts, tmp_path):
    size = scripts.full_size.Size(
        {
            "sample_size": 8,
            "block_out_channels": (8, 8),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
        },
        {"block_out_channels": (8,), "norm_num_groups": 4},
        {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1},
    )
    scripts.full_size.write_pipeline(size, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    ours = sdjax.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert ours.tokenizer(["a horse"])[0].tolist() == theirs.tokenizer("a horse", padding="max_length").input_ids
    kernel = ours.unet.conv_in.kernel[...]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), theirs.unet.conv_in.weight.detach().numpy())
    assert np.std(kernel) == pytest.approx((4 * 3 * 3) ** -0.5, rel=0.2)


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
        scripts.bench.parse(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help_says_what_a_machine_with_a_gpu_needs(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts.bench.parse(["--help"])
    said = capsys.readouterr().out
    assert all(text in said for text in ("--no-index --find-links wheels", "--device gpu", "--peer-python"))
