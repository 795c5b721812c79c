"""The table of synthesized speech: numbers as text, and one header for rows with different columns."""

import pytest

from metrics.formatting import difference, percent, percent_interval, points, relative_change
from metrics.report import pareto_plot, summarize, table


def row(name: str, edits: list[int], synthesized: bool = True, nll: float | None = None) -> dict:
    """Clips of half a second with two words each, by one ASR."""
    clips = [
        {
            "text": str(i), "num_codes": 25 if synthesized else None, "truncated": False, "repetitive": False,
            "failure": None, "duration_s": 0.5, "num_units": 2, "log_f0_std": 0.1,
            "asr": {"base": {"edits": count, "ref_length": 2, "nll": nll}},
        }
        for i, count in enumerate(edits)
    ]  # fmt: skip
    return {"name": name, "seeds": [None], "compute_s": 0.25, "clips": clips}


def test_metrics_of_a_row():
    first, second = row("first", [2, 2]), row("second", [1, 1], nll=3.0)
    metrics = summarize(second, first)
    assert metrics["asr"]["base"]["error_rate"] == 0.5 and metrics["asr"]["base"]["nll"] == 3.0
    assert metrics["asr"]["base"]["change"]["relative"] == pytest.approx(-0.5)
    assert (metrics["duration_s"], metrics["units_per_second"], metrics["real_time_factor"]) == (0.5, 4.0, 0.25)
    assert summarize(first, first)["asr"]["base"]["change"] is None


def test_clips_that_are_not_finite_count_as_silent():
    one = row("first", [0, 2, 2, 2])
    for clip, failure in zip(one["clips"], (None, "silent", "non_finite", "empty"), strict=True):
        clip["failure"] = failure
    metrics = summarize(one, one)
    assert (metrics["silent"], metrics["empty"]) == (0.5, 0.25)


def test_rows_with_other_columns_share_a_header():
    rows = [row("before", [2, 0]), row("natural", [0, 0], synthesized=False, nll=1.5)]
    for one in rows:
        one["metrics"] = summarize(one, rows[0])
    header, before, natural = table({"rows": rows, "units": "words", "asr_roles": {"base": "held-out"}})
    assert len(header) == len(set(header)) == len(before) == len(natural)
    cells = dict(zip(header, natural, strict=True))
    assert cells["WER, base (held-out)"] == "0.0 % [0.0, 0.0]" and cells["NLL, base (held-out)"] == "1.50"
    assert cells["truncated"] == cells["real-time factor"] == "–" and cells["words per second"] == "4.00"
    assert dict(zip(header, before, strict=True))["NLL, base (held-out)"] == "–"


def test_means_have_columns_where_they_were_measured():
    """Differences 0.1 of each text; the natural readings have no voice prompt, and no DNSMOS was asked for there."""
    rows = [row("before", [0, 0]), row("after", [0, 0]), row("natural", [0, 0], synthesized=False)]
    for one, (low, high) in zip(rows, [(0.5, 0.7), (0.6, 0.8)], strict=False):
        for clip, similarity in zip(one["clips"], (low, high), strict=True):
            mos = {"ovrl": 1 + similarity, "sig": 3.0, "bak": 4.0}
            clip |= {"speaker_similarity": similarity, "dnsmos": mos}
    rows[0]["clips"][1]["dnsmos"] = None  # a failed clip
    for one in rows:
        one["metrics"] = summarize(one, rows[0])
    header, *lines = table({"rows": rows, "units": "words", "asr_roles": {"base": "held-out"}})
    before, after, natural = (dict(zip(header, line, strict=True)) for line in lines)
    assert before["speaker similarity"] == "0.600 [0.500, 0.700]" and before["DNSMOS OVRL"] == "1.50 [1.50, 1.50]"
    assert after["speaker similarity"] == "0.700 [0.600, 0.800]" and after["DNSMOS SIG"] == "3.00 [3.00, 3.00]"
    assert after["vs first, speaker similarity"] == "+0.100 [+0.100, +0.100]"
    assert natural["speaker similarity"] == natural["DNSMOS BAK"] == before["vs first, DNSMOS SIG"] == "–"
    assert not any(
        "DNSMOS" in title
        for title in table({**{"rows": rows[2:], "units": "words"}, "asr_roles": {"base": "held-out"}})[0]
    )


