"""The chat, its tools and the constrained decoder of sample.py, on random models and scripted ones."""

import builtins
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sample
from kimi_k2 import KimiConfig, KimiK2, Tokenizer, save_pretrained
from train import Gate, State, Tool, ToolError, misfit, schema

ROOT = Path(__file__).resolve().parent.parent
SECTION, END_SECTION = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, ARGUMENTS, END_CALL = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
TEXT = 'a dialog {"expression": "1 + 2", "name": true, "days": [1, 2.5], "text": "día 今天"} functions. ' * 9

RULES = {
    "nothing": {"type": "object", "properties": {}, "required": []},
    "plain": schema(text="string", number="number", flag="boolean"),
    "optional": schema(a="integer?", ab="string?", b="boolean?"),
    "ranges": schema(narrow="50..70", negative="-12..-3", one="7..7", large="99999..100001"),
    "words": schema(unit="m|km|ähnlich|\"quoted\"|m²", values="numbers"),
    "deep": {"type": "object", "required": ["who", "many"], "properties": {
        "who": {"type": "object", "required": ["name"], "properties": {
            "name": {"type": "string"}, "älter \"als\"": {"type": "integer", "minimum": 18}}},
        "many": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}}},
        "level": {"enum": [1, 12, 2.5, "1", None, True, [1, 2]]},
        "share": {"type": "number", "minimum": 0.25, "maximum": 0.5},
        "none": {"type": "null"}, "any": {}}},
}


def tokenizers():
    small = Tokenizer({bytes([i]): i for i in range(256)})
    return {"bytes": small, "merged": Tokenizer.train([TEXT], 700)}


TOKENIZERS = tokenizers()


def settings(**changed):
    return SimpleNamespace(**{"temperature": 1.0, "top_p": 1.0, "constrained": True, "max_new_tokens": 60,
                              "permissions": {}, **changed})


