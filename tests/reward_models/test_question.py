"""Final movement of F0: rewards of made contours, stated scores for failures."""

import pytest
from fake_rollouts import call, ids, speech_scorer

from reward_models.question import QuestionReward

LEVEL = [30] * 50  # codes of the humming codec: 100 + 2 · 30 = 160 Hz for 1 s
RISING = [30] * 40 + [40, 50, 55, 60, 60, 60, 60, 60, 60, 60]  # to 220 Hz, 5.5 semitones
FALLING = [30] * 40 + [25, 20, 15, 10, 10, 10, 10, 10, 10, 10]  # to 120 Hz


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
