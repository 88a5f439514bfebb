"""The corpora are repeatable, right and split without leaks; the n-gram is a distribution."""

import ast
import os
import re
import subprocess
import sys
import zlib
from fractions import Fraction

import numpy as np
import pytest
from ngram import ByteNGram

import train


@pytest.fixture(scope="module")
def web():
    return train.web_documents()


@pytest.fixture(scope="module")
def code():
    return train.code_documents()


@pytest.fixture(scope="module")
def problems():
    return train.math_documents(seed=1, count=1500)


@pytest.fixture(scope="module")
def world():
    return {entity["name"]: entity for entity in train.invent_world(seed=1, people=120)}


def size(documents, split):
    return sum(len(d["text"].encode()) for d in documents if train.split_of(d["source"]) == split)


def test_documents_are_the_same_in_another_process(web, code):
    """All the toy's texts; strings hash otherwise there."""
    line = (
        "import train as c, zlib; d = c.web_documents() + c.code_documents() + "
        "c.math_documents(3, 50) + c.knowledge_documents(3, 50); r = c.RunConfig(tools=300); "
        "d += [*c.tool_documents(r, 30), *c.drill_documents(r, 30)]; "
        "print(len(d), zlib.crc32(repr([(x, c.split_of(x['source'])) for x in d]).encode()))"
    )
    other = subprocess.run([sys.executable, "-c", line], check=True, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": "1"}).stdout
    run = train.RunConfig(tools=300)
    documents = [*web, *code, *train.math_documents(3, 50), *train.knowledge_documents(3, 50),
                 *train.tool_documents(run, 30), *train.drill_documents(run, 30)]
    checked = zlib.crc32(repr([(doc, train.split_of(doc["source"])) for doc in documents]).encode())
    assert other.split() == [str(len(documents)), str(checked)]
    assert train.math_documents(3, 5) != train.math_documents(4, 5)


def test_documents_have_their_fields(web, code, problems):
    for document in web + code + problems + train.knowledge_documents(0, 50):
        assert set(document) == {"text", "domain", "source"} and document["text"].strip()


def test_code_compiles_and_has_no_docstring(code):
    for document in code[::3]:
        for node in ast.walk(ast.parse(document["text"])):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                assert ast.get_docstring(node) is None, document["source"]


@pytest.mark.parametrize(
    "source, expected",
    [
        ('"""doc"""\n# kept\nx = 1\n', "# kept\nx = 1\n"),
        ('def f():\n    "é"\n', "def f():\n    pass\n"),
        ('def f(): "doc"; return 1\n', "def f(): pass; return 1\n"),
        (
            'class A:\n    ("doc"\n     "more")  # why\n    x = "kept"\n',
            'class A:\n      # why\n    x = "kept"\n',
        ),
        ('def f():\n    "one"\n    "two"\n    return 1\n', "def f():\n    return 1\n"),
    ],
)
def test_only_the_docstring_is_cut(source, expected):
    assert train.without(source, list(train.docstrings(ast.parse(source), "m"))) == expected


def test_no_module_is_on_both_sides(web, code):
    sides = {}
    for document in web + code:
        source = document["source"]
        group = source if source.startswith("topics/") else source.split(".")[0]
        sides.setdefault(group, set()).add(train.split_of(source))
    assert all(len(side) == 1 for side in sides.values())
    assert min(size(web, "val"), size(code, "val")) > 100_000


def test_no_text_is_on_both_sides(web, code):
    for documents in (web, code):
        assert len({d["text"] for d in documents}) == len(documents)
    paragraphs = [set(), set()]
    for document in (d for d in web if d["source"].startswith("topics/")):
        side = paragraphs[train.split_of(document["source"]) == "val"]
        side.update(document["text"].split("\n\n"))
    assert not paragraphs[0] & paragraphs[1]


def statements(document):
    """(statement, steps, answer) of each problem, the colons of every language made alike."""
    for problem in document["text"].replace("：", ": ").split("\n\n"):
        first, *steps, answer = problem.split("\n")
        yield first.split(": ", 1)[1], steps, answer.split(": ", 1)[1]


def test_no_problem_is_posed_twice(problems):
    posed = [s for d in problems for s, _, _ in statements(d)]
    assert len(posed) > 4500 and len(set(posed)) == len(posed)


def value(expression):
    """The exact value of an expression of whole numbers."""
    text = expression.replace("×", "*").replace("÷", "/")
    assert re.fullmatch(r"[\d+*/ -]+", text), expression
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})


def test_every_step_is_true(problems):
    checked = 0
    for _, steps, _ in (s for d in problems for s in statements(d)):
        for step in steps:
            sides = re.split(r" ([=<>]) ", step.split(": ")[-1])
            if "x" in step:
                sides = sides[2:]
            values = [value(side) for side in sides[::2]]
            compared = {
                "=": values[0] == values[-1],
                "<": values[0] < values[-1],
                ">": values[0] > values[-1],
            }
            assert compared[sides[1]], step
            checked += 1
    assert checked > 10_000


