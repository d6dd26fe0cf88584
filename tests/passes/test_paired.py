import numpy as np
import pytest

from passes.validate.paired import compare_paired, fewest_lost, mcnemar_exact, paired_bootstrap

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 0), (6, 0), (9, 2), (2, 9), (10, 10), (40, 17)])
def test_mcnemar_is_the_binomial_test_on_the_pairs_that_changed(lost, gained):
    expected = scipy_stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert mcnemar_exact(lost, gained) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_by_hand():
    assert mcnemar_exact(6, 0) == 2 / 64
    assert mcnemar_exact(5, 1) == 2 * (1 + 6) / 64
    assert mcnemar_exact(900, 1000) == pytest.approx(scipy_stats.binomtest(900, 1900).pvalue)  # no overflow


def test_scores_of_zero_and_one_go_to_mcnemar():
    before, after = [1.0] * 90 + [0.0] * 10, [1.0] * 82 + [0.0] * 16 + [1.0] * 2
    test = compare_paired(before, after)
    assert (test.method, test.samples, test.lost, test.gained) == ("McNemar's exact test", 100, 8, 2)
    assert test.drop == pytest.approx(0.06)
    assert test.p_value == pytest.approx(scipy_stats.binomtest(2, 10).pvalue)
    assert not test.larger_than_chance
    worse = compare_paired(before, [1.0] * 80 + [0.0] * 20)
    assert worse.p_value == 2 / 2**10
    assert worse.larger_than_chance
    assert not compare_paired([1.0] * 80 + [0.0] * 20, before).larger_than_chance, "a gain is no drop"


def test_the_smallest_drop_that_samples_can_show():
    assert fewest_lost() == 6
    scores = np.ones(300)
    for lost, shown in ((5, False), (6, True)):
        test = compare_paired(scores, np.where(np.arange(300) < lost, 0, 1))
        assert test.smallest_drop == 6 / 300
        assert test.larger_than_chance == shown == (test.drop >= test.smallest_drop)
    random = np.random.default_rng(0)
    graded = compare_paired(random.uniform(0.5, 1, 400), random.uniform(0.5, 1, 400))
    assert graded.smallest_drop == pytest.approx(1.96 * np.sqrt(2 / 12 * 0.25) / 20, rel=0.1)


@pytest.mark.parametrize("shift", [0.0, 0.02, 0.05])
def test_graded_scores_go_to_a_bootstrap_that_agrees_with_the_t_test(shift):
    random = np.random.default_rng(1)
    before = random.uniform(0.3, 1, 300)
    after = before - shift + random.normal(0, 0.2, 300)
    test = compare_paired(before.tolist(), after.tolist())
    assert test.method == "paired bootstrap"
    assert test.p_value == pytest.approx(scipy_stats.ttest_rel(before, after).pvalue, abs=0.02)


def test_the_bootstrap_is_seeded_and_never_says_never():
    differences = np.linspace(0.1, 1, 50)
    assert paired_bootstrap(differences) == paired_bootstrap(differences) == 2 / 10_001
    assert paired_bootstrap(np.zeros(50)) == 1.0


def test_equal_scores_differ_by_nothing():
    for scores in ([1.0, 0.0, 1.0], [0.3, 0.7, 1.0]):
        test = compare_paired(scores, scores)
        assert (test.drop, test.p_value, test.larger_than_chance) == (0, 1.0, False)


def test_lists_of_unequal_length_are_no_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        compare_paired([1.0], [1.0, 0.0])
