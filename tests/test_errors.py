"""Errors of one line."""

from fisher_vmap.errors import listed


def test_a_list_in_an_error_says_how_many_more():
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(i) for i in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
