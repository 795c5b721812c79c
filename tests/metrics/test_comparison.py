"""The comparison on the terminal: which line comes first, its numbers, and its width."""

import pytest

from metrics.comparison import MAX_WIDTH, asr_comparison, shortened, speech_comparison

REWARD_WER, HELD_OUT_WER = [0.499, 0.361], [0.602, 0.505]
CHANGES = [None, {"relative": -0.161, "interval": [-0.2149, -0.104]}]


def speech_results(names: list[str], asr_roles: dict[str, str]) -> dict:
    rows = []
    for i, name in enumerate(names):
        asr = {
            asr_name: {
                "error_rate": (HELD_OUT_WER if role == "held-out" else REWARD_WER)[min(i, 1)],
                "change": CHANGES[min(i, 1)],
            }
            for asr_name, role in asr_roles.items()
        }
        metrics = {"asr": asr, "emphasis": None, "question": None}
        rows.append({"name": name, "seeds": [0, 1, 2], "metrics": metrics})
    return {"rows": rows, "asr_roles": asr_roles, "units": "words", "num_texts": 100}


ROLES = {"pocketsphinx": "held-out", "tiny/whisper.pt": "reward's ASR"}


def test_two_rows_stand_side_by_side():
    assert speech_comparison(speech_results(["before", "after"], ROLES)) == [
        "Held-out WER (3 × 100 texts)      before   after  change",
        "  pocketsphinx (held-out)         60.2 %  50.5 %  −16 % [−21, −10]",
        "  tiny/whisper.pt (reward's ASR)  49.9 %  36.1 %  −16 % [−21, −10]",
    ]


def test_melody_that_the_texts_ask_for_has_lines():
    results = speech_results(["before", "after"], ROLES)
    for row, share in zip(results["rows"], (0.25, 0.75), strict=True):
        change = {"difference": 0.5, "interval": [0.251, 0.75]} if share == 0.75 else None
        row["metrics"]["question"] = {"mean": share, "change": change}
    assert speech_comparison(results)[2:] == [
        "  tiny/whisper.pt (reward's ASR)  49.9 %  36.1 %  −16 % [−21, −10]",
        "  question realised               25.0 %  75.0 %  +50.0 [+25.1, +75.0] points",
    ]


def test_one_row_has_no_change():
    assert speech_comparison(speech_results(["sft"], ROLES)) == [
        "Held-out WER (3 × 100 texts)         sft",
        "  pocketsphinx (held-out)         60.2 %",
        "  tiny/whisper.pt (reward's ASR)  49.9 %",
    ]


def test_more_rows_stand_below_each_other_each_with_its_change():
    results = speech_results(["before", "best of 4", "after"], ROLES)
    assert speech_comparison(results) == [
        "Held-out WER (3 × 100 texts)  pocketsphinx (held-out)   tiny/whisper.pt (reward's ASR)",
        "  before                      60.2 %                    49.9 %",
        "  best of 4                   50.5 %  −16 % [−21, −10]  36.1 %  −16 % [−21, −10]",
        "  after                       50.5 %  −16 % [−21, −10]  36.1 %  −16 % [−21, −10]",
    ]


def test_a_round_trip_is_missing_where_a_recording_was_not_synthesized():
    results = speech_results(["sft", "natural"], {**ROLES, "round trip": "round trip"})
    del results["rows"][1]["metrics"]["asr"]["round trip"]
    assert speech_comparison(results)[-1].split() == ["round", "trip", "(own", "ASR)", "49.9", "%", "–", "–"]


@pytest.mark.parametrize("num_rows", [1, 2, 3, 6])
def test_no_line_is_wider_than_a_terminal(num_rows):
    roles = {f"runs/of/many/whispers/number_{i}/checkpoint.pt": "held-out" for i in range(4)}
    names = [f"/a/long/path/of/a/checkpoint/that/is/its/own/name/checkpoint-{i}" for i in range(num_rows)]
    lines = speech_comparison(speech_results(names, roles))
    assert max(map(len, lines)) <= MAX_WIDTH
    assert sum(line.count("60.2 %") for line in lines) == len(roles)  # the first row's, by every ASR


def test_asr_rows_have_wer_by_length_and_hallucinations():
    def row(name, wer, change):
        part = {"wer": wer, "change": change, "hallucinations": 0.067}
        return {
            "name": name,
            "metrics": {"all": part, "short": part, "long": None, "nonspeech_hallucinations": None},
        }

    rows = [row("SFT", 0.743, None), row("RL", 0.542, CHANGES[1])]
    results = {"rows": rows, "arguments": {"long_s": 3.0}, "num_clips": 500, "units": "words"}
    assert asr_comparison(results) == [
        "500 clips            SFT      RL  change",
        "  WER             74.3 %  54.2 %  −16 % [−21, −10]",
        "  WER, up to 3 s  74.3 %  54.2 %  −16 % [−21, −10]",
        "  hallucinations   6.7 %   6.7 %  –",
    ]
    assert asr_comparison(results | {"units": "characters"})[1] == "  CER             74.3 %  54.2 %  −16 % [−21, −10]"


def test_a_long_name_keeps_its_end():
    assert shortened("runs/grpo/checkpoint-75", 13) == "…heckpoint-75"
    assert shortened("before", 6) == "before"
