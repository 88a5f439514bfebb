"""Talk to a model: complete a text, chat, or measure tokens per second.

    python sample.py runs/toy "The with statement"       complete (a run's folder, its newest model)
    python sample.py path/to/kimi --chat                 chat with any folder in Hugging Face layout
    python sample.py runs/toy --bench                    tokens per second, prompt and continuation

A prompt of - reads standard input. In a chat, /new forgets what was said and /quit leaves.
"""

import argparse
import codecs
import statistics
import sys
import time
from pathlib import Path

import torch

from kimi_k2 import LatentCache, count_parameters, load_pretrained
from train import OneLineParser, UserError, pick_device


def open_model(folder, device):
    """(model, tokenizer) of a run's folder (its model/) or of a folder in Hugging Face layout."""
    folder = Path(folder)
    if (folder / "metrics.jsonl").exists() and not (folder / "model").is_dir():
        raise UserError(
            f"{folder} is a run without a finished model yet: python train.py --resume --out {folder}"
        )
    model, tok = load_pretrained(
        folder / "model" if (folder / "model").is_dir() else folder, device
    )
    if tok is None:
        raise UserError(f"{folder} has no tiktoken.model, so text cannot be turned into tokens")
    return model, tok


def stream_text(model, tok, ids, cache, stop, args, generator):
    """Yield the continuation of ids piece by piece, never half a character; returns the new ids.

    The cache may hold the beginning of ids already: only the rest is read.
    """
    new, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
    rest = torch.tensor([ids[cache.length :]], device=model.lm_head.weight.device)
    tokens = model.stream(rest, cache, args.temperature, args.top_p, generator)
    for _, token in zip(range(args.max_new_tokens), tokens):
        new.append(token.item())
        if new[-1] in stop:
            break
        yield decoder.decode(tok.decode_bytes(new[-1:]))
    yield decoder.decode(b"", final=True)
    return new


def write_out(pieces):
    """Print pieces as they come; returns what the generator returned."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print(flush=True)
            return end.value


def complete(model, tok, args, generator):
    """Continue the prompt until [EOS] or max_new_tokens."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt or ""
    ids = [tok.special["[BOS]"], *tok.encode(prompt)]
    print(prompt, end="")
    cache = LatentCache(
        model.cfg, 1, device=model.lm_head.weight.device, dtype=model.lm_head.weight.dtype
    )
    write_out(stream_text(model, tok, ids, cache, {tok.special["[EOS]"]}, args, generator))


def chat(model, tok, args, generator):
    """Turns of user and assistant in K2's template. What two turns share stays in the cache."""

    def fresh():
        return LatentCache(
            model.cfg, 1, device=model.lm_head.weight.device, dtype=model.lm_head.weight.dtype
        )

    stop = {tok.special["<|im_end|>"], tok.special["[EOS]"]}
    messages, seen, cache = [], [], fresh()
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
            messages, seen, cache = [], [], fresh()
            continue
        messages.append({"role": "user", "content": said})
        ids, _ = tok.render(messages, add_generation_prompt=True)
        if len(ids) + args.max_new_tokens > model.cfg.max_position_embeddings:
            print(
                f"note: beyond the {model.cfg.max_position_embeddings} tokens this model knows; /new forgets"
            )
        shared = next(
            (i for i, (a, b) in enumerate(zip(seen, ids)) if a != b), min(len(seen), len(ids) - 1)
        )
        cache.length = min(shared, cache.length)
        print("kimi > ", end="")
        new = write_out(stream_text(model, tok, ids, cache, stop, args, generator))
        seen = ids + new
        answer = tok.parse(new)
        for error in answer.pop("errors", []):
            print(f"note: {error}")
        messages.append(answer)


def bench(model, tok, args, generator):
    """Tokens per second of the prompt and of the continuation, medians of five rounds."""
    device, n_new = model.lm_head.weight.device, args.max_new_tokens
    print(
        f"{count_parameters(model.cfg).total:,} parameters on {device}, prompt 32, {n_new} new tokens"
    )
    for batch in (1, 16):
        prompt = torch.randint(len(tok.ranks), (batch, 32), device=device)
        rounds = []
        for _ in range(6):
            cache = LatentCache(model.cfg, batch, 32 + n_new, device, model.lm_head.weight.dtype)
            tokens, times = model.stream(prompt, cache, 0.0), []
            for _, token in zip(range(n_new), tokens):
                token[0].item()  # waits for the device
                times.append(time.perf_counter())
                if len(times) == 1:
                    rounds.append([times[0]])
            rounds[-1].append(times[-1])
            rounds[-1].append(len(times) - 1)
        decode = statistics.median(batch * n / (end - first) for first, end, n in rounds[1:])
        print(f"batch {batch:3d}: {decode:,.0f} new tokens/s")


def main(argv=None):
    parser = OneLineParser("sample.py", description=__doc__, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a run's folder, or a model in Hugging Face layout")
    parser.add_argument(
        "prompt", nargs="?", help="text to continue, or the first thing to say; - reads stdin"
    )
    parser.add_argument("--chat", action="store_true", help="talk in turns")
    parser.add_argument("--bench", action="store_true", help="measure tokens per second")
    parser.add_argument(
        "--max_new_tokens", type=int, default=128, help="longest answer (default 128)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.6, help="0: always the likeliest (default 0.6)"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="smallest set of tokens to draw from (default 1)"
    )
    parser.add_argument("--seed", type=int, default=None, help="repeat a draw exactly")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to run"
    )
    args = parser.parse_args(argv)
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        parser.error("temperature must not be negative, top_p in (0, 1], max_new_tokens at least 1")
    try:
        device = pick_device(args.device)
        model, tok = open_model(args.folder, device)
        generator = torch.Generator(device)
        generator.manual_seed(args.seed) if args.seed is not None else generator.seed()
        task = bench if args.bench else chat if args.chat else complete
        task(model, tok, args, generator)
    except (UserError, ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
