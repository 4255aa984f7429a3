"""Latents and read captions in place of pictures: what `nanodiffusion encode` made for the checkpoint that is trained on."""

from typing import TYPE_CHECKING, Any

import torch

from nanodiffusion.errors import UserError

if TYPE_CHECKING:
    from nanodiffusion.data.encoded import EncodedData
    from nanodiffusion.finetune.base import Tuned

CLOSE = 0.1  # of their size, contexts of one encoder may differ by: half precision moves them by some 0.01
PIXELS = "data.name=pictures"


def ready_made(data: "EncodedData", model: "Tuned") -> "EncodedData":
    """The data set for a model that needs neither its codec nor its text encoders now: they stay behind on the CPU.

    UserError: a task that needs pixels or reads captions itself, a set without contexts or for other checkpoints.
    """
    if {"control", "concat"} & set(model.takes):
        what = "this task reads pictures, and there are only latents"
        raise UserError(what, key="data.name", found="encoded", fix=PIXELS)
    if data.context is None:
        fix = "nanodiffusion encode SOURCE out=FOLDER codec=BASE text=BASE, BASE being task.base"
        raise UserError("nothing says what a U-Net is told of these latents", key="data", found="no contexts", fix=fix)
    if data.outpaint:
        raise UserError("no checkpoint outpaints so", key="data.outpaint", found=data.outpaint, fix="leave it out")
    check_codec(data, model.codec)
    check_texts(data, model)
    model.without_encoders(dict(data.empty))
    return data


def check_codec(data: "EncodedData", codec: Any) -> None:
    """UserError unless the latents are of the codec's kind; its weights may differ, as those of fp16-fix do."""
    own = {"factor": codec.factor, "scale": codec.config.scale, "shift": codec.config.shift}
    expected = {"channels": codec.latent_channels, **own}
    found = {"channels": data.shape[0], **{name: data.coding[name] for name in own if name in data.coding}}
    if {**expected, **found} != expected:
        fix = "encode with codec= the base, or one for the same latents"
        what = "these latents are of another kind than the base's"
        raise UserError(what, file=data.codec, key="codec", expected=expected, found=found, fix=fix)


def check_texts(data: "EncodedData", model: "Tuned") -> None:
    """UserError unless the base reads a caption as it was read when the data was encoded, and training does not change how."""
    row, caption = next(((i, text) for i, text in enumerate(data.captions) if text.strip()), (0, ""))
    with torch.enable_grad():
        said = model.reader(model.reader.tokens([caption]))
    if any(v.requires_grad for v in said.values()):
        what = "what is trained takes part in reading captions, and these were read beforehand"
        raise UserError(what, key="data.name", found="encoded", fix=f"{PIXELS}; a LoRA also by task.targets=[unet]")
    _, cond = data.batch(torch.tensor([row]))
    kinds = [{name: tuple(v.shape[1:]) for name, v in each.items()} for each in (said, data.empty)]
    near = lambda name: float((said[name].float() - cond[name]).norm()) <= CLOSE * float(cond[name].norm())
    if kinds[0] != kinds[1] or (caption and not all(map(near, said))):
        what, fix = "these captions were read by other text encoders than the base's", "encode with text= the base"
        found = kinds[1] if kinds[0] != kinds[1] else f"other numbers of {caption[:80]!r}"
        raise UserError(what, file=data.text, key="text", expected=kinds[0], found=found, fix=fix)
