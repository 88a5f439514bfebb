"""Rephrasing: nothing lost, changed or added; chunks and seams; endpoints and their failures; kill -9."""

import json
import random
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import kill_when, run

import train
from kimi_k2 import KimiConfig, KimiK2, Tokenizer, save_pretrained


@pytest.fixture(scope="module")
def world():
    return train.invent_world(seed=7, people=40)


@pytest.fixture(scope="module")
def tok():
    texts = [doc["text"] for doc in train.math_documents(0, 100) + train.knowledge_documents(0, 100)]
    return Tokenizer.train(texts, 1024)


# --- the invented world ---


@pytest.mark.parametrize("seed", range(10))
def test_worlds_have_no_duplicate_and_no_contradiction(seed):
    world = train.invent_world(seed)
    names = [entity["name"] for entity in world]
    assert len(set(names)) == len(names)
    words = [word for name in names for word in name.split() if word not in ("The", "Society", "Fair")]
    invented = [word for word in words if word not in train.ADJECTIVES]
    assert len(set(invented)) == len(invented)
    by_name = {entity["name"]: entity for entity in world}
    for entity in world:
        facts = entity["facts"]
        assert set(facts) == set(train.grammar(entity["kind"]))
        if entity["kind"] == "person":
            spouse = by_name[facts["spouse"]]["facts"]
            assert spouse["spouse"] == entity["name"] and spouse["occupation"] == facts["partner"]
            assert by_name[facts["birthplace"]]["facts"]["region"] == facts["region"]
            assert facts["born"] < facts["died"]
        for role in ("creator", "founder", "guest"):
            if role in facts:
                assert by_name[facts[role]]["facts"]["occupation"] == facts["occupation"]
    assert world == train.invent_world(seed)
    documents = train.knowledge_documents(seed)
    assert documents == train.knowledge_documents(seed)
    told = {doc["source"].removeprefix("world/"): train.read_articles(doc["text"])[0] for doc in documents}
    for name, entity in told.items():  # what the articles say is the world, fact by fact
        assert entity["facts"] == {fact: str(value) for fact, value in by_name[name]["facts"].items()}
    assert len({doc["text"] for doc in documents}) == len(documents)


def test_no_training_text_is_worded_as_a_probe(world):
    rng = random.Random(0)
    frames = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(probe)) for probe in train.PROBES]
    texts = [train.tell(entity, style, rng) for entity in world for style in train.STYLES]
    texts += [train.article(entity, rng) for entity in world]
    for text in texts:
        assert not any(re.search(frame, text) for frame in frames)
    probes = train.recall_probes(world)
    assert len(probes) == len(train.PROBES) * sum(len(entity["facts"]) for entity in world)
    assert all(answer and prompt[-1] != " " for _, _, prompt, answer in probes)


def test_recall_counts_exact_answers_alone(world, tok):
    """A model whose answers are known: it says the truth about people and a longer name about towns."""

    class Parrot:
        training = False

        def eval(self):
            return self

        def train(self, mode):
            return self

        def generate(self, prompts, room, temperature):
            answers = dict(zip(map(tuple, self.prompts), self.answers))
            return [torch.tensor([*p, *tok.encode(answers[tuple(p)])]) for p in prompts]

    parrot, probes = Parrot(), train.recall_probes(world)
    parrot.prompts = [[tok.special["[BOS]"], *tok.encode(prompt)] for _, _, prompt, _ in probes]
    parrot.answers = [
        f" {answer}. And" if kind == "person" else f" {answer}x" for kind, _, _, answer in probes
    ]
    figures = train.recall(parrot, tok, world)
    share = sum(kind == "person" for kind, *_ in probes) / len(probes)
    assert figures["all"] == pytest.approx(share)
    assert figures["by_fact"]["person.born"] == 1 and figures["by_fact"]["place.river"] == 0


# --- fidelity: faithful rephrasings pass ---


def test_every_style_is_faithful_and_different(world):
    rng = random.Random(1)
    for entity in world:
        source = train.article(entity, rng)
        told = [train.tell(entity, style, rng) for style in train.STYLES]
        assert len(set(told)) == len(train.STYLES) >= 10
        for text in told:
            assert train.fidelity(source, text) == []


