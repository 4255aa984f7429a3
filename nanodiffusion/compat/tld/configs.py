"""The configurations of tld.configs; each is made from its own JSON again by Config(**json.loads(text))."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

import torch

from nanodiffusion.config import check_options
from nanodiffusion.errors import UserError, lookup

DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
SDXL_VAE = "madebyollin/sdxl-vae-fp16-fix"


@dataclass
class _Config:
    """Parts may be given as mappings, dtypes by name. UserError: an unknown key, a value of another type."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            setattr(self, f.name, _value(hints[f.name], getattr(self, f.name), f.name))
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        check_options(given, hints, type(self).__name__)

    def json(self) -> str:
        """As JSON, dtypes by name."""
        return json.dumps(asdict(self), default=str, indent=1)


def _value(hint: Any, value: Any, key: str) -> Any:
    if is_dataclass(hint) and isinstance(value, Mapping):
        for name in value:
            lookup(get_type_hints(hint), name, f"{key}.{name}")
        return hint(**value)  # type: ignore[operator]
    if hint is torch.dtype and isinstance(value, str):
        return lookup(DTYPES, value.removeprefix("torch."), key)
    return value


@dataclass
class DenoiserConfig(_Config):
    """The net; legacy: the layout of the published weights (norms after, 4 heads in cross-attention, heads inside)."""

    image_size: int = 16
    noise_embed_dims: int = 256
    patch_size: int = 2
    embed_dim: int = 128
    dropout: float = 0
    n_layers: int = 3
    text_emb_size: int = 768
    n_channels: int = 4
    mlp_multiplier: int = 4
    legacy: bool = False


@dataclass
class DenoiserLoad(_Config):
    """Where a net's weights are: local_filename is used, and fetched from file_url first where it is not there."""

    dtype: torch.dtype = torch.float32
    file_url: str | None = None
    local_filename: str | None = None


@dataclass
class VaeConfig(_Config):
    """A VAE by its folder, file or name on the hub; its unscaled latents are vae_scale_factor * x0."""

    vae_scale_factor: float = 8
    vae_name: str = SDXL_VAE
    vae_dtype: torch.dtype = torch.float32


@dataclass
class ClipConfig(_Config):
    """A text encoder: a name of OpenAI's, a folder, a name on the hub, or "words:768", which needs no download."""

    clip_model_name: str = "ViT-L/14"
    clip_dtype: torch.dtype = torch.float16


@dataclass
class LTDConfig(_Config):
    """Everything `DiffusionTransformer` needs."""

    denoiser_cfg: DenoiserConfig = field(default_factory=DenoiserConfig)
    denoiser_load: DenoiserLoad = field(default_factory=DenoiserLoad)
    vae_cfg: VaeConfig = field(default_factory=VaeConfig)
    clip_cfg: ClipConfig = field(default_factory=ClipConfig)


@dataclass
class DataConfig(_Config):
    """Arrays (.npy or .hdf5): unscaled latents (n c h w), pooled texts (n d), and texts (k d) to draw pictures for."""

    latent_path: str
    text_emb_path: str
    val_path: str


@dataclass
class TrainConfig(_Config):
    """How the net is trained; model_name: the file of its weights, to go on from (unless from_scratch) and to write."""

    batch_size: int = 128
    lr: float = 3e-4
    n_epoch: int = 100
    alpha: float = 0.999
    from_scratch: bool = True
    beta_a: float = 1.0
    beta_b: float = 2.5
    save_and_eval_every_iters: int = 1000
    run_id: str = ""
    model_name: str = ""
    compile: bool = True
    save_model: bool = True
    use_wandb: bool = True


@dataclass
class ModelConfig(_Config):
    """A whole training run."""

    data_config: DataConfig
    denoiser_config: DenoiserConfig = field(default_factory=DenoiserConfig)
    train_config: TrainConfig = field(default_factory=TrainConfig)
    vae_cfg: VaeConfig = field(default_factory=VaeConfig)
    clip_cfg: ClipConfig = field(default_factory=ClipConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data_config, DataConfig):
            fix = "ModelConfig of compat.tld.train takes embed_dim=... itself"
            raise UserError("a run needs data", key="data_config", expected="a DataConfig", fix=fix)


@dataclass
class DataDownloadConfig(_Config):
    """A table (.csv or .parquet) of addresses and captions, and where its pictures and arrays go."""

    data_link: str
    caption_col: str = "caption"
    url_col: str = "url"
    latent_save_path: str = "latents_folder"
    raw_imgs_save_path: str = "raw_imgs_folder"
    use_drive: bool = False
    initial_csv_path: str = "imgs.csv"
    number_sample_per_shard: int = 10000
    image_size: int = 256
    batch_size: int = 64
    download_data: bool = True
    vae_cfg: VaeConfig = field(default_factory=VaeConfig)
    clip_cfg: ClipConfig = field(default_factory=ClipConfig)
