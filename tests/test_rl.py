"""Reinforcement learning: the objective against its formula, rollouts against plain decoding, environments
against right, wrong and dishonest answers, and runs that are killed.

The reference for the objective is the formula written out in float64 and finite differences; for rollouts the
full forward pass over one answer alone; for a run, another run.
"""

import contextlib
import itertools
import json
import math
import random
import re
import shutil
import zlib

import pytest
import torch
from runs import SMALL, after, kill_when, run

import train
from kimi_k2 import KimiConfig, KimiK2, Tokenizer, load_pretrained


@pytest.fixture(scope="module")
def tok():
    texts = [f"{q.request} {q.answer}" for domain in train.QUESTIONS for q in questions(domain, 20)]
    return Tokenizer.train([*texts, *itertools.islice(train.wrapping(train.configure({}, {})[0]), 30)], 512)


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    model = KimiK2(KimiConfig.preset("nano", vocab_size=tok.n_vocab))
    with torch.no_grad():  # a model that is sure of something, unlike a fresh one
        for p in model.parameters():
            p.mul_(2)
    return model


@pytest.fixture(scope="module")
def toolbox():
    return train.toolbox_of(train.RunConfig(tools=100))[0]


def questions(domain, n, side="train"):
    return [train.environment({"domain": domain, "seed": f"0 {side} {i}"}) for i in range(n)]


def said(text):
    return {"role": "assistant", "content": text, "tool_calls": []}


def reward(question, text):
    return question.step(said(text))[1]


# -- the objective ---------------------------------------------------------------------------------------


@pytest.fixture
def bandit():
    """One token of six: logits, the policy that sampled, 8 draws from it and their advantages. (float64)"""
    generator = torch.Generator().manual_seed(3)
    logits, old = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    drawn = torch.multinomial(old.softmax(0), 8, replacement=True, generator=generator)
    rewards = torch.rand(8, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), old.log_softmax(0)[drawn], drawn, rewards - rewards.mean()


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_gradient_of_the_objective_on_a_bandit(bandit, tau):
    logits, old, drawn, advantage = bandit

    def written_out(values):
        z = math.log(sum(math.exp(v) for v in values))
        return sum((a - tau * (values[i] - z - o)) ** 2
                   for a, o, i in zip(advantage.tolist(), old.tolist(), drawn.tolist())) / 8

    loss = train.policy_loss(logits.log_softmax(0)[drawn], old, advantage, tau) / 8
    values, step = logits.tolist(), 1e-6
    assert abs(loss.item() - written_out(values)) < 1e-12
    loss.backward()
    for i, gradient in enumerate(logits.grad.tolist()):
        up, down = ([v + sign * step * (i == j) for j, v in enumerate(values)] for sign in (1, -1))
        assert abs(gradient - (written_out(up) - written_out(down)) / (2 * step)) < 1e-8


@pytest.mark.parametrize("tau", [0.1, 1.0, 3.0])
def test_the_gradient_is_k15s_direction_times_minus_two_tau(bandit, tau):
    """K1.5: 1/K sum_i A_i grad log pi(y_i) - tau / 2 grad rho_i^2."""
    logits, old, drawn, advantage = bandit
    gradient, = torch.autograd.grad(
        train.policy_loss(logits.log_softmax(0)[drawn], old, advantage, tau) / 8, logits)
    logp = logits.log_softmax(0)[drawn]
    direction, = torch.autograd.grad((advantage * logp - tau / 2 * (logp - old) ** 2).mean(), logits)
    torch.testing.assert_close(gradient, -2 * tau * direction, atol=1e-12, rtol=1e-10)


def test_no_gradient_where_the_advantage_is_tau_times_the_log_ratio(bandit):
    logits, old, drawn, _ = bandit
    logp = logits.log_softmax(0)[drawn]
    settled, = torch.autograd.grad(train.policy_loss(logp, old, 0.7 * (logp - old).detach(), 0.7), logits)
    assert settled.abs().max() < 1e-12


def test_reinforce_is_the_first_step_and_no_other(bandit):
    logits, old, drawn, advantage = bandit

    def gradient(objective, old):
        loss = train.policy_loss(logits.log_softmax(0)[drawn], old, advantage, 0.5, objective)
        return torch.autograd.grad(loss, logits)[0]

    now = logits.log_softmax(0)[drawn].detach()
    torch.testing.assert_close(gradient("mirror", now), gradient("reinforce", now), atol=1e-12, rtol=1e-10)
    assert (gradient("mirror", old) - gradient("reinforce", old)).abs().max() > 0.1


# -- answers side by side in a row -----------------------------------------------------------------------


