"""Run a comparison of docs/experiments/ on the toy setup: RL data, trainings, evaluations, a table and a plot.

    python -m tiny.compare melody --output_dir runs/melody --seeds 0    # three hours; another terminal takes seed 1
    python -m tiny.compare diffro --output_dir runs/diffro              # three hours a seed on one core
    python -m tiny.compare stability --output_dir runs/diffro           # two hours a seed, beyond the runs of diffro
    python -m tiny.compare recognition --output_dir runs/recognition    # half an hour a seed

The comparisons:

    melody       GRPO with the Whisper reward, with credit in time and by rollout, and with rewards of melody
    diffro       DiffRO, GRPO and both, and their variants, over 75 steps
    stability    the four main methods of diffro over 225 steps
    recognition  GRPO for ASR, rewards and choices of RL data, against longer SFT

The held-out ASR is OpenAI's Whisper base, which `make whisper` fetches. Runs and evaluations that are complete in
--output_dir are kept, so an interrupted comparison resumes. The log of a run is beside its folder. <comparison>.md and
<comparison>.png have every checkpoint evaluated so far: mean ± standard deviation over the seeds.
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

from common.cli import HelpFormatter, bad_input_exits, check_writable, parse_strictly, run_script, set_up_logging
from common.tables import markdown_table

logger = logging.getLogger("tiny.compare")

START = "sft"  # name of the policy that every run starts from

# --- ASR --------------------------------------------------------------------------------------------------

POOL = "--dataset tiny/asr/pool.parquet --num 400"
TRANSCRIPTS = (
    "inference.py --task asr --model_name_or_path tiny/llasa_asr --dataset tiny/asr/pool.parquet "
    "--num_samples 4 --temperature 1 --batch_size 64 --max_completion_length 64"
)
HARD = "--transcripts {folder}/transcripts.jsonl"
KEYWORDS = "--keywords tiny/asr/keywords.txt"
LONG = "--longest_frac 0.15"
RL_DATA = {  # name: flags of select_rl_data.py; without non_speech the policies learn to hallucinate on it
    "d0": "--select random non_speech",
    "d02": f"--select random long non_speech {LONG}",
    "d12": f"--select hard long non_speech {LONG} {HARD}",
    "all": f"--select random hard long keywords non_speech {LONG} {HARD} {KEYWORDS}",
}
RECOGNITION = (
    "--config configs/tiny_asr.yaml --save_strategy no --sample_steps 0 --dataset {folder}/%s.parquet "
    "--reward_config reward_models/%s.json"
)


@dataclass(frozen=True)
class Metric:
    """A number of an evaluation, as a column of the table.

    Attributes:
        path: its keys in {temperature: metrics of evaluation.py}.
        scale: factor to show it by; 100 is for percent.
        digits: decimals to show.
    """

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
    "hallucinations on non-speech": Metric((0.0, "nonspeech_hallucinations")),
    "keyword recall": Metric((0.0, "keyword_recall")),
    "WER at temperature 1": Metric((1.0, "all", "wer")),
}

# --- Text to speech ---------------------------------------------------------------------------------------

TTS = "--config configs/%s.yaml --credit %s --max_steps %d --save_steps 75 --sample_steps 0 "
TTS_EVALUATION = (
    "--texts tiny/texts/heldout.txt --max_length 240 --batch_size 60 --temperature 1.0 --seeds 0 --num_players 120 "
    "--judge tiny/whisper.pt faster-whisper:build/whisper-base --token2text tiny/token2text"
)
HELDOUT_WER = "WER, held-out ASR"  # OpenAI's Whisper base, which no reward uses
REWARD_WER = "WER, reward ASR"
WORDS_METRICS = {
    HELDOUT_WER: Metric((1.0, "asr", "faster-whisper:build/whisper-base", "error_rate")),
    REWARD_WER: Metric((1.0, "asr", "tiny/whisper.pt", "error_rate")),
}
DIFFRO_METRICS = {
    **WORDS_METRICS,
    "token-to-text score": Metric((1.0, "token2text"), scale=1, digits=2),
    "duration, s": Metric((1.0, "duration_s"), scale=1, digits=2),
    "log-F0 std": Metric((1.0, "log_f0_std"), scale=1, digits=3),
    "truncated": Metric((1.0, "truncated")),
}
MELODY_METRICS = {
    **WORDS_METRICS,
    "questions that rise": Metric((1.0, "question", "mean")),
    "statements that rise": Metric((1.0, "statement_rise", "mean")),
    "emphasis": Metric((1.0, "emphasis", "mean")),
    "F0 movement, st": Metric((1.0, "f0_range_st", "mean"), scale=1, digits=2),
    "duration, s": Metric((1.0, "duration_s"), scale=1, digits=2),
}


ONE_DRAW = "--token2text tiny/token2text --gumbel_temperature 2"
EIGHT_DRAWS = f"{ONE_DRAW} --gumbel_draws 8"  # a single draw's is mostly noise
DIFFRO_ALONE = "--method diffro --reward_config reward_models/token2text.json"  # needs neither codec nor Whisper
KL = "--beta 0.1"  # the papers'; configs/tiny.yaml has 0
FILTERED = f"--method grpo+diffro {EIGHT_DRAWS} --diffro_filter clean"
DIFFRO_METHODS = {
    "grpo": "--method grpo",
    "diffro": f"{DIFFRO_ALONE} {EIGHT_DRAWS} --diffro_filter clean {KL}",
    "combined": f"--method grpo+diffro {EIGHT_DRAWS} --diffro_filter none",
    "filtered": FILTERED,
}
DIFFRO_VARIANTS = {
    "grpo_kl": f"--method grpo {KL}",
    "filtered_kl": f"{FILTERED} {KL}",
    "diffro_no_kl": f"{DIFFRO_ALONE} {EIGHT_DRAWS} --diffro_filter clean",
    "published": f"{DIFFRO_ALONE} {ONE_DRAW} --diffro_filter none {KL}",
    "published_no_kl": f"{DIFFRO_ALONE} {ONE_DRAW} --diffro_filter none",
    "filtered_r2": f"{FILTERED} --reward_config reward_models/duration.json",
    "filtered_r23": f"{FILTERED} --reward_config reward_models/duration_diversity.json",
}


def diffro_runs(steps: int, methods: dict[str, str]) -> dict[str, str]:
    """Credit is by rollout, since DiffRO's own is."""
    return {name: TTS % ("tiny", "rollout", steps) + flags for name, flags in methods.items()}


