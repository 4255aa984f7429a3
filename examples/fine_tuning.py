"""Every fine-tuning task learns: on a small Stable Diffusion of our own, with real pictures, on a CPU.

    garments -> an autoencoder -> a checkpoint as diffusers lays it out -> its U-Net from nothing (`text_to_image`): the base
    base -> controlnet, adapter, inpaint, inpaint_by_tokens, lora, textual_inversion, lcm, each by the recipe of its name

    python examples/fine_tuning.py                    about 25 minutes of one core, into runs/fine-tuning; a third is the base
    python examples/fine_tuning.py lora inpaint       only these, and the base where it is not there yet
    python examples/fine_tuning.py --setting tiny     seconds, and nothing to look at: whether everything works

Everything that is trained is a line of the command line, printed before it runs; what it leaves (controlnet/, adapter/, unet/,
lora.safetensors, learned_embeds.safetensors) is loaded as any published file and drawn with by `generate`. Each task writes
TASK.png and its row of figures.json, and all of them tasks.png. A second call goes on where the first one ended.
Distillation of runs with nets of their own kind has a benchmark: python -m benchmarks.distill.
"""

import argparse
import json
import shlex
import shutil
import string
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nanodiffusion import grid, load_codec, load_controlnet, load_pretrained, pictures, save_diffusers, save_png
from nanodiffusion.cli import main as nanodiffusion
from nanodiffusion.data import load_data
from nanodiffusion.data.conditioning import canny, to_unit
from nanodiffusion.denoiser import Denoiser
from nanodiffusion.errors import UserError
from nanodiffusion.evaluate import frechet, moments, of_data
from nanodiffusion.evaluate.features import SmallNet, fit_small, load_small, small_features
from nanodiffusion.evaluate.scores import T_95, jackknife, leave_out
from nanodiffusion.fast import adapt
from nanodiffusion.lora import add_lora, read_lora
from nanodiffusion.nets.sd_unet import SDUNet, SDUNetConfig
from nanodiffusion.noise import LADDERS, ldm
from nanodiffusion.pretrained import FAMILIES, Bundle, load_adapter, load_tokens, replace_part
from nanodiffusion.resume import keep_settings
from nanodiffusion.tasks import AdapterInput, Control, generate
from nanodiffusion.tensors import save_tensors
from nanodiffusion.text import CLIPText, CLIPTokenizer, TextConfig
from nanodiffusion.text.inversion import load_inversion
from nanodiffusion.text.prompts import TextEncoder, TextPart

SIDE, TEMPLATE = 32, "a photo of a {}"
WORDS = "a photo of picture the in style t-shirt / top trouser pullover dress coat sandal shirt sneaker bag ankle boot"
STYLE = (0.35, 0.35, 0.35)  # what is left of red, green and blue in the pictures of the style: dusk
SUBJECT, START = "Sneaker", "coat"  # what the new word is learnt from, and the word it begins as
EDGES = {"low": 100, "high": 200}
GUIDANCE = 2.0  # of the base's pictures
LEARNT = 2.5  # of those that a student of few steps learns
WALK = {"of": "karras", "original": 10}  # the ladder that it learns them on
PASSED = {1: (0,), 2: (0, 5), 4: (0, 5, 7, 9)}  # by number of steps: the levels of it that a picture passes
SHOWN = 10  # columns of a grid
PITCH, ASIDE = 2 * SIDE + 2, 110  # pixels from row to row of a grid, and for the names beside the rows
SHEET = {  # rows of the tasks' grids that are shown together
    "controlnet": {0: "edges", 1: "ControlNet", 2: "without it"},
    "inpaint": {1: "a hole", 2: "painted"},
    "lora": {0: "LoRA off", 2: "strength 0.5", 3: "strength 1"},
    "lcm": {0: "30 steps", 1: "4 steps", 2: "4, distilled"},
}


@dataclass(frozen=True)
class Setting:
    """How much of everything: pictures, words of `train` for each run, pictures that are measured, and of a distance."""

    garments: int
    codec: str
    unet: dict[str, Any]
    base: str
    tune: dict[str, str]
    measured: int
    counted: int
    steps: int
    classifier: int


