"""Shards: what is sound is read to the pixel, what is not is named, and what is written is the same to the byte."""

import functools
import hashlib
import http.server
import io
import json
import re
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from nanodiffusion.data.captions import read_captioned
from nanodiffusion.data.shards import Sample, expand_shards, member_names, read_shards, write_shards
from nanodiffusion.errors import UserError


def pixels(seed: int, height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png(seed: int) -> bytes:
    return encoded(Image.fromarray(pixels(seed)))


def png_header(width: int, height: int, rest: bytes = b"") -> bytes:
    """A PNG that claims a size, with next to nothing inside."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rest or zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def tar(file: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(file, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return file


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def good(key: str, seed: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(seed)), (f"{key}.txt", f"caption {seed}".encode())]


def read(*shards: Path, **options) -> tuple[list[Sample], list[str]]:
    faults: list[str] = []
    return list(read_shards([str(s) for s in shards], faults, **options)), faults


def words(key: str, picture: bytes, caption: bytes = b"a caption", ending: str = "png") -> list[tuple[str, bytes]]:
    return [(f"{key}.{ending}", picture), (f"{key}.txt", caption)]


DEEP = b'{"caption": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"

# kind of fault -> (members of the sample, what is said of it)
FAULTS: dict[str, tuple[list, str]] = {
    "truncated_png": (words("k", png(1)[:-60]), r"the picture cannot be decoded: .*"),
    "truncated_jpeg": (
        words("k", encoded(Image.fromarray(pixels(1, 64, 64)), "JPEG")[:900], ending="jpg"),
        ".*trunc.*",
    ),
    "broken_png_data": (words("k", png_header(30, 30)), r"the picture cannot be decoded: .*"),
    "wrong_checksum": (words("k", png(1).replace(b"IHDR\0\0\0\x08", b"IHDR\0\0\0\x07")), r"(not a PNG|the picture).*"),
    "not_an_image": (words("k", b"<html>404</html>"), "not a PNG, JPEG or WEBP"),
    "gif_called_png": (words("k", encoded(Image.fromarray(pixels(1)), "GIF")), "not a PNG, JPEG or WEBP"),
    "huge_by_header": (words("k", png_header(8001, 8001)), "8001 x 8001 pixels, above 64 megapixels"),
    "bomb_by_header": (words("k", png_header(60000, 60000)), "above 64 megapixels"),
    "empty_picture": (words("k", b""), "k.png is empty"),
    "no_caption": ([("k.png", png(1))], "no caption"),
    "empty_caption_file": (words("k", png(1), b""), "k.txt is empty"),
    "blank_caption": (words("k", png(1), b" \n\t"), "an empty caption"),
    "caption_not_utf8": (words("k", png(1), b"caf\xe9"), "the caption is not UTF-8 at byte 3"),
    "caption_too_long": (words("k", png(1), b"a" * 1_100_000), "k.txt has 1100000 bytes, above 1048576"),
    "no_picture": ([("k.txt", b"a caption"), ("k.gif", b"GIF89a")], "no picture"),
    "two_pictures": ([*words("k", png(1)), ("k.jpg", png(2))], "more than one picture: png, jpg"),
    "member_twice": ([*words("k", png(1)), ("k.txt", b"another")], "k.txt is there twice"),
    "bad_json": ([("k.png", png(1)), ("k.json", b'{"caption": ')], "the json cannot be read: .*"),
    "json_without_caption": ([("k.png", png(1)), ("k.json", b'{"width": 8}')], "no caption"),
    "json_is_a_list": ([*words("k", png(1)), ("k.json", b"[1]")], "the json is not an object"),
    "json_caption_a_number": ([("k.png", png(1)), ("k.json", b'{"caption": 7}')], "the caption is not a text"),
    "half_a_surrogate": ([("k.png", png(1)), ("k.json", b'{"caption": "\\ud800"}')], "the caption is not a text"),
    "deep_json": ([*words("k", png(1)), ("k.json", DEEP)], "the json is nested too deeply"),
    "huge_number_in_json": ([*words("k", png(1)), ("k.json", b'{"a": ' + b"9" * 9000 + b"}")], "the json cannot.*"),
    "cls_not_a_number": ([*words("k", png(1)), ("k.cls", b"cat")], "the cls is not a whole number"),
    "negative_cls": ([*words("k", png(1)), ("k.cls", b"-1")], "the cls is not a whole number"),
    "symbolic_link": ([special("k.png", tarfile.SYMTYPE, "/etc/passwd"), ("k.txt", b"a")], "k.png is a link.*"),
    "hard_link": ([("k.txt", b"a"), special("k.png", tarfile.LNKTYPE, "k.txt")], "k.png is a link.*"),
    "device": ([("k.txt", b"a"), special("k.png", tarfile.CHRTYPE)], "k.png is a link, a device or a sparse file"),
    "pipe": ([("k.txt", b"a"), special("k.png", tarfile.FIFOTYPE)], "k.png is a link, a device or a sparse file"),
    "name_with_dots": (words("../../k", png(1)), "the name leaves the archive"),
    "absolute_name": (words("/tmp/k", png(1)), "the name leaves the archive"),
    "name_with_backslash": (words("a\\k", png(1)), "the name leaves the archive"),
    "name_steers_a_terminal": (words("k\x1b[31m", png(1)), "the name is not a printable text"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_named_once_and_its_neighbours_are_read(kind: str, tmp_path: Path) -> None:
    members, said = FAULTS[kind]
    shard = tar(tmp_path / "a.tar", *good("before", 10), *members, *good("next", 11))
    samples, faults = read(shard)
    assert [s.key for s in samples] == ["before", "next"]
    assert len(faults) == 1 and re.fullmatch(rf"a\.tar:.*k.*: {said}", faults[0]), faults
    assert "0x" not in faults[0] and faults[0].isprintable()


def dirty_set(home: Path) -> list[Path]:
    """All faults of samples in one shard, and six faults of archives, with sound samples between."""
    members: list = []
    for i, (kind, (parts, _)) in enumerate(FAULTS.items()):
        for part in parts:
            name = part.name if isinstance(part, tarfile.TarInfo) else part[0]
            name = name.replace("k", kind, 1)
            members.append((name, part[1]) if isinstance(part, tuple) else special(name, part.type, part.linkname))
        members += good(f"good{i:02d}", i)
    shards = [tar(home / "0.tar", *members, *good("good00", 99), ("README", b"no ending"), ("._x", b"hidden"))]
    whole = tar(home / "whole.tar", *good("a", 1), *good("b", 2)).read_bytes()
    at = {"cut_in_data": 512 * 7 + 4, "cut_in_header": 512 * 6 + 200, "no_end": 512 * 8, "no_tar": 0, "empty": 0}
    for name, size in at.items():
        shards.append(home / f"{name}.tar")
        shards[-1].write_bytes(b"no archive at all" * 100 if name == "no_tar" else whole[:size])
    shards.append(home / "nothing.tar")
    shards[-1].write_bytes(bytes(10240))
    shards.append(home / "torn.tar")  # a header in the middle is overwritten
    shards[-1].write_bytes(whole[: 512 * 4] + b"\xff" * 512 + whole[512 * 5 :])
    return [*shards, tar(home / "last.tar", *good("z", 50))]


def test_a_set_with_forty_kinds_of_fault_is_read_to_its_end_with_the_same_list_every_time(tmp_path: Path) -> None:
    shards = dirty_set(tmp_path)
    samples, faults = read(*shards)
    again, same = read(*shards)
    ahead, alike = read(*shards, workers=3)
    assert faults == same == alike and [s.where for s in samples] == [s.where for s in again] == [
        s.where for s in ahead
    ]
    named = [fault.split(": ")[0] for fault in faults]
    for kind in FAULTS:
        assert sum(kind in name for name in named) == 1, kind
    rest = [fault for fault in faults if not any(kind in fault.split(": ")[0] for kind in FAULTS)]
    assert rest == [
        "0.tar:README: the name has no key and ending",
        "0.tar:._x: the name has no key and ending",
        "0.tar:good00: the key is there twice, the first was taken",
        "cut_in_data.tar: the archive ends inside b.txt",
        "cut_in_data.tar:b: the archive ends inside b.txt",
        "cut_in_header.tar: the archive has no end, it is cut off at byte 3272",
        "cut_in_header.tar:b: no caption",
        "no_end.tar: the archive has no end, it is cut off at byte 4096",
        "no_tar.tar: not a tar archive",
        "empty.tar: not a tar archive",
        "nothing.tar: the archive holds no sample",
        "torn.tar: a broken header at byte 2048",
    ]
    keys = [s.key for s in samples if s.where.startswith("0.tar")]
    assert keys == [f"good{i:02d}" for i in range(len(FAULTS))]
    for i, sample in enumerate(samples[: len(FAULTS)]):
        np.testing.assert_array_equal(np.asarray(sample.image), pixels(i))
        assert sample.caption == f"caption {i}" and sample.label is None
    assert [s.where for s in samples[len(FAULTS) :]] == [
        *("cut_in_data.tar:a", "cut_in_header.tar:a", "no_end.tar:a", "no_end.tar:b", "torn.tar:a", "last.tar:z")
    ]


def rotated() -> tuple[bytes, np.ndarray]:
    """A picture whose EXIF says that it was taken with the camera turned: orientation 6 is shown turned by 90 degrees."""
    image, exif = Image.fromarray(pixels(3)), Image.Exif()
    exif[0x0112] = 6
    return encoded(image, exif=exif), np.rot90(pixels(3), -1)


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., -1:] / 255
    return rgba[..., :-1] * alpha + 255 * (1 - alpha)


def modes() -> dict[str, tuple[bytes, np.ndarray]]:
    grey, rgba, la = pixels(1, channels=1)[..., 0], pixels(2, channels=4), pixels(3, channels=2)
    deep = np.random.default_rng(4).integers(0, 65536, (6, 8), np.uint16)
    palette = Image.fromarray(grey).convert("P")
    palette.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    cmyk = np.zeros((8, 8, 4), np.uint8)
    cmyk[..., 1] = 255  # magenta alone: red and blue stay
    frames = [Image.fromarray(pixels(i)) for i in (5, 6)]
    g = grey.astype(int)
    return {
        "grey": (encoded(Image.fromarray(grey)), np.stack([grey] * 3, -1)),
        "rgba": (encoded(Image.fromarray(rgba)), over_white(rgba)),
        "la": (encoded(Image.fromarray(la, "LA")), np.repeat(over_white(la), 3, -1)),
        "16_bit": (encoded(Image.fromarray(deep)), np.stack([deep >> 8] * 3, -1)),
        "one_bit": (encoded(Image.fromarray(grey > 127)), np.stack([(grey > 127) * 255] * 3, -1)),
        "palette": (encoded(palette), np.stack([g, 255 - g, g // 2], -1)),
        "cmyk": (encoded(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100), np.full((8, 8, 3), (255, 0, 255))),
        "animated": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), pixels(5)),
        "turned": rotated(),
        "jpeg_called_png": (encoded(Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG"), np.full((8, 8, 3), 9)),
    }


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("mode", sorted(modes()))
def test_every_mode_becomes_upright_rgb_on_white(mode: str, tmp_path: Path) -> None:
    raw, expected = modes()[mode]
    samples, faults = read(tar(tmp_path / "a.tar", *words("k", raw)))
    assert not faults and samples[0].image.mode == "RGB"
    difference = np.abs(np.asarray(samples[0].image).astype(float) - expected)
    assert difference.max() <= (2 if mode == "cmyk" else 1 if mode in ("rgba", "la") else 0)


def test_the_caption_is_the_txt_then_the_json_and_the_class_stands_alone(tmp_path: Path) -> None:
    meta = json.dumps({"text": "from json", "width": 8}).encode()
    shard = tar(
        tmp_path / "a.tar",
        *[("both.png", png(0)), ("both.json", meta), ("both.txt", "\ufeff from txt \n".encode())],
        *[("dir/only.json", meta), ("dir/only.PNG", png(1)), ("dir/only.seg.png", b"never opened")],
        *[("./class.png", png(2)), ("./class.cls", b"7\n")],
        special("dir", tarfile.DIRTYPE),
    )
    samples, faults = read(shard)
    assert not faults
    assert [(s.key, s.caption, s.label) for s in samples] == [
        *(("both", "from txt", None), ("dir/only", "from json", None), ("class", "", 7))
    ]
    assert samples[0].meta == {"text": "from json", "width": 8} and samples[2].where == "a.tar:class"


@pytest.mark.parametrize(
    "meta", [{"caption": None, "text": "a cat"}, {"text": ["a cat", "a tiger"]}, {"prompt": "a cat "}]
)
def test_a_json_says_the_same_in_a_shard_as_in_a_folder(meta: dict, tmp_path: Path) -> None:
    raw = json.dumps(meta).encode()
    samples, faults = read(tar(tmp_path / "a.tar", ("k.png", png(0)), ("k.json", raw)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "k.png").write_bytes(png(0))
    (tmp_path / "folder" / "k.json").write_bytes(raw)
    assert not faults and [s.caption for s in samples] == ["a cat"]
    assert [row.caption for row in read_captioned(tmp_path / "folder")] == ["a cat"]


def test_without_need_a_picture_alone_is_a_sample(tmp_path: Path) -> None:
    shard = tar(tmp_path / "a.tar", ("k.png", png(0)))
    assert [s.caption for s in read(shard, need_caption=False)[0]] == [""]


def test_members_of_absurd_size_are_never_read(tmp_path: Path) -> None:
    sound = tar(tmp_path / "sound.tar", *good("a", 1)).read_bytes()[: 512 * 4]
    large = tarfile.TarInfo("b.png")
    large.size = 10**15
    (tmp_path / "a.tar").write_bytes(sound + large.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    extended = tarfile.TarInfo("x" * 10)
    extended.type, extended.size = tarfile.XHDTYPE, 10**12
    (tmp_path / "b.tar").write_bytes(sound + extended.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    real = tarfile.TarInfo("c.png")
    real.size = 300 * 2**20
    with open(tmp_path / "c.tar", "wb") as file:  # a hole on the disk: 300 MB that take no place
        file.write(sound + real.tobuf())
        file.truncate(len(sound) + 512 + real.size + 1024)
    samples, faults = read(*(tmp_path / f"{name}.tar" for name in "abc"))
    assert [s.where for s in samples] == ["a.tar:a", "b.tar:a", "c.tar:a"]
    assert faults == [
        "a.tar: the archive ends inside b.png",
        "a.tar:b: b.png has 1000000000000000 bytes, above 268435456",
        "b.tar: the archive is damaged after byte 2048: a header of 1000000000000 bytes",
        "c.tar:c: c.png has 314572800 bytes, above 268435456",
    ]


def test_a_header_that_points_backwards_does_not_hang(tmp_path: Path) -> None:
    back = tarfile.TarInfo("b.png")
    header = bytearray(back.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 8 + struct.pack(">i", -1024)  # base-256: a negative size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(tar(tmp_path / "s.tar", *good("a", 1)).read_bytes()[:2048] + header + bytes(1024))
    samples, faults = read(tmp_path / "a.tar")
    assert [s.key for s in samples] == ["a"] and len(faults) == 1 and "damaged" in faults[0]


def header(kind: bytes, data: bytes) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    "hostile",
    [
        header(tarfile.XHDTYPE, b"1" * 1_000_000),  # quadratic in some versions of tarfile
        header(tarfile.XHDTYPE, b"1" * 16_000),
        header(tarfile.GNUTYPE_LONGNAME, b"x\0") * 3000,  # each one reads the next inside itself
        header(tarfile.XHDTYPE, b"30 GNU.sparse.major=1000000000\n"),
    ],
    ids=["long", "digits", "nested", "sparse"],
)
def test_hostile_headers_end_in_a_fault_within_two_seconds(hostile: bytes, tmp_path: Path) -> None:
    sound = tar(tmp_path / "s.tar", *good("a", 1)).read_bytes()[:2048]
    (tmp_path / "a.tar").write_bytes(sound + hostile + bytes(1024))
    start = time.process_time()
    samples, faults = read(tmp_path / "a.tar")
    assert time.process_time() - start < 2
    assert [s.key for s in samples] == ["a"] and len(faults) == 1 and "damaged" in faults[0]


def test_random_damage_ends_in_faults_never_in_another_error(tmp_path: Path) -> None:
    sound = tar(tmp_path / "a.tar", *(m for i in range(4) for m in good(str(i), i))).read_bytes()
    random = np.random.default_rng(0)
    for _ in range(150):
        raw = bytearray(sound)
        for place in random.integers(0, len(raw), 20):
            raw[place] = random.integers(0, 256)
        (tmp_path / "b.tar").write_bytes(raw[: random.integers(1, len(raw) + 1)])
        samples, faults = read(tmp_path / "b.tar")
        assert len(samples) <= 4 and all(isinstance(f, str) and f.startswith("b.tar") for f in faults)
        assert (samples, faults)[1] == read(tmp_path / "b.tar")[1]


def samples_of(n: int) -> Iterator[Sample]:
    for i in range(n):
        meta = {"n": i, "name": "é"} if i % 2 else {}
        yield Sample(f"{i:04d}", Image.fromarray(pixels(i)), f"caption {i} é", i % 3 or None, meta, "")


def test_what_is_written_is_read_again_to_the_pixel_and_repeats_to_the_byte(tmp_path: Path) -> None:
    files = write_shards(samples_of(7), tmp_path / "a", per_shard=3)
    again = write_shards(samples_of(7), tmp_path / "b", per_shard=3)
    assert [f.name for f in files] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [hashlib.sha256(f.read_bytes()).digest() for f in files] == [
        *(hashlib.sha256(f.read_bytes()).digest() for f in again)
    ]
    found, faults = read(*files)
    assert not faults and len(found) == 7
    for a, b in zip(samples_of(7), found):
        assert a._replace(image=None, where="") == b._replace(image=None, where="")  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.asarray(a.image), np.asarray(b.image))


def test_webdataset_reads_what_we_write(tmp_path: Path) -> None:
    files = write_shards(samples_of(4), tmp_path, per_shard=4)
    rows = list(webdataset.WebDataset([str(f) for f in files], shardshuffle=False, empty_check=False))
    assert [r["__key__"] for r in rows] == [f"{i:04d}" for i in range(4)]
    assert [r["txt"].decode() for r in rows] == [s.caption for s in samples_of(4)]
    for row, sample in zip(rows, samples_of(4)):
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(row["png"]))), np.asarray(sample.image))


def test_we_read_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(3):
            writer.write({"__key__": f"s{i}", "png": pixels(i), "txt": f"c{i}", "cls": i, "json": {"i": i}})
    samples, faults = read(tmp_path / "a.tar")
    assert not faults and [(s.key, s.caption, s.label, s.meta) for s in samples] == [
        *((f"s{i}", f"c{i}", i, {"i": i}) for i in range(3))
    ]
    np.testing.assert_array_equal(np.asarray(samples[2].image), pixels(2))
    assert member_names(tmp_path / "a.tar")[0][:2] == ["s0.cls", "s0.json"]


def test_shards_are_found_by_braces_patterns_folders_and_lists_in_order(tmp_path: Path) -> None:
    names = [str(tar(tmp_path / f"{i:03d}.tar", *good("a", i))) for i in (2, 0, 1, 10)]
    (tmp_path / ".hidden.tar").write_bytes(b"")
    home = str(tmp_path)
    assert expand_shards(tmp_path) == sorted(names) == expand_shards(f"{home}/*.tar")
    assert expand_shards(home + "/{000..002}.tar") == sorted(names)[:3]
    assert expand_shards(home + "/{010,000}.tar") == [f"{home}/010.tar", f"{home}/000.tar"]
    assert expand_shards(f"{home}/010.tar::{home}/001.tar") == [f"{home}/010.tar", f"{home}/001.tar"]
    assert expand_shards("https://host.example/a-{0..2}.tar") == [f"https://host.example/a-{i}.tar" for i in range(3)]


@pytest.mark.parametrize(
    ("spec", "said"),
    {
        "pipe": ("pipe:cat {home}/a.tar", "no place for shards"),
        "bucket": ("s3://bucket/a.tar", "no place for shards"),
        "missing": ("{home}/nothing-{{0..3}}.tar", "4 of 4 are missing"),
        "no_match": ("{home}/z*.tar", "no file"),
        "folder_without": ("{home}", "there is no shard here"),
        "too_many": ("a-{{0..99999999999}}.tar", "too many"),
        "too_many_products": ("{{0..9999}}{{0..9999}}.tar", "too many"),
        "unclosed": ("{home}/{{0..3.tar", "braces"),
    }.values(),
    ids="pipe bucket missing no_match folder_without too_many too_many_products unclosed".split(),
)
def test_a_bad_list_of_shards_is_one_message(spec: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as error:
        expand_shards(spec.format(home=tmp_path))
    assert len(str(error.value).splitlines()) <= 6


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_shard_at_an_address_is_read_like_a_file(site: str, tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", *good("a", 1))
    tar(tmp_path / "1.tar", *good("b", 2), *words("c", b"nothing"))
    faults: list[str] = []
    samples = list(read_shards(expand_shards(site + "/{0..1}.tar"), faults.append))
    assert [s.where for s in samples] == ["0.tar:a", "1.tar:b"]
    assert faults == ["1.tar:c: not a PNG, JPEG or WEBP"]


def test_a_shard_that_cannot_be_had_stops_the_reading(site: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be had"):
        list(read_shards([site + "/none.tar"], []))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_shards([str(tmp_path / "none.tar")], []))
