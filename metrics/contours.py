"""The F0 contours of the clips of a text, each over its words, as inline SVG for report.html."""

import html
from dataclasses import dataclass

import numpy as np

from speech.pitch import STEP_S, PitchTrack

WIDTH, LEFT, RIGHT = 960, 52, 12  # of a figure and of the margins beside the contours; all lengths in pixels
HEADING, PLOT, LINE, GAP = 22, 120, 16, 14  # heights: of a panel's name, its contour, a line of words; between panels
LETTER = 7.2  # width of a letter of the words, on the broad side
WIDEST_FINE_ST = 15  # a scale that spans more semitones has a line every 6, others every 3


@dataclass(frozen=True)
class Contour:
    """A clip of a figure.

    Attributes:
        name: the row's.
        words: [word, start in s, end in s]; none where no ASR told them.
        marked: indices of the words that the text marks for emphasis.
    """

    name: str
    track: PitchTrack
    words: list[list]
    duration_s: float
    marked: list[int]


@dataclass(frozen=True)
class Scale:
    """From seconds and semitones to pixels, the same in all panels of a figure."""

    pixels_per_s: float
    low_st: int
    high_st: int
    step_st: int

    def x(self, time_s: float) -> float:
        return LEFT + self.pixels_per_s * time_s

    def y(self, semitones: float) -> float:
        return HEADING + PLOT * (self.high_st - semitones) / (self.high_st - self.low_st)


def contour_figure(text: str, contours: list[Contour]) -> str:
    """A panel for each clip, below each other; "" without any.

    F0 is in semitones from the clip's own median, so that voices of any height compare; times and semitones have one
    scale in all panels.
    """
    if not contours:
        return ""
    scale = common_scale(contours)
    panels, top = [], 0
    for contour in contours:
        panel, height = contour_panel(contour, scale)
        panels.append(f"<g transform='translate(0 {top})'>{panel}</g>")
        top += height + GAP
    label = html.escape(f"F0 of: {text}")
    view = f"viewBox='0 0 {WIDTH} {top}' role='img' aria-label='{label}'"
    return f"<svg class='contours' {view}>{''.join(panels)}</svg>"


def common_scale(contours: list[Contour]) -> Scale:
    """Wide enough for the longest clip and every frame, and for 6 semitones up and down at least."""
    semitones = np.concatenate([from_median(contour.track) for contour in contours] + [np.array([-6.0, 6.0])])
    span = semitones.max() - semitones.min()
    step = 3 if span <= WIDEST_FINE_ST else 6
    low, high = step * np.floor(semitones.min() / step), step * np.ceil(semitones.max() / step)
    longest_s = max(contour.duration_s for contour in contours)
    return Scale((WIDTH - LEFT - RIGHT) / longest_s, int(low), int(high), step)


def from_median(track: PitchTrack) -> np.ndarray:
    """F0 of the voiced frames in semitones from their median."""
    return track.f0 - np.median(track.f0) if len(track.f0) else track.f0


def contour_panel(contour: Contour, scale: Scale) -> tuple[str, int]:
    """The panel and its height."""
    bottom, right_edge = HEADING + PLOT, scale.x(contour.duration_s)
    parts = [f"<text class='name' x='{LEFT}' y='15'>{html.escape(contour.name)}</text>"]
    for semitones in range(scale.low_st, scale.high_st + 1, scale.step_st):
        y = scale.y(semitones)
        parts.append(f"<line x1='{LEFT}' x2='{right_edge:.1f}' y1='{y:.1f}' y2='{y:.1f}' />")
        unit = " st" if semitones == scale.high_st else ""
        signed = f"{semitones:+d}{unit}".replace("-", "−") if semitones else "0"
        parts.append(f"<text class='tick' x='{LEFT - 6}' y='{y + 4:.1f}'>{signed}</text>")
    lines = word_lines([(word, scale.x((start_s + end_s) / 2)) for word, start_s, end_s in contour.words])
    for index, (word, start_s, end_s) in enumerate(contour.words):
        left, right = scale.x(start_s), scale.x(end_s)
        marked = index in contour.marked
        if marked:
            box = f"x='{left:.1f}' y='{HEADING}' width='{right - left:.1f}' height='{PLOT}'"
            parts.append(f"<rect class='marked' {box} />")
        y = bottom + LINE * (lines[index] + 1) - 2
        kind = "word marked-word" if marked else "word"
        parts.append(f"<text class='{kind}' x='{(left + right) / 2:.1f}' y='{y}'>{html.escape(word)}</text>")
    for time_s in sorted({time_s for _, *edges in contour.words for time_s in edges}):
        x = scale.x(time_s)
        parts.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{HEADING}' y2='{bottom}' />")
    for times, semitones in voiced_stretches(contour.track):
        points = " ".join(
            f"{scale.x(time_s):.1f},{scale.y(value):.1f}" for time_s, value in zip(times, semitones, strict=True)
        )
        parts.append(f"<polyline points='{points}' />")
    return "".join(parts), bottom + LINE * (max(lines, default=-1) + 1)


def word_lines(words: list[tuple[str, float]]) -> list[int]:
    """The line of each word, 0 the uppermost, such that no two words of a line touch.

    Args:
        words: each with the x of its middle.
    """
    ends: list[float] = []  # of the last word of each line
    lines = []
    for word, middle in words:
        half = LETTER * (len(word) + 1) / 2
        line = next((number for number, end in enumerate(ends) if end <= middle - half), len(ends))
        if line == len(ends):
            ends.append(0.0)
        ends[line] = middle + half
        lines.append(line)
    return lines


def voiced_stretches(track: PitchTrack) -> list[tuple[np.ndarray, np.ndarray]]:
    """Times and semitones from the median of each stretch of voiced frames without a gap."""
    gaps = np.flatnonzero(np.diff(track.times) > 1.5 * STEP_S) + 1
    stretches = zip(np.split(track.times, gaps), np.split(from_median(track), gaps), strict=True)
    return [(times, semitones) for times, semitones in stretches if len(times)]
