GAINS = (0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
def score(tries, key):
    import numpy as np
    from typing import Any
    rows = np.array([row for of in tries.values() for row in of[key]], dtype=float)
    rows[np.isnan(rows)] = np.inf
    med = np.median(rows[:, [GAINS.index(g) for g in (1.0, 2.0, 3.0)]], axis=0)
    return float(np.log(med).mean())
