"""Talk to a model: complete a text, chat with tools that run, or measure tokens per second.

    python sample.py runs/toy "The with statement"       complete (a run's folder, its newest model)
    python sample.py path/to/kimi --chat                 chat with any folder in Hugging Face layout
    python sample.py runs/toy --chat --constrained       ... whose calls always follow the tools' schemas
    python sample.py runs/toy --chat --tools files,notes --ask all --allow read_file --folder scratch
    python sample.py runs/toy --bench                    tokens per second of a continuation

A prompt of - reads standard input. In a chat, /tools lists the tools, /new forgets what was said, /quit
leaves, and Ctrl-C stops an answer. Every call passes train.py's Gate: it has to be declared, well-formed,
permitted (each tool says allow, ask or deny; flags go before that) and within the turn's budget.
"""

import argparse
import codecs
import functools
import json
import math
import random
import re
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from decimal import Decimal
from pathlib import Path

import torch

from kimi_k2 import (
    SPECIAL_NAMES,
    Decoder,
    LatentCache,
    count_parameters,
    load_pretrained,
    nearest,
    sample_token,
)
from train import (
    REAL_TOOLS,
    Gate,
    OneLineParser,
    State,
    UserError,
    evolved_tool,
    first_line,
    goes_on,
    misfit,
    pick_device,
    some_items,
    training_world,
    turn,
)


def open_model(folder, device):
    """(model, tokenizer) of a run's folder (its model/) or of a folder in Hugging Face layout."""
    folder = Path(folder)
    newest = folder / "model"
    if (folder / "metrics.jsonl").exists() and not newest.is_dir():
        raise UserError(f"{folder} is a run without a finished model yet: "
                        f"python train.py --resume --out {folder}")
    model, tok = load_pretrained(newest if newest.is_dir() else folder, device)
    if tok is None:
        raise UserError(f"{folder} has no tiktoken.model, so text cannot be turned into tokens")
    return model, tok


def compile_decoding(model, n_tokens):
    """From now on tokens are decoded by compiled code, if that works here."""
    print("note: compiling, which takes a minute or so", file=sys.stderr)
    model.compile_decode = True
    try:
        model.generate([[0]], n_tokens)
    except Exception as error:  # no compiler, an operator it does not know: many kinds
        model.compile_decode = False
        print(f"note: torch.compile failed ({first_line(error)}), going on without")


def new_cache(model):
    """An empty cache for one dialog."""
    weight = model.lm_head.weight
    return LatentCache(model.cfg, 1, device=weight.device, dtype=weight.dtype)


def sampler(args, generator):
    """The unconstrained choose(logits (1, V)) -> id."""
    return lambda logits: sample_token(logits, args.temperature, args.top_p, generator).item()


@torch.inference_mode()
def stream(model, ids, cache, choose, room):
    """Yield at most `room` tokens that continue ids, each picked by choose(logits (1, V)).

    The cache may hold the beginning of ids already: only the rest is read.
    """
    device = model.lm_head.weight.device
    if model.compile_decode:  # one size of cache, one compilation
        cache.reserve(len(ids) + room)
    logits = model.lm_head(model.hidden(torch.tensor([ids[cache.length :]], device=device), cache)[:, -1])
    decoder = Decoder(model)
    for _ in range(room):
        token = choose(logits)
        yield token
        logits = decoder.step(torch.tensor([token], device=device), cache)