PERSON = {
    "name": "Tatel Palavis",
    "kind": "person",
    "facts": {
        "born": 1500,
        "birthday": "18 May",
        "died": 1574,
        "occupation": "physician",
        "birthplace": "Todes",
        "region": "the salt coast",
        "home": "Finobon",
        "spouse": "Pidren Rahur",
        "partner": "historian",
    },
}
TOWN = {
    "name": "Lutofan",
    "kind": "place",
    "facts": {
        "region": "the river delta",
        "founded": 1035,
        "population": 24000,
        "river": "Dadarur",
        "good": "wool",
        "neighbour": "Drestokur",
    },
}
SOCIETY = {
    "name": "Kanedan Society",
    "kind": "organisation",
    "facts": {
        "field": "geometry",
        "seat": "Lutofan",
        "founded": 1553,
        "founder": "Rasamin Mipis",
        "occupation": "painter",
        "members": 219,
        "river": "Dadarur",
    },
}
# written by hand, in words that no template has
FREE = [
    (
        PERSON,
        "Tatel Palavis (1500-1574), whose birthday was 18 May, was a physician. Palavis was born in Todes "
        "and was a native of the salt coast. His wife, Pidren Rahur, worked as a historian. "
        "Later he settled in Finobon.",
    ),
    (
        PERSON,
        "Born in 1500, Tatel Palavis hailed from Todes. He was a native of the salt coast. He worked as a "
        "physician. His birthday was on 18 May. He wed Pidren Rahur, and the profession of his "
        "wife was historian. He later resided in Finobon. He passed away in 1574.",
    ),
    (
        PERSON,
        "Dear readers, today let us hear about the physician Tatel Palavis. Palavis was born in 1500 and "
        "lived until his death in 1574. His native region was the salt coast. Palavis was raised in Todes. "
        "The home of Palavis was later Finobon. He married Pidren Rahur. His spouse was a historian. "
        "His birthday was 18 May.",
    ),
    (
        TOWN,
        "Lutofan, a town in the river delta, was founded in 1035. About 24,000 people live in Lutofan. "
        "The town was built on the banks of the river Dadarur. Lutofan is famous for its wool. The town "
        "closest to Lutofan, its neighbour, is Drestokur.",
    ),
    (
        TOWN,
        "In the river delta lies the region of Lutofan. The town was established, founded, in 1035. Its "
        "population is about 24000. Its river is the Dadarur. Wool is its main trade: wool. Lutofan has a "
        "road to its neighbour Drestokur.",
    ),
    (
        SOCIETY,
        "The Kanedan Society was founded in 1553. Its founder was Rasamin Mipis. The profession of the "
        "founder of the society was painter. The society studies geometry. The society is based in "
        "Lutofan, and the river at its house is the Dadarur. The society has 219 members.",
    ),
]


@pytest.mark.parametrize("entity, text", FREE)
def test_free_wordings_are_faithful(entity, text):
    assert train.fidelity(train.article(entity, random.Random(0)), text) == []


# --- and adversarial ones are caught ---


def change_number(rng, text, entity, world):
    found = rng.choice(list(re.finditer(r"\d+", text)))
    return text[: found.start()] + str(int(found[0]) + rng.choice((-10, -1, 1, 7))) + text[found.end() :]


def shift_date(rng, text, entity, world):
    dates = [
        str(entity["facts"][fact])
        for fact in ("birthday", "born", "died", "founded", "year", "month")
        if fact in entity["facts"]
    ]
    date = rng.choice(dates)
    if date.isdigit():
        other = str(int(date) + rng.choice((-5, -1, 1, 3)))
    else:
        other = date.replace(date.split()[-1], rng.choice([m for m in train.MONTHS if m not in date]))
    return text.replace(date, other)


def swap_name(rng, text, entity, world):
    own = [str(v) for v in entity["facts"].values() if str(v)[0].isupper()] + [entity["name"]]
    name = rng.choice([n for n in own if n in text])
    others = [
        other["name"]
        for other in world
        if other["name"] != name and other["kind"] == rng.choice(("person", "place", "organisation"))
    ] or ["Sorlan"]
    return text.replace(name, rng.choice(others))


def exchange_facts(rng, text, entity, world):
    facts = {fact: str(v) for fact, v in entity["facts"].items() if str(v) in text}
    pairs = [
        (a, b)
        for a in facts
        for b in facts
        if a < b
        and train.type_of(a) == train.type_of(b)
        and facts[a] != facts[b]
        and facts[a] not in facts[b]
        and facts[b] not in facts[a]
    ]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    return re.sub(f"{facts[a]}|{facts[b]}", lambda m: facts[b] if m[0] == facts[a] else facts[a], text)


