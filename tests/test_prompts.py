"""Class names and templates, however they are written down, are the same sentences; what is wrong names its line."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest

from clipmini.errors import UserError
from clipmini.evaluation.prompts import (
    Names,
    Prompts,
    Template,
    imagenet_synsets,
    make_prompts,
    read_names,
    read_templates,
)

Templates = Sequence[Template] | Mapping[str, Sequence[str]]

NAMES = ["dog", "tabby cat"]
SENTENCES = (("a photo of a dog.", "dog"), ("a photo of a tabby cat.", "tabby cat"))


def make(names: Names, templates: Templates) -> Prompts:
    return make_prompts(names, templates, "names.txt", "templates.txt")[1]


@pytest.mark.parametrize(
    ("names", "templates"),
    [
        (NAMES, ["a photo of a {}.", "{}"]),
        (NAMES, ["a photo of a {c}.", "{c}"]),
        (NAMES, ["a photo of a {name}.", "{name}"]),
        (NAMES, ["a photo of a {c}.", "{}"]),
        (NAMES, [lambda name: f"a photo of a {name}.", lambda name: name]),
        (NAMES, [lambda name: f"a photo of a {name}.", "{}"]),
        (NAMES, {name: [f"a photo of a {name}.", name] for name in reversed(NAMES)}),
        (["pet:dog", "pet: tabby cat"], ["pet:a photo of a {c}.", "pet: {c}"]),
    ],
    ids=["{}", "{c}", "{name}", "a kind each", "functions", "both", "mapping", "group"],
)
def test_all_dialects_are_the_same_sentences(names: Names, templates: Templates) -> None:
    assert make(names, templates) == SENTENCES


def test_every_place_in_a_template_is_filled() -> None:
    assert make(["dog"], ["{c}: a {c}"]) == (("dog: a dog",),)


def test_synonyms_have_sentences_each_and_the_first_is_the_name() -> None:
    class_names, prompts = make_prompts([["happy", "smiling"], "sad"], ["a {} face", "{c}!"], "n", "t")
    assert class_names == ("happy", "sad")
    assert prompts == (("a happy face", "a smiling face", "happy!", "smiling!"), ("a sad face", "sad!"))


def test_braces_in_names_stay() -> None:
    assert make(["{}", "{c} {name}", r"\1 \g<0>"], ["a {c}"]) == (("a {}",), ("a {c} {name}",), (r"a \1 \g<0>",))


def test_a_template_is_for_the_names_of_its_group() -> None:
    names = ["age:child", "race:White", ["age:adult", "age:grown-up"]]
    prompts = make(names, ["age:a {c}", "race:a {} person", "age:the {c}"])
    assert prompts == (
        ("a child", "the child"),
        ("a White person",),
        ("a adult", "the adult", "a grown-up", "the grown-up"),
    )


def test_a_colon_in_one_of_the_names_is_no_group() -> None:
    assert make(["Alien: Covenant", "Up"], ["the film {}"]) == (("the film Alien: Covenant",), ("the film Up",))


def test_imagenet_is_open_clips() -> None:
    names, at = read_names("imagenet", "set.class_names")
    templates, _ = read_templates("imagenet", "set.templates")
    class_names, prompts = make_prompts(names, templates, at, "t")
    assert class_names == open_clip.IMAGENET_CLASSNAMES and len(class_names) == 1000
    assert prompts == tuple(
        tuple(template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
        for name in open_clip.IMAGENET_CLASSNAMES
    )
    assert {len(of_class) for of_class in prompts} == {80}


def test_imagenet_simple_is_open_clips() -> None:
    expected = tuple(template("dog") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES)
    assert make(["dog"], read_templates("imagenet_simple", "t")[0]) == (expected,) and len(expected) == 7


def test_synsets_are_in_the_order_of_imagenets_names() -> None:
    synsets = imagenet_synsets()
    assert sorted(synsets.values()) == list(range(1000)) and list(synsets) == sorted(synsets)
    for synset, name in (("n01440764", "tench"), ("n02123045", "tabby cat"), ("n15075141", "toilet paper")):
        assert open_clip.IMAGENET_CLASSNAMES[synsets[synset]] == name


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "dog\ntabby cat\n"),
        ("names.txt", "\ufeffdog\r\n tabby cat \r\n\r\n\r\n"),
        ("names", "dog\ntabby cat"),
        ("names.json", '["dog", "tabby cat"]'),
        ("names.json", '[["dog"], "tabby cat"]'),
    ],
)
def test_names_and_templates_are_read_from_files(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode())
    names, at = read_names(str(tmp_path / name), "set.class_names")
    assert at == str(tmp_path / name)
    (tmp_path / "t.txt").write_text("a photo of a {c}.\n{c}\n")
    templates, _ = read_templates(str(tmp_path / "t.txt"), "set.templates")
    assert make(names, templates) == SENTENCES


def test_sentences_are_read_from_json(tmp_path: Path) -> None:
    sentences = dict(zip(NAMES, SENTENCES, strict=True))
    (tmp_path / "cupl.json").write_text(json.dumps(sentences))
    templates, at = read_templates(str(tmp_path / "cupl.json"), "set.templates")
    assert make(NAMES, templates) == SENTENCES and at == str(tmp_path / "cupl.json")


def test_numbers_as_keys_of_yaml_are_names() -> None:
    assert make(["0", "1"], {0: ["a zero"], 1: ["a one"]}) == (("a zero",), ("a one",))  # type: ignore[dict-item]


def test_equal_names_are_told_with_their_lines(caplog: pytest.LogCaptureFixture) -> None:
    make(["crane", "dog", "crane", "dog", "cat", "crane"], ["{}"])
    assert "names.txt: equal names, of which the first wins: 'crane' in lines 1, 3, 6; 'dog' in lines 2, 4" in (
        caplog.text
    )
    assert len(caplog.records) == 1
    make(*(read_names("imagenet", "k")[0], ["{}"]))
    assert "'missile' in lines 658, 745; 'sunglasses' in lines 837, 838" in caplog.text


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (NAMES, ["a {}", "a photo"], r"^templates.txt, line 2: 'a photo' has no place for the class: it needs one of"),
        (NAMES, ["a {} {c}"], r"^templates.txt, line 1: 'a {} {c}' has {c} and {}: it needs one of {}, {c}, {name}$"),
        (NAMES, ["a {class}"], r"^templates.txt, line 1: 'a {class}' has {class}: it needs one of"),
        (NAMES, ["a {0}"], r"line 1: 'a \{0\}' has \{0\}: it needs"),
        (NAMES, ["{}", 7], "^templates.txt, line 2: 7 is no text"),
        (["dog", " "], ["{}"], r"^names.txt, line 2: ' ' is no name of a class \(a text, or a list of them\)$"),
        (["dog", []], ["{}"], r"^names.txt, line 2: \[\] is no name of a class"),
        (["dog", ["cat", ""]], ["{}"], r"^names.txt, line 2: \['cat', ''\] is no name of a class"),
        (["dog", True], ["{}"], "^names.txt, line 2: True is no name of a class"),
        (
            ["dog", "cats"],
            {"dog": ["a dog"], "cat": ["a cat"]},
            r"^templates.txt: no list of sentences for the class 'cats' of names.txt \(did you mean 'cat'\?\)$",
        ),
        (["dog"], {"dog": []}, "no list of sentences for the class 'dog' of names.txt$"),
        (["dog"], {"dog": "a dog"}, "no list of sentences for the class 'dog' of names.txt$"),
        (["dog"], {"dog": ["a dog", " "]}, "no list of sentences for the class 'dog' of names.txt$"),
        (["dog"], {"dog": ["a dog"], "doge": ["x"]}, r"^templates.txt: 'doge' is no class of names.txt \(did .* 'dog'"),
        (
            ["age:child", "race:White"],
            ["age:a {c}", "gender:a {c}"],
            "^templates.txt, line 2: 'gender:a {c}' is for none of the groups age, race$",
        ),
        (["age:child", "age:adult"], ["a {c}"], "^templates.txt, line 1: 'a {c}' is for none of the groups age$"),
        (
            ["age:child", "race:White"],
            ["age:a {c}"],
            "^names.txt, line 2: no template in templates.txt is for the group of 'race:White'$",
        ),
        (
            ["age:child", "adult"],
            ["age:a {c}"],
            "^names.txt, line 2: no template in templates.txt is for the group of 'adult'$",
        ),
    ],
)
def test_wrong_names_and_templates_are_refused(names: Any, templates: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(names, templates)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("names.txt", b"dog\n\ncat\n", "names.txt, line 2: is blank"),
        ("names.txt", b"\ndog\n", "names.txt, line 1: is blank"),
        ("names.txt", b"\n \n", "names.txt is empty"),
        ("names.txt", b"dog\nch\xe2teau\n", "names.txt is not UTF-8: .*position 6"),
        ("names.json", b"[1,", "names.json is not JSON: .*line 1 column 4"),
        ("names.json", b'["ch\xe2teau"]', "names.json is not JSON: .*utf-8"),
        ("names.json", b'"dog"', "names.json: expected a list of .*, found 'dog'$"),
        ("names.json", b"[]", r"names.json: expected a list of .*, found \[\]$"),
    ],
)
def test_broken_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    for function in (read_names, read_templates):
        with pytest.raises(UserError, match=message):
            function(str(tmp_path / name), "set.key")


def test_a_mapping_is_no_list_of_names() -> None:
    with pytest.raises(UserError, match="^set.class_names: expected a list of class names, found {'a': 'b'}$"):
        read_names({"a": "b"}, "set.class_names")


def test_files_and_names_that_are_not_there_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"^k=imagnet: neither a file nor one of imagenet \(did you mean 'imagenet'\?\)$"
    ):
        read_names("imagnet", "k")
    with pytest.raises(UserError, match="^k=simple: neither a file nor one of imagenet, imagenet_simple"):
        read_templates("simple", "k")
