"""Captioned folders: every layout that people use gives the caption that a person would read there."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanodiffusion.data.captions import Captioned, read_captioned
from nanodiffusion.errors import UserError


def picture(file: Path, value: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file)
    return file


def said(home: Path, **options) -> dict[str, tuple[str, int | None]]:
    rows = read_captioned(home, **options)
    assert all(isinstance(row, Captioned) for row in rows)
    assert [row.file for row in rows] == sorted(row.file for row in rows)
    return {row.file.relative_to(home).as_posix(): (row.caption, row.label) for row in rows}


def test_a_text_beside_each_picture_in_any_of_three_endings(tmp_path: Path) -> None:
    for name in ("a.png", "b.JPG", "c.webp", "d.jpeg"):
        picture(tmp_path / name)
    (tmp_path / "a.txt").write_text(" a cat \n")
    (tmp_path / "b.caption").write_text("\ufeffa dog")
    (tmp_path / "c.json").write_text(json.dumps({"caption": "a fish", "width": 4}))
    (tmp_path / "d.json").write_text(json.dumps({"text": ["an owl", "a bird"]}))
    (tmp_path / "notes.pdf").write_bytes(b"")
    picture(tmp_path / ".cache" / "x.png")
    expected = {"a.png": "a cat", "b.JPG": "a dog", "c.webp": "a fish", "d.jpeg": "an owl"}
    assert said(tmp_path) == {name: (caption, None) for name, caption in expected.items()}


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_metadata_table(kind: str, column: str, tmp_path: Path) -> None:
    rows = {"a.png": 'a cat, "big"', "sub/b.png": "ein Käfer"}
    for name in rows:
        picture(tmp_path / name)
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, column: caption}, ensure_ascii=False) for name, caption in rows.items()]
    else:
        lines = [f"file_name,{column}", 'a.png,"a cat, ""big"""', "sub/b.png,ein Käfer"]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines) + "\n", "utf-8")
    assert said(tmp_path) == {name: (caption, None) for name, caption in rows.items()}


@pytest.mark.parametrize(
    "value",
    [
        {"a.png": "one", "s/b.png": "two"},
        {"a.png": {"caption": "one"}, "s/b.png": ["two", "zwei"]},
        [{"file_name": "a.png", "caption": "one"}, {"file_name": "s/b.png", "text": "two"}],
    ],
    ids=["texts", "objects", "list"],
)
def test_one_file_of_captions_by_name(value: object, tmp_path: Path) -> None:
    for name in ("a.png", "s/b.png"):
        picture(tmp_path / name)
    (tmp_path / "captions.json").write_text(json.dumps(value))
    assert said(tmp_path) == {"a.png": ("one", None), "s/b.png": ("two", None)}


def test_tables_of_hidden_folders_are_not_seen(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one")
    for home in (".old", "sub/.trash"):
        (tmp_path / home).mkdir(parents=True)
        (tmp_path / home / "captions.json").write_text('{"a.png": "of old"}')
    assert said(tmp_path) == {"a.png": ("one", None)}


def test_class_folders_by_template(tmp_path: Path) -> None:
    for name in ("red_fox/1.png", "red_fox/deep/2.png", "cat/1.png"):
        picture(tmp_path / name)
    assert said(tmp_path) == {
        "cat/1.png": ("a photo of a cat", 0),
        "red_fox/1.png": ("a photo of a red fox", 1),
        "red_fox/deep/2.png": ("a photo of a red fox", 1),
    }
    assert said(tmp_path, template="{}, drawn")["cat/1.png"] == ("cat, drawn", 0)


def test_a_table_comes_before_a_text_beside_and_that_before_the_class(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/3.png"):
        picture(tmp_path / name)
    (tmp_path / "cat" / "1.txt").write_text("from the text")
    (tmp_path / "cat" / "2.txt").write_text("from the text")
    (tmp_path / "cat" / "metadata.csv").write_text("file_name,text\n2.png,from the table\n")
    assert said(tmp_path) == {
        "cat/1.png": ("from the text", 0),
        "cat/2.png": ("from the table", 0),
        "dog/3.png": ("a photo of a dog", 1),
    }


def dirty(home: Path) -> Path:
    for name in ("a", "b", "c", "d", "e", "f", "g"):
        picture(home / f"{name}.png")
    (home / "a.txt").write_text("a sound one")
    (home / "b.txt").write_bytes(b"caf\xe9")
    (home / "c.txt").write_text("  ")
    (home / "d.json").write_text("{")
    (home / "e.json").write_text('{"width": 3}')
    rows = [("../a.png", "out"), ("none.png", "of nothing"), ("g.png", "one"), ("g.png", "two")]
    (home / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": t}) for n, t in rows))
    return home


def test_faults_are_listed_exactly_and_the_rest_is_read(tmp_path: Path) -> None:
    lists: list[list[str]] = [[], []]
    for faults in lists:
        assert said(dirty(tmp_path), faults=faults) == {"a.png": ("a sound one", None)}
    assert lists[0] == lists[1]
    assert [f if not f.startswith("d") else f[:32] for f in lists[0]] == [
        "b.png: the caption is not UTF-8 at byte 3",
        "c.png: an empty caption",
        "d.png: the json cannot be read: ",
        "e.png: no caption",
        "f.png: no caption",
        "g.png: it has two captions",
        "../a.png: the path leaves the folder",
        "none.png: it has a caption, but there is no such picture",
    ]


def broken(home: Path, kind: str) -> str:
    """Make a folder that is no captioned folder; the template to read it with."""
    if kind != "no_picture":
        picture(home / "a.png")
    files = {
        "table_of_rubbish": ("metadata.jsonl", b"not json\n"),
        "no_file_name": ("metadata.csv", b"name,text\na.png,x\n"),
        "table_not_utf8": ("metadata.csv", b"file_name,text\na.png,\xff\n"),
        "captions_a_number": ("captions.json", b"7"),
        "captions_deep": ("captions.json", b"[" * 100_000),
        "captions_twice": ("captions.json", b'{"a.png": "1", "a.png": "2"}'),
    }
    if kind in files:
        name, raw = files[kind]
        (home / name).write_bytes(raw)
    return {"template_without": "a photo", "template_attribute": "{0.__class__}", "template_two": "{} {}"}.get(
        kind, "a photo of a {}"
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_picture", "there is no picture here"),
        ("no_caption", "1 pictures cannot be used"),
        ("table_of_rubbish", "line 1 cannot be read"),
        ("no_file_name", "a row names no picture"),
        ("table_not_utf8", "the table cannot be read"),
        ("captions_a_number", "these are no captions by name"),
        ("captions_deep", "the captions cannot be read"),
        ("captions_twice", "a name is there twice"),
        ("template_without", "this is no template"),
        ("template_attribute", "this is no template"),
        ("template_two", "this is no template"),
    ],
)
def test_what_is_no_captioned_folder_is_one_message(kind: str, message: str, tmp_path: Path) -> None:
    template = broken(tmp_path, kind)
    with pytest.raises(UserError, match=message) as error:
        read_captioned(tmp_path, template)
    assert len(str(error.value).splitlines()) <= 6


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_captioned(tmp_path / "none")