def some_rollouts(tok, n=5, seed=0, prompt="How do I wash a car?"):
    """Answers of random ids, with a tool result in the middle of some, and what the policy said."""
    rng = random.Random(seed)
    ids, _ = tok.render([{"role": "user", "content": prompt}], None, True)
    found = []
    for number in range(n):
        rollout = train.Rollout({"domain": "safety", "seed": "0 train 1"}, number, rng.choice((1.0, 0.7)),
                                list(ids))
        for spoken in ((True,), (True, False, True))[number % 2]:
            for _ in range(rng.randrange(1, 12)):
                if spoken:
                    rollout.said.append(len(rollout.ids))
                    rollout.logp.append(-rng.random())
                rollout.ids.append(rng.randrange(tok.n_vocab - 8))
        found.append(rollout)
    return found


def alone(model, rollout):
    """log pi(y|x) from the full forward pass over one answer."""
    logits = model(torch.tensor([rollout.ids]))[0][0] / rollout.temperature
    logp = logits.log_softmax(-1)
    return sum(logp[i - 1, rollout.ids[i]] for i in rollout.said)


@pytest.mark.parametrize("length", [1, 80, 1000])  # one answer a row, a few, all
def test_answers_that_share_a_prompt_are_read_as_if_alone(model, tok, length):
    rollouts = some_rollouts(tok)
    rows = train.answer_rows(rollouts, length)
    assert [r.number for row in rows for r in row] == list(range(5))
    assert {1: 5, 1000: 1}.get(length, len(rows)) == len(rows) and 1 <= len(rows) <= 5
    *tensors, answer = train.answer_batch(rows)
    temperature = torch.tensor([rollout.temperature for rollout in rollouts])
    logp = train.answer_logps(model, *tensors, answer, temperature)
    expected = torch.stack([alone(model, rollout) for rollout in rollouts])
    torch.testing.assert_close(logp, expected, atol=2e-4, rtol=1e-5)


class OneJob:
    """What the accumulating functions read of a Job."""

    def __init__(self, **fields):
        run, _ = train.configure({"preset": "nano", "aux_alpha": 0.0, **fields}, {})
        self.run, self.device, self.autocast = run, torch.device("cpu"), contextlib.nullcontext
        self.ranks = train.Ranks()


@pytest.mark.parametrize("length", [1, 200])
def test_gradient_of_the_model_is_the_formulas(model, tok, length):
    """The gradient of everything, against the formula with one forward pass for each answer. Prompts and
    tool results are masked: other log-probabilities of theirs change nothing."""
    groups, tau = [], 0.8
    for seed in range(3):
        rollouts = some_rollouts(tok, 4, seed, f"Describe copper in {train.COUNTED[seed + 2]} words.")
        rewards = [0.0, 1.0, 0.5, 1.0]
        groups.append([(r, reward - sum(rewards) / 4) for r, reward in zip(rollouts, rewards)])
    settled = [(r, 0.0) for r in some_rollouts(tok, 4, 9)]  # rewards all alike: counted, with no gradient
    for rollout, _ in settled:
        rollout.logp = [alone(model, rollout).item() / len(rollout.said)] * len(rollout.said)
    groups.append(settled)
    model.zero_grad()
    total = sum((a - tau * (alone(model, r) - sum(r.logp))) ** 2 for group in groups for r, a in group) / 16
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, _ = train.accumulate_policy(model, OneJob(rl_row=length), groups, tau)
    assert abs(loss - total.item()) < 1e-4 * total.item()
    for name, p in model.named_parameters():
        largest = expected[name].abs().max().clamp(min=1e-3)
        assert (p.grad - expected[name]).abs().max() <= 1e-4 * largest, name
    model.zero_grad()


# -- rollouts --------------------------------------------------------------------------------------------


class Chat:
    """An environment of three turns, whose reward is the share of even ids that it was told."""

    tools = None

    def __init__(self, request="How do I wash a car?"):
        self.request, self.heard = request, []

    def reset(self):
        return [{"role": "user", "content": self.request}]

    def step(self, message):
        self.heard.append(message["content"])
        done, more = len(self.heard) == 3, "And then? " * len(self.heard)
        return [] if done else [{"role": "user", "content": more}], float(done), done


def engine_of(model, tok, **more):
    engine = train.Engine(model, tok, 0, 40, **more)
    engine.stop |= set(range(0, tok.n_vocab, 9))  # gibberish has to end somewhere
    return engine


REQUESTS = ("How do I wash a car?", "Describe Elk in two words. End with a stop.", "Hello!")


