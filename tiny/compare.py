"""The comparisons of RESULTS.md on the small world, a command each: data, trainings, evaluations, a table and a plot.

    python -m tiny.compare grpo --output_dir runs/grpo                   # four hours on one core
    python -m tiny.compare recognition --output_dir runs/recognition     # two and a half hours
    python -m tiny.compare diffro --output_dir runs/diffro --seeds 0     # two hours; another terminal takes seed 1
    python -m tiny.compare stability --output_dir runs/diffro --seeds 0  # four of them three times as long: an hour

What is there already is kept, so a comparison that was stopped goes on. Each run has its log beside its folder;
<comparison>.md and .png in the folder hold whatever is evaluated by then: mean ± standard deviation over the seeds.
"""

import argparse
import json
import logging
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common.cli import HelpFormatter, bad_input_exits, check_writable, parse_strictly

logger = logging.getLogger("tiny.compare")

BEFORE = "sft"  # the policy that every run starts from, before training

# --- Recognition ------------------------------------------------------------------------------------------

POOL = "--dataset tiny/asr/pool.parquet --num 400"
TRANSCRIPTS = (
    "inference.py --task asr --model_name_or_path tiny/llasa_asr --dataset tiny/asr/pool.parquet --num_samples 4 "
    "--temperature 1 --batch_size 64 --max_completion_length 64"
)
HARD, LONG = "--transcripts {folder}/transcripts.jsonl", "--longest_share 0.15"
RL_DATA = {  # name: flags of select_rl_data.py; "nothing" keeps a policy from making up words
    "d0": "--select random nothing",
    "d02": f"--select random long nothing {LONG}",
    "d12": f"--select hard long nothing {LONG} {HARD}",
    "all": f"--select random hard long keywords nothing {LONG} {HARD} --keywords tiny/asr/keywords.txt",
}
RECOGNITION = "--config configs/tiny_asr.yaml --save_strategy no --sample_steps 0 --dataset {folder}/%s.parquet"
RECOGNITION += " --reward_config reward_models/%s.json"


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation: `path` leads to it from {temperature: metrics}; it is shown times `scale`."""

    path: tuple
    scale: float = 100.0
    digits: int = 1

    def __call__(self, rows: dict[float, dict]) -> float | None:
        value = rows
        for key in self.path:
            value = value[key]
        return None if value is None else self.scale * value


RECOGNITION_METRICS = {
    **{
        f"{part}: {name}": Metric((0.0, part, key))
        for part in ("all", "short", "long")
        for name, key in (("WER", "wer"), ("ins", "insertions"), ("del", "deletions"))
    },
    "hallucinations": Metric((0.0, "all", "hallucinations")),
    "words where nothing is said": Metric((0.0, "nothing_with_words")),
    "keyword recall": Metric((0.0, "keyword_recall")),
    "WER at temperature 1": Metric((1.0, "all", "wer")),
}

# --- DiffRO -----------------------------------------------------------------------------------------------

READER = "--token2text tiny/token2text --gumbel_temperature 2"
DRAWS = f"{READER} --gumbel_draws 8"  # a single draw is mostly noise
ALONE = "--method diffro --reward_config reward_models/token2text.json"  # neither codec nor Whisper
KL = "--beta 0.1"  # the papers'; configs/tiny.yaml has 0
DIFFRO_METHODS = {
    "grpo": "--method grpo",
    "diffro": f"{ALONE} {DRAWS} --diffro_filter clean {KL}",
    "combined": f"--method grpo+diffro {DRAWS} --diffro_filter none",
    "filtered": f"--method grpo+diffro {DRAWS} --diffro_filter clean",
}
FILTERED = DIFFRO_METHODS["filtered"]
SPEECH = "--config configs/tiny.yaml --save_steps 50 --sample_steps 0 --max_steps %d "
SPEECH_EVALUATION = (
    "--texts tiny/texts/heldout.txt --max_length 160 --batch_size 50 --temperature 1.0 --seeds 0 1 2 "
    "--judge tiny/whisper.pt pocketsphinx --token2text tiny/token2text"
)
SPEECH_METRICS = {
    "WER by pocketsphinx": Metric((1.0, "judges", "pocketsphinx", "error_rate")),
    "WER by the reward's ASR": Metric((1.0, "judges", "tiny/whisper.pt", "error_rate")),
    "token-to-text score": Metric((1.0, "token2text"), scale=1, digits=2),
    "seconds": Metric((1.0, "duration_s"), scale=1, digits=2),
    "log-F0 spread": Metric((1.0, "log_f0_std"), scale=1, digits=3),
    "truncated": Metric((1.0, "truncated")),
}


@dataclass(frozen=True)
class Comparison:
    """What is trained, and how it is judged.

    Attributes:
        policy: where every run starts.
        runs: name -> flags of train.py; {folder} is --output_dir's.
        evaluation: flags of evaluation.py.
        metrics: the table's columns.
        plotted: columns to draw.
        checkpoints: steps to evaluate; the end if there are none.
        rl_data: which of RL_DATA the runs need.
    """

    policy: str
    runs: dict[str, str]
    evaluation: str
    metrics: dict[str, Metric]
    plotted: tuple[str, ...]
    checkpoints: tuple[int, ...] = ()
    rl_data: tuple[str, ...] = ()


SPEECH_PLOTTED = ("WER by pocketsphinx", "WER by the reward's ASR", "token-to-text score", "truncated")
COMPARISONS = {
    "grpo": Comparison(
        policy="tiny/llasa",
        runs={"grpo": "--config configs/tiny_long.yaml --save_steps 75 --sample_steps 0"},
        evaluation=SPEECH_EVALUATION,
        metrics=SPEECH_METRICS,
        plotted=("WER by pocketsphinx", "WER by the reward's ASR", "seconds", "truncated"),
        checkpoints=(75, 150, 300, 400),
    ),
    "recognition": Comparison(
        policy="tiny/llasa_asr",
        runs={
            # 480 steps take as long as the RL runs
            "sft_longer": "--config configs/tiny_asr_sft.yaml --task asr --model_name_or_path tiny/llasa_asr "
            "--learning_rate 5e-4 --max_steps 480",
            "r1_d0": RECOGNITION % ("d0", "asr_wer"),
            "r12_d0": RECOGNITION % ("d0", "asr_wer_hallucination"),
            "r12_d02": RECOGNITION % ("d02", "asr_wer_hallucination"),
            "r12_d12": RECOGNITION % ("d12", "asr_wer_hallucination"),
            "r123_all": RECOGNITION % ("all", "asr_rules"),
        },
        evaluation="--task asr --clips tiny/asr/heldout.parquet --long_s 3 --temperature 0 1 --seeds 0 --batch_size 64 "
        "--max_length 512 --max_completion_length 64",
        metrics=RECOGNITION_METRICS,
        plotted=("all: WER", "short: WER", "long: WER", "words where nothing is said"),
        rl_data=tuple(RL_DATA),
    ),
    "diffro": Comparison(
        policy="tiny/llasa",
        runs={
            **{name: SPEECH % 50 + flags for name, flags in DIFFRO_METHODS.items()},
            "grpo_kl": SPEECH % 50 + f"{DIFFRO_METHODS['grpo']} {KL}",
            "filtered_kl": SPEECH % 50 + f"{FILTERED} {KL}",
            "diffro_no_kl": SPEECH % 50 + f"{ALONE} {DRAWS} --diffro_filter clean",
            "published": SPEECH % 50 + f"{ALONE} {READER} --diffro_filter none {KL}",
            "published_no_kl": SPEECH % 50 + f"{ALONE} {READER} --diffro_filter none",
            "filtered_r2": SPEECH % 50 + f"{FILTERED} --reward_config reward_models/duration.json",
            "filtered_r23": SPEECH % 50 + f"{FILTERED} --reward_config reward_models/duration_diversity.json",
        },
        evaluation=SPEECH_EVALUATION,
        metrics=SPEECH_METRICS,
        plotted=SPEECH_PLOTTED,
        checkpoints=(50,),
    ),
    "stability": Comparison(
        policy="tiny/llasa",
        runs={name: SPEECH % 150 + flags for name, flags in DIFFRO_METHODS.items()},
        evaluation=SPEECH_EVALUATION,
        metrics=SPEECH_METRICS,
        plotted=SPEECH_PLOTTED,
        checkpoints=(50, 100, 150),
    ),
}

# --- Running ----------------------------------------------------------------------------------------------


def run(log: Path, command: str, *more: str) -> None:
    """A script of the project, its output in `log`; RuntimeError if it fails."""
    with log.open("a") as output:
        argv = [sys.executable, *shlex.split(command), *more]
        if subprocess.run(argv, stdout=output, stderr=subprocess.STDOUT).returncode:
            raise RuntimeError(f"{command.split()[0]} failed, {log} says why")


def select_data(comparison: Comparison, folder: Path) -> None:
    """RL data, the same for all seeds."""
    transcripts = folder / "transcripts.jsonl"
    if comparison.rl_data and not transcripts.exists():
        run(folder / "data.log", TRANSCRIPTS, "--output", str(transcripts))
    for name in comparison.rl_data:
        rows = folder / f"{name}.parquet"
        if not rows.exists():
            flags = RL_DATA[name].format(folder=folder)
            run(folder / "data.log", f"select_rl_data.py {POOL} {flags}", "--output", str(rows))


def log_history(trained: Path) -> list[dict]:
    """Of a run's end; empty if it has not come there."""
    state = trained / "trainer_state.json"
    return json.loads(state.read_text())["log_history"] if state.exists() else []


