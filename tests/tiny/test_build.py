"""tiny/build.py: the flags of the scripts that it calls exist."""

import pytest
import yaml

import train
import train_token2text
from tiny import build


@pytest.mark.parametrize(
    "config, rounds", [("tiny_sft", build.POLICY_ROUNDS), ("tiny_multitask_sft", build.ASR_POLICY_ROUNDS)]
)
def test_flags_of_the_rounds_exist(config, rounds):
    settings = yaml.safe_load(open(f"configs/{config}.yaml"))
    for flags in rounds:
        script_args, training_args, _ = train.parse_args(["--config", f"configs/{config}.yaml", *flags.split()])
        assert script_args.method == "sft"
        assert (training_args.max_steps == settings["max_steps"]) is ("--max_steps" not in flags)


def test_flags_of_train_token2text_exist():
    args = train_token2text.parse_args(["--dataset", "rows.parquet", *build.TOKEN2TEXT_FLAGS.split()])
    assert args.num_codes == build.NUM_CODES and args.steps == 4000


def test_help_names_every_stage(capsys):
    with pytest.raises(SystemExit):
        build.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert all(f"    {stage}  " in printed for stage in build.STAGES)
