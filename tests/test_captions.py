"""Which caption is drawn, and what is none."""

import json

import pytest

from clipmini.data.captions import Captions, caption_id, caption_ids, check_caption
from clipmini.data.draws import Draws
from clipmini.data.health import Fault
from clipmini.errors import UserError


def draw(key: str | dict[str, float], members: dict[str, bytes], position: int = 0) -> str:
    return Captions.from_key(key).draw(members, Draws(0, position))


def test_txt_and_json() -> None:
    members = {"txt": b" plain \n", "json": json.dumps({"name": "n"}).encode()}
    assert draw("txt", members) == "plain" and draw("name", members) == "n"
    assert Captions.from_key("txt").extensions == ("txt",) and Captions.from_key("name").extensions == ("json",)


def test_lists_and_probabilities() -> None:
    members = {"txt": b" plain ", "json": json.dumps({"name": "n", "many": ["x", "y"]}).encode()}
    key = {"txt": 0.5, "name": 0.25, "many": 0.25}
    assert Captions.from_key(key).extensions == ("json", "txt")
    drawn = [draw(key, members, position) for position in range(4000)]
    shares = {caption: drawn.count(caption) / 4000 for caption in set(drawn)}
    assert shares == pytest.approx({"plain": 0.5, "n": 0.25, "x": 0.125, "y": 0.125}, abs=0.03)
    assert drawn == [draw(key, members, position) for position in range(4000)]  # a function of the position


def test_byte_order_mark_is_no_part_of_a_caption() -> None:
    assert draw("txt", {"txt": b"\xef\xbb\xbfa dog"}) == "a dog"


BAD = {
    "missing": ("txt", {}, "caption", "txt is missing"),
    "empty": ("txt", {"txt": b""}, "caption", "txt is blank"),
    "blank": ("txt", {"txt": b" \t\r\n"}, "caption", "txt is blank"),
    "not utf-8": ("txt", {"txt": b"\xff\xfe\xfa"}, "caption", "txt is not UTF-8: .*invalid start byte"),
    "latin-1": ("txt", {"txt": "café".encode("latin-1")}, "caption", "txt is not UTF-8"),
    "no key": ("name", {"json": b"{}"}, "caption", "no 'name' in the .json"),
    "no json": ("name", {"txt": b"a"}, "caption", "no 'name' in the .json"),
    "null": ("name", {"json": b'{"name": null}'}, "caption", "name is missing"),
    "number": ("name", {"json": b'{"name": 3}'}, "caption", "name is int, not text"),
    "empty list": ("name", {"json": b'{"name": []}'}, "caption", "name is list, not text"),
    "list of numbers": ("name", {"json": b'{"name": [1]}'}, "caption", "name is int, not text"),
    "half a surrogate pair": ("name", {"json": b'{"name": "a \\ud83d"}'}, "caption", "name is not UTF-8"),
    "list for an object": ("name", {"json": b"[]"}, "json", "list in place of an object"),
    "text for an object": ("name", {"json": b'"name"'}, "json", "str in place of an object"),
    "cut json": ("name", {"json": b'{"name": "a'}, "json", "Unterminated string"),
    "no text in json": ("name", {"json": b"\xff\xfe\xfa"}, "json", "codec can't decode"),
    "deep json": ("name", {"json": b"[" * 100_000}, "json", "recursion"),
}


@pytest.mark.parametrize(("key", "members", "cause", "detail"), BAD.values(), ids=BAD)
def test_captions_that_cannot_be_used(key: str, members: dict[str, bytes], cause: str, detail: str) -> None:
    with pytest.raises(Fault, match=detail) as caught:
        draw(key, members)
    assert caught.value.cause == cause
    (fault,) = Captions.from_key(key).faults(members)
    assert (fault.cause, fault.detail) == (caught.value.cause, caught.value.detail)


def test_every_caption_that_could_be_drawn_is_verified() -> None:
    members = {"txt": b"fine", "json": b'{"many": ["fine", "", 3], "name": "fine"}'}
    faults = list(Captions.from_key({"txt": 0.5, "many": 0.25, "name": 0.25}).faults(members))
    assert [fault.detail for fault in faults] == ["many is blank", "many is int, not text"]


def test_a_key_that_is_a_number_is_a_name() -> None:
    captions = Captions.from_key({1: 1.0}, None, "same")  # type: ignore[dict-item]  # as yaml reads {1:1.0}
    assert captions.draw_all({"json": b'{"1": "one"}'}, Draws(0, 0), Draws(0, 1)) == {"text": "one", "text_2": "one"}


@pytest.mark.parametrize("key", [{"txt": 0.5}, {"txt": 1.5, "name": -0.5}, {}])
def test_probabilities_must_add_up(key: dict) -> None:
    with pytest.raises(UserError, match="data.caption_key=.*must be positive and add up to 1"):
        Captions.from_key(key)