def train_run(folder: Path, name: str, flags: str, seed: int) -> None:
    trained = folder / f"{name}_{seed}"
    words = flags.split()
    wanted = int(words[words.index("--max_steps") + 1]) if "--max_steps" in words else 1
    if any(entry["step"] >= wanted for entry in log_history(trained)):
        return
    more = ["--seed", str(seed), "--output_dir", str(trained)]
    if "--save_strategy" not in words:
        more += ["--resume_from_checkpoint", "true"]
    run(folder / f"{name}_{seed}.log", f"train.py {flags.format(folder=folder)}", *more)


def evaluate(comparison: Comparison, folder: Path, name: str, path: Path | str) -> dict[float, dict]:
    """Metrics by temperature of the checkpoint at `path`."""
    done = folder / "evaluations" / name
    if not done.exists():
        begun = done.with_name(f"{name}.part")  # evaluation.py writes its results row by row
        begun.mkdir(parents=True, exist_ok=True)
        flags = f"evaluation.py {comparison.evaluation} --output_dir"
        run(done.with_name(f"{name}.log"), flags, str(begun), "--models", f"model={path}")
        begun.rename(done)
    results = done / "results.json"
    return {row["temperature"]: row["metrics"] for row in json.loads(results.read_text())["rows"]}


def evaluated(comparison: Comparison, folder: Path, seeds: list[int]) -> dict[tuple[str, int], list[dict]]:
    """(run, step) -> for each seed the metrics by temperature; the policy before training is (BEFORE, 0)."""
    found = {(BEFORE, 0): [evaluate(comparison, folder, BEFORE, comparison.policy)]}
    for name in comparison.runs:
        for seed in seeds:
            trained = folder / f"{name}_{seed}"
            for step in comparison.checkpoints:
                checkpoint = trained / f"checkpoint-{step}"
                if checkpoint.is_dir():
                    metrics = evaluate(comparison, folder, f"{trained.name}@{step}", checkpoint)
                    found.setdefault((name, step), []).append(metrics)
            if not comparison.checkpoints and log_history(trained):
                last = log_history(trained)[-1]["step"]
                found.setdefault((name, last), []).append(evaluate(comparison, folder, trained.name, trained))
    return found


