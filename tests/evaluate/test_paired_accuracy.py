import math

import pytest

from neuqi_serve.errors import UsageError
from neuqi_serve.evaluate.paired_accuracy import compare_paired


def answers(both, first_only, second_only, neither):
    first = [True] * both + [True] * first_only + [False] * second_only + [False] * neither
    second = [True] * both + [False] * first_only + [True] * second_only + [False] * neither
    return first, second


def test_comparison_equals_a_hand_computed_example():
    found = compare_paired(*answers(5, 4, 1, 2))
    assert (found.first_only, found.second_only) == (4, 1)
    assert found.difference == 3 / 12
    assert found.standard_error == pytest.approx(math.sqrt(5 - 9 / 12) / 12)
    # Two-sided: 2·(C(5,0) + C(5,1))/2^5.
    assert found.p_value == 12 / 32


def test_comparison_changes_sign_when_the_models_change_places():
    first, second = answers(5, 7, 2, 1)
    one, other = compare_paired(first, second), compare_paired(second, first)
    assert one.difference == -other.difference
    assert (one.standard_error, one.p_value) == (other.standard_error, other.p_value)


def test_equal_answers_are_no_evidence():
    found = compare_paired(*answers(3, 0, 0, 4))
    assert (found.difference, found.standard_error, found.p_value) == (0.0, 0.0, 1.0)


def test_probability_never_exceeds_one():
    assert compare_paired(*answers(0, 3, 3, 0)).p_value == 1.0


def test_standard_error_is_that_of_the_paired_differences():
    first, second = answers(11, 6, 2, 4)
    steps = [int(a) - int(b) for a, b in zip(first, second, strict=True)]
    mean = sum(steps) / len(steps)
    variance = sum((step - mean) ** 2 for step in steps) / len(steps)
    assert compare_paired(first, second).standard_error == pytest.approx(math.sqrt(variance / len(steps)))


@pytest.mark.parametrize(("first", "second"), [([], []), ([True], [True, False])])
def test_answers_to_different_questions_are_refused(first, second):
    with pytest.raises(UsageError, match="same questions"):
        compare_paired(first, second)
