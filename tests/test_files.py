"""Text files as people save them: every encoding of Unicode is read, whatever else is refused by what it is."""

# ruff: noqa: RUF001 - letters of other scripts

import codecs
import json
import re
import warnings

import pytest
from huggingface_hub import ModelCard

from microclip_hf.data.class_names import read_class_names
from microclip_hf.descriptions.files import read_descriptions, save_descriptions
from microclip_hf.files import read_text, whole_file, whole_files, write_whole
from microclip_hf.hub.model_card import save_card


TEXTS = {
    "English": ["red disc", "green square", "blue bar"],
    "German": ["Möwe", "Rotkehlchen", "Grünspecht"],
    "Russian": ["красный диск", "зелёный квадрат"],
    "Arabic": ["قرص أحمر", "مربع أخضر"],
    "Chinese": ["红色圆盘", "绿色方块", "蓝色条"],
    "Japanese": ["赤い円盤", "緑の四角", "カモメ"],
    "Korean": ["붉은 원반", "녹색 사각형"],
    "emoji": ["🍎 apple", "🍐 pear"],
}
MARKS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-8": codecs.BOM_UTF8}
MARKS |= {"utf-32-le": codecs.BOM_UTF32_LE, "utf-32-be": codecs.BOM_UTF32_BE}


