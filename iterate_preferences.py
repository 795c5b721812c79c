"""Iterative DPO by one command: sample, judge, train; then again from the policy that came out.

    python iterate_preferences.py --model_name_or_path tiny/llasa --dataset tiny/texts/train.jsonl --num_texts 200 \\
      --rounds 2 --sample "--max_completion_length 160" --train "--num_train_epochs 2 --learning_rate 1e-4" \\
      --evaluate "--texts tiny/texts/heldout.txt --max_length 240 --judge tiny/whisper.pt" --output_dir runs/iterative

It runs the scripts that one would run by hand, each in a process of its own, and logs their commands:

    sample_preferences.py     scores rollouts of the round's policy by a reward config     → round_1/pairs.jsonl
      or, with --judge,       clips of the round's policy by inference.py                  → round_1/clips
      judge_preferences.py    judged by an audio model                                     → round_1/pairs.jsonl
    train.py --method dpo     trains the round's policy, which is also its reference       → round_1/policy
    evaluation.py             with --evaluate, of the start and of each round's policy     → round_1/evaluation

Their flags are given in quotation marks: --sample (of sample_preferences.py; with --judge of inference.py), --judge,
--train and --evaluate. Round r draws and samples with --seed + r − 1, so each has texts of its own. results.json and
results.md hold a line for each round.

An interrupted run is resumed by the same command, at the step that it was at. More --rounds may be asked for later.
"""

import argparse
import importlib
import json
import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.cli import (
    HelpFormatter,
    InputError,
    bad_input_exits,
    check_at_least,
    check_ranges,
    check_seed,
    check_writable,
    parse_strictly,
    run_script,
    set_up_logging,
    settings_of,
    show_tracebacks,
    write_whole_text,
)
from metrics.preference_answers import report_path
from speech.adapters import ADAPTER_CONFIG

ROOT = Path(__file__).parent
# Arguments that do not change what a round is: a resumed run may have other values of them
FREE_ARGUMENTS = ("output_dir", "overwrite", "debug", "rounds", "min_planted")

logger = logging.getLogger("iterate_preferences")


# --- Steps ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One script's part of a round.

    Attributes:
        name: the folder or file that it makes, such as round_1/pairs.jsonl.
        flag: ours that has the user's flags for it.
        flags: those that the loop sets.
        before: called before it.
        facts: called after it, for what is noted of it.
    """

    name: str
    script: str
    flag: str
    flags: list[str]
    before: Callable[[], None] = lambda: None
    facts: Callable[[], dict] = dict


def policy_of(args: argparse.Namespace, number: int) -> str:
    """The policy that a round ends with; that of round 0 is the start."""
    return args.model_name_or_path if number == 0 else str(Path(args.output_dir, f"round_{number}", "policy"))


def steps_of(args: argparse.Namespace, number: int) -> list[Step]:
    """The steps of a round; round 0 is the evaluation of the start."""
    steps = []
    if number > 0:
        steps = reward_steps(args, number) if args.judge is None else judge_steps(args, number)
        steps.append(training_step(args, number))
    return steps if args.evaluate is None else [*steps, evaluation_step(args, number)]


def round_flags(args: argparse.Namespace, number: int) -> list[str]:
    """What each script of a round is given that has the policy."""
    return ["--model_name_or_path", policy_of(args, number - 1), "--seed", str(args.seed + number - 1)]


def reward_steps(args: argparse.Namespace, number: int) -> list[Step]:
    name = f"round_{number}/pairs.jsonl"
    flags = [*round_flags(args, number), "--dataset", args.dataset, "--split", args.split]
    flags += [] if args.num_texts is None else ["--num_texts", str(args.num_texts)]
    flags += ["--output", str(Path(args.output_dir, name))]
    return [Step(name, "sample_preferences.py", "sample", flags)]


def judge_steps(args: argparse.Namespace, number: int) -> list[Step]:
    folder, seed = Path(args.output_dir, f"round_{number}"), args.seed + number - 1
    texts, clips, pairs = folder / "texts.txt", folder / "clips", folder / "pairs.jsonl"
    sample = [*round_flags(args, number), "--text_file", str(texts), "--num_samples", "2", "--output", str(clips)]
    judge = ["--clips", str(clips / "sample.jsonl"), "--seed", str(seed), "--output", str(pairs)]
    write = partial(write_texts, args, seed, texts)
    facts = partial(judge_facts, pairs, args.min_planted)
    return [
        Step(f"{folder.name}/clips", "inference.py", "sample", sample, before=write),
        Step(f"{folder.name}/pairs.jsonl", "judge_preferences.py", "judge", judge, facts=facts),
    ]


def training_step(args: argparse.Namespace, number: int) -> Step:
    folder = Path(args.output_dir, f"round_{number}")
    pairs, policy = folder / "pairs.jsonl", folder / "policy"
    flags = ["--method", "dpo", *round_flags(args, number), "--dataset", str(pairs), "--output_dir", str(policy)]
    flags += ["--resume_from_checkpoint", "true"]
    return Step(
        f"{folder.name}/policy",
        "train.py",
        "train",
        flags,
        before=partial(remove_weights, policy),
        facts=partial(training_facts, pairs, policy),
    )


def evaluation_step(args: argparse.Namespace, number: int) -> Step:
    name = f"round_{number}/evaluation"
    folder = Path(args.output_dir, name)
    flags = ["--models", f"round_{number}={policy_of(args, number)}", "--output_dir", str(folder)]
    return Step(name, "evaluation.py", "evaluate", flags, facts=partial(evaluation_facts, folder))


def flags_of(args: argparse.Namespace, step: Step) -> list[str]:
    """All flags of a step, the user's included; InputError for those that the loop sets itself."""
    given = getattr(args, step.flag) or ""
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise InputError(f"--{step.flag}: {error} (got {given!r}). Close each quotation mark") from error
    taken = [flag for flag in (word.split("=")[0] for word in words) if flag.startswith("--") and flag in step.flags]
    if taken:
        raise InputError(f"--{step.flag}: the loop sets {taken[0]} of {step.script} itself. Leave it out (see --help)")
    if step.flag == "train":
        start = step.flags[step.flags.index("--model_name_or_path") + 1]
        if Path(start, ADAPTER_CONFIG).is_file():
            words += ["--use_peft", "false"]  # from the second round on: the adapter is there, and is trained further
    return [*step.flags, *words]


