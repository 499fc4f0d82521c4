"""The tables, the verdict and the pictures of the bake-off, of invented figures."""

import contextlib
import io

import numpy as np
import pytest

from experiments.common.methods import CATEGORIES, ENTRANTS, METHODS
from experiments.leaderboard.figure import draw_errors, draw_pareto
from experiments.leaderboard.tables import LOSSES, Board, Entry, print_board, standard_error
from experiments.leaderboard.verdict import judge, print_verdict


def invented_board(ratios=(4, 8)):
    """Some figures for every method; one is missing, and one is not finite."""
    rng = np.random.default_rng(0)
    entries = {}
    for method in ENTRANTS:
        for ratio in ratios:
            mean, tail = rng.uniform(0.1, 1, (2, 2, 3, 2, 2, 2))
            bits = rng.uniform(0.01, 0.2, (4, 2, 3, 2))
            entries[method.name, ratio] = Entry(mean, tail, *bits, rng.uniform(), 1e6 / ratio)
    failures = {("wildcat_4", 8): "size must be a multiple of bins"}
    entries.pop(("wildcat_4", 8))
    entries["kmeans", 4].mean[0, 0, 0, 0, 0] = np.nan
    exact = {"continuation": 1.5, "repeated": 0.5}
    return Board(ENTRANTS, list(ratios), ["code", "prose"], entries, failures, exact, 10**6)


@pytest.mark.parametrize("name", ["balanced", "nystrom_8"])
def test_verdict_against_brute_force(name):
    board = invented_board()
    ours = METHODS[name]
    rivals = [method for method in ENTRANTS if method.category == ours.category and not method.ours]
    assert not any(rival.ours for rival in rivals)
    for metric in ("mean", "tail"):
        shares = []
        for ratio, kind, layer, head in np.ndindex(2, 2, 2, 2):
            ratio = board.ratios[ratio]

            def error(method, ratio=ratio, place=(kind, layer, head)):
                entry = board.entries.get((method.name, ratio))
                if entry is None:
                    return np.inf
                kind, layer, head = place
                found = getattr(entry, metric)[kind, :, :, layer, head].mean()  # noqa: B023
                return found if np.isfinite(found) else np.inf

            shares.append(error(ours) / min(error(rival) for rival in rivals))
        found = judge(board, ours, 8)
        np.testing.assert_allclose(np.sort(found.shares[metric]), np.sort(shares))
        assert found.cells == len(shares)
    for loss in LOSSES:
        losses = {
            rival.label: getattr(board.entries[rival.name, 8], loss).mean()
            for rival in rivals
            if (rival.name, 8) in board.entries
        }
        mine, best, label = judge(board, ours, 8).losses[loss]
        assert mine == pytest.approx(getattr(board.entries[name, 8], loss).mean())
        assert best == pytest.approx(min(losses.values()))
        assert losses[label] == pytest.approx(best)


def test_every_method_is_in_the_tables_and_the_pictures():
    board = invented_board()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_board(board, 8, "texts", "stamp")
        print_verdict(board, 8)
    for method in ENTRANTS:
        assert printed.getvalue().count(f" {method.title} ") >= 7
    assert "–: WildCat, 4 bins at 8×: size must be a multiple of bins" in printed.getvalue()
    assert "–: k-means at 4×: not all figures are finite" in printed.getvalue()
    errors = draw_errors(board, "texts")
    # Two panels, each with a number or a dash in every place.
    shown = [text.get_text() for text in errors.axes[0].texts]
    assert len(shown) == len(ENTRANTS) * len(board.ratios)
    assert shown.count("–") == 2
    pareto = draw_pareto(board, "texts")
    labels = {line.get_label() for line in pareto.axes[0].lines}
    assert {method.title for method in ENTRANTS} <= labels


def test_losses_come_with_their_standard_errors_and_sizes():
    board = invented_board()
    entry = board.entries["balanced", 8]
    board.entries["uniform", 8] = entry._replace(repeated=-entry.repeated)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_board(board, 8, "texts", "stamp")
    table = printed.getvalue().split("how large they are")[1]
    # Two kinds of text, three seeds, two passages: those of a kind are a sample.
    passages = entry.repeated.mean(axis=1)
    error = np.sqrt((passages.var(axis=1, ddof=1) / 2).sum()) / 2
    mine = next(line for line in table.splitlines() if " balanced (ours) " in line)
    other = next(line for line in table.splitlines() if " uniform " in line)
    assert f"{passages.mean():.4f} ± {error:.4f}" in mine
    assert f"{-passages.mean():.4f} ± {error:.4f}" in other
    # What was gained is as large as what was lost.
    assert mine.split()[-1].lstrip("*") == other.split()[-1].lstrip("*") == f"{passages.mean():.4f}"
    # One passage of each kind says nothing of that.
    assert np.isnan(standard_error("repeated", entry._replace(repeated=entry.repeated[..., :1])))


def test_best_of_each_class_is_marked():
    board = invented_board()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_board(board, 8, "texts", "stamp")
    first = printed.getvalue().split("\n\n")[0]
    table = first[: first.index("texts.")]
    assert table.count("*") == len(CATEGORIES) * len(board.ratios)
