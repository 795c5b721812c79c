"""F0 contours as SVG: every voiced frame is a point, words stand where they are spoken, all text is escaped."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from fake_vowel import vowel

from metrics.contours import LEFT, WIDTH, Contour, common_scale, contour_figure, voiced_stretches, word_lines
from speech.pitch import PitchTrack, pitch_track
from speech.tokens import SAMPLE_RATE

WORDS = [["Did", 0.0, 0.4], ["he?", 0.6, 1.0]]


def track_of(*semitones: float, start_s: float = 0.0) -> PitchTrack:
    times = start_s + 0.01 * np.arange(len(semitones))
    return PitchTrack(times, 86.0 + np.array(semitones), np.zeros(len(semitones)))


def points(figure: str) -> np.ndarray:
    """The vertices of all lines, shape (n, 2)."""
    lines = [line.get("points").split() for line in ElementTree.fromstring(figure).iter("polyline")]
    return np.array([tuple(map(float, point.split(","))) for line in lines for point in line])


def test_every_voiced_frame_is_a_point():
    """A vowel of 0.5 s at 150 Hz, silence, and one that rises by half an octave: two lines."""
    rising = 150 * 2 ** np.linspace(0, 0.5, SAMPLE_RATE // 2)
    quiet = np.zeros(SAMPLE_RATE // 5)
    wav = np.concatenate([vowel(np.full(SAMPLE_RATE // 2, 150.0)), quiet, vowel(rising)]).astype(np.float32)
    track = pitch_track(wav)
    figure = contour_figure("Did he?", [Contour("after", track, WORDS, 1.2, [])])
    assert len(points(figure)) == len(track.times) > 80
    assert figure.count("<polyline") == len(voiced_stretches(track)) == 2
    first, last = points(figure)[0], points(figure)[-1]
    assert last[1] < first[1]  # higher on the page


def test_coordinates_by_hand():
    """A clip of 1 s over 896 pixels: 0.5 s at 52 + 448 = 500. From −6 to +6 st over 120 pixels below a heading of 22:
    0 st at 82, +3 st at 52."""
    contour = Contour("before", track_of(0, 0, 0, 3, start_s=0.47), [], 1.0, [])
    figure = contour_figure("text", [contour])
    assert WIDTH - LEFT - 12 == 896
    assert points(figure) == pytest.approx(np.array([(473.1, 82), (482.1, 82), (491.0, 82), (500.0, 52)]))


def test_all_panels_have_one_scale():
    """Each from its own median; the widest and the longest clip decide for both."""
    low, high = track_of(0, 0, 0, -7), track_of(24, 24, 24, 34)
    scale = common_scale([Contour("a", low, [], 1.0, []), Contour("b", high, [], 2.0, [])])
    assert (scale.low_st, scale.high_st, scale.step_st) == (-12, 12, 6) and scale.pixels_per_s == 448
    figure = contour_figure("text", [Contour("a", low, [], 1.0, []), Contour("b", high, [], 2.0, [])])
    assert figure.count(">+12 st<") == figure.count(">−6<") == 2
    assert points(figure)[:, 1] == pytest.approx([82, 82, 82, 117, 82, 82, 82, 32])
    fine = common_scale([Contour("a", track_of(0), [], 1.0, [])])
    assert (fine.low_st, fine.high_st, fine.step_st) == (-6, 6, 3)


def test_words_stand_in_the_middle_of_their_time_and_marked_ones_are_shaded():
    figure = contour_figure("*Did* he?", [Contour("a", track_of(0), WORDS, 1.0, [0])])
    texts = {text.text: text for text in ElementTree.fromstring(figure).iter("text")}
    assert float(texts["Did"].get("x")) == pytest.approx(52 + 896 * 0.2, abs=0.1)
    assert float(texts["he?"].get("x")) == pytest.approx(52 + 896 * 0.8, abs=0.1)
    assert texts["Did"].get("class") == "word marked-word" and texts["he?"].get("class") == "word"
    [shade] = ElementTree.fromstring(figure).iter("rect")
    assert (float(shade.get("x")), float(shade.get("width"))) == pytest.approx((52, 358.4))


def test_words_that_would_touch_stand_below_each_other():
    assert word_lines([("a", 100), ("b", 200)]) == [0, 0]
    assert word_lines([("beautiful", 100), ("pianos", 120), ("of", 180)]) == [0, 1, 0]
    assert word_lines([]) == []
    tall, flat = (
        contour_figure("t", [Contour("a", track_of(0), [["beautiful", 0.5, x], ["pianos", x, x + 0.1]], 5.0, [])])
        for x in (0.55, 2.5)
    )
    height = [float(ElementTree.fromstring(figure).get("viewBox").split()[3]) for figure in (tall, flat)]
    assert height[0] == height[1] + 16


def test_all_text_is_escaped():
    hostile = "<script>'\"&"
    contour = Contour(hostile, track_of(0, 1), [[hostile, 0.0, 0.5]], 1.0, [])
    figure = contour_figure(hostile, [contour])
    assert "<script" not in figure and figure.count("&lt;script&gt;&#x27;&quot;&amp;") == 3
    texts = [text.text for text in ElementTree.fromstring(figure).iter("text")]
    assert texts.count(hostile) == 2


def test_nothing_to_draw():
    assert contour_figure("text", []) == ""
    whispered = contour_figure("text", [Contour("a", track_of(), WORDS, 1.0, [])])
    assert len(points(whispered)) == 0 and ">Did<" in whispered
    unknown = contour_figure("text", [Contour("a", track_of(0, 1), [], 1.0, [0])])
    assert len(points(unknown)) == 2 and "<rect" not in unknown
