"""Pooled texts: words by random projection, and CLIP's vector against transformers'."""

import hashlib
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanodiffusion.errors import UserError
from nanodiffusion.text import open_text
from tests.sd_files import END, TEXTS, randomised, text_encoder, vocabulary_of, write_sd1, write_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = ["a photo of a red cat", "the blue house by the sea", "dog", "a castle and a puppy with a hat " * 9]


def signs(word: str, dim: int) -> torch.Tensor:
    """The bits of SHAKE-256 of a word, the highest of a byte first, as signs."""
    stream = hashlib.shake_256(word.encode()).digest(math.ceil(dim / 8))
    bits = [stream[i // 8] >> (7 - i % 8) & 1 for i in range(dim)]
    return torch.tensor([1.0 if bit else -1.0 for bit in bits], dtype=torch.float64)


# -- words -------------------------------------------------------------------------------------------------------------


def test_a_text_is_the_sum_of_its_words_and_half_its_pairs_scaled_to_a_mean_square_of_one():
    total = signs("red", 100) + signs("car", 100) + signs("9", 100)
    total += 0.5 * (signs("red car", 100) + signs("car 9", 100))
    expected = (total / total.square().mean().sqrt()).float()[None]
    torch.testing.assert_close(open_text("words:100").encode([" Red, CAR (9)!"]), expected)


def test_a_text_without_a_word_is_zeros_and_there_may_be_no_text_at_all():
    encoder = open_text("words")
    torch.testing.assert_close(encoder.encode(["", " \n", "?!", "_"]), torch.zeros(4, 768), rtol=0, atol=0)
    assert encoder.encode([]).shape == (0, encoder.dim) == (0, 768)


def test_texts_are_near_by_the_words_they_share_and_order_counts_a_little():
    red, turned, longer, other = open_text("words:4096").encode(
        ["the red car", "car red the", "the red car stops", "blue sky above"]
    )
    near = lambda a, b: float(a @ b) / 4096
    # of 3 words and 2 pairs: 3 / (3 + 2/4), whatever the order
    assert near(red, turned) == pytest.approx(3 / 3.5, abs=0.06)
    assert near(red, longer) == pytest.approx(3.5 / math.sqrt(3.5 * 4.75), abs=0.06)
    assert abs(near(red, other)) < 0.06


def test_letters_that_look_alike_in_unicode_are_one_word():
    composed, apart = "caf\u00e9 \u00c5", "cafe\u0301 A\u030a"
    rows = open_text("words:64").encode([composed, apart, "caf\u00c9 \u00e5"])
    torch.testing.assert_close(rows, rows[:1].expand(3, 64), rtol=0, atol=0)


def test_the_hash_tells_encoders_apart():
    assert open_text("words").sha256 == open_text("words:768").sha256 != open_text("words:64").sha256


# -- CLIP --------------------------------------------------------------------------------------------------------------


def write_clip(folder, kind="l"):
    """A whole tiny CLIP as transformers writes it, tokenizer beside: the folder and the model."""
    from transformers import CLIPConfig, CLIPModel

    size = len(vocabulary_of("tiny"))
    text = {**TEXTS[kind], "vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config={**text, "intermediate_size": 96, "max_position_embeddings": 77},
        vision_config={**vision, "image_size": 32, "patch_size": 16},
        projection_dim=48,
    )
    model = randomised(CLIPModel(config), 3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder, model


def ids(folder, texts):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def test_a_whole_clip_gives_the_projected_vector_of_transformers(tmp_path):
    folder, model = write_clip(tmp_path)
    pooled = model.text_model(ids(folder, TEXT)).pooler_output
    encoder = open_text(folder)
    assert encoder.dim == 48
    torch.testing.assert_close(encoder.encode(TEXT), model.text_projection(pooled), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_clip_as_openai_published_it_with_buffers_reads_the_same(tmp_path):
    folder, _ = write_clip(tmp_path)
    weights = load_file(folder / "model.safetensors")
    for part, n in (("text_model", 77), ("vision_model", 5)):
        weights[f"{part}.embeddings.position_ids"] = torch.arange(n)[None]
    before = open_text(folder).encode(TEXT)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(open_text(folder).encode(TEXT), before, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["l", "bigg"])
def test_a_text_encoder_alone_gives_transformers_vector_projected_where_it_has_a_projection(tmp_path, kind):
    model = text_encoder(kind)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    out = model(ids(tmp_path, TEXT))
    expected = out.text_embeds if kind == "bigg" else out.pooler_output
    torch.testing.assert_close(open_text(tmp_path).encode(TEXT), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_pipelines_folder_gives_its_text_encoders_vector(tmp_path):
    folder = write_sd1(tmp_path)
    out = text_encoder("l")(ids(folder / "tokenizer", TEXT))
    torch.testing.assert_close(open_text(folder).encode(TEXT), out.pooler_output, rtol=0, atol=1e-5)


def test_a_blank_text_is_zeros_whatever_its_neighbours_and_the_others_do_not_depend_on_them(tmp_path):
    encoder = open_text(write_clip(tmp_path)[0])
    rows = encoder.encode(["dog", " ", "", END])
    assert rows[0].abs().sum() > 0 and rows[3].abs().sum() > 0
    torch.testing.assert_close(rows[1:3], torch.zeros(2, 48), rtol=0, atol=0)
    torch.testing.assert_close(rows[:1], encoder.encode(["dog"]), rtol=0, atol=1e-6)
    assert encoder.encode([]).shape == (0, 48)


def test_the_hash_of_a_clip_is_of_its_weights(tmp_path):
    folder, _ = write_clip(tmp_path / "a")
    first = open_text(folder).sha256
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert open_text(folder).sha256 != first


# -- bad inputs --------------------------------------------------------------------------------------------------------


def spoilt(folder, how):
    write_clip(folder)
    if how == "no tokenizer":
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
    elif how == "a weight is missing":
        weights = load_file(folder / "model.safetensors")
        del weights["text_model.final_layer_norm.bias"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif how == "cut short":
        raw = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    elif how == "a file":
        return folder / "model.safetensors"
    return folder


@pytest.mark.parametrize("where", ["words:0", "words:x", "words:-3", "words:99999999", "no/such/folder/here"])
def test_a_name_that_is_none_is_one_message(where, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        open_text(where)
    assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.parametrize("how", ["no tokenizer", "a weight is missing", "cut short", "a file"])
def test_a_spoilt_clip_is_one_message_that_names_the_place(tmp_path, how):
    with pytest.raises(UserError) as caught:
        open_text(spoilt(tmp_path, how))
    assert str(tmp_path) in str(caught.value) and len(str(caught.value).splitlines()) <= 6
