"""Latent diffusion from pictures to figures, with nothing downloaded but two small sets: the whole way, command by command.

    captioned pictures -> shards -> an autoencoder of our own -> latents and text vectors -> two transformers, one that reads
    text (TLD) and one that knows classes (a modern DiT) -> guided samples -> distances to pictures neither has seen

    python examples/latent_diffusion.py                  about a quarter of an hour on two CPU cores, into runs/latent
    python examples/latent_diffusion.py --setting full   for a GPU: all pictures, larger nets
    python examples/latent_diffusion.py --setting tiny   seconds, and nothing to look at: whether everything works

Every step is one line of the command line, printed before it runs, so that any of them can be repeated or changed by hand.
A second call goes on where the first one ended. The pictures are 12,000 garments and 1,438 digits in 20 class folders.
"""

import argparse
import json
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from nanodiffusion.cli import main as nanodiffusion
from nanodiffusion.errors import UserError
from nanodiffusion.resume import keep_settings

SETS = {"fashion-mnist": "a photo of a {}", "digits": "a handwritten {}"}  # caption of a class
PROMPTS = ["a photo of a sneaker", "a photo of a coat", "a photo of a bag", "a handwritten 3", "a handwritten 8"]


@dataclass(frozen=True)
class Setting:
    """How much of everything: pictures, words of `train` for each run, samples that are measured."""

    garments: int  # of 60,000
    codec: str
    text: str  # what the text model gets
    classes: str  # what the class model gets
    measured: int
    evaluate: str = ""


SMALL = (
    "net.patch=2 time_limit=240 batch_size=128 lr=1e-3 lr_schedule.warmup=100 validation=0.05 validate_every=500 "
    "sample_every=0 sample.guidance=2"
)
TINY = "net.depth=1 steps=4 batch_size=8 validation=0.2 validate_every=2 sample_every=0 sample.n=4 sample.steps=2"
SETTINGS = {
    "small": Setting(
        garments=12_000,
        codec="time_limit=150 validate_every=200 sample_every=0",
        text=f"{SMALL} net.dim=192 net.depth=5 ema=[{{name:power,sigma_rel:0.1}}]",  # 0.999 would remember the beginning
        classes=f"{SMALL} net.dim=192 net.heads=6 net.depth=5",
        measured=2048,
    ),
    "full": Setting(
        garments=60_000,
        codec="net.widths=[32,64,128] batch_size=256 steps=30000 time_limit=600",
        text="net.dim=512 net.depth=8 net.patch=1 steps=40000 compile=true",
        classes="net.dim=384 net.depth=12 net.patch=1 steps=40000 compile=true",
        measured=10_000,
    ),
    "tiny": Setting(
        garments=60,
        codec="net.widths=[8,8,8] net.groups=4 steps=6 validate_every=3 sample_every=0 batch_size=8 sample.n=2 validation=0.2",
        text=f"{TINY} net.dim=64",
        classes=f"{TINY} net.dim=48 net.heads=2",
        measured=16,
        evaluate="force=true features=random",
    ),
}


def call(*words: str) -> None:
    """One command of the library, as it would be typed; this script ends with it if it fails."""
    print("\n$", shlex.join(["nanodiffusion", *words]), flush=True)
    if code := nanodiffusion(words):
        raise SystemExit(code)


def place(out: Path | None, setting: str) -> Path:
    """The folder to work in, by default one of the setting's own. UserError: there is work of another setting in it."""
    home = out or Path("runs/latent" + f"-{setting}" * (setting != "small"))
    what, fix = "this folder holds work of another setting", "another --out, or remove this folder"
    keep_settings(home / "setting.json", {"setting": setting}, what, home, fix)
    return home


def captioned(home: Path, split: str, garments: int) -> Path:
    """A folder of both sets: CLASS/number.png, each with its caption in a .txt beside it."""
    together = home / f"pictures-{split}"
    if together.exists():
        return together
    parts = home / f"parts-{split}"
    for name, template in SETS.items():
        some = [f"n={garments}"] if name == "fashion-mnist" or garments < 1000 else []
        words = [f"split={split}", "size=32", "format=folder", f"template={template}", *some]
        call("prepare", name, f"out={parts / name}", *words)
    gathered = home / f".{together.name}"
    shutil.rmtree(gathered, ignore_errors=True)
    gathered.mkdir()
    for folder in (f for name in SETS for f in sorted((parts / name).iterdir()) if f.is_dir()):
        shutil.copytree(folder, gathered / folder.name)
    gathered.rename(together)
    return together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--out", type=Path, help="runs/latent, or of another setting runs/latent-SETTING")
    args = parser.parse_args()
    try:
        home, setting, started = place(args.out, args.setting), SETTINGS[args.setting], time.perf_counter()
    except UserError as e:
        parser.error(str(e))
    runs, latents = home / "runs", home / "latents"

    pictures, unseen = (
        captioned(home, "train", setting.garments),
        captioned(home, "test", max(60, setting.garments // 4)),
    )
    call("prepare", str(pictures), f"out={home / 'shards'}", "per_shard=2000")

    where = ["data.name=folder", f"data.path={pictures}", "data.size=32", f"out={runs}"]
    call("train", "autoencoder", *where, *setting.codec.split())
    rows = [json.loads(line) for line in (runs / "autoencoder/metrics.jsonl").read_text().splitlines()]
    measured = [row for row in rows if "val/ema_psnr" in row][-1]
    print(f"unseen pictures come back with a PSNR of {measured['val/ema_psnr']:.1f} dB, at step {measured['step']}")
    call(
        "encode",
        str(home / "shards"),
        f"out={latents}",
        f"codec={runs / 'autoencoder/codec'}",
        "text=words:256",
        "size=32",
    )

    same = [f"data.path={latents}", f"out={runs}"]
    prompts = f"sample.prompts={json.dumps(PROMPTS)}"
    call("train", "tld", *same, "net.in_size=8", "net.text_dim=256", prompts, *setting.text.split())
    call("train", "latent-dit", *same, *setting.classes.split())

    captions = home / "captions.txt"
    captions.write_text("".join(f"{(next(f.glob('*.txt'))).read_text()}\n" for f in sorted(pictures.iterdir())))
    drawn = {"tld": f"text={captions}", "latent-dit": "class=all"}
    for run, what in drawn.items():
        npz = f"npz={home / run}.npz"
        call("sample", str(runs / run), what, "guidance=2", f"n={setting.measured}", npz)
        words = setting.evaluate.split() or ["features=small"]
        call("evaluate", f"{home / run}.npz", f"reference={unseen}", *words, f"out={home / run}.json")
    call(
        "sample",
        str(runs / "tld"),
        "text=[a photo of a sneaker,a handwritten 8]",
        "frames=10",
        f"grid={home / 'walk.png'}",
    )
    call("sample", str(runs / "latent-dit"), f"trajectories={home / 'trajectories.png'}", "guidance=2")
    print(f"\n{home}: everything in {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
