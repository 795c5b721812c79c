"""common/arithmetic.py: what it sets, and that every script that trains or samples calls it."""

import ast
from pathlib import Path

import pytest
import torch

from common.arithmetic import set_up_arithmetic

SCRIPTS = ("train", "train_token2text", "train_preference_model", "inference", "evaluation", "sample_preferences")


def test_denormal_numbers_are_0_and_cudnn_gives_no_attention():
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_flush_denormal(False)
    assert (torch.full((8,), 1e-30) * 1e-10).all()
    set_up_arithmetic()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not (torch.full((8,), 1e-30) * 1e-10).any()


@pytest.mark.parametrize("script", [*SCRIPTS, "tiny/build", "tiny/build", "benchmarks/gradient_noise"])
def test_a_script_calls_it(script):
    tree = ast.parse(Path(f"{script}.py").read_text(encoding="utf-8"))
    [main] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    assert "set_up_arithmetic" in {call.func.id for call in ast.walk(main) if _names_a_function(call)}


def _names_a_function(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