@pytest.fixture
def names_in(tmp_path):
    """Writes a file of class names and reads it."""

    def read(content, name="names.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_class_names(path)

    return read


@pytest.mark.parametrize("names", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("encoding", MARKS)
def test_every_encoding_of_unicode(names_in, encoding, names, tmp_path):
    for end in ("\n", "\r\n", "\r"):
        content = "".join(name + end for name in names).encode(encoding)
        assert names_in(content) == names_in(MARKS[encoding] + content) == names
    content = json.dumps({name: [f"{name}."] for name in names}, ensure_ascii=False).encode(encoding)
    for mark in (b"", MARKS[encoding]):
        (tmp_path / "descriptions.json").write_bytes(mark + content)
        assert read_descriptions(tmp_path / "descriptions.json", names) == {name: [f"{name}."] for name in names}
        lines = "\n".join(f"{name}: {name}." for name in names)
        (tmp_path / "descriptions.txt").write_bytes(mark + lines.encode(encoding))
        assert read_descriptions(tmp_path / "descriptions.txt", names) == {name: [f"{name}."] for name in names}


@pytest.mark.parametrize(
    ("encoding", "lines", "name"),
    [
        ("latin-1", TEXTS["German"], "Windows-1252"),
        ("cp1252", ["wren", "Anna’s hummingbird"], "Windows-1252"),
        ("cp932", TEXTS["Japanese"], "Shift-JIS"),
        ("gbk", TEXTS["Chinese"], "GBK"),
        ("euc_kr", TEXTS["Korean"], "EUC-KR"),
        ("big5", ["紅色圓盤", "綠色方塊"], "Big5"),
        ("cp1251", TEXTS["Russian"], "Windows-1251"),
    ],
)
def test_older_encodings_are_named(names_in, encoding, lines, name):
    """With the first line that shows it, as that encoding reads it."""
    number, line = next((index, line) for index, line in enumerate(lines, 1) if not line.isascii())
    with pytest.raises(
        ValueError, match=f"isn't text in UTF-8, but probably in {name}, in which line {number} is '{line}'"
    ):
        names_in("\n".join(lines).encode(encoding))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 [Content_Types].xml", "is a ZIP archive, as .docx, .xlsx"),
        (b"%PDF-1.7\n", "is a PDF document"),
        (b"{\\rtf1 red}", "is an RTF document"),
        (b"\xff\xd8\xff\xe0", "is a JPEG picture"),
        (b"\n<!DOCTYPE html>\n<html>red</html>", "is a page of HTML"),
        (b"red\ngreen\0\nblue\n", "has NUL bytes, the first in line 2"),
        (b"red\0disc\nblue\0bar\n", "has NUL bytes"),
        (bytes(range(256)) * 4, "has NUL bytes"),
        ("red\nblue\n".encode("utf-16-le")[:-1], "has NUL bytes"),
        (codecs.BOM_UTF16_LE + b"a\0b", "begins like text in UTF-16 but isn't"),
        (b"red\n\x98\x81\xff\xff", r"isn't text in UTF-8: line 2 is b'\\x98"),
    ],
)
def test_what_is_no_text(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.txt {message}"):
        read_text(path)


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("n.json", '["red disc", "blue"]', ["red disc", "blue"]),
        ("n.txt", '\n[\n "red disc",\n "blue"\n]\n', ["red disc", "blue"]),
        ("n.json", '["1. red", "2. blue", "# [x]"]', ["1. red", "2. blue", "# [x]"]),
        ("n.json", '["\\ud83c\\udf4e", "blue"]', ["🍎", "blue"]),
        ("n.json", '{"1": "blue", "0": "red"}', ["red", "blue"]),
        ("n.json", '{"blue": 2, "red": 1}', ["red", "blue"]),
        ("config.json", '{"num": 2, "id2label": {"0": "red", "1": "blue"}}', ["red", "blue"]),
        ("n.json", '{"names": ["red", "blue"], "_type": "ClassLabel"}', ["red", "blue"]),
        ("n.jsonl", '"red"\n"blue"\n', ["red", "blue"]),
        ("n.csv", 'red\n"Gull, herring"\n', ["red", "Gull, herring"]),
        ("n.txt", "Gull, herring\nTern, arctic\n", ["Gull, herring", "Tern, arctic"]),
        ("n.txt", "7 spot ladybird\nrose\n", ["7 spot ladybird", "rose"]),
        ("n.txt", "7 spot ladybird\n2 spot ladybird\n", ["7 spot ladybird", "2 spot ladybird"]),
        ("n.txt", "0\n1\n2\n", ["0", "1", "2"]),
        ("n.txt", "#one\n#two\n", ["#one", "#two"]),
        ("n.txt", "C#\nF#\n", ["C#", "F#"]),
        ("n.txt", "\u200bred\u200b di\u00adsc\n\ufeffblue\u200e\n\u200b\n", ["red disc", "blue"]),
        ("n.txt", "می\u200cخواهم\n👩\u200d🌾\n", ["می\u200cخواهم", "👩\u200d🌾"]),  # spelt with joiners
        ("n.txt", "red\n\fblue\n", ["red", "blue"]),  # a page's end
    ],
)
def test_forms_of_class_names(names_in, name, content, names):
    assert names_in(content, name) == names


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["house sparrow, Passer domesticus", "wren, Troglodytes"],
            "a comma, semicolon or bar in 2 of 2 .*'house sparrow, P",
        ),
        (["daisy", "rose,1", "lily"], "a comma, semicolon or bar in 1 of 3 lines, the first of them 'rose,1'"),
        (["daisy", "rose | lily"], "a comma, semicolon or bar in 1 of 2 lines"),
        (["daisy", "rose [wild]"], "a bracket in 1 of 2 lines, the first of them 'rose .wild.'"),
        (["12 oak", "17 elm"], "a number in front in 2 of 2 lines, the first of them '12 oak'"),
        (["daisy", "rose", "Name"], "what reads like a column's title in 1 of 3 lines, the first of them 'Name'"),
        (["name, latin name", "wren, Troglodytes"], "what reads like a column's title .*'name, latin name'"),
        (["2012 Audi A4", "2010 Audi S4"], "a number in front in 2 of 2 lines"),
        (["daisy", "Boeing 737", "7 spot ladybird", "C-130 (Hercules)", "name tag"], None),
    ],
)
def test_what_may_be_names_is_told_of_once(names_in, lines, message):
    """And kept; the same names as JSON mean no warning."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert names_in("\n".join(lines)) == names_in(json.dumps(lines)) == lines
    assert len(found) == (message is not None)
    assert all(re.search(message, str(warning.message)) for warning in found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("n.txt", "", "n.txt: .*at least two"),
        ("n.txt", "0 daisy\n1 rose\n", "a number before every name, as in '0 daisy'"),
        ("n.txt", "1. daisy\n2. rose\n", "a number before every name"),
        ("n.txt", "2 daisy\n1 rose\n3 lily", "a number before every name, as in '2 daisy'"),
        ("n.txt", "012.Laysan\n001.Black_footed_Albatross\n", "a number before every name, as in '012.Laysan'"),
        ("n.txt", "id name\n1 daisy\n2 rose\n", "a number before every name, as in '1 daisy'"),
        ("n.txt", "001.Black_footed_Albatross\n002.Laysan\n", "a number before every name"),
        ("n.txt", "- daisy\n- rose\n", "the mark of a list in every line, as in '- daisy'"),
        ("n.txt", "# mine\ndaisy\nrose\n", "the comment '# mine'"),
        ("n.txt", "daisy, rose", "one line, with ',' in it"),
        ("n.txt", "daisy,\nrose,\nlily", "commas at the ends of lines"),
        ("n.txt", "daisy\nrose,\nlily", "commas at the ends of lines, as in 'rose,'"),
        ("n.txt", ",name\ndaisy\nrose", "commas at the ends of lines, as in ',name'"),
        ("n.txt", "daisy,0\nrose,1\nlily\n", "several columns, with commas .*'daisy,0'"),
        ("n.txt", "daisy,0\nrose,1,red\n", "several columns, with commas"),
        ("n.txt", "names = ['daisy'\n'rose']\n", 'a bracket without its pair, in the line "names = '),
        ("n.txt", "'daisy'\n'rose'\n", "quotes in every line"),
        ("n.txt", "names = [\n'daisy'\n]\n", r"the line '\]'"),
        ("n.txt", "daisy,0\nrose,1\n", "several columns, with commas"),
        ("n.txt", "n01\tdaisy\nn02\trose\n", "several columns, with tabs"),
        ("n.txt", "daisy;0\nrose;1\n", "several columns, with semicolons"),
        ("n.csv", ",name\n0,daisy\n1,rose\n", "has several columns .'', 'name'"),
        ("n.csv", "0;daisy\n1;rose\n", "semicolons in every line"),
        ("n.csv", "Class_Name\ndaisy\nrose\n", "begins with 'Class_Name', which reads like a column's title"),
        ("n.csv", "daisy\nrose\nname\n", "ends with 'name', which reads like a column's title"),
        ("n.csv", '"daisy\nrose\n', "isn't a CSV file"),
        ("n.tsv", "0\tdaisy\n1\trose\n", "has several columns .'0', 'daisy'"),
        ("n.txt", "red\fdisc\nblue\n", "holds U.000C, which ends or controls a line"),
        ("n.txt", "red\u2028disc\nblue\n", "holds U.2028"),
        ("n.txt", "red\x1b[0m\nblue\n", "holds U.001B"),
        ("n.txt", "M\ufffdwe\nblue\n", "U.FFFD, the sign for a lost character"),
        ("n.json", '["daisy",\n "rose"', "n.json isn't a JSON file .*line 2"),
        ("n.txt", "['daisy', 'rose']", "isn't a JSON file"),
        ("n.json", "[" * 100_000, "isn't a JSON file"),
        ("n.json", '{"daisy": 0, "daisy": 1}', "the key 'daisy' twice"),
        ("n.json", '["\\ud83d", "rose"]', "half a character"),
        *(
            (name, content, "holds JSON, but no list of class names")
            for name, content in (
                ("n.json", '"daisy"'),
                ("n.json", "[1, 2]"),
                ("n.json", "[NaN, null]"),
                ("n.json", '[{"name": "daisy"}, {"name": "rose"}]'),
                ("n.json", '{"daisy": ["white"], "rose": ["red"]}'),
                ("n.json", '{"1": "daisy", "3": "rose"}'),
                ("n.json", '{"daisy": true, "rose": false}'),
                ("n.jsonl", '{"name": "daisy"}\n{"name": "rose"}\n'),
            )
        ),
    ],
)
def test_what_is_no_list_of_class_names(names_in, name, content, message):
    with pytest.raises(ValueError, match=message):
        names_in(content, name)


def test_half_characters_in_descriptions(tmp_path):
    """Such as a language model's last token leaves; a pair in escapes is a character."""
    path = tmp_path / "descriptions.json"
    path.write_text('{"red": ["A red \\ud83d disc\\udc4e.", "An apple \\ud83c\\udf4e."]}')
    assert read_descriptions(path, ["red", "blue"]) == {"red": ["A red disc.", "An apple 🍎."]}
    save_descriptions(path, [("red", ["A red \ud83d disc."])])
    assert json.loads(path.read_text(encoding="utf-8")) == {"red": ["A red \ud83d disc."]}