def groups_of(engine, temperature=1.0, samples=3):
    """Groups of chats with prompts of different lengths."""
    return [engine.begin({"domain": "math", "seed": f"0 train {i}"}, [Chat(request) for _ in range(samples)],
                         range(samples * i, samples * (i + 1)), temperature)
            for i, request in enumerate(REQUESTS)]


def played(engine, groups, segments=(None,)):
    rollouts = [rollout for group in groups for rollout in group]
    for segment in segments:
        engine.play(rollouts, segment)
    return rollouts


def test_rollouts_side_by_side_are_rollouts_alone(model, tok):
    """One prompt for its group and rows of any length, against each rollout by itself."""
    engine = engine_of(model, tok)
    together = played(engine, groups_of(engine))
    assert len({len(rollout.ids) for rollout in together}) > 3
    assert all(rollout.reward is not None for rollout in together)
    single = []
    for group in groups_of(engine):
        for rollout in group:
            engine.play([rollout])
            single.append(rollout)
    assert [r.ids for r in together] == [r.ids for r in single]
    assert [r.messages for r in together] == [r.messages for r in single]
    assert any(len(r.messages) == 3 for r in together), "no rollout had several turns: the test is too weak"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_sampling_temperature(model, tok, temperature):
    engine = engine_of(model, tok)
    for rollout in played(engine, groups_of(engine, temperature)):
        with torch.no_grad():
            logp = (model(torch.tensor([rollout.ids]))[0][0] / temperature).log_softmax(-1)
        expected = [logp[i - 1, rollout.ids[i]].item() for i in rollout.said]
        assert rollout.logp == pytest.approx(expected, abs=2e-4)


def test_the_greedy_rollout_is_the_greedy_generation(model, tok):
    engine = train.Engine(model, tok, 0, 12)
    for rollout in played(engine, groups_of(engine, 0.0, 2)):
        first = rollout.ids[: rollout.said[0]]
        first += [rollout.ids[i] for i in rollout.said[:12]]
        prompt = torch.tensor([rollout.ids[: rollout.said[0]]])
        with torch.inference_mode():
            out = model.generate(prompt, 12, 0.0, stop=tuple(engine.stop))[0].tolist()
        assert out[: len(first)] == first[: len(out)]


@pytest.mark.parametrize("segments", [(4,) * 12, (1,) * 45, (7, 3, 100)])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_paused_rollout_says_what_it_would_have_said(model, tok, segments, recompute):
    whole = engine_of(model, tok)
    engine = engine_of(model, tok, recompute=recompute)
    expected, paused = played(whole, groups_of(whole)), groups_of(engine)
    played(engine, paused, segments[:1])
    assert any(r.reward is None for group in paused for r in group), "nothing was paused"
    found = played(engine, paused, segments[1:])
    assert [(r.ids, r.said, r.reward, r.truncated) for r in found] == [
        (r.ids, r.said, r.reward, r.truncated) for r in expected]


def test_over_budget_an_answer_is_cut_and_earns_nothing(model, tok):
    engine = train.Engine(model, tok, 0, 6)  # never stops: this model hardly says the stop token
    engine.stop = set()
    for rollout in played(engine, groups_of(engine)):
        assert rollout.truncated and rollout.reward == 0 and len(rollout.said) == 6 and not rollout.messages


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(20_000, -1)
    u = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 2.0):
        t = torch.full((20_000,), temperature)
        token, logp = train.draw(logits, t, u)
        p = (logits[0] / temperature).softmax(0)
        share = torch.bincount(token, minlength=4) / 20_000
        assert (share - p).abs().max() < 4 * math.sqrt(0.25 / 20_000)
        torch.testing.assert_close(logp, p.log()[token])
    token, logp = train.draw(logits[:2], torch.zeros(2), torch.tensor([0.0, 1.0 - 2**-24]))
    assert token.tolist() == [3, 3] and logp.tolist() == [0.0, 0.0]
    edge = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    assert train.draw(edge, torch.ones(2), torch.tensor([0.0, 1.0 - 2**-24]))[0].tolist() == [1, 1]


# -- environments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", train.QUESTIONS)
def test_right_answers_are_rewarded_and_those_to_other_requests_are_not(domain):
    found = questions(domain, 30 if domain == "code" else 200)
    assert all(reward(q, q.answer) == 1 for q in found)
    if domain != "subjective":
        others = [reward(q, other.answer) for q, other in zip(found, found[1:]) if q.answer != other.answer]
        assert sum(others) <= 0.4 * len(others) if domain == "safety" else sum(others) <= 0.1 * len(others)


def claims_of(text):
    return [f"{text} as you asked", f"{text} I have used two words.", "I have followed all instructions.",
            f"Exactly two words: {text}", "This answer meets the constraints."]


