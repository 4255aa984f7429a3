"""tld.denoiser's Denoiser, which is the core's TLD, and its weights as they are found in files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nanodiffusion.errors import UserError, few
from nanodiffusion.nets.tld import LEGACY, TLD, TLDConfig
from nanodiffusion.nets.transfer import fit_state
from nanodiffusion.pretrained.weights import PICKLES, pickled
from nanodiffusion.tensors import load_tensors, load_weights

AVERAGE = "model_ema."  # where training checkpoints have the weights
PREFIXES = (AVERAGE, "_orig_mod.", "module.")
BESIDE = ("opt_state.", "optimizer.", "global_step")  # what else they hold


class Denoiser(TLD):
    """x0 of a noisy latent: x (b c h w), noise_level (b 1) or (b), label (b d) -> (b c h w); a fresh one says zero.

    legacy: the layout of the published weights. UserError: samples of another size than image_size, sizes that do not divide.
    """

    def __init__(
        self,
        image_size: int,
        noise_embed_dims: int,
        patch_size: int,
        embed_dim: int,
        dropout: float,
        n_layers: int,
        text_emb_size: int = 768,
        mlp_multiplier: int = 4,
        n_channels: int = 4,
        legacy: bool = False,
    ) -> None:
        layout: dict[str, Any] = LEGACY if legacy else {}
        sizes = (image_size, n_channels, patch_size, embed_dim, n_layers, noise_embed_dims, text_emb_size)
        super().__init__(TLDConfig(*sizes, dropout, mlp_multiplier, **layout))
        self.image_size, self.n_channels, self.embed_dim = image_size, n_channels, embed_dim
        self.noise_embed_dims, self.legacy = noise_embed_dims, legacy

    def forward(
        self,
        x: Tensor,
        noise_level: Tensor,
        label: Tensor | None = None,
        pooled: Tensor | None = None,
        concat: Tensor | None = None,
    ) -> Tensor:
        return super().forward(x, noise_level.reshape(-1), pooled if label is None else label, concat)

    def at_size(self, image_size: int) -> "Denoiser":
        """The same net for another size, its table of positions resized; itself where that is its own."""
        if image_size == self.image_size:
            return self
        c = self.config
        sizes = (self.noise_embed_dims, c.patch, c.dim, c.dropout, c.depth, c.text_dim, c.ffn_ratio, c.channels_in)
        new = Denoiser(image_size, *sizes, legacy=self.legacy)
        load_weights(new, fit_state(new, self.state_dict())[0])
        return new.to(self.label_proj.weight).train(self.training)


def published(state: Mapping[str, Tensor], file: object = None) -> dict[str, Tensor]:
    """The weights by the net's own names: of a state dict, or the average of a training checkpoint, whatever its prefixes.

    UserError: there are none.
    """
    nested = any(name.startswith(AVERAGE) for name in state)
    chosen = {k: v for k, v in state.items() if (k.startswith(AVERAGE) if nested else not k.startswith(BESIDE))}
    found = {_plain(name): value for name, value in chosen.items()}
    if not any(name.startswith("denoiser_trans_block.") for name in found):
        raise UserError(
            "these are not a denoiser's weights",
            file=file,
            expected="denoiser_trans_block.*",
            found=few(state) or "nothing",
        )
    return found


def _plain(name: str) -> str:
    while (prefix := next((p for p in PREFIXES if name.startswith(p)), None)) is not None:
        name = name.removeprefix(prefix)
    return name


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The weights in a file, or of a run's folder its average, by the net's own names. UserError: a pickle; none there."""
    path = Path(file)
    if path.suffix in PICKLES:
        raise pickled(path)
    if not path.is_dir():
        return published(load_tensors(path)[0], path)
    from nanodiffusion.run import choose_weights, find_checkpoint  # slow to import

    checkpoint = find_checkpoint(path)
    return published(checkpoint.files[choose_weights(checkpoint, "ema-0")], path)


def read_weights(model: Denoiser, file: str | Path) -> None:
    """Give a model the weights in a file. UserError: they are another model's, naming keys."""
    state, own = read_state(file), model.state_dict()
    fixed = {
        name for name, _ in model.named_buffers()
    }  # sinusoids and positions 0, 1, ..., which are the same anywhere
    state |= {name: own[name] for name in fixed}
    load_weights(model, state, file)
