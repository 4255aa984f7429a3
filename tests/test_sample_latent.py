"""`nanodiffusion sample` on runs of latents: decoded pictures, classes and texts from words and files, sizes, walks."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_runs import expected, write_codec, write_run
from PIL import Image
from torch import Tensor

from nanodiffusion.cli import main, pictures
from nanodiffusion.cli import sample as sample_command
from nanodiffusion.pretrained import load_codec
from nanodiffusion.run import load_run
from nanodiffusion.sampler import ImageNoise
from nanodiffusion.tensors import load_tensors, save_tensors
from nanodiffusion.text.pooled import open_text

pytestmark = pytest.mark.usefixtures("one_thread")
CLASSES = ("cat", "dog", "bird")
WHERE = {"out": "", "npz": ".npz", "latents": ".safetensors"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def codec(place: Path) -> Path:
    return write_codec(place / "vae")


@pytest.fixture(scope="module")
def classes(place: Path, codec: Path) -> Path:
    """A run of three classes on latents (4 4 4), decoded to (3 8 8)."""
    return write_run(place / "classes", CLASSES, codec=str(codec))


@pytest.fixture(scope="module")
def texts(place: Path, codec: Path) -> Path:
    """A run that reads texts by a bag of words of 6 features."""
    return write_run(place / "texts", pooled_dim=6, text="words:6", codec=str(codec))


@pytest.fixture(scope="module")
def outpaints(place: Path, codec: Path) -> Path:
    return write_run(place / "outpaints", concat_channels=4, codec=str(codec))


def sample(run: Path, *words: object) -> None:
    assert main(["sample", str(run), *map(str, words)]) == 0


def latents(run: Path, file: Path, *words: object) -> Tensor:
    sample(run, f"latents={file}", *words)
    return load_tensors(file)[0]["x"]


def bytes_of(image: Tensor) -> np.ndarray:
    """(n 3 h w) in [-1, 1] as (n h w 3) uint8."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def labels_of(run: Path, file: Path, *words: object) -> list[int]:
    sample(run, f"npz={file}", "steps=1", *words)
    with np.load(file) as found:
        return found["labels"].tolist()


# ---- pictures


def test_pictures_are_the_decoded_latents_everywhere(classes: Path, codec: Path, tmp_path: Path):
    files = {k: tmp_path / f"x.{k}" for k in ("npz", "safetensors")} | {"out": tmp_path / "each"}
    sample(classes, f"npz={files['npz']}", f"latents={files['safetensors']}", f"out={files['out']}", "n=5", "batch=2")
    x, meta = load_tensors(files["safetensors"])
    assert x["x"].shape == (5, 4, 4, 4) and x["labels"].tolist() == [0, 1, 2, 0, 1]
    assert json.loads(meta["settings"])["n"] == 5
    run = load_run(classes)
    for i in range(5):
        alone = expected(run, i, {"label": torch.tensor([i % 3])})
        torch.testing.assert_close(x["x"][i], alone, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        image = bytes_of(load_codec(codec, device="cpu").decode(x["x"]))
    with np.load(files["npz"]) as found:
        np.testing.assert_allclose(found["arr_0"].astype(int), image.astype(int), atol=1)
        for i, pixels in enumerate(found["arr_0"]):
            np.testing.assert_array_equal(np.asarray(Image.open(files["out"] / f"{i:06d}.png")), pixels)
    settings = json.loads(Image.open(files["out"] / "000004.png").text["nanodiffusion"])  # type: ignore[attr-defined]
    assert (settings["seed"], settings["label"], settings["class"]) == (4, 1, "all")


def test_grids_strips_and_films_show_what_the_codec_makes(classes: Path, tmp_path: Path):
    sample(classes, "n=6", "steps=4", *(f"{k}={tmp_path / k}.{s}" for k, s in (("grid", "png"), ("strip", "png"))))
    sample(classes, "n=6", "steps=4", f"gif={tmp_path / 'a.gif'}", f"npz={tmp_path / 'x.npz'}")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))  # three columns of pictures 64 pixels wide
    assert grid.shape == (2 * 64 + 2, 3 * 64 + 2 * 2, 3)
    with np.load(tmp_path / "x.npz") as found:
        for i, pixels in enumerate(found["arr_0"]):
            top, left = 66 * (i // 3), 66 * (i % 3)
            np.testing.assert_array_equal(grid[top : top + 64 : 8, left : left + 64 : 8], pixels)
    assert Image.open(tmp_path / "a.gif").n_frames == 4  # type: ignore[attr-defined]


def test_another_codec_takes_the_place_of_the_runs_own(place: Path, codec: Path, classes: Path, tmp_path: Path):
    bare = write_run(place / "bare", CLASSES)
    sample(bare, f"npz={tmp_path / 'x.npz'}", f"codec={codec}")
    sample(classes, f"npz={tmp_path / 'y.npz'}")
    with np.load(tmp_path / "x.npz") as one, np.load(tmp_path / "y.npz") as other:
        np.testing.assert_array_equal(one["arr_0"], other["arr_0"])
    assert latents(bare, tmp_path / "x.safetensors").shape == (4, 4, 4, 4)  # which need no codec


def test_latents_as_npz_are_those_of_the_safetensors(classes: Path, tmp_path: Path):
    x = latents(classes, tmp_path / "x.safetensors", "n=5", "batch=2")
    sample(classes, f"latents={tmp_path / 'x.npz'}", "n=5", "batch=2")
    with np.load(tmp_path / "x.npz") as found:
        np.testing.assert_array_equal(found["x"], x.numpy())
        assert found["labels"].tolist() == [0, 1, 2, 0, 1]


def test_what_was_interrupted_goes_on_and_draws_each_batch_once(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ["n=9", "batch=2", "steps=2"]
    kinds = (("npz", "x.npz"), ("latents", "x.safetensors"), ("out", "each"))
    sample(classes, *words, *(f"{key}={tmp_path / 'whole' / name}" for key, name in kinds))
    states, drawn = sample_command.Job.states, []

    def some(self, start=0, stop=None):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(start)
        return states(self, start, stop)

    monkeypatch.setattr(sample_command.Job, "states", some)
    again = ["sample", str(classes), *words, *(f"{key}={tmp_path / 'parts' / name}" for key, name in kinds)]
    assert main(again) == 130
    drawn.clear()
    assert main(again) == 0
    assert drawn == [6, 8]
    for name in ("x.npz", "x.safetensors", *(f"each/{i:06d}.png" for i in range(9))):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "parts").iterdir())) == 3
    drawn.clear()
    assert main(again) == 0
    assert drawn == []


