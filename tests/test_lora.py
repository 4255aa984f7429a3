"""LoRA: every dialect's file changes the weights as its own library says, outputs are diffusers', unfusing is exact."""

import copy
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd import SD1, XL, randomise, reference_unet
from torch import Tensor, nn

from nanodiffusion.errors import UserError
from nanodiffusion.lora import (
    Applied,
    Factors,
    Lora,
    add_lora,
    block_of,
    lbw,
    lora_tensors,
    new_lora,
    read_lora,
    resolve,
    save_lora,
)
from nanodiffusion.lora.names import layers_of
from nanodiffusion.nets.sd_unet import SD15, SD21, SDXL, SDUNet, SDUNetConfig
from nanodiffusion.pretrained.layouts import module_names
from nanodiffusion.pretrained.recognise import published
from nanodiffusion.text import CLIP_BIGG, CLIP_H, CLIP_L, CLIPText, TextConfig

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = TextConfig(width=12, layers=2, heads=2, mlp=20, vocab=40, positions=8, eos=39)
TEXT_L = replace(TEXT, width=8)
TEXT_G = replace(TEXT, width=16, activation="gelu", projection=10)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
MLP = ["fc1", "fc2", "q_proj", "k_proj", "v_proj", "out_proj"]
LINEAR = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj"]
CONV = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out"]
DIFFUSERS = {"unet": "unet", "text": "text_encoder", "text_2": "text_encoder_2"}

Nets = dict[str, nn.Module]


# -- models and LoRAs of the reference libraries -----------------------------------------------------------------------


def reference_text(c: TextConfig) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=c.vocab,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp,
        projection_dim=c.projection or c.width,
        max_position_embeddings=c.positions,
        hidden_act=c.activation,
        eos_token_id=c.eos,
        bos_token_id=0,
        pad_token_id=1,
    )
    return randomise((CLIPTextModelWithProjection if c.projection else CLIPTextModel)(config)).eval()


@functools.cache
def _references(c: SDUNetConfig) -> Nets:
    texts = {"text": TEXT} if c is SD1 else {"text": TEXT_L, "text_2": TEXT_G}
    return {"unet": reference_unet(c), **{target: reference_text(text) for target, text in texts.items()}}


@functools.cache
def _ours(c: SDUNetConfig) -> Nets:
    texts = {"text": CLIPText(TEXT)} if c is SD1 else {"text": CLIPText(TEXT_L), "text_2": CLIPText(TEXT_G)}
    nets: Nets = {"unet": SDUNet(c), **texts}
    for target, net in _references(c).items():
        state = {name.removeprefix("text_model."): t for name, t in net.state_dict().items()}
        wanted = {name.removeprefix("text_model."): name for name in nets[target].state_dict()}
        nets[target].load_state_dict({wanted[name]: t for name, t in state.items()})
    return {target: net.eval() for target, net in nets.items()}


def references(c: SDUNetConfig) -> Nets:
    """The U-Net of diffusers and the text encoders of transformers."""
    return copy.deepcopy(_references(c))


def ours(c: SDUNetConfig) -> Nets:
    """Our nets with the references' weights."""
    return copy.deepcopy(_ours(c))


@dataclass
class Made:
    """A LoRA that peft made: per target its model, its tensors (A, B, alpha) by layer, and what it says the change is."""

    config: SDUNetConfig
    models: dict[str, Any]
    pairs: dict[str, dict[str, tuple[Tensor, Tensor, float]]]
    deltas: dict[str, dict[str, Tensor]]


def make(config: SDUNetConfig, modules: list[str]) -> Made:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    made = Made(config, {}, {}, {})
    for seed, (target, net) in enumerate(references(config).items()):
        chosen = modules if target == "unet" else MLP
        ranks = {"to_k": 2, "conv1": 3} if "conv1" in chosen else {("to_k" if target == "unet" else "k_proj"): 2}
        alphas = {("attn2.to_k" if target == "unet" else "fc1"): 7.0}
        options = LoraConfig(r=4, lora_alpha=2, target_modules=chosen, rank_pattern=ranks, alpha_pattern=alphas)
        made.models[target] = model = get_peft_model(net, options)
        g = torch.Generator().manual_seed(seed)
        tuned = {n: m for n, m in net.named_modules() if isinstance(m, BaseTunerLayer)}
        for p in (p for m in tuned.values() for p in (m.lora_A.default.weight, m.lora_B.default.weight)):
            p.data = torch.randn(p.shape, generator=g) * 0.3
        made.deltas[target] = {full(target, n): m.get_delta_weight("default").detach() for n, m in tuned.items()}
        made.pairs[target] = {
            full(target, n): (
                m.lora_A.default.weight.data,
                m.lora_B.default.weight.data,
                m.scaling["default"] * m.r["default"],
            )
            for n, m in tuned.items()
        }
        assert model.get_nb_trainable_parameters()[0] > 0
    return made


def full(target: str, name: str) -> str:
    """A layer's published name: transformers 5 has dropped "text_model." from those of CLIPTextModel."""
    return name if target == "unet" or name.startswith("text_") else f"text_model.{name}"


@pytest.fixture(scope="module")
def sd1() -> Made:
    return make(SD1, LINEAR + CONV)


@pytest.fixture(scope="module")
def xl() -> Made:
    return make(XL, LINEAR)


@pytest.fixture(scope="module")
def attention() -> Made:
    return make(SD1, ATTENTION)


# -- their files -------------------------------------------------------------------------------------------------------

Named = dict[str, Tensor]