def check_step(args: argparse.Namespace, step: Step) -> None:
    """InputError where the step's script refuses its flags: before an hour's work, not after it."""
    module = importlib.import_module(step.script.removesuffix(".py"))
    flags = flags_of(args, step)
    try:
        arguments = module.parse_args(flags)
    except SystemExit as stop:
        raise InputError(f"--{step.flag}: {step.script} does not take these flags, as it says above") from stop
    if hasattr(module, "check_args"):
        module.check_args(arguments)


def run_step(args: argparse.Namespace, step: Step) -> dict:
    """Run a step to its end, and return its facts; exits with the code of a script that fails."""
    flags = flags_of(args, step)
    logger.info("%s: python %s %s", step.name, step.script, shlex.join(flags))
    step.before()
    code = run_process(step.script, flags)
    if code:
        ended = f"{step.script} ended with exit code {code}" if code > 0 else f"{step.script} was killed"
        logger.error("%s: %s, see above. The same command resumes here", step.name, ended)
        sys.exit(max(code, 1))
    return {"step": step.name, **step.facts()}


def run_process(script: str, flags: list[str]) -> int:
    """In a process of its own: its models leave the GPU with it. SIGTERM ends both, or the step would go on alone and
    write into the same folder as the run that resumes.
    """
    environment = dict(os.environ)
    if script == "train.py":  # TRL trains on one of several GPUs only where it sees no other
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return subprocess.run([sys.executable, str(ROOT / script), *flags], env=environment).returncode
    finally:
        signal.signal(signal.SIGTERM, before)


# --- What a step needs and leaves -------------------------------------------------------------------------


def drawn_texts(args: argparse.Namespace, seed: int) -> list[str]:
    """--num_texts texts of --dataset, each on one line, for inference.py."""
    from common.dataset_io import check_texts, drawn_rows, load_any_dataset

    dataset = load_any_dataset(args.dataset, args.split)
    check_texts(dataset, "text", args.dataset)
    if "ref_codes" in dataset.column_names and any(dataset["ref_codes"]):
        raise InputError(f"--dataset {args.dataset}: has voice prompts, which --judge does not take. Drop ref_codes")
    return [" ".join(text.split()) for text in dataset.select(drawn_rows(len(dataset), args.num_texts, seed))["text"]]


