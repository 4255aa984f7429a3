"""Textual inversion: every layout of file read, equal to diffusers in the prompt's cond, and what cannot be added."""

import pytest
import sd_text
import torch
from safetensors.torch import save_file
from sd_text import new_pipeline, ours_like, reference_cond, relative, same_cond

from nanodiffusion.errors import UserError
from nanodiffusion.text import CLIPText
from nanodiffusion.text.inversion import add, load_inversion, read_inversion
from nanodiffusion.text.tokenizer import CLIPTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
families = pytest.mark.parametrize("family", ["sd1", "sd2"])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def reason(match: str = "") -> object:
    return pytest.raises(UserError, match=match)


def vectors(n: int, d: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def written(path, tensors) -> str:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


# -- files -------------------------------------------------------------------------------------------------------------


def test_each_layout_is_read(tmp_path):
    many, one = vectors(3), vectors(1)[0]
    layouts = {
        "a1111.safetensors": ({"emb_params": many}, "a1111", {"text_encoder": many}),
        "converted.safetensors": ({"string_to_param.*": many}, "converted", {"text_encoder": many}),
        "learned_embeds.safetensors": ({"<birb-style>": one}, "<birb-style>", {"text_encoder": one[None]}),
        "several.safetensors": ({"<birb>": many}, "<birb>", {"text_encoder": many}),
        "xl.safetensors": ({"clip_l": many, "clip_g": many}, "xl", {"clip_l": many, "clip_g": many}),
    }
    for name, (tensors, token, want) in layouts.items():
        found = read_inversion(written(tmp_path / name, tensors))
        assert found.token == token
        assert found.vectors.keys() == want.keys()
        assert all(torch.equal(found.vectors[key], want[key]) for key in want)
        assert read_inversion(tmp_path / name, token="<mine>").token == "<mine>"


@pytest.mark.parametrize(
    ("name", "tensors", "match"),
    [
        ("a.safetensors", {"one": vectors(1), "two": vectors(1)}, "not a textual inversion"),
        ("a.safetensors", {}, "not a textual inversion"),
        ("a.safetensors", {"emb_params": vectors(2)[None]}, "not the vectors"),
        ("a.safetensors", {"emb_params": vectors(2).long()}, "not the vectors"),
        ("a.safetensors", {"emb_params": torch.zeros(0, 32)}, "not the vectors"),
        ("a.safetensors", {"emb_params": vectors(2) / 0}, "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, name, tensors, match):
    with reason(match):
        read_inversion(written(tmp_path / name, tensors))


def test_pickles_are_not_opened_and_the_way_out_is_said(tmp_path):
    for name in ("birb.pt", "birb.bin", "BIRB.PT"):
        with reason("nanodiffusion convert .*safetensors"):
            read_inversion(tmp_path / name)
    torch.save({"<birb>": vectors(1)}, tmp_path / "birb.safetensors")
    with reason("pickle"):
        read_inversion(tmp_path / "birb.safetensors")
    with reason("nothing"):
        read_inversion(tmp_path / "none.safetensors")


# -- in a prompt -------------------------------------------------------------------------------------------------------

PROMPTS = ["a photo of <birb>", "<BIRB>, the cat and a<birb>house!", "MyStyle castle"]


@families
@pytest.mark.parametrize("n", [1, 4])
def test_cond_is_diffusers(family, n):
    pipe = new_pipeline(family)
    text = ours_like(pipe)
    width = pipe.text_encoder.config.hidden_size
    birb, style = vectors(n, width), vectors(1, width, 1)
    pipe.load_textual_inversion({"<birb>": birb if n > 1 else birb[0]})
    pipe.load_textual_inversion({"mystyle": style[0]})
    text = add(add(text, "<birb>", birb), "mystyle", style[0])
    prompts = (
        PROMPTS if n == 1 else [p.replace("<BIRB>", "<birb>") for p in PROMPTS]
    )  # its expansion knows case, ours does not
    got = text.encode(prompts, "a <birb> hat", clip_skip=1)
    for a, b in zip(got, reference_cond(pipe, prompts, ["a <birb> hat"] * 3, clip_skip=1)):
        same_cond(a, b)


@pytest.mark.parametrize("n", [1, 3])
def test_cond_of_two_encoders_is_diffusers(tmp_path, n):
    pipe = new_pipeline("sdxl")
    text = ours_like(pipe)
    file = written(tmp_path / "<birb>.safetensors", {"clip_l": vectors(n, 32), "clip_g": vectors(n, 40, 1)})
    text = load_inversion(text, file)
    second = {"tokenizer": pipe.tokenizer_2, "text_encoder": pipe.text_encoder_2}
    pipe.load_textual_inversion({"<birb>": vectors(n, 32)}, tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    pipe.load_textual_inversion({"<birb>": vectors(n, 40, 1)}, **second)
    prompts = ["a photo of <birb>", "cat <birb> <birb>"]
    for a, b in zip(text.encode(prompts, "dog"), reference_cond(pipe, prompts, ["dog"] * 2)):
        same_cond(a, b)


def test_a_saved_pipelines_added_tokens_are_found(tmp_path):
    """A pipeline saved after load_textual_inversion: the tokens are in its tokenizer, the vectors in its table."""
    pipe = new_pipeline("sd1")
    pipe.load_textual_inversion({"<birb>": vectors(3)})
    pipe.tokenizer.save_pretrained(tmp_path)
    tokenizer = CLIPTokenizer.from_folder(tmp_path)
    rows = pipe.text_encoder.get_input_embeddings().weight[-3:]
    net = sd_text.ours_of(pipe.text_encoder)
    found = net.token_embedding(tokenizer(["a <birb>"]))[0, 2:5]
    assert torch.equal(found, rows) and torch.equal(rows, vectors(3))


def test_the_encoder_given_stays_as_it_is_and_shares_its_layers():
    text = ours_like(new_pipeline("sd1"))
    before = text.encode("a <birb>")[0]["context"]
    size, rows = len(text.parts[0].tokenizer), text.parts[0].net.config.vocab
    more = add(text, "<birb>", vectors(2))
    old, new = text.parts[0].net, more.parts[0].net
    assert torch.equal(text.encode("a <birb>")[0]["context"], before)
    assert relative(more.encode("a <birb>")[0]["context"], before) > 0.01
    assert torch.equal(more.encode("")[0]["context"], text.encode("")[0]["context"])
    assert (len(text.parts[0].tokenizer), old.config.vocab) == (size, rows)
    assert new.config.vocab == rows + 2 == len(new.text_model.embeddings.token_embedding.weight)
    table = "text_model.embeddings.token_embedding.weight"
    pairs = [(a, b) for (name, a), b in zip(old.named_parameters(), new.parameters()) if name != table]
    assert all(a is b for a, b in pairs)
    fresh = CLIPText(new.config)
    fresh.load_state_dict(new.state_dict(), strict=True)  # what it saves is a checkpoint of its own
    ids = more.parts[0].tokenizer(["a <birb>"])
    assert torch.equal(fresh(ids).last, new(ids).last)


def test_a_word_is_only_found_whole():
    text = add(ours_like(new_pipeline("sd1")), "my-style", vectors(2))
    tokenizer = text.parts[0].tokenizer
    (group,) = tokenizer.added.values()
    assert group in tokenizer.groups("cat,my-style!") and group in tokenizer.groups("MY-STYLE")
    assert group not in tokenizer.groups("my-styles") and group not in tokenizer.groups("amy-style")


def test_an_embedding_in_no_prompt_is_said():
    text = add(ours_like(new_pipeline("sd1")), "<birb>", vectors(1))
    with reason("<birb>"):
        text.encode(["a cat", "a dog"], "sea")
    text.encode(["a cat", "a (<birb>:1.2)"])
    text.encode("a cat", "<birb>")
    text.encode(["", ""])  # the unconditional input is no prompt
    text.check_added = False
    text.encode("a cat")


def test_what_cannot_be_added_is_said():
    one, two = ours_like(new_pipeline("sd1")), ours_like(new_pipeline("sdxl"))
    both = {"clip_l": vectors(1, 32), "clip_g": vectors(1, 40)}
    for text, token, given, match in (
        (one, "cat", vectors(1), "already"),
        (one, "Cat", vectors(1), "already"),
        (one, "<|endoftext|>", vectors(1), "already"),
        (add(one, "<birb>", vectors(1)), "<BIRB>", vectors(1), "already"),
        (one, "", vectors(1), "no prompt can name"),
        (one, "two words", vectors(1), "no prompt can name"),
        (one, "birb(1)", vectors(1), "no prompt can name"),
        (one, "<birb>", vectors(1, 40), "text_encoder"),
        (one, "<birb>", vectors(76), "more vectors"),
        (one, "<birb>", vectors(1)[None], "not the vectors"),
        (one, "<birb>", both, "another family"),
        (two, "<birb>", vectors(1), "another family"),
        (two, "<birb>", {"clip_l": vectors(1)}, "another family"),
        (two, "<birb>", {**both, "clip_g": vectors(1, 32)}, "clip_g"),
    ):
        with reason(match):
            add(text, token, given)