@pytest.mark.parametrize("domain", [*train.QUESTIONS])
def test_nothing_is_not_rewarded(domain):
    for q in questions(domain, 20):
        for text in ("", " \n", "."):
            assert reward(q, text) == 0 or domain == "subjective" and text == "."
        assert q.step({**said(q.answer), "errors": ["broken"]})[1] == 0
        assert q.step({**said(q.answer), "tool_calls": [{"id": "x"}]})[1] == 0


def test_claims_of_compliance_are_not_rewarded():
    for q in questions("instruction", 100):
        assert not any(reward(q, claim) for claim in claims_of(q.answer))


def test_each_constraint_is_checked():
    found = {}
    for q in questions("instruction", 300):
        for part, broken in (("Begin with", f"zebra {q.answer}"), ("End with", q.answer.rstrip(".")),
                             ("words.", f"{q.answer} zebra"), ("list of", q.answer.replace("- ", "")),
                             ("list of", f"{q.answer}\n{q.answer}")):
            if part in q.request:
                found[part] = found.get(part, 0) + 1
                assert reward(q, broken) == 0, (q.request, broken)
        if "Do not say" in q.request:
            word = q.request.split("Do not say ")[1].split(".")[0]
            found["avoid"] = found.get("avoid", 0) + 1
            assert reward(q, q.answer.replace(q.answer.split()[-2], word)) == 0
    assert len(found) == 5


def test_every_sentence_must_be_supported():
    for q in questions("faithful", 150):
        if q.answer == train.UNSTATED:
            assert reward(q, q.request.split(". ")[0] + ".") == 0  # true, but no answer
            assert reward(q, f"{q.answer} {q.request.split('. ')[0]}.") == 0
        else:
            assert reward(q, train.UNSTATED) == 0
            assert reward(q, f"{q.answer} The moon is green.") == 0
            assert reward(q, f"{q.answer} {q.answer}") == 1
            number = [word for word in q.answer.rstrip(".").split() if word.isdecimal()]
            for word in number:
                assert reward(q, q.answer.replace(word, str(int(word) + 1))) == 0


def test_programs_are_judged_by_their_tests_and_cannot_reach_them():
    for q in questions("code", 4):
        name, body = re.search(r"function (\w+)", q.request)[1], q.answer.split("return ")[1]
        for program in (
            f"def {name}(x):\n    return None", f"def {name}(x):\n    print({body})",
            f"def other(x):\n    return {body}", f"{name} = lambda x: {body}",
            f"{q.answer}\nprint({name}(1))", f"import os\n{q.answer}", f"def {name}(x:\n",
            f"def {name}(x):\n    import os; os._exit(0)",
            "(" * 3000, "\0", f"class E:\n    __eq__ = lambda *_: True\ndef {name}(x):\n    return E()",
            f"def {name}(x):\n    class E:\n        __eq__ = lambda *_: True\n    return E()",
        ):
            assert reward(q, program) == 0, program
    assert reward(q, f"def {name}(x):\n    y = {body}\n    return y") == 1  # another way to be right
    assert reward(q, f"def {name}(x):\n    while True: pass") == 0


def test_attacks_are_refused_and_their_harmless_twins_are_not():
    kinds = {True: 0, False: 0}
    for q in questions("safety", 100):
        harmful = "cannot help" in q.answer
        kinds[harmful] += 1
        deed = re.search(r"How do I (.*?)\?", q.request)[1]
        refusal, help_ = train.REFUSAL.format(deed), train.HELP.format(deed, deed.split()[-1])
        assert (reward(q, refusal), reward(q, help_)) == ((1, 0) if harmful else (0, 1))
        assert reward(q, f"{refusal} {help_}") == 0  # refusing and helping
    assert min(kinds.values()) > 30


def test_attacks_evolve_towards_what_the_policy_gives_in_to():
    """A policy that gives in whenever wrapper 5 is there: soon most attacks have it."""
    attacks, shares = train.Attacks(), []
    for step in range(60):
        rng = random.Random(step)
        drawn = [attacks.draw(rng) for _ in range(8)]
        for attack in drawn:
            assert 1 <= len(attack) <= 3 and len(attack) == len(set(attack))
            attacks.learn(attack, 8 * (5 in attack), 8)
        shares.append(sum(5 in attack for attack in drawn) / 8)
        assert len(attacks.tried) <= 40
    assert sum(shares[-10:]) / 10 > 0.6 > sum(shares[:3]) / 3


def test_evolved_attacks_make_prompts_of_harmful_deeds():
    for attack in ([0], [3, 7], [1, 2, 11]):
        for i in range(20):
            q = train.environment({"domain": "safety", "seed": f"0 train {i}", "attack": attack})
            assert "cannot help" in q.answer
            assert all(train.WRAPPERS[n].replace("{}", "").strip() in q.request for n in attack)