def test_files_are_written_whole(tmp_path):
    """Names of files may hold surrogates, bytes that aren't UTF-8; no failure leaves a file behind."""
    path = tmp_path / "a.json"
    write_whole(path, json.dumps("caf\udce9 é", ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == "caf\udce9 é"
    write_whole(path, b"\r\n")
    assert path.read_bytes() == b"\r\n"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").touch()
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder", "text")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "folder"]
    save_card(ModelCard("---\nlicense: mit\n---\nphotos of caf\udce9"), tmp_path)
    assert "photos of caf\\udce9" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("keep", [False, True])
def test_a_file_that_is_written_bit_by_bit(tmp_path, keep):
    """It has its name, and replaces the old one, at the end; what was written before an error stays if wanted."""
    path = tmp_path / "labels.csv"
    for content in ("old", "new"):
        with whole_file(path, keep) as incomplete:
            incomplete.write_text(content)
            assert not path.exists() or path.read_text() == "old"
    with pytest.raises(KeyboardInterrupt), whole_file(path, keep) as incomplete:
        incomplete.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new"
    kept = [incomplete] if keep else []
    assert sorted(tmp_path.iterdir()) == [*kept, path] and all(file.read_text() == "half" for file in kept)


def test_files_that_belong_together(tmp_path):
    """All of them are complete before the first has its name; what a killed run left behind goes."""
    folder = tmp_path / "new" / "folder"
    (folder / "_incomplete_b").mkdir(parents=True)
    (folder / "_incomplete_b" / "old").touch()
    with whole_files(folder, last="b") as incomplete:
        for name in "bca":
            (incomplete / name).touch()
        assert [file.name for file in folder.iterdir()] == [incomplete.name]
    assert sorted(file.name for file in folder.iterdir()) == ["a", "b", "c"]
    with pytest.raises(OSError), whole_files(folder, last="b") as incomplete:
        (incomplete / "a").write_text("half")
        raise OSError
    assert sorted(file.name for file in folder.iterdir()) == ["a", "b", "c"]
    assert (folder / "a").read_text() == ""