QUIET = "validation=0 validate_every=0 sample_every=0 checkpoint_every=100000 sample.n=8"
FAST = f"{QUIET} sample.steps=8 sample.guidance=2"
PAINT = "accumulate=1 lr=2e-3 ema=[] lr_schedule={name:linear,warmup:20} data.hole={name:boxes}"
SETTINGS = {
    "small": Setting(
        garments=6000,
        codec="steps=1000 time_limit=0 validation=0 validate_every=0 sample_every=0 lr_schedule={name:cosine,warmup:50}",
        unet={"widths": (64, 128), "depths": (1, 1), "heads": (2, 4), "blocks": 1, "context_dim": 64},
        base=f"{FAST} steps=1100 batch_size=32 accumulate=1 lr=1e-3 ema=[{{name:power,sigma_rel:0.1}}] "
        "lr_schedule={name:linear,warmup:50}",
        tune={
            "controlnet": f"{FAST} steps=400 batch_size=32 accumulate=1 lr=1e-3",
            "adapter": f"{FAST} steps=400 batch_size=32 accumulate=1 lr=1e-3",
            "inpaint": f"{FAST} steps=600 batch_size=32 {PAINT}",
            "inpaint_by_tokens": f"{FAST} steps=600 batch_size=32 {PAINT}",
            "lora": f"{FAST} steps=200 batch_size=16 lr=3e-3 lr_schedule.warmup=10",
            "textual_inversion": f"{FAST} steps=150 batch_size=16 lr=2e-2",
            "lcm": f"{QUIET} steps=500 batch_size=32 accumulate=1 lr=1e-3 ema=[{{name:power,sigma_rel:0.1}}] "
            "lr_schedule={name:linear,warmup:20} task.decay=0.9 weight={name:p2,gamma:0.5,k:0} "
            "density={name:log_normal,mean:0.3,std:1.9}",
        },
        measured=120,
        counted=1000,
        steps=12,
        classifier=400,
    ),
    "tiny": Setting(
        garments=60,
        codec="net.widths=[8,8,8] net.groups=4 steps=4 batch_size=8 time_limit=0 validation=0 validate_every=0 sample_every=0",
        unet={"widths": (16, 32), "depths": (1, 1), "heads": (1, 2), "blocks": 1, "context_dim": 16, "groups": 8},
        base=f"{FAST} steps=4 batch_size=4 accumulate=1 ema=[{{name:power,sigma_rel:0.1}}]",
        tune=dict.fromkeys(
            ("controlnet", "adapter", "inpaint", "inpaint_by_tokens", "lora", "textual_inversion", "lcm"),
            f"{FAST} steps=3 batch_size=4 accumulate=1 ema=[] lr=1e-3",
        ),
        measured=4,
        counted=20,
        steps=2,
        classifier=4,
    ),
}


def call(*words: str) -> None:
    """One command of the library, as it would be typed; this script ends with it if it fails."""
    print("\n$", shlex.join(["nanodiffusion", *words]), flush=True)
    if code := nanodiffusion(words):
        raise SystemExit(code)


def place(out: Path | None, setting: str) -> Path:
    """The folder to work in, by default one of the setting's own. UserError: there is work of another setting in it."""
    home = out or Path("runs/fine-tuning" + f"-{setting}" * (setting != "small"))
    what, fix = "this folder holds work of another setting", "another --out, or remove this folder"
    keep_settings(home / "setting.json", {"setting": setting}, what, home, fix)
    return home


# -- the pictures --------------------------------------------------------------------------------------------------------


def tinted(picture: Image.Image, colour: Sequence[float]) -> Image.Image:
    """A picture with that share of its red, green and blue."""
    return Image.fromarray((np.asarray(picture.convert("RGB")) * np.asarray(colour)).round().astype(np.uint8))