def folded(made: Made) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Pairs with alpha in B, for dialects that have none."""
    return {
        target: {name: (a, b * (alpha / len(a))) for name, (a, b, alpha) in layers.items()}
        for target, layers in made.pairs.items()
    }


def in_diffusers_names(made: Made) -> Named:
    return {
        f"{DIFFUSERS[target]}.{name}.lora_{role}.weight": tensor
        for target, layers in folded(made).items()
        for name, pair in layers.items()
        for role, tensor in zip("AB", pair)
    }


def write(folder: Path, tensors: Named, **header: str) -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "lora.safetensors", metadata=header or None)
    return folder / "lora.safetensors"


def with_alpha(made: Made, name: Callable[[str, str], str], down: str, up: str) -> Named:
    """Tensors named by `name` (target, layer), with alpha beside them."""
    out: Named = {}
    for target, layers in made.pairs.items():
        for layer, (a, b, alpha) in layers.items():
            key = name(target, layer)
            out |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b, f"{key}.alpha": torch.tensor(alpha)}
    return out


def flat(prefixes: str) -> Callable[[str, str], str]:
    table = dict(zip(DIFFUSERS, prefixes.split()))
    return lambda target, layer: f"{table[target]}_{layer.replace('.', '_')}"


def original_names(made: Made) -> dict[str, str]:
    names = [name for name, _ in _references(made.config)["unet"].named_parameters()]
    return {our: their for their, our in module_names("unet", names).items()}


def kohya(made: Made, folder: Path) -> Path:
    prefixes = "lora_unet lora_te" if made.config is SD1 else "lora_unet lora_te1 lora_te2"
    return write(folder, with_alpha(made, flat(prefixes), "lora_down", "lora_up"))


def kohya_original(made: Made, folder: Path) -> Path:
    original, name = original_names(made), flat("lora_unet lora_te1 lora_te2")
    tensors = with_alpha(made, lambda t, n: name(t, original.get(n, n)), "lora_down", "lora_up")
    return write(folder, tensors, ss_base_model_version="sdxl_base_v1-0")


def kohya_by_diffusers(made: Made, folder: Path) -> Path:
    from diffusers.utils import convert_state_dict_to_kohya

    return write(folder, convert_state_dict_to_kohya(in_diffusers_names(made)))


def kohya_half(made: Made, folder: Path) -> Path:
    tensors = load_file(kohya(made, folder))
    return write(folder, {name: t.half() for name, t in tensors.items()})


def lycoris(made: Made, folder: Path) -> Path:
    return write(folder, with_alpha(made, flat("lycoris lora_te lora_te2"), "lora_down", "lora_up"))


def diffusers_with_metadata(made: Made, folder: Path) -> Path:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    names = {"unet": "unet", "text": "text_encoder", "text_2": "text_encoder_2"}
    state = {
        f"{names[t]}_lora_layers": {
            k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(m).items()
        }
        for t, m in made.models.items()
    }
    metadata = _collate_lora_metadata({names[t]: m for t, m in made.models.items()})
    pipe = StableDiffusionPipeline if made.config is SD1 else StableDiffusionXLPipeline
    pipe.save_lora_weights(folder, **state, **metadata)
    return folder


def diffusers_older(made: Made, folder: Path) -> Path:
    """unet.X.lora.down.weight and text_encoder.X.lora_linear_layer.down.weight."""
    from diffusers.utils import convert_state_dict_to_diffusers

    tensors = convert_state_dict_to_diffusers({k: v for k, v in in_diffusers_names(made).items() if ".to_" in k})
    text = {k: v for k, v in in_diffusers_names(made).items() if k.startswith("text")}
    older = {k.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): v for k, v in tensors.items()}
    linear = {"lora_A": "lora_linear_layer.down", "lora_B": "lora_linear_layer.up"}
    return write(folder, older | {re.sub("lora_[AB]", lambda m: linear[m[0]], k): v for k, v in text.items()})


def processors(made: Made, folder: Path, prefix: str = "unet.") -> Path:
    """The oldest: attention processors, and CLIP's projections called as the U-Net's."""
    tensors: Named = {}
    for key, tensor in in_diffusers_names(made).items():
        key = re.sub(r"\.(attn\d)\.(to_\w+?)(\.0)?\.lora_", r".\1.processor.\2_lora.", key)
        key = re.sub(r"self_attn\.(\w+)_proj\.lora_", r"self_attn.to_\1_lora.", key)
        key = re.sub(r"(mlp\.fc\d)\.lora_", r"\1.lora_linear_layer.", key)
        if prefix or key.startswith("unet."):
            key = re.sub(
                r"^unet\.", prefix, key.replace(".A.weight", ".down.weight").replace(".B.weight", ".up.weight")
            )
            tensors[key] = tensor
    return write(folder, tensors)


def bare_processors(made: Made, folder: Path) -> Path:
    return processors(made, folder, prefix="")


def network_alphas(made: Made, folder: Path) -> Path:
    """diffusers' names with its own name for alpha, X.to_q_lora.down.weight.alpha."""
    tensors: Named = {}
    for target, layers in made.pairs.items():
        for layer, (a, b, alpha) in layers.items():
            key = f"{DIFFUSERS[target]}.{layer}.lora"
            if target == "unet":
                key = re.sub(r"\.(to_\w+?)(\.0)?\.lora$", r".processor.\1_lora", key)
            tensors |= {f"{key}.down.weight": a, f"{key}.up.weight": b, f"{key}.down.weight.alpha": torch.tensor(alpha)}
    return write(folder, tensors)


def peft(made: Made, folder: Path) -> Path:
    made.models["unet"].save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_text(made: Made, folder: Path) -> Path:
    made.models["text"].save_pretrained(folder, save_embedding_layers=False)
    return folder / "adapter_model.safetensors"


def peft_text_2(made: Made, folder: Path) -> Path:
    made.models["text_2"].save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_in_memory(made: Made, folder: Path) -> Path:
    """A peft model's own state dict: lora_A.default.weight."""
    state = made.models["unet"].state_dict()
    tensors = {name: t for name, t in state.items() if "lora_" in name}
    (folder / "adapter_config.json").write_text(
        json.dumps(made.models["unet"].peft_config["default"].to_dict(), default=list)
    )
    return write(folder, tensors)


def comfyui(
    made: Made,
    folder: Path,
    prefixes: str = "diffusion_model. text_encoders.clip_l.transformer. text_encoders.clip_g.transformer.",
) -> Path:
    original, table = original_names(made), dict(zip(DIFFUSERS, prefixes.split()))
    tensors = with_alpha(made, lambda t, n: f"{table[t]}{original.get(n, n)}", "lora_A", "lora_B")
    return write(folder, tensors)