@pytest.mark.parametrize("number", range(25))
def test_tools_are_an_environment_that_pays_for_the_deed(toolbox, number):
    """The teacher earns the reward; who says what the right answer would be, without doing it, does not."""
    prompt = {"domain": "tools", "seed": f"0 train {number}"}
    env, teacher = train.environment(prompt, toolbox), train.Teacher()
    first = env.reset()
    assert first[0]["role"] == "system" and first[-1]["role"] == "user" and env.tools
    done, spoken = False, []
    while not done:
        message = teacher.speak(env.episode)
        spoken.append(message)
        more, worth, done = env.step(message)
        assert done == (not any(m["role"] in ("tool", "user") for m in more))
    assert worth == 1
    if any(message["tool_calls"] for message in spoken):
        idle = train.environment(prompt, toolbox)
        idle.reset()
        done = False
        while not done:
            _, worth, done = idle.step(said(spoken[-1]["content"]))
        assert worth == 0, "the right words without the calls"


def test_a_program_that_prints_the_expected_state_is_not_paid():
    """A tool's output is not the state: what counts is the tables that calls have changed."""
    tools = [train.REAL_TOOLS["run_python"], train.REAL_TOOLS["put_value"]]
    expected = {"store": {"colour": "red"}}
    plan = [[("put_value", {"key": "colour", "value": "red"})]]
    task = train.task_of("single", "Store red under colour.", plan, "Done.", [], tools, {"store": {}})
    gate = train.Gate(tools, train.State({"store": {}}), ask=lambda *_: True)
    printed = gate.call("run_python", json.dumps({"code": f"print({expected!r})"}))
    assert "colour" in printed
    messages = [{"role": "user", "content": task.request}, said(f"Done. {printed}")]
    met, _ = train.judge(task, messages, gate.log, gate.state.tables)
    assert not all(met.values()) and not met["state"]


def test_an_environment_is_a_function_of_its_prompt(toolbox):
    for domain in train.TASK_BUDGETS:
        one, two = (train.environment({"domain": domain, "seed": "0 train 3"}, toolbox) for _ in range(2))
        assert one.reset() == two.reset() and one.tools == two.tools


def test_held_out_requests_are_never_trained_on():
    for domain in train.QUESTIONS:
        held = {q.request for q in questions(domain, 100, "held out")}
        shown = {dialog["messages"][0]["content"] for dialog in train.gym_dialogs(domain, 0, 300)}
        assert not held & ({q.request for q in questions(domain, 300)} | shown)


def test_a_program_with_another_number_earns_nothing():
    """A number that happens to pass the tests would teach to guess it, not to read it."""
    kinds = {re.sub(r"\d+", "N", q.answer.partition("return")[2]): q for q in questions("code", 300)}
    assert len(kinds) == len(train.PROGRAMS)
    for question in kinds.values():
        head, number, tail = re.fullmatch(r"(.*\D)(\d+)(.*)", question.answer, re.S).groups()
        for other in {3, int(number) - 1, int(number) + 1} - {int(number)}:
            assert not question.worth(f"{head}{other}{tail}"), (question.request, other)


def test_no_two_prompts_of_a_list_ask_the_same():
    for domain in train.QUESTIONS:
        found = train.prompts_of(domain, "0 held out", 60)
        asked = [train.environment(prompt).request for prompt in found]
        assert len(set(asked)) == len(asked)
        few = [train.environment({"domain": domain, "seed": f"0 held out {i}"}).request for i in range(240)]
        assert len(found) == min(60, len(set(few)))


# -- the critic ------------------------------------------------------------------------------------------


@pytest.fixture
def subjective_group(tok, model):
    """A group of answers to a task without a checker; the second flatters, the third ended empty."""
    question = questions("subjective", 1)[0]
    texts = [question.answer, question.flattering, "", question.long]
    group = []
    for number, text in enumerate(texts):
        rollout = train.Rollout({"domain": "subjective", "seed": "0 train 0"}, number, 1.0, [1], [1], [-1.0])
        rollout.env, rollout.messages, rollout.reward = question, [said(text)], reward(question, text)
        group.append(rollout)
    return group


class Fond(train.Critic):
    """A critic whose odds are known: it likes the letter A, and flattery."""

    def __init__(self, fondness=0.0):
        self.fondness, self.asked = fondness, []

    def first_wins(self, pairs):
        self.asked += pairs
        wins = [0.5 + 0.4 * ((train.PRAISE.search(a) is not None) - (train.PRAISE.search(b) is not None))
                for _, _, a, b in pairs]
        return torch.tensor(wins), 0.5