def random_model(tok, seed, sharpness=1.0):
    torch.manual_seed(seed)
    model = KimiK2(KimiConfig.preset("nano", vocab_size=tok.n_vocab)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def enforcer(tok, rules, seed=0, **changed):
    return sample.Enforcer(tok, rules, settings(**changed), torch.Generator().manual_seed(seed))


def willing(choose, tok):
    """A choose that badly wants to begin calls at its first token."""
    wish = torch.zeros(tok.n_vocab)
    wish[tok.special[SECTION]] = 1e4
    first = itertools.chain([wish], itertools.repeat(torch.zeros(1)))
    return lambda logits: choose(logits + next(first))


def ends(tok):
    return tok.special["<|im_end|>"], tok.special["[EOS]"]


def check(tok, new, rules, number):
    """The message of a constrained turn; everything that is promised of it holds."""
    message = tok.parse(new)
    assert "errors" not in message, message
    for n, call in enumerate(message["tool_calls"], number):
        name, text = call["function"]["name"], call["function"]["arguments"]
        assert call["id"] == f"functions.{name}:{n}" and name in rules
        assert misfit(json.loads(text), rules[name]) == "", (text, rules[name])
        assert len(json.loads(text, object_pairs_hook=list)) == len(json.loads(text))  # no key twice
        text.encode()  # no lone surrogates
        assert "\ufffd" not in text  # whole characters
    special = [i for i in new if i >= len(tok.ranks)]
    if tok.special[SECTION] in special:
        assert message["tool_calls"] and new[-1] == tok.special["<|im_end|>"]
    else:
        assert set(special) <= {*ends(tok)}
    return message


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_every_call_of_a_random_model_fits_its_schema(kind, temperature):
    tok, called = TOKENIZERS[kind], set()
    for seed in range(4):
        model = random_model(tok, seed, sharpness=[1, 30][seed % 2])
        for names in ([*RULES], ["deep"], ["optional", "ranges"], ["words", "plain"])[seed % 2 :: 2]:
            rules = {name: RULES[name] for name in names}
            choose = enforcer(tok, rules, seed, temperature=temperature)
            room = [150, 90, 60, 45][seed]
            choose.begin(seed, room)
            ids, new = [tok.special["[BOS]"]], []
            for token in sample.stream(model, ids, sample.new_cache(model), willing(choose, tok), room):
                new.append(token)
                if token in ends(tok):
                    break
            called |= {call["function"]["name"] for call in check(tok, new, rules, seed)["tool_calls"]}
    assert called >= ({"deep"} if temperature == 0 else {"deep", "plain"})


@pytest.mark.parametrize("rule", [*RULES])
def test_any_room_is_enough_or_nothing_is_begun(rule):
    """From the first room that holds the cheapest call, a call is begun and always ends in time."""
    tok, rules, begun = TOKENIZERS["bytes"], {rule: RULES[rule]}, {}
    cheapest = 1 + sample.cost([sample.calls(rules, 0)])  # a token a symbol, with these ranks
    for room in [cheapest + more for more in (-1, 0, 1, 3, 30)] + [3 * cheapest]:
        for seed in range(3):
            choose = enforcer(tok, rules, seed, temperature=[0.0, 1.0, 3.0][seed])
            choose.begin(0, room)
            choose, noise, new = willing(choose, tok), torch.Generator().manual_seed(seed), []
            while len(new) < room and not (new and new[-1] in ends(tok)):
                new.append(choose(5 * torch.randn(1, tok.n_vocab, generator=noise)))
            begun[room] = bool(check(tok, new, rules, 0)["tool_calls"])
            assert begun[room] == (room >= cheapest)


def fits(items, text):
    stack = sample.feed(items, text.encode().decode("latin-1"))
    return stack is not None and sample.cost(stack) == 0


def begins(items, text):
    stack = sample.feed(items, text.encode().decode("latin-1"))
    return stack is not None and sample.cost(stack) < math.inf


def test_numbers_have_no_dead_ends():
    rng = random.Random(0)
    for low, high in [(50, 70), (-12, -3), (-5, 130), (7, 7), (0, 0), (99, 1000), (98765, 100321), (-3, 0)]:
        rule = {"type": "integer", "minimum": low, "maximum": high}
        whole = {str(n) for n in range(low, high + 1)}
        starts = {text[:i] for text in whole for i in range(len(text) + 1)}
        others = {str(rng.randint(-2000, 200_000)) for _ in range(300)} | {"-0", "007", "+5", "5."}
        for text in starts | others:
            assert fits(sample.value(rule), text) == (text in whole), (rule, text)
            assert begins(sample.value(rule), text) == (text in starts), (rule, text)
    share = sample.value({"type": "number", "minimum": 0.25, "maximum": 0.5})
    assert fits(share, "0.25") and fits(share, "0.5") and fits(share, "0.499999") and fits(share, "0.250000")
    assert not any(begins(share, text) for text in ("0.24", "0.6", "1", "-", "0.500001", "0.2500000", "00"))
    assert begins(share, "0.2") and not fits(share, "0.2") and not fits(share, "0.")
    price = sample.value({"type": "number"})
    assert fits(price, "-0.000001") and fits(price, "123456789012345.5") and fits(price, "0")
    assert not any(begins(price, t) for t in ("1234567890123456", "1e5", "-0.0000000", "01", ".5"))
    assert sample.cost(sample.value({"type": "integer", "minimum": 3, "maximum": 2})) == math.inf
    for low, high in itertools.product((-1.5, 0, 2.25, 2.5), (2.5, 10, 1e6)):  # costs are exact
        items = sample.value({"type": "number", "minimum": low, "maximum": high})
        while sample.cost(items):
            steps = [sample.feed(items, c) for c in "-.0123456789"]
            items, before = min((s for s in steps if s is not None), key=sample.cost), sample.cost(items)
            assert sample.cost(items) == before - 1


def test_strings_are_json_and_utf8():
    string = sample.value({"type": "string"})
    for text in ("", "a b", "ünï", "今天", "🙂", 'a\\"b', "\\u00e9\\n\\\\", "\x7f"):
        assert fits(string, f'"{text}"')
    for text in ('a"b', "\n", "\\x", "\\u12", "\\ud800", "\\", "\x1f"):
        assert not fits(string, f'"{text}"')
    for raw in (b"\xff", b"\x80", b"\xc3(", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe4\xbb"):
        assert sample.feed(string, '"' + raw.decode("latin-1") + '"') is None


def test_objects_and_arrays():
    deep = sample.value(RULES["deep"])
    good = '{"many":[[true, false],[]], "who": {"älter \\"als\\"": 21,"name":"x"},"level":12, "any":"s"}'
    assert fits(deep, good) and misfit(json.loads(good), RULES["deep"]) == ""
    assert fits(deep, '{"who":{"name":""},"many":[]}')
    assert fits(deep, '{"level": [1, 2],"many":[[]],"who":{"name":"","älter \\"als\\"":18}}')
    for text in ('{}', '{"many":[]}', '{"none":0', '{"many":[],"many":[]', '{"many":[],}', '{"many":[,',
                 '{"many":[[1', '{"many":  [', '{"many" :', '{ "many"', '{"unknown"', '{"level":3'):
        assert sample.feed(deep, text.encode().decode("latin-1")) is None, text


def test_the_choice_is_the_renormalised_softmax():
    tok, rules = TOKENIZERS["merged"], {"words": RULES["words"]}
    for temperature, so_far in ((1.0, '{"unit":'), (0.7, '{"unit": "m", "values":[1'), (2.0, '{"unit')):
        head = f"{sample.SYMBOL[SECTION]}{sample.SYMBOL[CALL]}functions.words:0{sample.SYMBOL[ARGUMENTS]}"
        stack = sample.feed([sample.Speech(rules, 0)], head + so_far)
        logits = 2 * torch.randn(1, tok.n_vocab, generator=torch.Generator().manual_seed(1))
        choose = enforcer(tok, rules, 3, temperature=temperature)
        allowed = torch.tensor([sample.feed(stack, text) is not None for text in choose.symbols])
        p = (logits[0] / temperature).masked_fill(~allowed, -math.inf).softmax(-1)
        counts, n = torch.zeros(tok.n_vocab), 700
        for _ in range(n):
            choose.stack, choose.left = stack, 100
            counts[choose(logits)] += 1
        assert counts[~allowed].sum() == 0 and allowed.sum() >= 2
        error = (counts / n - p).abs() / (p * (1 - p) / n).sqrt().clamp(min=1e-3)
        assert error.max() < 4.5, (so_far, error.max())


def test_top_p_and_temperature_zero():
    tok, rules = TOKENIZERS["bytes"], {"optional": RULES["optional"]}
    head = f"{sample.SYMBOL[SECTION]}{sample.SYMBOL[CALL]}functions.optional:0{sample.SYMBOL[ARGUMENTS]}"
    stack = sample.feed([sample.Speech(rules, 0)], head + '{"')  # now a or b
    logits = torch.zeros(1, tok.n_vocab)
    logits[0, ord("b")], logits[0, ord("a")], logits[0, ord("z")] = 2.0, 0.0, 50.0
    for changed, wanted in (({"temperature": 0.0}, {"b"}), ({"top_p": 0.5}, {"b"}), ({}, {"a", "b"})):
        choose, drawn = enforcer(tok, rules, **changed), set()
        for _ in range(100):
            choose.stack, choose.left = stack, 100
            drawn.add(chr(choose(logits)))
        assert drawn == wanted


# --- the chat ---


def divide(state, a, b):
    if b == 0:
        raise ToolError("division by zero")
    return a / b


def keep(state, text):
    state.table("kept")[text] = True
    return {"kept": text}


TOOLS = {tool.name: tool for tool in (
    Tool("divide", "a by b", schema(a="number", b="number"), divide, "calculator"),
    Tool("broken", "fails", schema(), lambda state: [][1], "calculator"),
    Tool("keep", "Keep a text.", schema(text="string"), keep, "notes", "ask"),
    Tool("forbidden", "No.", schema(), lambda state: "ran", "notes", "deny"),
)}


def call_ids(tok, *calls, text="", number=0):
    """What a model says that calls (name, arguments)."""
    ids = tok.encode(text) + [tok.special[SECTION]]
    for n, (name, arguments) in enumerate(calls, number):
        ids += [tok.special[CALL], *tok.encode(f"functions.{name}:{n}"), tok.special[ARGUMENTS],
                *tok.encode(arguments), tok.special[END_CALL]]
    return [*ids, tok.special[END_SECTION], tok.special["<|im_end|>"]]


def answer_ids(tok, text):
    return [*tok.encode(text), tok.special["<|im_end|>"]]


@pytest.fixture
def talk(monkeypatch):
    """talk(what the model says, message by message, what the user types when asked) -> Chat."""
    tok = TOKENIZERS["bytes"]
    model = random_model(tok, 0)

    def start(script, keys=(), tools=TOOLS, budget=8, **permissions):
        def typed(prompt=""):
            print(prompt, end="")
            key = next(keys, None)
            if key is None:
                raise EOFError
            print(key)
            return key

        keys, script = iter(keys), iter(script)
        monkeypatch.setattr(builtins, "input", typed)
        gate = sample.ShownGate(tools.values(), State(), budget)
        gate.ask = gate.asked
        chat = sample.Chat(model, tok, gate, settings(permissions=permissions, constrained=False), None)
        monkeypatch.setattr(chat, "tokens", lambda ids: iter(next(script)))
        return chat

    return start


def results(chat):
    return [json.loads(message["content"]) for message in chat.messages if message["role"] == "tool"]


def test_tools_run_and_are_shown(talk, capsys):
    tok = TOKENIZERS["bytes"]
    two = ("divide", '{"a": 3, "b": 2}'), ("divide", '{"a": 3, "b": 0}')
    chat = talk([call_ids(tok, *two, text="Let me."),
                 call_ids(tok, ("broken", "{}"), ("divid", "{}"), number=2),
                 answer_ids(tok, "It is 1.5\x1b[2J.")])
    chat.say("3 / 2?")
    out = capsys.readouterr().out
    assert 'tool > divide {"a": 3, "b": 2} = 1.5\n' in out and "division by zero" in out
    assert "IndexError" in out and "did you mean divide" in out
    assert "kimi > Let me.\n" in out and "functions." not in out and "<|tool" not in out
    assert "It is 1.5\\x1b[2J." in out  # no terminal codes from a model
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "tool", "assistant", "tool",
                                                  "tool", "assistant"]
    assert results(chat)[0] == 1.5


def test_permissions(talk, capsys):
    tok = TOKENIZERS["bytes"]
    ok = answer_ids(tok, "ok")

    def kept(text, number=0):
        return call_ids(tok, ("keep", json.dumps({"text": text})), number=number)

    for key, ran in {"y": True, "YES ": True, "n": False, "": False, "yes please": False, "a": True}.items():
        chat = talk([kept("x\x07"), ok], [key])
        chat.say("keep x")
        assert bool(chat.gate.state.tables) == ran, key
        assert 'ask  > keep {"text": "x\\u0007"}' in capsys.readouterr().out
    chat = talk([kept("x"), ok])  # the input has ended
    chat.say("keep x")
    assert not chat.gate.state.tables and "does not allow" in results(chat)[0]["error"]

    chat = talk([kept("1"), kept("2", 1), ok, kept("3"), ok], ["always"])
    chat.say("keep two")
    assert [*chat.gate.state.tables["kept"]] == ["1", "2"]  # asked once
    chat.forget()
    chat.say("keep one more")
    assert [*chat.gate.state.tables["kept"]] == ["1", "2"] and not chat.gate.permissions  # asked anew: EOF

    chat = talk([call_ids(tok, ("forbidden", "{}")), ok], ["y"])
    chat.say("go")
    assert "does not allow" in results(chat)[0]["error"]
    chat = talk([call_ids(tok, ("forbidden", "{}"), ("keep", '{"text": "1"}')), ok],
                forbidden="allow", keep="allow")
    chat.say("go")
    assert results(chat) == ["ran", {"kept": "1"}]


def test_budget_and_malformed_calls(talk, capsys):
    tok = TOKENIZERS["bytes"]
    one = ("divide", '{"a": 1, "b": 2}')
    chat = talk([call_ids(tok, one, one, one), answer_ids(tok, "done")], budget=2)
    chat.say("go")
    assert results(chat)[:2] == [0.5, 0.5] and "used up" in results(chat)[2]["error"]
    chat = talk([call_ids(tok, ("divide", '{"a": 1')), call_ids(tok, ("divide", '{"a": "1", "b": 2}')),
                 answer_ids(tok, "sorry")])
    chat.say("go")
    out = capsys.readouterr().out
    assert "note: functions.divide:0: the arguments are not valid JSON" in out and "must be of type" in out
    chat = talk(itertools.repeat(call_ids(tok, one)), budget=3)
    chat.say("go")  # a model that never stops calling
    assert results(chat).count(0.5) == 3


def test_garbage_never_ends_the_chat(talk, capsys):
    tok, rng = TOKENIZERS["bytes"], random.Random(0)
    names = (SECTION, END_SECTION, CALL, ARGUMENTS, END_CALL, "<|im_end|>")
    favourites = [tok.special[name] for name in names]

    def garbage():
        while True:
            pool = [range(256), favourites, range(tok.n_vocab), b'functions.keep:0{"text": "\\ud800"}']
            yield [rng.choice(rng.choice(pool)) for _ in range(rng.randint(0, 60))]

    chat = talk(garbage(), itertools.cycle("yna?"))
    for n in range(30):
        chat.say(f"turn {n} \x00\udcff")
        tok.render(chat.messages, chat.gate.declarations(), add_generation_prompt=True)
    chat = talk([call_ids(tok, ("keep", '{"text": "\\ud800"}')), answer_ids(tok, "ok")], ["y"])
    chat.say("a lone surrogate")
    assert results(chat)
    capsys.readouterr().out.encode()  # what was printed is text


def test_ctrl_c_ends_the_turn_and_keeps_the_history(talk, capsys):
    tok = TOKENIZERS["bytes"]

    def interrupted():
        yield from tok.encode("Half an ans")
        raise KeyboardInterrupt

    chat = talk([interrupted(), answer_ids(tok, "whole")])
    chat.say("one")
    chat.say("two")
    assert [m["content"] for m in chat.messages] == ["one", "Half an ans", "two", "whole"]
    assert "Half an ans (stopped)" in capsys.readouterr().out

    def stop(state, text):
        raise KeyboardInterrupt

    slow = {"keep": Tool("keep", "", schema(text="string"), stop, "notes")}
    chat = talk([call_ids(tok, ("keep", '{"text": ""}')), answer_ids(tok, "whole")], tools=slow)
    chat.say("one")
    chat.say("two")
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("constrained", [False, True])
def test_the_cache_keeps_what_prompts_share(constrained, capsys):
    """What the cache holds is what a fresh one would, and what all prompts begin with is read once."""
    tok = TOKENIZERS["bytes"]
    model = random_model(tok, 1, sharpness=20)
    gate = sample.ShownGate(TOOLS.values(), State(), 2)
    args = settings(temperature=0.0, constrained=constrained, max_new_tokens=60)
    chat, known = sample.Chat(model, tok, gate, args, torch.Generator()), []
    hidden = model.hidden
    model.hidden = lambda ids, cache: known.append(cache.length) or hidden(ids, cache)
    for text in ("hello", "again", "and again"):
        chat.say(text)
        fresh = sample.new_cache(model)
        with torch.inference_mode():
            hidden(torch.tensor([chat.seen[: chat.cache.length]]), fresh)
        assert torch.allclose(chat.cache.c_kv[1], fresh.c_kv[1], atol=1e-4)
    declared = len(tok.encode(json.dumps(gate.declarations(), separators=(",", ":"))))
    assert known[0] == 0 and min(known[1:]) > declared
    assert "note: beyond the 64 tokens" in capsys.readouterr().out


# --- the command line ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    tok = TOKENIZERS["bytes"]
    save_pretrained(random_model(tok, 0), tok, folder)
    return folder


@pytest.mark.parametrize("flags, words", [
    (["--chat", "--tools", "calculater"], "'calculater', did you mean calculator?; a chat"),
    (["--chat", "--deny", "everything,all"], "--deny: there is no tool or domain 'everything'"),
    (["--chat", "--max_calls", "0"], "max_calls must be at least 1"),
    (["--constrained"], "needs --chat"),
    (["--chat", "--constraind"], "did you mean --constrained?"),
])
def test_bad_flags_give_one_line(folder, flags, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        sample.main([str(folder), *flags])
    said = capsys.readouterr().err or stopped.value.code
    assert words in said and said.startswith("sample.py: ") and len(said.strip().splitlines()) == 1


def test_a_scratch_folder_that_is_a_file(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="sample.py: .*exists"):
        sample.main([str(folder), "--chat", "--folder", str(tmp_path / "file")])


def test_a_text_is_completed(folder, capsys):
    sample.main([str(folder), "Once", "--max_new_tokens", "20", "--seed", "1", "--device", "cpu"])
    first = capsys.readouterr().out
    sample.main([str(folder), "Once", "--max_new_tokens", "20", "--seed", "1", "--device", "cpu"])
    assert first.startswith("Once") and first == capsys.readouterr().out


def test_flags_that_meet(monkeypatch):
    monkeypatch.setattr(sample, "REAL_TOOLS", TOOLS)

    def settled(*flags):
        args = sample.build_parser().parse_args(["folder", *flags])
        sample.settle_tools(args)
        return args

    assert settled().tools == ["divide", "broken"]
    assert settled("--tools", "none").tools == [] and settled("--tools", "all").tools == [*TOOLS]
    assert settled("--tools", "keep, calculator,divide").tools == ["keep", "divide", "broken"]
    given = settled("--deny", "all", "--allow", "keep,calculator", "--ask", "divide,keep").permissions
    assert given == {"divide": "ask", "broken": "allow", "keep": "ask", "forbidden": "deny"}


def test_the_world_of_a_run(tmp_path):
    from train import knowledge_documents

    assert sample.training_world(tmp_path) == []
    (tmp_path / "data").mkdir()
    documents = [{**doc, "split": "train"} for doc in knowledge_documents(1, count=40)]
    other = [{**documents[0], "split": "val"}, {**documents[1], "style": "article"}]
    lines = "".join(json.dumps(doc) + "\n" for doc in documents + other)
    (tmp_path / "data" / "knowledge.jsonl").write_text(lines, encoding="utf-8")
    world = sample.training_world(tmp_path)
    assert len(world) == len({entity["name"] for entity in world}) > 5
    gate = Gate([sample.REAL_TOOLS["search_world"]], State(world=world))
    found = json.loads(gate.call("search_world", json.dumps({"query": world[0]["name"]})))
    assert found["found"] == 1 and found["entries"][0]["facts"], found


def run(folder, *flags, said, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, ROOT / "sample.py", folder, *flags, "--seed", "1", "--device", "cpu"]
    return subprocess.run(command, input=said, capture_output=True, env=environment, timeout=600)


def test_the_program(folder):
    said = b"hello\n/tools\n\xff\xfe\n/new\nagain\n/quit\n"
    done = run(folder, "--chat", "--constrained", "--max_new_tokens", "60", "--ask", "all", said=said,
               PYTHONIOENCODING="ascii")  # a terminal that shows little
    out = done.stdout.decode()
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert out.startswith("tools: ") and "(ask)" in out and "at most 8 calls a turn" in out
    assert out.count("kimi > ") >= 3 and "what the tools keep stays" in out


def test_without_a_compiler_there_is_a_note(folder, tmp_path):
    flags = ["Once", "--max_new_tokens", "20"]
    plain = run(folder, *flags, said=b"")
    done = run(folder, *flags, "--compile", "on", said=b"", CXX="/no/such/compiler",
               TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    note, _, text = done.stdout.partition(b"\n")
    assert note.startswith(b"note: torch.compile failed") and text == plain.stdout and done.returncode == 0


@pytest.mark.slow
def test_compiled_decoding_says_the_same(folder):
    flags = ["Once", "--max_new_tokens", "20", "--temperature", "0"]
    plain, done = run(folder, *flags, said=b""), run(folder, *flags, "--compile", "on", said=b"")
    assert plain.stdout == done.stdout and plain.returncode == 0 and not done.stderr, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_in_the_program(folder):
    command = [sys.executable, "-u", ROOT / "sample.py", folder, "--chat", "--max_new_tokens", "100000",
               "--tools", "none", "--temperature", "0"]  # this model then says one thing for ever
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}) as chat:
        chat.stdin.write(b"hello\n")
        chat.stdin.flush()
        read = b""
        while b"kimi > " not in read or len(read) < 120:
            read += chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        out, error = chat.communicate(b"/quit\n", timeout=600)
    assert chat.returncode == 0 and not error and b"(stopped)" in out


def test_evolved_tools_are_there_by_name_with_things_to_work_on(folder, capsys):
    """The user is told what there is to ask about; the model may never have seen the tool."""
    names = "quests_get_dragon_colour,quests_list_dragon"
    done = run(folder, "--chat", "--tools", names, said=b"hi\n/tools\n")
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode()
    assert "note: quests has dragon " in shown and "quests_get_dragon_colour (allow)" in shown
    assert "Read the colour of a dragon in quests." in shown
    with pytest.raises(SystemExit) as stopped:
        sample.main([str(folder), "--chat", "--tools", "quests_get_dragon_wings"])
    assert "quests_get_dragon_wings" in capsys.readouterr().err + str(stopped.value.code)