def comfyui_short(made: Made, folder: Path) -> Path:
    return comfyui(made, folder, "diffusion_model. clip_l. clip_g.")


def original(made: Made, folder: Path) -> Path:
    names, prefixes = original_names(made), "model.diffusion_model. cond_stage_model.transformer."
    table = dict(zip(DIFFUSERS, prefixes.split()))
    return write(folder, with_alpha(made, lambda t, n: f"{table[t]}{names.get(n, n)}", "lora_down", "lora_up"))


def original_open_clip(made: Made, folder: Path) -> Path:
    """SDXL's original names, but for the query, key and value that OpenCLIP holds as one."""
    their = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    wanted = {
        f"conditioner.embedders.1.model.transformer.resblocks.{name.split('.')[3]}.{new}": pair
        for name, pair in made.pairs["text_2"].items()
        for old, new in their.items()
        if name.endswith(old)
    }
    tensors = {f"{n}.lora_down.weight": a for n, (a, _, _) in wanted.items()}
    tensors |= {f"{n}.lora_up.weight": b for n, (_, b, _) in wanted.items()}
    return write(folder, tensors | {f"{n}.alpha": torch.tensor(alpha) for n, (_, _, alpha) in wanted.items()})


Writer = Callable[[Made, Path], Path]
DIALECTS: dict[str, tuple[str, Writer, str, str | None]] = {  # name -> which LoRA, writer, targets, layers it covers
    "kohya SD 1.x, LoCon": ("sd1", kohya, "unet text", None),
    "kohya fp16": ("sd1", kohya_half, "unet text", None),
    "kohya by diffusers": ("sd1", kohya_by_diffusers, "unet text", None),
    "kohya SDXL, diffusers blocks": ("xl", kohya, "unet text text_2", None),
    "kohya SDXL, original blocks": ("xl", kohya_original, "unet text text_2", None),
    "lycoris": ("sd1", lycoris, "unet text", None),
    "diffusers with metadata": ("sd1", diffusers_with_metadata, "unet text", None),
    "diffusers SDXL with metadata": ("xl", diffusers_with_metadata, "unet text text_2", None),
    "diffusers older": ("attention", diffusers_older, "unet text", None),
    "diffusers processors": ("attention", processors, "unet text", None),
    "diffusers processors without prefix": ("attention", bare_processors, "unet", None),
    "diffusers network alphas": ("attention", network_alphas, "unet text", None),
    "peft": ("sd1", peft, "unet", None),
    "peft text encoder": ("sd1", peft_text, "text", None),
    "peft second text encoder": ("xl", peft_text_2, "text_2", None),
    "peft in memory": ("sd1", peft_in_memory, "unet", None),
    "ComfyUI": ("xl", comfyui, "unet text text_2", None),
    "ComfyUI, short text names": ("xl", comfyui_short, "unet text text_2", None),
    "original SD 1.x": ("sd1", original, "unet text", None),
    "original OpenCLIP": ("xl", original_open_clip, "text_2", r"out_proj|fc\d"),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_changes_the_weights_as_peft_says(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fixture, writer, targets, covers = DIALECTS[name]
    made: Made = request.getfixturevalue(fixture)
    lora = resolve(read_lora(writer(made, tmp_path)), ours(made.config))
    assert set(lora.parts) == set(targets.split())
    for target in lora.parts:
        found = {layer: f.delta() * f.scale for layer, f in lora.parts[target].items()}
        wanted = {n: d for n, d in made.deltas[target].items() if covers is None or re.search(covers, n)}
        limit = 2e-3 if "fp16" in name else 1e-6
        assert set(found) == set(wanted)
        for layer, delta in wanted.items():
            torch.testing.assert_close(found[layer], delta.reshape(found[layer].shape), rtol=limit, atol=limit)


def test_rank_stabilised_alpha_is_divided_by_the_root_of_the_rank(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=9, lora_alpha=2, use_rslora=True, target_modules=["to_q"], init_lora_weights=False)
    model = get_peft_model(reference_unet(SD1), options)
    model.save_pretrained(tmp_path)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = resolve(read_lora(tmp_path), {"unet": SDUNet(SD1)}).parts["unet"][name]
    delta = model.base_model.model.get_submodule(name).get_delta_weight("default").detach()
    torch.testing.assert_close(factors.delta() * factors.scale, delta)
    assert factors.scale == pytest.approx(2 / 3)


def test_locon_with_a_middle_factor_is_the_composition_of_its_convolutions(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(s, generator=g) for s in ((3, 8, 1, 1), (3, 3, 3, 3), (8, 3, 1, 1)))
    key = "lora_unet_down_blocks_0_downsamplers_0_conv"
    tensors = {f"{key}.lora_{n}.weight": t for n, t in (("down", down), ("mid", mid), ("up", up))}
    path = write(tmp_path, {**tensors, f"{key}.alpha": torch.tensor(1.5)})
    net = SDUNet(SD1)
    layer, x = net.down_blocks[0].downsamplers[0].conv, torch.randn(2, 8, 6, 7, generator=g)
    conv = nn.functional.conv2d
    with torch.no_grad():
        wanted = layer(x) + 0.5 * conv(conv(conv(x, down), mid, stride=2, padding=1), up)
        applied = add_lora({"unet": net}, read_lora(path))
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(applied.fuse() and layer(x), wanted, rtol=1e-5, atol=1e-5)
    exported = lora_tensors(applied.lora)  # a pair, without the middle
    assert exported["unet.down_blocks.0.downsamplers.0.conv.lora_A.weight"].shape == (3, 8, 3, 3)


# -- outputs are diffusers' --------------------------------------------------------------------------------------------


def pipeline(config: SDUNetConfig) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    nets = references(config)
    none = dict.fromkeys(("vae", "tokenizer", "feature_extractor"))
    if config is SD1:
        return StableDiffusionPipeline(
            **none, unet=nets["unet"], text_encoder=nets["text"], scheduler=DDIMScheduler(), safety_checker=None,
            requires_safety_checker=False,
        )  # fmt: skip
    return StableDiffusionXLPipeline(
        **none, tokenizer_2=None, unet=nets["unet"], text_encoder=nets["text"], text_encoder_2=nets["text_2"],
        scheduler=DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip


def inputs(c: SDUNetConfig) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    out = {"x": torch.randn(2, 4, 8, 8, generator=g), "t": torch.tensor([3, 870])}
    out["context"] = torch.randn(2, 5, c.context_dim, generator=g)
    if c.added_dim:
        out |= {"pooled": torch.randn(2, c.pooled_dim, generator=g), "sizes": torch.arange(12.0).view(2, 6)}
    return out


IDS = torch.tensor([[0, 5, 9, 39, 39], [0, 2, 3, 4, 39]])


@torch.no_grad()
def outputs(nets: Nets, c: SDUNetConfig) -> dict[str, Tensor]:
    out = {t: net(IDS).last for t, net in nets.items() if t != "unet"}
    return {"unet": nets["unet"](**inputs(c)), **out}


@torch.no_grad()
def reference_outputs(pipe: Any, c: SDUNetConfig) -> dict[str, Tensor]:
    i = inputs(c)
    added = {"text_embeds": i["pooled"], "time_ids": i["sizes"]} if c.added_dim else None
    out = {"unet": pipe.unet(i["x"], i["t"], i["context"], added_cond_kwargs=added).sample}
    out["text"] = pipe.text_encoder(IDS).last_hidden_state
    return out | ({"text_2": pipe.text_encoder_2(IDS).last_hidden_state} if c.added_dim else {})


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for target in wanted:
        error = (found[target] - wanted[target]).abs().max() / wanted[target].abs().max()
        assert error <= limit, (target, float(error))


def assert_differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for target in a:
        assert (a[target] - b[target]).abs().max() / b[target].abs().max() > 1e-2, target


@pytest.mark.parametrize("fixture", ["sd1", "xl"])
def test_outputs_equal_diffusers_live_and_fused(fixture: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(fixture)
    path, pipe, nets = diffusers_with_metadata(made, tmp_path), pipeline(made.config), ours(made.config)
    plain = reference_outputs(pipe, made.config)
    pipe.load_lora_weights(path)
    wanted = reference_outputs(pipe, made.config)
    assert_differ(wanted, plain)
    lora = add_lora(nets, read_lora(path))
    assert_near(outputs(nets, made.config), wanted)
    lora.fuse()
    assert_near(outputs(nets, made.config), wanted)
    lora.remove()
    assert_near(outputs(nets, made.config), plain)


def test_two_loras_with_strengths_equal_diffusers(sd1: Made, attention: Made, tmp_path: Path) -> None:
    paths = [diffusers_with_metadata(m, tmp_path / str(k)) for k, m in enumerate((sd1, attention))]
    pipe, nets = pipeline(SD1), ours(SD1)
    for path, name in zip(paths, "ab"):
        pipe.load_lora_weights(path, adapter_name=name)
    a, b = (add_lora(nets, read_lora(path), strength) for path, strength in zip(paths, (0.7, -0.4)))
    pipe.set_adapters(["a", "b"], [0.7, -0.4])
    assert_near(outputs(nets, SD1), reference_outputs(pipe, SD1))
    pipe.set_adapters(["a", "b"], [0.2, 1.5])
    a.fuse().set(0.2)
    b.set(1.5)
    assert_near(outputs(nets, SD1), reference_outputs(pipe, SD1))


def unused_keys(pipe: Any, tensors: Named) -> set[str]:
    """Tensors of a file that no layer of the pipeline has taken."""
    held = [p for net in (pipe.unet, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if net
            for name, p in net.named_parameters() if "lora_" in name]  # fmt: skip
    return {
        n for n, t in tensors.items() if t.ndim > 1 and not any(t.shape == p.shape and torch.equal(t, p) for p in held)
    }


EXPORTS = [("sd1", "diffusers"), ("sd1", "kohya"), ("xl", "diffusers"), ("xl", "kohya"), ("xl", "kohya-sdxl")]


@pytest.mark.parametrize(("fixture", "layout"), EXPORTS)
def test_exports_load_in_diffusers_with_no_key_unused(
    fixture: str, layout: str, tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    made: Made = request.getfixturevalue(fixture)
    nets = ours(made.config)
    lora = read_lora(kohya(made, tmp_path))
    if layout != "diffusers":  # diffusers ignores alphas that differ from layer to layer in this layout
        lora = replace(lora, parts={t: {n: replace(f, alpha=2.5) for n, f in p.items()} for t, p in lora.parts.items()})
    applied = add_lora(nets, lora)
    save_lora(applied.lora, tmp_path / "out.safetensors", layout)
    pipe = pipeline(made.config)
    pipe.load_lora_weights(tmp_path, weight_name="out.safetensors")
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert not unused_keys(pipe, load_file(tmp_path / "out.safetensors"))
    assert_near(outputs(nets, made.config), reference_outputs(pipe, made.config))


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_what_is_saved_reads_back_bit_by_bit(sd1: Made, layout: str, tmp_path: Path) -> None:
    nets = ours(SD1)
    lora = resolve(read_lora(kohya(sd1, tmp_path)), nets)
    lora = Lora({t: {n: replace(f, alpha=f.rank / 2) for n, f in p.items()} for t, p in lora.parts.items()})
    save_lora(lora, tmp_path / "out.safetensors", layout)
    back = resolve(read_lora(tmp_path / "out.safetensors"), nets)
    assert back.parts.keys() == lora.parts.keys()
    for target, layer, factors in lora:
        again = back.parts[target][layer]
        torch.testing.assert_close(again.down, factors.down, rtol=0, atol=0)
        torch.testing.assert_close(again.up * again.scale, factors.up * factors.scale, rtol=0, atol=0)
    if layout == "kohya":
        assert all(back.parts[t][n].alpha == f.alpha for t, n, f in lora)


def test_alpha_that_half_precision_would_round_is_written_in_float32() -> None:
    up = torch.full((4, 3), 1e-4, dtype=torch.float16)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = lora_tensors(Lora({"unet": {layer: Factors(torch.ones(3, 4, dtype=torch.float16), up, 0.01)}}))
    torch.testing.assert_close(tensors[f"unet.{layer}.lora_B.weight"], up.float() * (0.01 / 3))


def test_sdxl_in_kohya_layout_has_the_names_its_trainer_writes() -> None:
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert layer + ".weight" in published("sdxl-unet")
    factors = Factors(torch.zeros(2, 640), torch.zeros(640, 2), 1.0)
    names = lora_tensors(Lora({"unet": {layer: factors}}), "kohya-sdxl")
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert set(names) == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}


KOHYA_MODULES = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", *MLP)
PUBLISHED = {  # config -> text encoders, how many modules kohya's trainer says it trains, layout
    "sd15": (SD15, {"text": CLIP_L}, {"unet": 192, "text": 72}, "kohya"),
    "sd21": (SD21, {"text": CLIP_H}, {"unet": 192, "text": 138}, "kohya"),
    "sdxl": (SDXL, {"text": CLIP_L, "text_2": CLIP_BIGG}, {"unet": 722, "text": 72, "text_2": 192}, "kohya-sdxl"),
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_every_layer_of_the_published_nets_is_found_again(family: str, tmp_path: Path) -> None:
    config, texts, counts, layout = PUBLISHED[family]
    with torch.device("meta"):
        nets: Nets = {"unet": SDUNet(config), **{target: CLIPText(text) for target, text in texts.items()}}
    made = new_lora(nets, 1, match=KOHYA_MODULES)
    made.remove()
    parts = {t: {n: f.map(lambda x: torch.zeros(x.shape)) for n, f in p.items()} for t, p in made.lora.parts.items()}
    assert {target: len(layers) for target, layers in parts.items()} == counts
    save_lora(Lora(parts), tmp_path / "lora.safetensors", layout)
    lora = read_lora(tmp_path / "lora.safetensors")
    assert f"for {family[:3] if family != 'sdxl' else family}" in str(lora)
    assert {(t, n) for t, n, _ in resolve(lora, nets)} == {(t, n) for t, p in parts.items() for n in p}


# -- on the net --------------------------------------------------------------------------------------------------------


def state(nets: Nets) -> dict[str, Tensor]:
    return {f"{t}.{name}": p.clone() for t, net in nets.items() for name, p in net.state_dict().items()}


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name].view(torch.uint8), tensor.view(torch.uint8), rtol=0, atol=0, msg=name)


@pytest.fixture
def net() -> Nets:
    return {"unet": randomise(SDUNet(SD1))}


def some_lora(net: Nets, seed: int, match: tuple[str, ...] = ("to_q", "to_k", "conv1", "proj_in")) -> Lora:
    """Random factors for a net."""
    g = torch.Generator().manual_seed(seed)
    applied = new_lora(net, 3, 2.0, match)
    applied.remove()
    fresh = lambda f: f.map(lambda t: 0.3 * torch.randn(t.shape, generator=g))
    return Lora({t: {n: fresh(f) for n, f in layers.items()} for t, layers in applied.lora.parts.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_unfusing_restores_the_very_tensors_in_any_order(net: Nets, dtype: torch.dtype) -> None:
    net["unet"].to(dtype)
    before = state(net)
    addresses = {name: p.data_ptr() for name, p in net["unet"].named_parameters()}
    a, b, c = (add_lora(net, some_lora(net, seed), 0.3 * seed + 0.1) for seed in range(3))
    for lora in (b, a, c):
        lora.fuse()
    assert any(not torch.equal(t.float(), before[n].float()) for n, t in state(net).items())
    for lora in (a, c, b):
        lora.unfuse()
    assert_same_bits(state(net), before)
    assert {name: p.data_ptr() for name, p in net["unet"].named_parameters()} == addresses


def test_the_fused_weights_do_not_depend_on_history(net: Nets) -> None:
    net["unet"].to(torch.bfloat16)
    loras = [add_lora(net, some_lora(net, seed), 0.5) for seed in range(3)]
    loras[0].fuse(), loras[2].fuse()
    wanted = state(net)
    loras[0].unfuse(), loras[1].fuse(), loras[0].fuse(), loras[2].set(3.0)
    loras[2].set(0.5), loras[1].unfuse()
    assert_same_bits(state(net), wanted)


def test_fused_bf16_weights_are_the_sum_in_float32_rounded_once(net: Nets) -> None:
    net["unet"].to(torch.bfloat16)
    before = {n: layer.weight.data for n, layer in layers_of(net["unet"]).items()}
    loras = [add_lora(net, some_lora(net, seed), s).fuse() for seed, s in ((0, 0.5), (1, -2.0))]
    for n, layer in layers_of(net["unet"]).items():
        parts = [(s.lora.parts["unet"][n], s.strength) for s in loras if n in s.lora.parts["unet"]]
        exact = before[n].double() + sum(s * f.scale * f.delta(torch.float64) for f, s in parts)
        # float32's own error may tip a tie: one unit in the last place of bf16
        torch.testing.assert_close(layer.weight.double(), exact.bfloat16().double(), rtol=2**-7, atol=1e-6)


def test_live_equals_fused_in_bf16_within_its_rounding(net: Nets) -> None:
    net["unet"].to(torch.bfloat16)
    args = {k: v.bfloat16() if k in ("x", "context") else v for k, v in inputs(SD1).items()}
    applied = add_lora(net, some_lora(net, 0))
    with torch.no_grad():
        live, fused = net["unet"](**args), applied.fuse() and net["unet"](**args)
    assert live.dtype == torch.bfloat16
    assert (live - fused).abs().max() / fused.abs().max() < 0.05


def test_a_live_lora_leaves_the_state_dict_and_the_parameters_alone(net: Nets) -> None:
    before, names = state(net), [name for name, _ in net["unet"].named_parameters()]
    applied = add_lora(net, some_lora(net, 0))
    assert_same_bits(state(net), before)
    assert [name for name, _ in net["unet"].named_parameters()] == names
    assert [name for name, _ in net["unet"].named_buffers()] == []
    assert outputs(net, SD1)["unet"].shape == (2, 4, 8, 8)
    applied.remove()
    assert all("forward" not in vars(layer) for layer in layers_of(net["unet"]).values())


def test_strength_zero_and_removal_give_the_output_without(net: Nets) -> None:
    plain = outputs(net, SD1)
    applied = add_lora(net, some_lora(net, 0), 0.0)
    torch.testing.assert_close(outputs(net, SD1), plain, rtol=0, atol=0)
    assert_differ(outputs(net, SD1) if applied.set(1.0) else {}, plain)
    applied.fuse().remove()
    torch.testing.assert_close(outputs(net, SD1), plain, rtol=0, atol=0)


def test_a_deep_copy_is_independent(net: Nets) -> None:
    applied = add_lora(net, some_lora(net, 0))
    wanted = outputs(net, SD1)
    other: Nets = {"unet": copy.deepcopy(net["unet"])}
    applied.set(2.0)
    torch.testing.assert_close(outputs(other, SD1), wanted, rtol=0, atol=0)


def test_a_net_that_moves_takes_its_loras_along(net: Nets) -> None:
    add_lora(net, some_lora(net, 0))
    wanted = outputs(net, SD1)
    net["unet"].double()
    live = {"unet": net["unet"](**{k: v.double() for k, v in inputs(SD1).items()})}
    assert_near(live, {"unet": wanted["unet"].double()})
    net["unet"].to("meta")
    away = {k: v.to("meta") for k, v in inputs(SD1).items()}
    assert net["unet"](**{**away, "x": away["x"].double(), "context": away["context"].double()}).is_meta
    places = vars(net["unet"].conv_in), vars(net["unet"].mid_block.attentions[0].proj_in)
    assert "forward" not in places[0]
    assert all(b.factors.down.is_meta for b in places[1]["forward"].__self__.branches.values())  # moved once, for good


def test_a_compiled_net_sees_loras_come_change_and_go(net: Nets) -> None:
    """Without building the net anew when only a strength changes: torch.compile ignores hooks added later."""
    seen: list[int] = []
    layer = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(2), nn.Linear(64, 5))
    compiled = torch.compile(layer, backend=lambda graph, _: seen.append(1) or graph, fullgraph=True)
    x = torch.randn(2, 4, 8, 8)
    agree = lambda: torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    plain = compiled(x)
    targets: Nets = {"unet": layer}
    parts = {"0": Factors(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), 2.0)}
    applied = Applied(
        Lora({"unet": parts | {"2": Factors(torch.randn(2, 64), torch.randn(5, 2), 2.0)}}), targets, 1.0, {}
    )
    for strength in (1.0, 0.5, 0.2, -3.0):
        applied.set(strength)
        agree()
    count = len(seen)
    applied.set(0.7)
    agree()
    applied.fuse()
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    applied.remove()
    torch.testing.assert_close(compiled(x), plain)
    assert len(seen) == count <= 3
    torch.compiler.reset()


# -- strength by block -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "layer", "block"),
    [
        ("unet", "conv_in", "in"),
        ("unet", "time_embedding.linear_1", "embedding"),
        ("unet", "down_blocks.1.attentions.0.proj_in", "down.1.0"),
        ("unet", "down_blocks.1.resnets.1.conv1", "down.1.1"),
        ("unet", "down_blocks.1.downsamplers.0.conv", "down.1.sampler"),
        ("unet", "mid_block.resnets.1.conv2", "mid"),
        ("unet", "up_blocks.2.attentions.2.proj_out", "up.2.2"),
        ("text", "text_model.encoder.layers.11.mlp.fc1", "text.11"),
        ("text_2", "text_projection", "text_2"),
    ],
)
def test_a_layer_is_in_one_block(target: str, layer: str, block: str) -> None:
    assert block_of(target, layer) == block


def scales(applied: Applied) -> dict[str, float]:
    """Block -> strength, as measured on the fused weights."""
    out: dict[str, float] = {}
    for place in applied.places:
        before = place.layer.weight.double()
        applied.fuse()
        change = place.layer.weight.double() - before
        applied.unfuse()
        delta = place.factors.scale * place.factors.delta(torch.float64)
        out.setdefault(place.block, round(float((change * delta).sum() / (delta * delta).sum()), 4))
    return out


@torch.no_grad()
def test_the_narrowest_block_named_counts(net: Nets) -> None:
    blocks = {"down": 0.5, "down.1": 2.0, "down.1.1": -1.0, "mid": 0.0, "unet": 3.0}
    found = scales(add_lora(net, some_lora(net, 0), 0.5, blocks))
    assert found == {"down.0.0": 0.25, "down.0.1": 0.25, "down.1.0": 1.0, "down.1.1": -0.5, "mid": 0.0} | {
        name: 0.25 if name.startswith("down") else 1.5 for name in found if name not in ("down.1.0", "down.1.1", "mid")
    }


def test_text_encoders_have_a_strength_of_their_own(sd1: Made, tmp_path: Path) -> None:
    nets, lora = ours(SD1), read_lora(kohya(sd1, tmp_path))
    plain = outputs(nets, SD1)
    changed = add_lora(nets, lora, 1.0, {"text": 0.0})
    without = outputs(nets, SD1)
    torch.testing.assert_close(without["text"], plain["text"], rtol=0, atol=0)
    changed.set(blocks={"unet": 0.0})
    torch.testing.assert_close(outputs(nets, SD1)["unet"], plain["unet"], rtol=0, atol=0)
    assert_differ({"text": outputs(nets, SD1)["text"]}, plain)


def test_block_weights_in_the_web_ui_s_order_name_our_blocks() -> None:
    sd1, xl = lbw(",".join(map(str, range(17)))), lbw(",".join(map(str, range(20))))
    assert sd1["text"] == 0 and sd1["down.0.0"] == 1 and sd1["down.2.1"] == 6 and sd1["mid"] == 7
    assert sd1["up.1.0"] == 8 and sd1["up.3.2"] == 16 and "up.0.0" not in sd1
    assert xl["in"] == 1 and xl["down.0.sampler"] == 4 and xl["down.1.0"] == 5 and xl["mid"] == 10
    assert xl["up.0.0"] == 11 and xl["up.0.2"] == xl["up.0.sampler"] == 13 and xl["up.2.2"] == 19
    assert len(lbw(",".join("1" * 26))) == 26 + 1 + 3 and len(lbw(",".join("1" * 12))) == 12 + 1 + 2


@pytest.mark.parametrize(("config", "n"), [("sd15-unet", 26), ("sdxl-unet", 20)])
def test_a_full_row_of_block_weights_covers_every_block(config: str, n: int) -> None:
    blocks = {block_of("unet", name.rpartition(".")[0]) for name in published(config)}
    assert set(lbw(",".join(["1"] * n))) == blocks - {"out", "embedding"} | {"text", "text_2"}


# -- training ----------------------------------------------------------------------------------------------------------


def test_a_new_lora_changes_nothing_and_then_learns(net: Nets) -> None:
    plain, teacher = outputs(net, SD1), add_lora(net, some_lora(net, 0, ("to_v",)))
    aim = outputs(net, SD1)["unet"]
    teacher.remove()
    net["unet"].requires_grad_(False)
    applied = new_lora(net, rank=3, alpha=6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(outputs(net, SD1), plain, rtol=0, atol=0)
    before = state(net)
    optimizer = torch.optim.Adam(applied.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = (net["unet"](**inputs(SD1)) - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert_same_bits(state(net), before)
    trained = outputs(net, SD1)
    applied.fuse()
    assert_near(outputs(net, SD1), trained)


def test_gradients_equal_peft_s(attention: Made, tmp_path: Path) -> None:
    nets, model = ours(SD1), attention.models["unet"]
    lora = resolve(read_lora(peft(attention, tmp_path)), {"unet": nets["unet"]})
    parts = {n: f.map(lambda t: nn.Parameter(t.clone())) for n, f in lora.parts["unet"].items()}
    applied = Applied(Lora({"unet": parts}), {"unet": nets["unet"]}, 1.0, {})
    i = inputs(SD1)
    nets["unet"](**i).square().sum().backward()
    model.zero_grad()
    model(i["x"], i["t"], i["context"]).sample.square().sum().backward()
    assert len(applied.parameters()) == 2 * len(parts)
    for name, factors in parts.items():
        peft_layer = model.base_model.model.get_submodule(name)
        for found, wanted in zip(factors.tensors, (peft_layer.lora_A.default.weight, peft_layer.lora_B.default.weight)):
            error = (found.grad - wanted.grad).abs().max() / wanted.grad.abs().max()
            assert error < 1e-4, name


def test_a_half_precision_net_trains_float32_factors_also_when_recomputing(net: Nets) -> None:
    unet = net["unet"].to(torch.bfloat16).requires_grad_(False).train()
    applied = new_lora(net, rank=2, match=("to_q", "conv1"), generator=torch.Generator().manual_seed(0))
    args = {k: v.bfloat16() if k in ("x", "context") else v for k, v in inputs(SD1).items()}
    grads = []
    for checkpointing in (False, True):
        unet.checkpointing = checkpointing
        unet(**args).float().square().sum().backward()
        grads.append([p.grad for p in applied.parameters()])
        for p in applied.parameters():
            p.grad = None
    assert all(g.dtype == torch.float32 for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_new_factors_are_a_function_of_the_seed_and_start_as_peft_s(net: Nets) -> None:
    g = lambda: torch.Generator().manual_seed(7)
    a, b = new_lora(net, 2, generator=g()), new_lora(net, 2, generator=g())
    torch.testing.assert_close(a.parameters(), b.parameters(), rtol=0, atol=0)
    for _, _, factors in new_lora(net, 8, match=("to_q", "conv1"), generator=g()).lora:
        bound = factors.down[0].numel() ** -0.5  # kaiming with a = sqrt(5)
        assert factors.down.abs().max() <= bound < 1.5 * factors.down.abs().max() and not factors.up.any()


# -- what a user can get wrong -----------------------------------------------------------------------------------------


def a_pair(key: str, width: int = 12, down: str = "lora_down", up: str = "lora_up", rank: int = 2) -> Named:
    return {f"{key}.{down}.weight": torch.zeros(rank, width), f"{key}.{up}.weight": torch.zeros(8, rank)}


Q, K = (f"down_blocks_0_attentions_0_transformer_blocks_0_attn{n}" for n in ("1_to_q", "2_to_k"))
BROKEN: dict[str, tuple[Named, str]] = {
    "unknown layer": (a_pair(f"lora_unet_{Q}x", 8), rf"no layer of unet\n.*\n.*1 of 1: {Q}x\n.*nearest: {Q}x -> {Q}$"),
    "another family": (a_pair(f"lora_unet_{K}", 2048), r"another family.*\n.*\n.*12 text features\)\n.*sdxl \(2048"),
    "another shape": (a_pair(f"lora_unet_{Q}", 16), r"another shape\n.*\n.*\(8, 8\)\n.*\(8, 16\)"),
    "text encoder not given": (
        a_pair("lora_te_text_model_encoder_layers_0_mlp_fc1"),
        r"changes text, which was not given",
    ),
    "twice": (
        a_pair(f"lora_unet_{Q}", 8) | a_pair("unet." + "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 8),
        "twice",
    ),
    "DoRA": (a_pair(f"lora_unet_{Q}", 8) | {f"lora_unet_{Q}.dora_scale": torch.ones(8)}, "no plain LoRA: DoRA"),
    "DoRA of peft": (a_pair("unet.a", 8) | {"unet.a.lora_magnitude_vector": torch.ones(8)}, "no plain LoRA: DoRA"),
    "LoHa": ({f"lora_unet_{Q}.hada_w1_a": torch.ones(8, 2)}, "no plain LoRA: LoHa"),
    "LoKr": ({f"lora_unet_{Q}.lokr_w1": torch.ones(8, 2)}, "no plain LoRA: LoKr"),
    "full difference": ({f"lora_unet_{Q}.diff": torch.ones(8, 8)}, "no plain LoRA: full difference"),
    "OFT": ({f"lora_unet_{Q}.oft_blocks": torch.ones(8, 8)}, "no plain LoRA: OFT"),
    "biases": (a_pair("unet.a", 8) | {"unet.a.lora_B.bias": torch.ones(8)}, "LoRA with biases"),
    "half a layer": ({f"lora_unet_{Q}.lora_down.weight": torch.zeros(2, 8)}, r"half of this layer.*\n.*\n.*up"),
    "two ranks": (
        {**a_pair(f"lora_unet_{Q}", 8), f"lora_unet_{Q}.lora_up.weight": torch.zeros(8, 3)},
        "belong together",
    ),
    "no matrices": ({f"lora_unet_{Q}.lora_{n}.weight": torch.tensor(1.0) for n in ("down", "up")}, "belong together"),
    "two adapters": (
        a_pair("unet.x", 8, "lora_A.a", "lora_B.a") | a_pair("unet.x", 8, "lora_A.b", "lora_B.b"),
        "twice",
    ),
    "a middle that does not fit": (
        {f"lora_unet_{Q}.lora_{n}.weight": torch.ones(2, 2, 1, 1 + (n == "down")) for n in ("down", "mid", "up")},
        "belong together",
    ),
    "alpha alone": (a_pair(f"lora_unet_{Q}", 8) | {f"lora_unet_{K}.alpha": torch.tensor(1.0)}, "alpha without factors"),
    "alpha no number": (a_pair(f"lora_unet_{Q}", 8) | {f"lora_unet_{Q}.alpha": torch.tensor(torch.nan)}, "one finite"),
    "a checkpoint": ({"conv_in.weight": torch.zeros(8, 4, 3, 3)}, r"this is no LoRA\n.*\n.*\n.*conv_in.weight"),
    "stray tensor": (
        a_pair(f"lora_unet_{Q}", 8) | {"logit_scale": torch.tensor(1.0)},
        r"belong to no LoRA\n.*\n.*\n.*logit_scale",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_does_not_fit_is_refused_and_the_net_untouched(name: str, net: Nets, tmp_path: Path) -> None:
    tensors, message = BROKEN[name]
    path, before = write(tmp_path, tensors), state(net)
    with pytest.raises(UserError, match=message) as e:
        add_lora(net, read_lora(path))
    assert str(path) in str(e.value) and len(str(e.value).splitlines()) <= 6
    assert_same_bits(state(net), before)
    assert all("forward" not in vars(layer) for layer in layers_of(net["unet"]).values())


def test_a_lora_for_sd1_on_sdxl_says_so_although_its_layers_are_not_there(sd1: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another family of models\n.*\n.*24 text features\)\n.*12 text features\)"):
        add_lora(ours(XL), read_lora(kohya(sd1, tmp_path)))


def test_a_text_encoder_that_is_left_out_is_not_missed(sd1: Made, tmp_path: Path) -> None:
    nets = ours(SD1)
    applied = add_lora({"unet": nets["unet"]}, read_lora(kohya(sd1, tmp_path)), 1.0, {"text": 0})
    assert list(applied.lora.parts) == ["unet"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.set(float("nan")), "finite number"),
        (lambda a: a.set(blocks={"down.9": 1.0}), "no such block"),
        (lambda a: a.set(blocks={"mid": float("inf")}), "finite number"),
    ],
)
def test_a_strength_that_makes_no_sense_is_refused_and_nothing_changes(net: Nets, change: Any, message: str) -> None:
    applied = add_lora(net, some_lora(net, 0), 0.3)
    wanted = outputs(net, SD1)
    with pytest.raises(UserError, match=message):
        change(applied)
    torch.testing.assert_close(outputs(net, SD1), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net, _: new_lora(net, 0), "needs a rank"),
        (lambda net, _: new_lora(net, match=("to_qq",)), "no layer matches"),
        (lambda net, _: lbw("1,0"), "12, 17, 20, 26"),
        (lambda net, _: lbw("1,x"), "numbers between commas"),
        (lambda net, folder: read_lora(folder), "cannot tell the LoRA"),
        (lambda net, folder: read_lora(folder / "a.safetensors"), "cannot load"),
        (lambda net, _: lora_tensors(some_lora(net, 0), "kohyaa"), "did you mean 'kohya'"),
        (lambda net, _: lora_tensors(Lora({}, "kohya")), "resolve"),
        (lambda net, _: lora_tensors(some_lora({"unet": net["unet"]}, 0), "kohya-sdxl"), "SDXL has no such layer"),
        (lambda net, _: add_lora({"text_encoder": net["unet"]}, some_lora(net, 0)), "unknown target"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(net: Nets, tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(net, tmp_path)


def test_a_peft_file_without_its_configuration_is_refused(attention: Made, tmp_path: Path) -> None:
    (peft(attention, tmp_path) / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"how strong it is\n.*\n.*adapter_config.json"):
        read_lora(tmp_path)


def test_a_pattern_that_could_take_forever_is_refused(attention: Made, tmp_path: Path) -> None:
    path = peft(attention, tmp_path) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": {"(a+)+x": 1.0}}))
    with pytest.raises(UserError, match="configuration of this LoRA is damaged"):
        read_lora(tmp_path)


def test_a_forward_that_was_replaced_before_is_kept(net: Nets) -> None:
    layer, g = net["unet"].conv_in, torch.Generator().manual_seed(0)
    x, own = torch.randn(1, 4, 8, 8, generator=g), layer.forward
    plain = layer(x)
    layer.forward = lambda input: own(input) + 1
    applied = add_lora(net, some_lora(net, 0, ("conv_in",)))
    add = layer(x) - plain - 1
    assert add.abs().max() > 0.1
    applied.remove()
    torch.testing.assert_close(layer(x), plain + 1, rtol=0, atol=0)


def test_a_damaged_configuration_is_named(attention: Made, tmp_path: Path) -> None:
    peft(attention, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="configuration of this LoRA is damaged"):
        read_lora(tmp_path)


def test_a_lora_says_what_it_is(sd1: Made, tmp_path: Path) -> None:
    text = str(read_lora(kohya(sd1, tmp_path)))
    assert text == (
        "LoRA kohya: layers 12 of text, 199 of unet; rank 2, 3, 4, for an unknown family (12 text features)"
    )