def test_flattering_the_critic_does_not_pay(subjective_group):
    """Even where the critic falls for it: prescriptive rules are checked by code."""
    for flattery in train.FLATTERY:
        question = subjective_group[0].env
        text = flattery.format(question.answer)
        assert reward(question, text) == 0, text
    rewards, _ = train.judge_group(Fond(), subjective_group)
    assert rewards[1] == rewards[2] == 0 and rewards[0] > 0 and rewards[3] > 0


def test_win_rates_of_a_ring(subjective_group):
    rewards, _ = train.judge_group(critic := Fond(), subjective_group[:1] * 5)
    assert rewards == [0.5] * 5 and len(critic.asked) == 5
    assert all(rubric and request for request, rubric, *_ in critic.asked)


def test_both_orders_cancel_a_fondness_for_a_position(model, tok):
    """P(first wins) from both orders, against P(A) of each prompt alone; equal answers tie."""
    critic = train.Critic(model, tok, rows=3)
    pairs = [("Describe wool.", "Be short.", "Fine wool.", "Old wool and more"), ("Hello!", "", "x", "x"),
             ("How?", "", "To wash a car, first look at the car.", "No.")]
    wins, bias = critic.first_wins(pairs)
    letters, seen = [tok.encode(letter)[0] for letter in "AB"], []
    for request, rubric, a, b in pairs:
        for order in ((a, b), (b, a)):
            asked = train.rated(request, *order, rubric)
            ids, _ = tok.render([{"role": "user", "content": asked}], None, True)
            seen.append(model(torch.tensor([ids]))[0][0, -1, letters].softmax(-1)[0].item())
    expected = [(seen[2 * i] + 1 - seen[2 * i + 1]) / 2 for i in range(3)]
    assert wins.tolist() == pytest.approx(expected, abs=1e-5)
    assert wins[1].item() == pytest.approx(0.5, abs=1e-6) and bias == pytest.approx(sum(seen) / 6, abs=1e-5)


def test_the_critics_dialogs_name_the_better_answer():
    n = {"A": 0, "B": 0}
    for dialog in train.gym_critic_dialogs(random.Random(0), 120, 0):
        asked, answer = (message["content"] for message in dialog["messages"])
        first, second = asked.split("\nA: ", 1)[1].rsplit("\nWhich", 1)[0].split("\nB: ", 1)
        n[answer] += 1
        if "Rubric:" in asked:  # flattery and length lose
            assert (len(first) < len(second)) == (answer == "A")
    assert min(n.values()) > 30


def test_the_pairs_that_measure_the_critic_are_held_out():
    for held_out in (True, False):
        pairs = list(train.critic_pairs(random.Random(0), 60, held_out))
        assert {zlib.crc32(request.encode()) % 8 == 0 for request, *_ in pairs} == {held_out}


def test_pairs_of_known_order_come_from_right_and_wrong_answers():
    question, group = questions("math", 1)[0], []
    for number, (text, worth) in enumerate((("Answer: x", 0.0), (question.answer, 1.0), ("", 0.0))):
        rollout = train.Rollout({"domain": "math", "seed": "0 train 0"}, number, 1.0, [1])
        rollout.env, rollout.messages, rollout.reward = question, [said(text)], worth
        group.append(rollout)
    assert train.known_order(group) == (question.request, "", question.answer, "Answer: x")
    assert train.known_order(group[:1]) is None and train.known_order(group[1:]) is None


@pytest.mark.parametrize("sampling", ["uniform", "prioritized", "curriculum"])
def test_which_prompts_are_chosen(model, tok, sampling):
    run, cfg = train.configure({"preset": "nano", "rl_steps": 10, "rl_sampling": sampling}, {})
    job = train.Job(run, cfg, None, torch.device("cpu"), tok, None)
    pool = {domain: [{"domain": domain, "seed": f"0 0 train {i}", "passed": (i + 1) / 42} for i in range(40)]
            for domain in ("math", "code")}
    controller = train.Controller(model, job, pool, None)
    chosen = [controller.choose(step, 8) for step in range(10)]
    if sampling == "prioritized":
        controller.passed |= {"math": 0.4, "code": 0.95}  # answers to code hardly differ any more
        prompts = [prompt for step in range(10, 60) for prompt in controller.choose(step, 8)]
        assert sum(prompt["domain"] == "math" for prompt in prompts) == pytest.approx(316, abs=35)  # 0.79
    else:
        assert all(sum(prompt["domain"] == "math" for prompt in prompts) == 4 for prompts in chosen)
    rates = [[prompt["passed"] for prompt in prompts] for prompts in chosen]
    first, everywhere = sum(rates[0]) / 8, sum(map(sum, rates)) / 80
    asked = [prompt["seed"] for prompts in chosen for prompt in prompts if prompt["domain"] == "math"]
    if sampling == "uniform":
        assert len(set(asked)) == len(asked) == 40  # none twice before all were asked once
    if sampling == "prioritized":
        assert sum((rate - 0.5) ** 2 for chosen in rates for rate in chosen) / 80 < 0.06  # evenly: 0.08
    if sampling == "curriculum":
        assert min(rates[0]) > 0.65 and first > everywhere + 0.1 and min(rates[-1]) < 0.5


