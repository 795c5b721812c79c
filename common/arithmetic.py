"""PyTorch's arithmetic in this process."""

import torch


def set_up_arithmetic() -> None:
    """Settings of this process; every script that trains calls it before anything is computed.

    - Denormal numbers are 0: on a CPU they cost a hundred times as much.
    - No attention by cuDNN, which PyTorch prefers on an H100, H200 or B200 from 2.11 on: in half precision, with a mask
      and a length of 64 more than a multiple of 128, its backward gives NaN for rows whose scores have a log-sum-exp
      below −88.7 (pytorch/pytorch#196678). Left padding sees nothing, its rows have −∞: one NaN, and an update later
      all weights are NaN (docs/experiments/gpu_readiness.md).
    """
    torch.set_flush_denormal(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