def test_melody_has_columns_where_the_texts_ask_for_it():
    """The first text is a question, the second a statement with a mark."""
    rows = [row("before", [0, 0]), row("after", [0, 0])]
    for one, asked, emphasis, movement in zip(rows, (0.0, 1.0), (0.0, 0.5), (3.0, 4.5), strict=True):
        question, statement = one["clips"]
        question |= {"question": asked, "statement_rise": None, "emphasis": None, "f0_range_st": movement}
        statement |= {"question": None, "statement_rise": 0.0, "emphasis": emphasis, "f0_range_st": movement}

    def cells() -> list[dict]:
        for one in rows:
            one["metrics"] = summarize(one, rows[0])
        header, *lines = table({"rows": rows, "units": "words", "asr_roles": {"base": "held-out"}})
        return [dict(zip(header, line, strict=True)) for line in lines]

    before, after = cells()
    assert before["question realised"] == before["emphasis realised"] == "0.0 % [0.0, 0.0]"
    assert (
        after["question realised"] == "100.0 % [100.0, 100.0]" and after["emphasis realised"] == "50.0 % [50.0, 50.0]"
    )
    assert after["vs first, question realised"] == "+100.0 [+100.0, +100.0]"
    assert after["vs first, emphasis realised"] == "+50.0 [+50.0, +50.0]"
    assert after["statements that rise"] == "0.0 % [0.0, 0.0]" and after["vs first, statements that rise"][0] == "+"
    assert after["F0 movement, st"] == "4.50 [4.50, 4.50]" and after["vs first, F0 movement, st"][:5] == "+1.50"
    assert "pause placement" not in after and "code diversity" not in after
    assert not any("@" in title for title in after)  # one sample of a text
    for one in rows:
        for clip in one["clips"]:
            clip |= {"question": None, "emphasis": None}
    for asked_nothing in cells():
        assert not {"question realised", "emphasis realised", "statements that rise"} & set(asked_nothing)


def test_samples_of_a_text_have_columns():
    """Two samples: of the first text one is good, of the second both; distances of 0.2 and 0.4."""
    rows = [row("before", [2, 0, 0, 0]), row("after", [0, 0, 0, 0])]
    for one in rows:
        one["seeds"] = [0, 1]
        for i, clip in enumerate(one["clips"]):
            clip |= {"text": str(i % 2), "code_distance": (0.2, 0.4)[i % 2]}
            clip["asr"]["base"]["error_rate"] = clip["asr"]["base"]["edits"] / 2
        one["metrics"] = summarize(one, rows[0])
    header, *lines = table({"rows": rows, "units": "words", "asr_roles": {"base": "held-out"}})
    before, after = (dict(zip(header, line, strict=True)) for line in lines)
    assert before["Pass@1"] == "75.0 % [50.0, 100.0]" and before["Pass@2"] == "100.0 % [100.0, 100.0]"
    assert before["Failure@2"] == "50.0 % [0.0, 100.0]" and after["Failure@2"] == "0.0 % [0.0, 0.0]"
    assert after["vs first, Failure@2"] == "−50.0 [−100.0, +0.0]"
    assert after["code diversity"] == "0.300 [0.200, 0.400]"


def with_metrics(name: str, model: str | None, **metrics) -> dict:
    error = {"base": {"error_rate": 0.2, "interval": [0.1, 0.3]}}
    none = dict.fromkeys(("emphasis", "question", "f0_range_st", "speaker_similarity"))
    mean = {key: {"mean": value, "interval": [value, value]} for key, value in metrics.items()}
    return {"name": name, "model": model, "metrics": {"asr": error} | none | mean}


def test_the_plot_needs_two_checkpoints(monkeypatch):
    drawn = {}

    def spy(x_title, panels):
        drawn.update(panels)
        return b"png"

    monkeypatch.setattr("metrics.report.pareto_png", spy)

    def panels(*rows) -> dict:
        drawn.clear()
        results = {"rows": rows, "units": "words", "asr_roles": {"base": "held-out", "other": "reward's ASR"}}
        assert pareto_plot(results) == (b"png" if drawn else None)
        return {title: [(one.name, one.x, one.y) for one in points] for title, points in drawn.items()}

    before, natural = with_metrics("before", "a", f0_range_st=3.0), with_metrics("natural", None, f0_range_st=9.0)
    assert panels(before) == panels(before, natural, with_metrics("best of 4", "a", f0_range_st=4.0)) == {}
    after = with_metrics("after", "b", f0_range_st=4.0)
    assert panels(before, after, natural) == {"F0 movement, st": [("before", 20.0, 3.0), ("after", 20.0, 4.0)]}
    asking = with_metrics("after", "b", question=0.5, f0_range_st=4.0, speaker_similarity=0.9)
    assert panels(before, asking) == {
        "question realised, %": [("after", 20.0, 50.0)], "speaker similarity": [("after", 20.0, 0.9)],
    }  # fmt: skip


def test_numbers_as_text():
    assert points({"difference": 0.125, "interval": [-0.03, 0.201]}) == "+12.5 [−3.0, +20.1]" and points(None) == "–"
    assert difference({"difference": -0.02, "interval": [-0.05, 0.012]}) == "−0.02 [−0.05, +0.01]"
    assert difference(None) == "–"
    assert percent(0.161) == "16.1 %" and percent(0.5, 0) == "50 %" and percent(None) == "–"
    assert percent_interval([0.12, 0.2]) == "[12.0, 20.0]"
    assert relative_change({"relative": -0.161, "interval": [-0.2151, 0.004]}) == "−16 % [−22, 0]"
    assert relative_change({"relative": 0.25, "interval": [0.1, 1.5]}) == "+25 % [+10, +150]"
    assert relative_change(None) == "–"
