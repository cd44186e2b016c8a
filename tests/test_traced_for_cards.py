"""What a caller's graph on a card is, traced without one: by fake tensors, for which torch's CUDA build is enough.

Nothing is compiled or run. It finds what a graph cannot say: a tensor's address, a text of a symbol.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mask_mods import prefix, sliding_window
from rr_flex import create_rr_block_mask, rr_attention, select_blocks
from rr_flex.kernels import deciding, options

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a torch built for CUDA"),
    pytest.mark.filterwarnings("ignore"),
]
SPARSE = {"min_length": 0}
window = sliding_window(200)
FORMS = {
    "as it comes": lambda q, k, v: rr_attention(q, k, v),
    "a preset": lambda q, k, v: rr_attention(q, k, v, preset="best"),
    "sparse": lambda q, k, v: rr_attention(q, k, v, preset="best", **SPARSE),
    "by tau": lambda q, k, v: rr_attention(q, k, v, tau=[0.5] * 8, return_density=True, return_lse=True, **SPARSE),
    "dense, with its log-sum-exp": lambda q, k, v: rr_attention(q, k, v, return_lse=True),
    "Triton": lambda q, k, v: rr_attention(q, k, v, backend="triton"),
    "not causal": lambda q, k, v: rr_attention(q, k, v, causal=False),
    "a chunk": lambda q, k, v: rr_attention(q[:, :, -200:], k, v),
    "a chunk from the middle": lambda q, k, v: rr_attention(q[:, :, :200], k, v, q_offset=100, tau=0.5, **SPARSE),
    "a mask": lambda q, k, v: rr_attention(q, k, v, mask_mod=window),
    "a mask, sparse": lambda q, k, v: rr_attention(q, k, v, mask_mod=prefix(77), causal=False, tau=0.5, **SPARSE),
    "a soft cap": lambda q, k, v: rr_attention(q, k, v, softcap=30.0, **SPARSE),
    "a density": lambda q, k, v: rr_attention(q, k, v, budget="density", target_density=0.6, **SPARSE),
    "narrow blocks": lambda q, k, v: rr_attention(q, k, v, preset="fast", block_size=(128, 64), **SPARSE),
    "a block mask": lambda q, k, v: create_rr_block_mask(q, k, preset="best").kv_num_blocks,
    "a selection": lambda q, k, v: select_blocks(q, k, pool="queries", head_offset=3).kept,
}


@pytest.fixture(autouse=True)
def a_card(monkeypatch):
    """Of compute capability 9.0: its properties need a driver."""
    for module in (options, deciding):
        monkeypatch.setattr(
            module, "tuned", lambda device, *kind: options.tuned_for("9.0", *kind) if device.type == "cuda" else {}
        )
    torch._dynamo.reset()


@pytest.mark.parametrize("symbols", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_caller_s_graph(name, symbols):
    module = torch.nn.Module()
    module.forward = FORMS[name]
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        qkv = [torch.empty(1, heads, 1100, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 4, 4)]
        sizes = tuple({axis: torch.export.Dim.AUTO for axis in range(4)} for _ in qkv) if symbols else None
        torch.export.export(module, tuple(qkv), strict=True, dynamic_shapes=sizes)