def gather(home: Path, name: str, files: Sequence[Path], colour: Callable[[int], Sequence[float]], said: bool) -> None:
    """A folder home/name of copies of pictures, tinted, with their captions if `said`."""
    if (home / name).exists():
        return
    beside = home / f".{name}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for i, file in enumerate(files):
        tinted(Image.open(file), colour(i)).save(beside / f"{i:05d}.png")
        if said:
            shutil.copy(file.with_suffix(".txt"), beside / f"{i:05d}.txt")
    beside.rename(home / name)


def prepare(home: Path, setting: Setting) -> None:
    """pictures/ and unseen/ (CLASS/number.png with captions), shards/, colours/ for the codec, dusk/ and subject/."""
    for split, name, n in (("train", "pictures", setting.garments), ("test", "unseen", max(60, setting.measured))):
        if not (home / name).exists():
            words = [f"split={split}", f"size={SIDE}", "format=folder", f"template={TEMPLATE}", f"n={n}"]
            call("prepare", "fashion-mnist", f"out={home / name}", *words)
    if not (home / "shards").exists():
        call("prepare", str(home / "pictures"), f"out={home / 'shards'}", "per_shard=2000")
    files = sorted((home / "pictures").rglob("*.png"))
    tints = np.random.default_rng(0).uniform(0.05, 1, (len(files), 3))
    gather(home, "colours", files, lambda i: (1, 1, 1) if i % 2 else tints[i], said=False)
    gather(home, "dusk", files[:: max(1, len(files) // 300)], lambda i: STYLE, said=True)
    gather(home, "subject", sorted((home / "pictures" / SUBJECT).glob("*.png"))[:100], lambda i: (1, 1, 1), said=False)


# -- a checkpoint of our own ---------------------------------------------------------------------------------------------


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """What a tokenizer is made of: letters, the merges that spell WORDS, and the two marks."""
    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS.replace("-", " ").split():
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for letter in rest:
            merges[left, letter] = None
            left += letter
    marks = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), *marks]
    return {token: i for i, token in enumerate(tokens)}, list(merges)


def fresh(codec: Path, unet: SDUNetConfig, seed: int = 0) -> Bundle:
    """A checkpoint of Stable Diffusion's kind with our codec, and with a U-Net and a text encoder that know nothing yet."""
    torch.manual_seed(seed)
    family = replace(FAMILIES["sd1"], size=SIDE, guidance=GUIDANCE)
    tokenizer = CLIPTokenizer(*vocabulary())
    width = unet.context_dim
    clip = CLIPText(TextConfig(width, 2, 2, 2 * width, vocab=len(tokenizer), eos=tokenizer.end))
    with torch.no_grad():  # words that are farther apart than places: an encoder that is never trained must tell them
        clip.text_model.embeddings.token_embedding.weight.mul_(25)
    row = family.texts[0]
    text = TextEncoder([TextPart(tokenizer, clip.eval(), row.layer, row.norm, row.pooled)])
    denoiser = Denoiser(SDUNet(unet), "eps", "table", ldm()).eval()
    return Bundle(family, denoiser, load_codec(codec, "fp32", "cpu"), text, ldm(), {})


def make_base(home: Path, setting: Setting) -> Path:
    """The base: a checkpoint's folder whose U-Net was trained by `text_to_image`."""
    base, runs = home / "base", f"out={home / 'runs'}"
    if base.exists():
        return base
    started = time.process_time()
    if not (home / "runs/autoencoder/codec").exists():
        where = ["data.name=folder", f"data.path={home / 'colours'}", f"data.size={SIDE}", runs]
        call("train", "autoencoder", *where, *setting.codec.split())
        record(home, "autoencoder", {"cpu_seconds": time.process_time() - started, "words": setting.codec})
    if not (home / "fresh").exists():
        save_diffusers(fresh(home / "runs/autoencoder/codec", SDUNetConfig(**setting.unet)), home / "fresh")
    started = time.process_time()
    call(
        "train",
        "sd-text-to-image",
        *told(home / "fresh", home / "shards"),
        "data.flip=false",
        runs,
        *setting.base.split(),
    )
    record(home, "text_to_image", {"cpu_seconds": time.process_time() - started, "words": setting.base})
    bundle = replace_part(load(home / "fresh"), "unet", home / "runs/sd-text-to-image/unet")
    return save_diffusers(bundle, base)


def told(base: Path, data: Path) -> list[str]:
    """Words of `train` that all runs have in common."""
    return [f"task.base={base}", f"data.path={data}", f"data.size={SIDE}", "device=cpu"]


def load(where: Path) -> Bundle:
    """A checkpoint, on the CPU in fp32."""
    return load_pretrained(where, "fp32", "cpu")


# -- drawing and measuring -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """What the tasks are measured with: the base, pictures that nothing has seen with their captions, a classifier."""

    home: Path
    base: Path
    setting: Setting
    unseen: list[Image.Image]
    captions: list[str]
    classes: tuple[str, ...]
    classifier: SmallNet

    def train(self, recipe: str, task: str, data: str, *words: str) -> Path:
        """The folder of a run."""
        where = [*told(self.base, self.home / data), f"out={self.home / 'runs'}"]
        call("train", recipe, *where, *words, *self.setting.tune[task].split())
        return self.home / "runs" / recipe

    def draw(self, bundle: Bundle, prompts: Sequence[str], **inputs: Any) -> np.ndarray:
        """Pictures (n h w 3) uint8 of prompts, picture i from seed i."""
        adapt(bundle.denoiser.net)
        options = {"seeds": range(len(prompts)), "steps": self.setting.steps, "guidance": GUIDANCE}
        options["sampler"] = "dpmpp_2m"
        with torch.no_grad():
            *_, last = generate(bundle, list(prompts), height=SIDE, width=SIDE, **{**options, **inputs})
            shown = (inputs["image"], inputs["mask"]) if "mask" in inputs else ()
            return np.stack([np.asarray(p) for p in pictures(bundle, last.x, *shown)])

    def many(self, bundle: Bundle, **inputs: Any) -> np.ndarray:
        """As many pictures (n h w 3) as a distance needs, of all captions in turn."""
        prompts = [*islice(cycle(sorted({*self.captions})), self.setting.counted)]
        parts = [range(k, min(k + 100, len(prompts))) for k in range(0, len(prompts), 100)]
        return np.concatenate([self.draw(bundle, prompts[p.start : p.stop], seeds=p, **inputs) for p in parts])

    @torch.no_grad()
    def features(self, images: np.ndarray) -> Tensor:
        """Of the classifier: (n 64)."""
        return self.classifier.features(as_input(images))

    @torch.no_grad()
    def share(self, images: np.ndarray, name: str) -> float:
        """How many of the pictures the classifier takes for a class."""
        return (self.classifier(as_input(images)).argmax(1) == self.classes.index(name)).float().mean().item()


def as_input(images: np.ndarray) -> Tensor:
    """uint8 (n h w 3) -> (n 3 h w) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def laboratory(home: Path, base: Path, setting: Setting) -> Lab:
    """The unseen pictures, of all classes mixed, and a classifier trained on the seen ones."""
    files = sorted((home / "unseen").rglob("*.png"), key=lambda file: file.name)[: setting.measured]
    judge = home / "classifier.safetensors"
    if not judge.exists():
        data = of_data(load_data("folder", path=str(home / "pictures"), size=SIDE), "pictures")
        save_tensors(judge, fit_small(data, setting.classifier).state_dict(), {})
    captions = [file.with_suffix(".txt").read_text().strip() for file in files]
    classes = tuple(sorted(folder.name for folder in (home / "pictures").iterdir() if folder.is_dir()))
    unseen = [Image.open(file).convert("RGB") for file in files]
    return Lab(home, base, setting, unseen, captions, classes, load_small(judge).eval())


def record(home: Path, task: str, figures: dict[str, Any]) -> None:
    """Put a task's figures into figures.json; its seconds are those of all calls together."""
    file = home / "figures.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    figures["cpu_seconds"] += known.get(task, {}).get("cpu_seconds", 0.0)
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    file.write_text(json.dumps({**known, task: rounded}, indent=1) + "\n")
    print(f"{task}: {rounded}", flush=True)


def show(lab: Lab, task: str, *rows: np.ndarray) -> None:
    """Write TASK.png, a row of pictures for each."""
    shown = torch.cat([as_input(row[:SHOWN]) for row in rows])
    save_png(grid(shown, columns=min(SHOWN, len(rows[0]))), lab.home / f"{task}.png")


def sheet(home: Path) -> None:
    """Write tasks.png: the rows named in SHEET of what the tasks have drawn so far, in grey."""
    drawn = {task: Image.open(home / f"{task}.png").convert("L") for task in SHEET if (home / f"{task}.png").exists()}
    rows = [(drawn[task], k, name) for task in drawn for k, name in SHEET[task].items()]
    if not rows:
        return
    page = Image.new("L", (ASIDE + rows[0][0].width, PITCH * len(rows)), 255)
    pen, style = ImageDraw.Draw(page), {"font": ImageFont.load_default(14), "anchor": "rm"}
    for i, (picture, k, name) in enumerate(rows):
        page.paste(picture.crop((0, PITCH * k, picture.width, PITCH * k + 2 * SIDE)), (ASIDE, PITCH * i))
        pen.text((ASIDE - 8, PITCH * i + SIDE), name, fill=0, **style)
    save_png(page, home / "tasks.png")


def edges(images: Iterable[Any]) -> np.ndarray:
    """Canny's edges: (n h w) bool."""
    return np.stack([np.asarray(canny(image, **EDGES)) > 0 for image in images])


def wide(there: np.ndarray) -> np.ndarray:
    """Edges and all pixels beside them: (n h w) -> (n h w)."""
    padded = np.pad(there, ((0, 0), (1, 1), (1, 1)))
    h, w = there.shape[1:]
    return np.any([padded[:, y : y + h, x : x + w] for y in range(3) for x in range(3)], axis=0)


def overlap(made: np.ndarray, wanted: np.ndarray) -> float:
    """F1 of edges (n h w) against those wanted: right if one is at most a pixel away; the mean over pictures."""
    precision = (made & wide(wanted)).sum((1, 2)) / np.maximum(made.sum((1, 2)), 1)
    recall = (wanted & wide(made)).sum((1, 2)) / np.maximum(wanted.sum((1, 2)), 1)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-9)).mean())