@dataclass(frozen=True)
class Comparison:
    """Trainings and their evaluation.

    Attributes:
        policy: the checkpoint that every run starts from.
        runs: name -> flags of train.py; {folder} is --output_dir.
        evaluation: flags of evaluation.py.
        metrics: columns of the table.
        plotted: those of them to plot.
        checkpoints: steps to evaluate; without any, the end of the training.
        rl_data: names in RL_DATA of the data sets that the runs need.
    """

    policy: str
    runs: dict[str, str]
    evaluation: str
    metrics: dict[str, Metric]
    plotted: tuple[str, ...]
    checkpoints: tuple[int, ...] = ()
    rl_data: tuple[str, ...] = ()


DIFFRO_PLOTTED = (HELDOUT_WER, REWARD_WER, "token-to-text score", "truncated")
COMPARISONS = {
    "melody": Comparison(
        policy="tiny/llasa",
        runs={
            "wer_nll_time": TTS % ("tiny", "time", 225),
            "wer_nll_rollout": TTS % ("tiny", "rollout", 225),
            "melody_time": TTS % ("tiny_expressive", "time", 225),
        },
        evaluation=TTS_EVALUATION,
        metrics=MELODY_METRICS,
        plotted=(HELDOUT_WER, "questions that rise", "statements that rise", "emphasis"),
        checkpoints=(75, 150, 225),
    ),
    "diffro": Comparison(
        policy="tiny/llasa",
        runs=diffro_runs(75, DIFFRO_METHODS | DIFFRO_VARIANTS),
        evaluation=TTS_EVALUATION,
        metrics=DIFFRO_METRICS,
        plotted=DIFFRO_PLOTTED,
        checkpoints=(75,),
    ),
    "stability": Comparison(
        policy="tiny/llasa",
        runs=diffro_runs(225, DIFFRO_METHODS),
        evaluation=TTS_EVALUATION,
        metrics=DIFFRO_METRICS,
        plotted=DIFFRO_PLOTTED,
        checkpoints=(75, 150, 225),
    ),
    "recognition": Comparison(
        policy="tiny/llasa_asr",
        runs={
            # On all clips that RL picks from, with their texts; 240 steps take 7 minutes, an RL run 3 to 5
            "sft_longer": "--method sft --task asr --model_name_or_path tiny/llasa_asr "
            "--dataset tiny/asr/pool.parquet --max_length 512 --max_steps 240 --per_device_train_batch_size 16 "
            "--learning_rate 3e-4 --gradient_checkpointing false --train_sampling_strategy group_by_length "
            "--save_strategy no",
            "r1_d0": RECOGNITION % ("d0", "asr_wer"),
            "r12_d0": RECOGNITION % ("d0", "asr_wer_hallucination"),
            "r12_d02": RECOGNITION % ("d02", "asr_wer_hallucination"),
            "r12_d12": RECOGNITION % ("d12", "asr_wer_hallucination"),
            "r123_all": RECOGNITION % ("all", "asr_rules"),
        },
        evaluation="--task asr --clips tiny/asr/heldout.parquet --long_s 3.2 --temperature 0 1 --seeds 0 1 2 "
        "--batch_size 64 --max_length 512 --max_completion_length 64",
        metrics=RECOGNITION_METRICS,
        plotted=("all: WER", "short: WER", "long: WER", "keyword recall"),
        rl_data=tuple(RL_DATA),
    ),
}

