import numpy as np

from dynrank_ds.report.places import Place, place
from dynrank_ds.report.progress import course
from dynrank_ds.report.ranks import head_maps, rank_heatmap, rank_history

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


def ranks_of_heads() -> dict[str, int]:
    """Two layers: 12 heads of q and o, 2 of k, whose ranks are their number and 1; down_proj without heads."""
    ranks = {f"layers.{layer}.mlp.down_proj": 20 + layer for layer in range(2)}
    for linear, count in {"q_proj": 12, "k_proj": 2, "o_proj": 12}.items():
        for head in range(count):
            ranks |= {f"layers.{layer}.attn.{linear}.blocks.{head}": head + 1 for layer in range(2)}
    return ranks


def test_heatmap_sums_the_heads_of_a_linear():
    start = ranks_of_heads()
    figure = rank_heatmap(start, start | {"layers.1.attn.k_proj.blocks.0": 8})
    changes, shown = cells(figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "q_proj",
        "k_proj",
        "o_proj",
        "down_proj",
    ]
    assert shown["q_proj", "1"] == "78" and shown["k_proj", "0"] == "3" and shown["down_proj", "1"] == "21"
    assert changes[1].tolist() == [0, 7] and shown["k_proj", "1"] == "10"


def test_every_head_has_a_cell_in_the_panel_of_its_linear():
    ranks = ranks_of_heads() | {"layers.1.attn.k_proj.blocks.0": 8}
    panels = head_maps(ranks).axes[:3]
    assert [panel.get_title(loc="left") for panel in panels] == ["q_proj", "k_proj", "o_proj"]
    q, k, _ = (np.array(panel.images[0].get_array()) for panel in panels)
    assert q.tolist() == [[head + 1] * 2 for head in range(12)]
    assert k.tolist() == [[1, 8], [2, 2]]
    assert len({(panel.images[0].norm.vmin, panel.images[0].norm.vmax) for panel in panels}) == 1


def test_history_has_heads_layer_by_layer():
    ranks = ranks_of_heads()
    history = rank_history([(10, ranks | {"layers.1.attn.k_proj.blocks.0": 8})], ranks).axes[0]
    assert [label.get_text() for label in history.get_xticklabels()] == [
        "q_proj",
        "k_proj",
        "o_proj",
        "down_proj",
    ]
    changes = np.array(history.images[0].get_array())[0]
    assert changes.tolist().index(7) == 24 + 2  # k_proj's heads layer by layer


def test_eighty_layers_are_three_panels_whose_numbers_stand_in_their_layer():
    ranks = {f"model.layers.{layer}.mlp.up_proj": layer for layer in range(80)}
    figure = rank_heatmap(ranks, ranks)
    panels = figure.axes[:3]
    assert [len(panel.get_xticklabels()) for panel in panels] == [27, 27, 26]
    assert len({np.array(panel.images[0].get_array()).shape for panel in panels}) == 1
    for panel in panels:
        layers = [label.get_text() for label in panel.get_xticklabels()]
        assert {layers[int(text.get_position()[0])] for text in panel.texts} == set(layers)
        assert all(layers[int(text.get_position()[0])] == text.get_text() for text in panel.texts)
    assert figure.get_figwidth() * 88 < 1168  # a window of 1,200 pixels less its margins


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
