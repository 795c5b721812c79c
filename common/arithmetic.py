"""PyTorch's arithmetic in this process."""

import torch


def set_up_arithmetic() -> None:
    """Settings of this process; every script that trains or samples calls it before anything is computed.

    - Denormal numbers are 0: on a CPU they cost a hundred times as much.
    - No attention by cuDNN, which PyTorch prefers on an H100, H200 or B200 from 2.11 on. On an H200 six of ten runs of
      GRPO in bfloat16 ended in NaN with it, and without it none of eight (docs/experiments/gpu_readiness.md). Its
      backward gives NaN where there is a mask, the length is 64 more than a multiple of 128, and a row's scores have a
      log-sum-exp below −88.7 (pytorch/pytorch#196678), as the rows of left padding have, which see nothing: −∞.
    """
    torch.set_flush_denormal(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
