"""CLIP's tokenizer and text encoder: equal to transformers', id for id and number for number, and what they refuse."""

import json
import random
import shutil

import pytest
import sd_text
import torch
from sd_text import END, gradients, ours_of, published, reference_net, relative
from torch.testing import assert_close

from nanodiffusion.errors import UserError
from nanodiffusion.text import CLIP_BIGG, CLIP_H, CLIP_L, CLIPText, TextConfig, mix_tokens, replace_token
from nanodiffusion.text.tokenizer import CLIPTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
pads = pytest.mark.parametrize("pad", [END, "!"])
kinds = pytest.mark.parametrize("kind", list(sd_text.SIZES))
VOCAB = 90


def reason(match: str = "") -> object:
    return pytest.raises(UserError, match=match)


# -- the tokenizer -----------------------------------------------------------------------------------------------------
# transformers 5 has one CLIPTokenizer, on the package tokenizers; the one in Python is gone, and OpenAI's stands for it.


def differences(pad: str, n: int, seed: int) -> list[str]:
    """Those of n random texts whose ids differ from transformers'."""
    ours, reference = sd_text.tokenizers("clip", pad)
    r = random.Random(seed)
    texts = [sd_text.random_text(r) for _ in range(n)]
    return [text for text, ids in zip(texts, reference(texts).input_ids) if ours.encode(text) != ids]


@pads
def test_tokenizer_is_transformers_on_any_text(pad):
    assert differences(pad, 1500, 0) == []


@pytest.mark.slow
@pads
def test_tokenizer_is_transformers_on_a_hundred_thousand_texts(pad):
    for seed in range(1, 6):
        assert differences(pad, 10_000, seed) == []


def test_tokenizer_is_openais_on_clean_text():
    theirs = sd_text.openai_tokenizer().SimpleTokenizer()
    ours = sd_text.tokenizers("clip")[0]
    r = random.Random(0)
    # Its cleaning (ftfy, HTML entities) has no part in CLIP's published tokenizer files, so: nothing to clean.
    words = [p for p in sd_text.PIECES if p.isascii() and "|" not in p] + ["Ünïcödé", "straße", "日本語", "🙂"]
    texts = [" ".join(r.choice(words) for _ in range(r.randint(0, 20))) for _ in range(300)]
    assert [ours.encode(t)[1:-1] for t in texts] == [theirs.encode(t) for t in texts]


@pads
def test_rows_are_cut_and_padded_as_transformers_does(pad):
    ours, reference = sd_text.tokenizers("clip", pad)
    texts = ["", "a puppy", "puppy! " * 60, "one, " * 37 + "two"]
    want = reference(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert_close(ours(texts), want)
    assert ours("a puppy")[0, :4].tolist() == [49406, 320, 6829, 49407]
    assert (
        ours(["a puppy", ""], length=5).tolist()
        == reference(["a puppy", ""], padding="max_length", max_length=5).input_ids
    )


def saved_today(path, pad):
    sd_text.tokenizers("tiny", pad)[1].save_pretrained(path)


def saved_by_version_4(path, pad):
    """vocab.json and merges.txt beside a tokenizer_config.json that lists the added tokens."""
    shutil.copytree(sd_text.folder(pad=pad), path)
    vocab = json.loads((path / "vocab.json").read_text())
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    listed = {vocab[t]: {"content": t, "normalized": t != "!", **flags} for t in (sd_text.START, END, pad)}
    config = {"bos_token": sd_text.START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": listed}))


def with_added_tokens(path, pad):
    """As of old, with tokens beyond the vocabulary."""
    shutil.copytree(sd_text.folder(pad=pad), path)
    n = len(json.loads((path / "vocab.json").read_text()))
    (path / "added_tokens.json").write_text(json.dumps({"<Cat>": n, "<dog>": n + 1}))


def bare(path, pad):
    path.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(sd_text.folder() / name, path / name)
    (path / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))


@pads
@pytest.mark.parametrize("write", [saved_today, saved_by_version_4, with_added_tokens, bare])
def test_every_kind_of_folder_is_read_as_transformers_reads_it(tmp_path, write, pad):
    from transformers import CLIPTokenizer as Reference

    write(tmp_path / "tokenizer", pad)
    ours = CLIPTokenizer.from_folder(tmp_path / "tokenizer")
    reference = Reference.from_pretrained(tmp_path / "tokenizer")
    r = random.Random(0)
    texts = [sd_text.random_text(r) for _ in range(200)] + ["a <CAT> on<dog>! " + END.upper() + " " + END]
    assert (len(ours), ours.pad) == (len(reference), reference.pad_token_id)
    assert [ours.encode(text) for text in texts] == reference(texts).input_ids


def test_files_alone_are_enough():
    from transformers import CLIPTokenizer as Reference

    files = [sd_text.folder("clip") / name for name in ("vocab.json", "merges.txt")]
    for pad, text in ((None, END), (0, "!")):
        ours = CLIPTokenizer.from_files(*files, pad=pad)
        reference = Reference(*map(str, files), pad_token=text)
        assert (
            ours("Hi! a cat!!", 12).tolist()[0]
            == reference("Hi! a cat!!", padding="max_length", max_length=12).input_ids
        )
    plain = CLIPTokenizer.from_files(*files, pad=0, special_pad=False)
    assert plain("hi!", 6).tolist() == [[49406, 1883, 256, 49407, 0, 0]]


def test_decoding_gives_back_the_words():
    ours = sd_text.tokenizers("clip")[0].with_token("<Birb>", (49408, 49409))
    assert ours.decode(ours.encode("A  Naïve puppy, <birb>!")[1:-1]) == "a naïve puppy , <birb>!"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("vocab.json", None, "vocab.json"),
        ("merges.txt", None, "merges.txt"),
        ("vocab.json", "{", "JSON"),
        ("vocab.json", "[1, 2]", "not a vocabulary"),
        ("vocab.json", '{"a": "b"}', "not a vocabulary"),
        ("vocab.json", '{"a": 0, "b": 1}', "do not belong together"),
        ("merges.txt", "a b c\n", "not a list of merges"),
        ("merges.txt", "q zz\n", "do not belong together"),
    ],
)
def test_damaged_tokenizer_files_are_named(tmp_path, name, content, match):
    folder = tmp_path / "tokenizer"
    shutil.copytree(sd_text.folder(), folder)
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with reason(match):
        CLIPTokenizer.from_folder(folder)