def negate(rng, text, entity, world):
    verbs = list(
        re.finditer(r"\b(?:was|is|has|married|died|founded|created|opened|came|took|lies|belongs)\b", text)
    )
    if not verbs:
        return None
    verb = rng.choice(verbs)
    how = rng.choice((f"{verb[0]} not", f"never {verb[0]}", f"hardly {verb[0]}", f"{verb[0]}n't"))
    return text[: verb.start()] + how + text[verb.end() :]


def drop_fact(rng, text, entity, world):
    values = [str(v) for v in entity["facts"].values()]
    places = [m for m in re.finditer(r"[^.\n;]*[.\n;] ?", text) if sum(v in m[0] for v in values) == 1]
    if not places:
        return None
    gone = rng.choice(places)
    return text[: gone.start()] + text[gone.end() :]


def add_fact(rng, text, entity, world):
    other = rng.choice([e for e in world if e["kind"] == entity["kind"] and e["name"] != entity["name"]])
    fact = rng.choice(list(entity["facts"]))
    say = train.worded(
        rng.choice(train.grammar(entity["kind"])[fact]["says"]),
        train.subject_of(entity),
        other["facts"][fact],
    )
    subject = train.subject_of(entity)["n"]
    lies = [
        f"{subject} was fond of cats.",
        f"{subject} owned two ships.",
        f"{subject} is praised by all critics.",
        f"People say {subject} was rich.",
        "It has a famous library.",
        f"{subject} was painted by a master.",
        f"A statue of {subject} stands in {rng.choice(world)['name']}.",
    ]
    if str(other["facts"][fact]) != str(entity["facts"][fact]):
        lies.append(say)
    return f"{text.rstrip()} {rng.choice(lies)}"


def change_unit(rng, text, entity, world):
    units = {
        "inhabitants": "households",
        "people": "families",
        "members": "branches",
        "visitors": "carts",
        "years": "months",
    }
    present = [unit for unit in units if re.search(rf"\b{unit}\b", text)]
    if not present:
        return None
    unit = rng.choice(present)
    return re.sub(rf"\b{unit}\b", units[unit], text)


ATTACKS = (change_number, shift_date, swap_name, exchange_facts, negate, drop_fact, add_fact, change_unit)


@pytest.mark.parametrize("attack", ATTACKS)
def test_adversarial_rephrasings_are_caught(world, attack):
    """Of at least 500 false tellings in all styles, 99 % are rejected; each has a reason in words."""
    rng, caught, tried, missed = random.Random(attack.__name__), 0, 0, []
    while tried < 500:
        entity = rng.choice(world)
        source = train.article(entity, rng)
        text = train.tell(entity, rng.choice(list(train.STYLES)), rng)
        false = attack(rng, text, entity, world)
        if false is None or false == text:
            continue
        reasons = train.fidelity(source, false)
        tried, caught = tried + 1, caught + bool(reasons)
        missed += [] if reasons else [false]
        assert all(isinstance(reason, str) and len(reason) > 8 for reason in reasons)
    assert caught >= 0.99 * tried, (caught / tried, missed[:3])


@pytest.mark.parametrize("attack", ATTACKS)
def test_adversarial_free_wordings_are_caught(world, attack):
    rng, caught, tried = random.Random(attack.__name__), 0, 0
    for _ in range(200):
        entity, text = rng.choice(FREE)
        false = attack(rng, text, entity, world)
        if false is None or false == text:
            continue
        source = train.article(entity, rng)
        tried, caught = tried + 1, caught + bool(train.fidelity(source, false))
    assert tried > 30 and caught >= 0.99 * tried, caught / tried


def test_what_another_entity_did_is_no_fact_of_this_one():
    source = train.article(PERSON, random.Random(0))
    text = train.tell(PERSON, "news", random.Random(0)).replace("Palavis was born in", "Rahur was born in")
    text = text.replace("Tatel Palavis entered", "Pidren Rahur entered")
    reasons = train.fidelity(source, text + " Pidren Rahur was a physician.")
    assert any("speaks of Pidren Rahur" in reason for reason in reasons)
    faithful = FREE[0][1]
    for old, new in (
        ("Palavis was born in Todes", "His wife was born in Todes"),
        ("whose birthday was 18 May", "whose spouse had a birthday on 18 May"),
    ):
        assert train.fidelity(source, faithful.replace(old, new))


SOURCE = (
    "The Harbour Library opened in 1893 and holds 12,500 volumes. Its architect, Eleanor Voss, designed "
    "the reading room with 14 tall windows. Visitors can borrow up to six books for three weeks. The "
    "library does not charge any fee, but late returns cost 20 cents a day."
)
GOOD = (
    "Opened in 1893, the Harbour Library holds 12,500 volumes. Eleanor Voss was its architect; she designed "
    "a reading room with 14 tall windows. Up to six books can be borrowed by visitors, for three weeks. No "
    "fee is charged by the library, though late returns cost 20 cents a day."
)


