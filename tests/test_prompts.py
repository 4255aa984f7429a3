"""Prompts: A1111's grammar, chunks and weights; cond as diffusers' pipelines make it; and what cannot be asked."""

import warnings

import pytest
import sd_text
import torch
from sd_text import ours_like, ours_of, pipeline, reference_cond, relative, same_cond
from torch.testing import assert_close

from nanodiffusion.errors import UserError
from nanodiffusion.text import CLIPText, TextConfig, replace_token
from nanodiffusion.text.prompts import TextEncoder, TextPart, chunks, emphasise, mix, parse

pytestmark = pytest.mark.usefixtures("one_thread")
families = pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
PROMPTS = ["a cat in the sea", "red castle! with a blue dog, 12 photos"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def reason(match: str = "") -> object:
    return pytest.raises(UserError, match=match)


# -- the grammar -------------------------------------------------------------------------------------------------------

GRAMMAR = {
    "": [],
    "plain text": [("plain text", 1)],
    "an (important) word": [("an ", 1), ("important", 1.1), (" word", 1)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "(word:1.3)": [("word", 1.3)],
    "(word: .5 )": [("word", 0.5)],
    "(word:-2)": [("word", -2)],
    "(one two:1.)": [("one two", 1)],
    "(a:b:1.2)": [("a:b", 1.2)],
    "[less]": [("less", 1 / 1.1)],
    "[less:0.5]": [("less:0.5", 1 / 1.1)],
    "((more))": [("more", 1.1 * 1.1)],
    "(a (b:2) [c])": [("a ", 1.1), ("b", 2.2), (" ", 1.1), ("c", 1)],
    "(a (b:2) c:0.5)": [("a ", 0.5), ("b", 1), (" c", 0.5)],
    r"\(plain\) \[too\] \\": [("(plain) [too] \\", 1)],
    r"(in \(both\):1.5)": [("in (both)", 1.5)],
    r"a \b c": [(r"a \b c", 1)],
    "(open": [("(open", 1)],
    "close)": [("close)", 1)],
    "[open (both)": [("[open ", 1), ("both", 1.1)],
    "(crossed ]": [("(crossed ]", 1)],
    "(cross [ed) ]": [("cross [ed", 1.1), (" ]", 1)],
    "smile :) frown :(": [("smile :) frown :(", 1)],
    "at 4:30) sharp": [("at 4:30) sharp", 1)],
    "(1.2.3:1.2.3)": [("1.2.3:1.2.3", 1.1)],
    "(word:12345)": [("word:12345", 1.1)],
    "()(:1.2)[]": [],
}


@pytest.mark.parametrize("prompt", GRAMMAR)
def test_weights_are_read_as_the_grammar_says(prompt):
    (found,) = parse(prompt)
    want = [(text, pytest.approx(weight)) for text, weight in GRAMMAR[prompt] if text.strip()]
    assert [(text, weight) for text, weight in found] == want


def test_break_ends_a_section_only_as_an_upper_case_word():
    assert parse("a BREAK b") == [[("a ", 1.0)], [(" b", 1.0)]]
    assert parse("(a BREAK b:2)c") == [[("a ", 2.0)], [(" b", 2.0), ("c", 1.0)]]
    assert parse("BREAK,BREAK") == [[], [(",", 1.0)], []]
    assert parse("breakfast Break BREAKFAST") == [[("breakfast Break BREAKFAST", 1.0)]]


@pytest.mark.parametrize(
    "prompt",
    ["(" * 99_999, "(:1" * 30_000, "[" * 50_000 + ")" * 50_000, ":" + "1" * 99_999, " " * 99_999, "\\" * 99_999],
)
def test_a_hostile_prompt_is_only_text(prompt):
    assert sum(len(text) for section in parse(prompt) for text, _ in section) in (
        len(prompt.strip()),
        len(prompt) // 2 + 1,
    )


def test_infinite_weight_is_refused():
    with reason("infinity"):
        parse("(" * 9999 + "a" + ")" * 9999)


# -- chunks ------------------------------------------------------------------------------------------------------------


def test_chunks_hold_75_tokens_and_end_at_break():
    tokenizer = sd_text.tokenizers()[0]
    length = lambda prompt: [len(chunk.ids) for chunk in chunks(tokenizer, parse(prompt))]
    assert length("") == [0]
    assert length("cat " * 75) == [75]
    assert length("cat " * 76) == [75, 1]
    assert length("cat " * 800) == [75] * 10 + [50]
    assert length("cat BREAK dog") == [1, 1]
    assert length("cat BREAK") == [1]
    assert length("BREAK cat") == [0, 1]
    assert length("BREAK BREAK") == [0, 0]
    assert length("cat " * 75 + "BREAK dog") == [75, 1]
    assert length("(cat:1.2) " * 76) == [75, 1]


def test_a_token_of_several_vectors_is_never_cut_in_two():
    tokenizer = sd_text.tokenizers()[0].with_token("<birb>", (1000, 1001, 1002))
    found = chunks(tokenizer, parse("cat " * 73 + "(<birb>:2)"))
    assert [len(chunk.ids) for chunk in found] == [73, 3]
    assert found[1].row(77) == [1.0, 2.0, 2.0, 2.0, *[1.0] * 73]
    assert [len(c.ids) for c in chunks(tokenizer, parse("cat " * 72 + "<birb>"))] == [75]


# -- cond, against diffusers -------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_cond_is_the_pipelines_at_every_clip_skip(family, skip):
    pipe = pipeline(family)
    negative = ["dog", "a house! on a hat"]
    want = reference_cond(pipe, PROMPTS, negative, clip_skip=skip or None)
    got = ours_like(pipe).encode(PROMPTS, negative, clip_skip=skip)
    for a, b in zip(got, want):
        same_cond(a, b)
    if skip:
        want = reference_cond(pipe, negative, clip_skip=skip)[0]  # A1111 skips for negative prompts too
        same_cond(ours_like(pipe).encode(PROMPTS, negative, negative_skip=skip)[1], want)


@families
def test_cond_is_the_pipelines_in_float64(family):
    pipe = pipeline(family, torch.float64)
    for a, b in zip(ours_like(pipe).encode(PROMPTS, ""), reference_cond(pipe, PROMPTS, ["", ""])):
        same_cond(a, b, 1e-10)


def test_each_encoder_of_sdxl_reads_its_own_prompt():
    pipe = pipeline("sdxl")
    second, against, against_2 = ["puppy", "sea"], ["blue", "red"], ["the", "hat"]
    want = reference_cond(pipe, PROMPTS, against, prompt_2=second, negative_prompt_2=against_2)
    got = ours_like(pipe).encode(PROMPTS, against, prompts_2=second, negative_2=against_2)
    for a, b in zip(got, want):
        same_cond(a, b)


@families
def test_one_negative_prompt_serves_all(family):
    text = ours_like(pipeline(family))
    for one, each in zip(text.encode(PROMPTS, "dog"), text.encode(PROMPTS, ["dog", "dog"])):
        assert one.keys() == each.keys()
        assert all(torch.equal(one[key], each[key]) for key in one)
    assert text.encode(PROMPTS)[1] is None
    assert {len(value) for value in text.encode("a cat")[0].values()} == {1}


@families
def test_what_one_chunk_leaves_out_is_named(family):
    pipe = pipeline(family)
    prompt = "cat " * 74 + "blue castle by the sea"
    with pytest.warns(UserWarning, match="castle by the sea"):
        cond, _ = ours_like(pipe).encode([prompt], max_chunks=1)
    same_cond(cond, reference_cond(pipe, [prompt])[0])


@families
def test_a_long_prompt_is_its_chunks_one_after_another(family):
    pipe = pipeline(family)
    words = (sd_text.sd_files.WORDS * 40)[: 75 * 10 + 20]  # a token each
    pieces = [" ".join(words[i : i + 75]) for i in range(0, len(words), 75)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cond, uncond = ours_like(pipe).encode([" ".join(words), "cat"], "dog")
    each = reference_cond(pipe, pieces)[0]
    short, against, empty = reference_cond(pipe, ["cat", "dog", ""])[0]["context"]
    assert cond["context"].shape[1] == uncond["context"].shape[1] == 11 * 77
    assert relative(cond["context"][0], each["context"].flatten(0, 1)) <= 1e-5
    assert relative(cond["context"][1], torch.cat([short, *[empty] * 10])) <= 1e-5
    assert relative(uncond["context"][1], torch.cat([against, *[empty] * 10])) <= 1e-5
    if family == "sdxl":
        assert relative(cond["pooled"][0], each["pooled"][0]) <= 1e-5


def test_break_starts_a_chunk():
    pipe = pipeline("sdxl")
    cond, _ = ours_like(pipe).encode("a red cat BREAK the sea")
    want = reference_cond(pipe, ["a red cat", "the sea"])[0]["context"]
    assert relative(cond["context"][0], want.flatten(0, 1)) <= 1e-5


def test_without_the_grammar_a_prompt_is_plain_text():
    pipe = pipeline("sd2")
    prompts = ["a (cat:1.3) [by] \\(the\\) BREAK sea"]
    same_cond(ours_like(pipe).encode(prompts, emphasis="off")[0], reference_cond(pipe, prompts)[0])


# -- weights -----------------------------------------------------------------------------------------------------------


def weighted(z, weights, widths, restore):
    """A1111's "original" and "no norm" emphasis of one chunk: the encoder's output (77 d) times {place: weight}."""
    each = torch.tensor([weights.get(place, 1.0) for place in range(77)])[:, None]
    means = [(half.mean(), (half * each).mean()) for half in z.split(widths, dim=1)]
    halves = [half * each * (a / b if restore else 1) for half, (a, b) in zip(z.split(widths, dim=1), means)]
    return torch.cat(halves, dim=1)


@families
@pytest.mark.parametrize(("emphasis", "restore"), [("restore", True), ("scale", False)])
def test_weights_multiply_the_output_as_a1111_does(family, emphasis, restore):
    pipe = pipeline(family)
    text = ours_like(pipe)
    cond, uncond = text.encode(["a (red cat:1.5) [by] sea BREAK (dog)", "hat"], "(dog:.25)", emphasis=emphasis)
    want = reference_cond(pipe, ["a red cat by sea", "dog", "hat", ""])[0]
    widths = [part.net.config.width for part in text.parts]
    weights = [{2: 1.5, 3: 1.5, 4: 1 / 1.1}, {1: 1.1}, {}, {}]
    expected = [weighted(z, w, widths, restore) for z, w in zip(want["context"], weights)]
    assert relative(cond["context"], torch.stack(expected).unflatten(0, (2, 2)).flatten(1, 2)) <= 1e-5
    against = weighted(want["context"][1], {1: 0.25}, widths, restore)
    assert relative(uncond["context"][0, :77], against) <= 1e-5
    if family == "sdxl":
        assert relative(cond["pooled"], want["pooled"][[0, 2]]) <= 1e-5


def test_weights_of_one_change_no_bit():
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.ones(3, 7)
    weights[1, 2] = 1.4
    for restore in (True, False):
        found = emphasise(x, weights, restore)
        assert torch.equal(found[[0, 2]], x[[0, 2]])
        assert not torch.equal(found[1], x[1])
    assert_close(emphasise(x, weights).mean((1, 2)), x.mean((1, 2)), rtol=1e-5, atol=1e-6)
    text = ours_like(pipeline("sd1"))
    assert torch.equal(text.encode("a (cat:1) dog")[0]["context"], text.encode("a cat dog")[0]["context"])
    half = emphasise(x.half(), weights)
    assert half.dtype == torch.half and torch.equal(half[0], x[0].half())


# -- embeddings --------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("skip", [0, 1])
def test_embeddings_untouched_give_the_prompts_cond(family, skip):
    text = ours_like(pipeline(family))
    ids = [part.tokenizer(PROMPTS) for part in text.parts]
    found = text.from_embeddings([part.net.embed(i) for part, i in zip(text.parts, ids)], ids, skip)
    same_cond(found, text.encode(PROMPTS, clip_skip=skip)[0], 1e-6)


def test_a_token_put_in_anothers_place_gives_that_prompt():
    text = ours_like(pipeline("sd1"))
    (part,) = text.parts
    cat, dog = (part.tokenizer.groups(word)[0][0] for word in ("cat", "dog"))
    ids, net = part.tokenizer(["a photo of a cat"]), part.net
    vector = net.token_embedding(torch.tensor([[dog]]))[0, 0]
    edited = replace_token(net.token_embedding(ids), ids, cat, vector) + net.position_embedding()
    same_cond(text.from_embeddings([edited], [ids]), text.encode("a photo of a dog")[0], 1e-6)


def test_mixing_conds_is_linear():
    pipe = pipeline("sdxl")
    a, b = (ours_like(pipe).encode([p])[0] for p in PROMPTS)
    want = reference_cond(pipe, PROMPTS)[0]
    for key, value in mix(a, b, 0.65).items():
        assert relative(value, 0.35 * want[key][:1] + 0.65 * want[key][1:]) <= 1e-5
    long = ours_like(pipe).encode("cat BREAK dog")[0]
    with reason("cannot be mixed"):
        mix(a, long, 0.5)


# -- what cannot be asked ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": 3}, "prompts are text"),
        ({"prompts": None}, "prompts are text"),
        ({"prompts": ["a", 2]}, "prompts are text"),
        ({"prompts": ["a"], "negative": []}, "no prompt"),
        ({"prompts": ["a", "b", "c"], "negative": ["a", "b"]}, "not as many"),
        ({"prompts": ["a"], "negative": ["a", "b"]}, "not as many"),
        ({"prompts": ["a", "b"], "prompts_2": ["a", "b", "c"]}, "not as many"),
        ({"prompts": ["a"], "negative_2": ["a"]}, "negative_2"),
        ({"prompts": ["a"], "clip_skip": -1}, "clip_skip"),
        ({"prompts": ["a"], "clip_skip": 3}, "clip_skip"),
        ({"prompts": ["a"], "clip_skip": 0.5}, "clip_skip"),
        ({"prompts": ["a"], "emphasis": "strong"}, "emphasis"),
        ({"prompts": ["a"], "max_chunks": 0}, "max_chunks"),
    ],
)
def test_what_cannot_be_encoded_is_said(asked, match):
    with reason(match):
        ours_like(pipeline("sdxl")).encode(**asked)


def test_encoders_that_do_not_fit_are_refused():
    with reason("one text encoder"):
        ours_like(pipeline("sd1")).encode("a", prompts_2="b")
    tokenizer, net = sd_text.tokenizers()[0], CLIPText(TextConfig(8, 1, 2, 8, vocab=10))
    with reason("more tokens than the encoder"):
        TextEncoder([TextPart(tokenizer, net)])
    with reason("end token"):
        TextEncoder([TextPart(tokenizer, CLIPText(TextConfig(8, 1, 2, 8, vocab=2000)))])
    with reason("one of each"):
        ours_like(pipeline("sdxl")).from_embeddings([torch.zeros(1, 77, 32)], [torch.zeros(1, 77)])
    with reason("one text encoder or two"):
        TextEncoder([])


def test_half_precision_stays_half():
    pipe = pipeline("sd1")
    net = ours_of(pipe.text_encoder).bfloat16()
    cond, _ = TextEncoder([TextPart(sd_text.tokenizers()[0], net)]).encode("a (red:1.4) cat")
    assert cond["context"].dtype == torch.bfloat16
    exact = ours_like(pipe).encode("a (red:1.4) cat")[0]["context"]
    assert relative(cond["context"].float(), exact) < 0.03