def test_what_is_no_text_is_refused():
    ours = sd_text.tokenizers()[0]
    for wrong in ("half a pair \ud83d", 3, None):
        with reason("no text"):
            ours.encode(wrong)
    with reason("no token has this id"):
        CLIPTokenizer.from_files(sd_text.folder() / "vocab.json", sd_text.folder() / "merges.txt", pad=10**6)


# -- the encoder -------------------------------------------------------------------------------------------------------


def ids(b: int = 3, n: int = 77, seed: int = 0) -> torch.Tensor:
    """Random tokens between start and end, each row of another length, the end repeated as padding."""
    found = torch.randint(0, VOCAB - 2, (b, n), generator=torch.Generator().manual_seed(seed))
    found[:, 0] = VOCAB - 2
    for row, length in zip(found, range(n // 2, n, 7)):
        row[length:] = VOCAB - 1
    return found


def hidden(net, given):
    out = net(given, output_hidden_states=True)
    return out.hidden_states, out.last_hidden_state, out[0] if out[0].ndim == 2 else out.pooler_output


@kinds
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_every_layer_is_transformers(kind, dtype, most):
    reference = reference_net(kind, VOCAB).to(dtype)
    ours = ours_of(reference)
    for given in (ids(), ids(1, 5), ids(2, 1)):
        layers, last, pooled = hidden(reference, given)
        found = ours(given)
        assert len(found.layers) == len(layers)
        for a, b in zip([*found.layers, found.last, found.pooled], [*layers, last, pooled]):
            assert relative(a, b) <= most


@kinds
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_gradients_are_transformers(kind, dtype, most):
    reference = reference_net(kind, VOCAB).to(dtype)
    ours = ours_of(reference)
    g = torch.Generator().manual_seed(2)
    draw = lambda like: torch.randn(like.shape, generator=g, dtype=dtype)
    layers, last, pooled = hidden(reference, ids())
    found = ours(ids())
    weights = [draw(t) for t in (last, pooled, layers[-2])]
    sum((w * t).sum() for w, t in zip(weights, (last, pooled, layers[-2]))).backward()
    sum((w * t).sum() for w, t in zip(weights, (found.last, found.pooled, found.layers[-2]))).backward()
    want = published(gradients(reference))
    got = gradients(ours)
    assert got.keys() == want.keys()
    for name in want:
        scale = (
            want[name].abs().max().clamp(min="k_proj.bias" in name)
        )  # a key's bias moves nothing: its gradient is noise
        assert float((got[name] - want[name]).abs().max() / scale) <= most, name


@kinds
def test_files_that_transformers_writes_fit_key_for_key(kind, tmp_path):
    from safetensors.torch import load_file

    reference = reference_net(kind, VOCAB)
    reference.save_pretrained(tmp_path)
    saved = published(load_file(tmp_path / "model.safetensors"))
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in ours_of(reference).state_dict().items()}


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [(CLIP_L, 196, 123_060_480), (CLIP_H, 372, 340_387_840), (CLIP_BIGG, 517, 694_659_840)],
)
def test_full_size_keys_and_shapes_are_transformers(config, tensors, parameters):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    theirs = CLIPTextConfig(
        hidden_size=config.width,
        intermediate_size=config.mlp,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        hidden_act=config.activation,
        projection_dim=config.projection or 512,
    )
    with torch.device("meta"):
        ours = CLIPText(config)
        reference = (CLIPTextModelWithProjection if config.projection else CLIPTextModel)(theirs)
    assert config.width // config.heads == 64
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in published(reference.state_dict()).items()}
    assert (len(shapes), sum(p.numel() for p in ours.parameters())) == (tensors, parameters)
    assert list(ours.buffers()) == []  # nothing that could stay on meta


