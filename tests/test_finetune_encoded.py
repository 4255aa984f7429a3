"""Fine-tuning on what `encode` made: the same step as from pixels, the pipelines' own contexts, and nothing else moved."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanodiffusion.cli import main
from nanodiffusion.config import make
from nanodiffusion.data import load_data
from nanodiffusion.data.encoded import read_manifest
from nanodiffusion.distributed import World
from nanodiffusion.encode import EncodeConfig, Encoder
from nanodiffusion.errors import UserError
from nanodiffusion.finetune import FINETUNES
from nanodiffusion.finetune.encoded import ready_made
from nanodiffusion.memory import tensors_of, training_peak
from nanodiffusion.objective import make_density
from nanodiffusion.pretrained.load import is_checkpoint
from nanodiffusion.runner import Runner
from nanodiffusion.train import Trainer
from tests import sd_files
from tests.test_encode import contents, encode, picture, program, write_codec, write_shards
from tests.test_finetune import config_of
from tests.tiny import differences

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = "a photo of a cat and a dog by the sea " * 12  # more than 75 tokens
CAPTIONS = ("a photo of a cat", "a red dog", LONG, "", "the sea", "a house by the sea")
SIZES = ((64, 64), (64, 64), (64, 64), (64, 64), (88, 72), (100, 200))  # width, height
EXACT = {"quantise": False, "dtype": "float32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos`, of which the first four need no crop and the last says that it was larger."""
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "photos").mkdir()
    for i, (caption, size) in enumerate(zip(CAPTIONS, SIZES)):
        picture(i, *size).save(folder / f"photos/{i}.png")
        if caption:
            (folder / f"photos/{i}.txt").write_text(caption)
    (folder / "photos/5.json").write_text('{"original_height": 1000, "original_width": 500}')
    return folder


def encoded(place: Path, family: str = "sd1", **more: Any) -> Path:
    """The photos encoded for a tiny checkpoint, at the first call with these options."""
    out = place / "-".join([family, *(f"{k}={Path(str(v)).name}" for k, v in more.items())])
    base = str(sd_files.tree(family))
    options = {"source": str(place / "photos"), "codec": base, "text": base, "size": 64, "batch": 4, "part": 4}
    encode(out, **{**options, **EXACT, **more})
    return out


def data_of(folder: Path, **options: Any) -> Any:
    """The data set in a folder."""
    return load_data("encoded", path=str(folder), **options)


def model_of(task: str, family: str = "sd1", **more: Any) -> tuple[Any, Any, Any]:
    """The task, its config, and the model on a tiny checkpoint."""
    config = config_of(task, family, cond_dropout=0.5, **more)
    row = make(FINETUNES, config.task, "task")()
    torch.manual_seed(config.seed)
    return row, config, row.model(config)


def trainer_of(data: Any, task: str, family: str = "sd1", **more: Any) -> Trainer:
    """The loop of a task on a tiny checkpoint and a data set."""
    row, config, model = model_of(task, family, **more)
    return Trainer(model, row.prepared(data, model), make_density(config), config)


def pixels(place: Path) -> Any:
    """The photos themselves, those that need no crop."""
    return load_data("pictures", path=str(place / "photos"), size=64, captions=False).take(torch.arange(4))


def pipeline(family: str) -> Any:
    """The checkpoint as diffusers loads it."""
    import diffusers

    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    return kind.from_pretrained(sd_files.tree(family))


# ---- what is written


@pytest.mark.parametrize("family", [pytest.param("sd1", marks=pytest.mark.slow), "sdxl"])
def test_contexts_are_those_that_the_pipeline_makes_of_the_prompts_and_of_none(place, family):
    folder, pipe = encoded(place, family), pipeline(family)
    spoken = [i for i, caption in enumerate(CAPTIONS) if caption]
    given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        context, nothing, *pooled = pipe.encode_prompt([CAPTIONS[i] for i in spoken], **given)
    expected = {"context": (context, nothing[0])} | ({"pooled": (pooled[0], pooled[1][0])} if pooled else {})
    for name, (said, empty) in expected.items():
        rows = torch.from_numpy(np.load(folder / f"{name}.npy"))
        torch.testing.assert_close(rows[spoken], said, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rows[3], empty, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.from_numpy(np.load(folder / f"empty-{name}.npy")), empty, rtol=1e-5, atol=1e-5)
        assert family == "sd1" or not empty.any()
    assert (folder / "pooled.npy").exists() is (folder / "sizes.npy").exists() is (family == "sdxl")
    row, _, model = model_of("lora", family)
    own = model.nothing()
    _, cond = row.prepared(data_of(folder), model).batch(torch.arange(2))
    dropped = model.unconditional(cond)
    assert dropped.keys() == cond.keys()
    for name, (_, empty) in expected.items():
        torch.testing.assert_close(dropped[name], empty.expand(2, *empty.shape), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own[name][0], empty, rtol=1e-5, atol=1e-5)


