"""Dependence of class and expert by hand, orders of axes, and models whose routing is known by construction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vmoe.tiny import CONFIG, DENSE, PREPROCESSING, data_of, model_of
from vmoe.checkpoint import Checkpoint
from vmoe.model import VisionTransformer
from vmoe.operating_point import OperatingPoint
from vmoe.routing_analysis import (
    analyse_routing,
    normalised_mutual_information,
    save_routing_figure,
    seriation,
)

DATA = data_of(60)


def checkpoint_with_equal_gates() -> Checkpoint:
    """Every token asks expert 0, then expert 1, with a gate of 1/4 each."""
    state = model_of().state_dict()
    equal = {
        name: torch.zeros_like(value) if name.endswith("router.weight") else value for name, value in state.items()
    }
    return Checkpoint(CONFIG, equal, PREPROCESSING, DATA.labels)


def checkpoint_of_brightness() -> Checkpoint:
    """Routes by class: a token of a patch of mean m is (m, -m, 1, -1), and attention and MLPs add nothing.

    Norms scale it to u * (m, -m, 1, -1): experts 0 and 2 follow -m and m, expert 1 wins in between by a constant.
    """
    config = replace(CONFIG, hidden_size=4, position_embedding="none")
    model = VisionTransformer(config).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
            block.mlp.experts.weight_out.zero_()
            block.mlp.experts.bias_out.zero_()
            rows = [[-1.0, 0, 0, 0], [0, 0, 0.4, 0], [1.0, 0, 0, 0], [0, 0, -1, 0]]
            block.mlp.router.weight.copy_(torch.tensor(rows))
        model.embedding.weight.zero_()
        model.embedding.weight[0], model.embedding.weight[1] = 1 / 16, -1 / 16
        model.embedding.bias.copy_(torch.tensor([0.0, 0.0, 1.0, -1.0]))
    return Checkpoint(config, model.state_dict(), PREPROCESSING, DATA.labels)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([[5, 0], [0, 5]], 1.0),
        ([[2, 4], [3, 6]], 0.0),
        # p = 3/8 and 1/8: I = 2 ln 2 - (0.75 ln(8/3) + 0.25 ln 8) = 0.13081; over ln 2.
        ([[3, 1], [1, 3]], 0.18872),
        ([[4, 4]], 0.0),  # one class tells nothing
        ([[7]], 0.0),
    ],
)
def test_mutual_information_by_hand(counts: list[list[int]], expected: float) -> None:
    assert normalised_mutual_information(np.array(counts, dtype=float)) == pytest.approx(expected, abs=1e-5)


def test_seriation_puts_the_blocks_of_a_shuffled_table_together() -> None:
    table = np.kron(np.eye(2), np.ones((3, 2))) + 0.1  # 6 classes, 4 experts, two blocks
    random = np.random.default_rng(3)
    rows, columns = random.permutation(6), random.permutation(4)
    found_rows, found_columns = seriation(table[np.ix_(rows, columns)])
    ordered = table[np.ix_(rows[found_rows], columns[found_columns])]
    assert (ordered == table).all() or (ordered == table[::-1, ::-1]).all()


def test_routing_of_equal_gates_depends_on_no_class_and_drops_half() -> None:
    # (1, 2): 2 slots; experts 0 and 1 serve the first 2 of 4 tokens, the others go unserved.
    for layer, block in zip(analyse_routing(checkpoint_with_equal_gates(), DATA), (0, 1), strict=True):
        assert layer.block == block
        assert layer.load == (0.5, 0.5, 0.0, 0.0)
        assert layer.dropped == pytest.approx(0.5)
        assert layer.unserved == pytest.approx(0.5)
        assert layer.dependence == pytest.approx(0, abs=1e-12)
        # A gate of 1/4 for half of the tokens.
        assert np.array(layer.weights) == pytest.approx(np.tile([0.125, 0.125, 0, 0], (3, 1)))


def test_routing_by_brightness_depends_on_the_class_far_above_chance() -> None:
    # Dark, grey and bright images ask experts 0, 1 and 2 with their first choice: one to one.
    layers = analyse_routing(checkpoint_of_brightness(), DATA, OperatingPoint(4.0, 1))
    for layer in layers:
        assert layer.dependence == pytest.approx(1.0)
        assert layer.chance < 0.2
        assert layer.load == pytest.approx((1 / 3, 1 / 3, 1 / 3, 0))
        assert (layer.dropped, layer.unserved) == (0, 0)
        assert np.array(layer.weights).argmax(1).tolist() == [0, 1, 2]


def test_routing_of_the_first_images_only() -> None:
    done: list[int] = []
    (layer, _) = analyse_routing(checkpoint_of_brightness(), DATA, OperatingPoint(4.0, 1), limit=2, advance=done.append)
    assert sum(done) == 2
    assert layer.load == (0.5, 0.5, 0.0, 0.0)  # a dark and a grey one
    assert layer.weights[2] == (0.0, 0.0, 0.0, 0.0)  # no bright one


def test_routing_of_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="a dense model, which routes nothing"):
        analyse_routing(Checkpoint(DENSE, model_of(DENSE).state_dict(), PREPROCESSING, DATA.labels), DATA)


def test_routing_of_no_image_is_refused() -> None:
    with pytest.raises(ValueError, match="no images to analyse: 60 in the data set, limit 0"):
        analyse_routing(checkpoint_with_equal_gates(), DATA, limit=0)


def test_routing_figure_is_an_image(tmp_path: Path) -> None:
    layers = analyse_routing(checkpoint_of_brightness(), DATA)
    save_routing_figure(tmp_path / "routing.png", layers, DATA.labels)
    with Image.open(tmp_path / "routing.png") as picture:
        assert min(picture.size) > 100