def test_the_steps_lead_to_the_answer(problems):
    for statement, steps, answer in (s for d in problems for s in statements(d)):
        results = [step.split(" = ")[-1] for step in steps]
        if re.search(r"\d [+-] \d", statement) and "x" not in statement:  # column by column
            *low, top = map(int, results)
            total = sum(n % 10 * 10**i for i, n in enumerate(low)) + top * 10 ** len(low)
            assert answer == str(total), statement
        elif ", " in answer:  # quotient, remainder
            assert answer.endswith(f" {results[3 if len(results) > 2 else 1]}"), statement
        elif re.search(r" × \d+ \+ 0$", results[-1]):  # Euclid's last line
            assert results[-1].endswith(f" × {answer} + 0")
        elif "×" not in answer:
            assert results[-1] == answer, statement


ANSWERS = {  # computed from the numbers of the statement alone
    r"What is (\d+ [-+×] \d+)\?": lambda e: value(e),
    r"What is (\d+)% of (\d+)\?": lambda p, n: Fraction(int(p) * int(n), 100),
    r"Add the fractions (\S+) and (\S+)\.": lambda a, b: Fraction(a) + Fraction(b),
    r"Solve (\d+)x \+ (\d+) = (\d+) for x\.": lambda a, b, c: Fraction(int(c) - int(b), int(a)),
    r"Divide (\d+) by (\d+) and .*": lambda a, b: "{}, remainder {}".format(
        *divmod(int(a), int(b))
    ),
    r"Find .* divisor of (\d+) and (\d+)\.": lambda a, b: max(
        n for n in range(1, int(a) + 1) if int(a) % n == int(b) % n == 0
    ),
    r"Which number comes next: (\d+), (\d+), .*": lambda a, b: int(a) + 4 * (int(b) - int(a)),
    r"(\d+) \w+ cost (\d+) euros\. .* do (\d+) .*": lambda a, b, c: Fraction(
        int(b) * int(c), int(a)
    ),
    r"A train travels at (\d+) .* in (\d+) hours\?": lambda a, b: int(a) * int(b),
    r"A rectangle is (\d+) metres long and (\d+) .*": lambda a, b: int(a) * int(b),
    r"Which is larger, (.*) or (.*)\?": lambda a, b: max(a, b, key=value),
    r"What is the sum of the numbers (.*)\?": lambda n: sum(map(int, n.split(", "))),
}


def test_english_answers_follow_from_the_statements(problems):
    used = set()
    for document in (d for d in problems if "/english/" in d["source"]):
        for statement, _, answer in statements(document):
            (pattern,) = [p for p in ANSWERS if re.fullmatch(p, statement)]
            numbers = re.fullmatch(pattern, statement).groups()
            assert answer == str(ANSWERS[pattern](*numbers)), statement
            used.add(pattern)
    assert used == set(ANSWERS)


def test_languages_have_their_share(problems):
    language = [d["source"].split("/")[1] for d in problems]
    assert 0.65 < language.count("english") / len(language) < 0.75
    assert set(language) == set(train.LANGUAGES)
    script = {"korean": "[가-힣]", "chinese": "[一-鿿]", "german": "Aufgabe", "english": "Problem"}
    for document, name in zip(problems, language):
        assert re.search(script[name], document["text"]) and "@" not in document["text"]
    assert all(len(row) == 4 for t in (train.WORDS, train.STATEMENTS) for row in t.values())


NAMED = {
    "birthplace": "place",
    "home": "place",
    "neighbour": "place",
    "seat": "place",
    "subject": "place",
    "place": "place",
    "spouse": "person",
    "founder": "person",
    "creator": "person",
    "guest": "person",
    "owner": "organisation",
    "organiser": "organisation",
}


def test_the_world_is_consistent(world):
    for name, entity in world.items():
        facts = entity["facts"]
        for fact in NAMED.keys() & facts.keys():
            assert world[facts[fact]]["kind"] == NAMED[fact] and facts[fact] != name
        maker = world.get(facts.get("founder") or facts.get("creator") or facts.get("guest"))
        if maker:
            year = facts.get("founded") or facts.get("year")
            assert maker["facts"]["born"] + 20 <= year <= maker["facts"]["died"]
            assert maker["facts"]["occupation"] == facts["occupation"]
        if entity["kind"] == "person":
            assert world[facts["spouse"]]["facts"]["spouse"] == name
            assert world[facts["birthplace"]]["facts"]["region"] == facts["region"]
            assert world[facts["birthplace"]]["facts"]["founded"] < facts["born"]


def test_articles_tell_the_facts(world):
    assert len(world) == len(train.invent_world(seed=1, people=120)) == 300
    for entity in world.values():
        text = train.article(entity, train.random.Random("test"))
        assert text.startswith(entity["name"] + "\n\n") and "{" not in text
        assert sum(str(f) in text for f in entity["facts"].values()) >= len(entity["facts"]) - 1


def test_ngram_sums_to_one_and_learns():
    documents = [d["text"].encode() for d in train.knowledge_documents(0, 300)]
    model = ByteNGram(documents[:250])
    contexts = [b"\0\0\0\0", b" was", b"town", b"qzx\xff", "é".encode() + b"a "]
    keys = [int.from_bytes(c + bytes([b]), "big") for c in contexts for b in range(256)]
    p = model.probabilities(np.array(keys, np.uint64)).reshape(-1, 256)
    assert (p > 0).all() and np.allclose(p.sum(1), 1, atol=1e-12)
    assert model.bits_per_byte(documents[:250]) < model.bits_per_byte(documents[250:]) < 3
    assert ByteNGram(documents[:250], 1).bits_per_byte(documents[250:]) > 3.5