def text_of(tokens, tok, stop, hide=None):
    """The text of tokens piece by piece, never half a character, up to a token of `stop`; what comes
    after `hide` is read but not shown."""
    decoder, shown = codecs.getincrementaldecoder("utf-8")("replace"), True
    for token in tokens:
        if token in stop:
            break
        shown = shown and token != hide
        if shown:
            yield decoder.decode(tok.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


def complete(model, tok, args, generator):
    """Continue the prompt until [EOS] or max_new_tokens."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt or ""
    ids = [tok.special["[BOS]"], *tok.encode(prompt)]
    print(prompt, end="")
    tokens = stream(model, ids, new_cache(model), sampler(args, generator), args.max_new_tokens)
    for piece in text_of(tokens, tok, {tok.special["[EOS]"]}):
        print(piece, end="", flush=True)
    print()


# --- calls that cannot be malformed: R App. B names such a decoder, the "enforcer", and says no more ---
# A grammar over symbols: the 256 bytes as characters, and above them one for each special token. A token
# is allowed if all its symbols fit, so any BPE will do. What is still to come is a stack of items, the next
# one first. Of an item, eat(symbol) gives the items that replace it after the symbol, or None if that does
# not fit; cost is the fewest symbols that it still takes, 0 if it may end here. Since every single byte is
# a token, there is always one that leads on, and `cost` tokens are enough to finish.

SYMBOL = {name: chr(256 + offset) for offset, name in SPECIAL_NAMES.items()}


def feed(stack, symbols):
    """The stack after these symbols, None if they do not fit."""
    for symbol in symbols:
        new = None
        while stack and new is None:
            item, *below = stack
            new = item.eat(symbol)
            if new is None and item.cost:
                return None
            stack = below
        if new is None:
            return None
        stack = [*new, *stack]
    return stack


def cost(stack):
    """The fewest symbols that a stack still takes."""
    return sum(item.cost for item in stack)


class Words:
    """One of some words, and then(word), the items that follow it."""

    def __init__(self, words, then=lambda word: (), typed=""):
        self.words, self.then, self.typed = sorted(words, key=len), then, typed

    def eat(self, symbol):
        typed = self.typed + symbol
        words = [word for word in self.words if word.startswith(typed)]
        if words == [typed]:
            return self.then(typed)
        return [Words(words, self.then, typed)] if words else None

    @functools.cached_property
    def cost(self):
        best = math.inf
        for word in self.words:
            left = len(word) - len(self.typed)
            if left < best:  # else do not ask what follows: calls may follow calls without end
                best = min(best, left + cost(self.then(word)))
        return best


class Part:
    """A text that grows symbol by symbol; cost_of(text) is what it still takes, inf if it leads nowhere."""

    def __init__(self, cost_of, typed):
        self.cost_of, self.typed, self.cost = cost_of, typed, cost_of(typed)

    def eat(self, symbol):
        new = Part(self.cost_of, self.typed + symbol)
        return [new] if new.cost < math.inf else None


@functools.lru_cache(4096)
def character_cost(typed):
    """What a begun character of a JSON string still takes."""
    if max(typed) > "\xff" or typed < " ":
        return math.inf
    if typed[0] == "\\":  # no \uD...: half of those are no characters, and the rest need no escape
        if re.fullmatch(r"\\u([0-9A-CEFa-cef][0-9A-Fa-f]{0,3})?", typed):
            return 6 - len(typed)
        return 2 - len(typed) if re.fullmatch(r'\\["\\/bfnrt]?', typed) else math.inf
    try:
        return 0 if len(typed.encode("latin-1").decode()) == 1 else math.inf
    except UnicodeDecodeError as error:  # the first byte tells how many there are
        begun = error.start == 0 and error.reason == "unexpected end of data"
        return 2 + (typed >= "\xe0") + (typed >= "\xf0") - len(typed) if begun else math.inf


class Characters:
    """The inside of a JSON string and its closing quote."""

    cost = 1

    def eat(self, symbol):
        if symbol == '"':
            return ()
        begun = Part(character_cost, symbol)
        return [begun, self] if begun.cost < math.inf else None


@functools.lru_cache(100_000)
def number_cost(low, high, places, typed):
    """What a begun number still takes to lie from low to high, both in units of the last of `places`
    decimals: from 50 to 70, "5" takes one more digit, and nothing comes of "8"."""
    if typed in ("", "-"):
        starts = "0123456789" if typed else "-0123456789"
        return min(1 + number_cost(low, high, places, typed + c) for c in starts)
    if not re.fullmatch(r"-?(0|[1-9]\d*)(\.\d*)?" if places else r"-?(0|[1-9]\d*)", typed):
        return math.inf
    if typed[0] == "-":
        typed, low, high = typed[1:], max(-high, 1), -low  # no -0
    whole, dot, part = typed.partition(".")
    low, best = max(low, 0), math.inf
    for more in range(1 if dot or whole == "0" else 1 + len(str(high))):  # digits to come before the dot
        for decimals in range(max(len(part), 1) if dot else 0, places + 1):
            step, spread = 10 ** (places - decimals), 10 ** (more + places - len(part))
            start = int(whole + part) * spread
            if -(-max(low, start) // step) * step <= min(high, start + spread - 1):  # such numbers exist
                best = min(best, more + decimals - len(part) + (decimals > 0 and not dot))
    return best


class Inside:
    """The inside of an object or an array, and its closing bracket. entry(), if any may come, gives the
    items of one more entry and of what follows it; `needed` is the cost of those that have to come."""

    def __init__(self, close, first, needed, entry):
        self.close, self.first, self.needed, self.entry = close, first, needed, entry
        self.cost = needed + 1

    def eat(self, symbol):
        if symbol == self.close and not self.needed:
            return ()
        if not self.entry:
            return None
        if self.first:
            return feed(self.entry(), symbol)
        return [Words(["", " "]), *self.entry()] if symbol == "," else None


def as_json(word):
    """A value's JSON in symbols: one character a byte."""
    return json.dumps(word, ensure_ascii=False).encode().decode("latin-1")


def members(left, required, first=True):
    """The inside of an object: the keys that are left {name: rule}, each at most once, in any order."""
    keys = {as_json(name) + ":": name for name in left}

    def then(key):
        others = {name: rule for name, rule in left.items() if name != keys[key]}
        return [Words(["", " "]), *value(left[keys[key]]), members(others, required, first=False)]

    costs = [1 + len(key) + cost(value(left[name])) for key, name in keys.items() if name in required]
    needed = sum(costs) - (first and bool(costs))  # no comma before the first
    return Inside("}", first, needed, (lambda: [Words(keys, then)]) if left else None)


def elements(rule, first=True):
    """The inside of an array of values that fit a rule."""
    return Inside("]", first, 0, lambda: [*value(rule), elements(rule, first=False)])


def value(rule):
    """The items of a JSON value that fits a schema (train.py's misfit says what of JSON schema counts)."""
    kind = rule.get("type", "string")  # if anything fits, a string does
    if "enum" in rule:
        return [Words([as_json(word) for word in rule["enum"] if not misfit(word, rule)])]
    if kind == "object":
        return [Words(["{"]), members(rule.get("properties", {}), rule.get("required", ()))]
    if kind == "array":
        return [Words(["["]), elements(rule.get("items", {}))]
    if kind in ("integer", "number"):
        places, most = 0 if kind == "integer" else 6, 10**15 - 1  # so that every number comes to an end
        low, high = (Decimal(str(rule.get(*bound))) * 10**places
                     for bound in (("minimum", -most), ("maximum", most)))
        return [Part(functools.partial(number_cost, math.ceil(low), math.floor(high), places), "")]
    words = {"boolean": ["true", "false"], "null": ["null"]}.get(kind)
    return [Words(words)] if words else [Words(['"']), Characters()]


def calls(rules, number, first=True):
    """Calls of the tools {name: schema of the arguments}, counted from number on, and the turn's end."""
    begin, argument, end = (SYMBOL[f"<|tool_call_{part}|>"] for part in ("begin", "argument_begin", "end"))
    heads = {f"{begin}functions.{name}:{number}{argument}": name for name in rules}
    stop = [] if first else [SYMBOL["<|tool_calls_section_end|>"] + SYMBOL["<|im_end|>"]]

    def then(word):
        if word in stop:
            return []
        arguments = value({**rules[heads[word]], "type": "object"})
        return [*arguments, Words([end]), calls(rules, number + 1, first=False)]

    return Words([*heads, *stop], then)


class Speech:
    """An assistant's turn: any bytes, and either its end or calls."""

    cost = 0

    def __init__(self, rules, number):
        self.rules, self.number = rules, number

    def eat(self, symbol):
        if symbol == SYMBOL["<|tool_calls_section_begin|>"]:
            return [calls(self.rules, self.number)]
        if symbol in (SYMBOL["<|im_end|>"], SYMBOL["[EOS]"]):
            return ()
        return [self] if symbol <= "\xff" else None


class Enforcer:
    """A choose(logits) that follows the grammar. A token is allowed if it fits and if the room that is left
    pays for the rest: a call that was begun is finished in time, and none is begun that could not be."""

    def __init__(self, tok, rules, args, generator):
        self.rules, self.temperature, self.top_p = rules, args.temperature, args.top_p
        self.generator = torch.Generator().manual_seed(generator.initial_seed())  # on the CPU, as all below
        self.symbols = [token.decode("latin-1") for token in sorted(tok.ranks, key=tok.ranks.get)]
        self.symbols += [chr(256 + i) for i in range(len(tok.special))]
        self.first = torch.tensor([ord(symbols[0]) for symbols in self.symbols])  # (V,)

    def begin(self, number, room):
        """A new turn of at most `room` tokens, whose calls count from `number` on."""
        self.stack, self.left = [Speech(self.rules, number)], room

    def __call__(self, logits):
        """Logits (1, V) -> id."""
        self.left -= 1
        fits = torch.tensor([feed(self.stack, chr(i)) is not None for i in range(512)])[self.first]  # (V,)
        for token in self.in_order(logits[0].cpu().double().masked_fill(~fits, -math.inf)):
            stack = feed(self.stack, self.symbols[token])
            if stack is not None and cost(stack) <= self.left:
                self.stack = stack
                return token
        raise ValueError("no token can follow, so the model's logits are not finite")

    def in_order(self, keys):
        """Ids in the order in which to try them, so that few are tried.

        Among any tokens, the largest log p + Gumbel noise is a draw from the softmax over just these. So
        the first allowed one in this order is a draw from the softmax over all that are allowed, and nobody
        has to find out which these are. top_p: after the nucleus (of the tokens whose first symbol fits)
        come the others, the likeliest first.
        """
        if self.temperature > 0:
            logp = (keys / self.temperature).log_softmax(dim=-1)
            keys = logp - torch.empty_like(logp).exponential_(generator=self.generator).log()
            if self.top_p < 1:
                p, index = logp.exp().sort(descending=True)
                outside = index[p.cumsum(dim=-1) - p >= self.top_p]
                keys[outside] = logp[outside] - 1e9
        for k in (min(64, len(keys)), len(keys)):
            best, ids = keys.topk(k)
            yield from ids[best > -math.inf].tolist()


# --- chat: the model, the user and the tools take turns (R has nothing on what a tool may do) ---


def visible(text, width=None):
    """One line: what does not print becomes an escape; cut at `width`."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if width is None or len(line) <= width else line[: width - 3] + "..."


class ShownGate(Gate):
    """A Gate that shows every call with its result, and asks the person at the keyboard."""

    def call(self, name, text):
        result = super().call(name, text)
        print(f"tool > {visible(f'{name} {text}', 60)} = {visible(result, 60)}")
        return result

    def asked(self, tool, arguments):
        text = visible(json.dumps(arguments, ensure_ascii=False))  # not cut: who agrees has seen it all
        try:
            answer = input(f"ask  > {tool.name} {text}  [y]es, [n]o, [a]lways? ").strip().lower()
        except EOFError:
            print()
            answer = "no"
        if answer in ("a", "always"):
            self.permissions[tool.name] = "allow"
        return answer in ("y", "yes", "a", "always")


class Chat:
    """A dialog in K2's template. What two prompts share stays in the cache."""

    def __init__(self, model, tok, gate, args, generator):
        self.model, self.tok, self.gate, self.args = model, tok, gate, args
        self.stop = {tok.special["<|im_end|>"], tok.special["[EOS]"]}
        rules = {tool.name: tool.parameters for tool in gate.tools.values()}
        self.choose = (Enforcer(tok, rules, args, generator) if args.constrained
                       else sampler(args, generator))
        self.forget()

    def forget(self):
        """A new chat, in which no "always" was said yet. The tools keep their state."""
        self.messages, self.seen, self.cache = [], [], new_cache(self.model)
        self.gate.permissions = dict(self.args.permissions)

    def tokens(self, ids):
        """What the model says after ids; `seen` follows what the cache holds."""
        if self.args.constrained:
            n_calls = sum(len(message.get("tool_calls") or ()) for message in self.messages)
            self.choose.begin(n_calls, self.args.max_new_tokens)
        same = [a == b for a, b in zip(self.seen, ids[:-1])]
        self.cache.length = min([*same, False].index(False), self.cache.length)
        self.seen = list(ids)
        for token in stream(self.model, ids, self.cache, self.choose, self.args.max_new_tokens):
            self.seen.append(token)
            yield token

    def speak(self):
        """The model's next message, shown while it comes. Ctrl-C ends it; what was said till then stays."""
        ids, _ = self.tok.render(self.messages, self.gate.declarations(), add_generation_prompt=True)
        known, new, stopped = self.model.cfg.max_position_embeddings, [], False
        if len(ids) + self.args.max_new_tokens > known:
            print(f"note: beyond the {known} tokens this model knows; /new forgets")
        hide = self.tok.special["<|tool_calls_section_begin|>"]
        print("kimi > ", end="", flush=True)
        try:
            said = (new.append(token) or token for token in self.tokens(ids))
            for piece in text_of(said, self.tok, self.stop, hide):
                print("".join(c if c in "\n\t" else visible(c) for c in piece), end="", flush=True)
        except KeyboardInterrupt:
            stopped = True
        print(" (stopped)" if stopped else "")
        message = self.tok.parse(new)
        if stopped:
            return {"role": "assistant", "content": message["content"]}
        for error in message.get("errors", []):
            print(f"note: {visible(error, 100)}")
        return message

    def say(self, text):
        """One turn: the user's words, then the model and its tools until it calls none."""
        self.messages.append({"role": "user", "content": text})
        talk = turn(self.messages, self.gate)
        next(talk)
        try:
            while goes_on(talk, self.speak()):
                pass
        except KeyboardInterrupt:
            print("\nnote: the turn was stopped")

    def list_tools(self):
        for tool in self.gate.tools.values():
            print(f"{self.gate.permission(tool):5} {tool.name}: {visible(tool.description)}")
        print(f"tools: {len(self.gate.tools)}, at most {self.gate.budget} calls a turn")


def chat(model, tok, args, generator):
    """Read what the user says until /quit or the end of the input."""
    keep = nullcontext(args.scratch) if args.scratch else tempfile.TemporaryDirectory()
    with keep as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = State(folder=Path(folder).resolve(), world=training_world(args.folder))
        tools = [REAL_TOOLS.get(name) or evolved_tool(name) for name in args.tools]
        for place in filter(None, (tool.place for tool in tools)):
            items = state.table(place.application)
            items.setdefault(place.object, some_items(place, random.Random(place.object)))
            print(f"note: {place.application} has {place.object} {', '.join(items[place.object])}")
        gate = ShownGate(tools, state, args.max_calls)
        gate.ask = gate.asked
        talk = Chat(model, tok, gate, args, generator)
        print("tools:", ", ".join(f"{tool.name} ({gate.permission(tool)})" for tool in tools) or "none")
        while True:
            try:
                said = args.prompt or input("you  > ")
            except (EOFError, KeyboardInterrupt):
                print()
                return
            args.prompt = None
            if said.strip() == "/quit":
                return
            if said.strip() == "/new":
                talk.forget()
                print("note: what was said is forgotten; what the tools keep stays")
            elif said.strip() == "/tools":
                talk.list_tools()
            else:
                talk.say(said)


def settle_tools(args):
    """Turn the words of --tools into names, those of --allow, --ask and --deny into `permissions`: a tool's
    name goes before its domain and that before "all"; between equals the stricter one counts."""
    groups = {name: [name] for name in REAL_TOOLS} | {"all": [*REAL_TOOLS], "none": []}
    for domain in {tool.domain for tool in REAL_TOOLS.values()}:
        groups[domain] = [name for name, tool in REAL_TOOLS.items() if tool.domain == domain]

    def words(flag):
        for word in filter(None, map(str.strip, getattr(args, flag).split(","))):
            if word not in groups and evolved_tool(word):
                groups[word] = [word]
            if word not in groups:
                raise UserError(f"--{flag}: there is no tool or domain {word!r}{nearest(word, groups)}; "
                                "a chat with --tools all lists them by /tools")
            yield word

    args.tools = list(dict.fromkeys(name for word in words("tools") for name in groups[word]))
    rules = sorted((-len(groups[word]), strictness, permission, word)
                   for strictness, permission in enumerate(("allow", "ask", "deny"))
                   for word in words(permission))
    args.permissions = {name: permission for *_, permission, word in rules for name in groups[word]}


def bench(model, tok, args, generator):
    """Tokens per second after the first one, the median of five rounds that follow a first."""
    device, n_new = model.lm_head.weight.device, max(2, args.max_new_tokens)
    print(f"{count_parameters(model.cfg).total:,} parameters on {device}, prompt 32, {n_new} new tokens")
    for batch in (1, 16):
        prompt, rates = torch.randint(len(tok.ranks), (batch, 32), device=device), []
        for _ in range(6):
            cache = LatentCache(model.cfg, batch, 32 + n_new, device, model.lm_head.weight.dtype)
            times = []
            for _, token in zip(range(n_new), model.stream(prompt, cache, 0.0)):
                token[0].item()  # waits for the device
                times.append(time.perf_counter())
            rates.append(batch * (len(times) - 1) / (times[-1] - times[0]))
        print(f"batch {batch:3d}: {statistics.median(rates[1:]):,.0f} new tokens/s")


def build_parser():
    """Flags for one prompt, for a chat and for the benchmark."""
    parser = OneLineParser("sample.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", help="a run's folder, or a model in Hugging Face layout")
    add("prompt", nargs="?", help="text to continue, or the first thing to say; - reads stdin")
    add("--chat", action="store_true", help="talk in turns")
    add("--bench", action="store_true", help="measure tokens per second")
    add("--max_new_tokens", type=int, default=128, help="longest answer (default 128)")
    add("--temperature", type=float, default=0.6, help="0: always the likeliest (default 0.6)")
    add("--top_p", type=float, default=1.0, help="smallest set of tokens to draw from (default 1)")
    add("--seed", type=int, default=None, help="repeat a draw exactly")
    add("--compile", default="off", choices=("on", "off"),
        help="on: faster tokens, after a wait at first and for each new size (default off)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to run")
    chat = parser.add_argument_group("chat")
    add = chat.add_argument
    add("--tools", default="calculator",
        help="names, also of evolved tools, domains, none or all (default calculator)")
    add("--allow", default="", help="tools, domains or all that run without a question")
    add("--ask", default="", help="those that ask before each call")
    add("--deny", default="", help="those that never run")
    add("--max_calls", type=int, default=8, help="calls in one turn (default 8)")
    add("--folder", dest="scratch", help="where file tools work (default: a temporary folder)")
    add("--constrained", action="store_true", help="calls can only follow the tools' schemas")
    return parser


def main(argv=None):
    """The command line: complete, chat or measure."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("temperature must not be negative, top_p in (0, 1], max_new_tokens at least 1")
    if args.max_calls < 1:
        parser.error("max_calls must be at least 1; --tools none is a chat without tools")
    if args.constrained and not args.chat:
        parser.error("--constrained is about tool calls, so it needs --chat")
    try:
        settle_tools(args)
        device = pick_device(args.device)
        model, tok = open_model(args.folder, device)
        generator = torch.Generator(device)
        generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
        if args.compile == "on":
            compile_decoding(model, args.max_new_tokens)
        task = bench if args.bench else chat if args.chat else complete
        task(model, tok, args, generator)
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    for pipe in (sys.stdin, sys.stdout):
        pipe.reconfigure(errors="replace")  # a terminal that cannot show a character shows a ?
    main()