@kinds
def test_token_plus_position_then_layers_is_the_whole(kind):
    ours = ours_of(reference_net(kind, VOCAB))
    given = ids()
    embeddings = ours.token_embedding(given) + ours.position_embedding(given.shape[1])
    for a, b in zip(ours.encode(embeddings, ours.end(given)), ours(given)):
        assert_close(a, b, rtol=0, atol=0)


def test_a_replaced_token_is_another_row_of_the_table():
    reference = reference_net("l", VOCAB)
    ours = ours_of(reference)
    given, vector = ids(), torch.randn(32, generator=torch.Generator().manual_seed(3))
    token = int(given[0, 3])
    edited = replace_token(ours.token_embedding(given), given, token, vector) + ours.position_embedding(77)
    table = reference.get_input_embeddings().weight
    assert relative(mix_tokens(ours, 5, 7), (table[5] + table[7]) / 2) < 1e-6
    assert relative(mix_tokens(ours, 5, 7, 0.35), 0.65 * table[5] + 0.35 * table[7]) < 1e-6
    with torch.no_grad():
        table[token] = vector
    assert relative(ours.encode(edited, ours.end(given)).last, reference(given).last_hidden_state) <= 1e-5


def test_pooled_is_read_at_the_first_end_token_whatever_larger_ids_there_are():
    reference = reference_net("bigg", VOCAB, eos=VOCAB - 5)
    given = ids()
    given[:, 20] = given[:, 30] = VOCAB - 5
    given[:, 10] = VOCAB - 1
    ours = ours_of(reference)
    assert ours.end(given).tolist() == [20, 20, 20]
    assert relative(ours(given).pooled, reference(given).text_embeds) <= 1e-5


def test_the_end_token_of_old_configs_is_understood():
    """Published config.json files of SD 1.5 and SDXL say eos_token_id 2, where transformers takes the largest id."""
    reference = reference_net("bigg", 49408, eos=2)
    given = torch.tensor([[49406, 2, 5, 49407, 49407], [49406, 49407, 0, 0, 0]])
    assert relative(ours_of(reference)(given).pooled, reference(given).text_embeds) <= 1e-5


def test_a_replacement_of_attention_is_told_to_look_back_only():
    ours = ours_of(reference_net("l", VOCAB))
    want = ours(ids()).last

    def masked(q, k, v, is_causal):
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        assert is_causal
        return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1) @ v

    for layer in ours.text_model.encoder.layers:
        layer.self_attn.attend = masked
    assert relative(ours(ids()).last, want) < 1e-5


def test_the_encoder_compiles_as_one_graph():
    ours = ours_of(reference_net("bigg", VOCAB))
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_close(compiled(ids()), ours(ids()))


def test_inputs_of_another_shape_are_refused():
    ours = CLIPText(TextConfig(8, 1, 2, 8, vocab=VOCAB))
    x = torch.zeros(2, 5, 8)
    for wrong, match in (
        (lambda: ours(torch.zeros(77).long()), "not token ids"),
        (lambda: ours(torch.zeros(1, 77)), "not token ids"),
        (lambda: ours(torch.zeros(1, 78).long()), "more tokens than places"),
        (lambda: ours.encode(torch.zeros(2, 5, 9), torch.zeros(2).long()), "another shape"),
        (lambda: ours.encode(x, torch.zeros(3).long()), "end"),
        (lambda: replace_token(x, torch.zeros(2, 4).long(), 0, x[0, 0]), "do not belong together"),
        (lambda: replace_token(x, torch.zeros(2, 5).long(), 0, torch.zeros(9)), "do not belong together"),
        (lambda: TextConfig(activation="relu"), "activation"),
        (lambda: TextConfig(heads=5), "width"),
        (lambda: TextConfig(layers=0), "layers"),
    ):
        with reason(match):
            wrong()
