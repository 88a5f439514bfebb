from kimi_k2 import KimiConfig


def test_kimi_k2(answer):
    k2 = KimiConfig.preset("k2")
    assert answer.gpus_to_serve(k2, 0, 0) == 14, "1,026,408,232,448 bytes in pieces of 72 GiB"
    assert answer.gpus_to_serve(k2, 64, 131_072) == 21, "and 64 caches of 8.58 GiB"
    assert answer.gpus_to_serve(k2, 1, 131_072) == 14, "one session more or less does not matter"
    assert answer.gpus_to_serve(k2, 64, 131_072, gib=141) == 12, "fewer of a larger kind"


def test_small_models_need_one(answer):
    tiny = KimiConfig.preset("tiny")
    assert answer.gpus_to_serve(tiny, 1, 256) == 1
    assert answer.gpus_to_serve(tiny, 10**9, 256) == answer.gpus_to_serve(tiny, 1, 256 * 10**9)