# --- Running ----------------------------------------------------------------------------------------------


def run(log: Path, command: str, *more: str) -> None:
    """Run a script of the project, with its output in `log`; RuntimeError if it fails."""
    logger.info("%s: %s", log, command.split()[0])
    with log.open("a") as output:
        argv = [sys.executable, *shlex.split(command), *more]
        if subprocess.run(argv, stdout=output, stderr=subprocess.STDOUT).returncode:
            raise RuntimeError(f"{command.split()[0]}: failed. See {log}")


def select_data(comparison: Comparison, folder: Path) -> None:
    """Write the RL data, which is the same for all seeds."""
    transcripts = folder / "transcripts.jsonl"
    if comparison.rl_data and not transcripts.exists():
        run(folder / "data.log", TRANSCRIPTS, "--output", str(transcripts))
    for name in comparison.rl_data:
        rows = folder / f"{name}.parquet"
        if not rows.exists():
            flags = RL_DATA[name].format(folder=folder)
            run(folder / "data.log", f"select_rl_data.py {POOL} {flags}", "--output", str(rows))


def log_history(trained: Path) -> list[dict]:
    """The log of a run that is complete; empty for any other."""
    state = trained / "trainer_state.json"
    return json.loads(state.read_text())["log_history"] if state.exists() else []


def train_run(folder: Path, name: str, flags: str, seed: int) -> None:
    """Train, unless that is done; resume from the last checkpoint where there is one."""
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
    """(run, step) -> for each seed the metrics by temperature; the policy before training is (START, 0)."""
    results = {(START, 0): [evaluate(comparison, folder, START, comparison.policy)]}
    for name in comparison.runs:
        for seed in seeds:
            trained = folder / f"{name}_{seed}"
            for step in comparison.checkpoints:
                checkpoint = trained / f"checkpoint-{step}"
                if checkpoint.is_dir():
                    metrics = evaluate(comparison, folder, f"{trained.name}@{step}", checkpoint)
                    results.setdefault((name, step), []).append(metrics)
            if not comparison.checkpoints and log_history(trained):
                last = log_history(trained)[-1]["step"]
                results.setdefault((name, last), []).append(evaluate(comparison, folder, trained.name, trained))
    return results


