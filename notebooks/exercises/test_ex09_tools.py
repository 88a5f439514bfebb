import json

import train


def call(answer, given, **store):
    """(result, store after it, whether the tool ran) of a call through the gate."""
    gate = train.Gate([answer.move_tool()], train.State({"store": store}))
    result = json.loads(gate.call("move_value", json.dumps(given)))
    return result, gate.state.tables["store"], gate.log[-1][3]


def test_moves(answer):
    assert call(answer, {"key": "a", "to": "b"}, a="tea", c="sugar") == (
        {"moved": "tea"}, {"b": "tea", "c": "sugar"}, True)


def test_failures_say_why_and_change_nothing(answer):
    for given in ({"key": "x", "to": "b"}, {"key": "a", "to": "c"}):
        result, store, _ = call(answer, given, a="tea", c="sugar")
        assert list(result) == ["error"], f"{given} must fail"
        assert "the tool broke" not in result["error"], "raise train.ToolError with a reason in words"
        assert store == {"a": "tea", "c": "sugar"}, "a call that failed has changed something"


def test_schema_is_enforced(answer):
    for given in ({"key": "a"}, {"to": "b"}, {"key": "a", "to": 1}, {"key": "a", "to": "b", "why": ""}):
        result, _, ran = call(answer, given, a="tea")
        assert "error" in result and not ran, f"the gate lets {given} through: look at the schema"
    assert answer.move_tool().description