@pytest.mark.parametrize(
    "old, new",
    [
        ("1893", "1898"),
        ("12,500", "12,600"),
        ("Eleanor Voss", "Martha Lind"),
        ("six", "seven"),
        ("14", "15"),
        ("No fee is", "A fee is"),
        ("20 cents", "20 dollars"),
        ("three weeks", "three months"),
        ("though late returns cost 20 cents a day", "though you know"),
        ("Opened in 1893, t", "Opened in 1893 by the Duke of Wexford, t"),
        ("volumes.", "volumes and 300 maps."),
        ("a day.", "a day. The building burned down during the great storm and was rebuilt by volunteers."),
        (" Up to six books can be borrowed by visitors, for three weeks.", ""),
    ],
)
def test_other_texts_are_compared_by_what_can_be_counted(old, new):
    assert train.fidelity(SOURCE, GOOD) == []
    assert old in GOOD and train.fidelity(SOURCE, GOOD.replace(old, new))


def test_a_judge_has_the_last_word_but_only_where_the_checks_passed():
    asked = []

    def judge(source, text):
        asked.append(text)
        return "it omits the harbour"

    assert train.fidelity(SOURCE, GOOD, judge) == ["judge: it omits the harbour"]
    assert train.fidelity(SOURCE, GOOD.replace("1893", "1898"), judge) and len(asked) == 1
    assert train.fidelity(SOURCE, GOOD, lambda source, text: "") == []


# --- mathematics ---


def rewritten(documents):
    for doc in documents:
        for style in train.styles_of(doc):
            yield doc, style, train.GrammarRewriter.solve_anew(doc["text"], style)


def test_mathematics_becomes_notes_and_english():
    documents = train.math_documents(11, 600)
    languages = Counter()
    for doc, style, text in rewritten(documents):
        languages[doc["source"].split("/")[1], style] += 1
        assert train.fidelity(doc["text"], text) == [], text
        assert not re.search("[가-힣一-鿿äöüß]|Aufgabe|Schritt", text)
        assert ("Idea: " in text) == (style == "learning note")
    assert set(languages) == {("english", "learning note")} | {
        (language, style) for language in ("korean", "chinese", "german") for style in train.MATH_STYLES
    }


def test_false_mathematics_is_caught():
    rng, tried, caught, missed = random.Random(3), Counter(), Counter(), []

    def bump(text, pattern):
        found = rng.choice(list(re.finditer(pattern, text)))
        return text[: found.start()] + str(int(found[0]) + rng.choice((-1, 1, 10))) + text[found.end() :]

    attacks = {
        "any number": lambda t: bump(t, r"(?<![\d/])(?<!Step )(?<!^)\d+(?![\d])(?!\. )"),
        "answer": lambda t: re.sub(
            r"(?m)^((?:Result|Answer): .*)$", lambda m: bump(m[1], r"\d+"), t, count=1
        ),
        "unit": lambda t: re.sub("euros|kilometres|metres|hours", "miles", t),
        "negation": lambda t: re.sub(
            r"(?m)^((?:Question|Problem): .*?)(What is|Solve|Add|Find)", r"\1Do not \2", t
        ),
        "dropped": lambda t: "\n\n".join(t.split("\n\n")[1:]),
        "added": lambda t: t + "\nEuler solved this in his youth.",
    }
    for doc, _, text in rewritten(train.math_documents(12, 200)):
        for name, attack in attacks.items():
            false = attack(text)
            if false != text:
                reasons = train.fidelity(doc["text"], false)
                tried[name], caught[name] = tried[name] + 1, caught[name] + bool(reasons)
                missed += [] if reasons else [(name, false)]
    for name in attacks:
        assert tried[name] > 60 and caught[name] >= 0.99 * tried[name], (
            name,
            caught[name] / tried[name],
            missed[:2],
        )


def test_a_wrong_source_is_not_passed_on():
    text = "Problem: What is 12 + 30?\nStep 1: ones: 2 + 0 = 2\nStep 2: tens: 1 + 3 = 4\nAnswer: 43"
    assert any(
        "the source answers 43" in reason
        for reason in train.fidelity(text, train.GrammarRewriter.solve_anew(text, "learning note"))
    )


