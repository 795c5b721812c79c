"""tiny/build.py: the flags of the scripts that it calls exist."""

import pytest
import yaml

import train
import train_token2text
from tiny import build


def test_flags_of_the_rounds_exist():
    config = "configs/tiny_sft.yaml"
    settings = yaml.safe_load(open(config))
    for flags in build.POLICY_ROUNDS:
        script_args, training_args, _ = train.parse_args(["--config", config, *flags.split()])
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
