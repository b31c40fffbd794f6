import numpy as np

from dynrank_ds.report.places import Place, place
from dynrank_ds.report.progress import course
from dynrank_ds.report.ranks import rank_heatmap, rank_history

from .conftest import AFTER_10, AFTER_20, START, metric


def cells(figure) -> tuple[np.ndarray, dict[tuple[str, str], str]]:
    """The image's values, and the number shown for every (kind, layer)."""
    axes = figure.axes[0]
    kinds = [label.get_text() for label in axes.get_yticklabels()]
    layers = [label.get_text() for label in axes.get_xticklabels()]
    shown = {}
    for text in axes.texts:
        column, row = text.get_position()
        shown[kinds[int(row)], layers[int(column)]] = text.get_text()
    return np.array(axes.images[0].get_array()), shown


def test_a_module_is_placed_by_its_first_number():
    assert place("model.layers.11.mlp.down_proj") == Place(11, "mlp.down_proj")
    assert place("model.layers.3.mlp.experts.7.up_proj") == Place(3, "mlp.experts.7.up_proj")
    assert place("lm_head").kind == "lm_head"
    assert place("model.layers.3.self_attn.q_proj.blocks.12") == Place(3, "self_attn.q_proj", head=12)
    assert place("transformer.blocks.3.attn.q_proj") == Place(3, "attn.q_proj")


def test_heatmap_shows_ranks_as_numbers_and_changes_as_colours_around_the_start():
    figure = rank_heatmap(START, AFTER_20)
    changes, shown = cells(figure)
    assert len(shown) == len(START)
    assert shown["down_proj", "11"] == "9" and shown["q_proj", "0"] == "2" and shown["v_proj", "5"] == "4"
    assert changes.tolist()[2][11] == 5 and changes.tolist()[0][0] == -2
    norm = figure.axes[0].images[0].norm
    assert (norm.vmin, norm.vcenter, norm.vmax) == (-5, 0, 5)
    assert "initial rank 4" in figure.axes[0].get_title(loc="left")


def test_modules_outside_the_layers_and_of_equal_last_names_have_cells_of_their_own():
    ranks = {"lm_head": 3, "layers.0.self.q_proj": 1, "layers.0.cross.q_proj": 2, "layers.1.self.q_proj": 5}
    _, shown = cells(rank_heatmap(ranks, ranks))
    assert shown == {
        ("lm_head", "none"): "3",
        ("self.q_proj", "0"): "1",
        ("cross.q_proj", "0"): "2",
        ("self.q_proj", "1"): "5",
    }


def test_heads_stand_with_their_linear_in_the_order_of_their_numbers():
    heads = {"q_proj": 12, "k_proj": 2, "o_proj": 12}
    ranks = {f"layers.{layer}.mlp.down_proj": 20 + layer for layer in range(2)}
    for linear, count in heads.items():
        for head in range(count):
            ranks |= {f"layers.{layer}.attn.{linear}.blocks.{head}": head + 1 for layer in range(2)}
    figure = rank_heatmap(ranks, ranks)
    rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert rows == [f"{linear} {h}" for linear, count in heads.items() for h in range(count)] + ["down_proj"]
    _, shown = cells(figure)
    assert shown["q_proj 11", "1"] == "12" and shown["down_proj", "1"] == "21"

    grown = ranks | {"layers.1.attn.k_proj.blocks.0": 8}
    history = rank_history([(10, grown)], ranks).axes[0]
    assert [label.get_text() for label in history.get_xticklabels()] == [*heads, "down_proj"]
    changes = np.array(history.images[0].get_array())[0]
    assert changes.tolist().index(7) == 24 + 2  # k_proj's heads layer by layer


def test_history_has_one_row_per_adjustment():
    figure = rank_history([(10, AFTER_10), (20, AFTER_20)], START)
    changes = np.array(figure.axes[0].images[0].get_array())
    assert changes.shape == (2, len(START))
    assert changes[0].tolist() == [-2, *[0] * 34, 2]  # q_proj of layer 0 first, down_proj of layer 11 last
    assert changes[1, 12 + 2] == -3 and changes[1, -1] == 5
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["10", "20"]


def test_ranks_over_time_show_stored_and_live_where_they_differ():
    lines = [metric(step, 1.0) | {"total_rank_stored": 200} for step in range(1, 6)]
    bottom = course(lines, [3]).axes[1]
    labelled = {line.get_label(): list(line.get_ydata()) for line in bottom.lines}
    assert labelled["stored"] == [200] * 5 and labelled["live"] == [144] * 5
    same = course([metric(step, 1.0) for step in range(1, 6)], []).axes[1]
    assert [line.get_label() for line in same.lines] == ["live and stored"]


def test_smoothing_keeps_a_constant_loss_constant():
    top = course([metric(step, 2.5) for step in range(1, 101)], []).axes[0]
    assert all(np.allclose(line.get_ydata(), 2.5) for line in top.lines)
