"""The table of synthesized speech: numbers as text, and one header for rows with different columns."""

import pytest

from metrics.formatting import difference, percent, percent_interval, relative_change
from metrics.report import summarize, table


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
    first, second = row("first", [2, 0]), row("second", [1, 0], nll=3.0)
    metrics = summarize(second, first)
    assert metrics["asr"]["base"]["error_rate"] == 0.25 and metrics["asr"]["base"]["nll"] == 3.0
    assert metrics["asr"]["base"]["change"]["relative"] == pytest.approx(-0.5)
    assert (metrics["duration_s"], metrics["units_per_second"], metrics["speech_per_compute_s"]) == (0.5, 4.0, 4.0)
    assert summarize(first, first)["asr"]["base"]["change"] is None


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


def test_numbers_as_text():
    assert difference({"difference": -0.02, "interval": [-0.05, 0.012]}) == "−0.02 [−0.05, +0.01]"
    assert difference(None) == "–"
    assert percent(0.161) == "16.1 %" and percent(0.5, 0) == "50 %" and percent(None) == "–"
    assert percent_interval([0.12, 0.2]) == "[12.0, 20.0]"
    assert relative_change({"relative": -0.161, "interval": [-0.2151, 0.004]}) == "−16 % [−22, 0]"
    assert relative_change({"relative": 0.25, "interval": [0.1, 1.5]}) == "+25 % [+10, +150]"
    assert relative_change(None) == "–"
