"""What FLASH's template (torch 2.11) can take of a mask: it loads nothing at a fixed place, and chooses no constant."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mask_mods import both, causal, document, either, frames, from_head, padding, prefix, sink, sliding_window
from mask_mods.spans import per_sequence

NUMBER, ONE = torch.tensor(5), torch.tensor([300])
IDS = torch.arange(400) // 100
MASKS = [
    causal(3),
    causal(NUMBER),
    sliding_window(77, NUMBER),
    sliding_window(77, 3, symmetric=True),
    document(IDS),
    document(IDS.expand(2, -1), NUMBER),
    prefix(NUMBER, 3),
    prefix(20, ONE),
    padding(ONE),
    padding(ONE, "left", 400, NUMBER),
    frames(16, 2, NUMBER),
    frames(16),
    both(causal(NUMBER), document(IDS), sink(20)),
    both(causal(NUMBER), either(sink(4), sliding_window(40), padding(ONE))),
    from_head(both(causal(), prefix(NUMBER)), NUMBER),
]


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("B", [1, 2])
def test_a_mask_s_graph_chooses_no_constant_and_loads_by_an_index(mask, B):
    b, h, i, j = torch.arange(B)[:, None, None], torch.tensor(1), torch.arange(400)[:, None], torch.arange(400)
    spread = per_sequence(mask, B)
    assert (spread(b, h, i, j) == mask(b, h, i, j)).all()
    of_indices = set()
    for node in make_fx(spread)(*torch.zeros(4, 1, dtype=torch.int32).unbind()).graph.nodes:
        if node.op == "placeholder" or of_indices.intersection(node.all_input_nodes):
            of_indices.add(node)
        if node.target == torch.ops.aten.where.self:
            assert of_indices.issuperset(node.args), f"a constant is chosen: {node.format_node()}"
        captured = [source for source in node.all_input_nodes if source.op == "get_attr"]
        if captured:
            assert node.target == torch.ops.aten.index.Tensor and captured == [node.args[0]], node.format_node()
            assert of_indices.intersection(node.args[1]), f"loaded at a fixed place: {node.format_node()}"
