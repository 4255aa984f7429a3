"""The benchmarks of the SD family run, and both sides compute the same: a typo must not wait for a lent GPU to be found."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench, latent, latent_quality, loader, quality, sd, training_memory
from nanodiffusion.nets import build_net, net_size


@pytest.fixture(autouse=True)
def _settings_stay():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("config", [sd.SD15, sd.SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("side", ["ours", "ours untuned", "diffusers best"])
def test_every_side_s_unet_is_the_same_net(side, config):
    run = lambda side: sd.unet("cpu", side, "fp32", config, latent=8, tiny=True).run()
    assert sd.relative(run(side), run("diffusers")) < 1e-5


@pytest.mark.parametrize("case", [sd.decode, sd.text])
@pytest.mark.parametrize("side", ["ours", "diffusers best"])
def test_every_side_s_codec_and_text_encoder_are_the_same(side, case):
    run = lambda side: case("cpu", side, "fp32", tiny=True).run()
    assert sd.relative(run(side), run("diffusers")) < 1e-5


@pytest.mark.parametrize("side", ["ours", "diffusers", "diffusers best"])
def test_the_runs_of_the_gpu_benchmark_make_a_picture(side):
    (picture,) = sd.sdxl_run("cpu", side, size=64, steps=2, tiny=True).run()
    assert picture.size == (64, 64) or picture.size == (16, 16)  # the tiny codec halves once


@pytest.mark.parametrize("side", ["ours", "diffusers"])
def test_the_small_run_makes_a_picture(side):
    (picture,) = sd.small_run("cpu", side, size=64, steps=2).run()
    assert picture.size == (64, 64)


def test_every_side_is_a_case():
    named = [case for b in bench.stable_diffusion().values() for group in b.groups.values() for case in group.values()]
    assert all(case.split()[0] == "sd" and case.split()[1] in sd.CASES for case in named)


@pytest.mark.parametrize("gate", sd.GATES)
def test_the_gate_measures_rounding(gate):
    errors = sd.accuracy(gate, tiny=True)
    assert all(0 < e < (1e-5 if side.endswith("fp32") else 0.1) for side, e in errors.items())


@pytest.mark.parametrize("name", ["pixart", "tld"])
def test_the_plain_latent_transformers_have_the_size_of_ours(name):
    net = {"pixart": latent.PIXART, "tld": latent.TLD}[name]
    with torch.device("meta"):
        ours, plain = net_size(build_net(**net)), net_size(latent.PLAIN[name]())
    assert abs(ours / plain - 1) < 0.002  # the null class and the fixed positions


@pytest.mark.parametrize("name", ["pixart", pytest.param("tld", marks=pytest.mark.slow)])
def test_both_sides_train_a_latent_transformer(name):
    net = latent.TINY[name]
    sides = [latent.ours_train("cpu", net, 64, "fp32"), latent.ours_train("cpu", net, 64, "bf16")]
    for case in [*sides, latent.plain_train("cpu", net, 64)]:
        first, *_, last = [case.run() for _ in range(40)]
        assert (
            0.5 < last < 1.2 * first
        )  # of unit noise or unit samples, neither of which so small a net can learn by heart


def test_both_sides_draw_guided_latents():
    net = latent.TINY["tld"]
    for case in (latent.ours_sample("cpu", "fp32", 2, 3, net), latent.plain_sample("cpu", 2, 3, net)):
        case.run()


def test_every_latent_side_is_a_case():
    named = [c for b in bench.latent_transformers().values() for group in b.groups.values() for c in group.values()]
    assert all(case.split()[0] == "latent" and case.split()[1] in latent.CASES for case in named)


def test_both_loaders_give_the_same_latents(tmp_path):
    file, shards = loader.write_array(tmp_path, 24), loader.write_shards(tmp_path, 24)
    expected = {row.tobytes() for row in np.load(file)}
    for case in (loader.ours(file, 6, True), loader.ours(file, 6, False), loader.theirs(shards, 6)):
        batches = [case.run() for _ in range(4)]
        rows = torch.cat([b if isinstance(b, torch.Tensor) else b[0] for b in batches])
        levels = (rows.double() / loader.LIMIT + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        assert len(rows) == 24 and rows.dtype == torch.float32
        assert {row.tobytes() for row in levels.round().byte().numpy()} <= expected  # the buffer holds several passes


def test_every_loader_side_is_a_case(monkeypatch):
    monkeypatch.setattr(loader, "SAMPLES", 300)
    (sides,) = bench.loader().groups.values()
    assert {case.split()[1] for case in sides.values()} == loader.CASES.keys()
    for build in loader.CASES.values():
        case = build("cpu")
        case.run()
        assert case.units == loader.BATCH


def test_counted_memory_of_a_lora_s_update_is_what_was_measured_of_a_real_one():
    measured = json.loads((training_memory.RESULTS / "training-memory.json").read_text())["real"]["measured_gib"]
    assert training_memory.expected("sd1", "lora", 256, "fp32", False) == pytest.approx(measured, rel=0.15)


# -- quality -----------------------------------------------------------------------------------------------------------

SCRIPTS = [pytest.param(quality, "ours", id="quality"), pytest.param(latent_quality, "modern", id="latent_quality")]


@pytest.mark.parametrize(("script", "side"), SCRIPTS)
def test_a_run_of_another_length_leaves_the_usual_result_alone(script, side, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "measure", lambda side, minutes, *_: {"minutes": minutes})
    monkeypatch.setattr(latent_quality, "prepare", lambda: None)
    kind, usual = script.__name__.split(".")[1].replace("_", "-"), f"{script.MINUTES:g}"
    for minutes in (usual, "0.5"):
        monkeypatch.setattr("sys.argv", [kind, side, "--minutes", minutes])
        script.main()
    found = {file.name: json.loads(file.read_text())["minutes"] for file in tmp_path.iterdir()}
    assert found == {f"{kind}-{side}.json": script.MINUTES, f"{kind}-{side}-0.5min.json": 0.5}


def test_a_run_of_a_changed_recipe_leaves_the_usual_result_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    monkeypatch.setattr(quality, "measure", lambda *_: {})
    monkeypatch.setattr("sys.argv", ["quality", "ours", "lr=1e-4", "data.path=a/b"])
    quality.main()
    assert [file.name for file in tmp_path.iterdir()] == ["quality-ours-lr=1e-4-data.path=a_b.json"]


def test_our_side_of_quality_trains_and_draws_two_thousand_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = "net={name: unet, channels: 8, multipliers: [1], blocks: 1, attention: []}"
    small = ["data=digits", net, "batch_size=4", "sample.steps=2", "precision=fp32"]
    samples, steps = quality.train_ours(0, False, small)
    assert steps == 1 and samples["ema"].shape == (2000, 1, 8, 8) and bool(samples["ema"].isfinite().all())
    assert len(samples["ema"].flatten(1).unique(dim=0)) == 2000


@pytest.mark.parametrize("file", sorted(quality.RESULTS.glob("*quality-*.json")), ids=lambda file: file.stem)
def test_a_result_lies_where_its_command_puts_it(file):
    result, script = json.loads(file.read_text()), latent_quality if file.name.startswith("latent") else quality
    kind = result["command"].split()[2].split(".")[1].replace("_", "-")
    assert file.stem == f"{kind}-{quality.named(result['side'], result['minutes'], script.MINUTES)}"


@pytest.mark.parametrize("file", sorted(Path(bench.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_every_option_that_a_script_s_text_names_is_one(file):
    code = file.read_text()
    said = re.findall(r"(--[a-z][\w-]*)", code.split('"""')[1])
    assert [option for option in said if f'add_argument("{option}"' not in code] == []
