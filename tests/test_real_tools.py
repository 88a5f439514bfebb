"""Real tools: each does what it says, none can be made to fail otherwise than by a ToolError; the sandbox."""

import contextlib
import copy
import datetime
import json
import os
import random
import re
import sys
import time

import pytest

import train
from train import REAL_TOOLS, State, ToolError

POSIX = os.name == "posix"
posix = pytest.mark.skipif(not POSIX, reason="needs POSIX")


@pytest.fixture
def state(tmp_path):
    return State(folder=tmp_path, world=train.invent_world(seed=3, people=12))


def call(state, tool_name, /, **arguments):
    """As a gate calls: the arguments have to fit the schema, the result is strict JSON."""
    tool = REAL_TOOLS[tool_name]
    assert train.misfit(arguments, tool.parameters) == ""
    result = tool.run(state, **arguments)
    assert json.loads(json.dumps(result, allow_nan=False, ensure_ascii=False).encode()) == result
    return result


def refuses(state, reason, tool_name, /, **arguments):
    with pytest.raises(ToolError, match=reason) as caught:
        call(state, tool_name, **arguments)
    str(caught.value).encode()


# --- each by what it does ---


def test_the_set_of_tools():
    assert len(REAL_TOOLS) == 36 and len({tool.domain for tool in REAL_TOOLS.values()}) == 11
    asking = {name for name, tool in REAL_TOOLS.items() if tool.permission == "ask"}
    assert asking == {"delete_note", "delete_value", "book_room", "cancel_booking", "write_file",
                      "delete_file", "run_python"}
    for name, tool in REAL_TOOLS.items():
        assert tool.name == name and tool.description.endswith(".") and tool.permission in ("allow", "ask")
        assert all("type" in rule for rule in tool.parameters["properties"].values())


