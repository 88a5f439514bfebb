import math


def muon_update(M):
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = M.shape[0] > M.shape[1]
    X = M.T if tall else M
    X = X / X.norm()
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    X = X.T if tall else X
    return X * 0.2 * math.sqrt(max(M.shape))


MISTAKES = {  # what the checks have to catch: name: (part of the solution, what stands there instead)
    "no norm first": ("X = X / X.norm()", ""),
    "four steps": ("range(5)", "range(4)"),
    "shorter side": ("max(M.shape)", "min(M.shape)"),
    "no factor": (" * 0.2 * math.sqrt(max(M.shape))", ""),
    "tall not turned": ("M.shape[0] > M.shape[1]", "False"),
    "tall not turned back": ("X = X.T if tall else X", "pass"),
    "coefficient swapped": ("b * A + c * A @ A", "c * A + b * A @ A"),
}