# --- Table and plot ---------------------------------------------------------------------------------------


def mean_and_deviation(values: list[float | None], digits: int) -> str:
    """Of one value no deviation is known; a dash where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}"


def seconds_a_step(folder: Path, name: str, seeds: list[int]) -> float | None:
    """Median over all steps of all seeds."""
    times = [e["step_time"] for seed in seeds for e in log_history(folder / f"{name}_{seed}") if "step_time" in e]
    return statistics.median(times) if times else None


def table(
    found: dict[tuple[str, int], list[dict]],
    metrics: dict[str, Metric],
    step_times: dict[str, float | None],
) -> str:
    """In Markdown, a row for each run and step."""
    columns = {
        column: [mean_and_deviation([metric(one) for one in of_seeds], metric.digits) for of_seeds in found.values()]
        for column, metric in metrics.items()
    }
    lines = [["", "step", "runs", *columns, "seconds a step"], ["---"] * (len(columns) + 4)]
    for i, ((name, step), of_seeds) in enumerate(found.items()):
        time = step_times.get(name)
        cells = [column[i] for column in columns.values()]
        lines.append([name, str(step), str(len(of_seeds)), *cells, "–" if time is None else f"{time:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plot(found: dict[tuple[str, int], list[dict]], metrics: dict[str, Metric], path: Path) -> None:
    """Each metric of each run, a dot a seed and a bar at their mean; over the steps, where runs have several."""
    import matplotlib.pyplot as plt  # slow to import

    runs = list(dict.fromkeys(name for name, _ in found if name != BEFORE))
    steps = {run: sorted(step for name, step in found if name == run) for run in runs}
    over_steps = any(len(of_run) > 1 for of_run in steps.values())
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.8 * len(metrics), 3.8))
    for axis, (column, metric) in zip(axes, metrics.items(), strict=True):
        before = metric(found[BEFORE, 0][0])
        axis.axhline(before, color="gray", linewidth=0.8, linestyle=":")
        for number, run in enumerate(runs):
            values = [[metric(one) for one in found[run, step]] for step in steps[run]]
            means = [statistics.mean(of_seeds) for of_seeds in values]
            at = steps[run] if over_steps else [number]
            for x, of_seeds in zip(at, values, strict=True):
                axis.plot([x] * len(of_seeds), of_seeds, "o", color=f"C{number}", markersize=4, alpha=0.6)
            if over_steps:
                axis.plot([0, *at], [before, *means], color=f"C{number}", label=run)
            else:
                axis.plot(at, means, "_", color=f"C{number}", markersize=20)
        axis.set_title(f"{column}, %" if metric.scale == 100 else column, fontsize=10)
        if over_steps:
            axis.set_xlabel("step", fontsize=8)
        else:
            axis.set_xticks(range(len(runs)), runs, rotation=40, ha="right", fontsize=8)
    if over_steps:
        axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# --- The script -------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(format="%(name)s: %(message)s")
    logger.setLevel(logging.INFO)
    folder, comparison = Path(args.output_dir), COMPARISONS[args.comparison]
    with bad_input_exits():
        check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    select_data(comparison, folder)
    for seed in args.seeds:
        for name, flags in tqdm(comparison.runs.items(), desc=f"seed {seed}"):
            train_run(folder, name, flags, seed)
    found = evaluated(comparison, folder, args.seeds)
    step_times = {name: seconds_a_step(folder, name, args.seeds) for name in comparison.runs}
    text = table(found, comparison.metrics, step_times)
    (folder / f"{args.comparison}.md").write_text(text)
    plotted = {column: comparison.metrics[column] for column in comparison.plotted}
    plot(found, plotted, folder / f"{args.comparison}.png")
    logger.info("%s/%s.md and .png\n\n%s", folder, args.comparison, text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    parser.add_argument("--output_dir", required=True, help="folder of runs, evaluations, table and plot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trainings")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    main(parse_args())
