"""Which kernel a call gets, and what an impossible choice says. What FLASH computes is tested in test_gpu.py."""

from dataclasses import replace

import pytest
import torch
from cases import SQUARE, tensors

from mask_mods import document
from rr_flex import RRConfig, rr_attention
from rr_flex.kernels import flash as backends
from rr_flex.kernels.choose import choose_kernel
from rr_flex.kernels.flash import FlashCheck
from rr_flex.request import make_request


class Cuda:
    """As much of a tensor on a CUDA device as the choice looks at."""

    def __init__(self, dtype=torch.bfloat16, head_dim=64):
        self.device, self.dtype, self.shape = torch.device("cuda", 0), dtype, (1, 4, 1000, head_dim)


def choose(backend="auto", q=None, block_size=(128, 128), plain_mask=True, for_backward=False, softcap=False):
    q, (some_q, some_k, _) = q or Cuda(), tensors(SQUARE)
    options = {"mask_mod": None if plain_mask else document(torch.zeros(300, dtype=torch.int64))}
    options["softcap"] = 9.0 if softcap else None
    request = make_request(some_q, some_k, RRConfig(block_size=block_size), options)
    return choose_kernel(backend, q, q, replace(request, backward=for_backward))


@pytest.fixture
def flash(monkeypatch):
    """FLASH is installed and right."""
    monkeypatch.setattr(backends, "flash_is_installed", lambda: True)
    monkeypatch.setattr(backends, "_checks", {})
    monkeypatch.setattr(backends, "_run_check", lambda *key: FlashCheck(None))


def test_auto_takes_flash_where_it_is_right(flash):
    assert choose() == "flash" and choose("flash") == "flash" and choose("triton") == "triton"


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"q": Cuda(torch.float32)}, "float32"),
        ({"block_size": (128, 64)}, "128 × 64"),
        ({"for_backward": True}, "gradients"),
        ({"softcap": True}, "soft cap"),
    ],
)
def test_where_flash_can_t_run_auto_is_triton_and_flash_an_error(flash, case, reason):
    assert choose(**case) == "triton"
    with pytest.raises(RuntimeError, match=rf"^backend must be 'auto' or another kernel here, got 'flash': .*{reason}"):
        choose("flash", **case)


def test_a_mask_of_the_caller_s_own_is_flash_s_only_by_name(flash):
    assert choose(plain_mask=False) == "triton" and choose("flash", plain_mask=False) == "flash"


def test_a_failed_self_check_is_remembered_and_named(flash, monkeypatch):
    runs = []

    def failing(*key):
        runs.append(key)
        return FlashCheck("its self-check was off by 0.5 of the output's norm")

    monkeypatch.setattr(backends, "_run_check", failing)
    assert choose() == "triton" and choose() == "triton" and len(runs) == 1
    with pytest.raises(RuntimeError, match="self-check was off"):
        choose("flash")
    assert choose(q=Cuda(head_dim=128)) == "triton" and len(runs) == 2


def test_inside_a_caller_s_graph_it_is_triton(flash, monkeypatch):
    monkeypatch.setattr(backends, "traced", lambda: True)
    assert choose() == "triton"
    with pytest.raises(RuntimeError, match="inside a caller's"):
        choose("flash")


def test_without_the_package_flash_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "flash_is_installed", lambda: False)
    assert choose() == "triton"
    with pytest.raises(RuntimeError, match="not installed"):
        choose("flash")


def test_the_cpu_has_no_choice():
    q, k, v = tensors(SQUARE)
    for backend in ("triton", "flash"):
        with pytest.raises(ValueError, match=f"^backend must be 'auto' where .* got '{backend}'"):
            rr_attention(q, k, v, backend=backend)
    with pytest.raises(ValueError, match=r"^backend must be one of auto, triton, flash, got .cudnn."):
        rr_attention(q, k, v, backend="cudnn")


def test_an_offset_for_flash_has_an_index():
    assert backends.offset_per_batch(torch.tensor(5), 1).tolist() == [5, 5]
    assert backends.offset_per_batch(torch.tensor(5), 3).tolist() == [5, 5, 5]
