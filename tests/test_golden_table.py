"""The table of all methods against their authors' numbers, printed by the run."""

import golden_table


def test_every_method_is_within_the_stored_digits(capsys):
    cases = golden_table.every_case()
    assert cases
    for method, (_, value, gradient) in golden_table.rows(cases).items():
        assert max(value, gradient) <= golden_table.TOLERANCE, method
    with capsys.disabled():
        print("\n" + golden_table.table(cases))
