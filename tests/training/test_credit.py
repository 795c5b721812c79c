"""training/credit.py, and the parts of the rewards: worked numbers, and that a part moves its codes alone."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

import train
from reward_models.emphasis import EmphasisReward
from reward_models.parts import Part
from reward_models.question import QuestionReward
from reward_models.whisper import WhisperReward
from speech.whisper_scorer import Score
from speech.word_times import Word
from training.credit import EPSILON, in_group, token_advantages
from training.grpo_trainer import SpeechGRPOTrainer

NAN = math.nan


def test_a_group_is_normalised_with_what_it_has():
    values = np.array([[1.0, 3.0, NAN], [2.0, NAN, NAN], [5.0, 5.0, 5.0]])
    expected = [[-1 / (math.sqrt(2) + EPSILON), 1 / (math.sqrt(2) + EPSILON), 0], [0, 0, 0], [0, 0, 0]]
    assert in_group(values) == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("start_s", "end_s", "length", "tokens"),
    [
        (0.05, 0.13, 100, slice(2, 7)),
        (-0.05, 0.1, 100, slice(0, 5)),
        (1.9, math.inf, 100, slice(95, 100)),
        (3.0, 4.0, 100, slice(100, 100)),
        (1.0, 0.5, 100, slice(25, 25)),
    ],
)
def test_the_tokens_of_a_part(start_s, end_s, length, tokens):
    assert Part(1.0, start_s, end_s).tokens(length) == tokens


def test_rewards_without_parts_move_the_whole_rollout():
    rewards = np.array([[1.0, 0.0], [0.0, 0.0], [2.0, NAN], [4.0, NAN]])
    no_parts = [[None] * 4] * 2
    advantages = token_advantages(rewards, no_parts, [1.0, 0.5], [0.0, 0.0], lengths=[3, 2, 4, 4], group_size=2)
    assert advantages.shape == (4, 4)
    assert (advantages[0, :3] > 0).all() and (advantages[1, :2] < 0).all() and (advantages[3] > 0).all()
    # Of two, one is as far above the mean as the other below
    assert np.abs(advantages[advantages != 0]) == pytest.approx(1 / math.sqrt(2), abs=1e-3)
    assert (advantages[0, 3:] == 0).all() and (advantages[1, 2:] == 0).all()


def test_a_part_moves_its_codes_alone():
    """Both rollouts earn the same; the first has its second word right, the other one its first."""
    words = [
        {0: Part(0.0, 0.0, 0.04), 1: Part(1.0, 0.04, 0.1)},
        {0: Part(1.0, 0.0, 0.06), 1: Part(0.0, 0.06, 0.08)},
    ]
    advantages = token_advantages(np.array([[0.5], [0.5]]), [words], [1.0], [0.5], lengths=[5, 5], group_size=2)
    assert np.sign(advantages).tolist() == [[-1, -1, 1, 1, 1], [1, 1, 1, -1, 0]]
    assert len(set(np.abs(advantages[advantages != 0]).round(6))) == 1


def test_a_rollout_of_no_parts_takes_the_reward_as_a_whole():
    rewards, lengths = np.array([[1.0], [0.0]]), [3, 3]
    none, empty = (token_advantages(rewards, [[parts] * 2], [1.0], [0.0], lengths, 2) for parts in (None, {}))
    assert (none[0] > 0).all() and empty.tolist() == none.tolist()


def test_a_part_without_a_value_raises():
    """NaN would pass for a part that the rollout does not have."""
    for value in (NAN, math.inf):
        with pytest.raises(ValueError, match="value of a part: must be finite"):
            Part(value, 0.0, 1.0)


def test_the_parts_of_a_group_move_that_group():
    words = [{0: Part(value, 0.0, 0.02)} for value in (1.0, 0.0, 0.0, 1.0)]
    advantages = token_advantages(np.zeros((4, 1)), [words], [1.0], [0.0], lengths=[2] * 4, group_size=2)
    assert np.sign(advantages).tolist() == [[1, 0], [-1, 0], [-1, 0], [1, 0]]


@pytest.mark.parametrize(("whole", "first"), [(0.5, 2), (0.2, 5)])
def test_a_share_of_the_weight_stays_on_the_whole_rollout(whole, first):
    words = [{0: Part(1.0, 0.0, 0.02)}, {0: Part(0.0, 0.0, 0.02)}]
    advantages = token_advantages(np.array([[1.0], [0.0]]), [words], [2.0], [whole], lengths=[3, 3], group_size=2)
    assert advantages[0] == pytest.approx(advantages[0, 1] * np.array([first, 1, 1])) and advantages[0, 1] > 0
    assert advantages[1] == pytest.approx(-advantages[0])


def test_a_rollout_that_failed_takes_its_reward_as_a_whole():
    words = [{0: Part(1.0, 0.0, 0.02)}, {0: Part(1.0, 0.0, 0.02)}, None]
    advantages = token_advantages(
        np.array([[1.0], [1.0], [0.0]]), [words], [1.0], [0.25], lengths=[2, 2, 2], group_size=3
    )
    assert advantages[2, 0] == advantages[2, 1] < 0
    # Of a word that both others have right there is nothing to learn: what they have is their share of the whole
    assert advantages[0] == pytest.approx(-advantages[2] / 8, rel=1e-3) and (advantages[0] == advantages[1]).all()


def rollouts(text: str, hyp_text: str, **fields) -> SimpleNamespace:
    """One rollout of 100 codes whose words are 0.3 s long, with an NLL of 0.6 nats per token."""
    plain = text.replace("*", "").split()
    words = tuple(Word(word, 0.3 * i, 0.3 * (i + 1), 0.6) for i, word in enumerate(plain))
    score = Score(hyp_text, 0.5, 0.1, 1, len(plain), words=words)
    one = {"texts": [text], "languages": ["en"], "failures": [None], "scores": [score], "codes": [[0] * 100]}
    return SimpleNamespace(**one | {name: [value] for name, value in fields.items()})


def test_words_are_heard_in_their_places():
    """Heard: R_wer 1, R_nll exp(-0.6 / 3) = 0.8187, R 1 / (0.6 + 0.4 / 0.8187) = 0.9186. Not heard: R_wer
    1 - tanh(3) = 0.004945, R 1 / (0.6 / 0.004945 + 0.4 / 0.8187) = 0.00821."""
    parts = WhisperReward(None).parts(rollouts("Tom *took* 7 cars.", "tom so seven cars"), 0)
    assert [*parts] == [0, 1, 2, 3]
    assert [part.value for part in parts.values()] == pytest.approx([0.9186, 0.00821, 0.9186, 0.9186], rel=1e-3)
    assert (parts[1].start_s, parts[1].end_s) == pytest.approx((0.24, 0.66))


def test_half_of_the_whisper_reward_stays_on_the_whole_rollout():
    """Its words have the other half; nothing stays there of a reward whose parts are all that it is about."""
    whole_fracs = [getattr(reward, "whole_frac", 0.0) for reward in (WhisperReward, EmphasisReward, QuestionReward)]
    assert whole_fracs == [0.5, 0.0, 0.0]


def test_without_times_of_words_there_are_no_parts():
    without_times = Score("tom", 0.5, 0.1, 1, 4)
    for fields in ({"failures": "truncated"}, {"scores": without_times}):
        assert WhisperReward(None).parts(rollouts("Tom took 7 cars.", "tom", **fields), 0) is None
        assert EmphasisReward(None).parts(rollouts("Tom *took* 7 cars.", "tom", **fields), 0) is None


def test_the_marked_word_and_the_end_are_parts(monkeypatch):
    monkeypatch.setattr("reward_models.emphasis.marked_word_scores", lambda *_: [0.8])
    monkeypatch.setattr(QuestionReward, "_reward", lambda *_: 0.7)
    one = rollouts("Tom *took* it?", "tom took it")
    one.pitch_track = lambda _: None
    (index, part), *others = EmphasisReward(None).parts(one, 0).items()
    assert (index, part.value, others) == (1, 0.8, []) and (part.start_s, part.end_s) == pytest.approx((0.2, 0.7))
    assert EmphasisReward(None).parts(rollouts("Tom took it.", "tom took it"), 0) is None
    assert QuestionReward(None).parts(one, 0)["end"].tokens(101) == slice(70, 101)  # END too
    assert QuestionReward(None).parts(rollouts("Tom?", "tom", failures="silent"), 0) is None


FLAGS = (
    "--config configs/tiny.yaml --reward_config reward_models/melody.json --max_steps 2 --save_steps 1 "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --num_generations 4 --max_completion_length 140 "
    "--sample_steps 0"
)


def test_a_run_resumes_with_it_and_differs_from_one_without(tmp_path, monkeypatch):
    seen, masks, shown = [], [], []
    of_tokens, of_batch = SpeechGRPOTrainer._token_advantages, SpeechGRPOTrainer._generate_and_score_completions

    def note(self, mask):
        masks.append(mask)
        seen.append(of_tokens(self, mask))
        return seen[-1]

    def note_shown(self, inputs):
        self.log_completions = True
        outputs = of_batch(self, inputs)
        self.log_completions = False  # without printing the table
        shown.append(list(self._logs["advantages"]))
        return outputs

    monkeypatch.setattr(SpeechGRPOTrainer, "_token_advantages", note)
    monkeypatch.setattr(SpeechGRPOTrainer, "_generate_and_score_completions", note_shown)
    weights = {}
    for credit in ("time", "rollout"):
        folder = tmp_path / credit
        train.main(train.parse_args([*FLAGS.split(), "--credit", credit, "--output_dir", str(folder)]))
        weights[credit] = (folder / "model.safetensors").read_bytes()
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert log[0]["grad_norm"] > 0
    assert weights["time"] != weights["rollout"]
    assert [advantages.dim() for advantages in seen] == [2, 2]
    assert any(len(set(row[row != 0].tolist())) > 1 for row in seen[0])  # one rollout's tokens differ
    for advantages, mask, means in zip(seen, masks, shown[:2], strict=True):
        assert advantages.square().sum() / mask.sum() == pytest.approx(1, abs=1e-3)
        assert (advantages[mask == 0] == 0).all()
        of_rollouts = [row[:length].mean().item() for row, length in zip(advantages, mask.sum(dim=1), strict=True)]
        assert means == pytest.approx(of_rollouts, abs=1e-6)  # what --log_completions shows
    (tmp_path / "time" / "model.safetensors").unlink()
    last = tmp_path / "time" / "checkpoint-2"
    last.rename(tmp_path / "elsewhere")
    flags = [*FLAGS.split(), "--credit", "time", "--output_dir", str(tmp_path / "time")]
    train.main(train.parse_args([*flags, "--resume_from_checkpoint", "true"]))
    assert (tmp_path / "time" / "model.safetensors").read_bytes() == weights["time"]


@pytest.mark.parametrize("flags", ["--method grpo+diffro --token2text tiny/token2text", "--task asr"])
def test_it_is_for_grpo_of_speech(flags, caplog):
    with pytest.raises(SystemExit):
        train.parse_args([*FLAGS.split(), "--credit", "time", "--output_dir", "x", *flags.split()])
    assert "--credit time: for --method grpo --task tts only" in caplog.text


def test_it_has_a_scale_of_its_own(caplog):
    with pytest.raises(SystemExit):
        train.parse_args([*FLAGS.split(), "--credit", "time", "--scale_rewards", "batch", "--output_dir", "x"])
    assert "--scale_rewards batch: --credit time normalises each reward by its group's deviation" in caplog.text