CALLS = [
    ("add", dict(a=2, b=3), {"result": 5}),
    ("add", dict(a=0.1, b=0.2), {"result": 0.3}),
    ("add", dict(a=10**15, b=10**15), {"result": 2 * 10**15}),
    ("add", dict(a=1e308, b=1e308), "too large"),
    ("add", dict(a=10**400, b=1), "too large"),
    ("add", dict(a=123456789012, b=0.1), {"result": 123456789012.1}),
    ("subtract", dict(a=2, b=3.5), {"result": -1.5}),
    ("multiply", dict(a=999999999999, b=999999999999), {"result": 999999999998000000000001}),
    ("multiply", dict(a=-0.0, b=4), {"result": 0}),
    ("divide", dict(a=1, b=3), {"result": 0.33333333333333}),
    ("divide", dict(a=6, b=3), {"result": 2}),
    ("divide", dict(a=1, b=0), "division by zero"),
    ("divide", dict(a=1e-300, b=1e300), {"result": 0}),
    ("statistics", dict(values=[3, 1, 2], what="sum"), {"result": 6}),
    ("statistics", dict(values=[123456789012345, 1], what="sum"), {"result": 123456789012346}),
    ("statistics", dict(values=[1, 2, 4], what="mean"), {"result": 2.3333333333333}),
    ("statistics", dict(values=[9, 1, 4], what="median"), {"result": 4}),
    ("statistics", dict(values=[9, 1, 4, 6], what="median"), {"result": 5}),
    ("statistics", dict(values=[3, 1, 2], what="max"), {"result": 3}),
    ("statistics", dict(values=[3, 1, 2.5], what="min"), {"result": 1}),
    ("statistics", dict(values=[], what="min"), "empty"),
    ("statistics", dict(values=[1e308, 1e308], what="mean"), "cannot be computed"),
    ("statistics", dict(values=[1e308, 1e308], what="median"), {"result": 1e308}),
    ("statistics", dict(values=[1] * 1001, what="sum"), "more than 1,000"),
    ("convert_length", dict(value=1, unit="mile", to="km"), {"value": 1.609344, "unit": "km"}),
    ("convert_length", dict(value=5, unit="foot", to="inch"), {"value": 60, "unit": "inch"}),
    ("convert_length", dict(value=1e308, unit="km", to="mm"), "too large"),
    ("convert_weight", dict(value=1, unit="pound", to="ounce"), {"value": 16, "unit": "ounce"}),
    ("convert_time", dict(value=1, unit="week", to="hour"), {"value": 168, "unit": "hour"}),
    ("convert_temperature", dict(value=100, unit="celsius", to="fahrenheit"),
     {"value": 212, "unit": "fahrenheit"}),
    ("convert_temperature", dict(value=-40, unit="fahrenheit", to="celsius"),
     {"value": -40, "unit": "celsius"}),
    ("convert_temperature", dict(value=0, unit="kelvin", to="celsius"),
     {"value": -273.15, "unit": "celsius"}),
    ("convert_temperature", dict(value=-300, unit="celsius", to="kelvin"), "absolute zero"),
    ("convert_temperature", dict(value=1.7e308, unit="kelvin", to="fahrenheit"), "too large"),
    ("days_between", dict(start="2024-02-28", end="2024-03-01"), {"days": 2}),
    ("days_between", dict(start="2024-02-30", end="2024-03-01"), "no date"),
    ("days_between", dict(start="20240228", end="2024-03-01"), "no date"),
    ("days_between", dict(start="٢٠٢٤-٠٢-٢٨", end="2024-03-01"), "no date"),
    ("add_days", dict(date="2023-12-31", days=1), {"date": "2024-01-01"}),
    ("add_days", dict(date="0001-01-01", days=-1), "outside the calendar"),
    ("weekday", dict(date="1969-07-20"), {"weekday": "Sunday"}),
    ("count_text", dict(text="one two\nthree", what="words"), {"count": 3}),
    ("count_text", dict(text="one 2, dé", what="letters"), {"count": 5}),
    ("count_text", dict(text="one two\nthree", what="lines"), {"count": 2}),
    ("change_text", dict(text="Straße", how="upper"), {"text": "STRASSE"}),
    ("change_text", dict(text="ABC", how="lower"), {"text": "abc"}),
    ("change_text", dict(text="abc", how="reverse"), {"text": "cba"}),
    ("change_text", dict(text="a\ud800", how="upper"), "Unicode"),
    ("change_text", dict(text="a" * 20_001, how="upper"), "more than 20,000"),
    ("replace_text", dict(text="a cat, a dog", old="a ", new="the "),
     {"text": "the cat, the dog", "replaced": 2}),
    ("replace_text", dict(text="a cat", old="cow", new="dog"), "does not occur"),
    ("replace_text", dict(text="a cat", old="", new="dog"), "does not occur"),
    ("replace_text", dict(text="a" * 9999, old="a", new="b" * 9999), "too long"),
    ("read_note", dict(name="plan"), "no note 'plan'; there are: none"),
    ("write_note", dict(name=" ", text="x"), "1 to 80"),
    ("write_note", dict(name="a\nb", text="x"), "one line"),
    ("delete_note", dict(name="plan"), "no note"),
    ("get_value", dict(key="k"), "no key"),
    ("delete_value", dict(key="k"), "no key"),
    ("find_rows", dict(table="t", column="c", value="1"), "no table"),
    ("column_total", dict(table="t", column="c"), "no table"),
    ("search_world", dict(query="Atlantis"), "nothing is known of 'Atlantis'"),
    ("search_world", dict(query="the"), "nothing is known"),
    ("free_rooms", dict(date="2026-01-31", slot="morning", seats=9),
     {"rooms": [{"room": "Cedar", "seats": 20}, {"room": "Elm", "seats": 60}]}),
    ("free_rooms", dict(date="31.1.2026", slot="morning"), "no date"),
    ("cancel_booking", dict(room="Ash", date="2026-01-31", slot="morning", name="Ada"), "no booking"),
    ("book_room", dict(room="Ash", date="2026-01-31", slot="morning", name=""), "1 to 80"),
    ("read_file", dict(name="list.txt"), "no file list.txt"),
    ("delete_file", dict(name="list.txt"), "no file list.txt"),
    ("list_files", dict(), {"files": []}),
    ("run_python", dict(code="print(6 * 7)"), {"output": "42\n", "exit": 0}),
]