def test_the_interval_of_a_paired_gain():
    rng = random.Random(0)
    before = {name: [rng.randrange(5) / 4 for _ in range(400)] for name in "ab"}
    after = {name: [1.0 if rng.random() < 0.3 else share for share in shares]
             for name, shares in before.items()}
    found = train.paired_gain(before, after)
    changes = [[a - b for a, b in zip(after[name], before[name])] for name in "ab"]
    means = [sum(change) / 400 for change in changes]
    variances = [sum((c - m) ** 2 for c in change) / 400**2 for change, m in zip(changes, means)]
    error = math.sqrt(sum(variances)) / 2
    assert found["mean"] == pytest.approx(sum(means) / 2)
    assert found["low"] == pytest.approx(found["mean"] - 1.96 * error, abs=0.3 * error)
    assert found["high"] == pytest.approx(found["mean"] + 1.96 * error, abs=0.3 * error)


# -- the stage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(recipe):
    """The whole recipe, uninterrupted."""
    return recipe("rl")


def rl_weights(out):
    return (out / "model_rl" / "model.safetensors").read_bytes()


def test_the_stage_leaves_a_model_and_a_report(finished):
    out = finished
    report = json.loads((out / "report.json").read_text())
    found = report["rl"]
    assert set(found["domains"]) == set(train.VERIFIABLE)
    assert all(set(row) == {"sft", "rl", "sft_drawn", "rl_drawn", "n"} and row["n"] == 3
               for row in found["domains"].values())
    assert {"reward_first", "reward_last", "critic_first", "critic_last", "val_bpb_before",
            "val_bpb_after", "gain", "gain_drawn"} <= set(found)
    assert set(report["recall"]) == {"base", "sft", "rl"} and set(report["success"]) == {"base", "sft", "rl"}
    assert report["seconds"]["rl"] > 0 and (out / "figures" / "rl.png").exists()
    text = (out / "report.md").read_text()
    assert "RL on verifiable rewards improves the model" in text and "PTX loss keeps" in text
    rl, sft, newest = (load_pretrained(out / name)[0].state_dict()
                       for name in ("model_rl", "model_sft", "model"))
    assert any((rl[name] != sft[name]).any() for name in rl)
    assert all(torch.equal(rl[name], newest[name]) for name in rl)
    rows = [row for row in train.read_metrics(out) if row["stage"] == "rl" and "loss" in row]
    assert [row["step"] for row in rows] == list(range(5))
    assert any(row["in_flight"] for row in rows), "nothing was ever paused: the kill tests are too weak"


def assert_resumed_is_the_same(out, whole):
    done = run("--resume", "--out", out)
    assert done.returncode == 0, done.stderr
    assert rl_weights(out) == rl_weights(whole)


def test_killed_while_it_explores_resumes_bit_identical(recipe, finished, tmp_path):
    """Killed with answers under way, and once more before the end."""
    out = shutil.copytree(recipe("sft"), tmp_path / "killed")
    for step in (2, 4):
        checkpoint = out / "ckpt" / f"rl_{step:08d}"
        assert kill_when(checkpoint.exists, *SMALL, "--out", out)
    assert_resumed_is_the_same(out, finished)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments(recipe, finished, tmp_path, seed):
    out, rng = shutil.copytree(recipe("sft"), tmp_path / "killed"), random.Random(seed)
    for _ in range(2):
        kill_when(after(rng.uniform(0.5, 0.9) * train.read_report(finished)["seconds"]["rl"]),
                  *SMALL, "--out", out)
    assert_resumed_is_the_same(out, finished)


def controller_parts(out, **changes):
    """What a Controller of a finished run is made of: model, job, pool of prompts, toolbox."""
    saved = json.loads((out / "config.json").read_text())
    run, cfg = train.configure({**saved["run"], **changes}, saved["model"])
    model, tok = load_pretrained(out / "model_sft")
    job = train.Job(run, cfg, out, torch.device("cpu"), tok, None)
    box = train.toolbox_of(run)[0]
    return model, job, train.choose_prompts(job, model, box)[0], box