def test_a_folder_takes_more_pictures_but_none_made_otherwise(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    each, words = tmp_path / "each", [f"out={tmp_path / 'each'}"]
    sample(classes, "n=2", *words)
    (each / "000000.png").unlink()  # any of them will do
    sample(classes, "n=3", *words)
    before = {file.name: file.read_bytes() for file in each.iterdir()}
    assert sorted(before) == ["000000.png", "000001.png", "000002.png"]
    for other, key in (("seed=7", "seed"), ("steps=1", "steps"), ("class=[1,0,2]", "class, label")):
        assert main(["sample", str(classes), "n=5", *words, other]) == 2
        said = capsys.readouterr().err
        assert f"key {key}" in said and "another out=" in said
    assert {file.name: file.read_bytes() for file in each.iterdir()} == before
    (each / "000000.png").unlink()
    Image.new("RGB", (8, 8)).save(each / "000000.png")
    assert main(["sample", str(classes), "n=5", *words]) == 2
    assert "carries no settings" in capsys.readouterr().err


def test_pictures_of_another_codec_or_encoder_are_never_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    codec, npz = write_codec(tmp_path / "vae"), tmp_path / "x.npz"
    run = write_run(tmp_path / "run", pooled_dim=6, text="words:6", codec=str(codec))
    places = [f"npz={npz}", f"out={tmp_path / 'each'}"]
    for place in places:
        sample(run, "text=a cat", place)
    weights = load_tensors(codec / "diffusion_pytorch_model.safetensors")[0]
    weights["decoder.conv_out.bias"] = weights["decoder.conv_out.bias"] + 1
    save_tensors(codec / "diffusion_pytorch_model.safetensors", weights, {})
    for place in places:
        assert main(["sample", str(run), "text=a cat", place]) == 2
        assert "key codec_sha256" in capsys.readouterr().err


def test_sharpness_and_brightness_shift_the_last_latent(classes: Path, tmp_path: Path):
    x = latents(classes, tmp_path / "x.safetensors")
    moved = latents(classes, tmp_path / "y.safetensors", "sharpness=0.5", "brightness=-0.25")
    torch.testing.assert_close(
        moved - x, torch.tensor([-0.25, 0, 0, 0.5])[:, None, None].expand_as(x), atol=1e-6, rtol=0
    )


def test_image_to_image_starts_from_the_encoded_picture(classes: Path, codec: Path, tmp_path: Path):
    start = tmp_path / "start.png"
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(start)
    weak = ["ladder=exponential", "ladder.sigma_min=0.0001", "ladder.sigma_max=0.0002", "strength=0.5", "steps=2"]
    x = latents(classes, tmp_path / "x.safetensors", "n=2", f"image={start}", *weak)
    image = torch.from_numpy(np.asarray(Image.open(start)).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(x, load_codec(codec, device="cpu").encode(image).expand_as(x), rtol=0, atol=0.005)


def test_samples_from_another_picture_of_the_same_name_are_others(
    classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    start, words = tmp_path / "start.png", ["n=1", "steps=2", f"image={tmp_path / 'start.png'}"]
    for level in (0, 200):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(start)
        codes = [main(["sample", str(classes), *words, f"{key}={tmp_path / key}{end}"]) for key, end in WHERE.items()]
        assert codes == ([2] * 3 if level else [0] * 3)
    assert capsys.readouterr().err.count("key image_sha256") == 3


# ---- classes


@pytest.mark.parametrize(
    ("text", "words", "labels"),
    [
        ("- bird\n- 0\n- dog\n", [], [2, 0, 1]),
        ("[cat, dog]", ["n=5"], [0, 1, 0, 1, 0]),
        ("{dog: 2, 2: 1, cat: 3}", [], [1, 1, 2, 0, 0, 0]),
        ("{dog: 2, cat: 1}", ["n=3"], [1, 1, 0]),
        ("[null, 1]", [], [3, 1]),
        ("dog\n\n  2\ncat\n", [], [1, 2, 0]),
    ],
)
def test_classes_come_from_a_file(classes: Path, tmp_path: Path, text: str, words: list[str], labels: list[int]):
    file = tmp_path / ("classes.txt" if text.startswith("dog") else "classes.yaml")
    file.write_text(text)
    assert labels_of(classes, tmp_path / "x.npz", f"class={file}", *words) == labels


def test_many_images_of_a_file_go_into_a_folder(classes: Path, tmp_path: Path):
    (tmp_path / "many.yaml").write_text("{cat: 9, bird: 4}")
    sample(classes, f"class={tmp_path / 'many.yaml'}", f"out={tmp_path / 'each'}", "steps=1", "batch=5")
    told = [json.loads(Image.open(p).text["nanodiffusion"]) for p in sorted((tmp_path / "each").iterdir())]  # type: ignore[attr-defined]
    assert [t["label"] for t in told] == [0] * 9 + [2] * 4
    assert [t["seed"] for t in told] == list(range(13))
    assert told[0]["class"]["file"] == "many.yaml" and len(told[0]["class"]["sha256"]) == 64


# ---- texts


def pooled(*words: str) -> Tensor:
    return open_text("words:6").encode(list(words))


def test_texts_come_from_words_lists_and_files(texts: Path, tmp_path: Path):
    (tmp_path / "t.txt").write_text("a cat\n\na red dog\n")
    (tmp_path / "t.yaml").write_text("{a cat: 1, a red dog: 1}")
    run, both = load_run(texts), ("a cat", "a red dog")
    want = torch.stack([expected(run, i, {"pooled": pooled(both[i])}) for i in range(2)])
    for i, word in enumerate(("text=[a cat,a red dog]", f"text={tmp_path / 't.txt'}", f"text={tmp_path / 't.yaml'}")):
        x = latents(texts, tmp_path / f"{i}.safetensors", word, "n=2")
        torch.testing.assert_close(x, want, rtol=1e-4, atol=1e-4)
    one = latents(texts, tmp_path / "one.safetensors", "text=a cat, and a dog", "n=3", "batch=2")
    alone = torch.stack([expected(run, i, {"pooled": pooled("a cat, and a dog")}) for i in range(3)])
    torch.testing.assert_close(one, alone, rtol=1e-4, atol=1e-4)


def test_no_text_is_zeros_and_pictures_say_their_text(texts: Path, tmp_path: Path):
    x = latents(texts, tmp_path / "x.safetensors", "text=null", "n=1")
    torch.testing.assert_close(x[0], expected(load_run(texts), 0, {"pooled": torch.zeros(1, 6)}), rtol=1e-4, atol=1e-4)
    sample(texts, "text=[a cat,a dog]", "n=3", f"out={tmp_path / 'each'}", "steps=1")
    told = [json.loads(Image.open(p).text["nanodiffusion"])["text"] for p in sorted((tmp_path / "each").iterdir())]  # type: ignore[attr-defined]
    assert told == ["a cat", "a dog", "a cat"]


def test_a_run_of_prompts_draws_those_when_no_text_is_given(place: Path, codec: Path, tmp_path: Path):
    run = write_run(place / "prompted", pooled_dim=6, text="words:6", codec=str(codec))
    save_tensors(run / "pictures.safetensors", {"pooled": pooled("a cat", "a dog")}, {"prompts": ["a cat", "a dog"]})
    x = latents(run, tmp_path / "x.safetensors", "n=3")
    given = latents(run, tmp_path / "y.safetensors", "n=3", "text=[a cat,a dog]")
    torch.testing.assert_close(x, given, rtol=0, atol=0)


def test_a_negative_text_is_what_guidance_leads_away_from(texts: Path, tmp_path: Path):
    """One Euler step of D = D_n + w (D_c - D_n) to 0 gives D itself."""
    steps = ["steps=1", "n=1", "text=a cat"]
    plain = {
        word: latents(texts, tmp_path / f"{word}.safetensors", "steps=1", "n=1", f"text={word}")
        for word in ("cat", "fog")
    }
    none = latents(texts, tmp_path / "none.safetensors", "steps=1", "n=1", "text=null")
    cat = latents(texts, tmp_path / "a.safetensors", *steps)
    away = latents(texts, tmp_path / "b.safetensors", *steps, "guidance=3", "negative=fog")
    torch.testing.assert_close(away, 3 * cat - 2 * plain["fog"], rtol=1e-4, atol=1e-4)
    guided = latents(texts, tmp_path / "c.safetensors", *steps, "guidance=3")
    torch.testing.assert_close(guided, 3 * cat - 2 * none, rtol=1e-4, atol=1e-4)


def test_another_encoder_reads_the_texts_of_a_run_that_names_none(place: Path, texts: Path, tmp_path: Path):
    bare = write_run(place / "wordless", pooled_dim=6)
    x = latents(bare, tmp_path / "x.safetensors", "text=a cat", "encoder=words:6")
    torch.testing.assert_close(x, latents(texts, tmp_path / "y.safetensors", "text=a cat"), rtol=0, atol=0)


# ---- trajectories, frames


def test_trajectories_show_each_class_from_its_noise_to_its_image(
    classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict = {}
    decoded = pictures.decoded
    monkeypatch.setattr(
        pictures, "decoded", lambda run, state: seen.setdefault(len(seen), state) and decoded(run, state)
    )
    sample(classes, f"trajectories={tmp_path / 't.png'}", "steps=15", "n=9")
    levels = [float(s.sigma_next) for s in seen.values()]
    assert len(levels) == 11 and levels == sorted(levels, reverse=True) and levels[-1] == 0
    torch.testing.assert_close(seen[0].x, levels[0] * ImageNoise(range(3)).draw(4, 4, 4), rtol=1e-6, atol=1e-6)
    final = latents(classes, tmp_path / "x.safetensors", "steps=15", "n=3")
    torch.testing.assert_close(seen[10].x, final, rtol=1e-4, atol=1e-4)
    assert [float(s.sigma) for s in seen.values()] == sorted({float(s.sigma) for s in seen.values()}, reverse=True)
    picture = Image.open(tmp_path / "t.png")
    assert picture.size == (36 + 11 * 66 - 2, 2 * (20 + 3 * 66 - 2))  # two bands of 3 x 11


def test_frames_go_from_class_to_class(classes: Path, tmp_path: Path):
    frames = latents(classes, tmp_path / "f.safetensors", "class=[cat,bird]", "frames=3", "seed=5", "steps=1")
    ends = [latents(classes, tmp_path / f"{i}.safetensors", f"class={i}", "n=1", "seed=5", "steps=1") for i in (0, 2)]
    torch.testing.assert_close(frames[[0]], ends[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frames[[2]], ends[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frames[[1]], (ends[0] + ends[1]) / 2, rtol=1e-4, atol=1e-4)


def test_frames_go_from_text_to_text_on_a_straight_line(texts: Path, tmp_path: Path):
    words = ["text=[a cat,a dog,a red bird]", "frames=5", "batch=2"]
    frames = latents(texts, tmp_path / "f.safetensors", *words)
    run, keys = load_run(texts), pooled("a cat", "a dog", "a red bird")
    way = [keys[0], keys[:2].mean(0), keys[1], keys[1:].mean(0), keys[2]]
    want = torch.stack([expected(run, 0, {"pooled": row[None]}) for row in way])
    torch.testing.assert_close(frames, want, rtol=1e-4, atol=1e-4)
    sample(texts, *words, f"gif={tmp_path / 'w.gif'}", f"grid={tmp_path / 'w.png'}")
    assert Image.open(tmp_path / "w.gif").n_frames == 5  # type: ignore[attr-defined]


def test_the_noise_of_frames_goes_along_a_great_circle(outpaints: Path, classes: Path, tmp_path: Path):
    """From seed to seed + 1 the noise has the length of its ends, and turns at a constant rate."""
    job = sample_command.open_job(
        str(classes),
        *sample_command.read_words(["class=1", "frames=5", "noise=slerp", "seed=2"]),
        sample_command_world(),
    )
    noise = job.noise.flatten(1).double()  # type: ignore[union-attr]
    a, b = (ImageNoise([seed]).draw(4, 4, 4).flatten().double() for seed in (2, 3))
    angle = math.acos(float(a @ b / (a.norm() * b.norm())))
    for i, w in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        want = (math.sin((1 - w) * angle) * a + math.sin(w * angle) * b) / math.sin(angle)
        torch.testing.assert_close(noise[i], want, rtol=1e-5, atol=1e-6)
    frames = latents(classes, tmp_path / "f.safetensors", "class=1", "frames=5", "noise=slerp", "seed=2")
    for i, seed in ((0, 2), (4, 3)):
        end = latents(classes, tmp_path / f"{i}.safetensors", "class=1", "n=1", f"seed={seed}")
        torch.testing.assert_close(frames[[i]], end, rtol=1e-4, atol=1e-4)


def sample_command_world():
    from nanodiffusion.distributed import World

    return World()


# ---- sizes, panoramas


@pytest.mark.parametrize(("size", "shape"), [("16x24", (8, 12)), ("[12,8]", (6, 4)), ("16", (8, 8)), ("8x8", (4, 4))])
def test_another_size_is_drawn_whole(classes: Path, tmp_path: Path, size: str, shape: tuple[int, int]):
    sample(classes, f"size={size}", f"npz={tmp_path / 'x.npz'}", f"latents={tmp_path / 'x.safetensors'}", "n=2")
    assert load_tensors(tmp_path / "x.safetensors")[0]["x"].shape == (2, 4, *shape)
    with np.load(tmp_path / "x.npz") as found:
        assert found["arr_0"].shape == (2, 2 * shape[0], 2 * shape[1], 3)
    if size == "8x8":
        plain = latents(classes, tmp_path / "y.safetensors", "n=2")
        torch.testing.assert_close(load_tensors(tmp_path / "x.safetensors")[0]["x"], plain, rtol=0, atol=0)


def test_a_panorama_is_written_like_any_picture(outpaints: Path, tmp_path: Path):
    words = ["panorama=3", "n=2", "toward=down"]
    sample(outpaints, *words, f"out={tmp_path / 'each'}", f"grid={tmp_path / 'g.png'}", f"npz={tmp_path / 'x.npz'}")
    assert Image.open(tmp_path / "each/000001.png").size == (8, 2 * (4 + 2 + 2))
    whole = latents(outpaints, tmp_path / "x.safetensors", *words)
    assert whole.shape == (2, 4, 8, 4)
    first = latents(outpaints, tmp_path / "y.safetensors", "n=2")  # plain pictures know nothing of themselves
    torch.testing.assert_close(whole[:, :, :4], first, rtol=1e-4, atol=1e-4)
    alone = latents(outpaints, tmp_path / "z.safetensors", "panorama=3", "n=1", "seed=1", "toward=down")
    torch.testing.assert_close(alone[0], whole[1], rtol=1e-4, atol=1e-4)


def test_large_latents_are_decoded_by_tiles(outpaints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "LARGE", 6)
    seen = []
    images = pictures.Run.images
    monkeypatch.setattr(pictures.Run, "images", lambda run, x: seen.append(run.codec.tile) or images(run, x))
    sample(outpaints, "panorama=4", "n=1", f"grid={tmp_path / 'g.png'}")
    sample(outpaints, "n=1", f"grid={tmp_path / 'h.png'}")
    assert seen == [6, None]


# ---- what cannot be


BAD = {
    "a class that is not there": ("classes", ["class={yaml:[cat, cow]}"], "unknown class 'cow'"),
    "a count of none": ("classes", ["class={yaml:{cat: 0}}"], "how many of 'cat'?"),
    "a class counted twice": ("classes", ["class={yaml:{cat: 2, cat: 3}}"], "counted twice"),
    "counts and n": ("classes", ["class={yaml:{cat: 2}}", "n=5"], "the file's counts say how many"),
    "an empty file": ("classes", ["class={yaml:}"], "the file is empty"),
    "no YAML": ("classes", ["class={yaml:[cat}"], "the file is no YAML"),
    "neither list nor counts": ("classes", ["class={yaml:cat}"], "neither a list nor counts"),
    "a truth for a class": ("classes", ["class={yaml:[yes]}"], "this cannot be listed"),
    "a YAML object": ("classes", ["class={yaml:!!python/object/apply:os.getcwd []}"], "the file is no YAML"),
    "no such file": ("classes", ["class=nowhere.yaml"], "the file cannot be read"),
    "a text for classes": ("classes", ["text=a cat"], "this model reads no text"),
    "a class for texts": ("texts", ["class=1", "text=a cat"], "this model knows no classes"),
    "no text": ("texts", [], "this model draws from text"),
    "an empty list of texts": ("texts", ["text={txt:\n \n}"], "the file is empty"),
    "a negative without guidance": ("texts", ["text=a", "negative=b"], "works through guidance"),
    "another encoder": ("texts", ["text=a", "encoder=words:7"], "not the one that the model learnt from"),
    "an encoder that is not there": ("texts", ["text=a", "encoder=./nowhere"], "key encoder"),
    "no multiple": ("classes", ["size=18x24"], "a multiple of 4 is wanted"),
    "too large": ("classes", ["size=20000000x8"], "at most 64 megapixels"),
    "no size": ("classes", ["size=large"], "this is no size"),
    "a panorama of a plain model": ("classes", ["panorama=3"], "needs a model that outpaints"),
    "a film of a panorama": ("outpaints", ["panorama=3", "gif=x.gif"], "gif is not for a panorama"),
    "an unknown side": ("outpaints", ["panorama=3", "toward=north"], "valid: down, left, right, up"),
    "no tiles": ("outpaints", ["panorama=0"], "must be at least 1"),
    "no frames": ("classes", ["frames=0"], "must be at least 1"),
    "frames that are all the same": ("classes", ["frames=5", "class=1"], "nothing changes from frame to frame"),
    "frames and n": ("classes", ["frames=5", "n=5"], "exclude each other"),
    "noise without frames": ("classes", ["noise=slerp"], "noise is for frames"),
    "unknown noise": ("classes", ["frames=5", "noise=pink"], "valid: seed, slerp"),
    "no codec": ("bare16", [], "nothing says what decodes them"),
    "a codec that is not there": ("classes", ["codec=./nowhere"], "file ./nowhere key codec"),
    "a codec of other latents": ("bare16", ["codec=CODEC"], "this codec does not fit the samples"),
    "a shift of pixels": ("bare16", ["latents=x.npz", "sharpness=0.1"], "shifts latents of 4 channels"),
    "latents of another kind": ("classes", ["latents=x.pt"], "a file of another kind"),
    "an array of another kind": ("classes", ["npz=x.png"], "a file of another kind"),
    "a picture of another kind": ("classes", ["grid=x.jpg"], "a file of another kind"),
    "a film of another kind": ("classes", ["gif=x.mp4"], "a file of another kind"),
    "one file for two things": ("classes", ["npz=x.npz", "latents=x.npz"], "a file each"),
}


@pytest.mark.parametrize("what", sorted(BAD))
def test_a_mistake_is_one_clear_message(
    what: str, place: Path, codec: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str], request
):
    run, words, message = BAD[what]
    if run == "bare16" and not (place / run).exists():
        write_run(place / run, CLASSES, (16, 4, 4))
    folder = place / run if run == "bare16" else request.getfixturevalue(run)
    monkeypatch.chdir(tmp_path)
    given = []
    for word in words:
        key, _, value = word.replace("CODEC", str(codec)).partition("=")
        kind, _, text = value.removeprefix("{").partition(":")
        if kind in ("yaml", "txt") and value.startswith("{"):
            (tmp_path / f"list.{kind}").write_text(text[:-1])
            value = f"list.{kind}"
        given.append(f"{key}={value}")
    assert main(["sample", str(folder), *given]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) <= 6 and told.startswith("error: ")
    assert not (folder / "sample.png").exists()