# -- the tasks -----------------------------------------------------------------------------------------------------------


def controlled(lab: Lab, task: str) -> dict[str, Any]:
    """Pictures that keep to the edges of others, by a ControlNet or an adapter."""
    name = f"data.control={{name:canny,low:{EDGES['low']},high:{EDGES['high']}}}"
    run = lab.train(f"sd-{task}", task, "shards", name)
    wanted = edges(lab.unseen)
    hints = torch.cat([to_unit(Image.fromarray(e).convert("RGB")) for e in wanted])
    bundle = load(lab.base)
    inputs: dict[str, Any]
    if task == "controlnet":
        inputs = {"controls": [Control(load_controlnet(run / task, "fp32", "cpu"), hints)]}
    else:
        inputs = {"adapters": [AdapterInput(load_adapter(run / task, "fp32", "cpu"), hints)]}
    plain, made = lab.draw(bundle, lab.captions), lab.draw(bundle, lab.captions, **inputs)
    best = np.stack([np.asarray(p) for p in through(bundle, lab.unseen)])
    drawn = np.repeat(wanted[..., None], 3, 3).astype(np.uint8) * 255
    show(lab, task, drawn, made, plain, np.stack([np.asarray(p) for p in lab.unseen]))
    f1 = {"controlled": made, "uncontrolled": plain, "codec_alone": best}
    return {f"edge_f1_{key}": overlap(edges(images), wanted) for key, images in f1.items()}


