"""Which prompts the report finds unlike the rest: the planted case, and each measure against its definition."""

import numpy as np
import pytest
from report_cases import planted, write_factors

from fisher_vmap.report.outliers import WORTH_A_LOOK, rank_outliers, score_prompts

pytestmark = pytest.mark.needs("matplotlib", "plotly", "scipy")


@pytest.mark.parametrize("width", [64, 200])
@pytest.mark.parametrize("kind", ["common", "private"])
@pytest.mark.parametrize("seed", [0, 1])
def test_five_of_two_hundred_that_share_a_direction_come_first(tmp_path, kind, width, seed):
    factors, who, u = planted(kind, seed, width=width)
    results = write_factors(tmp_path, {"m": factors})
    found = rank_outliers(score_prompts(results, "m"))
    assert sorted(outlier.index for outlier in found[:5]) == who.tolist()
    for outlier in found[:5]:
        assert outlier.company == tuple(who)
        assert outlier.reasons[0].startswith("20% of its trace along a direction shared with ")
    for where in (lambda row: row["prompt_index"] in set(who), np.isin(np.arange(200), who)):
        assert abs(results.contrast(where).directions[0] @ u) > 0.99
    assert abs(results.directions(1, where=np.isin(np.arange(200), who)).V[0] @ u) > (0.9 if kind == "private" else 0)


def test_none_of_them_is_conspicuous_by_itself(tmp_path):
    """What finds the five is the direction that they share: by the other measures they are like the rest."""
    factors, who, _ = planted("private", 0)
    scores = score_prompts(write_factors(tmp_path, {"m": factors}), "m")
    for measure in ("trace", "leading value", "distance"):
        assert np.median(scores.z[measure][who]) < WORTH_A_LOOK
    alone = planted("private", 0, few=1)
    single = score_prompts(write_factors(tmp_path / "alone", {"m": alone[0]}), "m")
    assert single.z["shared with few"][alone[1][0]] < WORTH_A_LOOK


def test_the_measures_are_what_they_say(tmp_path):
    factors, _, _ = planted("common", 2, count=40, width=30)
    scores = score_prompts(write_factors(tmp_path, {"m": factors}), "m")
    F = np.einsum("nkd,nke->nde", factors, factors)
    trace = np.trace(F, axis1=1, axis2=2)
    np.testing.assert_allclose(scores.trace, trace, rtol=1e-5)
    np.testing.assert_allclose(scores.leading, np.linalg.eigvalsh(F)[:, -1], rtol=1e-5)
    scaled = F / trace[:, None, None]
    for i in range(40):
        others = np.delete(scaled, i, 0).mean(0)
        cosine = (scaled[i] * others).sum() / np.linalg.norm(scaled[i]) / np.linalg.norm(others)
        np.testing.assert_allclose(scores.distance[i], 1 - cosine, atol=1e-5)
    x = np.log10(trace)
    mad = 1.4826 * np.median(abs(x - np.median(x)))
    np.testing.assert_allclose(scores.z["trace"], abs(x - np.median(x)) / mad, rtol=1e-3, atol=1e-3)


def test_a_large_trace_and_a_strange_matrix_are_found_and_named(tmp_path):
    factors, _, _ = planted("common", 3, few=0)
    factors[17] *= 30
    factors[60] = (
        np.linalg.norm(factors[60]) * np.linalg.qr(np.random.default_rng(0).normal(size=(64, 8)))[0].T / 8**0.5
    )
    found = {o.index: o for o in rank_outliers(score_prompts(write_factors(tmp_path, {"m": factors}), "m"))}
    assert "trace" in " ".join(found[17].reasons) and "times the median" in found[17].reasons[0]
    assert any(reason.startswith("unlike the mean of the others: cosine 0.") for reason in found[60].reasons)


def test_few_prompts_have_no_outliers_and_equal_ones_no_reasons(tmp_path):
    factors, _, _ = planted("common", 0, count=6, few=1)
    assert rank_outliers(score_prompts(write_factors(tmp_path / "few", {"m": factors}), "m")) == []
    same = np.repeat(factors[:1], 40, axis=0)
    assert rank_outliers(score_prompts(write_factors(tmp_path / "same", {"m": same}), "m")) == []


def test_fewer_candidates_still_find_the_group(tmp_path, monkeypatch):
    monkeypatch.setattr("fisher_vmap.report.outliers.CANDIDATES", 300)
    factors, who, _ = planted("common", 4)
    found = rank_outliers(score_prompts(write_factors(tmp_path, {"m": factors}), "m"))
    assert sorted(outlier.index for outlier in found[:5]) == who.tolist()
