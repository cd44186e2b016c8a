"""Under transformers' tensor parallelism two processes keep the blocks that one keeps: 2 processes, gloo, CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import tensor_parallel_worker as worker
from model_families import make

HERE = Path(__file__).parent


def prefill(folder, out, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, HERE / "tensor_parallel_worker.py", folder, out]
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("family", ["llama"])
def test_two_processes_keep_what_one_keeps(family, tmp_path):
    make(family).save_pretrained(tmp_path / "model")
    worker.main(tmp_path / "model", tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt")
    two = prefill(tmp_path / "model", tmp_path / "two.pt", processes=2)
    assert len(one["kept"]) == len(two["kept"]) == 2
    for whole, sharded in zip(one["kept"], two["kept"], strict=True):
        assert whole.shape[1] == 4 and not whole.all()
        assert torch.equal(whole, sharded)
    torch.testing.assert_close(two["logits"], one["logits"], atol=1e-3, rtol=1e-3)