@torch.no_grad()
def through(bundle: Bundle, images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures through the codec and back: what no net behind it can better."""
    x = as_input(np.stack([np.asarray(p) for p in images]))
    return pictures(bundle, bundle.codec.encode(x))


def painted(lab: Lab, task: str) -> dict[str, Any]:
    """Holes painted anew: nearer to what was there than other fillings, and nothing else touched.

    base_held: by the base, which is held to what is known at every step. blind: by the base, which sees none of it. misled:
    by the trained net, which is shown another picture.
    """
    recipe = {
        "inpaint": ["sd-inpaint"],
        "inpaint_by_tokens": ["sd-inpaint", "name=tokens", "task.name=inpaint_by_tokens"],
    }
    run = lab.train(recipe[task][0], task, "shards", *recipe[task][1:])
    run = run.with_name("tokens") if task != "inpaint" else run
    bundle = replace_part(load(lab.base), "unet", run / "unet")
    hole = np.zeros((SIDE, SIDE), np.uint8)
    hole[8:24, 8:24] = 255
    real, mask = np.stack([np.asarray(p) for p in lab.unseen]), hole > 0
    inputs: dict[str, Any] = {"image": lab.unseen, "mask": Image.fromarray(hole)}
    if task == "inpaint_by_tokens":
        inputs["tokens"] = load_tokens(run / "tokens.safetensors", "fp32", "cpu")
    made = lab.draw(bundle, lab.captions, **inputs)
    base = load(lab.base)
    before = lab.draw(base, lab.captions, image=lab.unseen, mask=Image.fromarray(hole))
    blind = np.where(mask[..., None], lab.draw(base, lab.captions), real)
    others = {**inputs, "image": [*lab.unseen[1:], lab.unseen[0]]}
    misled = np.where(mask[..., None], lab.draw(bundle, lab.captions, **others), real)
    other = np.random.default_rng(0)
    filled = {"painted": made, "base_held": before, "blind": blind, "misled": misled}
    filled |= {"mean": real.copy(), "noise": real.copy()}
    filled["mean"][:, mask] = real[:, ~mask].mean(1, keepdims=True).round().astype(np.uint8)
    filled["noise"][:, mask] = other.integers(0, 256, (len(real), int(mask.sum()), 3))
    show(lab, task, real, np.where(mask[..., None], np.uint8(128), real), made, before, blind)
    figures: dict[str, Any] = {"untouched_outside": bool((made[:, ~mask] == real[:, ~mask]).all())}
    for name, images in filled.items():
        error = images[:, mask].astype(float) - real[:, mask]
        apart = (lab.features(images) - lab.features(real)).norm(dim=1).mean().item()
        figures |= {f"hole_rmse_{name}": float(np.sqrt((error**2).mean())), f"features_apart_{name}": apart}
    return figures


def styled(lab: Lab, task: str) -> dict[str, Any]:
    """A style in low-rank factors: how bright the pictures are, by strength."""
    run = lab.train("sd-lora", task, "dusk", "task.rank=8")
    plain = lab.draw(load(lab.base), lab.captions)
    rows, figures = [plain], {"brightness_base": brightness(plain)}
    for strength in (0.0, 0.5, 1.0):
        bundle = load(lab.base)
        add_lora({"unet": bundle.denoiser.net}, read_lora(run / "lora.safetensors"), strength)
        rows.append(lab.draw(bundle, lab.captions))
        figures[f"brightness_{strength}"] = brightness(rows[-1])
    figures["brightness_style"] = brightness(
        np.stack([np.asarray(Image.open(f)) for f in (lab.home / "dusk").glob("*.png")])
    )
    show(lab, task, *rows)
    return {**figures, "strength_0_is_the_base": bool((rows[1] == plain).all())}


def brightness(images: np.ndarray) -> float:
    """The mean level, 0 to 255."""
    return float(images.mean())


def named(lab: Lab, task: str) -> dict[str, Any]:
    """A new word for what a hundred pictures show: how often the classifier sees it."""
    run = lab.train("textual-inversion", task, "subject", f"task.start={START}", "data.flip=false")
    bundle, prompts = load(lab.base), ["a photo of a <new>"] * lab.setting.measured
    before = lab.draw(bundle, [TEMPLATE.format(START)] * len(prompts))
    taught = replace(bundle, text=load_inversion(bundle.text, run / "learned_embeds.safetensors"))
    made, real = lab.draw(taught, prompts), lab.draw(bundle, [TEMPLATE.format(SUBJECT)] * len(prompts))
    show(lab, task, before, made, real)
    old, new = (b.text.parts[0].net.text_model.embeddings.token_embedding.weight for b in (bundle, taught))
    shares = {"as_it_began": before, "learnt": made, "of_the_word_itself": real}
    return {
        **{f"{SUBJECT}_share_{key}": lab.share(images, SUBJECT) for key, images in shares.items()},
        "rows_learnt": len(new) - len(old),
        "other_rows_unchanged": bool(torch.equal(new[: len(old)], old)),
    }


def hurried(lab: Lab, task: str) -> dict[str, Any]:
    """Four steps as good as thirty: Fréchet's distance to the pictures that the base has seen, by the number of steps.

    What a step makes is guided; from a middle level the next guides it once more. So most of the levels passed are low ones.
    even: the levels that `ladder=lcm` passes.
    """
    walk = [f"task.ladder={WALK['of']}", f"task.levels={WALK['original']}", "task.solver=heun", "task.rank=0"]
    walk.append(f"sample.ladder={{name:lcm,of:{WALK['of']},original:{WALK['original']}}}")
    guided = [f"task.w_min={LEARNT}", f"task.w_max={LEARNT}", "data.flip=false"]
    run = lab.train("sd-lcm-lora", task, "shards", *walk, *guided)
    base, student = load(lab.base), replace_part(load(lab.base), "unet", run / "unet")
    quick = {"sampler": "lcm", "guidance": 1.0}
    levels = LADDERS[WALK["of"]](base.schedule, WALK["original"]).tolist()
    drawn = {f"base_{k}": lab.many(base, steps=k) for k in (30, 4)}
    drawn |= {f"student_{k}": lab.many(student, sigmas=[levels[i] for i in at], **quick) for k, at in PASSED.items()}
    drawn["student_4_even"] = lab.many(student, steps=4, ladder={"name": "lcm", **WALK}, **quick)
    show(lab, task, *(drawn[name] for name in ("base_30", "base_4", "student_4", "student_1")))
    features = small_features("classifier", lab.classifier, "")
    seen = moments(features(of_data(load_data("folder", path=str(lab.home / "pictures"), size=SIDE), "pictures")))
    found = {name: lab.features(images) for name, images in drawn.items()}
    without = {name: leave_out(x.double(), seen) for name, x in found.items()}
    figures: dict[str, Any] = {"counted": lab.setting.counted}
    for name, x in found.items():
        figures |= {
            f"distance_{name}": frechet(moments(x), seen),
            f"distance_{name}_95": T_95 * jackknife(without[name]),
        }
    ratio = jackknife(without["student_4"] / without["base_30"])  # of the same seeds and captions
    four, thirty = figures["distance_student_4"], figures["distance_base_30"]
    return {**figures, "student_4_over_base_30": four / thirty, "student_4_over_base_30_95": T_95 * ratio}


TASKS: dict[str, Callable[[Lab, str], dict[str, Any]]] = {
    "controlnet": controlled,
    "adapter": controlled,
    "inpaint": painted,
    "inpaint_by_tokens": painted,
    "lora": styled,
    "textual_inversion": named,
    "lcm": hurried,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; all of them where none is named")
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--out", type=Path, help="runs/fine-tuning, or of another setting runs/fine-tuning-SETTING")
    args = parser.parse_args()
    if odd := [task for task in args.tasks if task not in TASKS]:
        parser.error(str(UserError("no such task", found=odd[0], expected=", ".join(TASKS))))
    try:
        home, setting = place(args.out, args.setting), SETTINGS[args.setting]
    except UserError as e:
        parser.error(str(e))
    prepare(home, setting)
    lab = laboratory(home, make_base(home, setting), setting)
    for task in args.tasks or TASKS:
        started = time.process_time()
        figures = TASKS[task](lab, task)
        record(home, task, {**figures, "cpu_seconds": time.process_time() - started, "words": setting.tune[task]})
    sheet(home)


if __name__ == "__main__":
    main()