def test_sizes_are_those_before_any_preparation_and_the_place_of_the_square(place):
    sizes = np.load(encoded(place, "sdxl") / "sizes.npy")
    same = [64, 64, 0, 0, 64, 64]
    assert sizes.tolist() == [same, same, same, same, [72, 88, 0, 7, 64, 64], [1000, 500, 32, 0, 64, 64]]


def test_contexts_are_of_half_precision_unless_a_dtype_is_asked_for(place):
    folder = encoded(place, quantise=True, dtype="float16", flip=True)
    rows, exact = np.load(folder / "context.npy"), np.load(encoded(place) / "context.npy")
    assert rows.dtype == np.float16 and np.load(folder / "latents.npy").dtype == np.uint8
    np.testing.assert_array_equal(rows, exact.astype(np.float16))
    manifest = read_manifest(folder)
    assert manifest["context"] == {"file": "context.npy", "shape": list(exact.shape[1:])}
    assert {"context.npy", "empty-context.npy"} <= manifest["files"].keys()
    data = data_of(folder, flip=True, verify=True)
    x0, cond = data.batch(torch.arange(6), torch.tensor([[0.1], [0.9]] * 3))
    torch.testing.assert_close(cond["context"], torch.from_numpy(rows).float(), rtol=0, atol=0)
    plain, _ = data.batch(torch.arange(6))
    assert [bool((a != b).any()) for a, b in zip(x0, plain)] == [True, False] * 3