@pytest.mark.parametrize("name, arguments, expected", CALLS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_call_gives(state, name, arguments, expected):
    if isinstance(expected, str):
        refuses(state, re.escape(expected), name, **arguments)
    else:
        result = call(state, name, **arguments)
        assert result == expected
        assert all(type(result[key]) is type(value) for key, value in expected.items())  # 5 and not 5.0


def test_notes(state):
    assert call(state, "write_note", name=" plan ", text="first") == {"saved": "plan", "replaced": False}
    assert call(state, "write_note", name="plan", text="second") == {"saved": "plan", "replaced": True}
    call(state, "write_note", name="list", text="")
    assert call(state, "list_notes") == {"names": ["list", "plan"]}
    assert call(state, "read_note", name="plan ") == {"text": "second"}
    assert call(state, "delete_note", name="plan") == {"deleted": "plan"}
    refuses(state, "there are: list", "read_note", name="plan")


def test_store(state):
    assert call(state, "put_value", key="a.x", value="1") == {"stored": "a.x"}
    assert call(state, "put_value", key="a.x", value="2") == {"stored": "a.x", "old": "1"}
    call(state, "put_value", key="b", value="")
    assert call(state, "list_keys") == {"keys": ["a.x", "b"]}
    assert call(state, "list_keys", prefix="a.") == {"keys": ["a.x"]}
    assert call(state, "get_value", key="b") == {"value": ""}
    assert call(state, "delete_value", key="a.x") == {"deleted": "a.x", "value": "2"}
    refuses(state, "no key", "get_value", key="a.x")


def test_nothing_can_be_stored_without_end(state):
    for i in range(200):
        call(state, "put_value", key=str(i), value="x")
    refuses(state, "no room", "put_value", key="one more", value="x")
    assert call(state, "put_value", key="7", value="y")["old"] == "x"
    for i in range(200):
        call(state, "add_row", table="t", row=f"a={i}")
    refuses(state, "full", "add_row", table="t", row="a=1")


def test_tables(state):
    assert call(state, "add_row", table="shop", row="item = Pen; price = 2.5") == {"table": "shop", "rows": 1}
    call(state, "add_row", table="shop", row="price=10;item=Lamp;")
    assert call(state, "add_row", table=" shop", row="item=lamp; price=-3")["rows"] == 3
    found = call(state, "find_rows", table="shop", column="item", value="LAMP")
    assert found == {"found": 2, "rows": [{"price": 10, "item": "Lamp"}, {"item": "lamp", "price": -3}]}
    assert call(state, "find_rows", table="shop", column="price", value="2.50")["rows"][0]["item"] == "Pen"
    assert call(state, "find_rows", table="shop", column="price", value="pen") == {"found": 0, "rows": []}
    assert call(state, "column_total", table="shop", column="price") == {"total": 9.5, "rows": 3}
    refuses(state, "'Pen' is no number", "column_total", table="shop", column="item")
    refuses(state, "there are: item, price", "column_total", table="shop", column="colour")
    for row in ("item=x", "item=x; price=1; colour=red", "item=x; colour=1"):
        refuses(state, "the columns of this table are: item, price", "add_row", table="shop", row=row)
    for row in ("", ";", "item", "=3", "a=1; a=2", "a = 1; b", "a=" + "x" * 500):
        refuses(state, "write a row as", "add_row", table="shop", row=row)


@pytest.mark.parametrize("text", ["nan", "inf", "1e999", "1_000", "٣", "9" * 400, "0x10", "--1", "1."])
def test_what_only_looks_like_a_number_stays_text(state, text):
    call(state, "add_row", table="t", row=f"a = {text}")
    assert call(state, "find_rows", table="t", column="a", value=text)["rows"] == [{"a": text}]
    refuses(state, "no number", "column_total", table="t", column="a")


def test_search_by_name_and_by_words(state):
    for entity in state.world:
        result = call(state, "search_world", query=f" {entity['name'].upper()} ")
        assert result["found"] == 1 and result["entries"][0]["name"] == entity["name"]
        values = list(result["entries"][0]["facts"].values())
        assert values == [value for _, value in train.in_order(entity)]
    person = next(entity for entity in state.world if entity["kind"] == "person")
    job, town = person["facts"]["occupation"], person["facts"]["birthplace"]
    result = call(state, "search_world", query=f"a {job} of {town}")
    names = [entry["name"] for entry in result["entries"]]
    assert person["name"] in names and len(names) == result["found"]
    towns = call(state, "search_world", query="town river")  # more than a reader should get
    assert towns["found"] >= len([e for e in state.world if e["kind"] == "place"])
    assert len(json.dumps(towns)) < 6000 and all(entry["facts"] for entry in towns["entries"])


def test_bookings_and_their_conflicts(state):
    at, booking = dict(date="2026-01-31", slot="evening"), "2026-01-31 evening Elm"
    assert call(state, "book_room", room="Elm", name="Ada", **at) == {"booked": booking, "name": "Ada"}
    assert call(state, "free_rooms", seats=21, **at) == {"rooms": []}
    refuses(state, "Elm is taken then, by Ada", "book_room", room="Elm", name="Ben", **at)
    call(state, "book_room", room="Elm", name="Ben", date="2026-01-31", slot="morning")
    assert call(state, "list_bookings", name="ada") == {"bookings": [booking]}
    refuses(state, "in the name of Ada", "cancel_booking", room="Elm", name="Ben", **at)
    assert call(state, "cancel_booking", room="Elm", name="ADA", **at) == {"cancelled": booking}
    assert call(state, "free_rooms", seats=21, **at)["rooms"] == [{"room": "Elm", "seats": 60}]
    assert call(state, "list_bookings", name="Ada") == {"bookings": []}


def test_files(state):
    text = "zwei\r\nZeilen: 世界\n"
    assert call(state, "write_file", name="a.txt", text="old") == {"written": "a.txt", "bytes": 3}
    size = call(state, "write_file", name="a.txt", text=text)["bytes"]
    assert (state.folder / "a.txt").read_bytes() == text.encode() and size == len(text.encode())
    assert call(state, "read_file", name="a.txt") == {"text": text, "bytes": size}
    (state.folder / "sub").mkdir()
    assert call(state, "list_files") == {"files": ["a.txt"]}
    assert call(state, "delete_file", name="a.txt") == {"deleted": "a.txt"}
    assert call(state, "list_files") == {"files": []}


def test_long_results_are_cut_and_say_so(state):
    result = call(state, "change_text", text="ß" * 20_000, how="upper")
    assert result["text"] == "S" * 4000
    assert result["cut"] == "text has 40,000 characters, these are the first 4,000"
    (state.folder / "big.bin").write_bytes(b"\xff" * 300_000)  # as a program may leave it
    assert call(state, "read_file", name="big.bin")["bytes"] == 300_000
    for i in range(150):
        call(state, "write_note", name=f"{i:080}", text="x")
    result = call(state, "list_notes")
    assert 20 < len(result["names"]) < 60 and result["cut"].startswith("names has 150 entries")


# --- properties ---


@pytest.mark.parametrize("kind", [*train.UNITS, "temperature"])
def test_units_there_and_back(state, kind):
    rng, units = random.Random(kind), REAL_TOOLS[f"convert_{kind}"].parameters["properties"]["unit"]["enum"]
    for unit in units:
        for to in units:
            value = round(rng.uniform(0.1, 1000), 3)
            there = call(state, f"convert_{kind}", value=value, unit=unit, to=to)["value"]
            back = call(state, f"convert_{kind}", value=there, unit=to, to=unit)["value"]
            assert back == pytest.approx(value, rel=1e-6)


def test_dates_agree_with_each_other_and_with_the_calendar(state):
    rng = random.Random(0)
    for _ in range(200):
        start, days = datetime.date.fromordinal(rng.randint(200_000, 2_000_000)), rng.randint(-99_999, 99_999)
        end = call(state, "add_days", date=str(start), days=days)["date"]
        assert call(state, "days_between", start=str(start), end=end) == {"days": days}
        assert call(state, "weekday", date=end)["weekday"] == datetime.date.fromisoformat(end).strftime("%A")


def test_states_know_nothing_of_each_other(state):
    other = State()
    call(state, "write_note", name="a", text="x")
    call(state, "add_row", table="t", row="a=1")
    before = copy.deepcopy(state.tables)
    assert call(other, "list_notes") == {"names": []}
    refuses(other, "no table", "find_rows", table="t", column="a", value="1")
    call(other, "write_note", name="a", text="y")
    call(state, "find_rows", table="t", column="a", value="1")["rows"][0]["a"] = 99
    assert state.tables == before
    refuses(other, "no folder", "list_files")
    refuses(other, "no folder", "read_file", name="a")
    refuses(other, "no folder", "write_file", name="a", text="")


USUAL = ["a", "Ada", "a = 1", "a.txt", "2026-01-31", "town"]
WORDS = ["", " ", "ü世界🎉", "\ud800", "\udfff x", "a\x00b", "..", "../a", "CON", "a=1; b=x", "a=1e400",
         "0001-01-01", "9999-12-31", "0000-00-00", "x" * 81, "y" * 3999, "z" * 20_000, "w" * 30_000, "\n",
         "\u2028", "ﷺ" * 2000, "%s{0}", "nan", "[a-", "\\", "a\r\nb", "İ", "ŉ" * 9000]
NUMBERS = [0, 1, -1, 0.1, -0.0, 1e308, -1e308, 5e-324, 10**15, 10**16, 10**400, -10**4000, 2**63, 1e15, 1e16]


def random_argument(rng, rule):
    if "enum" in rule:
        return rng.choice(rule["enum"])
    if rule["type"] == "integer":
        low, high = rule.get("minimum", -10**400), rule.get("maximum", 10**400)
        return rng.choice([low, high, rng.randint(low, high)])
    if rule["type"] == "number":
        return rng.choice([*NUMBERS, rng.uniform(-1000, 1000)])
    if rule["type"] == "array":
        items = [random_argument(rng, rule["items"]) for _ in range(rng.randint(0, 4))]
        return items * rng.choice([1, 1, 1, 500])
    assert rule["type"] == "string"
    noise = "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randint(0, 12)))
    return rng.choice([rng.choice(USUAL), rng.choice(USUAL), rng.choice(WORDS), noise])


def test_whatever_fits_the_schema_gives_json_or_a_tool_error(state):
    rng, done = random.Random(1), set()
    names = sorted(REAL_TOOLS.keys() - {"run_python"})
    started = time.monotonic()
    for name in names * 500:
        rules = REAL_TOOLS[name].parameters
        arguments = {key: random_argument(rng, rule) for key, rule in rules["properties"].items()
                     if key in rules["required"] or rng.random() < 0.5}
        try:
            result = call(state, name, **arguments)
            assert len(json.dumps(result)) < 40_000  # a character is six bytes at worst
            done.add(name)
        except ToolError as error:
            assert len(str(error).encode()) < 4000
    json.dumps(state.tables, allow_nan=False, ensure_ascii=False).encode()
    assert done == set(names)  # each was done, too, and not only refused
    assert time.monotonic() - started < 20


def test_through_the_gate_a_real_tool_asks_first(state):
    gate = train.Gate(REAL_TOOLS.values(), state)
    assert gate.call("add", '{"a": 1, "b": 2}') == '{"result":3}'
    assert "does not allow" in gate.call("run_python", '{"code": "print(1)"}')
    assert "does not allow" in gate.call("write_file", '{"name": "a", "text": "x"}')
    assert os.listdir(state.folder) == []
    gate = train.Gate(REAL_TOOLS.values(), state, ask=lambda tool, arguments: True)
    assert json.loads(gate.call("run_python", '{"code": "print(1)"}'))["output"] == "1\n"
    assert "error" in json.loads(gate.call("add", '{"a": 1' + "0" * 400 + ', "b": 1}'))


# --- no way out of the folder ---

ESCAPES = ["..", ".", "", "../secret", "..\\secret", "a/../../secret", "/etc/passwd", "//server/share",
           "\\\\server\\x", "C:\\x", "C:x", "c:", "a:stream", "~", "~/x", "sub/a", "sub\\a", "a\x00", "\x00",
           "a\n", "a ", " a", "a.", "...", "CON", "con.txt", "NUL", "nul.a.b", "Aux", "COM1", "lpt9.log",
           "PRN.", "CONIN$", "%2e%2e", "a*", "a?", "a|b", "ａ", "．．", "\u202ea", "\ud800",
           "file:///etc/passwd", "$HOME", "-rf", "x" * 65, ".hidden"]


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_a_name_does_not_lead_out(state, name):
    outside = state.folder.parent / "secret"
    outside.write_text("secret")
    for tool, more in (("write_file", {"text": "x"}), ("read_file", {}), ("delete_file", {})):
        refuses(state, "no file name|Unicode", tool, name=name, **more)
    assert outside.read_text() == "secret" and not os.listdir(state.folder)


@posix
def test_links_folders_and_pipes_are_no_files(state):
    secret = state.folder.parent / "secret"
    secret.write_text("secret")
    (state.folder / "link").symlink_to(secret)
    (state.folder / "dangling").symlink_to(state.folder.parent / "new")
    (state.folder / "up").symlink_to(state.folder.parent)
    (state.folder / "dir").mkdir()
    os.mkfifo(state.folder / "pipe")  # to read it would wait for ever
    for name in ("link", "dangling", "up", "dir", "pipe"):
        for tool, more in (("write_file", {"text": "x"}), ("read_file", {}), ("delete_file", {})):
            refuses(state, "not a plain file", tool, name=name, **more)
    assert call(state, "list_files") == {"files": []}
    assert secret.read_text() == "secret" and not (state.folder.parent / "new").exists()


def test_the_folder_fills_up(state):
    for i in range(100):
        (state.folder / f"{i}.txt").touch()
    refuses(state, "full", "write_file", name="more.txt", text="x")
    call(state, "write_file", name="7.txt", text="x")
    refuses(State(folder=state.folder / "gone"), "the system refuses", "write_file", name="a.txt", text="x")
    refuses(State(folder=state.folder / "gone"), "the system refuses", "run_python", code="")


# --- the sandbox ---


def sandboxed(code, folder, seconds=5):
    return train.run_limited(train.PYTHON, code, folder, seconds)


def test_a_program_shares_the_folder_and_nothing_else(state):
    call(state, "write_file", name="in.txt", text="4\n5\n")
    code = "total = sum(map(int, open('in.txt')))\nopen('out.txt', 'w').write(str(total))\nprint('é', total)"
    assert call(state, "run_python", code=code) == {"output": "é 9\n", "exit": 0}
    assert call(state, "read_file", name="out.txt")["text"] == "9"
    assert "EOFError" in call(state, "run_python", code="input()")["output"]
    code = "import os\nopen('x', 'w').close()\nprint(os.listdir())"  # without a folder it gets one for itself
    assert call(State(), "run_python", code=code)["output"] == "['x']\n"


def test_a_program_has_no_environment(state, monkeypatch):
    monkeypatch.setenv("SECRET", "of this process")
    assert call(state, "run_python", code="import os\nprint(dict(os.environ))")["output"] == "{}\n"
    plain = [sys.executable, "-I", "-c", "import os; print(sorted(os.environ))"]  # not emptied by the sandbox
    names = train.run_limited(plain, "", state.folder)[0]
    assert "PATH" not in names and "HOME" not in names and "SECRET" not in names


def test_errors_are_told_without_our_paths(state):
    result = call(state, "run_python", code="import json\ndef f(x):\n    return json.loads(x)\nf('{')")
    assert result["exit"] == 1
    assert result["output"].splitlines()[:2] == ["Traceback (most recent call last):",
                                                 '  File "snippet", line 4, in <module>']
    assert "JSONDecodeError" in result["output"] and "/" not in result["output"]
    assert call(state, "run_python", code="raise SystemExit(3)") == {"output": "", "exit": 3}
    assert "SyntaxError" in call(state, "run_python", code="1 +")["output"]
    endless = call(state, "run_python", code="def f():\n    f()\nf()")["output"].splitlines()
    assert len(endless) == 7 and endless[-1].startswith("RecursionError")


REFUSED = {
    "network": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "native network": "import _socket",
    "urllib": "import urllib.request",
    "subprocess": "import subprocess; subprocess.run(['true'])",
    "native subprocess": "import _posixsubprocess",
    "system": "import os; os.system('true')",
    "popen": "import os; os.popen('true')",
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "ctypes": "import ctypes",
    "sqlite": "import sqlite3; sqlite3.connect('/tmp/x.db')",
    "read": "open('/etc/passwd').read()",
    "read bytes": "open(b'/etc/passwd').read()",
    "read path": "from pathlib import Path; Path('/etc/passwd').read_text()",
    "read by io": "import io; io.FileIO('/etc/passwd')",
    "read by os": "import os; os.open('/etc/passwd', os.O_RDONLY)",
    "read code": "import io; io.open_code('/etc/passwd')",
    "read up": "open('../secret').read()",
    "write up": "open('../new', 'w')",
    "append up": "open('../secret', 'a')",
    "update up": "open('../secret', 'r+')",
    "write the library": "import os; open(os.__file__, 'r+')",
    "folder of the library": "import os; os.open(os.path.dirname(os.__file__), os.O_RDONLY)",
    "list": "import os; os.listdir('/')",
    "scan": "import os; os.scandir('..')",
    "remove": "import os; os.remove('../secret')",
    "unlink": "from pathlib import Path; Path('../secret').unlink()",
    "rename out": "import os; open('a', 'w').close(); os.rename('a', '../new')",
    "rename in": "import os; os.replace('../secret', 'a')",
    "mkdir": "import os; os.mkdir('../new')",
    "symlink": "import os; os.symlink('../secret', 'a')",
    "link": "import os; os.link('../secret', 'a')",
    "truncate": "import os; os.truncate('../secret', 0)",
    "chmod": "import os; os.chmod('../secret', 0)",
    "chdir": "import os; os.chdir('..'); open('secret')",
    "kill": "import os; os.kill(os.getppid(), 0)",
    "shutil": "import shutil; open('a', 'w').close(); shutil.copy('a', '../new')",
    "rmtree": "import shutil; shutil.rmtree('..')",
    "many files": "for i in range(1000): open(str(i), 'w').close()",
} | ({"fork": "import os; os.fork()", "spawn": "import os; os.posix_spawn('/bin/true', ['true'], {})",
      "fork bomb": "import os\nwhile True: os.fork()", "pipe": "import os; os.mkfifo('../new')",
      "limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
      "planted link": "open('link').read()"} if POSIX else {})


@pytest.mark.parametrize("what", REFUSED)
def test_the_sandbox_refuses(tmp_path, what):
    folder = tmp_path / "scratch"
    folder.mkdir()
    (tmp_path / "secret").write_text("secret")
    if POSIX:
        (folder / "link").symlink_to(tmp_path / "secret")
    output, code, stopped = sandboxed(REFUSED[what], folder)
    assert "PermissionError: not allowed here" in output and (code, stopped) == (1, "")
    assert sorted(os.listdir(tmp_path)) == ["scratch", "secret"]
    assert (tmp_path / "secret").read_text() == "secret"
    assert len(os.listdir(folder)) <= 101


def test_useful_things_work_in_the_sandbox(state):
    code = """
import calendar, collections, csv, datetime, decimal, fractions, hashlib, heapq, itertools, json
import math, random, re, statistics, string, tempfile, textwrap, unittest, zipfile
from pathlib import Path
Path("d").mkdir()
Path("d/x.json").write_text(json.dumps([1, 2]))
with zipfile.ZipFile("a.zip", "w") as archive:
    archive.write("d/x.json")
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "y").write_text("z")
    Path(folder, "sub").mkdir()
Path("d/x.json").rename("y.json")
Path("d").rmdir()
from os import *
print(sorted(listdir()), statistics.mean([1, 3]), decimal.Decimal("0.1") * 3)
"""
    assert call(state, "run_python", code=code) == {"output": "['a.zip', 'y.json'] 2 0.3\n", "exit": 0}


def test_an_endless_program_is_ended(tmp_path):
    start = time.monotonic()
    output, code, stopped = sandboxed("import os\nprint(os.getpid())\nwhile True: pass", tmp_path, seconds=2)
    assert stopped == "it ran longer than 2 seconds" and time.monotonic() - start < 6
    assert_dead(int(output))
    code = "import os\nos.close(1); os.close(2)\nwhile True: pass"  # without output it is not taken for done
    assert sandboxed(code, tmp_path, seconds=1)[2] == "it ran longer than 1 seconds"


def test_a_flood_of_output_is_ended(state):
    start = time.monotonic()
    result = call(state, "run_python", code="while True: print('x' * 10_000)")
    assert len(json.dumps(result)) < 5000 and "more than 65,536 bytes" in result["stopped"]
    assert time.monotonic() - start < 4


@posix
def test_limits_on_memory_and_files(tmp_path):
    output, code, stopped = sandboxed("x = 'a' * 10**10", tmp_path)
    if sys.platform == "linux":  # macOS does not enforce it
        assert "MemoryError" in output and code == 1
        assert "MemoryError" in sandboxed("x = []\nwhile True: x.append(bytearray(10**7))", tmp_path)[0]
    code = "import resource as r\nprint(*r.getrlimit(r.RLIMIT_CPU), *r.getrlimit(r.RLIMIT_NOFILE))"
    assert sandboxed(code, tmp_path)[0] == "10 10 64 64\n"
    assert "OSError" in sandboxed("open('big', 'wb').write(bytes(10**8))", tmp_path)[0]
    assert (tmp_path / "big").stat().st_size <= 2**20


def assert_dead(pid):
    if not POSIX:
        return
    for _ in range(100):
        try:
            os.kill(pid, 0)
            with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return  # dead, and nobody has asked yet
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"{pid} lives")


@posix
@pytest.mark.parametrize("ending", ["", "time.sleep(60)"], ids=["ends", "sleeps"])
def test_children_do_not_outlive(tmp_path, ending):
    # without the hook, as a program that got around it; the child keeps the output open
    code = f"import os, time\npid = os.fork()\nif pid == 0: time.sleep(60)\nprint(pid, flush=True)\n{ending}"
    output, _, _ = train.run_limited([sys.executable, "-c", code], "", tmp_path, seconds=2)
    assert_dead(int(output))


def test_the_snippet_never_runs_in_our_process(state):
    before = set(sys.modules)
    code = "import os, sys\nsys.modules['planted'] = os\nprint(os.getpid())"
    assert int(call(state, "run_python", code=code)["output"]) != os.getpid()
    assert "planted" not in sys.modules and set(sys.modules) == before