# --- Table and plot ---------------------------------------------------------------------------------------


def mean_and_deviation(values: list[float | None], digits: int) -> str:
    """ "mean ± standard deviation"; the mean alone of one value, a dash of none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}"


def seconds_a_step(folder: Path, name: str, seeds: list[int]) -> float | None:
    """Median over all steps of all seeds; None without a complete run."""
    entries = [entry for seed in seeds for entry in log_history(folder / f"{name}_{seed}")]
    times = [entry["step_time"] for entry in entries if "step_time" in entry]
    return statistics.median(times) if times else None


def table(
    results: dict[tuple[str, int], list[dict]],
    metrics: dict[str, Metric],
    step_times: dict[str, float | None],
) -> str:
    """In Markdown, a row for each run and step."""
    rows = []
    for (name, step), seeds in results.items():
        cells = [mean_and_deviation([metric(seed) for seed in seeds], metric.digits) for metric in metrics.values()]
        time = step_times.get(name)
        rows.append([name, step, len(seeds), *cells, "–" if time is None else f"{time:.1f}"])
    header = [f"{column}, %" if metric.scale == 100 else column for column, metric in metrics.items()]
    return markdown_table(["run", "step", "seeds", *header, "s/step"], rows)


def plot(results: dict[tuple[str, int], list[dict]], metrics: dict[str, Metric], path: Path) -> None:
    """A panel for each metric: a dot for each seed and a bar at their mean; over the steps, where runs have several."""
    import matplotlib.pyplot as plt  # slow to import

    runs = list(dict.fromkeys(name for name, _ in results if name != START))
    steps = {run: sorted(step for name, step in results if name == run) for run in runs}
    over_steps = any(len(of_run) > 1 for of_run in steps.values())
    figure, axes = plt.subplots(1, len(metrics), figsize=(3.8 * len(metrics), 3.8))
    for axis, (column, metric) in zip(axes, metrics.items(), strict=True):
        before = metric(results[START, 0][0])
        axis.axhline(before, color="gray", linewidth=0.8, linestyle=":")
        for number, run in enumerate(runs):
            values = [[metric(seed) for seed in results[run, step]] for step in steps[run]]  # of each seed by step
            means = [statistics.mean(seeds) for seeds in values]
            at = steps[run] if over_steps else [number]
            for x, seeds in zip(at, values, strict=True):
                axis.plot([x] * len(seeds), seeds, "o", color=f"C{number}", markersize=4, alpha=0.6)
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
    set_up_logging("tiny", timestamps=True)
    folder, comparison = Path(args.output_dir), COMPARISONS[args.comparison]
    with bad_input_exits():
        check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    select_data(comparison, folder)
    for seed in args.seeds:
        for name, flags in comparison.runs.items():
            train_run(folder, name, flags, seed)
    results = evaluated(comparison, folder, args.seeds)
    step_times = {name: seconds_a_step(folder, name, args.seeds) for name in comparison.runs}
    text = table(results, comparison.metrics, step_times)
    (folder / f"{args.comparison}.md").write_text(text + "\n")
    plotted = {column: comparison.metrics[column] for column in comparison.plotted}
    plot(results, plotted, folder / f"{args.comparison}.png")
    logger.info("%s/%s.md and .png\n\n%s", folder, args.comparison, text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tiny.compare", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS, help="name of the comparison")
    parser.add_argument("--output_dir", required=True, help="folder of the runs, evaluations, table and plot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds of the trainings")
    return parse_strictly(parser, argv)


if __name__ == "__main__":
    run_script(main, parse_args)