def test_a_call_that_fails_on_the_way_goes_on_to_the_same_bytes(place, tmp_path, monkeypatch):
    from nanodiffusion.encode import encoder

    options = {"source": str(place / "photos"), "codec": str(sd_files.tree("sdxl")), "text": str(sd_files.tree("sdxl"))}
    options |= {"size": 64, "batch": 2, "part": 2}
    encode(tmp_path / "whole", **options)
    save, left = encoder.save_tensors, iter([True, True])

    def failing(*args: Any) -> None:
        next(left)
        save(*args)

    monkeypatch.setattr(encoder, "save_tensors", failing)
    with pytest.raises(StopIteration):
        encode(tmp_path / "cut", **options)
    monkeypatch.undo()
    encode(tmp_path / "cut", **options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_killed_thirty_times_and_shared_by_two_processes_it_makes_the_same_bytes(tmp_path):
    folder = tmp_path / "place"
    write_shards(folder / "shards")
    write_codec(folder / "codec")
    options = {"source": str(folder / "shards"), "codec": str(folder / "codec"), "text": str(sd_files.tree("sdxl"))}
    options |= {"size": 16, "batch": 2, "part": 4, "flip": True}
    encode(folder / "whole", **options)
    counts = program(folder, tmp_path, kills=30, options=options)
    assert counts["at_sync"] >= 10 and counts["timed"] >= 5 and counts["finished"] >= 1


def test_a_name_on_the_hub_says_by_its_files_whether_it_is_a_whole_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, folder in (("base", sd_files.tree("sd1")), ("clip", sd_files.tree("sd1") / "text_encoder")):
        (tmp_path / f"models--own--{name}/snapshots").mkdir(parents=True)
        (tmp_path / f"models--own--{name}/refs").mkdir()
        (tmp_path / f"models--own--{name}/refs/main").write_text("abc")
        (tmp_path / f"models--own--{name}/snapshots/abc").symlink_to(folder)
    assert is_checkpoint("own/base") and not is_checkpoint("own/clip")


# ---- the step


def gradients(trainer: Trainer) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the first batch of four, of which some go without their caption, and latents are the mean."""
    g = torch.Generator().manual_seed(1)
    (draw,) = trainer.draw()
    keep = torch.tensor([True, False, True, True])
    draw = draw._replace(index=torch.arange(4), eps=torch.randn(4, 4, 8, 8, generator=g), u=None, keep=keep)
    loss = trainer.losses(draw).mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainer.denoiser.net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("lora", "sd1"),
        pytest.param("lora", "sdxl", marks=pytest.mark.slow),
        *(pytest.param("text_to_image", family, marks=pytest.mark.slow) for family in ("sd1", "sdxl")),
        *(pytest.param("lcm", family, marks=pytest.mark.slow) for family in ("sd1", "sdxl")),
    ],
)
def test_a_step_has_the_loss_and_the_gradients_of_the_one_from_pixels(place, task, family):
    ready = data_of(encoded(place, family)).take(torch.arange(4))
    (loss, ours), (expected, theirs) = (gradients(trainer_of(data, task, family)) for data in (ready, pixels(place)))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    magnified = 20 if task == "lcm" else 1  # rounding, by a pseudo-Huber distance of what is nearly the same
    top = max(float(grad.abs().max()) for grad in theirs.values())
    for name, grad in theirs.items():
        atol = 2e-5 * magnified * top
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_pictures_on_the_way_are_those_of_a_run_on_pixels(place, family):
    drawn = []
    for data in (data_of(encoded(place, family)), pixels(place)):
        row, config, model = model_of(
            "lora", family, sample={**config_of("lora").sample.__dict__, "prompts": ["a cat", LONG]}
        )
        prepared = row.prepared(data, model)
        fixed = row.fixed(config, model, prepared)
        drawn.append(row.pictures(model, config, prepared.shape, fixed, range(4)))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)


def test_codec_and_text_encoders_stay_behind_when_the_model_is_moved(place):
    row, _, model = model_of("lora")
    row.prepared(data_of(encoded(place)), model)
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    behind = [*model.codec.parameters(), *model.reader.parameters()]
    assert len(behind) > 20 and {p.device.type for p in behind} == {"cpu"}
    mine = {id(p) for p in model.parameters()}
    assert not mine & {id(p) for p in behind}


@pytest.mark.slow
def test_a_step_s_memory_is_less_by_the_weights_of_codec_and_text_encoders(place):
    row, _, model = model_of("lora")
    new = lambda *shape: torch.zeros(*shape, device="meta")
    loss = lambda ghost: ghost.loss(new(1, 4, 8, 8), new(1), new(1, 4, 8, 8), {"context": new(1, 77, 64)}).mean()
    weights = sum(t.nbytes for part in (model.codec, model.reader) for t in tensors_of(part))
    before = training_peak(model, loss)
    row.prepared(data_of(encoded(place)), model)
    assert before - training_peak(model, loss) == weights > 1e5


@pytest.mark.slow
def test_a_recipe_takes_what_the_command_encoded(place, tmp_path):
    base, out = str(sd_files.tree("sdxl")), str(tmp_path / "latents")
    words = [str(place / "photos"), f"out={out}", f"codec={base}", f"text={base}", "size=64", "flip=true"]
    assert main(["encode", *words, "device=cpu"]) == 0
    data = f"data={{name: encoded, path: {out}, flip: true}}"
    small = ["steps=1", "batch_size=2", "sample.n=2", "sample.steps=2", "precision=fp32", "device=cpu"]
    assert main(["train", "sdxl-lora", f"task.base={base}", data, *small, f"out={tmp_path}", "name=run"]) == 0
    assert (tmp_path / "run/lora.safetensors").is_file() and (tmp_path / "run/samples.png").is_file()


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_with_the_same_bits_and_shows_pictures(place, tmp_path):
    folder = encoded(place, quantise=True, dtype="float16", flip=True)
    data = {"name": "encoded", "path": str(folder), "flip": True}

    def run(name: str, *ends: int) -> Path:
        for steps in ends:
            more = {"lr": 1e-3, "validation": 0.4, "validate_every": 1, "log_every": 1, "sample_every": 2}
            config = config_of("lora", data=data, steps=steps, out=str(tmp_path), name=name, **more)
            assert Runner(config, World(), say=lambda _: None).run() == "done"
        return tmp_path / name

    assert not differences(run("whole", 2), run("stopped", 1, 2))
    left = {file.relative_to(tmp_path / "whole").as_posix() for file in (tmp_path / "whole").rglob("*.*")}
    assert {"lora.safetensors", "samples/step-00000002-raw.png", "pictures.safetensors"} <= left


# ---- what is refused


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("controlnet", {}, "reads pictures"),
        ("inpaint", {}, "reads pictures"),
        *(
            pytest.param(task, {}, "reads pictures", marks=pytest.mark.slow)
            for task in ("adapter", "inpaint_by_tokens")
        ),
        ("lora", {"task_targets": ["unet", "text"]}, r"task\.targets=\[unet\]"),
        ("textual_inversion", {}, "reading captions"),
    ],
)
def test_a_task_that_needs_what_was_left_out_is_one_message(place, task, more, said):
    row, _, model = model_of(task, **more)
    with pytest.raises(UserError, match=said) as caught:
        row.prepared(data_of(encoded(place)), model)
    assert caught.value.details["key"] == "data.name" and caught.value.details["fix"]


def test_a_set_for_another_checkpoint_is_one_message(place):
    _, _, model = model_of("lora")
    data = data_of(encoded(place))
    others = {
        "no contexts": (
            data_of(encoded(place, text="words:8", dtype="float16", quantise=True)),
            "told of these latents",
        ),
        "codec": (data_of(encoded(place, codec=str(sd_files.part("vae", "sdxl")))), "another kind"),
        "texts of another size": (data_of(encoded(place, text=str(sd_files.tree("sdxl")))), "other text encoders"),
        "texts": (replace(data, context=data.context + 0.2 * data.context.std()), "other text encoders"),
        "outpaint": (data_of(encoded(place), outpaint=0.5), "outpaints"),
    }
    for other, said in others.values():
        with pytest.raises(UserError, match=said):
            ready_made(other, model)
    assert ready_made(data, model) is data


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("text={base}/text_encoder/model.safetensors", "no whole checkpoint"),
        ("text={base} dtype=int8", "dtype"),
        ("text=words:8 dtype=float32", "not quantised"),
        ("text={base}/nothing", "no such model"),
    ],
)
def test_a_mistake_in_the_command_is_one_message(place, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = words.format(base=sd_files.tree("sd1"))
    given = ["encode", str(place / "photos"), f"out={tmp_path / 'x'}", f"codec={sd_files.tree('sd1')}", "device=cpu"]
    assert main([*given, *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) <= 6


@pytest.mark.parametrize(
    ("text", "more", "expected"),
    [
        ("{base}", {}, (0, False)),
        ("{base}", {"quantise": True}, (0, True)),
        ("{base}", {"limit": 20.0, "size": 48}, (48, True)),
        ("words:8", {}, (256, True)),
        ("", {"quantise": False}, (256, False)),
    ],
)
def test_for_a_checkpoint_pictures_have_its_size_and_latents_are_floats_unless_something_else_is_asked_for(
    place, tmp_path, text, more, expected
):
    base = sd_files.tree("sd1")
    side = json.loads((base / "unet/config.json").read_text())["sample_size"]
    natural = side * 2 ** (len(json.loads((base / "vae/config.json").read_text())["block_out_channels"]) - 1)
    config = EncodeConfig(str(place / "photos"), str(base), text.format(base=base), **more)
    chosen = Encoder(config, tmp_path / "x", World()).config
    assert (chosen.size, chosen.quantise) == (expected[0] or natural, expected[1])


def test_a_set_for_sdxl_without_sizes_is_one_message(place):
    row, config, model = model_of("lora", "sdxl")
    data = row.prepared(replace(data_of(encoded(place, "sdxl")), sizes=None), model)
    trainer = Trainer(model, data, make_density(config), config)
    with pytest.raises(UserError, match="lacks"):
        trainer.conditions(data.batch(torch.arange(2))[1])


def test_a_picture_whose_json_says_no_size_is_left_out_and_listed(tmp_path):
    for i, said in enumerate(({}, {"original_height": "x", "original_width": 3})):
        picture(i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.json").write_text(json.dumps(said))
    encode(tmp_path / "x", source=str(tmp_path), size=16)
    assert (tmp_path / "x/faults.txt").read_text().startswith("1.png: original_height")