def write_texts(args: argparse.Namespace, seed: int, path: Path) -> None:
    lines = "".join(f"{text}\n" for text in drawn_texts(args, seed))
    write_whole_text(path, lines)


def remove_weights(policy: Path) -> None:
    """Of a training that was interrupted as it ended: train.py would take them for another run's."""
    from training.checkpoints import TRAINED_WEIGHTS

    for name in TRAINED_WEIGHTS:
        (policy / name).unlink(missing_ok=True)


def training_facts(pairs: Path, policy: Path) -> dict:
    log = json.loads((policy / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    with pairs.open(encoding="utf-8") as file:
        return {"pairs": sum(1 for _ in file), **last_epoch(log)}


def last_epoch(log: list[dict]) -> dict:
    """Mean accuracy and margin of the training pairs over the logged steps of the last epoch; {} where none was.

    >>> log = [{"epoch": e, "rewards/accuracies": a, "rewards/margins": 0.5} for e, a in ((1, 0), (1.5, 0.5), (2, 1))]
    >>> last_epoch([*log, {"epoch": 2, "train_runtime": 1}])
    {'accuracy': 0.75, 'margin': 0.5}
    """
    steps = [entry for entry in log if "rewards/accuracies" in entry]
    if not steps:  # --logging_steps was more than there were
        return {}
    first = math.ceil(steps[-1]["epoch"]) - 1
    steps = [entry for entry in steps if entry["epoch"] > first]
    names = {"accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    return {ours: sum(entry[name] for entry in steps) / len(steps) for ours, name in names.items()}


def judge_facts(pairs: Path, min_planted: float) -> dict:
    """Raises InputError for a judge whose pairs are not to be trained on unheard."""
    report = json.loads(report_path(pairs).read_text(encoding="utf-8"))
    facts = {name: report[name] for name in ("consistency", "planted", "planted_right", "cost")}
    if facts["planted_right"] < min_planted * facts["planted"]:
        raise InputError(
            f"{pairs}: the judge has {facts['planted_right']} of {facts['planted']} planted pairs right, too few to "
            "train on its pairs. Use another judge or question in another --output_dir; or listen to the pairs, and if "
            "they are right go on with a lower --min_planted"
        )
    return facts


def evaluation_facts(folder: Path) -> dict:
    """Error rates by each evaluation ASR, with their 95 % intervals."""
    [row] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"][:1]
    rates = {asr: metrics for asr, metrics in row["metrics"]["asr"].items() if metrics}
    return {"error_rates": {asr: [rate["error_rate"], rate["interval"]] for asr, rate in rates.items()}}


# --- The loop ---------------------------------------------------------------------------------------------


def table_of(done: list[dict]) -> list[list[str]]:
    """Header and a line for each round, from the facts of the steps that are done."""
    from metrics.formatting import number, percent, percent_interval

    rounds: dict[str, dict] = {}
    for step in done:
        rounds.setdefault(step["step"].split("/")[0], {}).update(step)
    asrs = list(dict.fromkeys(asr for facts in rounds.values() for asr in facts.get("error_rates", {})))
    table = [["", "pairs", "consistency", "planted right", "pair accuracy", "margin", *(f"WER, {asr}" for asr in asrs)]]
    for name, facts in rounds.items():
        line = ["start" if name == "round_0" else name, str(facts.get("pairs", "–"))]
        planted = f"{facts['planted_right']} of {facts['planted']}" if facts.get("planted") else "–"
        line += [percent(facts.get("consistency")), planted]
        line += [percent(facts.get("accuracy")), number(facts.get("margin"))]
        for asr in asrs:
            rate, interval = facts.get("error_rates", {}).get(asr, (None, None))
            line.append(percent(rate) if rate is None else f"{percent(rate)} {percent_interval(interval)}")
        table.append(line)
    return table


def write_results(folder: Path, results: dict) -> None:
    """results.json, from which the run resumes, and results.md."""
    from common.tables import markdown_table

    header, *rows = table_of(results["rows"])
    command = shlex.join(results["argv"])
    contents = {
        "results.md": f"    {command}\n\n{markdown_table(header, rows)}\n",
        "results.json": json.dumps(results, ensure_ascii=False, indent=1) + "\n",
    }
    for name, content in contents.items():
        write_whole_text(folder / name, content)


def open_run(args: argparse.Namespace) -> dict:
    """What results.json holds of this run; InputError if it is of another one, which --overwrite deletes."""
    from common.run_record import content_digest
    from metrics.result_files import open_results

    folder = Path(args.output_dir)
    settings = settings_of(args, FREE_ARGUMENTS)
    digests = {"weights": content_digest(args.model_name_or_path), "texts": content_digest(args.dataset)}
    other = not (folder / "results.json").exists()
    try:
        results = open_results(folder, settings, digests, overwrite=False)
    except InputError:
        if not args.overwrite:
            raise
        other, results = True, open_results(folder, settings, digests, overwrite=True)
    if args.overwrite and other:  # an interrupted run of the same command, --overwrite included, keeps its own rounds
        for earlier in folder.glob("round_*"):
            shutil.rmtree(earlier)
        write_results(folder, results)  # before the first step, so that it is known whose rounds are there
    return results


def main(args: argparse.Namespace) -> dict:
    """Returns the content of results.json."""
    from metrics.comparison import aligned

    set_up_logging("iterate_preferences")
    folder = Path(args.output_dir)
    with bad_input_exits():
        check_args(args)
        check_writable(folder)
        for step in [*steps_of(args, 0), *steps_of(args, 1)]:
            check_step(args, step)
        show_tracebacks(args.debug)  # the scripts' own flags have set it
        if args.judge is not None:
            drawn_texts(args, args.seed)
        results = open_run(args)
    done = {step["step"] for step in results["rows"]}
    for number in range(args.rounds + 1):
        for step in steps_of(args, number):
            if step.name in done:
                logger.info("%s: done before", step.name)
                continue
            with bad_input_exits():
                results["rows"].append(run_step(args, step))
            write_results(folder, results)
    table = table_of(results["rows"])
    for line in aligned(table, right=range(1, len(table[0]))):
        logger.info(line)
    logger.info("%s: the policy of the last round", policy_of(args, args.rounds))
    return results


def check_args(args: argparse.Namespace) -> None:
    check_at_least(args, rounds=1, num_texts=1)
    check_ranges(args, {"min_planted": (0, True, 1, True)})
    check_seed(args.seed)
    check_seed(args.seed + args.rounds - 1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from metrics.preference_answers import MIN_PLANTED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="policy to start from: folder saved by train.py (LoRA too), Hub id")
    add("--dataset", required=True, help="texts, in any form of train.py's --dataset")
    add("--split", default="train", help="split of --dataset")
    add("--num_texts", type=int, help="so many of the texts in each round, drawn by --seed (default: all)")
    add("--rounds", type=int, default=2, help="number of rounds")
    add("--output_dir", required=True, help="folder of the rounds, results.json and results.md")
    help = "fraction of a judge's planted pairs that must be right, or its pairs are not trained on"
    add("--min_planted", type=float, default=MIN_PLANTED, help=help)
    add("--overwrite", action="store_true", help="delete the rounds of other settings in --output_dir")
    add(
        "--sample", metavar="FLAGS", help='flags of sample_preferences.py, or with --judge of inference.py: "--top_p 1"'
    )
    add("--judge", metavar="FLAGS", help="flags of judge_preferences.py; without, a reward config judges")
    add("--train", metavar="FLAGS", help="flags of train.py --method dpo")
    add("--evaluate", metavar="FLAGS", help="flags of evaluation.py, --texts among them; without, none is run")
    add("--seed", type=int, default=0, help="seed of the first round; each later one has the next")
    return parse_strictly(parser, with_values_joined(sys.argv[1:] if argv is None else argv))


def with_values_joined(argv: list[str]) -> list[str]:
    """`--train --bf16` as `--train=--bf16`: argparse takes a value for a flag if it looks like one and has no space.

    >>> with_values_joined(["--train", "--bf16", "--rounds", "2", "--sample=--top_p"])
    ['--train=--bf16', '--rounds', '2', '--sample=--top_p']
    """
    words, joined = iter(argv), []
    for word in words:
        value = next(words, None) if word in ("--sample", "--judge", "--train", "--evaluate") else None
        joined.append(word if value is None else f"{word}={value}")
    return joined


if __name__ == "__main__":
    run_script(main, parse_args)