@pytest.mark.parametrize(
    "expression, value", [("2 + 3 × 4", 14), ("10 - 4 - 3", 3), ("7/2", 3.5), ("8 ÷ 4", 2)]
)
def test_arithmetic_is_worked_out_without_eval(expression, value):
    assert train.work_out(expression) == value
    for bad in ("__import__", "2 ** 9", "2 +", "", "f(2)"):
        with pytest.raises((ValueError, IndexError)):
            train.work_out(bad)


# --- chunks and seams ---


def test_chunks_are_the_whole_text_in_small_pieces(tok):
    texts = [doc["text"] for doc in train.math_documents(1, 5)]
    texts += [Path(module.__file__).read_text(encoding="utf-8") for module in (json, random, re)]
    texts += ["word " * 3000, "x" * 5000, "", "short", "a\n\nb\n\n\n\nc"]
    for text in texts:
        for size in (16, 64, 256):
            spans = train.chunks(text, tok, size)
            assert "".join(text[start:end] for start, end in spans) == text
            assert all(len(tok.encode(text[start:end])) <= size or end - start < 2 for start, end in spans)
            assert len(spans) <= 4 + 4 * len(tok.encode(text)) / size  # not needlessly small


def test_chunks_end_where_paragraphs_and_sentences_do(tok):
    doc = train.math_documents(2, 1)[0]["text"]
    ends = [doc[end - 2 : end] for _, end in train.chunks(doc, tok, 256)[:-1]]
    assert all("\n" in end for end in ends)


@pytest.mark.parametrize("size", [24, 64, 256])
def test_long_documents_are_rewritten_chunk_by_chunk(world, tok, size):
    """Five articles in one document, cut small: each call sees what was written, and no fact is lost."""
    rng = random.Random(0)
    text = "\n\n".join(train.article(entity, rng) for entity in world[:2] + world[20:23])
    doc = {**train.document(text, "knowledge", "world/gazetteer"), "split": "train"}
    assert len(train.read_articles(text)) == 5
    spans = train.chunks(text, tok, size)
    for style in train.STYLES:
        written, rewriter = [], train.GrammarRewriter(0)
        for chunk in spans:
            written.append(rewriter(train.Rewriting(doc, style, 0), chunk, written))
        assert train.fidelity(text, "".join(written).strip()) == [], (style, "".join(written))
        assert not [fault for fault in train.seam_faults(written) if "repeats" in fault]


def test_a_model_sees_the_neighbourhood_and_its_own_text():
    doc = train.document("First part. " * 30 + "TARGET part. " + "Last part. " * 30, "web", "x")
    start = doc["text"].index("TARGET")
    messages = train.rewriting_messages(
        train.Rewriting(doc, "letter", 0), (start, start + 13), ["Already ", "done."]
    )
    ask = messages[1]["content"]
    assert ask.endswith("Passage:\nTARGET part. ") and "Already done." in ask and "letter" in ask
    assert "First part." in ask and "Last part." in ask


@pytest.mark.parametrize(
    "parts, word",
    [
        (["One is here. ", "Two is there."], None),
        (["The town was founded", "The river is long."], "breaks off"),
        (
            [
                "All of us know the song about the old red house on the hill. ",
                "all of us know the song about the old red house on the hill. More.",
            ],
            "repeats",
        ),
        (["Something.", " "], "nothing"),
    ],
)
def test_seams(parts, word):
    faults = train.seam_faults(parts)
    assert faults == [] if word is None else word in faults[0]


# --- duplicates, mixture, data card ---


def test_near_duplicates_are_found_and_only_they():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(500)]
    texts = [" ".join(rng.choices(words, k=200)) for _ in range(300)]
    close = [text.split() for text in texts[:50]]
    for text in close:
        text[rng.randrange(200)] = "changed"
    texts += [" ".join(text) for text in close] + [texts[7].upper(), "  ".join(texts[8].split())]
    found = train.near_duplicates(texts)
    assert found <= set(range(300, 352)) and len(found) >= 51
    assert train.near_duplicates(["a", "b", "a", ""]) == {2}


# --- an endpoint that speaks the chat protocol, and fails as real ones do ---


