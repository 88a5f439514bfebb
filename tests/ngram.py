"""The baseline to beat: an interpolated byte 5-gram with modified Kneser-Ney smoothing.

python tests/ngram.py runs/toy     trained on the same bytes as the run, beside the run's report
"""

import json
import sys
from pathlib import Path

import numpy as np


def byte_grams(documents, order):
    """uint64 key of the last `order` bytes at each byte of the documents, NULs before each."""
    pad = order - 1
    texts = [d.encode() if isinstance(d, str) else bytes(d) for d in documents]
    data = np.frombuffer(b"".join(bytes(pad) + t for t in texts), np.uint8)
    real = np.concatenate([np.arange(pad + len(t)) >= pad for t in texts])
    keys = np.zeros(len(data), np.uint64)
    for back in range(order):  # the last byte is the lowest
        keys[back:] |= data[: len(data) - back].astype(np.uint64) << np.uint64(8 * back)
    return keys[real]


def tail(keys, length):
    """The last `length` bytes of each key."""
    return keys & np.uint64((1 << 8 * length) - 1)


def look_up(table, keys):
    """Index of each key in the sorted table, and whether it is there."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


class ByteNGram:
    """p(byte | order - 1 bytes before it), order <= 8, of bytes documents (or str, as UTF-8).

    The longest grams are counted as often as they occur, a shorter one once for each different
    byte seen before it. Every count gives up a discount to the next shorter context, the last
    to the uniform byte. Beats Witten-Bell on these corpora.
    """

    def __init__(self, documents, order=5):
        self.order, self.levels = order, []
        grams, counts = np.unique(byte_grams(documents, order), return_counts=True)
        for length in range(order, 0, -1):
            if length < order:
                grams, counts = np.unique(tail(grams, length), return_counts=True)
            contexts, starts = np.unique(grams >> np.uint64(8), return_index=True)
            given_up = self.discounts(counts)[np.minimum(counts, 3)]
            totals = np.add.reduceat(counts, starts)
            left = np.add.reduceat(given_up, starts) / totals
            self.levels.insert(0, (grams, counts - given_up, contexts, totals, left))

    @staticmethod
    def discounts(counts):
        """(4,) discounts of the counts 0, 1, 2 and 3 or more, after Chen and Goodman."""
        n = np.array([max((counts == c).sum(), 1) for c in range(1, 5)])
        y = n[0] / (n[0] + 2 * n[1])
        d = [c - (c + 1) * y * n[c] / n[c - 1] for c in (1, 2, 3)]
        return np.concatenate([[0], np.clip(d, 0.1, (0.95, 1.95, 2.95))])

    def probabilities(self, keys):
        """(n,) probability of the last byte of each uint64 key given the bytes before it."""
        p = np.full(len(keys), 1 / 256)
        for length, (grams, counts, contexts, totals, left) in enumerate(self.levels, 1):
            at, known = look_up(contexts, tail(keys, length) >> np.uint64(8))
            gram, seen = look_up(grams, tail(keys, length))
            p = np.where(known, counts[gram] * seen / totals[at] + left[at] * p, p)
        return p

    def bits_per_byte(self, documents):
        """Mean -log2 p over the bytes of the documents; the NULs before each are not scored."""
        return float(-np.log2(self.probabilities(byte_grams(documents, self.order))).mean())


def compare(run):
    """{domain: (bits per byte of the 5-gram, of the run's model)}, both on the whole validation text."""
    run = Path(run)
    documents = {"train": [], "val": []}
    index = json.loads((run / "data" / "index.json").read_text(encoding="utf-8"))
    for domain in index["domains"]:
        for line in open(run / "data" / f"{domain}.jsonl", encoding="utf-8"):
            document = json.loads(line)
            documents[document["split"]].append(document)
    baseline = ByteNGram([document["text"] for document in documents["train"]])
    measured = json.loads((run / "report.json").read_text(encoding="utf-8"))["pretrain"]["val_bpb"]
    texts = {
        domain: [d["text"] for d in documents["val"] if d["domain"] == domain]
        for domain in measured
    }
    return {
        domain: (baseline.bits_per_byte(texts[domain]), measured[domain]) for domain in measured
    }


if __name__ == "__main__":
    table = compare(sys.argv[1])
    print(f"{'domain':12s} 5-gram  model  ratio")
    for domain, (baseline, model) in table.items():
        print(f"{domain:12s} {baseline:6.3f} {model:6.3f} {model / baseline:6.3f}")
    baseline, model = (sum(table[domain][i] for domain in ("web", "code")) for i in (0, 1))
    print(f"{'web + code':12s} {baseline / 2:6.3f} {model / 2:6.3f} {model / baseline:6.3f}")