def test_equal_captions_have_equal_ids() -> None:
    assert caption_id("A  dog") == caption_id("a dog") != caption_id("a cat")
    assert -(2**63) <= caption_id(check_caption(b"x")) < 2**63


def test_blank_captions_and_no_others_have_the_id_0() -> None:
    assert caption_ids(["", " \n", "a dog"]).tolist() == [0, 0, caption_id("a dog")] and caption_id("a dog") != 0


def draw_second(second_key: str, members: dict[str, bytes], position: int = 0) -> str:
    draws = Draws(0, position)
    drawn = Captions.from_key("many", None, second_key).draw_all(members, draws, Draws(0, position, 3))
    assert list(drawn) == ["text", "text_2"] and drawn["text"] == draw("many", members, position)
    assert second_key in ("same", "name", "more.txt") or drawn["text_2"] != drawn["text"]
    return drawn["text_2"]


def test_second_captions() -> None:
    members = {"txt": b"plain", "more.txt": b" other ", "json": b'{"name": "n", "many": ["x", " y ", "z"]}'}
    assert draw_second("name", members) == "n" and draw_second("more.txt", members) == "other"
    assert draw_second("same", members) == draw("many", members)
    drawn = [draw_second("many", members, position) for position in range(3000)]
    assert {caption: drawn.count(caption) / 3000 for caption in "xyz"} == pytest.approx(
        dict.fromkeys("xyz", 1 / 3), abs=0.03
    )
    assert Captions.from_key("txt", None, "more.txt").extensions == ("more.txt", "txt")
    assert Captions.from_key("txt", None, "same").extensions == ("txt",)
    assert Captions.from_key("txt", None, "name").extensions == ("json", "txt")


@pytest.mark.parametrize(
    ("many", "detail"),
    [(["x"], "many has no second caption"), (["x", "x "], "many has no second caption"), (["x", 3], "many is int")],
)
def test_second_captions_that_cannot_be_used(many: list, detail: str) -> None:
    captions = Captions({"name": 1.0}, None, "many")
    members = {"json": json.dumps({"name": "x", "many": many}).encode()}
    with pytest.raises(Fault, match=detail):
        captions.draw_all(members, Draws(0, 0), Draws(0, 0, 3))
    (fault,) = captions.faults(members)
    assert fault.cause == "caption" and fault.detail.startswith(detail)


def test_second_captions_are_verified_with_every_first_one() -> None:
    captions = Captions.from_key({"name": 0.5, "many": 0.5}, None, "many")
    for many, is_right in ((["x", "y"], True), (["x", "x"], False), (["z"], False), ("x", True)):
        members = {"json": json.dumps({"name": "x", "many": many}).encode()}
        assert [fault.detail for fault in captions.faults(members)] == ["many has no second caption"] * (not is_right)


def test_without_captions_nothing_is_drawn() -> None:
    captions = Captions.from_key(None)
    assert captions.extensions == () and captions.draw_all({}, Draws(0, 0), Draws(0, 0, 3)) == {}
    for name, options in (("hard_negatives", ("wrong", None)), ("second_caption_key", (None, "many"))):
        with pytest.raises(UserError, match=f"data.{name}=.*: needs captions, and data.caption_key=null takes none"):
            Captions.from_key(None, *options)


def draw_negative(value: object, position: int = 0) -> str:
    members = {"txt": b"a dog", "json": json.dumps({"wrong": value}).encode()}
    return Captions.from_key("txt", "wrong").draw_negative(members, Draws(0, position))


def test_hard_negatives() -> None:
    assert Captions.from_key("txt", "wrong").extensions == ("json", "txt")
    assert draw_negative("a cat") == "a cat"
    assert draw_negative(None) == draw_negative([]) == ""
    drawn = [draw_negative(["x", "y", "z"], position) for position in range(3000)]
    assert {caption: drawn.count(caption) / 3000 for caption in "xyz"} == pytest.approx(
        dict.fromkeys("xyz", 1 / 3), abs=0.03
    )
    assert Captions.from_key("txt").draw_negative({"txt": b"a"}, Draws(0, 0)) == ""


@pytest.mark.parametrize(("value", "detail"), [(3, "wrong is int, not text"), ([" "], "wrong is blank")])
def test_hard_negatives_that_cannot_be_used(value: object, detail: str) -> None:
    with pytest.raises(Fault, match=detail):
        draw_negative(value)
    members = {"txt": b"a dog", "json": json.dumps({"wrong": value}).encode()}
    assert [fault.detail for fault in Captions.from_key("txt", "wrong").faults(members)] == [detail]
    assert not list(Captions.from_key("txt").faults(members))