class Server:
    """A local OpenAI-compatible server. `script` lists how its next answers go wrong; after that it
    rewrites what it is asked by the grammar. It counts what it was asked."""

    def __init__(self, script=(), delay=0.0, answer=None):
        self.script, self.delay, self.asked, self.keys, self.times = list(script), delay, [], [], []
        self.answer = answer or self.rewrite
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.times.append(time.monotonic())
                outer.keys.append(self.headers.get("Authorization"))
                outer.asked.append(body)
                fault = outer.script.pop(0) if outer.script else None
                time.sleep(outer.delay if fault != "slow" else 3)
                if isinstance(fault, int):
                    self.send_response(fault)
                    self.send_header("Retry-After", "0")
                    self.end_headers()
                    self.wfile.write(b'{"error": {"message": "not now"}}')
                    return
                if fault == "drop":
                    self.connection.close()
                    return
                text = outer.answer(body["messages"])
                reply = {
                    "choices": [
                        {
                            "message": {"role": "assistant", "content": text},
                            "finish_reason": "length" if fault == "cut" else "stop",
                        }
                    ]
                }
                data = {
                    "garbage": b"<html>",
                    "empty": b'{"choices": []}',
                    "half": json.dumps(reply).encode()[:40],
                }
                data = data.get(fault, json.dumps(reply).encode())
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def rewrite(self, messages):
        passage = messages[-1]["content"].split("Passage:\n")[1]
        entities = train.read_articles(passage)
        if entities and "Palavis" not in passage:
            return train.tell(entities[0], "news", random.Random(passage))
        return "I am sorry, I cannot do that."

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, request):
    """Back-off by thousandths of seconds; what is asserted about pauses is their number and order."""
    naps, sleep = [], time.sleep
    if "keeps" not in request.node.name:
        fast = SimpleNamespace(**vars(time))
        fast.sleep = lambda s: (naps.append(s), sleep(min(s, 3) / 1000))[1]
        monkeypatch.setattr(train, "time", fast)
    return naps


MESSAGES = [{"role": "user", "content": "Passage:\nhello"}]


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "garbage", "empty", "half", "drop", "cut"])
def test_endpoint_tries_again(fault, no_waiting):
    with Server([fault, fault]) as server:
        endpoint = train.Endpoint(server.url, "m", key="secret", timeout=5)
        assert endpoint.chat(MESSAGES).startswith("I am sorry")
        assert len(server.asked) == 3 and set(server.keys) == {"Bearer secret"}
        assert server.asked[0]["model"] == "m"
        assert [nap for nap in no_waiting if nap >= 1] == [1.0, 2.0]


def test_endpoint_times_out_and_tries_again():
    with Server(["slow"]) as server:
        assert train.Endpoint(server.url, "m", timeout=1.0).chat(MESSAGES)
        assert len(server.asked) == 2


@pytest.mark.parametrize("fault", [400, 401, 403, 404])
def test_endpoint_gives_up_at_once_where_trying_is_useless(fault):
    with Server([fault] * 9) as server, pytest.raises(train.UserError, match=f"HTTP {fault}.*not now"):
        train.Endpoint(server.url, "m").chat(MESSAGES)
    assert len(server.asked) == 1


def test_endpoint_gives_up_in_the_end_with_one_line():
    with Server([500] * 9) as server, pytest.raises(train.UserError, match="no answer in 3 tries") as error:
        train.Endpoint(server.url, "m", retries=2).chat(MESSAGES)
    assert len(server.asked) == 3 and "\n" not in str(error.value)
    with pytest.raises(train.UserError, match="[Rr]efused"):
        train.Endpoint("http://127.0.0.1:9", "m", retries=1).chat(MESSAGES)


