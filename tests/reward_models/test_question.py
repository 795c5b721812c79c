"""Final movement of F0: measured on a made contour, what counts as a question, stated scores for failures."""

import numpy as np
import pytest
from fake_rollouts import call, ids, speech_scorer

from reward_models.question import QuestionReward, asks, final_movement_st, rise_share
from speech.pitch import PitchTrack, pitch_track

LEVEL = [30] * 50  # codes of the humming codec: 100 + 2 · 30 = 160 Hz for 1 s
RISING = [30] * 40 + [40, 50, 55, 60, 60, 60, 60, 60, 60, 60]  # to 220 Hz, 5.5 semitones
FALLING = [30] * 40 + [25, 20, 15, 10, 10, 10, 10, 10, 10, 10]  # to 120 Hz


def test_final_movement_by_hand():
    times = np.arange(0, 1, 0.01)
    f0 = np.where(times > 0.9, 92.0, 86.0)  # semitones
    assert final_movement_st(PitchTrack(times, f0, np.zeros(100))) == 6.0
    assert np.isnan(final_movement_st(PitchTrack(times[:10], f0[:10], np.zeros(10))))  # 0.1 s of voice
    assert np.isnan(final_movement_st(pitch_track(np.zeros(16_000, np.float32))))


@pytest.mark.parametrize(("movement_st", "share"), [(-3.0, 0.0), (0.0, 0.0), (1.5, 0.25), (4.5, 0.75), (9.0, 1.0)])
def test_rise_share(movement_st, share):
    assert rise_share(movement_st) == share


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("Did he go?", "en", True),
        ('"Did *he* go?"', "en", True),
        ("He went.", "en", False),
        ("Where did he go?", "en", None),
        ("*Who* went?", "en", None),
        ("Wo ist er?", "de", True),
        ("你好吗？", "zh", True),
        ("He went,", "en", None),
        ("He went", "en", None),
    ],
)
def test_what_asks(text, language, expected):
    assert asks(text, language) is expected


def test_question_reward():
    batch = [ids(RISING), ids(LEVEL), ids(FALLING), ids(RISING, truncated=True), ids([]), ids([0] * 50)]
    question = call(QuestionReward(speech_scorer(6)), batch, text=["Is it?"] * 6, language=["en"] * 6)
    assert question[0] == pytest.approx(5.5 / 6, abs=0.05)
    assert question[1] == pytest.approx(0, abs=0.02) and question[2] == 0
    statement = call(QuestionReward(speech_scorer(6)), batch, text=["It is."] * 6, language=["en"] * 6)
    assert statement[:3] == pytest.approx([1 - value for value in question[:3]])
    assert question[3:] == statement[3:] == [0, 0, 0]


def test_other_texts_have_no_reward():
    batch = [ids(RISING), ids([])]
    assert call(QuestionReward(speech_scorer()), batch, text=["Where is it?"] * 2, language=["en"] * 2) == [None, None]
