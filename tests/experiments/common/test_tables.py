"""Printed tables."""

from experiments.common.tables import print_table


def test_tables_are_aligned_and_never_folded(capsys):
    name, title = "a long name " * 20, "a title " * 40
    print_table(title, ["name", "error"], [[name, "1.0"], None, ["b", "10.25"]], left=["name"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].strip() == title.strip()
    rows = [row for row in printed if row.rstrip().endswith(("1.0", "10.25"))]
    assert len({len(row.rstrip()) for row in rows}) == 1
    assert name.strip() in rows[0]