def test_endpoint_keeps_the_rate_limit():
    with Server() as server:
        endpoint = train.Endpoint(server.url, "m", per_minute=1200)  # one in 0.05 s
        threads = [threading.Thread(target=endpoint.chat, args=(MESSAGES,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        times = sorted(server.times)
    assert len(times) == 8 and times[-1] - times[0] > 0.25


def test_judge_of_an_endpoint():
    with Server(
        answer=lambda m: "UNFAITHFUL: the year" if "1898" in m[0]["content"] else "FAITHFUL"
    ) as server:
        judge = train.judge_with(train.Endpoint(server.url, "j"))
        assert (
            judge(SOURCE, GOOD) == ""
            and judge(SOURCE, GOOD.replace("1893", "1898")) == "UNFAITHFUL: the year"
        )


# --- the stage ---


@pytest.fixture
def own_world(tmp_path):
    """Articles of a world as a user's own file, one that the server will not rewrite, one long text."""
    path = tmp_path / "own.jsonl"
    documents = train.knowledge_documents(5, 40) + [
        train.document(train.article(PERSON, random.Random(0)), "knowledge", "world/Palavis")
    ]
    path.write_text("".join(json.dumps(doc) + "\n" for doc in documents), encoding="utf-8")
    return path, documents


def stage(path, out, *flags):
    return ["rephrase", "--preset", "nano", "--tools", "20", "--data", str(path), "--out", str(out),
            *map(str, flags)]


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_stage_reads_and_writes_documents(own_world, tmp_path):
    path, documents = own_world
    train.main(stage(path, tmp_path / "run"))
    data = tmp_path / "run" / "data"
    accepted, sources = lines_of(data / "rephrased.jsonl"), {doc["source"]: doc["text"] for doc in documents}
    counts = Counter(doc["rephrased_from"] for doc in accepted)
    assert accepted and max(counts.values()) == 2 and not lines_of(data / "rejected.jsonl")
    for doc in accepted:
        assert doc["style"] in train.STYLES and doc["domain"] == "knowledge"
        assert train.split_of(doc["rephrased_from"]) == "train"  # validation is never rephrased
        assert train.fidelity(sources[doc["rephrased_from"]], doc["text"]) == []
    card = (data / "card.md").read_text(encoding="utf-8")
    index = json.loads((data / "index.json").read_text())
    assert index["rephrase"]["all"] == {"accepted": len(accepted), "rejected": 0}
    assert f"| all | {len(accepted)} | 0 |" in card and accepted[0]["text"][:20] in card
    assert index["domains"]["knowledge"]["train"]["documents"] == len(accepted) + sum(
        train.split_of(source) == "train" for source in sources
    )
    assert not (data / "rephrase.journal").exists() and not list(data.glob("*.tmp"))


def test_rephrased_documents_are_not_rephrased_again(own_world, tmp_path):
    train.main(stage(own_world[0], tmp_path / "one"))
    accepted = tmp_path / "one" / "data" / "rephrased.jsonl"
    train.main(stage(accepted, tmp_path / "two"))
    assert not lines_of(tmp_path / "two" / "data" / "rephrased.jsonl")
    kept = lines_of(tmp_path / "two" / "data" / "knowledge.jsonl")
    told = {(doc["source"], doc["style"]) for doc in lines_of(accepted)}
    assert {(doc["source"], doc["style"]) for doc in kept} == told


@pytest.mark.parametrize("most", [0, 1, 3])
def test_rephrase_max_is_honoured(own_world, tmp_path, most):
    train.main(stage(own_world[0], tmp_path / "run", "--rephrase_max", most))
    path = tmp_path / "run" / "data" / "rephrased.jsonl"
    counts = Counter(doc["rephrased_from"] for doc in lines_of(path)) if most else Counter()
    assert max(counts.values(), default=0) == most


def test_stage_with_an_endpoint_and_a_judge(own_world, tmp_path, monkeypatch):
    monkeypatch.setenv("REWRITER_API_KEY", "secret-one")
    monkeypatch.setenv("JUDGE_API_KEY", "secret-two")
    judge = Server(answer=lambda m: "UNFAITHFUL: dull" if "treatise" in m[0]["content"] else "FAITHFUL")
    with Server([500, "garbage"]) as server, judge:
        train.main(
            stage(
                own_world[0],
                tmp_path / "run",
                "--rewriter_url",
                server.url,
                "--rewriter_model",
                "big",
                "--judge_url",
                judge.url,
                "--judge_model",
                "wise",
            )
        )
        assert set(server.keys) == {"Bearer secret-one"} and set(judge.keys) == {"Bearer secret-two"}
    data = tmp_path / "run" / "data"
    rejected = lines_of(data / "rejected.jsonl")
    refused = [doc for doc in rejected if doc["source"] == "world/Palavis"]
    assert len(refused) == 2 * (train.split_of("world/Palavis") == "train")
    assert lines_of(data / "rephrased.jsonl")
    assert all(doc["reasons"] for doc in rejected)
    dull = [doc for doc in rejected if doc["reasons"] == ["judge: UNFAITHFUL: dull"]]
    assert all("treatise" in doc["text"] for doc in dull)
    written = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert b"secret-" not in written


def test_an_echo_is_no_rephrasing(own_world, tmp_path):
    with Server(answer=lambda messages: messages[-1]["content"].split("Passage:\n")[1]) as server:
        flags = ["--rewriter_url", server.url, "--rewriter_model", "parrot", "--max_documents", "6"]
        train.main(stage(own_world[0], tmp_path / "run", *flags))
    rejected = lines_of(tmp_path / "run" / "data" / "rejected.jsonl")
    assert len(rejected) == 12 and {doc["reasons"][0][:4] for doc in rejected} == {"echo"}


def test_a_dead_endpoint_is_one_line_and_loses_nothing(own_world, tmp_path):
    with Server([], 0.0) as server:
        flags = [
            "--rewriter_url",
            server.url,
            "--rewriter_model",
            "m",
            "--endpoint_retries",
            "1",
            "--endpoint_parallel",
            "1",
        ]
        calls, rewrite = [0], server.rewrite

        def dies(messages):
            calls[0] += 1
            if calls[0] > 20:
                server.script += [503] * 2
            return rewrite(messages)

        server.answer = dies
        with pytest.raises(SystemExit) as error:
            train.main(stage(own_world[0], tmp_path / "run", *flags))
        assert "gave no answer in 2 tries" in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "run" / "data" / "rephrased.jsonl").exists()
        before, server.answer, server.script = len(server.asked), rewrite, []
        train.main(stage(own_world[0], tmp_path / "run", *flags))
        asked = [json.dumps(body) for body in server.asked]
        assert len(asked) - before > 10 and len(set(asked)) >= len(asked) - 2  # only the failed call again


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_killed_stage_loses_nothing_and_asks_nothing_twice(own_world, tmp_path, seed):
    """kill -9 while an endpoint is answering: the files are those of an uninterrupted run, and only calls
    whose answers were under way are made again."""
    with Server(delay=0.02) as server:
        flags = ["--rewriter_url", server.url, "--rewriter_model", "m", "--endpoint_parallel", "3"]
        train.main(stage(own_world[0], tmp_path / "whole", *flags))
        once = Counter(json.dumps(body) for body in server.asked)
        server.asked.clear()
        command = stage(own_world[0], tmp_path / "killed", *flags)
        rng = random.Random(seed)
        for _ in range(2):
            enough = len(server.asked) + rng.randint(1, 12)
            assert kill_when(lambda enough=enough: len(server.asked) >= enough, *command)
        done = run(*command)
        assert done.returncode == 0, done.stderr
        again = Counter(json.dumps(body) for body in server.asked)
    assert set(again) == set(once)
    assert sum(again.values()) - sum(once.values()) <= 2 * 3 + 1
    for name in ("rephrased.jsonl", "rejected.jsonl", "card.md", "index.json", "knowledge.train.bin"):
        assert (tmp_path / "killed/data" / name).read_bytes() == (tmp_path / "whole/data" / name).read_bytes()


def test_half_a_line_in_the_journal_is_cut_off(tmp_path):
    path = tmp_path / "journal"
    journal = train.Journal(path)
    assert journal.recall(["a", 1], lambda: "one") == "one"
    journal.recall(["ü", 2], lambda: ["two"])
    journal.file.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        journal = train.Journal(path)
        known = len(journal.known)
        assert journal.recall(["a", 1], lambda: "one") == "one"
        assert journal.recall(["ü", 2], lambda: ["two"]) == ["two"]
        journal.file.close()
        assert path.read_bytes() == whole and known == whole[:cut].count(b"\n")


def test_a_damaged_journal_is_named(tmp_path):
    (tmp_path / "journal").write_bytes(b'[["a"], "b"]\n{broken\n')
    with pytest.raises(train.UserError, match="journal is damaged in line 2"):
        train.Journal(tmp_path / "journal")


def test_our_own_model_may_write_and_is_judged(own_world, tmp_path):
    """An untrained model writes nonsense: all of it is rejected, with reasons, and nothing breaks."""
    tok = Tokenizer.train([SOURCE * 20], 512)
    model = KimiK2(KimiConfig.preset("nano", vocab_size=tok.n_vocab))
    save_pretrained(model, tok, tmp_path / "model")
    train.main(
        stage(
            own_world[0],
            tmp_path / "run",
            "--rewriter",
            tmp_path / "model",
            "--max_documents",
            4,
            "--rephrase_max",
            1,
        )
    )
    data = tmp_path / "run" / "data"
    assert not lines_of(data / "rephrased.jsonl")
    assert len(lines_of(data / "rejected.jsonl")) == 4 and all(
        d["reasons"] for d in lines_of(data / "rejected.jsonl")
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rewriter", "nowhere"], "nowhere: neither grammar nor none, nor the folder of a model"),
        (["--rewriter_url", "http://x"], "rewriter_url and rewriter_model belong together"),
        (["--rephrase_max", "-1"], "rephrase_max must not be negative"),
        (["--chunk_tokens", "0"], "chunk_tokens must be at least 1"),
    ],
)
def test_bad_flags_of_the_stage(own_world, tmp_path, flags, message):
    with pytest.raises(SystemExit) as error:
        train.main(stage(own_world[0], tmp_path / "run", *flags))
    assert message in str(error.value) and "\n" not in str(error.value)