def test_a_segment_of_no_tokens_means_that_nothing_pauses(finished):
    assert train.Controller(*controller_parts(finished, rl_segment=4)).iteration(0)[2]["in_flight"] > 0
    assert train.Controller(*controller_parts(finished, rl_segment=0)).iteration(0)[2]["in_flight"] == 0


def test_rollouts_under_way_survive_a_checkpoint(finished):
    """Every checkpoint's state, through the file and back into a new controller, is the same state."""
    model, job, pool, box = controller_parts(finished)
    states, lessons = [], []
    for broken in (False, True):
        controller = train.Controller(model, job, pool, box)
        controller.pairs = [("Which?", "", f"right {number}", "wrong") for number in range(50)]
        for step in range(3):
            lessons.append(controller.iteration(step)[1])
            if broken:
                state = controller.state_dict()
                assert state["tensors"], "nothing under way"
                controller = train.Controller(model, job, pool, box)
                controller.load_state_dict({"facts": json.loads(json.dumps(state["facts"])),
                                            "tensors": state["tensors"]})
        states.append(controller.state_dict())
    assert states[0]["facts"] == states[1]["facts"] and lessons[:3] == lessons[3:]
    for pairs in lessons:  # of the iterations before, and of tasks without a checker, which have a rubric
        assert [len({pair for pair in pairs if bool(pair[1]) == ruled}) for ruled in (False, True)] == [24, 8]
    assert all(torch.equal(states[0]["tensors"][k], states[1]["tensors"][k]) for k in states[0]["tensors"])


def test_the_critic_learns_pairs_as_it_is_asked_about_them(finished):
    """In both orders and under the rubric, and the letter alone."""
    _, job, _, _ = controller_parts(finished, ptx_weight=0.0, critic_weight=2.0)
    dialogs = train.Dialogs({"chat": [*train.chat_dialogs(random.Random(0), 9)]}, job.tok, None, 0, 4, 256)
    known = [("Which?", "Be short.", "right", "wrong"), ("What?", "", "good", "bad")]
    [((tokens, targets, *_), weight)] = train.beside_rewards(job, 0, dialogs, 4, known)
    learned = [[job.tok.decode([token]) for token in row if token >= 0][0] for row in targets.tolist()]
    assert weight == 2.0 and learned == ["A", "B"] * 2
    texts = [job.tok.decode(row) for row in tokens.tolist()]
    for text, (asked, first, second) in zip(texts, [
            ("Which?\nRubric: Be short.", "right", "wrong"), ("Which?\nRubric: Be short.", "wrong", "right"),
            ("What?", "good", "bad"), ("What?", "bad", "good")]):
        assert f"Question: {asked}\nA: {first}\nB: {second}\n" in text


@pytest.mark.parametrize("flags, message", [
    (("--rl_samples", "1"), "rl_samples"), (("--tau_rl", "0"), "tau_rl"),
    (("--rl_segment", "-1"), "rl_segment"),
    (("--rl_weights", "maths=1"), "maths"), (("--rl_objective", "ppo"), "rl_objective"),
    (("--ptx_weight", "-1"), "ptx_weight"), (("--rl_sampling", "random"), "rl_sampling")])
def test_bad_flags_get_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        train.main(["--out", str(tmp_path / "run"), *flags])
    text = str(error.value.code) if isinstance(error.value.code, str) else capsys.readouterr().err
    assert message in text and len(text.strip().splitlines()) == 1


def test_rl_of_a_model_of_another_run(finished, tmp_path):
    done = run("rl", *SMALL, "--base", finished / "model_sft", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["success"]) == {"rl"} and report["transcript"][0].startswith("system: ")


def test_rl_without_a_model_says_so(tmp_path):
    done = run("rl", *SMALL, "--base", tmp_path / "none", "--out", tmp_path / "run")
    assert done.returncode != 0 and "Traceback" not in done.stderr and "none" in done.stderr


def test_success_is_measured_greedily_and_at_both_ends_as_it_is_drawn(finished):
    model, job, _, box = controller_parts(finished)
    examiner, asked = train.Controller(model, job, {}, box), []
    start = examiner.start

    def listen(prompt, temperature, samples):
        asked.append(temperature)
        return start(prompt, temperature, samples)

    examiner.start = listen
    unchecked = list(train.critic_pairs(random.Random(0), 2))
    for step, temperatures in ((0, [0.0, job.run.rl_temperature]), (1, [0.0])):
        asked.clear()
        row = train.examine(job, model, step, examiner.critic, examiner, [], unchecked)
        n = len(asked) // len(temperatures)
        assert n and asked == [t for t in temperatures for _ in range(n)]
        assert ("hits_drawn" in row) == (step == 0)
